package vsockrpc

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// newServer is a test's server with a log.
func newServer(interfaces ...Interface) (*Server, *logBuffer) {
	log := &logBuffer{}
	return &Server{Interfaces: append([]Interface{testInterface()}, interfaces...), Authorize: allowAll, Log: log.logger()}, log
}

func TestServerAnswers(t *testing.T) {
	for call, want := range map[string]string{
		`{"method":"org.example.test.Echo","parameters":{"s":"x"}}`:                                                 `{"parameters":{"s":"x"}}`,
		` {"oneway":false,"more":null,"parameters":{"s":"\u0041"},"method":"org.example.test.Echo"} `:               `{"parameters":{"s":"A"}}`,
		`{"method":"org.example.test.Nothing"}`:                                                                     `{"parameters":{}}`,
		`{"method":"org.example.test.Nothing","parameters":null}`:                                                   `{"parameters":{}}`,
		`{"method":"org.example.test.Echo"}`:                                                                        `{"error":"org.varlink.service.InvalidParameter","parameters":{"parameter":"s (byte 2: is missing)"}}`,
		`{"method":"org.example.test.Echo","parameters":{"s":1}}`:                                                   `{"error":"org.varlink.service.InvalidParameter","parameters":{"parameter":"s (byte 52: want a string, have a number)"}}`,
		`{"method":"org.example.test.Echo","parameters":{"s":"","x":1}}`:                                            `{"error":"org.varlink.service.InvalidParameter","parameters":{"parameter":"(byte 55: unknown key)"}}`,
		`{"method":"org.example.test.Nowhere"}`:                                                                     `{"error":"org.varlink.service.MethodNotFound","parameters":{"method":"org.example.test.Nowhere"}}`,
		`{"method":"org.example.other.Echo"}`:                                                                       `{"error":"org.varlink.service.InterfaceNotFound","parameters":{"interface":"org.example.other"}}`,
		`{"method":"org.example.test.Missing"}`:                                                                     `{"error":"org.varlink.service.MethodNotImplemented","parameters":{"method":"org.example.test.Missing"}}`,
		`{"method":"org.example.test.Denied"}`:                                                                      `{"error":"org.varlink.service.PermissionDenied","parameters":{}}`,
		`{"method":"org.example.test.Count"}`:                                                                       `{"error":"org.varlink.service.ExpectedMore","parameters":{}}`,
		`{"method":"org.example.test.Fail"}`:                                                                        `{"error":"io.guestagent.InternalError","parameters":{}}`,
		`{"method":"org.example.test.Panic"}`:                                                                       `{"error":"io.guestagent.InternalError","parameters":{}}`,
		`{"method":"org.example.test.Index"}`:                                                                       `{"error":"io.guestagent.InternalError","parameters":{}}`,
		`{"method":"org.example.test.Huge"}`:                                                                        `{"error":"io.guestagent.InternalError","parameters":{}}`,
		`{"method":"org.example.test.TwoLasts"}`:                                                                    `{"parameters":{}}`,
		`{"method":"org.example.test.Echo","upgrade":true}`:                                                         `{"error":"org.varlink.service.InvalidParameter","parameters":{"parameter":"upgrade"}}`,
		`{"method":"org.varlink.service.GetInfo"}`:                                                                  `{"parameters":{"vendor":"","product":"","version":"","url":"","interfaces":["io.guestagent","org.example.test","org.varlink.service"]}}`,
		`{"method":"org.varlink.service.GetInfo","parameters":{"a":1}}`:                                             `{"error":"org.varlink.service.InvalidParameter","parameters":{"parameter":"(byte 54: unknown key)"}}`,
		`{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"org.example.test"}}`:    `{"parameters":{"description":"interface org.example.test\u000amethod Echo(s: string) -> (s: string)\u000a"}}`,
		`{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"org.example.none"}}`:    `{"error":"org.varlink.service.InterfaceNotFound","parameters":{"interface":"org.example.none"}}`,
		`{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"` + marker + `"}}`:      `{"error":"org.varlink.service.InvalidParameter","parameters":{"parameter":"interface (byte 0: not the name of an interface)"}}`,
		`{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"a.b","interface":"c"}}`: `{"error":"org.varlink.service.InvalidParameter","parameters":{"parameter":"interface (byte 88: the key stands twice)"}}`,
	} {
		t.Run("", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, log := newServer()
				c := serve(t, s).dial()
				defer c.Close()
				send(t, c, call+"\n")
				expect(t, c, want)
				// The connection is good for another call.
				send(t, c, `{"method":"org.example.test.Echo","parameters":{"s":"y"}}`+"\n")
				expect(t, c, `{"parameters":{"s":"y"}}`)
				internal, logged := strings.Contains(want, "InternalError"), strings.Contains(log.String(), `"ERROR"`)
				if internal != logged && !strings.Contains(call, "TwoLasts") {
					t.Errorf("%s: the log is %q", call, log)
				}
				if strings.Contains(log.String(), marker) {
					t.Errorf("%s: the log has content: %s", call, log)
				}
			})
		})
	}
}

