package host

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// None of these tests runs in parallel with another: some change the umask,
// which is the process's, and they count its descriptors.

const (
	vmUser  = 54321 // the VMM's, in tests
	vmGroup = 54322
)

// folderOf makes a folder of that user that everybody can get to.
func folderOf(t *testing.T, uid, gid int) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, uid, gid)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("gives files to other users: run the tests as root to have this case")
	}
}

// A logBuffer collects what is logged.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// count is how many lines have that in them.
func (l *logBuffer) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for line := range strings.Lines(l.b.String()) {
		if strings.Contains(line, s) {
			n++
		}
	}
	return n
}

// mux makes a listener that looks when the test says so, after a first look.
func mux(t *testing.T, cfg MuxConfig) (*MuxListener, *logBuffer) {
	t.Helper()
	var log logBuffer
	cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	m := newMux(cfg)
	m.look()
	t.Cleanup(func() { _ = m.Close() })
	return m, &log
}

func isReady(m *MuxListener) bool {
	m.looking.Lock()
	defer m.looking.Unlock()
	return m.cur != nil
}

// checkProblem checks that the listener has that problem, or none.
func checkProblem(t *testing.T, m *MuxListener, want string) {
	t.Helper()
	if got := m.Problem(); (got == "") != (want == "") || !strings.Contains(got, want) {
		t.Errorf("Problem = %q, want %q in it", got, want)
	}
}

// checkFile checks what the name itself is.
func checkFile(t *testing.T, path string, uid, gid int, mode uint32) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Errorf("looking at %s: %v", path, err)
		return
	}
	if int(st.Uid) != uid || int(st.Gid) != gid || st.Mode != mode {
		t.Errorf("%s has owner %d:%d and mode %#o, want %d:%d, %#o", path, st.Uid, st.Gid, st.Mode, uid, gid, mode)
	}
}

func checkMissing(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("looking at %s: %v, want %v", path, err, fs.ErrNotExist)
	}
}

// dialSocket connects to a socket, however long its path is.
func dialSocket(path string) (net.Conn, error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return net.Dial("unix", filepath.Join(procPath(int(dir.Fd())), filepath.Base(path)))
}

// checkReached checks that who connects there comes out of l.
func checkReached(t *testing.T, l net.Listener, path string) {
	t.Helper()
	c, err := dialSocket(path)
	if err != nil {
		t.Fatalf("connecting to %s: %v", path, err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatalf("Accept = %v", err)
	}
	defer s.Close()
	if _, ok := s.(*net.UnixConn); !ok {
		t.Errorf("Accept = %T, want *net.UnixConn, which says who connected", s)
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	b := make([]byte, 1)
	if _, err := io.ReadFull(s, b); err != nil || b[0] != 'x' {
		t.Errorf("read %q, %v, want x", b, err)
	}
}

// foreignSocket makes a socket of somebody else, who listens unless stale.
func foreignSocket(t *testing.T, path string, stale bool) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	t.Cleanup(func() { _ = l.Close() })
	if stale {
		_ = l.Close()
	}
	return l
}

func descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

func TestMuxListener(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "vm")
	uds := filepath.Join(dir, "vm.sock")
	socket := uds + "_1021"
	mkdir := func() {
		t.Helper()
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m, log := mux(t, MuxConfig{Path: uds, Port: 1021})
	m.look()
	checkProblem(t, m, "it is waited for")
	if isReady(m) || log.count("waited for") != 1 || log.count("level=WARN") != 0 {
		t.Errorf("without a folder: ready %v, log %q, want one line that is no warning", isReady(m), log.b.String())
	}

	mkdir()
	m.look()
	checkProblem(t, m, "")
	if !isReady(m) || m.Addr().String() != socket {
		t.Errorf("with a folder: ready %v, Addr = %s, want %s", isReady(m), m.Addr(), socket)
	}
	checkFile(t, socket, os.Geteuid(), os.Getegid(), unix.S_IFSOCK|0o600)
	checkReached(t, m, socket)
	before, err := os.Lstat(socket)
	if err != nil {
		t.Fatal(err)
	}
	m.look()
	if after, err := os.Lstat(socket); err != nil || !os.SameFile(before, after) {
		t.Error("a look replaced the socket that was there")
	}

	t.Log("the runner removes it")
	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	m.look()
	checkProblem(t, m, "")
	checkReached(t, m, socket)

	t.Log("the runner removes its folder, and makes it anew")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	m.look()
	checkProblem(t, m, "it is waited for")
	mkdir()
	m.look()
	checkReached(t, m, socket)

	t.Log("the folder is another, with a stale socket in it")
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
	mkdir()
	foreignSocket(t, socket, true)
	m.look()
	checkReached(t, m, socket)

	t.Log("somebody else takes the name")
	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	other := foreignSocket(t, socket, false)
	warned := log.count("level=WARN")
	m.look()
	checkProblem(t, m, "another program listens there")
	asked := m.asked
	m.look()
	if m.asked != asked {
		t.Error("a look asked the other again at once")
	}
	m.asked = asked.Add(-muxLive)
	m.look()
	if m.asked.Equal(asked.Add(-muxLive)) || log.count("level=WARN") != warned+1 {
		t.Errorf("a look later did not ask the other, or warned again: %q", log.b.String())
	}
	checkProblem(t, m, "another program listens there")
	_ = other.Close()
	m.asked = asked.Add(-muxLive)
	m.look()
	checkProblem(t, m, "")
	checkReached(t, m, socket)

	t.Log("Close")
	if err := errors.Join(m.Close(), m.Close()); err != nil {
		t.Errorf("Close = %v", err)
	}
	m.look()
	checkMissing(t, socket)
	if c, err := m.Accept(); c != nil || !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept = %v, %v, want %v", c, err, net.ErrClosed)
	}
}

