package vsockrpc

import _ "embed" // the description of the interface

// MetricsDescription is the definition of io.systemd.Metrics, which is
// systemd's.
//
//go:embed io.systemd.Metrics.varlink
var MetricsDescription string

// The full names of io.systemd.Metrics and what it has. Whoever serves it answers
// each method with one [Metric] or [MetricFamily] in a reply, and only with more.
const (
	MetricsInterface      = "io.systemd.Metrics"
	MethodMetricsList     = MetricsInterface + ".List"
	MethodMetricsDescribe = MetricsInterface + ".Describe"
)

// The types of a [MetricFamily].
const (
	MetricGauge  = "gauge"  // a number that goes up and down
	MetricString = "string" // a word
)

// A MetricFamily is what there may be values of.
type MetricFamily struct {
	// Name is the name of the socket that it is served on, a dot and a word.
	// systemd-report takes no other.
	Name        string
	Description string // one line
	Type        string // MetricGauge or MetricString
}

// A Metric is a value.
type Metric struct {
	Name string // of its family
	// Text is the value in a family of strings, and not empty; Number is it in any
	// other.
	Text   string
	Number int64
	// Object is what it is about, empty if the family has one value.
	Object string
	// Fields tell the values of a family apart that Object does not. No name is in
	// it twice.
	Fields []MetricField
}

// A MetricField is a name and its value.
type MetricField struct{ Name, Value string }

// EncodeTo encodes the family.
func (f *MetricFamily) EncodeTo(e *Encoder) {
	e.String("name", f.Name)
	e.String("description", f.Description)
	e.String("type", f.Type)
}

// EncodeTo encodes the value.
func (m *Metric) EncodeTo(e *Encoder) {
	e.String("name", m.Name)
	if m.Text != "" {
		e.String("value", m.Text)
	} else {
		e.Int("value", m.Number)
	}
	e.OptString("object", m.Object)
	if len(m.Fields) > 0 {
		e.Object("fields", func() {
			for _, f := range m.Fields {
				e.String(f.Name, f.Value)
			}
		})
	}
}
