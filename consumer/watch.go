package consumer

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
)

// A Failure is a unit that did not stay up.
type Failure struct {
	Unit    string
	Status  Status // when it was noticed
	Problem string // one line
}

// Watch watches units for as long as d, and returns nothing if all of them
// stayed up. base has the status of each after its refresh. Watch returns as
// soon as one of them fails, has been restarted by systemd on its own account,
// or has ended and is no oneshot service that succeeded; with all that have done
// so by then, sorted by name. A restart that somebody asked for is none of this.
//
// A unit that is not expected to be up must not be in base: an inactive one
// that a try-restart left alone, for example.
func (c *Conn) Watch(ctx context.Context, base map[string]Status, d time.Duration) ([]Failure, error) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	signals, stop := c.subscribe()
	defer stop()

	units := make([]*watched, 0, len(base))
	for name, status := range base {
		units = append(units, &watched{name: name, restarts: status.NRestarts})
	}
	slices.SortFunc(units, func(a, b *watched) int { return cmp.Compare(a.name, b.name) })
	if failed, err := c.look(ctx, units, false); err != nil || failed != nil {
		return failed, err
	}
	byPath := make(map[dbus.ObjectPath]*watched, len(units))
	for _, u := range units {
		byPath[u.path] = u
	}
	for {
		s, err := c.next(ctx, signals, timer.C)
		switch {
		case err != nil:
			return nil, fmt.Errorf("watching units: %w", err)
		case s == nil:
			return c.look(ctx, units, true)
		}
		u, ok := byPath[s.Path]
		if !ok || s.Name != "org.freedesktop.DBus.Properties.PropertiesChanged" {
			continue
		}
		var (
			iface   string
			changed map[string]dbus.Variant
			names   []string
		)
		if err := dbus.Store(s.Body, &iface, &changed, &names); err != nil {
			return nil, fmt.Errorf("decoding systemd's PropertiesChanged: %w", err)
		}
		u.set(changed)
		// Of a change, systemd tells what is the service's before what is the
		// unit's (send_changed_signal in src/core/dbus-unit.c).
		if iface == ifaceUnit && u.judge(false) {
			return c.look(ctx, units, false)
		}
	}
}

// A watched is a unit that is being watched.
type watched struct {
	name     string
	path     dbus.ObjectPath // by its primary name: the one that signals have
	restarts uint32          // of systemd's own account, that are not counted
	status   Status
	job      uint32 // what is pending for it, 0 for nothing

	failure *Failure
}

// look asks how all units are doing, and returns those that have failed.
func (c *Conn) look(ctx context.Context, units []*watched, last bool) ([]Failure, error) {
	err := each(len(units), func(i int) error {
		u := units[i]
		v, err := c.get(ctx, unitPath(u.name), append(statusProperties(u.name), property{ifaceUnit, "Id"}, property{ifaceUnit, "Job"})...)
		if err != nil {
			return fmt.Errorf("reading the status of %q: %w", u.name, err)
		}
		u.path = unitPath(v.text("Id"))
		u.set(v)
		u.judge(last)
		return nil
	})
	if err != nil {
		return nil, err
	}
	var failed []Failure
	for _, u := range units {
		if u.failure != nil {
			failed = append(failed, *u.failure)
		}
	}
	return failed, nil
}

// set takes over what v has.
func (u *watched) set(v map[string]dbus.Variant) {
	u.status.set(v)
	if job, ok := v["Job"].Value().([]any); ok && len(job) > 0 {
		u.job, _ = job[0].(uint32)
	}
	// Somebody started it anew, and systemd counts from zero.
	u.restarts = min(u.restarts, u.status.NRestarts)
}

// judge reports whether the unit has failed, and keeps the first time it did:
// a moment later it may be up again, or forgotten by systemd. At the end of the
// watch a unit that is going down counts as down.
func (u *watched) judge(last bool) bool {
	if u.failure != nil {
		return true
	}
	s := u.status
	var problem string
	switch {
	case s.ActiveState == "failed":
		problem = "failed"
	case s.NRestarts > u.restarts:
		problem = "restarted itself"
	case strings.HasPrefix(s.SubState, "auto-restart"):
		// auto-restart and, from systemd 254, auto-restart-queued.
		problem = "ended, and systemd is about to restart it"
	case u.job != 0 && !last:
		// Between the two halves of a restart it is down, too.
	case s.ActiveState == "inactive" && (s.Type != "oneshot" || s.Result != "success"):
		problem = "ended"
	case s.ActiveState == "deactivating" && last:
		problem = "is ending"
	case s.ActiveState == "activating" && last && s.Type != "oneshot":
		problem = "is not up"
	}
	if problem == "" {
		return false
	}
	u.failure = &Failure{Unit: u.name, Status: s, Problem: problem}
	return true
}
