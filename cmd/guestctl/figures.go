package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// maxReason bounds what is shown of a reason in a list of them, in bytes.
	maxReason = 120
	// recently is how long ago a guest was heard that is said to be there now.
	// Healthy ones are silent for as long.
	recently = time.Minute
)

// A view is what is known of a guest, to be shown. Its words are the guest's as
// they came.
type view struct {
	guest, target string
	verdict       string
	reasons       []vsockrpc.Reason
	reachable     bool
	report        *vsockrpc.Report         // nil if there is none
	provider      *vsockrpc.ProviderStatus // nil where it was not asked
	contact       time.Time
	offset        *time.Duration
	trimmed       bool
	problem       *host.Failure // why it is not known how the guest is
}

func viewOf(s *host.State) *view {
	return &view{
		guest: s.Guest, target: s.Target, verdict: s.Verdict(), reasons: s.Reasons(), reachable: s.Reachable, report: s.Report,
		provider: s.Provider, contact: s.LastContact, offset: s.ClockOffset, trimmed: s.Trimmed, problem: s.Problem,
	}
}

// resultView is the view of a guest that was asked for its status.
func resultView(r *host.Result) *view {
	v := &view{
		guest: r.Guest, target: r.Target, verdict: r.Verdict, reasons: r.Reasons, reachable: r.Verdict != host.VerdictUnreachable,
		report: r.Report, provider: r.ProviderStatus, trimmed: r.Trimmed,
	}
	if v.verdict == "" { // it was not asked
		v.verdict = host.VerdictUnknown
	}
	v.contact, _ = time.Parse(time.RFC3339, r.LastContact) // zero where there was none
	if r.ClockOffset != nil {
		d := time.Duration(*r.ClockOffset) * time.Millisecond
		v.offset = &d
	}
	if r.Error != nil && r.Error.Code != host.CodeNotHealthy {
		v.problem = r.Error
	}
	return v
}

// about says what a reason is, in the guest's words: its code, and the unit and
// the credential that it is about.
func about(r vsockrpc.Reason) string {
	var s strings.Builder
	s.WriteString(r.Code)
	for _, word := range []string{r.Unit, r.Credential} {
		if word != "" {
			s.WriteString(" " + word)
		}
	}
	return s.String()
}

// showReason is a reason in a list of them, fit for a terminal: about, and the
// detail where that would say too little.
func showReason(r vsockrpc.Reason) string {
	s := about(r)
	if r.Unit == "" && r.Credential == "" && r.Detail != "" {
		s += ": " + r.Detail
	}
	return vsockrpc.Escape(s, maxReason)
}

// showReasons is the first of a guest's reasons, and how many more there are.
// Where it cannot be reached, it is why.
func showReasons(v *view) string {
	if v.problem != nil {
		return show(string(v.problem.Code))
	}
	if len(v.reasons) == 0 {
		return "-"
	}
	first := vsockrpc.Escape(about(v.reasons[0]), maxReason)
	if n := len(v.reasons) - 1; n > 0 {
		first += fmt.Sprintf(" +%d", n)
	}
	return first
}

// showHint is the way out of a reason, for this guest. A command of guestctl is
// for the host, and has VM in place of its name.
func showHint(r vsockrpc.Reason, guest string) string {
	words := strings.Split(r.Hint, " ")
	if words[0] != "guestctl" {
		where := "next, in the guest: "
		if hostHints[r.Code] {
			where = "next: "
		}
		return where + vsockrpc.Escape(r.Hint, maxLine)
	}
	for i, word := range words {
		if word == "VM" {
			words[i] = quoted(guest)
		}
	}
	return "next: " + vsockrpc.Escape(strings.Join(words, " "), maxLine)
}

// hostHints are the codes of reasons whose hints are for the host.
var hostHints = map[string]bool{
	host.ReasonProviderRolledBack: true, host.ReasonProviderRefused: true, host.ReasonProviderUnreadable: true,
}

