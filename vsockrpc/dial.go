package vsockrpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"
)

// DefaultDialTimeout bounds one attempt to connect.
const DefaultDialTimeout = 5 * time.Second

// A port below 1024 on this machine is either a provider's to listen on, from
// FirstProviderPort to LastProviderPort, or one to call from, below those: a
// connection that holds a port keeps a server from listening there.
const (
	FirstProviderPort = 768
	LastProviderPort  = DefaultProviderPort
)

const (
	retryFirst = 50 * time.Millisecond
	retryMost  = time.Second

	// maxHandshake bounds the line that answers CONNECT. It is "OK " and at
	// most ten digits.
	maxHandshake = 32
)

// A Step is how far a connection got.
type Step string

// The steps there are.
const (
	StepSocket    Step = "socket"    // there is no such socket or guest, or it may not be opened
	StepListener  Step = "listener"  // nobody listens there
	StepHandshake Step = "handshake" // what answered CONNECT is no VMM's socket
	StepRefused   Step = "refused"   // it was closed without a word, as a peer that may not talk is
	StepAnswer    Step = "answer"    // there was no answer in time
)

// A ConnectError says which step of reaching a guest failed.
type ConnectError struct {
	Target Target // the zero Target where the client was made of a connection
	Step   Step
	Err    error
}

func (e *ConnectError) Error() string {
	what := map[Step]string{
		StepSocket:    "no way to it",
		StepListener:  "nobody listens",
		StepHandshake: "not a vsock-mux socket",
		StepRefused:   "it hung up without an answer: it does not take calls from here, or has just ended",
		StepAnswer:    "no answer in time",
	}[e.Step]
	where := "calling"
	if e.Target != (Target{}) {
		where = "connecting to " + Escape(e.Target.String(), maxTargetLen)
	}
	err := e.Err
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err // the rest is said already
	}
	return fmt.Sprintf("%s: %s: %s", where, what, Escape(err.Error(), maxQuoted))
}

// Unwrap returns the cause.
func (e *ConnectError) Unwrap() error { return e.Err }

// A Dialer connects to targets. The zero Dialer tries once.
type Dialer struct {
	// Timeout bounds one attempt, with vsock-mux its handshake too.
	Timeout time.Duration // 0 is DefaultDialTimeout
	// RetryFor is how long to go on trying where an attempt fails that may
	// succeed a little later: nobody listens yet, or there is no answer, since
	// a kernel that boots may drop it. 0 is one attempt. Only connecting is
	// tried again, never a call.
	RetryFor time.Duration
	// MessageLimit bounds a reply in bytes. 0 is the constant MessageLimit.
	MessageLimit int
}

// Dial connects to t with the zero [Dialer].
func Dial(ctx context.Context, t Target) (*Client, error) { return Dialer{}.Dial(ctx, t) }

// Dial connects to t. The error is a [ConnectError], or that of ctx.
func (d Dialer) Dial(ctx context.Context, t Target) (*Client, error) {
	conn, err := d.DialConn(ctx, t)
	if err != nil {
		return nil, err
	}
	c := NewClient(conn, d.MessageLimit)
	c.target = t
	return c, nil
}

// DialConn connects to t and returns the bare connection.
//
// Over AF_VSOCK the source port is below [FirstProviderPort] where this process
// may bind one.
//
// With vsock-mux the socket's folder may be that of a VMM's user, whom nobody
// trusts, and who could lead a caller with more rights to another VM's socket.
// So, on Linux, neither the socket nor its folder may be a symbolic link; the
// folders above may. The socket has one name, and belongs to root, to this
// process's user or to the folder's owner; in a folder that only root, or this
// process's user, can write to, it may be anybody's. All else is an error at
// [StepSocket] that matches fs.ErrPermission. The path may be of any length, and
// /proc is needed.
func (d Dialer) DialConn(ctx context.Context, t Target) (net.Conn, error) {
	if d.Timeout <= 0 {
		d.Timeout = DefaultDialTimeout
	}
	end := time.Now().Add(d.RetryFor)
	for delay := retryFirst; ; delay = min(2*delay, retryMost) {
		conn, err := d.dialOnce(ctx, t)
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil || !mayRetry(err) || !time.Now().Add(delay).Before(end) {
			return nil, err
		}
		if wait(ctx, delay) != nil {
			return nil, err // what was wrong says more than that time is up
		}
	}
}

