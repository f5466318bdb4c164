package consumer

import (
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	systemd "github.com/coreos/go-systemd/v22/dbus"
)

// A flaggedFile is one of EnvironmentFiles.
type flaggedFile struct {
	Path     string
	Optional bool
}

const ifaceMount = "org.freedesktop.systemd1.Mount"

// lists answers what lists units.
func (m *fakeManager) lists(units ...systemd.UnitStatus) {
	m.listed = units
	m.call = func(member string, args []any) ([]any, error) {
		switch member {
		case "ListUnitsByPatterns":
			var found []systemd.UnitStatus
			for _, u := range units {
				states, patterns := args[0].([]string), args[1].([]string)
				if (len(states) == 0 || slices.Contains(states, u.ActiveState)) &&
					(len(patterns) == 0 || slices.Contains(patterns, "*"+u.Name[strings.LastIndexByte(u.Name, '.'):])) {
					found = append(found, u)
				}
			}
			return []any{found}, nil
		case "ListUnitsByNames":
			i := slices.IndexFunc(units, func(u systemd.UnitStatus) bool { return u.Name == args[0].([]string)[0] })
			if i < 0 {
				return []any{[]systemd.UnitStatus{}}, nil
			}
			return []any{units[i : i+1]}, nil
		}
		return nil, busError("org.freedesktop.DBus.Error.UnknownMethod", member)
	}
}

// TestFindOld has a systemd 252, which does not know half of what it is asked.
func TestFindOld(t *testing.T) {
	m, c := newFake(t)
	m.lists(
		unitStatus("b.service", "loaded", "active", "running"),
		unitStatus("a.service", "loaded", "failed", "failed"),
		unitStatus("gone.service", "loaded", "active", "running"), // between the list and the question
		unitStatus("no.service", "not-found", "inactive", "dead"),
		unitStatus("x.mount", "loaded", "active", "mounted"),
		unitStatus("x.device", "loaded", "active", "plugged"),
	)
	service := map[property]any{
		{ifaceService, "LoadCredential"}:                  []loadCredential{{"x", "key"}},
		{ifaceService, "LoadCredentialEncrypted"}:         []loadCredential{{"y", "/run/credstore/key"}},
		{ifaceService, "EnvironmentFiles"}:                []flaggedFile{{"/run/credstore/key", true}},
		{ifaceUnit, "InvocationID"}:                       []byte{0: 0xAB, 15: 1},
		{ifaceUnit, "InactiveExitTimestampMonotonic"}:     uint64(6),
		{ifaceUnit, "CanReload"}:                          true,
		{ifaceUnit, "RefuseManualStop"}:                   true,
		{ifaceService, "Type"}:                            "notify",
		{ifaceService, "ExecMainStartTimestampMonotonic"}: uint64(7),
	}
	m.set(t, "a.service", false, service)
	m.set(t, "b.service", false, service)
	m.set(t, "no.service", false, service)
	m.set(t, "x.mount", false, map[property]any{
		{ifaceMount, "LoadCredential"}:                []loadCredential{{"key", "key"}},
		{ifaceMount, "LoadCredentialEncrypted"}:       []loadCredential{},
		{ifaceMount, "EnvironmentFiles"}:              []flaggedFile{},
		{ifaceUnit, "InvocationID"}:                   make([]byte, 16),
		{ifaceUnit, "CanReload"}:                      true,
		{ifaceUnit, "RefuseManualStop"}:               false,
		{ifaceUnit, "InactiveExitTimestampMonotonic"}: uint64(8),
	})

	loads := []Load{{"key", "", WayEnvironment}, {"key", "x", WayFile}, {"key", "y", WayPath}}
	a := Unit{
		Name: "a.service", LoadState: "loaded", ActiveState: "failed", SubState: "failed", Loads: loads,
		InvocationID: "ab000000000000000000000000000001", Type: "notify", CanReload: true, RefuseManualStop: true,
	}
	b := a
	b.Name, b.ActiveState, b.SubState, b.LoadedUSec, b.StartedUSec = "b.service", "active", "running", 7, 7
	x := Unit{Name: "x.mount", LoadState: "loaded", ActiveState: "active", SubState: "mounted", Loads: []Load{{"key", "key", WayFile}}, LoadedUSec: 8, StartedUSec: 8, CanReload: true}
	want := []Unit{a, b, x}
	for range 2 {
		units, err := c.Find(t.Context(), []string{"key", "other"})
		if err != nil || !reflect.DeepEqual(units, want) {
			t.Fatalf("Find = %+v, %v, want %+v", units, err, want)
		}
	}

	// The second time it is not asked for what it did not know the first time.
	times := make(map[string]int)
	for _, asked := range m.asked {
		if strings.HasPrefix(asked, "no.service ") {
			t.Errorf("asked for %s, which has no file", asked)
		}
		times[asked]++
	}
	for _, unit := range []string{"a.service " + ifaceService, "b.service " + ifaceService, "x.mount " + ifaceMount} {
		if n := times[unit+".ImportCredential"]; n > 1 {
			t.Errorf("asked %d times for ImportCredential of %s", n, unit)
		}
		if n := times[unit+".LoadCredential"]; n != 2 {
			t.Errorf("asked %d times for LoadCredential of %s, want 2", n, unit)
		}
	}
	if len(c.unknown) != 5 {
		t.Errorf("unknown are %v, want two of services and mounts each, and RefreshOnReload", c.unknown)
	}
}

