// Package agent puts the guest's side together: it decides what is read, in
// which order, and what comes of it. The rooms it uses (smbios, credstore,
// consumer, credsocket, vsockrpc) have no policy of their own and do not know
// each other.
//
// It trusts root in the guest and, but in a confidential VM, the host. It does
// not trust what it reads: OEM strings, configuration, and what other programs
// left in its folders are checked by the room that reads them.
package agent

import (
	"cmp"
	"context"
	"path/filepath"

	"github.com/coreos/go-systemd/v22/journal"

	"github.com/guestagent/guestagent/credstore"
)

// Paths of the guest, below the root.
const (
	pathConfig      = "etc/guestagent/config.json"
	pathCmdline     = "proc/cmdline"
	pathBootID      = "proc/sys/kernel/random/boot_id"
	pathStore       = "run/credstore"
	pathCredentials = "run/credentials"
	pathLocalSocket = "run/guestagent/varlink.sock"
	// Where units load credentials from, and where the credentials that units
	// have are bound to in a sandbox, which does not see /run/credentials.
	pathCredentialsSocket = "run/guestagent/credentials.sock"
	pathLoaded            = "run/guestagent/loaded"
	pathPID1Socket        = "run/systemd/private"
	pathSevGuest          = "sys/devices/platform/sev-guest"
	pathTDXGuest          = "sys/class/misc/tdx_guest"
	hintImport            = "systemctl restart guestagent-import.service"
	hintCheckConfig       = "guestagent check-config"
	hintPull              = "systemctl status guestagent-pull.service"
	pathMachineID         = "etc/machine-id"
)

// An Agent is one guest. The zero value is the guest that this process runs in.
type Agent struct {
	// Version is this program's version, for reports.
	Version string
	// Root is the folder below which every path is looked up; "/" where empty.
	Root string
	// PID1Credentials is a folder whose system and encrypted stand for
	// /run/credentials/@system and @encrypted. A sandboxed service does not see
	// those, since systemd masks /run/credentials, and has them bound elsewhere;
	// what is missing there, PID 1 does not have.
	PID1Credentials string

	// confidential asks whether this is a confidential VM. Tests set it.
	confidential func(context.Context) (string, error)
	// dialSystemd connects to PID 1. Tests set it.
	dialSystemd func(context.Context) (systemd, error)
	// sendJournal leaves a line in the journal. Tests set it.
	sendJournal func(message string, priority journal.Priority, vars map[string]string) error
}

func (a *Agent) path(p string) string { return filepath.Join(cmp.Or(a.Root, "/"), p) }

// pid1Place is a folder of PID 1's, system or encrypted: where to look, and
// what everybody else calls it.
func (a *Agent) pid1Place(name string) credstore.Place {
	p := credstore.Place{Dir: a.path(pathCredentials + "/@" + name)}
	if a.PID1Credentials != "" {
		p.Dir, p.As = filepath.Join(a.PID1Credentials, name), p.Dir
	}
	return p
}

// store is the guest's credential store, with the folders that systemd
// searches besides it (systemd.exec(5), "Credentials").
func (a *Agent) store() *credstore.Store {
	place := func(p string) credstore.Place { return credstore.Place{Dir: a.path(p)} }
	return credstore.New(credstore.Config{
		Dir:       a.path(pathStore),
		Shadowing: a.shadowing(),
		Encrypted: []credstore.Place{
			a.pid1Place("encrypted"), place("etc/credstore.encrypted"), place("run/credstore.encrypted"),
			place("usr/local/lib/credstore.encrypted"), place("usr/lib/credstore.encrypted"),
		},
	})
}

// shadowing are the folders that systemd searches before the store.
func (a *Agent) shadowing() []credstore.Place {
	return []credstore.Place{a.pid1Place("system"), {Dir: a.path("etc/credstore")}}
}
