package consumer

import (
	"context"
	"strings"
	"sync"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// A Follower notes what systemd signals on one connection. Its methods may be
// called at the same time.
type Follower struct {
	c       *Conn
	changed chan struct{}

	mu     sync.Mutex
	closed bool
	units  map[dbus.ObjectPath]*followed
	// stale counts the signals after which what a unit is set to may be
	// different: an answer that was under way meanwhile is not kept.
	stale uint64
	// moved counts the changes of units' states.
	moved uint64
}

// A followed is what is known of a unit.
type followed struct {
	state    unitState
	moved    uint64 // the follower's count at the last change of state
	consumer bool   // Find has told of it

	settings  *settings // nil if they have to be asked for
	loadState string    // of what settings were asked for
}

// A unitState is what System and Find make use of and systemd signals, with
// ActiveState "" before the first signal.
type unitState struct {
	ActiveState, SubState string
	InvocationID          string
	Changed               uint64 // StateChangeTimestampMonotonic
	MainStart             uint64 // ExecMainStartTimestampMonotonic
}

// Follow notes, from now on, what systemd signals. Several may follow on one
// connection. Whoever follows has to call [Follower.Close] or [Conn.Close].
//
// Nothing is asked for, so that it costs no time; the error is that the context
// or the connection has ended.
func (c *Conn) Follow(ctx context.Context) (*Follower, error) {
	f := &Follower{c: c, changed: make(chan struct{}, 1), units: make(map[dbus.ObjectPath]*followed)}
	c.signals.add(f)
	if err := ctx.Err(); err != nil || c.wire.ended.Load() {
		f.Close()
		return nil, c.failure(ctx, "following systemd", err)
	}
	return f, nil
}

// Changed returns a channel, of capacity 1, that has something once what
// [Conn.System] or [Follower.Find] told last may be different now. It is for
// one to take from, who then asks again, and who decides how often: what comes
// meanwhile is one more. It is never closed: see [Follower.Lost].
//
// It does not tell of the number of jobs, which changes all the time; nor of a
// unit that Find did not tell of, unless it fails, is new or is gone.
func (f *Follower) Changed() <-chan struct{} { return f.changed }

// Lost returns a channel that is closed when the connection has ended, as it
// does with every daemon-reexec: dial and follow anew.
func (f *Follower) Lost() <-chan struct{} { return f.c.bus.Context().Done() }

// Close ends following, not the connection.
func (f *Follower) Close() {
	f.c.signals.remove(f)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	clear(f.units)
}

// Find is as [Conn.Find], but keeps what units are set to until systemd says
// that it may have changed: where nothing did, it asks for the list of units and
// for the state of those it returns. What systemd had signaled before it
// answered with the list counts. After [Follower.Close] nothing is kept.
func (f *Follower) Find(ctx context.Context, names []string) ([]Unit, error) {
	f.mu.Lock()
	began := f.moved
	f.mu.Unlock()
	units, err := f.c.find(ctx, names, f.settings)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return units, nil
	}
	for _, u := range units {
		e := f.unit(unitPath(u.Name))
		e.consumer = true
		// Perhaps after it was asked, and then nobody knew that it mattered.
		if e.moved > began {
			f.tell()
		}
	}
	return units, nil
}

