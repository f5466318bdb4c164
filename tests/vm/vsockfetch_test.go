package vm

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var (
	someHash  = strings.Repeat("0f", sha256.Size)
	otherHash = strings.Repeat("aa", sha256.Size)
)

func TestParseRelease(t *testing.T) {
	const index = "main/binary-amd64/Packages.gz"
	const head = "Origin: Debian\nCodename: sid\nMD5Sum:\n 0011 5 " + index + "\nSHA256:\n"
	for _, tt := range []struct{ name, in, want string }{
		{"good", head + " " + otherHash + " 7 main/binary-arm64/Packages.gz\n " + someHash + "   17 " + index + "\n", someHash},
		{"carriage returns", strings.ReplaceAll(head, "\n", "\r\n") + " " + someHash + " 17 " + index + "\r\n", someHash},
		{"empty", "", ""},
		{"other release", strings.Replace(head, "sid", "trixie", 1) + " " + someHash + " 17 " + index + "\n", ""},
		{"only MD5", "Codename: sid\nMD5Sum:\n " + someHash + " 17 " + index + "\n", ""},
		{"after SHA256", head + "SHA512:\n " + someHash + " 17 " + index + "\n", ""},
		{"short hash", head + " " + someHash[2:] + " 17 " + index + "\n", ""},
		{"hash that is a path", head + " ../" + someHash[3:] + " 17 " + index + "\n", ""},
		{"size", head + " " + someHash + " -17 " + index + "\n", ""},
		{"large", head + " " + someHash + " 99999999999 " + index + "\n", ""},
	} {
		got, err := parseRelease([]byte(tt.in), "sid", index)
		want := archiveFile{}
		if tt.want != "" {
			want = archiveFile{path: "dists/sid/main/binary-amd64/by-hash/SHA256/" + tt.want, sha256: tt.want, size: 17}
		}
		if got != want || (err == nil) != (tt.want != "") {
			t.Errorf("%s: parseRelease = %+v, %v, want %+v", tt.name, got, err, want)
		}
	}
}

func TestParsePackages(t *testing.T) {
	entry := func(name, version, file, hash, size string) string {
		return fmt.Sprintf("Package: %s\nVersion: %s\nDescription: x: y\n z\nFilename: %s\nSize: %s\nSHA256: %s\n\n", name, version, file, size, hash)
	}
	other := entry("other", "1", "pool/o.deb", otherHash, "1")
	good := entry("tool", "1:0.3.0-2+b1", "pool/t.deb", someHash, "17")
	want := debPackage{version: "1:0.3.0-2+b1", file: archiveFile{path: "pool/t.deb", sha256: someHash, size: 17}}
	for _, tt := range []struct {
		name, in string
		ok       bool
	}{
		{"good", other + good + other, true},
		{"last, without an empty line", other + strings.TrimSuffix(good, "\n"), true},
		{"empty", "", false},
		{"missing", other, false},
		{"only a prefix", strings.Replace(good, "tool", "tool-extra", 1), false},
		{"fields of another", other + "Package: tool\n\n", false},
		{"version", entry("tool", "../1", "pool/t.deb", someHash, "17"), false},
		{"path", entry("tool", "1", "../t.deb", someHash, "17"), false},
		{"absolute path", entry("tool", "1", "/t.deb", someHash, "17"), false},
		{"hash", entry("tool", "1", "pool/t.deb", "", "17"), false},
		{"size", entry("tool", "1", "pool/t.deb", someHash, "99999999999"), false},
		{"line too long", "X: " + strings.Repeat("x", maxLine) + "\n\n" + good, false},
	} {
		got, err := parsePackages(strings.NewReader(tt.in), "tool")
		if (err == nil) != tt.ok || (tt.ok && got != want) || (!tt.ok && got != debPackage{}) {
			t.Errorf("%s: parsePackages = %+v, %v, want %t", tt.name, got, err, tt.ok)
		}
	}
}

func TestGoodSignature(t *testing.T) {
	const good, missing = "[GNUPG:] GOODSIG 0E98 Debian\n[GNUPG:] VALIDSIG 1F89\n", "[GNUPG:] ERRSIG 6ED0 1 8 01 1 9\n[GNUPG:] NO_PUBKEY 6ED0\n"
	for in, want := range map[string]bool{
		"":                                     false,
		good:                                   true,
		missing:                                false,
		missing + good:                         true,
		good + "[GNUPG:] BADSIG 6ED0 Debian\n": false,
		"[GNUPG:] EXPKEYSIG 0E98 Debian\n[GNUPG:] VALIDSIG 1F89\n": false,
		"GOODSIG 0E98\n": false,
	} {
		if got := goodSignature(in); got != want {
			t.Errorf("goodSignature(%q) = %t, want %t", in, got, want)
		}
	}
}

