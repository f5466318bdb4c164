package credsocket

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// A systemdStore is PID 1's file descriptor store for this service, reached
// over the notification socket: sd_pid_notify_with_fds(3), FDSTORE=1.
type systemdStore struct {
	socket int
	addr   *unix.SockaddrUnix
}

var _ FDStore = (*systemdStore)(nil)

// SystemdStore returns the store that $NOTIFY_SOCKET leads to. It is false
// where there is no such variable, or it names no Unix socket: then systemd has
// not started this process. The service needs FileDescriptorStoreMax= and
// NotifyAccess=main (Type=notify has that).
//
// Each call of it opens a socket that stays open for the life of the process.
func SystemdStore() (FDStore, bool) {
	path := os.Getenv("NOTIFY_SOCKET")
	if len(path) < 2 || !strings.ContainsRune("/@", rune(path[0])) {
		return nil, false
	}
	// Opened beforehand: between accept and Keep every system call counts.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, false
	}
	// package unix, too, writes '@' for the NUL of an abstract address.
	return &systemdStore{socket: fd, addr: &unix.SockaddrUnix{Name: path}}, true
}

// Keep returns when the message lies in PID 1's queue, with the descriptor in
// it: from then on the sender may be killed. PID 1 reads its queue before it
// reaps the sender (manager_setup_notify in src/core/manager.c gives the socket
// a higher priority than SIGCHLD), and so still knows whose message it is.
func (s *systemdStore) Keep(name string, fd int) error {
	return s.send("FDSTORE=1\nFDNAME="+name, unix.UnixRights(fd))
}

// Drop returns when the message lies in PID 1's queue.
func (s *systemdStore) Drop(name string) error {
	return s.send("FDSTOREREMOVE=1\nFDNAME="+name, nil)
}

func (s *systemdStore) send(message string, rights []byte) error {
	for {
		err := unix.Sendmsg(s.socket, []byte(message), rights, s.addr, unix.MSG_NOSIGNAL)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("notifying the service manager: %w", err)
		}
	}
}
