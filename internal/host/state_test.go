package host

import (
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// healthy is a report of a guest that is.
func healthy(change ...func(*vsockrpc.Report)) *vsockrpc.Report {
	r := &vsockrpc.Report{Verdict: vsockrpc.VerdictHealthy, Systemd: &vsockrpc.SystemdState{State: "running"}}
	for _, f := range change {
		f(r)
	}
	return r
}

func TestStateVerdict(t *testing.T) {
	verdict := func(v string) *vsockrpc.Report { return healthy(func(r *vsockrpc.Report) { r.Verdict = v }) }
	system := func(s string) *vsockrpc.Report { return healthy(func(r *vsockrpc.Report) { r.Systemd.State = s }) }
	provider := func(s string) *vsockrpc.Report {
		return healthy(func(r *vsockrpc.Report) { r.Provider = &vsockrpc.ProviderState{State: s} })
	}
	off := func(d time.Duration) *time.Duration { return &d }
	in := func(s string) *vsockrpc.ProviderStatus {
		return &vsockrpc.ProviderStatus{State: s, Problem: "why", Since: "since"}
	}
	for _, c := range []struct {
		what    string
		state   State
		verdict string
		ready   bool
		reasons string // of the host
	}{
		{"nothing", State{}, VerdictUnreachable, false, ""},
		{"no report", State{Reachable: true}, VerdictUnknown, false, ""},
		{"lost", State{Report: healthy()}, VerdictUnreachable, false, ""},
		{"healthy", State{Reachable: true, Report: healthy()}, "healthy", true, ""},
		{"degraded", State{Reachable: true, Report: verdict("degraded")}, "degraded", true, ""},
		{"failing", State{Reachable: true, Report: verdict("failing")}, "failing", false, ""},
		{"starting", State{Reachable: true, Report: verdict("starting")}, "starting", false, ""},
		{"old", State{Reachable: true, Report: verdict("")}, VerdictUnknown, false, ""},
		{"hostile", State{Reachable: true, Report: verdict("\x1b[31munreachable")}, VerdictUnknown, false, ""},
		{"a word of the host's", State{Reachable: true, Report: verdict("unreachable")}, VerdictUnknown, false, ""},
		{"systemd degraded", State{Reachable: true, Report: system("degraded")}, "healthy", true, ""},
		{"systemd starting", State{Reachable: true, Report: system("starting")}, "healthy", false, ""},
		{"systemd unknown", State{Reachable: true, Report: system("")}, "healthy", true, ""},
		{"no systemd", State{Reachable: true, Report: healthy(func(r *vsockrpc.Report) { r.Systemd = nil })}, "healthy", true, ""},
		{"systemd too busy", State{Reachable: true, Report: healthy(func(r *vsockrpc.Report) { r.Systemd, r.Unknown = nil, []string{"systemd"} })}, "healthy", false, ""},
		{"no provider", State{Reachable: true, Report: provider("none")}, "healthy", true, ""},
		{"in force", State{Reachable: true, Report: provider("inForce")}, "healthy", true, ""},
		{"waiting", State{Reachable: true, Report: provider("waiting")}, "healthy", false, ""},
		{"unreachable", State{Reachable: true, Report: provider("unreachable")}, "healthy", false, ""},
		{"clock", State{Reachable: true, Report: healthy(), ClockOffset: off(5 * time.Second)}, "healthy", true, ""},
		{"clock ahead", State{Reachable: true, Report: healthy(), ClockOffset: off(61 * time.Second)}, "degraded", true, "clockOff: the guest's clock is 1 min ahead of the host's (timedatectl status)"},
		{"clock behind", State{Reachable: true, Report: verdict("failing"), ClockOffset: off(math.MinInt64)}, "failing", false, "clockOff: the guest's clock is 106751 days behind the host's (timedatectl status)"},
		{"rolled back", State{Guest: "web", Reachable: true, Report: healthy(), Provider: in(vsockrpc.GuestRolledBack)}, "degraded", true, "providerRolledBack: why (guestctl retry web)"},
		{"refused", State{Guest: "web", Reachable: true, Report: healthy(), Provider: in(vsockrpc.GuestRefused)}, "degraded", true, "providerRefused: why (guestctl list web)"},
		{"unreadable", State{Guest: "web", Report: healthy(), Provider: in(vsockrpc.GuestUnreadable)}, VerdictUnreachable, false, "providerUnreadable: why (systemctl status guestagent-provide@web.service)"},
		{"applied", State{Reachable: true, Report: healthy(), Provider: in(vsockrpc.GuestInForce)}, "healthy", true, ""},
	} {
		s := c.state
		if s.Verdict() != c.verdict || s.Ready() != c.ready || s.Healthy() != (c.verdict == "healthy") {
			t.Errorf("%s: Verdict %q, Ready %v, Healthy %v, want %q, %v", c.what, s.Verdict(), s.Ready(), s.Healthy(), c.verdict, c.ready)
		}
		var lines []string
		for _, r := range s.Reasons() {
			lines = append(lines, fmt.Sprintf("%s: %s (%s)", r.Code, r.Detail, r.Hint))
			if r.Verdict != vsockrpc.VerdictDegraded {
				t.Errorf("%s: the reason %s has the verdict %q", c.what, r.Code, r.Verdict)
			}
		}
		if got := strings.Join(lines, "; "); got != c.reasons {
			t.Errorf("%s: Reasons = %q, want %q", c.what, got, c.reasons)
		}
	}
}

// The line has the reason that weighs most, and what is wrong with the host's
// eyes first otherwise; and nothing of it is raw.
func TestStateSummary(t *testing.T) {
	reason := func(verdict, code, unit, credential string) vsockrpc.Reason {
		return vsockrpc.Reason{Verdict: verdict, Code: code, Unit: unit, Credential: credential}
	}
	hour := time.Hour
	for _, c := range []struct {
		verdict string
		offset  *time.Duration
		reasons []vsockrpc.Reason
		want    string
	}{
		{"healthy", nil, nil, "healthy"},
		{"healthy", nil, []vsockrpc.Reason{reason("healthy", "noSMBIOS", "", "")}, "healthy"},
		{"degraded", nil, []vsockrpc.Reason{
			reason("degraded", "unitFailed", "nginx.service", ""), reason("degraded", "diskLow", "", ""), reason("degraded", "mismatch", "", "x"), reason("healthy", "noSMBIOS", "", ""),
		}, "degraded: unitFailed nginx.service and 2 more"},
		{"degraded", nil, []vsockrpc.Reason{reason("degraded", "consumerStale", "web.service", "cert")}, "degraded: consumerStale web.service cert"},
		{"healthy", &hour, nil, "degraded: clockOff"},
		{"failing", &hour, []vsockrpc.Reason{reason("failing", "diskFull", "", "")}, "failing: diskFull and 1 more"},
		{"degraded", nil, []vsockrpc.Reason{reason("", "old", "", "")}, "degraded: old"},
		{"failing", nil, []vsockrpc.Reason{reason("failing", "a\x1b", "b\n", strings.Repeat("c", 500))}, `failing: a\x1b b\n ` + strings.Repeat("c", 100)},
		{"\x1b", nil, []vsockrpc.Reason{reason("failing", "a", "", "")}, VerdictUnknown},
	} {
		s := State{Reachable: true, ClockOffset: c.offset, Report: healthy(func(r *vsockrpc.Report) { r.Verdict, r.Reasons = c.verdict, c.reasons })}
		if got := s.summary(); !strings.HasPrefix(got, c.want) || len(got) > len(c.want)+3 || strings.ContainsAny(got, "\x1b\n") {
			t.Errorf("summary of %q, %+v = %q, want %q", c.verdict, c.reasons, got, c.want)
		}
	}
}

func TestStateOf(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	contact := at.Add(-30 * time.Second).Format(time.RFC3339Nano)
	ms := func(n int64) *int64 { return &n }
	for _, c := range []struct {
		what   string
		status vsockrpc.ProviderStatus
		want   string // the problem
	}{
		{"in force", vsockrpc.ProviderStatus{State: vsockrpc.GuestInForce, LastContact: contact}, ""},
		{"applying", vsockrpc.ProviderStatus{State: vsockrpc.GuestApplying, LastContact: contact}, ""},
		{"waiting", vsockrpc.ProviderStatus{State: vsockrpc.GuestWaiting, LastContact: contact, Problem: "nobody\x1b"}, `the guest does not answer its provider: nobody\x1b`},
		{"waiting anew", vsockrpc.ProviderStatus{State: vsockrpc.GuestWaiting}, "the guest does not answer its provider"},
		{"unreadable", vsockrpc.ProviderStatus{State: vsockrpc.GuestUnreadable, LastContact: contact, Problem: "x"}, ""},
		{"unreadable for long", vsockrpc.ProviderStatus{State: vsockrpc.GuestUnreadable, LastContact: at.Add(-time.Hour).Format(time.RFC3339)}, "the guest does not answer its provider, which cannot read the credentials either"},
		{"unreadable at once", vsockrpc.ProviderStatus{State: vsockrpc.GuestUnreadable, Problem: "x"}, "the guest does not answer its provider"},
		{"no time", vsockrpc.ProviderStatus{State: vsockrpc.GuestInForce, LastContact: "\x1b"}, "the guest does not answer its provider"},
	} {
		c.status.Report = healthy()
		s := stateOf(Guest{Name: "web"}, &c.status, at)
		got := ""
		if s.Problem != nil {
			if got = s.Problem.Message; s.Problem.Status() != StatusUnreachable {
				t.Errorf("%s: the problem has status %d", c.what, s.Problem.Status())
			}
		}
		if got != c.want || s.Reachable != (c.want == "") || s.Report == nil || s.Provider.Report != nil || s.Provider.State != c.status.State || c.status.Report == nil {
			t.Errorf("%s: %+v, with problem %q, want %q", c.what, s, got, c.want)
		}
	}
	for n, want := range map[int64]time.Duration{
		-1500: -1500 * time.Millisecond, math.MaxInt64: math.MaxInt64 / time.Millisecond * time.Millisecond, math.MinInt64: -(math.MaxInt64 / time.Millisecond * time.Millisecond),
	} {
		s := stateOf(Guest{}, &vsockrpc.ProviderStatus{ClockOffset: ms(n)}, at)
		if *s.ClockOffset != want {
			t.Errorf("an offset of %d ms is %v, want %v", n, *s.ClockOffset, want)
		}
	}
}

func TestClockOffset(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for told, want := range map[string]string{
		"": "unknown", "\x1b": "unknown", "2026-01-02": "unknown", "10000-01-01T00:00:00Z": "unknown",
		"2026-01-02T03:04:07.5Z": "2.5s", "2026-01-02T04:04:05+02:00": "-1h0m0s",
		"0000-01-01T00:00:00Z": fmt.Sprint(time.Duration(math.MinInt64)), "9999-12-31T23:59:59Z": fmt.Sprint(time.Duration(math.MaxInt64)),
	} {
		got := "unknown"
		if d := clockOffset(told, at); d != nil {
			got = d.String()
		}
		if got != want {
			t.Errorf("clockOffset(%q) = %s, want %s", told, got, want)
		}
	}
}

// hugeReport has this many of everything, with texts of so many bytes of which
// each becomes six.
func hugeReport(n, text int) *vsockrpc.Report {
	s := strings.Repeat("\x01", text)
	r := &vsockrpc.Report{
		Version: s, BootID: s, MachineID: s, Hostname: s, Verdict: s, Time: s,
		Systemd: &vsockrpc.SystemdState{Version: s, State: s}, Provider: &vsockrpc.ProviderState{Address: s, State: s, Since: s, Problem: s},
		Memory: &vsockrpc.Memory{Total: 1}, Pressure: &vsockrpc.Pressure{IO: &vsockrpc.Stall{Full10: 7}}, Load: &vsockrpc.Load{Load1: 3},
	}
	for i := range n {
		r.Entries = append(r.Entries, vsockrpc.Entry{
			Name: fmt.Sprint(i), Revision: s, Path: s, Source: credential.Source(s), Consumers: []vsockrpc.Consumer{{Unit: s}, {Unit: s, Detail: s}},
		})
		r.Refusals = append(r.Refusals, credential.Refusal{Name: s, Detail: s})
		r.Reasons = append(r.Reasons, vsockrpc.Reason{Code: fmt.Sprint(i), Detail: s})
		r.Rejected = append(r.Rejected, vsockrpc.Rejected{Names: slices.Repeat([]string{s}, min(n, 4)), Problem: s})
		r.Waiting = append(r.Waiting, vsockrpc.Waiting{Unit: s})
		r.Disks = append(r.Disks, vsockrpc.Disk{Path: s, Used: 5})
		r.Unknown = append(r.Unknown, s)
		r.Systemd.Failed = append(r.Systemd.Failed, vsockrpc.FailedUnit{Unit: s})
	}
	return r
}

func TestTrim(t *testing.T) {
	small := hugeReport(3, 5)
	if got, trimmed := trim(small); got != small || trimmed {
		t.Error("a small report is trimmed")
	}
	for _, c := range []struct {
		n, text int
		entries int // that are left
	}{
		{300, 20, 64},   // many
		{60, 300, 16},   // long ones
		{100, 4096, 16}, // as long as the wire has them
		{1, 100000, 1},
	} {
		r := hugeReport(c.n, c.text)
		before := r.Size()
		got, trimmed := trim(r)
		if size := got.Size(); !trimmed || size > maxKept {
			t.Errorf("%d with %d: trimmed %v to %d bytes, want at most %d", c.n, c.text, trimmed, size, maxKept)
		}
		if r.Size() != before || r.Entries[0].Consumers == nil {
			t.Errorf("%d with %d: the report itself is changed", c.n, c.text)
		}
		if n := len(got.Entries); n != c.entries || got.Entries[0].Name != "0" || got.Entries[0].Consumers != nil || got.Reasons[n-1].Code != fmt.Sprint(n-1) {
			t.Errorf("%d with %d: %d entries, want the first %d, without consumers", c.n, c.text, n, c.entries)
		}
		if got.Pressure.IO.Full10 != 7 || got.Memory.Total != 1 || got.Load.Load1 != 3 || got.Disks[0].Used != 5 {
			t.Errorf("%d with %d: the figures are %+v", c.n, c.text, got)
		}
	}
	// Where the consumers are all that is too much, nothing else goes.
	r := &vsockrpc.Report{}
	for i := range 1000 {
		r.Entries = append(r.Entries, vsockrpc.Entry{Name: fmt.Sprint(i), Consumers: []vsockrpc.Consumer{{Detail: strings.Repeat("x", 1000)}}})
	}
	if got, trimmed := trim(r); !trimmed || len(got.Entries) != 1000 {
		t.Errorf("without its consumers a report has %d entries, want 1000", len(got.Entries))
	}
	if got := cut(reflect.ValueOf("ä\u202e"), 1, 3).String(); got != "ä" {
		t.Errorf("cut in the middle of a character = %q", got)
	}
}
