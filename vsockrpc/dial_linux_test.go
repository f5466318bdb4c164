package vsockrpc

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// dialMuxTest connects, and retries where that is of use.
func dialMuxTest(t *testing.T, path string) error {
	t.Helper()
	conn, err := Dialer{RetryFor: time.Hour}.DialConn(t.Context(), Target{Scheme: SchemeMux, Path: path, Port: 1})
	if err == nil {
		must(t, conn.Close())
	}
	return err
}

// A VMM's user cannot lead a caller to another VM: what they put in the place
// of their socket is not connected to.
func TestMuxHostile(t *testing.T) {
	var calls atomic.Int32
	other := vmm(t, func(c net.Conn, _ string) { calls.Add(1); _, _ = io.WriteString(c, "OK 1\n") })
	root := t.TempDir()
	folder := func(name string) string {
		path := filepath.Join(root, name)
		must(t, os.Mkdir(path, 0o700))
		return path
	}
	link := filepath.Join(folder("link"), "v.sock")
	must(t, os.Symlink(other, link))
	dangling := filepath.Join(folder("dangling"), "v.sock")
	must(t, os.Symlink("none", dangling))
	file := filepath.Join(folder("file"), "v.sock")
	must(t, os.WriteFile(file, nil, 0o600))
	dir := filepath.Join(folder("dir"), "v.sock")
	must(t, os.Mkdir(dir, 0o700))
	linked := filepath.Join(root, "linked")
	must(t, os.Symlink(filepath.Dir(other), linked))
	tests := map[string]string{
		link: "a symbolic link", dangling: "a symbolic link", file: "no socket", dir: "no socket",
		filepath.Join(linked, "v.sock"): "name the folder itself", linked + "//v.sock": "name the folder itself", linked + "/./v.sock": "name the folder itself",
		filepath.Join(other, "v.sock"): "no folder",
	}
	check := func() {
		t.Helper()
		for path, want := range tests {
			err := dialMuxTest(t, path)
			if e, ok := errors.AsType[*ConnectError](err); !ok || e.Step != StepSocket || !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), want) {
				t.Errorf("Dial(%q) = %v, want an error at step %s with %q", path, err, StepSocket, want)
			}
		}
		if n := calls.Load(); n != 0 {
			t.Errorf("another VM was called %d times", n)
		}
	}
	check()

	hard := filepath.Join(folder("hard"), "v.sock")
	must(t, os.Link(other, hard))
	tests = map[string]string{hard: "a hard link", other: "a hard link"}
	check()
	must(t, os.Remove(hard))

	if os.Geteuid() == 0 {
		// In a folder that several can write to, or that is another's.
		const a, b = 64001, 64002
		must(t, os.Chown(filepath.Dir(other), a, a))
		must(t, os.Chown(other, b, b))
		tests = map[string]string{other: "the socket is user 64002's, and its folder user 64001's"}
		check()
		must(t, os.Chown(filepath.Dir(other), 0, a))
		must(t, os.Chmod(filepath.Dir(other), 0o770))
		tests[other] = "its folder user 0's, with mode 0770"
		check()
		must(t, os.Chmod(filepath.Dir(other), 0o777|fs.ModeSticky))
		tests[other] = "its folder user 0's, with mode 1777"
		check()
	}
	must(t, os.Chmod(filepath.Dir(other), 0o700))
	if err := dialMuxTest(t, other); err != nil || calls.Load() != 1 {
		t.Errorf("Dial(%q) = %v, %d calls, want the VM itself called", other, err, calls.Load())
	}
}

// What honest set-ups have.
func TestMuxPaths(t *testing.T) {
	socket := vmm(t, func(c net.Conn, _ string) { _, _ = io.WriteString(c, "OK 1\n") })
	folder, root := filepath.Dir(socket), t.TempDir()
	must(t, os.Symlink(filepath.Dir(folder), filepath.Join(root, "parent")))
	must(t, os.Symlink(folder, filepath.Join(root, "folder")))
	must(t, os.Mkdir(filepath.Join(folder, "x"), 0o700))
	long := folder
	for range 10 {
		long = filepath.Join(long, strings.Repeat("x", 100))
	}
	must(t, os.MkdirAll(long, 0o700))
	must(t, os.Rename(socket, filepath.Join(long, "v.sock")))
	if err := dialMuxTest(t, filepath.Join(long, "v.sock")); err != nil {
		t.Errorf("Dial of a path of %d bytes = %v", len(long), err)
	}
	must(t, os.Rename(filepath.Join(long, "v.sock"), socket))
	t.Chdir(folder)
	for _, path := range []string{
		socket, "v.sock", "./v.sock", ".//v.sock", "x/../v.sock", "../" + filepath.Base(folder) + "/v.sock",
		filepath.Join(root, "parent", filepath.Base(folder), "v.sock"),
		filepath.Join(root, "folder") + "/x/../v.sock",
		folder + "//./v.sock",
	} {
		if err := dialMuxTest(t, path); err != nil {
			t.Errorf("Dial(%q) = %v", path, err)
		}
	}
	if os.Geteuid() != 0 {
		return
	}
	const user = 64001
	for _, owners := range [][2]int{{user, user}, {user, 0}, {0, user}} {
		must(t, os.Chown(folder, owners[0], owners[0]))
		must(t, os.Chown(socket, owners[1], owners[1]))
		if err := dialMuxTest(t, socket); err != nil {
			t.Errorf("Dial of user %d's socket in user %d's folder = %v", owners[1], owners[0], err)
		}
	}
}

func TestSplitMux(t *testing.T) {
	for path, want := range map[string][2]string{
		"v": {".", "v"}, "/v": {"/", "v"}, "//v": {"/", "v"}, "/./v": {"/", "v"}, "./v": {".", "v"}, "a/v": {"a", "v"}, "/a/b//././/v": {"/a/b", "v"},
		"a/../v": {"a/..", "v"}, "/a/": {"/a", ""}, "/a./v": {"/a.", "v"}, "..": {".", ".."}, ".../v": {"...", "v"},
	} {
		if dir, name := splitMux(path); dir != want[0] || name != want[1] {
			t.Errorf("splitMux(%q) = %q, %q, want %q", path, dir, name, want)
		}
	}
}
