package main

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/internal/host/hosttest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// noon is now, in these tests.
var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func utc(t *testing.T) {
	t.Helper()
	local := time.Local
	time.Local = time.UTC
	t.Cleanup(func() { time.Local = local })
}

// printable reports whether s can be shown to a terminal.
func printable(s string) bool { return !strings.ContainsAny(s, "\x1b\a\u009b\u202e\x7f\r") }

func TestFigures(t *testing.T) {
	utc(t)
	offset := func(d time.Duration) *time.Duration { return &d }
	report := &vsockrpc.Report{Uptime: 60, Time: "2026-01-02T11:00:00Z"}
	for _, c := range []struct{ what, got, want string }{
		{"no uptime", showUptime(0), "-"},
		{"uptime", showUptime(59), "59s"},
		{"uptime", showUptime(3599), "59m"},
		{"uptime", showUptime(2*3600 + 5*60), "2h 5m"},
		{"uptime", showUptime(3*86400 + 7200), "3d 2h"},
		{"bytes", showBytes(1023), "1023 B"},
		{"bytes", showBytes(1024*1024 - 1), "1.0 MiB"},
		{"bytes", showBytes(1<<63 - 1), "8.0 EiB"},
		{"bytes", showBytes(-5), "-5 B"},
		{"disk", showDisk(vsockrpc.Disk{Used: 901, Available: 99, ReadOnly: true}), "901 B used, 99 B available (91% full), read-only"},
		{"disk", showDisk(vsockrpc.Disk{}), "0 B used, 0 B available"},
		{"disk", showDisk(vsockrpc.Disk{Used: 1<<63 - 1, Available: 1<<63 - 1}), "8.0 EiB used, 8.0 EiB available (50% full)"},
		{"stall", showStall("io", &vsockrpc.Stall{Some10: 1234, Full10: 5}), "io 12.34% (full 0.05%)"},
		{"no stall", showStall("io", nil), ""},
		{"offset", showOffset(-1500 * time.Millisecond), "1.5 s behind this host's"},
		{"offset", showOffset(20 * time.Millisecond), "20 ms ahead of this host's"},
		{"offset", showOffset(-1 << 63), "106751d 23h behind this host's"},
		{"contact", showContact(&view{}, noon), "never"},
		{"contact", showContact(&view{reachable: true, contact: noon.Add(-20 * time.Second)}, noon), "now"},
		{"contact", showContact(&view{contact: noon.Add(-20 * time.Second)}, noon), "11:59:40"},
		{"contact", showContact(&view{contact: noon.Add(-24 * time.Hour)}, noon), "2026-01-01 12:00:00"},
		{"since", showSince("2026-01-02T11:00:00Z", noon), "11:00:00"},
		{"since", showSince("\x1b", noon), `\x1b`},
		{"time passed since the report", showUptime(uptime(&view{reachable: true, report: report, offset: offset(0)}, noon)), "1h 1m"},
		{"and the guest's clock counts", showUptime(uptime(&view{reachable: true, report: report, offset: offset(-time.Hour)}, noon)), "1m"},
		{"a clock that went back", showUptime(uptime(&view{reachable: true, report: report, offset: offset(-2 * time.Hour)}, noon)), "1m"},
		{"a guest that is gone", showUptime(uptime(&view{report: report, offset: offset(0)}, noon)), "1m"},
	} {
		if c.got != c.want {
			t.Errorf("%s = %q, want %q", c.what, c.got, c.want)
		}
	}
}

