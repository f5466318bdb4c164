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
	// Timeout bounds what is done to one guest.
	Timeout time.Duration // 0 is DefaultTimeout
	// Waiting, if not nil, is told which guests are waited for, whenever that
	// changes. It and emit are never called at the same time.
	Waiting func(guests []Guest)
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
	Refusals   []credential.Refusal `json:"refusals,omitzero"` // of the last import

	Error *Failure `json:"error,omitzero"`
}

// Push puts a set in force in each guest, and hands each result to emit, in
// the order of the guests. The values are not wiped.
func (f Fleet) Push(ctx context.Context, p *vsockrpc.ApplyParams, emit func(Result)) error {
	return f.each(ctx, !p.DryRun, emit, func(ctx context.Context, c *vsockrpc.Client, r *Result) error {
		a, err := vsockrpc.Credentials{Client: c}.Apply(ctx, p)
		if err == nil {
			r.DryRun, r.Generation = p.DryRun, &a.Generation
			r.Installed, r.Relabelled, r.Removed, r.Unchanged = a.Installed, a.Relabelled, a.Removed, a.Unchanged
		}
		return err
	})
}

// Remove removes names from each guest.
func (f Fleet) Remove(ctx context.Context, p *vsockrpc.RemoveParams, emit func(Result)) error {
	return f.each(ctx, true, emit, func(ctx context.Context, c *vsockrpc.Client, r *Result) error {
		a, err := vsockrpc.Credentials{Client: c}.Remove(ctx, p)
		if err == nil {
			r.Generation, r.Removed, r.Unchanged = &a.Generation, a.Removed, a.Unchanged
		}
		return err
	})
}

// Rollback puts back, in each guest, what its last set replaced.
func (f Fleet) Rollback(ctx context.Context, p *vsockrpc.RollbackParams, emit func(Result)) error {
	return f.each(ctx, true, emit, func(ctx context.Context, c *vsockrpc.Client, r *Result) error {
		a, err := vsockrpc.Credentials{Client: c}.Rollback(ctx, p)
		if err == nil {
			r.Generation, r.Installed, r.Removed = &a.Generation, a.Installed, a.Removed
		}
		return err
	})
}

// List lists what is in each guest.
func (f Fleet) List(ctx context.Context, emit func(Result)) error {
	return f.each(ctx, false, emit, func(ctx context.Context, c *vsockrpc.Client, r *Result) error {
		a, err := vsockrpc.Credentials{Client: c}.List(ctx)
		if err == nil {
			r.Generation, r.Entries, r.Refusals = &a.Generation, a.Entries, a.Refusals
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
	}, func(ctx context.Context, c *vsockrpc.Client, r *Result) error {
		var i info
		err := c.Call(ctx, "org.varlink.service.GetInfo", nil, &i)
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
	s := fmt.Sprintf("%d of %d guests failed", e.Failed, e.Guests)
	if e.NotTried > 0 {
		s += fmt.Sprintf(", and %d were not tried (--keep-going does)", e.NotTried)
	}
	return s
}

// Unwrap returns the failure with the highest status.
func (e *FleetError) Unwrap() error { return e.Worst }

// each does the same to every guest, Batch at a time. One is begun when
// another is done, so that after a failure there are at most Batch-1 others
// under way, which are not interrupted. The error is that of the one guest, or
// a [FleetError].
func (f Fleet) each(ctx context.Context, changes bool, emit func(Result), do func(context.Context, *vsockrpc.Client, *Result) error) error {
	if len(f.Guests) == 0 {
		return errors.New("there is no guest to do anything to")
	}
	if f.Timeout <= 0 {
		f.Timeout = DefaultTimeout
	}
	type done struct {
		i int
		r Result
	}
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
					r.Error = f.one(ctx, g, changes, &r, do)
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
		d := <-results
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
func (f Fleet) one(ctx context.Context, g Guest, changes bool, r *Result, do func(context.Context, *vsockrpc.Client, *Result) error) *Failure {
	limited, cancel := context.WithTimeout(ctx, f.Timeout)
	defer cancel()
	c, err := vsockrpc.Dial(limited, g.Target)
	if err != nil {
		return failure(err, false, ctx.Err() != nil)
	}
	defer c.Close()
	if err := do(limited, c, r); err != nil {
		return failure(err, changes, ctx.Err() != nil)
	}
	return nil
}
