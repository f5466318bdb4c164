// Demo boots a virtual machine with a secret in an SMBIOS OEM string, and shows how it reaches a service. Then it pushes
// another one into the running machine.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/guestagent/guestagent/tests/vm"
)

// The service that the secret is for. It knows nothing of guestagent.
const unit = `[Unit]
Description=A service that needs an API key

[Service]
Type=oneshot
RemainAfterExit=yes
LoadCredential=api-key
ExecStart=/bin/sh -c 'sha256sum < $${CREDENTIALS_DIRECTORY}/api-key'

[Install]
WantedBy=multi-user.target
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer) (err error) {
	say := func(format string, a ...any) { fmt.Fprintf(out, "\n==> "+format+"\n", a...) }
	release := vm.Releases()[1]
	say("Building a guest with Debian %s (once; it is kept for the next time)", release.Name)
	image, err := vm.BuildImage(ctx, release, out)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "guestagent-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	overlay, err := vm.Installed(ctx, dir)
	if err != nil {
		return err
	}
	overlay = append(
		overlay,
		vm.File{Path: "/etc/systemd/system/demo.service", Content: []byte(unit)},
		vm.File{Path: "/etc/systemd/system/multi-user.target.wants/demo.service", Symlink: "../demo.service"},
		// The device that stands in for vhost-vsock here chooses the port by itself.
		vm.File{Path: "/etc/guestagent/config.json", Content: []byte(`{"peer": {"privilegedPort": "ignored"}}`)},
	)

	// What cannot be fetched today costs the second half only.
	var vsock *vm.VsockConfig
	program, vsockErr := vm.VhostDeviceVsock(ctx, out)
	if vsockErr == nil {
		vsock = &vm.VsockConfig{Program: program}
	}

	key := make([]byte, 16)
	_, _ = rand.Read(key) // never fails
	text := fmt.Sprintf("%x", key)
	say("Booting it with three OEM strings: io.guestagent.credential:api-key=…, and two with mistakes in them")
	m, err := vm.Boot(ctx, vm.Config{
		Image:   image,
		Overlay: overlay,
		Console: out,
		Vsock:   vsock,
		OEMStrings: vm.OEM(
			"io.guestagent.credential:api-key="+text,
			"io.guestagent.credential.binary:certificate=not base64",
			"io.guestagent.credental:misspelt=…",
		),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()

	for _, command := range []string{
		"systemctl cat demo.service",
		"systemctl status --no-pager --lines=3 demo.service",
		"guestagent status",
		"findmnt /run/credstore",
		"systemd-analyze security --no-pager guestagent-import.service",
	} {
		say("In the guest: %s", command)
		res, err := m.Run(ctx, strings.Fields(command)...)
		if err != nil {
			return err
		}
		stdout := res.Stdout
		if strings.HasPrefix(command, "systemd-analyze") {
			stdout = stdout[bytes.LastIndexByte(bytes.TrimSpace(stdout), '\n')+1:]
		}
		_, _ = out.Write(append(stdout, res.Stderr...))
	}

	sum := fmt.Sprintf("%x", sha256.Sum256([]byte(text)))
	res, err := m.Run(ctx, "journalctl", "--output=cat", "--unit=demo.service")
	if err != nil {
		return err
	}
	if !bytes.Contains(res.Stdout, []byte(sum)) {
		return fmt.Errorf("the service did not get the key: its journal says %q", res.Stdout)
	}
	say("The service has the key that the host made: both say SHA-256 %s…", sum[:16])
	if vsock == nil {
		say("There is no vsock to push by: %v", vsockErr)
		return nil
	}
	return push(ctx, out, m, dir)
}

// push shows the other half: the host changes a running guest.
func push(ctx context.Context, out io.Writer, m *vm.Machine, dir string) error {
	ctl := filepath.Join(dir, "guestctl")
	if err := vm.BuildBinary(ctx, "github.com/guestagent/guestagent/cmd/guestctl", ctl); err != nil {
		return err
	}
	file := filepath.Join(dir, "db-password")
	if err := os.WriteFile(file, []byte("not a real one"), 0o600); err != nil {
		return err
	}
	target := "vsock-mux:" + m.VsockPath()
	for _, args := range [][]string{
		{"push", target, "--revision=2", "db-password:" + file},
		{"list", target},
	} {
		fmt.Fprintf(out, "\n==> On the host: guestctl %s\n", strings.Join(args, " "))
		cmd := exec.CommandContext(ctx, ctl, args...)
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("running guestctl: %w", err)
		}
	}
	command := "systemd-run --quiet --wait --pipe --property=LoadCredential=db-password sh -c 'wc -c < $CREDENTIALS_DIRECTORY/db-password'"
	fmt.Fprintf(out, "\n==> In the guest, a service that starts now: %s\n", command)
	res, err := m.Run(ctx, "sh", "-c", command)
	if err != nil {
		return err
	}
	_, _ = out.Write(append(res.Stdout, res.Stderr...))
	if strings.TrimSpace(string(res.Stdout)) != "14" {
		return errors.New("the service did not get what was pushed")
	}
	return nil
}
