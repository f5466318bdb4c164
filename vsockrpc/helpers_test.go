package vsockrpc

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
)

// TestMain checks that no test leaves a goroutine or a file descriptor behind.
func TestMain(m *testing.M) {
	before := resources()
	code := m.Run()
	// The fuzzing engine keeps some of its own.
	if fuzz := flag.Lookup("test.fuzz"); code == 0 && fuzz.Value.String() == "" {
		var after [2]int
		for range 100 { // what ends needs a moment
			runtime.GC() // finalizers close what was left to them
			if after = resources(); after[0] <= before[0] && after[1] <= before[1] {
				break
			}
			<-time.After(20 * time.Millisecond)
		}
		if after[0] > before[0] || after[1] > before[1] {
			stacks := make([]byte, 1<<20)
			fmt.Fprintf(os.Stderr, "left behind: goroutines %d, was %d; descriptors %d, was %d\n%s\n",
				after[0], before[0], after[1], before[1], stacks[:runtime.Stack(stacks, true)])
			code = 1
		}
	}
	os.Exit(code)
}

// resources counts goroutines and file descriptors.
func resources() [2]int {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return [2]int{runtime.NumGoroutine(), 0}
	}
	// The poller takes some with its first socket, and keeps them.
	n := 0
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && !strings.HasPrefix(to, "anon_inode:") {
			n++
		}
	}
	return [2]int{runtime.NumGoroutine(), n}
}

// allowAll authorises everybody.
func allowAll(Peer) error { return nil }

// A pipeListener hands out ends of net.Pipe.
type pipeListener struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

var _ net.Listener = (*pipeListener)(nil)

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }

// dial connects to the listener.
func (l *pipeListener) dial() net.Conn { return l.dialAs(nil) }

// dialAs connects from an address.
func (l *pipeListener) dialAs(addr net.Addr) net.Conn {
	ours, theirs := net.Pipe()
	if addr != nil {
		theirs = addrConn{theirs, addr}
	}
	l.conns <- theirs
	return ours
}

// An addrConn is a connection that comes from where it says.
type addrConn struct {
	net.Conn
	addr net.Addr
}

func (c addrConn) RemoteAddr() net.Addr { return c.addr }

// serve runs the server on a listener of pipes until the test ends.
func serve(t testing.TB, s *Server) *pipeListener {
	t.Helper()
	l := newPipeListener()
	serveOn(t, s, l)
	return l
}

func serveOn(t testing.TB, s *Server, l net.Listener) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(context.Background(), l) }) //nolint:usetesting // it is ended below
	t.Cleanup(func() {
		s.Close()
		wg.Wait()
	})
}

// serveUnix runs the server on a Unix socket, and returns its target.
func serveUnix(t testing.TB, s *Server) Target {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, s, l)
	return Target{Scheme: SchemeUnix, Path: path}
}

