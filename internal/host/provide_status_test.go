package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/host/hosttest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// statusOnly is a provider of which only the status is used.
func statusOnly() *Provider {
	p := &Provider{Name: "web", Log: slog.New(slog.DiscardHandler), changed: make(chan struct{})}
	p.status.Applies = noApplies()
	return p
}

// watchStatus has somebody watch the status in a bubble, and returns what he read
// so far, in words.
func watchStatus(t *testing.T, p *Provider, heartbeat time.Duration) func() string {
	t.Helper()
	n := &network{}
	n.serve("local", func(l net.Listener) func() {
		s := &vsockrpc.Server{
			Authorize:  func(vsockrpc.Peer) error { return nil },
			Interfaces: []vsockrpc.Interface{{Name: vsockrpc.ProviderInterface, Methods: map[string]vsockrpc.Handler{"Watch": p.watch}}},
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = s.Serve(context.WithoutCancel(t.Context()), l)
		}()
		return func() {
			s.Close()
			<-done
		}
	})
	c, err := n.dial(t.Context(), vsockrpc.Target{Path: "local"})
	must(t, err)
	words := make(chan string, 1000)
	done := make(chan struct{})
	begun := time.Now()
	go func() {
		defer close(done)
		for r, err := range (vsockrpc.Provider{Client: c}).Watch(context.WithoutCancel(t.Context()), heartbeat) {
			word := fmt.Sprintf("%v:", time.Since(begun))
			switch {
			case err != nil:
				return
			case r.Status == nil:
				word += "beat"
			default:
				if word += r.Status.State; r.Status.Report != nil {
					word += fmt.Sprint(r.Status.Report.Generation)
				}
			}
			words <- word
		}
	}()
	t.Cleanup(func() {
		must(t, c.Close())
		<-done
		n.leave("local")
	})
	return func() string {
		synctest.Wait()
		var all []string
		for {
			select {
			case w := <-words:
				all = append(all, w)
				continue
			default:
			}
			return strings.Join(all, " ")
		}
	}
}

func TestProviderTells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := statusOnly()
		p.set(vsockrpc.GuestWaiting, "")
		a, b := watchStatus(t, p, 0), watchStatus(t, p, time.Minute)
		read := func(what, wantA, wantB string) {
			t.Helper()
			if gotA, gotB := a(), b(); gotA != wantA || gotB != wantB {
				t.Errorf("%s: %q and %q, want %q and %q", what, gotA, gotB, wantA, wantB)
			}
		}
		read("at once", "0s:waiting", "0s:waiting")
		later(10 * time.Second)
		read("nothing new", "", "")
		// Many changes are told twice a second, and the last one wins.
		p.mu.Lock()
		p.status.State = vsockrpc.GuestInForce // with the first report, and not before it
		p.mu.Unlock()
		for i := range 10 {
			p.heard(&vsockrpc.Report{Generation: int64(i)}, "")
			later(20 * time.Millisecond)
		}
		later(time.Second)
		read("many changes", "10s:inForce0 10.5s:inForce9", "10s:inForce0 10.5s:inForce9")
		// The same again is nothing new, and neither is a sign of life or the time.
		p.set(vsockrpc.GuestInForce, "")
		p.heard(nil, "")
		p.heard(&vsockrpc.Report{Generation: 9, Time: "later", Uptime: 7}, "")
		later(time.Second)
		read("the same", "", "")
		later(4 * time.Second)
		read("a heartbeat", "15s:beat", "")
		later(15 * time.Second)
		read("heartbeats", "30s:beat", "30s:beat")
		if s, _ := p.told(); s.Report.Uptime != 7 {
			t.Error("the status has not the last report")
		}
		p.count(&Result{}, time.Second)
		later(time.Second)
		read("a set", "31.2s:inForce9", "31.2s:inForce9")
	})
}

func TestProviderClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := statusOnly()
		clock := func(ahead time.Duration) string { return time.Now().Add(ahead).Format(time.RFC3339Nano) }
		for i, c := range []struct {
			report  bool
			clock   string
			want    string
			changed bool
		}{
			{true, "", "unknown", true}, // the first contact
			{true, clock(0), "0", true},
			{false, clock(900 * time.Millisecond), "900", false},
			{false, "", "900", false},
			{false, clock(1100 * time.Millisecond), "1100", true},
			{false, clock(200 * time.Millisecond), "200", false},
			{false, "\x1b", "unknown", true},
			{false, clock(time.Hour), "3600000", true},
			{false, "9999-12-31T23:59:59Z", "9223372036854", true},
			{true, "", "unknown", true},
		} {
			_, changed := p.told()
			var r *vsockrpc.Report
			if c.report {
				r = &vsockrpc.Report{Time: c.clock}
			}
			p.heard(r, c.clock)
			s, now := p.told()
			got := "unknown"
			if s.ClockOffset != nil {
				got = fmt.Sprint(*s.ClockOffset)
			}
			if got != c.want || (now != changed) != c.changed {
				t.Errorf("%d: after %q the offset is %s, changed %v, want %s, %v", i, c.clock, got, now != changed, c.want, c.changed)
			}
		}
	})
}

