package credsocket

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/guestagent/guestagent/internal/credential"
)

// TestMain lets the test binary be the server that is killed, and checks that
// no test leaves a goroutine or a file descriptor behind.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		if err := child(); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		return
	}
	// The poller takes descriptors with its first pipe, and keeps them.
	r, w, err := os.Pipe()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_, _ = r.Close(), w.Close()
	before := resources()
	code := m.Run()
	// The fuzzing engine keeps some of its own.
	if fuzz := flag.Lookup("test.fuzz"); code == 0 && fuzz.Value.String() == "" {
		var after [2]int
		for range 100 { // what ends needs a moment
			runtime.GC() // finalizers close what was left to them
			if after = resources(); after[0] <= before[0] && after[1] <= before[1] {
				break
			}
			<-time.After(20 * time.Millisecond)
		}
		if after[0] > before[0] || after[1] > before[1] {
			stacks := make([]byte, 1<<20)
			fmt.Fprintf(os.Stderr, "left behind: goroutines %d, was %d; descriptors %d, was %d\n%s\n",
				after[0], before[0], after[1], before[1], stacks[:runtime.Stack(stacks, true)])
			code = 1
		}
	}
	os.Exit(code)
}

// resources counts goroutines and file descriptors.
func resources() [2]int {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return [2]int{runtime.NumGoroutine(), 0}
	}
	return [2]int{runtime.NumGoroutine(), len(fds)}
}

// A pid1Store is a file descriptor store that behaves like PID 1's
// (service_add_fd_store in src/core/service.c): bounded, and it takes no socket
// that it has already, whatever the name.
type pid1Store struct {
	mu    sync.Mutex
	max   int // 0: no bound
	fds   []storedFD
	drops []string
	err   error // of every Keep
}

type storedFD struct {
	name string
	fd   int
	ino  uint64
}

var _ FDStore = (*pid1Store)(nil)

func newStore(t testing.TB) *pid1Store {
	st := &pid1Store{}
	t.Cleanup(func() {
		for _, s := range st.fds {
			_ = unix.Close(s.fd)
		}
	})
	return st
}

func (st *pid1Store) Keep(name string, fd int) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.err != nil {
		return st.err
	}
	if len(name) > 255 || strings.ContainsAny(name, ":\n") {
		return fmt.Errorf("name %q", name)
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return err
	}
	for _, s := range st.fds {
		if s.ino == stat.Ino {
			return nil
		}
	}
	if st.max > 0 && len(st.fds) >= st.max {
		return nil // PID 1 tells nobody
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	st.fds = append(st.fds, storedFD{name, dup, stat.Ino})
	return nil
}

func (st *pid1Store) Drop(name string) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.drops = append(st.drops, name)
	kept := st.fds[:0]
	for _, s := range st.fds {
		if s.name == name {
			_ = unix.Close(s.fd)
			continue
		}
		kept = append(kept, s)
	}
	st.fds = kept
	return nil
}

func (st *pid1Store) len() int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return len(st.fds)
}

// restored is what the next process is started with. Before that PID 1 drops
// what hung up. The store keeps its own copies.
func (st *pid1Store) restored(t testing.TB) []*os.File {
	t.Helper()
	st.mu.Lock()
	defer st.mu.Unlock()
	var files []*os.File
	kept := st.fds[:0]
	for _, s := range st.fds {
		p := []unix.PollFd{{Fd: int32(s.fd)}} //nolint:gosec // descriptors are small
		if _, err := unix.Poll(p, 0); err != nil {
			t.Fatal(err)
		}
		if p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0 {
			_ = unix.Close(s.fd)
			continue
		}
		kept = append(kept, s)
		dup, err := unix.FcntlInt(uintptr(s.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if !IsStored(s.name) {
			t.Errorf("IsStored(%q) = false", s.name)
		}
		files = append(files, os.NewFile(uintptr(dup), s.name))
	}
	st.fds = kept
	return files
}

// listen returns a listening socket without a path, and its address.
func listen(t testing.TB) (*os.File, *net.UnixAddr) {
	t.Helper()
	addr := &net.UnixAddr{Net: "unix", Name: "@guestagent-credsocket-" + rand.Text()}
	l, err := net.ListenUnix("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f, addr
}

// A unit is what PID 1's child is for one credential.
type unit struct {
	Request
	conn *net.UnixConn
	got  chan []byte // once, at the end of what came; closed without anything where it broke off
}

// connect is load_credential up to the point where it reads.
func connect(t testing.TB, to *net.UnixAddr, r Request) *unit {
	t.Helper()
	return connectFrom(t, to, fmt.Sprintf("@%x/unit/%s/%s", randomUint64(), r.Unit, r.Name), r)
}

func connectFrom(t testing.TB, to *net.UnixAddr, from string, r Request) *unit {
	t.Helper()
	conn, err := net.DialUnix("unix", &net.UnixAddr{Net: "unix", Name: from}, to)
	if err == nil {
		err = conn.CloseWrite()
	}
	if err != nil {
		t.Fatal(err)
	}
	u := &unit{Request: r, conn: conn, got: make(chan []byte, 1)}
	t.Cleanup(func() { _ = conn.Close() })
	return u
}

// randomUint64 is as in an address: few of its numbers have leading zeros.
func randomUint64() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:])
	return uint64(b[0])<<56 | uint64(b[1])<<48 | uint64(b[2])<<40 | uint64(b[3])<<32 | uint64(b[4])<<24 | uint64(b[5])<<16 | uint64(b[6])<<8 | uint64(b[7])
}

