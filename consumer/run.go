package consumer

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
)

// Run does all jobs and returns when the last one ended, with the results in
// the order in which they came. It queues all of them before it waits for any,
// and systemd puts them in order. done, if not nil, is called for each as it
// ends, never twice at the same time.
//
// An error (the context ended, the connection was lost) comes with the results
// so far. What was queued by then goes on without Run.
func (c *Conn) Run(ctx context.Context, jobs []Job, done func(JobResult)) ([]JobResult, error) {
	removed, stop := c.subscribe()
	defer stop()

	ids := make([]uint32, len(jobs))
	refusals := make([]string, len(jobs))
	queueErr := each(len(jobs), func(i int) (err error) {
		ids[i], err = c.queue(ctx, jobs[i])
		if answer, ok := errors.AsType[dbus.Error](err); ok {
			refusals[i], err = problem(answer), nil
		}
		return err
	})

	var results []JobResult
	end := func(i int, result string) error {
		r := JobResult{Unit: jobs[i].Unit, Action: jobs[i].Action, Result: result, Problem: refusals[i]}
		var err error
		if r.Status, err = c.Status(ctx, r.Unit); isAnswer(err) {
			err = nil
		}
		results = append(results, r)
		if done != nil {
			done(r)
		}
		return err
	}

	// One job may be the answer to several: systemd merges them.
	waiting := make(map[uint32][]int)
	for i, id := range ids {
		switch {
		case refusals[i] != "":
			if err := end(i, ResultRefused); err != nil {
				return results, err
			}
		case id != 0:
			waiting[id] = append(waiting[id], i)
		}
	}
	if queueErr != nil {
		return results, queueErr
	}
	for len(waiting) > 0 {
		signal, err := c.next(ctx, removed, nil)
		if err != nil {
			return results, fmt.Errorf("waiting for jobs: %w", err)
		}
		if signal.Name != "org.freedesktop.systemd1.Manager.JobRemoved" {
			continue
		}
		var (
			id           uint32
			path         dbus.ObjectPath
			unit, result string
		)
		if err := dbus.Store(signal.Body, &id, &path, &unit, &result); err != nil {
			return results, fmt.Errorf("decoding systemd's JobRemoved: %w", err)
		}
		for _, i := range waiting[id] {
			if err := end(i, result); err != nil {
				return results, err
			}
		}
		delete(waiting, id)
	}
	return results, nil
}

// queue queues one job and returns its ID.
func (c *Conn) queue(ctx context.Context, j Job) (uint32, error) {
	var call func(ctx context.Context, unit, mode string, ch chan<- string) (int, error)
	switch j.Action {
	case ActionReload:
		call = c.manager.ReloadUnitContext
	case ActionTryRestart:
		call = c.manager.TryRestartUnitContext
	case ActionRestart:
		call = c.manager.RestartUnitContext
	case ActionStart:
		call = c.manager.StartUnitContext
	default:
		return 0, fmt.Errorf("queueing a job for %q: unknown action %q", j.Unit, j.Action)
	}
	// A restart that is asked for counts for the start limit like one of systemd's
	// own (unit_test_start_limit in src/core/unit.c): a few changes within ten
	// seconds would leave a sound service failed. A unit that is not loaded has
	// nothing to be reset; of one that failed, and is to be left alone, the
	// failure would be lost.
	reset := j.Action == ActionRestart
	if j.Action == ActionTryRestart {
		v, err := c.get(ctx, unitPath(j.Unit), property{ifaceUnit, "ActiveState"})
		if err != nil && !isAnswer(err) {
			return 0, err
		}
		state := v.text("ActiveState")
		reset = err == nil && state != "failed" && state != "inactive"
	}
	if reset {
		if err := c.manager.ResetFailedUnitContext(ctx, j.Unit); err != nil && !isAnswer(err) {
			return 0, c.failure(ctx, fmt.Sprintf("resetting %q", j.Unit), err)
		}
	}
	// Without a channel: go-systemd would queue one job after the other, and
	// say nothing when the connection is lost.
	id, err := call(ctx, j.Unit, "replace", nil)
	switch {
	case err != nil:
		return 0, c.failure(ctx, fmt.Sprintf("queueing a job for %q", j.Unit), err)
	case id <= 0 || id > math.MaxUint32:
		return 0, fmt.Errorf("queueing a job for %q: systemd gave it no ID", j.Unit)
	}
	return uint32(id), nil
}

// problem returns systemd's answer as one line.
func problem(answer dbus.Error) string {
	name := strings.TrimPrefix(answer.Name, busName+".")
	return strings.Join(strings.Fields(name+": "+answer.Error()), " ")
}

// subscribe returns a channel with all signals from now on, in their order, and
// a function that ends it. PID 1 sends all of them to everyone on its own
// socket, asked or not (bus_foreach_bus in src/core/dbus.c).
func (c *Conn) subscribe() (signals <-chan *dbus.Signal, stop func()) {
	ch := make(chan *dbus.Signal, 16)
	c.bus.Signal(ch)
	return ch, func() { c.bus.RemoveSignal(ch) }
}

// next waits for a signal. It returns nil when timeout comes first.
func (c *Conn) next(ctx context.Context, signals <-chan *dbus.Signal, timeout <-chan time.Time) (*dbus.Signal, error) {
	select {
	case s, ok := <-signals:
		if !ok {
			return nil, ErrLost
		}
		return s, nil
	case <-timeout:
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-c.bus.Context().Done():
		return nil, ErrLost
	}
}
