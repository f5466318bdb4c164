package vsockrpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"os"
	"slices"
	"syscall"
	"time"
)

// errBroken is the error of a call on a connection that an earlier one broke.
var errBroken = errors.New("the connection has ended")

// ErrProtocol is matched by the error for an answer that is not Varlink, or
// not what the method answers.
var ErrProtocol = errors.New("the answer is not what it should be")

// lastWords is how long a client that cannot write looks for a reason.
const lastWords = time.Second

// A Client calls methods over one connection. Calls of several goroutines wait
// for each other. A call whose context ends, or whose answer makes no sense,
// ends the connection: nobody knows where the next answer begins.
type Client struct {
	conn   net.Conn
	target Target
	turn   chan struct{} // whoever has it may use what follows
	frames frameReader
	enc    Encoder
	heard  bool // something came back
	broken error
}

// NewClient makes a client of a connection, and takes it over. Limit bounds a
// reply in bytes; 0 is [MessageLimit].
func NewClient(conn net.Conn, limit int) *Client {
	if limit <= 0 {
		limit = MessageLimit
	}
	c := &Client{conn: conn, turn: make(chan struct{}, 1), frames: frameReader{r: conn, limit: limit}}
	c.turn <- struct{}{}
	return c
}

// Close ends the connection, and with it a call that waits.
func (c *Client) Close() error { return c.conn.Close() }

// Call calls a method by its full name, and decodes the parameters of the reply
// into reply; nil passes over them. It is sent once and never again: after an
// error that is not an [Error], nobody knows whether the method was carried out.
func (c *Client) Call(ctx context.Context, method string, params Marshaler, reply Unmarshaler) error {
	end, err := c.begin(ctx, method)
	if err != nil {
		return err
	}
	return end(func() error {
		if err := c.send(method, params, false, false); err != nil {
			return err
		}
		r, err := c.receive()
		if err != nil {
			return err
		}
		if r.continues {
			return fmt.Errorf("%w: more than one reply", ErrProtocol)
		}
		return decodeParameters(&r, reply)
	}())
}

// CallOneway calls a method that nobody answers. That it returns means only
// that the call was handed to the kernel.
func (c *Client) CallOneway(ctx context.Context, method string, params Marshaler) error {
	end, err := c.begin(ctx, method)
	if err != nil {
		return err
	}
	return end(c.send(method, params, false, true))
}

// CallMore calls a method that answers more than once. Each turn yields the
// parameters of a reply, which are valid until the next; an error is the last
// turn. Whoever leaves the loop early ends the connection, since Varlink has no
// other way to say that it is enough.
func (c *Client) CallMore(ctx context.Context, method string, params Marshaler) iter.Seq2[*Decoder, error] {
	return func(yield func(*Decoder, error) bool) {
		end, err := c.begin(ctx, method)
		if err != nil {
			yield(nil, err)
			return
		}
		var stopped bool
		err = end(func() error {
			if err := c.send(method, params, true, false); err != nil {
				return err
			}
			for {
				r, err := c.receive()
				if err != nil {
					return err
				}
				if !yield(&r.parameters, nil) {
					stopped = true
					if r.continues {
						return errBroken
					}
					return nil
				}
				if !r.continues {
					return nil
				}
			}
		}())
		if err != nil && !stopped {
			yield(nil, err)
		}
	}
}

// begin waits for its turn, and ties the connection to ctx. The func it returns
// is to be called with what became of the call.
func (c *Client) begin(ctx context.Context, method string) (end func(error) error, err error) {
	if _, name := splitMethod(method); name == "" {
		return nil, fmt.Errorf("calling a method: %q is not the full name of one", method)
	}
	select {
	case <-c.turn:
	case <-ctx.Done():
		return nil, fmt.Errorf("calling %s: %w", method, context.Cause(ctx))
	}
	if c.broken == nil && ctx.Err() != nil { // nothing was sent, the connection stays good
		c.turn <- struct{}{}
		return nil, fmt.Errorf("calling %s: %w", method, context.Cause(ctx))
	}
	if err := c.broken; err != nil {
		c.turn <- struct{}{}
		return nil, fmt.Errorf("calling %s: %w", method, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.conn.Close() })
	return func(err error) error {
		ended := !stop()
		c.frames.release()
		var answer *Error
		if ended || err != nil && !errors.As(err, &answer) || answer != nil && ends(answer) {
			c.broken = errBroken
			_ = c.conn.Close()
			c.frames.wipe()
		}
		defer func() { c.turn <- struct{}{} }()
		switch {
		case err == nil || answer != nil:
			return err
		case ended && errors.Is(context.Cause(ctx), context.DeadlineExceeded):
			err = &ConnectError{Target: c.target, Step: StepAnswer, Err: context.DeadlineExceeded}
		case ended:
			err = context.Cause(ctx)
		}
		return fmt.Errorf("calling %s: %w", method, err)
	}, nil
}

// ends reports whether a server hangs up after this error.
func ends(e *Error) bool {
	return slices.Contains([]string{errBusy, errMessageTooLarge, errBadMessage}, e.Name)
}

// send encodes the call into one buffer, and overwrites that afterwards.
func (c *Client) send(method string, params Marshaler, more, oneway bool) error {
	defer c.enc.wipe()
	encodeCall(&c.enc, method, params, more, oneway)
	_, err := c.conn.Write(c.enc.buf)
	if err == nil {
		return nil
	}
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) {
		return err
	}
	// A server that hangs up while we write may have said why.
	_ = c.conn.SetReadDeadline(time.Now().Add(lastWords))
	if _, answer := c.receive(); answer != nil {
		if e, ok := errors.AsType[*Error](answer); ok {
			return e
		}
	}
	return c.hungUp(err)
}

// receive reads one reply. An error in it is returned as [Error].
func (c *Client) receive() (replyMessage, error) {
	msg, err := c.frames.message()
	if err != nil {
		if errors.Is(err, ErrTooLarge) {
			return replyMessage{}, fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		return replyMessage{}, c.hungUp(err)
	}
	c.heard = true
	r, err := decodeReply(msg)
	if err != nil {
		return replyMessage{}, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if r.err != "" {
		return replyMessage{}, &Error{Name: r.err, Parameters: slices.Clone(r.raw)}
	}
	return r, nil
}

// hungUp says what the end of the connection means.
func (c *Client) hungUp(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	gone := errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrClosedPipe)
	switch {
	case gone && !c.heard:
		return &ConnectError{Target: c.target, Step: StepRefused, Err: err}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &ConnectError{Target: c.target, Step: StepAnswer, Err: err}
	}
	return err
}

// decodeParameters decodes a reply's parameters.
func decodeParameters(r *replyMessage, reply Unmarshaler) error {
	if reply == nil {
		return nil // their grammar was checked
	}
	if err := r.parameters.Decode(reply); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return nil
}
