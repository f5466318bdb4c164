package health

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A guest is the kernel of a Collector in tests.
type guest struct {
	mu      sync.Mutex
	files   map[string]string // by name
	systems map[string]fileSystem
	errs    map[string]error         // by name or path
	hang    map[string]chan struct{} // by name or path, until it is closed
	asked   map[string]int           // by name or path
}

func newGuest(t *testing.T) (*guest, *Collector) {
	g := &guest{
		files: map[string]string{
			"proc/sys/kernel/hostname": "web\n",
			"proc/uptime":              "61.50 100.00\n",
			"proc/loadavg":             "0.25 1.07 12.00 1/83 20385\n",
			"proc/meminfo":             sample(t, "meminfo"),
			"proc/pressure/cpu":        "some avg10=0.01 avg60=0.02 avg300=0.03 total=0\n",
			"proc/pressure/memory":     stalls("1.00", "0.00"),
			"proc/pressure/io":         sample(t, "pressure"),
			"proc/self/mountinfo":      sample(t, "mountinfo"),
		},
		systems: map[string]fileSystem{
			"/":          {mount: 22, device: "254:0", total: 1000, used: 400, available: 500, readOnly: true},
			"/nix/store": {mount: 29, device: "254:16", total: 1000, used: 1000, available: 0, readOnly: true},
			"/var":       {mount: 130, device: "0:77", total: 2000, used: 10, available: 1990},
		},
		errs:  map[string]error{},
		hang:  map[string]chan struct{}{},
		asked: map[string]int{},
	}
	return g, &Collector{
		readFile: func(name string, _ int64) (string, error) { return ask(g, g.files, name) },
		statFS:   func(path string) (fileSystem, error) { return ask(g, g.systems, path) },
	}
}

func stalls(some, full string) string {
	return "some avg10=" + some + " avg60=0.00 avg300=0.00 total=0\nfull avg10=" + full + " avg60=0.00 avg300=0.00 total=0\n"
}

func ask[T any](g *guest, from map[string]T, name string) (T, error) {
	g.mu.Lock()
	g.asked[name]++
	v, ok := from[name]
	err, hang := g.errs[name], g.hang[name]
	g.mu.Unlock()
	if hang != nil {
		<-hang
	}
	if err == nil && !ok {
		err = fs.ErrNotExist
	}
	return v, err
}

func (g *guest) count(name string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.asked[name]
}

func TestCollect(t *testing.T) {
	_, c := newGuest(t)
	want := Figures{
		Hostname: "web",
		Uptime:   61500 * time.Millisecond,
		Load:     [3]int{25, 107, 1200},
		Memory:   Memory{Total: 24684084 << 10, Available: 24163676 << 10},
		Pressure: Pressure{
			CPU:    &Stall{Some: Share{Avg10: 1, Avg60: 2, Avg300: 3}},
			Memory: &Stall{Some: Share{Avg10: 100}},
			IO:     &Stall{Some: Share{Avg10: 26, Avg60: 1534, Avg300: 10000}, Full: Share{Avg10: 5, Avg300: 103}},
		},
		Disks: []Disk{
			{Path: "/", Total: 1000, Used: 400, Available: 500},
			{Path: "/nix/store", Total: 1000, Used: 1000, ReadOnly: true},
			{Path: "/var", Total: 2000, Used: 10, Available: 1990},
		},
	}
	if got := c.Collect(); !reflect.DeepEqual(got, want) {
		t.Errorf("Collect() = %+v\nwant %+v", got, want)
	}
}

