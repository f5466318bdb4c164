package vsockrpc

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// The policy decides by the address, before a byte is read.
func TestServerPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, log := newServer()
		s.Authorize = Policy{}.Authorize
		l := serve(t, s)
		c := l.dialAs(&vsock.Addr{ContextID: 2, Port: 1000})
		send(t, c, `{"method":"org.example.test.Nothing"}`+"\n")
		expect(t, c, `{"parameters":{}}`)
		_ = c.Close()
		for _, addr := range []net.Addr{
			&vsock.Addr{ContextID: 2, Port: 5000}, &vsock.Addr{ContextID: 1, Port: 1000}, &vsock.Addr{ContextID: 7, Port: 1000}, (*vsock.Addr)(nil),
			vsockLike{},
			pipeAddr{},
			&net.UnixAddr{Name: "/x"}, &net.TCPAddr{},
		} {
			c := l.dialAs(addr)
			expectEnd(t, c)
			_ = c.Close()
		}
		synctest.Wait()
		for _, want := range []string{`"peer":{"cid":2,"port":5000}`, `"peer":{"cid":1,"port":1000}`} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("the log has no %s: %s", want, log)
			}
		}
	})
}

// vsockLike calls itself vsock, and is of another type.
type vsockLike struct{}

func (vsockLike) Network() string { return "vsock" }
func (vsockLike) String() string  { return "host(2):1" }

func TestPeerOfUnix(t *testing.T) {
	got := make(chan Peer, 1)
	s, _ := newServer()
	s.Authorize = func(p Peer) error { got <- p; return nil }
	dialTest(t, serveUnix(t, s))
	if p := <-got; p != (Peer{Kind: PeerUnix, UID: uint32(os.Getuid()), PID: int32(os.Getpid())}) { //nolint:gosec // both fit
		t.Errorf("the peer is %+v", p)
	}
}

// What the service manager hands over: listeners with their names, the rest as
// it is.
func TestFileListeners(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	named := dup(t, f, "guestagent-local.socket")
	_ = f.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	waiter, other := os.NewFile(uintptr(pair[0]), "waiter-1"), os.NewFile(uintptr(pair[1]), "other")
	defer other.Close()
	file, err := os.Create(filepath.Join(dir, "memfd"))
	if err != nil {
		t.Fatal(err)
	}

	listeners, rest, err := FileListeners([]*os.File{named, waiter, file})
	if err != nil || len(listeners) != 1 || listeners[0].Name != "guestagent-local.socket" || len(rest) != 2 || rest[0] != waiter || rest[1] != file {
		t.Fatalf("FileListeners = %v, %v, %v", listeners, rest, err)
	}
	_ = waiter.Close()
	_ = file.Close()
	s, _ := newServer()
	serveOn(t, s, listeners[0])
	if err := dialTest(t, Target{Scheme: SchemeUnix, Path: filepath.Join(dir, "s")}).Call(t.Context(), "org.example.test.Nothing", nil, nil); err != nil {
		t.Errorf("Call: %v", err)
	}
}

func dup(t *testing.T, f *os.File, name string) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), name)
}

func TestFileListenersRefuses(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skipf("no loopback network: %v; give the test a network namespace with lo up", err)
	}
	defer tcp.Close()
	f, err := tcp.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	packets, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "p"), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	g, err := packets.File()
	if err != nil {
		t.Fatal(err)
	}
	for want, f := range map[string]*os.File{"AF_VSOCK or AF_UNIX": f, "stream socket": g} {
		if l, rest, err := FileListeners([]*os.File{f}); err == nil || !strings.Contains(err.Error(), want) || l != nil || rest != nil {
			t.Errorf("FileListeners = %v, %v, %v, want an error with %q", l, rest, err, want)
		}
		if err := f.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("after an error the file is open: %v", err)
		}
	}
}

func TestActivatedNothing(t *testing.T) {
	t.Setenv("LISTEN_PID", "")
	if l, rest, err := Activated(); len(l) != 0 || len(rest) != 0 || err != nil {
		t.Errorf("Activated = %v, %v, %v", l, rest, err)
	}
}

func TestBindPrivileged(t *testing.T) {
	var got uint32
	for _, free := range []uint32{sourceLow, 500, sourceHigh} {
		bind := func(port uint32) error {
			if port != free {
				return os.NewSyscallError("bind", unix.EADDRINUSE)
			}
			got = port
			return nil
		}
		if err := bindPrivileged(bind); err != nil || got != free {
			t.Errorf("bound %d, %v, want %d, since the others are taken", got, err, free)
		}
	}
	// One that was just free is not taken again at once.
	seen := map[uint32]bool{}
	for range 100 {
		if err := bindPrivileged(func(port uint32) error { seen[port] = true; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if len(seen) < 50 {
		t.Errorf("100 connections have %d ports, want one of its own for most", len(seen))
	}
	var tried int
	for errno, want := range map[unix.Errno]error{unix.EACCES: nil, unix.EPERM: nil, unix.EINVAL: unix.EINVAL} {
		tried = 0
		if err := bindPrivileged(func(uint32) error { tried++; return errno }); !errors.Is(err, want) || tried != 1 {
			t.Errorf("with %v: %v after %d ports", errno, err, tried)
		}
	}
	tried = 0
	if err := bindPrivileged(func(port uint32) error {
		tried++
		if port >= FirstProviderPort || port < sourceLow {
			t.Errorf("tried port %d, which is a server's", port)
		}
		return unix.EADDRINUSE
	}); err != nil || tried != sourceHigh-sourceLow+1 || tried < 2*(LastProviderPort-FirstProviderPort+1) {
		t.Errorf("with all taken: %v after %d ports", err, tried)
	}
}

// AF_VSOCK itself is tested in VMs; here only that what is missing is told.
func TestVsockMissing(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l, err := ListenVsock(ctx, 1, 0)
	if err == nil {
		_ = l.Close()
	}
	c, err := Dial(t.Context(), Target{Scheme: SchemeVsock, CID: 77, Port: DefaultPort})
	if e, ok := errors.AsType[*ConnectError](err); !ok || e.Target.CID != 77 {
		t.Errorf("Dial of a guest that is not there = %v, %v", c, err)
	}
}
