package credsocket

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/guestagent/guestagent/internal/credential"
)

// The environment of a child: the names of the restored descriptors, separated
// by colons, as in $LISTEN_FDNAMES.
const childEnv = "CREDSOCKET_TEST_NAMES"

// The child's descriptors: the listening socket, a page that it shares with its
// parent, and what was stored.
const (
	childListener = 3 + iota
	childPage
	childStored
)

// child serves until it is killed. Credentials whose name begins with "refused"
// are refused, others are given at the second time of asking or later.
func child() error {
	page, err := unix.Mmap(childPage, 0, 1, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	store, ok := SystemdStore()
	if !ok {
		return errors.New("no store")
	}
	var restored []*os.File
	for i, name := range strings.Split(os.Getenv(childEnv), ":")[1:] {
		unix.CloseOnExec(childStored + i)
		restored = append(restored, os.NewFile(uintptr(childStored+i), name))
	}
	asked := make(map[Request]int)
	s := &Server{
		Store: store, UID: os.Getuid(),
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
		Decide: func(_ context.Context, r Request) Decision {
			if strings.HasPrefix(r.Name, "refused") {
				return Decision{Refuse: errors.New("no")}
			}
			if asked[r]++; asked[r] < 2 {
				return Decision{}
			}
			b := valueOf(r)
			f, err := memfile(b)
			if err != nil {
				return Decision{Refuse: err}
			}
			return Decision{Value: f, Size: int64(len(b))}
		},
	}
	// The gap between accept(2) and Keep, for the parent to see.
	s.step = func(at string) {
		page[0] = 0
		if at == "accept" {
			page[0] = 1
		}
	}
	go func() {
		for range time.Tick(3 * time.Millisecond) {
			s.Retry()
		}
	}()
	return s.Serve(context.Background(), os.NewFile(childListener, "listener"), restored)
}

// valueOf is the value of a credential: its size is in its name.
func valueOf(r Request) []byte {
	size := 0
	if _, err := fmt.Sscanf(r.Name, "size-%d", &size); err != nil {
		return nil
	}
	return bytes.Repeat([]byte(r.Unit+"/"+r.Name+"\n"), size/(len(r.Unit)+len(r.Name)+2)+1)[:size]
}

// pid1 receives notifications like PID 1, into a store, until the socket closes.
// What arrived before sync is in the store when it returns.
type pid1 struct {
	*pid1Store
	conn   *net.UnixConn
	addr   *net.UnixAddr
	synced chan bool
}

func newPID1(t *testing.T) *pid1 {
	addr := &net.UnixAddr{Net: "unixgram", Name: "@guestagent-credsocket-" + rand.Text()}
	conn, err := net.ListenUnixgram("unixgram", addr)
	if err != nil {
		t.Fatal(err)
	}
	p := &pid1{newStore(t), conn, addr, make(chan bool)}
	done := make(chan bool)
	go func() {
		defer close(done)
		if err := p.receive(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("receiving notifications: %v", err)
		}
	}()
	t.Cleanup(func() { // before that of the store
		_ = conn.Close()
		<-done
	})
	return p
}

func (p *pid1) receive() error {
	b, oob := make([]byte, 4096), make([]byte, 4096)
	for {
		n, oobn, _, _, err := p.conn.ReadMsgUnix(b, oob)
		if err != nil {
			return err
		}
		var fds []int
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return err
		}
		for _, m := range messages {
			rights, err := unix.ParseUnixRights(&m)
			if err != nil {
				return err
			}
			fds = append(fds, rights...)
		}
		lines := strings.Split(string(b[:n]), "\n")
		name, ok := strings.CutPrefix(lines[len(lines)-1], "FDNAME=")
		switch {
		case string(b[:n]) == "sync":
			p.synced <- true
		case len(lines) == 2 && ok && lines[0] == "FDSTORE=1" && len(fds) == 1:
			err = p.Keep(name, fds[0])
		case len(lines) == 2 && ok && lines[0] == "FDSTOREREMOVE=1" && len(fds) == 0:
			err = p.Drop(name)
		default:
			err = fmt.Errorf("notification %q with %d descriptors", b[:n], len(fds))
		}
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		if err != nil {
			return err
		}
	}
}

func (p *pid1) sync(t *testing.T) {
	t.Helper()
	conn, err := net.DialUnix("unixgram", nil, p.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("sync")); err != nil {
		t.Fatal(err)
	}
	<-p.synced
}