func TestHint(t *testing.T) {
	for _, c := range []struct {
		reason vsockrpc.Reason
		guest  string
		want   string
	}{
		{vsockrpc.Reason{Hint: "guestctl refresh VM db"}, "web", "next: guestctl refresh web db"},
		{vsockrpc.Reason{Hint: "guestctl push VM VMs:PATH"}, "unix:/a b'c", `next: guestctl push 'unix:/a b'\''c' VMs:PATH`},
		{vsockrpc.Reason{Hint: "systemctl status VM\x1b"}, "web", `next, in the guest: systemctl status VM\x1b`},
		{vsockrpc.Reason{Code: host.ReasonProviderUnreadable, Hint: "systemctl status x"}, "web", "next: systemctl status x"},
	} {
		if got := showHint(c.reason, c.guest); got != c.want {
			t.Errorf("showHint(%q, %q) = %q, want %q", c.reason.Hint, c.guest, got, c.want)
		}
	}
}

func reason(code, unit, detail string) vsockrpc.Reason {
	return vsockrpc.Reason{Code: code, Unit: unit, Detail: detail, Verdict: vsockrpc.VerdictDegraded}
}

// stateWith is a guest that was heard.
func stateWith(verdict string, generation int64, reasons ...vsockrpc.Reason) *host.State {
	return &host.State{
		Guest: "web", Target: "vsock:3", Reachable: true, LastContact: noon,
		Report: &vsockrpc.Report{BootID: "b", Verdict: verdict, Generation: generation, Reasons: reasons},
	}
}

func TestChanges(t *testing.T) {
	utc(t)
	failed := reason("unitFailed", "nginx.service", "exit-code")
	later := failed
	later.Since, later.Hint = "2026-01-02T11:00:00Z", "systemctl status nginx.service"
	worse := failed
	worse.Verdict = vsockrpc.VerdictFailing
	full, root := reason("diskFull", "", "/var is 98% full or more"), reason("diskFull", "", "/ is 98% full or more")
	many := make([]vsockrpc.Reason, 1000)
	for i := range many {
		many[i] = reason(hosttest.Escapes, strings.Repeat("u", i), hosttest.Escapes)
	}
	lost := &host.State{Guest: "web", Problem: &host.Failure{Code: host.CodeNoSocket, Message: "no way to it"}}
	silent := &host.State{Guest: "web", Problem: &host.Failure{Code: host.CodeNoAnswer, Message: "no answer in time"}}
	booted := stateWith("healthy", 0)
	booted.Report.BootID = "c"
	sign := stateWith("healthy", 1)
	sign.LastContact, sign.Report = noon.Add(time.Minute), &vsockrpc.Report{BootID: "b", Verdict: "healthy", Generation: 1, Uptime: 5}
	provided := stateWith("healthy", 1)
	provided.Provider = &vsockrpc.ProviderStatus{State: vsockrpc.GuestApplying}
	for _, c := range []struct {
		name     string
		old, now *host.State
		want     string // empty where it is not worth a line
	}{
		{"first", nil, stateWith("degraded", 3, failed, full), "degraded +unitFailed nginx.service; +diskFull: /var is 98% full or more; generation 3"},
		{"first, and it is not there", nil, lost, "unreachable no way to it"},
		{"a sign of life", stateWith("healthy", 1), sign, ""},
		{"the same", stateWith("degraded", 1, failed), stateWith("degraded", 1, later), ""},
		{"in another order", stateWith("degraded", 1, failed, full), stateWith("degraded", 1, full, failed), ""},
		{"came", stateWith("healthy", 1), stateWith("degraded", 1, failed), "degraded +unitFailed nginx.service"},
		{"went", stateWith("degraded", 1, failed, full), stateWith("degraded", 1, full), "degraded -unitFailed nginx.service"},
		{"worse", stateWith("degraded", 1, failed), stateWith("failing", 1, worse), "failing ~unitFailed nginx.service"},
		{"another disk", stateWith("degraded", 1, full), stateWith("degraded", 1, root), "degraded +diskFull: / is 98% full or more; -diskFull: /var is 98% full or more"},
		{"verdict alone", stateWith("starting", 1), stateWith("healthy", 1), "healthy was starting"},
		{"generation", stateWith("healthy", 1), stateWith("healthy", 2), "healthy generation 2"},
		{"lost", stateWith("healthy", 1), lost, "unreachable no way to it"},
		{"still lost", lost, lost, ""},
		{"lost in another way", lost, silent, "unreachable no answer in time"},
		{"back", lost, stateWith("healthy", 1), "healthy it answers; generation 1"},
		{"booted", stateWith("healthy", 0), booted, "healthy it booted; generation 0"},
		{"its provider", stateWith("healthy", 1), provided, "healthy its provider: applying"},
		{"many", stateWith("healthy", 1), stateWith("degraded", 1, many...), ""},
	} {
		change, worth := compare(c.old, c.now, noon)
		line := change.line(noon, 0)
		if !printable(line) || len(line) > 2*maxChanges*maxReason {
			t.Errorf("%s: line = %q", c.name, line)
		}
		if c.name == "many" {
			if !worth || !strings.HasSuffix(line, "; and 991 more") || len(change.Came) != 1000 {
				t.Errorf("many: line = %.200q, with %d reasons", line, len(change.Came))
			}
			continue
		}
		if worth != (c.want != "") || worth && line != "2026-01-02T12:00:00Z\tweb\t"+strings.Replace(c.want, " ", "\t", 1) {
			t.Errorf("%s: line = %q, %v, want %q", c.name, line, worth, c.want)
		}
		if want := "12:00:00  web   "; worth && !strings.HasPrefix(change.line(noon, 4), want) {
			t.Errorf("%s: on a terminal = %q, want %q first", c.name, change.line(noon, 4), want)
		}
	}
}

