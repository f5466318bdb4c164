package vsockrpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// The defaults of a [Server].
const (
	DefaultMaxConns         = 16
	DefaultFirstByteTimeout = 10 * time.Second
	DefaultIdleTimeout      = time.Minute
	DefaultMessageTimeout   = time.Minute
	DefaultWriteTimeout     = 30 * time.Second

	// largeMessages is how many messages that do not fit into a small buffer
	// may be in memory at once, over all connections.
	largeMessages = 2
	// largeWait is how long a connection waits for its turn to send one.
	largeWait = 10 * time.Second
	// refusers is how many connections past the limit are told so at once; any
	// more are just closed.
	refusers = 16
)

// ErrServerClosed is returned by Serve after Shutdown or Close.
var ErrServerClosed = errors.New("server is closed")

// errBusyServer is answered with io.guestagent.Busy.
var errBusyServer = errors.New("too much at once")

// A Server answers Varlink calls. Its fields may not be changed after the first
// Serve. The zero Server closes every connection unread.
type Server struct {
	// Vendor, Product, Version and URL are what GetInfo answers.
	Vendor, Product, Version, URL string

	// Interfaces are what is served, beside org.varlink.service and
	// io.guestagent, which need not be there.
	Interfaces []Interface

	// Authorize decides over a connection before a byte of it is read. Nil
	// refuses all; [Policy.Authorize] is what the agent needs. What it returns
	// is logged and not sent.
	Authorize func(Peer) error

	// AuthorizeCall, if not nil, decides over each call of an authorised peer
	// by the full name of its method. An error is logged, and answered with
	// PermissionDenied.
	AuthorizeCall func(ctx context.Context, peer Peer, method string) error

	// Log gets what is to be said. Nil says nothing.
	Log *slog.Logger

	// MessageLimit bounds a message in bytes, in both directions.
	MessageLimit int // 0 is the constant MessageLimit
	// MaxConns bounds the connections of all listeners together; [Limited]
	// those of one.
	MaxConns int // 0 is DefaultMaxConns
	// FirstByteTimeout bounds the time from the connection to its first byte.
	FirstByteTimeout time.Duration // 0 is DefaultFirstByteTimeout
	// IdleTimeout bounds the time without a call.
	IdleTimeout time.Duration // 0 is DefaultIdleTimeout
	// MessageTimeout bounds the time from a message's first byte to its last.
	MessageTimeout time.Duration // 0 is DefaultMessageTimeout
	// WriteTimeout bounds the time that a peer may take to read one reply.
	WriteTimeout time.Duration // 0 is DefaultWriteTimeout

	once     sync.Once
	log      *slog.Logger
	methods  map[string]*Interface
	large    chan struct{} // a place for each large message
	refusing chan struct{} // a place for each refuser
	refused  logLimit
	ended    logLimit
	wg       sync.WaitGroup // every goroutine
	ctx      context.Context
	cancel   context.CancelFunc // ends ctx, which every handler's context descends from

	mu        sync.Mutex
	closing   bool
	listeners map[net.Listener]struct{}
	conns     map[*serverConn]struct{}
	calls     int
	last      time.Time     // when a connection or a call last began or ended
	changed   chan struct{} // closed when one does; nil if nobody waits for it
	closed    chan struct{} // closed with closing
}

// An Interface is a Varlink interface that is served.
type Interface struct {
	// Name is its full name.
	Name string
	// Description is its definition in Varlink's notation.
	Description string
	// Methods are its handlers, by the method's name without the interface. A
	// nil one is a method that is described and not there.
	Methods map[string]Handler
}

// A Handler serves one method. It decodes call's parameters, and replies; if it
// returns nil without a last reply, an empty one is sent. An error is answered
// as [WireError] and the Err variables of this package say, a fault in the
// parameters with InvalidParameter, anything else with InternalError.
//
// ctx ends when the server is shut down by force, and in a call with more also
// when the peer goes, or Shutdown begins: such a call may have no end of its
// own. A peer that has sent on more than its connection's buffer holds is missed
// only when the handler writes. A handler whose work must not stop then does it
// without that ctx, and passes over the errors of telling about it. One that has
// its ctx ended and returns the context's error closes the connection without an
// answer.
type Handler func(ctx context.Context, call *Call) error

// Limited is a listener with a limit of its own. Where the vsock listener has
// one that is below the server's MaxConns, the difference is kept for others.
type Limited struct {
	net.Listener
	MaxConns int
}