// TestFindImport has a systemd that tells of globs in two ways.
func TestFindImport(t *testing.T) {
	m, c := newFake(t)
	m.lists(unitStatus("a.service", "loaded", "inactive", "dead"))
	m.set(t, "a.service", false, map[property]any{
		{ifaceService, "ImportCredential"}:   []string{"k*"},
		{ifaceService, "ImportCredentialEx"}: []importCredential{{"k*", "new."}},
	})
	units, err := c.Find(t.Context(), []string{"key"})
	if err != nil || len(units) != 1 || !reflect.DeepEqual(units[0].Loads, []Load{{"key", "new.ey", WayImport}}) {
		t.Errorf("Find = %+v, %v, want the renamed one", units, err)
	}
}

// TestFindWrong has a property of a type that it never had.
func TestFindWrong(t *testing.T) {
	m, c := newFake(t)
	m.lists(unitStatus("a.service", "loaded", "inactive", "dead"))
	m.set(t, "a.service", false, map[property]any{{ifaceService, "LoadCredential"}: "a"})
	if units, err := c.Find(t.Context(), []string{"a"}); err == nil {
		t.Errorf("Find = %+v, want an error", units)
	}
}

// TestFindRestarted has a service start anew while systemd is asked about it.
func TestFindRestarted(t *testing.T) {
	run := func(id byte, state string, usec uint64) map[property]any {
		return map[property]any{
			{ifaceUnit, "InvocationID"}: []byte{15: id}, {ifaceUnit, "ActiveState"}: state, {ifaceUnit, "SubState"}: state,
			{ifaceService, "ExecMainStartTimestampMonotonic"}: usec,
		}
	}
	for _, at := range []property{{ifaceUnit, "InvocationID"}, {ifaceUnit, "ActiveState"}, {ifaceService, "ExecMainStartTimestampMonotonic"}, {ifaceUnit, "StateChangeTimestampMonotonic"}} {
		t.Run(at.name, func(t *testing.T) {
			m, c := newFake(t)
			m.lists(unitStatus("a.service", "loaded", "failed", "failed"))
			m.set(t, "a.service", false, map[property]any{
				{ifaceService, "LoadCredential"}: []loadCredential{{"x", "key"}}, {ifaceService, "RefreshOnReload"}: []string{"credentials"},
			})
			m.set(t, "a.service", false, run(1, "active", 3))
			started := false
			m.got = func(_ string, p property) {
				if p == at && !started {
					started = true
					m.set(t, "a.service", false, run(2, "active", 5))
				}
			}
			units, err := c.Find(t.Context(), []string{"key"})
			if err != nil || len(units) != 1 {
				t.Fatalf("Find = %+v, %v, want one", units, err)
			}
			u := units[0]
			if u.ActiveState != "active" || u.InvocationID[31] != '2' || u.LoadedUSec != 5 {
				t.Errorf("Find = %+v, want the second run alone", u)
			}
		})
	}
}

