//go:build !linux

package vsockrpc

import "net"

// peerOf knows nobody: only Linux is asked.
func peerOf(net.Conn) (Peer, error) { return Peer{}, nil }
