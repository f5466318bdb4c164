package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/internal/host/hosttest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// showStatus is the verdict of each guest, and the exit status that it is worth.
func showStatus(results []Result) string {
	words := make([]string, len(results))
	for i, r := range results {
		status := StatusDone
		if r.Error != nil {
			status = r.Error.Status()
		}
		words[i] = fmt.Sprintf("%s=%s/%d", r.Guest, r.Verdict, status)
	}
	return strings.Join(words, " ")
}

func TestFleetStatus(t *testing.T) {
	dir := t.TempDir()
	guests := start(t, dir, "good")
	guest := func(name string, f func(*hosttest.Guest)) Guest {
		g, err := hosttest.Start(dir, name)
		must(t, err)
		t.Cleanup(g.Close)
		f(g)
		return unixGuest(g.Socket, name)
	}
	good := guests[0]
	bad := guest("b", func(g *hosttest.Guest) {
		g.Judge(vsockrpc.VerdictDegraded, vsockrpc.Reason{Code: "unitFailed", Unit: "nginx.service", Verdict: vsockrpc.VerdictDegraded})
	})
	old := guest("o", func(g *hosttest.Guest) {
		g.Says(func(r *vsockrpc.Report) { r.Verdict, r.Version = "", "0.1\x1b" })
	})
	late := guest("l", func(g *hosttest.Guest) { g.Clock(-time.Hour) })
	gone := unixGuest(filepath.Join(dir, "gone.sock"), "gone")
	for _, c := range []struct {
		guests []Guest
		want   string
		err    string
		status int
	}{
		{[]Guest{good}, "good=healthy/0", "", StatusDone},
		{[]Guest{bad}, "b=degraded/3", "degraded: unitFailed nginx.service", StatusNotHealthy},
		{[]Guest{old}, "o=unknown/3", `the agent does not say how the guest is; it is of version 0.1\x1b`, StatusNotHealthy},
		{[]Guest{late}, "l=degraded/3", "degraded: clockOff", StatusNotHealthy},
		{[]Guest{gone}, "gone=unreachable/4", "no way to it", StatusUnreachable},
		{[]Guest{good, bad, late}, "good=healthy/0 b=degraded/3 l=degraded/3", "2 of 3 guests are not healthy", StatusNotHealthy},
		{[]Guest{gone, good, bad}, "gone=unreachable/4 good=healthy/0 b=degraded/3", "2 of 3 guests failed", StatusUnreachable},
	} {
		var results []Result
		err := Fleet{Guests: c.guests}.Status(t.Context(), func(r Result) { results = append(results, r) })
		if got := showStatus(results); got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.HasPrefix(err.Error(), c.err) || Status(err) != c.status {
			t.Errorf("Status = %s, %v, status %d, want %s, %q, %d", got, err, Status(err), c.want, c.err, c.status)
		}
		for _, r := range results {
			known := r.Verdict != VerdictUnreachable
			if known != (r.Report != nil) || known != (r.LastContact != "") || known != (r.ClockOffset != nil) {
				t.Errorf("the status of %s is %+v", r.Guest, r)
			}
			if r.Guest == "l" && (*r.ClockOffset > -3590000 || *r.ClockOffset < -3610000 || r.Reasons[0].Code != ReasonClockOff) {
				t.Errorf("the clock of %s is %d ms ahead, with %+v", r.Guest, *r.ClockOffset, r.Reasons)
			}
		}
	}
	// What does not belong to the call is left out.
	var b []byte
	must(t, Fleet{Guests: []Guest{good}}.List(t.Context(), func(r Result) { b, _ = json.Marshal(r) }))
	for _, key := range []string{"verdict", "reasons", "report", "lastContact", "clockOffset", "trimmed", "providerStatus"} {
		if strings.Contains(string(b), `"`+key+`"`) {
			t.Errorf("a list has %s: %s", key, b)
		}
	}
}

