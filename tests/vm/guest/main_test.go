//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/guestagent/guestagent/tests/vm/internal/wire"
)

// dial starts the server on a pipe and returns the host's side, after the greeting.
func dial(t *testing.T) net.Conn {
	t.Helper()
	host, guest := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- serve(t.Context(), guest) }()
	t.Cleanup(func() {
		_ = host.Close()
		if err := <-done; !errors.Is(err, io.EOF) {
			t.Errorf("serve = %v, want %v", err, io.EOF)
		}
	})
	if m := receive(t, host); m.Op != wire.OpHello {
		t.Fatalf("first message is %q, want %q", m.Op, wire.OpHello)
	}
	return host
}

func send(t *testing.T, conn net.Conn, m *wire.Message) {
	t.Helper()
	if err := wire.Write(conn, m); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, conn net.Conn) *wire.Message {
	t.Helper()
	m, err := wire.Read(conn)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestRun(t *testing.T) {
	conn := dial(t)
	for _, tt := range []struct {
		name           string
		in             wire.Message
		stdout, stderr string
		exit, signal   int
	}{
		{
			"all",
			wire.Message{
				Argv: []string{"sh", "-c", "cat; echo $A $HOME $LEAK >&2; pwd; exit 3"},
				Env:  []string{"A=b"}, Dir: "/usr", Body: []byte("in\x00\n"),
			},
			"in\x00\n/usr\n", "b /root\n", 3, 0,
		},
		{"signal", wire.Message{Argv: []string{"sh", "-c", "kill -KILL $$"}}, "", "", 137, 9},
		{"nothing", wire.Message{Argv: []string{"true"}}, "", "", 0, 0},
	} {
		t.Setenv("LEAK", "leak")
		tt.in.ID, tt.in.Op = 7, wire.OpRun
		send(t, conn, &tt.in)
		got := receive(t, conn)
		stdout, stderr := string(got.Body[:got.Stdout]), string(got.Body[got.Stdout:])
		if got.ID != 7 || got.Op != wire.OpResult || got.Error != "" || stdout != tt.stdout || stderr != tt.stderr ||
			got.ExitCode != tt.exit || got.Signal != tt.signal {
			t.Errorf("%s: answer = %+v", tt.name, got)
		}
	}
}

func TestRunFailures(t *testing.T) {
	conn := dial(t)
	for name, tt := range map[string]struct {
		in    wire.Message
		errno syscall.Errno
		text  string
	}{
		"missing":      {wire.Message{Op: wire.OpRun, Argv: []string{"/no/such"}}, syscall.ENOENT, "/no/such"},
		"no program":   {wire.Message{Op: wire.OpRun}, 0, "no program"},
		"too much":     {wire.Message{Op: wire.OpRun, Argv: []string{"cat", "/dev/zero"}}, 0, "standard output is larger"},
		"no operation": {wire.Message{Op: "dance"}, 0, "dance"},
		"missing file": {wire.Message{Op: wire.OpRead, Path: "/no/such"}, syscall.ENOENT, "/no/such"},
		"endless file": {wire.Message{Op: wire.OpRead, Path: "/dev/zero"}, 0, "larger"},
	} {
		send(t, conn, &tt.in)
		got := receive(t, conn)
		if got.Errno != int(tt.errno) || !strings.Contains(got.Error, tt.text) || len(got.Body) != 0 {
			t.Errorf("%s: answer = %q, %d, want %q, %d", name, got.Error, got.Errno, tt.text, tt.errno)
		}
	}
}

func TestKill(t *testing.T) {
	conn := dial(t)
	send(t, conn, &wire.Message{ID: 1, Op: wire.OpRun, Argv: []string{"sh", "-c", "sleep 1000 & wait"}})
	// Others are served meanwhile.
	send(t, conn, &wire.Message{ID: 2, Op: wire.OpRun, Argv: []string{"true"}})
	if got := receive(t, conn); got.ID != 2 {
		t.Fatalf("first answer is for %d, want 2", got.ID)
	}
	send(t, conn, &wire.Message{ID: 3, Op: wire.OpKill})
	send(t, conn, &wire.Message{ID: 1, Op: wire.OpKill})
	if got := receive(t, conn); got.ID != 1 || (got.Signal != 9 && got.Error == "") {
		t.Errorf("answer = %+v, want one for 1 that was killed", got)
	}
}

func TestFiles(t *testing.T) {
	conn := dial(t)
	path := filepath.Join(t.TempDir(), "new", "file")
	want := bytes.Repeat([]byte("\x00\xff"), 1000)
	for range 2 {
		send(t, conn, &wire.Message{Op: wire.OpWrite, Path: path, Mode: 0o751, Body: want})
		if got := receive(t, conn); got.Error != "" {
			t.Fatal(got.Error)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o751 {
		t.Errorf("Stat = %v, %v, want 0751", info, err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("ReadDir = %v, %v, want the file alone", entries, err)
	}
	send(t, conn, &wire.Message{Op: wire.OpRead, Path: path})
	if got := receive(t, conn); !bytes.Equal(got.Body, want) {
		t.Errorf("read = %d bytes, want the %d written", len(got.Body), len(want))
	}
	send(t, conn, &wire.Message{Op: wire.OpWrite, Path: "/proc/no/such", Body: want})
	if got := receive(t, conn); got.Error == "" {
		t.Error("writing to /proc worked")
	}
}

func TestOpenPort(t *testing.T) {
	ports, dev := t.TempDir(), t.TempDir()
	for name, port := range map[string]string{"vport1p1": "other\n", "vport1p2": wire.PortName + "\n"} {
		if err := os.Mkdir(filepath.Join(ports, name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(ports, name, "name"), []byte(port), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dev, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f, err := openPort(t.Context(), ports, dev)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if filepath.Base(f.Name()) != "vport1p2" {
		t.Errorf("openPort opened %s, want vport1p2", f.Name())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := openPort(ctx, t.TempDir(), dev); !errors.Is(err, context.Canceled) {
		t.Errorf("openPort without a port = %v, want %v", err, context.Canceled)
	}
}

func TestOpenChannel(t *testing.T) {
	socket := filepath.Join(t.TempDir(), wire.SocketName)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	c, err := openChannel(t.Context(), socket, "", "")
	if err != nil {
		t.Fatal(err)
	}
	host, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1)
	if _, err := io.ReadFull(host, got); err != nil || string(got) != "x" {
		t.Errorf("the harness read %q, %v, want x", got, err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	// A socket that nobody answers is no reason to look for a port, which a container has not.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := openChannel(t.Context(), socket, "", ""); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("openChannel of a dead socket = %v, want %v", err, syscall.ECONNREFUSED)
	}
}
