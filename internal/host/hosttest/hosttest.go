// Package hosttest has guests for tests: an agent in memory, and some that mean
// no good. It plays systemd with one unit per credential and checks little; the
// agent's own tests do that.
package hosttest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// A Guest is an agent on a Unix socket, with a store in memory. It lets in the
// user that the test runs as.
type Guest struct {
	// Socket is where it listens.
	Socket string

	close func() // ends the listener and all connections

	mu sync.Mutex
	state
	calls   int
	asked   int
	boots   int
	applies []Applied
	waiting []vsockrpc.Waiting
	trial   *int64
	systemd string // why it cannot be reached; empty if it can
	says    func(*vsockrpc.Report)
	ahead   time.Duration // of the host's clock
	changed chan struct{} // closed at the next change
}

// A state is what a guest has in memory, and loses when it boots.
type state struct {
	bootID     string
	generation int64
	store      map[string]entry
	previous   map[string]entry  // nil if there is none
	loaded     map[string]entry  // what the unit of each credential runs with
	rejected   map[string]*entry // what it changed, nil for a removal; no map if there is none
	rejection  vsockrpc.Rejected
	provided   bool                 // the provider's set was applied
	refusals   []credential.Refusal // of that set
	onRejected []string             // what a gate rolled back before this boot, and is in force
}

type entry struct {
	value, revision string
	source          credential.Source
	ephemeral       bool
}

// managed says that a provider has the name.
func (e entry) managed() bool { return e.source == credential.SourceProvider || e.ephemeral }

// An Applied is a call of Apply, and what came of it. It has no value.
type Applied struct {
	Params     vsockrpc.ApplyParams // without the set
	Rejected   []string             // those of the set that were rejected in an earlier boot
	Installed  []string
	Relabelled []string
	Removed    []string
	Unchanged  []string
	Refused    []string
}

// Every credential NAME is loaded by NAME.service, which runs. What happens
// when that is refreshed depends on the value and the name.
const (
	// Bad begins a value that no unit starts with.
	Bad = "bad"
	// Never is the name of a credential whose unit is not refreshed.
	Never = "never"
	// Dies is the state of a unit that did not start. It has an escape sequence.
	Dies = "failed (\x1b[31mexit-code 1)"
)

// Refuses is a name that every Guest refuses, for a reason with an escape
// sequence in it.
const Refuses = "refused"

// Start starts a guest that listens on dir/name.sock.
func Start(dir, name string) (*Guest, error) {
	g := &Guest{Socket: filepath.Join(dir, name+".sock"), changed: make(chan struct{})}
	g.state = g.booted()
	return g, g.Start()
}

// booted is the state after a boot.
func (g *Guest) booted() state {
	g.boots++
	return state{bootID: fmt.Sprintf("boot-%d", g.boots), store: map[string]entry{}, loaded: map[string]entry{}}
}

// Start has it listen again, after Stop.
func (g *Guest) Start() error {
	s := &vsockrpc.Server{
		Product: "guestagent", Version: "test",
		Authorize: func(p vsockrpc.Peer) error {
			if p.Local() && int(p.UID) == os.Getuid() {
				return nil
			}
			return vsockrpc.ErrRefused
		},
		Interfaces: []vsockrpc.Interface{
			{
				Name: vsockrpc.CredentialsInterface, Description: vsockrpc.CredentialsDescription,
				Methods: map[string]vsockrpc.Handler{
					"Apply": g.apply, "List": g.list, "Remove": g.remove, "Rollback": g.rollback, "Refresh": g.refresh, "Retry": g.retry,
				},
			},
			{
				Name: vsockrpc.HealthInterface, Description: vsockrpc.HealthDescription,
				Methods: map[string]vsockrpc.Handler{"Get": g.get, "Ping": g.ping, "Watch": g.watch},
			},
		},
	}
	l, err := net.Listen("unix", g.Socket)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(context.Background(), l) })
	g.close = sync.OnceFunc(func() {
		s.Close()
		wg.Wait()
	})
	return nil
}

