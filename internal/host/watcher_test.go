package host

import (
	"cmp"
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/guestagent/guestagent/internal/host/hosttest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// A pipes is a listener of pipes, which can go and come back.
type pipes struct {
	conns chan net.Conn

	mu    sync.Mutex
	stop  func()
	dials int
}

func (l *pipes) Accept() (net.Conn, error) {
	c, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (l *pipes) Close() error   { return nil }
func (l *pipes) Addr() net.Addr { return &net.UnixAddr{Net: "pipe"} }

// A network is what a watcher dials, by path.
type network struct {
	mu    sync.Mutex
	paths map[string]*pipes
}

// serve has somebody listen there, until the network is left.
func (n *network) serve(path string, serve func(net.Listener) (stop func())) {
	l := n.at(path)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = make(chan net.Conn)
	end := serve(l)
	l.stop = func() {
		close(l.conns)
		l.conns = nil
		end()
	}
}

func (n *network) at(path string) *pipes {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.paths == nil {
		n.paths = map[string]*pipes{}
	}
	if n.paths[path] == nil {
		n.paths[path] = &pipes{}
	}
	return n.paths[path]
}

// leave has nobody listen there any more.
func (n *network) leave(path string) {
	l := n.at(path)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stop != nil {
		l.stop()
		l.stop = nil
	}
}

func (n *network) dial(_ context.Context, to vsockrpc.Target) (*vsockrpc.Client, error) {
	n.mu.Lock()
	l := n.paths[to.Path]
	n.mu.Unlock()
	if l == nil {
		return nil, &vsockrpc.ConnectError{Target: to, Step: vsockrpc.StepSocket, Err: errors.New("no such file")}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dials++
	if l.conns == nil {
		return nil, &vsockrpc.ConnectError{Target: to, Step: vsockrpc.StepListener, Err: errors.New("nobody")}
	}
	ours, theirs := net.Pipe()
	l.conns <- theirs
	return vsockrpc.NewClient(ours, 0), nil
}

// guest serves a guest that answers a watch by that.
func guest(watch func(ctx context.Context, tell func(vsockrpc.WatchReply) error) error) func(net.Listener) func() {
	return func(l net.Listener) func() {
		s := &vsockrpc.Server{
			Authorize: func(vsockrpc.Peer) error { return nil },
			Interfaces: []vsockrpc.Interface{{Name: vsockrpc.HealthInterface, Methods: map[string]vsockrpc.Handler{
				"Watch": func(ctx context.Context, call *vsockrpc.Call) error {
					return watch(ctx, func(r vsockrpc.WatchReply) error { return call.ReplyMore(&r) })
				},
			}}},
		}
		var wg sync.WaitGroup
		wg.Go(func() { _ = s.Serve(context.Background(), l) })
		return func() {
			s.Close()
			wg.Wait()
		}
	}
}

// beating tells a report, and then a heartbeat whenever it is time. Ahead is its
// clock.
func beating(r *vsockrpc.Report, every, ahead time.Duration) func(net.Listener) func() {
	return guest(func(ctx context.Context, tell func(vsockrpc.WatchReply) error) error {
		clock := func() string { return time.Now().Add(ahead).Format(time.RFC3339Nano) }
		first := *r
		first.Time = clock()
		err := tell(vsockrpc.WatchReply{Report: &first})
		for err == nil {
			if err = pausing(ctx, every); err == nil {
				err = tell(vsockrpc.WatchReply{Time: clock()})
			}
		}
		return err
	})
}

// A watched is what a watcher told.
type watched struct {
	mu     sync.Mutex
	states []State
}

func (w *watched) tell(s State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.states = append(w.states, s)
}

// last is the state that was told last, and how many were.
func (w *watched) last() (State, int) {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.states) == 0 {
		return State{}, 0
	}
	return w.states[len(w.states)-1], len(w.states)
}

// code is why a guest is not reachable.
func (w *watched) code() Code {
	if s, _ := w.last(); s.Problem != nil {
		return s.Problem.Code
	}
	return ""
}

// watchIn runs a watcher in a bubble until the test ends.
func watchIn(t *testing.T, n *network, w *Watcher) *watched {
	t.Helper()
	var got watched
	w.dial = n.dial
	if w.Guest.Target == (vsockrpc.Target{}) {
		w.Guest = Guest{Name: "web", Target: vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: "guest"}, Provider: ProviderAddress{Socket: "provider"}}
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx, got.tell) }()
	t.Cleanup(func() {
		end := errors.New("the end")
		cancel(end)
		if err := <-done; !errors.Is(err, end) {
			t.Errorf("Run = %v, want %v", err, end)
		}
		for path := range n.paths {
			n.leave(path)
		}
	})
	return &got
}

