package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/guestagent/guestagent/consumer"
	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/vsockrpc"
)

// fakePID1 is a systemd with services that load credentials.
type fakePID1 struct {
	store string // where services find files
	own   string

	mu    sync.Mutex
	units map[string]*fakeUnit
	jobs  []string // what was asked for, in that order
	lost  int      // how many connections are lost at their first job or watch
	gone  error    // nobody answers
	over  bool     // no start is in progress
	// watch decides over a watch; nil lets the time pass.
	watch func(ctx context.Context, base map[string]consumer.Status) []consumer.Failure
	conns int

	system    consumer.System
	stuck     error // System's
	followers []*fakeFollower
}

// A fakeUnit runs with what its files say when it starts.
type fakeUnit struct {
	consumer.Unit
	status consumer.Status
	has    map[string]string
	// start says what becomes of it with those values; nil is that it runs.
	start func(has map[string]string) consumer.Status
}

var upStatus = consumer.Status{ActiveState: "active", SubState: "running", Result: "success", Type: "exec"}

func (g *guest) systemd(units ...*fakeUnit) *fakePID1 {
	f := &fakePID1{store: filepath.Join(g.root, pathStore), own: "guestagent.service", units: map[string]*fakeUnit{}, system: consumer.System{Version: "262", State: "running"}}
	for _, u := range units {
		f.units[u.Name] = u
	}
	g.a.dialSystemd = func(context.Context) (systemd, error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.gone != nil {
			return nil, f.gone
		}
		f.conns++
		return &fakeConn{f}, nil
	}
	return f
}

// service is a running service that loads files.
func service(name string, files ...string) *fakeUnit {
	u := &fakeUnit{Unit: consumer.Unit{Name: name, LoadState: "loaded", ActiveState: "active", SubState: "running", InvocationID: "1", LoadedUSec: 1, Type: "exec"}}
	u.status = upStatus
	for _, file := range files {
		u.Loads = append(u.Loads, consumer.Load{Name: file, As: file, Way: consumer.WayFile})
	}
	return u
}

func (u *fakeUnit) with(f func(*fakeUnit)) *fakeUnit {
	f(u)
	return u
}

type fakeConn struct{ *fakePID1 }

func (c *fakeConn) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns--
}

func (f *fakePID1) lose() bool {
	if f.lost == 0 {
		return false
	}
	f.lost--
	return true
}

func (f *fakePID1) Find(_ context.Context, names []string) (found []consumer.Unit, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, u := range f.units {
		copied := u.Unit
		copied.Loads = slices.DeleteFunc(slices.Clone(u.Loads), func(l consumer.Load) bool { return !slices.Contains(names, l.Name) })
		if len(copied.Loads) > 0 {
			found = append(found, copied)
		}
	}
	slices.SortFunc(found, func(x, y consumer.Unit) int { return strings.Compare(x.Name, y.Name) })
	return found, nil
}

func (f *fakePID1) Unit(_ context.Context, unit string, _ []string) (consumer.Unit, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if u, ok := f.units[unit]; ok {
		return u.Unit, nil
	}
	return consumer.Unit{Name: unit, LoadState: "not-found", ActiveState: "inactive"}, nil
}

func (f *fakePID1) Starting(_ context.Context, unit string) (consumer.Start, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	u, ok := f.units[unit]
	if !ok {
		return consumer.Start{}, nil
	}
	s := consumer.Start{InvocationID: u.InvocationID, Job: 7, JobType: "start", ActiveState: u.ActiveState}
	if f.over {
		s.Job, s.JobType, s.ActiveState = 0, "", "active"
	}
	for _, l := range u.Loads {
		if l.Way == consumer.WaySocket {
			s.SocketNames = append(s.SocketNames, l.Name)
		}
	}
	return s, nil
}

func (f *fakePID1) Run(_ context.Context, jobs []consumer.Job, done func(consumer.JobResult)) (results []consumer.JobResult, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.lose() {
		return nil, fmt.Errorf("waiting for jobs: %w", consumer.ErrLost)
	}
	for _, j := range jobs {
		f.jobs = append(f.jobs, string(j.Action)+" "+j.Unit)
	}
	for _, j := range jobs {
		u := f.units[j.Unit]
		if j.Action == consumer.ActionStart && u.ActiveState == "activating" {
			u.status, u.ActiveState = upStatus, "active" // the start that goes on
		} else if u.ActiveState != "inactive" && u.ActiveState != "failed" || j.Action == consumer.ActionRestart {
			u.begin(f.store)
		}
		r := consumer.JobResult{Unit: j.Unit, Action: j.Action, Result: "done", Status: u.status}
		if u.status.ActiveState == "failed" {
			r.Result = "failed"
		}
		results = append(results, r)
		f.mu.Unlock()
		done(r)
		f.mu.Lock()
	}
	return results, nil
}

func (u *fakeUnit) begin(store string) {
	u.has = map[string]string{}
	for _, l := range u.Loads {
		if b, err := os.ReadFile(filepath.Join(store, l.Name)); err == nil {
			u.has[l.As] = string(b)
		}
	}
	u.LoadedUSec, u.InvocationID = credstore.MonotonicUSec(), u.InvocationID+"+"
	u.status = upStatus
	if u.start != nil {
		u.status = u.start(u.has)
	}
	u.ActiveState, u.SubState = u.status.ActiveState, u.status.SubState
}

