package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/vsockrpc"
)

// A metricReply is a reply as systemd-report reads it.
type metricReply struct {
	Error      string
	Continues  bool
	Parameters struct {
		Name, Object, Type, Description string
		Fields                          map[string]string
		Value                           any
	}
}

// callMetrics has the interface on a socket, calls a method of it, and returns
// all replies.
func callMetrics(t *testing.T, method string, more bool, report func(context.Context) (*vsockrpc.Report, error)) []metricReply {
	t.Helper()
	path := filepath.Join(t.TempDir(), "io.guestagent")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &vsockrpc.Server{
		Interfaces: []vsockrpc.Interface{metrics{report}.iface()},
		Authorize:  func(vsockrpc.Peer) error { return nil },
	}
	done := make(chan error)
	go func() { done <- s.Serve(context.Background(), l) }() //nolint:usetesting // it is ended below
	defer func() {
		s.Close()
		<-done
	}()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, `{"method":%q,"parameters":{},"more":%t}`+"\x00", method, more); err != nil {
		t.Fatal(err)
	}
	var replies []metricReply
	for in := bufio.NewReader(c); ; {
		line, err := in.ReadBytes(0)
		if err != nil {
			t.Fatalf("reading the replies of %s: %v", method, err)
		}
		var r metricReply
		if err := json.Unmarshal(line[:len(line)-1], &r); err != nil {
			t.Fatalf("%s answers %q: %v", method, line, err)
		}
		if replies = append(replies, r); !r.Continues {
			return replies
		}
	}
}

// row is a value in one line.
func (r metricReply) row() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %v", r.Parameters.Name, r.Parameters.Value)
	if r.Parameters.Object != "" {
		fmt.Fprintf(&b, " %q", r.Parameters.Object)
	}
	for _, k := range slices.Sorted(maps.Keys(r.Parameters.Fields)) {
		fmt.Fprintf(&b, " %s=%q", k, r.Parameters.Fields[k])
	}
	return b.String()
}

// rows are values in lines, sorted: systemd-report sorts them itself.
func rows(replies []metricReply) []string {
	var list []string
	for _, r := range replies {
		list = append(list, r.row())
	}
	slices.Sort(list)
	return list
}

// fullReport knows everything.
func fullReport() *vsockrpc.Report {
	stale := []vsockrpc.Consumer{{Unit: "a.service", Stale: true}, {Unit: "b.service"}}
	return &vsockrpc.Report{
		Verdict: vsockrpc.VerdictDegraded, Generation: 7,
		Entries: []vsockrpc.Entry{
			{Name: "x", State: "inForce", Consumers: stale}, {Name: "y", State: "missing"}, {Name: "z", State: "inForce", Consumers: stale},
		},
		Reasons:  []vsockrpc.Reason{{Code: "unitFailed"}, {Code: "unitFailed"}, {Code: "consumerStale"}, {Code: "noSmbios"}},
		Provider: &vsockrpc.ProviderState{State: vsockrpc.ProviderInForce},
		Systemd:  &vsockrpc.SystemdState{Failed: []vsockrpc.FailedUnit{{Unit: "f.service"}, {Unit: "g.service"}}},
		Waiting:  []vsockrpc.Waiting{{Unit: "w.service", Name: "m"}, {Unit: "w.service", Name: "n"}},
		Memory:   &vsockrpc.Memory{Total: 2048, Available: 1024},
		Pressure: &vsockrpc.Pressure{CPU: &vsockrpc.Stall{Some10: 123}, Memory: &vsockrpc.Stall{Some10: 20, Full10: 10}},
		Disks:    []vsockrpc.Disk{{Path: "/", Available: 4096}, {Path: "/srv", Available: 0}},
	}
}

