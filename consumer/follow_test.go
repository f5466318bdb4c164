package consumer

import (
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// follow returns a follower of a fake PID 1.
func follow(t *testing.T, c *Conn) *Follower {
	t.Helper()
	f, err := c.Follow(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

// told reports whether Changed has something, and takes it. All that was
// signaled before has been seen: the fake's pipe has no buffer, and what is read
// after the signal comes after it was noted.
func told(t *testing.T, c *Conn, f *Follower) bool {
	t.Helper()
	if _, err := c.Status(t.Context(), "fence.service"); err == nil {
		t.Fatal("there is a fence.service")
	}
	select {
	case <-f.Changed():
		return true
	default:
		return false
	}
}

// manager sends one of the manager's signals.
func (m *fakeManager) manager(t testing.TB, member string, body ...any) {
	t.Helper()
	m.signal(t, managerPath, ifaceManager, member, body...)
}

// consumer makes a unit that loads credentials.
func (m *fakeManager) consumer(t testing.TB, unit string, names ...string) {
	t.Helper()
	load := []loadCredential{}
	for _, name := range names {
		load = append(load, loadCredential{name, name})
	}
	m.set(t, unit, false, serviceState(unit))
	m.set(t, unit, false, change{
		{ifaceService, "LoadCredential"}:          load,
		{ifaceService, "LoadCredentialEncrypted"}: []loadCredential{},
		{ifaceService, "ImportCredential"}:        []string{},
		{ifaceService, "ImportCredentialEx"}:      []importCredential{},
		{ifaceService, "EnvironmentFiles"}:        []flaggedFile{},
	})
}

// settingsAsked returns how many settings have been asked for since the last
// call, by unit.
func (m *fakeManager) settingsAsked() map[string]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	asked := make(map[string]int)
	for _, a := range m.asked {
		if unit, p, _ := strings.Cut(a, " "); strings.HasSuffix(p, ".LoadCredential") {
			asked[unit]++
		}
	}
	m.asked = nil
	return asked
}

// finds fails the test if Find does not find the units.
func finds(t *testing.T, f *Follower, want ...string) []Unit {
	t.Helper()
	units, err := f.Find(t.Context(), []string{"key"})
	got := []string{}
	for _, u := range units {
		got = append(got, u.Name)
	}
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("Find = %q, %v, want %q", got, err, want)
	}
	return units
}

func TestFollowerFind(t *testing.T) {
	loaded := func(names ...string) (list []systemd.UnitStatus) {
		for _, name := range names {
			list = append(list, unitStatus(name, "loaded", "active", "running"))
		}
		return list
	}
	reloading := func(m *fakeManager) { m.manager(t, "Reloading", true) }
	for _, tt := range []struct {
		name   string
		change func(m *fakeManager)
		want   []string // what is found then
		asked  map[string]int
	}{
		{"nothing", func(m *fakeManager) {}, []string{"a.service"}, nil},
		{"daemon-reload", reloading, []string{"a.service"}, map[string]int{"a.service": 1, "b.service": 1}},
		{"daemon-reload, other settings", func(m *fakeManager) {
			m.consumer(t, "a.service")
			m.consumer(t, "b.service", "key")
			m.manager(t, "Reloading", false)
		}, []string{"b.service"}, map[string]int{"a.service": 1, "b.service": 1}},
		{"loaded anew", func(m *fakeManager) {
			m.consumer(t, "b.service", "key")
			m.manager(t, "UnitRemoved", "b.service", unitPath("b.service"))
		}, []string{"a.service", "b.service"}, map[string]int{"b.service": 1}},
		{"a new one", func(m *fakeManager) {
			m.consumer(t, "c.service", "key")
			m.manager(t, "UnitNew", "c.service", unitPath("c.service"))
			m.lists(loaded("a.service", "b.service", "c.service")...)
		}, []string{"a.service", "c.service"}, map[string]int{"c.service": 1}},
		{"gone", func(m *fakeManager) {
			m.manager(t, "UnitRemoved", "a.service", unitPath("a.service"))
			m.lists(loaded("b.service")...)
		}, []string{}, nil},
		{"masked", func(m *fakeManager) {
			// Where a signal is missing, the list has it.
			m.consumer(t, "a.service")
			list := loaded("a.service", "b.service")
			list[0].LoadState = "masked"
			m.lists(list...)
		}, []string{}, map[string]int{"a.service": 1}},
		{"signals that say nothing", func(m *fakeManager) {
			m.manager(t, "UnitNew")
			m.manager(t, "UnitNew", uint32(1), uint32(2))
			m.manager(t, "JobNew", uint32(1))
			m.signal(t, unitPath("a.service"), "org.freedesktop.DBus.Properties", "PropertiesChanged")
			m.signal(t, unitPath("a.service"), "org.freedesktop.DBus.Properties", "PropertiesChanged", uint32(1), "x", []string{})
			m.signal(t, unitPath("a.service"), "org.example", "Reloading", true)
		}, []string{"a.service"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, c := newFake(t)
			m.consumer(t, "a.service", "key")
			m.consumer(t, "b.service", "other")
			m.lists(append(loaded("a.service", "b.service"), unitStatus("none.service", "not-found", "inactive", "dead"))...)
			f := follow(t, c)
			finds(t, f, "a.service")
			if asked := m.settingsAsked(); len(asked) != 2 {
				t.Errorf("asked for %v the first time, want a and b", asked)
			}
			tt.change(m)
			finds(t, f, tt.want...)
			if asked := m.settingsAsked(); len(asked) != len(tt.asked) || len(asked) > 0 && !reflect.DeepEqual(asked, tt.asked) {
				t.Errorf("asked for %v, want %v", asked, tt.asked)
			}
			finds(t, f, tt.want...)
			if asked := m.settingsAsked(); len(asked) != 0 {
				t.Errorf("asked again for %v, want nothing", asked)
			}
		})
	}
}

// TestFollowerState has a unit whose state is never kept.
func TestFollowerState(t *testing.T) {
	m, c := newFake(t)
	m.consumer(t, "a.service", "key")
	m.lists(unitStatus("a.service", "loaded", "active", "running"))
	f := follow(t, c)
	for _, main := range []uint64{5, 6} {
		m.set(t, "a.service", false, change{{ifaceService, "ExecMainStartTimestampMonotonic"}: main})
		units := finds(t, f, "a.service")
		want, err := c.Find(t.Context(), []string{"key"})
		if err != nil || units[0].LoadedUSec != main || !reflect.DeepEqual(units, want) {
			t.Errorf("Find = %+v, %v, want it as Conn.Find: %+v", units, err, want)
		}
	}
	// Other names are not what was asked for before.
	if units, err := f.Find(t.Context(), []string{"other"}); err != nil || len(units) != 0 {
		t.Errorf("Find(other) = %+v, %v, want nothing", units, err)
	}
}

// TestFollowerRace changes settings while they are asked for. The signal comes
// before the answers of the moment after.
func TestFollowerRace(t *testing.T) {
	for _, tt := range []struct {
		name   string
		member string
		body   []any
	}{
		{"reload", "Reloading", []any{true}},
		{"new", "UnitNew", []any{"a.service", unitPath("a.service")}},
		{"removed", "UnitRemoved", []any{"a.service", unitPath("a.service")}},
	} {
		t.Run("answer/"+tt.name, func(t *testing.T) {
			m, c := newFake(t)
			m.consumer(t, "a.service", "key")
			m.lists(unitStatus("a.service", "loaded", "active", "running"))
			f := follow(t, c)
			m.got = func(unit string, p property) {
				// LoadCredential has been answered, and this is not yet.
				if p.name == "EnvironmentFiles" {
					m.got = nil
					m.consumer(t, "a.service")
					m.manager(t, tt.member, tt.body...)
				}
			}
			finds(t, f, "a.service")
			finds(t, f)
		})
		t.Run("list/"+tt.name, func(t *testing.T) {
			m, c := newFake(t)
			m.consumer(t, "a.service", "key")
			m.lists(unitStatus("a.service", "loaded", "active", "running"))
			f := follow(t, c)
			finds(t, f, "a.service")
			list := m.call
			m.call = func(member string, args []any) ([]any, error) {
				m.consumer(t, "a.service")
				m.manager(t, tt.member, tt.body...)
				return list(member, args)
			}
			// The signal came before the list: what was kept is no more.
			finds(t, f)
		})
	}
}

// TestFollowerOrder has a follower take its time to note a signal: nothing that
// comes after it is read meanwhile.
func TestFollowerOrder(t *testing.T) {
	_, c := newFake(t)
	f := follow(t, c)
	delivered := make(chan struct{})
	f.mu.Lock()
	go func() {
		defer close(delivered)
		c.signals.DeliverSignal(ifaceManager, "Reloading", &dbus.Signal{Path: managerPath, Body: []any{true}})
	}()
	early := false
	for range 1000 {
		runtime.Gosched()
		select {
		case <-delivered:
			early = true
		default:
		}
	}
	f.mu.Unlock()
	<-delivered
	if early {
		t.Error("the next message is read before the signal is noted")
	}
}

// TestFollowerMissed has a unit's state change before anybody knows that Find
// tells of it.
func TestFollowerMissed(t *testing.T) {
	m, c := newFake(t)
	m.consumer(t, "a.service", "key")
	m.consumer(t, "b.service")
	m.lists(unitStatus("a.service", "loaded", "active", "running"), unitStatus("b.service", "loaded", "active", "running"))
	f := follow(t, c)
	m.set(t, "a.service", true, state("active", "running"))
	m.set(t, "b.service", true, state("active", "running"))
	told(t, c, f)
	m.got = func(unit string, p property) {
		if unit == "b.service" && p.name == "LoadCredential" {
			m.set(t, "b.service", true, state("inactive", "dead"))
		}
	}
	finds(t, f, "a.service")
	if told(t, c, f) {
		t.Error("Changed tells of a unit that Find does not tell of")
	}
	m.manager(t, "Reloading", true) // forgets both
	m.set(t, "a.service", true, state("active", "running"))
	told(t, c, f)
	m.got = func(unit string, p property) {
		if unit == "a.service" && p.name == "LoadCredential" {
			m.set(t, "a.service", true, state("inactive", "dead"))
		}
	}
	finds(t, f, "a.service")
	if !told(t, c, f) {
		t.Error("Changed does not tell that what Find returned is of before")
	}
}

func TestFollowerChanged(t *testing.T) {
	moved := func(unit string, c change) func(m *fakeManager, t *testing.T) {
		return func(m *fakeManager, t *testing.T) { m.set(t, unit, true, c) }
	}
	manager := func(member string, body ...any) func(m *fakeManager, t *testing.T) {
		return func(m *fakeManager, t *testing.T) { m.manager(t, member, body...) }
	}
	changed := property{ifaceUnit, "StateChangeTimestampMonotonic"}
	for _, tt := range []struct {
		name   string
		signal func(m *fakeManager, t *testing.T)
		want   bool
	}{
		{"consumer stops", moved("a.service", state("deactivating", "stop")), true},
		{"consumer fails", moved("a.service", state("failed", "failed")), true},
		{"consumer reloads", moved("a.service", state("reloading", "reload")), true},
		{"consumer restarted, unseen", moved("a.service", with(state("active", "running"), property{ifaceUnit, "InvocationID"}, []byte{15: 9})), true},
		{"consumer reloaded, unseen", moved("a.service", with(state("active", "running"), changed, uint64(77))), true},
		{"consumer has a main process", moved("a.service", change{{ifaceService, "ExecMainStartTimestampMonotonic"}: uint64(9)}), true},
		{"consumer says something", moved("a.service", with(state("active", "running"), property{ifaceService, "StatusText"}, "x")), false},
		{"consumer has a job", moved("a.service", with(state("active", "running"), job, pendingJob{7, jobPath(7)})), false},
		{"other stops", moved("b.service", state("inactive", "dead")), false},
		{"other starts", moved("b.service", state("activating", "start")), false},
		{"other fails", moved("b.service", state("failed", "failed")), true},
		{"failed stays", moved("f.timer", state("failed", "failed")), false},
		{"failed fails again", moved("f.timer", with(state("failed", "failed"), changed, uint64(5))), true},
		{"failed starts", moved("f.timer", state("active", "waiting")), true},
		{"unknown", moved("u.service", state("active", "running")), true}, // it may have been failed before
		{"device", moved("d.device", state("active", "plugged")), false},
		{"slice", moved("s.slice", state("active", "active")), false},
		{"target", moved("t.target", state("active", "active")), false},
		{"basic.target", moved("basic.target", state("active", "active")), true},
		{"started", manager("StartupFinished", uint64(1), uint64(1), uint64(1), uint64(1), uint64(1), uint64(1)), true},
		{"reload", manager("Reloading", true), true},
		{"new", manager("UnitNew", "n.service", unitPath("n.service")), true},
		{"new device", manager("UnitNew", "n.device", unitPath("n.device")), false},
		{"removed", manager("UnitRemoved", "b.service", unitPath("b.service")), true},
		{"new job", manager("JobNew", uint32(1), jobPath(1), "a.service"), false},
		{"job of a target", manager("JobNew", uint32(1), jobPath(1), "multi-user.target"), false},
		{"end of a job", manager("JobRemoved", uint32(1), jobPath(1), "a.service", "done"), false},
		{"shutdown", manager("JobNew", uint32(1), jobPath(1), "shutdown.target"), true},
		{"no shutdown", manager("JobRemoved", uint32(1), jobPath(1), "shutdown.target", "canceled"), true},
		{"another interface's", func(m *fakeManager, t *testing.T) {
			m.signal(t, unitPath("a.service"), "org.freedesktop.DBus.Properties", "PropertiesChanged",
				"org.freedesktop.systemd1.Socket", map[string]dbus.Variant{"SubState": dbus.MakeVariant("x")}, []string{})
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, c := newFake(t)
			m.consumer(t, "a.service", "key")
			m.consumer(t, "b.service")
			m.lists(unitStatus("a.service", "loaded", "active", "running"), unitStatus("b.service", "loaded", "active", "running"))
			f := follow(t, c)
			finds(t, f, "a.service")
			for _, unit := range []string{"a.service", "b.service"} {
				m.set(t, unit, true, state("active", "running"))
			}
			m.set(t, "f.timer", true, state("failed", "failed"))
			if !told(t, c, f) || told(t, c, f) {
				t.Fatal("Changed tells nothing, or twice, of the first signals")
			}
			tt.signal(m, t)
			if got := told(t, c, f); got != tt.want {
				t.Errorf("Changed tells: %v, want %v", got, tt.want)
			}
		})
	}
}

func TestFollowerLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, c := newFake(t)
		m.consumer(t, "a.service", "key")
		m.lists(unitStatus("a.service", "loaded", "active", "running"))
		f := follow(t, c)
		finds(t, f, "a.service")
		select {
		case <-f.Lost():
			t.Error("Lost while the connection is there")
		default:
		}
		go m.hangUp()
		<-f.Lost()
		if units, err := f.Find(t.Context(), []string{"key"}); !errors.Is(err, ErrLost) {
			t.Errorf("Find = %+v, %v, want ErrLost", units, err)
		}
		if f, err := c.Follow(t.Context()); f != nil || !errors.Is(err, ErrLost) {
			t.Errorf("Follow = %v, %v, want ErrLost", f, err)
		}
	})
}

