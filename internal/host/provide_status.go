package host

import (
	"cmp"
	"context"
	"log/slog"
	"reflect"
	"slices"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// tellPause is the least time from one status that is told to the next.
const tellPause = 500 * time.Millisecond

// tell answers Status.
func (p *Provider) tell(_ context.Context, call *vsockrpc.Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	s, _ := p.told()
	return call.Reply(s)
}

// told is the status as others may have it, and what is closed when it is
// another.
func (p *Provider) told() (*vsockrpc.ProviderStatus, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.status // what it points to is never changed
	return &s, p.changed
}

// changedLocked has everybody look who watches the status. The caller has mu.
func (p *Provider) changedLocked() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// watch answers Watch.
func (p *Provider) watch(ctx context.Context, call *vsockrpc.Call) error {
	var params vsockrpc.WatchParams
	if err := call.Decode(&params); err != nil {
		return err
	}
	if !call.More {
		return vsockrpc.ErrExpectedMore
	}
	call.Forget()
	// The guest's last word may be older than its end: the next heartbeat has when
	// it was heard anew.
	p.poke()
	heart := time.NewTicker(cmp.Or(params.Heartbeat, vsockrpc.DefaultWatchHeartbeat) / 2)
	defer heart.Stop()
	for {
		s, changed := p.told()
		if err := call.ReplyMore(&vsockrpc.ProviderWatchReply{Status: s}); err != nil {
			return err
		}
		if err := pausing(ctx, tellPause); err != nil {
			return err
		}
		for same := true; same; {
			select {
			case <-changed:
				same = false
			case <-heart.C:
				s, _ := p.told()
				if err := call.ReplyMore(&vsockrpc.ProviderWatchReply{LastContact: s.LastContact}); err != nil {
					return err
				}
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
}

// announce tells the status in one line.
func (p *Provider) announce(ctx context.Context) {
	for last := ""; ; {
		s, changed := p.told()
		if line := statusLine(s); line != last {
			last = line
			p.Status(line)
		}
		if pausing(ctx, tellPause) != nil {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// set says how the guest's set is.
func (p *Provider) set(state, problem string) {
	p.setting.Lock()
	defer p.setting.Unlock()
	p.setSetting(state, problem)
}

// setSetting is set for who holds setting.
func (p *Provider) setSetting(state, problem string) {
	if p.over.Load() {
		return // what is under way is broken off
	}
	p.mu.Lock()
	changed := p.status.State != state || p.status.Problem != problem
	if p.status.State != state {
		p.status.Since = now()
	}
	p.status.Name, p.status.Target, p.status.State, p.status.Problem = p.Name, p.Target.String(), state, problem
	if changed {
		p.changedLocked()
	}
	p.mu.Unlock()
	if !changed {
		return
	}
	level := slog.LevelInfo
	if state != vsockrpc.GuestInForce && state != vsockrpc.GuestApplying && problem != "" {
		level = slog.LevelWarn
	}
	p.Log.Log(context.Background(), level, "the guest's set", slog.String("vm", p.Name), slog.String("state", state), slog.String("problem", problem))
}

func now() string { return time.Now().UTC().Format(time.RFC3339Nano) }

// statusLine is one line for people: how the set is and, where that is in force,
// what is wrong with the guest.
func statusLine(s *vsockrpc.ProviderStatus) string {
	what := map[string]string{
		vsockrpc.GuestWaiting:    "the guest does not answer yet",
		vsockrpc.GuestApplying:   "handing over the set",
		vsockrpc.GuestInForce:    "the set is in force",
		vsockrpc.GuestRefused:    "the set is in force, but for what the guest refused",
		vsockrpc.GuestRolledBack: "the set was rolled back by its gate",
		vsockrpc.GuestUnreadable: "the credentials cannot be read",
	}[s.State]
	line := s.Name + ": " + what
	if s.Problem != "" {
		line += ": " + s.Problem
	}
	if s.State != vsockrpc.GuestInForce {
		return line
	}
	guest := stateOf(Guest{Name: s.Name}, s, time.Now())
	if v := guest.Verdict(); slices.Contains(known, v) && v != vsockrpc.VerdictHealthy {
		line += "; the guest is " + guest.summary()
	}
	return line
}

// heard notes that the guest said something: a report, if it is not nil, and what
// time it is there, "" if it did not say. Trimmed says that the report was too
// large to be kept.
func (p *Provider) heard(r *vsockrpc.Report, clock string) (trimmed bool) {
	at := time.Now()
	kept := r
	if r != nil {
		kept, trimmed = trim(r)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	first := p.status.LastContact == ""
	p.status.LastContact = at.UTC().Format(time.RFC3339Nano)
	changed := first
	if r != nil {
		changed = changed || !sameReport(p.status.Report, kept)
		p.status.Report, p.status.Trimmed = kept, trimmed
	}
	if r != nil || clock != "" {
		d := clockOffset(clock, at)
		if (d == nil) != (p.status.ClockOffset == nil) || d != nil && (*d-p.offset).Abs() >= time.Second {
			changed = true
		}
		if p.status.ClockOffset = nil; d != nil {
			ms := d.Milliseconds()
			p.status.ClockOffset = &ms
			if changed {
				p.offset = *d
			}
		}
	}
	if changed {
		p.changedLocked()
	}
	return trimmed
}

// sameReport reports whether two reports say the same, but for the time.
func sameReport(a, b *vsockrpc.Report) bool {
	if a == nil || b == nil {
		return a == b
	}
	x, y := *a, *b
	x.Time, x.Uptime, y.Time, y.Uptime = "", 0, "", 0
	return reflect.DeepEqual(&x, &y)
}

// refreshed takes back that units were not refreshed, where a report has that
// they run on what is in force now.
func (p *Provider) refreshed(r *vsockrpc.Report) {
	p.setting.Lock()
	defer p.setting.Unlock()
	p.mu.Lock()
	o := &p.last
	good := p.status.State == vsockrpc.GuestInForce && o.state == vsockrpc.GuestInForce && o.problem != "" &&
		r.BootID == o.bootID && r.Generation >= o.generation && runsOnIt(r)
	if good {
		o.problem = ""
	}
	p.mu.Unlock()
	if good {
		p.setSetting(vsockrpc.GuestInForce, "")
	}
}

// runsOnIt reports whether a report knows the units that load what the provider
// has, and that all of them run on what is in force.
func runsOnIt(r *vsockrpc.Report) bool {
	some := false
	for _, e := range r.Entries {
		if e.Source != credential.SourceProvider && !e.Ephemeral {
			continue
		}
		for _, c := range e.Consumers {
			if some = true; c.Stale || c.Loaded != vsockrpc.LoadedInForce {
				return false
			}
		}
	}
	return some
}

// applyBounds are the bounds of the histogram of [vsockrpc.Applies], in
// milliseconds.
var applyBounds = []int64{10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000}

// noApplies counts nothing.
func noApplies() *vsockrpc.Applies {
	a := &vsockrpc.Applies{Buckets: make([]vsockrpc.Bucket, len(applyBounds))}
	for i, le := range applyBounds {
		a.Buckets[i].LE = le
	}
	return a
}

// count counts a set that was handed over, and what came of it.
func (p *Provider) count(res *Result, took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := *p.status.Applies
	a.Buckets = slices.Clone(a.Buckets) // somebody may be encoding the others
	a.Count++
	switch f := res.Error; {
	case f != nil && f.Code == CodeRolledBack:
		a.RolledBack++
	case f != nil && f.Code != CodeRefreshFailed:
		a.Failed++
	case len(res.Refusals) > 0:
		a.Refused++
	}
	a.Sum += took.Microseconds()
	for i := range a.Buckets {
		if took <= time.Duration(a.Buckets[i].LE)*time.Millisecond {
			a.Buckets[i].Count++
		}
	}
	p.status.Applies = &a
	p.changedLocked()
}
