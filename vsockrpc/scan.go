package vsockrpc

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/guestagent/guestagent/internal/secret"
)

const (
	// MaxDepth is how deep objects and arrays of a message may be nested, the
	// message itself counted.
	MaxDepth = 8
	// maxKeyLen bounds the keys that are compared; a longer one is unknown.
	maxKeyLen = 64
)

// A DecodeError says where a message is not what it should be. It never has
// content of the message: Path consists of keys that this side knows, and
// Problem of fixed words.
type DecodeError struct {
	// Offset is the place in the message, in bytes, from 0.
	Offset int
	// Path is the key at fault, such as set[3].name. It is relative to the
	// parameters where those are decoded, and empty for a whole message.
	Path string
	// Problem says what is wrong.
	Problem string
}

func (e *DecodeError) Error() string {
	if e.Path == "" {
		return fmt.Sprintf("byte %d: %s", e.Offset, e.Problem)
	}
	return fmt.Sprintf("byte %d: %s: %s", e.Offset, e.Path, e.Problem)
}

// Fields are the keys that an object may have.
type Fields struct {
	names    []string
	optional uint64 // bits of names
	open     bool
}

// NewFields makes Fields of at most 64 names. One that ends in '?' may be left
// out or be null, as in Varlink's own notation.
func NewFields(names ...string) *Fields {
	if len(names) > 64 {
		panic("vsockrpc: more than 64 fields")
	}
	f := &Fields{names: slices.Clone(names)}
	for i, name := range f.names {
		if n, ok := strings.CutSuffix(name, "?"); ok {
			f.names[i] = n
			f.optional |= 1 << i
		}
	}
	return f
}

// Open returns the same fields, and other keys are passed over. It is for what
// a server answers: one that is newer than its client may say more. What a
// client asks for must be understood whole.
func (f *Fields) Open() *Fields {
	return &Fields{names: f.names, optional: f.optional, open: true}
}

// An Unmarshaler decodes itself from an object. It reads one value, mostly by
// [Decoder.Object]; errors stay in the Decoder.
type Unmarshaler interface {
	DecodeFrom(d *Decoder)
}

// A Decoder goes through one JSON value in a message, which the caller pulls
// out of it. After the first error every method returns its zero value, and
// Err says what it was. It is valid until the handler that got it returns, or
// the next reply is read.
//
// It is stricter than encoding/json: keys are matched byte for byte, and may
// neither be unknown nor stand twice; strings are valid UTF-8, escaped
// surrogates in pairs; integers have no fraction and no exponent and fit into
// 64 bits.
type Decoder struct {
	buf   []byte
	pos   int
	base  int // where buf begins in the message
	last  int // where the string or number that was read last begins
	depth int
	sound bool // buf was gone through already: its grammar is right
	steps int  // how many of path count; each has a bracket of its own
	path  [MaxDepth]pathStep
	err   error
}

// A pathStep is a key, or with an empty key an index.
type pathStep struct {
	key   string
	index int
}

// Decode decodes one object, and checks that there is nothing after it. After
// an error it wipes what can be wiped.
func (d *Decoder) Decode(v Unmarshaler) error {
	v.DecodeFrom(d)
	err := d.End()
	if w, ok := v.(interface{ Wipe() }); ok && err != nil {
		w.Wipe()
	}
	return err
}

// Err returns the first error, nil if there was none.
func (d *Decoder) Err() error { return d.err }

// End returns the first error, or one if something is left to be read.
func (d *Decoder) End() error {
	if d.space(); d.err == nil && d.pos != len(d.buf) {
		d.fail("something follows the end")
	}
	return d.err
}

// Fail makes err the Decoder's error, if it is the first one. It is for an
// Unmarshaler that does not like what it has read.
func (d *Decoder) Fail(err error) {
	if d.err == nil {
		d.err = err
	}
}

// Invalid is Fail for the string or number that was read last: problem is fixed
// words.
func (d *Decoder) Invalid(problem string) { d.failAt(d.last, problem) }

// Empty reads an object that has no keys.
func (d *Decoder) Empty() { d.Object(&Fields{}, func(string) {}) }