func TestConditions(t *testing.T) {
	entry := func(name, revision, state string, consumers ...vsockrpc.Consumer) vsockrpc.Entry {
		return vsockrpc.Entry{Name: name, Revision: revision, State: state, Path: "/p", Consumers: consumers}
	}
	consumer := func(unit, state string, stale bool) vsockrpc.Consumer {
		return vsockrpc.Consumer{Unit: unit, ActiveState: state, Stale: stale}
	}
	s := stateWith("degraded", 1, reason("unitFailed", "x.service", "exit-code"), reason("diskLow", "", "/"))
	s.Report.Entries = []vsockrpc.Entry{
		entry("a", "r1", "inForce", consumer("both.service", "active", false), consumer("web.service", "active", false)),
		entry("b", "", "shadowed", consumer("both.service", "active", true), consumer("up.service", "activating", false)),
		entry("c@d", "", "inForce"),
	}
	s.Report.Waiting = []vsockrpc.Waiting{{Unit: "up.service", Name: "z"}, {Unit: "waits.service", Name: "z"}}
	starting := stateWith("healthy", 1)
	starting.Report.Systemd = &vsockrpc.SystemdState{State: "starting"}
	busy := stateWith("degraded", 1)
	busy.Report.Systemd, busy.Report.Unknown = nil, []string{"systemd"}
	pulls := stateWith("healthy", 1)
	pulls.Report.Provider = &vsockrpc.ProviderState{State: vsockrpc.ProviderUnreachable, Problem: "nobody \x1b listens"}
	old := stateWith("", 1)
	trimmed := stateWith("healthy", 1)
	trimmed.Trimmed = true
	lost := stateWith("healthy", 1)
	lost.Reachable, lost.Problem = false, &host.Failure{Code: host.CodeNoAnswer, Message: "no answer in time"}
	for _, c := range []struct {
		what  string
		state *host.State
		want  string
	}{
		{"ready", s, ""},
		{"ready", starting, "its systemd is starting"},
		{"ready", busy, "its systemd is too busy to say how it is"},
		{"ready", pulls, `its provider has not handed over the credentials (unreachable): nobody \x1b listens`},
		{"ready", old, "its agent gives no verdict that this guestctl knows"},
		{"ready", lost, "no answer in time"},
		{"ready", &host.State{Reachable: true}, "it has not said how it is"},
		{"ready", stateWith("failing", 1, reason("diskFull", "", "/")), "it is failing: diskFull: /"},
		{"healthy", s, "it is degraded: unitFailed x.service: exit-code, and 1 more"},
		{"healthy", trimmed, ""},
		{"credential=a", s, ""},
		{"credential=a@r1", s, ""},
		{"credential=a@r2", s, "a is revision r1, not r2"},
		{"credential=b", s, "b is shadowed (/p)"},
		{"credential=b@r2", s, "b has no revision, not r2"},
		{"credential=c@d", s, "c is not there"},
		{"credential=c@d@", s, ""},
		{"credential=a", trimmed, "a is not there, or not in what the provider keeps of a large report: wait for the guest by vsock:CID or vsock-mux:PATH"},
		{"credential=a", lost, "no answer in time"},
		{"consumer=web.service", s, ""},
		{"consumer=both.service", s, "both.service is stale in b"},
		{"consumer=up.service", s, "up.service is activating, and waits for z"},
		{"consumer=waits.service", s, "waits.service waits for z"},
		{"consumer=x.service", s, "x.service loads no credential that is there"},
	} {
		cond, err := parseFor(nil, c.what)
		if err != nil {
			t.Fatal(err)
		}
		if got := cond.missing(c.state); got != c.want {
			t.Errorf("--for %s: missing = %q, want %q", c.what, got, c.want)
		}
	}
}