// quoted is a guest's name as one word of a shell.
func quoted(name string) string {
	if strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-@+:/") == "" {
		return name
	}
	return "'" + strings.ReplaceAll(name, "'", `'\''`) + "'"
}

// uptime is for how long a guest has been up, in seconds; 0 if that is not
// known. A report is old: what passed since is added where the clocks are known.
func uptime(v *view, now time.Time) int64 {
	r := v.report
	if r == nil || r.Uptime <= 0 {
		return 0
	}
	at, err := time.Parse(time.RFC3339, r.Time)
	if err != nil || v.offset == nil || !v.reachable {
		return r.Uptime
	}
	return r.Uptime + int64(max(0, now.Add(*v.offset).Sub(at))/time.Second)
}

// showUptime is a number of seconds for people.
func showUptime(n int64) string {
	const minute, hour, day = 60, 60 * 60, 24 * 60 * 60
	switch {
	case n <= 0:
		return "-"
	case n < minute:
		return fmt.Sprintf("%ds", n)
	case n < hour:
		return fmt.Sprintf("%dm", n/minute)
	case n < day:
		return fmt.Sprintf("%dh %dm", n/hour, n%hour/minute)
	}
	return fmt.Sprintf("%dd %dh", n/day, n%day/hour)
}

// showContact says when a guest was heard last.
func showContact(v *view, now time.Time) string {
	switch {
	case v.contact.IsZero():
		return "never"
	case v.reachable && now.Sub(v.contact) < recently:
		return "now"
	}
	return showTime(v.contact, now)
}

// showTime is a time of this host's, without the day if that is today.
func showTime(t, now time.Time) string {
	t, now = t.Local(), now.Local()
	if t.Format(time.DateOnly) == now.Format(time.DateOnly) {
		return t.Format(time.TimeOnly)
	}
	return t.Format(time.DateTime)
}

// showSince is a time that a guest gave.
func showSince(s string, now time.Time) string {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return showTime(t, now)
	}
	return show(s)
}

// showGeneration is the generation of a guest's report.
func showGeneration(v *view) string {
	if v.report == nil {
		return "-"
	}
	return strconv.FormatInt(v.report.Generation, 10)
}

// showBytes is a size for people.
func showBytes(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n)/1024, 0
	const units = "KMGTPE"
	for f >= 1023.95 && unit < len(units)-1 { // 1023.95 would be shown as 1024.0
		f /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", f, units[unit])
}

// showHundredths is a number that is given in hundredths.
func showHundredths(n int64) string { return strconv.FormatFloat(float64(n)/100, 'f', 2, 64) }

// showDisk says how full a file system is, rounded up as df(1) does it.
func showDisk(d vsockrpc.Disk) string {
	s := fmt.Sprintf("%s used, %s available", showBytes(d.Used), showBytes(d.Available))
	if all := float64(d.Used) + float64(d.Available); all > 0 {
		s += fmt.Sprintf(" (%.0f%% full)", math.Ceil(float64(d.Used)/all*100))
	}
	if d.ReadOnly {
		s += ", read-only"
	}
	return s
}

// showStall is one kind of pressure, over the last ten seconds.
func showStall(what string, s *vsockrpc.Stall) string {
	if s == nil {
		return ""
	}
	return fmt.Sprintf("%s %s%% (full %s%%)", what, showHundredths(s.Some10), showHundredths(s.Full10))
}

// showOffset is by how much a guest's clock differs.
func showOffset(d time.Duration) string {
	way := "ahead of"
	if d < 0 {
		way = "behind"
	}
	d = d.Abs()
	if d < time.Second {
		return fmt.Sprintf("%d ms %s this host's", d.Milliseconds(), way)
	}
	if d < time.Minute {
		return fmt.Sprintf("%.1f s %s this host's", d.Seconds(), way)
	}
	return fmt.Sprintf("%s %s this host's", showUptime(int64(d/time.Second)), way)
}
