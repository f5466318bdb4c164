package host

import (
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/guestagent/guestagent/vsockrpc"
)

// The verdicts of a [State] that no report has.
const (
	VerdictUnreachable = "unreachable" // the guest does not answer
	VerdictUnknown     = "unknown"     // its agent gives none, or one that nobody knows
)

// The codes of the reasons that only the host can tell.
const (
	ReasonClockOff           = "clockOff"           // the guest's clock and the host's differ
	ReasonProviderRolledBack = "providerRolledBack" // the provider's set did not stand its gate
	ReasonProviderRefused    = "providerRefused"    // the guest refused names of the provider's set
	ReasonProviderUnreadable = "providerUnreadable" // the provider cannot read the set
)

// maxClockOffset is by how much a guest's clock may differ from the host's.
const maxClockOffset = 5 * time.Second

// A State is what is known of a guest. Its parts are shared, and not to be
// changed. Its words are the guest's as they came: whoever shows them escapes
// them.
type State struct {
	// Guest and Target are the VM's name and where it is dialled.
	Guest, Target string
	// Reachable says that the guest was heard and has not been lost since. Where
	// a provider was asked, it is that which hears the guest.
	Reachable bool
	// Report is the guest's last one, nil if there is none. Where the guest is not
	// reachable it is old.
	Report *vsockrpc.Report
	// Provider is what the guest's provider said last, without the report; nil
	// where the guest was asked itself.
	Provider *vsockrpc.ProviderStatus
	// LastContact is when the guest was heard last, by the host's clock; zero if
	// it never was.
	LastContact time.Time
	// ClockOffset is by how much the guest's clock was ahead of the host's when it
	// told its time last; nil if it is not known.
	ClockOffset *time.Duration
	// Trimmed says that the report was too large to keep all of it.
	Trimmed bool
	// Problem is why the guest is not reachable; nil if it is.
	Problem *Failure
}

// Verdict returns the verdict of the report, in which what only the host can
// tell counts too: [VerdictUnreachable] where the guest is not reachable, and
// [VerdictUnknown] where there is none that is known.
func (s *State) Verdict() string {
	switch {
	case !s.Reachable:
		return VerdictUnreachable
	case s.Report == nil:
		return VerdictUnknown
	}
	switch v := s.Report.Verdict; v {
	case vsockrpc.VerdictStarting, vsockrpc.VerdictDegraded, vsockrpc.VerdictFailing:
		return v
	case vsockrpc.VerdictHealthy:
		if len(s.hostReasons()) > 0 {
			return vsockrpc.VerdictDegraded
		}
		return v
	default:
		return VerdictUnknown
	}
}

// partSystemd is systemd among what a guest could not find out.
const partSystemd = "systemd"

// Healthy reports whether the verdict is healthy.
func (s *State) Healthy() bool { return s.Verdict() == vsockrpc.VerdictHealthy }

// Ready reports whether the guest can do its work: it is healthy or degraded,
// its systemd has booted, as far as its agent is not too old to say so, and its
// provider's set is in force, if it has a provider.
func (s *State) Ready() bool {
	if v := s.Verdict(); v != vsockrpc.VerdictHealthy && v != vsockrpc.VerdictDegraded {
		return false
	}
	// A guest that boots may be too busy to say so.
	if slices.Contains(s.Report.Unknown, partSystemd) {
		return false
	}
	if sd := s.Report.Systemd; sd != nil && !slices.Contains([]string{"running", "degraded", ""}, sd.State) {
		return false
	}
	p := s.Report.Provider
	return p == nil || p.State == vsockrpc.ProviderNone || p.State == vsockrpc.ProviderInForce
}

// Reasons returns the reasons of the report, after those that only the host can
// tell. Where the guest is not reachable, they are those that it had.
func (s *State) Reasons() []vsockrpc.Reason {
	reasons := s.hostReasons()
	if s.Report != nil {
		reasons = append(reasons, s.Report.Reasons...)
	}
	return reasons
}