func TestDetails(t *testing.T) {
	utc(t)
	offset := -1500 * time.Millisecond
	v := &view{guest: "web", target: "vsock:3", offset: &offset, reasons: []vsockrpc.Reason{
		{Code: "unitFailed", Verdict: "degraded", Unit: "nginx.service", Detail: "exit-code", Hint: "systemctl status nginx.service", Since: "2026-01-02T11:00:00Z"},
		{Code: "noSmbios", Verdict: "healthy"},
	}, report: &vsockrpc.Report{
		Version: "1.0", Hostname: "web",
		Systemd:  &vsockrpc.SystemdState{Version: "257", State: "degraded", Failed: []vsockrpc.FailedUnit{{Unit: "nginx.service", Result: "exit-code", Since: "2026-01-01T11:00:00Z"}}},
		Memory:   &vsockrpc.Memory{Total: 2 << 30, Available: 1 << 30},
		Pressure: &vsockrpc.Pressure{IO: &vsockrpc.Stall{Some10: 100}},
		Disks:    []vsockrpc.Disk{{Path: "/", Used: 1 << 30, Available: 1 << 30}, {Path: "/var", ReadOnly: true}},
		Load:     &vsockrpc.Load{Load1: 12, Load5: 100, Load15: 5},
		Provider: &vsockrpc.ProviderState{State: "inForce", Address: "vsock:2:1021"},
		Unknown:  []string{"disks"},
	}, provider: &vsockrpc.ProviderStatus{State: "refused", Problem: "db"}, trimmed: true}
	want := []string{
		"target vsock:3",
		"degraded unitFailed nginx.service, since 11:00:00", " exit-code", " next, in the guest: systemctl status nginx.service",
		"remark noSmbios",
		"systemd 257 degraded, 1 units failed, 0 jobs", " nginx.service: exit-code, since 2026-01-01 11:00:00",
		"memory 1.0 GiB of 2.0 GiB available",
		"pressure io 1.00% (full 0.00%) of the last 10 s",
		"disks /: 1.0 GiB used, 1.0 GiB available (50% full)", " /var: 0 B used, 0 B available, read-only",
		"load 0.12 1.00 0.05",
		"clock 1.5 s behind this host's",
		"provider inForce at vsock:2:1021", " it says: refused: db",
		"agent version 1.0 on web",
		"unknown disks",
		"report too large for the provider to keep all of it",
	}
	var got []string
	for _, row := range details(v, noon) {
		got = append(got, strings.Join(row, " "))
	}
	if !slices.Equal(got, want) {
		t.Errorf("details = %q, want %q", got, want)
	}

	// Of a guest that has too much to say, and means no good.
	const n = 5000
	bad := &view{reasons: make([]vsockrpc.Reason, n), report: &vsockrpc.Report{
		Systemd: &vsockrpc.SystemdState{Failed: make([]vsockrpc.FailedUnit, n)}, Disks: make([]vsockrpc.Disk, n), Unknown: make([]string, n),
	}}
	for i := range n {
		e := hosttest.Escapes + strings.Repeat("x", 4000)
		bad.reasons[i] = vsockrpc.Reason{Code: e, Detail: e, Hint: e, Verdict: e, Unit: e, Credential: e, Since: e}
		bad.report.Systemd.Failed[i] = vsockrpc.FailedUnit{Unit: e, Result: e, Since: e}
		bad.report.Disks[i].Path, bad.report.Unknown[i] = e, e
	}
	rows := details(bad, noon)
	size := 0
	for _, row := range rows {
		line := strings.Join(row, "")
		if size += len(line); !printable(line) {
			t.Fatalf("details have %q", line)
		}
	}
	if len(rows) > 6*maxDetails || size > 200<<10 {
		t.Errorf("details have %d rows, %d bytes", len(rows), size)
	}
}

