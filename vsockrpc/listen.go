package vsockrpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

const (
	listenFirst = 50 * time.Millisecond
	listenMost  = time.Second
	// portWait bounds the wait for a port that another socket has: a server that
	// ends, or a call of a program that knows of no split of the ports.
	portWait = 5 * time.Second
)

// ListenVsock listens on a vsock port, whatever the machine's CID is or will
// be: it changes when the machine is restored from a snapshot. A kernel that
// has no vsock yet is waited for, at most for d, and a port that is taken for a
// few seconds of that. The error then is the kernel's.
func ListenVsock(ctx context.Context, port uint32, d time.Duration) (net.Listener, error) {
	l, err := listenWithin(ctx, d, func() (net.Listener, error) { return listenVsock(port) })
	if err != nil {
		return nil, fmt.Errorf("listening on vsock port %d: %w", port, err)
	}
	return l, nil
}

func listenWithin(ctx context.Context, d time.Duration, listen func() (net.Listener, error)) (net.Listener, error) {
	begin := time.Now()
	for delay := listenFirst; ; delay = min(2*delay, listenMost) {
		l, err := listen()
		if err == nil {
			return l, nil
		}
		patience := time.Duration(0)
		switch {
		case missingTransport(err):
			patience = d
		case errors.Is(err, syscall.EADDRINUSE):
			patience = min(d, portWait)
		}
		if time.Since(begin)+delay >= patience || wait(ctx, delay) != nil {
			return nil, err
		}
	}
}

// missingTransport reports whether the kernel has no vsock, or none yet.
func missingTransport(err error) bool {
	for _, errno := range []syscall.Errno{syscall.EAFNOSUPPORT, syscall.ENODEV, syscall.EADDRNOTAVAIL, syscall.ENOENT} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// A NamedListener is a listener that the service manager handed over.
type NamedListener struct {
	// Name is what FileDescriptorName= of the socket unit says, by default the
	// unit's own name.
	Name string
	net.Listener
}

// Activated returns what the service manager handed over (LISTEN_FDS), and
// takes the variables out of the environment. See [FileListeners].
func Activated() (listeners []NamedListener, rest []*os.File, err error) {
	return FileListeners(activated())
}

// FileListeners makes listeners of files that are listening sockets, AF_VSOCK
// or Unix streams, each under its file's name. It takes the files over. Files
// that do not listen, such as connections from the service manager's store, are
// returned as they are. A socket that listens in some other way is an error,
// and then everything is closed.
func FileListeners(files []*os.File) (listeners []NamedListener, rest []*os.File, err error) {
	fail := func(err error) ([]NamedListener, []*os.File, error) {
		for _, l := range listeners {
			_ = l.Close()
		}
		for _, f := range files {
			_ = f.Close()
		}
		return nil, nil, err
	}
	for _, f := range files {
		listens, err := isListening(f)
		if err != nil {
			return fail(fmt.Errorf("looking at the socket %s: %w", Escape(f.Name(), maxQuoted), err))
		}
		if !listens {
			rest = append(rest, f)
			continue
		}
		l, err := fileListener(f)
		if err != nil {
			return fail(fmt.Errorf("taking over the socket %s: %w", Escape(f.Name(), maxQuoted), err))
		}
		listeners = append(listeners, NamedListener{Name: f.Name(), Listener: l})
		_ = f.Close() // the listener has a descriptor of its own
	}
	return listeners, rest, nil
}