func later(d time.Duration) { <-time.After(d) }

func TestWatcherProvider(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		offset := int64(7000)
		status := vsockrpc.ProviderStatus{
			Name: "web", State: vsockrpc.GuestInForce, LastContact: now(), ClockOffset: &offset, Report: healthy(), Applies: noApplies(), Trimmed: true,
		}
		p := hosttest.NewProvider(status)
		n.serve("provider", p.Serve)
		w := watchIn(t, n, &Watcher{})
		s, count := w.last()
		if count != 1 || !s.Reachable || s.Report == nil || s.Provider == nil || s.Provider.Report != nil || s.Provider.Applies == nil ||
			!s.Trimmed || *s.ClockOffset != 7*time.Second || s.Verdict() != "degraded" || s.Guest != "web" || s.Target != "unix:guest" {
			t.Errorf("at first %d states, %+v", count, s)
		}

		// Its heartbeat is a sign of the guest.
		later(11 * time.Second)
		if _, count = w.last(); count != 2 {
			t.Errorf("after a heartbeat there are %d states, want 2", count)
		}

		waiting := status
		waiting.State, waiting.Problem = vsockrpc.GuestWaiting, "nobody listens"
		p.Set(waiting)
		later(time.Second)
		if s, _ := w.last(); s.Reachable || w.code() != CodeNoAnswer || s.Report == nil || !strings.Contains(s.Problem.Message, "nobody listens") {
			t.Errorf("with a guest that does not answer %+v", s)
		}
		p.Set(status)
		later(time.Second)
		if s, _ := w.last(); !s.Reachable {
			t.Errorf("with a guest that answers again %+v", s)
		}

		_, before := w.last()
		n.leave("provider")
		s, count = w.last()
		if count != before+1 || s.Reachable || s.Report == nil || w.code() != CodeNoSocket {
			t.Errorf("without its provider %d states more, %+v", count-before, s)
		}
		n.serve("provider", p.Serve)
		later(callFirst)
		if s, _ := w.last(); !s.Reachable {
			t.Errorf("with its provider again %+v", s)
		}
	})
}

// A guest that others watch has a report of a while ago.
func TestWatcherClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		n.serve("guest", guest(func(ctx context.Context, tell func(vsockrpc.WatchReply) error) error {
			old := healthy(func(r *vsockrpc.Report) { r.Time = time.Now().Add(-time.Hour).Format(time.RFC3339Nano) })
			_ = tell(vsockrpc.WatchReply{Report: old, Time: time.Now().Format(time.RFC3339Nano)})
			<-ctx.Done()
			return ctx.Err()
		}))
		if s, _ := watchIn(t, n, &Watcher{}).last(); s.ClockOffset == nil || *s.ClockOffset != 0 || !s.Healthy() {
			t.Errorf("with an old report %+v, %s", s.ClockOffset, s.Verdict())
		}
	})
}

