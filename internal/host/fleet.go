package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// DefaultTimeout bounds what is done to one guest.
const DefaultTimeout = 30 * time.Second

// A Fleet is guests that the same is done to. Its zero value, with guests, is
// the careful way: one after the other, until the first failure.
type Fleet struct {
	Guests []Guest
	// Batch is how many guests are worked on at a time. 0 is one.
	Batch int
	// KeepGoing goes on after a failure.
	KeepGoing bool
	// Timeout bounds what is done to one guest. From the moment that a guest
	// tells how it gets on with refreshing units, which may take as long as the
	// units do, it bounds the time from one message to the next, and is at least
	// DefaultTimeout: see [vsockrpc.Heartbeat]. A guest that goes on telling is
	// waited for until ctx ends.
	Timeout time.Duration // 0 is DefaultTimeout
	// Waiting, if not nil, is told which guests are waited for, whenever that
	// changes. It, Progress and emit are never called at the same time.
	Waiting func(guests []Guest)
	// Progress, if not nil, is told how a guest gets on.
	Progress func(guest Guest, p vsockrpc.Progress)

	dial func(context.Context, vsockrpc.Target) (*vsockrpc.Client, error) // nil is vsockrpc.Dial
}

// A Result is what came of one guest. In JSON it has the wire's names; what
// does not belong to the call is left out. It has a guest's words as they came.
type Result struct {
	Guest  string `json:"guest"`
	Target string `json:"target"`

	Reachable *bool  `json:"reachable,omitzero"` // Probe
	Product   string `json:"product,omitzero"`
	Version   string `json:"version,omitzero"`

	DryRun     bool                 `json:"dryRun,omitzero"`
	Generation *int64               `json:"generation,omitzero"`
	Installed  []string             `json:"installed,omitzero"`
	Relabelled []string             `json:"relabelled,omitzero"`
	Removed    []string             `json:"removed,omitzero"`
	Unchanged  []string             `json:"unchanged,omitzero"`
	Entries    []vsockrpc.Entry     `json:"entries,omitzero"`
	Refusals   []credential.Refusal `json:"refusals,omitzero"` // of the set, or in a list of what booted

	// Units are there with an Error too: CodeRolledBack and CodeRefreshFailed.
	Units            []vsockrpc.Refreshed `json:"units,omitzero"`
	Waiting          []vsockrpc.Waiting   `json:"waiting,omitzero"`
	Rejected         []vsockrpc.Rejected  `json:"rejected,omitzero"`
	Gate             *int64               `json:"gate,omitzero"`
	ConsumersProblem string               `json:"consumersProblem,omitzero"`

	// What follows is Status's. Verdict and Reasons are as in [State]. LastContact
	// is a time of RFC 3339, by the host's clock, and ClockOffset milliseconds that
	// the guest's clock is ahead. ProviderStatus has no report.
	Verdict     string            `json:"verdict,omitzero"`
	Reasons     []vsockrpc.Reason `json:"reasons,omitzero"`
	LastContact string            `json:"lastContact,omitzero"`
	ClockOffset *int64            `json:"clockOffset,omitzero"`
	Report      *vsockrpc.Report  `json:"report,omitzero"`
	Trimmed     bool              `json:"trimmed,omitzero"` // the report was too large to keep all of it

	ProviderStatus *vsockrpc.ProviderStatus `json:"providerStatus,omitzero"`

	Error *Failure `json:"error,omitzero"`
}

// Push puts a set in force in each guest, and hands each result to emit, in
// the order of the guests. The values are not wiped.
func (f Fleet) Push(ctx context.Context, p *vsockrpc.ApplyParams, emit func(Result)) error {
	return f.each(ctx, !p.DryRun, emit, func(ctx context.Context, c vsockrpc.Credentials, r *Result) error {
		a, err := c.Apply(ctx, p)
		r.DryRun = p.DryRun && err == nil
		return r.applied(&a, err)
	})
}

// Retry puts the set that a gate rolled back in force again, in each guest.
func (f Fleet) Retry(ctx context.Context, p *vsockrpc.RetryParams, emit func(Result)) error {
	return f.each(ctx, true, emit, func(ctx context.Context, c vsockrpc.Credentials, r *Result) error {
		a, err := c.Retry(ctx, p)
		return r.applied(&a, err)
	})
}

func (r *Result) applied(a *vsockrpc.ApplyResult, err error) error {
	if err == nil {
		r.Generation, r.Units = &a.Generation, a.Units
		r.Installed, r.Relabelled, r.Removed, r.Unchanged = a.Installed, a.Relabelled, a.Removed, a.Unchanged
		r.Refusals = a.Refusals
	}
	return err
}

