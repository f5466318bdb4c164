package consumer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// TestDial connects over a real socket.
func TestDial(t *testing.T) {
	m := &fakeManager{units: map[string]map[property]any{"a.service": serviceState("a.service")}}
	cfg := testConfig
	cfg.Bus = filepath.Join(t.TempDir(), "private")
	l, err := net.Listen("unix", cfg.Bus)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		m.serve(&fakeConn{Conn: conn})
	}()
	c, err := Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := c.Status(t.Context(), "a.service"); err != nil || s.String() != "active (running)" {
		t.Errorf("Status = %v, %v, want active", s, err)
	}
	c.Close()
	<-served // the other side has seen it
	if _, err := c.Status(t.Context(), "a.service"); !errors.Is(err, ErrLost) {
		t.Errorf("Status after Close = %v, want ErrLost", err)
	}
	_ = l.Close()
	if _, err := Dial(t.Context(), cfg); err == nil {
		t.Error("Dial without PID 1 succeeded")
	}
}

// TestDialStuck has a PID 1 that accepts, and says nothing.
func TestDialStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c, err := dial(ctx, testConfig, func() (net.Conn, error) {
			ours, theirs := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, ours) }()
			return theirs, nil
		})
		if c != nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial = %v, %v, want DeadlineExceeded", c, err)
		}
	})
}

// TestDialContext has a connection that outlives the context it was made with.
func TestDialContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &fakeManager{units: map[string]map[property]any{"a.service": serviceState("a.service")}}
		ctx, cancel := newContext(t)
		c, err := dial(ctx, testConfig, m.connect(t))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		cancel()
		synctest.Wait()
		if _, err := c.Status(t.Context(), "a.service"); err != nil {
			t.Errorf("Status = %v, want none", err)
		}
	})
}

// TestStuck has a PID 1 that answers no more.
func TestStuck(t *testing.T) {
	for name, call := range map[string]func(ctx context.Context, c *Conn) error{
		"Find":     func(ctx context.Context, c *Conn) error { _, err := c.Find(ctx, []string{"a"}); return err },
		"Unit":     func(ctx context.Context, c *Conn) error { _, err := c.Unit(ctx, "a.service", nil); return err },
		"Status":   func(ctx context.Context, c *Conn) error { _, err := c.Status(ctx, "a.service"); return err },
		"Starting": func(ctx context.Context, c *Conn) error { _, err := c.Starting(ctx, "a.service"); return err },
		"System":   func(ctx context.Context, c *Conn) error { _, err := c.System(ctx); return err },
		"Follower": func(ctx context.Context, c *Conn) error {
			f, err := c.Follow(ctx)
			if err != nil {
				return err
			}
			_, err = f.Find(ctx, []string{"a"})
			return err
		},
		"Own": func(ctx context.Context, c *Conn) error { _, _, _, err := c.Own(ctx); return err },
		"Run": func(ctx context.Context, c *Conn) error {
			_, err := c.Run(ctx, []Job{{"a.service", ActionRestart}}, nil)
			return err
		},
		"Watch": func(ctx context.Context, c *Conn) error {
			_, err := c.Watch(ctx, map[string]Status{"a.service": {}}, time.Hour)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, c := newFake(t)
				m.silent = true
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if err := call(ctx, c); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("error %v, want DeadlineExceeded", err)
				}
			})
			synctest.Test(t, func(t *testing.T) {
				m, c := newFake(t)
				m.silent = true
				go func() {
					synctest.Wait() // until the call waits for its answer
					m.hangUp()
				}()
				if err := call(t.Context(), c); !errors.Is(err, ErrLost) {
					t.Errorf("error %v, want ErrLost", err)
				}
			})
		})
	}
}

// TestStuckWrite has a PID 1 that does not even read.
func TestStuckWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, c := newFake(t)
		m.busy = make(chan struct{})
		defer close(m.busy)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if _, err := c.Status(ctx, "a.service"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Status = %v, want DeadlineExceeded", err)
		}
		if took := time.Since(began); took > writeTimeout {
			t.Errorf("Status took %v, want at most %v", took, writeTimeout)
		}
		if _, err := c.Status(t.Context(), "a.service"); !errors.Is(err, ErrLost) {
			t.Errorf("Status = %v, want ErrLost", err)
		}
		c.Close() // does not wait for PID 1 either
	})
}

// TestWire has half a message written: nothing may follow it.
func TestWire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		w := &wire{Conn: ours}
		go func() { _, _ = io.ReadFull(theirs, make([]byte, 3)) }()
		if n, err := w.Write(bytes.Repeat([]byte("x"), 8)); err == nil || n != 3 {
			t.Errorf("Write = %d, %v, want an error after 3 bytes", n, err)
		}
		if n, err := w.Write([]byte("y")); err == nil {
			t.Errorf("Write after it = %d, %v, want an error", n, err)
		}
		if !w.ended.Load() {
			t.Error("the connection was not given up")
		}
	})
}
