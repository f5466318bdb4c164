package consumer

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
)

// queues answers jobs with the IDs of their units, and remembers them.
type queues struct {
	mu    sync.Mutex
	calls []string // "METHOD UNIT MODE"
	ids   map[string]uint32
	after func(unit string, id uint32) // before the answer is sent
}

func (q *queues) call(member string, args []any) ([]any, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	unit := args[0].(string)
	if member == "ResetFailedUnit" {
		q.calls = append(q.calls, member+" "+unit)
		return nil, busError("org.freedesktop.systemd1.NoSuchUnit", "Unit "+unit+" not loaded.")
	}
	q.calls = append(q.calls, member+" "+unit+" "+args[1].(string))
	id, ok := q.ids[unit]
	if !ok {
		return nil, busError("org.freedesktop.systemd1.JobTypeNotApplicable", "Job type reload is\nnot applicable.")
	}
	if q.after != nil {
		q.after(unit, id)
	}
	return []any{jobPath(id)}, nil
}

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, c := newFake(t)
		// b and c get one job; a's ends before its ID arrives.
		q := &queues{ids: map[string]uint32{"a.service": 1, "b.service": 2, "c.service": 2, "d.service": 4}}
		q.after = func(unit string, id uint32) {
			if unit == "a.service" {
				m.removed(t, id, unit, "done")
			}
		}
		m.call = q.call
		for unit := range q.ids {
			m.set(t, unit, false, serviceState(unit))
		}
		m.set(t, "d.service", false, map[property]any{{ifaceUnit, "ActiveState"}: "failed", {ifaceUnit, "SubState"}: "failed"})

		var seen []JobResult
		go func() {
			synctest.Wait() // until Run waits
			if len(seen) != 2 {
				t.Errorf("done saw %v before the jobs ended, want the refusal and a.service", seen)
			}
			m.removed(t, 99, "x.service", "done")
			m.removed(t, 4, "d.service", "failed")
			m.removed(t, 2, "b.service", "canceled")
		}()
		jobs := []Job{{"a.service", ActionTryRestart}, {"b.service", ActionTryRestart}, {"c.service", ActionReload}, {"d.service", ActionRestart}, {"e.service", ActionReload}}
		results, err := c.Run(t.Context(), jobs, func(r JobResult) { seen = append(seen, r) })
		if err != nil {
			t.Fatal(err)
		}
		active := Status{ActiveState: "active", SubState: "running", Result: "success", Type: "simple", InvocationID: "00000000000000000000000000000001"}
		failed := active
		failed.ActiveState, failed.SubState = "failed", "failed"
		want := []JobResult{
			{Unit: "e.service", Action: ActionReload, Result: ResultRefused, Problem: "JobTypeNotApplicable: Job type reload is not applicable."},
			{Unit: "a.service", Action: ActionTryRestart, Result: "done", Status: active},
			{Unit: "d.service", Action: ActionRestart, Result: "failed", Status: failed},
			{Unit: "b.service", Action: ActionTryRestart, Result: "canceled", Status: active},
			{Unit: "c.service", Action: ActionReload, Result: "canceled", Status: active},
		}
		if !reflect.DeepEqual(results, want) || !reflect.DeepEqual(seen, want) {
			t.Errorf("Run = %+v, and done saw %+v, want %+v", results, seen, want)
		}
		slices.Sort(q.calls)
		wantCalls := []string{
			"ReloadUnit c.service replace", "ReloadUnit e.service replace",
			"ResetFailedUnit a.service", "ResetFailedUnit b.service", "ResetFailedUnit d.service",
			"RestartUnit d.service replace", "TryRestartUnit a.service replace", "TryRestartUnit b.service replace",
		}
		if !reflect.DeepEqual(q.calls, wantCalls) {
			t.Errorf("Run called %q, want %q", q.calls, wantCalls)
		}
	})
}

// TestRunEnds has the context or the connection end after the first of two jobs.
func TestRunEnds(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(m *fakeManager, cancel context.CancelFunc)
		want error
	}{
		{"context", func(m *fakeManager, cancel context.CancelFunc) { cancel() }, context.Canceled},
		{"connection", func(m *fakeManager, cancel context.CancelFunc) { m.hangUp() }, ErrLost},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, c := newFake(t)
				q := &queues{ids: map[string]uint32{"a.service": 1, "b.service": 2}}
				m.call = q.call
				for unit := range q.ids {
					m.set(t, unit, false, serviceState(unit))
				}
				ctx, cancel := newContext(t)
				go func() {
					synctest.Wait()
					m.removed(t, 1, "a.service", "done")
					synctest.Wait()
					tt.end(m, cancel)
				}()
				results, err := c.Run(ctx, []Job{{"a.service", ActionTryRestart}, {"b.service", ActionTryRestart}}, nil)
				if !errors.Is(err, tt.want) || len(results) != 1 || results[0].Unit != "a.service" {
					t.Errorf("Run = %+v, %v, want a.service, %v", results, err, tt.want)
				}
			})
		})
	}
}

func TestRunUnknownAction(t *testing.T) {
	_, c := newFake(t)
	if results, err := c.Run(t.Context(), []Job{{Unit: "a.service"}}, nil); err == nil || results != nil {
		t.Errorf("Run = %+v, %v, want an error", results, err)
	}
	if results, err := c.Run(t.Context(), nil, nil); err != nil || results != nil {
		t.Errorf("Run without jobs = %+v, %v, want nothing", results, err)
	}
}
