package vsockrpc

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
)

// A call that takes its time holds no large message meanwhile, and still learns
// that its caller has gone.
func TestForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const calls = largeMessages + 2
		begun, ended := 0, 0
		hold := Interface{
			Name: "org.example.hold", Description: "interface org.example.hold\nmethod Hold(s: string) -> ()\n",
			Methods: map[string]Handler{"Hold": func(ctx context.Context, call *Call) error {
				var s string
				d := call.Params()
				if err := d.Decode(decodeFunc(func(d *Decoder) { d.Object(NewFields("s"), func(string) { s = d.String(MessageLimit) }) })); err != nil {
					return err
				}
				begun++
				message := call.conn.frames.buf[call.conn.frames.start:call.conn.frames.next]
				call.Forget()
				for _, b := range message {
					if b != 0 {
						t.Error("the message is not overwritten")
						break
					}
				}
				if len(s) != 2*smallBuffer || strings.Trim(s, "x") != "" {
					t.Error("what was decoded changed")
				}
				if n := len(call.conn.frames.buf); n > smallBuffer {
					t.Errorf("%d bytes are still held", n)
				}
				<-ctx.Done()
				ended++
				return ctx.Err()
			}},
		}
		s, _ := newServer(hold)
		l := serve(t, s)
		var conns []net.Conn
		for i := range calls {
			c := l.dial()
			conns = append(conns, c)
			go func() {
				message := `{"more":true,"method":"org.example.hold.Hold","parameters":{"s":"` + strings.Repeat("x", 2*smallBuffer) + `"}}` + "\x00"
				if _, err := io.WriteString(c, message); err != nil {
					t.Errorf("writing a call: %v", err)
				}
			}()
			synctest.Wait()
			if begun != i+1 {
				t.Errorf("%d calls are served, want %d", begun, i+1)
			}
		}
		for i, c := range conns {
			_ = c.Close()
			synctest.Wait()
			if ended != i+1 {
				t.Errorf("%d calls have ended, want %d", ended, i+1)
			}
		}
	})
}

type decodeFunc func(*Decoder)

func (f decodeFunc) DecodeFrom(d *Decoder) { f(d) }
