package health

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"unicode/utf8"
)

// The bounds of what Judge returns.
const (
	maxReasons = 256
	maxPerCode = 64
	maxDetail  = 1024 // bytes
)

// codes is what each reason makes of a guest. Reasons of one verdict are in this
// order. A code that is not here degrades, and comes after those that are.
//
// A guest fails where it has not got what it is for: it is in emergency mode, the
// host's credentials cannot be had, nothing can be written or all of it waits for
// memory. What is wrong with one unit or credential degrades: the others work, and
// only the owner knows which of them the guest is for. Values that a gate rolled
// back, and that are in force for want of others, are no worse: if they are bad, a
// unit fails by them and is told. What could not be found out degrades as well,
// since nobody can say that it is fine. That a guest has no SMBIOS, or does not
// read it, is as somebody wanted it.
var codes = [...]rule{
	{Maintenance, Failing},
	{SMBIOSUnreadable, Failing},
	{ProviderUnreachable, Failing},
	{DiskFull, Failing},
	{MemoryPressure, Failing}, // degraded, where only some tasks wait
	{SystemStarting, Starting},
	{ProviderWaiting, Starting},
	{SystemStopping, Degraded},
	{SystemdUnknown, Degraded},
	{UnitFailed, Degraded},
	{RejectedInForce, Degraded},
	{RolledBack, Degraded},
	{Interrupted, Degraded},
	{Missing, Degraded},
	{Foreign, Degraded},
	{Shadowed, Degraded},
	{Mismatch, Degraded},
	{Refused, Degraded},
	{ConsumerStale, Degraded},
	{ConsumerWaiting, Degraded},
	{StoreSwappable, Degraded},
	{ConfigFault, Degraded},
	{SMBIOSDamaged, Degraded},
	{NotImported, Degraded},
	{DiskLow, Degraded},
	{Unknown, Degraded},
	{Confidential, Healthy},
	{SMBIOSOff, Healthy},
	{NoSMBIOS, Healthy},
}

// A rule is what a reason makes of a guest.
type rule struct {
	code    Code
	verdict Verdict
}

// row returns where code is in the table, or one past its end.
func row(code Code) int {
	for i := range codes {
		if codes[i].code == code {
			return i
		}
	}
	return len(codes)
}

// Compare orders codes by weight, the weightiest first.
func Compare(a, b Code) int {
	return cmp.Or(
		cmp.Compare(row(a), row(b)),
		cmp.Compare(a, b), // of those that are not in the table
	)
}

func verdictOf(code Code) Verdict {
	if i := row(code); i < len(codes) {
		return codes[i].verdict
	}
	return Degraded
}

// weights are the verdicts, the weightiest first.
var weights = []Verdict{Failing, Starting, Degraded, Healthy}

// Judge returns how the guest is, and why: the reasons that weigh most first,
// those of one verdict in the order of the table codes, and then by unit and by
// credential.
//
// Of one code there are at most 64 reasons, of all at most 256, for which each
// code gives up as much as it takes; the detail of the last one of a code that was
// cut says how many more there are. A unit that [Rules.Ignore] names does not
// count as failed, nor does guestagent.socket: a guest without vsock is not ill.
// That systemd calls itself degraded says nothing that its failed units do not.
func Judge(g Guest, r Rules) (Verdict, []Reason) {
	r = r.withDefaults()
	var j judgment
	j.system(g.System, r.Ignore)
	j.figures(g.Figures, r)
	j.credentials(g)
	if g.Provider == "waiting" {
		j.add(ProviderWaiting, "systemctl status guestagent-pull.service", "the provider has not handed over its set yet")
	}
	for _, o := range g.Others {
		o.Verdict = verdictOf(o.Code)
		j.reasons = append(j.reasons, o)
	}

	slices.SortStableFunc(j.reasons, func(a, b Reason) int {
		return cmp.Or(
			cmp.Compare(slices.Index(weights, a.Verdict), slices.Index(weights, b.Verdict)),
			Compare(a.Code, b.Code),
			cmp.Compare(a.Unit, b.Unit),
			cmp.Compare(a.Credential, b.Credential),
		)
	})
	if len(j.reasons) == 0 {
		return Healthy, nil
	}
	return j.reasons[0].Verdict, bound(j.reasons)
}