// Remove removes names from each guest.
func (f Fleet) Remove(ctx context.Context, p *vsockrpc.RemoveParams, emit func(Result)) error {
	return f.each(ctx, true, emit, func(ctx context.Context, c vsockrpc.Credentials, r *Result) error {
		a, err := c.Remove(ctx, p)
		if err == nil {
			r.Generation, r.Removed, r.Unchanged, r.Units = &a.Generation, a.Removed, a.Unchanged, a.Units
		}
		return err
	})
}

// Rollback puts back, in each guest, what its last set replaced.
func (f Fleet) Rollback(ctx context.Context, p *vsockrpc.RollbackParams, emit func(Result)) error {
	return f.each(ctx, true, emit, func(ctx context.Context, c vsockrpc.Credentials, r *Result) error {
		a, err := c.Rollback(ctx, p)
		if err == nil {
			r.Generation, r.Installed, r.Removed, r.Units = &a.Generation, a.Installed, a.Removed, a.Units
		}
		return err
	})
}

// Refresh refreshes the units of each guest that load these credentials.
func (f Fleet) Refresh(ctx context.Context, p *vsockrpc.RefreshParams, emit func(Result)) error {
	return f.each(ctx, true, emit, func(ctx context.Context, c vsockrpc.Credentials, r *Result) error {
		a, err := c.Refresh(ctx, p)
		if err == nil {
			r.Generation, r.Units = &a.Generation, a.Units
		}
		return err
	})
}

// List lists what is in each guest, but for the consumers.
func (f Fleet) List(ctx context.Context, emit func(Result)) error {
	return f.list(ctx, emit, vsockrpc.Credentials.List)
}

// ListConsumers lists what is in each guest, and the units that load it.
func (f Fleet) ListConsumers(ctx context.Context, emit func(Result)) error {
	return f.list(ctx, emit, vsockrpc.Credentials.ListConsumers)
}

func (f Fleet) list(ctx context.Context, emit func(Result), list func(vsockrpc.Credentials, context.Context) (vsockrpc.ListResult, error)) error {
	return f.each(ctx, false, emit, func(ctx context.Context, c vsockrpc.Credentials, r *Result) error {
		a, err := list(c, ctx)
		if err == nil {
			r.Generation, r.Entries, r.Refusals = &a.Generation, a.Entries, a.Refusals
			r.Waiting, r.Rejected, r.Gate, r.ConsumersProblem = a.Waiting, a.Rejected, a.Gate, a.ConsumersProblem
		}
		return err
	})
}

// Probe asks each guest who it is, all of them whatever KeepGoing says. That
// one cannot be reached is a result, not an error.
func (f Fleet) Probe(ctx context.Context, emit func(Result)) error {
	f.KeepGoing = true
	err := f.each(ctx, false, func(r Result) {
		reachable := r.Error == nil || r.Error.Status() != StatusUnreachable
		r.Reachable = &reachable
		emit(r)
	}, func(ctx context.Context, c vsockrpc.Credentials, r *Result) error {
		var i info
		err := c.Client.Call(ctx, "org.varlink.service.GetInfo", nil, &i)
		r.Product, r.Version = i.product, i.version
		return err
	})
	if ctx.Err() == nil {
		return nil
	}
	return err
}

// info is what a probe wants to know of GetInfo's answer.
type info struct{ product, version string }

var infoFields = vsockrpc.NewFields("product", "version").Open()

// DecodeFrom decodes the answer.
func (i *info) DecodeFrom(d *vsockrpc.Decoder) {
	d.Object(infoFields, func(key string) {
		switch key {
		case "product":
			i.product = d.String(maxDetail)
		case "version":
			i.version = d.String(maxDetail)
		}
	})
	if d.Err() != nil {
		*i = info{}
	}
}

// A FleetError says that something went wrong with at least one of several
// guests. It matches the Failure with the highest status.
type FleetError struct {
	Failed, NotTried, Guests int
	Worst                    *Failure
}

func (e *FleetError) Error() string {
	what := "failed"
	if e.Worst != nil && e.Worst.Code == CodeNotHealthy {
		what = "are not healthy"
	}
	s := fmt.Sprintf("%d of %d guests %s", e.Failed, e.Guests, what)
	if e.NotTried > 0 {
		s += fmt.Sprintf(", and %d were not tried (--keep-going does)", e.NotTried)
	}
	return s
}