// Stop ends its listener and all connections. It keeps what it has.
func (g *Guest) Stop() { g.close() }

// Close ends the guest.
func (g *Guest) Close() { g.close() }

// Reboot boots it anew, with nothing in memory.
func (g *Guest) Reboot() error {
	g.Stop()
	g.mu.Lock()
	g.state = g.booted()
	g.mu.Unlock()
	return g.Start()
}

// Snapshot keeps what it has. Restore brings that back, in the same boot.
func (g *Guest) Snapshot() (restore func() error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	kept := g.state
	kept.loaded = maps.Clone(kept.loaded)
	return func() error {
		g.Stop()
		g.mu.Lock()
		g.state = kept
		g.loaded = maps.Clone(kept.loaded)
		g.mu.Unlock()
		return g.Start()
	}
}

// Value returns the value of a credential.
func (g *Guest) Value(name string) (value string, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	e, ok := g.store[name]
	return e.value, ok
}

// Calls returns how many calls there were.
func (g *Guest) Calls() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.calls
}

// Applies returns the calls of Apply so far.
func (g *Guest) Applies() []Applied {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.applies)
}

// Asked returns how often the guest was asked for its report, watches aside.
func (g *Guest) Asked() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.asked
}

// Wait makes a unit wait for a credential.
func (g *Guest) Wait(unit, name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting = append(g.waiting, vsockrpc.Waiting{Unit: unit, Name: name, Since: now})
	g.tell()
}

// OnTrial makes a generation be on trial.
func (g *Guest) OnTrial(generation int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.trial = &generation
	g.tell()
}

// TrialOver ends that.
func (g *Guest) TrialOver() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.trial = nil
	g.tell()
}

// NoSystemd makes its systemd unreachable, or, with "", reachable again.
func (g *Guest) NoSystemd(problem string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.systemd = problem
}

// now is the time of everything.
const now = "2026-01-02T03:04:05Z"

func (g *Guest) expect(generation *int64, refresh string) error {
	g.calls++
	switch {
	case g.trial != nil:
		return &vsockrpc.GateInProgressError{Generation: *g.trial}
	case g.systemd != "" && refreshes(refresh):
		return &vsockrpc.NoSystemdError{Problem: g.systemd}
	}
	if generation != nil && *generation != g.generation {
		return &vsockrpc.GenerationMismatchError{ExpectedGeneration: *generation, Generation: g.generation}
	}
	return nil
}

// replace puts next in force. Other labels alone make no generation.
func (g *Guest) replace(next map[string]entry, forget bool) {
	defer g.tell()
	changed := changes(g.store, next)
	if len(changed) == 0 {
		g.store = next
		return
	}
	for name := range g.rejected {
		if slices.Contains(changed, name) {
			g.rejected = nil
			break
		}
	}
	g.previous, g.store = g.store, next
	if forget {
		g.previous = nil
	}
	g.generation++
}

