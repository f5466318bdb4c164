package smbios

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
)

// sysfs makes a folder with files.
func sysfs(t *testing.T, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range files {
		name = filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, b, 0o400); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func entry(i int) string { return pathEntries + "/11-" + strconv.Itoa(i) + "/raw" }

func TestRead(t *testing.T) {
	table := cat(oem(0x0E00, "a", "b"), end)
	large := make([]byte, MaxTableSize)
	copy(large, table)
	ab := []plain{{0x0E00, 1, false, "a"}, {0x0E00, 2, false, "b"}}
	c := plain{0x0E01, 1, false, "c"}
	tests := []struct {
		name   string
		files  map[string][]byte
		want   []plain
		faults []FaultCode
		origin Origin
		ep     EntryPoint
	}{
		{
			name:  "tables",
			files: map[string][]byte{pathTable: table, pathEntryPoint: entry64(len(table)), entry(0): oem(0x0E01, "c")},
			want:  ab, origin: OriginTables, ep: EntryPoint{"3.2", 64, int64(len(table)), 0},
		},
		{
			name:  "32 bits",
			files: map[string][]byte{pathTable: cat(end, table), pathEntryPoint: entry32(100, 3)},
			want:  ab, origin: OriginTables, ep: EntryPoint{"2.8", 32, 100, 3},
		},
		{name: "no entry point", files: map[string][]byte{pathTable: table}, want: ab, faults: []FaultCode{FaultEntryPoint}, origin: OriginTables},
		{name: "empty entry point", files: map[string][]byte{pathTable: table, pathEntryPoint: nil}, want: ab, faults: []FaultCode{FaultEntryPoint}, origin: OriginTables},
		{name: "endless entry point", files: map[string][]byte{pathTable: table, pathEntryPoint: large}, want: ab, faults: []FaultCode{FaultEntryPoint}, origin: OriginTables},
		{name: "entry point is a folder", files: map[string][]byte{pathTable: table, pathEntryPoint + "/x": nil}, want: ab, faults: []FaultCode{FaultEntryPoint}, origin: OriginTables},
		{name: "empty table", files: map[string][]byte{pathTable: nil, pathEntryPoint: entry64(0)}, faults: []FaultCode{FaultNoEnd}, origin: OriginTables, ep: EntryPoint{"3.2", 64, 0, 0}},
		{name: "largest table", files: map[string][]byte{pathTable: large, pathEntryPoint: entry64(MaxTableSize)}, want: ab, faults: []FaultCode{FaultTrailing}, origin: OriginTables, ep: EntryPoint{"3.2", 64, MaxTableSize, 0}},

		{name: "entries", files: map[string][]byte{entry(0): oem(0x0E00, "a", "b"), entry(1): oem(0x0E01, "c")}, want: append(slices.Clone(ab), c), origin: OriginEntries},
		{name: "entries, entry point alone", files: map[string][]byte{pathEntryPoint: entry64(9), entry(0): oem(0x0E01, "c")}, want: []plain{c}, origin: OriginEntries},
		{name: "entries to the first gap", files: map[string][]byte{entry(0): oem(0x0E00, "a", "b"), entry(2): oem(0x0E01, "c")}, want: ab, origin: OriginEntries},
		{name: "entries, last NUL missing", files: map[string][]byte{entry(0): oem(0x0E00, "a", "b")[:8]}, want: ab, origin: OriginEntries},
		{
			name:  "entries, one broken",
			files: map[string][]byte{entry(0): structure(typeOEMStrings, 0x0D00, []byte{1, 0}, "x"), entry(1): oem(0x0E01, "c")},
			want:  []plain{c}, faults: []FaultCode{FaultBadOEMStructure}, origin: OriginEntries,
		},
		{name: "entries of other types only", files: map[string][]byte{pathEntries + "/1-0/raw": structure(1, 1, []byte{1})}, origin: OriginEntries},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Read(sysfs(t, tt.files))
			if err != nil {
				t.Fatalf("Read() = %v, want no error", err)
			}
			if g := plainStrings(got); !slices.Equal(g, tt.want) {
				t.Errorf("Read().Strings = %v, want %v", g, tt.want)
			}
			if g := codes(got); !slices.Equal(g, tt.faults) {
				t.Errorf("Read().Faults = %v, want %v", got.Faults, tt.faults)
			}
			if got.Origin != tt.origin || got.EntryPoint != tt.ep {
				t.Errorf("Read() has origin %q and entry point %v, want %q and %v", got.Origin, got.EntryPoint, tt.origin, tt.ep)
			}
			checkFaults(t, got)
		})
	}
}

