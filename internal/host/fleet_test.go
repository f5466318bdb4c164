package host

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

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
		err := fleet.each(t.Context(), false, func(Result) {}, func(context.Context, *vsockrpc.Client, *Result) error {
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
		func(ctx context.Context, c *vsockrpc.Client, _ *Result) error {
			cancel(errors.New("a signal"))
			return c.Call(ctx, vsockrpc.MethodList, nil, nil)
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
		{&vsockrpc.Error{Name: "io.guestagent.Busy"}, CodeAnswered, StatusFailed},
		{&vsockrpc.Error{Name: "a.B", Parameters: []byte("\x1b" + strings.Repeat("x", 1<<20))}, CodeAnswered, StatusFailed},
		{fmt.Errorf("x: %w", vsockrpc.ErrProtocol), CodeBadAnswer, StatusFailed},
		{errors.New("x"), CodeInternal, StatusFailed},
	} {
		f := failure(c.err, false, false)
		if f.Code != c.code || f.Status() != c.status || len(f.Message) > 1024 || strings.ContainsRune(f.Message, '\x1b') {
			t.Errorf("failure(%.100v) = %s, %d, %.200q, want %s, %d", c.err, f.Code, f.Status(), f.Message, c.code, c.status)
		}
	}
	for _, err := range []error{connect(vsockrpc.StepAnswer), vsockrpc.ErrProtocol, errors.New("x")} {
		if f := failure(err, true, false); !strings.Contains(f.Message, "whether it was done is unknown") {
			t.Errorf("failure(%v) = %q, which does not say that it may have been done", err, f.Message)
		}
	}
	if f := failure(errors.New("x"), false, true); f.Code != CodeInterrupted {
		t.Errorf("failure of an interrupted call = %s, want %s", f.Code, CodeInterrupted)
	}
	for err, want := range map[error]int{nil: StatusDone, errors.New("x"): StatusFailed, fmt.Errorf("x: %w", ErrUnknownVM): StatusUnreachable} {
		if got := Status(err); got != want {
			t.Errorf("Status(%v) = %d, want %d", err, got, want)
		}
	}
}
