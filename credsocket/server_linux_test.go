package credsocket

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/guestagent/guestagent/internal/credential"
)

var web = Request{"web@1.service", "api-key"}

func TestGive(t *testing.T) {
	for _, size := range []int{0, 1, 4096, 300_000, credential.MaxSize} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			want := value(size)
			given1 := make(chan Request, 1)
			store := newStore(t)
			l, addr := listen(t)
			s := start(t, &Server{Store: store, Decide: func(_ context.Context, r Request) Decision {
				d := given(t, want)
				d.Given = func() { given1 <- r }
				return d
			}}, l, nil)
			connect(t, addr, web).read().wants(t, want)
			if r := <-given1; r != web {
				t.Errorf("Given for %+v, want %+v", r, web)
			}
			s.holds(0)
			if n := store.len(); n != 0 {
				t.Errorf("%d connections are left in the store", n)
			}
			s.stop()
			if size > 8 && bytes.Contains([]byte(s.logs.String()), want[:8]) {
				t.Errorf("the value is in the log:\n%s", s.logs)
			}
		})
	}
}

// A reader that is slower than the server gets everything all the same, and
// nobody else waits for it.
func TestSlowReader(t *testing.T) {
	want := value(credential.MaxSize)
	l, addr := listen(t)
	s := start(t, &Server{Decide: func(context.Context, Request) Decision { return given(t, want) }}, l, nil)
	slow := connect(t, addr, Request{"slow.service", "k"})
	s.holds(1)
	for i := range 40 {
		connect(t, addr, Request{fmt.Sprintf("u%d.service", i), "k"}).read().wants(t, want)
	}
	go func() {
		defer close(slow.got)
		var b bytes.Buffer
		for {
			if _, err := io.CopyN(&b, slow.conn, 10_000); err != nil {
				break
			}
			runtime.Gosched()
		}
		slow.got <- b.Bytes()
	}()
	slow.wants(t, want)
	s.stop()
}

func TestRetry(t *testing.T) {
	asked := make(chan Request, 100)
	var there atomic.Bool
	store := newStore(t)
	l, addr := listen(t)
	s := start(t, &Server{Store: store, Decide: func(_ context.Context, r Request) Decision {
		defer func() { asked <- r }()
		if there.Load() {
			return given(t, []byte("hunter2"))
		}
		return Decision{}
	}}, l, nil)
	before := time.Now()
	u := connect(t, addr, web).read()
	if r := <-asked; r != web {
		t.Errorf("asked for %+v, want %+v", r, web)
	}
	w := s.Waiting()
	if len(w) != 1 || w[0].Request != web || w[0].Since.Before(before.Add(-time.Second)) || w[0].Since.After(time.Now().Add(time.Second)) {
		t.Errorf("Waiting() = %+v", w)
	}
	if n := store.len(); n != 1 {
		t.Errorf("%d connections in the store, want 1", n)
	}
	s.Retry() // nothing has come
	<-asked
	there.Store(true)
	s.Retry()
	u.wants(t, []byte("hunter2"))
	s.holds(0)
	if w := s.Waiting(); len(w) != 0 {
		t.Errorf("Waiting() = %+v, want none", w)
	}
	s.stop()
	s.has("level=DEBUG", "unit=web@1.service", "credential=api-key")
	if strings.Contains(s.logs.String(), "hunter2") {
		t.Errorf("the value is in the log:\n%s", s.logs)
	}
}

// A value that arrives while its request is being decided on is not missed.
func TestRetryDuringDecide(t *testing.T) {
	asked, goOn := make(chan bool), make(chan Decision)
	l, addr := listen(t)
	s := start(t, &Server{Decide: func(context.Context, Request) Decision {
		asked <- true
		return <-goOn
	}}, l, nil)
	u := connect(t, addr, web).read()
	<-asked
	s.Retry()
	s.Retry()
	s.holds(1)
	goOn <- Decision{}
	<-asked
	goOn <- given(t, []byte("v"))
	u.wants(t, []byte("v"))
	s.stop()
}