func TestFetch(t *testing.T) {
	const content = "what the archive has"
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/debian/pool/file" {
			http.NotFound(w, r)
			return
		}
		_, _ = io.WriteString(w, content)
	}))
	t.Cleanup(server.Close)
	sum := sha256.Sum256([]byte(content))
	hash := hex.EncodeToString(sum[:])
	local := t.TempDir()
	if err := os.MkdirAll(filepath.Join(local, "pool"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(local, "pool/file"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, base := range []string{server.URL + "/debian", "file:" + local, "file://" + local} {
		for _, tt := range []struct {
			name string
			file archiveFile
			ok   bool
		}{
			{"good", archiveFile{"pool/file", hash, int64(len(content))}, true},
			{"other hash", archiveFile{"pool/file", someHash, int64(len(content))}, false},
			{"larger", archiveFile{"pool/file", hash, int64(len(content)) - 1}, false},
			{"missing", archiveFile{"pool/other", hash, int64(len(content))}, false},
		} {
			t.Setenv("MIRROR", base+"/")
			a, err := openArchive(t.Context(), t.TempDir(), io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			name, err := a.fetch(t.Context(), tt.file)
			if (err == nil) != tt.ok || (!tt.ok && !errors.Is(err, ErrArchive)) {
				t.Errorf("%s: fetch = %v, want %t, an error matching %v", tt.name, err, tt.ok, ErrArchive)
			}
			if got, _ := os.ReadFile(name); tt.ok && string(got) != content {
				t.Errorf("%s: fetched %q, want %q", tt.name, got, content)
			}
		}
	}
}

// needPrograms skips where one of the named programs is missing.
func needPrograms(t *testing.T, names ...string) {
	t.Helper()
	if err := needTools(names...); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// TestUnsigned has a mirror without a signature: nothing is taken from it.
func TestUnsigned(t *testing.T) {
	needPrograms(t, "gpgv", "dpkg-deb")
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.Path)
		_, _ = io.WriteString(w, "Codename: sid\nSHA256:\n "+someHash+" 1 main/binary-amd64/Packages.gz\n")
	}))
	t.Cleanup(server.Close)
	cache := t.TempDir()
	t.Setenv("MIRROR", server.URL)
	t.Setenv("GUESTAGENT_VM_CACHE", cache)
	withoutVsockProgram(t)
	program, err := VhostDeviceVsock(t.Context(), nil)
	if errors.Is(err, ErrMissingTool) {
		t.Skip(err) // no keys
	}
	if program != "" || !errors.Is(err, ErrArchive) || len(asked) != 1 {
		t.Errorf("VhostDeviceVsock = %q, %v, want %v after one request, not %q", program, err, ErrArchive, asked)
	}
	if left, err := filepath.Glob(filepath.Join(cache, "[^l]*")); err != nil || len(left) != 0 {
		t.Errorf("left in the cache are %q, %v, want the lock alone", left, err)
	}
}

