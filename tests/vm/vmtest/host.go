package vmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/guestagent/guestagent/tests/vm"
)

const (
	// hostTimeout bounds each wait for a program on the host, which may itself wait for a guest that is emulated.
	hostTimeout = 3 * time.Minute
	// stopTimeout bounds the wait for a program's end after SIGTERM.
	stopTimeout = 30 * time.Second
	// pipeDelay is how long a child of a program may keep its output open.
	pipeDelay = 2 * time.Second
	// maxNotification bounds one message of sd_notify.
	maxNotification = 64 << 10
	// saidBytes of standard error are in the message of a test that fails.
	saidBytes = 2048
)

// HostConfig says what to run on the host. The zero value is guestctl without arguments.
type HostConfig struct {
	// Args are the arguments.
	Args []string
	// Program is what to run; empty is [Guestctl].
	Program string
	// Env is added to this process's environment and NOTIFY_SOCKET, and wins over both.
	Env []string
	// Dir is the current folder; empty is that of the test.
	Dir string
	// Stdin is standard input; nil is an empty one.
	Stdin []byte
}

// Host is a program that runs on the host. Methods with a t are for the test's own goroutine; they fail the test where what
// they wait for does not come.
type Host struct {
	// PID is the program's.
	PID int
	// Stdout and Stderr are the files with what it wrote, and Notify that with what it said by sd_notify. They are among
	// the artifacts.
	Stdout, Stderr, Notify string

	cmd                *exec.Cmd
	done               <-chan struct{}
	out, said, notices *stream
	// heard is closed when all notifications of a program that has ended were read.
	heard chan struct{}
}

var guestctl = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "guestagent-host-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	out := filepath.Join(dir, "guestctl")
	if err := vm.BuildBinary(context.Background(), "github.com/guestagent/guestagent/cmd/guestctl", out); err != nil {
		return nil, err
	}
	return os.ReadFile(out)
})

// Guestctl returns guestctl as it is shipped, compiled once for all tests. The file is gone after this one.
func Guestctl(t testing.TB) string {
	t.Helper()
	b, err := guestctl()
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "guestctl")
	if err := os.WriteFile(name, b, 0o700); err != nil {
		t.Fatal(err)
	}
	return name
}

// StartHost starts a program on the host, which gets SIGTERM at the end of the test, and fails it if it does not end by
// that. Nothing of it outlives the test's process. Its output is kept in the artifacts.
func StartHost(t testing.TB, cfg HostConfig) *Host {
	t.Helper()
	if cfg.Program == "" {
		cfg.Program = Guestctl(t)
	}
	h := &Host{cmd: exec.Command(cfg.Program, cfg.Args...), heard: make(chan struct{})}
	dir, base := Artifacts(t), "host-"+filepath.Base(cfg.Program)
	for _, s := range []struct {
		stream **stream
		file   *string
		name   string
	}{{&h.out, &h.Stdout, "stdout"}, {&h.said, &h.Stderr, "stderr"}, {&h.notices, &h.Notify, "notify"}} {
		f, err := createNew(dir, base, s.name)
		if err != nil {
			t.Fatalf("making the artifacts of %s: %v", cfg.Program, err)
		}
		t.Cleanup(func() { _ = f.Close() })
		*s.stream, *s.file = &stream{file: f, changed: make(chan struct{})}, f.Name()
	}
	socket := h.listenNotify(t)
	h.cmd.Env = append(append(os.Environ(), "NOTIFY_SOCKET="+socket), cfg.Env...)
	h.cmd.Dir = cfg.Dir
	h.cmd.Stdin = bytes.NewReader(cfg.Stdin)
	h.cmd.Stdout, h.cmd.Stderr = h.out, h.said
	h.cmd.WaitDelay = pipeDelay
	var err error
	if h.done, err = vm.StartHost(h.cmd); err != nil {
		t.Fatal(err)
	}
	h.PID = h.cmd.Process.Pid
	t.Cleanup(func() { h.end(t) })
	go func() { // ends with the program; its end is what the reader of the socket waits for
		<-h.done
		endNotify(socket)
	}()
	return h
}

// createNew makes a file that no other program of the test has.
func createNew(dir, base, name string) (*os.File, error) {
	for n := 1; ; n++ {
		f, err := os.OpenFile(filepath.Join(dir, fmt.Sprintf("%s-%d.%s", base, n, name)), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if !errors.Is(err, fs.ErrExist) {
			return f, err
		}
	}
}

// listenNotify listens for sd_notify until the program's end and returns the socket.
func (h *Host) listenNotify(t testing.TB) string {
	t.Helper()

	//nolint:usetesting // the path has to be short
	dir, err := os.MkdirTemp("", "guestagent-host-")
	if err != nil {
		t.Fatalf("making a folder for sd_notify: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatalf("listening for sd_notify: %v", err)
	}
	go func() {
		defer close(h.heard)
		b := make([]byte, maxNotification)
		for {
			n, _, err := conn.ReadFromUnix(b)
			if n == 0 || err != nil {
				return // see endNotify
			}
			_, _ = h.notices.Write(append(bytes.TrimRight(b[:n], "\n"), '\n'))
		}
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-h.heard
	})
	return socket
}

// endNotify sends what no program sends, an empty message. It comes after all of those.
func endNotify(socket string) {
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return // the test is over
	}
	_, _ = conn.Write(nil)
	_ = conn.Close()
}

