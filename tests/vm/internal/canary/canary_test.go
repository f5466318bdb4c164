package canary_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/guestagent/guestagent/tests/vm/internal/canary"
)

// secret has bytes that each encoding treats in its own way.
var secret = []byte("canary \xff\xfe?>+/&=%\x01\"3f9c")

func TestForms(t *testing.T) {
	forms := canary.Forms(secret)
	quoted, err := json.Marshal(map[string][]byte{"data": secret})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"raw":               string(secret),
		"hex":               fmt.Sprintf("%x", secret),
		"upper hex":         fmt.Sprintf("%X", secret),
		"quoted":            fmt.Sprintf("%q", secret),
		"slice":             fmt.Sprintf("%v", secret),
		"query":             "?v=" + url.QueryEscape(string(secret)),
		"path":              url.PathEscape(string(secret)),
		"json":              string(quoted),
		"all bytes percent": strings.ReplaceAll(fmt.Sprintf("% X", append([]byte{0}, secret...)), " ", "%"),
	} {
		if n, err := canary.Scan(strings.NewReader("before "+text+" after"), forms); n < 0 || err != nil {
			t.Errorf("%s: Scan = %d, %v, want it found", name, n, err)
		}
	}
	for before := range 7 {
		for after := range 4 {
			b := slices.Concat(bytes.Repeat([]byte{0xa5}, before), secret, bytes.Repeat([]byte{0x5a}, after))
			for name, e := range map[string]*base64.Encoding{"standard": base64.StdEncoding, "URL": base64.URLEncoding} {
				if n, err := canary.Scan(strings.NewReader(e.EncodeToString(b)), forms); n < 0 || err != nil {
					t.Errorf("%s base64, %d bytes before, %d after: Scan = %d, %v, want it found", name, before, after, n, err)
				}
			}
		}
	}
	for _, other := range []string{"", "canary", string(secret[1:]), fmt.Sprintf("%x", secret[1:]), base64.StdEncoding.EncodeToString(secret[2:])} {
		if n, err := canary.Scan(strings.NewReader(other), forms); n != -1 || err != nil {
			t.Errorf("Scan(%q) = %d, %v, want -1", other, n, err)
		}
	}
	for _, f := range forms {
		if len(f) < canary.MinSize {
			t.Errorf("a form of %d bytes, want %d at least", len(f), canary.MinSize)
		}
	}
}

func TestFormsOfShortSecret(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("Forms of a short secret did not panic")
		}
	}()
	canary.Forms(secret[:canary.MinSize-1])
}

func TestScan(t *testing.T) {
	forms := canary.Forms(secret)
	// At each place around the borders of what is read at a time.
	for _, at := range []int{0, 1, 64<<10 - len(secret), 64<<10 - 1, 64 << 10, 128<<10 - 3, 200_000} {
		data := slices.Concat(bytes.Repeat([]byte("x"), at), secret, []byte("tail"))
		if n, err := canary.Scan(bytes.NewReader(data), forms); n != int64(at) || err != nil {
			t.Errorf("Scan = %d, %v, want %d", n, err, at)
		}
	}
	if n, err := canary.Scan(iotest.OneByteReader(bytes.NewReader(append([]byte("1234"), secret...))), forms); n != 4 || err != nil {
		t.Errorf("Scan byte by byte = %d, %v, want 4", n, err)
	}
	want := errors.New("broken")
	if n, err := canary.Scan(io.MultiReader(strings.NewReader("x"), iotest.ErrReader(want)), forms); n != -1 || !errors.Is(err, want) {
		t.Errorf("Scan of a broken reader = %d, %v, want -1, %v", n, err, want)
	}
}

func TestScanTree(t *testing.T) {
	dir := t.TempDir()
	for name, data := range map[string]string{"a": "nothing", "sub/b": "x" + string(secret), "sub/c": fmt.Sprintf("%x", secret)} {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/no/such/file", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	got, err := canary.ScanTree(dir, canary.Forms(secret))
	if want := []string{filepath.Join(dir, "sub/b"), filepath.Join(dir, "sub/c")}; err != nil || !slices.Equal(got, want) {
		t.Errorf("ScanTree = %q, %v, want %q", got, err, want)
	}
	if _, err := canary.ScanFile(filepath.Join(dir, "none"), canary.Forms(secret)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ScanFile of a missing file = %v, want %v", err, fs.ErrNotExist)
	}
}

func TestScanProcesses(t *testing.T) {
	procfs := t.TempDir()
	for pid, p := range map[int]struct{ stat, cmdline, environ string }{
		1:  {"1 (init) S 0 1", "init", string(secret)},
		10: {"10 (test) S 1 10", "test", ""},
		11: {"11 (a) b) S 10 11", "a\x00" + string(secret), ""},
		12: {"12 (child of child) S 11 11", "b", fmt.Sprintf("A=%x\x00", secret)},
		13: {"13 (clean) S 10 11", "c", ""},
		20: {"20 (other) S 1 20", string(secret), ""},
	} {
		dir := filepath.Join(procfs, strconv.Itoa(pid))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for name, data := range map[string]string{"stat": p.stat, "cmdline": p.cmdline, "environ": p.environ} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	forms := canary.Forms(secret)
	got, err := canary.ScanProcesses(procfs, 10, forms)
	slices.Sort(got)
	if want := []string{filepath.Join(procfs, "11/cmdline"), filepath.Join(procfs, "12/environ")}; err != nil || !slices.Equal(got, want) {
		t.Errorf("ScanProcesses = %q, %v, want %q", got, err, want)
	}
	if _, err := canary.ScanProcesses(procfs, 99, forms); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ScanProcesses of no process = %v, want %v", err, fs.ErrNotExist)
	}
}

func TestScanRealProcesses(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no /proc: run it on Linux")
	}
	value := bytes.Repeat([]byte("real canary "), 3)
	cmd := exec.CommandContext(t.Context(), "cat")
	cmd.Env = append(os.Environ(), "CANARY="+base64.StdEncoding.EncodeToString(value))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	got, err := canary.ScanProcesses("/proc", os.Getpid(), canary.Forms(value))
	if want := []string{fmt.Sprintf("/proc/%d/environ", cmd.Process.Pid)}; err != nil || !slices.Equal(got, want) {
		t.Errorf("ScanProcesses = %q, %v, want %q", got, err, want)
	}
	_ = stdin.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