// changes are the names whose values differ from before to after, sorted.
func changes(before, after map[string]entry) []string {
	names := map[string]bool{}
	for name, e := range before {
		if now, ok := after[name]; !ok || now.value != e.value {
			names[name] = true
		}
	}
	for name := range after {
		if _, ok := before[name]; !ok {
			names[name] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}

func refreshes(refresh string) bool { return refresh != "" && refresh != vsockrpc.RefreshNone }

// refreshUnits refreshes the units of these credentials.
func (g *Guest) refreshUnits(names []string, refresh string, tell func(vsockrpc.Progress) error) ([]vsockrpc.Refreshed, error) {
	var units []vsockrpc.Refreshed
	if !refreshes(refresh) || len(names) == 0 {
		return units, nil
	}
	waitingFor := make([]string, len(names))
	for i, name := range names {
		waitingFor[i] = name + ".service"
	}
	action := vsockrpc.ActionRestart
	if refresh == vsockrpc.RefreshReload {
		action = vsockrpc.ActionReload
	}
	if err := tell(vsockrpc.Progress{Phase: vsockrpc.PhaseRefreshing, WaitingFor: waitingFor}); err != nil {
		return nil, err
	}
	for i, name := range names {
		u := vsockrpc.Refreshed{Unit: waitingFor[i], Action: action, Result: vsockrpc.ResultDone, State: "active (running)"}
		switch {
		case name == Never:
			u.Action, u.Result, u.Detail = vsockrpc.ActionNone, vsockrpc.ResultSkipped, "refresh.never names it"
		case strings.HasPrefix(g.store[name].value, Bad):
			u.Result, u.State = vsockrpc.ResultFailed, Dies
		default:
			g.loaded[name] = g.store[name]
		}
		if err := tell(vsockrpc.Progress{Phase: vsockrpc.PhaseRefreshing, Unit: &u}); err != nil {
			return nil, err
		}
		units = append(units, u)
	}
	return units, nil
}

// install puts next in force, refreshes the units of what changed, and rolls
// back what does not stand its gate.
func (g *Guest) install(call *vsockrpc.Call, next map[string]entry, forget bool, refresh string, gate bool, r *vsockrpc.ApplyResult) error {
	tell := func(p vsockrpc.Progress) error {
		if !call.More {
			return nil
		}
		return call.ReplyMore(&vsockrpc.ApplyResult{Generation: g.generation, Progress: &p})
	}
	before := g.store
	g.replace(next, forget)
	r.Generation = g.generation
	if !refreshes(refresh) {
		return call.Reply(r)
	}
	if err := tell(vsockrpc.Progress{Phase: vsockrpc.PhaseApplied}); err != nil {
		return err
	}
	var err error
	if r.Units, err = g.refreshUnits(r.Installed, refresh, tell); err != nil {
		return err
	}
	if !gate {
		return call.Reply(r)
	}
	if err := tell(vsockrpc.Progress{Phase: vsockrpc.PhaseWatching, WaitingFor: []string{"everything"}}); err != nil {
		return err
	}
	i := slices.IndexFunc(r.Units, func(u vsockrpc.Refreshed) bool { return u.Result == vsockrpc.ResultFailed })
	if i < 0 {
		return call.Reply(r)
	}
	problem := r.Units[i].Unit + ": " + Dies
	rejection := vsockrpc.Rejected{Generation: g.generation, At: now, Names: changes(before, next), Problem: problem}
	g.replace(before, false)
	g.rejected, g.rejection = map[string]*entry{}, rejection
	for _, name := range rejection.Names {
		g.rejected[name] = nil
		if e, ok := next[name]; ok {
			g.rejected[name] = &e
		}
	}
	if err := tell(vsockrpc.Progress{Phase: vsockrpc.PhaseRollingBack}); err != nil {
		return err
	}
	return &vsockrpc.RolledBackError{Generation: g.generation, Units: r.Units, Problem: problem, Restored: true}
}

// check says why a credential is not taken, "" if it is.
func (g *Guest) check(c vsockrpc.Credential, p *vsockrpc.ApplyParams, again map[string]bool) (credential.Reason, string) {
	old, ok := g.store[c.Name]
	switch {
	case c.Name == Refuses && !c.AllowShadowed:
		return credential.ReasonShadowed, "by \x1b[31m/etc/credstore/" + c.Name
	case again[c.Name]:
		return credential.ReasonRejected, "rolled back by its gate: " + g.rejection.Problem
	case c.Rejected && ok && old.value != string(c.Value.Bytes()):
		return credential.ReasonRejected, "rolled back before the guest booted"
	case ok && old.managed() && p.Source != credential.SourceProvider && !p.Ephemeral:
		return credential.ReasonManaged, "the provider has it"
	}
	return "", ""
}

// rejectedAgain are the names of what was rejected, if that is here again.
func (g *Guest) rejectedAgain(set []vsockrpc.Credential) map[string]bool {
	again := map[string]bool{}
	for _, c := range set {
		old, ok := g.rejected[c.Name]
		if !ok {
			continue
		}
		if old == nil || old.value != string(c.Value.Bytes()) {
			return nil
		}
		again[c.Name] = true
	}
	return again
}

func (g *Guest) apply(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.ApplyParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	defer p.Wipe()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.applies = append(g.applies, Applied{Params: p})
	applied := &g.applies[len(g.applies)-1]
	applied.Params.Set = nil
	for _, c := range p.Set {
		if c.Rejected {
			applied.Rejected = append(applied.Rejected, c.Name)
		}
	}
	if err := g.expect(p.ExpectedGeneration, p.Refresh); err != nil {
		return err
	}
	source := cmp.Or(p.Source, credential.SourcePush)
	next := maps.Clone(g.store)
	r := &vsockrpc.ApplyResult{}
	inSet := map[string]bool{}
	again := g.rejectedAgain(p.Set)
	for _, c := range p.Set {
		inSet[c.Name] = true
		if reason, detail := g.check(c, &p, again); reason != "" {
			r.Refusals = append(r.Refusals, credential.Refusal{Name: c.Name, Source: source, Reason: reason, Detail: detail})
			applied.Refused = append(applied.Refused, c.Name)
			continue
		}
		old, ok := g.store[c.Name]
		e := entry{
			value: string(c.Value.Bytes()), revision: c.Revision, source: source,
			ephemeral: ok && old.managed() && source != credential.SourceProvider,
		}
		switch {
		case !ok || old.value != e.value:
			r.Installed = append(r.Installed, c.Name)
		case old.revision != e.revision || source == credential.SourceProvider && e != old:
			r.Relabelled = append(r.Relabelled, c.Name)
		default:
			r.Unchanged = append(r.Unchanged, c.Name)
			continue
		}
		next[c.Name] = e
	}
	if len(r.Refusals) > 0 && !p.Partial {
		return &vsockrpc.RefusedError{Refusals: r.Refusals}
	}
	remove := p.Remove
	if p.Prune {
		for _, name := range slices.Sorted(maps.Keys(g.store)) {
			e := g.store[name]
			own := e.source == source || e.ephemeral && source == credential.SourceProvider
			if own && strings.HasPrefix(name, p.PrunePrefix) && !inSet[name] {
				remove = append(remove, name)
			}
		}
	}
	for _, name := range remove {
		if _, ok := next[name]; ok {
			r.Removed = append(r.Removed, name)
		} else {
			r.Unchanged = append(r.Unchanged, name)
		}
		delete(next, name)
	}
	if p.DryRun {
		r.Generation = g.generation
		return call.Reply(r)
	}
	applied.Installed, applied.Relabelled, applied.Removed, applied.Unchanged = r.Installed, r.Relabelled, r.Removed, r.Unchanged
	if source == credential.SourceProvider {
		g.provided, g.refusals, g.onRejected = true, r.Refusals, applied.Rejected
		g.tell()
	}
	return g.install(call, next, p.Forget, p.Refresh, p.Gate > 0, r)
}

func (g *Guest) retry(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RetryParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.expect(p.ExpectedGeneration, p.Refresh); err != nil {
		return err
	}
	if g.rejected == nil {
		return &vsockrpc.NothingRejectedError{}
	}
	next := maps.Clone(g.store)
	for name, e := range g.rejected {
		delete(next, name)
		if e != nil {
			next[name] = *e
		}
	}
	return g.install(call, next, false, p.Refresh, p.Gate > 0, &vsockrpc.ApplyResult{Installed: g.rejection.Names})
}

func (g *Guest) refresh(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RefreshParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	p.Refresh = cmp.Or(p.Refresh, vsockrpc.RefreshAuto)
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.expect(nil, p.Refresh); err != nil {
		return err
	}
	var names []string
	for _, name := range slices.Sorted(maps.Keys(g.store)) {
		if (p.All || g.stale(name)) && (p.Names == nil || slices.Contains(p.Names, name)) {
			names = append(names, name)
		}
	}
	units, err := g.refreshUnits(names, p.Refresh, func(progress vsockrpc.Progress) error {
		if !call.More {
			return nil
		}
		return call.ReplyMore(&vsockrpc.RefreshResult{Generation: g.generation, Progress: &progress})
	})
	if err != nil {
		return err
	}
	return call.Reply(&vsockrpc.RefreshResult{Generation: g.generation, Units: units})
}

func (g *Guest) list(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.ListParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls++
	r := &vsockrpc.ListResult{Generation: g.generation, Waiting: g.waiting, Gate: g.trial}
	if g.rejected != nil {
		r.Rejected = []vsockrpc.Rejected{g.rejection}
	}
	if p.Consumers {
		r.ConsumersProblem = g.systemd
	}
	r.Entries = g.entries()
	if p.Consumers && g.systemd == "" {
		for i, e := range r.Entries {
			r.Entries[i].Consumers = []vsockrpc.Consumer{g.consumer(e.Name)}
		}
	}
	return call.Reply(r)
}

func (g *Guest) entries() []vsockrpc.Entry {
	var entries []vsockrpc.Entry
	for _, name := range slices.Sorted(maps.Keys(g.store)) {
		e := g.store[name]
		entries = append(entries, vsockrpc.Entry{
			Name: name, Revision: e.revision, Size: int64(len(e.value)), Source: e.source,
			InstalledAt: now, State: "inForce", Path: "/run/credstore/" + name, Ephemeral: e.ephemeral,
		})
	}
	return entries
}

func (g *Guest) stale(name string) bool { return g.loaded[name].value != g.store[name].value }

func (g *Guest) consumer(name string) vsockrpc.Consumer {
	c := vsockrpc.Consumer{
		Unit: name + ".service", ActiveState: "active", As: name, Way: vsockrpc.WayFile, Revision: g.loaded[name].revision,
		Loaded: vsockrpc.LoadedInForce, Refresh: vsockrpc.ActionRestart,
	}
	if g.stale(name) {
		c.Loaded, c.Stale = vsockrpc.LoadedUnknown, true
	}
	if name == Never {
		c.Refresh, c.Detail = vsockrpc.ActionNone, "refresh.never names it"
	}
	return c
}

func (g *Guest) remove(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RemoveParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.expect(p.ExpectedGeneration, p.Refresh); err != nil {
		return err
	}
	next := maps.Clone(g.store)
	r := &vsockrpc.RemoveResult{}
	for _, name := range p.Names {
		if _, ok := next[name]; ok {
			r.Removed = append(r.Removed, name)
		} else {
			r.Unchanged = append(r.Unchanged, name)
		}
		delete(next, name)
	}
	g.replace(next, p.Forget)
	r.Generation = g.generation
	return call.Reply(r)
}

func (g *Guest) rollback(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RollbackParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.expect(p.ExpectedGeneration, p.Refresh); err != nil {
		return err
	}
	if g.previous == nil {
		return &vsockrpc.NoPreviousError{}
	}
	r := &vsockrpc.RollbackResult{}
	for _, name := range slices.Sorted(maps.Keys(g.previous)) {
		if g.previous[name] != g.store[name] {
			r.Installed = append(r.Installed, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(g.store)) {
		if _, ok := g.previous[name]; !ok {
			r.Removed = append(r.Removed, name)
		}
	}
	g.replace(g.previous, false)
	r.Generation = g.generation
	var err error
	if r.Units, err = g.refreshUnits(r.Installed, p.Refresh, func(vsockrpc.Progress) error { return nil }); err != nil {
		return err
	}
	return call.Reply(r)
}

// Hostile starts a guest that answers every message with what kind says, until
// it is closed:
//
//	flood    bytes without an end
//	escapes  a list of credentials, and a report, with control sequences for terminals
//	garbage  what is no JSON
//	error    an error that nobody knows, with control sequences
//	rolledBack  progress and the end of a gate, with control sequences
//	reports  a report per millisecond to who watches, each another one
//	large    a report of nearly 6 MiB, and to who watches nothing more
//	silent   nothing at all
//	hangup   the end of the connection
func Hostile(dir, name, kind string) (*HostileGuest, error) {
	answer, ok := hostile[kind]
	if !ok {
		return nil, fmt.Errorf("there is no kind %s", kind)
	}
	l, err := net.Listen("unix", filepath.Join(dir, name+".sock"))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	g := &HostileGuest{called: make(chan struct{}, 1)}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
				b := make([]byte, 4096)
				n, err := conn.Read(b)
				if err != nil {
					return
				}
				select {
				case g.called <- struct{}{}:
				default:
				}
				answer(ctx, conn, bytes.Contains(b[:n], []byte(`"more":true`)))
			})
		}
	})
	g.close = func() {
		cancel()
		_ = l.Close()
		wg.Wait()
	}
	return g, nil
}

