package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/guestagent/guestagent/consumer"
	"github.com/guestagent/guestagent/health"
	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// reasons are the report's as "CODE UNIT CREDENTIAL".
func reasonsOf(r *vsockrpc.Report) []string {
	var list []string
	for _, n := range r.Reasons {
		list = append(list, strings.TrimRight(n.Code+" "+strings.TrimSpace(n.Unit+" "+n.Credential), " "))
	}
	return list
}

// wellGuest is one whose verdict is healthy.
func wellGuest(t *testing.T) (*guest, *fakePID1) {
	g := newGuest(t)
	g.imports()
	for path, content := range map[string]string{
		"proc/meminfo":         "MemTotal:        2048 kB\nMemAvailable:    1024 kB\n",
		"proc/loadavg":         "0.25 0.50 1.00 1/100 1234\n",
		"proc/uptime":          "100.50 10.00\n",
		"proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",

		"proc/sys/kernel/hostname": "web\n",
	} {
		g.write(path, content)
	}
	return g, g.systemd()
}

// A watching is a watch that waits for reports.
type watching struct {
	t     testing.TB
	turns <-chan turn
	leave func()
	last  *vsockrpc.Report
}

type turn struct {
	reply vsockrpc.WatchReply
	err   error
}

func (s *served) watch() *watching {
	s.t.Helper()
	ctx, leave := context.WithCancel(s.t.Context())
	s.t.Cleanup(leave)
	turns := make(chan turn)
	c := s.client().Client
	go func() {
		defer close(turns)
		for reply, err := range (vsockrpc.Health{Client: c}).Watch(ctx, vsockrpc.MinWatchHeartbeat) {
			select {
			case turns <- turn{reply, err}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return &watching{t: s.t, turns: turns, leave: leave}
}

// until goes on until the report is as it should be. What comes before is passed
// over.
func (w *watching) until(verdict string, reasons ...string) *vsockrpc.Report {
	w.t.Helper()
	deadline := time.After(time.Minute)
	for {
		if r := w.last; r != nil && r.Verdict == verdict && slices.Equal(reasonsOf(r), reasons) {
			return r
		}
		select {
		case x, ok := <-w.turns:
			if !ok || x.err != nil {
				w.t.Fatalf("the watch ended with %v", x.err)
			}
			if x.reply.Report != nil {
				w.last = x.reply.Report
			}
		case <-deadline:
			w.t.Fatalf("it is not %s for %q, but %s for %q", verdict, reasons, w.last.Verdict, reasonsOf(w.last))
		}
	}
}

// TestHealth has each change of the guest told by the watch, and taken back.
func TestHealth(t *testing.T) {
	g, pid1 := wellGuest(t)
	g.write("etc/hostname", "guest")
	old, waits := service("old.service", "a"), service("waits.service")
	pid1.units["old.service"], pid1.units["waits.service"] = old, waits
	s := g.serve(0)
	c := s.client()
	w := s.watch()
	// What this test's folder lies on.
	const here = "storeSwappable"
	r := w.until(vsockrpc.VerdictDegraded, here)
	if r.Hostname != "web" || r.Uptime != 100 || r.Load.Load15 != 100 || r.Memory.Available != 1<<20 || r.Systemd.State != "running" || r.Pressure.Memory == nil ||
		r.Protocol != vsockrpc.Protocol || len(r.Unknown) > 0 {
		t.Errorf("the report = %+v", r)
	}

	pid1.signal(func(s *consumer.System) { s.State = "starting" })
	w.until(vsockrpc.VerdictStarting, "systemStarting", here)
	pid1.signal(func(s *consumer.System) {
		s.State = "degraded"
		s.Failed = []consumer.FailedUnit{{Unit: "guestagent.socket", Result: "resources"}, {Unit: "web.service", Result: "exit-code", SinceUSec: 1_700_000_000_000_000}}
	})
	r = w.until(vsockrpc.VerdictDegraded, "unitFailed web.service", here)
	if n := r.Reasons[0]; n.Since != "2023-11-14T22:13:20Z" || n.Hint != "systemctl status web.service" || n.Verdict != vsockrpc.VerdictDegraded || !strings.Contains(n.Detail, "exit-code") {
		t.Errorf("the reason = %+v", n)
	}
	if len(r.Systemd.Failed) != 2 {
		t.Errorf("the failed units = %+v, want both", r.Systemd.Failed)
	}
	pid1.signal(func(s *consumer.System) { s.Failed = nil })
	w.until(vsockrpc.VerdictDegraded, here)

	// The unit has been running for longer than the credential is there.
	if _, err := c.Apply(t.Context(), apply(value("a", "1"))); err != nil {
		t.Fatal(err)
	}
	r = w.until(vsockrpc.VerdictDegraded, "consumerStale old.service a", here)
	if n := r.Reasons[0]; n.Hint != "guestctl refresh VM a" || n.Since != r.Entries[0].InstalledAt {
		t.Errorf("the reason = %+v", n)
	}
	if _, err := c.Refresh(t.Context(), &vsockrpc.RefreshParams{}); err != nil {
		t.Fatal(err)
	}
	pid1.signal(func(*consumer.System) {})
	w.until(vsockrpc.VerdictDegraded, here)

	g.write("etc/credstore/a", "other") // in a folder that was not there
	w.until(vsockrpc.VerdictDegraded, "shadowed a", here)
	g.write(pathStore+"/b", "not ours")
	if _, err := c.Apply(t.Context(), apply(value("c", "1"))); err != nil {
		t.Fatal(err)
	}
	w.until(vsockrpc.VerdictDegraded, "shadowed a", here)
	if err := os.Remove(filepath.Join(g.root, "etc/credstore/a")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(g.root, pathStore, "c")); err != nil {
		t.Fatal(err)
	}
	w.until(vsockrpc.VerdictDegraded, "missing c", here)

	// A PID 1 that has executed itself anew is followed again.
	pid1.hangUp()
	for pid1.signal(func(s *consumer.System) { s.State = "stopping" }); ; {
		pid1.mu.Lock()
		again := len(pid1.followers) > 0
		pid1.mu.Unlock()
		if again {
			break
		}
	}
	w.until(vsockrpc.VerdictDegraded, "systemStopping", "missing c", here)
}

// A PID 1 that does not answer is one part of the report, and costs no other.
func TestHealthWithoutSystemd(t *testing.T) {
	g, pid1 := wellGuest(t)
	pid1.stuck = errors.New("asking: \x1b[31m")
	s := g.serve(0)
	get := func() *vsockrpc.Report {
		t.Helper()
		r, err := (vsockrpc.Health{Client: s.client().Client}).Get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for range 2 {
		r := get()
		if r.Verdict != vsockrpc.VerdictDegraded || r.Systemd != nil || !slices.Contains(r.Unknown, "systemd") || r.Memory == nil || !slices.Contains(reasonsOf(r), "systemdUnknown") {
			t.Errorf("the report = %+v", r)
		}
		for _, n := range r.Reasons {
			if strings.Contains(n.Detail, "\x1b") {
				t.Errorf("the reason is raw: %q", n.Detail)
			}
		}
		pid1.mu.Lock()
		pid1.gone = errors.New("no such file")
		pid1.mu.Unlock()
	}
	pid1.mu.Lock()
	pid1.gone, pid1.stuck = nil, nil
	pid1.mu.Unlock()
	if r := get(); r.Systemd == nil || r.Systemd.Version != "262" || len(r.Unknown) > 0 {
		t.Errorf("the report = %+v", r)
	}
}

// lostConn is a connection to PID 1 that has ended.
type lostConn struct{ systemd }

func (lostConn) System(context.Context) (consumer.System, error) {
	return consumer.System{}, fmt.Errorf("reading the state of systemd: %w", consumer.ErrLost)
}

// A daemon-reexec while a report is made is none of its news.
func TestHealthReexec(t *testing.T) {
	for _, tt := range []struct {
		name    string
		refused int // times
		ok      bool
	}{
		{"at once", 0, true},
		{"by and by", 5, true},
		{"not in time", 1 << 20, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGuest(t)
				pid1 := g.systemd(service("old.service", "a"))
				dial, refused := g.a.dialSystemd, errors.New("connection refused")
				g.a.dialSystemd = func(ctx context.Context) (systemd, error) {
					if tt.refused--; tt.refused >= 0 {
						return nil, refused
					}
					return dial(ctx)
				}
				u := g.a.askUnits(t.Context(), &followed{bus: lostConn{}, own: "other.service"}, []vsockrpc.Entry{{Name: "a"}})
				if !tt.ok {
					if !errors.Is(u.err, refused) {
						t.Errorf("askUnits: %v, want %v", u.err, refused)
					}
					return
				}
				if u.err != nil || u.system.State != "running" || len(u.consumers) != 1 || u.own != pid1.own || pid1.conns != 0 {
					t.Errorf("askUnits = %+v, with %d connections left", u, pid1.conns)
				}
			})
		})
	}
}

// What somebody configures is what is judged.
func TestHealthRules(t *testing.T) {
	g, pid1 := wellGuest(t)
	g.write(pathConfig, `{"health": {"ignoreUnits": ["web*"], "disk": {"degraded": 1, "failing": 101}, "memory": {"degraded": 5, "failing": 101}}}`)
	g.write("proc/pressure/memory", "some avg10=6.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=100.00 avg60=0.00 avg300=0.00 total=0\n")
	pid1.system.Failed = []consumer.FailedUnit{{Unit: "web.service"}, {Unit: "db.service"}}
	s := g.serve(0)
	r, err := (vsockrpc.Health{Client: s.client().Client}).Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	codes := reasonsOf(r)
	if !slices.Contains(codes, "unitFailed db.service") || slices.Contains(codes, "unitFailed web.service") || !slices.Contains(codes, "memoryPressure") || r.Verdict != vsockrpc.VerdictDegraded {
		t.Errorf("%s: %v", r.Verdict, codes)
	}
}

// Several watches have one observer, which goes with the last of them; and
// another one begins afresh.
func TestHealthWatches(t *testing.T) {
	g, pid1 := wellGuest(t)
	s := g.serve(0)
	a, b := s.watch(), s.watch()
	a.until(vsockrpc.VerdictDegraded, "storeSwappable")
	b.until(vsockrpc.VerdictDegraded, "storeSwappable")
	pid1.mu.Lock()
	if n := len(pid1.followers); n > 1 {
		t.Errorf("%d connections follow PID 1, want 1", n)
	}
	pid1.mu.Unlock()
	a.leave()
	pid1.signal(func(s *consumer.System) { s.State = "stopping" })
	b.until(vsockrpc.VerdictDegraded, "systemStopping", "storeSwappable")
	b.leave()
	pid1.signal(func(s *consumer.System) { s.State = "running" })
	d := s.watch()
	d.until(vsockrpc.VerdictDegraded, "storeSwappable")
	pid1.signal(func(s *consumer.System) { s.State = "maintenance" })
	d.until(vsockrpc.VerdictFailing, "maintenance", "storeSwappable")
}

// `guestagent status` has the verdict of the agent that serves.
func TestAsk(t *testing.T) {
	g, pid1 := wellGuest(t)
	pid1.system.Failed = []consumer.FailedUnit{{Unit: "web.service", Result: "exit-code"}}
	r, err := g.a.Ask(t.Context())
	if err != nil || r.Verdict != "" || len(codes(r)) > 0 {
		t.Errorf("without an agent: %v, %+v", err, r)
	}
	s := g.serve(0)
	if err := os.MkdirAll(filepath.Join(g.root, "run/guestagent"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(s.target.Path, filepath.Join(g.root, pathLocalSocket)); err != nil {
		t.Fatal(err)
	}
	r, err = g.a.Ask(t.Context())
	if err != nil || r.Verdict != vsockrpc.VerdictDegraded || !slices.Equal(codes(r), []health.Code{health.UnitFailed}) || r.Reasons[0].Unit != "web.service" {
		t.Errorf("Ask = %v, %+v", err, r)
	}
	var b strings.Builder
	if err := r.WriteText(&b, ""); err != nil || !strings.Contains(b.String(), "the guest is degraded\n") {
		t.Errorf("the text is %q, %v", b.String(), err)
	}
	// A socket that nobody listens on.
	if err := os.Remove(filepath.Join(g.root, pathLocalSocket)); err != nil {
		t.Fatal(err)
	}
	g.write(pathLocalSocket, "")
	r, err = g.a.Ask(t.Context())
	if err != nil || r.Verdict != "" || !slices.Contains(codes(r), health.Unknown) {
		t.Errorf("with an agent that is gone: %v, %+v", err, r)
	}
}

// A report that is too large to be sent is told without those who load what they
// should have, and then without all.
func TestReportFits(t *testing.T) {
	report := func(stale bool) *vsockrpc.Report {
		r := &vsockrpc.Report{}
		for range 4096 {
			e := vsockrpc.Entry{Name: strings.Repeat("n", 250)}
			for i := range 4 {
				e.Consumers = append(e.Consumers, vsockrpc.Consumer{Unit: strings.Repeat("u", 250), Stale: stale || i == 0})
			}
			r.Entries = append(r.Entries, e)
		}
		return r
	}
	for _, tt := range []struct {
		stale bool
		want  int // consumers of each
	}{{false, 1}, {true, 0}} {
		r := fitting(report(tt.stale))
		if size := r.Size(); size > maxReportSize {
			t.Errorf("the report has %d bytes", size)
		}
		wantEqual(t, "unknown", r.Unknown, []string{partConsumers})
		for _, e := range r.Entries {
			if len(e.Consumers) != tt.want {
				t.Fatalf("%d consumers are left, want %d", len(e.Consumers), tt.want)
			}
		}
	}
	if r := fitting(&vsockrpc.Report{Entries: []vsockrpc.Entry{{Consumers: []vsockrpc.Consumer{{}}}}}); len(r.Unknown) > 0 || len(r.Entries[0].Consumers) != 1 {
		t.Errorf("a small report becomes %+v", r)
	}
}

// Who asks while a report is made waits for one other, however many they are.
func TestReportsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, pid1 := wellGuest(t)
		asked := 0
		dial := g.a.dialSystemd
		g.a.dialSystemd = func(ctx context.Context) (systemd, error) {
			pid1.mu.Lock()
			asked++
			pid1.mu.Unlock()
			<-ctx.Done() // it answers nobody
			return dial(ctx)
		}
		c := credentials{a: g.a, giving: new(atomic.Bool), changes: &changes{}}
		o := &observer{c: c, collecting: make(chan struct{}, 1), parts: &reportParts{c: c, collector: &health.Collector{Root: g.root}}}
		var wg sync.WaitGroup
		begin := time.Now()
		for range 20 {
			wg.Go(func() {
				if _, err := o.report(t.Context()); err != nil {
					t.Errorf("report: %v", err)
				}
			})
		}
		wg.Wait()
		if d := time.Since(begin); asked > 2 || d > 2*systemdTimeout {
			t.Errorf("PID 1 was asked %d times, for %v", asked, d)
		}
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() { _, _ = o.report(t.Context()) })
		synctest.Wait()
		cancel()
		if _, err := o.report(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("report of who has gone = %v", err)
		}
		wg.Wait()
	})
}

// What was refused is told once, by its refusal.
func TestAskRefused(t *testing.T) {
	r := Report{
		Verdict:  vsockrpc.VerdictDegraded,
		Refusals: []credential.Refusal{{Name: "a", Reason: credential.ReasonBadBase64, Detail: "why"}},
		Reasons:  []Reason{{Code: health.Refused, Detail: "a was refused"}, {Code: health.DiskLow, Detail: "/ is full"}},
	}
	var b strings.Builder
	if err := r.WriteText(&b, ""); err != nil {
		t.Fatal(err)
	}
	if want := "refused a: badBase64: why\ndiskLow: / is full\nthe guest is degraded\n"; !strings.HasPrefix(b.String(), want) {
		t.Errorf("the text is %q, want %q first", b.String(), want)
	}
}
