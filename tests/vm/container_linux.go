package vm

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// peerPID returns the process that connected, as this process's PID namespace has it.
func peerPID(conn net.Conn) (int, error) {
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("a connection of type %T has no peer's process", conn)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return 0, fmt.Errorf("asking for the peer's process: %w", err)
	}
	return int(cred.Pid), nil
}