// withoutVsockProgram makes a PATH with only what VhostDeviceVsock needs.
func withoutVsockProgram(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"gpgv", "dpkg-deb"} {
		program, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(program, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
}

func TestVsockProgramPlaces(t *testing.T) {
	bin, cache := t.TempDir(), t.TempDir()
	t.Setenv("PATH", bin)
	t.Setenv("GUESTAGENT_VM_CACHE", cache)
	t.Setenv("MIRROR", "file:"+t.TempDir())
	get := func(want string, wantErr error) {
		t.Helper()
		if got, err := VhostDeviceVsock(t.Context(), nil); got != want || !errors.Is(err, wantErr) {
			t.Errorf("VhostDeviceVsock = %q, %v, want %q, %v", got, err, want, wantErr)
		}
	}
	script := func(dir, name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return name
	}
	get("", ErrMissingTool)
	script(cache, vsockProgram+"-1", "exit 127")
	get("", ErrMissingTool)
	get(script(cache, vsockProgram+"-1", "exit 0"), nil)
	get(script(bin, vsockProgram, "exit 0"), nil)
	script(bin, vsockProgram, "echo no such library >&2; exit 127")
	if _, err := VhostDeviceVsock(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "no such library") {
		t.Errorf("VhostDeviceVsock with a program that does not run = %v, want what it said", err)
	}
}

func TestUntar(t *testing.T) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range []tar.Header{
		{Name: "./usr/bin/", Typeflag: tar.TypeDir},
		{Name: "./usr/bin/link", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"},
		{Name: "./usr/bin/tool", Typeflag: tar.TypeReg, Size: 4},
	} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := io.WriteString(w, "tool"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	for _, name := range []string{"usr/bin/link", "usr/bin", "usr/bin/none"} {
		if err := untar(bytes.NewReader(buf.Bytes()), name, out); !errors.Is(err, io.EOF) {
			t.Errorf("untar of %s = %v, want %v", name, err, io.EOF)
		}
	}
	if err := untar(bytes.NewReader(buf.Bytes()), "usr/bin/tool", out); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(out)
	if err != nil || string(got) != "tool" {
		t.Errorf("untar wrote %q, %v, want %q", got, err, "tool")
	}
	if info, err := os.Stat(out); err != nil || info.Mode() != 0o700 {
		t.Errorf("Stat = %v, %v, want 0700", info, err)
	}
}

// socketPath returns a path that is short enough for a socket.
func socketPath(t *testing.T) string {
	t.Helper()

	//nolint:usetesting // t.TempDir is too long
	dir, err := os.MkdirTemp("", "guestagent-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

func TestDialVsock(t *testing.T) {
	for _, tt := range []struct {
		name, answer string
		hang         bool
		want         error
		text         string
	}{
		{name: "good", answer: "OK 1022\nmore"},
		{name: "largest", answer: "OK 4294967295\nmore"},
		{name: "nobody listens", want: io.EOF},
		{name: "half a line", answer: "OK 10", want: io.EOF},
		{name: "no number", answer: "OK \nmore", text: "not OK"},
		{name: "no OK", answer: "1022\nmore", text: "not OK"},
		{name: "endless", answer: strings.Repeat("x", 1000), text: "too long"},
		{name: "silent", answer: "OK 1", hang: true, want: context.DeadlineExceeded},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := socketPath(t)
			l, err := ListenVsock(t.Context(), path, 1)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			asked := make(chan string, 1)
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				conn, err := l.Accept()
				if err != nil {
					asked <- err.Error()
					return
				}
				defer func() { _ = conn.Close() }()
				buf := make([]byte, 100)
				n, _ := conn.Read(buf)
				asked <- string(buf[:n])
				_, _ = io.WriteString(conn, tt.answer)
				if tt.hang {
					_, _ = conn.Read(buf) // until the other side gives up
				}
			}()
			timeout := time.Minute
			if tt.hang {
				timeout = 50 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			conn, err := DialVsock(ctx, path+"_1", 1022)
			if got := <-asked; got != "CONNECT 1022\n" {
				t.Errorf("asked is %q", got)
			}
			if ok := tt.want == nil && tt.text == ""; ok {
				if err != nil {
					t.Fatal(err)
				}
				cancel() // has no effect any more
				if got, err := io.ReadAll(conn); err != nil || string(got) != "more" {
					t.Errorf("reading = %q, %v, want %q", got, err, "more")
				}
				_ = conn.Close()
			} else if conn != nil || err == nil || !strings.Contains(err.Error(), tt.text) || (tt.want != nil && !errors.Is(err, tt.want)) {
				t.Errorf("DialVsock = %v, %v, want %v, %q", conn, err, tt.want, tt.text)
			}
			<-ended
		})
	}
	if _, err := DialVsock(t.Context(), socketPath(t), 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("DialVsock without a socket = %v, want %v", err, fs.ErrNotExist)
	}
}

func TestListening(t *testing.T) {
	path := socketPath(t)
	if listening(path) {
		t.Errorf("listening(%q) before there is a socket = true", path)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if !listening(path) || listening(path[1:]) {
		t.Errorf("listening(%q) = %t, of a part of it %t, want true, false", path, listening(path), listening(path[1:]))
	}
}

func TestVsockPaths(t *testing.T) {
	m := &Machine{dir: t.TempDir(), artifacts: t.TempDir()}
	taken := socketPath(t)
	if err := os.WriteFile(taken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		strings.Repeat("/x", maxVsockPath): "too long",
		taken:                              "already",
	} {
		err := m.prepareVsock(t.Context(), VsockConfig{Path: path, Program: "true"})
		if err == nil || !strings.Contains(err.Error(), want) || m.VsockPath() != "" {
			t.Errorf("prepareVsock with path %q = %v, want %q", path, err, want)
		}
	}
}

// TestVsockStart has programs that do not do what is awaited.
func TestVsockStart(t *testing.T) {
	for _, tt := range []struct {
		program, text string
	}{
		{"false", "it ended (exit status 1)"},
		{"/no/such/program", "no such file"},
	} {
		v := &vsock{cfg: VsockConfig{Program: tt.program, Path: socketPath(t)}, control: socketPath(t), log: io.Discard}
		if err := v.start(t.Context()); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("start of %s = %v, want %q", tt.program, err, tt.text)
		}
		v.stop()
	}
	var none *vsock
	none.stop()
}
