package health

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// statFS asks the file system that path lies on. It has no automount mounted, and
// has nothing fetched over a network but the figures.
func statFS(path string) (fileSystem, error) {
	fd, err := open(path, unix.O_PATH)
	if err != nil {
		return fileSystem{}, err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(fd, &fs) }); err != nil {
		return fileSystem{}, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		return fileSystem{}, &os.PathError{Op: "statx", Path: path, Err: err}
	}

	// Blocks are counted in fragments, as statvfs(3) has it: FUSE has both.
	unit := uint64(fs.Frsize) //nolint:gosec // a size
	if unit == 0 {
		unit = uint64(fs.Bsize) //nolint:gosec // a size
	}
	hi, total := bits.Mul64(fs.Blocks, unit)
	if hi != 0 {
		return fileSystem{}, &os.PathError{Op: "statfs", Path: path, Err: errors.New("its size makes no sense")}
	}
	free := min(fs.Bfree, fs.Blocks)
	return fileSystem{
		mount:     st.Mnt_id,
		device:    strconv.FormatUint(uint64(st.Dev_major), 10) + ":" + strconv.FormatUint(uint64(st.Dev_minor), 10),
		total:     total,
		used:      (fs.Blocks - free) * unit,
		available: min(fs.Bavail, free) * unit,
		readOnly:  fs.Flags&unix.ST_RDONLY != 0,
	}, nil
}

// A psiTrigger is one file of /proc/pressure for each stall: one holds one trigger.
type psiTrigger struct {
	fds  []int
	wake int // an eventfd
}

// openTrigger has the kernel tell of stalls. Without CAP_SYS_RESOURCE Linux before
// 6.4 refuses.
func openTrigger(file string, stalls []stall) (_ trigger, err error) {
	t := &psiTrigger{wake: -1}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	for _, s := range stalls {
		fd, err := open(file, unix.O_RDWR|unix.O_NONBLOCK)
		if err != nil {
			return nil, err
		}
		t.fds = append(t.fds, fd)
		var fs unix.Statfs_t
		if err := unix.Fstatfs(fd, &fs); err != nil {
			return nil, &os.PathError{Op: "statfs", Path: file, Err: err}
		}
		if fs.Type != unix.PROC_SUPER_MAGIC {
			return nil, fmt.Errorf("setting a trigger in %s: it is not the kernel's", file)
		}
		// The kernel takes the last byte for the end of the text.
		word := fmt.Sprintf("%s %d %d\x00", s.word, s.time.Microseconds(), s.window.Microseconds())
		if _, err := unix.Write(fd, []byte(word)); err != nil {
			return nil, fmt.Errorf("setting a trigger in %s: %w", file, err)
		}
	}
	if t.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("making an eventfd: %w", err)
	}
	return t, nil
}

// wait polls by itself: the runtime's poller does not wait for POLLPRI.
func (t *psiTrigger) wait(ctx context.Context, fired func(i int)) {
	defer t.close()
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(t.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	// Nobody writes to what is closed, or to what has its number next.
	defer func() {
		if !stop() {
			<-woken
		}
	}()
	fds := []unix.PollFd{{Fd: int32(t.wake), Events: unix.POLLIN}} //nolint:gosec // a descriptor
	for _, fd := range t.fds {
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLPRI}) //nolint:gosec // a descriptor
	}
	for ctx.Err() == nil {
		if err := retry(func() error { _, err := unix.Poll(fds, -1); return err }); err != nil {
			return
		}
		for i, p := range fds[1:] {
			switch {
			case p.Revents&(unix.POLLERR|unix.POLLNVAL) != 0:
				return
			case p.Revents&unix.POLLPRI != 0:
				fired(i)
			}
		}
	}
}

func (t *psiTrigger) close() {
	for _, fd := range append(t.fds, t.wake) {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

func open(path string, flags int) (fd int, err error) {
	err = retry(func() error { fd, err = unix.Open(path, flags|unix.O_CLOEXEC, 0); return err })
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// retry does again what a signal interrupted: the runtime sends itself some.
func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
