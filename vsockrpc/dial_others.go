//go:build !linux

package vsockrpc

import (
	"context"
	"net"
)

func dialMux(ctx context.Context, path string) (net.Conn, error) { return dialUnix(ctx, path) }