func TestRefuse(t *testing.T) {
	old := value(100)
	for name, decide := range map[string]func(context.Context, Request) Decision{
		"refused":    func(context.Context, Request) Decision { return Decision{Refuse: errors.New("no, says policy")} },
		"both":       func(context.Context, Request) Decision { d := given(t, old); d.Refuse = errors.New("no"); return d },
		"panic":      func(context.Context, Request) Decision { panic("hunter2") },
		"nobody":     nil,
		"short file": func(context.Context, Request) Decision { d := given(t, old); d.Size++; return d },
		"empty file": func(context.Context, Request) Decision { d := given(t, nil); d.Size = 1; return d },
		"too large":  func(context.Context, Request) Decision { d := given(t, old); d.Size = 1<<20 + 1; return d },
		"negative":   func(context.Context, Request) Decision { d := given(t, old); d.Size = -1; return d },
		"closed":     func(context.Context, Request) Decision { d := given(t, old); _ = d.Value.Close(); return d },
	} {
		t.Run(name, func(t *testing.T) {
			store := newStore(t)
			l, addr := listen(t)
			s := start(t, &Server{Store: store, Decide: decide}, l, nil)
			connect(t, addr, web).read().fails(t)
			s.holds(0)
			if n := store.len(); n != 0 {
				t.Errorf("%d connections are left in the store", n)
			}
			// The server lives.
			connect(t, addr, web).read().fails(t)
			s.stop()
			s.has("level=WARN", "unit=web@1.service", "credential=api-key", "error=")
			if strings.Contains(s.logs.String(), "hunter2") {
				t.Errorf("what was panicked with is in the log:\n%s", s.logs)
			}
		})
	}
}

// Only the user that the server is for gets anything, whatever the address says.
func TestStranger(t *testing.T) {
	store := newStore(t)
	l, addr := listen(t)
	s := &Server{Store: store, Decide: func(_ context.Context, r Request) Decision {
		t.Errorf("asked for %+v", r)
		return given(t, []byte("v"))
	}}
	r := start(t, s, l, nil)
	r.stop()
	s = &Server{Store: store, Decide: s.Decide, Log: s.Log, UID: os.Getuid() + 1, Busy: s.Busy}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l, nil) }()
	for range 10 {
		connect(t, addr, web).read().wants(t, []byte{})
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve = %v", err)
	}
	if n := store.len(); n != 0 {
		t.Errorf("%d connections are left in the store", n)
	}
	r.has("level=WARN", "not the service manager", fmt.Sprintf("uid=%d", os.Getuid()))
	if n := strings.Count(r.logs.String(), "level=WARN"); n != 1 {
		t.Errorf("%d warnings about ten strangers, want 1:\n%s", n, r.logs)
	}
}

// Root with an address that says nothing may be a systemd that we do not know:
// it is failed, not given the end of a file.
func TestUnknownAddress(t *testing.T) {
	l, addr := listen(t)
	s := start(t, &Server{Decide: func(_ context.Context, r Request) Decision {
		t.Errorf("asked for %+v", r)
		return Decision{}
	}}, l, nil)
	for _, from := range []string{"@7e/manager/1/web.service/k", "@guestagent-test-7e", filepath.Join(t.TempDir(), "s")} {
		connectFrom(t, addr, from, Request{}).read().fails(t)
	}
	conn, err := net.DialUnix("unix", nil, addr) // not bound at all
	if err != nil {
		t.Fatal(err)
	}
	(&unit{conn: conn, got: make(chan []byte, 1)}).read().fails(t)
	s.stop()
	s.has("level=WARN", ErrAddress.Error())
}

func TestUnitGone(t *testing.T) {
	store := newStore(t)
	asked := make(chan bool, 10)
	l, addr := listen(t)
	s := start(t, &Server{Store: store, Decide: func(context.Context, Request) Decision {
		asked <- true
		return Decision{}
	}}, l, nil)
	a, b := connect(t, addr, Request{"a.service", "k"}), connect(t, addr, Request{"b.service", "k"})
	s.holds(2)
	<-asked
	<-asked
	_ = a.conn.Close()
	s.holds(1)
	if w := s.Waiting(); len(w) != 1 || w[0].Unit != "b.service" {
		t.Errorf("Waiting() = %+v, want b.service", w)
	}
	if n := store.len(); n != 1 {
		t.Errorf("%d connections in the store, want 1", n)
	}
	_ = b.conn.Close()
	s.holds(0)
	s.stop()
}