// What is not a call ends the connection.
func TestServerBadMessages(t *testing.T) {
	for call, want := range map[string]string{
		``:                                       "byte 0: want an object, have the end",
		`x`:                                      "byte 0: want an object, have no JSON",
		`{}`:                                     "byte 2: method: is missing",
		`{"method":1}`:                           "byte 10: method: want a string, have a number",
		`{"method":"` + marker + `"}`:            "byte 10: method: not the name of a method",
		`{"method":"a.b.C","method":""}`:         "byte 18: method: the key stands twice",
		`{"method":"a.b.C","` + marker + `":1}`:  "byte 18: unknown key",
		`{"method":"a.b.C","parameters":[]}`:     "byte 31: parameters: want an object, have an array",
		`{"method":"a.b.C","parameters":{"a":}}`: "byte 36: parameters: want a value, have no JSON",
		`{"method":"a.b.C","more":true,"oneway":true}`:      "byte 0: more and oneway exclude each other",
		`{"method":"a.b.C","more":"` + marker + `"}`:        "byte 25: more: want a boolean, have a string",
		`{"method":"a.b.C"}{}`:                              "byte 18: something follows the end",
		`{"parameters":` + strings.Repeat("[", 1000) + `}`:  "byte 14: parameters: want an object, have an array",
		`{"parameters":{"a":` + strings.Repeat("[", 1000):   "byte 25: parameters: nested deeper than 8",
		`{"parameters":{"a":` + strings.Repeat(`{"a":`, 99): "byte 49: parameters: nested deeper than 8",
		"GET / HTTP/1.1\r\n\r\n":                            "byte 0: want an object, have no JSON",
		"CONNECT 1022":                                      "byte 0: want an object, have no JSON",
	} {
		t.Run("", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, log := newServer()
				c := serve(t, s).dial()
				defer c.Close()
				send(t, c, strings.ReplaceAll(call, "\n", " ")+"\n")
				expect(t, c, `{"error":"io.guestagent.BadMessage","parameters":{"problem":"`+want+`"}}`)
				expectEnd(t, c)
				if strings.Contains(log.String(), marker) {
					t.Errorf("%s: the log has content: %s", call, log)
				}
			})
		})
	}
}

func TestServerMoreAndOneway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newServer()
		c := serve(t, s).dial()
		defer c.Close()
		// Calls in one packet are answered in order, oneway ones not at all.
		send(t, c, `{"method":"org.example.test.Count","more":true}`+"\n"+
			`{"method":"org.example.test.Echo","parameters":{"s":"a"},"oneway":true}`+"\n"+
			`{"method":"org.example.test.Count","oneway":true}`+"\n"+
			`{"method":"org.example.test.Fail","oneway":true}`+"\n"+
			`{"method":"org.example.none.Echo","oneway":true}`+"\n"+
			`{"method":"org.example.test.Echo","more":true,"parameters":{"s":"b"}}`+"\n"+
			`{"method":"org.example.test.Fail","more":true}`+"\n")
		expect(t, c, `{"parameters":{"i":0},"continues":true}`)
		expect(t, c, `{"parameters":{"i":1},"continues":true}`)
		expect(t, c, `{"parameters":{"i":2}}`)
		expect(t, c, `{"parameters":{"s":"b"}}`)
		expect(t, c, `{"error":"io.guestagent.InternalError","parameters":{}}`)
	})
}

// A call that streams sees the next calls wait, and its peer go.
func TestServerStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newServer()
		l := serve(t, s)
		c := l.dial()
		send(t, c, `{"method":"org.example.test.Stream","more":true}`+"\n")
		expect(t, c, `{"parameters":{},"continues":true}`)
		<-time.After(time.Hour) // no limit holds for a stream
		if a := s.Activity(); a.Calls != 1 || a.Conns != 1 {
			t.Errorf("after an hour %+v", a)
		}
		send(t, c, `{"method":`) // the next call begins
		synctest.Wait()
		_ = c.Close()
		synctest.Wait()
		if a := s.Activity(); a.Calls != 0 || a.Conns != 0 {
			t.Errorf("after the peer went %+v", a)
		}
	})
}