// bound cuts sorted reasons down to what Judge returns.
func bound(all []Reason) []Reason {
	counts := make(map[Code]int)
	for _, r := range all {
		counts[r.Code]++
	}
	most := maxPerCode
	for ; most > 1; most-- {
		sum := 0
		for _, n := range counts {
			sum += min(n, most)
		}
		if sum <= maxReasons {
			break
		}
	}
	kept := make([]Reason, 0, min(len(all), maxReasons))
	seen := make(map[Code]int)
	for _, r := range all {
		seen[r.Code]++
		if len(kept) == maxReasons || seen[r.Code] > most {
			continue
		}
		r.Detail = shorten(r.Detail)
		if more := counts[r.Code] - most; seen[r.Code] == most && more > 0 {
			r.Detail = fmt.Sprintf("%s (and %d more)", r.Detail, more)
		}
		kept = append(kept, r)
	}
	return kept
}

// shorten cuts a detail that was put together of several bounded parts.
func shorten(s string) string {
	if len(s) <= maxDetail {
		return s
	}
	n := maxDetail
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}

// A judgment is what Judge collects.
type judgment struct{ reasons []Reason }

func (j *judgment) add(code Code, hint, detail string) {
	j.reasons = append(j.reasons, Reason{Code: code, Verdict: verdictOf(code), Detail: detail, Hint: hint})
}

func (j *judgment) system(s System, ignore func(unit string) bool) {
	const jobs = "systemctl list-jobs"
	switch {
	case s.Problem != "":
		j.add(SystemdUnknown, "systemctl is-system-running", "systemd does not say how it is: "+s.Problem)
	case s.State == "":
		j.add(SystemdUnknown, "systemctl is-system-running", "systemd does not say how it is")
	case s.State == "initializing", s.State == "starting":
		j.add(SystemStarting, jobs, "systemd has not finished the boot")
	case s.State == "stopping":
		j.add(SystemStopping, jobs, "the guest is shutting down")
	case s.State == "maintenance":
		j.add(Maintenance, "systemctl list-units --failed", "systemd is in emergency or rescue mode")
	}
	for _, f := range s.Failed {
		// It fails where there is no vsock, and that is no fault.
		if f.Unit == "guestagent.socket" || ignore != nil && ignore(f.Unit) {
			continue
		}
		detail := f.Unit + " has failed"
		if f.Result != "" {
			detail += ": " + f.Result
		}
		hint := "systemctl list-units --failed"
		if unit, ok := argument(f.Unit); ok {
			hint = "systemctl status " + unit
		}
		j.reasons = append(j.reasons, Reason{Code: UnitFailed, Verdict: verdictOf(UnitFailed), Unit: f.Unit, Since: f.Since, Detail: detail, Hint: hint})
	}
}

func (j *judgment) figures(f Figures, r Rules) {
	const memory = "systemd-cgtop --order=memory"
	switch memoryVerdict(f.Pressure.Memory, r) {
	case Failing:
		j.add(MemoryPressure, memory, fmt.Sprintf("everything waits for memory, %d%% of the time or more", r.MemoryFailing))
	case Degraded:
		j.add(MemoryPressure, memory, fmt.Sprintf("tasks wait for memory, %d%% of the time or more", r.MemoryDegraded))
		j.reasons[len(j.reasons)-1].Verdict = Degraded
	}
	for _, d := range f.Disks {
		hint := "df"
		if where, ok := argument(d.Path); ok {
			hint = "du -xhd1 " + where + " | sort -h"
		}
		switch diskVerdict(d, r) {
		case Failing:
			j.add(DiskFull, hint, fmt.Sprintf("%s is %d%% full or more", d.Path, r.DiskFailing))
		case Degraded:
			j.add(DiskLow, hint, fmt.Sprintf("%s is %d%% full or more", d.Path, r.DiskDegraded))
		}
	}
	for _, part := range f.Unknown {
		j.add(Unknown, "journalctl --dmesg --lines=50", part+" could not be found out")
	}
}

