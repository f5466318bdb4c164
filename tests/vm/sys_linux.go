package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/guestagent/guestagent/tests/vm/internal/cpio"
)

// lockFile waits for the lock on path, which it makes. The lock ends with the process at the latest.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening lock: %w", err)
	}
	ticker := time.NewTicker(lockPoll)
	defer ticker.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("waiting for another builder's lock %s: %w", path, ctx.Err())
		case <-ticker.C:
		}
	}
}

// ownGroup makes the end of cmd's context end its children too.
func ownGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
}

// dieWithThread makes the kernel kill cmd when the thread that starts it ends, at the latest with the process. The
// caller keeps its goroutine on its thread for as long as cmd runs.
func dieWithThread(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// ownSession keeps the terminal's signals from cmd, which ends by itself.
func ownSession(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
}

// fileHeader describes a file for an archive. It says false for what an archive does not hold.
func fileHeader(name string, info fs.FileInfo) (cpio.Header, bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Mode&cpio.TypeMask == syscall.S_IFSOCK {
		return cpio.Header{}, false
	}
	return cpio.Header{
		Name:     name,
		Mode:     st.Mode,
		UID:      st.Uid,
		GID:      st.Gid,
		ModTime:  uint32(max(0, st.Mtim.Sec)), //nolint:gosec // until 2106
		DevMajor: unix.Major(st.Rdev),
		DevMinor: unix.Minor(st.Rdev),
	}, true
}

// kernelRelease names the kernel that runs here.
func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}