func (f *fakePID1) Status(_ context.Context, unit string) (consumer.Status, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.units[unit].status, nil
}

func (f *fakePID1) Watch(ctx context.Context, base map[string]consumer.Status, d time.Duration) ([]consumer.Failure, error) {
	f.mu.Lock()
	lost, watch := f.lose(), f.watch
	f.mu.Unlock()
	if lost {
		return nil, fmt.Errorf("watching units: %w", consumer.ErrLost)
	}
	if watch != nil {
		failures := watch(ctx, base)
		return failures, ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (f *fakePID1) System(context.Context) (consumer.System, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.system, f.stuck
}

// Follow returns a follower that is told by f.signal.
func (f *fakePID1) Follow(context.Context) (follower, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := &fakeFollower{f, make(chan struct{}, 1), make(chan struct{})}
	f.followers = append(f.followers, w)
	return w, nil
}

type fakeFollower struct {
	*fakePID1
	changed chan struct{}
	lost    chan struct{}
}

func (w *fakeFollower) Changed() <-chan struct{} { return w.changed }
func (w *fakeFollower) Lost() <-chan struct{}    { return w.lost }
func (w *fakeFollower) Close()                   {}

// signal changes the system, and tells who follows it.
func (f *fakePID1) signal(change func(*consumer.System)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.system)
	for _, w := range f.followers {
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
}

// hangUp ends the connections of who follows.
func (f *fakePID1) hangUp() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range f.followers {
		close(w.lost)
	}
	f.followers = nil
}

func (f *fakePID1) Own(context.Context) (string, string, bool, error) { return f.own, "", true, nil }

// asked returns what was asked for since the last time.
func (f *fakePID1) asked() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	jobs := f.jobs
	f.jobs = nil
	return jobs
}

func (f *fakePID1) unitHas(unit, name string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.units[unit].has[name]
}

// results are one line for each unit, without its state and detail.
func results(units []vsockrpc.Refreshed) (lines []string) {
	for _, u := range units {
		lines = append(lines, u.Unit+" "+u.Action+" "+u.Result)
	}
	return lines
}

func apply(set ...vsockrpc.Credential) *vsockrpc.ApplyParams { return &vsockrpc.ApplyParams{Set: set} }

func TestRefreshPlan(t *testing.T) {
	reloads := func(u *fakeUnit) { u.CanReload = true }
	refreshes := func(u *fakeUnit) { u.CanReload, u.RefreshOnReload, u.ReloadTells = true, true, true }
	environment := func(u *fakeUnit) {
		u.Loads = append(u.Loads, consumer.Load{Name: "a", Way: consumer.WayEnvironment})
	}
	state := func(load, active string) func(*fakeUnit) {
		return func(u *fakeUnit) { u.LoadState, u.ActiveState = load, active }
	}
	never := func(u *fakeUnit) { u.RefuseManualStop = true }
	for _, tt := range []struct {
		name string
		unit *fakeUnit
		want map[string]string // by mode: the job, or why there is none
	}{
		{"plain", service("web.service", "a"), map[string]string{"auto": "tryRestart", "reload": whyReload, "restart": "tryRestart"}},
		{"can reload", service("web.service", "a").with(reloads), map[string]string{"auto": "tryRestart", "reload": "reload", "restart": "tryRestart"}},
		{"refreshes", service("web.service", "a").with(refreshes), map[string]string{"auto": "reload", "reload": "reload", "restart": "tryRestart"}},
		{"refreshes, and nobody tells it", service("web.service", "a").with(func(u *fakeUnit) { u.CanReload, u.RefreshOnReload = true, true }), map[string]string{"auto": "tryRestart", "reload": "reload"}},
		{"environment", service("web.service", "a").with(refreshes).with(environment), map[string]string{"auto": "tryRestart", "reload": "reload"}},
		{"inactive", service("web.service", "a").with(state("loaded", "inactive")), map[string]string{"auto": whyInactive, "restart": whyInactive}},
		{"failed", service("web.service", "a").with(state("loaded", "failed")), map[string]string{"auto": whyInactive}},
		{"masked", service("web.service", "a").with(state("masked", "active")), map[string]string{"auto": "it is masked"}},
		{"mount", service("srv.mount", "a"), map[string]string{"auto": "only services are refreshed", "restart": "only services are refreshed"}},
		{"socket", service("web.socket", "a"), map[string]string{"auto": "only services are refreshed"}},
		{"refuses", service("web.service", "a").with(never), map[string]string{"auto": "it has RefuseManualStop=", "restart": "it has RefuseManualStop="}},
		{"refuses to stop, but reloads", service("web.service", "a").with(never).with(refreshes), map[string]string{"auto": "reload"}},
		{"never", service("serial-getty@ttyS0.service", "a"), map[string]string{"auto": "refresh.never in the guest's configuration has it", "restart": "refresh.never in the guest's configuration has it"}},
		{"the agent", service("guestagent.service", "a"), map[string]string{"auto": whyOwn, "restart": whyOwn}},
	} {
		for mode, want := range tt.want {
			g := newGuest(t)
			f := g.systemd(tt.unit)
			cfg, _ := ParseConfig(nil)
			tx, err := g.a.store().Begin()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tx.Apply(credstore.Set{Install: []credstore.Credential{{Name: "a", Value: value("a", "1").Value}}}); err != nil {
				t.Fatal(err)
			}
			tx.Close()
			p, err := refresh{cfg: cfg, names: []string{"a"}, mode: mode}.plan(t.Context(), g.a, &fakeConn{f})
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			for _, j := range p.jobs {
				got.WriteString(string(j.Action))
			}
			for _, u := range p.skipped {
				got.WriteString(u.Detail)
			}
			if got.String() != want {
				t.Errorf("%s, mode %s: %q, want %q", tt.name, mode, got.String(), want)
			}
		}
	}
}