// A provider that ends is not the guest's end, where the guest can be asked; and
// it is asked again when it is there again.
func TestWatcherDirect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		n.serve("guest", beating(healthy(), 5*time.Second, time.Minute))
		p := hosttest.NewProvider(vsockrpc.ProviderStatus{State: vsockrpc.GuestInForce, LastContact: now(), Report: healthy()})
		w := watchIn(t, n, &Watcher{})
		s, count := w.last()
		if count != 1 || !s.Reachable || s.Provider != nil || *s.ClockOffset != time.Minute || !s.LastContact.Equal(time.Now()) {
			t.Errorf("at first %d states, %+v", count, s)
		}
		n.serve("provider", p.Serve)
		later(6 * time.Second)
		if s, _ := w.last(); !s.Reachable || s.Provider == nil {
			t.Errorf("with a provider %+v", s)
		}
		n.leave("provider")
		if s, _ := w.last(); !s.Reachable || s.Provider != nil || *s.ClockOffset != time.Minute {
			t.Errorf("without a provider %+v", s)
		}
		for i, s := range w.states {
			if !s.Reachable {
				t.Errorf("state %d is %+v, want none that is lost", i, s)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		n.serve("guest", beating(healthy(), 5*time.Second, 0))
		n.serve("provider", hosttest.NewProvider(vsockrpc.ProviderStatus{}).Serve)
		w := watchIn(t, n, &Watcher{Direct: true})
		later(time.Minute)
		if s, _ := w.last(); !s.Reachable || s.Provider != nil || n.at("provider").dials != 0 {
			t.Errorf("without asking the provider %+v, %d dials", s, n.at("provider").dials)
		}
	})
}

// Three heartbeats of silence are the end, and not less.
func TestWatcherSilent(t *testing.T) {
	for _, c := range []struct {
		heartbeat, every, lost time.Duration // 0 is never
	}{
		{0, 59 * time.Second, 0},
		{0, 61 * time.Second, time.Minute},
		{5 * time.Second, 16 * time.Second, 15 * time.Second},
		{time.Millisecond, time.Hour, 3 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := &network{}
			served := false
			n.serve("guest", guest(func(ctx context.Context, tell func(vsockrpc.WatchReply) error) error {
				if served {
					<-ctx.Done()
					return ctx.Err()
				}
				served = true
				err := tell(vsockrpc.WatchReply{Report: healthy()})
				for err == nil {
					if err = pausing(ctx, c.every); err == nil {
						err = tell(vsockrpc.WatchReply{})
					}
				}
				return err
			}))
			w := watchIn(t, n, &Watcher{Heartbeat: c.heartbeat})
			if c.lost == 0 {
				later(time.Hour)
				if s, count := w.last(); !s.Reachable || count < 60 {
					t.Errorf("after an hour %d states, %+v", count, s)
				}
				return
			}
			// Whoever is lost is asked once more before it is told.
			later(c.lost + DefaultTimeout - 1)
			if s, count := w.last(); !s.Reachable || count != 1 {
				t.Errorf("with %+v it is lost early: %d states, %+v", c, count, s)
			}
			later(1)
			if s, count := w.last(); s.Reachable || w.code() != CodeNoAnswer || s.Report == nil || count != 2 {
				t.Errorf("with %+v it is not lost: %d states, %+v", c, count, s)
			}
		})
	}
}

// A guest that is not there is told once, and looked for less and less.
func TestWatcherPause(t *testing.T) {
	for most, want := range map[time.Duration]int{0: 65, WaitPause: 303} { // in ten minutes
		synctest.Test(t, func(t *testing.T) {
			n := &network{}
			n.at("guest") // it is there, and nobody listens
			w := watchIn(t, n, &Watcher{MaxPause: most})
			later(10 * time.Minute)
			if s, count := w.last(); count != 1 || s.Reachable || w.code() != CodeNoListener || s.Report != nil || !s.LastContact.IsZero() {
				t.Errorf("%d states, %+v", count, s)
			}
			if got := n.at("guest").dials; got != want {
				t.Errorf("with at most %v between them there were %d attempts, want %d", most, got, want)
			}
			n.serve("guest", beating(healthy(), time.Second, 0))
			later(cmp.Or(most, callMost))
			if s, count := w.last(); !s.Reachable || count < 2 {
				t.Errorf("when it is there: %d states, %+v", count, s)
			}
		})
	}
}

