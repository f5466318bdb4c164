package consumer

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

type change = map[property]any

// active, sub and so on are changes that systemd tells about.
func state(active, sub string) change {
	return change{{ifaceUnit, "ActiveState"}: active, {ifaceUnit, "SubState"}: sub}
}

func with(c change, p property, v any) change {
	c[p] = v
	return c
}

var (
	result   = property{ifaceService, "Result"}
	restarts = property{ifaceService, "NRestarts"}
	job      = property{ifaceUnit, "Job"}
	kind     = property{ifaceService, "Type"}
)

func TestWatch(t *testing.T) {
	for _, tt := range []struct {
		name    string
		base    Status
		before  change   // what it is like when the watch begins
		changes []change // a second after one another
		problem string   // "" if it stays up
	}{
		{name: "healthy"},
		{name: "fails", changes: []change{with(state("failed", "failed"), result, "exit-code")}, problem: "failed"},
		{name: "fails, then up", changes: []change{state("failed", "failed"), state("active", "running")}, problem: "failed"},
		{name: "ends", changes: []change{state("deactivating", "stop-sigterm"), state("inactive", "dead")}, problem: "ended"},
		{name: "ends slowly", changes: []change{state("deactivating", "final-sigterm")}, problem: "is ending"},
		{name: "restarted by systemd", changes: []change{with(state("active", "running"), restarts, uint32(1))}, problem: "restarted itself"},
		{name: "restarted before", base: Status{NRestarts: 3}, before: change{restarts: uint32(3)}, changes: []change{{restarts: uint32(3)}}},
		{name: "restarted between", base: Status{NRestarts: 3}, before: change{restarts: uint32(4)}, problem: "restarted itself"},
		{name: "counts anew", base: Status{NRestarts: 3}, before: change{restarts: uint32(3)}, changes: []change{{restarts: uint32(0)}}},
		{
			name: "counts anew and on", base: Status{NRestarts: 3}, before: change{restarts: uint32(3)},
			changes: []change{{restarts: uint32(0)}, with(state("active", "running"), restarts, uint32(1))}, problem: "restarted itself",
		},
		{name: "restart to come", changes: []change{state("activating", "auto-restart")}, problem: "ended, and systemd is about to restart it"},
		{name: "restart queued", changes: []change{state("activating", "auto-restart-queued")}, problem: "ended, and systemd is about to restart it"},
		{
			name: "restarted by somebody",
			changes: []change{
				with(state("deactivating", "stop-sigterm"), job, pendingJob{7, jobPath(7)}),
				state("inactive", "dead"),
				state("activating", "start"),
				with(state("active", "running"), job, noJob),
			},
		},
		{
			name: "stopped by somebody",
			changes: []change{
				with(state("deactivating", "stop-sigterm"), job, pendingJob{7, jobPath(7)}),
				with(state("inactive", "dead"), job, noJob),
			},
			problem: "ended",
		},
		{name: "reloaded", changes: []change{state("reloading", "reload"), state("active", "running")}},
		{name: "down from the start", before: state("inactive", "dead"), problem: "ended"},
		{name: "failed from the start", before: state("failed", "failed"), problem: "failed"},
		{name: "oneshot, before", before: with(state("inactive", "dead"), kind, "oneshot")},
		{name: "oneshot, ends", before: with(state("activating", "start"), kind, "oneshot"), changes: []change{state("inactive", "dead")}},
		{
			name:    "oneshot, failed", // and was forgotten, with CollectMode=inactive-or-failed
			before:  with(state("activating", "start"), kind, "oneshot"),
			changes: []change{with(state("failed", "failed"), result, "exit-code"), with(state("inactive", "dead"), result, "success")},
			problem: "failed",
		},
		{name: "oneshot, ended badly", before: with(with(state("inactive", "dead"), kind, "oneshot"), result, "timeout"), problem: "ended"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, c := newFake(t)
				m.set(t, "a.service", false, serviceState("a.service"))
				m.set(t, "a.service", false, tt.before)
				m.set(t, "b.service", false, serviceState("b.service"))

				ctx, cancel := newContext(t)
				told := make(chan struct{})
				go func() {
					defer close(told)
					for _, change := range tt.changes {
						select {
						case <-time.After(time.Second):
							m.set(t, "a.service", true, change)
						case <-ctx.Done():
							return
						}
					}
				}()
				began := time.Now()
				failed, err := c.Watch(t.Context(), map[string]Status{"a.service": tt.base, "b.service": {}}, time.Minute)
				took := time.Since(began)
				cancel()
				<-told
				if err != nil {
					t.Fatal(err)
				}
				if tt.problem == "" {
					if failed != nil || took != time.Minute {
						t.Errorf("Watch = %+v after %v, want nothing after a minute", failed, took)
					}
					return
				}
				if len(failed) != 1 || failed[0].Unit != "a.service" || failed[0].Problem != tt.problem {
					t.Errorf("Watch = %+v, want that a.service %s", failed, tt.problem)
				}
				if tt.problem != "is ending" && took > time.Duration(len(tt.changes))*time.Second {
					t.Errorf("Watch took %v, want it to end with the failure", took)
				}
			})
		})
	}
}

// TestWatchTogether has one unit fail, and another that has failed unnoticed.
func TestWatchTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, c := newFake(t)
		// An alias: signals come from the unit's primary name.
		m.set(t, "alias.service", false, serviceState("a.service"))
		m.set(t, "a.service", false, serviceState("a.service"))
		m.set(t, "b.service", false, serviceState("b.service"))
		go func() {
			synctest.Wait()
			m.set(t, "b.service", false, state("failed", "failed"))
			m.set(t, "x.service", true, state("failed", "failed"))
			m.set(t, "alias.service", false, state("failed", "failed"))
			m.set(t, "a.service", true, with(state("failed", "failed"), result, "signal"))
		}()
		failed, err := c.Watch(t.Context(), map[string]Status{"alias.service": {}, "b.service": {}}, time.Minute)
		units := make([]string, 0, len(failed))
		for _, f := range failed {
			units = append(units, f.Unit)
		}
		if want := []string{"alias.service", "b.service"}; err != nil || !slices.Equal(units, want) {
			t.Errorf("Watch = %+v, %v, want %q", failed, err, want)
		}
		if failed[0].Status.String() != "failed (result signal)" {
			t.Errorf("Watch: %v, want the result that came first", failed[0].Status)
		}
	})
}

func TestWatchEnds(t *testing.T) {
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
				m.set(t, "a.service", false, serviceState("a.service"))
				ctx, cancel := newContext(t)
				go func() {
					synctest.Wait()
					tt.end(m, cancel)
				}()
				if failed, err := c.Watch(ctx, map[string]Status{"a.service": {}}, time.Minute); failed != nil || !errors.Is(err, tt.want) {
					t.Errorf("Watch = %+v, %v, want %v", failed, err, tt.want)
				}
			})
		})
	}
}
