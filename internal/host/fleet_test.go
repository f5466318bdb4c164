package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/host/hosttest"
	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/vsockrpc"
)

func start(t testing.TB, dir string, names ...string) []Guest {
	t.Helper()
	var guests []Guest
	for _, name := range names {
		g, err := hosttest.Start(dir, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(g.Close)
		guests = append(guests, unixGuest(g.Socket, name))
	}
	return guests
}

func unixGuest(socket, name string) Guest {
	return Guest{Name: name, Target: vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: socket}}
}

// showResults is the name of each guest, and the code of what went wrong.
func showResults(results []Result) string {
	words := make([]string, len(results))
	for i, r := range results {
		words[i] = r.Guest
		if r.Error != nil {
			words[i] += "=" + string(r.Error.Code)
		}
	}
	return strings.Join(words, " ")
}

func TestFleetOrder(t *testing.T) {
	dir := t.TempDir()
	there := start(t, dir, "a", "b", "c", "d", "e", "f")
	gone := unixGuest(filepath.Join(dir, "gone.sock"), "gone")
	guests := append(append(append([]Guest{}, there[:2]...), gone), there[2:]...)
	for _, c := range []struct {
		fleet  Fleet
		want   string
		err    string
		status int
	}{
		{Fleet{Guests: there}, "a b c d e f", "", StatusDone},
		{Fleet{Guests: there, Batch: 100}, "a b c d e f", "", StatusDone},
		{
			Fleet{Guests: guests},
			"a b gone=noSocket c=notTried d=notTried e=notTried f=notTried",
			"1 of 7 guests failed, and 4 were not tried (--keep-going does)", StatusUnreachable,
		},
		{Fleet{Guests: guests, KeepGoing: true, Batch: 3}, "a b gone=noSocket c d e f", "1 of 7 guests failed", StatusUnreachable},
		{Fleet{Guests: []Guest{gone}}, "gone=noSocket", "no way to it: ", StatusUnreachable},
		{Fleet{}, "", "there is no guest", StatusFailed},
	} {
		var results []Result
		c.fleet.Waiting = func(guests []Guest) {
			if len(guests) > max(c.fleet.Batch, 1) {
				t.Errorf("%d guests are waited for, with Batch %d", len(guests), c.fleet.Batch)
			}
		}
		err := c.fleet.List(t.Context(), func(r Result) { results = append(results, r) })
		if got := showResults(results); got != c.want || !strings.HasPrefix(fmt.Sprint(err), c.err) || (err == nil) != (c.err == "") || Status(err) != c.status {
			t.Errorf("List = %s, %v, status %d, want %s, %q, %d", got, err, Status(err), c.want, c.err, c.status)
		}
	}
}

// As many guests as Batch are worked on at a time, never more.
func TestFleetBatch(t *testing.T) {
	for _, batch := range []int{0, 1, 3, 10} {
		dir := t.TempDir()
		fleet := Fleet{Batch: batch, Guests: start(t, dir, "a", "b", "c", "d", "e")}
		want := int64(min(max(batch, 1), len(fleet.Guests)))
		var now atomic.Int64
		var mu sync.Mutex
		most := int64(0)
		full := make(chan struct{})
		var once sync.Once
		err := fleet.each(t.Context(), false, func(Result) {}, func(context.Context, vsockrpc.Credentials, *Result) error {
			n := now.Add(1)
			defer now.Add(-1)
			mu.Lock()
			most = max(most, n)
			mu.Unlock()
			if n == want {
				once.Do(func() { close(full) })
			}
			<-full // until there are as many as there may be
			return nil
		})
		if err != nil || most != want {
			t.Errorf("with Batch %d there were %d at a time, %v, want %d", batch, most, err, want)
		}
	}
}

// An interrupt ends what is under way, and the rest is not begun.
func TestFleetInterrupted(t *testing.T) {
	dir := t.TempDir()
	silent, err := hosttest.Hostile(dir, "silent", "silent")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(silent.Close)
	g := unixGuest(filepath.Join(dir, "silent.sock"), "silent")
	ctx, cancel := context.WithCancelCause(t.Context())
	var results []Result
	err = Fleet{Guests: []Guest{g, unixGuest("/other", "other")}, KeepGoing: true}.each(ctx, true, func(r Result) { results = append(results, r) },
		func(ctx context.Context, c vsockrpc.Credentials, _ *Result) error {
			cancel(errors.New("a signal"))
			return c.Client.Call(ctx, vsockrpc.MethodList, nil, nil)
		})
	if got, want := showResults(results), "silent=interrupted other=interrupted"; got != want || Status(err) != StatusFailed {
		t.Errorf("each = %s, %v, want %s", got, err, want)
	}
}