// An Activity says how busy a server is.
type Activity struct {
	Conns int       // connections
	Calls int       // calls in flight
	Last  time.Time // when a connection or a call last began or ended; zero if none has
}

func (s *Server) init() {
	s.once.Do(func() {
		s.log = s.Log
		if s.log == nil {
			s.log = slog.New(slog.DiscardHandler)
		}
		def := func(d *time.Duration, v time.Duration) {
			if *d <= 0 {
				*d = v
			}
		}
		def(&s.FirstByteTimeout, DefaultFirstByteTimeout)
		def(&s.IdleTimeout, DefaultIdleTimeout)
		def(&s.MessageTimeout, DefaultMessageTimeout)
		def(&s.WriteTimeout, DefaultWriteTimeout)
		if s.MessageLimit <= 0 {
			s.MessageLimit = MessageLimit
		}
		if s.MaxConns <= 0 {
			s.MaxConns = DefaultMaxConns
		}
		s.large = make(chan struct{}, largeMessages)
		s.refusing = make(chan struct{}, refusers)
		s.ctx, s.cancel = context.WithCancel(context.Background())
		s.listeners = map[net.Listener]struct{}{}
		s.conns = map[*serverConn]struct{}{}
		s.closed = make(chan struct{})
		s.methods = map[string]*Interface{}
		for _, i := range append(s.ownInterfaces(), s.Interfaces...) {
			s.methods[i.Name] = &i
		}
	})
}

// Serve accepts connections from l until ctx ends, Shutdown or Close is called,
// or l fails for good. It may run for several listeners at once. It owns l and
// closes it, and does not return before the connections from it are gone. After
// Shutdown or Close the error is [ErrServerClosed], when ctx ends its cause;
// the connections are then closed, calls in flight or not.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.init()
	limit := s.MaxConns
	if limited, ok := l.(Limited); ok && limited.MaxConns > 0 {
		limit = min(limit, limited.MaxConns)
	}
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		_ = l.Close()
		return ErrServerClosed
	}
	// Once closing is set nobody adds to the group from zero: this goroutine
	// counts as well.
	s.wg.Add(1)
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer s.wg.Done()

	ctx, cancel := context.WithCancel(ctx)
	var own sync.WaitGroup
	defer own.Wait()
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
		_ = l.Close()
	}()

	ours := &listenerConns{limit: limit}
	for delay := time.Duration(0); ; {
		conn, err := l.Accept()
		if err == nil {
			delay = 0
			s.accept(ctx, conn, ours, &own)
			continue
		}
		if s.isClosing() {
			// Calls in flight finish: do not cancel them on the way out.
			own.Wait()
			return ErrServerClosed
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !passing(err) {
			return fmt.Errorf("accepting connections: %w", err)
		}
		delay = min(max(2*delay, 5*time.Millisecond), time.Second)
		s.log.Warn("accepting a connection failed, trying again", slog.String("error", err.Error()), slog.Duration("delay", delay))
		if wait(ctx, delay) != nil {
			return context.Cause(ctx)
		}
	}
}