// A unit that goes while its answer is on the way, or while its request is
// being decided on, leaves nothing behind: TestMain counts descriptors.
func TestUnitGoneMeanwhile(t *testing.T) {
	asked, goOn := make(chan bool), make(chan bool)
	store := newStore(t)
	l, addr := listen(t)
	s := start(t, &Server{Store: store, Decide: func(context.Context, Request) Decision {
		asked <- true
		<-goOn
		return given(t, value(credential.MaxSize))
	}}, l, nil)
	u := connect(t, addr, web)
	<-asked
	_ = u.conn.Close()
	s.holds(0)
	goOn <- true

	u = connect(t, addr, web)
	<-asked
	goOn <- true
	if _, err := io.CopyN(io.Discard, u.conn, 1000); err != nil {
		t.Fatal(err)
	}
	_ = u.conn.Close()
	s.holds(0)
	if n := store.len(); n != 0 {
		t.Errorf("%d connections are left in the store", n)
	}
	s.stop()
	if strings.Contains(s.logs.String(), "level=WARN") {
		t.Errorf("units that went are warned of:\n%s", s.logs)
	}
}

// Past the limit nobody is accepted, and nobody is turned away.
func TestBacklog(t *testing.T) {
	const more = 40
	var there atomic.Bool
	asked := make(chan bool, 1<<16)
	store := newStore(t)
	store.max = DefaultMaxWaiting
	l, addr := listen(t)
	s := start(t, &Server{Store: store, Decide: func(_ context.Context, r Request) Decision {
		asked <- true
		if !there.Load() {
			return Decision{}
		}
		return given(t, []byte(r.Unit))
	}}, l, nil)
	var units []*unit
	for i := range DefaultMaxWaiting + more {
		units = append(units, connect(t, addr, Request{fmt.Sprintf("u%d.service", i), "k"}).read())
	}
	s.holds(DefaultMaxWaiting)
	for range DefaultMaxWaiting {
		<-asked
	}
	if n, m := len(s.Waiting()), store.len(); n != DefaultMaxWaiting || m != n {
		t.Errorf("%d wait, %d are stored, want %d", n, m, DefaultMaxWaiting)
	}
	// One place becomes free, one is accepted.
	_ = units[0].conn.Close()
	<-asked
	if n, m := len(s.Waiting()), store.len(); n != DefaultMaxWaiting || m != n {
		t.Errorf("%d wait, %d are stored, want %d", n, m, DefaultMaxWaiting)
	}
	there.Store(true)
	s.Retry()
	for _, u := range units[1:] {
		u.wants(t, []byte(u.Unit))
	}
	s.holds(0)
	s.stop()
	for len(s.busy) > 0 {
		if n := <-s.busy; n > DefaultMaxWaiting {
			t.Errorf("%d connections were held", n)
		}
	}
}

func TestWait(t *testing.T) {
	var now atomic.Int64
	now.Store(int64(time.Hour))
	asked := make(chan bool, 10)
	store := newStore(t)
	l, addr := listen(t)
	server := func() *Server {
		s := &Server{Store: store, Wait: time.Minute, Decide: func(context.Context, Request) Decision {
			asked <- true
			return Decision{}
		}}
		s.clock = func() time.Duration { return time.Duration(now.Load()) }
		return s
	}
	s := start(t, server(), l, nil)
	first := connect(t, addr, Request{"first.service", "k"}).read()
	<-asked
	now.Add(int64(30 * time.Second))
	second := connect(t, addr, Request{"second.service", "k"}).read()
	<-asked
	// The time counts on in the next process.
	s.kill()
	s = start(t, server(), l, store.restored(t))
	<-asked
	<-asked
	if w := s.Waiting(); len(w) != 2 || w[0].Unit != "first.service" || w[1].Since.Sub(w[0].Since).Round(time.Second) != 30*time.Second {
		t.Errorf("Waiting() = %+v, want first.service 30 s before second.service", w)
	}
	now.Add(int64(30 * time.Second))
	s.wake()
	first.fails(t)
	s.holds(1)
	if w := s.Waiting(); len(w) != 1 || w[0].Unit != "second.service" {
		t.Errorf("Waiting() = %+v, want second.service", w)
	}
	now.Add(int64(30*time.Second) - 1)
	s.wake()
	s.Retry()
	<-asked // it still waits
	now.Add(1)
	s.wake()
	second.fails(t)
	s.holds(0)
	s.stop()
	s.has("level=WARN", "unit=second.service", errOver.Error())
}

