// Package agent puts the guest's side together: it decides what is read, in
// which order, and what comes of it. The rooms it uses (smbios, credstore) have
// no policy of their own and do not know each other.
//
// It trusts root in the guest and, but in a confidential VM, the host. It does
// not trust what it reads: OEM strings, configuration, and what other programs
// left in its folders are checked by the room that reads them.
package agent

import (
	"cmp"
	"context"
	"path/filepath"

	"github.com/guestagent/guestagent/credstore"
)

// Paths of the guest, below the root.
const (
	pathConfig      = "etc/guestagent/config.json"
	pathCmdline     = "proc/cmdline"
	pathBootID      = "proc/sys/kernel/random/boot_id"
	pathStore       = "run/credstore"
	pathSystem      = "run/credentials/@system"
	pathPID1Socket  = "run/systemd/private"
	pathSevGuest    = "sys/devices/platform/sev-guest"
	pathTDXGuest    = "sys/class/misc/tdx_guest"
	hintImport      = "systemctl restart guestagent-import.service"
	hintCheckConfig = "guestagent check-config"
)

// An Agent is one guest. The zero value is the guest that this process runs in.
type Agent struct {
	// Version is this program's version, for reports.
	Version string
	// Root is the folder below which every path is looked up; "/" where empty.
	Root string
	// SystemCredentials is where this process sees the credentials that PID 1
	// took; /run/credentials/@system below Root where empty. A sandboxed
	// service does not see that folder and has it bound elsewhere.
	SystemCredentials string

	// confidential asks whether this is a confidential VM. Tests set it.
	confidential func(context.Context) (string, error)
}

func (a *Agent) path(p string) string { return filepath.Join(cmp.Or(a.Root, "/"), p) }

// systemPlace is PID 1's folder: where to look, and what everybody else calls it.
func (a *Agent) systemPlace() credstore.Place {
	as := a.path(pathSystem)
	return credstore.Place{Dir: cmp.Or(a.SystemCredentials, as), As: as}
}

// store is the guest's credential store, with the folders that systemd
// searches besides it (systemd.exec(5), "Credentials").
func (a *Agent) store() *credstore.Store {
	place := func(p string) credstore.Place { return credstore.Place{Dir: a.path(p)} }
	return credstore.New(credstore.Config{
		Dir:       a.path(pathStore),
		Shadowing: []credstore.Place{a.systemPlace(), place("etc/credstore")},
		Encrypted: []credstore.Place{
			place("run/credentials/@encrypted"), place("etc/credstore.encrypted"), place("run/credstore.encrypted"),
			place("usr/local/lib/credstore.encrypted"), place("usr/lib/credstore.encrypted"),
		},
	})
}