// TestLoadedUSec has services that refresh their credentials when they are
// reloaded.
func TestLoadedUSec(t *testing.T) {
	for _, tt := range []struct {
		name                                  string
		refresh                               []string
		active                                string
		exit, mainStart, activeEnter, changed uint64
		reloadResult                          string
		want                                  uint64
	}{
		{"no refresh", []string{"extensions"}, "active", 1, 1, 2, 3, "success", 1},
		{"never reloaded", []string{"credentials"}, "active", 1, 1, 2, 2, "success", 1},
		{"reloaded", []string{"extensions", "credentials"}, "active", 1, 1, 2, 3, "success", 3},
		{"failed reload", []string{"credentials"}, "active", 1, 1, 2, 3, "exit-code", 1},
		{"reloading", []string{"credentials"}, "reloading", 1, 1, 2, 3, "success", 1},
		{"starting", []string{"credentials"}, "activating", 1, 1, 0, 1, "success", 1},
		{"before its main process", []string{}, "activating", 5, 1, 2, 3, "success", 5},
		{"with its main process", []string{}, "activating", 5, 6, 2, 3, "success", 6},
		{"stopped", []string{"credentials"}, "inactive", 1, 1, 2, 3, "success", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, c := newFake(t)
			m.lists(unitStatus("a.service", "loaded", tt.active, ""))
			m.set(t, "a.service", false, map[property]any{
				{ifaceService, "RefreshOnReload"}:                 tt.refresh,
				{ifaceService, "ExecMainStartTimestampMonotonic"}: tt.mainStart,
				{ifaceUnit, "InactiveExitTimestampMonotonic"}:     tt.exit,
				{ifaceUnit, "ActiveEnterTimestampMonotonic"}:      tt.activeEnter,
				{ifaceUnit, "StateChangeTimestampMonotonic"}:      tt.changed,
				{ifaceService, "ReloadResult"}:                    tt.reloadResult,
			})
			u, err := c.Unit(t.Context(), "a.service", nil)
			// Whatever was reloaded since.
			if started := min(tt.want, max(tt.exit, tt.mainStart)); u.StartedUSec != started {
				t.Errorf("Unit = %+v, want it started at %d", u, started)
			}
			if err != nil || u.LoadedUSec != tt.want || u.RefreshOnReload != slices.Contains(tt.refresh, "credentials") {
				t.Errorf("Unit = %+v, %v, want it loaded at %d", u, err, tt.want)
			}
		})
	}
}

// TestReloadTells has services whose credentials a reload refreshes, and that hear of it or do not.
func TestReloadTells(t *testing.T) {
	type command struct {
		Path string
		Argv []string
	}
	for _, tt := range []struct {
		kind   string
		reload []command
		want   bool
	}{
		{"exec", []command{}, false},
		{"exec", []command{{"/bin/kill", []string{"kill", "-HUP"}}}, true},
		{"notify-reload", []command{}, true},
	} {
		m, c := newFake(t)
		m.lists(unitStatus("a.service", "loaded", "active", "running"))
		m.set(t, "a.service", false, map[property]any{
			{ifaceService, "RefreshOnReload"}: []string{"credentials"}, {ifaceService, "Type"}: tt.kind, {ifaceService, "ExecReload"}: tt.reload,
		})
		if u, err := c.Unit(t.Context(), "a.service", nil); err != nil || u.ReloadTells != tt.want {
			t.Errorf("%s with %d commands: Unit = %+v, %v, want ReloadTells %v", tt.kind, len(tt.reload), u, err, tt.want)
		}
	}
}

func TestStarting(t *testing.T) {
	m, c := newFake(t)
	u := unitStatus("a.service", "loaded", "activating", "start")
	u.JobId, u.JobType, u.JobPath = 12, "start", jobPath(12)
	m.lists(u)
	m.set(t, "a.service", false, map[property]any{
		{ifaceUnit, "InvocationID"}:               []byte{15: 1},
		{ifaceService, "LoadCredential"}:          []loadCredential{{"b", testConfig.Socket}, {"x", "x"}, {"a", testConfig.Socket}},
		{ifaceService, "LoadCredentialEncrypted"}: []loadCredential{{"c", testConfig.Socket}},
	})
	want := Start{InvocationID: fmt.Sprintf("%032d", 1), Job: 12, JobType: "start", ActiveState: "activating", SubState: "start", SocketNames: []string{"b", "a", "c"}}
	if s, err := c.Starting(t.Context(), "a.service"); err != nil || !reflect.DeepEqual(s, want) {
		t.Errorf("Starting = %+v, %v, want %+v", s, err, want)
	}
	if s, err := c.Starting(t.Context(), "b.service"); err == nil {
		t.Errorf("Starting = %+v, want an error: there is no such unit", s)
	}
}

func TestOwn(t *testing.T) {
	for value, want := range map[string]bool{"": false, "no": false, "restart": false, "yes": true} {
		m, c := newFake(t)
		u := unitStatus("guest-agent.service", "loaded", "active", "running")
		u.JobId, u.JobType = 3, "stop"
		m.lists(u)
		list := m.call
		m.call = func(member string, args []any) ([]any, error) {
			if member == "GetUnitByPID" && args[0] == uint32(os.Getpid()) { //nolint:gosec // a pid is positive
				return []any{unitPath(u.Name)}, nil
			}
			return list(member, args)
		}
		m.units[u.Name] = map[property]any{}
		if value != "" {
			m.units[u.Name][property{ifaceService, "FileDescriptorStorePreserve"}] = value
		}
		unit, jobType, preserve, err := c.Own(t.Context())
		if err != nil || unit != u.Name || jobType != "stop" || preserve != want {
			t.Errorf("Own with %q = %q, %q, %v, %v, want %q, stop, %v", value, unit, jobType, preserve, err, u.Name, want)
		}
	}
}
