package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/guestagent/guestagent/credsocket"
	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// maxRefusals bounds the refusals that one answer lists.
const maxRefusals = 1024

// credentials serves io.guestagent.Credentials. Each call opens the store for
// itself, so that one writer goes after the other whoever they are, and nothing
// is held between calls, nor while units are waited for.
type credentials struct {
	a      *Agent
	cfg    Config
	log    *slog.Logger
	work   *work
	hand   *handout     // nil where there is no credentials socket
	giving *atomic.Bool // memory is about to be given back
	// changes are told of what becomes of the store.
	changes *changes
}

// iface is io.guestagent.Credentials, ready to be served.
func (c credentials) iface() vsockrpc.Interface {
	return vsockrpc.Interface{
		Name:        vsockrpc.CredentialsInterface,
		Description: vsockrpc.CredentialsDescription,
		Methods: map[string]vsockrpc.Handler{
			"Apply":    c.apply,
			"List":     c.list,
			"Refresh":  c.refresh,
			"Remove":   c.remove,
			"Retry":    c.retry,
			"Rollback": c.rollback,
		},
	}
}

// source is what a value of this peer's is recorded as.
func source(p vsockrpc.Peer) credential.Source {
	if p.Local() {
		return credential.SourceLocal
	}
	return credential.SourcePush
}

func (c credentials) apply(ctx context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.ApplyParams
	if err := call.Decode(&p); err != nil {
		return withSource(err, source(call.Peer))
	}
	defer p.Wipe()
	size := 0
	for _, cred := range p.Set {
		size += cred.Value.Len()
	}
	if size >= largeSet {
		defer c.giveBack()
	}
	set := credstore.Set{Source: source(call.Peer), Remove: p.Remove, Forget: p.Forget, Ephemeral: p.Ephemeral}
	if p.Source == credential.SourceProvider {
		set.Source = p.Source
	}
	for _, cred := range p.Set {
		set.Install = append(set.Install, credstore.Credential{
			Name: cred.Name, Revision: cred.Revision, Value: cred.Value, AllowShadowed: cred.AllowShadowed, Rejected: cred.Rejected,
		})
	}
	set, refusals := c.denied(set)
	if len(refusals) > 0 && !p.Partial {
		return &vsockrpc.RefusedError{Refusals: refusals}
	}
	denied := len(refusals)
	apply := func(tx *credstore.Tx, do func(credstore.Set) (credstore.Result, error), note []byte) (credstore.Result, error) {
		set := set
		set.Trial = note
		if p.Prune {
			set.Remove = append(slices.Clone(set.Remove), pruned(tx, set, refusals[:denied], p.PrunePrefix)...)
		}
		if p.Partial {
			var more []credential.Refusal
			set, more = tx.Check(set)
			refusals = append(refusals[:denied:denied], more...)
		}
		res, err := do(set)
		if err == nil && set.Source == credential.SourceProvider && !p.DryRun {
			if err := provided(tx, refusals); err != nil {
				c.log.Error("noting what the provider did failed; its set is in force", slog.String("error", err.Error()))
			}
		}
		return res, err
	}
	reply := func(res credstore.Result, units []vsockrpc.Refreshed, progress *vsockrpc.Progress) vsockrpc.Marshaler {
		r := applyReply(res, units, progress)
		r.Refusals = listed(refusals)
		return r
	}
	if p.DryRun {
		tx, err := c.a.store().View()
		if err != nil {
			return err
		}
		defer tx.Close()
		if err := expect(tx, p.ExpectedGeneration); err != nil {
			return err
		}
		res, err := apply(tx, tx.DryRun, nil)
		if errors.Is(err, credstore.ErrOnTrial) {
			return &vsockrpc.GateInProgressError{Generation: generation(tx.Generation())}
		}
		if err != nil {
			return wireError(err)
		}
		tx.Close() // before a caller that may read slowly is waited for
		return call.Reply(reply(res, nil, nil))
	}
	return c.carryOut(ctx, call, change{
		names: setNames(set), expected: p.ExpectedGeneration, mode: p.Refresh, gate: p.Gate,
		apply: func(tx *credstore.Tx, note []byte) (credstore.Result, error) { return apply(tx, tx.Apply, note) },
		done:  p.Wipe,
		reply: reply,
	})
}