// What the configuration wants, and that a call has the last word.
func TestOnChange(t *testing.T) {
	g := newGuest(t)
	g.write(pathConfig, `{"credentials": {
		"a": {"onChange": "restart", "restartUnits": ["extra.service", "off.service", "none.service"], "reloadUnits": ["extra.service", "loads.service", "stiff.service"]},
		"b": {"onChange": "none"}}}`)
	f := g.systemd(
		service("web.service", "a"), service("b.service", "b"), service("both.service", "a", "b"),
		service("extra.service"), service("loads.service").with(func(u *fakeUnit) { u.CanReload = true }), service("stiff.service"),
		service("off.service").with(func(u *fakeUnit) { u.ActiveState = "inactive" }),
	)
	c := g.serve(0).client()
	res, err := c.Apply(t.Context(), apply(value("a", "1"), value("b", "1")))
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "units", results(res.Units), []string{
		"both.service restart done", "extra.service restart done", "loads.service reload done", "none.service none skipped",
		"off.service none skipped", "stiff.service none skipped", "web.service restart done",
	})
	wantEqual(t, "jobs", f.asked(), []string{"tryRestart both.service", "tryRestart extra.service", "reload loads.service", "tryRestart web.service"})

	// Only consumers of what changed.
	if res, err = c.Apply(t.Context(), apply(value("a", "1"), value("b", "2"))); err != nil || len(res.Units) != 0 {
		t.Errorf("Apply of b = %v, %v, want nothing refreshed", results(res.Units), err)
	}
	p := apply(value("b", "3"))
	p.Refresh = vsockrpc.RefreshAuto
	if res, err = c.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "units", results(res.Units), []string{"b.service restart done", "both.service restart done"})
	p = apply(value("a", "2"))
	p.Refresh = vsockrpc.RefreshNone
	if res, err = c.Apply(t.Context(), p); err != nil || len(res.Units) != 0 {
		t.Errorf("Apply with none = %v, %v", results(res.Units), err)
	}
}

func TestApplyRefreshes(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(service("web.service", "a"), service("other.service", "b"), service("bad.service", "a").with(func(u *fakeUnit) {
		u.start = func(map[string]string) consumer.Status {
			return consumer.Status{ActiveState: "failed", SubState: "failed", Result: "exit-code", ExecMainCode: 1, ExecMainStatus: 3}
		}
	}))
	c := g.serve(0).client()
	var progress []string
	c.Progress = func(p vsockrpc.Progress) {
		line := p.Phase
		if p.Unit != nil {
			line += " " + p.Unit.Unit + " " + p.Unit.Result
		}
		progress = append(progress, line)
	}
	p := apply(value("a", "1"))
	p.Refresh = vsockrpc.RefreshAuto
	res, err := c.Apply(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "units", results(res.Units), []string{"bad.service restart failed", "web.service restart done"})
	wantEqual(t, "progress", progress, []string{"applied", "refreshing", "refreshing bad.service failed", "refreshing web.service done"})
	if got := res.Units[0].State; got != "failed (result exit-code, exit status 3)" {
		t.Errorf("state = %q", got)
	}
	if got := f.unitHas("web.service", "a"); got != "1" {
		t.Errorf("web.service has %q, want what was applied before it was restarted", got)
	}
	f.asked()

	// The same again: nothing is stale.
	if res, err = c.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "jobs", f.asked(), nil)
	// A set that was applied and not refreshed is mended by the same call.
	p.Set[0] = value("a", "2")
	p.Refresh = vsockrpc.RefreshNone
	if _, err = c.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	p.Refresh = vsockrpc.RefreshRestart
	if _, err = c.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "jobs", f.asked(), []string{"tryRestart web.service"})

	// Removing and rolling back.
	removed, err := c.Remove(t.Context(), &vsockrpc.RemoveParams{Names: []string{"a"}, Refresh: vsockrpc.RefreshAuto, Forget: true})
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "units after removing", results(removed.Units), []string{"bad.service none skipped", "web.service restart done"})
	if got := f.unitHas("web.service", "a"); got != "" {
		t.Errorf("web.service has %q after its removal", got)
	}
	if _, err := c.Apply(t.Context(), apply(value("a", "3"))); err != nil {
		t.Fatal(err)
	}
	rolled, err := c.Rollback(t.Context(), &vsockrpc.RollbackParams{Refresh: vsockrpc.RefreshAuto})
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "units after rolling back", results(rolled.Units), []string{"bad.service none skipped", "web.service restart done"})

	// Refresh itself: what is stale, or with all everything.
	if _, err := c.Apply(t.Context(), apply(value("a", "4"), value("b", "4"))); err != nil {
		t.Fatal(err)
	}
	f.asked()
	refreshed, err := c.Refresh(t.Context(), &vsockrpc.RefreshParams{Names: []string{"a"}})
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "units of a", results(refreshed.Units), []string{"bad.service none skipped", "web.service restart done"})
	if refreshed, err = c.Refresh(t.Context(), &vsockrpc.RefreshParams{All: true}); err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "all units", results(refreshed.Units), []string{"bad.service none skipped", "other.service restart done", "web.service restart done"})

	// The end of the connection, as at a daemon-reexec, is put up with.
	f.lost = 1
	p.Set[0], p.Refresh = value("a", "5"), vsockrpc.RefreshAuto
	if res, err = c.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "units", results(res.Units), []string{"bad.service none skipped", "web.service restart done"})

	// Where systemd cannot be reached, nothing is changed.
	f.gone = errors.New("connection refused")
	p.Set[0] = value("a", "6")
	if _, err = c.Apply(t.Context(), p); !errors.As(err, new(*vsockrpc.NoSystemdError)) {
		t.Errorf("Apply without systemd = %v", err)
	}
	g.wantStore(map[string]string{"a": "5", "b": "4"})
	p.Refresh = vsockrpc.RefreshNone
	if _, err = c.Apply(t.Context(), p); err != nil {
		t.Errorf("Apply without refresh and systemd: %v", err)
	}
	if f.conns != 0 {
		t.Errorf("%d connections to systemd are open", f.conns)
	}
}