// Wait ends by itself, with the real clock.
func TestWaitWakes(t *testing.T) {
	l, addr := listen(t)
	s := start(t, &Server{Wait: time.Millisecond, Decide: func(context.Context, Request) Decision { return Decision{} }}, l, nil)
	connect(t, addr, web).read().fails(t)
	s.stop()
}

// When the context ends, who waits goes on waiting, and the backlog too.
func TestStopAndRestore(t *testing.T) {
	asked := make(chan bool, 10)
	store := newStore(t)
	l, addr := listen(t)
	s := start(t, &Server{Store: store, Decide: func(context.Context, Request) Decision {
		asked <- true
		return Decision{}
	}}, l, nil)
	a, b := connect(t, addr, Request{"a.service", "k"}).read(), connect(t, addr, Request{"b.service", "k"}).read()
	<-asked
	<-asked
	s.stop()
	late := connect(t, addr, Request{"late.service", "k"}).read()
	s.kill() // the process is gone
	for _, u := range []*unit{a, b, late} {
		select {
		case got := <-u.got:
			t.Fatalf("%s got %s, want to wait", u.Unit, brief(got))
		default:
		}
	}
	var mu sync.Mutex
	var order []string
	s = start(t, &Server{Store: store, Decide: func(_ context.Context, r Request) Decision {
		mu.Lock()
		defer mu.Unlock()
		order = append(order, r.Unit)
		return given(t, []byte(r.Unit))
	}}, l, store.restored(t))
	for _, u := range []*unit{a, b, late} {
		u.wants(t, []byte(u.Unit))
	}
	s.stop()
	if got, want := strings.Join(order, " "), "a.service b.service late.service"; got != want {
		t.Errorf("order = %q, want %q", got, want)
	}
	if n := store.len(); n != 0 {
		t.Errorf("%d connections are left in the store", n)
	}
}

// Who waits is answered also where the listening socket has gone.
func TestRestoreWithoutListener(t *testing.T) {
	asked := make(chan bool, 10)
	store := newStore(t)
	l, addr := listen(t)
	s := start(t, &Server{Store: store, Decide: func(context.Context, Request) Decision {
		asked <- true
		return Decision{}
	}}, l, nil)
	u := connect(t, addr, Request{"a.service", "k"}).read()
	<-asked
	s.kill()
	_ = l.Close()
	s = start(t, &Server{Store: store, Decide: func(context.Context, Request) Decision { return given(t, []byte("v")) }}, nil, store.restored(t))
	u.wants(t, []byte("v"))
	s.stop()
	if n := store.len(); n != 0 {
		t.Errorf("%d connections are left in the store", n)
	}
}

// Before it ends a process has to know that nobody comes any more.
func TestStop(t *testing.T) {
	asked := make(chan bool, 10)
	store := newStore(t)
	l, addr := listen(t)
	wait := func(context.Context, Request) Decision {
		asked <- true
		return Decision{}
	}
	s := start(t, &Server{Store: store, Decide: wait}, l, nil)
	a := connect(t, addr, Request{"a.service", "k"}).read()
	<-asked
	if s.StopIfIdle() {
		t.Error("StopIfIdle stops though a unit waits")
	}
	b := connect(t, addr, Request{"b.service", "k"}).read()
	<-asked // it is accepted still
	if n := s.Stop(); n != 2 {
		t.Errorf("Stop = %d, want 2", n)
	}
	late := connect(t, addr, Request{"late.service", "k"}).read()
	if n := s.Stop(); n != 2 {
		t.Errorf("Stop = %d after one more came, want 2", n)
	}
	s.stop()
	if n := s.Stop(); n != 0 {
		t.Errorf("Stop after the end = %d", n)
	}
	s.kill()
	s = start(t, &Server{Store: store, Decide: func(_ context.Context, r Request) Decision { return given(t, []byte(r.Unit)) }}, l, store.restored(t))
	for _, u := range []*unit{a, b, late} {
		u.wants(t, []byte(u.Unit))
	}
	s.holds(0)
	if !s.StopIfIdle() {
		t.Error("StopIfIdle does not stop though nobody waits")
	}
	s.stop()
}

