//go:build !linux

package main

// screen is nil: a whole screen is drawn on Linux only.
func (p *program) screen() *screen { return nil }