func gated(d time.Duration, set ...vsockrpc.Credential) *vsockrpc.ApplyParams {
	return &vsockrpc.ApplyParams{Set: set, Refresh: vsockrpc.RefreshAuto, Gate: d}
}

// dies is a watch in which a unit that has the bad value fails.
func (f *fakePID1) dies(unit, name, bad string) func(context.Context, map[string]consumer.Status) []consumer.Failure {
	return func(context.Context, map[string]consumer.Status) []consumer.Failure {
		f.mu.Lock()
		defer f.mu.Unlock()
		u := f.units[unit]
		if u.has[name] != bad {
			return nil
		}
		u.status = consumer.Status{ActiveState: "failed", SubState: "failed", Result: "exit-code", ExecMainCode: 1, ExecMainStatus: 1}
		u.ActiveState, u.SubState = "failed", "failed"
		return []consumer.Failure{{Unit: unit, Status: u.status, Problem: "failed"}}
	}
}

func TestGate(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(service("web.service", "a"), service("sibling.service", "b"))
	f.watch = f.dies("web.service", "a", "bad")
	s := g.serve(0)
	c := s.client()
	if _, err := c.Apply(t.Context(), gated(time.Second, value("a", "good"), value("b", "good"))); err != nil {
		t.Fatal(err)
	}
	// It has passed, and nothing is kept to go back to.
	if _, err := c.Rollback(t.Context(), &vsockrpc.RollbackParams{}); !errors.As(err, new(*vsockrpc.NoPreviousError)) {
		t.Errorf("Rollback after the gate = %v", err)
	}
	f.asked()

	bad := gated(time.Second, value("a", "bad"), value("b", "new"))
	_, err := c.Apply(t.Context(), bad)
	rolled, ok := errors.AsType[*vsockrpc.RolledBackError](err)
	if !ok {
		t.Fatalf("Apply = %v, want it rolled back", err)
	}
	if rolled.Generation != 3 || !rolled.Restored || rolled.Problem != "web.service failed: failed (result exit-code, exit status 1)" {
		t.Errorf("rolled back: %+v", rolled)
	}
	wantEqual(t, "units", results(rolled.Units), []string{"sibling.service restart done", "web.service restart done"})
	wantEqual(t, "jobs", f.asked(), []string{
		"tryRestart sibling.service", "tryRestart web.service", "tryRestart sibling.service", "restart web.service",
	})
	g.wantStore(map[string]string{"a": "good", "b": "good"})
	if f.unitHas("web.service", "a") != "good" || f.unitHas("sibling.service", "b") != "good" {
		t.Error("a consumer does not have the value before")
	}

	list, err := c.List(t.Context())
	if err != nil || len(list.Rejected) != 1 || list.Rejected[0].Generation != 2 || list.Gate != nil {
		t.Errorf("List = %+v, %v", list, err)
	}
	_, err = c.Apply(t.Context(), bad)
	if refused, ok := errors.AsType[*vsockrpc.RefusedError](err); !ok || refused.Refusals[0].Reason != "rejected" {
		t.Errorf("Apply of what was rejected = %v", err)
	}
	// Retry tries again, and fails again; mended it passes.
	if _, err := c.Retry(t.Context(), &vsockrpc.RetryParams{Refresh: vsockrpc.RefreshAuto, Gate: time.Second}); !errors.As(err, new(*vsockrpc.RolledBackError)) {
		t.Errorf("Retry = %v, want it rolled back", err)
	}
	f.watch = nil
	res, err := c.Retry(t.Context(), &vsockrpc.RetryParams{Refresh: vsockrpc.RefreshAuto, Gate: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "installed", res.Installed, []string{"a", "b"})
	g.wantStore(map[string]string{"a": "bad", "b": "new"})
	if _, err := c.Retry(t.Context(), &vsockrpc.RetryParams{}); !errors.As(err, new(*vsockrpc.NothingRejectedError)) {
		t.Errorf("Retry = %v, want nothing rejected", err)
	}
	if log := s.log.String(); strings.Contains(log, "good") || strings.Contains(log, "=bad") {
		t.Errorf("the log has values:\n%s", log)
	}
}

// A unit that does not come up fails the gate at once, without a watch.
func TestGateNotUp(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(service("web.service", "a").with(func(u *fakeUnit) {
		u.start = func(has map[string]string) consumer.Status {
			if has["a"] == "2" {
				return consumer.Status{ActiveState: "activating", SubState: "auto-restart", Result: "exit-code"}
			}
			return upStatus
		}
	}))
	f.watch = func(context.Context, map[string]consumer.Status) []consumer.Failure {
		t.Error("a unit that is not up is watched")
		return nil
	}
	c := g.serve(0).client()
	if _, err := c.Apply(t.Context(), apply(value("a", "1"))); err != nil {
		t.Fatal(err)
	}
	_, err := c.Apply(t.Context(), gated(time.Hour, value("a", "2")))
	if rolled, ok := errors.AsType[*vsockrpc.RolledBackError](err); !ok || !rolled.Restored {
		t.Errorf("Apply = %v, want it rolled back", err)
	}
	g.wantStore(map[string]string{"a": "1"})
}

// While a set is on trial, others wait outside; who hangs up does not end it;
// and the agent stays for it.
func TestGateInProgress(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(service("web.service", "a"))
	watching, pass := make(chan struct{}), make(chan struct{})
	f.watch = func(context.Context, map[string]consumer.Status) []consumer.Failure {
		close(watching)
		<-pass
		return nil
	}
	s := g.serve(time.Second) // long enough for the callers to come
	caller := s.client()
	ended := make(chan error, 1)
	go func() {
		_, err := caller.Apply(t.Context(), gated(time.Hour, value("a", "1")))
		ended <- err
	}()
	select {
	case <-watching:
	case err := <-ended:
		t.Fatalf("Apply = %v, want it to watch", err)
	}
	_ = caller.Client.Close()
	if err := <-ended; err == nil {
		t.Error("Apply over a closed connection succeeded")
	}

	c := s.client()
	for what, err := range map[string]error{
		"Apply": func() error { _, err := c.Apply(t.Context(), apply(value("b", "1"))); return err }(),
		"Remove": func() error {
			_, err := c.Remove(t.Context(), &vsockrpc.RemoveParams{Names: []string{"a"}})
			return err
		}(),
		"Rollback": func() error { _, err := c.Rollback(t.Context(), &vsockrpc.RollbackParams{}); return err }(),
		"Refresh":  func() error { _, err := c.Refresh(t.Context(), &vsockrpc.RefreshParams{}); return err }(),
	} {
		if progress, ok := errors.AsType[*vsockrpc.GateInProgressError](err); !ok || progress.Generation != 1 {
			t.Errorf("%s during a gate = %v", what, err)
		}
	}
	if list, err := c.List(t.Context()); err != nil || list.Gate == nil || *list.Gate != 1 {
		t.Errorf("List = %+v, %v", list, err)
	}
	_ = c.Client.Close()
	close(pass)
	// Only now it ends by itself.
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if tx, err := g.a.store().View(); err != nil || tx.Trial() != nil {
		t.Errorf("after the gate: %v, or it is on trial still", err)
	} else {
		tx.Close()
	}
	g.wantStore(map[string]string{"a": "1"})
}

// An agent that ends in the middle of a gate leaves it to the next one.
func TestGateResumed(t *testing.T) {
	for _, fails := range []bool{false, true} {
		g := newGuest(t)
		f := g.systemd(service("web.service", "a"), service("late.service", "a"))
		watching := make(chan struct{}, 8)
		f.watch = func(ctx context.Context, _ map[string]consumer.Status) []consumer.Failure {
			watching <- struct{}{}
			<-ctx.Done()
			return nil
		}
		first := g.serve(0)
		c := first.client()
		if _, err := c.Apply(t.Context(), apply(value("a", "1"))); err != nil {
			t.Fatal(err)
		}
		called := make(chan error)
		go func() {
			c := first.client()
			c.Progress = func(vsockrpc.Progress) {}
			_, err := c.Apply(t.Context(), gated(time.Hour, value("a", "2")))
			called <- err
		}()
		<-watching
		if err := first.stop(); err != nil {
			t.Fatal(err)
		}
		if err := <-called; err == nil {
			t.Error("Apply succeeded though the agent ended")
		}

		f.asked()
		f.watch = func(_ context.Context, base map[string]consumer.Status) []consumer.Failure {
			if len(base) != 2 {
				t.Errorf("watching %v, want both units", base)
			}
			if !fails {
				return nil
			}
			return []consumer.Failure{{Unit: "web.service", Problem: "restarted itself"}}
		}
		second := g.serve(time.Millisecond)
		if err := second.stop(); err != nil {
			t.Fatal(err)
		}
		if fails {
			g.wantStore(map[string]string{"a": "1"})
			wantEqual(t, "jobs", f.asked(), []string{"tryRestart late.service", "tryRestart web.service"})
			if !strings.Contains(second.log.String(), "web.service restarted itself") {
				t.Errorf("the log does not say why:\n%s", second.log)
			}
		} else {
			g.wantStore(map[string]string{"a": "2"})
			wantEqual(t, "jobs", f.asked(), nil)
		}
	}
}

// From every phase that an agent can be killed in, the next one comes to an end.
func TestTrialPhases(t *testing.T) {
	for _, phase := range []trialPhase{trialRefreshing, trialWatching, trialRestoring, "nonsense", "later"} {
		g := newGuest(t)
		f := g.systemd(service("web.service", "a"))
		g.put("1", "")
		f.units["web.service"].begin(f.store)
		tr := trial{Generation: 2, Phase: trialRefreshing, Mode: vsockrpc.RefreshAuto, GateUSec: 1, Names: []string{"a"}, Changed: []string{"a"}}
		g.put("2", string(tr.encode()))
		if phase != trialRefreshing {
			f.units["web.service"].begin(f.store) // it was refreshed
			tr.Jobs = []consumer.Job{{Unit: "web.service", Action: consumer.ActionTryRestart}}
			tr.Base = map[string]consumer.Status{"web.service": upStatus}
			tr.Phase = phase
		}
		want := "2"
		switch phase {
		case trialRestoring:
			tr.Phase = trialWatching
			if err := tr.save(g.a); err != nil {
				t.Fatal(err)
			}
			if err := tr.fail(g.a, "it was on trial"); err != nil {
				t.Fatal(err)
			}
			want = "1"
		case "nonsense", "later":
			tx, err := g.a.store().Begin()
			if err != nil {
				t.Fatal(err)
			}
			note := map[trialPhase]string{"nonsense": `{"phase": 1}`, "later": `{"generation": 2, "phase": "later"}`}[phase]
			if err := tx.SetTrial([]byte(note)); err != nil {
				t.Fatal(err)
			}
			tx.Close()
			want = "1"
		default:
			if err := tr.save(g.a); err != nil {
				t.Fatal(err)
			}
		}
		s := g.serve(time.Millisecond)
		if err := s.stop(); err != nil {
			t.Fatalf("phase %s: %v", phase, err)
		}
		g.wantStore(map[string]string{"a": want})
		if got := f.unitHas("web.service", "a"); phase != "nonsense" && phase != "later" && got != want {
			t.Errorf("phase %s: web.service has %q, want %q", phase, got, want)
		}
		if pending, err := g.a.pendingTrial(); err != nil || pending != nil {
			t.Errorf("phase %s: trial %+v, %v, want none", phase, pending, err)
		}
	}
}

// Who would wait for a credential that is not there is left alone: a gate would
// wait with it, and keep out the push that brings it.
func TestRestoreDoesNotWait(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(service("web.service", "a"), loader("socket.service", "new"))
	f.units["socket.service"].ActiveState = "active"
	f.over = true
	f.watch = f.dies("web.service", "a", "bad")
	c := g.serve(0).client()
	if _, err := c.Apply(t.Context(), apply(value("a", "good"))); err != nil {
		t.Fatal(err)
	}
	_, err := c.Apply(t.Context(), gated(time.Second, value("a", "bad"), value("new", "1")))
	rolled, ok := errors.AsType[*vsockrpc.RolledBackError](err)
	if !ok || rolled.Restored {
		t.Fatalf("Apply = %v, want it rolled back and not all restored", err)
	}
	wantEqual(t, "units", results(rolled.Units), []string{"socket.service none skipped", "web.service restart done"})
	g.wantStore(map[string]string{"a": "good"})
	removed, err := c.Remove(t.Context(), &vsockrpc.RemoveParams{Names: []string{"new"}, Refresh: vsockrpc.RefreshAuto})
	if err != nil || len(removed.Units) != 0 {
		t.Errorf("Remove = %v, %v", removed.Units, err)
	}
}

// A gate wants something to watch, whatever the configuration says.
func TestGateImpliesRefresh(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(service("web.service", "a"))
	c := g.serve(0).client()
	p := gated(time.Millisecond, value("a", "1"))
	p.Gate, p.Refresh = time.Second, ""
	res, err := c.Apply(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "units", results(res.Units), []string{"web.service restart done"})
	wantEqual(t, "jobs", f.asked(), []string{"tryRestart web.service"})
}

// A start that the agent before this one asked for, and that goes on, is waited
// for: the unit is not up yet, and has not failed.
func TestTrialAwaitsStart(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(service("web.service", "a"))
	g.put("1", "")
	tr := trial{
		Generation: 2, Phase: trialRefreshing, Mode: vsockrpc.RefreshAuto, GateUSec: 1, Names: []string{"a"}, Changed: []string{"a"},
		Jobs: []consumer.Job{{Unit: "web.service", Action: consumer.ActionTryRestart}},
	}
	g.put("2", string(tr.encode()))
	u := f.units["web.service"]
	u.begin(f.store)
	u.ActiveState, u.status = "activating", consumer.Status{ActiveState: "activating", SubState: "start-pre", Result: "success"}
	if err := g.serve(time.Millisecond).stop(); err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "jobs", f.asked(), []string{"start web.service"})
	g.wantStore(map[string]string{"a": "2"})
}

