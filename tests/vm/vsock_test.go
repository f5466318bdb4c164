package vm_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
)

const (
	vsockPeer = "/usr/lib/guestagent-test/vsockpeer"
	// The guest's port is one that only root may bind, and so is the host's.
	guestPort, hostPort = 1022, 1021
	vsockTimeout        = time.Minute
)

// vsockFiles are the guest's end of these tests, which serves guestPort.
func vsockFiles(t testing.TB) []vm.File {
	t.Helper()
	return append(service("vsockpeer.service", "[Service]", "Type=notify", fmt.Sprintf("ExecStart=%s serve %d", vsockPeer, guestPort)),
		vsockPeerFile(t))
}

func vsockPeerFile(t testing.TB) vm.File {
	t.Helper()
	return vm.File{Path: vsockPeer, Mode: 0o755, Source: vmtest.Binary(t, "github.com/guestagent/guestagent/tests/vm/vsockpeer")}
}

// dialVsock dials guestPort and returns the peer that the guest saw.
func dialVsock(t testing.TB, m *vm.Machine) (conn net.Conn, r *bufio.Reader, cid, port uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), vsockTimeout)
	defer cancel()
	conn, err := vm.DialVsock(ctx, m.VsockPath(), guestPort)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(vsockTimeout)); err != nil {
		t.Fatal(err)
	}
	r = bufio.NewReader(conn)
	line, err := r.ReadString('\n')
	if err != nil {
		t.Fatalf("reading the first line: %v", err)
	}
	if _, err := fmt.Sscanf(line, "%d %d\n", &cid, &port); err != nil {
		t.Fatalf("the first line is %q: %v", line, err)
	}
	return conn, r, cid, port
}

// asNobody returns a command that runs as a user without any privilege.
func asNobody(argv ...string) vm.Command {
	return vm.Command{Argv: append([]string{
		"setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs",
	}, argv...)}
}

// TestVsock shows what vsock does between a guest and the host, by vhost-device-vsock.
func TestVsock(t *testing.T) {
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		path := vmtest.VsockPath(t)
		// Before the boot, as somebody has to whom the guest speaks during its boot.
		listener, err := vm.ListenVsock(t.Context(), path, hostPort)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = listener.Close() })
		m := vmtest.Boot(t, vm.Config{
			Image:   vmtest.Image(t, release),
			Overlay: vsockFiles(t),
			Vsock:   &vm.VsockConfig{Path: path, CID: 42},
		})

		t.Run("device", func(t *testing.T) {
			// udev has loaded it: nothing else did.
			vmtest.Run(t, m, "stat", "/sys/module/vmw_vsock_virtio_transport")
			if got := vmtest.Run(t, m, vsockPeer, "cid"); got != "42\n" {
				t.Errorf("CID of the guest = %q, want 42", got)
			}
		})
		t.Run("host to guest", func(t *testing.T) { testHostToGuest(t, m) })
		t.Run("guest to host", func(t *testing.T) { testGuestToHost(t, m, listener) })
		t.Run("privilege", func(t *testing.T) { testVsockPrivilege(t, m) })
		t.Run("loopback", func(t *testing.T) { testVsockLoopback(t, m) })
		t.Run("pause", func(t *testing.T) { testPause(t, m) })
		t.Run("restart", func(t *testing.T) { testRestartVsock(t, m) })
		if release.Name == vmtest.Releases(t)[0].Name { // it takes its time, and is about the harness
			t.Run("reset", func(t *testing.T) { testReset(t, m, listener) })
		}
		t.Run("end", func(t *testing.T) {
			conn, r, _, _ := dialVsock(t, m)
			if err := m.Shutdown(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, r); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("reading from a machine that is gone: %v", err)
			}
			_ = conn.Close()
			if err := m.Close(); err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Lstat of the socket after the end = %v, want %v", err, fs.ErrNotExist)
			}
			if _, err := os.Lstat(fmt.Sprintf("%s_%d", path, hostPort)); err != nil {
				t.Errorf("Lstat of the host's own socket after the end = %v, want it there", err)
			}
		})
	})
}