// A refusal that came about because the context ended is none.
func TestStopDuringDecide(t *testing.T) {
	asked := make(chan bool, 1)
	store := newStore(t)
	l, addr := listen(t)
	s := start(t, &Server{Store: store, Decide: func(ctx context.Context, _ Request) Decision {
		asked <- true
		<-ctx.Done()
		d := given(t, []byte("v"))
		d.Refuse = ctx.Err()
		return d
	}}, l, nil)
	u := connect(t, addr, web).read()
	<-asked
	s.stop()
	s.kill()
	s = start(t, &Server{Store: store, Decide: func(context.Context, Request) Decision { return given(t, []byte("v")) }}, l, store.restored(t))
	u.wants(t, []byte("v"))
	s.stop()
}

func TestDecideAfterEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	d := given(t, []byte("v"))
	s := &Server{Decide: func(context.Context, Request) Decision {
		cancel()
		return Decision{Value: d.Value, Size: d.Size, Refuse: ctx.Err()}
	}}
	if got := s.decide(ctx, slog.New(slog.DiscardHandler), web); got.Refuse != nil || got.Value != nil {
		t.Errorf("decide = %+v, want that it waits", got)
	}
	if err := d.Value.Close(); err == nil {
		t.Error("the value was not closed")
	}
}

// An answer that is on the way when the context ends is finished.
func TestStopDuringAnswer(t *testing.T) {
	want := value(credential.MaxSize)
	l, addr := listen(t)
	s := start(t, &Server{Decide: func(context.Context, Request) Decision { return given(t, want) }}, l, nil)
	u := connect(t, addr, web)
	first := make([]byte, 1)
	if _, err := io.ReadFull(u.conn, first); err != nil {
		t.Fatal(err)
	}
	s.cancel()
	u.read().wants(t, want[1:])
	s.stop()
}