// end is what happens at the end of the test.
func (h *Host) end(t testing.TB) {
	t.Helper()
	_ = h.cmd.Process.Signal(syscall.SIGTERM)
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-h.done:
	case <-timer.C:
		t.Errorf("%s does not end by SIGTERM; it wrote:\n%s", h.name(), h.said.tail())
		_ = h.cmd.Process.Kill()
		<-h.done
	}
}

func (h *Host) name() string {
	return strings.Join(append([]string{filepath.Base(h.cmd.Path)}, h.cmd.Args[1:]...), " ")
}

// A Line is one line of standard output.
type Line struct {
	Text string    // without its end
	At   time.Time // when it came
}

// AwaitLine waits until ok takes a whole line that the program wrote to standard output since [Host.Mark], and returns it.
func (h *Host) AwaitLine(t testing.TB, what string, ok func(line string) bool) Line {
	t.Helper()
	var found Line
	h.until(t, what+" in the standard output", h.done, func() (string, bool, <-chan struct{}) {
		list, changed := h.out.markedLines()
		var text strings.Builder
		for _, l := range list {
			if ok(l.Text) {
				found = l
				return "", true, changed
			}
			text.WriteString(l.Text + "\n")
		}
		return text.String(), false, changed
	})
	return found
}

// AwaitStderr waits until a regular expression matches what the program wrote to standard error, since [Host.Mark], and
// returns the match and its groups. ^ and $ are the ends of a line.
func (h *Host) AwaitStderr(t testing.TB, pattern string) []string {
	t.Helper()
	return h.await(t, h.said, h.done, "standard error", pattern)
}

// AwaitNotify is AwaitStderr for what the program said by sd_notify: READY=1, or STATUS=.* for example.
func (h *Host) AwaitNotify(t testing.TB, pattern string) []string {
	t.Helper()
	return h.await(t, h.notices, h.heard, "notifications", pattern)
}

// Mark makes the methods that await something look only at what comes from now on.
func (h *Host) Mark() {
	h.out.mark()
	h.said.mark()
	h.notices.mark()
}

func (h *Host) await(t testing.TB, s *stream, end <-chan struct{}, what, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile("(?m)" + pattern)
	var match []string
	h.until(t, fmt.Sprintf("%q in the %s", pattern, what), end, func() (string, bool, <-chan struct{}) {
		text, changed := s.marked()
		match = re.FindStringSubmatch(text)
		return text, match != nil, changed
	})
	return match
}

// until waits until look finds what it looks for, which returns where it looked, and what is closed when there is more.
func (h *Host) until(t testing.TB, what string, end <-chan struct{}, look func() (text string, ok bool, changed <-chan struct{})) {
	t.Helper()
	timer := time.NewTimer(hostTimeout)
	defer timer.Stop()
	for ended := false; ; {
		text, ok, changed := look()
		if ok {
			return
		}
		why := "it has ended"
		if !ended {
			select {
			case <-changed:
				continue
			case <-end:
				ended = true // one more look
				continue
			case <-timer.C:
				why = "it took too long"
			}
		}
		t.Fatalf("waiting for %s of %s: %s; it has\n%s\nits standard error is\n%s", what, h.name(), why, tailOf(text), h.said.tail())
	}
}

// Signal sends a signal to the program.
func (h *Host) Signal(t testing.TB, sig os.Signal) {
	t.Helper()
	if err := h.cmd.Process.Signal(sig); err != nil {
		t.Fatalf("sending %v to %s: %v", sig, h.name(), err)
	}
}

// Wait waits for the program's end and returns its exit status, or 128 and the signal that ended it.
func (h *Host) Wait(t testing.TB) int {
	t.Helper()
	timer := time.NewTimer(hostTimeout)
	defer timer.Stop()
	select {
	case <-h.done:
	case <-timer.C:
		t.Fatalf("waiting for the end of %s: it took too long; it wrote\n%s", h.name(), h.said.tail())
	}
	if ws, ok := h.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return h.cmd.ProcessState.ExitCode()
}

// Stop sends SIGTERM and waits as Wait does.
func (h *Host) Stop(t testing.TB) int {
	t.Helper()
	h.Signal(t, syscall.SIGTERM)
	return h.Wait(t)
}

// Done is closed when the program has ended.
func (h *Host) Done() <-chan struct{} { return h.done }

// stream keeps what is written to it, also in a file.
type stream struct {
	mu   sync.Mutex
	file *os.File
	text []byte
	from int
	// lines are those of text that are whole, and begun is how much of it they are.
	lines    []Line
	begun    int
	fromLine int
	// changed is closed, and replaced, at each write.
	changed chan struct{}
}

func (s *stream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text = append(s.text, p...)
	now := time.Now()
	for {
		n := bytes.IndexByte(s.text[s.begun:], '\n')
		if n < 0 {
			break
		}
		s.lines = append(s.lines, Line{Text: string(s.text[s.begun : s.begun+n]), At: now})
		s.begun += n + 1
	}
	close(s.changed)
	s.changed = make(chan struct{})
	return s.file.Write(p)
}

func (s *stream) mark() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.from, s.fromLine = len(s.text), len(s.lines)
}

// marked returns what was written since the mark, and what is closed by the next write.
func (s *stream) marked() (string, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.text[s.from:]), s.changed
}

// markedLines is marked for whole lines.
func (s *stream) markedLines() ([]Line, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.lines[s.fromLine:]), s.changed
}

func (s *stream) tail() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return tailOf(string(s.text))
}

func tailOf(text string) string { return text[max(0, len(text)-saidBytes):] }
