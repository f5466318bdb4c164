package agent

import (
	"context"
	"errors"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/guestagent/guestagent/consumer"
	"github.com/guestagent/guestagent/vsockrpc"
)

// systemd is what the agent needs of PID 1.
type systemd interface {
	Find(ctx context.Context, names []string) ([]consumer.Unit, error)
	Unit(ctx context.Context, unit string, names []string) (consumer.Unit, error)
	Starting(ctx context.Context, unit string) (consumer.Start, error)
	Run(ctx context.Context, jobs []consumer.Job, done func(consumer.JobResult)) ([]consumer.JobResult, error)
	Status(ctx context.Context, unit string) (consumer.Status, error)
	Watch(ctx context.Context, base map[string]consumer.Status, d time.Duration) ([]consumer.Failure, error)
	Own(ctx context.Context) (unit, jobType string, preserve bool, err error)
	System(ctx context.Context) (consumer.System, error)
	Follow(ctx context.Context) (follower, error)
	Close()
}

// busConn is a connection to PID 1.
type busConn struct{ *consumer.Conn }

var _ systemd = busConn{}

// Follow has what systemd signals noted from then on.
func (b busConn) Follow(ctx context.Context) (follower, error) {
	f, err := b.Conn.Follow(ctx)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// pid1Timeout bounds the wait for PID 1, which answers between two steps of
// booting.
const pid1Timeout = 10 * time.Second

// pid1 connects to PID 1. It must be closed: PID 1 sends every signal to
// whoever is connected.
func (a *Agent) pid1(ctx context.Context) (systemd, error) {
	if a.dialSystemd != nil {
		return a.dialSystemd(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, pid1Timeout)
	defer cancel()
	c, err := consumer.Dial(ctx, consumer.Config{
		Bus: a.path(pathPID1Socket), Store: "/" + pathStore, Socket: "/" + pathCredentialsSocket,
	})
	if err != nil {
		return nil, err
	}
	return busConn{c}, nil
}

// A refresh is what is to be done to the consumers of some names.
type refresh struct {
	cfg Config
	// names are those whose consumers are meant.
	names []string
	// changed are those of the names that have just changed. What the
	// configuration wants refreshed besides is refreshed for them.
	changed []string
	// removed are those of changed that are no longer there.
	removed []string
	// mode is one of vsockrpc's words, "" for what the configuration says.
	mode string
	// all refreshes consumers that are not stale, too.
	all bool
}

// wanted reports whether there may be anything to do.
func (r refresh) wanted() bool {
	if len(r.names) == 0 || r.mode == vsockrpc.RefreshNone {
		return false
	}
	return r.mode != "" || slices.ContainsFunc(r.names, func(name string) bool {
		c := r.cfg.Credentials[name]
		return c.OnChange != "" && c.OnChange != vsockrpc.RefreshNone || len(c.RestartUnits) > 0 || len(c.ReloadUnits) > 0
	})
}

// patience is how long the end of the connection to PID 1, as at a
// daemon-reexec, is put up with.
const patience = 30 * time.Second

// do plans and carries out. Where the connection to PID 1 ends, what is stale
// by then is planned anew.
func (r refresh) do(ctx context.Context, a *Agent, progress func(vsockrpc.Progress)) ([]vsockrpc.Refreshed, error) {
	var run refreshRun
	err := a.withPID1(ctx, func(bus systemd) error {
		p, err := r.plan(ctx, a, bus)
		if err != nil {
			return err
		}
		run.add(p)
		return run.run(ctx, bus, p, progress)
	})
	return run.list(), err
}

// A refreshRun is a refresh that may take several attempts: PID 1 executes
// itself anew in the middle, or an agent is killed and another goes on. Jobs go
// on in PID 1 meanwhile.
type refreshRun struct {
	// jobs are all that were asked for.
	jobs   []consumer.Job
	units  map[string]vsockrpc.Refreshed
	status map[string]consumer.Status // after its job
}

// add takes over what is about to be asked for.
func (run *refreshRun) add(p refreshPlan) {
	for _, j := range p.jobs {
		if !hasJob(run.jobs, j.Unit) {
			run.jobs = append(run.jobs, j)
		}
	}
}

func hasJob(jobs []consumer.Job, unit string) bool {
	return slices.ContainsFunc(jobs, func(j consumer.Job) bool { return j.Unit == unit })
}

// run carries a plan out, waits for what earlier attempts asked for and goes on,
// and says how all of it ended.
func (run *refreshRun) run(ctx context.Context, bus systemd, p refreshPlan, progress func(vsockrpc.Progress)) error {
	if run.units == nil {
		run.units, run.status = map[string]vsockrpc.Refreshed{}, map[string]consumer.Status{}
	}
	for _, j := range run.jobs {
		if hasJob(p.jobs, j.Unit) {
			continue
		}
		s, err := bus.Status(ctx, j.Unit)
		if err != nil {
			return err
		}
		if starting(s) {
			p.jobs = append(p.jobs, consumer.Job{Unit: j.Unit, Action: consumer.ActionStart})
		}
	}
	results, status, err := p.run(ctx, bus, progress)
	maps.Copy(run.status, status)
	for _, u := range results {
		if _, ok := run.units[u.Unit]; !ok || u.Result != vsockrpc.ResultSkipped {
			run.units[u.Unit] = u
		}
	}
	if err != nil {
		return err
	}
	for _, j := range run.jobs {
		if _, ok := run.status[j.Unit]; ok {
			continue // it ended while somebody looked
		}
		s, err := bus.Status(ctx, j.Unit)
		if err != nil {
			return err
		}
		run.status[j.Unit] = s
		run.units[j.Unit] = refreshed(consumer.JobResult{Unit: j.Unit, Action: j.Action, Result: vsockrpc.ResultDone, Status: s})
	}
	return nil
}

// starting reports whether a unit is on its way up, or down in the first half
// of a restart.
func starting(s consumer.Status) bool {
	return s.ActiveState == "deactivating" || s.ActiveState == "activating" && !strings.HasPrefix(s.SubState, "auto-restart")
}

// list returns what became of each unit, sorted.
func (run *refreshRun) list() []vsockrpc.Refreshed {
	return slices.SortedFunc(maps.Values(run.units), func(x, y vsockrpc.Refreshed) int { return strings.Compare(x.Unit, y.Unit) })
}

// withPID1 connects to PID 1 and does something with it, again where the
// connection is lost.
func (a *Agent) withPID1(ctx context.Context, do func(systemd) error) error {
	for delay, waited := 100*time.Millisecond, time.Duration(0); ; delay = min(2*delay, time.Second) {
		bus, err := a.pid1(ctx)
		if err == nil {
			err = do(bus)
			bus.Close()
			if !errors.Is(err, consumer.ErrLost) {
				return err
			}
		}
		if waited += delay; waited > patience {
			return err
		}
		t := time.NewTimer(delay)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
	}
}

// A refreshPlan is what comes of a refresh: jobs for systemd, and what is not
// done, with the reason.
type refreshPlan struct {
	jobs    []consumer.Job
	skipped []vsockrpc.Refreshed
	// wouldWait are those of the skipped whose start would wait for a credential
	// that is not there.
	wouldWait []string
}

// plan looks at who loads the names. It changes nothing.
func (r refresh) plan(ctx context.Context, a *Agent, bus systemd) (refreshPlan, error) {
	var p refreshPlan
	own, err := ownUnit(ctx, bus)
	if err != nil {
		return p, err
	}
	units, err := bus.Find(ctx, r.names)
	if err != nil {
		return p, err
	}
	sockets, err := socketNames(ctx, bus, units)
	if err != nil {
		return p, err
	}
	actions := map[string]consumer.Action{}
	if err := r.consumers(a, &p, actions, units, sockets, own); err != nil {
		return p, err
	}
	if err := r.besides(ctx, bus, &p, actions, own); err != nil {
		return p, err
	}
	for unit, action := range actions {
		p.jobs = append(p.jobs, consumer.Job{Unit: unit, Action: action})
	}
	slices.SortFunc(p.jobs, func(x, y consumer.Job) int { return strings.Compare(x.Unit, y.Unit) })
	slices.SortFunc(p.skipped, func(x, y vsockrpc.Refreshed) int { return strings.Compare(x.Unit, y.Unit) })
	return p, nil
}

// consumers plans for the units that load the names. The store is looked at
// now, after systemd has answered: nothing is held while it is waited for.
func (r refresh) consumers(a *Agent, p *refreshPlan, actions map[string]consumer.Action, units []consumer.Unit, sockets map[string][]string, own string) error {
	tx, err := a.store().View()
	if err != nil {
		return err
	}
	defer tx.Close()
	seen := a.newView(tx, r.cfg, r.removed)
	for _, u := range units {
		// What does not run has nothing, and what has the values in force, or is
		// about to load them, needs no more.
		wants := u.Loads
		if running(u) && !r.all && strings.HasSuffix(u.Name, ".service") {
			wants = slices.DeleteFunc(slices.Clone(u.Loads), func(l consumer.Load) bool { return !seen.staleLoad(u, l) })
		}
		mode := r.modeFor(wants)
		if len(wants) == 0 || mode == "" || mode == vsockrpc.RefreshNone {
			continue
		}
		action, why := r.action(u, mode, own)
		if i := slices.IndexFunc(sockets[u.Name], seen.missing); action != "" && i >= 0 {
			action, why = "", "its start would wait for "+sockets[u.Name][i]
			p.wouldWait = append(p.wouldWait, u.Name)
		}
		if action != "" {
			actions[u.Name] = action
		} else {
			p.skip(u, why)
		}
	}
	return nil
}

// socketNames returns all that each running unit loads over the credentials
// socket, be it asked for or not.
func socketNames(ctx context.Context, bus systemd, units []consumer.Unit) (map[string][]string, error) {
	names := map[string][]string{}
	for _, u := range units {
		if !running(u) || !slices.ContainsFunc(u.Loads, func(l consumer.Load) bool { return l.Way == consumer.WaySocket }) {
			continue
		}
		s, err := bus.Starting(ctx, u.Name)
		if err != nil {
			return nil, err
		}
		names[u.Name] = s.SocketNames
	}
	return names, nil
}

// besides plans for the units that the configuration names for what changed.
// Of two actions on one unit, the restart is the stronger one.
func (r refresh) besides(ctx context.Context, bus systemd, p *refreshPlan, actions map[string]consumer.Action, own string) error {
	named := map[string]consumer.Action{}
	for _, name := range r.changed {
		for _, unit := range r.cfg.Credentials[name].ReloadUnits {
			if named[unit] == "" {
				named[unit] = consumer.ActionReload
			}
		}
		for _, unit := range r.cfg.Credentials[name].RestartUnits {
			named[unit] = consumer.ActionTryRestart
		}
	}
	for _, unit := range slices.Sorted(maps.Keys(named)) {
		action := named[unit]
		u, err := bus.Unit(ctx, unit, nil)
		if errors.Is(err, consumer.ErrLost) || ctx.Err() != nil {
			return err
		}
		switch {
		case err != nil:
			p.skip(consumer.Unit{Name: unit}, err.Error())
		case u.Name == own:
			p.skip(u, whyOwn)
		case u.LoadState != "loaded":
			p.skip(u, "it is "+u.LoadState)
		case !running(u):
			p.skip(u, whyInactive)
		case actions[u.Name] == consumer.ActionTryRestart: // by another name, perhaps
		case action == consumer.ActionReload && !u.CanReload:
			p.skip(u, whyReload)
		default:
			actions[u.Name] = action
		}
	}
	return nil
}

// ownUnit returns the unit this process runs in, "" where it runs in none.
func ownUnit(ctx context.Context, bus systemd) (string, error) {
	unit, _, _, err := bus.Own(ctx)
	if err != nil && (errors.Is(err, consumer.ErrLost) || ctx.Err() != nil) {
		return "", err
	}
	return unit, nil
}

func (p *refreshPlan) skip(u consumer.Unit, why string) {
	state := u.ActiveState
	if u.SubState != "" && u.SubState != u.ActiveState {
		state += " (" + u.SubState + ")"
	}
	p.skipped = append(p.skipped, vsockrpc.Refreshed{
		Unit: u.Name, Action: vsockrpc.ActionNone, Result: vsockrpc.ResultSkipped, State: state, Detail: why,
	})
}

// modes are the ways to refresh, the strongest last.
var modes = []string{"", vsockrpc.RefreshNone, vsockrpc.RefreshAuto, vsockrpc.RefreshReload, vsockrpc.RefreshRestart}

// modeFor is how a unit is to be refreshed for what it loads: as the call says,
// else the strongest that the configuration says for one of the names.
func (r refresh) modeFor(loads []consumer.Load) string {
	if r.mode != "" {
		return r.mode
	}
	mode := ""
	for _, l := range loads {
		if m := r.cfg.Credentials[l.Name].OnChange; slices.Index(modes, m) > slices.Index(modes, mode) {
			mode = m
		}
	}
	return mode
}

const (
	whyInactive = "it does not run"
	whyOwn      = "it is the agent, which does not refresh itself"
	whyReload   = "it cannot be reloaded"
)

// action says what refreshes a consumer, "" and why where nothing does.
// Restarting a mount or a session takes more away than a stale value: that is
// for somebody to decide who knows them.
func (r refresh) action(u consumer.Unit, mode, own string) (consumer.Action, string) {
	switch {
	case u.Name == own:
		return "", whyOwn
	case !running(u):
		return "", whyInactive
	case !strings.HasSuffix(u.Name, ".service"):
		return "", "only services are refreshed"
	case u.LoadState != "loaded":
		return "", "it is " + u.LoadState
	case matchesUnit(u.Name, r.cfg.Refresh.Never):
		return "", "refresh.never in the guest's configuration has it"
	}
	// A file of the environment is read when a process starts, and never again.
	// And a process that nobody tells of a reload goes on with what it has read.
	environment := slices.ContainsFunc(u.Loads, func(l consumer.Load) bool { return l.Way == consumer.WayEnvironment })
	switch {
	case mode == vsockrpc.RefreshReload && !u.CanReload:
		return "", whyReload
	case mode == vsockrpc.RefreshReload, mode == vsockrpc.RefreshAuto && u.CanReload && u.RefreshOnReload && u.ReloadTells && !environment:
		return consumer.ActionReload, ""
	case u.RefuseManualStop:
		return "", "it has RefuseManualStop="
	}
	return consumer.ActionTryRestart, ""
}

// running reports whether there is something to refresh.
func running(u consumer.Unit) bool {
	switch u.ActiveState {
	case "active", "reloading", "activating", "refreshing":
		return true
	}
	return false
}

// matchesUnit reports whether one of the patterns, with wildcards as in
// systemctl(1), matches the unit's name. See [checkUnitPattern] for those that
// are none.
func matchesUnit(unit string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(unitPattern(p), unit)
		return ok && err == nil
	})
}

