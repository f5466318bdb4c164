package health

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// partTime is how long a part may take. The kernel answers in microseconds,
	// unless what it has to ask is gone.
	partTime = 500 * time.Millisecond
	// The bounds of what is read, in bytes. A mount is about 150 in mountinfo.
	maxFile      = 64 << 10
	maxMountinfo = 1 << 20
)

// A Collector reads the guest's figures. The zero value reads this machine's. Its
// methods may be called at the same time, but for Watch, of which one at a time may
// run. The fields must not change once one has been called.
type Collector struct {
	// Root is the folder that /proc and Paths are looked for in; "" is /.
	Root string
	// Paths are where file systems are looked at; nil is /, /nix/store and /var. A
	// path that is not there is left out. Of several on one file system only the
	// first is told.
	Paths []string
	// Shown, where it is not nil, returns the reasons that were made of what
	// Collect found, for those that Watch tells. Whoever collects for another cause
	// may see something that is undone before Watch looks, which alone would never
	// tell that it has gone.
	Shown func() []Reason

	// What tests put in the place of the kernel's.
	readFile func(name string, limit int64) (string, error)
	statFS   func(path string) (fileSystem, error)
	triggers func(file string, stalls []stall) (trigger, error)

	mu       sync.Mutex
	attempts map[string]*attempt // by part, those that go on
	over     [2]time.Time        // until when a stall counts that the kernel told of
}

// A fileSystem is what one call told of it.
type fileSystem struct {
	mount                  uint64 // its ID
	device                 string // MAJOR:MINOR, of stat(2)
	total, used, available uint64 // as in Disk
	readOnly               bool   // it, or the mount
}

// A part is something that may hang. read returns what to make of what it read.
type part struct {
	name string
	read func() (func(*finding), error)
}

// A finding is what the parts have found.
type finding struct {
	Figures

	systems   map[string]fileSystem // by path
	mountinfo string
}

// An attempt is one run of a part.
type attempt struct {
	done  chan struct{}
	apply func(*finding) // once done
	err   error          // once done
	late  bool           // somebody has given up on it; needs the collector's mu
}

// Collect reads the figures, within half a second: what takes longer, or cannot be
// read, is named in Unknown. A part that hangs is left behind, and is not asked
// again until it has come back, so that at most one goroutine hangs for each.
func (c *Collector) Collect() Figures {
	parts := []part{
		{"hostname", read(c, "proc/sys/kernel/hostname", parseHostname, func(f *finding, v string) { f.Hostname = v })},
		{"uptime", read(c, "proc/uptime", parseUptime, func(f *finding, v time.Duration) { f.Uptime = v })},
		{"load", read(c, "proc/loadavg", parseLoad, func(f *finding, v [3]int) { f.Load = v })},
		{"memory", read(c, "proc/meminfo", parseMeminfo, func(f *finding, v Memory) { f.Memory = v })},
		c.pressure(),
		c.mounts(),
	}
	f := c.run(append(parts, c.disks()...))
	c.settle(f, true)
	return f.Figures
}

// pressure is the part that reads /proc/pressure.
func (c *Collector) pressure() part {
	return part{"pressure", func() (func(*finding), error) {
		var p Pressure
		for _, of := range []struct {
			file string
			to   **Stall
		}{{"cpu", &p.CPU}, {"memory", &p.Memory}, {"io", &p.IO}} {
			s, err := c.file("proc/pressure/"+of.file, maxFile)
			// It is not there without CONFIG_PSI, and not supported with psi=0.
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errors.ErrUnsupported) {
				continue
			}
			if err == nil {
				*of.to, err = parseStall(s)
			}
			if err != nil {
				return nil, err
			}
		}
		return func(f *finding) {
			f.Pressure = p
			if p.Memory != nil {
				// A copy: several that ask at once share what was read.
				m := *p.Memory
				m.Some.Over, m.Full.Over = c.isOver(stallSome), c.isOver(stallFull)
				f.Pressure.Memory = &m
			}
		}, nil
	}}
}

// mounts is the part that reads mountinfo.
func (c *Collector) mounts() part {
	return part{"mounts", func() (func(*finding), error) {
		s, err := c.file("proc/self/mountinfo", maxMountinfo)
		if err != nil {
			return nil, err
		}
		return func(f *finding) { f.mountinfo = s }, nil
	}}
}