func TestStatusOnTerminal(t *testing.T) {
	utc(t)
	g, err := hosttest.Start(t.TempDir(), "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	target := "unix:" + g.Socket
	g.Judge(vsockrpc.VerdictDegraded, vsockrpc.Reason{
		Code: "consumerStale", Verdict: vsockrpc.VerdictDegraded, Unit: "web.service", Credential: "db" + hosttest.Escapes, Hint: "guestctl refresh VM db",
	})
	stdout, _, err := terminal(t, "status", target)
	if host.Status(err) != host.StatusNotHealthy || !printable(stdout) {
		t.Errorf("status = %q, %v, want status %d", stdout, err, host.StatusNotHealthy)
	}
	lines := strings.Split(stdout, "\n")
	for i, want := range []string{
		"GUEST VERDICT UPTIME GENERATION CONTACT REASONS", target + " degraded 1m 0 now consumerStale web.service db\\x1b", "", "target " + target,
		"degraded consumerStale web.service db\\x1b", "next: guestctl refresh " + target + " db",
	} {
		if i >= len(lines) || !strings.HasPrefix(strings.Join(strings.Fields(lines[i]), " "), want) {
			t.Fatalf("status = %q, want %q as line %d", lines, want, i)
		}
	}
	g.Stop()
	stdout, _, err = terminal(t, "status", target)
	if host.Status(err) != host.StatusUnreachable || !strings.HasSuffix(stdout, "noSocket\n") {
		t.Errorf("status = %q, %v, want status %d", stdout, err, host.StatusUnreachable)
	}
}

func TestDraw(t *testing.T) {
	utc(t)
	var guests []host.Guest
	var states []*host.State
	add := func(name string, s *host.State) {
		guests = append(guests, host.Guest{Name: name})
		if states = append(states, s); s != nil {
			s.Guest = name
		}
	}
	add("b-fine", stateWith("healthy", 1))
	add("a-fine", stateWith("healthy", 1))
	add("new", nil)
	add("bad", stateWith("degraded", 12, reason("unitFailed", "nginx.service"+hosttest.Escapes, ""), reason("x", "", "")))
	add("gone", &host.State{Problem: &host.Failure{Code: host.CodeNoSocket}})
	const blank = "\x1b[K"
	// lines takes the screen apart.
	lines := func(width, height int) []string {
		s := draw(guests, states, width, height, noon)
		s, home := strings.CutPrefix(s, "\x1b[H")
		s, end := strings.CutSuffix(s, blank+"\x1b[J")
		if !home || !end {
			t.Fatalf("draw = %q", s)
		}
		return strings.Split(s, blank+"\r\n")
	}
	want := []string{
		"12:00:00  5 guests, 1 unreachable, 1 degraded, 2 healthy, 1 not heard yet",
		"",
		"GUEST   VERDICT      UPTIME  GENERATION  CONTACT  REASONS",
		"gone    unreachable  -       -           never    noSocket",
		`bad     degraded     -       12          now      unitFailed nginx.service\x1b]0;owned\a\u009b31m\u202e\x7f +1`,
		"a-fine  healthy      -       1           now      -",
		"b-fine  healthy      -       1           now      -",
		"new     -            -       -           -        -",
	}
	if got := lines(200, 8); !slices.Equal(got, want) {
		t.Errorf("draw = %q, want %q", got, want)
	}
	if got := lines(200, 50); !slices.Equal(got, want) {
		t.Errorf("draw on a tall terminal = %q, want %q", got, want)
	}
	if got := lines(200, 6); len(got) != 6 || got[5] != "and 3 more" || !strings.HasPrefix(got[4], "bad ") {
		t.Errorf("draw on 6 lines = %q, want the two worst", got)
	}
	for height := range 6 {
		for _, width := range []int{0, 1, 20} {
			got := lines(width, height)
			if len(got) > max(1, height) {
				t.Errorf("draw on %d lines = %q", height, got)
			}
			for _, line := range got {
				if len(line) > width || !printable(line) {
					t.Errorf("draw on a width of %d = %q", width, got)
				}
			}
		}
	}
	guests[0].Name = strings.Repeat("é", 100)
	states[0].Guest = guests[0].Name
	for _, line := range columns([][]string{{strings.Repeat("é", 100), "x"}, {"a", "y"}}) {
		if n := len([]rune(line)); n != maxColumn+3 {
			t.Errorf("a line of %d characters, want %d: %q", n, maxColumn+3, line)
		}
	}
}

// A terminal is a screen's.
type fakeTerminal struct {
	mu     sync.Mutex
	writes []string
	err    error
}

func (f *fakeTerminal) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writes = append(f.writes, string(b))
	return len(b), f.err
}