// Accept that waits gets the connections of a later socket, and Close's error.
func TestMuxAccept(t *testing.T) {
	uds := filepath.Join(t.TempDir(), "vm.sock")
	m, _ := mux(t, MuxConfig{Path: uds, Port: 1})
	accepted := make(chan error)
	go func() {
		for {
			c, err := m.Accept()
			accepted <- err
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	for range 3 {
		c, err := dialSocket(uds + "_1")
		if err != nil {
			t.Fatal(err)
		}
		if err := <-accepted; err != nil {
			t.Errorf("Accept = %v", err)
		}
		_ = c.Close()
		if err := os.Remove(uds + "_1"); err != nil {
			t.Fatal(err)
		}
		m.look()
	}
	_ = m.Close()
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept = %v, want %v", err, net.ErrClosed)
	}
}

// Nothing but a socket is removed, followed or changed.
func TestMuxLeavesAlone(t *testing.T) {
	for name, c := range map[string]struct {
		make func(t *testing.T, name, victim string) error
		want string
	}{
		"symlink":  {func(t *testing.T, name, victim string) error { return os.Symlink(victim, name) }, "a symbolic link is there"},
		"dangling": {func(t *testing.T, name, victim string) error { return os.Symlink(victim+".missing", name) }, "a symbolic link is there"},
		"stale link": {func(t *testing.T, name, victim string) error {
			foreignSocket(t, victim+".sock", true)
			return os.Symlink(victim+".sock", name)
		}, "a symbolic link is there"},
		"hard link": {func(t *testing.T, name, victim string) error { return os.Link(victim, name) }, "a file is there"},
		"folder":    {func(t *testing.T, name, victim string) error { return os.Mkdir(name, 0o750) }, "a folder is there"},
		"pipe":      {func(t *testing.T, name, victim string) error { return unix.Mkfifo(name, 0o600) }, "no socket is there"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			victim, uds := filepath.Join(t.TempDir(), "victim"), filepath.Join(dir, "vm.sock")
			if err := os.WriteFile(victim, nil, 0o640); err != nil {
				t.Fatal(err)
			}
			if err := c.make(t, uds+"_1021", victim); err != nil {
				t.Fatal(err)
			}
			before, err := os.Lstat(uds + "_1021")
			if err != nil {
				t.Fatal(err)
			}
			m, log := mux(t, MuxConfig{Path: uds, Port: 1021})
			m.look()
			m.look()
			checkProblem(t, m, c.want)
			checkProblem(t, m, "remove it")
			if n := log.count(c.want); n != 1 || log.count("level=WARN") != 1 || isReady(m) {
				t.Errorf("it was reported %d times, ready %v, want once, and not ready", n, isReady(m))
			}
			after, err := os.Lstat(uds + "_1021")
			if err != nil || !os.SameFile(before, after) || before.Mode() != after.Mode() {
				t.Errorf("it was %v, and is %v, %v", before, after, err)
			}
			checkFile(t, victim, os.Geteuid(), os.Getegid(), unix.S_IFREG|0o640)
			checkMissing(t, victim+".missing")

			if err := os.Remove(uds + "_1021"); err != nil {
				t.Fatal(err)
			}
			m.look()
			checkProblem(t, m, "")
			checkReached(t, m, uds+"_1021")

			// Close leaves alone what was put there meanwhile.
			if err := os.Remove(uds + "_1021"); err != nil {
				t.Fatal(err)
			}
			_ = os.Remove(victim + ".sock")
			if err := c.make(t, uds+"_1021", victim); err != nil {
				t.Fatal(err)
			}
			_ = m.Close()
			if _, err := os.Lstat(uds + "_1021"); err != nil {
				t.Errorf("Close removed it: %v", err)
			}
		})
	}
}

