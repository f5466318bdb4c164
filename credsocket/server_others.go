//go:build !linux

package credsocket

import (
	"context"
	"errors"
	"os"
)

// The protocol is systemd's, and systemd runs on Linux. Elsewhere the package
// compiles, so that programs that share code with it do.

type state struct{}

// Serve fails: there is no systemd here.
func (s *Server) Serve(context.Context, *os.File, []*os.File) error { return errors.ErrUnsupported }

// Retry does nothing.
func (s *Server) Retry() {}

// FailWaiting does nothing.
func (s *Server) FailWaiting() {}

// Stop does nothing.
func (s *Server) Stop() int { return 0 }

// StopIfIdle does nothing.
func (s *Server) StopIfIdle() bool { return true }

// Waiting returns nothing.
func (s *Server) Waiting() []Waiting { return nil }

// SystemdStore returns false: there is no systemd here.
func SystemdStore() (FDStore, bool) { return nil, false }