func TestPush(t *testing.T) {
	dir := t.TempDir()
	f := Fleet{Guests: start(t, dir, "a")}
	params := &vsockrpc.ApplyParams{Set: []vsockrpc.Credential{{Name: "x", Revision: "r", Value: secret.New([]byte("v"))}}}
	var got Result
	emit := func(r Result) { got = r }
	if err := f.Push(t.Context(), params, emit); err != nil || *got.Generation != 1 || fmt.Sprint(got.Installed, got.Removed) != "[x] []" {
		t.Errorf("Push = %+v, %v", got, err)
	}
	if params.Set[0].Value.Len() != 1 {
		t.Error("Push wiped the value, which another guest may need")
	}
	if err := f.List(t.Context(), emit); err != nil || len(got.Entries) != 1 || got.Entries[0].Revision != "r" || got.Entries[0].Size != 1 {
		t.Errorf("List = %+v, %v", got, err)
	}
	if err := f.Remove(t.Context(), &vsockrpc.RemoveParams{Names: []string{"x", "y"}}, emit); err != nil || *got.Generation != 2 || fmt.Sprint(got.Removed, got.Unchanged) != "[x] [y]" {
		t.Errorf("Remove = %+v, %v", got, err)
	}
	if err := f.Rollback(t.Context(), &vsockrpc.RollbackParams{}, emit); err != nil || *got.Generation != 3 || fmt.Sprint(got.Installed) != "[x]" {
		t.Errorf("Rollback = %+v, %v", got, err)
	}
	if err := f.Probe(t.Context(), emit); err != nil || !*got.Reachable || got.Product != "guestagent" {
		t.Errorf("Probe = %+v, %v", got, err)
	}

	params.Set[0].Name = hosttest.Refuses
	err := f.Push(t.Context(), params, emit)
	if e, ok := errors.AsType[*Failure](err); !ok || e.Code != CodeRefused || e.Refusals[0].Reason != credential.ReasonShadowed || Status(err) != StatusFailed {
		t.Errorf("Push of a name that is refused = %v", err)
	}
}

func TestFailure(t *testing.T) {
	connect := func(s vsockrpc.Step) error {
		return fmt.Errorf("x: %w", &vsockrpc.ConnectError{Step: s, Err: errors.New("why")})
	}
	for _, c := range []struct {
		err    error
		code   Code
		status int
	}{
		{connect(vsockrpc.StepSocket), CodeNoSocket, StatusUnreachable},
		{connect(vsockrpc.StepListener), CodeNoListener, StatusUnreachable},
		{connect(vsockrpc.StepHandshake), CodeNotVsockMux, StatusUnreachable},
		{connect(vsockrpc.StepRefused), CodePeerRefused, StatusUnreachable},
		{connect(vsockrpc.StepAnswer), CodeNoAnswer, StatusUnreachable},
		{connect("new"), CodeInternal, StatusFailed},
		{&vsockrpc.RefusedError{}, CodeRefused, StatusFailed},
		{&vsockrpc.GenerationMismatchError{}, CodeGenerationMismatch, StatusFailed},
		{&vsockrpc.NoPreviousError{}, CodeNoPrevious, StatusFailed},
		{&vsockrpc.RolledBackError{Problem: "\x1b" + strings.Repeat("x", 1<<12)}, CodeRolledBack, StatusRolledBack},
		{&vsockrpc.GateInProgressError{}, CodeGateInProgress, StatusFailed},
		{&vsockrpc.NothingRejectedError{}, CodeNothingRejected, StatusFailed},
		{&vsockrpc.NoSystemdError{Problem: "\x1b" + strings.Repeat("x", 1<<12)}, CodeNoSystemd, StatusFailed},
		{&vsockrpc.Error{Name: "org.varlink.service.InvalidParameter", Parameters: []byte(`{"parameter":"\x1b"}`)}, CodeAnswered, StatusFailed},
		{&vsockrpc.Error{Name: "io.guestagent.Busy"}, CodeAnswered, StatusFailed},
		{&vsockrpc.Error{Name: "a.B", Parameters: []byte("\x1b" + strings.Repeat("x", 1<<20))}, CodeAnswered, StatusFailed},
		{fmt.Errorf("x: %w", vsockrpc.ErrProtocol), CodeBadAnswer, StatusFailed},
		{errors.New("x"), CodeInternal, StatusFailed},
	} {
		f := failure(c.err, fateUntouched, false)
		if f.Code != c.code || f.Status() != c.status || len(f.Message) > 1024 || strings.ContainsRune(f.Message, '\x1b') {
			t.Errorf("failure(%.100v) = %s, %d, %.200q, want %s, %d", c.err, f.Code, f.Status(), f.Message, c.code, c.status)
		}
	}
	for _, err := range []error{connect(vsockrpc.StepAnswer), vsockrpc.ErrProtocol, errors.New("x")} {
		if f := failure(err, fateUnknown, false); !strings.Contains(f.Message, "whether it was done is unknown") {
			t.Errorf("failure(%v) = %q, which does not say that it may have been done", err, f.Message)
		}
		if f := failure(err, fateBegun, false); !strings.Contains(f.Message, "it was begun, and how it ended is unknown") {
			t.Errorf("failure(%v) = %q, which does not say that it was begun", err, f.Message)
		}
	}
	if f := failure(context.Canceled, fateBegun, true); f.Code != CodeInterrupted || !strings.Contains(f.Message, "it was begun") {
		t.Errorf("failure of a call that was interrupted after it had begun = %s, %q", f.Code, f.Message)
	}
	if f := failure(errors.New("x"), fateUntouched, true); f.Code != CodeInterrupted {
		t.Errorf("failure of an interrupted call = %s, want %s", f.Code, CodeInterrupted)
	}
	for err, want := range map[error]int{nil: StatusDone, errors.New("x"): StatusFailed, fmt.Errorf("x: %w", ErrUnknownVM): StatusUnreachable} {
		if got := Status(err); got != want {
			t.Errorf("Status(%v) = %d, want %d", err, got, want)
		}
	}
}

