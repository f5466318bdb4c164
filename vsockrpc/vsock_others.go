//go:build !linux

package vsockrpc

import (
	"context"
	"errors"
	"net"
	"os"
)

func dialVsock(context.Context, uint32, uint32) (net.Conn, error) { return nil, errors.ErrUnsupported }

func listenVsock(uint32) (net.Listener, error) { return nil, errors.ErrUnsupported }
func activated() []*os.File                    { return nil }
func isListening(*os.File) (bool, error)       { return false, errors.ErrUnsupported }

func fileListener(*os.File) (net.Listener, error) { return nil, errors.ErrUnsupported }