// read reads to the end, in the background, like read_full_file_full: with more
// than 1 MiB it has enough.
func (u *unit) read() *unit {
	go func() {
		defer close(u.got)
		b := make([]byte, credential.MaxSize+1)
		n, err := io.ReadFull(u.conn, b)
		if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			u.got <- b[:n]
		}
		_ = u.conn.Close()
	}()
	return u
}

// wants checks what the unit has read.
func (u *unit) wants(t testing.TB, want []byte) {
	t.Helper()
	switch got, ok := <-u.got; {
	case !ok:
		t.Errorf("%s/%s: the connection broke off", u.Unit, u.Name)
	case !bytes.Equal(got, want):
		t.Errorf("%s/%s: got %s, want %s", u.Unit, u.Name, brief(got), brief(want))
	}
}

// fails checks that the unit was failed.
func (u *unit) fails(t testing.TB) {
	t.Helper()
	if got, ok := <-u.got; !ok || len(got) <= credential.MaxSize {
		t.Errorf("%s/%s: got %s, want more than 1 MiB", u.Unit, u.Name, brief(got))
	}
}

func brief(b []byte) string {
	if len(b) > 16 {
		return fmt.Sprintf("%d bytes %q…", len(b), b[:16])
	}
	return fmt.Sprintf("%q", b)
}

// value is what the tests' units want: n bytes, up to 1 MiB, that tell their place.
func value(n int) []byte { return largest()[:n:n] }

var largest = sync.OnceValue(func() []byte {
	var b bytes.Buffer
	for b.Len() < credential.MaxSize {
		fmt.Fprintf(&b, "%08d", b.Len())
	}
	return b.Bytes()
})

// given is a decision to give these bytes.
func given(t testing.TB, b []byte) Decision {
	t.Helper()
	f, err := memfile(b)
	if err != nil {
		t.Error(err)
		return Decision{Refuse: err}
	}
	return Decision{Value: f, Size: int64(len(b))}
}

func memfile(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("value", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "value")
	if _, err := f.Write(b); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// A running is a server under test.
type running struct {
	*Server
	t      testing.TB
	cancel context.CancelFunc
	done   chan struct{}
	err    error
	busy   chan int
	logs   *logs
}

// start serves until the test ends, or stop or kill.
func start(t testing.TB, s *Server, l *os.File, restored []*os.File) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{Server: s, t: t, cancel: cancel, done: make(chan struct{}), busy: make(chan int, 1<<12), logs: &logs{}}
	s.UID = os.Getuid()
	s.Busy = func(n int) {
		for {
			select {
			case r.busy <- n:
				return
			default:
			}
			select {
			case <-r.busy: // nobody looks: the oldest goes
			default:
			}
		}
	}
	s.Log = slog.New(slog.NewTextHandler(r.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	go func() {
		defer close(r.done)
		r.err = s.Serve(ctx, l, restored)
	}()
	t.Cleanup(r.kill)
	return r
}

// stop ends the server in an orderly way. What it left open stays open.
func (r *running) stop() {
	r.t.Helper()
	r.cancel()
	<-r.done
	if r.err != nil {
		r.t.Errorf("Serve = %v, want nil", r.err)
	}
}

// kill is what SIGKILL does after stop, or after a step that ended the loop:
// every descriptor is closed without a word.
func (r *running) kill() {
	r.cancel()
	<-r.done
	l := r.loop
	if l == nil {
		return
	}
	for _, c := range l.held {
		if c.answer != nil {
			c.answer.close()
		}
		if c.file != nil {
			_ = c.file.Close()
		} else {
			_ = unix.Close(c.fd)
		}
	}
	l.held = nil
}

// holds waits until the server holds n connections.
func (r *running) holds(n int) {
	r.t.Helper()
	for {
		select {
		case got := <-r.busy:
			if got == n {
				return
			}
		case <-r.done:
			r.t.Fatalf("the server ended with %v, want %d connections", r.err, n)
		}
	}
}

// logs is a buffer that goroutines may share.
type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Reset()
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// has checks that a line of the log has all the words.
func (r *running) has(words ...string) {
	r.t.Helper()
lines:
	for line := range strings.Lines(r.logs.String()) {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue lines
			}
		}
		return
	}
	r.t.Errorf("no line of the log has %q:\n%s", words, r.logs)
}
