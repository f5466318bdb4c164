package vsockrpc

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
)

func TestMetrics(t *testing.T) {
	for want, m := range map[string]Marshaler{
		`{"name":"a.b.C","description":"Number of C","type":"gauge"}`: &MetricFamily{Name: "a.b.C", Description: "Number of C", Type: MetricGauge},
		`{"name":"a.b.C","value":"word"}`:                             &Metric{Name: "a.b.C", Text: "word"},
		`{"name":"a.b.C","value":0}`:                                  &Metric{Name: "a.b.C"},
		`{"name":"a.b.C","value":-1,"object":"/srv/\"x\""}`:           &Metric{Name: "a.b.C", Number: -1, Object: `/srv/"x"`},
		`{"name":"a.b.C","value":9007199254740993,"object":"o","fields":{"k":"v","l":"\u001b"}}`: &Metric{
			Name: "a.b.C", Number: 9007199254740993, Object: "o", Fields: []MetricField{{"k", "v"}, {"l", "\x1b"}},
		},
	} {
		var e Encoder
		e.raw("{")
		m.EncodeTo(&e)
		e.raw("}")
		if got := string(e.buf); got != want {
			t.Errorf("%+v is encoded as %s, want %s", m, got, want)
		}
	}
}

// What is sent has the keys of the description.
func TestMetricsDescription(t *testing.T) {
	// parseIDL knows neither enumerations nor maps.
	enum := "type MetricFamilyType (\n  counter,\n  gauge,\n  string\n)\n"
	text := strings.Replace(MetricsDescription, "?[string]string", "?fields", 1)
	if !strings.Contains(text, enum) || text == MetricsDescription {
		t.Fatalf("the description is another:\n%s", MetricsDescription)
	}
	x := parseIDL(t, strings.Replace(text, enum, "", 1))
	if x.name != MetricsInterface || len(x.methods) != 2 || len(x.errors["NoSuchMetric"]) != 0 {
		t.Errorf("%s has %v, %v", x.name, x.methods, x.errors)
	}
	full := &Metric{Name: "a.b.C", Text: "word", Object: "o", Fields: []MetricField{{"k", "v"}}}
	for method, m := range map[string]Marshaler{MethodMetricsList: full, MethodMetricsDescribe: &MetricFamily{Name: "a.b.C", Description: "d", Type: MetricString}} {
		var e Encoder
		e.raw("{")
		m.EncodeTo(&e)
		e.raw("}")
		var object map[string]json.RawMessage
		if err := json.Unmarshal(e.buf, &object); err != nil {
			t.Fatal(err)
		}
		_, name := splitMethod(method)
		described, ok := x.methods[name]
		var want []string
		for _, f := range described.out {
			want = append(want, f.name)
		}
		slices.Sort(want)
		if got := slices.Sorted(maps.Keys(object)); !ok || len(described.in) != 0 || !slices.Equal(got, want) {
			t.Errorf("%s sends %v, want %v", method, got, want)
		}
	}
}