// hostReasons are those that only the host can tell. Each degrades the guest.
func (s *State) hostReasons() []vsockrpc.Reason {
	var reasons []vsockrpc.Reason
	if p := s.Provider; p != nil {
		if code, hint := providerReason(s.Guest, p.State); code != "" {
			reasons = append(reasons, vsockrpc.Reason{Code: code, Detail: p.Problem, Hint: hint, Verdict: vsockrpc.VerdictDegraded, Since: p.Since})
		}
	}
	if s.ClockOffset != nil && s.ClockOffset.Abs() > maxClockOffset {
		way := "ahead of"
		if *s.ClockOffset < 0 {
			way = "behind"
		}
		reasons = append(reasons, vsockrpc.Reason{
			Code: ReasonClockOff, Detail: fmt.Sprintf("the guest's clock is %s %s the host's", roughly(s.ClockOffset.Abs()), way),
			Hint: "timedatectl status", Verdict: vsockrpc.VerdictDegraded,
		})
	}
	return reasons
}

// providerReason is what the state of a provider makes of a guest, "" for
// nothing.
func providerReason(guest, state string) (code, hint string) {
	switch state {
	case vsockrpc.GuestRolledBack:
		return ReasonProviderRolledBack, "guestctl retry " + guest
	case vsockrpc.GuestRefused:
		return ReasonProviderRefused, "guestctl list " + guest
	case vsockrpc.GuestUnreadable:
		return ReasonProviderUnreadable, "systemctl status guestagent-provide@" + guest + ".service"
	}
	return "", ""
}

// roughly is a duration for people. It has no figures that change from one look
// to the next.
func roughly(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%d h", d/time.Hour)
	}
	return fmt.Sprintf("%d days", d/day)
}

// stateOf is what is known of a guest from its provider.
func stateOf(g Guest, p *vsockrpc.ProviderStatus, now time.Time) State {
	own := *p
	own.Report = nil
	s := State{Guest: g.Name, Target: g.Target.String(), Report: p.Report, Provider: &own, Trimmed: p.Trimmed}
	s.LastContact, _ = time.Parse(time.RFC3339, p.LastContact) // zero where there is none
	if p.ClockOffset != nil {
		const most = int64(math.MaxInt64 / time.Millisecond)
		d := time.Duration(min(max(*p.ClockOffset, -most), most)) * time.Millisecond
		s.ClockOffset = &d
	}
	switch {
	case p.State == vsockrpc.GuestWaiting || s.LastContact.IsZero():
		s.Problem = &Failure{Code: CodeNoAnswer, Message: "the guest does not answer its provider"}
		if p.Problem != "" && p.State == vsockrpc.GuestWaiting {
			s.Problem.Message += ": " + vsockrpc.Escape(p.Problem, maxDetail)
		}
	case p.State == vsockrpc.GuestUnreadable && now.Sub(s.LastContact) > silence:
		// That state hides whether the guest answers.
		s.Problem = &Failure{Code: CodeNoAnswer, Message: "the guest does not answer its provider, which cannot read the credentials either"}
	}
	s.Reachable = s.Problem == nil
	return s
}

// clockOffset is by how much a guest's clock is ahead that tells this time now,
// as far as a Duration can have it; nil if it is not known.
func clockOffset(told string, now time.Time) *time.Duration {
	t, err := time.Parse(time.RFC3339, told)
	if err != nil {
		return nil
	}
	d := t.Sub(now)
	return &d
}

// known are the verdicts that a guest can have.
var known = []string{vsockrpc.VerdictStarting, vsockrpc.VerdictHealthy, vsockrpc.VerdictDegraded, vsockrpc.VerdictFailing}

// summary is the verdict, and the reason that weighs most, in one line fit for a
// terminal.
func (s *State) summary() string {
	verdict := s.Verdict()
	line := verdict
	var worse []vsockrpc.Reason
	for _, r := range s.Reasons() {
		if r.Verdict != vsockrpc.VerdictHealthy {
			worse = append(worse, r)
		}
	}
	if len(worse) == 0 || !slices.Contains(known, verdict) {
		return line
	}
	// What only the host can tell comes first, and may weigh less.
	first := worse[max(0, slices.IndexFunc(worse, func(r vsockrpc.Reason) bool { return r.Verdict == verdict }))]
	line += ": " + vsockrpc.Escape(first.Code, maxWord)
	for _, about := range []string{first.Unit, first.Credential} {
		if about != "" {
			line += " " + vsockrpc.Escape(about, maxWord)
		}
	}
	if more := len(worse) - 1; more > 0 {
		line += fmt.Sprintf(" and %d more", more)
	}
	return line
}

// maxWord bounds a name or a code that a line quotes of a guest, in bytes.
const maxWord = 100
