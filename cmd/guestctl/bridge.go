package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/guestagent/guestagent/vsockrpc"
)

// bridgeFD is where systemd hands over the socket: the first of the LISTEN_FDS.
const bridgeFD = 3

// bridgeNames are the schemes that systemd runs a program of the same name for,
// from /usr/lib/systemd/varlink-bridges.
var bridgeNames = []string{string(vsockrpc.SchemeVsock), string(vsockrpc.SchemeMux)}

// asBridge are the arguments of a program that was called by the name of a
// scheme, as systemd does it.
func asBridge(argv []string) []string {
	if len(argv) > 0 && slices.Contains(bridgeNames, filepath.Base(argv[0])) {
		return append([]string{"bridge"}, argv[1:]...)
	}
	return argv[min(1, len(argv)):]
}

// bridge lets systemd's Varlink clients talk to a guest: from version 260 on,
// varlinkctl call vsock:3:1022 … runs /usr/lib/systemd/varlink-bridges/vsock
// with the address as its argument and a connected socket as descriptor 3.
func (p *program) bridge() *cobra.Command {
	return &cobra.Command{
		Use:   "bridge TARGET",
		Short: "Connect systemd's Varlink clients to a guest",
		Long: `bridge copies between a connected socket that systemd hands over as descriptor 3
and a guest. Link it as /usr/lib/systemd/varlink-bridges/vsock and vsock-mux; then,
with systemd 260 and later, varlinkctl takes the same targets as guestctl.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(cmd, "bridge takes one target")
			}
			target, err := vsockrpc.ParseTarget(args[0])
			if err != nil {
				return usage(cmd, err.Error())
			}
			f := os.NewFile(bridgeFD, "the socket from systemd")
			client, err := net.FileConn(f)
			if err != nil {
				return fmt.Errorf("taking over descriptor %d: %w; systemd runs this, with a socket there", bridgeFD, err)
			}
			_ = f.Close()
			defer client.Close()
			ctx, cancel := context.WithTimeout(cmd.Context(), p.timeout)
			guest, err := vsockrpc.Dialer{}.DialConn(ctx, target)
			cancel()
			if err != nil {
				return err
			}
			defer guest.Close()
			return splice(cmd.Context(), client, guest)
		},
	}
}

// splice copies both ways until one side ends, or ctx does. It closes both
// then, and hands on neither half: a vsock device may take half for whole.
func splice(ctx context.Context, client, guest net.Conn) error {
	defer context.AfterFunc(ctx, func() {
		_ = client.Close()
		_ = guest.Close()
	})()
	done := make(chan error, 2)
	pass := func(to, from net.Conn) {
		_, err := io.Copy(to, from)
		_ = to.Close()
		_ = from.Close()
		done <- err
	}
	go pass(guest, client)
	go pass(client, guest)
	first, second := <-done, <-done
	for _, err := range []error{first, second} {
		if err != nil && !errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("copying between systemd and the guest: %w", err)
		}
	}
	return nil
}
