package host

import (
	"math"
	"slices"
	"time"

	"github.com/guestagent/guestagent/vsockrpc"
)

// The bounds of a digest. What is past them is left out, and a metric says so.
const (
	digestCredentials = 256
	digestStale       = 64
	digestReasons     = 64
	// digestLabel and digestVersion bound a text, in bytes, with the mark that it
	// was cut.
	digestLabel   = 255
	digestVersion = 64
)

// other stands for a word that nobody knows.
const other = "other"

// The words that become labels as they are. Prometheus keeps every label that it
// ever saw, and a guest must not fill it with words.
var (
	verdictWords = []string{
		vsockrpc.VerdictStarting, vsockrpc.VerdictHealthy, vsockrpc.VerdictDegraded, vsockrpc.VerdictFailing, VerdictUnreachable, VerdictUnknown,
	}
	providerWords = []string{
		vsockrpc.GuestWaiting, vsockrpc.GuestApplying, vsockrpc.GuestInForce, vsockrpc.GuestRefused, vsockrpc.GuestRolledBack, vsockrpc.GuestUnreadable, other,
	}
	credentialWords = []string{"inForce", "shadowed", "foreign", "missing", "mismatch"}
	// codeWords have a section each in docs/operations.md.
	codeWords = []string{
		ReasonClockOff, ReasonProviderRolledBack, ReasonProviderRefused, ReasonProviderUnreadable,
		"maintenance", "smbiosUnreadable", "providerUnreachable", "diskFull", "memoryPressure", "systemStarting", "providerWaiting",
		"systemStopping", "systemdUnknown", "unitFailed", "rejectedInForce", "rolledBack", "interrupted", "missing", "foreign", "shadowed",
		"mismatch", "refused", codeConsumerStale, "consumerWaiting", "storeSwappable", "configFault", "smbiosDamaged", "notImported", "diskLow",
		"unknown", "confidential", "smbiosOff", "noSmbios",
	}
)

// codeConsumerStale is the code of a unit that runs with another value than the
// one in force.
const codeConsumerStale = "consumerStale"

// A digest is what is shown of a guest. Its texts are escaped and bounded, and
// no two of its entries have the same labels. It shares nothing with the report.
type digest struct {
	up             bool
	verdict        string
	truncated      bool
	lastContact    time.Time      // zero if never
	clockOffset    *time.Duration // nil if not known
	agent, systemd string         // versions; both empty without a report
	failedUnits    int            // -1 if not known
	reasons        map[string]int // by code
	credentials    []digestedCredential
	stale          []staleConsumer
	provider       string // its state, "" without one
	applies        *digestedApplies
}

type digestedCredential struct {
	name, state string
	installed   time.Time // zero if not known
}

type staleConsumer struct{ unit, credential string }

// digestedApplies counts sets by what came of them. Count, sum, in seconds, and
// buckets are a histogram's.
type digestedApplies struct {
	inForce, refused, rolledBack, failed uint64

	count   uint64
	sum     float64
	buckets map[float64]uint64
}

func newDigest(s *State) *digest {
	d := &digest{
		up: s.Reachable, verdict: knownWord(s.Verdict(), verdictWords), truncated: s.Trimmed,
		lastContact: s.LastContact, failedUnits: -1, reasons: map[string]int{},
	}
	if s.ClockOffset != nil {
		offset := *s.ClockOffset
		d.clockOffset = &offset
	}
	if p := s.Provider; p != nil {
		d.provider = knownWord(p.State, providerWords)
		d.applies = digestApplies(p.Applies)
	}
	reasons := s.Reasons()
	for i, r := range reasons {
		if i == digestReasons {
			d.truncated = true
			break
		}
		d.reasons[knownWord(r.Code, codeWords)]++
	}
	if s.Report != nil {
		d.report(s.Report)
	}
	return d
}

func (d *digest) report(r *vsockrpc.Report) {
	d.agent = shownAs(r.Version, digestVersion)
	if sd := r.Systemd; sd != nil {
		d.systemd = shownAs(sd.Version, digestVersion)
		d.failedUnits = len(sd.Failed)
	}
	names := map[string]bool{}
	stale := map[staleConsumer]bool{}
	isStale := func(unit, name string) {
		c := staleConsumer{shownAs(unit, digestLabel), shownAs(name, digestLabel)}
		switch {
		case stale[c]:
		case len(stale) == digestStale:
			d.truncated = true
		default:
			stale[c] = true
			d.stale = append(d.stale, c)
		}
	}
	for i := range r.Entries {
		e := &r.Entries[i]
		for j := range e.Consumers {
			if e.Consumers[j].Stale {
				isStale(e.Consumers[j].Unit, e.Name)
			}
		}
		if len(names) == digestCredentials {
			d.truncated = true
			continue
		}
		name := shownAs(e.Name, digestLabel)
		if names[name] {
			continue
		}
		names[name] = true
		installed, _ := time.Parse(time.RFC3339Nano, e.InstalledAt)
		d.credentials = append(d.credentials, digestedCredential{name: name, state: knownWord(e.State, credentialWords), installed: installed})
	}
	// A report that was trimmed may have lost the consumers, and not the reasons.
	for _, reason := range r.Reasons {
		if reason.Code == codeConsumerStale {
			isStale(reason.Unit, reason.Credential)
		}
	}
}

// digestApplies returns nil where there is nothing to show. Counters never fall
// below 0, and a histogram's buckets rise.
func digestApplies(a *vsockrpc.Applies) *digestedApplies {
	if a == nil {
		return nil
	}
	count := func(n int64) uint64 { return uint64(max(n, 0)) }
	d := &digestedApplies{
		refused: count(a.Refused), rolledBack: count(a.RolledBack), failed: count(a.Failed),
		count: count(a.Count), sum: float64(max(a.Sum, 0)) / 1e6, buckets: map[float64]uint64{},
	}
	d.inForce = d.count - min(d.count, d.refused+d.rolledBack+d.failed)
	bound, before := int64(math.MinInt64), uint64(0)
	for _, b := range a.Buckets {
		if b.LE <= bound || count(b.Count) < before || count(b.Count) > d.count {
			continue
		}
		bound, before = b.LE, count(b.Count)
		d.buckets[float64(b.LE)/1000] = before
	}
	return d
}

// knownWord returns s if it is one of the words, and other if it is not.
func knownWord(s string, words []string) string {
	if slices.Contains(words, s) {
		return s
	}
	return other
}

// shownAs returns s, which somebody else wrote, as a label: printable UTF-8 of at
// most so many bytes. Two texts may become the same.
func shownAs(s string, limit int) string {
	const mark = len("…")
	return vsockrpc.Escape(s, limit-mark)
}
