package agent

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// dup returns a second descriptor of an open file.
func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicating a descriptor: %w", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
