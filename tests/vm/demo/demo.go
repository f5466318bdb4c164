package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// waitLimit bounds how long it may take until a service waits, pollEvery is how often the guest is asked for it.
	waitLimit = time.Minute
	pollEvery = 200 * time.Millisecond
)

// A demo is a running guest, and what the host has for its guests.
type demo struct {
	out   io.Writer
	guest *vm.Machine
	dir   string // the host's files; guestctl runs in it
}

func (d *demo) say(format string, a ...any) { fmt.Fprintf(d.out, "\n==> "+format+"\n", a...) }

// boot boots a guest, which the caller closes.
func (d *demo) boot(ctx context.Context, cfg vm.Config) (err error) {
	if d.guest, err = vm.Boot(ctx, cfg); err != nil {
		return err
	}
	// From here on the console is quiet: it shares the output with us.
	if _, err = d.run(ctx, "dmesg --console-level=err"); err != nil {
		return errors.Join(err, d.guest.Close())
	}
	return nil
}

// wanted is a unit that the boot starts.
func wanted(name, unit string) []vm.File {
	return []vm.File{
		{Path: "/etc/systemd/system/" + name, Content: []byte(unit)},
		{Path: "/etc/systemd/system/multi-user.target.wants/" + name, Symlink: "../" + name},
	}
}

// run runs a command in the guest, which has to succeed, and returns what it wrote.
func (d *demo) run(ctx context.Context, command string) ([]byte, error) {
	res, err := d.guest.Run(ctx, strings.Fields(command)...)
	if err == nil && res.ExitCode != 0 {
		err = fmt.Errorf("running %q in the guest: exit status %d: %s", command, res.ExitCode, bytes.TrimSpace(res.Stderr))
	}
	return append(res.Stdout, res.Stderr...), err
}

// inGuest shows a command of the guest, and what it writes.
func (d *demo) inGuest(ctx context.Context, command string) error {
	d.say("In the guest: %s", command)
	text, err := d.run(ctx, command)
	_, _ = d.out.Write(text)
	return err
}

// shows is inGuest for a command that has to write the lines.
func (d *demo) shows(ctx context.Context, command string, lines ...string) error {
	d.say("In the guest: %s", command)
	text, err := d.run(ctx, command)
	_, _ = d.out.Write(text)
	if err != nil {
		return err
	}
	if want := strings.Join(lines, "\n") + "\n"; string(text) != want {
		return fmt.Errorf("running %q in the guest: it wrote %q, want %q", command, text, want)
	}
	return nil
}

// journal shows all that a service has said, which has to be the lines.
func (d *demo) journal(ctx context.Context, unit string, lines ...string) error {
	if _, err := d.run(ctx, "journalctl --sync"); err != nil {
		return err
	}
	return d.shows(ctx, "journalctl --no-pager --output=cat --identifier=use-key --unit="+unit, lines...)
}

// onHost shows guestctl, and what it writes. It has to end with the exit status.
func (d *demo) onHost(ctx context.Context, status int, args ...string) error {
	cmd := d.guestctl(ctx, args...)
	cmd.Stdout, cmd.Stderr = d.out, d.out
	d.say("On the host: guestctl %s", strings.Join(cmd.Args[1:], " "))
	err := cmd.Run()
	if cmd.ProcessState == nil {
		return fmt.Errorf("running guestctl: %w", err)
	}
	if got := cmd.ProcessState.ExitCode(); got != status {
		return fmt.Errorf("running guestctl %s: exit status %d, want %d", args[0], got, status)
	}
	if status != host.StatusDone {
		fmt.Fprintf(d.out, "(exit status %d)\n", status)
	}
	return nil
}

// guestctl returns a call of guestctl, which finds the guest in our folder.
func (d *demo) guestctl(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(d.dir, "guestctl"), append(args, "--vms=vms")...)
	cmd.Dir = d.dir
	return cmd
}

// list shows guestctl list. A unit has to run with a credential's value in force, of that revision.
func (d *demo) list(ctx context.Context, name, revision, unit string) (host.Result, error) {
	if err := d.onHost(ctx, host.StatusDone, "list", "web"); err != nil {
		return host.Result{}, err
	}
	list, err := d.readList(ctx)
	if err != nil {
		return host.Result{}, err
	}
	for _, e := range list.Entries {
		for _, c := range e.Consumers {
			if e.Name == name && e.Revision == revision && c.Unit == unit && c.ActiveState == "active" && c.Loaded == vsockrpc.LoadedInForce && !c.Stale {
				return list, nil
			}
		}
	}
	return host.Result{}, fmt.Errorf("listing the guest: %s does not run with revision %s of %s: %+v", unit, revision, name, list.Entries)
}

// readList is guestctl list for a program.
func (d *demo) readList(ctx context.Context) (host.Result, error) {
	var list host.Result
	out, err := d.guestctl(ctx, "list", "web", "--json").Output()
	if err == nil {
		err = json.Unmarshal(out, &list)
	}
	if err != nil {
		return host.Result{}, fmt.Errorf("listing the guest: %w: %s", err, bytes.TrimSpace(out))
	}
	return list, nil
}

// waiting returns when the guest says that a unit waits for a credential. started gets the result of a start that does
// not wait.
func (d *demo) waiting(ctx context.Context, unit, name string, started <-chan error) error {
	ctx, cancel := context.WithTimeout(ctx, waitLimit)
	defer cancel()
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		list, err := d.readList(ctx)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(list.Waiting, func(w vsockrpc.Waiting) bool { return w.Unit == unit && w.Name == name }) {
			return nil
		}
		select {
		case err := <-started:
			return errors.Join(fmt.Errorf("starting %s: it does not wait for %s", unit, name), err)
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s waits for %s: %w", unit, name, context.Cause(ctx))
		case <-ticker.C:
		}
	}
}

// newKey makes a key that the services take.
func newKey() string { return "key-" + rand.Text() }

// has is what a service says of its key.
func has(name, key string) string { return name + " has SHA-256 " + digest(key) }

// digest is the part of a key's SHA-256 that is shown.
func digest(key string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(key)))[:16] }
