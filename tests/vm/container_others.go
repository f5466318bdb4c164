//go:build !linux

package vm

import (
	"errors"
	"net"
)

func peerPID(net.Conn) (int, error) { return 0, errors.ErrUnsupported }