func applyReply(res credstore.Result, units []vsockrpc.Refreshed, p *vsockrpc.Progress) *vsockrpc.ApplyResult {
	return &vsockrpc.ApplyResult{
		Generation: generation(res.Generation), Installed: res.Installed, Relabelled: res.Relabelled, Removed: res.Removed, Unchanged: res.Unchanged,
		Units: units, Progress: p,
	}
}

const (
	// largeSet is how many bytes make a set a large one.
	largeSet = 64 << 10
	// giveBackAfter is when what a large set needed, or a report, is no longer in
	// use.
	giveBackAfter = time.Second
)

// giveBack returns the memory that something needed which does not happen all the
// time, once that is forgotten. An agent that is not called again would keep it
// until it ends.
func (c credentials) giveBack() {
	if c.giving.CompareAndSwap(false, true) {
		time.AfterFunc(giveBackAfter, func() {
			c.giving.Store(false)
			debug.FreeOSMemory()
		})
	}
}

func (c credentials) remove(ctx context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RemoveParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	return c.carryOut(ctx, call, change{
		names: p.Names, expected: p.ExpectedGeneration, mode: p.Refresh,
		apply: func(tx *credstore.Tx, _ []byte) (credstore.Result, error) {
			return tx.Apply(credstore.Set{Source: source(call.Peer), Remove: p.Names, Forget: p.Forget})
		},
		reply: func(res credstore.Result, units []vsockrpc.Refreshed, p *vsockrpc.Progress) vsockrpc.Marshaler {
			return &vsockrpc.RemoveResult{Generation: generation(res.Generation), Removed: res.Removed, Unchanged: res.Unchanged, Units: units, Progress: p}
		},
	})
}

func (c credentials) rollback(ctx context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RollbackParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	return c.carryOut(ctx, call, change{
		expected: p.ExpectedGeneration, mode: p.Refresh,
		apply: func(tx *credstore.Tx, _ []byte) (credstore.Result, error) { return tx.Rollback() },
		reply: func(res credstore.Result, units []vsockrpc.Refreshed, p *vsockrpc.Progress) vsockrpc.Marshaler {
			return &vsockrpc.RollbackResult{Generation: generation(res.Generation), Installed: res.Installed, Removed: res.Removed, Units: units, Progress: p}
		},
	})
}

func (c credentials) list(ctx context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.ListParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	r, err := c.a.Status()
	if err != nil {
		return err
	}
	res := vsockrpc.ListResult{Generation: generation(r.Generation), Entries: wireEntries(r.Entries), Refusals: r.Refusals}
	if res.Gate, res.Rejected, err = c.a.trials(); err != nil {
		return err
	}
	if p.Consumers {
		c.flush()
		if err := c.a.consumers(ctx, c.cfg, res.Entries); err != nil {
			res.ConsumersProblem = err.Error()
		}
		res.Waiting = c.connected()
	}
	return call.Reply(&res)
}

// connected are the units that have asked for a credential, and have no answer.
func (c credentials) connected() []vsockrpc.Waiting {
	if c.hand == nil {
		return nil
	}
	return wireWaiting(c.hand.server.Waiting())
}

// waiting are those of the connected that were found to have to wait.
func (c credentials) waiting() []vsockrpc.Waiting {
	if c.hand == nil {
		return nil
	}
	return wireWaiting(c.hand.waiting())
}

func wireWaiting(requests []credsocket.Waiting) []vsockrpc.Waiting {
	var list []vsockrpc.Waiting
	for _, w := range requests {
		list = append(list, vsockrpc.Waiting{Unit: w.Unit, Name: w.Name, Since: w.Since.UTC().Format(time.RFC3339Nano)})
	}
	return list
}