// unitPattern writes a pattern of systemctl's, fnmatch(3) without escapes, as Go
// has it: names of units have backslashes, and [!…] is [^…].
func unitPattern(p string) string {
	return strings.ReplaceAll(strings.ReplaceAll(p, `\`, `\\`), "[!", "[^")
}

// checkUnitPattern checks a pattern for names of units.
func checkUnitPattern(p string) error {
	if _, err := path.Match(unitPattern(p), ""); err != nil {
		return errors.New("a pattern for units is malformed")
	}
	return nil
}

// refreshed is a job's end in the wire's words. A job that is done says only
// that systemd did what it was asked for: a service of Type=simple may have
// failed since.
func refreshed(r consumer.JobResult) vsockrpc.Refreshed {
	u := vsockrpc.Refreshed{Unit: r.Unit, Action: vsockrpc.ActionRestart, Result: r.Result, State: r.Status.String(), Detail: r.Problem}
	if r.Action == consumer.ActionReload {
		u.Action = vsockrpc.ActionReload
	}
	switch {
	case r.Result == consumer.ResultRefused:
		u.Result = vsockrpc.ResultFailed
	case r.Result == vsockrpc.ResultDone && !up(r.Status):
		u.Result, u.Detail = vsockrpc.ResultFailed, "it was started, and is not up"
	}
	return u
}

// up reports whether a unit whose job is done came up: it runs, or was made to
// run once and did.
func up(s consumer.Status) bool {
	switch s.ActiveState {
	case "active", "reloading", "refreshing":
		return true
	case "inactive":
		return s.Type == "oneshot" && s.Result == "success"
	}
	return false
}

// bad returns the units that were to be refreshed and did not come up.
func bad(units []vsockrpc.Refreshed) (names []string) {
	for _, u := range units {
		if u.Result != vsockrpc.ResultDone && u.Result != vsockrpc.ResultSkipped {
			names = append(names, u.Unit)
		}
	}
	return names
}

// run queues the jobs, waits until each has ended, and tells of it.
func (p refreshPlan) run(ctx context.Context, bus systemd, progress func(vsockrpc.Progress)) (units []vsockrpc.Refreshed, status map[string]consumer.Status, err error) {
	waiting := make([]string, len(p.jobs))
	for i, j := range p.jobs {
		waiting[i] = j.Unit
	}
	progress(vsockrpc.Progress{Phase: vsockrpc.PhaseRefreshing, WaitingFor: waiting})
	results, err := bus.Run(ctx, p.jobs, func(r consumer.JobResult) {
		u := refreshed(r)
		progress(vsockrpc.Progress{Phase: vsockrpc.PhaseRefreshing, Unit: &u})
	})
	status = map[string]consumer.Status{}
	for _, r := range results {
		units = append(units, refreshed(r))
		status[r.Unit] = r.Status
	}
	units = append(units, p.skipped...)
	slices.SortFunc(units, func(x, y vsockrpc.Refreshed) int { return strings.Compare(x.Unit, y.Unit) })
	return units, status, err
}
