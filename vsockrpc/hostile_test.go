package vsockrpc

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestVectors plays testdata/vectors.txt, which docs/protocol.md quotes.
func TestVectors(t *testing.T) {
	text, err := os.ReadFile("testdata/vectors.txt")
	if err != nil {
		t.Fatal(err)
	}
	wire := func(line string) string { return strings.ReplaceAll(line[2:], `\0`, "\n") }
	count := 0
	for paragraph := range strings.SplitSeq(string(text), "\n\n") {
		s, _ := testServer()
		c := serve(t, s).dial()
		for line := range strings.Lines(paragraph) {
			switch line = strings.TrimSuffix(line, "\n"); {
			case strings.HasPrefix(line, "> "):
				count++
				send(t, c, wire(line))
			case strings.HasPrefix(line, "< "):
				expect(t, c, strings.TrimSuffix(wire(line), "\n"))
			case line == ".":
				expectEnd(t, c)
			case line != "" && line[0] != '#':
				t.Fatalf("%q is no vector", line)
			}
		}
		_ = c.Close()
	}
	if count < 10 {
		t.Errorf("%d vectors were played", count)
	}
}

// Hostile peers over real sockets: each gets its end, and others are served in
// the meantime.
func TestHostile(t *testing.T) {
	s, _ := testServer()
	s.FirstByteTimeout, s.MessageTimeout, s.WriteTimeout = 300*time.Millisecond, 300*time.Millisecond, 300*time.Millisecond
	target := serveUnix(t, s)
	good := Credentials{Client: dialTest(t, target)}
	forever := func(c net.Conn, b []byte) {
		for {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}
	var wg sync.WaitGroup
	for name, peer := range map[string]func(c net.Conn){
		"flood":       func(c net.Conn) { forever(c, bytes.Repeat([]byte("x"), 1<<16)) },
		"flood again": func(c net.Conn) { forever(c, bytes.Repeat([]byte("y"), 1<<16)) },
		"nesting":     func(c net.Conn) { forever(c, bytes.Repeat([]byte(`{"a":`), 1<<12)) },
		"slow writer": func(c net.Conn) {
			for range 100 {
				<-time.After(20 * time.Millisecond)
				if _, err := c.Write([]byte(" ")); err != nil {
					return
				}
			}
		},
		"silence": func(net.Conn) {},
		"garbage": func(c net.Conn) { forever(c, []byte("\x00\xff\xfe{")) },
		"slow reader": func(c net.Conn) {
			for range 10_000 { // until both buffers are full
				if _, err := io.WriteString(c, `{"method":"org.varlink.service.GetInfo"}`+"\x00"); err != nil {
					return
				}
			}
		},
	} {
		for range 2 {
			wg.Go(func() {
				c, err := net.Dial("unix", target.Path)
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				defer c.Close()
				peer(c)
				_, _ = io.Copy(io.Discard, c) // until the server hangs up
			})
		}
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for i := 0; ; i++ {
		if _, err := good.List(t.Context()); err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
		select {
		case <-done:
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// All places taken by floods at once take no more memory than the limits say.
func TestHostileMemory(t *testing.T) {
	s, _ := testServer()
	target := serveUnix(t, s)
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	part := bytes.Repeat([]byte("x"), 1<<20)
	var conns []net.Conn
	for range DefaultMaxConns {
		c, err := net.Dial("unix", target.Path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() {
			for range 5 { // short of the limit, so that it stays
				_ = c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
				if _, err := c.Write(part); err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	runtime.GC()
	runtime.ReadMemStats(&now)
	if grown := int64(now.HeapAlloc) - int64(before.HeapAlloc); grown > largeMessages*(MessageLimit+1<<20)+DefaultMaxConns*2*smallBuffer+1<<20 { //nolint:gosec // small
		t.Errorf("the heap grew by %d bytes", grown)
	}
}

// 10,000 connections, one after the other and many at once.
func TestManyConnections(t *testing.T) {
	s, _ := testServer()
	target := serveUnix(t, s)
	var wg sync.WaitGroup
	var mu sync.Mutex
	served, busy := 0, 0
	for range 50 {
		wg.Go(func() {
			for range 200 {
				c, err := Dial(t.Context(), target)
				if err != nil {
					t.Errorf("Dial: %v", err)
					return
				}
				err = c.Call(t.Context(), "org.example.test.Nothing", nil, nil)
				_ = c.Close()
				wire, isWire := errors.AsType[*Error](err)
				connect, isConnect := errors.AsType[*ConnectError](err)
				mu.Lock()
				switch {
				case err == nil:
					served++
				case isWire && wire.Name == errBusy, isConnect && connect.Step == StepRefused:
					busy++
				default:
					t.Errorf("Call: %v", err)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if served == 0 || served+busy != 10_000 {
		t.Errorf("%d served, %d told to come later", served, busy)
	}
	if err := dialTest(t, target).Call(t.Context(), "org.example.test.Nothing", nil, nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// Clients that push overlapping sets while others list.
func TestManyClients(t *testing.T) {
	s, _ := testServer()
	target := serveUnix(t, s)
	var wg sync.WaitGroup
	for i := range 8 {
		c := Credentials{Client: dialTest(t, target)}
		wg.Go(func() {
			for range 50 {
				v := value(strings.Repeat("abcdefgh"[i:i+1], 100<<(i%4)))
				if _, err := c.Apply(t.Context(), &ApplyParams{Set: []Credential{{Name: "shared", Value: v}}}); err != nil {
					t.Errorf("Apply: %v", err)
				}
				if r, err := c.List(t.Context()); err != nil || len(r.Entries) != 1 {
					t.Errorf("List = %+v, %v", r, err)
				}
			}
		})
	}
	wg.Wait()
}

// A server that is shut down under load leaves nothing behind: see TestMain.
func TestShutdownUnderLoad(t *testing.T) {
	for range 20 {
		s, _ := testServer()
		target := serveUnix(t, s)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for {
					c, err := Dial(t.Context(), target)
					if err != nil {
						return
					}
					for range 5 {
						if err = c.Call(t.Context(), "org.example.test.Count", nil, nil); err != nil && !errors.As(err, new(*Error)) {
							break
						}
					}
					_ = c.Close()
				}
			})
		}
		<-time.After(5 * time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown = %v", err)
		}
		cancel()
		wg.Wait()
	}
}