// A peer that does not read is not waited for, and gets no end: the next
// process fails it.
func TestStopWithoutReader(t *testing.T) {
	want := value(credential.MaxSize)
	var now atomic.Int64
	store := newStore(t)
	l, addr := listen(t)
	server := &Server{Store: store, Decide: func(context.Context, Request) Decision { return given(t, want) }}
	server.clock = func() time.Duration { return time.Duration(now.Load()) }
	s := start(t, server, l, nil)
	u := connect(t, addr, web)
	if _, err := io.ReadFull(u.conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	s.cancel()
	for ended := false; !ended; { // it has to see that ctx has ended, and then that time has
		now.Add(int64(time.Hour))
		s.wake()
		select {
		case <-s.done:
			ended = true
		default:
			runtime.Gosched()
		}
	}
	s.stop()
	s.kill()
	s = start(t, &Server{Store: store, Decide: server.Decide}, l, store.restored(t))
	u.read().fails(t)
	s.stop()
	s.has("level=WARN", errInterrupted.Error())
}

func TestFailWaiting(t *testing.T) {
	asked, goOn := make(chan bool, 1), make(chan bool)
	l, addr := listen(t)
	s := start(t, &Server{Decide: func(context.Context, Request) Decision {
		asked <- true
		<-goOn
		return given(t, []byte("v"))
	}}, l, nil)
	var units []*unit
	for i := range 5 {
		units = append(units, connect(t, addr, Request{fmt.Sprintf("u%d.service", i), "k"}).read())
	}
	s.holds(5)
	<-asked // the first is being decided on
	s.FailWaiting()
	s.cancel()
	for _, u := range units {
		u.fails(t)
	}
	goOn <- true
	s.stop()
	s.has("level=WARN", "unit=u0.service", errTold.Error())

	// Before Serve, too; who has not been accepted stays in the backlog.
	store := newStore(t)
	late := connect(t, addr, Request{"late.service", "k"}).read()
	s = start(t, &Server{Store: store, Decide: func(context.Context, Request) Decision { return Decision{} }}, l, nil)
	s.holds(1)
	s.kill()
	server := &Server{Store: store, Decide: func(context.Context, Request) Decision { return given(t, nil) }}
	server.FailWaiting()
	later := connect(t, addr, Request{"later.service", "k"}).read()
	s = start(t, server, l, store.restored(t))
	late.fails(t)
	s.stop()
	s = start(t, &Server{Decide: func(context.Context, Request) Decision { return given(t, []byte("v")) }}, l, nil)
	later.wants(t, []byte("v"))
	s.stop()
}

// What comes out of the store under our names need not be ours.
func TestRestoreOther(t *testing.T) {
	dir := t.TempDir()
	file, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	alone, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	listening, _ := listen(t)
	inet, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer inet.Close()
	var others []*os.File
	for i, fd := range []int{int(file.Fd()), pair[0], pair[1], alone, int(listening.Fd())} {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		others = append(others, os.NewFile(uintptr(dup), storedName(time.Second, uint64(i))))
	}
	tcp, err := inet.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	others = append(others, tcp)
	for _, fd := range []int{pair[0], pair[1], alone} {
		_ = unix.Close(fd)
	}
	_ = file.Close()
	store := newStore(t)
	l, addr := listen(t)
	s := start(t, &Server{Store: store, Decide: func(context.Context, Request) Decision { return given(t, []byte("v")) }}, l, others)
	connect(t, addr, web).read().wants(t, []byte("v"))
	s.stop()
	for i, f := range others {
		if err := f.Close(); err == nil {
			t.Errorf("%s was not closed", f.Name())
		}
		if i < 5 && store.drops[i] != storedName(time.Second, uint64(i)) {
			t.Errorf("dropped %q", store.drops)
		}
	}
}

// A store that does not work takes nothing from those who are answered.
func TestStoreFails(t *testing.T) {
	store := newStore(t)
	store.err = errors.New("nobody listens")
	l, addr := listen(t)
	s := start(t, &Server{Store: store, Decide: func(context.Context, Request) Decision { return given(t, []byte("v")) }}, l, nil)
	connect(t, addr, web).read().wants(t, []byte("v"))
	s.stop()
	s.has("level=WARN", "could not be stored", "nobody listens")
}

func TestServeTwice(t *testing.T) {
	l, _ := listen(t)
	s := start(t, &Server{}, l, nil)
	s.stop()
	if err := s.Serve(t.Context(), l, nil); err == nil {
		t.Error("the second Serve succeeded")
	}
	s.Retry() // does nothing, and does not harm
	if w := (&Server{}).Waiting(); len(w) != 0 {
		t.Errorf("Waiting() = %v", w)
	}
	(&Server{}).Retry()
}

// Where sendfile does not work, the value goes through a buffer that is zeroed.
func TestCopied(t *testing.T) {
	want := value(credential.MaxSize / 2)
	f, err := memfile(want)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(r)
		_ = r.Close()
		got <- b
	}()
	l := &loop{Server: &Server{}, log: slog.New(slog.DiscardHandler)}
	a := &answer{value: f, size: int64(len(want)), copied: true}
	for a.off < a.size {
		n, err := l.writeSome(int(w.Fd()), a)
		if err != nil {
			t.Fatal(err)
		}
		a.off += int64(n)
		if !bytes.Equal(l.buf, make([]byte, chunk)) {
			t.Fatal("the buffer still has a part of the value")
		}
	}
	a.size++
	if _, err := l.writeSome(int(w.Fd()), a); err == nil {
		t.Error("the end of the file came as no error")
	}
	_ = w.Close()
	if b := <-got; !bytes.Equal(b, want) {
		t.Errorf("got %s, want %s", brief(b), brief(want))
	}
}

