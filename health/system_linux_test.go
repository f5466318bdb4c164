package health

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestStatFS(t *testing.T) {
	dir := t.TempDir()
	s, err := statFS(dir)
	if err != nil || s.mount == 0 || s.device == "" || s.used+s.available > s.total {
		t.Errorf("statFS() = %+v, %v", s, err)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if m, ok := parseMount(string(b), s.mount); !ok || m.device == "" || m.readOnly {
		t.Errorf("parseMount() of the mount of a folder that can be written = %+v, %v", m, ok)
	}
	// It has no size.
	if s, err := statFS("/proc"); err != nil || s.total != 0 || s.used != 0 || s.available != 0 {
		t.Errorf("statFS(/proc) = %+v, %v", s, err)
	}
	if s, err := statFS(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) || s != (fileSystem{}) {
		t.Errorf("statFS() of what is not there = %+v, %v", s, err)
	}
}

// openHere sets a trigger in this machine's kernel.
func openHere(t *testing.T) trigger {
	tr, err := openTrigger("/proc/pressure/memory", []stall{{"some", stallWindow, stallWindow}, {"full", averageWindow, averageWindow}})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
		t.Skipf("%v: run it on Linux 6.4 or later, booted with psi=1", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func TestTriggerEnds(t *testing.T) {
	tr := openHere(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		tr.wait(ctx, func(i int) { t.Errorf("the kernel tells of a stall that takes all the time: %d", i) })
	}()
	cancel()
	<-done
	noneOpen(t)
}

// noneOpen fails if a trigger is open.
func noneOpen(t *testing.T) {
	t.Helper()
	fds, err := filepath.Glob("/proc/self/fd/*")
	if err != nil || len(fds) == 0 {
		t.Fatalf("listing descriptors: %v", err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && to == "/proc/pressure/memory" {
			t.Errorf("%s is a trigger", fd)
		}
	}
}

func TestTriggerRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "memory")
	if _, err := openTrigger(file, []stall{{"some", stallWindow, stallWindow}}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("openTrigger() of what is not there: %v", err)
	}
	if err := os.WriteFile(file, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openTrigger(file, []stall{{"some", stallWindow, stallWindow}}); err == nil {
		t.Error("openTrigger() takes a file for the kernel's")
	}
	if b, err := os.ReadFile(file); string(b) != "kept" {
		t.Errorf("openTrigger() left %q, %v in a file", b, err)
	}
	openHere(t).(*psiTrigger).close()
	if _, err := openTrigger("/proc/pressure/memory", []stall{{"some", averageWindow, 2 * stallWindow}}); err == nil {
		t.Error("openTrigger() takes more than a window")
	}
	noneOpen(t)
}

// A watch of this machine leaves no trigger behind.
func TestWatchHere(t *testing.T) {
	var c Collector
	ctx, cancel := context.WithCancel(t.Context())
	changed := make(chan struct{}, 1)
	done := make(chan error)
	go func() { done <- c.Watch(ctx, Rules{}, changed) }()
	<-changed
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Watch() = %v", err)
	}
	noneOpen(t)
}

// This machine has all of it.
func TestCollectHere(t *testing.T) {
	var c Collector
	f := c.Collect()
	for range 20 { // a machine under load may take its time
		if len(f.Unknown) == 0 {
			break
		}
		f = c.Collect()
	}
	if len(f.Unknown) != 0 || f.Hostname == "" || f.Uptime == 0 || f.Memory.Total < f.Memory.Available || f.Memory.Available == 0 {
		t.Errorf("Collect() = %+v", f)
	}
	if len(f.Disks) == 0 || f.Disks[0].Path != "/" || f.Disks[0].Total < f.Disks[0].Used+f.Disks[0].Available {
		t.Errorf("Collect() = %+v", f.Disks)
	}
}