// Object reads an object. It calls read for each key, which has to read the
// value and gets the string that [NewFields] was given. It is not called for
// null where the field is optional. A missing field is an error if it is not
// optional.
func (d *Decoder) Object(f *Fields, read func(key string)) {
	if !d.enter('{', "an object") {
		return
	}
	var seen uint64
	for first := true; d.more('}', &first); {
		at := d.pos
		i := d.key(f.names)
		if d.err != nil {
			return
		}
		if i < 0 {
			if !f.open {
				d.failAt(at, "unknown key")
				return
			}
			d.Skip()
			continue
		}
		d.push(pathStep{key: f.names[i]})
		if seen&(1<<i) != 0 {
			d.failAt(at, "the key stands twice")
			return
		}
		seen |= 1 << i
		if d.space(); f.optional&(1<<i) != 0 && d.peek() == 'n' {
			d.literal("null")
		} else {
			d.value(func() { read(f.names[i]) })
		}
		d.pop()
	}
	if missing := (uint64(1)<<len(f.names) - 1) &^ f.optional &^ seen; d.err == nil && missing != 0 {
		d.push(pathStep{key: f.names[bits.TrailingZeros64(missing)]})
		d.fail("is missing")
	}
}

// Array reads an array of at most limit values. It calls read for each, which
// has to read it.
func (d *Decoder) Array(limit int, read func(i int)) {
	if !d.enter('[', "an array") {
		return
	}
	first := true
	for i := 0; d.more(']', &first); i++ {
		if i == limit {
			d.fail("has more than " + strconv.Itoa(limit) + " values")
			return
		}
		d.push(pathStep{index: i})
		d.value(func() { read(i) })
		d.pop()
	}
}

// value lets read read one value, and refuses a reader that does not.
func (d *Decoder) value(read func()) {
	d.space()
	at := d.pos
	if d.err == nil {
		read()
	}
	if d.err == nil && d.pos == at {
		d.fail("nobody reads this value")
	}
}

// String reads a string of at most limit bytes. It makes a copy that nobody
// can wipe: it is not for secrets.
func (d *Decoder) String(limit int) string {
	at, raw, escaped := d.text()
	if d.err != nil {
		return ""
	}
	if !fits(raw, escaped, limit) {
		d.failAt(at, tooLong(limit))
		return ""
	}
	if !escaped {
		return string(raw)
	}
	return string(appendUnescaped(make([]byte, 0, len(raw)), raw))
}

// Strings reads an array of at most count strings of at most limit bytes. It
// is never nil without an error.
func (d *Decoder) Strings(count, limit int) []string {
	list := []string{}
	d.Array(count, func(int) { list = append(list, d.String(limit)) })
	if d.err != nil {
		return nil
	}
	return list
}

// Text reads a string of at most limit bytes into a buffer of its own, which
// the Value can wipe.
func (d *Decoder) Text(limit int) secret.Value {
	v, at, problem := d.secretText(limit)
	if problem != 0 {
		d.failAt(at, tooLong(limit))
	}
	return v
}

// secretText is Text, but that a string that does not fit is passed over.
func (d *Decoder) secretText(limit int) (v secret.Value, at int, problem stringProblem) {
	at, raw, escaped := d.text()
	if d.err != nil {
		return secret.Value{}, at, 0
	}
	if !fits(raw, escaped, limit) {
		return secret.Value{}, at, badLength
	}
	return secret.New(appendUnescaped(make([]byte, 0, unescapedLen(raw)), raw)), at, 0
}

// Base64 reads a string of base64 that stands for at most limit bytes: the
// standard alphabet, padded, without line ends, unused bits zero. It decodes
// into a buffer of its own, which the Value can wipe.
func (d *Decoder) Base64(limit int) secret.Value {
	v, at, problem := d.base64(limit)
	switch problem {
	case badLength:
		d.failAt(at, tooLong(limit))
	case badBase64:
		d.failAt(at, "not base64")
	}
	return v
}

// base64 is Base64, but that a string that does not fit is passed over.
func (d *Decoder) base64(limit int) (v secret.Value, at int, problem stringProblem) {
	at, raw, escaped := d.text()
	if d.err != nil {
		return secret.Value{}, at, 0
	}
	if escaped { // some encoders write every '/' as "\/"
		raw = appendUnescaped(make([]byte, 0, unescapedLen(raw)), raw)
		defer secret.Zero(raw)
	}
	// The padding is counted first: a value that is just as large as it may be
	// has two bytes less than the decoder may need.
	size := base64.StdEncoding.DecodedLen(len(raw))
	for i := len(raw) - 1; i >= 0 && i >= len(raw)-2 && raw[i] == '='; i-- {
		size--
	}
	if size > limit {
		return secret.Value{}, at, badLength
	}
	b, ok := decodeBase64(raw)
	if !ok || escaped && bytes.ContainsAny(raw, "\r\n") {
		secret.Zero(b)
		return secret.Value{}, at, badBase64
	}
	return secret.New(b), at, 0
}