func (j *judgment) credentials(g Guest) {
	const list = "guestctl list VM"
	name := func(u Use, after, without string) string {
		if arg, ok := argument(u.Credential); ok {
			return after + arg
		}
		return without
	}
	for _, kind := range []struct {
		code  Code
		uses  []Use
		words string // between unit and credential; of a credential alone after it
		hint  func(Use) string
	}{
		{RolledBack, g.RolledBack, "a gate rolled a set back", func(Use) string { return "guestctl retry VM" }},
		{Missing, g.Missing, "has been removed from the store", func(u Use) string {
			return name(u, "guestctl push VM ", "guestctl push VM NAME") + ":PATH"
		}},
		{Foreign, g.Foreign, "has been changed or replaced in the store", func(Use) string { return list }},
		{Shadowed, g.Shadowed, "is not what systemd finds first", func(Use) string { return list }},
		{Mismatch, g.Mismatched, "is not with PID 1 as the OEM string has it", func(Use) string { return list }},
		{Refused, g.Refused, "was refused", func(Use) string { return list }},
		{ConsumerStale, g.Stale, "runs with another value than the one in force", func(u Use) string {
			return name(u, "guestctl refresh VM ", "guestctl refresh VM")
		}},
		{ConsumerWaiting, g.Waiting, "waits for a credential", func(u Use) string {
			return name(u, "guestctl push VM ", "guestctl push VM NAME") + ":PATH"
		}},
	} {
		for _, u := range kind.uses {
			who := u.Unit
			if who == "" {
				who = u.Credential
			}
			detail := strings.TrimPrefix(who+" "+kind.words, " ")
			if u.Unit != "" && u.Credential != "" {
				detail += " (" + u.Credential + ")"
			}
			if u.Detail != "" {
				detail += ": " + u.Detail
			}
			j.reasons = append(j.reasons, Reason{
				Code: kind.code, Verdict: verdictOf(kind.code), Unit: u.Unit, Credential: u.Credential,
				Since: u.Since, Detail: detail, Hint: kind.hint(u),
			})
		}
	}
}

// memoryVerdict is what the pressure makes of the guest.
func memoryVerdict(s *Stall, r Rules) Verdict {
	switch {
	case s == nil:
		return Healthy
	case s.Full.Over || s.Full.Avg10 >= r.MemoryFailing*100:
		return Failing
	case s.Some.Over || s.Some.Avg10 >= r.MemoryDegraded*100:
		return Degraded
	default:
		return Healthy
	}
}

// diskVerdict is what a file system makes of the guest. One that is read-only, or
// that has no size, is never full.
func diskVerdict(d Disk, r Rules) Verdict {
	switch {
	case d.ReadOnly || d.Used+d.Available == 0:
		return Healthy
	case reaches(d.Used, d.Used+d.Available, r.DiskFailing):
		return Failing
	case reaches(d.Used, d.Used+d.Available, r.DiskDegraded):
		return Degraded
	default:
		return Healthy
	}
}

// reaches reports whether part is percent of whole or more.
func reaches(part, whole uint64, percent int) bool {
	ahi, alo := bits.Mul64(part, 100)
	bhi, blo := bits.Mul64(whole, uint64(max(percent, 0)))
	return ahi > bhi || ahi == bhi && alo >= blo
}

// argument returns s as one argument of a shell's command, and whether there is a
// way to write it that can be pasted.
func argument(s string) (arg string, ok bool) {
	plain := true
	for i := range len(s) {
		switch c := s[i]; {
		case c < ' ' || c > '~':
			return "", false
		case '0' <= c && c <= '9', 'A' <= c && c <= 'Z', 'a' <= c && c <= 'z', strings.IndexByte(":-_.@/", c) >= 0:
		default:
			plain = false
		}
	}
	if s == "" {
		return "", false
	}
	if !plain {
		s = "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
	}
	if strings.TrimPrefix(s, "'")[0] == '-' { // -.mount is one
		s = "-- " + s
	}
	return s, true
}
