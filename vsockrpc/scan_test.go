package vsockrpc

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
)

// A doc is what the tests decode, with one field of each kind.
type doc struct {
	S    string
	O    string
	N    int64
	B    bool
	List []string
	In   []doc
	V    []byte // text
	D    []byte // data
}

var docFields = NewFields("s?", "o?", "n?", "b?", "list?", "in?", "v?", "d?")

func (x *doc) DecodeFrom(d *Decoder) {
	d.Object(docFields, func(key string) {
		switch key {
		case "s":
			x.S = d.String(100)
		case "o":
			x.O = d.String(5)
		case "n":
			x.N = d.Int()
		case "b":
			x.B = d.Bool()
		case "list":
			x.List = d.Strings(3, 10)
		case "in":
			d.Array(3, func(int) {
				var in doc
				in.DecodeFrom(d)
				x.In = append(x.In, in)
			})
		case "v":
			x.V = d.Text(20).Bytes()
		case "d":
			x.D = d.Base64(20).Bytes()
		}
	})
}

func decodeDoc(s string) (doc, error) {
	var x doc
	err := (&Decoder{buf: []byte(s)}).Decode(&x)
	return x, err
}

func TestDecode(t *testing.T) {
	x, err := decodeDoc(` {"s" : "aé\n\"\/\u00e9\ud83d\ude00" , "n":-9223372036854775808,"b":true,"list":["x",""],` +
		"\t\r\n" + `"in":[{"s":"1"},{}],"v":"\u0000\u0041","d":"AAEC\/w==","o":null}  `)
	if err != nil || x.S != "aé\n\"/é😀" || x.N != math.MinInt64 || !x.B || fmt.Sprint(x.List) != "[x ]" || len(x.In) != 2 || x.In[0].S != "1" ||
		string(x.V) != "\x00A" || !bytes.Equal(x.D, []byte{0, 1, 2, 255}) {
		t.Errorf("Decode = %+v, %v", x, err)
	}
	for _, s := range []string{`{"n":0}`, `{"n":-0}`, `{"n":9223372036854775807}`, `{"\u006e":1}`, `{"v":"` + strings.Repeat(`\u0041`, 20) + `"}`, `{"o":"\u00e9\u00e9."}`} {
		if x, err := decodeDoc(s); err != nil {
			t.Errorf("Decode(%s) = %+v, %v", s, x, err)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	for s, want := range map[string]string{
		``:                                 "byte 0: want an object, have the end",
		`[]`:                               "byte 0: want an object, have an array",
		`{`:                                "byte 1: want a key, have the end",
		`{}x`:                              "byte 2: something follows the end",
		`{}{}`:                             "byte 2: something follows the end",
		`{"s":"a","s":"b"}`:                "byte 9: s: the key stands twice",
		`{"s":"a","\u0073":"b"}`:           "byte 9: s: the key stands twice",
		`{"s":null,"s":"b"}`:               "byte 10: s: the key stands twice",
		`{"S":"a"}`:                        "byte 1: unknown key",
		`{"` + marker + `":1}`:             "byte 1: unknown key",
		`{"in":[{},{"x":1}]}`:              "byte 11: in[1]: unknown key",
		`{"s":1}`:                          "byte 5: s: want a string, have a number",
		`{"s":[]}`:                         "byte 5: s: want a string, have an array",
		`{"n":"1"}`:                        "byte 5: n: want a number, have a string",
		`{"n":1.0}`:                        "byte 5: n: want an integer, have a number with a fraction or an exponent",
		`{"n":1e2}`:                        "byte 5: n: want an integer, have a number with a fraction or an exponent",
		`{"n":01}`:                         "byte 6: want ',' or '}', have a number",
		`{"n":-}`:                          "byte 6: n: want a digit",
		`{"n":9223372036854775808}`:        "byte 5: n: does not fit into 64 bits",
		`{"n":-9223372036854775809}`:       "byte 5: n: does not fit into 64 bits",
		`{"n":99999999999999999999999999}`: "byte 5: n: does not fit into 64 bits",
		`{"b":1}`:                          "byte 5: b: want a boolean, have a number",
		`{"b":trux}`:                       "byte 5: b: want true",
		`{"list":"a"}`:                     "byte 8: list: want an array, have a string",
		`{"list":["a","b","c","d"]}`:       "byte 21: list: has more than 3 values",
		`{"list":["` + marker + `"]}`:      "byte 9: list[0]: longer than 10 bytes",
		`{"list":[null]}`:                  "byte 9: list[0]: want a string, have null",
		`{"list":["a",]}`:                  "byte 13: list[1]: want a string, have no JSON",
		`{"s":"a",}`:                       "byte 9: want a key, have no JSON",
		`{"s" "a"}`:                        "byte 5: want ':', have a string",
		`{"s":"a" "b":true}`:               "byte 9: want ',' or '}', have a string",
		"{\"s\":\"a\nb\"}":                 "byte 7: s: control character in a string",
		"{\"s\":\"12345678\x1f\"}":         "byte 14: s: control character in a string",
		"{\"s\":\"\xff\"}":                 "byte 6: s: invalid UTF-8 in a string",
		"{\"s\":\"\xed\xa0\x80\"}":         "byte 6: s: invalid UTF-8 in a string",
		`{"s":"\ud800"}`:                   "byte 6: s: bad escape in a string",
		`{"s":"\ud800\u0041"}`:             "byte 6: s: bad escape in a string",
		`{"s":"\udc00\ud800"}`:             "byte 6: s: bad escape in a string",
		`{"s":"\x"}`:                       "byte 6: s: bad escape in a string",
		`{"s":"\u12g4"}`:                   "byte 6: s: bad escape in a string",
		`{"s":"abc`:                        "byte 9: s: a string has no end",
		`{"s":"\`:                          "byte 6: s: bad escape in a string",
		`{"v":"` + strings.Repeat("a", 21) + `"}`:   "byte 5: v: longer than 20 bytes",
		`{"v":"` + strings.Repeat(`\n`, 21) + `"}`:  "byte 5: v: longer than 20 bytes",
		`{"d":"` + strings.Repeat("AAAA", 7) + `"}`: "byte 5: d: longer than 20 bytes",
		`{"d":"AAA"}`:      "byte 5: d: not base64",
		`{"d":"AB=="}`:     "byte 5: d: not base64", // unused bits
		`{"d":"AA=\n="}`:   "byte 5: d: not base64",
		`{"d":"AA_-"}`:     "byte 5: d: not base64",
		`{"d":"AAAA===="}`: "byte 5: d: not base64",
		`{"in":[{"in":[{"in":[{"in":[{"in":[]}]}]}]}]}`:    "byte 28: in[0].in[0].in[0].in[0]: nested deeper than 8",
		`{"s":"a"` + strings.Repeat(" ", 9) + "\x00" + `}`: "byte 17: want ',' or '}', have no JSON",
	} {
		x, err := decodeDoc(s)
		if err == nil || err.Error() != want {
			t.Errorf("Decode(%q) = %+v, %v, want %s", s, x, err, want)
		}
		if strings.Contains(fmt.Sprint(err), marker) {
			t.Errorf("the error for %q has content: %v", s, err)
		}
	}
}

func TestDecodeRequired(t *testing.T) {
	f := NewFields("a", "b?", "c")
	decode := func(f *Fields, s string) error {
		d := Decoder{buf: []byte(s)}
		d.Object(f, func(string) { d.Int() })
		return d.End()
	}
	for s, want := range map[string]string{
		`{"a":1,"c":1}`:       "",
		`{"a":1,"b":2,"c":1}`: "",
		`{"a":1}`:             "byte 7: c: is missing",
		`{}`:                  "byte 2: a: is missing",
		`{"a":null,"c":1}`:    "byte 5: a: want a number, have null",
		`{"a":1,"c":1,"d":1}`: "byte 13: unknown key",
	} {
		if err := decode(f, s); (err == nil) != (want == "") || err != nil && err.Error() != want {
			t.Errorf("Decode(%s) = %v, want %q", s, err, want)
		}
	}
	if err := decode(f.Open(), `{"a":1,"d":{"e":[1,"x"]},"d":null,"c":1}`); err != nil {
		t.Errorf("open fields: %v", err)
	}
	d := Decoder{buf: []byte(`{"a":1,"c":1}`)}
	d.Object(f, func(string) {})
	if d.Err() == nil {
		t.Errorf("a reader that reads nothing gets away with it")
	}
	if err := (&Decoder{buf: []byte(`{"a":1,"c":1}`)}).Err(); err != nil {
		t.Errorf("Err = %v", err)
	}
}

// plain is fast where a string is long: every position of every kind of byte.
func TestPlain(t *testing.T) {
	for n := range 20 {
		for at := range n {
			for c := range 256 {
				b := bytes.Repeat([]byte{'x'}, n)
				b[at] = byte(c)
				want := n
				if c < 0x20 || c >= 0x80 || c == '"' || c == '\\' {
					want = at
				}
				if got := plain(b); got != want {
					t.Fatalf("plain(%q) = %d, want %d", b, got, want)
				}
			}
		}
	}
}

// FuzzDecode compares with encoding/json: what we take it takes, with the same
// values; what it takes and we do not has one of the reasons that are ours.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{"s":"aé\n\"\/\u00e9\ud83d\ude00","n":-1,"b":true,"list":["x",""],"in":[{"s":"1"},{}],"v":"\u0000","d":"AAEC"}`,
		`{"in":[{"in":[{"in":[{}]}]}]}`, `{"n":1e5}`, `{"s":null}`, `{"s":"\ud800"}`, `{"x":[1,2,{"y":false}]}`, `[]`, ` {} `, `{"n":00}`,
		"{\"s\":\"\x7f\xc2\x80\"}", `{"d":"A\/8="}`,
	} {
		f.Add(s)
	}
	type plainDoc struct {
		S    string      `json:"s"`
		O    string      `json:"o"`
		N    json.Number `json:"n"`
		B    bool        `json:"b"`
		List []string    `json:"list"`
		In   []doc       `json:"in"`
		V    string      `json:"v"`
		D    string      `json:"d"`
	}
	f.Fuzz(func(t *testing.T, s string) {
		// The grammar alone.
		d := Decoder{buf: []byte(s)}
		d.Skip()
		skipErr := d.End()
		if valid := json.Valid([]byte(s)); (skipErr == nil) != valid && (valid != true || !ourReason(skipErr)) {
			t.Errorf("Skip(%q) = %v, json.Valid %v", s, skipErr, valid)
		}

		x, err := decodeDoc(s)
		if err != nil {
			if skipErr == nil && !errors.As(err, new(*DecodeError)) {
				t.Errorf("Decode(%q) = %v, want a DecodeError", s, err)
			}
			return
		}
		if skipErr != nil {
			t.Errorf("Decode(%q) works, Skip says %v", s, skipErr)
		}
		// What was gone through once is read in another way, to the same end.
		sound := Decoder{buf: []byte(s), sound: true}
		var y doc
		if err := sound.Decode(&y); err != nil || fmt.Sprint(x) != fmt.Sprint(y) {
			t.Errorf("Decode(%q) = %+v, and when it is known to be sound %+v, %v", s, x, y, err)
		}
		var want plainDoc
		dec := json.NewDecoder(strings.NewReader(s))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&want); err != nil {
			t.Fatalf("Decode(%q) = %+v, json says %v", s, x, err)
		}
		data, err := base64.StdEncoding.Strict().DecodeString(want.D)
		if x.S != want.S || x.O != want.O || x.B != want.B || fmt.Sprint(x.List) != fmt.Sprint(want.List) || string(x.V) != want.V ||
			!bytes.Equal(x.D, data) || err != nil || len(x.In) != len(want.In) {
			t.Errorf("Decode(%q) = %+v, want %+v", s, x, want)
		}
		if n, _ := want.N.Int64(); n != x.N {
			t.Errorf("Decode(%q).N = %d, want %s", s, x.N, want.N)
		}
	})
}

// ourReason reports whether an error is one where we are stricter than
// encoding/json by intention.
func ourReason(err error) bool {
	for _, s := range []string{"nested deeper", "invalid UTF-8", "bad escape"} {
		if strings.Contains(fmt.Sprint(err), s) {
			return true
		}
	}
	return false
}

// FuzzStrings: what the Encoder writes, the Decoder and encoding/json read.
func FuzzStrings(f *testing.F) {
	for _, s := range []string{"", "a", "\"\\/\b\f\n\r\t\x00\x1f\x7f", "é😀\u2028", "\xff\xed\xa0\x80"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var e Encoder
		e.raw("{")
		e.String("s", s)
		e.Base64("d", value(s))
		e.raw("}")
		d := Decoder{buf: e.buf}
		var got, text string
		var data []byte
		d.Object(NewFields("s", "d"), func(key string) {
			if key == "s" {
				at := d.pos
				got = d.String(4*len(s) + 4)
				again := Decoder{buf: d.buf, pos: at}
				text = string(again.Text(4*len(s) + 4).Bytes())
			} else {
				data = d.Base64(len(s)).Bytes()
			}
		})
		if err := d.End(); err != nil {
			t.Fatalf("decoding %s: %v", e.buf, err)
		}
		want := string([]rune(s)) // one U+FFFD for each byte that is not UTF-8
		var std struct{ S, D string }
		if err := json.Unmarshal(e.buf, &std); err != nil || got != want || text != want || std.S != want || string(data) != s {
			t.Errorf("%q became %q, %q, %q and %q, %v", s, got, text, std.S, data, err)
		}
		if bytes.IndexByte(e.buf, 0) >= 0 {
			t.Errorf("%q is encoded with a NUL: %q", s, e.buf)
		}
	})
}
