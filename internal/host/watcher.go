package host

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/guestagent/guestagent/vsockrpc"
)

// A Watcher watches one guest: through its provider where it has one that
// answers on its local socket, otherwise the guest itself.
type Watcher struct {
	// Guest is whom to watch.
	Guest Guest
	// Direct asks the guest itself, whatever provider it has.
	Direct bool
	// Heartbeat is the longest silence. Whoever is silent for three of them is
	// lost. It is whole seconds, as in [vsockrpc.WatchParams].
	Heartbeat time.Duration // 0 is 20 s
	// MaxPause is the longest pause between two attempts to reach the guest; the
	// first is 250 ms. Whoever waits for a guest that boots takes [WaitPause].
	MaxPause time.Duration // 0 is 10 s

	dial func(context.Context, vsockrpc.Target) (*vsockrpc.Client, error) // nil is vsockrpc's
}

// WaitPause is the MaxPause of whoever waits for a guest. For a thousand guests
// that are down it would be five hundred attempts in a second.
const WaitPause = 2 * time.Second

const (
	// readPause is the least time from one message of a guest that is read to the
	// next, largePause the same after one that was too large to be kept: a guest
	// that tells more waits until it can.
	readPause  = 100 * time.Millisecond
	largePause = time.Second
	// lostAfter is after how many heartbeats of silence somebody is lost.
	lostAfter = 3
)

// Run watches until ctx ends, and returns its cause. It tells what is known of
// the guest after the first attempt to reach it, and whenever that changed: a
// sign of life is a change of LastContact. A connection that ends is made anew at
// once, unless it was too short for that, and only a guest that cannot be reached
// then is lost. All of it is told by the goroutine that calls Run; while it is
// told, nothing is read, and a tell that takes as long as three heartbeats loses
// the guest.
func (w *Watcher) Run(ctx context.Context, tell func(State)) error {
	r := watching{
		Watcher: w, tell: tell, state: State{Guest: w.Guest.Name, Target: w.Guest.Target.String()},
		heartbeat: min(max(cmp.Or(w.Heartbeat, watchHeartbeat), vsockrpc.MinWatchHeartbeat), vsockrpc.MaxWatchHeartbeat),
	}
	most := cmp.Or(w.MaxPause, callMost)
	told := false
	for pause := callFirst; ; {
		begun := time.Now()
		heard, f := r.attempt(ctx)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case heard && time.Since(begun) >= callFirst:
			told, pause = true, callFirst
			continue
		}
		s := &r.state
		if same := !s.Reachable && s.Problem != nil && s.Problem.Code == f.Code; !told || heard || !same {
			s.Reachable, s.Problem, told = false, f, true
			tell(*s)
		}
		if pausing(ctx, pause) != nil {
			return context.Cause(ctx)
		}
		pause = min(2*pause, most)
	}
}

// pausing waits, or returns the cause of ctx's end.
func pausing(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// A watching is one Run of a Watcher.
type watching struct {
	*Watcher
	tell      func(State)
	heartbeat time.Duration
	state     State
}

// errProvider ends the watch of a guest whose provider can be asked instead.
var errProvider = errors.New("the guest's provider answers")

// attempt watches over one connection, until that ends. Heard says that somebody
// answered.
func (r *watching) attempt(ctx context.Context) (heard bool, f *Failure) {
	var provider *Failure
	if r.provided() {
		heard, err := r.over(ctx, providerTarget(r.Guest), maxStatus, r.watchProvider)
		if heard {
			return true, failure(err, fateUntouched, false)
		}
		provider = failure(err, fateUntouched, false)
	}
	heard, err := r.over(ctx, r.Guest.Target, vsockrpc.MessageLimit, r.watchGuest)
	f = failure(err, fateUntouched, false)
	if provider != nil && provider.Code != CodeNoSocket && provider.Code != CodeNoListener && !heard {
		f = &Failure{Code: f.Code, Message: f.Message + "; its provider: " + provider.Message}
	}
	return heard, f
}

// provided reports whether there may be a provider to ask.
func (w *Watcher) provided() bool { return !w.Direct && w.Guest.Provider.Socket != "" }

// providerTarget is the local socket of a guest's provider.
func providerTarget(g Guest) vsockrpc.Target {
	return vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: g.Provider.Socket}
}

