package vsockrpc

import (
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// maxNameLen bounds the names of interfaces, methods and errors.
	maxNameLen = 255
	// maxQuoted bounds what an error quotes of the other side.
	maxQuoted = 200
)

// The names of errors that this package itself answers with.
const (
	errInterfaceNotFound    = "org.varlink.service.InterfaceNotFound"
	errMethodNotFound       = "org.varlink.service.MethodNotFound"
	errMethodNotImplemented = "org.varlink.service.MethodNotImplemented"
	errInvalidParameter     = "org.varlink.service.InvalidParameter"
	errPermissionDenied     = "org.varlink.service.PermissionDenied"
	errExpectedMore         = "org.varlink.service.ExpectedMore"

	errInternal        = "io.guestagent.InternalError"
	errBusy            = "io.guestagent.Busy"
	errMessageTooLarge = "io.guestagent.MessageTooLarge"
	errBadMessage      = "io.guestagent.BadMessage"
)

var (
	// ErrPermissionDenied makes a handler answer org.varlink.service.PermissionDenied.
	ErrPermissionDenied = errors.New("permission denied")
	// ErrExpectedMore makes a handler answer org.varlink.service.ExpectedMore.
	ErrExpectedMore = errors.New("the method has to be called with more")
)

// A WireError is an error that a handler answers to its caller, parameters and
// all. Any other error becomes io.guestagent.InternalError.
type WireError interface {
	error
	Marshaler
	// WireName returns the error's full name.
	WireName() string
}

// An Error is what a server answered instead of a reply.
type Error struct {
	// Name is the error's full name.
	Name string
	// Parameters are its parameters as they came, a JSON object; nil if there
	// are none. They are the other side's words: untrusted.
	Parameters []byte
}

// Error returns the name and the parameters, bounded and escaped.
func (e *Error) Error() string {
	if p := string(e.Parameters); p != "" && p != "{}" {
		return Escape(e.Name, maxNameLen) + " " + Escape(p, maxQuoted)
	}
	return Escape(e.Name, maxNameLen)
}

// Decode decodes the parameters.
func (e *Error) Decode(v Unmarshaler) error {
	if e.Parameters == nil {
		return (&Decoder{buf: []byte("{}")}).Decode(v)
	}
	return (&Decoder{buf: e.Parameters}).Decode(v)
}

// Escape returns s, which somebody else wrote, fit for a terminal and a log:
// what is not printable is escaped, and of what is longer than limit bytes the
// rest is left out.
func Escape(s string, limit int) string {
	var b strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		part := s[:n]
		if r == utf8.RuneError && n == 1 {
			part = `\x` + hexByte(s[0])
		} else if !unicode.IsPrint(r) {
			part = strings.Trim(strconv.QuoteRuneToASCII(r), "'")
		}
		if b.Len()+len(part) > limit {
			return b.String() + "…"
		}
		b.WriteString(part)
		s = s[n:]
	}
	return b.String()
}

func hexByte(c byte) string { return string([]byte{hexDigits[c>>4], hexDigits[c&15]}) }

// A call is a decoded call, but for its parameters.
type callMessage struct {
	iface, method string // the method without its interface
	name          string // both
	parameters    Decoder
	more, oneway  bool
	upgrade       bool
}

var callFields = NewFields("method", "parameters?", "more?", "oneway?", "upgrade?")

// decodeCall decodes a call. The parameters are checked for their grammar.
func decodeCall(msg []byte) (callMessage, error) {
	var c callMessage
	d := Decoder{buf: msg}
	c.parameters = Decoder{buf: []byte("{}"), depth: 1}
	d.Object(callFields, func(key string) {
		switch key {
		case "method":
			c.name = d.String(maxNameLen)
			if c.iface, c.method = splitMethod(c.name); d.err == nil && c.method == "" {
				d.Invalid("not the name of a method")
			}
		case "parameters":
			from, to := d.view()
			c.parameters = Decoder{buf: msg[from:to], base: from, depth: 1, sound: true}
		case "more":
			c.more = d.Bool()
		case "oneway":
			c.oneway = d.Bool()
		case "upgrade":
			c.upgrade = d.Bool()
		}
	})
	if err := d.End(); err != nil {
		return callMessage{}, err
	}
	if c.more && c.oneway {
		return callMessage{}, &DecodeError{Problem: "more and oneway exclude each other"}
	}
	return c, nil
}

// encodeCall encodes a call with its NUL.
func encodeCall(e *Encoder, method string, params Marshaler, more, oneway bool) {
	if sizer, ok := params.(interface{ sizeHint() int }); ok {
		e.grow(sizer.sizeHint() + len(method) + 128)
	}
	e.raw("{")
	e.String("method", method)
	if params != nil {
		e.Object("parameters", func() { params.EncodeTo(e) })
	}
	e.OptBool("more", more)
	e.OptBool("oneway", oneway)
	e.raw("}\x00")
}

