// Package secret holds the bytes of a credential in a type that cannot print
// itself.
//
// A [Value] keeps its bytes behind a func. That is deliberate: a []byte with
// String, Format and LogValue methods still leaks where fmt reaches it through
// an unexported field of another struct, since fmt does not call methods on
// such fields and prints what it finds. A func prints as an address.
//
// The package guarantees that no verb of fmt, no handler of log/slog and no
// encoder of the standard library shows a byte of a Value, bare or nested.
// It does not guarantee that wiping removes every copy: the garbage collector
// may have moved or the kernel may have buffered some, and a snapshot of the
// VM contains them all. Wiping is best effort.
package secret

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
)

// redacted is what a Value prints as.
const redacted = "[secret]"

// ErrMarshal is returned by every encoder that is given a [Value]: a secret
// that reaches one is a programming error, and it must not pass as an
// ordinary string.
var ErrMarshal = errors.New("a secret cannot be encoded")

// A Value is a secret of known length. The zero Value is empty. Values share
// their bytes when they are copied, so that wiping one wipes them all.
type Value struct {
	bytes func() *[]byte
}

var (
	_ fmt.Formatter  = Value{}
	_ fmt.Stringer   = Value{}
	_ fmt.GoStringer = Value{}
	_ slog.LogValuer = Value{}
)

// New makes a Value of b and takes ownership: the caller must neither keep
// nor change b.
func New(b []byte) Value {
	return Value{bytes: func() *[]byte { return &b }}
}

// Bytes returns the secret itself, not a copy. The caller must not change it,
// keep it past the Value's Wipe, or hand it to anything that formats or logs.
// After Wipe it is nil.
func (v Value) Bytes() []byte {
	if v.bytes == nil {
		return nil
	}
	return *v.bytes()
}

// Len returns the number of bytes; 0 after Wipe. A length is not secret: it
// is shown to whoever may list credentials.
func (v Value) Len() int { return len(v.Bytes()) }

// Equal reports whether both hold the same bytes. Its time depends on the
// lengths only.
func (v Value) Equal(w Value) bool {
	return subtle.ConstantTimeCompare(v.Bytes(), w.Bytes()) == 1
}

// Wipe overwrites the bytes with zeros and forgets them, for every copy of
// this Value. It may be called more than once. It must not run at the same
// time as another method.
func (v Value) Wipe() {
	if v.bytes == nil {
		return
	}
	p := v.bytes()
	Zero(*p)
	*p = nil
}

// Zero overwrites b with zeros, and keeps the compiler from leaving that out
// as a dead store. It is for buffers that held a secret on its way into or
// out of a Value.
func Zero(b []byte) {
	clear(b)
	runtime.KeepAlive(&b)
}

// String returns a fixed text, for fmt and for whoever concatenates.
func (Value) String() string { return redacted }

// GoString returns a fixed text, for the verb %#v.
func (Value) GoString() string { return redacted }

// Format writes a fixed text, whatever the verb is.
func (Value) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redacted) }

// LogValue returns a fixed text.
func (Value) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON returns [ErrMarshal].
func (Value) MarshalJSON() ([]byte, error) { return nil, ErrMarshal }

// MarshalText returns [ErrMarshal].
func (Value) MarshalText() ([]byte, error) { return nil, ErrMarshal }

// MarshalBinary returns [ErrMarshal].
func (Value) MarshalBinary() ([]byte, error) { return nil, ErrMarshal }

// GobEncode returns [ErrMarshal].
func (Value) GobEncode() ([]byte, error) { return nil, ErrMarshal }
