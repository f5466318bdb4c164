package secret

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

const hidden = "correct horse battery staple"

type nested struct {
	Public  Value
	private Value
	Pointer *Value
	List    []Value
	Map     map[string]Value
	Any     any
}

func everywhere() map[string]any {
	v := New([]byte(hidden))
	n := nested{Public: v, private: v, Pointer: &v, List: []Value{v}, Map: map[string]Value{"k": v}, Any: v}
	return map[string]any{"bare": v, "pointer": &v, "nested": n, "pointer to nested": &n, "slice": []nested{n}, "error": fmt.Errorf("with %v", n)}
}

// leaks reports whether s shows the secret, as text, as numbers or encoded.
func leaks(s string) bool {
	numbers := strings.Trim(fmt.Sprintf("%d", []byte(hidden)[:6]), "[]")
	hexBytes := strings.Trim(fmt.Sprintf("%#v", []byte(hidden)[:4]), "[]byte{}")
	for _, shape := range []string{
		"horse", numbers, hexBytes, hex.EncodeToString([]byte("horse")), strings.ToUpper(hex.EncodeToString([]byte("horse"))),
		base64.StdEncoding.EncodeToString([]byte(hidden))[:12],
	} {
		if strings.Contains(s, shape) {
			return true
		}
	}
	return false
}

func TestNothingPrints(t *testing.T) {
	if !leaks(hidden) || !leaks(fmt.Sprintf("%d", []byte(hidden))) || !leaks(fmt.Sprintf("%#v", []byte(hidden))) || !leaks(fmt.Sprintf("%x", hidden)) {
		t.Fatal("the test would not see a leak")
	}
	for name, v := range everywhere() {
		for verb := range strings.SplitSeq("v +v #v s q x X d b o c U t e g p T 08x -40s", " ") {
			if s := fmt.Sprintf("%"+verb, v); leaks(s) {
				t.Errorf("%%%s of %s shows the secret: %s", verb, name, s)
			}
		}
		var b bytes.Buffer
		for _, h := range []slog.Handler{slog.NewTextHandler(&b, nil), slog.NewJSONHandler(&b, nil)} {
			slog.New(h).With(slog.Any("with", v)).WithGroup("g").Info("m", slog.Any("v", v), slog.Group("h", slog.Any("v", v)))
		}
		if leaks(b.String()) {
			t.Errorf("slog of %s shows the secret: %s", name, b.String())
		}
	}
}

type holder struct{ V Value }

func TestNothingEncodes(t *testing.T) {
	v := New([]byte(hidden))
	for name, encode := range map[string]func(any) ([]byte, error){
		"json": json.Marshal,
		"xml":  xml.Marshal,
		"gob": func(v any) ([]byte, error) {
			var b bytes.Buffer
			err := gob.NewEncoder(&b).Encode(v)
			return b.Bytes(), err
		},
	} {
		for what, x := range map[string]any{"bare": v, "nested": holder{v}, "pointer": &v} {
			b, err := encode(x)
			if !errors.Is(err, ErrMarshal) || leaks(string(b)) || leaks(fmt.Sprint(err)) {
				t.Errorf("%s of a %s value = %q, %v, want %v", name, what, b, err, ErrMarshal)
			}
		}
	}
}

func TestValue(t *testing.T) {
	var zero Value
	if zero.Len() != 0 || zero.Bytes() != nil || !zero.Equal(New(nil)) {
		t.Errorf("the zero value is not empty")
	}
	zero.Wipe()

	b := []byte(hidden)
	v := New(b)
	w := v
	if v.Len() != len(hidden) || string(v.Bytes()) != hidden || !v.Equal(New([]byte(hidden))) || v.Equal(New([]byte("other"))) {
		t.Errorf("a value does not hold what it was given")
	}
	w.Wipe()
	if v.Len() != 0 || !bytes.Equal(b, make([]byte, len(hidden))) {
		t.Errorf("after Wipe %d bytes are left", v.Len())
	}
	w.Wipe()
}
