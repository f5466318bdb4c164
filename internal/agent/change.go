package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/vsockrpc"
)

// A work is what goes on when the call that began it may be gone: refreshes
// and gates. It keeps an idle agent from ending.
type work struct {
	ctx  context.Context // ends with the agent; set before the first call
	wg   sync.WaitGroup
	busy *activity
	// trial is held by who runs one, from before it is committed.
	trial sync.Mutex
}

// run does something in a goroutine of its own.
func (w *work) run(f func(context.Context)) {
	release := w.busy.hold()
	w.wg.Go(func() {
		defer release()
		f(w.ctx)
	})
}

// An activity counts what keeps an agent from ending when nobody calls.
type activity struct {
	mu      sync.Mutex
	n       int
	waiting int           // units on the credentials socket
	changed chan struct{} // closed at the next change; nil if nobody waits for it
}

// hold counts one more, until release is called.
func (a *activity) hold() (release func()) {
	a.add(1)
	return sync.OnceFunc(func() { a.add(-1) })
}

func (a *activity) add(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.n += n
	a.touchLocked()
}

// setWaiting says how many units wait.
func (a *activity) setWaiting(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting = n
	a.touchLocked()
}

func (a *activity) touchLocked() {
	if a.changed != nil {
		close(a.changed)
		a.changed = nil
	}
}

// wait returns nil when there is nothing to stay for, and whether it had to
// wait for that; or ctx's error.
func (a *activity) wait(ctx context.Context) (waited bool, err error) {
	for {
		a.mu.Lock()
		if a.n == 0 && a.waiting == 0 {
			a.mu.Unlock()
			return waited, nil
		}
		if a.changed == nil {
			a.changed = make(chan struct{})
		}
		changed := a.changed
		a.mu.Unlock()
		waited = true
		select {
		case <-changed:
		case <-ctx.Done():
			return waited, ctx.Err()
		}
	}
}

// A change is a call that changes values, and refreshes their consumers.
type change struct {
	// names are those that the call is about, where they are known before it is
	// carried out.
	names    []string
	expected *int64
	mode     string
	gate     time.Duration
	// apply does it. With a note the set goes on trial.
	apply func(tx *credstore.Tx, note []byte) (credstore.Result, error)
	// done, if not nil, is called when the values are not needed any more.
	done func()
	// reply is the answer, with what came of the refresh, or with progress an
	// answer that others follow.
	reply func(res credstore.Result, units []vsockrpc.Refreshed, p *vsockrpc.Progress) vsockrpc.Marshaler
}

// carryOut carries a change out, and answers.
func (c credentials) carryOut(ctx context.Context, call *vsockrpc.Call, ch change) error {
	r := refresh{cfg: c.cfg, names: slices.Clone(ch.names), mode: ch.mode}
	if ch.mode != vsockrpc.RefreshNone && (ch.mode != "" || len(c.cfg.Credentials) > 0) {
		// Before anything is changed: a refresh was asked for.
		bus, err := c.a.pid1(ctx)
		if err != nil {
			return &vsockrpc.NoSystemdError{Problem: err.Error()}
		}
		bus.Close()
	}
	if ch.gate > 0 {
		if r.mode == "" && !r.wanted() {
			r.mode = vsockrpc.RefreshAuto // a gate wants something to watch
		}
		if !c.work.trial.TryLock() {
			return c.gateInProgress()
		}
	}
	t := &trial{Phase: trialRefreshing, Mode: r.mode, GateUSec: uint64(max(0, ch.gate.Microseconds())), Names: ch.names, Changed: ch.names}
	res, err := c.commit(ch, ch.gate > 0, t)
	if ch.gate > 0 && t.Generation == 0 {
		c.work.trial.Unlock() // there is none
	}
	if errors.Is(err, credstore.ErrOnTrial) {
		// An agent before this one may have left it.
		c.resume()
		return c.gateInProgress()
	}
	if err != nil {
		return err
	}
	c.changes.tell()
	if c.hand != nil {
		c.hand.server.Retry() // somebody may wait for it
	}
	r.changed, r.removed = slices.Concat(res.Installed, res.Removed), res.Removed
	r.names = union(r.names, r.changed) // a rollback or prune found some
	onTrial := t.Generation != 0
	if !onTrial && !r.wanted() {
		return call.Reply(ch.reply(res, nil, nil))
	}
	// What follows may take an hour.
	if ch.done != nil {
		ch.done()
	}
	call.Forget()
	return c.follow(ctx, call, func(units []vsockrpc.Refreshed, p *vsockrpc.Progress) vsockrpc.Marshaler {
		if p != nil {
			return ch.reply(credstore.Result{Generation: res.Generation}, nil, p)
		}
		return ch.reply(res, units, nil)
	}, func(ctx context.Context, progress func(vsockrpc.Progress)) ([]vsockrpc.Refreshed, error) {
		if onTrial {
			defer c.work.trial.Unlock()
			t.Names, t.Changed, t.Removed = r.names, r.changed, r.removed
			return t.run(ctx, c.a, c.cfg, c.log, progress)
		}
		return r.do(ctx, c.a, progress)
	})
}

