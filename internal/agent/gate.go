package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/guestagent/guestagent/consumer"
	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/vsockrpc"
)

// A trial is what a gate has to know, in this process or, after a crash, in the
// next one. The store keeps it together with the set that is on trial, and lets
// nobody change a value meanwhile. It holds no values.
type trial struct {
	// Generation is the set on trial.
	Generation uint64     `json:"generation"`
	Phase      trialPhase `json:"phase"`
	// Mode is how the call wanted consumers refreshed; "" as the configuration says.
	Mode string `json:"mode"`
	// GateUSec is how long the refreshed units are watched; UntilUSec until
	// when, on CLOCK_MONOTONIC, once they are.
	GateUSec  uint64 `json:"gateUSec"`
	UntilUSec uint64 `json:"untilMonotonicUSec,omitempty"`
	// Names are all of the set, Changed those whose values it changed, Removed
	// those that it took away.
	Names   []string `json:"names"`
	Changed []string `json:"changed"`
	Removed []string `json:"removed"`
	// Jobs are what was or is being done to units because of the set.
	Jobs []consumer.Job `json:"jobs"`
	// Base is how the units were doing when their jobs had ended.
	Base map[string]consumer.Status `json:"base,omitempty"`
	// Problem says, while the set is taken back, why.
	Problem string `json:"problem,omitempty"`
}

// A trialPhase is how far a trial has come.
type trialPhase string

const (
	trialRefreshing trialPhase = "refreshing" // the consumers are being refreshed
	trialWatching   trialPhase = "watching"   // they are watched
	trialRestoring  trialPhase = "restoring"  // the set was taken back, the consumers are being refreshed again
)

// encode is the note that the store keeps.
func (t *trial) encode() []byte {
	b, err := json.Marshal(t)
	if err != nil {
		panic(err) // strings and numbers
	}
	return b
}

// save keeps the note.
func (t *trial) save(a *Agent) error {
	tx, err := a.store().Begin()
	if err != nil {
		return err
	}
	defer tx.Close()
	return tx.SetTrial(t.encode())
}

func (t *trial) refresh(cfg Config) refresh {
	return refresh{cfg: cfg, names: t.Names, changed: t.Changed, removed: t.Removed, mode: t.Mode}
}

// run brings the trial to its end, from wherever it is. It returns the units
// that were refreshed, or a [vsockrpc.RolledBackError] where one did not stand
// the gate. Any other error leaves the trial as it is, for the next start.
func (t *trial) run(ctx context.Context, a *Agent, cfg Config, log *slog.Logger, progress func(vsockrpc.Progress)) ([]vsockrpc.Refreshed, error) {
	if !slices.Contains([]trialPhase{trialRefreshing, trialWatching, trialRestoring}, t.Phase) {
		return nil, t.abandon(a, errors.New("what an agent before this one noted makes no sense"))
	}
	run := refreshRun{jobs: t.Jobs}
	back := refreshRun{}
	err := a.withPID1(ctx, func(bus systemd) error {
		if t.Phase == trialRefreshing {
			if err := t.start(ctx, a, bus, cfg, &run, progress); err != nil {
				return err
			}
		}
		if t.Phase == trialWatching {
			if err := t.watch(ctx, a, bus, progress); err != nil {
				return err
			}
		}
		if t.Phase == trialRestoring {
			return t.restore(ctx, a, bus, cfg, &back, progress)
		}
		return nil
	})
	if err != nil && ctx.Err() == nil && !isRolledBack(err) {
		// Nobody can be watched any more: what is not known to be good is not
		// left in force.
		log.Error("a gate cannot go on", slog.Uint64("generation", t.Generation), slog.String("error", err.Error()))
		err = t.abandon(a, err)
	}
	if run.units == nil {
		run.units = map[string]vsockrpc.Refreshed{}
	}
	maps.Copy(run.units, back.units)
	list := run.list()
	if rolled, ok := errors.AsType[*vsockrpc.RolledBackError](err); ok {
		rolled.Units = list
		log.Warn("a set was rolled back by its gate", slog.Uint64("generation", t.Generation), slog.String("problem", rolled.Problem), slog.Bool("restored", rolled.Restored))
	} else if err == nil {
		log.Info("a set stood its gate", slog.Uint64("generation", t.Generation), slog.Int("units", len(t.Jobs)))
	}
	return list, err
}