// A guest that tells all the time waits until it is read, and one that hangs up
// after each report is called less and less.
func TestWatcherFlood(t *testing.T) {
	n := 0
	endless := guest(func(_ context.Context, tell func(vsockrpc.WatchReply) error) error {
		for {
			n++
			if err := tell(vsockrpc.WatchReply{Report: healthy(func(r *vsockrpc.Report) { r.Generation = int64(n) })}); err != nil {
				return err
			}
		}
	})
	large := guest(func(_ context.Context, tell func(vsockrpc.WatchReply) error) error {
		for {
			if err := tell(vsockrpc.WatchReply{Report: healthy(func(r *vsockrpc.Report) {
				r.Reasons = make([]vsockrpc.Reason, 1000)
				for i := range r.Reasons {
					r.Reasons[i].Detail = strings.Repeat("x", 1000)
				}
			})}); err != nil {
				return err
			}
		}
	})
	brief := guest(func(_ context.Context, tell func(vsockrpc.WatchReply) error) error {
		_ = tell(vsockrpc.WatchReply{Report: healthy()})
		return errors.New("enough")
	})
	for what, c := range map[string]struct {
		serve func(net.Listener) func()
		most  int
	}{"endless": {endless, 101}, "large": {large, 11}, "brief": {brief, 12}} {
		synctest.Test(t, func(t *testing.T) {
			n := &network{}
			n.serve("guest", c.serve)
			w := watchIn(t, n, &Watcher{Direct: true})
			later(10 * time.Second)
			s, count := w.last()
			if count > c.most || count < c.most/2 {
				t.Errorf("%s: %d states in ten seconds, want at most %d", what, count, c.most)
			}
			if s.Trimmed != (what == "large") || s.Report.Size() > maxKept {
				t.Errorf("%s: a report of %d bytes is kept", what, s.Report.Size())
			}
		})
	}
}

// A provider that hangs, or does not know the call, is passed over.
func TestWatcherPassesOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		p := hosttest.NewProvider(vsockrpc.ProviderStatus{})
		p.Hang()
		n.serve("provider", p.Serve)
		w := watchIn(t, n, &Watcher{})
		later(DefaultTimeout)
		if s, _ := w.last(); s.Problem == nil || s.Problem.Code != CodeNoSocket || !strings.Contains(s.Problem.Message, "; its provider: no answer in time") {
			t.Errorf("with a provider that hangs, and no guest, %+v", s.Problem)
		}
		n.serve("guest", beating(healthy(), time.Second, 0))
		later(DefaultTimeout + time.Second)
		if s, _ := w.last(); !s.Reachable {
			t.Errorf("with a provider that hangs %+v", s)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		n.serve("guest", beating(healthy(), time.Second, 0))
		n.serve("provider", guest(nil)) // it is none
		w := watchIn(t, n, &Watcher{})
		if s, count := w.last(); !s.Reachable || count != 1 {
			t.Errorf("with what is no provider %d states, %+v", count, s)
		}
	})
}

// Whatever a guest tells, over a socket: it is bounded, and what is shown of it
// is escaped.
func TestWatcherHostile(t *testing.T) {
	for kind, want := range map[string]string{
		"escapes": "failing: ", "reports": "degraded", "large": "degraded: code", "garbage": "", "error": "", "hangup": "", "flood": "",
	} {
		dir := t.TempDir()
		g, err := hosttest.Hostile(dir, "g", kind)
		must(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		w := Watcher{Guest: unixGuest(dir+"/g.sock", "g")}
		var first *State
		err = w.Run(ctx, func(s State) {
			if first == nil {
				first = &s
			}
			cancel()
		})
		g.Close()
		if !errors.Is(err, context.Canceled) || first == nil {
			t.Errorf("%s: Run = %v, with %+v", kind, err, first)
			continue
		}
		line := first.summary()
		if first.Problem != nil {
			line = first.Problem.Message
		}
		if first.Reachable != (want != "") || !strings.HasPrefix(line, want) || strings.ContainsAny(line, hosttest.Escapes[:1]+"\n\a") {
			t.Errorf("%s: %+v, as %q, want %q", kind, first.Problem, line, want)
		}
		if first.Report != nil && (first.Report.Size() > maxKept || first.Trimmed != (kind == "large")) {
			t.Errorf("%s: a report of %d bytes is kept", kind, first.Report.Size())
		}
	}
}
