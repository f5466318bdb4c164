package vsockrpc

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

func listenVsock(port uint32) (net.Listener, error) {
	return vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
}

// The first descriptor that is handed over, and how many are taken: a socket
// each, and the service manager's store (sd_listen_fds(3)).
const (
	firstListenFD = 3
	maxListenFDs  = 4096
)

// activated takes the descriptors that were handed over to this process, each
// under its name. go-systemd's package for that links crypto/tls, which would
// make the agent a sixth larger.
func activated() []*os.File {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	for _, key := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(key)
	}
	n, err := strconv.Atoi(count)
	if err != nil || pid != strconv.Itoa(os.Getpid()) {
		return nil
	}
	var files []*os.File
	for i := range min(n, maxListenFDs) {
		name := "unknown" // as sd_listen_fds_with_names(3) says
		if i < len(names) && names[i] != "" {
			name = names[i]
		}
		fd := firstListenFD + i
		unix.CloseOnExec(fd)
		files = append(files, os.NewFile(uintptr(fd), name))
	}
	return files
}

// isListening reports whether f is a socket that listens.
func isListening(f *os.File) (bool, error) {
	n, err := sockopt(f, unix.SO_ACCEPTCONN)
	if errors.Is(err, unix.ENOTSOCK) {
		return false, nil
	}
	return n != 0, err
}

// fileListener makes a listener of f's socket, with a descriptor of its own.
// net.FileListener does not know AF_VSOCK.
func fileListener(f *os.File) (net.Listener, error) {
	domain, err := sockopt(f, unix.SO_DOMAIN)
	if err != nil {
		return nil, err
	}
	typ, err := sockopt(f, unix.SO_TYPE)
	switch {
	case err != nil:
		return nil, err
	case typ != unix.SOCK_STREAM:
		return nil, fmt.Errorf("want a stream socket, have type %d", typ)
	case domain == unix.AF_VSOCK:
		return vsock.FileListener(f)
	case domain == unix.AF_UNIX:
		return net.FileListener(f)
	}
	return nil, fmt.Errorf("want a socket of AF_VSOCK or AF_UNIX, have family %d", domain)
}

func sockopt(f *os.File, opt int) (int, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var optErr error
	if err := raw.Control(func(fd uintptr) {
		n, optErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, opt)
	}); err != nil {
		return 0, err
	}
	return n, optErr
}