// put puts a value of a in force, on trial with a note.
func (g *guest) put(v, note string) {
	g.t.Helper()
	tx, err := g.a.store().Begin()
	if err != nil {
		g.t.Fatal(err)
	}
	defer tx.Close()
	set := credstore.Set{Install: []credstore.Credential{{Name: "a", Value: value("a", v).Value}}}
	if note != "" {
		set.Trial = []byte(note)
	}
	if _, err := tx.Apply(set); err != nil {
		g.t.Fatal(err)
	}
}

// A set whose units nobody can watch any more is not left in force.
func TestTrialWithoutSystemd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGuest(t)
		f := g.systemd(service("web.service", "a"))
		g.put("1", "")
		tr := &trial{Generation: 2, Phase: trialRefreshing, Mode: vsockrpc.RefreshAuto, GateUSec: 1, Names: []string{"a"}, Changed: []string{"a"}}
		g.put("2", string(tr.encode()))
		f.gone = errors.New("connection refused")
		cfg, _ := ParseConfig(nil)
		_, err := tr.run(t.Context(), g.a, cfg, discard, func(vsockrpc.Progress) {})
		rolled, ok := errors.AsType[*vsockrpc.RolledBackError](err)
		if !ok || rolled.Restored || !strings.Contains(rolled.Problem, "connection refused") {
			t.Errorf("run = %v", err)
		}
		g.wantStore(map[string]string{"a": "1"})
	})
}

