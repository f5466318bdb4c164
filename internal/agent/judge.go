package agent

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/guestagent/guestagent/consumer"
	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/health"
	"github.com/guestagent/guestagent/vsockrpc"
)

// systemdTimeout bounds the wait for PID 1 while a report is made.
const systemdTimeout = 5 * time.Second

// askPause is the time after which PID 1 is asked again that was lost.
const askPause = 100 * time.Millisecond

// The parts of a report that are not the collector's: PID 1's, and who loads what,
// where that is too much to be sent.
const (
	partSystemd   = "systemd"
	partConsumers = "consumers"
)

// A follower is PID 1 as somebody sees it who stays connected.
type follower interface {
	Find(ctx context.Context, names []string) ([]consumer.Unit, error)
	Changed() <-chan struct{}
	Lost() <-chan struct{}
	Close()
}

// reportParts are what a report is made of.
type reportParts struct {
	c         credentials
	collector *health.Collector
	rules     health.Rules
}

// units is what PID 1 says for one report.
type units struct {
	system    consumer.System
	consumers []consumer.Unit
	own       string
	err       error
}

// report makes a report, with f where PID 1 is followed.
func (p *reportParts) report(ctx context.Context, f *followed) (*vsockrpc.Report, error) {
	c := p.c
	c.flush()
	s, err := c.a.Status()
	if err != nil {
		return nil, err
	}
	r := &vsockrpc.Report{
		Version: s.Version, BootID: s.BootID, MachineID: c.a.machineID(), Generation: generation(s.Generation),
		Entries: wireEntries(s.Entries), Refusals: s.Refusals, Provider: s.Provider, Protocol: vsockrpc.Protocol,
	}
	if r.Gate, r.Rejected, err = c.a.trials(); err != nil {
		return nil, err
	}
	r.Waiting = c.waiting()

	var wg sync.WaitGroup
	var u units
	wg.Go(func() { u = c.a.askUnits(ctx, f, r.Entries) })
	figures := p.collector.Collect()
	wg.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if u.err == nil {
		// Who has started by now was handed its values meanwhile.
		c.flush()
		u.err = c.a.addConsumers(c.cfg, r.Entries, u.consumers, u.own)
	}
	g := health.Guest{Figures: figures, System: judgedSystem(u), Provider: s.Provider.State}
	addCredentials(&g, r)
	for _, n := range s.Reasons {
		g.Others = append(g.Others, health.Reason{Code: n.Code, Detail: n.Detail, Hint: n.Hint})
	}
	verdict, reasons := health.Judge(g, p.rules)
	r.Verdict, r.Reasons = string(verdict), wireReasons(reasons)
	r.Time = clock()
	addFigures(r, figures)
	if u.err != nil {
		r.Unknown = append(r.Unknown, partSystemd)
	} else {
		r.Systemd = wireSystem(g.System)
	}
	return fitting(r), nil
}

// maxReportSize is how large a report may be and still be sent, in bytes.
const maxReportSize = vsockrpc.MessageLimit - 64<<10

// fitting is a report that can be sent: where it is too large, the consumers are
// left out that are not stale, and where that is not enough, all.
func fitting(r *vsockrpc.Report) *vsockrpc.Report {
	for _, left := range []func(vsockrpc.Consumer) bool{
		func(c vsockrpc.Consumer) bool { return !c.Stale },
		func(vsockrpc.Consumer) bool { return true },
	} {
		if r.Size() <= maxReportSize {
			break
		}
		for i := range r.Entries {
			r.Entries[i].Consumers = slices.DeleteFunc(r.Entries[i].Consumers, left)
		}
		if !slices.Contains(r.Unknown, partConsumers) {
			r.Unknown = append(r.Unknown, partConsumers)
		}
	}
	return r
}

// askUnits asks PID 1, and gives up soon: a report says so then.
//
// Where f is lost it asks on another connection, as soon as there is one. So it
// is with each daemon-reexec, of which systemd tells those who follow right
// before, and where the last watch has just left.
func (a *Agent) askUnits(ctx context.Context, f *followed, entries []vsockrpc.Entry) units {
	ctx, cancel := context.WithTimeout(ctx, systemdTimeout)
	defer cancel()
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name
	}
	u := a.askOnce(ctx, f, names)
	if f != nil && f.hangs != nil && errors.Is(u.err, context.DeadlineExceeded) {
		select {
		case f.hangs <- struct{}{}:
		default:
		}
	}
	if f == nil || !errors.Is(u.err, consumer.ErrLost) {
		return u
	}
	again := time.NewTicker(askPause)
	defer again.Stop()
	for u.err != nil {
		select {
		case <-again.C:
			u = a.askOnce(ctx, nil, names)
		case <-ctx.Done():
			return u
		}
	}
	return u
}

func (a *Agent) askOnce(ctx context.Context, f *followed, names []string) (u units) {
	if f == nil {
		var bus systemd
		if bus, u.err = a.pid1(ctx); u.err != nil {
			return u
		}
		defer bus.Close()
		if u.own, u.err = ownUnit(ctx, bus); u.err != nil {
			return u
		}
		f = &followed{bus: bus, find: bus.Find, own: u.own}
	}
	u.own = f.own
	if u.system, u.err = f.bus.System(ctx); u.err == nil && len(names) > 0 {
		u.consumers, u.err = f.find(ctx, names)
	}
	return u
}