// settings returns what a listed unit says about credentials.
func (f *Follower) settings(ctx context.Context, u systemd.UnitStatus) (settings, error) {
	f.mu.Lock()
	// A unit without a file that gets one, or a transient one, is no new unit.
	e := f.units[u.Path]
	if e != nil && e.settings != nil && e.loadState == u.LoadState {
		s := *e.settings
		f.mu.Unlock()
		return s, nil
	}
	asked := f.stale
	f.mu.Unlock()

	s, err := f.c.settings(ctx, u.Name)
	if err != nil {
		return settings{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stale == asked && !f.closed {
		e := f.unit(u.Path)
		e.settings, e.loadState = &s, u.LoadState
	}
	return s, nil
}

// unit returns what is known of a unit, to be added to. f.mu is held.
func (f *Follower) unit(path dbus.ObjectPath) *followed {
	e := f.units[path]
	if e == nil {
		e = &followed{}
		f.units[path] = e
	}
	return e
}

// tell has Changed tell.
func (f *Follower) tell() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// note takes a signal in, before any answer that systemd sent after it is seen.
func (f *Follower) note(iface, member string, s *dbus.Signal) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return
	}
	switch {
	case iface == "org.freedesktop.DBus.Properties" && member == "PropertiesChanged":
		f.noteState(s)
	case iface != ifaceManager:
	case member == "Reloading":
		// All units are read anew. It comes before and after that, and systemd
		// answers nothing in between.
		f.stale++
		clear(f.units)
		f.tell()
	case member == "UnitNew" || member == "UnitRemoved":
		// Of a new unit, this comes in place of its first PropertiesChanged
		// (bus_unit_send_change_signal in src/core/dbus-unit.c).
		if len(s.Body) < 2 {
			return
		}
		path, _ := s.Body[1].(dbus.ObjectPath)
		if !matters(path) {
			return
		}
		f.stale++
		delete(f.units, path)
		f.tell()
	case member == "JobNew" || member == "JobRemoved":
		// Both have the job's ID, its path and its unit.
		if len(s.Body) < 3 {
			return
		}
		if unit, _ := s.Body[2].(string); strings.HasSuffix(unit, ".target") && stateTargets[unitPath(unit)] {
			f.tell()
		}
	case member == "StartupFinished":
		f.tell()
	}
}

// noteState takes PropertiesChanged of a unit in. systemd sends all it has, for
// whatever changed. f.mu is held.
func (f *Follower) noteState(s *dbus.Signal) {
	if len(s.Body) < 2 || !matters(s.Path) {
		return
	}
	iface, _ := s.Body[0].(string)
	changed, _ := s.Body[1].(map[string]dbus.Variant)
	if iface != ifaceUnit && iface != ifaceService {
		return
	}
	e := f.unit(s.Path)
	before := e.state
	e.state.set(changed)
	if e.state == before {
		return // a job, a new status text, ...
	}
	f.moved++
	e.moved = f.moved
	if e.consumer || before.ActiveState == "" || before.ActiveState == "failed" || e.state.ActiveState == "failed" || stateTargets[s.Path] {
		f.tell()
	}
}

// set takes over what v has.
func (s *unitState) set(v values) {
	for _, t := range []struct {
		name string
		dst  *string
	}{{"ActiveState", &s.ActiveState}, {"SubState", &s.SubState}} {
		if _, ok := v[t.name]; ok {
			*t.dst = v.text(t.name)
		}
	}
	if _, ok := v["InvocationID"]; ok {
		s.InvocationID = v.id("InvocationID")
	}
	if _, ok := v["StateChangeTimestampMonotonic"]; ok {
		s.Changed = v.number("StateChangeTimestampMonotonic")
	}
	if _, ok := v["ExecMainStartTimestampMonotonic"]; ok {
		s.MainStart = v.number("ExecMainStartTimestampMonotonic")
	}
}

// stateTargets are the units that SystemState is made of (manager_state in
// src/core/manager.c), besides those that failed and StartupFinished.
var stateTargets = map[dbus.ObjectPath]bool{
	unitPath("basic.target"):     true,
	unitPath("emergency.target"): true,
	unitPath("rescue.target"):    true,
	unitPath("shutdown.target"):  true,
}

// matters reports whether a path is a unit's that can fail, load credentials or
// make the state of systemd. Devices and slices, of which there may be many, and
// other targets never do.
func matters(path dbus.ObjectPath) bool {
	p := string(path)
	switch {
	case !strings.HasPrefix(p, unitFolder), strings.HasSuffix(p, "_2edevice"), strings.HasSuffix(p, "_2eslice"):
		return false
	case strings.HasSuffix(p, "_2etarget"):
		return stateTargets[path]
	default:
		return true
	}
}
