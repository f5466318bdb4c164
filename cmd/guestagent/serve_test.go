package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait. A kernel without vsock costs the agent 30 s
// where it listens itself.
const patience = 75 * time.Second

// served is `guestagent serve` as a process, and its local socket.
type served struct {
	t      testing.TB
	cmd    *exec.Cmd
	socket string
	stderr *bytes.Buffer // to be read when it has ended
	notify *net.UnixConn // what it tells its service manager
	end    func() error
}

// serve starts the program and waits until it says that it is ready. Activated,
// it gets its local socket as systemd hands it over, and no vsock.
func serve(t testing.TB, program string, activated bool) *served {
	t.Helper()
	// A guest's /run is a tmpfs, and so should this be: every push is synced.
	root, err := os.MkdirTemp("/dev/shm", "ga") //nolint:usetesting // see above; a socket's path is short, too
	if err != nil {
		root, err = os.MkdirTemp("", "ga") //nolint:usetesting // a socket's path is short
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	s := &served{t: t, socket: filepath.Join(root, "run/guestagent/varlink.sock"), stderr: &bytes.Buffer{}}
	notify := filepath.Join(root, "notify")
	if s.notify, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: notify}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.notify.Close() })

	s.cmd = exec.Command(program, "serve", "--root", root)
	s.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify)
	if activated {
		s.socket = filepath.Join(root, "s")
		l, err := net.Listen("unix", s.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		// LISTEN_PID is the program's own, which the shell becomes.
		s.cmd = exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh", program, "serve", "--root", root, "--idle", "1h")
		s.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify, "LISTEN_FDS=1", "LISTEN_FDNAMES=local")
		s.cmd.ExtraFiles = []*os.File{f}
	}
	s.cmd.Stderr = s.stderr
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.end = sync.OnceValue(s.cmd.Wait)
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		_ = s.end()
	})
	s.told("READY=1")
	return s
}

// told waits until the program tells its service manager state.
func (s *served) told(state string) {
	s.t.Helper()
	b := make([]byte, 4096)
	if err := s.notify.SetReadDeadline(time.Now().Add(patience)); err != nil {
		s.t.Fatal(err)
	}
	for {
		n, err := s.notify.Read(b)
		if err != nil {
			_ = s.cmd.Process.Kill()
			_ = s.end()
			s.t.Fatalf("waiting for %s: %v\n%s", state, err, s.stderr)
		}
		if string(b[:n]) == state {
			return
		}
	}
}

// ends sends a signal, upon which the program has to end in good order.
func (s *served) ends(sig os.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
	s.told("STOPPING=1")
	if err := s.end(); err != nil {
		s.t.Errorf("after %v: %v, want exit status 0\n%s", sig, err, s.stderr)
	}
	for _, value := range []string{"hunter2", "s3cr3t", "czNjcjN0"} {
		if bytes.Contains(s.stderr.Bytes(), []byte(value)) {
			s.t.Errorf("the log has what was sent (%d bytes)", s.stderr.Len())
		}
	}
}

// A caller speaks Varlink in as few lines as can be: nothing here is the
// project's own client.
type caller struct {
	conn net.Conn
	r    *bufio.Reader
}

func (s *served) dial() (*caller, error) {
	conn, err := net.Dial("unix", s.socket)
	if err != nil {
		return nil, err
	}
	return &caller{conn, bufio.NewReader(conn)}, conn.SetDeadline(time.Now().Add(patience))
}

func (s *served) mustDial() *caller {
	s.t.Helper()
	c, err := s.dial()
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// call calls a method, and puts the parameters of the reply into reply.
func (c *caller) call(method string, parameters, reply any) error {
	b, err := json.Marshal(map[string]any{"method": method, "parameters": parameters})
	if err != nil {
		return err
	}
	if _, err := c.conn.Write(append(b, 0)); err != nil {
		return err
	}
	b, err = c.r.ReadBytes(0)
	if err != nil {
		return err
	}
	var answer struct {
		Error      string
		Parameters json.RawMessage
	}
	if err := json.Unmarshal(b[:len(b)-1], &answer); err != nil {
		return err
	}
	if answer.Error != "" {
		return fmt.Errorf("%s %s", answer.Error, answer.Parameters)
	}
	return json.Unmarshal(answer.Parameters, reply)
}

// push pushes a value that nobody pushed before. It begins with s3cr3t.
func (c *caller) push(name string, size int) error {
	value := append([]byte("s3cr3t"), make([]byte, size-6)...)
	_, _ = rand.Read(value[6:])
	set := []map[string]string{{"name": name, "data": base64.StdEncoding.EncodeToString(value)}}
	var reply struct{ Installed []string }
	if err := c.call("io.guestagent.Credentials.Apply", map[string]any{"set": set}, &reply); err != nil {
		return err
	}
	if len(reply.Installed) != 1 || reply.Installed[0] != name {
		return fmt.Errorf("a push of %s installed %q", name, reply.Installed)
	}
	return nil
}

// The program by itself: it opens its socket or gets it from systemd, answers,
// refuses what is no call, and ends in good order when it is told to.
func TestServe(t *testing.T) {
	program := release(t)
	for _, tt := range []struct {
		name      string
		activated bool
		sig       syscall.Signal
	}{
		{"by itself", false, syscall.SIGTERM},
		{"activated", true, syscall.SIGINT},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t, program, tt.activated)
			c := s.mustDial()
			defer c.conn.Close()
			var info struct{ Product, Version string }
			if err := c.call("org.varlink.service.GetInfo", map[string]any{}, &info); err != nil || info.Product != "guestagent" || info.Version != "test" {
				t.Errorf("GetInfo = %+v, %v", info, err)
			}
			if st, err := os.Stat(s.socket); !tt.activated && (err != nil || st.Mode().Perm() != 0o600) {
				t.Errorf("the local socket: %v, %v, want mode 0600", st, err)
			}
			for _, garbage := range []string{
				"\x00", "{}\x00", "[]\x00", "hunter2\x00", "GET /hunter2 HTTP/1.1\r\n\r\n\x00", "\x16\x03\x01hunter2\x00",
				`{"method":"org.varlink.service.GetInfo","method":"hunter2"}` + "\x00",
				`{"method":"org.varlink.service.GetInfo","hunter2":1}` + "\x00",
			} {
				s.refuses(garbage)
			}

			// The others do not notice, and a push is there when it is answered.
			if err := c.push("a", 1<<10); err != nil {
				t.Error(err)
			}
			var list struct {
				Generation int
				Entries    []struct{ Name string }
			}
			if err := c.call("io.guestagent.Credentials.List", map[string]any{}, &list); err != nil || list.Generation != 1 || len(list.Entries) != 1 {
				t.Errorf("List = %+v, %v", list, err)
			}
			s.ends(tt.sig) // with a connection that is still open
		})
	}
}