// commit puts the change in force, on trial if that is wanted and there is
// something to take back. Then t has the generation.
func (c credentials) commit(ch change, onTrial bool, t *trial) (credstore.Result, error) {
	tx, err := c.a.store().Begin()
	if err != nil {
		return credstore.Result{}, err
	}
	defer tx.Close()
	if err := expect(tx, ch.expected); err != nil {
		return credstore.Result{}, err
	}
	before := tx.Generation()
	if tx.Trial() != nil {
		return credstore.Result{}, credstore.ErrOnTrial
	}
	var note []byte
	if onTrial {
		next := *t
		next.Generation = before + 1
		note = next.encode()
	}
	res, err := ch.apply(tx, note)
	if err != nil {
		return credstore.Result{}, wireError(err)
	}
	if onTrial && res.Generation > before {
		t.Generation = res.Generation
	}
	return res, nil
}

// gateInProgress is the error of a call that comes while a set is on trial.
func (c credentials) gateInProgress() error {
	tx, err := c.a.store().View()
	if err != nil {
		return err
	}
	defer tx.Close()
	return &vsockrpc.GateInProgressError{Generation: generation(tx.Generation())}
}

// resume goes on with a trial that an agent before this one left, if there is
// one and nobody runs it.
func (c credentials) resume() {
	if !c.work.trial.TryLock() {
		return
	}
	t, err := c.a.pendingTrial()
	if err != nil {
		c.log.Error("looking for a gate to go on with failed", slog.String("error", err.Error()))
	}
	if t == nil {
		c.work.trial.Unlock()
		return
	}
	c.log.Info("going on with a gate", slog.Uint64("generation", t.Generation), slog.String("phase", string(t.Phase)))
	c.work.run(func(ctx context.Context) {
		defer c.work.trial.Unlock()
		if _, err := t.run(ctx, c.a, c.cfg, c.log, func(vsockrpc.Progress) {}); err != nil && ctx.Err() == nil && !isRolledBack(err) {
			c.log.Error("a gate ended with an error", slog.Uint64("generation", t.Generation), slog.String("error", err.Error()))
		}
	})
}

