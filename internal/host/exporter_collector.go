package host

import (
	"maps"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The outcomes of a set that a provider handed over, as labels.
const (
	outcomeInForce    = "in_force"
	outcomeRefused    = "refused"
	outcomeRolledBack = "rolled_back"
	outcomeFailed     = "failed"
)

func newDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("guestagent_"+name, help, append([]string{"vm"}, labels...), nil)
}

// The metrics of a guest, and of the exporter.
var (
	descUp          = newDesc("up", "Whether the guest answers.")
	descVerdict     = newDesc("verdict", "How the guest is: 1 for the verdict that holds, 0 for the others.", "verdict")
	descReasons     = newDesc("reasons", "What is not as it should be in the guest, by code.", "code")
	descContact     = newDesc("last_contact_timestamp_seconds", "When the guest was heard last, by the host's clock.")
	descClock       = newDesc("clock_offset_seconds", "By how much the guest's clock was ahead of the host's.")
	descInfo        = newDesc("guest_info", "The versions of what runs in the guest; always 1.", "agent_version", "systemd_version")
	descFailed      = newDesc("failed_units", "Units that have failed in the guest.")
	descInstalled   = newDesc("credential_installed_timestamp_seconds", "When the credential's value was put in force, by the guest's clock.", "credential")
	descCredential  = newDesc("credential_state", "In which state the credential is; always 1.", "credential", "state")
	descStale       = newDesc("stale_consumer", "A unit that runs with another value of the credential than the one in force; always 1.", "unit", "credential")
	descProvider    = newDesc("provider_state", "How the VM's provider gets on: 1 for the state that holds, 0 for the others.", "state")
	descApplies     = newDesc("provider_applies_total", "Sets that the provider has handed over since it started, by what came of them.", "outcome")
	descApplySecond = newDesc("provider_apply_duration_seconds", "How long the guest took to put a set in force, units that were refreshed included.")
	descTruncated   = newDesc("exporter_truncated", "Whether the guest says more than is shown.")

	descReadable = prometheus.NewDesc("guestagent_exporter_registry_readable", "Whether the files of all VMs could be read.", nil, nil)
	descBuild    = prometheus.NewDesc("guestagent_exporter_build_info", "The exporter's version; always 1.", []string{"version", "goversion"}, nil)

	allDescs = []*prometheus.Desc{
		descUp, descVerdict, descReasons, descContact, descClock, descInfo, descFailed, descInstalled, descCredential, descStale,
		descProvider, descApplies, descApplySecond, descTruncated, descReadable, descBuild,
	}
)

// A collector has the metrics of an exporter's guests.
type collector struct{ e *Exporter }

var _ prometheus.Collector = collector{}

func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range allDescs {
		ch <- d
	}
}

func (c collector) Collect(ch chan<- prometheus.Metric) {
	c.e.mu.Lock()
	readable, watched := !c.e.faulty, maps.Clone(c.e.watched)
	c.e.mu.Unlock()
	out := output{ch}
	out.gauge(descReadable, truth(readable))
	out.gauge(descBuild, 1, shownAs(c.e.Version, digestVersion), runtime.Version())
	for name, w := range watched {
		w.digest.Load().collect(out, name)
	}
}

func (d *digest) collect(out output, vm string) {
	out.gauge(descUp, truth(d.up), vm)
	out.states(descVerdict, d.verdict, verdictWords, vm)
	out.gauge(descTruncated, truth(d.truncated), vm)
	out.time(descContact, d.lastContact, vm)
	if d.clockOffset != nil {
		out.gauge(descClock, d.clockOffset.Seconds(), vm)
	}
	if d.agent != "" || d.systemd != "" {
		out.gauge(descInfo, 1, vm, d.agent, d.systemd)
	}
	if d.failedUnits >= 0 {
		out.gauge(descFailed, float64(d.failedUnits), vm)
	}
	for code, n := range d.reasons {
		out.gauge(descReasons, float64(n), vm, code)
	}
	for _, c := range d.credentials {
		out.gauge(descCredential, 1, vm, c.name, c.state)
		out.time(descInstalled, c.installed, vm, c.name)
	}
	for _, s := range d.stale {
		out.gauge(descStale, 1, vm, s.unit, s.credential)
	}
	if d.provider != "" {
		out.states(descProvider, d.provider, providerWords, vm)
	}
	if a := d.applies; a != nil {
		out.counter(descApplies, a.inForce, vm, outcomeInForce)
		out.counter(descApplies, a.refused, vm, outcomeRefused)
		out.counter(descApplies, a.rolledBack, vm, outcomeRolledBack)
		out.counter(descApplies, a.failed, vm, outcomeFailed)
		out.send(descApplySecond)(prometheus.NewConstHistogram(descApplySecond, a.count, a.sum, a.buckets, vm))
	}
}

// An output takes metrics.
type output struct{ ch chan<- prometheus.Metric }

// send takes what a constructor returns. It does not fail with labels that a
// digest has; if it did, the scrape would say so and have the rest.
func (o output) send(desc *prometheus.Desc) func(prometheus.Metric, error) {
	return func(m prometheus.Metric, err error) {
		if err != nil {
			m = prometheus.NewInvalidMetric(desc, err)
		}
		o.ch <- m
	}
}

func (o output) gauge(desc *prometheus.Desc, value float64, labels ...string) {
	o.send(desc)(prometheus.NewConstMetric(desc, prometheus.GaugeValue, value, labels...))
}

func (o output) counter(desc *prometheus.Desc, value uint64, labels ...string) {
	o.send(desc)(prometheus.NewConstMetric(desc, prometheus.CounterValue, float64(value), labels...))
}

// time is nothing where the time is not known.
func (o output) time(desc *prometheus.Desc, t time.Time, labels ...string) {
	if !t.IsZero() {
		o.gauge(desc, float64(t.UnixMilli())/1000, labels...)
	}
}

// states has one metric for each word.
func (o output) states(desc *prometheus.Desc, holds string, words []string, vm string) {
	for _, w := range words {
		o.gauge(desc, truth(w == holds), vm, w)
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
