package vsockrpc

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

func listenVsock(port uint32) (net.Listener, error) {
	return vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
}

func activated() []*os.File { return activation.Files(true) }

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