// A real process is killed at random, hundreds of times, while units come, wait
// and read. No unit ever gets an empty credential or a part of one, but in the
// gap that the package comment tells of.
func TestKilledProcess(t *testing.T) {
	rounds := 300
	if testing.Short() {
		rounds = 30
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	pageFile, err := memfile([]byte{0})
	if err != nil {
		t.Fatal(err)
	}
	defer pageFile.Close()
	page, err := unix.Mmap(int(pageFile.Fd()), 0, 1, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(page) }()
	p := newPID1(t)
	l, addr := listen(t)
	seed := mathrand.Uint64()
	t.Logf("seed %d", seed)
	rng := mathrand.New(mathrand.NewPCG(seed, 0))

	var over atomic.Bool
	var units sync.WaitGroup
	var values, failed, empty, gaps atomic.Int64
	for i := range 6 {
		rng := mathrand.New(mathrand.NewPCG(seed, uint64(i+1)))
		units.Go(func() {
			for n := 0; !over.Load() && !t.Failed(); n++ {
				r := Request{fmt.Sprintf("u%d@%d.service", i, n), fmt.Sprintf("size-%d", 1+rng.IntN(credential.MaxSize))}
				if rng.IntN(10) == 0 {
					r.Name = "refused"
				}
				u := connect(t, addr, r).read()
				switch got, ok := <-u.got; {
				case !ok:
					t.Errorf("%+v: the connection broke off", r)
				case len(got) > credential.MaxSize:
					failed.Add(1)
				case len(got) == 0:
					empty.Add(1)
				case r.Name != "refused" && bytes.Equal(got, valueOf(r)):
					values.Add(1)
				default:
					t.Errorf("%+v got %s", r, brief(got))
				}
			}
		})
	}
	for range rounds {
		page[0] = 0
		restored := p.restored(t)
		cmd := exec.Command(self)
		names := []string{"listener"}
		cmd.ExtraFiles = append([]*os.File{l, pageFile}, restored...)
		for _, f := range restored {
			names = append(names, f.Name())
		}
		cmd.Env = append(os.Environ(), childEnv+"="+strings.Join(names, ":"), "NOTIFY_SOCKET="+p.addr.Name)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for _, f := range restored {
			_ = f.Close()
		}
		<-time.After(time.Duration(rng.Int64N(int64(40 * time.Millisecond)))) // the point of the kill is random
		_ = cmd.Process.Kill()
		err := cmd.Wait()
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("the child ended with %v: %s", err, &stderr)
		}
		if page[0] != 0 {
			gaps.Add(1)
		}
		p.sync(t)
		if t.Failed() {
			break
		}
	}
	over.Store(true)
	// The last child answers those who are left.
	s := start(t, &Server{Store: p, Decide: func(_ context.Context, r Request) Decision {
		if r.Name == "refused" {
			return Decision{Refuse: errors.New("no")}
		}
		return given(t, valueOf(r))
	}}, l, p.restored(t))
	units.Wait()
	s.stop()
	if empty.Load() > gaps.Load() {
		t.Errorf("%d empty credentials, %d kills in the gap", empty.Load(), gaps.Load())
	}
	if values.Load() == 0 || failed.Load() == 0 {
		t.Errorf("nothing was tried")
	}
	t.Logf("values %d, failed %d, kills in the gap %d, empty because of them %d", values.Load(), failed.Load(), gaps.Load(), empty.Load())
}

func TestSystemdStore(t *testing.T) {
	for _, path := range []string{"", "/", "@", "run/notify", "vsock:2:1234"} {
		t.Setenv("NOTIFY_SOCKET", path)
		if st, ok := SystemdStore(); ok || st != nil {
			t.Errorf("SystemdStore() with %q = %v, %v", path, st, ok)
		}
	}
	for _, path := range []string{t.TempDir() + "/notify", "@guestagent-credsocket-" + rand.Text()} {
		conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		t.Setenv("NOTIFY_SOCKET", path)
		st, ok := SystemdStore()
		if !ok {
			t.Fatalf("SystemdStore() with %q = false", path)
		}
		defer func() { _ = unix.Close(st.(*systemdStore).socket) }()
		if err := st.Keep("credential-1-2", int(os.Stdin.Fd())); err != nil {
			t.Fatal(err)
		}
		b, oob := make([]byte, 100), make([]byte, 100)
		n, oobn, _, _, err := conn.ReadMsgUnix(b, oob)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := string(b[:n]), "FDSTORE=1\nFDNAME=credential-1-2"; got != want {
			t.Errorf("Keep sent %q, want %q", got, want)
		}
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(messages) != 1 {
			t.Fatalf("Keep sent %d control messages, %v", len(messages), err)
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil || len(fds) != 1 {
			t.Fatalf("Keep sent %d descriptors, %v", len(fds), err)
		}
		_ = unix.Close(fds[0])
		if err := st.Drop("credential-1-2"); err != nil {
			t.Fatal(err)
		}
		if n, oobn, _, _, err = conn.ReadMsgUnix(b, oob); err != nil || oobn != 0 {
			t.Fatalf("Drop sent %d bytes of control messages, %v", oobn, err)
		}
		if got, want := string(b[:n]), "FDSTOREREMOVE=1\nFDNAME=credential-1-2"; got != want {
			t.Errorf("Drop sent %q, want %q", got, want)
		}
		_ = conn.Close()
		if err := st.Keep("credential-1-2", int(os.Stdin.Fd())); err == nil || !strings.Contains(err.Error(), "notifying the service manager") {
			t.Errorf("Keep with nobody there = %v", err)
		}
	}
}
