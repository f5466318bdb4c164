package credsocket

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"

	"github.com/guestagent/guestagent/internal/credential"
)

const (
	// tooMuch is the least that makes systemd fail a unit (E2BIG from
	// read_full_file_full, whose limit is CREDENTIAL_SIZE_MAX).
	tooMuch = credential.MaxSize + 1
	// chunk is the most that one system call writes, in bytes. It is also the
	// most of a value that is ever in this process's memory, where it has to be.
	chunk = 64 << 10
)

// zeros are what a unit gets that is to fail.
var zeros [chunk]byte

// An answer is what is being written to a connection: a value, or too much.
type answer struct {
	value  *os.File // nil: zeros
	size   int64    // bytes to write
	off    int64    // bytes written
	copied bool     // sendfile(2) does not work on this file
	given  func()
	stuck  bool // the socket takes nothing for a reason we do not know
}

func (a *answer) close() {
	if a.value != nil {
		_ = a.value.Close()
		a.value = nil
	}
}

// give begins to answer with a value.
func (l *loop) give(c *conn, d Decision) {
	if d.Size < 0 || d.Size > credential.MaxSize {
		d.discard()
		l.refuse(c, fmt.Errorf("a value of %d bytes is none that systemd takes", d.Size))
		return
	}
	l.begin(c, &answer{value: d.Value, size: d.Size, given: d.Given})
}

// refuse begins to fail the unit, for a reason.
func (l *loop) refuse(c *conn, reason error) {
	l.log.Warn("failing a unit that asks for a credential", append(c.attrs(), slog.Any("error", reason))...)
	l.begin(c, &answer{size: tooMuch})
}

// begin marks the connection, so that whoever takes it up later knows, and writes.
func (l *loop) begin(c *conn, a *answer) {
	l.mu.Lock()
	delete(l.waiting, c)
	l.mu.Unlock()
	c.answer = a
	l.at("mark")
	tv := unix.NsecToTimeval(mark.Nanoseconds())
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil && a.value != nil {
		// No half of a value is ever to be taken for a whole one.
		l.spoil(c, fmt.Errorf("marking the connection: %w", err))
	}
	l.write(c)
}

// spoil fails the unit, though part of a value may have been written: whatever
// it was, more than 1 MiB follow.
func (l *loop) spoil(c *conn, reason error) {
	l.log.Warn("failing a unit whose credential could not be given whole", append(c.attrs(), slog.Any("error", reason))...)
	c.answer.close()
	c.answer = &answer{size: tooMuch}
}

// write writes what the socket takes, and ends the connection after the last byte.
func (l *loop) write(c *conn) {
	for {
		a := c.answer
		if a.off == a.size {
			l.finish(c)
			return
		}
		l.at("write")
		n, err := l.writeSome(c.fd, a)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
			l.log.Debug("a unit does not want its credential any more", c.attrs()...)
			l.remove(c)
			return
		case err != nil && a.value != nil:
			l.spoil(c, err)
		case err != nil:
			// Zeros, and no reason that we know. The end would be taken for
			// the end of a value, so there is none.
			l.log.Warn("failing a unit does not succeed; its connection is left alone", append(c.attrs(), slog.Any("error", err))...)
			a.stuck = true
			return
		default:
			a.off += int64(n)
		}
	}
}

// writeSome writes once. A file that ends too early is an error.
func (l *loop) writeSome(fd int, a *answer) (int, error) {
	want := int(min(a.size-a.off, chunk))
	if a.value == nil {
		return unix.Write(fd, zeros[:want])
	}
	if !a.copied {
		off := a.off
		n, err := unix.Sendfile(fd, int(a.value.Fd()), &off, want)
		switch {
		case err == nil && n == 0:
			return 0, fmt.Errorf("the value ends after %d of %d bytes", a.off, a.size)
		case !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS):
			return n, err
		}
		a.copied = true
	}
	if l.buf == nil {
		l.buf = make([]byte, chunk)
	}
	defer clear(l.buf)
	n, err := a.value.ReadAt(l.buf[:want], a.off)
	switch {
	case n > 0:
		return unix.Write(fd, l.buf[:n])
	case err == nil || errors.Is(err, io.EOF):
		return 0, fmt.Errorf("the value ends after %d of %d bytes", a.off, a.size)
	}
	return 0, err
}

// finish ends a connection that has everything. The store has a copy, so that
// it takes a shutdown to end it for the peer. Given comes before that: the unit
// may run before this process does again, and somebody ask what it has.
func (l *loop) finish(c *conn) {
	if given := c.answer.given; given != nil {
		l.at("given")
		l.log.Debug("a unit has its credential", c.attrs()...)
		given()
	}
	l.at("shutdown")
	_ = unix.Shutdown(c.fd, unix.SHUT_WR) // of a Unix socket it cannot fail
	l.remove(c)
}
