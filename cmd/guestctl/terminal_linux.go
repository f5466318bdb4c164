package main

import (
	"context"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// screen is the terminal that stdout is, nil if it is none that a whole screen
// can be drawn on.
func (p *program) screen() *screen {
	f, ok := p.stdout.(*os.File)
	if !ok || !p.terminal || os.Getenv("TERM") == "" || os.Getenv("TERM") == "dumb" {
		return nil
	}
	var last unix.Winsize
	size := func() (width, height int) {
		if w, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
			last = *w
		}
		return int(last.Col), int(last.Row)
	}
	if width, height := size(); width == 0 || height == 0 {
		return nil
	}
	return &screen{w: f, size: size, resized: resized}
}

// resized tells of another size of the terminal, until ctx ends. Around a stop by
// SIGTSTP it has the screen left and entered again.
func resized(ctx context.Context, leave, enter func()) <-chan struct{} {
	out := make(chan struct{}, 1)
	signals := make(chan os.Signal, 8) // of none that follows a few others may be lost
	signal.Notify(signals, unix.SIGWINCH, unix.SIGTSTP, unix.SIGCONT)
	go func() {
		defer signal.Stop(signals)
		for {
			select {
			case s := <-signals:
				switch s {
				case unix.SIGTSTP:
					leave()
					_ = unix.Kill(os.Getpid(), unix.SIGSTOP)
					continue // it may not have stopped yet
				case unix.SIGCONT:
					enter()
				}
			case <-ctx.Done():
				return
			}
			select {
			case out <- struct{}{}:
			default:
			}
		}
	}()
	return out
}
