package wire

import (
	"bytes"
	"errors"
	"io"
	"math"
	"reflect"
	"strings"
	"testing"
)

func messages() []*Message {
	return []*Message{
		{Op: OpHello},
		{ID: 1, Op: OpRun, Argv: []string{"cat", "a b", "\x00é"}, Env: []string{"A=b"}, Dir: "/etc", Body: []byte("input")},
		{ID: math.MaxUint64, Op: OpResult, ExitCode: 143, Signal: 15, Stdout: 2, Body: []byte("\x00\xffvmg1")},
		{ID: 3, Op: OpWrite, Path: "/x", Mode: 0o644, Body: bytes.Repeat([]byte{0xff}, 1<<20)},
		{ID: 4, Op: OpResult, Error: "no", Errno: 2},
	}
}

func TestRoundTrip(t *testing.T) {
	var buf bytes.Buffer
	for _, m := range messages() {
		if err := Write(&buf, m); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range messages() {
		got, err := Read(&buf)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("Read = %+v, %v, want %+v", got, err, want)
		}
	}
	if _, err := Read(&buf); !errors.Is(err, io.EOF) {
		t.Errorf("Read at the end = %v, want %v", err, io.EOF)
	}
}

func TestReadBad(t *testing.T) {
	var good bytes.Buffer
	if err := Write(&good, messages()[1]); err != nil {
		t.Fatal(err)
	}
	for n := 1; n < good.Len(); n++ {
		if m, err := Read(bytes.NewReader(good.Bytes()[:n])); m != nil || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("Read of the first %d bytes = %v, %v, want %v", n, m, err, io.ErrUnexpectedEOF)
		}
	}
	for name, in := range map[string]string{
		"magic":         "vmg2\x00\x00\x00\x02\x00\x00\x00\x00{}",
		"header size":   "vmg1\xff\xff\xff\xff\x00\x00\x00\x00",
		"body size":     "vmg1\x00\x00\x00\x02\xff\xff\xff\xff{}",
		"no JSON":       "vmg1\x00\x00\x00\x02\x00\x00\x00\x00{{",
		"two values":    "vmg1\x00\x00\x00\x04\x00\x00\x00\x00{}{}",
		"unknown key":   "vmg1\x00\x00\x00\x07\x00\x00\x00\x00{\"z\":1}",
		"stdout beyond": "vmg1\x00\x00\x00\x0c\x00\x00\x00\x00{\"stdout\":1}",
	} {
		if m, err := Read(strings.NewReader(in)); m != nil || !errors.Is(err, ErrFrame) {
			t.Errorf("%s: Read = %v, %v, want %v", name, m, err, ErrFrame)
		}
	}
}

func TestWriteTooLarge(t *testing.T) {
	for _, m := range []*Message{
		{Op: OpRun, Argv: []string{strings.Repeat("x", maxHeader)}},
		{Op: OpWrite, Body: make([]byte, maxBody+1)},
	} {
		var buf bytes.Buffer
		if err := Write(&buf, m); err == nil || buf.Len() != 0 {
			t.Errorf("Write of too much = %v, and %d bytes, want an error and none", err, buf.Len())
		}
	}
}

func FuzzRead(f *testing.F) {
	for _, m := range messages() {
		if len(m.Body) > 1<<10 {
			continue
		}
		var buf bytes.Buffer
		if err := Write(&buf, m); err != nil {
			f.Fatal(err)
		}
		f.Add(buf.Bytes())
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		m, err := Read(bytes.NewReader(in))
		if err != nil {
			if m != nil {
				t.Errorf("Read = %+v with an error", m)
			}
			return
		}
		var buf bytes.Buffer
		if err := Write(&buf, m); err != nil {
			t.Fatal(err)
		}
		again, err := Read(&buf)
		if err != nil || !reflect.DeepEqual(again, m) {
			t.Errorf("Read of what was written = %+v, %v, want %+v", again, err, m)
		}
	})
}