func TestReadError(t *testing.T) {
	large := make([]byte, MaxTableSize+1)
	half := make([]byte, MaxTableSize/2+1)
	copy(half, oem(1, "a"))
	notRegular := errors.New("not a regular file")

	tests := []struct {
		name  string
		files map[string][]byte
		setup func(t *testing.T, dir string)
		want  error // notRegular: by its text
	}{
		{name: "empty sysfs", want: ErrNotFound},
		{name: "no sysfs", setup: func(t *testing.T, dir string) { check(t, os.Remove(dir)) }, want: ErrNotFound},
		{name: "firmware, but no SMBIOS", files: map[string][]byte{"firmware/acpi/x": nil}, want: ErrNotFound},
		{name: "entry point alone", files: map[string][]byte{pathEntryPoint: entry64(9)}, want: ErrNotFound},
		{name: "table too large", files: map[string][]byte{pathTable: large}, want: ErrTooLarge},
		{name: "entry too large", files: map[string][]byte{entry(0): large}, want: ErrTooLarge},
		{name: "entries too large together", files: map[string][]byte{entry(0): half, entry(1): half}, want: ErrTooLarge},
		{name: "table is a folder", files: map[string][]byte{pathTable + "/x": nil}, want: notRegular},
		{name: "entry is a folder", files: map[string][]byte{entry(0) + "/x": nil}, want: notRegular},
		{name: "entries is a file", files: map[string][]byte{pathEntries: nil}, want: errors.New("not a folder")},
		{
			name: "table is a FIFO", files: map[string][]byte{pathEntryPoint: entry64(9)},
			setup: func(t *testing.T, dir string) { check(t, syscall.Mkfifo(filepath.Join(dir, pathTable), 0o600)) },
			want:  notRegular,
		},
		{
			name: "table leads out", files: map[string][]byte{pathEntryPoint: entry64(9)},
			setup: func(t *testing.T, dir string) {
				check(t, os.Symlink("/proc/self/status", filepath.Join(dir, pathTable)))
			},
			want: errors.New("escapes"),
		},
		{
			name: "table may not be read", files: map[string][]byte{pathTable: end, entry(0): oem(1, "a")},
			setup: func(t *testing.T, dir string) {
				if os.Geteuid() == 0 {
					t.Skip("root may read every file: run the tests as another user to have this case")
				}
				check(t, os.Chmod(filepath.Join(dir, pathTable), 0))
			},
			want: fs.ErrPermission,
		},
		{
			name: "entry may not be read", files: map[string][]byte{entry(0): oem(1, "a")},
			setup: func(t *testing.T, dir string) {
				if os.Geteuid() == 0 {
					t.Skip("root may read every file: run the tests as another user to have this case")
				}
				check(t, os.Chmod(filepath.Join(dir, entry(0)), 0))
			},
			want: fs.ErrPermission,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := sysfs(t, tt.files)
			if tt.setup != nil {
				tt.setup(t, dir)
			}
			got, err := Read(dir)
			if !reflect.DeepEqual(got, Table{}) {
				t.Errorf("Read() = %v, want the zero Table", got)
			}
			if err == nil || (!errors.Is(err, tt.want) && !strings.Contains(err.Error(), tt.want.Error())) {
				t.Errorf("Read() = %v, want %v", err, tt.want)
			}
			if errors.Is(err, ErrNotFound) != errors.Is(tt.want, ErrNotFound) {
				t.Errorf("Read() = %v, is ErrNotFound: %v", err, errors.Is(err, ErrNotFound))
			}
			if strings.ContainsAny(err.Error(), "\n\r") {
				t.Errorf("Read() = %q, want one line", err)
			}
		})
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestReadTooManyEntries(t *testing.T) {
	files := make(map[string][]byte)
	for i := range MaxOEMStructures + 9 {
		files[entry(i)] = oem(uint16(i), "a")
	}
	got, err := Read(sysfs(t, files))
	if err != nil || len(got.Strings) != MaxOEMStructures || !slices.Equal(codes(got), []FaultCode{FaultTooManyStructures}) {
		t.Errorf("Read() = %d strings, faults %v, %v, want %d and %v", len(got.Strings), got.Faults, err, MaxOEMStructures, FaultTooManyStructures)
	}
}

func TestReadAll(t *testing.T) {
	want := bytes.Repeat([]byte("0123456789"), 1000)
	readers := map[string]func(io.Reader) io.Reader{
		"whole":            func(r io.Reader) io.Reader { return r },
		"by the byte":      iotest.OneByteReader,
		"by halves":        iotest.HalfReader,
		"data and EOF":     iotest.DataErrReader,
		"byte, data + EOF": func(r io.Reader) io.Reader { return iotest.DataErrReader(iotest.OneByteReader(r)) },
	}
	for name, wrap := range readers {
		for _, size := range []int64{0, 1, 4096, int64(len(want)) - 1, int64(len(want)), int64(len(want)) + 1, MaxTableSize} {
			for _, limit := range []int{len(want), len(want) + 1, MaxTableSize} {
				if size > int64(limit) {
					continue
				}
				got, err := readAll(wrap(bytes.NewReader(want)), size, limit)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: readAll(size %d, limit %d) = %d bytes, %v, want %d", name, size, limit, len(got), err, len(want))
				}
			}
			// No more than the limit is read, and a byte to see that there is more.
			for _, limit := range []int{0, 1, len(want) / 2, len(want) - 1} {
				r := &countingReader{r: bytes.NewReader(want)}
				got, err := readAll(wrap(r), size, limit)
				if !errors.Is(err, ErrTooLarge) || got != nil {
					t.Errorf("%s: readAll(size %d, limit %d) = %d bytes, %v, want %v", name, size, limit, len(got), err, ErrTooLarge)
				}
				// DataErrReader reads ahead by itself.
				if r.n > limit+1 && !strings.Contains(name, "EOF") {
					t.Errorf("%s: readAll(size %d, limit %d) read %d bytes, want at most %d", name, size, limit, r.n, limit+1)
				}
			}
		}
	}
	if got, err := readAll(iotest.TimeoutReader(iotest.OneByteReader(bytes.NewReader(want))), 0, MaxTableSize); !errors.Is(err, iotest.ErrTimeout) || got != nil {
		t.Errorf("readAll() = %d bytes, %v, want %v", len(got), err, iotest.ErrTimeout)
	}
}

// A countingReader counts what was read from it.
type countingReader struct {
	r io.Reader
	n int
}

func (c *countingReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += n
	return n, err
}

// Read wipes the buffers that it read into, on every way out.
func TestReadAllWipes(t *testing.T) {
	for name, r := range map[string]io.Reader{
		"too large": strings.NewReader(strings.Repeat("s", 10000)),
		"error":     io.MultiReader(strings.NewReader(strings.Repeat("s", 5000)), iotest.ErrReader(errors.New("no"))),
	} {
		spy := &spyReader{r: r}
		if got, err := readAll(spy, 0, 9000); err == nil || got != nil {
			t.Errorf("%s: readAll() = %d bytes, %v, want an error", name, len(got), err)
		}
		for _, b := range spy.seen {
			if bytes.IndexByte(b, 's') >= 0 {
				t.Errorf("%s: a buffer was not wiped", name)
			}
		}
	}
}

// A spyReader keeps the buffers it is given.
type spyReader struct {
	r    io.Reader
	seen [][]byte
}

func (s *spyReader) Read(b []byte) (int, error) {
	s.seen = append(s.seen, b)
	return s.r.Read(b)
}