func testHostToGuest(t *testing.T, m *vm.Machine) {
	var ports []string
	for range 20 {
		conn, _, cid, port := dialVsock(t, m)
		if cid != 2 || port > 1<<16 {
			t.Errorf("the guest's peer is %d:%d, want the host, 2, and a small port", cid, port)
		}
		ports = append(ports, strconv.FormatUint(port, 10))
		_ = conn.Close()
	}
	t.Logf("the host's ports: %s", strings.Join(ports, " "))

	conn, r, _, _ := dialVsock(t, m)
	want := allBytes(1 << 20)
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(want)
		sent <- err
	}()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("echo of %d bytes: %v, equal = %t", len(want), err, bytes.Equal(got, want))
	}
	if err := <-sent; err != nil {
		t.Errorf("sending: %v", err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), vsockTimeout)
	defer cancel()
	if _, err := vm.DialVsock(ctx, m.VsockPath(), guestPort+1); !errors.Is(err, io.EOF) {
		t.Errorf("dialling a port that nobody listens on = %v, want %v", err, io.EOF)
	}
}

func testGuestToHost(t *testing.T, m *vm.Machine, l net.Listener) {
	for name, command := range map[string]vm.Command{
		"root":   {Argv: []string{vsockPeer, "dial", "2", strconv.Itoa(hostPort)}},
		"nobody": asNobody(vsockPeer, "dial", "2", strconv.Itoa(hostPort)),
	} {
		answered := make(chan error, 1)
		go func() {
			conn, err := l.Accept()
			if err != nil {
				answered <- err
				return
			}
			defer func() { _ = conn.Close() }()
			line, err := bufio.NewReader(io.LimitReader(conn, 100)).ReadString('\n')
			if err == nil {
				_, err = io.WriteString(conn, "the host heard "+line)
			}
			answered <- err
		}()
		res := vmtest.Exec(t, m, command)
		if res.ExitCode != 0 || string(res.Stdout) != "the host heard hello from the guest\n" {
			t.Errorf("%s dials the host: exit status %d, %q, %q", name, res.ExitCode, res.Stdout, res.Stderr)
			_ = l.Close() // lest nobody comes any more
		}
		if err := <-answered; err != nil {
			t.Errorf("answering %s: %v", name, err)
		}
	}
	res := vmtest.Exec(t, m, vm.Command{Argv: []string{vsockPeer, "dial", "2", strconv.Itoa(hostPort + 100)}})
	if res.ExitCode == 0 {
		t.Error("dialling a port of the host that nobody listens on worked")
	}
	t.Logf("dialling a port of the host that nobody listens on: %s", bytes.TrimSpace(res.Stdout))
}

// What makes the guest's port below 1024 one that only root can answer on.
func testVsockPrivilege(t *testing.T, m *vm.Machine) {
	for _, tt := range []struct {
		name    string
		command vm.Command
		want    string
	}{
		{"nobody binds 1023", asNobody(vsockPeer, "bind", "1023"), "EACCES\n"},
		{"nobody binds 1024", asNobody(vsockPeer, "bind", "1024"), ""},
		{"root binds 1023", vm.Command{Argv: []string{vsockPeer, "bind", "1023"}}, ""},
	} {
		res := vmtest.Exec(t, m, tt.command)
		if got := string(res.Stdout); got != tt.want || (res.ExitCode == 0) != (tt.want == "") {
			t.Errorf("%s: exit status %d, %q, want %q; %s", tt.name, res.ExitCode, got, tt.want, res.Stderr)
		}
	}
}

