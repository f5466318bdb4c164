// Demo boots a virtual machine with a key in an SMBIOS OEM string, and shows how it reaches a service. Then the host
// changes the key under the running service, sees a bad one rolled back, and pushes another key that a service waits for.
// A second machine gets no secret at its boot but the host's address, and asks there for its key. Each step is checked:
// the program fails where what it shows is not so.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/guestagent/guestagent/tests/vm"
)

const (
	// The services that the keys are for. They know nothing of guestagent, but for the path of a socket.
	demoUnit = `[Unit]
Description=A service that needs an API key

[Service]
Type=notify
NotifyAccess=all
LoadCredential=api-key
ExecStart=/usr/local/bin/use-key api-key

[Install]
WantedBy=multi-user.target
`
	signerUnit = `[Unit]
Description=A service that waits for its key
After=guestagent-credentials.socket

[Service]
Type=notify
NotifyAccess=all
LoadCredential=signing-key:/run/guestagent/credentials.sock
ExecStartPre=/usr/bin/test -s ${CREDENTIALS_DIRECTORY}/signing-key
ExecStart=/usr/local/bin/use-key signing-key
`
	// useKey is what they run.
	useKey = `#!/bin/sh
# It says which key it has, and is ready. What is wrong with a key it notices only at work.
key=$CREDENTIALS_DIRECTORY/$1
echo "$1 has SHA-256 $(sha256sum <"$key" | cut -c -16)"
systemd-notify --ready
sleep 2
grep -q ^key- "$key" || { echo "$1 is no key: it does not begin with key-"; exit 1; }
exec sleep infinity
`
)

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
	d := demo{out: out}
	release := vm.Releases()[1]
	d.say("Building a guest with Debian %s (once; it is kept for the next time)", release.Name)
	image, err := vm.BuildImage(ctx, release, out)
	if err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "guestagent-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()
	cfg := vm.Config{Image: image, Console: out}
	if cfg.Overlay, err = vm.Installed(ctx, d.dir); err != nil {
		return err
	}
	cfg.Overlay = append(
		cfg.Overlay,
		vm.File{Path: "/usr/local/bin/use-key", Mode: 0o755, Content: []byte(useKey)},
		// The device that stands in for vhost-vsock here chooses the port by itself.
		vm.File{Path: "/etc/guestagent/config.json", Content: []byte(`{"peer": {"privilegedPort": "ignored"}}`)},
	)

	// What cannot be fetched today costs all but the first part.
	program, vsockErr := vm.VhostDeviceVsock(ctx, out)
	if vsockErr == nil {
		cfg.Vsock = &vm.VsockConfig{Program: program}
		if err := vm.BuildBinary(ctx, "github.com/guestagent/guestagent/cmd/guestctl", filepath.Join(d.dir, "guestctl")); err != nil {
			return err
		}
	}
	if err := d.hand(ctx, cfg); err != nil {
		return err
	}
	if vsockErr != nil {
		d.say("There is no vsock for the rest: %v", vsockErr)
		return nil
	}
	return d.pull(ctx, cfg)
}

// hand boots a guest with a key in an OEM string, and changes that while it runs.
func (d *demo) hand(ctx context.Context, cfg vm.Config) (err error) {
	cfg.Overlay = slices.Concat(cfg.Overlay, wanted("demo.service", demoUnit), []vm.File{
		{Path: "/etc/systemd/system/signer.service", Content: []byte(signerUnit)},
	})
	key := newKey()
	cfg.OEMStrings = vm.OEM(
		"io.guestagent.credential:api-key="+key,
		"io.guestagent.credential.binary:certificate=not base64",
	)
	d.say("Booting it with two OEM strings: io.guestagent.credential:api-key=…, and one with a mistake in it")
	if err := d.boot(ctx, cfg); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.guest.Close()) }()
	if err := d.booted(ctx, key); err != nil || cfg.Vsock == nil {
		return err
	}
	return d.live(ctx, key)
}

// booted shows how a key of the boot reached a service.
func (d *demo) booted(ctx context.Context, key string) error {
	for _, command := range []string{
		"systemctl cat demo.service",
		"cat /usr/local/bin/use-key",
		"systemctl status --no-pager --lines=0 demo.service",
		"guestagent status",
		"findmnt /run/credstore",
	} {
		if err := d.inGuest(ctx, command); err != nil {
			return err
		}
	}
	const command = "systemd-analyze security --no-pager guestagent-import.service"
	d.say("In the guest: %s | tail -n1", command)
	text, err := d.run(ctx, command)
	if err != nil {
		return err
	}
	text = bytes.TrimSpace(text)
	fmt.Fprintf(d.out, "%s\n", text[bytes.LastIndexByte(text, '\n')+1:])

	if err := d.journal(ctx, "demo.service", has("api-key", key)); err != nil {
		return err
	}
	d.say("The service has the key that the host made: both say SHA-256 %s", digest(key))
	return nil
}
