package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/guestagent/guestagent/tests/vm/internal/wire"
)

const (
	// killGrace is how long a program in the guest may take to be killed, and QEMU to follow its channel's end.
	killGrace = 5 * time.Second
	// logBytes of standard error go into the list of commands.
	logBytes = 2048
)

// Command is a program to run in the guest, as root.
type Command struct {
	// Argv is the program, looked up in the usual folders, with its arguments.
	Argv []string
	// Stdin is its standard input, up to 32 MiB.
	Stdin []byte
	// Env is added to PATH, HOME and LANG, which is all it gets otherwise.
	Env []string
	// Dir is its current folder; else the root.
	Dir string
}

// Result is how a program ended, and what it wrote, up to 32 MiB each.
type Result struct {
	Stdout, Stderr []byte
	// ExitCode is the exit status, or 128 and the signal that ended the program.
	ExitCode int
	// Signal is the number of that signal, or 0.
	Signal int
}

// Run runs a program in the guest. It returns an error when it could not be started, or the machine or the context has
// ended; an exit status other than 0 is none. When the context ends, the program and its process group are killed.
func (m *Machine) Run(ctx context.Context, argv ...string) (Result, error) {
	return m.Exec(ctx, Command{Argv: argv})
}

// Exec is Run for what needs more than arguments.
func (m *Machine) Exec(ctx context.Context, c Command) (Result, error) {
	start := time.Now()
	answer, err := m.request(ctx, &wire.Message{Op: wire.OpRun, Argv: c.Argv, Env: c.Env, Dir: c.Dir, Body: c.Stdin})
	name := strings.Join(c.Argv, " ")
	if err != nil {
		m.commands.add(start, name, Result{}, err)
		return Result{}, fmt.Errorf("running %q in the guest: %w", name, err)
	}
	res := Result{
		Stdout:   answer.Body[:answer.Stdout:answer.Stdout],
		Stderr:   answer.Body[answer.Stdout:],
		ExitCode: answer.ExitCode,
		Signal:   answer.Signal,
	}
	m.commands.add(start, name, res, nil)
	return res, nil
}

// ReadFile reads a file in the guest, up to 32 MiB. The error matches fs.ErrNotExist and others of its kind.
func (m *Machine) ReadFile(ctx context.Context, path string) ([]byte, error) {
	answer, err := m.request(ctx, &wire.Message{Op: wire.OpRead, Path: path})
	if err != nil {
		return nil, fmt.Errorf("reading %s in the guest: %w", path, err)
	}
	return answer.Body, nil
}

// WriteFile puts a file in place in the guest, as a whole, and makes missing folders.
func (m *Machine) WriteFile(ctx context.Context, path string, mode fs.FileMode, data []byte) error {
	if len(data) > wire.MaxData {
		return fmt.Errorf("writing %s in the guest: larger than %d bytes", path, wire.MaxData)
	}
	if _, err := m.request(ctx, &wire.Message{Op: wire.OpWrite, Path: path, Mode: uint32(mode.Perm()), Body: data}); err != nil {
		return fmt.Errorf("writing %s in the guest: %w", path, err)
	}
	return nil
}

// request asks the guest program, and explains a machine that is gone.
func (m *Machine) request(ctx context.Context, msg *wire.Message) (*wire.Message, error) {
	answer, err := m.guest().do(ctx, msg)
	if errors.Is(err, ErrStopped) {
		return nil, m.stoppedError()
	}
	if err != nil {
		return nil, err
	}
	if answer.Error != "" {
		return nil, &guestError{text: answer.Error, errno: syscall.Errno(max(0, answer.Errno))}
	}
	return answer, nil
}

// guestError is an error of the guest program.
type guestError struct {
	text  string
	errno syscall.Errno
}

func (e *guestError) Error() string { return e.text }