func isRolledBack(err error) bool {
	_, ok := errors.AsType[*vsockrpc.RolledBackError](err)
	return ok
}

// trialJobs bounds the wait for the jobs of a trial, whatever the units' own
// time-outs: while it goes on, nobody changes a credential.
const trialJobs = 5 * time.Minute

// start refreshes the consumers. After a crash, those that are stale still; the
// jobs of the others went on in PID 1.
func (t *trial) start(ctx context.Context, a *Agent, bus systemd, cfg Config, run *refreshRun, progress func(vsockrpc.Progress)) error {
	limited, cancel := context.WithTimeout(ctx, trialJobs)
	defer cancel()
	err := t.startJobs(limited, a, bus, cfg, run, progress)
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		return t.fail(a, fmt.Sprintf("not every unit came up within %s", trialJobs))
	}
	if err != nil {
		return err
	}
	if names := bad(run.list()); len(names) > 0 {
		return t.fail(a, problemOf(names, func(unit string) string {
			u := run.units[unit]
			return fmt.Sprintf("%s: %s %s, %s", unit, u.Action, u.Result, u.State)
		}))
	}
	t.Base = map[string]consumer.Status{}
	for _, j := range t.Jobs {
		t.Base[j.Unit] = run.status[j.Unit]
	}
	t.Phase, t.UntilUSec = trialWatching, credstore.MonotonicUSec()+t.GateUSec
	return t.save(a)
}

func (t *trial) startJobs(ctx context.Context, a *Agent, bus systemd, cfg Config, run *refreshRun, progress func(vsockrpc.Progress)) error {
	p, err := t.refresh(cfg).plan(ctx, a, bus)
	if err != nil {
		return err
	}
	run.add(p)
	t.Jobs = run.jobs
	if err := t.save(a); err != nil {
		return err
	}
	return run.run(ctx, bus, p, progress)
}

// watch waits until the gate has passed, or a unit did not stand it.
func (t *trial) watch(ctx context.Context, a *Agent, bus systemd, progress func(vsockrpc.Progress)) error {
	var left time.Duration // none where there is nobody to watch
	if now := credstore.MonotonicUSec(); len(t.Jobs) > 0 && now < t.UntilUSec {
		left = time.Duration(min(t.UntilUSec-now, t.GateUSec)) * time.Microsecond //nolint:gosec // at most an hour
	}
	waitingFor := make([]string, len(t.Jobs))
	for i, j := range t.Jobs {
		waitingFor[i] = j.Unit
	}
	progress(vsockrpc.Progress{Phase: vsockrpc.PhaseWatching, WaitingFor: waitingFor})
	failures, err := bus.Watch(ctx, t.Base, left)
	if err != nil {
		return err
	}
	if len(failures) == 0 {
		t.Phase = ""
		tx, err := a.store().Begin()
		if err != nil {
			return err
		}
		defer tx.Close()
		return tx.PassTrial()
	}
	names := make([]string, len(failures))
	lines := map[string]string{}
	for i, f := range failures {
		names[i] = f.Unit
		lines[f.Unit] = fmt.Sprintf("%s %s: %s", f.Unit, f.Problem, f.Status)
	}
	return t.fail(a, problemOf(names, func(unit string) string { return lines[unit] }))
}

// problemOf is one line on the units that did not come up or stay up.
func problemOf(units []string, line func(string) string) string {
	const most = 3
	var lines []string
	for _, u := range units[:min(len(units), most)] {
		lines = append(lines, line(u))
	}
	if more := len(units) - most; more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(lines, "; ")
}

// fail takes the set back.
func (t *trial) fail(a *Agent, problem string) error {
	tx, err := a.store().Begin()
	if err != nil {
		return err
	}
	defer tx.Close()
	next := *t
	next.Phase, next.Problem, next.Base = trialRestoring, problem, nil
	if _, err := tx.FailTrial(problem, next.encode()); err != nil {
		return err
	}
	*t = next
	return nil
}

