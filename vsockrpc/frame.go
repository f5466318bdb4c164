package vsockrpc

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/guestagent/guestagent/internal/secret"
)

const (
	// MessageLimit is the default of the longest message, in bytes: a set of
	// 4 MiB in base64, and its names.
	MessageLimit = 6 << 20

	// smallBuffer is what a connection may keep while it is idle.
	smallBuffer = 64 << 10
	// firstBuffer is what it begins with.
	firstBuffer = 4 << 10
)

// ErrTooLarge is matched by the error for a message that passes the limit.
var ErrTooLarge = errors.New("message is too large")

// A frameReader takes messages from a stream: JSON, each ended by a NUL. It
// keeps what it has read past the end of one, for the next. There is one
// buffer, which is overwritten after each message.
type frameReader struct {
	r     io.Reader
	limit int // of a message without its NUL

	// begun, if not nil, is called when a message has begun to arrive and is
	// not whole.
	begun func()
	// enlarge, if not nil, is called before the buffer grows past smallBuffer;
	// shrunk, if not nil, when it is small again.
	enlarge func() error
	shrunk  func()

	// buf has what was read at [start:end]. The message that was handed out
	// last ends, with its NUL, before next. No NUL is in [next:scan]. One byte
	// of buf stays free, for [frameReader.watch].
	buf                    []byte
	start, next, scan, end int
	large                  bool
	err                    error // what Read said last; it stays
}

// message returns the next message, without its NUL. It is valid until
// release. At a clean end the error is io.EOF.
func (f *frameReader) message() ([]byte, error) {
	f.release()
	started := false
	for {
		if i := bytes.IndexByte(f.buf[f.scan:f.end], 0); i >= 0 {
			f.next = f.scan + i + 1
			f.scan = f.next
			return f.buf[f.start : f.next-1], nil
		}
		f.scan = f.end
		switch {
		case f.end-f.start > f.limit:
			return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, f.limit)
		case errors.Is(f.err, io.EOF) && f.end > f.start:
			return nil, io.ErrUnexpectedEOF
		case f.err != nil:
			return nil, f.err
		case f.end > f.start && !started:
			started = true
			if f.begun != nil {
				f.begun()
			}
		}
		if err := f.room(); err != nil {
			return nil, err
		}
		n, err := f.r.Read(f.buf[f.end : len(f.buf)-1])
		f.end += n
		f.err = err
	}
}

// release overwrites the message that was handed out, and lets go of a large
// buffer as soon as what is left fits into a small one.
func (f *frameReader) release() {
	secret.Zero(f.buf[f.start:f.next])
	f.start = f.next
	f.scan = f.start
	rest := f.end - f.start
	switch {
	case rest == 0 && len(f.buf) > smallBuffer:
		f.buf = nil
	case len(f.buf) > smallBuffer && rest < smallBuffer:
		f.move(make([]byte, smallBuffer))
		return
	case rest > 0:
		return
	}
	f.start, f.next, f.scan, f.end = 0, 0, 0, 0
	f.small()
}

func (f *frameReader) small() {
	if f.large && len(f.buf) <= smallBuffer {
		f.large = false
		if f.shrunk != nil {
			f.shrunk()
		}
	}
}

// move moves what was read to the beginning of b, and overwrites where it was.
func (f *frameReader) move(b []byte) {
	n := copy(b, f.buf[f.start:f.end])
	if len(f.buf) > 0 && &b[0] == &f.buf[0] {
		secret.Zero(f.buf[n:f.end])
	} else {
		secret.Zero(f.buf)
	}
	f.buf = b
	f.scan -= f.start
	f.next = 0
	f.start, f.end = 0, n
	f.small()
}

// room makes room to read at least one byte of a message that is not whole.
// The steps are few, since each leaves a buffer to overwrite and to collect, and
// a credential of the largest size fits into the last but one.
func (f *frameReader) room() error {
	if f.end < len(f.buf)-1 {
		return nil
	}
	if f.start > 0 {
		f.move(f.buf)
		return nil
	}
	size := f.limit + 2 // the message, its NUL, the free byte
	for _, step := range []int{firstBuffer, smallBuffer, 1 << 20, 2 << 20} {
		if step > len(f.buf) && step < size {
			size = step
		}
	}
	if size > smallBuffer && !f.large {
		if f.enlarge != nil {
			if err := f.enlarge(); err != nil {
				return err
			}
		}
		f.large = true
	}
	f.move(make([]byte, size))
	return nil
}

// watch reads on while a message is in use, to learn of the peer's end. What
// it reads is kept. It returns when Read errs, which may be a deadline, or when
// the buffer is full: it never moves the buffer.
func (f *frameReader) watch() error {
	for f.end < len(f.buf) {
		n, err := f.r.Read(f.buf[f.end:])
		f.end += n
		if err != nil {
			return err
		}
	}
	return nil
}

// spare makes room for watch where no message is in use.
func (f *frameReader) spare() {
	if f.buf == nil {
		f.buf = make([]byte, firstBuffer)
	}
}

// wipe overwrites everything and ends the reader.
func (f *frameReader) wipe() {
	secret.Zero(f.buf)
	f.buf = nil
	f.start, f.next, f.scan, f.end = 0, 0, 0, 0
	f.small()
	f.err = io.EOF
}