// A replyMessage is a decoded reply, but for its parameters.
type replyMessage struct {
	parameters Decoder
	raw        []byte // the parameters; a view
	continues  bool
	err        string
}

var replyFields = NewFields("parameters?", "continues?", "error?")

func decodeReply(msg []byte) (replyMessage, error) {
	var r replyMessage
	d := Decoder{buf: msg}
	r.parameters = Decoder{buf: []byte("{}"), depth: 1}
	d.Object(replyFields, func(key string) {
		switch key {
		case "parameters":
			from, to := d.view()
			r.raw = msg[from:to]
			r.parameters = Decoder{buf: r.raw, base: from, depth: 1, sound: true}
		case "continues":
			r.continues = d.Bool()
		case "error":
			r.err = d.String(maxNameLen)
			if iface, name := splitMethod(r.err); d.err == nil && (iface == "" || name == "") {
				d.Invalid("not the name of an error")
			}
		}
	})
	if err := d.End(); err != nil {
		return replyMessage{}, err
	}
	if r.err != "" && r.continues {
		return replyMessage{}, &DecodeError{Problem: "an error that continues"}
	}
	return r, nil
}

// encodeReply encodes a reply, or with a name an error, with its NUL.
func encodeReply(e *Encoder, name string, params Marshaler, continues bool) {
	e.raw("{")
	if name != "" {
		e.String("error", name)
	}
	e.Object("parameters", func() {
		if params != nil {
			params.EncodeTo(e)
		}
	})
	e.OptBool("continues", continues)
	e.raw("}\x00")
}

// splitMethod splits the full name of a method or error, such as
// org.varlink.service.GetInfo. It returns nothing for what is not one.
func splitMethod(name string) (iface, member string) {
	i := strings.LastIndexByte(name, '.')
	if i < 0 || !validMember(name[i+1:]) || !validInterface(name[:i]) {
		return "", ""
	}
	return name[:i], name[i+1:]
}

// validInterface reports whether s is the name of an interface: at least two
// words of letters, digits and inner '-', joined by dots, the first of them
// beginning with a letter.
func validInterface(s string) bool {
	if s == "" || len(s) > maxNameLen || !isLetter(s[0]) || !strings.Contains(s, ".") {
		return false
	}
	for word := range strings.SplitSeq(s, ".") {
		if word == "" || word[0] == '-' || word[len(word)-1] == '-' {
			return false
		}
		for i := range len(word) {
			if c := word[i]; !isLetter(c) && !isDigit(c) && c != '-' {
				return false
			}
		}
	}
	return true
}

// validMember reports whether s is the name of a method, an error or a type.
func validMember(s string) bool {
	if s == "" || s[0] < 'A' || s[0] > 'Z' {
		return false
	}
	for i := range len(s) {
		if !isLetter(s[i]) && !isDigit(s[i]) {
			return false
		}
	}
	return true
}

func isLetter(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }
func isDigit(c byte) bool  { return c >= '0' && c <= '9' }

// A plainError is a WireError with at most one parameter.
type plainError struct {
	name   string
	params func(*Encoder)
}

func (e *plainError) Error() string    { return e.name }
func (e *plainError) WireName() string { return e.name }
func (e *plainError) EncodeTo(enc *Encoder) {
	if e.params != nil {
		e.params(enc)
	}
}

func stringError(name, key, value string) *plainError {
	return &plainError{name: name, params: func(e *Encoder) { e.String(key, value) }}
}

// wireError maps the error of a handler to what is answered. It is the only
// place that does. What it does not know is logged here and not sent.
func wireError(err error, log func() *slog.Logger) WireError {
	if e, ok := errors.AsType[WireError](err); ok {
		return e
	}
	if e, ok := errors.AsType[*DecodeError](err); ok {
		return stringError(errInvalidParameter, "parameter", parameterOf(e))
	}
	switch {
	case errors.Is(err, ErrPermissionDenied):
		return &plainError{name: errPermissionDenied}
	case errors.Is(err, ErrExpectedMore):
		return &plainError{name: errExpectedMore}
	case errors.Is(err, errBusyServer):
		return &plainError{name: errBusy}
	}
	log().Error("a call failed", slog.String("error", err.Error()))
	return &plainError{name: errInternal}
}

// parameterOf says which parameter is at fault. Where it is no known one, or
// more is to be said than its name, the words are in brackets.
func parameterOf(e *DecodeError) string {
	return strings.TrimPrefix(fmt.Sprintf("%s (byte %d: %s)", e.Path, e.Offset, e.Problem), " ")
}
