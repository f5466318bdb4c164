package agent

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// maxRefusals bounds the refusals that one answer lists.
const maxRefusals = 1024

// credentials serves io.guestagent.Credentials. Each call opens the store for
// itself, so that one writer goes after the other whoever they are, and nothing
// is held between calls.
type credentials struct {
	a      *Agent
	cfg    Config
	giving *atomic.Bool // memory is about to be given back
}

// credentialsInterface is io.guestagent.Credentials, ready to be served.
func (a *Agent) credentialsInterface(cfg Config) vsockrpc.Interface {
	c := credentials{a: a, cfg: cfg, giving: new(atomic.Bool)}
	return vsockrpc.Interface{
		Name:        vsockrpc.CredentialsInterface,
		Description: vsockrpc.CredentialsDescription,
		Methods: map[string]vsockrpc.Handler{
			"Apply":    c.apply,
			"List":     c.list,
			"Remove":   c.remove,
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

func (c credentials) apply(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.ApplyParams
	if err := call.Decode(&p); err != nil {
		return withSource(err, source(call.Peer))
	}
	defer p.Wipe()
	defer c.giveBack(p.Set)
	set := credstore.Set{Source: source(call.Peer), Remove: p.Remove, Forget: p.Forget}
	for _, cred := range p.Set {
		set.Install = append(set.Install, credstore.Credential{
			Name: cred.Name, Revision: cred.Revision, Value: cred.Value, AllowShadowed: cred.AllowShadowed,
		})
	}
	var prune *string
	if p.Prune {
		prune = &p.PrunePrefix
	}
	res, err := c.change(set, prune, p.ExpectedGeneration, p.DryRun)
	if err != nil {
		return err
	}
	return call.Reply(&vsockrpc.ApplyResult{
		Generation: generation(res.Generation), Installed: res.Installed, Relabelled: res.Relabelled, Removed: res.Removed, Unchanged: res.Unchanged,
	})
}

const (
	// largeSet is how many bytes make a set a large one.
	largeSet = 64 << 10
	// giveBackAfter is when what a large set needed is no longer in use.
	giveBackAfter = time.Second
)

// giveBack returns the memory that a large set needed, once its message is
// forgotten. An agent that is not called again would keep it until it ends.
func (c credentials) giveBack(set []vsockrpc.Credential) {
	size := 0
	for _, cred := range set {
		size += cred.Value.Len()
	}
	if size >= largeSet && c.giving.CompareAndSwap(false, true) {
		time.AfterFunc(giveBackAfter, func() {
			c.giving.Store(false)
			debug.FreeOSMemory()
		})
	}
}

func (c credentials) remove(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RemoveParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	res, err := c.change(credstore.Set{Source: source(call.Peer), Remove: p.Names, Forget: p.Forget}, nil, p.ExpectedGeneration, false)
	if err != nil {
		return err
	}
	return call.Reply(&vsockrpc.RemoveResult{Generation: generation(res.Generation), Removed: res.Removed, Unchanged: res.Unchanged})
}

func (c credentials) rollback(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RollbackParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	tx, err := c.a.store().Begin()
	if err != nil {
		return err
	}
	defer tx.Close()
	if err := expect(tx, p.ExpectedGeneration); err != nil {
		return err
	}
	res, err := tx.Rollback()
	if err != nil {
		return wireError(err)
	}
	return call.Reply(&vsockrpc.RollbackResult{Generation: generation(res.Generation), Installed: res.Installed, Removed: res.Removed})
}

func (c credentials) list(_ context.Context, call *vsockrpc.Call) error {
	if err := call.Decode(&vsockrpc.ListParams{}); err != nil {
		return err
	}
	r, err := c.a.Status()
	if err != nil {
		return err
	}
	res := vsockrpc.ListResult{Generation: generation(r.Generation), Refusals: r.Refusals}
	for _, e := range r.Entries {
		entry := vsockrpc.Entry{Name: e.Name, Revision: e.Revision, Size: e.Size, Source: e.Source, State: string(e.State), Path: e.Path}
		if e.InstalledAt != nil {
			entry.InstalledAt = e.InstalledAt.Format(time.RFC3339Nano)
		}
		res.Entries = append(res.Entries, entry)
	}
	return call.Reply(&res)
}

// change applies a set, or says what would come of it.
func (c credentials) change(set credstore.Set, prune *string, expected *int64, dryRun bool) (credstore.Result, error) {
	open := c.a.store().Begin
	if dryRun {
		open = c.a.store().View
	}
	tx, err := open()
	if err != nil {
		return credstore.Result{}, err
	}
	defer tx.Close()
	if err := expect(tx, expected); err != nil {
		return credstore.Result{}, err
	}
	if refusals := c.denied(set); len(refusals) > 0 {
		return credstore.Result{}, &vsockrpc.RefusedError{Refusals: refusals}
	}
	if prune != nil {
		set.Remove = append(set.Remove, pruned(tx, set, *prune)...)
	}
	do := tx.Apply
	if dryRun {
		do = tx.DryRun
	}
	res, err := do(set)
	if err != nil {
		return credstore.Result{}, wireError(err)
	}
	return res, nil
}

// denied refuses the names that systemd itself acts on, to everybody but root
// in the guest.
func (c credentials) denied(set credstore.Set) []credential.Refusal {
	if set.Source == credential.SourceLocal {
		return nil
	}
	var refusals []credential.Refusal
	for _, cred := range set.Install {
		if nameDenied(cred.Name, c.cfg.Names.Allow) {
			refusals = append(refusals, credential.Refusal{
				Name: cred.Name, Source: set.Source, Reason: credential.ReasonDenied,
				Detail: "systemd itself acts on this name; where the host may set it, put it into names.allow of the guest's configuration",
			})
		}
	}
	return refusals
}

// pruned are the names of the set's source that begin with prefix and that the
// set does not have.
func pruned(tx *credstore.Tx, set credstore.Set, prefix string) []string {
	keep := map[string]bool{}
	for _, cred := range set.Install {
		keep[cred.Name] = true
	}
	for _, name := range set.Remove {
		keep[name] = true
	}
	var names []string
	for _, e := range tx.Entries() {
		if e.Source == set.Source && strings.HasPrefix(e.Name, prefix) && !keep[e.Name] {
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

// wireError gives the store's errors the wire's names. What it does not know
// stays, and becomes an internal error there.
func wireError(err error) error {
	if refused, ok := errors.AsType[*credstore.RefusedError](err); ok {
		refusals := refused.Refusals
		if more := len(refusals) - maxRefusals; more > 0 {
			refusals = append(refusals[:maxRefusals:maxRefusals], credential.Refusal{
				Source: refusals[0].Source, Reason: credential.ReasonMore, Detail: fmt.Sprintf("%d more refusals are not listed", more),
			})
		}
		return &vsockrpc.RefusedError{Refusals: refusals}
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