// TestFollowerClose has two follow, and one of them end.
func TestFollowerClose(t *testing.T) {
	m, c := newFake(t)
	m.consumer(t, "a.service", "key")
	m.lists(unitStatus("a.service", "loaded", "active", "running"))
	f, other := follow(t, c), follow(t, c)
	finds(t, f, "a.service")
	f.Close()
	m.settingsAsked()
	finds(t, f, "a.service")
	finds(t, f, "a.service")
	if asked := m.settingsAsked(); asked["a.service"] != 2 {
		t.Errorf("asked for %v, want it asked for each time", asked)
	}
	m.manager(t, "Reloading", true)
	if told(t, c, f) || !told(t, c, other) {
		t.Error("Changed tells the one that has ended, or not the other")
	}
	if len(f.units) != 0 {
		t.Errorf("%d units are kept after the end", len(f.units))
	}
}

// BenchmarkFind finds 10 consumers among 200 services of a fake PID 1.
func BenchmarkFind(b *testing.B) {
	m, c := newFake(b)
	var list []systemd.UnitStatus
	for i := range 200 {
		name := fmt.Sprintf("u%03d.service", i)
		if i%20 == 0 {
			m.consumer(b, name, "key")
		} else {
			m.consumer(b, name)
		}
		list = append(list, unitStatus(name, "loaded", "active", "running"))
	}
	m.lists(list...)
	f, err := c.Follow(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	for _, bb := range []struct {
		name string
		find func() ([]Unit, error)
	}{
		{"Conn", func() ([]Unit, error) { return c.Find(b.Context(), []string{"key"}) }},
		{"Follower", func() ([]Unit, error) { return f.Find(b.Context(), []string{"key"}) }},
	} {
		b.Run(bb.name, func(b *testing.B) {
			for b.Loop() {
				m.asked = m.asked[:0]
				units, err := bb.find()
				if err != nil || len(units) != 10 {
					b.Fatalf("Find = %d units, %v, want 10", len(units), err)
				}
			}
			b.ReportMetric(float64(len(m.asked)), "properties/op")
		})
	}
}