// Unwrap returns the failure with the highest status.
func (e *FleetError) Unwrap() error { return e.Worst }

// doer does something to one guest.
type doer func(context.Context, vsockrpc.Credentials, *Result) error

// each does the same to every guest, as all does, over a connection of its own.
func (f Fleet) each(ctx context.Context, changes bool, emit func(Result), do doer) error {
	if f.dial == nil {
		f.dial = vsockrpc.Dial
	}
	return f.all(ctx, emit, func(ctx context.Context, g Guest, r *Result, step func(vsockrpc.Progress)) *Failure {
		return f.one(ctx, g, changes, r, do, step)
	})
}

// all does the same to every guest, Batch at a time. One is begun when another is
// done, so that after a failure there are at most Batch-1 others under way, which
// are not interrupted. The error is that of the one guest, or a [FleetError].
func (f Fleet) all(ctx context.Context, emit func(Result), one func(context.Context, Guest, *Result, func(vsockrpc.Progress)) *Failure) error {
	if len(f.Guests) == 0 {
		return errors.New("there is no guest to do anything to")
	}
	type done struct {
		i int
		r Result
	}
	type step struct {
		i int
		p vsockrpc.Progress
	}
	steps := make(chan step)
	// Every guest may leave its result without being waited for.
	results := make(chan done, len(f.Guests))
	waiting := map[int]Result{}
	e := FleetError{Guests: len(f.Guests)}
	running := make([]bool, len(f.Guests))
	begun, ended, emitted := 0, 0, 0
	for emitted < len(f.Guests) {
		for begun < len(f.Guests) && begun-ended < max(f.Batch, 1) {
			i, g := begun, f.Guests[begun]
			begun++
			r := Result{Guest: g.Name, Target: g.Target.String()}
			switch {
			case ctx.Err() != nil:
				r.Error = &Failure{Code: CodeInterrupted, Message: "interrupted before it was tried"}
				results <- done{i, r}
			case e.Failed > 0 && !f.KeepGoing:
				r.Error = &Failure{Code: CodeNotTried, Message: "not tried, since another guest failed"}
				results <- done{i, r}
			default:
				running[i] = true
				go func() {
					r.Error = one(ctx, g, &r, func(p vsockrpc.Progress) { steps <- step{i, p} })
					results <- done{i, r}
				}()
			}
		}
		if f.Waiting != nil {
			var guests []Guest
			for i, yes := range running[:begun] {
				if yes {
					guests = append(guests, f.Guests[i])
				}
			}
			f.Waiting(guests)
		}
		var d done
		for ok := false; !ok; {
			select {
			case s := <-steps:
				if f.Progress != nil {
					f.Progress(f.Guests[s.i], s.p)
				}
			case d = <-results:
				ok = true
			}
		}
		ended++
		running[d.i] = false
		switch fail := d.r.Error; {
		case fail == nil:
		case fail.Code == CodeNotTried:
			e.NotTried++
		default:
			e.Failed++
			if e.Worst == nil || fail.Status() > e.Worst.Status() {
				e.Worst = fail
			}
		}
		waiting[d.i] = d.r
		for r, ok := waiting[emitted]; ok; r, ok = waiting[emitted] {
			delete(waiting, emitted)
			emit(r)
			emitted++
		}
	}
	switch {
	case e.Failed == 0:
		return nil
	case e.Guests == 1:
		return e.Worst
	}
	return &e
}

// one does it to one guest, over a connection of its own.
func (f Fleet) one(ctx context.Context, g Guest, changes bool, r *Result, do doer, step func(vsockrpc.Progress)) *Failure {
	if f.Timeout <= 0 {
		f.Timeout = DefaultTimeout
	}
	limited, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(f.Timeout, func() { cancel(context.DeadlineExceeded) })
	defer timer.Stop()
	c, err := f.dial(limited, g.Target)
	if err != nil {
		return failure(err, fateUntouched, ctx.Err() != nil)
	}
	defer c.Close()
	fate := fateUntouched
	if changes {
		fate = fateUnknown
	}
	err = do(limited, vsockrpc.Credentials{Client: c, Progress: func(p vsockrpc.Progress) {
		fate = fateBegun
		timer.Stop() // to show it takes as long as it takes
		step(p)
		timer.Reset(max(f.Timeout, DefaultTimeout))
	}}, r)
	if err == nil {
		return refreshFailure(r)
	}
	if e, ok := errors.AsType[*vsockrpc.RolledBackError](err); ok {
		r.Generation, r.Units = &e.Generation, e.Units
	}
	return failure(err, fate, ctx.Err() != nil)
}