// A stringProblem is why a string that is JSON is not what it should be.
type stringProblem int

const (
	badLength stringProblem = iota + 1
	badBase64
)

// decodeBase64 decodes into a buffer of its own. encoding/base64 passes over
// line ends, which only escapes can bring here and which the caller refuses;
// its error has an offset, which is not ours to tell.
func decodeBase64(raw []byte) ([]byte, bool) {
	b := make([]byte, base64.StdEncoding.DecodedLen(len(raw)))
	n, err := base64.StdEncoding.Strict().Decode(b, raw)
	if err != nil {
		secret.Zero(b)
		return nil, false
	}
	return b[:n], true
}

// Int reads an integer.
func (d *Decoder) Int() int64 {
	at, integer := d.number()
	if d.err != nil {
		return 0
	}
	if !integer {
		d.failAt(at, "want an integer, have a number with a fraction or an exponent")
		return 0
	}
	digits := d.buf[at:d.pos]
	negative := digits[0] == '-'
	if negative {
		digits = digits[1:]
	}
	var u uint64
	for _, c := range digits {
		hi, lo := bits.Mul64(u, 10)
		sum, carry := bits.Add64(lo, uint64(c-'0'), 0)
		if hi != 0 || carry != 0 {
			d.failAt(at, "does not fit into 64 bits")
			return 0
		}
		u = sum
	}
	switch {
	case !negative && u <= math.MaxInt64:
		return int64(u)
	case negative && u <= 1<<63:
		return -int64(u)
	}
	d.failAt(at, "does not fit into 64 bits")
	return 0
}

// Bool reads a boolean.
func (d *Decoder) Bool() bool {
	d.space()
	switch c := d.peek(); {
	case d.err != nil:
	case c == 't':
		d.literal("true")
		return d.err == nil
	case c == 'f':
		d.literal("false")
	default:
		d.fail("want a boolean, have " + d.kind())
	}
	return false
}

// Skip reads a value of any kind and checks its grammar. Keys of objects in it
// may stand twice.
func (d *Decoder) Skip() {
	d.space()
	switch c := d.peek(); {
	case d.err != nil:
	case c == '{':
		d.enter('{', "")
		for first := true; d.more('}', &first); {
			if d.key(nil); d.err == nil {
				d.Skip()
			}
		}
	case c == '[':
		d.enter('[', "")
		for first := true; d.more(']', &first); {
			d.Skip()
		}
	case c == '"':
		d.text()
	case c == '-' || c >= '0' && c <= '9':
		d.number()
	case c == 't':
		d.literal("true")
	case c == 'f':
		d.literal("false")
	case c == 'n':
		d.literal("null")
	default:
		d.fail("want a value, have " + d.kind())
	}
}

// view reads an object and returns where it stands, checked as Skip does.
func (d *Decoder) view() (from, to int) {
	d.space()
	if from = d.pos; d.err == nil && d.peek() != '{' {
		d.fail("want an object, have " + d.kind())
	}
	d.Skip()
	return from, d.pos
}

func (d *Decoder) fail(problem string) { d.failAt(d.pos, problem) }

func (d *Decoder) failAt(pos int, problem string) {
	if d.err == nil {
		d.err = &DecodeError{Offset: d.base + pos, Path: d.pathString(), Problem: problem}
	}
}

func (d *Decoder) pathString() string {
	var b strings.Builder
	for _, s := range d.path[:d.steps] {
		switch {
		case s.key == "":
			b.WriteString("[" + strconv.Itoa(s.index) + "]")
		case b.Len() > 0:
			b.WriteString("." + s.key)
		default:
			b.WriteString(s.key)
		}
	}
	return b.String()
}

// push enters a key or an index.
func (d *Decoder) push(s pathStep) {
	d.path[d.steps] = s
	d.steps++
}

// pop leaves it. After an error it stays, for whoever asks.
func (d *Decoder) pop() {
	if d.err == nil {
		d.steps--
	}
}

// peek returns the next byte, 0 at the end: no value begins with that.
func (d *Decoder) peek() byte {
	if d.pos < len(d.buf) {
		return d.buf[d.pos]
	}
	return 0
}