// A HostileGuest is a guest that means no good.
type HostileGuest struct {
	called chan struct{}
	close  func()
}

// Called has something to receive after a call.
func (g *HostileGuest) Called() <-chan struct{} { return g.called }

// Close ends the guest.
func (g *HostileGuest) Close() { g.close() }

// Escapes is what the hostile guests put into every text.
const Escapes = "\x1b]0;owned\a\u009b31m\u202e\x7f"

// hostile are what the kinds answer. More says that the call takes many replies.
var hostile = map[string]func(ctx context.Context, conn net.Conn, more bool){
	"flood": func(_ context.Context, conn net.Conn, _ bool) {
		b := []byte(strings.Repeat("[", 1<<16))
		for {
			if _, err := conn.Write(b); err != nil {
				return
			}
		}
	},
	"escapes": func(_ context.Context, conn net.Conn, _ bool) {
		_ = answer(conn, map[string]any{"parameters": map[string]any{
			"generation": 1, "installed": []string{Escapes}, "relabelled": []string{}, "removed": []string{}, "unchanged": []string{},
			"product": Escapes, "version": Escapes,
			"entries": []vsockrpc.Entry{{
				Name: Escapes, Revision: Escapes, Source: Escapes, InstalledAt: Escapes, State: Escapes, Path: Escapes,
				Consumers: []vsockrpc.Consumer{{
					Unit: Escapes, ActiveState: Escapes, As: Escapes, Way: Escapes, Revision: Escapes, Loaded: Escapes, Stale: true, Refresh: Escapes, Detail: Escapes,
				}},
			}},
			"units": []vsockrpc.Refreshed{
				{Unit: Escapes, Action: vsockrpc.ActionRestart, Result: vsockrpc.ResultDone},
				{Unit: Escapes, Action: Escapes, Result: vsockrpc.ResultSkipped, State: Escapes, Detail: Escapes},
			},
			"waiting":          []vsockrpc.Waiting{{Unit: Escapes, Name: Escapes, Since: Escapes}},
			"rejected":         []vsockrpc.Rejected{{Generation: 1, At: Escapes, Names: []string{Escapes}, Problem: Escapes}},
			"consumersProblem": Escapes,
			"report": map[string]any{
				"version": Escapes, "bootId": Escapes, "machineId": Escapes, "generation": 1,
				"entries":  []vsockrpc.Entry{{Name: Escapes, Revision: Escapes, Source: Escapes, InstalledAt: Escapes, State: Escapes, Path: Escapes}},
				"refusals": []credential.Refusal{{Name: Escapes, Source: Escapes, Reason: Escapes, Detail: Escapes}},
				"reasons": []vsockrpc.Reason{{
					Code: Escapes, Detail: Escapes, Hint: Escapes, Verdict: Escapes, Unit: Escapes, Credential: Escapes, Since: Escapes,
				}},
				"provider": vsockrpc.ProviderState{Address: Escapes, State: Escapes, Since: Escapes, Problem: Escapes},
				"verdict":  vsockrpc.VerdictFailing, "time": Escapes, "hostname": Escapes, "unknown": []string{Escapes},
				"systemd": vsockrpc.SystemdState{Version: Escapes, State: Escapes, Failed: []vsockrpc.FailedUnit{{Unit: Escapes, Result: Escapes, Since: Escapes}}},
				"waiting": []vsockrpc.Waiting{{Unit: Escapes, Name: Escapes, Since: Escapes}},
				"disks":   []vsockrpc.Disk{{Path: Escapes, Used: 1}},
			},
			"refusals": []credential.Refusal{{Name: Escapes, Source: Escapes, Reason: Escapes, Detail: Escapes}},
		}})
	},
	"garbage": func(_ context.Context, conn net.Conn, _ bool) { _, _ = conn.Write([]byte("\x1b[31mhello\x00")) },
	"error": func(_ context.Context, conn net.Conn, _ bool) {
		_ = answer(conn, map[string]any{"error": "com.example.Error", "parameters": map[string]any{"text": Escapes}})
	},
	"rolledBack": func(_ context.Context, conn net.Conn, _ bool) {
		_ = answer(conn, map[string]any{"continues": true, "parameters": map[string]any{
			"generation": 1, "installed": []string{}, "relabelled": []string{}, "removed": []string{}, "unchanged": []string{}, "units": []string{},
			"progress": vsockrpc.Progress{Phase: Escapes, WaitingFor: []string{Escapes}},
		}})
		_ = answer(conn, map[string]any{"error": vsockrpc.CredentialsInterface + ".RolledBack", "parameters": map[string]any{
			"generation": 1, "problem": Escapes, "restored": false,
			"units": []vsockrpc.Refreshed{{Unit: Escapes, Action: Escapes, Result: Escapes, State: Escapes, Detail: Escapes}},
		}})
	},
	"reports": func(ctx context.Context, conn net.Conn, more bool) {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for i := 0; answer(conn, reportMessage(i, nil, more)) == nil && more; i++ {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	},
	"large": func(ctx context.Context, conn net.Conn, more bool) {
		text := strings.Repeat("\x01", 4096) // six bytes each
		reasons := make([]vsockrpc.Reason, 6<<20/(6*4096)-10)
		for i := range reasons {
			reasons[i] = vsockrpc.Reason{Code: "code", Detail: text}
		}
		if answer(conn, reportMessage(1, reasons, more)) == nil && more {
			<-ctx.Done()
		}
	},
	"silent": func(ctx context.Context, _ net.Conn, _ bool) { <-ctx.Done() },
	"hangup": func(context.Context, net.Conn, bool) {},
}

// reportMessage is an answer with a report of this generation.
func reportMessage(generation int, reasons []vsockrpc.Reason, more bool) map[string]any {
	if reasons == nil {
		reasons = []vsockrpc.Reason{}
	}
	m := map[string]any{"parameters": map[string]any{"report": map[string]any{
		"version": "1", "bootId": "boot", "machineId": "machine", "generation": generation,
		"entries": []vsockrpc.Entry{}, "refusals": []credential.Refusal{}, "reasons": reasons, "verdict": vsockrpc.VerdictDegraded,
	}}}
	if more {
		m["continues"] = true
	}
	return m
}

func answer(conn net.Conn, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return errors.New("encoding an answer")
	}
	_, err = conn.Write(append(b, 0))
	return err
}
