package host

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A pinned is an open folder: all that is read through it is of one folder,
// whatever its path leads to meanwhile.
type pinned struct {
	path string
	fd   int
}

func pin(path string) (*pinned, error) {
	fd, err := openat(unix.AT_FDCWD, path, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return &pinned{path: path, fd: fd}, nil
}

func (p *pinned) close() { _ = unix.Close(p.fd) }

// open opens a file, following links, and does not wait for a pipe's other end.
func (p *pinned) open(name string) (*os.File, error) {
	path := filepath.Join(p.path, name)
	fd, err := openat(p.fd, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// stat follows links.
func (p *pinned) stat(name string) (stamp, error) { return statat(p.fd, name, 0) }

// names returns the names of all entries, sorted.
func (p *pinned) names() ([]string, error) {
	fd, err := openat(p.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: p.path, Err: err}
	}
	d := os.NewFile(uintptr(fd), p.path)
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	if names == nil {
		names = []string{}
	}
	return names, nil
}

// current reports whether the path still leads to this folder.
func (p *pinned) current() bool {
	this, err := statat(p.fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return false
	}
	now, err := statat(unix.AT_FDCWD, p.path, 0)
	return err == nil && now.dev == this.dev && now.ino == this.ino
}

func openat(dir int, path string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, path, flags|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

func statat(dir int, path string, flags int) (stamp, error) {
	var st unix.Stat_t
	for {
		err := unix.Fstatat(dir, path, &st, flags)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return stamp{}, &fs.PathError{Op: "stat", Path: path, Err: err}
		}
		return stamp{dev: uint64(st.Dev), ino: uint64(st.Ino), size: st.Size, mtime: st.Mtim.Nano(), ctime: st.Ctim.Nano(), mode: modeOf(st.Mode)}, nil
	}
}

func stampOf(fi fs.FileInfo) stamp {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return stamp{size: fi.Size(), mtime: fi.ModTime().UnixNano(), mode: fi.Mode()}
	}
	return stamp{dev: uint64(st.Dev), ino: uint64(st.Ino), size: st.Size, mtime: st.Mtim.Nano(), ctime: st.Ctim.Nano(), mode: modeOf(st.Mode)}
}

// modeOf returns the mode's bits as far as they matter here.
func modeOf(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		m |= fs.ModeDir
	default:
		m |= fs.ModeIrregular
	}
	return m
}

// owned reports whether the file is this user's.
func owned(fi fs.FileInfo) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// notifyMask is what matters of a folder. IN_MODIFY is in it, so that a file
// is not read before its last write.
const notifyMask = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR | unix.IN_DONT_FOLLOW

// A notifier watches folders by inotify(7).
type notifier struct {
	events chan struct{}
	f      *os.File // nil where there is no inotify
	fd     int
	done   chan struct{}

	mu      sync.Mutex
	watches map[uint32]interest
	broken  bool
}

func newNotifier() *notifier {
	n := openNotifier()
	n.start()
	return n
}

func (n *notifier) start() {
	if n.f != nil {
		go n.read()
	}
}

func openNotifier() *notifier {
	n := &notifier{events: make(chan struct{}, 1), done: make(chan struct{}), watches: map[uint32]interest{}}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil { // a user has 128 of them, unless fs.inotify.max_user_instances says otherwise
		n.broken = true
		close(n.done)
		return n
	}
	n.fd = fd
	n.f = os.NewFile(uintptr(fd), "inotify")
	return n
}

// close ends the watches, and returns when nothing runs any more.
func (n *notifier) close() {
	if n.f != nil {
		_ = n.f.Close()
	}
	<-n.done
}

// arm watches these folders and no others. It reports whether there is
// something to watch that was not watched before, and whether all is watched.
func (n *notifier) arm(want map[string]interest) (altered, complete bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.broken {
		return false, false
	}
	complete = true
	watches := make(map[uint32]interest, len(want))
	for dir, i := range want {
		// Adding what is watched gives its number again; another folder by the
		// same path gets another.
		wd, err := unix.InotifyAddWatch(n.fd, dir, notifyMask)
		if err != nil {
			complete = false
			continue
		}
		w := interest{names: map[string]bool{}, of: i.of}
		other, twice := watches[uint32(wd)] //nolint:gosec // the kernel counts up from 1
		if twice {
			// One folder by two paths.
			for name := range other.names {
				w.names[name] = true
			}
			if w.of == nil {
				w.of = other.of
			}
		}
		for name := range i.names {
			w.names[name] = true
		}
		watches[uint32(wd)] = w //nolint:gosec // the same
	}
	for wd := range n.watches {
		if _, ok := watches[wd]; !ok {
			_, _ = unix.InotifyRmWatch(n.fd, wd) // it may be gone with its folder
		}
	}
	for wd, w := range watches {
		old, ok := n.watches[wd]
		altered = altered || !ok || !old.equal(w)
	}
	n.watches = watches
	return altered, complete
}

func (n *notifier) read() {
	defer close(n.done)
	b := make([]byte, 64*(unix.SizeofInotifyEvent+unix.NAME_MAX+1))
	for {
		k, err := n.f.Read(b)
		if err != nil {
			n.mu.Lock()
			n.broken = true
			n.mu.Unlock()
			n.tell()
			return
		}
		if n.matters(b[:k]) {
			n.tell()
		}
	}
}

func (n *notifier) tell() {
	select {
	case n.events <- struct{}{}:
	default:
	}
}

// matters reports whether one of the events that were read does.
func (n *notifier) matters(b []byte) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for len(b) >= unix.SizeofInotifyEvent {
		wd, mask, size := binary.NativeEndian.Uint32(b), binary.NativeEndian.Uint32(b[4:]), int(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if size > len(b) {
			return true
		}
		name := strings.TrimRight(string(b[:size]), "\x00")
		b = b[size:]
		if mask&unix.IN_Q_OVERFLOW != 0 {
			return true
		}
		i, ok := n.watches[wd]
		if !ok {
			continue
		}
		// What has no name is about the folder itself.
		if name == "" || i.in(name) {
			return true
		}
	}
	return false
}
