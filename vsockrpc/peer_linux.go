package vsockrpc

import (
	"fmt"
	"net"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

func peerOf(conn net.Conn) (Peer, error) {
	switch addr := conn.RemoteAddr().(type) {
	case *vsock.Addr:
		if addr == nil {
			return Peer{}, nil
		}
		return Peer{Kind: PeerVsock, CID: addr.ContextID, Port: addr.Port}, nil
	case *net.UnixAddr:
		c, ok := conn.(*net.UnixConn)
		if !ok {
			return Peer{}, nil
		}
		raw, err := c.SyscallConn()
		if err != nil {
			return Peer{}, fmt.Errorf("asking for the peer: %w", err)
		}
		var cred *unix.Ucred
		var credErr error
		if err := raw.Control(func(fd uintptr) {
			cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		}); err != nil {
			return Peer{}, fmt.Errorf("asking for the peer: %w", err)
		}
		if credErr != nil {
			return Peer{}, fmt.Errorf("asking for SO_PEERCRED: %w", credErr)
		}
		return Peer{Kind: PeerUnix, UID: cred.Uid, PID: cred.Pid}, nil
	}
	return Peer{}, nil
}