// trials returns the generation that is on trial, nil if none is, and what was
// rejected.
func (a *Agent) trials() (gate *int64, rejected []vsockrpc.Rejected, err error) {
	tx, err := a.store().View()
	if err != nil {
		return nil, nil, err
	}
	defer tx.Close()
	if tx.Trial() != nil {
		g := generation(tx.Generation())
		gate = &g
	}
	if r, ok := tx.Rejected(); ok {
		rejected = []vsockrpc.Rejected{{
			Generation: generation(r.Generation), At: r.At.Format(time.RFC3339Nano), Names: r.Names, Problem: r.Problem,
		}}
	}
	return gate, rejected, nil
}

// denied takes the names out of the set that systemd itself acts on, and refuses
// them to everybody but root in the guest.
func (c credentials) denied(set credstore.Set) (credstore.Set, []credential.Refusal) {
	if set.Source == credential.SourceLocal {
		return set, nil
	}
	var allowed []credstore.Credential
	var refusals []credential.Refusal
	for _, cred := range set.Install {
		if !nameDenied(cred.Name, c.cfg.Names.Allow) {
			allowed = append(allowed, cred)
		} else {
			refusals = append(refusals, credential.Refusal{
				Name: cred.Name, Source: set.Source, Reason: credential.ReasonDenied,
				Detail: "systemd itself acts on this name; where the host may set it, put it into names.allow of the guest's configuration",
			})
		}
	}
	set.Install = allowed
	return set, refusals
}

// pruned are the names of the set's source that begin with prefix and that the
// set does not have, nor would have had but for a refusal.
func pruned(tx *credstore.Tx, set credstore.Set, refusals []credential.Refusal, prefix string) []string {
	keep := map[string]bool{}
	for _, r := range refusals {
		keep[r.Name] = true
	}
	for _, cred := range set.Install {
		keep[cred.Name] = true
	}
	for _, name := range set.Remove {
		keep[name] = true
	}
	var names []string
	for _, e := range tx.Entries() {
		owner := e.Source
		if e.Ephemeral {
			owner = credential.SourceProvider
		}
		if owner == set.Source && strings.HasPrefix(e.Name, prefix) && !keep[e.Name] {
			names = append(names, e.Name)
		}
	}
	return names
}

func expect(tx *credstore.Tx, expected *int64) error {
	if got := generation(tx.Generation()); expected != nil && *expected != got {
		return &vsockrpc.GenerationMismatchError{ExpectedGeneration: *expected, Generation: got}
	}
	return nil
}

// listed are as many refusals as one answer lists.
func listed(refusals []credential.Refusal) []credential.Refusal {
	more := len(refusals) - maxRefusals
	if more <= 0 {
		return refusals
	}
	return append(refusals[:maxRefusals:maxRefusals], credential.Refusal{
		Source: refusals[0].Source, Reason: credential.ReasonMore, Detail: fmt.Sprintf("%d more refusals are not listed", more),
	})
}

// wireError gives the store's errors the wire's names. What it does not know
// stays, and becomes an internal error there.
func wireError(err error) error {
	if refused, ok := errors.AsType[*credstore.RefusedError](err); ok {
		return &vsockrpc.RefusedError{Refusals: listed(refused.Refusals)}
	}
	if errors.Is(err, credstore.ErrNoPrevious) {
		return &vsockrpc.NoPreviousError{}
	}
	return err
}

// withSource completes the refusals that decoding gave, which does not know who calls.
func withSource(err error, s credential.Source) error {
	if refused, ok := errors.AsType[*vsockrpc.RefusedError](err); ok {
		for i := range refused.Refusals {
			refused.Refusals[i].Source = s
		}
	}
	return err
}

// generation is the number as the wire has it.
func generation(n uint64) int64 { return int64(n) } //nolint:gosec // it counts sets, one after the other