func TestProviderCounts(t *testing.T) {
	p := statusOnly()
	before, _ := p.told()
	refusals := []credential.Refusal{{Name: "x"}}
	for _, c := range []struct {
		r    Result
		took time.Duration
	}{
		{Result{}, 10 * time.Millisecond},
		{Result{Refusals: refusals}, 10*time.Millisecond + 1},
		{Result{Error: &Failure{Code: CodeRefreshFailed}}, time.Minute},
		{Result{Error: &Failure{Code: CodeRefreshFailed}, Refusals: refusals}, 0},
		{Result{Error: &Failure{Code: CodeRolledBack}}, time.Hour},
		{Result{Error: &Failure{Code: CodeNoListener}}, 0},
		{Result{Error: &Failure{Code: CodeGateInProgress}}, 0},
	} {
		p.count(&c.r, c.took)
	}
	s, _ := p.told()
	a := s.Applies
	want := fmt.Sprint([]int64{7, 2, 1, 2, (time.Hour + time.Minute + 20*time.Millisecond).Microseconds()})
	if got := fmt.Sprint([]int64{a.Count, a.Refused, a.RolledBack, a.Failed, a.Sum}); got != want {
		t.Errorf("counted %s, want %s", got, want)
	}
	for i, b := range a.Buckets {
		want := map[int64]int64{10: 4, 60000: 6}[b.LE]
		if want == 0 {
			want = 5
		}
		if b.LE != applyBounds[i] || b.Count != want || before.Applies.Buckets[i].Count != 0 {
			t.Errorf("bucket %d is %+v, want %d up to %d; and was %+v before", i, b, want, applyBounds[i], before.Applies.Buckets[i])
		}
	}
}

func TestStatusLine(t *testing.T) {
	degraded := healthy(func(r *vsockrpc.Report) {
		r.Verdict = vsockrpc.VerdictDegraded
		r.Reasons = []vsockrpc.Reason{{Code: "unitFailed", Unit: "nginx.service"}, {Code: "a"}, {Code: "b"}}
	})
	hostile := healthy(func(r *vsockrpc.Report) {
		r.Verdict = vsockrpc.VerdictFailing
		r.Reasons = []vsockrpc.Reason{{Code: hosttest.Escapes + "\n", Unit: strings.Repeat(hosttest.Escapes, 1000)}}
	})
	word := healthy(func(r *vsockrpc.Report) { r.Verdict = hosttest.Escapes })
	for _, c := range []struct {
		state, problem string
		report         *vsockrpc.Report
		want           string
	}{
		{vsockrpc.GuestWaiting, "", degraded, "web: the guest does not answer yet"},
		{vsockrpc.GuestInForce, "", nil, "web: the set is in force"},
		{vsockrpc.GuestInForce, "", healthy(), "web: the set is in force"},
		{vsockrpc.GuestInForce, "", word, "web: the set is in force"},
		{vsockrpc.GuestInForce, "", degraded, "web: the set is in force; the guest is degraded: unitFailed nginx.service and 2 more"},
		{vsockrpc.GuestInForce, "x was not refreshed", degraded, "web: the set is in force: x was not refreshed; the guest is degraded: unitFailed nginx.service and 2 more"},
		{vsockrpc.GuestRolledBack, "x", degraded, "web: the set was rolled back by its gate: x"},
		{vsockrpc.GuestInForce, "", hostile, `web: the set is in force; the guest is failing: \x1b]0;owned\a`},
	} {
		got := statusLine(&vsockrpc.ProviderStatus{Name: "web", State: c.state, Problem: c.problem, LastContact: now(), Report: c.report})
		if c.report == hostile && strings.HasPrefix(got, c.want) && len(got) < 400 {
			got = strings.TrimRightFunc(got, func(r rune) bool { return !unicode.IsControl(r) && r != '\u202e' })
			if got != "" {
				t.Errorf("the line is %q, want nothing raw", got)
			}
			continue
		}
		if got != c.want {
			t.Errorf("statusLine = %q, want %q", got, c.want)
		}
	}
}