// The folder itself may not be a link, those above may.
func TestMuxFolder(t *testing.T) {
	root := t.TempDir()
	folder := filepath.Join(root, "real", "vm")
	if err := errors.Join(os.MkdirAll(folder, 0o755), os.Symlink("real", filepath.Join(root, "link")), os.Symlink("vm", filepath.Join(root, "real", "vmlink")),
		os.WriteFile(filepath.Join(root, "file"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{"link/vm": "", "link/vmlink": "symbolic link", "real/vmlink/.": "symbolic link", "file": "no folder"} {
		m, _ := mux(t, MuxConfig{Path: root + "/" + dir + "/vm.sock", Port: 1})
		checkProblem(t, m, want)
		_ = m.Close()
	}

	m, _ := mux(t, MuxConfig{Path: filepath.Join(folder, "vm.sock"), Port: 1})
	if err := errors.Join(os.Rename(folder, folder+".old"), os.Symlink("vm.old", folder)); err != nil {
		t.Fatal(err)
	}
	m.look()
	checkProblem(t, m, "symbolic link")
	if c, err := dialSocket(filepath.Join(folder, "vm.sock_1")); err == nil {
		_ = c.Close()
		t.Error("it still listens in a folder that a link leads to")
	}
}

func TestMuxOwner(t *testing.T) {
	needRoot(t)
	dir := folderOf(t, vmUser, vmGroup)
	uds := filepath.Join(dir, "vm.sock")
	const mode = unix.S_IFSOCK | 0o600

	// A socket of an earlier run was the VMM's user's.
	foreignSocket(t, uds+"_1021", true)
	if err := os.Chown(uds+"_1021", vmUser, vmGroup); err != nil {
		t.Fatal(err)
	}
	m, log := mux(t, MuxConfig{Path: uds, Port: 1021})
	checkProblem(t, m, "")
	checkFile(t, uds+"_1021", vmUser, vmGroup, mode)
	if n := log.count("uid=54321 gid=54322"); n != 1 {
		t.Errorf("the log has the owner %d times, want once", n)
	}
	checkReached(t, m, uds+"_1021")

	// A folder is made first, and given away then.
	if err := os.Chown(dir, vmUser+2, vmGroup+2); err != nil {
		t.Fatal(err)
	}
	m.look()
	checkFile(t, uds+"_1021", vmUser+2, vmGroup+2, mode)
	checkReached(t, m, uds+"_1021")

	// What the VMM's user does with what is theirs is theirs to do.
	if err := os.Chown(uds+"_1021", vmUser+2, vmGroup+3); err != nil {
		t.Fatal(err)
	}
	m.look()
	checkFile(t, uds+"_1021", vmUser+2, vmGroup+3, mode)

	uid, gid := vmUser+4, vmGroup+4
	given, _ := mux(t, MuxConfig{Path: uds, Port: 1, UID: &uid})
	checkFile(t, uds+"_1", uid, vmGroup+2, mode)
	_ = given.Close()
	checkMissing(t, uds+"_1")
	_, _ = mux(t, MuxConfig{Path: uds, Port: 1, UID: &uid, GID: &gid})
	checkFile(t, uds+"_1", uid, gid, mode)
}

// Who comes second is told, and takes nothing from the first one.
func TestMuxTaken(t *testing.T) {
	uds := filepath.Join(t.TempDir(), "vm.sock")
	first, _ := mux(t, MuxConfig{Path: uds, Port: 1021})
	if err := first.Taken(); err != nil {
		t.Errorf("Taken = %v, want nil", err)
	}
	second, _ := mux(t, MuxConfig{Path: uds, Port: 1021})
	if err := second.Taken(); !errors.Is(err, ErrProviderRuns) || !strings.Contains(err.Error(), uds) {
		t.Errorf("Taken = %v, want %v with the path", err, ErrProviderRuns)
	}
	first.look()
	checkProblem(t, first, "")
	_ = first.Close()
	second.asked = second.asked.Add(-muxLive)
	second.look()
	if err := second.Taken(); err != nil {
		t.Errorf("Taken after the first one's end = %v, want nil", err)
	}
	checkReached(t, second, uds+"_1021")
}

func TestMuxLongPaths(t *testing.T) {
	dir := t.TempDir()
	for range 3 {
		dir = filepath.Join(dir, strings.Repeat("d", 100))
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	uds := filepath.Join(dir, "vm.sock")
	m, _ := mux(t, MuxConfig{Path: uds, Port: 4294967294})
	checkProblem(t, m, "")
	checkReached(t, m, uds+"_4294967294")

	m, _ = mux(t, MuxConfig{Path: filepath.Join(dir, strings.Repeat("n", 100)), Port: 1})
	checkProblem(t, m, "give the socket a shorter one")
}

// The mode does not depend on the umask; where it cannot be right, nothing is left.
func TestMuxUmask(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	uds := filepath.Join(t.TempDir(), "vm.sock")
	m, _ := mux(t, MuxConfig{Path: uds, Port: 1})
	checkFile(t, uds+"_1", os.Geteuid(), os.Getegid(), unix.S_IFSOCK|0o600)
	_ = m.Close()

	unix.Umask(0o077)
	m, _ = mux(t, MuxConfig{Path: uds, Port: 1})
	checkFile(t, uds+"_1", os.Geteuid(), os.Getegid(), unix.S_IFSOCK|0o600)
	_ = m.Close()

	unix.Umask(0o200)
	m, _ = mux(t, MuxConfig{Path: uds, Port: 1})
	checkProblem(t, m, "set a umask")
	checkMissing(t, uds+"_1")
}

// Who connects before the listener's own probe is not lost, and a socket that
// the probe does not reach is not taken for the listener's.
func TestReach(t *testing.T) {
	dir := t.TempDir()
	f, err := openFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.close()
	listening := func(name string) (fd, pin int) {
		t.Helper()
		fd, err := streamSocket()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Join(dir, name)}), unix.Listen(fd, 8)); err != nil {
			t.Fatal(err)
		}
		pin, _, err = f.pin(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(pin) })
		return fd, pin
	}
	a, pinA := listening("a")
	_, pinB := listening("b")
	c, err := dialSocket(filepath.Join(dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	early, err := reach(a, pinA)
	if err != nil || len(early) != 1 {
		t.Fatalf("reach = %v, %v, want one connection", early, err)
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	b := make([]byte, 1)
	if _, err := early[0].Read(b); err != nil || b[0] != 'x' {
		t.Errorf("read %q, %v, want x", b, err)
	}
	s := &boundSocket{early: slices.Clone(early)}
	if got, err := s.accept(); got != early[0] || err != nil || len(s.early) != 0 {
		t.Errorf("accept = %v, %v, want the early one", got, err)
	}
	_ = early[0].Close()

	if early, err := reach(a, pinB); !errors.Is(err, errSwapped) || early != nil {
		t.Errorf("reach another = %v, %v, want %v", early, err, errSwapped)
	}
	foreignSocket(t, filepath.Join(dir, "stale"), true)
	pin, _, err := f.pin("stale")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(pin) }()
	if early, err := reach(a, pin); !errors.Is(err, errSwapped) || early != nil {
		t.Errorf("reach a stale one = %v, %v, want %v", early, err, errSwapped)
	}
}

// Close comes while the socket is taken away and bound anew, and leaves
// nothing behind.
func TestMuxClose(t *testing.T) {
	dir := t.TempDir()
	uds := filepath.Join(dir, "vm.sock")
	foreignSocket(t, uds, false) // has the poller take its descriptors
	before := descriptors(t)
	for range 20 {
		m := ListenMux(MuxConfig{Path: uds, Port: 1021, every: time.Millisecond})
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := m.Accept()
				if err != nil {
					return
				}
				_ = c.Close()
			}
		})
		again := make(chan struct{})
		wg.Go(func() {
			defer close(again)
			_ = os.Remove(uds + "_1021")
			for { // until the listener has noticed by itself
				if c, err := dialSocket(uds + "_1021"); err == nil {
					_ = c.Close()
					return
				}
				runtime.Gosched()
			}
		})
		<-again
		for range 5 {
			wg.Go(func() {
				for range 20 {
					_ = os.Remove(uds + "_1021")
					if c, err := dialSocket(uds + "_1021"); err == nil {
						_ = c.Close()
					}
				}
			})
		}
		if err := m.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
		wg.Wait()
		checkMissing(t, uds+"_1021")
	}

	// Nor does what fails.
	if err := os.Mkdir(uds+"_2", 0o700); err != nil {
		t.Fatal(err)
	}
	foreignSocket(t, uds+"_3", true)
	live := descriptors(t)
	for _, cfg := range []MuxConfig{{Path: uds, Port: 2}, {Path: uds, Port: 3}, {Path: filepath.Join(dir, "missing", "a"), Port: 1}, {Path: filepath.Join(uds, "a"), Port: 1}} {
		m, _ := mux(t, cfg)
		m.look()
		_ = m.Close()
	}
	if after := descriptors(t); after != live || live != before {
		t.Errorf("%d descriptors are open, then %d, and were %d", live, after, before)
	}
}

