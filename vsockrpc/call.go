package vsockrpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
)

// A Call is a call that a [Handler] serves. It is valid until the handler
// returns, and not for use by several goroutines at once.
type Call struct {
	// Peer is who calls.
	Peer Peer
	// Method is the full name of the method.
	Method string
	// More says that the caller takes several replies.
	More bool
	// Oneway says that the caller takes none. Replies are dropped then.
	Oneway bool

	conn    *serverConn
	params  Decoder
	replied bool   // the last reply was sent
	forget  func() // lets go of the message
}

// Params is the decoder of the parameters, an object. Most handlers use
// [Call.Decode].
func (c *Call) Params() *Decoder { return &c.params }

// Decode decodes the parameters.
func (c *Call) Decode(v Unmarshaler) error { return c.params.Decode(v) }

// DecodeNone is Decode for a method that has no parameters.
func (c *Call) DecodeNone() error {
	c.params.Empty()
	return c.params.End()
}

// Forget overwrites the message and lets go of its memory, which otherwise stays
// until the handler returns: for a handler that has decoded the parameters, and
// is about to take its time.
func (c *Call) Forget() {
	c.params = Decoder{}
	c.forget()
}

// Reply sends the last reply, or the only one. Nil is a reply without
// parameters.
func (c *Call) Reply(params Marshaler) error { return c.reply(params, false) }

// ReplyMore sends a reply after which others come. The caller must have asked
// for more, else the error is [ErrExpectedMore].
func (c *Call) ReplyMore(params Marshaler) error {
	if !c.More && !c.Oneway {
		return ErrExpectedMore
	}
	return c.reply(params, true)
}

func (c *Call) reply(params Marshaler, continues bool) error {
	if c.replied {
		return errors.New("replying twice")
	}
	c.replied = !continues
	if c.Oneway {
		return nil
	}
	err := c.conn.write("", params, continues)
	if errors.Is(err, ErrTooLarge) {
		c.replied = false // nothing was sent
	}
	return err
}

// handle serves one message. An error ends the connection.
func (c *serverConn) handle(ctx context.Context, msg []byte) error {
	m, err := decodeCall(msg)
	if err != nil {
		return err
	}
	s := c.server
	s.countCall(1)
	defer s.countCall(-1)

	method := "" // known, so that it may be logged
	log := func() *slog.Logger { return s.log.With(slog.Any("peer", c.peer), slog.String("method", method)) }
	fail := func(err error) error {
		answer := wireError(err, log)
		if m.oneway {
			return nil
		}
		return c.write(answer.WireName(), answer, false)
	}
	iface := s.methods[m.iface]
	if iface == nil {
		return fail(stringError(errInterfaceNotFound, "interface", m.iface))
	}
	handler, known := iface.Methods[m.method]
	if !known {
		return fail(stringError(errMethodNotFound, "method", m.name))
	}
	method = m.name
	if s.AuthorizeCall != nil {
		if err := s.authorizeCall(ctx, c.peer, m.name); err != nil {
			if suppressed, ok := s.refused.allow(); ok {
				log().Warn("refused a call", slog.String("error", err.Error()), slog.Int("suppressed", suppressed))
			}
			return fail(ErrPermissionDenied)
		}
	}
	if m.upgrade {
		return fail(stringError(errInvalidParameter, "parameter", "upgrade"))
	}
	if handler == nil {
		return fail(stringError(errMethodNotImplemented, "method", m.name))
	}

	call := &Call{Peer: c.peer, Method: m.name, More: m.more, Oneway: m.oneway, conn: c, params: m.parameters}
	stop, watch := func() {}, func() {}
	if m.more {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		watch = func() { stop = c.watch(cancel) }
	}
	call.forget = func() {
		stop()
		c.frames.release()
		c.frames.spare()
		watch()
	}
	watch()
	err = s.run(ctx, handler, call)
	ended := ctx.Err() != nil
	stop()
	switch {
	case errors.Is(err, errHangUp):
		return err
	case err != nil && ended && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)):
		return errHangUp
	case err != nil && call.replied:
		log().Error("a call failed after its last reply", slog.String("error", err.Error()))
		return nil
	case err != nil:
		return fail(err)
	case !call.replied && !m.oneway:
		return c.write("", nil, false)
	}
	return nil
}

// run calls the handler, and turns a panic into an error.
func (s *Server) run(ctx context.Context, h Handler, call *Call) (err error) {
	defer func() {
		if r := recover(); r != nil {
			s.logPanic(r)
			err = errPanic
		}
	}()
	return h(ctx, call)
}

var errPanic = errors.New("the handler panicked")

// authorizeCall calls the hook. A fault in it denies.
func (s *Server) authorizeCall(ctx context.Context, peer Peer, method string) (err error) {
	defer func() {
		if r := recover(); r != nil {
			s.logPanic(r)
			err = fmt.Errorf("%w: the authorisation failed", ErrRefused)
		}
	}()
	return s.AuthorizeCall(ctx, peer, method)
}

// watch calls cancel when the peer goes, or the server is shut down, while a
// call with more is served. To learn of it, it reads on; what it reads is the
// next message's. The func it returns ends that.
//
// A peer that shuts its writing side is taken to be gone: whoever wants a
// stream keeps it open.
func (c *serverConn) watch(cancel context.CancelFunc) (stop func()) {
	c.mu.Lock()
	c.endMore = cancel
	if c.ending {
		cancel()
	}
	c.readDeadlineLocked(0)
	c.mu.Unlock()

	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err = c.frames.watch(); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			cancel()
		}
	}()
	return func() {
		c.mu.Lock()
		c.endMore = nil
		_ = c.conn.SetReadDeadline(past)
		c.mu.Unlock()
		<-done
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed) {
			c.frames.err = err
		}
	}
}
