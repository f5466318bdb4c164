package health

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// running is a PID 1 that has nothing to complain of.
var running = System{State: "running"}

func words(reasons []Reason) string {
	var ws []string
	for _, r := range reasons {
		w := fmt.Sprintf("%s=%s", r.Code, r.Verdict)
		if r.Unit != "" || r.Credential != "" {
			w += " " + r.Unit + "/" + r.Credential
		}
		ws = append(ws, w)
	}
	return strings.Join(ws, ", ")
}

func TestJudge(t *testing.T) {
	at := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	for _, tc := range []struct {
		name    string
		guest   Guest
		verdict Verdict
		want    string
	}{
		{name: "nothing", guest: Guest{System: running}, verdict: Healthy},
		{name: "degraded of systemd", guest: Guest{System: System{State: "degraded"}}, verdict: Healthy},
		{name: "a state of tomorrow", guest: Guest{System: System{State: "resting"}}, verdict: Healthy},
		{name: "initializing", guest: Guest{System: System{State: "initializing"}}, verdict: Starting, want: "systemStarting=starting"},
		{name: "starting", guest: Guest{System: System{State: "starting"}}, verdict: Starting, want: "systemStarting=starting"},
		{name: "stopping", guest: Guest{System: System{State: "stopping"}}, verdict: Degraded, want: "systemStopping=degraded"},
		{name: "maintenance", guest: Guest{System: System{State: "maintenance"}}, verdict: Failing, want: "maintenance=failing"},
		{name: "no systemd", guest: Guest{System: System{Problem: "it hangs"}}, verdict: Degraded, want: "systemdUnknown=degraded"},
		{name: "systemd half known", guest: Guest{System: System{State: "running", Problem: "it hangs"}}, verdict: Degraded, want: "systemdUnknown=degraded"},
		{name: "systemd not asked", verdict: Degraded, want: "systemdUnknown=degraded"},
		{name: "provider waiting", guest: Guest{System: running, Provider: "waiting"}, verdict: Starting, want: "providerWaiting=starting"},
		{name: "provider in force", guest: Guest{System: running, Provider: "inForce"}, verdict: Healthy},
		{name: "provider unreachable is said by Others", guest: Guest{System: running, Provider: "unreachable"}, verdict: Healthy},
		{
			name:    "starting weighs more than degraded",
			guest:   Guest{System: System{State: "starting", Failed: []FailedUnit{{Unit: "a.service"}}}},
			verdict: Starting, want: "systemStarting=starting, unitFailed=degraded a.service/",
		},
		{
			name:    "failing weighs more than starting",
			guest:   Guest{System: System{State: "starting"}, Others: []Reason{{Code: ProviderUnreachable}}},
			verdict: Failing, want: "providerUnreachable=failing, systemStarting=starting",
		},
		{
			name:    "remarks make nothing worse, and others' verdicts are made anew",
			guest:   Guest{System: running, Others: []Reason{{Code: NoSMBIOS, Verdict: Failing}, {Code: SMBIOSOff}, {Code: Confidential}}},
			verdict: Healthy, want: "confidential=healthy, smbiosOff=healthy, noSmbios=healthy",
		},
		{
			name:    "codes that are not known degrade, after those that are",
			guest:   Guest{System: running, Others: []Reason{{Code: "b"}, {Code: "a"}, {Code: NotImported}, {Code: NoSMBIOS}}},
			verdict: Degraded, want: "notImported=degraded, a=degraded, b=degraded, noSmbios=healthy",
		},
		{
			name: "credentials, by code, unit and credential",
			guest: Guest{
				System:     running,
				Waiting:    []Use{{Unit: "w.service", Credential: "x"}},
				Stale:      []Use{{Unit: "b.service", Credential: "a"}, {Unit: "a.service", Credential: "z"}, {Unit: "a.service", Credential: "b"}},
				Shadowed:   []Use{{Credential: "s"}},
				Mismatched: []Use{{Credential: "m"}},
				Missing:    []Use{{Credential: "g"}},
				Foreign:    []Use{{Credential: "f"}},
				Refused:    []Use{{Credential: "r"}, {Detail: "no valid name"}},
				RolledBack: []Use{{Detail: "generation 7"}},
			},
			verdict: Degraded,
			want: "rolledBack=degraded, missing=degraded /g, foreign=degraded /f, shadowed=degraded /s, mismatch=degraded /m, refused=degraded, refused=degraded /r, " +
				"consumerStale=degraded a.service/b, consumerStale=degraded a.service/z, consumerStale=degraded b.service/a, consumerWaiting=degraded w.service/x",
		},
		{
			name:    "unknown parts",
			guest:   Guest{System: running, Figures: Figures{Unknown: []string{"disk /var", "load"}}},
			verdict: Degraded, want: "unknown=degraded, unknown=degraded",
		},
		{
			name:    "the socket of a guest without vsock",
			guest:   Guest{System: System{State: "degraded", Failed: []FailedUnit{{Unit: "guestagent.socket"}, {Unit: "guestagent-local.socket", Since: at}}}},
			verdict: Degraded, want: "unitFailed=degraded guestagent-local.socket/",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			verdict, reasons := Judge(tc.guest, Rules{})
			if got := words(reasons); verdict != tc.verdict || got != tc.want {
				t.Errorf("Judge() = %s, %s\nwant %s, %s", verdict, got, tc.verdict, tc.want)
			}
		})
	}
}