// refuses sends garbage. The program hangs up, whatever it says before.
func (s *served) refuses(garbage string) {
	s.t.Helper()
	c := s.mustDial()
	defer c.conn.Close()
	if _, err := c.conn.Write([]byte(garbage)); err != nil {
		s.t.Fatal(err)
	}
	for {
		answer, err := c.r.ReadString(0)
		if strings.Contains(answer, `"product"`) || strings.Contains(answer, "hunter2") {
			s.t.Errorf("%q was answered with %q", garbage, answer)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			s.t.Errorf("after %q the connection is still there", garbage)
		}
		if err != nil {
			return
		}
	}
}

// resident is what /proc/PID/status says of memory, in bytes.
func (s *served) resident() map[string]int64 {
	s.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	m := map[string]int64{}
	for line := range strings.Lines(string(b)) {
		key, rest, _ := strings.Cut(line, ":")
		if f := strings.Fields(rest); len(f) == 2 && f[1] == "kB" {
			if m[key], err = strconv.ParseInt(f[0], 10, 64); err != nil {
				s.t.Fatal(err)
			}
			m[key] <<= 10
		}
	}
	if m["VmRSS"] == 0 || m["VmHWM"] == 0 {
		s.t.Fatal("the kernel does not tell how much is resident")
	}
	return m
}

// memory is resident, and logs it.
func (s *served) memory(when string) map[string]int64 {
	s.t.Helper()
	m := s.resident()
	mib := func(key string) float64 { return float64(m[key]) / (1 << 20) }
	s.t.Logf("%s: %.2f MiB resident, %.2f of them the program's file; at most %.2f MiB", when, mib("VmRSS"), mib("RssFile")+mib("RssShmem"), mib("VmHWM"))
	return m
}

// files counts the open files of the program. That is root's to see, since the
// agent keeps others out; -1 is that it could not be seen.
func (s *served) files() int {
	s.t.Helper()
	dir, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
	if errors.Is(err, fs.ErrPermission) && os.Getenv("CI") != "true" {
		return -1
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return len(dir)
}

// An agent that has worked a lot is as small as one that has not: every guest
// has one.
func TestFootprint(t *testing.T) {
	const limit = 10 << 20
	const clients, each = 4, 100 // each: pushes over one connection
	pushes := 10_000
	if testing.Short() {
		pushes = 800
	}
	s := serve(t, release(t), true)
	first := s.mustDial()
	if err := first.push("n0", 1<<10); err != nil {
		t.Fatal(err)
	}
	files := s.files()
	s.memory("at the beginning")
	_ = first.conn.Close()

	var wg sync.WaitGroup
	for n := range clients {
		wg.Go(func() {
			for done := 0; done < pushes/clients; done += each {
				c, err := s.dial()
				if err != nil {
					t.Error(err)
					return
				}
				for i := range each {
					if err := c.push(fmt.Sprintf("n%d", (n+i)%5), 1<<10); err != nil {
						t.Error(err)
						return
					}
				}
				_ = c.conn.Close()
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	if m := s.memory(fmt.Sprintf("after %d pushes of 1 KiB", pushes)); m["VmHWM"] >= limit {
		t.Errorf("%d bytes resident, at most %d, want below %d", m["VmRSS"], m["VmHWM"], limit)
	}

	// A large message is there twice, as it came and decoded. It may take more
	// for as long as it is there; the runtime gives that back as work goes on.
	last := s.mustDial()
	defer last.conn.Close()
	for i := range 8 {
		if err := last.push(fmt.Sprintf("large%d", i%2), 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	m := s.memory("after 8 pushes of 1 MiB")
	more := 0
	for ; m["VmRSS"] >= limit && more < 10_000; more += each {
		for range each {
			if err := last.push("n0", 1<<10); err != nil {
				t.Fatal(err)
			}
		}
		m = s.resident()
	}
	s.memory(fmt.Sprintf("after %d more of 1 KiB", more))
	if m["VmRSS"] >= limit {
		t.Errorf("%d bytes resident long after pushes of 1 MiB, want below %d", m["VmRSS"], limit)
	}

	// It learns from the kernel that connections have ended, a little later.
	now := s.files()
	for end := time.Now().Add(patience / 3); now > files && time.Now().Before(end); now = s.files() {
		var info struct{}
		if err := last.call("org.varlink.service.GetInfo", map[string]any{}, &info); err != nil {
			t.Fatal(err)
		}
	}
	if now > files {
		t.Errorf("%d open files, with as many connections as at the beginning, when there were %d", now, files)
	}
	t.Logf("%d open files", now)
	s.ends(syscall.SIGTERM)
	if now < 0 {
		t.Skip("open files were not counted: run this as root")
	}
}
