//go:build !linux

package agent

// Harden does nothing here: the agent runs on Linux.
func Harden() error { return nil }