func TestServerDeadlines(t *testing.T) {
	for name, test := range map[string]struct {
		send []string // each a second before the limit that it meets
		gaps []time.Duration
		want time.Duration // when the connection ends
	}{
		"silence":          {want: DefaultFirstByteTimeout},
		"one byte":         {send: []string{"{"}, gaps: []time.Duration{9 * time.Second}, want: 9*time.Second + DefaultMessageTimeout},
		"byte by byte":     {send: strings.Split(strings.Repeat("{", 100), ""), gaps: []time.Duration{time.Second}, want: time.Second + DefaultMessageTimeout},
		"idle after calls": {send: []string{`{"method":"org.example.test.Nothing","oneway":true}` + "\n"}, gaps: []time.Duration{time.Second}, want: time.Second + DefaultIdleTimeout},
		"call, then slow": {
			send: []string{`{"method":"org.example.test.Nothing","oneway":true}` + "\n{"}, gaps: []time.Duration{time.Second}, want: time.Second + DefaultMessageTimeout,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, _ := newServer()
				c := serve(t, s).dial()
				defer c.Close()
				begin := time.Now()
				var wg sync.WaitGroup
				wg.Go(func() {
					for _, part := range test.send {
						<-time.After(test.gaps[0])
						if _, err := c.Write([]byte(strings.ReplaceAll(part, "\n", "\x00"))); err != nil {
							return
						}
					}
				})
				expectEnd(t, c)
				if d := time.Since(begin); d != test.want {
					t.Errorf("it ended after %v, want %v", d, test.want)
				}
				wg.Wait()
			})
		})
	}
}

// A peer that does not read its reply does not keep the server.
func TestServerSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newServer()
		c := serve(t, s).dial()
		defer c.Close()
		send(t, c, `{"method":"org.example.test.Nothing"}`+"\n")
		<-time.After(DefaultWriteTimeout - time.Second)
		synctest.Wait()
		if a := s.Activity(); a.Conns != 1 {
			t.Errorf("before the limit %+v", a)
		}
		<-time.After(2 * time.Second)
		synctest.Wait()
		if a := s.Activity(); a.Conns != 0 {
			t.Errorf("past the limit %+v", a)
		}
	})
}

func TestServerTooLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, log := newServer()
		s.MessageLimit = 100
		c := serve(t, s).dial()
		defer c.Close()
		go func() { _, _ = c.Write([]byte(strings.Repeat(marker, 100))) }() // it blocks: nobody reads it
		expect(t, c, `{"error":"io.guestagent.MessageTooLarge","parameters":{"limit":100}}`)
		expectEnd(t, c)
		if strings.Contains(log.String(), marker) {
			t.Errorf("the log has content: %s", log)
		}
	})
}

// Few large messages are in memory at once; whoever has to wait too long is told.
func TestServerLargeMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newServer()
		l := serve(t, s)
		part := `{"method":"org.example.test.Echo","parameters":{"s":"` + strings.Repeat("x", smallBuffer)
		var conns []net.Conn
		for range largeMessages {
			c := l.dial()
			defer c.Close()
			send(t, c, part)
			conns = append(conns, c)
		}
		late := l.dial()
		defer late.Close()
		go func() { _, _ = late.Write([]byte(part)) }()
		begin := time.Now()
		expect(t, late, `{"error":"io.guestagent.Busy","parameters":{}}`)
		if d := time.Since(begin); d != largeWait {
			t.Errorf("told so after %v, want %v", d, largeWait)
		}
		small := l.dial()
		defer small.Close()
		send(t, small, `{"method":"org.example.test.Nothing"}`+"\n")
		expect(t, small, `{"parameters":{}}`)
		waits := l.dial()
		defer waits.Close()
		go func() { _, _ = waits.Write([]byte(part + `"}}` + "\x00")) }()
		synctest.Wait()
		send(t, conns[0], `"}}`+"\n")
		if got := readMessage(t, conns[0]); len(got) < smallBuffer {
			t.Errorf("the first one got %s", got)
		}
		if got := readMessage(t, waits); len(got) < smallBuffer {
			t.Errorf("the one that waits got %s", got)
		}
	})
}

func TestServerConnectionLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, log := newServer()
		vsock, local := newPipeListener(), newPipeListener()
		serveOn(t, s, Limited{vsock, 12})
		serveOn(t, s, local)
		var conns []net.Conn
		for range 12 {
			conns = append(conns, vsock.dial())
		}
		synctest.Wait()
		for range 1000 {
			c := vsock.dial()
			synctest.Wait()
			expect(t, c, `{"error":"io.guestagent.Busy","parameters":{}}`)
			expectEnd(t, c)
			_ = c.Close()
		}
		for range 4 {
			c := local.dial()
			send(t, c, `{"method":"org.example.test.Nothing"}`+"\n")
			expect(t, c, `{"parameters":{}}`)
			conns = append(conns, c)
		}
		c := local.dial()
		expect(t, c, `{"error":"io.guestagent.Busy","parameters":{}}`)
		_ = c.Close()

		_ = conns[0].Close()
		synctest.Wait()
		c = vsock.dial()
		send(t, c, `{"method":"org.example.test.Nothing"}`+"\n")
		expect(t, c, `{"parameters":{}}`)
		for _, c := range append(conns, c) {
			_ = c.Close()
		}
		if n := strings.Count(log.String(), "too many"); n < 1 || n > 2*logBurst {
			t.Errorf("%d lines in the log", n)
		}
	})
}

// Peers that do not read what they are told are not waited for, and not kept.
func TestServerFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newServer()
		s.MaxConns = 1
		l := serve(t, s)
		good := l.dial()
		defer good.Close()
		begin := time.Now()
		for range 10_000 {
			defer l.dial().Close()
		}
		if d := time.Since(begin); d != 0 {
			t.Errorf("accepting waited for %v", d)
		}
		send(t, good, `{"method":"org.example.test.Nothing"}`+"\n")
		expect(t, good, `{"parameters":{}}`)
	})
}

func TestServerNobody(t *testing.T) {
	for name, authorize := range map[string]func(Peer) error{
		"nil":   nil,
		"error": func(Peer) error { return errors.New("no") },
		"panic": func(Peer) error { panic("no") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, log := newServer()
				s.Authorize = authorize
				l := serve(t, s)
				for range 100 {
					c := l.dial()
					expectEnd(t, c)
					_ = c.Close()
				}
				if n := strings.Count(log.String(), "refused a peer"); n != logBurst {
					t.Errorf("%d lines in the log, want %d", n, logBurst)
				}
				<-time.After(logEvery)
				c := l.dial()
				expectEnd(t, c)
				synctest.Wait()
				if !strings.Contains(log.String(), `"suppressed":92`) {
					t.Errorf("the log does not say how many were not logged: %s", log)
				}
				if a := s.Activity(); !a.Last.IsZero() {
					t.Errorf("peers that were refused are activity: %+v", a)
				}
			})
		})
	}
}

func TestServerAuthorizeCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, log := newServer()
		s.AuthorizeCall = func(_ context.Context, _ Peer, method string) error {
			switch {
			case method == "org.example.test.Panic":
				panic("no")
			case !strings.HasSuffix(method, ".Nothing"):
				return errors.New("only nothing")
			}
			return nil
		}
		c := serve(t, s).dial()
		defer c.Close()
		for method, want := range map[string]string{
			"org.example.test.Nothing":    `{"parameters":{}}`,
			"org.example.test.Echo":       `{"error":"org.varlink.service.PermissionDenied","parameters":{}}`,
			"org.example.test.Panic":      `{"error":"org.varlink.service.PermissionDenied","parameters":{}}`,
			"org.varlink.service.GetInfo": `{"error":"org.varlink.service.PermissionDenied","parameters":{}}`,
		} {
			send(t, c, `{"method":"`+method+`"}`+"\n")
			expect(t, c, want)
		}
		if !strings.Contains(log.String(), "only nothing") {
			t.Errorf("the log is %s", log)
		}
	})
}