// disks are the parts that ask file systems.
func (c *Collector) disks() []part {
	var parts []part
	for _, p := range c.paths() {
		parts = append(parts, part{diskPart(p), func() (func(*finding), error) {
			s, err := c.fileSystem(filepath.Join(c.root(), p))
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errors.ErrUnsupported) {
				return func(*finding) {}, nil
			}
			if err != nil {
				return nil, err
			}
			return func(f *finding) { f.systems[p] = s }, nil
		}})
	}
	return parts
}

func diskPart(path string) string { return "disk " + path }

// settle makes Disks of the file systems. With mounts, mountinfo has been read,
// which alone tells whether a file system is read-only or only the mount of it: to a
// service in a sandbox, nearly all of them are.
func (c *Collector) settle(f *finding, mounts bool) {
	var seen []string
	for _, p := range c.paths() {
		s, ok := f.systems[p]
		if !ok {
			continue
		}
		d := Disk{Path: p, Total: s.total, Used: s.used, Available: s.available, ReadOnly: s.readOnly}
		if mounts {
			m, ok := parseMount(f.mountinfo, s.mount)
			switch {
			case ok:
				s.device, d.ReadOnly = m.device, m.readOnly
			case s.readOnly:
				f.Unknown = append(f.Unknown, diskPart(p))
				continue
			}
		}
		if !slices.Contains(seen, s.device) {
			seen = append(seen, s.device)
			f.Disks = append(f.Disks, d)
		}
	}
	// Without it the disks are unknown, if anything is.
	f.Unknown = slices.DeleteFunc(f.Unknown, func(name string) bool { return name == "mounts" })
}

// run reads parts, all at once, and returns what they found in time.
func (c *Collector) run(parts []part) *finding {
	late := make(chan struct{})
	timer := time.AfterFunc(partTime, func() { close(late) })
	defer timer.Stop()
	attempts := make([]*attempt, len(parts))
	for i, p := range parts {
		attempts[i] = c.start(p)
	}
	f := &finding{systems: make(map[string]fileSystem)}
	for i, p := range parts {
		if a := attempts[i]; c.wait(a, late) && a.err == nil {
			a.apply(f)
		} else {
			f.Unknown = append(f.Unknown, p.name)
		}
	}
	return f
}

// start begins with a part, or joins the attempt that goes on. Nobody waits for an
// attempt that hangs.
func (c *Collector) start(p part) *attempt {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a, ok := c.attempts[p.name]; ok {
		return a
	}
	a := &attempt{done: make(chan struct{})}
	if c.attempts == nil {
		c.attempts = make(map[string]*attempt)
	}
	c.attempts[p.name] = a
	go func() {
		a.apply, a.err = p.read()
		c.mu.Lock()
		delete(c.attempts, p.name)
		c.mu.Unlock()
		close(a.done)
	}()
	return a
}

// wait reports whether a was done in time.
func (c *Collector) wait(a *attempt, late <-chan struct{}) bool {
	c.mu.Lock()
	hangs := a.late
	c.mu.Unlock()
	if !hangs {
		select {
		case <-a.done:
			return true
		case <-late:
		}
	}
	select {
	case <-a.done:
		return true
	default:
	}
	c.mu.Lock()
	a.late = true
	c.mu.Unlock()
	return false
}

// read is how a part reads one file: what of it parse makes goes to where set puts it.
func read[T any](c *Collector, name string, parse func(string) (T, error), set func(*finding, T)) func() (func(*finding), error) {
	return func() (func(*finding), error) {
		s, err := c.file(name, maxFile)
		if err != nil {
			return nil, err
		}
		v, err := parse(s)
		if err != nil {
			return nil, err
		}
		return func(f *finding) { set(f, v) }, nil
	}
}

func parseHostname(s string) (string, error) { return strings.TrimSuffix(s, "\n"), nil }

func (c *Collector) root() string {
	if c.Root == "" {
		return "/"
	}
	return c.Root
}

func (c *Collector) paths() []string {
	if c.Paths == nil {
		return []string{"/", "/nix/store", "/var"}
	}
	return c.Paths
}

func (c *Collector) file(name string, limit int64) (string, error) {
	if c.readFile != nil {
		return c.readFile(name, limit)
	}
	f, err := os.Open(filepath.Join(c.root(), name))
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return "", fmt.Errorf("reading /%s: %w", name, err)
	}
	return string(b), nil
}

func (c *Collector) fileSystem(path string) (fileSystem, error) {
	if c.statFS != nil {
		return c.statFS(path)
	}
	return statFS(path)
}
