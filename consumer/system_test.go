package consumer

import (
	"errors"
	"fmt"
	"reflect"
	"testing"

	systemd "github.com/coreos/go-systemd/v22/dbus"
)

// manages sets the manager's own properties.
func (m *fakeManager) manages(t testing.TB, state string, jobs uint32) {
	m.set(t, "", false, map[property]any{
		{ifaceManager, "Version"}:     "257.13-1~deb13u1",
		{ifaceManager, "SystemState"}: state,
		{ifaceManager, "NJobs"}:       jobs,
	})
}

// fails sets what systemd says of a unit that failed.
func (m *fakeManager) fails(t testing.TB, unit, result string, since uint64) systemd.UnitStatus {
	m.set(t, unit, false, map[property]any{
		{ifaceUnit, "ActiveState"}:          "failed",
		{ifaceUnit, "StateChangeTimestamp"}: since,
	})
	if result != "" {
		m.set(t, unit, false, map[property]any{{resultInterface(unit), "Result"}: result})
	}
	return unitStatus(unit, "loaded", "failed", "failed")
}

func TestSystem(t *testing.T) {
	m, c := newFake(t)
	m.manages(t, "running", 0)
	m.lists(unitStatus("ok.service", "loaded", "active", "running"))
	want := System{Version: "257.13-1~deb13u1", State: "running", Failed: []FailedUnit{}}
	if s, err := c.System(t.Context()); err != nil || !reflect.DeepEqual(s, want) {
		t.Errorf("System = %+v, %v, want %+v", s, err, want)
	}

	m.manages(t, "degraded", 3)
	// It was listed, and then somebody started it again.
	up := m.fails(t, "up.service", "signal", 8)
	m.set(t, "up.service", false, change{{ifaceUnit, "ActiveState"}: "active"})
	m.lists(
		up,
		unitStatus("ok.service", "loaded", "active", "running"),
		unitStatus("gone.service", "loaded", "failed", "failed"),
		m.fails(t, "z.service", "exit-code", 7),
		m.fails(t, "y.scope", "oom-kill", 6),
		m.fails(t, "x.timer", "resources", 5),
		m.fails(t, "w.mount", "success", 4),
		m.fails(t, "v.device", "", 0),
	)
	want = System{Version: want.Version, State: "degraded", Jobs: 3, Failed: []FailedUnit{
		{"v.device", "failed", 0},
		{"w.mount", "failed", 4},
		{"x.timer", "resources", 5},
		{"y.scope", "oom-kill", 6},
		{"z.service", "exit-code", 7},
	}}
	if s, err := c.System(t.Context()); err != nil || !reflect.DeepEqual(s, want) {
		t.Errorf("System = %+v, %v, want %+v", s, err, want)
	}
}

// TestSystemMany has more units that failed than anybody wants to know.
func TestSystemMany(t *testing.T) {
	m, c := newFake(t)
	m.manages(t, "degraded", 0)
	var list []systemd.UnitStatus
	for i := range MaxFailed + 20 {
		list = append(list, m.fails(t, fmt.Sprintf("u%03d.service", MaxFailed+19-i), "exit-code", 1))
	}
	m.lists(list...)
	s, err := c.System(t.Context())
	if err != nil || len(s.Failed) != MaxFailed || s.Failed[0].Unit != "u000.service" || s.Failed[MaxFailed-1].Unit != "u255.service" {
		t.Errorf("System = %d units, %v, want %d: %+v", len(s.Failed), err, MaxFailed, s)
	}
	for _, asked := range m.asked {
		if asked > "u256" {
			t.Errorf("asked for %s, which is not told of", asked)
		}
	}
}

// TestSystemRefused has a systemd that lists nothing.
func TestSystemRefused(t *testing.T) {
	m, c := newFake(t)
	m.manages(t, "running", 0)
	if s, err := c.System(t.Context()); err == nil || errors.Is(err, ErrLost) {
		t.Errorf("System = %+v, %v, want systemd's error", s, err)
	}
}