const swapEnv = "GUESTAGENT_TEST_SWAP"

// TestSwapHelper is another user's process, see TestMuxSwap: it plays with the
// name in the folder where it runs until its standard input ends.
func TestSwapHelper(t *testing.T) {
	victim := os.Getenv(swapEnv)
	if victim == "" {
		t.Skip("is a part of TestMuxSwap: run that one")
	}
	const name, away, decoy = "vm.sock_1021", "away", "decoy.sock"
	if err := os.Link(victim, away); err != nil {
		t.Fatalf("the test's own trick does not work: %v", err)
	}
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	if _, err := os.Stdout.WriteString("swapping\n"); err != nil {
		t.Fatal(err)
	}
	for {
		select {
		case <-ended:
			return
		default:
		}
		_ = os.Rename(name, away)
		_ = os.Symlink(victim, name)
		_ = os.Remove(name)
		_ = os.Link(victim, away+"2")
		_ = os.Rename(away+"2", name) // at once, in the place of what is there
		_ = os.Remove(name)
		for range 20 {
			_ = os.Rename(name, away)
			_ = os.Rename(decoy, name)
			_ = os.Rename(name, decoy)
		}
		_ = os.Remove(away)
	}
}

// Another user swaps the name for links to a file of root's, and for another
// socket of root's, while it is bound: neither changes.
func TestMuxSwap(t *testing.T) {
	needRoot(t)
	dir := folderOf(t, vmUser, vmGroup)
	victim := filepath.Join(folderOf(t, 0, 0), "victim")
	if err := os.WriteFile(victim, []byte("root's"), 0o600); err != nil {
		t.Fatal(err)
	}
	// fs.protected_hardlinks lets others link only what they can write to.
	if err := os.Chmod(victim, 0o666); err != nil {
		t.Fatal(err)
	}
	foreignSocket(t, filepath.Join(dir, "decoy.sock"), false)
	if err := os.Chmod(filepath.Join(dir, "decoy.sock"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := openFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.close()
	decoy, before, err := f.pin("decoy.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(decoy) }()

	cmd := exec.Command("/proc/self/exe", "-test.run=^TestSwapHelper$") // its path is for this user alone
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), swapEnv+"="+victim)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: vmUser, Gid: vmGroup}}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		_ = stdin.Close()
		_, _ = io.Copy(io.Discard, stdout)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the other user's process: %v\n%s", err, stderr.String())
		}
	})
	defer stop()
	line := make([]byte, len("swapping\n"))
	if _, err := io.ReadFull(stdout, line); err != nil || string(line) != "swapping\n" {
		rest, _ := io.ReadAll(stdout)
		t.Fatalf("the other user's process says %q%s, %v\n%s", line, rest, err, stderr.String())
	}

	uds := filepath.Join(dir, "vm.sock")
	m, _ := mux(t, MuxConfig{Path: uds, Port: 1021})
	outcomes := map[string]int{}
	for range 5000 {
		m.asked = m.asked.Add(-muxLive)
		m.look()
		_, outcome, _ := strings.Cut(m.Problem(), "_1021\": ")
		outcomes[outcome]++
		checkFile(t, victim, 0, 0, unix.S_IFREG|0o666)
		var st unix.Stat_t
		if err := unix.Fstat(decoy, &st); err != nil || st.Uid != before.Uid || st.Gid != before.Gid || st.Mode != before.Mode {
			t.Errorf("root's other socket has owner %d:%d and mode %#o, %v", st.Uid, st.Gid, st.Mode, err)
		}
		if t.Failed() {
			break
		}
	}
	t.Log(outcomes)
	stop()
	_ = os.Remove(uds + "_1021")
	m.asked = m.asked.Add(-muxLive)
	m.look()
	checkProblem(t, m, "")
	checkFile(t, uds+"_1021", vmUser, vmGroup, unix.S_IFSOCK|0o600)
	checkReached(t, m, uds+"_1021")
	if b, err := os.ReadFile(victim); err != nil || string(b) != "root's" {
		t.Errorf("root's file has %q, %v", b, err)
	}
}