func (d *Decoder) space() {
	for d.pos < len(d.buf) {
		switch d.buf[d.pos] {
		case ' ', '\t', '\n', '\r':
			d.pos++
		default:
			return
		}
	}
}

// kind names what stands next, by its first byte.
func (d *Decoder) kind() string {
	if d.pos >= len(d.buf) {
		return "the end"
	}
	switch c := d.buf[d.pos]; {
	case c == '{':
		return "an object"
	case c == '[':
		return "an array"
	case c == '"':
		return "a string"
	case c == '-' || c >= '0' && c <= '9':
		return "a number"
	case c == 't' || c == 'f':
		return "a boolean"
	case c == 'n':
		return "null"
	}
	return "no JSON"
}

// enter reads the bracket that opens an object or an array.
func (d *Decoder) enter(bracket byte, want string) bool {
	d.space()
	switch {
	case d.err != nil:
		return false
	case d.peek() != bracket:
		d.fail("want " + want + ", have " + d.kind())
		return false
	case d.depth == MaxDepth:
		d.fail("nested deeper than " + strconv.Itoa(MaxDepth))
		return false
	}
	d.depth++
	d.pos++
	return true
}

// more reads the comma before the next value, or the bracket that closes.
func (d *Decoder) more(bracket byte, first *bool) bool {
	if d.err != nil {
		return false
	}
	d.space()
	switch c := d.peek(); {
	case c == bracket:
		d.pos++
		d.depth--
		return false
	case *first:
		*first = false
	case c == ',':
		d.pos++
		d.space()
	default:
		d.fail("want ',' or '" + string(rune(bracket)) + "', have " + d.kind())
		return false
	}
	return true
}

// key reads a key and its colon, and returns which of names it is, or -1.
func (d *Decoder) key(names []string) int {
	d.space()
	if d.err == nil && d.peek() != '"' {
		d.fail("want a key, have " + d.kind())
	}
	_, raw, escaped := d.text()
	d.space()
	if d.err == nil && d.peek() != ':' {
		d.fail("want ':', have " + d.kind())
	}
	if d.err != nil {
		return -1
	}
	d.pos++
	if escaped {
		if unescapedLen(raw) > maxKeyLen {
			return -1
		}
		var b [maxKeyLen]byte
		raw = appendUnescaped(b[:0], raw)
	}
	for i, name := range names {
		if string(raw) == name {
			return i
		}
	}
	return -1
}

func (d *Decoder) literal(word string) {
	if d.err != nil {
		return
	}
	if !strings.HasPrefix(string(d.buf[d.pos:min(len(d.buf), d.pos+len(word))]), word) {
		d.fail("want " + word)
		return
	}
	d.pos += len(word)
}

// number reads a number, and returns where it begins and whether it is written
// as an integer.
func (d *Decoder) number() (at int, integer bool) {
	d.space()
	at, d.last = d.pos, d.pos
	if d.err != nil {
		return at, false
	}
	if k := d.kind(); k != "a number" {
		d.fail("want a number, have " + k)
		return at, false
	}
	digits := func() {
		from := d.pos
		for d.pos < len(d.buf) && d.buf[d.pos] >= '0' && d.buf[d.pos] <= '9' {
			d.pos++
		}
		if d.pos == from {
			d.fail("want a digit")
		}
	}
	if d.peek() == '-' {
		d.pos++
	}
	if d.peek() == '0' {
		d.pos++
	} else {
		digits()
	}
	integer = true
	if d.peek() == '.' {
		d.pos++
		integer = false
		digits()
	}
	if c := d.peek(); c == 'e' || c == 'E' {
		d.pos++
		integer = false
		if c := d.peek(); c == '+' || c == '-' {
			d.pos++
		}
		digits()
	}
	return at, integer
}