// Kills before every single system call that somebody else can notice. Whatever
// was going on, a unit gets its whole value or is failed, and those that only
// waited get it.
func TestKilledAtEveryStep(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	steps := make(map[string]int)
	values, failed := 0, 0
	// What is a step depends on timing, so that one pass may miss a kind.
	missed := func() (kinds []string) {
		for _, step := range []string{"accept", "kept", "mark", "write", "given", "shutdown", "drop", "close", "poll"} {
			if steps[step] == 0 {
				kinds = append(kinds, step)
			}
		}
		return kinds
	}
	stride := 1
	if testing.Short() {
		stride = 7
	}
	for pass := 0; pass == 0 || pass < 20 && len(missed()) > 0; pass++ {
		for first := 1; ; first += 1 + rng.IntN(stride) {
			second := 1 + rng.IntN(60)
			killed := killTwice(t, first, second, steps, &values, &failed)
			if t.Failed() {
				t.Fatalf("killed at steps %d and %d", first, second)
			}
			if !killed {
				break
			}
		}
	}
	t.Logf("kills: %v; values %d, failed %d", steps, values, failed)
	if kinds := missed(); len(kinds) > 0 {
		t.Errorf("never killed at %q", kinds)
	}
}

// killTwice has four units ask, and kills the server at two steps. It reports
// whether the first was reached.
func killTwice(t *testing.T, first, second int, steps map[string]int, values, failed *int) (killed bool) {
	var there atomic.Bool
	reached := false
	want := map[string][]byte{"large.service": value(credential.MaxSize), "small.service": []byte("small"), "late.service": value(300_000)}
	store := newStore(t)
	l, addr := listen(t)
	server := func(kill int) *Server {
		s := &Server{Store: store, Decide: func(_ context.Context, r Request) Decision {
			switch {
			case r.Unit == "refused.service":
				return Decision{Refuse: errors.New("no")}
			case r.Unit == "late.service" && !there.Load():
				return Decision{}
			}
			d := given(t, want[r.Unit])
			d.Given = func() {}
			return d
		}}
		n := 0
		s.step = func(at string) {
			if n++; n == kill {
				steps[at]++
				reached = true
				runtime.Goexit()
			}
		}
		return s
	}
	var units []*unit
	for _, name := range []string{"large.service", "refused.service", "small.service", "late.service"} {
		units = append(units, connect(t, addr, Request{name, "k"}))
	}
	r := start(t, server(first), l, nil)
	// Nobody reads before the first kill, or before nothing moves without that.
	quiet := make(chan bool)
	go func() {
		defer close(quiet)
		for len(r.Waiting()) != 1 || r.Waiting()[0].Unit != "late.service" {
			select {
			case <-r.done:
				return
			case <-time.After(100 * time.Microsecond):
			}
		}
	}()
	<-quiet
	for _, u := range units {
		u.read()
	}
	there.Store(true)
	r.Retry()
	for _, u := range units {
		select {
		case <-r.done:
		case b, ok := <-u.got:
			again := make(chan []byte, 1)
			if ok {
				again <- b
			}
			close(again)
			u.got = again
		}
	}
	r.cancel()
	<-r.done
	killed = reached
	r.kill()
	r = start(t, server(second), l, store.restored(t))
	all := make(chan bool)
	outcomes := make([][]byte, len(units))
	go func() {
		defer close(all)
		for i, u := range units {
			outcomes[i] = <-u.got
		}
	}()
	select {
	case <-all:
	case <-r.done:
	}
	r.cancel()
	<-r.done
	r.kill()
	r = start(t, server(0), l, store.restored(t))
	<-all
	r.stop()
	for i, u := range units {
		switch got := outcomes[i]; {
		case len(got) > credential.MaxSize:
			*failed++
		case want[u.Unit] != nil && bytes.Equal(got, want[u.Unit]):
			*values++
		default:
			t.Errorf("%s got %s", u.Unit, brief(got))
		}
	}
	if n := store.len(); n != 0 {
		t.Errorf("%d connections are left in the store", n)
	}
	return killed
}