// restore brings every unit back to the values before the set: those that run
// with the set's, and those that the set brought down.
func (t *trial) restore(ctx context.Context, a *Agent, bus systemd, cfg Config, run *refreshRun, progress func(vsockrpc.Progress)) error {
	limited, cancel := context.WithTimeout(ctx, trialJobs)
	defer cancel()
	progress(vsockrpc.Progress{Phase: vsockrpc.PhaseRollingBack})
	stuck, err := t.restoreJobs(limited, a, bus, cfg, run, progress)
	if err != nil && (limited.Err() == nil || ctx.Err() != nil) {
		return err
	}
	return t.end(a, err == nil && !stuck && len(bad(run.list())) == 0)
}

// restoreJobs says, too, whether a unit has to go on with a value that was taken
// back, since its start would wait for another.
func (t *trial) restoreJobs(ctx context.Context, a *Agent, bus systemd, cfg Config, run *refreshRun, progress func(vsockrpc.Progress)) (stuck bool, err error) {
	// What the set removed is back, what it brought is gone.
	r := t.refresh(cfg)
	r.removed = t.Changed
	p, err := r.plan(ctx, a, bus)
	if err != nil {
		return false, err
	}
	// The others were told by the refresh before, or are about to be restarted.
	p.skipped = slices.DeleteFunc(p.skipped, func(u vsockrpc.Refreshed) bool { return !slices.Contains(p.wouldWait, u.Unit) })
	for _, j := range t.Jobs {
		s, err := bus.Status(ctx, j.Unit)
		if err != nil {
			return false, err
		}
		if up(s) || slices.Contains(p.wouldWait, j.Unit) {
			continue // if it is stale it is planned for
		}
		p.jobs = slices.DeleteFunc(p.jobs, func(have consumer.Job) bool { return have.Unit == j.Unit })
		p.jobs = append(p.jobs, consumer.Job{Unit: j.Unit, Action: consumer.ActionRestart})
	}
	run.add(p)
	return len(p.wouldWait) > 0, run.run(ctx, bus, p, func(p vsockrpc.Progress) {
		p.Phase = vsockrpc.PhaseRollingBack
		progress(p)
	})
}

// errInForce is matched by the error of a gate whose set could not be taken back.
var errInForce = errors.New("the set is in force still")

// end ends a trial that failed. The error says what came of its set, by what the
// store says.
func (t *trial) end(a *Agent, restored bool) error {
	tx, err := a.store().Begin()
	if err != nil {
		return err
	}
	defer tx.Close()
	if err := tx.EndTrial(); err != nil {
		return err
	}
	t.Phase = ""
	if r, ok := tx.Rejected(); !ok || r.Generation != t.Generation {
		return fmt.Errorf("%s: %w", t.Problem, errInForce)
	}
	return &vsockrpc.RolledBackError{Generation: generation(tx.Generation()), Problem: t.Problem, Restored: restored}
}

// abandon takes a set back whose units cannot be watched or refreshed any more.
// Where not even that can be done, it stays in force, and the error says so.
func (t *trial) abandon(a *Agent, why error) error {
	if t.Phase != trialRestoring {
		if err := t.fail(a, "its units cannot be watched: "+why.Error()); err != nil {
			t.Problem = fmt.Sprintf("%v; and taking it back failed: %v", why, err)
		}
	}
	return t.end(a, false)
}

// pendingTrial returns the trial that an agent before this one began; nil
// where there is none. A note that does not make sense is a trial that cannot
// be ended but by taking the set back. A set that is half in force is finished
// first: its trial may be part of it.
func (a *Agent) pendingTrial() (*trial, error) {
	tx, err := a.store().Begin()
	if err != nil {
		return nil, err
	}
	defer tx.Close()
	note := tx.Trial()
	if note == nil {
		return nil, nil
	}
	t := &trial{}
	if err := json.Unmarshal(note, t); err != nil {
		return &trial{Generation: tx.Generation()}, nil //nolint:nilerr // see above
	}
	// What was noted before the set was committed did not know what it changes.
	changed, removed := tx.Changed()
	t.Names, t.Changed, t.Removed = union(t.Names, changed), union(t.Changed, changed), union(t.Removed, removed)
	return t, nil
}

// union returns list with what it lacks of more.
func union(list, more []string) []string {
	for _, s := range more {
		if !slices.Contains(list, s) {
			list = append(list, s)
		}
	}
	return list
}