func testVsockLoopback(t *testing.T, m *vm.Machine) {
	before := vmtest.Exec(t, m, vm.Command{Argv: []string{vsockPeer, "dial", "1", strconv.Itoa(guestPort)}})
	t.Logf("before modprobe vsock_loopback: exit status %d, %s", before.ExitCode, bytes.TrimSpace(before.Stdout))
	vmtest.Run(t, m, "modprobe", "vsock_loopback")
	for _, cid := range []string{"1", "42"} {
		for name, command := range map[string]vm.Command{
			"root":   {Argv: []string{vsockPeer, "dial", cid, strconv.Itoa(guestPort)}},
			"nobody": asNobody(vsockPeer, "dial", cid, strconv.Itoa(guestPort)),
		} {
			res := vmtest.Exec(t, m, command)
			if got := string(res.Stdout); res.ExitCode != 0 || !strings.HasPrefix(got, "1 ") {
				t.Errorf("%s dials CID %s in the guest: exit status %d, peer %q, want CID 1; %s", name, cid, res.ExitCode, got, res.Stderr)
			} else {
				t.Logf("%s dials CID %s in the guest: the peer is %s", name, cid, got)
			}
		}
	}
}

// testPause has a connection that the guest's pause does not end, and one that is made meanwhile.
func testPause(t *testing.T, m *vm.Machine) {
	conn, r, _, _ := dialVsock(t, m)
	if err := m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := m.RestartVsock(t.Context(), 0); err == nil {
		t.Error("RestartVsock of a paused machine worked")
	}
	if _, err := io.WriteString(conn, "to a paused guest\n"); err != nil {
		t.Error(err)
	}
	dialled := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), vsockTimeout)
		defer cancel()
		other, err := vm.DialVsock(ctx, m.VsockPath(), guestPort)
		if err == nil {
			err = other.Close()
		}
		dialled <- err
	}()
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	if line, err := r.ReadString('\n'); err != nil || line != "to a paused guest\n" {
		t.Errorf("echo after the pause = %q, %v", line, err)
	}
	if err := <-dialled; err != nil {
		t.Errorf("dialling a paused guest: %v", err)
	}
}

// wantEnd returns a function that waits for the end of a connection, however that comes about.
func wantEnd(t *testing.T, conn net.Conn) func() {
	t.Helper()
	if err := conn.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, conn)
	}()
	return func() {
		t.Helper()
		select {
		case <-ended:
		case <-time.After(vsockTimeout):
			t.Error("the connection does not end")
		}
	}
}

func testRestartVsock(t *testing.T, m *vm.Machine) {
	conn, _, _, _ := dialVsock(t, m)
	ended := wantEnd(t, conn)
	pid := show(t, m, "vsockpeer.service", "MainPID")
	if err := m.RestartVsock(t.Context(), 43); err != nil {
		t.Fatal(err)
	}
	ended()
	if got := vmtest.Run(t, m, vsockPeer, "cid"); got != "43\n" {
		t.Errorf("CID of the guest = %q, want 43", got)
	}
	// Who listened goes on.
	dialVsock(t, m)
	if got := show(t, m, "vsockpeer.service", "MainPID"); got != pid {
		t.Errorf("vsockpeer is process %s, want %s as before", got, pid)
	}
}

func testReset(t *testing.T, m *vm.Machine, l net.Listener) {
	bootID := func() string { return string(vmtest.ReadFile(t, m, "/proc/sys/kernel/random/boot_id")) }
	before := bootID()
	conn, _, _, _ := dialVsock(t, m)
	ended := wantEnd(t, conn)
	if err := m.Reset(t.Context()); err != nil {
		t.Fatal(err)
	}
	ended()
	if bootID() == before {
		t.Error("the guest did not boot again")
	}
	dialVsock(t, m)
	testGuestToHost(t, m, l)
}

// BenchmarkVsock measures one message of 64 bytes there and back, and a connection.
func BenchmarkVsock(b *testing.B) {
	m := vmtest.Boot(b, vm.Config{
		Image:   vmtest.Image(b, vmtest.Releases(b)[0]),
		Overlay: vsockFiles(b),
		Vsock:   &vm.VsockConfig{},
	})
	b.Run("round trip", func(b *testing.B) {
		conn, r, _, _ := dialVsock(b, m)
		msg := make([]byte, 64)
		for b.Loop() {
			if _, err := conn.Write(msg); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(r, msg); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("connection", func(b *testing.B) {
		for b.Loop() {
			conn, _, _, _ := dialVsock(b, m)
			_ = conn.Close()
		}
	})
}