// Every code has a row, and the rows are in the order of their weight.
func TestCodes(t *testing.T) {
	src, err := os.ReadFile("health.go")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(src), " Code = \""); n != len(codes) {
		t.Errorf("there are %d codes, and %d in the table", n, len(codes))
	}
	if !slices.IsSortedFunc(codes[:], func(a, b rule) int {
		return slices.Index(weights, a.verdict) - slices.Index(weights, b.verdict)
	}) {
		t.Error("the codes are not in the order of their verdicts")
	}
	for i, c := range codes {
		if row(c.code) != i {
			t.Errorf("%s is there twice", c.code)
		}
	}
}

func TestJudgeReasons(t *testing.T) {
	at := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	for _, tc := range []struct {
		name  string
		guest Guest
		want  Reason
	}{
		{
			"a unit",
			Guest{System: System{State: "degraded", Failed: []FailedUnit{{Unit: "a@b:1.service", Result: "exit-code", Since: at}}}},
			Reason{UnitFailed, Degraded, "a@b:1.service", "", at, "a@b:1.service has failed: exit-code", "systemctl status a@b:1.service"},
		},
		{
			"a unit whose name the shell would eat",
			Guest{System: System{State: "degraded", Failed: []FailedUnit{{Unit: `dev-disk-by\x2did.swap`}}}},
			Reason{UnitFailed, Degraded, `dev-disk-by\x2did.swap`, "", time.Time{}, `dev-disk-by\x2did.swap has failed`, `systemctl status 'dev-disk-by\x2did.swap'`},
		},
		{
			"a unit that looks like an option",
			Guest{System: System{State: "degraded", Failed: []FailedUnit{{Unit: "-.mount"}}}},
			Reason{UnitFailed, Degraded, "-.mount", "", time.Time{}, "-.mount has failed", "systemctl status -- -.mount"},
		},
		{
			"a unit that cannot be pasted",
			Guest{System: System{State: "degraded", Failed: []FailedUnit{{Unit: "ä.service"}}}},
			Reason{UnitFailed, Degraded, "ä.service", "", time.Time{}, "ä.service has failed", "systemctl list-units --failed"},
		},
		{
			"a stale unit",
			Guest{System: running, Stale: []Use{{Unit: "web.service", Credential: "it's $(me)", Since: at, Detail: "it has no reload"}}},
			Reason{
				ConsumerStale, Degraded, "web.service", "it's $(me)", at,
				"web.service runs with another value than the one in force (it's $(me)): it has no reload", `guestctl refresh VM 'it'\''s $(me)'`,
			},
		},
		{
			"a stale unit of any credential",
			Guest{System: running, Stale: []Use{{Unit: "web.service"}}},
			Reason{ConsumerStale, Degraded, "web.service", "", time.Time{}, "web.service runs with another value than the one in force", "guestctl refresh VM"},
		},
		{
			"a waiting unit",
			Guest{System: running, Waiting: []Use{{Unit: "web.service", Credential: "key"}}},
			Reason{ConsumerWaiting, Degraded, "web.service", "key", time.Time{}, "web.service waits for a credential (key)", "guestctl push VM key:PATH"},
		},
		{
			"a missing credential",
			Guest{System: running, Missing: []Use{{Credential: "-k"}}},
			Reason{Missing, Degraded, "", "-k", time.Time{}, "-k has been removed from the store", "guestctl push VM -- -k:PATH"},
		},
		{
			"a refusal without a name",
			Guest{System: running, Refused: []Use{{Detail: "no name"}}},
			Reason{Refused, Degraded, "", "", time.Time{}, "was refused: no name", "guestctl list VM"},
		},
		{
			"a disk",
			Guest{System: running, Figures: Figures{Disks: []Disk{{Path: "/a b", Used: 95, Available: 5}}}},
			Reason{DiskLow, Degraded, "", "", time.Time{}, "/a b is 90% full or more", "du -xhd1 '/a b' | sort -h"},
		},
		{
			"one that was found elsewhere is left as it is",
			Guest{System: running, Others: []Reason{{Code: ConfigFault, Detail: "d", Hint: "h", Since: at}}},
			Reason{ConfigFault, Degraded, "", "", at, "d", "h"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, reasons := Judge(tc.guest, Rules{})
			if len(reasons) != 1 || reasons[0] != tc.want {
				t.Errorf("Judge() = %+v, want %+v", reasons, tc.want)
			}
		})
	}
}