// The line is told at most twice a second, and the last one wins.
func TestProviderAnnounces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := statusOnly()
		p.set(vsockrpc.GuestWaiting, "")
		var lines []string
		begun := time.Now()
		p.Status = func(line string) { lines = append(lines, fmt.Sprintf("%v %s", time.Since(begun), line)) }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			p.announce(ctx)
		}()
		synctest.Wait()
		p.set(vsockrpc.GuestApplying, "")
		for i := range 1000 {
			p.set(vsockrpc.GuestInForce, "")
			p.heard(healthy(func(r *vsockrpc.Report) {
				r.Verdict = []string{vsockrpc.VerdictFailing, vsockrpc.VerdictDegraded}[i%2]
			}), "")
			later(time.Millisecond)
		}
		later(time.Hour)
		cancel()
		<-done
		if len(lines) < 2 || len(lines) > 4 || !strings.HasPrefix(lines[0], "0s web: the guest does not answer yet") || !strings.HasSuffix(lines[len(lines)-1], "the guest is degraded") {
			t.Errorf("it told %q, want no more than four lines, and the last state last", lines)
		}
	})
}

// watchLocal asks at the provider's own socket.
func (r *rig) watchLocal(until func(*vsockrpc.ProviderStatus) bool) *vsockrpc.ProviderStatus {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	c := dialTest(r.t, filepath.Join(r.dir, "local"))
	defer c.Close()
	for reply, err := range (vsockrpc.Provider{Client: c}).Watch(ctx, time.Second) {
		must(r.t, err)
		if reply.Status != nil && until(reply.Status) {
			return reply.Status
		}
	}
	return nil
}

// What the guest says of itself is told to whoever watches, and nothing is handed
// over for it.
func TestProviderPassesOn(t *testing.T) {
	r := newRig(t, "a=1").boot().provide()
	r.is(vsockrpc.GuestInForce)
	verdict := func(want string) func(*vsockrpc.ProviderStatus) bool {
		return func(s *vsockrpc.ProviderStatus) bool { return s.Report != nil && s.Report.Verdict == want }
	}
	s := r.watchLocal(verdict(vsockrpc.VerdictHealthy))
	if s.ClockOffset == nil || s.Applies.Count != 1 || s.Trimmed {
		t.Errorf("the status is %+v", s)
	}
	r.guest.Judge(vsockrpc.VerdictDegraded)
	r.watchLocal(verdict(vsockrpc.VerdictDegraded)) // it is watched
	r.guest.Judge(vsockrpc.VerdictFailing, vsockrpc.Reason{Code: "diskFull", Verdict: vsockrpc.VerdictFailing})
	r.watchLocal(verdict(vsockrpc.VerdictFailing))
	await(t, "the line", func() bool {
		return strings.Contains(r.told.all(), "web: the set is in force; the guest is failing: diskFull")
	})
	r.guest.Judge(vsockrpc.VerdictHealthy)
	r.watchLocal(verdict(vsockrpc.VerdictHealthy))
	r.applied(1)

	bell := dialTest(t, filepath.Join(r.dir, "bell"))
	defer bell.Close()
	for _, err := range (vsockrpc.Provider{Client: bell}).Watch(t.Context(), 0) {
		if e, ok := errors.AsType[*vsockrpc.Error](err); !ok || e.Name != "org.varlink.service.MethodNotImplemented" {
			t.Errorf("Watch at the doorbell = %v, want that it is not there", err)
		}
	}
}

// Whoever begins to watch learns whether the guest is there still: it is asked.
func TestProviderLooksAnew(t *testing.T) {
	r := newRig(t, "a=1").boot().provide()
	r.is(vsockrpc.GuestInForce)
	begun := time.Now()
	c := dialTest(t, filepath.Join(r.dir, "local"))
	defer c.Close()
	for reply, err := range (vsockrpc.Provider{Client: c}).Watch(t.Context(), time.Second) {
		must(t, err)
		contact := reply.LastContact
		if reply.Status != nil {
			contact = reply.Status.LastContact
		}
		if at, err := time.Parse(time.RFC3339, contact); err == nil && at.After(begun) {
			break
		}
		if time.Since(begun) > watchHeartbeat/4 { // the guest gives a sign by itself later
			t.Fatal("the guest was not asked")
		}
	}
	r.applied(1)
}

