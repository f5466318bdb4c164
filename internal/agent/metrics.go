package agent

import (
	"context"
	"slices"

	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// metricPrefix is the name of the socket that systemd-report calls, in
	// /run/systemd/report/, and a dot.
	metricPrefix = "io.guestagent."
	// maxMetric bounds a string in a metric, in bytes. A path is the longest.
	maxMetric = 256
)

// metricFamilies are all that there are, without the prefix. What a name means
// does not change: it is in dashboards by then.
var metricFamilies = [...]vsockrpc.MetricFamily{
	{Name: "Credentials", Type: vsockrpc.MetricGauge, Description: "Number of credentials by state (state=inForce, shadowed, foreign, missing, mismatch; a state that none is in is left out)"},
	{Name: "DiskAvailable", Type: vsockrpc.MetricGauge, Description: "Per file system metric: bytes that are left for programs other than root's (object=path)"},
	{Name: "FailedUnits", Type: vsockrpc.MetricGauge, Description: "Number of units that have failed"},
	{Name: "Generation", Type: vsockrpc.MetricGauge, Description: "Generation of the credentials in force: each change in this boot has the next one"},
	{Name: "MemoryAvailable", Type: vsockrpc.MetricGauge, Description: "Bytes of memory that programs can have without swapping"},
	{Name: "Pressure", Type: vsockrpc.MetricGauge, Description: "Share of the last 10 s in which tasks waited, in hundredths of a percent (resource=cpu, io, memory; tasks=some, full, which is all of them)"},
	{Name: "ProviderState", Type: vsockrpc.MetricString, Description: "How the guest gets on with the host's provider: none (it has none), waiting, unreachable, inForce"},
	{Name: "Reasons", Type: vsockrpc.MetricGauge, Description: "Number of reasons for the verdict, and of remarks, by code (code=unitFailed, ...; a code that there is none of is left out)"},
	{Name: "StaleUnits", Type: vsockrpc.MetricGauge, Description: "Number of units that run, and may have another value of a credential than the one in force"},
	{Name: "Verdict", Type: vsockrpc.MetricString, Description: "How the guest is: starting, healthy, degraded, failing"},
	{Name: "WaitingUnits", Type: vsockrpc.MetricGauge, Description: "Number of units that wait for a credential that has not arrived"},
}

// metrics serves io.systemd.Metrics.
type metrics struct {
	report func(context.Context) (*vsockrpc.Report, error)
}

// iface is io.systemd.Metrics, ready to be served.
func (m metrics) iface() vsockrpc.Interface {
	return vsockrpc.Interface{
		Name:        vsockrpc.MetricsInterface,
		Description: vsockrpc.MetricsDescription,
		Methods:     map[string]vsockrpc.Handler{"List": m.list, "Describe": m.describe},
	}
}

func (m metrics) list(ctx context.Context, call *vsockrpc.Call) error {
	if err := wantsMore(call); err != nil {
		return err
	}
	r, err := m.report(ctx)
	if err != nil {
		return err
	}
	list := metricsOf(r)
	return replyEach(call, len(list), func(i int) vsockrpc.Marshaler { return &list[i] })
}

func (metrics) describe(_ context.Context, call *vsockrpc.Call) error {
	if err := wantsMore(call); err != nil {
		return err
	}
	return replyEach(call, len(metricFamilies), func(i int) vsockrpc.Marshaler {
		f := metricFamilies[i]
		f.Name = metricPrefix + f.Name
		return &f
	})
}

// wantsMore is for methods without parameters that have to be called with more.
func wantsMore(call *vsockrpc.Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	if !call.More {
		return vsockrpc.ErrExpectedMore
	}
	return nil
}

// replyEach sends n replies, of which there must be one.
func replyEach(call *vsockrpc.Call, n int, at func(int) vsockrpc.Marshaler) error {
	for i := range n - 1 {
		if err := call.ReplyMore(at(i)); err != nil {
			return err
		}
	}
	return call.Reply(at(n - 1))
}

// metricsOf are the values that a report has; what it does not know is left out.
// There is always one, the generation.
func metricsOf(r *vsockrpc.Report) []vsockrpc.Metric {
	var l metricList
	for _, e := range r.Entries {
		l.count("Credentials", "state", e.State)
	}
	for _, d := range r.Disks {
		l.number("DiskAvailable", d.Available).Object = vsockrpc.Escape(d.Path, maxMetric)
	}
	if r.Systemd != nil { // without it, it is not known who loads what either
		l.number("FailedUnits", int64(len(r.Systemd.Failed)))
		var stale []string
		for _, e := range r.Entries {
			for _, c := range e.Consumers {
				if c.Stale {
					stale = addOnce(stale, c.Unit)
				}
			}
		}
		l.number("StaleUnits", int64(len(stale)))
	}
	l.number("Generation", r.Generation)
	if r.Memory != nil {
		l.number("MemoryAvailable", r.Memory.Available)
	}
	if r.Pressure != nil {
		l.pressure("cpu", r.Pressure.CPU)
		l.pressure("io", r.Pressure.IO)
		l.pressure("memory", r.Pressure.Memory)
	}
	if r.Provider != nil {
		l.text("ProviderState", r.Provider.State)
	}
	for _, n := range r.Reasons {
		l.count("Reasons", "code", n.Code)
	}
	l.text("Verdict", r.Verdict)
	var waiting []string
	for _, w := range r.Waiting {
		waiting = addOnce(waiting, w.Unit)
	}
	l.number("WaitingUnits", int64(len(waiting)))
	return l
}

func addOnce(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

// A metricList is being made. Its methods take names without the prefix.
type metricList []vsockrpc.Metric

// number adds a number, and returns it until the next one is added.
func (l *metricList) number(name string, n int64, fields ...vsockrpc.MetricField) *vsockrpc.Metric {
	*l = append(*l, vsockrpc.Metric{Name: metricPrefix + name, Number: n, Fields: fields})
	return &(*l)[len(*l)-1]
}

// text adds a word, if there is one.
func (l *metricList) text(name, s string) {
	if s != "" {
		l.number(name, 0).Text = vsockrpc.Escape(s, maxMetric)
	}
}

// count adds one to the number of those that have the word in the field.
func (l *metricList) count(name, field, s string) {
	f := vsockrpc.MetricField{Name: field, Value: vsockrpc.Escape(s, maxMetric)}
	for i := range *l {
		if m := &(*l)[i]; len(m.Fields) == 1 && m.Fields[0] == f {
			m.Number++
			return
		}
	}
	l.number(name, 1, f)
}

// pressure adds a part of the pressure, if the kernel tells of it.
func (l *metricList) pressure(resource string, s *vsockrpc.Stall) {
	if s == nil {
		return
	}
	of := vsockrpc.MetricField{Name: "resource", Value: resource}
	l.number("Pressure", s.Full10, of, vsockrpc.MetricField{Name: "tasks", Value: "full"})
	l.number("Pressure", s.Some10, of, vsockrpc.MetricField{Name: "tasks", Value: "some"})
}