// mayRetry reports whether connecting may succeed a little later.
func mayRetry(err error) bool {
	e, ok := errors.AsType[*ConnectError](err)
	switch {
	case !ok, e.Step == StepHandshake:
		return false
	case e.Step == StepSocket:
		return !errors.Is(err, fs.ErrPermission) && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, ErrTarget) && !errors.Is(err, syscall.EINVAL)
	}
	return true
}

func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", path)
}

// A muxError is that something at the path of a VM's socket may not be used.
type muxError string

func (e muxError) Error() string { return string(e) }

// Is has it count as a permission that is missing: another try is of no use.
func (muxError) Is(target error) bool { return target == fs.ErrPermission }

func (d Dialer) dialOnce(ctx context.Context, t Target) (net.Conn, error) {
	attempt, cancel := context.WithTimeout(ctx, d.Timeout)
	defer cancel()
	var conn net.Conn
	var err error
	switch t.Scheme {
	case SchemeVsock:
		conn, err = dialVsock(attempt, t.CID, t.Port)
	case SchemeMux:
		conn, err = dialMux(attempt, t.Path)
	case SchemeUnix:
		conn, err = dialUnix(attempt, t.Path)
	default:
		return nil, &ConnectError{Target: t, Step: StepSocket, Err: ErrTarget}
	}
	if err == nil && t.Scheme == SchemeMux {
		if err = handshake(attempt, conn, t.Port); err != nil {
			_ = conn.Close()
		}
	}
	if err == nil {
		return conn, nil
	}
	if ctx.Err() != nil && !errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		return nil, fmt.Errorf("connecting to %s: %w", Escape(t.String(), maxTargetLen), context.Cause(ctx))
	}
	if attempt.Err() != nil {
		return nil, &ConnectError{Target: t, Step: StepAnswer, Err: context.DeadlineExceeded}
	}
	return nil, &ConnectError{Target: t, Step: stepOf(err), Err: err}
}

// stepOf tells the step from the error of connecting.
func stepOf(err error) Step {
	switch {
	case errors.Is(err, errNoListener), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return StepListener
	case errors.Is(err, errHandshake):
		return StepHandshake
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT), errors.Is(err, context.DeadlineExceeded):
		return StepAnswer
	}
	return StepSocket
}

var (
	errNoListener = errors.New("the VMM closed the connection instead of an OK")
	errHandshake  = errors.New("no OK in answer to CONNECT")
)

// handshake asks the VMM at the other end of conn for a port of its guest. It
// reads byte by byte, so that whatever the guest sends first stays unread.
func handshake(ctx context.Context, conn net.Conn, port uint32) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(past) })
	err := connectMux(conn, port)
	if !stop() {
		// The deadline is set, or will be: the connection is of no use.
		return context.DeadlineExceeded
	}
	return err
}

func connectMux(conn io.ReadWriter, port uint32) error {
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return err
	}
	line := make([]byte, 0, maxHandshake)
	for {
		var b [1]byte
		n, err := conn.Read(b[:])
		switch {
		case n == 1:
		case errors.Is(err, io.EOF):
			if len(line) > 0 {
				return fmt.Errorf("%w: it ends in the middle", errHandshake)
			}
			return errNoListener
		case err != nil:
			return err
		}
		if n == 1 && b[0] == '\n' {
			return checkHandshake(line)
		}
		if line = append(line, b[:n]...); len(line) == maxHandshake {
			return fmt.Errorf("%w: the line is longer than %d bytes", errHandshake, maxHandshake-1)
		}
	}
}

// checkHandshake checks the line, without its end: "OK " and the number that
// the VMM gave its own end.
func checkHandshake(line []byte) error {
	number, ok := bytesCutPrefix(line, "OK ")
	if !ok || number == "" || len(number) > 10 || !allDigits(number) {
		return errHandshake
	}
	return nil
}

func bytesCutPrefix(b []byte, prefix string) (string, bool) {
	if len(b) < len(prefix) || string(b[:len(prefix)]) != prefix {
		return "", false
	}
	return string(b[len(prefix):]), true
}
