package vsockrpc

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A vmm is a Unix socket that answers CONNECT as told.
func vmm(t *testing.T, answer func(c net.Conn, line string)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "v.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				var line []byte
				for b := make([]byte, 1); ; {
					if _, err := c.Read(b); err != nil {
						return
					}
					if b[0] == '\n' {
						break
					}
					line = append(line, b[0])
				}
				answer(c, string(line))
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return path
}

// The first bytes of the guest come in the same packet as the OK.
func TestMuxNoByteLost(t *testing.T) {
	lines := make(chan string, 1)
	path := vmm(t, func(c net.Conn, line string) {
		lines <- line
		_, _ = c.Write([]byte("OK 1073741824\n" + `{"parameters":{"generation":7,"removed":[],"unchanged":[]}}` + "\x00" + strings.Repeat(`{"parameters":{"generation":8,"removed":[],"unchanged":[]}}`+"\x00", 1000)))
		_, _ = io.Copy(io.Discard, c)
	})
	c := dialTest(t, Target{Scheme: SchemeMux, Path: path, Port: 77})
	if line := <-lines; line != "CONNECT 77" {
		t.Errorf("the VMM was asked %q", line)
	}
	for i := range 1001 {
		r, err := Credentials{Client: c}.Remove(t.Context(), &RemoveParams{})
		if err != nil || r.Generation != 7+int64(min(i, 1)) {
			t.Fatalf("call %d = %+v, %v", i, r, err)
		}
	}
}

func TestMuxHandshake(t *testing.T) {
	for answer, want := range map[string]Step{
		"":                                    StepListener,
		"O":                                   StepHandshake,
		"OK 12":                               StepHandshake,
		"OK\n":                                StepHandshake,
		"OK \n":                               StepHandshake,
		"OK x\n":                              StepHandshake,
		"OK -1\n":                             StepHandshake,
		"OK 12345678901\n":                    StepHandshake,
		"ok 1\n":                              StepHandshake,
		"OK 1\r\n":                            StepHandshake,
		"\n":                                  StepHandshake,
		"HTTP/1.1 400 Bad Request\r\n\r\n":    StepHandshake,
		strings.Repeat("O", 1<<20):            StepHandshake,
		"\x1b[31mOK 1\n":                      StepHandshake,
		"OK 0\n":                              "",
		"OK 4294967295\n":                     "",
		"OK 1\nand a lot that is the guest's": "",
	} {
		path := vmm(t, func(c net.Conn, _ string) { _, _ = io.WriteString(c, answer) })
		conn, err := Dialer{}.DialConn(t.Context(), Target{Scheme: SchemeMux, Path: path, Port: 1})
		if err == nil {
			_ = conn.Close()
		}
		e, _ := errors.AsType[*ConnectError](err)
		if (err == nil) != (want == "") || e != nil && (e.Step != want || strings.Contains(err.Error(), "\x1b")) {
			t.Errorf("with the answer %.40q: %v, want step %q", answer, err, want)
		}
	}
}

// A VMM that is silent, or slow, is not waited for.
func TestMuxSilence(t *testing.T) {
	for _, answer := range []string{"", "O", "OK 1"} {
		hold := make(chan struct{})
		path := vmm(t, func(c net.Conn, _ string) { _, _ = io.WriteString(c, answer); <-hold })
		_, err := Dialer{Timeout: 50 * time.Millisecond}.DialConn(t.Context(), Target{Scheme: SchemeMux, Path: path, Port: 1})
		if e, ok := errors.AsType[*ConnectError](err); !ok || e.Step != StepAnswer || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %q: %v, want step %s", answer, err, StepAnswer)
		}
		ctx, cancel := context.WithCancel(t.Context())
		stop := time.AfterFunc(20*time.Millisecond, cancel)
		if _, err := Dial(ctx, Target{Scheme: SchemeMux, Path: path, Port: 1}); !errors.Is(err, context.Canceled) {
			t.Errorf("after %q and with the context ended: %v", answer, err)
		}
		stop.Stop()
		cancel()
		close(hold)
	}
}