// follow has something done whether the caller stays or not, and answers: with
// more, about its progress, and at the end with what came of it.
func (c credentials) follow(
	ctx context.Context, call *vsockrpc.Call,
	reply func([]vsockrpc.Refreshed, *vsockrpc.Progress) vsockrpc.Marshaler,
	do func(context.Context, func(vsockrpc.Progress)) ([]vsockrpc.Refreshed, error),
) error {
	type outcome struct {
		units []vsockrpc.Refreshed
		err   error
	}
	// Whoever does it does not wait for a caller that reads slowly: the result
	// has everything.
	events, done := make(chan vsockrpc.Progress, 1024), make(chan outcome, 1)
	c.work.run(func(ctx context.Context) {
		units, err := do(ctx, func(p vsockrpc.Progress) {
			select {
			case events <- p:
			default:
			}
		})
		if err != nil && ctx.Err() == nil && !isRolledBack(err) {
			c.log.Error("refreshing consumers failed", slog.String("error", err.Error()))
		}
		done <- outcome{units, err}
	})

	last := vsockrpc.Progress{Phase: vsockrpc.PhaseApplied}
	tell := func(p vsockrpc.Progress) error {
		if !call.More {
			return nil
		}
		return call.ReplyMore(reply(nil, &p))
	}
	if err := tell(last); err != nil {
		return err
	}
	// Half of what is promised: the caller's clock may be faster.
	heart := time.NewTicker(vsockrpc.Heartbeat / 2)
	defer heart.Stop()
	for {
		var err error
		select {
		case p := <-events:
			if p.Unit == nil {
				last = p
			} else {
				last.WaitingFor = slices.DeleteFunc(slices.Clone(last.WaitingFor), func(unit string) bool { return unit == p.Unit.Unit })
			}
			err = tell(p)
		case <-heart.C:
			err = tell(last)
		case o := <-done:
			for len(events) > 0 {
				if err := tell(<-events); err != nil {
					return err
				}
			}
			if o.err != nil {
				return o.err
			}
			return call.Reply(reply(o.units, nil))
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if err != nil {
			return err
		}
	}
}

var errNothingRejected = &vsockrpc.NothingRejectedError{}

// refresh serves Refresh.
func (c credentials) refresh(ctx context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RefreshParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	tx, err := c.a.store().View()
	if err != nil {
		return err
	}
	g, onTrial, names := generation(tx.Generation()), tx.Trial() != nil, p.Names
	if len(names) == 0 {
		for _, e := range tx.Entries() {
			names = append(names, e.Name)
		}
	}
	tx.Close()
	if onTrial {
		c.resume()
		return &vsockrpc.GateInProgressError{Generation: g}
	}
	bus, err := c.a.pid1(ctx)
	if err != nil {
		return &vsockrpc.NoSystemdError{Problem: err.Error()}
	}
	bus.Close()
	r := refresh{cfg: c.cfg, names: names, mode: p.Refresh, all: p.All}
	if r.mode == "" {
		r.mode = vsockrpc.RefreshAuto
	}
	c.flush()
	return c.follow(ctx, call, func(units []vsockrpc.Refreshed, p *vsockrpc.Progress) vsockrpc.Marshaler {
		return &vsockrpc.RefreshResult{Generation: g, Units: units, Progress: p}
	}, func(ctx context.Context, progress func(vsockrpc.Progress)) ([]vsockrpc.Refreshed, error) {
		return r.do(ctx, c.a, progress)
	})
}

// retry serves Retry.
func (c credentials) retry(ctx context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RetryParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	set, err := c.rejected()
	if err != nil {
		return err
	}
	defer wipe(set)
	return c.carryOut(ctx, call, change{
		names: setNames(set), expected: p.ExpectedGeneration, mode: p.Refresh, gate: p.Gate,
		apply: func(tx *credstore.Tx, note []byte) (credstore.Result, error) {
			set.Trial = note
			return tx.Apply(set)
		},
		done: func() { wipe(set) },
		reply: func(res credstore.Result, units []vsockrpc.Refreshed, p *vsockrpc.Progress) vsockrpc.Marshaler {
			return applyReply(res, units, p)
		},
	})
}

// rejected returns the set that was rejected. Its caller wipes it.
func (c credentials) rejected() (credstore.Set, error) {
	tx, err := c.a.store().View()
	if err != nil {
		return credstore.Set{}, err
	}
	defer tx.Close()
	set, err := tx.RejectedSet()
	if errors.Is(err, credstore.ErrNothingRejected) {
		return set, errNothingRejected
	}
	return set, err
}

func wipe(set credstore.Set) {
	for _, c := range set.Install {
		c.Value.Wipe()
	}
}

// setNames are all names of a set.
func setNames(set credstore.Set) []string {
	names := slices.Clone(set.Remove)
	for _, c := range set.Install {
		names = append(names, c.Name)
	}
	return names
}

// flush writes down who was handed what, so that it is seen.
func (c credentials) flush() {
	if c.hand != nil {
		c.hand.save()
	}
}