// text reads a string, and returns where it begins, what stands between its
// quotes, and whether there are escapes in it. It is valid UTF-8, and so is
// what the escapes make of it.
func (d *Decoder) text() (at int, raw []byte, escaped bool) {
	d.space()
	at, d.last = d.pos, d.pos
	if d.err != nil {
		return at, nil, false
	}
	if d.peek() != '"' {
		d.fail("want a string, have " + d.kind())
		return at, nil, false
	}
	i := at + 1
	if d.sound {
		if n := bytes.IndexByte(d.buf[i:], '"'); n >= 0 && bytes.IndexByte(d.buf[i:i+n], '\\') < 0 {
			d.pos = i + n + 1
			return at, d.buf[i : i+n], false
		}
	}
	for {
		i += plain(d.buf[i:])
		if i == len(d.buf) {
			d.failAt(i, "a string has no end")
			return at, nil, false
		}
		switch c := d.buf[i]; {
		case c == '"':
			d.pos = i + 1
			return at, d.buf[at+1 : i], escaped
		case c == '\\':
			n := escapeLen(d.buf[i:])
			if n == 0 {
				d.failAt(i, "bad escape in a string")
				return at, nil, false
			}
			escaped = true
			i += n
		case c < 0x20:
			d.failAt(i, "control character in a string")
			return at, nil, false
		default:
			r, n := utf8.DecodeRune(d.buf[i:])
			if r == utf8.RuneError && n == 1 {
				d.failAt(i, "invalid UTF-8 in a string")
				return at, nil, false
			}
			i += n
		}
	}
}

// plain returns how many bytes at the beginning of b are printable ASCII but
// no quote and no backslash. It goes eight by eight: a megabyte of base64 is
// passed over twice on its way.
func plain(b []byte) int {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	i := 0
	for ; i+8 <= len(b); i += 8 {
		w := binary.LittleEndian.Uint64(b[i:])
		quote, backslash := w^ones*'"', w^ones*'\\'
		// Each term has the high bit where a byte is what is looked for, and
		// maybe above one that is; so a zero is certain, which is all it needs.
		if (w|(w-ones*0x20)|(quote-ones)&^quote|(backslash-ones)&^backslash)&highs != 0 {
			break
		}
	}
	for ; i < len(b); i++ {
		if c := b[i]; c < 0x20 || c >= utf8.RuneSelf || c == '"' || c == '\\' {
			break
		}
	}
	return i
}

// escapeLen returns the length of the escape that b begins with, 0 if it is
// none. Two escapes that are a surrogate pair are one.
func escapeLen(b []byte) int {
	if len(b) < 2 {
		return 0
	}
	if strings.IndexByte(`"\/bfnrt`, b[1]) >= 0 {
		return 2
	}
	r, ok := hexEscape(b)
	switch {
	case !ok:
		return 0
	case !utf16.IsSurrogate(r):
		return 6
	}
	if low, ok := hexEscape(b[6:]); ok && utf16.DecodeRune(r, low) != utf8.RuneError {
		return 12
	}
	return 0
}

// hexEscape reads \uXXXX.
func hexEscape(b []byte) (rune, bool) {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return 0, false
	}
	var r rune
	for _, c := range b[2:6] {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

// unescape decodes the escape that raw begins with, which text has checked.
func unescape(raw []byte) (r rune, n int) {
	n = escapeLen(raw)
	switch n {
	case 2:
		switch c := raw[1]; c {
		case 'b':
			r = '\b'
		case 'f':
			r = '\f'
		case 'n':
			r = '\n'
		case 'r':
			r = '\r'
		case 't':
			r = '\t'
		default:
			r = rune(c)
		}
	case 6:
		r, _ = hexEscape(raw)
	case 12:
		high, _ := hexEscape(raw)
		low, _ := hexEscape(raw[6:])
		r = utf16.DecodeRune(high, low)
	}
	return r, n
}

// unescapedLen returns the length of what appendUnescaped appends.
func unescapedLen(raw []byte) int {
	size := 0
	for len(raw) > 0 {
		i := bytes.IndexByte(raw, '\\')
		if i < 0 {
			return size + len(raw)
		}
		r, n := unescape(raw[i:])
		size += i + utf8.RuneLen(r)
		raw = raw[i+n:]
	}
	return size
}

// appendUnescaped appends to dst what raw stands for, which is never longer.
func appendUnescaped(dst, raw []byte) []byte {
	for len(raw) > 0 {
		i := bytes.IndexByte(raw, '\\')
		if i < 0 {
			return append(dst, raw...)
		}
		dst = append(dst, raw[:i]...)
		r, n := unescape(raw[i:])
		dst = utf8.AppendRune(dst, r)
		raw = raw[i+n:]
	}
	return dst
}

// fits reports whether what raw stands for has at most limit bytes.
func fits(raw []byte, escaped bool, limit int) bool {
	return len(raw) <= limit || escaped && unescapedLen(raw) <= limit
}

func tooLong(limit int) string { return "longer than " + strconv.Itoa(limit) + " bytes" }