func TestCollectParts(t *testing.T) {
	for _, tc := range []struct {
		name    string
		change  func(g *guest, c *Collector)
		unknown []string
		check   func(f Figures) bool
	}{
		{
			"no PSI",
			func(g *guest, _ *Collector) {
				delete(g.files, "proc/pressure/cpu")
				g.errs["proc/pressure/memory"] = &os.PathError{Op: "read", Err: syscall.EOPNOTSUPP}
			},
			nil,
			func(f Figures) bool { return f.Pressure.CPU == nil && f.Pressure.Memory == nil && f.Pressure.IO != nil },
		},
		{
			"files that say nothing, or cannot be read",
			func(g *guest, _ *Collector) {
				g.files["proc/meminfo"], g.files["proc/pressure/io"], g.files["proc/uptime"] = "x", "x", "x"
				g.errs["proc/loadavg"] = syscall.EIO
				delete(g.files, "proc/sys/kernel/hostname")
			},
			[]string{"hostname", "uptime", "load", "memory", "pressure"},
			func(f Figures) bool {
				return len(f.Disks) == 3 && f.Memory == Memory{} && f.Pressure == Pressure{} && f.Load == [3]int{}
			},
		},
		{
			"paths that are not there, and one that errs",
			func(g *guest, _ *Collector) {
				delete(g.systems, "/nix/store")
				g.errs["/"] = syscall.EIO
			},
			[]string{"disk /"},
			func(f Figures) bool { return len(f.Disks) == 1 && f.Disks[0].Path == "/var" },
		},
		{
			"one file system at several paths, by its device and not by stat(2)'s",
			func(g *guest, c *Collector) {
				g.files["proc/self/mountinfo"] += "\n200 22 0:40 /@log /var/log rw - btrfs /dev/vdc rw\n"
				g.systems["/var/log"] = fileSystem{mount: 200, device: "0:78", total: 9}
				c.Paths = []string{"/var/log", "/var", "/"}
			},
			nil,
			func(f Figures) bool {
				return len(f.Disks) == 2 && f.Disks[0].Path == "/var/log" && f.Disks[1].Path == "/"
			},
		},
		{
			"without mountinfo, who seems to be read-only is not known, and the others are",
			func(g *guest, _ *Collector) {
				g.errs["proc/self/mountinfo"] = syscall.EIO
				g.systems["/"] = fileSystem{device: "0:77", total: 9}
			},
			[]string{"disk /nix/store"},
			func(f Figures) bool { return len(f.Disks) == 1 && f.Disks[0].Path == "/" },
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g, c := newGuest(t)
			tc.change(g, c)
			if f := c.Collect(); !slices.Equal(f.Unknown, tc.unknown) || !tc.check(f) {
				t.Errorf("Collect() = %+v", f)
			}
		})
	}
}

// What hangs holds up nothing, is asked once, and is there again when it is done.
func TestCollectHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, c := newGuest(t)
		hang := make(chan struct{})
		g.hang["/var"], g.hang["proc/pressure/io"] = hang, hang
		start := time.Now()
		collect := func(took time.Duration) {
			t.Helper()
			f := c.Collect()
			if want := []string{"pressure", "disk /var"}; !slices.Equal(f.Unknown, want) || f.Hostname != "web" || len(f.Disks) != 2 {
				t.Errorf("Collect() = %+v", f)
			}
			if d := time.Since(start); d != took {
				t.Errorf("Collect() returned after %s, want %s", d, took)
			}
		}
		// Two at once share an attempt.
		done := make(chan struct{})
		go func() {
			defer close(done)
			collect(partTime)
		}()
		collect(partTime)
		<-done
		for range 100 {
			collect(partTime) // at once
		}
		if n, m := g.count("/var"), g.count("proc/pressure/io"); n != 1 || m != 1 {
			t.Errorf("what hangs was asked %d and %d times", n, m)
		}

		close(hang)
		synctest.Wait()
		if f := c.Collect(); len(f.Unknown) != 0 || len(f.Disks) != 3 || f.Pressure.IO == nil || g.count("/var") != 2 {
			t.Errorf("Collect() after all came back = %+v", f)
		}
	})
}

// What takes its time, but not too long, is waited for by all who ask.
func TestCollectSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, c := newGuest(t)
		hang := make(chan struct{})
		g.hang["/var"] = hang
		time.AfterFunc(partTime-1, func() { close(hang) })
		var known atomic.Int32
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if f := c.Collect(); len(f.Unknown) == 0 {
					known.Add(1)
				}
			})
		}
		wg.Wait()
		if known.Load() != 10 || g.count("/var") != 1 {
			t.Errorf("of 10 %d know all, and it was asked %d times", known.Load(), g.count("/var"))
		}
	})
}

func TestCollectReadsBelowRoot(t *testing.T) {
	root := t.TempDir()
	g, _ := newGuest(t)
	for name, s := range g.files {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c := &Collector{Root: root, Paths: []string{"/none"}}
	f := c.Collect()
	if f.Hostname != "web" || f.Load[0] != 25 || f.Pressure.Memory == nil || len(f.Disks) != 0 || len(f.Unknown) != 0 {
		t.Errorf("Collect() = %+v", f)
	}

	// What has no end is read for as long as is told.
	if err := os.WriteFile(filepath.Join(root, "proc/loadavg"), []byte("1.00 1.00 1.00 "+strings.Repeat("x", 1<<20)), 0o644); err != nil {
		t.Fatal(err)
	}
	if s, err := c.file("proc/loadavg", maxFile); err != nil || len(s) != maxFile {
		t.Errorf("file() = %d bytes, %v", len(s), err)
	}
	if _, err := c.file("proc/none", maxFile); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("file() of what is not there: %v", err)
	}
}

func BenchmarkCollect(b *testing.B) {
	var c Collector
	for b.Loop() {
		c.Collect()
	}
}