func TestJudgeIgnore(t *testing.T) {
	failed := func(units ...string) (g Guest) {
		g.System.State = "degraded"
		for _, u := range units {
			g.System.Failed = append(g.System.Failed, FailedUnit{Unit: u})
		}
		return g
	}
	ignore := Rules{Ignore: func(unit string) bool { return unit == "a.service" }}
	for _, tc := range []struct {
		guest Guest
		rules Rules
		want  string
	}{
		{failed("a.service"), Rules{}, "a.service"},
		{failed("a.service", "b.service"), ignore, "b.service"},
		{failed("a.service"), ignore, ""},
		{failed("guestagent.socket"), Rules{}, ""},
		{failed("guestagent.service"), ignore, "guestagent.service"},
	} {
		verdict, reasons := Judge(tc.guest, tc.rules)
		var units []string
		for _, r := range reasons {
			units = append(units, r.Unit)
		}
		if got := strings.Join(units, " "); got != tc.want || (verdict == Healthy) != (tc.want == "") {
			t.Errorf("Judge(%v) = %s for %q, want %q", tc.guest.System.Failed, verdict, got, tc.want)
		}
	}
}

func TestJudgeDisks(t *testing.T) {
	disk := func(used, available uint64) Disk { return Disk{Path: "/", Used: used, Available: available} }
	readOnly := disk(1000, 0)
	readOnly.ReadOnly = true
	const huge = math.MaxUint64 / 100 * 100
	for _, tc := range []struct {
		disk  Disk
		rules Rules
		want  Verdict
	}{
		{disk(899, 101), Rules{}, Healthy},
		{disk(900, 100), Rules{}, Degraded},
		{disk(979, 21), Rules{}, Degraded},
		{disk(980, 20), Rules{}, Failing},
		{disk(1000, 0), Rules{}, Failing},
		{disk(huge/100*90, huge/100*10), Rules{}, Degraded},
		{disk(huge/100*90-1, huge/100*10+1), Rules{}, Healthy},
		{disk(0, 0), Rules{}, Healthy},
		{disk(0, 1), Rules{}, Healthy},
		{readOnly, Rules{}, Healthy},
		{disk(500, 500), Rules{DiskDegraded: 50}, Degraded},
		{disk(499, 501), Rules{DiskDegraded: 50}, Healthy},
		{disk(500, 500), Rules{DiskFailing: 50}, Failing},
		{disk(1000, 0), Rules{DiskFailing: 101}, Degraded},
		{disk(1000, 0), Rules{DiskFailing: 101, DiskDegraded: 101}, Healthy},
	} {
		g := Guest{System: running, Figures: Figures{Disks: []Disk{tc.disk}}}
		if got, _ := Judge(g, tc.rules); got != tc.want {
			t.Errorf("Judge() of %+v with %+v = %s, want %s", tc.disk, tc.rules, got, tc.want)
		}
	}
}

