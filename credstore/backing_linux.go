package credstore

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func backing(dir string) (Backing, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return Backing{}, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	switch st.Type {
	case unix.RAMFS_MAGIC:
		return Backing{FSType: "ramfs"}, nil
	case unix.TMPFS_MAGIC:
		noswap, err := mountedNoswap(dir)
		if err != nil {
			return Backing{}, err
		}
		return Backing{FSType: "tmpfs", Swappable: !noswap}, nil
	}
	return Backing{FSType: fmt.Sprintf("%#x", st.Type), Swappable: true}, nil
}

// mountedNoswap looks for the option noswap of the mount that dir lies on, in
// /proc/self/mountinfo (proc_pid_mountinfo(5)).
func mountedNoswap(dir string) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &st); err != nil {
		return false, &fs.PathError{Op: "statx", Path: dir, Err: err}
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		// ID parent major:minor root mountpoint options optional… - type source super-options
		fields := strings.Fields(sc.Text())
		if len(fields) == 0 || fields[0] != strconv.FormatUint(st.Mnt_id, 10) {
			continue
		}
		return slices.Contains(strings.Split(fields[len(fields)-1], ","), "noswap"), nil
	}
	return false, sc.Err()
}