// connect connects to somebody whose messages have at most limit bytes.
func (w *Watcher) connect(ctx context.Context, to vsockrpc.Target, limit int) (*vsockrpc.Client, error) {
	if w.dial != nil {
		return w.dial(ctx, to)
	}
	return vsockrpc.Dialer{MessageLimit: limit}.Dial(ctx, to)
}

// over connects, and watches until somebody is silent for too long. For the first
// message that is DefaultTimeout. A watch calls alive for every message.
func (r *watching) over(ctx context.Context, to vsockrpc.Target, limit int, watch func(ctx context.Context, c *vsockrpc.Client, alive func()) error) (heard bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	quiet := time.AfterFunc(DefaultTimeout, func() { cancel(context.DeadlineExceeded) })
	defer quiet.Stop()
	c, err := r.connect(ctx, to, limit)
	if err != nil {
		return false, err
	}
	defer c.Close()
	err = watch(ctx, c, func() {
		heard = true
		quiet.Reset(lostAfter * r.heartbeat)
	})
	return heard, err
}

// watchProvider watches what a guest's provider tells.
func (r *watching) watchProvider(ctx context.Context, c *vsockrpc.Client, alive func()) error {
	var last *vsockrpc.ProviderStatus
	for reply, err := range (vsockrpc.Provider{Client: c}).Watch(ctx, r.heartbeat) {
		if err != nil {
			return err
		}
		alive()
		if reply.Status != nil {
			last = reply.Status
		} else {
			s := *last // the first reply has one
			s.LastContact = reply.LastContact
			last = &s
		}
		r.state = stateOf(r.Guest, last, time.Now())
		r.tell(r.state)
		if err := pausing(ctx, readPause); err != nil {
			return err
		}
	}
	return nil
}

// watchGuest watches the guest itself.
func (r *watching) watchGuest(ctx context.Context, c *vsockrpc.Client, alive func()) error {
	looked := time.Now()
	for reply, err := range (vsockrpc.Health{Client: c}).Watch(ctx, r.heartbeat) {
		if err != nil {
			return err
		}
		alive()
		s := &r.state
		s.Reachable, s.Problem, s.Provider, s.LastContact = true, nil, nil, time.Now()
		pause := readPause
		if reply.Report != nil {
			if s.Report, s.Trimmed = trim(reply.Report); s.Trimmed {
				pause = largePause
			}
		}
		if told := toldTime(&reply); reply.Report != nil || told != "" {
			s.ClockOffset = clockOffset(told, s.LastContact)
		}
		r.tell(*s)
		// One that never stops telling gives no heartbeats.
		if reply.Report == nil || time.Since(looked) >= r.heartbeat {
			if looked = time.Now(); r.answers(ctx) {
				return errProvider
			}
		}
		if err := pausing(ctx, pause); err != nil {
			return err
		}
	}
	return nil
}

// toldTime is the guest's clock when it sent a reply, "" if it does not say. The
// report may be older: who joins others that watch gets theirs.
func toldTime(r *vsockrpc.WatchReply) string {
	if r.Time == "" && r.Report != nil {
		return r.Report.Time
	}
	return r.Time
}

// answers reports whether the guest's provider, which did not answer before, can
// be connected to.
func (r *watching) answers(ctx context.Context) bool {
	if !r.provided() {
		return false
	}
	c, err := r.connect(ctx, providerTarget(r.Guest), maxStatus)
	if err != nil {
		return false
	}
	return c.Close() == nil
}