func TestJudgePressure(t *testing.T) {
	some := func(n int) *Stall { return &Stall{Some: Share{Avg10: n}} }
	full := func(n int) *Stall { return &Stall{Some: Share{Avg10: n}, Full: Share{Avg10: n}} }
	for _, tc := range []struct {
		stall *Stall
		rules Rules
		want  Verdict
	}{
		{nil, Rules{}, Healthy},
		{some(1999), Rules{}, Healthy},
		{some(2000), Rules{}, Degraded},
		{some(10000), Rules{}, Degraded},
		{full(1999), Rules{}, Healthy},
		{full(2000), Rules{}, Failing},
		{&Stall{Some: Share{Avg60: 9000, Avg300: 9000}, Full: Share{Avg60: 9000}}, Rules{}, Healthy},
		{&Stall{Some: Share{Over: true}}, Rules{}, Degraded},
		{&Stall{Full: Share{Over: true}}, Rules{}, Failing},
		{some(2000), Rules{MemoryDegraded: 21}, Healthy},
		{full(2000), Rules{MemoryFailing: 21}, Degraded},
		{full(100), Rules{MemoryDegraded: 2, MemoryFailing: 1}, Failing},
		{full(10000), Rules{MemoryDegraded: 101, MemoryFailing: 101}, Healthy},
	} {
		// That others wait for the disk or the processor is no fault.
		g := Guest{System: running, Figures: Figures{Pressure: Pressure{Memory: tc.stall, CPU: full(10000), IO: full(10000)}}}
		if got, reasons := Judge(g, tc.rules); got != tc.want || (len(reasons) == 0) != (got == Healthy) {
			t.Errorf("Judge() of %+v with %+v = %s, want %s", tc.stall, tc.rules, got, tc.want)
		}
	}
}

func TestJudgeBounds(t *testing.T) {
	many := func(n int) (us []Use) {
		for i := range n {
			us = append(us, Use{Credential: fmt.Sprintf("c%05d", i)})
		}
		return us
	}
	count := func(reasons []Reason, code Code) (n int, last string) {
		for _, r := range reasons {
			if r.Code == code {
				n, last = n+1, r.Detail
			}
		}
		return n, last
	}

	_, reasons := Judge(Guest{System: running, Missing: many(64), Foreign: many(65)}, Rules{})
	if n, last := count(reasons, Missing); n != 64 || strings.Contains(last, "more") {
		t.Errorf("of 64 Judge() kept %d, the last is %q", n, last)
	}
	if n, last := count(reasons, Foreign); n != 64 || !strings.HasSuffix(last, " (and 1 more)") || !strings.HasPrefix(last, "c00063 ") {
		t.Errorf("of 65 Judge() kept %d, the last is %q", n, last)
	}

	// Each code gives up as much as it takes, so that none is lost.
	g := Guest{System: running, Missing: many(5000), Foreign: many(5000), Shadowed: many(5000), Refused: many(5000), Stale: many(5000), Mismatched: many(3)}
	_, reasons = Judge(g, Rules{})
	if n, last := count(reasons, ConsumerStale); len(reasons) != 253 || n != 50 || !strings.HasSuffix(last, " (and 4950 more)") {
		t.Errorf("Judge() kept %d reasons, of them %d for one code, the last is %q", len(reasons), n, last)
	}
	if n, _ := count(reasons, Mismatch); n != 3 {
		t.Errorf("of 3 Judge() kept %d", n)
	}

	g = Guest{System: running}
	for i := range 1000 {
		g.Others = append(g.Others, Reason{Code: Code(fmt.Sprintf("code%04d", i)), Detail: strings.Repeat("ä", 1000)})
	}
	_, reasons = Judge(g, Rules{})
	if len(reasons) != 256 {
		t.Errorf("Judge() kept %d reasons", len(reasons))
	}
	if d := reasons[0].Detail; d != strings.Repeat("ä", 512)+"…" {
		t.Errorf("a detail of 2000 bytes is %d long", len(d))
	}
}

// Each code has a section for people, which says what it makes of the guest.
func TestCodesDocumented(t *testing.T) {
	b, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	words := map[Verdict]string{Failing: "Failing", Starting: "Starting", Degraded: "Degraded", Healthy: "A remark"}
	for _, c := range codes {
		_, section, ok := strings.Cut(string(b), "\n### "+string(c.code)+"\n")
		if !ok || !strings.HasPrefix(section, words[c.verdict]) {
			t.Errorf("docs/operations.md has no section on %s that begins with %q", c.code, words[c.verdict])
		}
	}
}