func dialTest(t testing.TB, target Target) *Client {
	t.Helper()
	c, err := Dial(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// send writes s, in which a line's end stands for NUL.
func send(t testing.TB, c net.Conn, s string) {
	t.Helper()
	if _, err := c.Write([]byte(strings.ReplaceAll(s, "\n", "\x00"))); err != nil {
		t.Fatalf("writing: %v", err)
	}
}

// expect reads one message.
func expect(t testing.TB, c net.Conn, want string) {
	t.Helper()
	if got := readMessage(t, c); got != want {
		t.Errorf("the answer is %s, want %s", got, want)
	}
}

func readMessage(t testing.TB, c net.Conn) string {
	t.Helper()
	var b bytes.Buffer
	for {
		var one [1]byte
		if _, err := c.Read(one[:]); err != nil {
			t.Errorf("after %q: %v", b.String(), err)
			return ""
		}
		if one[0] == 0 {
			return b.String()
		}
		b.Write(one[:])
	}
}

// expectEnd reads to the end, and wants nothing before it.
func expectEnd(t testing.TB, c net.Conn) {
	t.Helper()
	if b, err := io.ReadAll(c); len(b) > 0 {
		t.Errorf("read %q, %v, want the end", b, err)
	}
}

// A logBuffer is a log that a test reads.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// testInterface has a method for every behaviour.
func testInterface() Interface {
	return Interface{
		Name:        "org.example.test",
		Description: "interface org.example.test\nmethod Echo(s: string) -> (s: string)\n",
		Methods: map[string]Handler{
			"Echo": func(_ context.Context, call *Call) error {
				d := call.Params()
				var s string
				d.Object(NewFields("s"), func(string) { s = d.String(1 << 20) })
				if err := d.End(); err != nil {
					return err
				}
				return call.Reply(EncodeFunc(func(e *Encoder) { e.String("s", s) }))
			},
			"Nothing": func(context.Context, *Call) error { return nil },
			"Count": func(ctx context.Context, call *Call) error {
				for i := range int64(3) {
					reply := EncodeFunc(func(e *Encoder) { e.Int("i", i) })
					if i == 2 {
						return call.Reply(reply)
					}
					if err := call.ReplyMore(reply); err != nil {
						return err
					}
				}
				return nil
			},
			"Stream": func(ctx context.Context, call *Call) error {
				if err := call.ReplyMore(nil); err != nil {
					return err
				}
				<-ctx.Done()
				return ctx.Err()
			},
			"Denied":   func(context.Context, *Call) error { return fmt.Errorf("no: %w", ErrPermissionDenied) },
			"Fail":     func(context.Context, *Call) error { return fmt.Errorf("reading the moon: %w", io.ErrUnexpectedEOF) },
			"Panic":    func(context.Context, *Call) error { panic("a panic that quotes " + marker) },
			"Index":    func(context.Context, *Call) error { return []error{}[len(os.Args)] },
			"Missing":  nil,
			"TwoLasts": func(_ context.Context, call *Call) error { _ = call.Reply(nil); return call.Reply(nil) },
			"Huge": func(_ context.Context, call *Call) error {
				return call.Reply(EncodeFunc(func(e *Encoder) { e.String("s", strings.Repeat("x", MessageLimit)) }))
			},
		},
	}
}

// fakeCredentials answers io.guestagent.Credentials from a map. The values go
// where only the test looks.
type fakeCredentials struct {
	mu         sync.Mutex
	generation int64
	values     map[string][]byte
}

func (f *fakeCredentials) iface() Interface {
	return Interface{Name: CredentialsInterface, Description: CredentialsDescription, Methods: map[string]Handler{
		"Apply": func(_ context.Context, call *Call) error {
			var p ApplyParams
			if err := call.Decode(&p); err != nil {
				return err
			}
			defer p.Wipe()
			f.mu.Lock()
			defer f.mu.Unlock()
			if p.ExpectedGeneration != nil && *p.ExpectedGeneration != f.generation {
				return &GenerationMismatchError{ExpectedGeneration: *p.ExpectedGeneration, Generation: f.generation}
			}
			r := ApplyResult{}
			for _, c := range p.Set {
				if c.Name == "foreign" {
					refusal := credential.Refusal{Name: c.Name, Source: cmp.Or(p.Source, credential.SourcePush), Reason: credential.ReasonForeign, Detail: "somebody's"}
					if !p.Partial {
						return &RefusedError{Refusals: []credential.Refusal{refusal}}
					}
					r.Refusals = append(r.Refusals, refusal)
					continue
				}
				f.values[c.Name] = bytes.Clone(c.Value.Bytes())
				r.Installed = append(r.Installed, c.Name)
			}
			f.generation++
			r.Generation = f.generation
			if p.Refresh == "" || p.Refresh == RefreshNone {
				return call.Reply(&r)
			}
			unit := Refreshed{Unit: "web.service", Action: ActionRestart, Result: ResultDone, State: "active (running)"}
			if call.More {
				for _, progress := range []Progress{
					{Phase: PhaseApplied}, {Phase: PhaseRefreshing, WaitingFor: []string{"web.service"}}, {Phase: PhaseRefreshing, Unit: &unit},
				} {
					if err := call.ReplyMore(&ApplyResult{Generation: f.generation, Progress: &progress}); err != nil {
						return err
					}
				}
			}
			if p.Gate > 0 {
				f.generation++
				unit.State = "failed (exit-code 1)"
				return &RolledBackError{Generation: f.generation, Units: []Refreshed{unit}, Problem: "web.service failed", Restored: true}
			}
			r.Units = []Refreshed{unit}
			return call.Reply(&r)
		},
		"List": func(_ context.Context, call *Call) error {
			var p ListParams
			if err := call.Decode(&p); err != nil {
				return err
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			r := ListResult{Generation: f.generation}
			if p.Consumers {
				r.ConsumersProblem = "there is no systemd"
			}
			for name, v := range f.values {
				r.Entries = append(r.Entries, Entry{
					Name: name, Revision: "r1", Size: int64(len(v)), Source: credential.SourcePush,
					InstalledAt: "2026-11-22T00:00:00Z", State: "inForce", Path: "/run/credstore/" + name,
				})
			}
			return call.Reply(&r)
		},
		"Remove": func(_ context.Context, call *Call) error {
			var p RemoveParams
			if err := call.Decode(&p); err != nil {
				return err
			}
			return call.Reply(&RemoveResult{Generation: 1, Removed: p.Names})
		},
		"Rollback": func(_ context.Context, call *Call) error {
			var p RollbackParams
			if err := call.Decode(&p); err != nil {
				return err
			}
			return &NoPreviousError{}
		},
		"Refresh": func(_ context.Context, call *Call) error {
			if err := call.Decode(&RefreshParams{}); err != nil {
				return err
			}
			return &NoSystemdError{Problem: "there is no systemd"}
		},
		"Retry": func(_ context.Context, call *Call) error {
			if err := call.Decode(&RetryParams{}); err != nil {
				return err
			}
			return &NothingRejectedError{}
		},
	}}
}

// testReport is what [fakeHealth] has first.
func testReport() *Report {
	return &Report{
		Version: "1.2.3", BootID: "b1", MachineID: "m1", Generation: 1,
		Reasons: []Reason{
			{Code: "providerUnreachable", Detail: "no answer", Hint: "start it", Verdict: VerdictFailing, Since: "2026-11-22T00:00:00Z"},
			{Code: "consumerStale", Detail: "it has the one before", Verdict: VerdictDegraded, Unit: "web.service", Credential: "cert"},
		},
		Provider: &ProviderState{Address: "vsock:2:1021", State: ProviderUnreachable, Since: "2026-11-22T00:00:00Z", Problem: "no answer"},
		Protocol: Protocol, Verdict: VerdictFailing, Time: "2026-11-22T00:00:02Z", Hostname: "web", Uptime: 7,
		Systemd: &SystemdState{Version: "257", State: "degraded", Failed: []FailedUnit{{Unit: "a.service", Result: "exit-code"}}, Jobs: 1},
		Waiting: []Waiting{{Unit: "b.service", Name: "key"}},
		Memory:  &Memory{Total: 1 << 30, Available: 1 << 29},
		Pressure: &Pressure{
			CPU: &Stall{Some10: 1, Some60: 2, Some300: 3}, Memory: &Stall{Full10: 4, Full60: 5, Full300: 6}, IO: &Stall{},
		},
		Disks:   []Disk{{Path: "/", Used: 2, Available: 1}, {Path: "/nix/store", Used: 3, ReadOnly: true}},
		Load:    &Load{Load1: 150, Load5: 7, Load15: 1},
		Unknown: []string{"jobs"},
	}
}

// fakeHealth answers io.guestagent.Health. A watch sees a heartbeat and a change,
// and then heartbeats.
func fakeHealth() Interface {
	return Interface{Name: HealthInterface, Description: HealthDescription, Methods: map[string]Handler{
		"Get": func(_ context.Context, call *Call) error {
			if err := call.DecodeNone(); err != nil {
				return err
			}
			return call.Reply(&GetResult{Report: testReport()})
		},
		"Watch": func(ctx context.Context, call *Call) error {
			var p WatchParams
			if err := call.Decode(&p); err != nil {
				return err
			}
			changed := &Report{Version: "1.2.3", BootID: "b1", MachineID: "m1", Generation: 2}
			for _, r := range []*Report{testReport(), nil, changed} {
				if err := call.ReplyMore(&WatchReply{Report: r}); err != nil {
					return err
				}
			}
			for {
				if err := wait(ctx, cmp.Or(p.Heartbeat, DefaultWatchHeartbeat)); err != nil {
					return err
				}
				if err := call.ReplyMore(&WatchReply{Time: "2026-11-22T00:00:03Z"}); err != nil {
					return err
				}
			}
		},
		"Ping": func(_ context.Context, call *Call) error {
			if err := call.DecodeNone(); err != nil {
				return err
			}
			return call.Reply(&PingResult{BootID: "b1", Generation: 1})
		},
	}}
}

// testStatus is what [fakeProvider] has.
func testStatus() *ProviderStatus {
	behind := int64(-1500)
	return &ProviderStatus{
		Name: "web1", Target: "vsock:7", State: GuestInForce, Since: "2026-11-22T00:00:01Z", LastContact: "2026-11-22T00:00:02Z",
		Report: &Report{
			Version: "1.2.3", BootID: "b1", MachineID: "m1", Generation: 2,
			Entries: []Entry{}, Refusals: []credential.Refusal{}, Reasons: []Reason{}, Verdict: VerdictHealthy,
		},
		Trimmed: true, ClockOffset: &behind,
		Applies: &Applies{Count: 4, Refused: 1, RolledBack: 1, Failed: 1, Sum: 5000, Buckets: []Bucket{{LE: 10, Count: 3}, {LE: 60000, Count: 4}}},
	}
}

// fakeProvider answers io.guestagent.Provider. The first ring is in vain. A watch
// sees a heartbeat and a change, and then nothing.
func fakeProvider() Interface {
	var rung atomic.Bool
	return Interface{Name: ProviderInterface, Description: ProviderDescription, Methods: map[string]Handler{
		"Ring": func(_ context.Context, call *Call) error {
			if err := call.DecodeNone(); err != nil {
				return err
			}
			if !rung.Swap(true) {
				return &UnavailableError{Problem: "the guest does not answer"}
			}
			return call.Reply(nil)
		},
		"Status": func(_ context.Context, call *Call) error {
			if err := call.DecodeNone(); err != nil {
				return err
			}
			return call.Reply(testStatus())
		},
		"Watch": func(ctx context.Context, call *Call) error {
			if err := call.Decode(&WatchParams{}); err != nil {
				return err
			}
			waiting := &ProviderStatus{Name: "web1", State: GuestWaiting}
			for _, r := range []ProviderWatchReply{{Status: waiting}, {LastContact: "2026-11-22T00:00:02Z"}, {Status: testStatus()}} {
				if err := call.ReplyMore(&r); err != nil {
					return err
				}
			}
			<-ctx.Done()
			return ctx.Err()
		},
	}}
}

// testServer has every interface and lets everybody in.
func testServer() (*Server, *fakeCredentials) {
	f := &fakeCredentials{values: map[string][]byte{}}
	return &Server{
		Vendor: "guestagent", Product: "guestagent", Version: "1.2.3", URL: "https://example.org/",
		Interfaces: []Interface{testInterface(), f.iface(), fakeHealth(), fakeProvider()}, Authorize: allowAll,
	}, f
}

func value(s string) secret.Value { return secret.New([]byte(s)) }

// marker is a secret that must not be seen anywhere.
const marker = "hunter2hunter2"
