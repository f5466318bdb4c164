// Demo boots a virtual machine with a key in an SMBIOS OEM string, and shows how it reaches a service. Then the host
// changes the key under the running service, sees a bad one rolled back, and pushes another key that a service waits for.
// Each step is checked: the program fails where what it shows is not so.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
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
	overlay, err := vm.Installed(ctx, d.dir)
	if err != nil {
		return err
	}
	overlay = append(
		overlay,
		vm.File{Path: "/usr/local/bin/use-key", Mode: 0o755, Content: []byte(useKey)},
		vm.File{Path: "/etc/systemd/system/demo.service", Content: []byte(demoUnit)},
		vm.File{Path: "/etc/systemd/system/multi-user.target.wants/demo.service", Symlink: "../demo.service"},
		vm.File{Path: "/etc/systemd/system/signer.service", Content: []byte(signerUnit)},
		// The device that stands in for vhost-vsock here chooses the port by itself.
		vm.File{Path: "/etc/guestagent/config.json", Content: []byte(`{"peer": {"privilegedPort": "ignored"}}`)},
	)

	// What cannot be fetched today costs the second half only.
	var vsock *vm.VsockConfig
	program, vsockErr := vm.VhostDeviceVsock(ctx, out)
	if vsockErr == nil {
		vsock = &vm.VsockConfig{Program: program}
	}

	key := newKey()
	d.say("Booting it with two OEM strings: io.guestagent.credential:api-key=…, and one with a mistake in it")
	d.guest, err = vm.Boot(ctx, vm.Config{
		Image:   image,
		Overlay: overlay,
		Console: out,
		Vsock:   vsock,
		OEMStrings: vm.OEM(
			"io.guestagent.credential:api-key="+key,
			"io.guestagent.credential.binary:certificate=not base64",
		),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.guest.Close()) }()

	if err := d.booted(ctx, key); err != nil {
		return err
	}
	if vsock == nil {
		d.say("There is no vsock to push by: %v", vsockErr)
		return nil
	}
	return d.live(ctx, key)
}

// booted shows how a key of the boot reached a service.
func (d *demo) booted(ctx context.Context, key string) error {
	// From here on the console is quiet: it shares the output with us.
	if _, err := d.run(ctx, "dmesg --console-level=err"); err != nil {
		return err
	}
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