// judgedSystem is PID 1's part of what is judged.
func judgedSystem(u units) health.System {
	if u.err != nil {
		return health.System{Problem: vsockrpc.Escape(u.err.Error(), maxDetail)}
	}
	s := health.System{Version: u.system.Version, State: u.system.State, Jobs: u.system.Jobs}
	for _, f := range u.system.Failed {
		unit := health.FailedUnit{Unit: f.Unit, Result: f.Result}
		if f.SinceUSec != 0 {
			unit.Since = time.UnixMicro(int64(f.SinceUSec)).UTC() //nolint:gosec // since 1970
		}
		s.Failed = append(s.Failed, unit)
	}
	return s
}

// addCredentials adds what the report says of credentials to what is judged.
func addCredentials(g *health.Guest, r *vsockrpc.Report) {
	for _, e := range r.Entries {
		use := health.Use{Credential: e.Name, Detail: vsockrpc.Escape(e.Path, maxDetail)}
		switch credstore.State(e.State) {
		case credstore.StateShadowed:
			g.Shadowed = append(g.Shadowed, use)
		case StateMismatch:
			g.Mismatched = append(g.Mismatched, use)
		case credstore.StateMissing:
			g.Missing = append(g.Missing, use)
		case credstore.StateForeign:
			g.Foreign = append(g.Foreign, use)
		}
		for _, c := range e.Consumers {
			if !c.Stale {
				continue
			}
			detail := c.Detail
			if c.Loaded == vsockrpc.LoadedPrevious && c.Revision != "" {
				detail = strings.TrimSuffix("it has revision "+c.Revision+"; "+c.Detail, "; ")
			}
			g.Stale = append(g.Stale, health.Use{Unit: c.Unit, Credential: e.Name, Since: when(e.InstalledAt), Detail: vsockrpc.Escape(detail, maxDetail)})
		}
	}
	for _, w := range r.Waiting {
		g.Waiting = append(g.Waiting, health.Use{Unit: w.Unit, Credential: w.Name, Since: when(w.Since)})
	}
	for _, f := range r.Refusals {
		g.Refused = append(g.Refused, health.Use{Credential: f.Name, Detail: vsockrpc.Escape(f.String(), maxDetail)})
	}
	for _, j := range r.Rejected {
		g.RolledBack = append(g.RolledBack, health.Use{
			Since: when(j.At), Detail: vsockrpc.Escape(fmt.Sprintf("generation %d (%s): %s", j.Generation, strings.Join(j.Names, ", "), j.Problem), maxDetail),
		})
	}
}

// when reads a time of our own.
func when(s string) time.Time {
	t, _ := time.Parse(time.RFC3339Nano, s)
	return t
}

func wireTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Format(time.RFC3339Nano)
}

func wireReasons(reasons []health.Reason) []vsockrpc.Reason {
	list := make([]vsockrpc.Reason, 0, len(reasons))
	for _, n := range reasons {
		list = append(list, vsockrpc.Reason{
			Code: string(n.Code), Detail: n.Detail, Hint: n.Hint, Verdict: string(n.Verdict), Unit: n.Unit, Credential: n.Credential, Since: wireTime(n.Since),
		})
	}
	return list
}

func wireSystem(s health.System) *vsockrpc.SystemdState {
	w := &vsockrpc.SystemdState{Version: s.Version, State: s.State, Failed: make([]vsockrpc.FailedUnit, 0, len(s.Failed)), Jobs: int64(s.Jobs)}
	for _, f := range s.Failed {
		w.Failed = append(w.Failed, vsockrpc.FailedUnit{Unit: f.Unit, Result: f.Result, Since: wireTime(f.Since)})
	}
	return w
}

// addFigures adds the guest's figures to the report.
func addFigures(r *vsockrpc.Report, f health.Figures) {
	r.Hostname, r.Uptime, r.Unknown = vsockrpc.Escape(f.Hostname, maxDetail), int64(f.Uptime/time.Second), slices.Clone(f.Unknown)
	if f.Memory.Total != 0 {
		r.Memory = &vsockrpc.Memory{Total: int64(f.Memory.Total), Available: int64(f.Memory.Available)} //nolint:gosec // bytes of memory
	}
	if f.Load != [3]int{} {
		r.Load = &vsockrpc.Load{Load1: int64(f.Load[0]), Load5: int64(f.Load[1]), Load15: int64(f.Load[2])}
	}
	stall := func(s *health.Stall) *vsockrpc.Stall {
		if s == nil {
			return nil
		}
		return &vsockrpc.Stall{
			Some10: int64(s.Some.Avg10), Some60: int64(s.Some.Avg60), Some300: int64(s.Some.Avg300),
			Full10: int64(s.Full.Avg10), Full60: int64(s.Full.Avg60), Full300: int64(s.Full.Avg300),
		}
	}
	if p := f.Pressure; p != (health.Pressure{}) {
		r.Pressure = &vsockrpc.Pressure{CPU: stall(p.CPU), Memory: stall(p.Memory), IO: stall(p.IO)}
	}
	for _, d := range f.Disks {
		r.Disks = append(r.Disks, vsockrpc.Disk{Path: d.Path, Used: int64(d.Used), Available: int64(d.Available), ReadOnly: d.ReadOnly}) //nolint:gosec // bytes of a file system
	}
}

// sameNews reports whether two reports say the same but for figures that change
// all the time.
func sameNews(a, b *vsockrpc.Report) bool {
	return reflect.DeepEqual(news(a), news(b))
}

// news is a report without the figures that change all the time.
func news(r *vsockrpc.Report) vsockrpc.Report {
	n := *r
	n.Time, n.Uptime, n.Memory, n.Pressure, n.Disks, n.Load = "", 0, nil, nil, nil, nil
	if n.Systemd != nil {
		s := *n.Systemd
		s.Jobs = 0
		n.Systemd = &s
	}
	return n
}