func TestMetricsList(t *testing.T) {
	hostile := "in\x1b[2J\n\"Force"
	for _, tt := range []struct {
		name   string
		report *vsockrpc.Report
		want   []string
	}{
		{"all is known", fullReport(), []string{
			`io.guestagent.Credentials 2 state="inForce"`,
			`io.guestagent.Credentials 1 state="missing"`,
			`io.guestagent.DiskAvailable 4096 "/"`,
			`io.guestagent.DiskAvailable 0 "/srv"`,
			`io.guestagent.FailedUnits 2`,
			`io.guestagent.Generation 7`,
			`io.guestagent.MemoryAvailable 1024`,
			`io.guestagent.Pressure 0 resource="cpu" tasks="full"`,
			`io.guestagent.Pressure 123 resource="cpu" tasks="some"`,
			`io.guestagent.Pressure 10 resource="memory" tasks="full"`,
			`io.guestagent.Pressure 20 resource="memory" tasks="some"`,
			`io.guestagent.ProviderState inForce`,
			`io.guestagent.Reasons 1 code="consumerStale"`,
			`io.guestagent.Reasons 1 code="noSmbios"`,
			`io.guestagent.Reasons 2 code="unitFailed"`,
			`io.guestagent.StaleUnits 1`,
			`io.guestagent.Verdict degraded`,
			`io.guestagent.WaitingUnits 1`,
		}},
		{"nothing is known", &vsockrpc.Report{}, []string{`io.guestagent.Generation 0`, `io.guestagent.WaitingUnits 0`}},
		{"no unit failed", &vsockrpc.Report{Systemd: &vsockrpc.SystemdState{}}, []string{
			`io.guestagent.FailedUnits 0`, `io.guestagent.Generation 0`, `io.guestagent.StaleUnits 0`, `io.guestagent.WaitingUnits 0`,
		}},
		{"words of others", &vsockrpc.Report{
			Verdict: hostile, Provider: &vsockrpc.ProviderState{State: hostile}, Disks: []vsockrpc.Disk{{Path: "/" + strings.Repeat("\u202e", 1000)}},
			Entries: []vsockrpc.Entry{{State: hostile}}, Reasons: []vsockrpc.Reason{{Code: hostile}},
		}, []string{
			`io.guestagent.Credentials 1 state="in\\x1b[2J\\n\"Force"`,
			`io.guestagent.DiskAvailable 0 "/` + strings.Repeat(`\\u202e`, 42) + `…"`,
			`io.guestagent.Generation 0`,
			`io.guestagent.ProviderState in\x1b[2J\n"Force`,
			`io.guestagent.Reasons 1 code="in\\x1b[2J\\n\"Force"`,
			`io.guestagent.Verdict in\x1b[2J\n"Force`,
			`io.guestagent.WaitingUnits 0`,
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := rows(callMetrics(t, vsockrpc.MethodMetricsList, true, func(context.Context) (*vsockrpc.Report, error) { return tt.report, nil }))
			slices.Sort(tt.want)
			if !slices.Equal(got, tt.want) {
				t.Errorf("List =\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
		})
	}
}

// Describe has what List may have, each once and of the type that its values
// are of.
func TestMetricsDescribe(t *testing.T) {
	none := func(context.Context) (*vsockrpc.Report, error) { return nil, errors.New("it is not asked for") }
	types := map[string]string{}
	for _, r := range callMetrics(t, vsockrpc.MethodMetricsDescribe, true, none) {
		p := r.Parameters
		if types[p.Name] != "" || p.Description == "" || r.Error != "" {
			t.Errorf("Describe has %+v", r)
		}
		types[p.Name] = p.Type
	}
	listed := map[string]string{}
	for _, r := range callMetrics(t, vsockrpc.MethodMetricsList, true, func(context.Context) (*vsockrpc.Report, error) { return fullReport(), nil }) {
		listed[r.Parameters.Name] = vsockrpc.MetricGauge
		if _, ok := r.Parameters.Value.(string); ok {
			listed[r.Parameters.Name] = vsockrpc.MetricString
		}
	}
	if !maps.Equal(types, listed) {
		t.Errorf("Describe has %v, want what List has, %v", types, listed)
	}
	for name := range types {
		// What systemd-report demands of a name: the socket's, a dot, a word.
		word, ok := strings.CutPrefix(name, "io.guestagent.")
		if !ok || strings.Trim(word, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") != "" || word == "" {
			t.Errorf("%q is no name of a metric", name)
		}
	}
}

func TestMetricsErrors(t *testing.T) {
	fails := func(context.Context) (*vsockrpc.Report, error) { return nil, errors.New("no store") }
	for _, tt := range []struct {
		method string
		more   bool
		want   string
	}{
		{vsockrpc.MethodMetricsList, false, "org.varlink.service.ExpectedMore"},
		{vsockrpc.MethodMetricsDescribe, false, "org.varlink.service.ExpectedMore"},
		{vsockrpc.MethodMetricsList, true, "io.guestagent.InternalError"},
	} {
		if got := callMetrics(t, tt.method, tt.more, fails); len(got) != 1 || got[0].Error != tt.want {
			t.Errorf("%s with more %t answers %+v, want %s", tt.method, tt.more, got, tt.want)
		}
	}
}