func TestFleetRefresh(t *testing.T) {
	f := Fleet{Guests: start(t, t.TempDir(), "a")}
	var got Result
	emit := func(r Result) { got = r }
	var steps []string
	f.Progress = func(g Guest, p vsockrpc.Progress) {
		step := g.Name + " " + p.Phase + fmt.Sprint(p.WaitingFor)
		if p.Unit != nil {
			step += p.Unit.Result
		}
		steps = append(steps, step)
	}
	set := func(v string) *vsockrpc.ApplyParams {
		return &vsockrpc.ApplyParams{Set: []vsockrpc.Credential{{Name: "x", Value: secret.New([]byte(v))}}}
	}
	p := set("v")
	p.Refresh, p.Gate = vsockrpc.RefreshAuto, vsockrpc.MinGate
	err := f.Push(t.Context(), p, emit)
	want := "a applied[], a refreshing[x.service], a refreshing[]done, a watching[everything]"
	if err != nil || len(got.Units) != 1 || strings.Join(steps, ", ") != want {
		t.Errorf("Push = %+v, %v, with %q, want %q", got, err, steps, want)
	}

	// It is in force, and its unit does not start with it.
	p = set(hosttest.Bad)
	p.Refresh = vsockrpc.RefreshAuto
	err = f.Push(t.Context(), p, emit)
	if e, ok := errors.AsType[*Failure](err); !ok || e.Code != CodeRefreshFailed || Status(err) != StatusFailed || got.Error != e ||
		*got.Generation != 2 || len(got.Units) != 1 || !strings.HasPrefix(e.Message, "x.service was not refreshed; generation 2 is in force") {
		t.Errorf("Push of a bad value = %+v, %v", got, err)
	}
	if err := f.Rollback(t.Context(), &vsockrpc.RollbackParams{Refresh: vsockrpc.RefreshRestart}, emit); err != nil || len(got.Units) != 1 {
		t.Errorf("Rollback = %+v, %v", got, err)
	}

	// The same with a gate.
	p.Gate = vsockrpc.MinGate
	err = f.Push(t.Context(), p, emit)
	if e, ok := errors.AsType[*Failure](err); !ok || e.Code != CodeRolledBack || Status(err) != StatusRolledBack || !*e.Restored ||
		*e.Generation != 5 || *got.Generation != 5 || len(got.Units) != 1 || !strings.Contains(e.Problem, hosttest.Dies) || got.Installed != nil {
		t.Errorf("Push of a bad value with a gate = %+v, %v", got, err)
	}
	if err := f.List(t.Context(), emit); err != nil || len(got.Rejected) != 1 || got.Entries[0].Consumers != nil {
		t.Errorf("List = %+v, %v", got, err)
	}
	if err := f.Retry(t.Context(), &vsockrpc.RetryParams{}, emit); err != nil || *got.Generation != 6 || fmt.Sprint(got.Installed) != "[x]" {
		t.Errorf("Retry = %+v, %v", got, err)
	}
	if err := f.Retry(t.Context(), &vsockrpc.RetryParams{}, emit); err == nil || got.Error.Code != CodeNothingRejected {
		t.Errorf("Retry of nothing = %+v, %v", got, err)
	}
	if err := f.ListConsumers(t.Context(), emit); err != nil || len(got.Entries[0].Consumers) != 1 || !got.Entries[0].Consumers[0].Stale {
		t.Errorf("ListConsumers = %+v, %v", got, err)
	}
	if err := f.Push(t.Context(), set("w"), emit); err != nil {
		t.Errorf("Push = %v", err)
	}
	if err := f.Refresh(t.Context(), &vsockrpc.RefreshParams{}, emit); err != nil || *got.Generation != 7 || len(got.Units) != 1 {
		t.Errorf("Refresh = %+v, %v", got, err)
	}
	if err := f.Refresh(t.Context(), &vsockrpc.RefreshParams{}, emit); err != nil || got.Units == nil || len(got.Units) != 0 {
		t.Errorf("Refresh of nothing = %+v, %v", got, err)
	}
}

