// Package fleet has many guests on this machine, all of them processes as they
// are shipped. It measures (`make bench`) one guestctl that updates their agents,
// and providers that they get their first set from at once, which is a test, too.
package fleet

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	// batch is how many guests guestctl works on at a time.
	batch = 50
	// starters is how many agents are started at a time.
	starters = 8
	// idle ends the agents of a benchmark that was killed.
	idle = "10m"
)

// measuring makes the test program run its arguments, and tell what they took.
const measuring = "GUESTAGENT_FLEET_MEASURE"

// TestMain is there because the kernel counts the memory of whoever starts a
// program as the program's, up to its execve(2): so that is done by a small
// process, and not by the one that has the fleet.
func TestMain(m *testing.M) {
	if os.Getenv(measuring) == "" {
		os.Exit(m.Run())
	}
	if err := measure(os.NewFile(3, "result"), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A cost is what a process took.
type cost struct {
	Wall   time.Duration
	CPU    time.Duration
	Memory int64 // bytes resident at most
}

func measure(w io.Writer, args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return err
	}
	c := cost{Wall: time.Since(start), CPU: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
	if u, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		c.Memory = int64(u.Maxrss) << 10
	}
	return json.NewEncoder(w).Encode(c)
}

// run runs a program and returns its output and what it took.
func run(b *testing.B, args ...string) (string, cost) {
	b.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), measuring+"=1")
	cmd.ExtraFiles = []*os.File{w}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run() // the pipe holds the result
	_ = w.Close()
	if err != nil {
		b.Fatalf("%s: %v\n%s", args[0], err, &stderr)
	}
	var c cost
	if err := json.NewDecoder(r).Decode(&c); err != nil {
		b.Fatal(err)
	}
	return stdout.String(), c
}

// build builds a program as `make build` does.
func build(b testing.TB, name string) string {
	b.Helper()
	out := filepath.Join(b.TempDir(), name)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "github.com/guestagent/guestagent/cmd/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("building %s: %v\n%s", name, err, text)
	}
	return out
}

// start starts an agent below root, which gets its local socket as systemd
// hands it over: it is there at once, and nobody listens on vsock.
func start(program, root string) (*exec.Cmd, error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: socket(root)})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// LISTEN_PID is the program's own, which the shell becomes.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh", program, "serve", "--root", root, "--idle", idle)
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1", "LISTEN_FDNAMES=local")
	cmd.ExtraFiles = []*os.File{f}
	return cmd, cmd.Start()
}

func socket(root string) string { return filepath.Join(root, "s") }

// startAll starts n agents below dir, and ends them with the benchmark.
func startAll(b *testing.B, program, dir string, n int) []*exec.Cmd {
	b.Helper()
	agents, errs := make([]*exec.Cmd, n), make([]error, n)
	each(starters, n, func(i int) { agents[i], errs[i] = start(program, rootOf(dir, i)) })
	b.Cleanup(func() {
		for i, a := range agents {
			if errs[i] == nil {
				_ = a.Process.Kill()
				_ = a.Wait()
			}
		}
	})
	for _, err := range errs {
		if err != nil {
			b.Fatal(err)
		}
	}
	return agents
}

func rootOf(dir string, i int) string { return filepath.Join(dir, fmt.Sprintf("g%d", i)) }

// each calls do for 0 to n-1, some at a time.
func each(atATime, n int, do func(i int)) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, atATime)
	for i := range n {
		slots <- struct{}{}
		wg.Go(func() {
			do(i)
			<-slots
		})
	}
	wg.Wait()
}

// resident is what /proc says a process has in memory, in bytes: all of it
// (VmRSS), or what no other shares (RssAnon).
func resident(b testing.TB, pid int, what string) int64 {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), what+":")
	line, _, _ := strings.Cut(rest, "\n")
	kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(line, "kB")), 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return kib << 10
}

// BenchmarkFleet is one guestctl that puts a new value of 1 KiB into every agent
// of this machine. The time is that of the guestctl process, from its start to
// its end; the agents have the same processors. guestctl-MiB is the most that
// it had resident, agent-MiB what an agent has at the end.
func BenchmarkFleet(b *testing.B) {
	if runtime.GOOS != "linux" {
		b.Skip("the agent runs on Linux")
	}
	agent, guestctl := build(b, "guestagent"), build(b, "guestctl")
	for _, n := range []int{1, 10, 100, 1000} {
		b.Run(fmt.Sprintf("guests=%d", n), func(b *testing.B) {
			// A guest's /run is a tmpfs, and so should this be.
			dir, err := os.MkdirTemp("/dev/shm", "fleet") //nolint:usetesting // a socket's path is short, too
			if err != nil {
				dir, err = os.MkdirTemp("", "fleet") //nolint:usetesting // a socket's path is short
			}
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = os.RemoveAll(dir) })
			vms := filepath.Join(dir, "vms.d")
			if err := os.Mkdir(vms, 0o700); err != nil {
				b.Fatal(err)
			}
			for i := range n {
				vm := fmt.Sprintf(`{"target": "unix:%s"}`, socket(rootOf(dir, i)))
				if err := os.WriteFile(filepath.Join(vms, fmt.Sprintf("g%d.json", i)), []byte(vm), 0o600); err != nil {
					b.Fatal(err)
				}
			}
			agents := startAll(b, agent, dir, n)

			source := filepath.Join(dir, "value")
			value := make([]byte, 1<<10)
			push := func() cost {
				_, _ = rand.Read(value)
				if err := os.WriteFile(source, value, 0o600); err != nil {
					b.Fatal(err)
				}
				out, c := run(b, guestctl, "push", "--vms", vms, "--all", "--batch", strconv.Itoa(batch), "--json", "x:"+source)
				if got := strings.Count(out, `"installed":["x"]`); got != n {
					b.Fatalf("%d of %d guests say that they have it", got, n)
				}
				return c
			}
			push() // every agent has started when it has answered

			var sum cost
			for b.Loop() {
				c := push()
				sum.Wall, sum.CPU, sum.Memory = sum.Wall+c.Wall, sum.CPU+c.CPU, max(sum.Memory, c.Memory)
			}
			for i := range n {
				if got, err := os.ReadFile(filepath.Join(rootOf(dir, i), "run/credstore/x")); err != nil || !bytes.Equal(got, value) {
					b.Fatalf("guest %d does not have what was pushed last: %v", i, err)
				}
			}
			var memory int64
			for _, a := range agents {
				memory += resident(b, a.Process.Pid, "VmRSS")
			}
			b.ReportMetric(float64(sum.Wall.Nanoseconds())/float64(b.N), "ns/op")
			b.ReportMetric(sum.CPU.Seconds()*1000/float64(b.N), "guestctl-cpu-ms/op")
			b.ReportMetric(float64(sum.Memory)/(1<<20), "guestctl-MiB")
			b.ReportMetric(float64(memory)/float64(n)/(1<<20), "agent-MiB")
		})
	}
}
