package cpio

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
)

type entry struct {
	header  Header
	content string
}

func entries() []entry {
	return []entry{
		{Header{Name: "etc", Mode: TypeDir | 0o755, ModTime: 1700000000}, ""},
		{Header{Name: "etc/empty", Mode: TypeRegular | 0o600}, ""},
		{Header{Name: "etc/one", Mode: TypeRegular | 0o4755, UID: 3, GID: 4}, "1"},
		{Header{Name: "etc/ünï codé", Mode: TypeRegular | 0o400}, strings.Repeat("\x00\xffTRAILER!!!", 1000)},
		{Header{Name: "init", Mode: TypeSymlink | 0o777}, "sbin/init"},
		{Header{Name: "console", Mode: TypeChar | 0o600, DevMajor: 5, DevMinor: 1}, ""},
	}
}

func write(t *testing.T, list []entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := NewWriter(&buf)
	for _, e := range list {
		e.header.Size = int64(len(e.content))
		if err := w.Add(e.header, strings.NewReader(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// read is an independent reader, strict about padding. It returns what follows the archive too.
func read(in []byte) (list []entry, rest []byte, err error) {
	offset := 0
	take := func(n int) []byte {
		if len(in)-offset < n {
			err = errors.Join(err, io.ErrUnexpectedEOF)
			return make([]byte, n)
		}
		offset += n
		return in[offset-n : offset]
	}
	pad := func(to int) {
		if p := take((to - offset%to) % to); len(bytes.Trim(p, "\x00")) > 0 {
			err = errors.Join(err, fmt.Errorf("padding before %d is not zero", offset))
		}
	}
	for err == nil {
		if magic := take(6); string(magic) != "070701" {
			return nil, nil, fmt.Errorf("magic %q at %d", magic, offset)
		}
		var f [13]uint32
		for i := range f {
			v, perr := strconv.ParseUint(string(take(8)), 16, 32)
			err = errors.Join(err, perr)
			f[i] = uint32(v)
		}
		name := string(bytes.TrimSuffix(take(int(f[11])), []byte{0}))
		pad(4)
		if name == trailer {
			pad(blockSize)
			return list, in[offset:], err
		}
		content := string(take(int(f[6])))
		pad(4)
		list = append(list, entry{Header{
			Name: name, Mode: f[1], UID: f[2], GID: f[3], ModTime: f[5], Size: int64(f[6]), DevMajor: f[9], DevMinor: f[10],
		}, content})
	}
	return nil, nil, err
}

func TestRoundTrip(t *testing.T) {
	archive := write(t, entries())
	if len(archive)%blockSize != 0 {
		t.Errorf("archive of %d bytes, want a multiple of %d", len(archive), blockSize)
	}
	got, rest, err := read(archive)
	if err != nil || len(rest) != 0 {
		t.Fatalf("read = %v, and %d bytes are left", err, len(rest))
	}
	want := entries()
	for i := range want {
		want[i].header.Size = int64(len(want[i].content))
	}
	if !slices.Equal(got, want) {
		t.Errorf("read = %+v, want %+v", got, want)
	}
}

// TestTool reads an archive with the program cpio, if it is installed: it is not needed otherwise.
func TestTool(t *testing.T) {
	tool, err := exec.LookPath("cpio")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("cpio is not installed")
		}
		t.Skip("cpio is not installed: apt-get install cpio")
	}
	cmd := exec.CommandContext(t.Context(), tool, "--list", "--quiet")
	cmd.Stdin = bytes.NewReader(write(t, entries()))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("cpio --list: %v\n%s", err, out)
	}
	var want strings.Builder
	for _, e := range entries() {
		want.WriteString(e.header.Name + "\n")
	}
	// Some versions quote what is not ASCII.
	if got := string(out); got != want.String() && !strings.Contains(got, `\3`) {
		t.Errorf("cpio --list = %q, want %q", got, want.String())
	}
}

func TestRefused(t *testing.T) {
	for _, h := range []Header{
		{Name: ""},
		{Name: "/etc"},
		{Name: "TRAILER!!!"},
		{Name: "a\x00b"},
		{Name: strings.Repeat("x", maxName)},
		{Name: "x", Size: -1},
		{Name: "x", Size: 1 << 32},
	} {
		var buf bytes.Buffer
		if err := NewWriter(&buf).Add(h, nil); err == nil || buf.Len() != 0 {
			t.Errorf("Add(%.20q, size %d) = %v, and %d bytes, want an error and none", h.Name, h.Size, err, buf.Len())
		}
	}
	if err := NewWriter(io.Discard).Add(Header{Name: "x", Size: 3}, strings.NewReader("12")); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Add of too little = %v, want %v", err, io.ErrUnexpectedEOF)
	}
	w := NewWriter(io.Discard)
	if err := errors.Join(w.Close(), w.Close()); err != nil {
		t.Errorf("Close twice = %v", err)
	}
	if err := w.Add(Header{Name: "x"}, nil); err == nil {
		t.Error("Add after Close worked")
	}
}