// Is makes errors.Is see the system's error, such as fs.ErrNotExist.
func (e *guestError) Is(target error) bool { return e.errno != 0 && errors.Is(e.errno, target) }

// channel is the connection to the guest program. Two goroutines serve it, until close.
type channel struct {
	conn net.Conn
	out  chan *wire.Message
	// hello is closed when the guest program is there, done when the connection has ended.
	hello chan struct{}
	done  chan struct{}
	wg    sync.WaitGroup

	mu      sync.Mutex
	lastID  uint64
	pending map[uint64]chan *wire.Message
	err     error
}

func newChannel(conn net.Conn) *channel {
	c := &channel{
		conn:    conn,
		out:     make(chan *wire.Message),
		hello:   make(chan struct{}),
		done:    make(chan struct{}),
		pending: make(map[uint64]chan *wire.Message),
	}
	c.wg.Go(c.read)
	c.wg.Go(c.write)
	return c
}

// close ends the connection and waits for its goroutines.
func (c *channel) close() {
	_ = c.conn.Close()
	c.wg.Wait()
}

// reason says why the connection has ended, or nil.
func (c *channel) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *channel) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	_ = c.conn.Close()
	close(c.done)
}

func (c *channel) read() {
	greeted := false
	for {
		m, err := wire.Read(c.conn)
		switch {
		case err != nil:
			c.end(err)
			return
		case m.Op != wire.OpHello:
			c.deliver(m)
		case greeted:
			c.end(errors.New("the guest program was started again"))
			return
		default:
			greeted = true
			close(c.hello)
		}
	}
}

// deliver gives an answer to who waits for it. Nobody does after a context has ended.
func (c *channel) deliver(m *wire.Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if waiter, ok := c.pending[m.ID]; ok {
		waiter <- m // has room for one, and gets only one
		delete(c.pending, m.ID)
	}
}

func (c *channel) write() {
	for {
		select {
		case <-c.done:
			return
		case m := <-c.out:
			if err := wire.Write(c.conn, m); err != nil {
				c.end(err)
				return
			}
		}
	}
}

// do sends a request and waits for its answer.
func (c *channel) do(ctx context.Context, m *wire.Message) (*wire.Message, error) {
	waiter := make(chan *wire.Message, 1)
	c.mu.Lock()
	c.lastID++
	m.ID = c.lastID
	c.pending[m.ID] = waiter
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.pending, m.ID)
	}()
	select {
	case c.out <- m:
	case <-c.done:
		return nil, ErrStopped
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	select {
	case answer := <-waiter:
		return answer, nil
	case <-c.done:
		return nil, ErrStopped
	case <-ctx.Done():
	}
	// The program is killed before the caller goes on, unless the guest hangs.
	grace := time.NewTimer(killGrace)
	defer grace.Stop()
	select {
	case c.out <- &wire.Message{ID: m.ID, Op: wire.OpKill}:
	case <-c.done:
	case <-grace.C:
		return nil, context.Cause(ctx)
	}
	select {
	case <-waiter:
	case <-c.done:
	case <-grace.C:
	}
	return nil, context.Cause(ctx)
}

// commandLog is the list of commands in the artifacts.
type commandLog struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *commandLog) add(start time.Time, name string, res Result, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	outcome := fmt.Sprintf("exit status %d", res.ExitCode)
	if err != nil {
		outcome, _, _ = strings.Cut(err.Error(), "\n")
	}
	// A list that cannot be written is no reason to fail.
	_, _ = fmt.Fprintf(l.w, "%s %q: %s after %s\n", start.Format("15:04:05.000"), name, outcome,
		time.Since(start).Round(time.Millisecond))
	if res.ExitCode != 0 {
		stderr := res.Stderr[max(0, len(res.Stderr)-logBytes):]
		for line := range strings.Lines(string(stderr)) {
			_, _ = fmt.Fprintf(l.w, "    %s\n", strings.TrimRight(line, "\n"))
		}
	}
}