func TestListenLocal(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	root := t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(root, "a", "b", "web.sock")
	warm, err := ListenLocal(filepath.Join(root, "warm.sock"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer warm.Close()
	before := descriptors(t)

	l, err := ListenLocal(path, "")
	if err != nil {
		t.Fatal(err)
	}
	checkFile(t, filepath.Join(root, "a"), os.Geteuid(), os.Getegid(), unix.S_IFDIR|0o755)
	checkFile(t, filepath.Join(root, "a", "b"), os.Geteuid(), os.Getegid(), unix.S_IFDIR|0o755)
	checkFile(t, path, os.Geteuid(), os.Getegid(), unix.S_IFSOCK|0o600)
	checkFile(t, path+".lock", os.Geteuid(), os.Getegid(), unix.S_IFREG|0o600)
	if l.Addr().String() != path {
		t.Errorf("Addr = %s, want %s", l.Addr(), path)
	}
	checkReached(t, l, path)
	if second, err := ListenLocal(path, ""); second != nil || !errors.Is(err, ErrProviderRuns) {
		t.Errorf("a second ListenLocal = %v, %v, want %v", second, err, ErrProviderRuns)
	}
	// The lock holds though somebody removes the socket.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if second, err := ListenLocal(path, ""); second != nil || !errors.Is(err, ErrProviderRuns) {
		t.Errorf("ListenLocal without the socket = %v, %v, want %v", second, err, ErrProviderRuns)
	}
	// What was put there meanwhile is not removed.
	foreignSocket(t, path, true)
	if err := l.Close(); err != nil {
		t.Errorf("Close = %v", err)
	}
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a second Close = %v, want %v", err, net.ErrClosed)
	}
	if c, err := l.Accept(); c != nil || !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept = %v, %v, want %v", c, err, net.ErrClosed)
	}

	// That one is stale.
	if l, err = ListenLocal(path, ""); err != nil {
		t.Fatal(err)
	}
	checkReached(t, l, path)
	_ = l.Close()
	checkMissing(t, path)

	if os.Geteuid() == 0 {
		if l, err = ListenLocal(path, "54322"); err != nil {
			t.Fatal(err)
		}
		checkFile(t, path, 0, vmGroup, unix.S_IFSOCK|0o660)
		checkReached(t, l, path)
		_ = l.Close()
	}

	live := foreignSocket(t, path, false)
	if l, err := ListenLocal(path, ""); l != nil || !errors.Is(err, ErrProviderRuns) {
		t.Errorf("ListenLocal where somebody listens = %v, %v, want %v", l, err, ErrProviderRuns)
	}
	_ = live.Close()
	_ = os.Remove(path)
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Symlink("web.sock", filepath.Join(root, "a", "b", "link.sock")),
		os.Symlink("a", filepath.Join(root, "folderlink")), os.Mkdir(filepath.Join(root, "open"), 0o700), os.Chmod(filepath.Join(root, "open"), 0o777)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"a/b/web.sock": "a file is there", "a/b/link.sock": "a symbolic link is there", "folderlink/c.sock": "real path",
		"open/a.sock": "others could take the socket's place", "a/b/web.sock/c.sock": "no folder", "a/" + strings.Repeat("n", 120): "a shorter one",
	} {
		if l, err := ListenLocal(filepath.Join(root, name), ""); l != nil || err == nil || errors.Is(err, ErrProviderRuns) || !strings.Contains(err.Error(), want) {
			t.Errorf("ListenLocal(%q) = %v, %v, want an error with %q", name, l, err, want)
		}
	}
	if l, err := ListenLocal(filepath.Join(root, "x", "y"), "nobody-has-this-name"); l != nil || err == nil {
		t.Errorf("ListenLocal for a group that is not there = %v, %v, want an error", l, err)
	}
	checkMissing(t, filepath.Join(root, "x"))
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors are open, and were %d", after, before)
	}
}