// What only the provider knows counts, and it has the last report of a guest that
// does not answer; but it is the guest that is asked.
func TestFleetStatusProvider(t *testing.T) {
	dir := t.TempDir()
	contact := "2026-01-02T03:04:05Z"
	status := vsockrpc.ProviderStatus{Name: "a", State: vsockrpc.GuestInForce, LastContact: contact, Report: healthy(func(r *vsockrpc.Report) { r.Generation = 77 })}
	p, err := hosttest.StartProvider(dir, "p", status)
	must(t, err)
	defer p.Close()
	there := start(t, dir, "a")[0]
	there.Provider.Socket = p.Socket
	gone := unixGuest(filepath.Join(dir, "gone.sock"), "a")
	gone.Provider.Socket = p.Socket
	ask := func(g Guest, dial ...func(context.Context, vsockrpc.Target) (*vsockrpc.Client, error)) Result {
		t.Helper()
		var got Result
		f := Fleet{Guests: []Guest{g}}
		for _, d := range dial {
			f.dial = d
		}
		_ = f.Status(t.Context(), func(r Result) { got = r })
		return got
	}
	if r := ask(there); r.Verdict != "healthy" || r.Error != nil || r.Report.Generation == 77 || r.LastContact == contact {
		t.Errorf("a guest that answers: %+v", r)
	}
	refused := func(ctx context.Context, to vsockrpc.Target) (*vsockrpc.Client, error) {
		if to.Path == gone.Target.Path {
			return nil, &vsockrpc.ConnectError{Target: to, Step: vsockrpc.StepSocket, Err: fs.ErrPermission}
		}
		return vsockrpc.Dial(ctx, to)
	}
	for _, r := range []Result{ask(gone), ask(gone, refused)} {
		if r.Verdict != VerdictUnreachable || r.Error == nil || r.Error.Status() != StatusUnreachable || r.Report == nil || r.Report.Generation != 77 || r.LastContact != contact {
			t.Errorf("a guest that does not answer: %+v, %v", r, r.Error)
		}
	}
	// Whoever may not ask has the provider's word, if that is of now.
	hungUp := func(ctx context.Context, to vsockrpc.Target) (*vsockrpc.Client, error) {
		if to.Path == gone.Target.Path {
			return nil, &vsockrpc.ConnectError{Target: to, Step: vsockrpc.StepRefused, Err: io.EOF}
		}
		return vsockrpc.Dial(ctx, to)
	}
	status.LastContact = now()
	p.Set(status)
	for _, r := range []Result{ask(gone, refused), ask(gone, hungUp)} {
		if r.Verdict != "healthy" || r.Error != nil || r.Report.Generation != 77 || r.ProviderStatus == nil || r.ProviderStatus.State != vsockrpc.GuestInForce || r.ProviderStatus.Report != nil {
			t.Errorf("a guest that this caller may not ask: %+v, %v", r, r.Error)
		}
	}
	if r := ask(gone); r.Verdict != VerdictUnreachable || r.Error.Status() != StatusUnreachable {
		t.Errorf("a guest that is not there, whatever its provider says: %+v", r)
	}
	dead := status
	dead.State = vsockrpc.GuestWaiting
	p.Set(dead)
	if r := ask(gone, refused); r.Verdict != VerdictUnreachable || r.Error.Status() != StatusUnreachable {
		t.Errorf("a guest that its provider does not hear: %+v", r)
	}
	status.State, status.Problem = vsockrpc.GuestRolledBack, "a.service\x1b"
	p.Set(status)
	if r := ask(there); r.Verdict != "degraded" || r.Error.Code != CodeNotHealthy || len(r.Reasons) != 1 || r.Reasons[0].Code != ReasonProviderRolledBack {
		t.Errorf("a set that was rolled back: %+v, %v", r, r.Error)
	}
	p.Hang()
	if r := ask(there); r.Verdict != "healthy" || r.Error != nil {
		t.Errorf("a provider that hangs: %+v, %v", r, r.Error)
	}
}

// A guest that means no good costs nobody else anything.
func TestFleetStatusHostile(t *testing.T) {
	for kind, want := range map[string]Code{
		"escapes": CodeNotHealthy, "reports": CodeNotHealthy, "large": CodeNotHealthy, "flood": CodeBadAnswer, "garbage": CodeBadAnswer,
		"error": CodeAnswered, "hangup": CodePeerRefused, "silent": CodeNoAnswer,
	} {
		dir := t.TempDir()
		g, err := hosttest.Hostile(dir, "g", kind)
		must(t, err)
		guests := []Guest{unixGuest(filepath.Join(dir, "g.sock"), "g"), start(t, dir, "a")[0]}
		timeout := DefaultTimeout
		if kind == "silent" {
			timeout = 50 * time.Millisecond
		}
		var results []Result
		err = Fleet{Guests: guests, Timeout: timeout}.Status(t.Context(), func(r Result) { results = append(results, r) })
		g.Close()
		if e, ok := errors.AsType[*FleetError](err); !ok || e.Failed != 1 || len(results) != 2 || results[1].Verdict != "healthy" {
			t.Errorf("%s: Status = %v, %s", kind, err, showStatus(results))
			continue
		}
		r := results[0]
		if r.Error.Code != want || strings.ContainsAny(r.Error.Message, "\x1b\n\a") || len(r.Error.Message) > 1000 {
			t.Errorf("%s: %s %q, want %s", kind, r.Error.Code, r.Error.Message, want)
		}
		if r.Report != nil && r.Report.Size() > maxKept {
			t.Errorf("%s: a report of %d bytes", kind, r.Report.Size())
		}
	}
}
