package vsockrpc

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A transport that comes late is waited for; one that does not, until time is
// up; what will not get better, not at all.
func TestListenWithin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		late := func(errno error, after time.Duration) func() (net.Listener, error) {
			return func() (net.Listener, error) {
				if time.Since(begin) < after {
					return nil, os.NewSyscallError("socket", errno)
				}
				return newPipeListener(), nil
			}
		}
		for _, errno := range []error{syscall.EAFNOSUPPORT, syscall.ENODEV, syscall.EADDRNOTAVAIL} {
			begin = time.Now()
			if _, err := listenWithin(t.Context(), time.Minute, late(errno, 10*time.Second)); err != nil || time.Since(begin) > 11*time.Second {
				t.Errorf("%v for 10 s: %v after %v", errno, err, time.Since(begin))
			}
			begin = time.Now()
			if _, err := listenWithin(t.Context(), 5*time.Second, late(errno, time.Hour)); !errors.Is(err, errno) || time.Since(begin) > 5*time.Second {
				t.Errorf("%v for ever: %v after %v", errno, err, time.Since(begin))
			}
		}
		// A port that is taken is waited for, too, and not as long.
		begin = time.Now()
		if _, err := listenWithin(t.Context(), time.Minute, late(syscall.EADDRINUSE, time.Second)); err != nil || time.Since(begin) > 2*time.Second {
			t.Errorf("EADDRINUSE for 1 s: %v after %v", err, time.Since(begin))
		}
		for d, most := range map[time.Duration]time.Duration{time.Minute: portWait, time.Second: time.Second, 0: 0} {
			begin = time.Now()
			if _, err := listenWithin(t.Context(), d, late(syscall.EADDRINUSE, time.Hour)); !errors.Is(err, syscall.EADDRINUSE) || time.Since(begin) > most {
				t.Errorf("EADDRINUSE for ever, within %v: %v after %v", d, err, time.Since(begin))
			}
		}
		begin = time.Now()
		if _, err := listenWithin(t.Context(), time.Minute, late(syscall.EACCES, time.Hour)); !errors.Is(err, syscall.EACCES) || time.Since(begin) != 0 {
			t.Errorf("EACCES: %v after %v", err, time.Since(begin))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := listenWithin(ctx, time.Minute, late(syscall.ENODEV, time.Hour)); !errors.Is(err, syscall.ENODEV) || time.Since(begin) != time.Second {
			t.Errorf("with the context's end: %v after %v", err, time.Since(begin))
		}
	})
}
