package main

import (
	"net"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"github.com/guestagent/guestagent/internal/host/hosttest"
	"github.com/guestagent/guestagent/vsockrpc"
)

func TestAsBridge(t *testing.T) {
	for _, tt := range []struct{ argv, want []string }{
		{[]string{"guestctl", "list"}, []string{"list"}},
		{[]string{"/usr/lib/systemd/varlink-bridges/vsock", "vsock:3:1022"}, []string{"bridge", "vsock:3:1022"}},
		{[]string{"vsock-mux", "vsock-mux:/x"}, []string{"bridge", "vsock-mux:/x"}},
		{[]string{"guestctl"}, nil},
		{nil, nil},
	} {
		if got := asBridge(tt.argv); !slices.Equal(got, tt.want) {
			t.Errorf("asBridge(%q) = %q, want %q", tt.argv, got, tt.want)
		}
	}
}

// The program, run as systemd runs a bridge, carries a client's calls.
func TestBridge(t *testing.T) {
	guest, err := hosttest.Start(t.TempDir(), "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(guest.Close)

	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	syscall.CloseOnExec(pair[0]) // the bridge must not hold our end open
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "unix:"+guest.Socket)
	cmd.Args[0] = "vsock"
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	_ = ours.Close()
	client := vsockrpc.NewClient(conn, 0)
	if _, err := (vsockrpc.Credentials{Client: client}).List(t.Context()); err != nil {
		t.Errorf("List through the bridge: %v", err)
	}
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the bridge: %v", err)
	}
}
