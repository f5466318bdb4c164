package vsockrpc

import (
	"bytes"
	"context"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// benchServer takes sets and forgets them.
func benchServer() *Server {
	return &Server{Authorize: allowAll, Interfaces: []Interface{{Name: CredentialsInterface, Methods: map[string]Handler{
		"Apply": func(_ context.Context, call *Call) error {
			var p ApplyParams
			if err := call.Decode(&p); err != nil {
				return err
			}
			p.Wipe()
			return call.Reply(&ApplyResult{Generation: 1, Installed: []string{"api-key"}})
		},
		"Rollback": func(_ context.Context, call *Call) error { return call.Reply(&RollbackResult{}) },
	}}}}
}

// benchEcho answers each message of a Unix socket with as many bytes as an
// Apply is answered with, and does nothing else: the floor.
func benchEcho(b *testing.B, size int) net.Conn {
	b.Helper()
	path := filepath.Join(b.TempDir(), "echo")
	l, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		buf := make([]byte, size)
		for {
			if _, err := io.ReadFull(c, buf); err != nil {
				return
			}
			if _, err := c.Write(buf[:100]); err != nil {
				return
			}
		}
	})
	c, err := net.Dial("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = c.Close()
		_ = l.Close()
		wg.Wait()
	})
	return c
}

func BenchmarkRoundTrip(b *testing.B) {
	c := Credentials{Client: dialTest(b, serveUnix(b, benchServer()))}
	for b.Loop() {
		if _, err := c.Rollback(b.Context(), &RollbackParams{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkApply(b *testing.B) {
	for name, size := range map[string]int{"1KiB": 1 << 10, "1MiB": 1 << 20} {
		v := value(strings.Repeat("\xA5", size))
		var e Encoder
		encodeCall(&e, MethodApply, &ApplyParams{Set: []Credential{{Name: "api-key", Revision: "1", Value: v}}}, false, false)
		b.Run(name, func(b *testing.B) {
			c := Credentials{Client: dialTest(b, serveUnix(b, benchServer()))}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Apply(b.Context(), &ApplyParams{Set: []Credential{{Name: "api-key", Revision: "1", Value: v}}}); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/bare", func(b *testing.B) {
			c := benchEcho(b, len(e.buf))
			reply := make([]byte, 100)
			b.SetBytes(int64(size))
			for b.Loop() {
				if _, err := c.Write(e.buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, reply); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkDecode(b *testing.B) {
	for name, size := range map[string]int{"1KiB": 1 << 10, "1MiB": 1 << 20} {
		var e Encoder
		encodeCall(&e, MethodApply, &ApplyParams{Set: []Credential{{Name: "api-key", Value: value(strings.Repeat("\xA5", size))}}}, false, false)
		msg := bytes.TrimSuffix(e.buf, []byte{0})
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				m, err := decodeCall(msg)
				if err != nil {
					b.Fatal(err)
				}
				var p ApplyParams
				if err := m.parameters.Decode(&p); err != nil {
					b.Fatal(err)
				}
				p.Wipe()
			}
		})
	}
}