func TestLoadedAndStale(t *testing.T) {
	v := &view{
		entries: map[string]credstore.Entry{
			"a": {Name: "a", Revision: "r2", Generation: 5, InstalledUSec: 500, State: credstore.StateInForce},
			"s": {Name: "s", Revision: "r2", Generation: 5, InstalledUSec: 500, State: credstore.StateShadowed},
		},
		previous:  map[string]credstore.Entry{"a": {Name: "a", Revision: "r1", Generation: 3, InstalledUSec: 300}},
		removedAt: map[string]uint64{"gone": 500},
		loads: loads{
			"now.service":    {InvocationID: "1", Names: map[string]load{"a": {Generation: 5}}},
			"before.service": {InvocationID: "1", Names: map[string]load{"a": {Generation: 3}}},
			"before.mount":   {InvocationID: "1", Names: map[string]load{"a": {Generation: 3}}},
			"older.service":  {InvocationID: "1", Names: map[string]load{"a": {Generation: 1}}},
			"reload.service": {InvocationID: "1", Names: map[string]load{"a": {Generation: 5, Reload: true, USec: 600}}},
			"other.service":  {InvocationID: "0", Names: map[string]load{"a": {Generation: 5}}},
		},
	}
	for _, tt := range []struct {
		unit, active     string
		usec             uint64
		load             consumer.Load
		loaded, revision string
		stale            bool
	}{
		{"x.service", "active", 500, consumer.Load{Name: "a", As: "a", Way: consumer.WayFile}, "inForce", "r2", false},
		{"x.service", "active", 499, consumer.Load{Name: "a", As: "b", Way: consumer.WayPath}, "previous", "r1", true},
		{"x.service", "active", 299, consumer.Load{Name: "a", As: "a", Way: consumer.WayImport}, "unknown", "", true},
		{"x.service", "active", 499, consumer.Load{Name: "a", Way: consumer.WayEnvironment}, "previous", "r1", true},
		// A reload does not read the environment again, whenever it was.
		{"reloaded.service", "active", 900, consumer.Load{Name: "a", Way: consumer.WayEnvironment}, "previous", "r1", true},
		{"reloaded.service", "active", 900, consumer.Load{Name: "a", As: "a", Way: consumer.WayFile}, "inForce", "r2", false},
		{"x.service", "inactive", 0, consumer.Load{Name: "a", As: "a", Way: consumer.WayFile}, "none", "", false},
		{"x.service", "failed", 0, consumer.Load{Name: "a", As: "a", Way: consumer.WaySocket}, "none", "", false},
		// Where systemd finds another file, no refresh helps; by its path it is found.
		{"x.service", "active", 1, consumer.Load{Name: "s", As: "s", Way: consumer.WayFile}, "unknown", "", false},
		{"x.service", "active", 1, consumer.Load{Name: "s", As: "s", Way: consumer.WayPath}, "unknown", "", true},
		// By socket it is known, whatever the clock says.
		{"now.service", "active", 1, consumer.Load{Name: "a", As: "a", Way: consumer.WaySocket}, "inForce", "r2", false},
		{"before.service", "active", 900, consumer.Load{Name: "a", As: "a", Way: consumer.WaySocket}, "previous", "r1", true},
		{"older.service", "active", 900, consumer.Load{Name: "a", As: "a", Way: consumer.WaySocket}, "unknown", "", true},
		{"other.service", "active", 900, consumer.Load{Name: "a", As: "a", Way: consumer.WaySocket}, "unknown", "", true},
		{"other.service", "activating", 900, consumer.Load{Name: "a", As: "a", Way: consumer.WaySocket}, "none", "", false},
		// What a reload was given is there once the reload has succeeded.
		{"reload.service", "active", 599, consumer.Load{Name: "a", As: "a", Way: consumer.WaySocket}, "unknown", "", true},
		{"reload.service", "active", 601, consumer.Load{Name: "a", As: "a", Way: consumer.WaySocket}, "inForce", "r2", false},
		// What other units were given is not known, but where the agent gave it.
		{"x.socket", "active", 1, consumer.Load{Name: "a", As: "a", Way: consumer.WayFile}, "none", "", false},
		{"x.mount", "active", 1, consumer.Load{Name: "a", As: "a", Way: consumer.WayFile}, "unknown", "", false},
		{"x.mount", "active", 1, consumer.Load{Name: "a", As: "a", Way: consumer.WaySocket}, "unknown", "", false},
		{"before.mount", "active", 1, consumer.Load{Name: "a", As: "a", Way: consumer.WaySocket}, "previous", "r1", true},
		{"x.service", "active", 400, consumer.Load{Name: "gone", As: "gone", Way: consumer.WayFile}, "unknown", "", true},
		{"x.service", "active", 600, consumer.Load{Name: "gone", As: "gone", Way: consumer.WayFile}, "unknown", "", false},
		{"x.service", "active", 400, consumer.Load{Name: "never", As: "never", Way: consumer.WayFile}, "unknown", "", false},
	} {
		u := consumer.Unit{Name: tt.unit, ActiveState: tt.active, LoadedUSec: tt.usec, StartedUSec: tt.usec, InvocationID: "1", Loads: []consumer.Load{tt.load}}
		if tt.unit == "reloaded.service" {
			u.StartedUSec = 499
		}
		loaded, revision := v.loaded(u, tt.load)
		if loaded != tt.loaded || revision != tt.revision || v.staleLoad(u, tt.load) != tt.stale {
			t.Errorf("%s, %s, at %d, %+v: %s %q, stale %v, want %s %q, %v", tt.unit, tt.active, tt.usec, tt.load, loaded, revision, v.staleLoad(u, tt.load), tt.loaded, tt.revision, tt.stale)
		}
	}
}

