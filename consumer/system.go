package consumer

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	systemd "github.com/coreos/go-systemd/v22/dbus"
)

// MaxFailed bounds the failed units of a [System].
const MaxFailed = 256

// A System is how systemd as a whole is doing.
type System struct {
	Version string // as the manager has it: "257.13-1~deb13u1"
	State   string // SystemState: initializing, starting, running, degraded, maintenance, stopping, ...
	Jobs    int    // how many jobs are queued or run

	// Failed are the units that failed, sorted by name. Of more than
	// [MaxFailed], the first are there.
	Failed []FailedUnit
}

// A FailedUnit is one in the state failed.
type FailedUnit struct {
	Unit      string
	Result    string // why, as in [Status]; where systemd does not say, the unit's SubState
	SinceUSec uint64 // on CLOCK_REALTIME in µs, as the clock was then; 0 where unknown
}

// System tells how systemd is doing. The parts are asked for one after the
// other: a unit that fails meanwhile may be in one and not in the other.
func (c *Conn) System(ctx context.Context) (System, error) {
	v, err := c.get(ctx, managerPath,
		property{ifaceManager, "Version"},
		property{ifaceManager, "SystemState"},
		property{ifaceManager, "NJobs"},
	)
	if err != nil {
		return System{}, fmt.Errorf("reading the state of systemd: %w", err)
	}
	list, err := c.manager.ListUnitsByPatternsContext(ctx, []string{"failed"}, []string{})
	if err != nil {
		return System{}, c.failure(ctx, "listing failed units", err)
	}
	slices.SortFunc(list, func(a, b systemd.UnitStatus) int { return cmp.Compare(a.Name, b.Name) })
	list = list[:min(len(list), MaxFailed)]

	failed := make([]FailedUnit, len(list))
	err = each(len(list), func(i int) (err error) {
		failed[i], err = c.failed(ctx, list[i])
		if isAnswer(err) {
			return nil // it is gone by now
		}
		return err
	})
	if err != nil {
		return System{}, err
	}
	return System{
		Version: v.text("Version"),
		State:   v.text("SystemState"),
		Jobs:    int(v.number("NJobs")), //nolint:gosec // systemd has it in 32 bits
		Failed:  slices.DeleteFunc(failed, func(u FailedUnit) bool { return u.Unit == "" }),
	}, nil
}

// failed tells of a unit that was listed as failed, and returns the zero value
// if it is no longer: systemd loads one that is gone again to answer.
func (c *Conn) failed(ctx context.Context, u systemd.UnitStatus) (FailedUnit, error) {
	wanted := []property{{ifaceUnit, "ActiveState"}, {ifaceUnit, "StateChangeTimestamp"}}
	if iface := resultInterface(u.Name); iface != "" {
		wanted = append(wanted, property{iface, "Result"})
	}
	v, err := c.get(ctx, unitPath(u.Name), wanted...)
	if err != nil {
		return FailedUnit{}, fmt.Errorf("reading the state of %q: %w", u.Name, err)
	}
	if v.text("ActiveState") != "failed" {
		return FailedUnit{}, nil
	}
	result := v.text("Result")
	if result == "" || result == "success" {
		result = u.SubState
	}
	return FailedUnit{Unit: u.Name, Result: result, SinceUSec: v.number("StateChangeTimestamp")}, nil
}
