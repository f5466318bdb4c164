package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/internal/canary"
)

const (
	// pullUnit is a service that starts when the host has handed over its key.
	pullUnit = `[Unit]
Description=A service that starts once the host's credentials are there
After=guestagent-credentials.target

[Service]
Type=notify
NotifyAccess=all
LoadCredential=db-key
ExecStart=/usr/local/bin/use-key db-key

[Install]
WantedBy=multi-user.target
`
	// told is all that the guest gets at its boot.
	told = "io.guestagent.provider:vsock:2:1021"
	// width is how long the lines of a command line are.
	width = 120
)

// pull boots a guest that gets nothing but the host's address, and asks there for its key.
func (d *demo) pull(ctx context.Context, cfg vm.Config) (err error) {
	key, next := newKey(), newKey()
	cfg.Vsock.Path = filepath.Join(d.dir, "vm", "vsock")
	for _, dir := range []string{"vm", "keys"} {
		if err := os.Mkdir(filepath.Join(d.dir, dir), 0o700); err != nil {
			return err
		}
	}
	if err := d.replace("db-key", key); err != nil {
		return err
	}
	d.say("A second guest gets no secret from its VMM, only the address of the host. There its key is in keys/db-key, with SHA-256 %s", digest(key))
	p, err := d.provide(ctx, "--listen-mux="+cfg.Vsock.Path, "--dir=keys", "--refresh=auto")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.end()) }()

	d.say("Booting that guest with one OEM string: %s", told)
	cfg.Overlay = slices.Concat(cfg.Overlay, wanted("db.service", pullUnit))
	cfg.OEMStrings = vm.OEM(told)
	if err := d.boot(ctx, cfg); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.guest.Close()) }()
	d.say("The provider tells the service manager:")
	if err := p.until(ctx, handingOver, inForce); err != nil {
		return err
	}
	if err := d.pulled(ctx, key); err != nil {
		return err
	}
	if err := d.search(key, cfg.Vsock.Path); err != nil {
		return err
	}

	d.say("On the host another file takes the place of keys/db-key. The provider notices:")
	if err := d.replace("db-key", next); err != nil {
		return err
	}
	if err := p.until(ctx, handingOver, inForce); err != nil {
		return err
	}
	if err := d.journal(ctx, "db.service", has("db-key", key), has("db-key", next)); err != nil {
		return err
	}
	d.say("The service runs with the new key: both say SHA-256 %s", digest(next))
	return nil
}

// pulled shows how the guest was told of the host, and that its service has the key.
func (d *demo) pulled(ctx context.Context, key string) error {
	if err := d.shows(ctx, `grep --text --only-matching io\.guestagent[[:graph:]]* /sys/firmware/dmi/tables/DMI`, told); err != nil {
		return err
	}
	for _, command := range []string{"systemctl cat db.service", "guestagent status"} {
		if err := d.inGuest(ctx, command); err != nil {
			return err
		}
	}
	if err := d.journal(ctx, "db.service", has("db-key", key)); err != nil {
		return err
	}
	d.say("The service came after its key, and has the one of the host: both say SHA-256 %s", digest(key))
	return nil
}

// replace puts a key into the provider's folder as one should: never half of it is there.
func (d *demo) replace(name, key string) error {
	file := filepath.Join(d.dir, "keys", name)
	next := filepath.Join(d.dir, "next")
	if err := os.WriteFile(next, []byte(key), 0o600); err != nil {
		return err
	}
	return os.Rename(next, file)
}

// search looks for the key in the command lines and environments of all processes that we started, and shows the VMM's.
// socket is in some of them.
func (d *demo) search(key, socket string) error {
	find := func(what string) ([]string, error) {
		return canary.ScanProcesses("/proc", os.Getpid(), canary.Forms([]byte(what)))
	}
	if found, err := find(key); err != nil || len(found) > 0 {
		return errors.Join(fmt.Errorf("looking for the key: it is in %q", found), err)
	}
	// Who finds nothing at all has not looked.
	found, err := find(socket)
	if err != nil || len(found) == 0 {
		return errors.Join(fmt.Errorf("looking for %s: it is in %q, want that of the provider at least", socket, found), err)
	}
	started, err := children()
	if err != nil {
		return err
	}
	vmm := false
	var names []string
	for _, args := range started {
		name := filepath.Base(args[0])
		names = append(names, name)
		if strings.HasPrefix(name, "qemu-system-") {
			vmm = true
			d.say("On the host: the VMM's whole command line, with … for %s", d.guest.Artifacts())
			d.commandLine(args, d.guest.Artifacts())
		}
	}
	if !vmm {
		return fmt.Errorf("looking for QEMU among our processes: there are only %q", names)
	}
	slices.Sort(names)
	d.say("No secret in %d command lines and environments: this program's, and those of %s", len(started)+1, strings.Join(names, ", "))
	fmt.Fprintf(d.out, "(neither plain nor encoded; the same search finds the path of the vsock socket in %d)\n", len(found))
	return nil
}

// commandLine shows a command line with its options, in several lines, and without the path of its folder.
func (d *demo) commandLine(args []string, dir string) {
	var options []string
	for _, arg := range args {
		if strings.Contains(arg, " ") {
			arg = "'" + arg + "'"
		}
		if n := len(options); n > 0 && strings.HasPrefix(options[n-1], "-") && !strings.HasPrefix(arg, "-") {
			options[n-1] += " " + arg
			continue
		}
		options = append(options, arg)
	}
	line := ""
	for _, option := range options {
		option = strings.ReplaceAll(option, dir, "…")
		if line != "" && len(line)+len(option) > width {
			fmt.Fprintln(d.out, line+" \\")
			line = "   "
		}
		if line != "" {
			line += " "
		}
		line += option
	}
	fmt.Fprintln(d.out, line)
}

// children returns the arguments of the processes that this one started.
func children() ([][]string, error) {
	names, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		return nil, err
	}
	var all [][]string
	for _, name := range names {
		// What cannot be read has ended.
		status, err := os.ReadFile(name)
		if err != nil || !bytes.Contains(status, []byte("\nPPid:\t"+strconv.Itoa(os.Getpid())+"\n")) {
			continue
		}
		if line, err := os.ReadFile(filepath.Join(filepath.Dir(name), "cmdline")); err == nil && len(line) > 0 {
			all = append(all, strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00"))
		}
	}
	return all, nil
}