func TestRefreshFailure(t *testing.T) {
	unit := func(result string) vsockrpc.Refreshed { return vsockrpc.Refreshed{Unit: "u\x1b", Result: result} }
	generation := int64(7)
	for _, c := range []struct {
		results []string
		want    string
	}{
		{nil, ""},
		{[]string{vsockrpc.ResultDone, vsockrpc.ResultSkipped}, ""},
		{[]string{vsockrpc.ResultDone, vsockrpc.ResultTimeout}, `u\x1b was not refreshed; generation 7 `},
		{[]string{vsockrpc.ResultCanceled, vsockrpc.ResultDependency, "a newer word", vsockrpc.ResultDone}, "3 of 4 units were not refreshed; generation 7 "},
	} {
		r := Result{Generation: &generation}
		for _, result := range c.results {
			r.Units = append(r.Units, unit(result))
		}
		f := refreshFailure(&r)
		if (f == nil) != (c.want == "") || f != nil && (!strings.HasPrefix(f.Message, c.want) || f.Code != CodeRefreshFailed) {
			t.Errorf("refreshFailure(%q) = %v, want %q", c.results, f, c.want)
		}
	}
}

// The time-out is for the whole, and from the first progress on for each
// message.
func TestFleetTimeout(t *testing.T) {
	const step = `{"parameters":{"generation":1,"units":[],"progress":{"phase":"refreshing"}},"continues":true}` + "\x00"
	const last = `{"parameters":{"generation":1,"units":[]}}` + "\x00"
	for _, c := range []struct {
		timeout time.Duration
		answers []time.Duration // how long it takes to each step, and to the result
		want    Code
		took    time.Duration
	}{
		{time.Minute, []time.Duration{59 * time.Second}, "", 59 * time.Second},
		{time.Minute, []time.Duration{61 * time.Second}, CodeNoAnswer, time.Minute},
		{time.Minute, []time.Duration{59 * time.Second, 59 * time.Second, 59 * time.Second}, "", 177 * time.Second},
		{time.Minute, []time.Duration{time.Second, 59 * time.Second, 61 * time.Second}, CodeNoAnswer, 2 * time.Minute},
		{time.Second, []time.Duration{0, vsockrpc.Heartbeat, vsockrpc.Heartbeat}, "", 2 * vsockrpc.Heartbeat},
		{time.Second, []time.Duration{0, DefaultTimeout + 1}, CodeNoAnswer, DefaultTimeout},
	} {
		synctest.Test(t, func(t *testing.T) {
			ours, theirs := net.Pipe()
			f := Fleet{Guests: []Guest{unixGuest("/a", "a")}, Timeout: c.timeout, dial: func(context.Context, vsockrpc.Target) (*vsockrpc.Client, error) {
				return vsockrpc.NewClient(ours, 0), nil
			}}
			defer theirs.Close()
			go func() { _, _ = io.Copy(io.Discard, theirs) }()
			go func() {
				for i, d := range c.answers {
					select {
					case <-time.After(d):
					case <-t.Context().Done():
						return
					}
					text := step
					if i == len(c.answers)-1 {
						text = last
					}
					if _, err := io.WriteString(theirs, text); err != nil {
						return
					}
				}
			}()
			begin := time.Now()
			var got Result
			err := f.Refresh(t.Context(), &vsockrpc.RefreshParams{}, func(r Result) { got = r })
			code := Code("")
			if got.Error != nil {
				code = got.Error.Code
			}
			if took := time.Since(begin); code != c.want || took != c.took {
				t.Errorf("with %v and %v: %v after %v, want %q after %v", c.timeout, c.answers, err, took, c.want, c.took)
			}
			if c.want != "" && len(c.answers) > 1 && !strings.Contains(got.Error.Message, "it was begun") {
				t.Errorf("with %v and %v: %v does not say that it was begun", c.timeout, c.answers, err)
			}
		})
	}
}
