package vsockrpc

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"
)

// A PeerKind says what the kernel told of a peer.
type PeerKind uint8

// The kinds there are.
const (
	PeerUnknown PeerKind = iota // nothing that this package knows
	PeerVsock                   // CID and Port count
	PeerUnix                    // UID and PID count
)

const (
	cidHost = 2
	// privilegedPorts are those below it: only root may bind one.
	privilegedPorts = 1024
)

// A Peer is who is at the other end of a connection, in the kernel's words. The
// zero Peer is unknown, and nobody should let it in.
type Peer struct {
	Kind      PeerKind
	CID, Port uint32 // of AF_VSOCK
	UID       uint32 // of a Unix socket (SO_PEERCRED), at the time of its connect
	PID       int32
}

// PeerOf asks the kernel who is at the other end of conn. What it cannot tell
// is unknown, not an error.
func PeerOf(conn net.Conn) (Peer, error) { return peerOf(conn) }

// Local reports whether the peer came over a Unix socket.
func (p Peer) Local() bool { return p.Kind == PeerUnix }

// String returns the peer for people.
func (p Peer) String() string {
	switch p.Kind {
	case PeerVsock:
		return fmt.Sprintf("vsock CID %d port %d", p.CID, p.Port)
	case PeerUnix:
		return fmt.Sprintf("uid %d pid %d", p.UID, p.PID)
	}
	return "unknown peer"
}

// LogValue returns the peer for logs.
func (p Peer) LogValue() slog.Value {
	switch p.Kind {
	case PeerVsock:
		return slog.GroupValue(slog.Uint64("cid", uint64(p.CID)), slog.Uint64("port", uint64(p.Port)))
	case PeerUnix:
		return slog.GroupValue(slog.Uint64("uid", uint64(p.UID)), slog.Int64("pid", int64(p.PID)))
	}
	return slog.GroupValue(slog.String("kind", "unknown"))
}

// PrivilegedPort is the setting peer.privilegedPort.
type PrivilegedPort string

// The values of peer.privilegedPort.
const (
	// PortRequired wants the host's source port below 1024, so that only root
	// of the host may push. It is the default.
	PortRequired PrivilegedPort = "required"
	// PortIgnored takes any port. It is for VMMs that expose vsock as a Unix
	// socket: there the VMM picks the port, and the mode of the socket file is
	// the guard.
	PortIgnored PrivilegedPort = "ignored"
)

// ErrRefused is matched by the error for a peer that may not talk to us.
var ErrRefused = errors.New("peer refused")

// A Policy says who may talk to the agent: over vsock the host and nobody
// else, over a Unix socket root. The zero Policy is the strict one.
type Policy struct {
	// PrivilegedPort says what the host's source port has to be. Empty is
	// PortRequired, and a value that is not known refuses every vsock peer.
	PrivilegedPort PrivilegedPort
}

// Authorize returns nil for a peer that may talk to the agent.
//
// CID 1 and the guest's own CID are processes of the guest: they have the local
// socket, where the kernel tells their user.
func (p Policy) Authorize(peer Peer) error {
	switch peer.Kind {
	case PeerVsock:
		switch {
		case peer.CID != cidHost:
			return fmt.Errorf("%w: not the host (CID %d)", ErrRefused, cidHost)
		case p.PrivilegedPort == PortIgnored:
			return nil
		case p.PrivilegedPort != PortRequired && p.PrivilegedPort != "":
			return fmt.Errorf("%w: peer.privilegedPort is neither %s nor %s", ErrRefused, PortRequired, PortIgnored)
		case peer.Port >= privilegedPorts:
			return fmt.Errorf("%w: its source port is not below %d (peer.privilegedPort)", ErrRefused, privilegedPorts)
		}
		return nil
	case PeerUnix:
		if peer.UID != 0 {
			return fmt.Errorf("%w: not root", ErrRefused)
		}
		return nil
	}
	return fmt.Errorf("%w: the kernel does not tell who it is", ErrRefused)
}

// A logLimit lets a burst of lines through, and then one a while.
type logLimit struct {
	mu         sync.Mutex
	left       int
	since      time.Time
	suppressed int
}

const (
	logBurst = 8
	logEvery = 10 * time.Second
)

// allow reports whether a line may be written, and how many were not since the
// last one that was.
func (l *logLimit) allow() (suppressed int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.since.IsZero() {
		l.left, l.since = logBurst, now
	}
	if n := int(now.Sub(l.since) / logEvery); n > 0 {
		l.left = min(l.left+n, logBurst)
		l.since = l.since.Add(time.Duration(n) * logEvery)
	}
	if l.left == 0 {
		l.suppressed++
		return 0, false
	}
	l.left--
	suppressed, l.suppressed = l.suppressed, 0
	return suppressed, true
}
