package vsockrpc

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/mdlayher/socket"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

const (
	// Source ports are taken from sourceLow to sourceHigh. They are two for each
	// provider that there can be, and a hundred for other calls. Below sourceLow
	// are servers, such as sshd at 22.
	sourceHigh, sourceLow = FirstProviderPort - 1, 128
)

// A vsockConn is a connection over AF_VSOCK from a port of our choice, which
// package vsock does not offer.
type vsockConn struct {
	*socket.Conn
	local, remote *vsock.Addr
}

var _ net.Conn = (*vsockConn)(nil)

func (c *vsockConn) LocalAddr() net.Addr  { return c.local }
func (c *vsockConn) RemoteAddr() net.Addr { return c.remote }

// dialVsock connects from a source port below 1024 where that is allowed, else
// from any.
func dialVsock(ctx context.Context, cid, port uint32) (net.Conn, error) {
	s, err := socket.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0, "vsock", nil)
	if err != nil {
		return nil, err
	}
	conn, err := connectVsock(ctx, s, cid, port)
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	return conn, nil
}

func connectVsock(ctx context.Context, s *socket.Conn, cid, port uint32) (net.Conn, error) {
	if err := bindPrivileged(func(p uint32) error {
		return s.Bind(&unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: p})
	}); err != nil {
		return nil, err
	}
	if _, err := s.Connect(ctx, &unix.SockaddrVM{CID: cid, Port: port}); err != nil {
		return nil, err
	}
	local := &vsock.Addr{}
	if sa, err := s.Getsockname(); err == nil {
		if vm, ok := sa.(*unix.SockaddrVM); ok {
			local.ContextID, local.Port = vm.CID, vm.Port
		}
	}
	return &vsockConn{Conn: s, local: local, remote: &vsock.Addr{ContextID: cid, Port: port}}, nil
}

// bindPrivileged binds to a port from sourceLow to sourceHigh that is free, each
// time to another: the end of a connection can reset one that has the same port
// by then, where the process at the other end closes it after us (seen with
// Linux 6.12). Where that is not allowed, or none is free, it leaves the socket
// to the kernel.
func bindPrivileged(bind func(port uint32) error) error {
	const ports = sourceHigh - sourceLow + 1
	first := rand.Uint32N(ports) //nolint:gosec // it is no secret
	for i := range uint32(ports) {
		err := bind(sourceLow + (first+i)%ports)
		switch {
		case err == nil, errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
			return nil
		case !errors.Is(err, unix.EADDRINUSE):
			return err
		}
	}
	return nil
}

// dialMux connects to a VM's socket, if it is one: see [Dialer.DialConn].
func dialMux(ctx context.Context, path string) (net.Conn, error) {
	fd, err := openMux(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	// What was looked at is what is connected to, whatever its name is by now.
	conn, err := dialUnix(ctx, "/proc/self/fd/"+strconv.Itoa(fd))
	if errors.Is(err, unix.ENOENT) {
		return nil, errors.New("there is no /proc; mount it")
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return nil, op.Err // its address is none that anybody knows
	}
	return conn, err
}

// openMux pins a VM's socket, without opening it.
func openMux(path string) (int, error) {
	dir, name := splitMux(path)
	folder, err := openPath(unix.AT_FDCWD, dir, unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return -1, muxError("the socket's folder is a symbolic link or no folder; name the folder itself, with its real path")
	}
	if err != nil {
		return -1, fmt.Errorf("opening the socket's folder: %w", err)
	}
	defer func() { _ = unix.Close(folder) }()
	fd, err := openPath(folder, name, 0)
	if err != nil {
		return -1, fmt.Errorf("opening the socket: %w", err)
	}
	if err := checkMux(folder, fd); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// splitMux splits a path into the folder, without a slash or a dot at its end,
// since the kernel would follow a link there, and the name. It is not cleaned:
// ".." after a link is not the folder that the link is in.
func splitMux(path string) (dir, name string) {
	i := strings.LastIndexByte(path, '/')
	dir, name = path[:i+1], path[i+1:]
	for len(dir) > 1 && (strings.HasSuffix(dir, "/") || strings.HasSuffix(dir, "/.")) {
		dir = dir[:len(dir)-1]
	}
	if dir == "" {
		dir = "."
	}
	return dir, name
}

func openPath(folder int, path string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(folder, path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC|flags, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// checkMux reports whether fd holds a socket that is this VM's: one that its
// VMM, whose folder it is, has made and not merely brought there.
func checkMux(folder, fd int) error {
	var dir, st unix.Stat_t
	if err := unix.Fstat(folder, &dir); err != nil {
		return fmt.Errorf("looking at the socket's folder: %w", err)
	}
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("looking at the socket: %w", err)
	}
	trusted := func(uid uint32) bool { return uid == 0 || int64(uid) == int64(os.Geteuid()) }
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return muxError("it is a symbolic link, and not followed: it may lead to another VM; name the socket itself")
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return muxError("it is no socket; name that of the VM's vsock device")
	case st.Nlink == 0:
		return fmt.Errorf("looking at the socket: %w: it was removed in that moment", unix.ENOENT)
	case st.Nlink > 1:
		return muxError("the socket has another name, a hard link, and may be another VM's; remove it, and start the VM anew")
	case trusted(st.Uid) || st.Uid == dir.Uid:
		return nil
	case trusted(dir.Uid) && dir.Mode&0o022 == 0:
		return nil // whoever put it there is trusted
	}
	return muxError(fmt.Sprintf("the socket is user %d's, and its folder user %d's, with mode %04o: it may be another VM's; give each VM a folder that belongs to its VMM's user", st.Uid, dir.Uid, dir.Mode&0o7777))
}