// passing reports whether accept may work again after a while.
func passing(err error) bool {
	for _, errno := range []syscall.Errno{
		syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.ECONNABORTED, syscall.ECONNRESET, syscall.EINTR,
		syscall.EAGAIN, syscall.EPROTO,
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return errors.Is(err, os.ErrDeadlineExceeded)
}

// wait waits for d, or for the end of ctx, whose error it returns.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// listenerConns counts the connections of one listener, under the server's mu.
type listenerConns struct{ limit, n int }

// accept authorises first, and then finds a place for the connection.
func (s *Server) accept(ctx context.Context, conn net.Conn, ours *listenerConns, own *sync.WaitGroup) {
	peer, err := PeerOf(conn)
	switch {
	case err != nil:
	case s.Authorize == nil:
		err = fmt.Errorf("%w: nobody may talk to this server", ErrRefused)
	default:
		err = s.authorize(peer)
	}
	if err != nil {
		_ = conn.Close()
		if suppressed, ok := s.refused.allow(); ok {
			s.log.Warn("refused a peer", slog.Any("peer", peer), slog.String("error", err.Error()), slog.Int("suppressed", suppressed))
		}
		return
	}

	c := &serverConn{server: s, conn: conn, peer: peer}
	s.mu.Lock()
	closing := s.closing
	full := ours.n >= ours.limit || len(s.conns) >= s.MaxConns
	if !closing && !full {
		ours.n++
		s.conns[c] = struct{}{}
		s.touchLocked()
	}
	s.mu.Unlock()
	switch {
	case closing:
		_ = conn.Close()
	case full:
		if suppressed, ok := s.refused.allow(); ok {
			s.log.Warn("refused a connection: there are too many", slog.Any("peer", peer), slog.Int("limit", ours.limit), slog.Int("suppressed", suppressed))
		}
		s.refuse(conn, own)
	default:
		own.Go(func() {
			defer func() {
				s.mu.Lock()
				ours.n--
				delete(s.conns, c)
				s.touchLocked()
				s.mu.Unlock()
			}()
			c.serve(ctx)
		})
	}
}

// authorize calls the hook. A fault in it denies.
func (s *Server) authorize(peer Peer) (err error) {
	defer func() {
		if r := recover(); r != nil {
			s.logPanic(r)
			err = fmt.Errorf("%w: the authorisation failed", ErrRefused)
		}
	}()
	return s.Authorize(peer)
}

// refuse tells an authorised peer that there is no place for it. The reply fits
// into any socket's buffer; a peer that has none is not waited for by accept.
func (s *Server) refuse(conn net.Conn, own *sync.WaitGroup) {
	select {
	case s.refusing <- struct{}{}:
	default:
		_ = conn.Close()
		return
	}
	own.Go(func() {
		defer func() { <-s.refusing }()
		var e Encoder
		encodeReply(&e, errBusy, nil, false)
		_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = conn.Write(e.buf)
		_ = conn.Close()
	})
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

func (s *Server) touchLocked() {
	s.last = time.Now()
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

func (s *Server) countCall(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls += n
	s.touchLocked()
}

// Activity says how busy the server is now.
func (s *Server) Activity() Activity {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	return Activity{Conns: len(s.conns), Calls: s.calls, Last: s.last}
}

// WaitIdle returns nil as soon as there has been no connection for d, counted
// from now if there has been none at all, or the error of ctx.
func (s *Server) WaitIdle(ctx context.Context, d time.Duration) error {
	s.init()
	begin := time.Now()
	for {
		s.mu.Lock()
		if s.changed == nil {
			s.changed = make(chan struct{})
		}
		conns, last, changed := len(s.conns), s.last, s.changed
		s.mu.Unlock()
		if last.Before(begin) {
			last = begin
		}
		var timer <-chan time.Time
		if conns == 0 {
			left := d - time.Since(last)
			if left <= 0 {
				return nil
			}
			t := time.NewTimer(left)
			defer t.Stop()
			timer = t.C
		}
		select {
		case <-timer:
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Shutdown ends the server gently: no connection is accepted any more, idle
// ones are closed, calls in flight finish, those with more have their context
// ended. It returns when every goroutine is gone. If ctx ends before that, it
// closes what is left, as Close does, but does not wait, and returns the error
// of ctx.
func (s *Server) Shutdown(ctx context.Context) error {
	s.init()
	s.close()

	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		s.cancel()
		return nil
	case <-ctx.Done():
		s.cancel() // and with it every connection
		return ctx.Err()
	}
}

// Close ends the server at once: the contexts of all handlers end, and all
// connections. It returns when every goroutine is gone.
func (s *Server) Close() {
	s.init()
	s.close()
	s.cancel()
	s.wg.Wait()
}

// close stops what is not a call in flight.
func (s *Server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closing {
		s.closing = true
		close(s.closed)
	}
	for l := range s.listeners {
		_ = l.Close()
	}
	for c := range s.conns {
		c.shutdown()
	}
}

// logPanic logs where it happened. The value of a panic may be anything, a
// message's content too, so that only what the runtime itself says is shown.
func (s *Server) logPanic(r any) {
	text := fmt.Sprintf("%T", r)
	if e, ok := r.(runtime.Error); ok {
		text = e.Error()
	}
	pcs := make([]uintptr, 32)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(3, pcs)])
	var where []string
	for {
		f, more := frames.Next()
		where = append(where, fmt.Sprintf("%s:%d", f.Function, f.Line))
		if !more {
			break
		}
	}
	s.log.Error("a handler panicked", slog.String("panic", text), slog.Any("stack", where))
}

// A serverConn is one connection. One goroutine serves it.
type serverConn struct {
	server *Server
	conn   net.Conn
	peer   Peer
	frames frameReader
	enc    Encoder
	large  bool // a place in server.large is held

	mu      sync.Mutex
	ending  bool               // no further message is read
	endMore context.CancelFunc // ends a call with more; nil if there is none
}

// serve reads messages and answers them, one after the other.
func (c *serverConn) serve(ctx context.Context) {
	s := c.server
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = c.conn.Close() })()
	defer c.conn.Close()
	c.frames = frameReader{
		r: c.conn, limit: s.MessageLimit,
		begun:   func() { c.readDeadline(s.MessageTimeout) },
		enlarge: func() error { return c.enlarge(ctx) },
		shrunk:  c.shrunk,
	}
	defer c.frames.wipe()

	for timeout := s.FirstByteTimeout; ; timeout = s.IdleTimeout {
		c.frames.release()
		c.readDeadline(timeout)
		msg, err := c.frames.message()
		if err == nil {
			err = c.handle(ctx, msg)
		}
		if err != nil {
			c.end(err)
			return
		}
		if c.isEnding() {
			return
		}
	}
}

// end tells the peer why its connection ends, where there is something to tell.
func (c *serverConn) end(err error) {
	var answer WireError
	decode, isDecode := errors.AsType[*DecodeError](err)
	switch {
	case c.isEnding(), errors.Is(err, io.EOF), errors.Is(err, errHangUp), errors.Is(err, net.ErrClosed):
		return
	case errors.Is(err, ErrTooLarge):
		answer = &plainError{name: errMessageTooLarge, params: func(e *Encoder) { e.Int("limit", int64(c.server.MessageLimit)) }}
	case errors.Is(err, errBusyServer):
		answer = &plainError{name: errBusy}
	case isDecode:
		answer = stringError(errBadMessage, "problem", decode.Error())
	default:
		c.server.log.Debug("a connection ended", slog.Any("peer", c.peer), slog.String("error", err.Error()))
		return
	}
	// Any process of a guest can bring that about.
	if suppressed, ok := c.server.ended.allow(); ok {
		c.server.log.Warn("closing a connection", slog.Any("peer", c.peer), slog.String("error", err.Error()), slog.Int("suppressed", suppressed))
	}
	_ = c.write(answer.WireName(), answer, false)
	// What the peer still sends is not read: it would have no end.
}

// errHangUp ends a connection without a word.
var errHangUp = errors.New("hanging up")

// readDeadline sets the time for what is read next; 0 is none. When the
// connection is to end, nothing is read any more.
func (c *serverConn) readDeadline(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.readDeadlineLocked(d)
}

func (c *serverConn) readDeadlineLocked(d time.Duration) {
	switch {
	case c.ending:
		_ = c.conn.SetReadDeadline(past)
	case d == 0:
		_ = c.conn.SetReadDeadline(time.Time{})
	default:
		_ = c.conn.SetReadDeadline(time.Now().Add(d))
	}
}

// past is a deadline that is over.
var past = time.Unix(1, 0)

// shutdown ends the connection as soon as no call is in flight, and one with
// more at once.
func (c *serverConn) shutdown() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ending = true
	c.readDeadlineLocked(0)
	if c.endMore != nil {
		c.endMore()
	}
}

func (c *serverConn) isEnding() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ending
}

// enlarge waits for a place among the large messages.
func (c *serverConn) enlarge(ctx context.Context) error {
	t := time.NewTimer(largeWait)
	defer t.Stop()
	select {
	case c.server.large <- struct{}{}:
		c.large = true
		return nil
	case <-t.C:
		return errBusyServer
	case <-ctx.Done():
		return errHangUp
	case <-c.server.closed:
		return errHangUp
	}
}

func (c *serverConn) shrunk() {
	if c.large {
		c.large = false
		<-c.server.large
	}
}

// write sends a reply, or with a name an error.
func (c *serverConn) write(name string, params Marshaler, continues bool) error {
	defer c.enc.wipe()
	encodeReply(&c.enc, name, params, continues)
	if len(c.enc.buf) > c.server.MessageLimit+1 {
		return fmt.Errorf("sending a reply: %w: more than %d bytes", ErrTooLarge, c.server.MessageLimit)
	}
	_ = c.conn.SetWriteDeadline(time.Now().Add(c.server.WriteTimeout))
	_, err := c.conn.Write(c.enc.buf)
	if err != nil {
		return fmt.Errorf("%w: %w", errHangUp, err)
	}
	return nil
}
