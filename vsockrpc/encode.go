package vsockrpc

import (
	"encoding/base64"
	"strconv"
	"unicode/utf8"

	"github.com/guestagent/guestagent/internal/secret"
)

// A Marshaler encodes the fields of an object: its keys, without the brackets.
type Marshaler interface {
	EncodeTo(e *Encoder)
}

// EncodeFunc is a func that is a [Marshaler].
type EncodeFunc func(e *Encoder)

// EncodeTo calls f.
func (f EncodeFunc) EncodeTo(e *Encoder) { f(e) }

// An Encoder writes JSON into one buffer, and leaves no other copy: where the
// buffer grows, the old one is overwritten. Its methods write one field each.
type Encoder struct {
	buf []byte
}

// grow makes room for n more bytes.
func (e *Encoder) grow(n int) {
	if cap(e.buf)-len(e.buf) >= n {
		return
	}
	b := make([]byte, len(e.buf), max(2*cap(e.buf), len(e.buf)+n, 512))
	copy(b, e.buf)
	secret.Zero(e.buf)
	e.buf = b
}

// wipe overwrites what was written. A small buffer is kept for the next time.
func (e *Encoder) wipe() {
	secret.Zero(e.buf)
	if e.buf = e.buf[:0]; cap(e.buf) > smallBuffer {
		e.buf = nil
	}
}

func (e *Encoder) raw(s string) {
	e.grow(len(s))
	e.buf = append(e.buf, s...)
}

// key writes a comma where there is something before, and the key.
func (e *Encoder) key(key string) {
	if n := len(e.buf); n > 0 && e.buf[n-1] != '{' && e.buf[n-1] != '[' {
		e.raw(",")
	}
	e.quote(key)
	e.raw(":")
}

// String writes a string. What is not UTF-8 in it becomes U+FFFD.
func (e *Encoder) String(key, s string) {
	e.key(key)
	e.quote(s)
}

// OptString writes a string if it is not empty.
func (e *Encoder) OptString(key, s string) {
	if s != "" {
		e.String(key, s)
	}
}

// Int writes an integer.
func (e *Encoder) Int(key string, n int64) {
	e.key(key)
	e.grow(20)
	e.buf = strconv.AppendInt(e.buf, n, 10)
}

// Bool writes a boolean.
func (e *Encoder) Bool(key string, b bool) {
	e.key(key)
	e.raw(strconv.FormatBool(b))
}

// OptBool writes a boolean if it is true.
func (e *Encoder) OptBool(key string, b bool) {
	if b {
		e.Bool(key, true)
	}
}

// Strings writes an array of strings.
func (e *Encoder) Strings(key string, list []string) {
	e.key(key)
	e.raw("[")
	for i, s := range list {
		if i > 0 {
			e.raw(",")
		}
		e.quote(s)
	}
	e.raw("]")
}

// Base64 writes the bytes of a secret as base64.
func (e *Encoder) Base64(key string, v secret.Value) {
	e.key(key)
	n := base64.StdEncoding.EncodedLen(v.Len())
	e.grow(n + 2)
	e.buf = append(e.buf, '"')
	at := len(e.buf)
	e.buf = e.buf[:at+n]
	base64.StdEncoding.Encode(e.buf[at:], v.Bytes())
	e.buf = append(e.buf, '"')
}

// Object writes an object with the fields that are written meanwhile.
func (e *Encoder) Object(key string, fields func()) {
	e.key(key)
	e.raw("{")
	fields()
	e.raw("}")
}

// Array writes an array of n objects, each with the fields that are written
// meanwhile.
func (e *Encoder) Array(key string, n int, fields func(i int)) {
	e.key(key)
	e.raw("[")
	for i := range n {
		if i > 0 {
			e.raw(",")
		}
		e.raw("{")
		fields(i)
		e.raw("}")
	}
	e.raw("]")
}

const hexDigits = "0123456789abcdef"

// quote writes a JSON string.
func (e *Encoder) quote(s string) {
	e.grow(len(s) + 2)
	e.buf = append(e.buf, '"')
	for i := 0; i < len(s); {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			e.grow(2)
			e.buf = append(e.buf, '\\', c)
			i++
		case c < 0x20 || c == 0x7F:
			e.grow(6)
			e.buf = append(e.buf, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			i++
		case c < utf8.RuneSelf:
			e.grow(1)
			e.buf = append(e.buf, c)
			i++
		default:
			r, n := utf8.DecodeRuneInString(s[i:])
			e.grow(utf8.UTFMax)
			e.buf = utf8.AppendRune(e.buf, r)
			i += n
		}
	}
	e.raw(`"`)
}
