package credstore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// A dir is an open folder. Every operation is relative to it, names one entry
// without a slash, and never follows a link in that entry's place: the store
// shares its folder with whoever else is root.
type dir struct {
	fd   int
	path string // for errors only
}

// noDir is no folder: every operation on it fails, close does nothing.
var noDir = dir{fd: -1}

// openDir opens an existing folder that must not be a link itself.
func openDir(path string) (dir, error) {
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return noDir, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return dir{fd, path}, nil
}

// sub opens the folder name below d, after making it (0700) where it is missing and mk is set.
func (d dir) sub(name string, mk bool) (dir, error) {
	path := filepath.Join(d.path, name)
	if mk {
		if err := unix.Mkdirat(d.fd, name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
			return noDir, &fs.PathError{Op: "mkdir", Path: path, Err: err}
		}
	}
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return noDir, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return dir{fd, path}, nil
}

func (d dir) close() {
	if d.fd >= 0 {
		_ = unix.Close(d.fd)
	}
}

// ownedPrivately reports whether the folder belongs to this process's user
// and nobody else may write to it.
func (d dir) ownedPrivately() error {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: d.path, Err: err}
	}
	if int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("folder %s belongs to uid %d, not to uid %d, who runs this", d.path, st.Uid, os.Geteuid())
	}
	if st.Mode&0o022 != 0 {
		return fmt.Errorf("folder %s has mode %04o, so that others may write to it; chmod it to 0700", d.path, st.Mode&0o7777)
	}
	return nil
}

// create makes the file name, which must not exist, with its final mode before
// it has content. It leaves nothing behind where it fails.
func (d dir) create(name string, mode uint32, data []byte) (identity, error) {
	path := filepath.Join(d.path, name)
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Openat(d.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	})
	if err != nil {
		return identity{}, &fs.PathError{Op: "create", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	_, err = f.Write(data)
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	err = errors.Join(err, f.Close())
	if err != nil {
		_ = unix.Unlinkat(d.fd, name, 0)
		return identity{}, fmt.Errorf("writing %s: %w", path, err)
	}
	return identityOf(&st), nil
}

// replace writes the file name through a temporary one, so that a reader or a
// crash sees the old content or the new.
func (d dir) replace(name string, mode uint32, data []byte) error {
	tmp := name + tmpSuffix
	if err := d.unlink(tmp); err != nil {
		return err
	}
	if _, err := d.create(tmp, mode, data); err != nil {
		return err
	}
	if err := rename(d, tmp, d, name, false); err != nil {
		_ = d.unlink(tmp)
		return err
	}
	return nil
}

// overwrite writes over a part of the file name, in place: that needs no space
// in memory, and is done whole or not at all whenever the process is killed.
func (d dir) overwrite(name string, offset int64, data []byte) error {
	path := filepath.Join(d.path, name)
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Openat(d.fd, name, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	_, err = f.WriteAt(data, offset)
	return errors.Join(err, f.Close())
}

// open opens the regular file name for reading. The caller closes it.
func (d dir) open(name string) (*os.File, identity, error) {
	path := filepath.Join(d.path, name)
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, identity{}, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, identity{}, errors.Join(&fs.PathError{Op: "stat", Path: path, Err: err}, f.Close())
	}
	return f, identityOf(&st), nil
}

// read returns the content of the regular file name, and what the file is. A
// file longer than limit is an error: nobody else decides how much we read.
func (d dir) read(name string, limit int64) ([]byte, identity, error) {
	path := filepath.Join(d.path, name)
	f, id, err := d.open(name)
	if err != nil {
		return nil, identity{}, err
	}
	defer f.Close()
	switch {
	case !id.regular:
		return nil, id, fmt.Errorf("reading %s: not a regular file", path)
	case id.Size > limit:
		return nil, id, fmt.Errorf("reading %s: %d bytes are more than %d", path, id.Size, limit)
	}
	// One buffer of the final size: a growing one would leave copies behind.
	b := make([]byte, id.Size)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, id, fmt.Errorf("reading %s: %w", path, err)
	}
	return b[:n], id, nil
}

// stat says what the entry name is, without following it.
func (d dir) stat(name string) (identity, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return identity{}, &fs.PathError{Op: "stat", Path: filepath.Join(d.path, name), Err: err}
	}
	return identityOf(&st), nil
}

// unlink removes the file name; that it is missing is not an error.
func (d dir) unlink(name string) error {
	if err := unix.Unlinkat(d.fd, name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "unlink", Path: filepath.Join(d.path, name), Err: err}
	}
	return nil
}

// list returns the names in the folder, sorted.
func (d dir) list() ([]string, error) {
	e, err := d.sub(".", false)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(e.fd), d.path)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("listing %s: %w", d.path, err)
	}
	slices.Sort(names)
	return names, nil
}

// removeSub removes the folder name and the files in it; that it is missing is
// not an error. It does not descend: the store makes no deeper folders.
func (d dir) removeSub(name string) error {
	e, err := d.sub(name, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer e.close()
	names, err := e.list()
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := e.unlink(n); err != nil {
			return err
		}
	}
	if err := unix.Unlinkat(d.fd, name, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "rmdir", Path: filepath.Join(d.path, name), Err: err}
	}
	return nil
}

// rename moves the entry a of one folder to the entry b of another on the same
// file system. With noReplace an existing b is an error that matches
// [fs.ErrExist] (Linux 3.15 on the disk file systems and tmpfs, 3.18 on ramfs).
func rename(from dir, a string, to dir, b string, noReplace bool) error {
	var flags uint
	if noReplace {
		flags = unix.RENAME_NOREPLACE
	}
	if err := unix.Renameat2(from.fd, a, to.fd, b, flags); err != nil {
		return &os.LinkError{Op: "rename", Old: filepath.Join(from.path, a), New: filepath.Join(to.path, b), Err: err}
	}
	return nil
}

// link gives the file a of one folder the second name b in another.
func link(from dir, a string, to dir, b string) error {
	if err := unix.Linkat(from.fd, a, to.fd, b, 0); err != nil {
		return &os.LinkError{Op: "link", Old: filepath.Join(from.path, a), New: filepath.Join(to.path, b), Err: err}
	}
	return nil
}

// flock takes the lock of the file name, made where it is missing and mk is
// set, and waits for it. Closing the returned file gives it back; so does the
// kernel when the process dies.
func (d dir) flock(name string, exclusive, mk bool) (io.Closer, error) {
	path := filepath.Join(d.path, name)
	flags, how := unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, unix.LOCK_SH
	if mk {
		flags |= unix.O_CREAT
	}
	if exclusive {
		how = unix.LOCK_EX
	}
	fd, err := ignoringEINTR(func() (int, error) { return unix.Openat(d.fd, name, flags, 0o600) })
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	if _, err := ignoringEINTR(func() (int, error) { return 0, unix.Flock(fd, how) }); err != nil {
		_ = unix.Close(fd)
		return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// mkdir makes path and what is missing above it: the folder itself 0700, its parents 0755.
func mkdir(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // parents such as /run are for everybody to pass through
		return err
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func identityOf(st *unix.Stat_t) identity {
	return identity{
		Ino:     st.Ino,
		Size:    st.Size,
		MTime:   st.Mtim.Nano(),
		regular: st.Mode&unix.S_IFMT == unix.S_IFREG,
	}
}

// MonotonicUSec is CLOCK_MONOTONIC in microseconds, the clock of systemd's
// *TimestampMonotonic properties.
func MonotonicUSec() uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return uint64(ts.Nano()) / 1000 //nolint:gosec // time since boot is not negative
}

func ignoringEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
