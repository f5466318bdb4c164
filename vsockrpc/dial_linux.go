package vsockrpc

import (
	"context"
	"errors"
	"net"

	"github.com/mdlayher/socket"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

const (
	// Source ports are taken from sourceHigh downwards. The agent's own port
	// and the provider's are left alone: a connection that holds one keeps its
	// server from listening. So a provider with another port had better have
	// one below sourceLow.
	sourceHigh, sourceLow = 1023, 512
	providerPort          = 1021
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

// bindPrivileged binds to the highest port below 1024 that is free. Where that
// is not allowed, or none is free, it leaves the socket to the kernel.
func bindPrivileged(bind func(port uint32) error) error {
	for port := uint32(sourceHigh); port >= sourceLow; port-- {
		if port == DefaultPort || port == providerPort {
			continue
		}
		err := bind(port)
		switch {
		case err == nil, errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
			return nil
		case !errors.Is(err, unix.EADDRINUSE):
			return err
		}
	}
	return nil
}
