package agent

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// The changes that inotify tells of: that a file got its name or lost it; and
// those of somebody who writes files in place, too.
const (
	namesChange = unix.IN_MOVED_TO | unix.IN_DELETE | unix.IN_ONLYDIR
	filesChange = namesChange | unix.IN_MOVED_FROM | unix.IN_CLOSE_WRITE | unix.IN_CREATE
)

// inotify says when something in the folder changes, until ctx ends.
func inotify(ctx context.Context, dir string, changes uint32, changed chan<- struct{}) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return os.NewSyscallError("inotify_init1", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer context.AfterFunc(ctx, func() { _ = f.Close() })()
	defer f.Close()
	if _, err := unix.InotifyAddWatch(fd, dir, changes); err != nil {
		return os.NewSyscallError("inotify_add_watch", err)
	}
	b := make([]byte, 4096) // whatever it says, all is looked at anew
	for {
		if _, err := f.Read(b); err != nil {
			return err
		}
		select {
		case changed <- struct{}{}:
		default:
		}
	}
}

// dup returns a second descriptor of an open file.
func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicating a descriptor: %w", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