// A guest that hangs up after each answer is called every two seconds at most,
// however often it rings.
func TestProviderBrief(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		n.serve("guest", guest(func(_ context.Context, tell func(vsockrpc.WatchReply) error) error {
			_ = tell(vsockrpc.WatchReply{Report: healthy()})
			return errors.New("enough")
		}))
		defer n.leave("guest")
		p := statusOnly()
		p.Target, p.dial = vsockrpc.Target{Path: "guest"}, n.dial
		p.wake, p.reach = make(chan struct{}, 1), make(chan struct{}, 1)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			p.watchGuest(ctx)
		}()
		for range 600 {
			poke(p.reach)
			later(100 * time.Millisecond)
		}
		cancel()
		<-done
		synctest.Wait() // for the server to accept the next one
		if dials := n.at("guest").dials; dials < 20 || dials > 35 {
			t.Errorf("it was called %d times in a minute, want about 30", dials)
		}
	})
}

// Reports without an end are bounded, in size and in number.
func TestProviderFlooded(t *testing.T) {
	for kind, trimmed := range map[string]bool{"reports": false, "large": true} {
		r := newRig(t, "a=1")
		g, err := hosttest.Hostile(r.dir, "g", kind)
		must(t, err)
		r.provide()
		s := r.watchLocal(func(s *vsockrpc.ProviderStatus) bool { return s.Report != nil })
		if s.Trimmed != trimmed || s.Report.Size() > maxKept {
			t.Errorf("%s: trimmed %v, a report of %d bytes", kind, s.Trimmed, s.Report.Size())
		}
		r.stop()
		g.Close()
	}
}

// That a unit was not refreshed holds until a report has that all of them run on
// what is in force.
func TestProviderRefreshed(t *testing.T) {
	current := vsockrpc.Consumer{Unit: "a.service", Loaded: vsockrpc.LoadedInForce}
	stale := vsockrpc.Consumer{Unit: "a.service", Loaded: vsockrpc.LoadedPrevious, Stale: true}
	ended := vsockrpc.Consumer{Unit: "a.service", Loaded: vsockrpc.LoadedNone}
	of := func(source credential.Source, consumers ...vsockrpc.Consumer) vsockrpc.Entry {
		return vsockrpc.Entry{Name: "a", Source: source, Consumers: consumers}
	}
	for _, c := range []struct {
		what    string
		state   string
		report  vsockrpc.Report
		cleared bool
	}{
		{"current", vsockrpc.GuestInForce, vsockrpc.Report{BootID: "b", Generation: 5, Entries: []vsockrpc.Entry{of("provider", current, current)}}, true},
		{"another's stale", vsockrpc.GuestInForce, vsockrpc.Report{BootID: "b", Generation: 6, Entries: []vsockrpc.Entry{of("provider", current), of("push", stale)}}, true},
		{"stale", vsockrpc.GuestInForce, vsockrpc.Report{BootID: "b", Generation: 5, Entries: []vsockrpc.Entry{of("provider", current, stale)}}, false},
		{"not running", vsockrpc.GuestInForce, vsockrpc.Report{BootID: "b", Generation: 5, Entries: []vsockrpc.Entry{of("provider", ended)}}, false},
		{"not known", vsockrpc.GuestInForce, vsockrpc.Report{BootID: "b", Generation: 5, Entries: []vsockrpc.Entry{of("provider")}}, false},
		{"before", vsockrpc.GuestInForce, vsockrpc.Report{BootID: "b", Generation: 4, Entries: []vsockrpc.Entry{of("provider", current)}}, false},
		{"another boot", vsockrpc.GuestInForce, vsockrpc.Report{BootID: "c", Generation: 5, Entries: []vsockrpc.Entry{of("provider", current)}}, false},
		{"applying", vsockrpc.GuestApplying, vsockrpc.Report{BootID: "b", Generation: 5, Entries: []vsockrpc.Entry{of("provider", current)}}, false},
	} {
		p := statusOnly()
		p.done(outcome{bootID: "b", generation: 5, state: vsockrpc.GuestInForce, problem: "a.service was not refreshed"})
		if c.state != vsockrpc.GuestInForce {
			p.set(c.state, "a.service was not refreshed")
		}
		p.refreshed(&c.report)
		s, _ := p.told()
		if (s.Problem == "") != c.cleared || (p.lastOutcome().problem == "") != c.cleared || s.State != c.state {
			t.Errorf("%s: %s with problem %q, want it cleared: %v", c.what, s.State, s.Problem, c.cleared)
		}
	}
}
