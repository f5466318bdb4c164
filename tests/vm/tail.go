package vm

import (
	"slices"
	"sync"
)

const tailBytes = 64 << 10

// tail keeps the last bytes that were written to it.
type tail struct {
	max int

	mu  sync.Mutex
	buf []byte
}

func newTail(size int) *tail {
	return &tail{max: size}
}

// Write keeps p and forgets what is too old. It never fails.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	// Twice the size before a copy, so that each byte is moved once.
	if len(t.buf) > 2*t.max {
		t.buf = slices.Clone(t.buf[len(t.buf)-t.max:])
	}
	return len(p), nil
}

// Bytes returns a copy of what is kept.
func (t *tail) Bytes() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.buf[max(0, len(t.buf)-t.max):])
}
