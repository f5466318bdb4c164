package vm_test

import (
	"bufio"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
)

// heldEnv makes TestContainerLeavesNothing start a container and wait for its own end.
const heldEnv = "GUESTAGENT_TEST_HOLD_CONTAINER"

// goneTimeout bounds the wait for a process's end, in milliseconds. It is never reached where all is well.
const goneTimeout = 60_000

// TestContainerLeavesNothing ends a container in three ways and looks for processes, control groups, mounts and files.
// The second way, which is also that of a test's time-out, gives the harness no chance to clean up.
func TestContainerLeavesNothing(t *testing.T) {
	img := vmtest.ContainerImage(t)
	if os.Getenv(heldEnv) != "" {
		hold(t, img)
	}

	t.Run("close", func(t *testing.T) {
		m := boot(t, img)
		t.Cleanup(func() { _ = m.Close() })
		r := remainders(t, m.Artifacts())
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		r.wantNone(t)
	})

	t.Run("kill -9 of the harness", func(t *testing.T) {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestContainerLeavesNothing$")
		cmd.Env = append(os.Environ(), heldEnv+"=1")
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		sc := bufio.NewScanner(stdout)
		var dir string
		for sc.Scan() {
			if d, ok := strings.CutPrefix(sc.Text(), "container: "); ok {
				dir = d
				break
			}
			t.Log(sc.Text())
		}
		if dir == "" {
			t.Fatalf("no container was started: %v", errors.Join(sc.Err(), cmd.Wait()))
		}
		r := remainders(t, dir)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // the signal is an error
		r.wantNone(t)
	})

	t.Run("kill -9 of the supervisor", func(t *testing.T) {
		m := boot(t, img)
		t.Cleanup(func() {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
		r := remainders(t, m.Artifacts())
		if err := unix.Kill(r.supervisor, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// It cannot clean up, but no process may be left.
		r.wantNoProcess(t)
		for _, g := range slices.Backward(groupTree(t, filepath.Base(r.dir))) {
			if err := os.Remove(g); err != nil {
				t.Errorf("removing a control group that should be empty: %v", err)
			}
		}
	})
}

// hold starts a container, tells where, and waits to be killed.
func hold(t *testing.T, img *vm.Image) {
	t.Helper()
	m := boot(t, img)
	if _, err := io.WriteString(os.Stdout, "container: "+m.Artifacts()+"\n"); err != nil {
		t.Fatal(errors.Join(err, m.Close()))
	}
	<-m.Done()
	t.Fatal("the container has ended")
}

// boot starts a container without artifacts: m.Artifacts is then its own folder.
func boot(t *testing.T, img *vm.Image) *vm.Machine {
	t.Helper()
	m, err := vm.StartContainer(t.Context(), vm.ContainerConfig{Image: img})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// remains is all that a container consists of on the host.
type remains struct {
	dir        string
	supervisor int
	pids       []int
	fds        []int
}

// remainders takes stock of a running container. Its processes are held by file descriptors, so that no number is taken
// for another process.
func remainders(t *testing.T, dir string) *remains {
	t.Helper()
	r := &remains{dir: dir}
	tree := groupTree(t, filepath.Base(dir))
	for _, g := range tree {
		data, err := os.ReadFile(filepath.Join(g, "cgroup.procs"))
		if err != nil {
			t.Fatal(err)
		}
		for field := range strings.FieldsSeq(string(data)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			r.pids = append(r.pids, pid)
		}
	}
	slices.Sort(r.pids)
	r.pids = slices.Compact(r.pids)
	r.supervisor = supervisorOf(t, dir)
	r.pids = append(r.pids, r.supervisor)
	for _, pid := range r.pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue // it was a short one
		}
		if err != nil {
			t.Fatalf("opening process %d: %v", pid, err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		r.fds = append(r.fds, fd)
	}
	// The inner supervisor, systemd-nspawn, PID 1, the journal, the guest program at least.
	if len(r.fds) < 6 || len(tree) < 3 {
		t.Fatalf("the container has %d processes and %d control groups, want more", len(r.fds), len(tree))
	}
	return r
}

// supervisorOf returns the process that was started with the folder as argument.
func supervisorOf(t *testing.T, dir string) int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		// A process that has ended meanwhile has none.
		line, _ := os.ReadFile(file)
		if strings.HasPrefix(string(line), filepath.Join(dir, "nspawn")+"\x00"+dir+"\x00") {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("no supervisor of %s runs", dir)
	return 0
}

// groups returns the host's control groups of that name.
func groups(t *testing.T, name string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone meanwhile
		}
		if err == nil && d.IsDir() && d.Name() == name {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// groupTree returns the control groups of that name and all below them, parents first.
func groupTree(t *testing.T, name string) []string {
	t.Helper()
	var dirs []string
	for _, top := range groups(t, name) {
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return dirs
}

// wantNoProcess waits until each process has ended.
func (r *remains) wantNoProcess(t *testing.T) {
	t.Helper()
	for i, fd := range r.fds {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // descriptors are small
		n, err := unix.Poll(poll, goneTimeout)
		for errors.Is(err, unix.EINTR) {
			n, err = unix.Poll(poll, goneTimeout)
		}
		if n != 1 || err != nil {
			t.Errorf("process %d of %d goes on: %v", i+1, len(r.fds), err)
		}
	}
}

func (r *remains) wantNone(t *testing.T) {
	t.Helper()
	r.wantNoProcess(t)
	if left := groups(t, filepath.Base(r.dir)); len(left) != 0 {
		t.Errorf("left are the control groups %q", left)
	}
	if _, err := os.Lstat(r.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Lstat(%q) = %v, want %v", r.dir, err, fs.ErrNotExist)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), r.dir) {
		t.Errorf("%s is in the host's mounts, or they cannot be read: %v", r.dir, err)
	}
	if left, _ := filepath.Glob("/run/systemd/nspawn/*/*guest*"); len(left) != 0 {
		t.Errorf("left are %q", left)
	}
}