func (f *fakeTerminal) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.writes
	f.writes = nil
	return w
}

func TestScreen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeTerminal{}
		resize := make(chan struct{}, 1)
		width := 80
		var mu sync.Mutex
		s := &screen{w: f, size: func() (int, int) {
			mu.Lock()
			defer mu.Unlock()
			return width, 24
		}, resized: func(context.Context, func(), func()) <-chan struct{} { return resize }}
		b := newBoard([]host.Guest{{Name: "a"}, {Name: "b"}})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.run(ctx, b) }()
		synctest.Wait()
		if w := f.take(); len(w) != 2 || w[0] != enterScreen || !strings.Contains(w[1], "2 not heard yet") {
			t.Fatalf("at the start = %q", w)
		}
		// However often something changes, it is drawn five times in a second.
		for range 1000 {
			b.put(0, *stateWith("healthy", 1))
			pass(time.Millisecond)
		}
		if n := len(f.take()); n < 4 || n > 6 {
			t.Errorf("drawn %d times in a second, want 5", n)
		}
		pass(time.Second)
		f.take()
		mu.Lock()
		width = 5
		mu.Unlock()
		resize <- struct{}{}
		pass(time.Second)
		if w := f.take(); len(w) != 1 || strings.Contains(w[0], "GUEST ") {
			t.Errorf("on a terminal that became small = %q", w)
		}
		pass(showAgain)
		if n := len(f.take()); n != 1 {
			t.Errorf("drawn %d times in %s, want once", n, showAgain)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run = %v", err)
		}
		if w := f.take(); len(w) == 0 || w[len(w)-1] != leaveScreen {
			t.Errorf("at the end = %q", w)
		}
	})
}

func TestScreenThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeTerminal{err: errors.New("it is gone")}
		s := &screen{w: f, size: func() (int, int) { return 80, 24 }, resized: func(context.Context, func(), func()) <-chan struct{} { return nil }}
		if err := s.run(t.Context(), newBoard(make([]host.Guest, 2))); err == nil {
			t.Error("run = nil, want an error")
		}
	})
}

// A guest that never stops changing has five lines per second, and the last is
// as it is.
func TestBoard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBoard(make([]host.Guest, 2))
		ctx, cancel := context.WithCancel(t.Context())
		var seen []int64
		done := make(chan error, 1)
		go func() {
			done <- b.each(ctx, showPause, func(states []*host.State, fresh map[int]bool) error {
				if !fresh[1] || fresh[0] || states[0] != nil {
					t.Errorf("fresh = %v, want the second alone", fresh)
				}
				seen = append(seen, states[1].Report.Generation)
				return nil
			})
		}()
		for i := range int64(1000) {
			b.put(1, *stateWith("healthy", i+1))
			pass(time.Millisecond)
		}
		pass(time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("each = %v", err)
		}
		if len(seen) < 5 || len(seen) > 7 || seen[len(seen)-1] != 1000 {
			t.Errorf("seen %v, want about six, and 1000 last", seen)
		}
	})
}

// A trigger is a writer that calls a function when a word is written.
type trigger struct {
	strings.Builder
	word string
	call func()
}

func (w *trigger) Write(b []byte) (int, error) {
	if strings.Contains(string(b), w.word) {
		w.call()
	}
	return w.Builder.Write(b)
}

// On a terminal a line says what is missing, and is gone afterwards.
func TestWaitProgress(t *testing.T) {
	g, err := hosttest.Start(t.TempDir(), "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	ctx, cancel := context.WithCancel(t.Context())
	errOut := trigger{word: "x is not there", call: cancel}
	p := &program{stdout: io.Discard, stderr: &errOut, errTerminal: true}
	root := p.root()
	root.SetArgs([]string{"wait", "unix:" + g.Socket, "--for", "credential=x"})
	err = root.ExecuteContext(ctx)
	line := clearLine + "waiting for unix:" + g.Socket + ": "
	if want := line + "no answer yet" + line + "x is not there" + clearLine; status(err) != host.StatusFailed || errOut.String() != want {
		t.Errorf("stderr = %q, %v, want %q", errOut.String(), err, want)
	}
}

// What a provider knew of a guest before the wait began may be of one that has
// stopped, or of the boot before.
func TestWaitIsForNow(t *testing.T) {
	dir := t.TempDir()
	known := vsockrpc.ProviderStatus{
		Name: "a", State: vsockrpc.GuestInForce, LastContact: time.Now().UTC().Format(time.RFC3339Nano),
		Report: &vsockrpc.Report{Verdict: vsockrpc.VerdictHealthy},
	}
	provider, err := hosttest.StartProvider(dir, "p", known)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(provider.Close)
	g := host.Guest{Name: "a", Target: vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: filepath.Join(dir, "gone.sock")}, Provider: host.ProviderAddress{Socket: provider.Socket}}

	p := &program{stdout: io.Discard, stderr: io.Discard}
	if err := p.waitFor(t.Context(), g, missingReady, 100*time.Millisecond); status(err) != host.StatusUnreachable {
		t.Errorf("wait = %v, want that it was never reached", err)
	}
	errOut := trigger{word: "its provider has not heard of it since", call: func() {
		known.LastContact = time.Now().UTC().Format(time.RFC3339Nano)
		provider.Set(known)
	}}
	p = &program{stdout: io.Discard, stderr: &errOut, errTerminal: true}
	if err := p.waitFor(t.Context(), g, missingReady, 0); err != nil || !strings.Contains(errOut.String(), errOut.word) {
		t.Errorf("wait = %v, after %q, want that it waited", err, errOut.String())
	}
}

// pass lets the time of a bubble pass.
func pass(d time.Duration) { <-time.After(d) }
