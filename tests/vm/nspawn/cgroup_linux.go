package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// groups is the hierarchy of control groups of version 2, mounted nowhere: a host that uses version 1 may not have it
// mounted, and no mount of ours is to be seen.
type groups struct{ root *os.File }

// openGroups opens the hierarchy. The caller closes it.
func openGroups() (groups, error) {
	fd, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return groups{}, fmt.Errorf("opening the control groups: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.FsconfigCreate(fd); err != nil {
		return groups{}, fmt.Errorf("opening the control groups: %w", err)
	}
	mount, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return groups{}, fmt.Errorf("opening the control groups: %w", err)
	}
	return groups{os.NewFile(uintptr(mount), "cgroup2")}, nil
}

// Close closes the hierarchy. Its groups stay.
func (g groups) Close() error { return g.root.Close() }

// path returns where a group can be found as long as g is open.
func (g groups) path(group string) string {
	return filepath.Join("/proc/self/fd", strconv.FormatUint(uint64(g.root.Fd()), 10), group)
}

// make makes a group.
func (g groups) make(group string) error {
	if err := os.Mkdir(g.path(group), 0o755); err != nil {
		return fmt.Errorf("making control group %s: %w", group, withoutPath(err))
	}
	return nil
}

// remove removes a group and those that the container's systemd made below it. No process may be left in them.
func (g groups) remove(group string) error {
	var dirs []string
	err := filepath.WalkDir(g.path(group), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	for _, dir := range slices.Backward(dirs) {
		err = errors.Join(err, os.Remove(dir))
	}
	if err != nil {
		return fmt.Errorf("removing control group %s: %w", group, err)
	}
	return nil
}

// withoutPath returns the reason of a file operation's error.
func withoutPath(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}

// ownGroup returns the control group of version 2 that a process is in, from its /proc/PID/cgroup, see cgroups(7).
func ownGroup(cgroup string) (string, error) {
	for line := range strings.Lines(cgroup) {
		if group, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok && filepath.IsAbs(group) && filepath.Clean(group) == group {
			return group, nil
		}
	}
	return "", fmt.Errorf("looking for the own control group: none of version 2 in %q", cgroup)
}
