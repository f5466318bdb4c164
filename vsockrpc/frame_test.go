package vsockrpc

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// readAll reads messages to the end.
func readAll(f *frameReader) (got []string, err error) {
	for {
		msg, err := f.message()
		if err != nil {
			return got, err
		}
		got = append(got, string(msg))
	}
}

func TestFrames(t *testing.T) {
	long := strings.Repeat("long ", 40_000)
	want := []string{"a", "", "bc", long, "d", strings.Repeat("e", firstBuffer-1), strings.Repeat("f", smallBuffer), "g"}
	stream := strings.Join(want, "\x00") + "\x00"
	for name, r := range map[string]io.Reader{
		"whole":        strings.NewReader(stream),
		"half":         iotest.HalfReader(strings.NewReader(stream)),
		"one by one":   iotest.OneByteReader(strings.NewReader(stream)),
		"data and err": iotest.DataErrReader(strings.NewReader(stream)),
	} {
		f := frameReader{r: r, limit: len(long)}
		got, err := readAll(&f)
		if !errors.Is(err, io.EOF) || !slices.Equal(got, want) {
			t.Errorf("%s: %d messages, %v, want %d and EOF", name, len(got), err, len(want))
		}
		if len(f.buf) > smallBuffer || f.large {
			t.Errorf("%s: a buffer of %d bytes is left", name, len(f.buf))
		}
	}
}

func TestFramesEnd(t *testing.T) {
	for stream, want := range map[string]error{"": io.EOF, "a\x00": io.EOF, "a\x00b": io.ErrUnexpectedEOF, "b": io.ErrUnexpectedEOF} {
		if _, err := readAll(&frameReader{r: strings.NewReader(stream), limit: 10}); !errors.Is(err, want) {
			t.Errorf("the end of %q is %v, want %v", stream, err, want)
		}
	}
	boom := errors.New("boom")
	f := frameReader{r: io.MultiReader(strings.NewReader("a\x00b"), iotest.ErrReader(boom)), limit: 10}
	if got, err := readAll(&f); !errors.Is(err, boom) || len(got) != 1 {
		t.Errorf("messages %q, %v, want one and %v", got, err, boom)
	}
}

// A flood is what never ends, and counts what is taken of it.
type flood struct{ n int }

func (f *flood) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 'x'
	}
	f.n += len(b)
	return len(b), nil
}

func TestFramesLimit(t *testing.T) {
	for _, limit := range []int{1, 10, firstBuffer - 2, firstBuffer - 1, firstBuffer, 100_000, MessageLimit} {
		for _, over := range []int{0, 1} {
			f := frameReader{r: strings.NewReader("a\x00" + strings.Repeat("x", limit+over) + "\x00b\x00"), limit: limit}
			got, err := readAll(&f)
			if over == 0 && (!errors.Is(err, io.EOF) || len(got) != 3) || over == 1 && (!errors.Is(err, ErrTooLarge) || len(got) != 1) {
				t.Errorf("limit %d and %d: %d messages, %v", limit, over, len(got), err)
			}
		}
		var r flood
		f := frameReader{r: &r, limit: limit}
		if _, err := f.message(); !errors.Is(err, ErrTooLarge) || r.n > limit+1 || len(f.buf) > limit+2 {
			t.Errorf("limit %d: %v after %d bytes in a buffer of %d", limit, err, r.n, len(f.buf))
		}
	}
}

// A spyReader notes every buffer that is read into.
type spyReader struct {
	io.Reader
	seen [][]byte
}

func (s *spyReader) Read(b []byte) (int, error) {
	n, err := s.Reader.Read(b)
	s.seen = append(s.seen, b[:n])
	return n, err
}

func TestFramesWipe(t *testing.T) {
	var stream bytes.Buffer
	for _, n := range []int{1, 100, 300_000, 20, 70_000} {
		stream.WriteString(strings.Repeat(marker, n) + "\x00")
	}
	spy := &spyReader{Reader: iotest.HalfReader(&stream)}
	f := frameReader{r: spy, limit: MessageLimit}
	if got, err := readAll(&f); len(got) != 5 || !errors.Is(err, io.EOF) {
		t.Fatalf("%d messages, %v", len(got), err)
	}
	f.wipe()
	for _, b := range spy.seen {
		if len(bytes.Trim(b, "\x00")) > 0 {
			t.Fatalf("after all messages a buffer has %q…", b[:min(len(b), 40)])
		}
	}
}

func FuzzFrames(f *testing.F) {
	f.Add([]byte("a\x00bc\x00\x00d"), uint16(3), uint8(2))
	f.Add([]byte("{}\x00{\"a\":1}\x00"), uint16(100), uint8(1))
	f.Add(bytes.Repeat([]byte("xyz\x00"), 3000), uint16(3), uint8(200))
	f.Fuzz(func(t *testing.T, stream []byte, limit uint16, chunk uint8) {
		fr := frameReader{r: &chunkReader{r: bytes.NewReader(stream), n: int(chunk) + 1}, limit: int(limit)}
		got, err := readAll(&fr)
		var want []string
		wantErr := io.EOF
		rest := stream
		for len(rest) > 0 {
			msg, after, found := bytes.Cut(rest, []byte{0})
			if len(msg) > int(limit) {
				wantErr = ErrTooLarge
				break
			}
			if !found {
				wantErr = io.ErrUnexpectedEOF
				break
			}
			want = append(want, string(msg))
			rest = after
		}
		if !slices.Equal(got, want) || !errors.Is(err, wantErr) {
			t.Errorf("%q with limit %d: %q, %v, want %q, %v", stream, limit, got, err, want, wantErr)
		}
	})
}

// A chunkReader reads at most n bytes at a time.
type chunkReader struct {
	r io.Reader
	n int
}

func (c *chunkReader) Read(b []byte) (int, error) { return c.r.Read(b[:min(len(b), c.n)]) }