func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var ctxErr atomic.Value
		s, _ := newServer(Interface{Name: "org.example.slow", Methods: map[string]Handler{
			"Wait": func(ctx context.Context, call *Call) error {
				<-release
				if ctx.Err() != nil {
					ctxErr.Store(ctx.Err())
				}
				return nil
			},
		}})
		l := newPipeListener()
		served := make(chan error, 1)
		go func() { served <- s.Serve(t.Context(), l) }()
		idle, half, stream, busy := l.dial(), l.dial(), l.dial(), l.dial()
		send(t, half, `{"method":`)
		send(t, stream, `{"method":"org.example.test.Stream","more":true}`+"\n")
		expect(t, stream, `{"parameters":{},"continues":true}`)
		send(t, busy, `{"method":"org.example.slow.Wait"}`+"\n"+`{"method":"org.example.test.Nothing"}`+"\n")
		synctest.Wait()

		down := make(chan error, 1)
		go func() { down <- s.Shutdown(t.Context()) }()
		for _, c := range []net.Conn{idle, half, stream} {
			expectEnd(t, c)
			_ = c.Close()
		}
		synctest.Wait()
		select {
		case err := <-down:
			t.Errorf("Shutdown = %v with a call in flight", err)
		default:
		}
		if a := s.Activity(); a.Calls != 1 || a.Conns != 1 {
			t.Errorf("during Shutdown %+v", a)
		}
		close(release)
		expect(t, busy, `{"parameters":{}}`)
		expectEnd(t, busy) // the call that waited behind it is not carried out
		if err := <-down; err != nil {
			t.Errorf("Shutdown = %v", err)
		}
		if err := <-served; !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve = %v", err)
		}
		if err := ctxErr.Load(); err != nil {
			t.Errorf("the call in flight had its context ended: %v", err)
		}
		if err := s.Serve(t.Context(), newPipeListener()); !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve after Shutdown = %v", err)
		}
	})
}

func TestShutdownByForce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newServer(Interface{Name: "org.example.slow", Methods: map[string]Handler{
			"Wait": func(ctx context.Context, call *Call) error { <-ctx.Done(); return ctx.Err() },
		}})
		l := serve(t, s)
		c := l.dial()
		send(t, c, `{"method":"org.example.slow.Wait"}`+"\n")
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown = %v", err)
		}
		expectEnd(t, c)
	})
}

func TestServeContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newServer()
		cause := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		l := newPipeListener()
		served := make(chan error, 1)
		go func() { served <- s.Serve(ctx, l) }()
		c := l.dial()
		send(t, c, `{"method":"org.example.test.Stream","more":true}`+"\n")
		expect(t, c, `{"parameters":{},"continues":true}`)
		cancel(cause)
		expectEnd(t, c)
		if err := <-served; !errors.Is(err, cause) {
			t.Errorf("Serve = %v", err)
		}
		if a := s.Activity(); a.Conns != 0 {
			t.Errorf("after Serve %+v", a)
		}
	})
}

// A failingListener fails as told.
type failingListener struct {
	*pipeListener
	errs chan error
}

func (l failingListener) Accept() (net.Conn, error) {
	select {
	case err := <-l.errs:
		return nil, err
	default:
		return l.pipeListener.Accept()
	}
}

func TestServeAcceptErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newServer()
		l := failingListener{newPipeListener(), make(chan error, 100)}
		for range 20 {
			l.errs <- &net.OpError{Op: "accept", Err: syscall.EMFILE}
		}
		served := make(chan error, 1)
		go func() { served <- s.Serve(t.Context(), l) }()
		c := l.dial()
		send(t, c, `{"method":"org.example.test.Nothing"}`+"\n")
		expect(t, c, `{"parameters":{}}`)
		_ = c.Close()
		l.errs <- io.ErrNoProgress
		_ = l.dial().Close()
		if err := <-served; !errors.Is(err, io.ErrNoProgress) {
			t.Errorf("Serve = %v", err)
		}
	})
}

func TestWaitIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newServer()
		l := serve(t, s)
		begin := time.Now()
		if err := s.WaitIdle(t.Context(), 10*time.Second); err != nil || time.Since(begin) != 10*time.Second {
			t.Errorf("WaitIdle of nothing = %v after %v", err, time.Since(begin))
		}
		begin = time.Now()
		c := l.dial()
		done := make(chan error, 1)
		go func() { done <- s.WaitIdle(t.Context(), 10*time.Second) }()
		<-time.After(5 * time.Second)
		send(t, c, `{"method":"org.example.test.Stream","more":true}`+"\n")
		expect(t, c, `{"parameters":{},"continues":true}`)
		<-time.After(time.Hour)
		_ = c.Close()
		if err := <-done; err != nil || time.Since(begin) != time.Hour+15*time.Second {
			t.Errorf("WaitIdle = %v after %v", err, time.Since(begin))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := s.WaitIdle(ctx, time.Hour); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("WaitIdle = %v", err)
		}
	})
}

// Any process of a guest may send what is no message, as often as it likes.
func TestServerLogsEndsSparingly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, log := newServer()
		l := serve(t, s)
		for range 10 * logBurst {
			c := l.dial()
			send(t, c, "no message\n")
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}
		synctest.Wait()
		if n := strings.Count(log.String(), "closing a connection"); n != logBurst {
			t.Errorf("%d lines of %d connections, want %d", n, 10*logBurst, logBurst)
		}
	})
}
