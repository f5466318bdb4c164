//go:build !linux

package host

// Harden does nothing here.
func Harden() error { return nil }
