package host

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// statusBatch is how many guests are asked at a time for their status, where
	// no Batch says so. Each may be waited for until its time is over, and may take
	// as much memory as a report can.
	statusBatch = 64
	// providerTimeout bounds what a provider on this host is waited for.
	providerTimeout = 2 * time.Second
)

// Status asks each guest how it is, all of them whatever KeepGoing says, and 64
// at a time where Batch is 0. Where a guest has a provider, that is asked as well:
// for what only it knows, and for the last report of a guest that does not answer.
//
// The provider's word holds for a guest too that does not let this caller ask, and
// that its provider heard in the last minute.
//
// The Failure of a guest that answered and is not healthy has CodeNotHealthy, and
// that of one that did not answer is as for any other call, whatever its provider
// knows.
func (f Fleet) Status(ctx context.Context, emit func(Result)) error {
	f.KeepGoing = true
	f.Batch = cmp.Or(f.Batch, statusBatch)
	return f.all(ctx, emit, func(ctx context.Context, g Guest, r *Result, _ func(vsockrpc.Progress)) *Failure {
		s, fail := f.status(ctx, g)
		r.Verdict, r.Reasons, r.Report, r.Trimmed = s.Verdict(), s.Reasons(), s.Report, s.Trimmed
		r.ProviderStatus = s.Provider
		if !s.LastContact.IsZero() {
			r.LastContact = s.LastContact.UTC().Format(time.RFC3339Nano)
		}
		if s.ClockOffset != nil {
			ms := s.ClockOffset.Milliseconds()
			r.ClockOffset = &ms
		}
		if fail == nil && !s.Healthy() {
			fail = &Failure{Code: CodeNotHealthy, Message: s.summary()}
			if s.Verdict() == VerdictUnknown {
				fail.Message = "the agent does not say how the guest is"
				if s.Report != nil {
					fail.Message += "; it is of version " + vsockrpc.Escape(s.Report.Version, maxWord)
				}
			}
		}
		return fail
	})
}

// status is how one guest is.
func (f Fleet) status(ctx context.Context, g Guest) (State, *Failure) {
	asked := make(chan *vsockrpc.ProviderStatus, 1)
	go func() { asked <- f.askProvider(ctx, g) }()
	limited, cancel := context.WithTimeout(ctx, cmp.Or(f.Timeout, DefaultTimeout))
	defer cancel()
	r, err := askHealth(limited, g.Target, f.dial)
	at := time.Now()
	s := State{Guest: g.Name, Target: g.Target.String()}
	p := <-asked
	if p != nil {
		s = stateOf(g, p, at)
	}
	if err != nil && notLetIn(err) && s.Reachable && at.Sub(s.LastContact) <= silence {
		return s, nil
	}
	if err != nil {
		s.Problem = failure(err, fateUntouched, ctx.Err() != nil)
		s.Reachable = s.Problem.Status() != StatusUnreachable
		return s, s.Problem
	}
	s.Reachable, s.Problem, s.LastContact, s.ClockOffset = true, nil, at, clockOffset(r.Time, at)
	s.Report, s.Trimmed = trim(r)
	return s, nil
}

// notLetIn reports whether a guest may be there that this caller may not ask: it
// may not open the socket, or the agent hung up without a word.
func notLetIn(err error) bool {
	e, ok := errors.AsType[*vsockrpc.ConnectError](err)
	return ok && (e.Step == vsockrpc.StepRefused || e.Step == vsockrpc.StepSocket && errors.Is(e.Err, fs.ErrPermission))
}

// askProvider asks a guest's provider, and returns nil where there is none that
// answers.
func (f Fleet) askProvider(ctx context.Context, g Guest) *vsockrpc.ProviderStatus {
	if g.Provider.Socket == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, providerTimeout)
	defer cancel()
	dial := f.dial
	if dial == nil {
		dial = vsockrpc.Dialer{MessageLimit: maxStatus}.Dial
	}
	c, err := dial(ctx, providerTarget(g))
	if err != nil {
		return nil
	}
	defer c.Close()
	s, err := vsockrpc.Provider{Client: c}.Status(ctx)
	if err != nil {
		return nil
	}
	return s
}

// askHealth asks a guest for its report.
func askHealth(ctx context.Context, to vsockrpc.Target, dial func(context.Context, vsockrpc.Target) (*vsockrpc.Client, error)) (*vsockrpc.Report, error) {
	if dial == nil {
		dial = vsockrpc.Dial
	}
	c, err := dial(ctx, to)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return vsockrpc.Health{Client: c}.Get(ctx)
}