// With compare, what a unit has is read, in sizes and bytes.
func TestCompareLoaded(t *testing.T) {
	g := newGuest(t)
	g.put("one", "")
	g.put("two", "")
	g.write(pathLoaded+"/now.service/a", "two")
	g.write(pathLoaded+"/before.service/a", "one")
	g.write(pathLoaded+"/other.service/a", "eno")
	tx, err := g.a.store().View()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Close()
	cfg, _ := ParseConfig([]byte(`{"consumers": {"compare": true}}`))
	v := g.a.newView(tx, cfg, nil)
	for unit, want := range map[string]string{"now.service": "inForce", "before.service": "previous", "other.service": "unknown", "none.service": "unknown"} {
		u := consumer.Unit{Name: unit, ActiveState: "active", LoadedUSec: 1}
		if got, _ := v.loaded(u, consumer.Load{Name: "a", As: "a", Way: consumer.WayFile}); got != want {
			t.Errorf("%s has %s, want %s", unit, got, want)
		}
	}
}

func TestListConsumers(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(service("web.service", "a"), service("off.service", "a").with(func(u *fakeUnit) { u.ActiveState = "inactive" }))
	c := g.serve(0).client()
	if _, err := c.Apply(t.Context(), apply(value("a", "1"))); err != nil {
		t.Fatal(err)
	}
	list, err := c.ListConsumers(t.Context())
	if err != nil || list.ConsumersProblem != "" {
		t.Fatalf("List = %+v, %v", list, err)
	}
	wantEqual(t, "consumers", list.Entries[0].Consumers, []vsockrpc.Consumer{
		{Unit: "off.service", ActiveState: "inactive", As: "a", Way: "file", Loaded: "none", Refresh: "none", Detail: whyInactive},
		{Unit: "web.service", ActiveState: "active", As: "a", Way: "file", Loaded: "unknown", Stale: true, Refresh: "restart"},
	})
	if _, err := c.Refresh(t.Context(), &vsockrpc.RefreshParams{}); err != nil {
		t.Fatal(err)
	}
	if list, err = c.ListConsumers(t.Context()); err != nil || list.Entries[0].Consumers[1].Stale || list.Entries[0].Consumers[1].Revision != "r-1" {
		t.Errorf("List after a refresh = %+v, %v", list, err)
	}
	f.gone = errors.New("connection refused")
	if list, err = c.ListConsumers(t.Context()); err != nil || list.ConsumersProblem == "" || len(list.Entries) != 1 {
		t.Errorf("List without systemd = %+v, %v", list, err)
	}
}