// The handshake alone, on the bubble's clock.
func TestMuxDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		var wg sync.WaitGroup
		defer wg.Wait()
		defer ours.Close()
		defer theirs.Close()
		wg.Go(func() {
			buf := make([]byte, 100)
			_, _ = theirs.Read(buf)
			for { // one byte a second, for ever
				<-time.After(time.Second)
				if _, err := theirs.Write([]byte("O")); err != nil {
					return
				}
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), 5500*time.Millisecond)
		defer cancel()
		begin := time.Now()
		if err := handshake(ctx, ours, 1); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begin) != 5500*time.Millisecond {
			t.Errorf("handshake = %v after %v", err, time.Since(begin))
		}
	})
}

func TestDialNobody(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	for _, test := range []struct {
		target Target
		want   Step
	}{
		{Target{Scheme: SchemeUnix, Path: filepath.Join(dir, "none")}, StepSocket},
		{Target{Scheme: SchemeMux, Path: filepath.Join(dir, "none\x1b[31m"), Port: 1}, StepSocket},
		{Target{Scheme: SchemeUnix, Path: stale}, StepListener},
		{Target{Scheme: SchemeMux, Path: stale, Port: 1}, StepListener},
		{Target{Scheme: SchemeUnix, Path: dir}, StepListener}, // the kernel refuses what is no socket in the same way
		{Target{Scheme: SchemeUnix, Path: strings.Repeat("x", 200)}, StepSocket},
		{Target{}, StepSocket},
		{Target{Scheme: "tcp"}, StepSocket},
	} {
		_, err := Dial(t.Context(), test.target)
		if e, ok := errors.AsType[*ConnectError](err); !ok || e.Step != test.want || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("Dial(%q) = %v, want step %s", test.target, err, test.want)
		}
	}
}

func TestDialRetry(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	target := Target{Scheme: SchemeUnix, Path: path}
	s, _ := testServer()
	var wg sync.WaitGroup
	wg.Go(func() {
		<-time.After(200 * time.Millisecond)
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Error(err)
			return
		}
		_ = s.Serve(t.Context(), l)
	})
	c, err := Dialer{RetryFor: time.Minute}.Dial(t.Context(), target)
	if err != nil {
		t.Fatalf("Dial = %v", err)
	}
	if err := c.Call(t.Context(), "org.example.test.Nothing", nil, nil); err != nil {
		t.Errorf("Call = %v", err)
	}
	_ = c.Close()
	s.Close()
	wg.Wait()

	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = Dialer{RetryFor: time.Hour}.Dial(ctx, target)
	if e, ok := errors.AsType[*ConnectError](err); !ok || e.Step != StepSocket {
		t.Errorf("Dial until the context ends = %v, want the last step that failed", err)
	}

	// What will not get better is not tried again.
	var tries atomic.Int32
	mux := vmm(t, func(c net.Conn, _ string) { tries.Add(1); _, _ = io.WriteString(c, "garbage\n") })
	if _, err := (Dialer{RetryFor: time.Hour}).Dial(t.Context(), Target{Scheme: SchemeMux, Path: mux, Port: 1}); err == nil || tries.Load() != 1 {
		t.Errorf("Dial = %v after %d tries, want one", err, tries.Load())
	}
}

func FuzzHandshake(f *testing.F) {
	for _, s := range []string{"OK 1\n", "OK 1073741824\nrest", "O", "OK 12345678901\n", "\n", strings.Repeat("1", 40)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		rw := &answered{rest: answer}
		err := connectMux(rw, 5)
		line, rest, found := strings.Cut(string(answer), "\n")
		number, ok := strings.CutPrefix(line, "OK ")
		want := found && ok && number != "" && len(number) <= 10 && strings.Trim(number, "0123456789") == ""
		if (err == nil) != want || string(rw.asked) != "CONNECT 5\n" {
			t.Errorf("the answer %q: %v, want ok %v", answer, err, want)
		}
		if err == nil && string(rw.rest) != rest {
			t.Errorf("the answer %q: %q is left, want %q", answer, rw.rest, rest)
		}
		if read := len(answer) - len(rw.rest); read > maxHandshake {
			t.Errorf("the answer %q: %d bytes were read", answer, read)
		}
	})
}

// answered takes what is asked, and has an answer.
type answered struct{ asked, rest []byte }

func (a *answered) Write(b []byte) (int, error) {
	a.asked = append(a.asked, b...)
	return len(b), nil
}

func (a *answered) Read(b []byte) (int, error) {
	if len(a.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(b, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}
