package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/guestagent/guestagent/internal/host/hosttest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// shown is what a scrape would show of guests with these states: each sample as
// NAME{LABEL=VALUE,...}, with its value, or of a histogram the number of its
// observations. It fails the test where the registry finds fault.
func shown(t *testing.T, states map[string]*State) map[string]float64 {
	t.Helper()
	e := &Exporter{Version: "test", watched: map[string]*watchedGuest{}}
	for name, s := range states {
		e.watched[name] = &watchedGuest{}
		e.watched[name].digest.Store(newDigest(s))
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(collector{e})
	families, err := registry.Gather()
	if err != nil {
		t.Fatalf("Gather() = %v", err)
	}
	samples := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				if v := l.GetValue(); len(v) > digestLabel || !utf8.ValidString(v) || strings.ContainsFunc(v, func(r rune) bool { return !unicode.IsPrint(r) }) {
					t.Errorf("%s has a label %s=%q", f.GetName(), l.GetName(), v)
				}
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			value := m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			samples[f.GetName()+"{"+strings.Join(labels, ",")+"}"] = value
		}
	}
	return samples
}

// samplesOf counts those of a metric.
func samplesOf(samples map[string]float64, metric string) int {
	n := 0
	for s := range samples {
		if strings.HasPrefix(s, "guestagent_"+metric+"{") {
			n++
		}
	}
	return n
}

func TestExporterShows(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	offset := -90 * time.Second
	s := &State{
		Guest: "web", Reachable: true, LastContact: at, ClockOffset: &offset, Trimmed: true,
		Provider: &vsockrpc.ProviderStatus{
			Name: "web", State: vsockrpc.GuestRolledBack,
			Applies: &vsockrpc.Applies{Count: 10, Refused: 1, RolledBack: 2, Failed: 3, Sum: 2_500_000, Buckets: []vsockrpc.Bucket{{LE: 10, Count: 4}, {LE: 100, Count: 9}}},
		},
		Report: &vsockrpc.Report{
			Version: "1.2.3", Verdict: vsockrpc.VerdictFailing,
			Systemd: &vsockrpc.SystemdState{Version: "257", State: "degraded", Failed: []vsockrpc.FailedUnit{{Unit: "a.service"}, {Unit: "b.service"}}},
			Entries: []vsockrpc.Entry{
				{Name: "db", State: "inForce", InstalledAt: "2026-01-02T03:04:05Z", Consumers: []vsockrpc.Consumer{{Unit: "web.service", Stale: true}, {Unit: "fresh.service"}}},
				{Name: "tls", State: "shadowed", InstalledAt: "yesterday"},
				{Name: "new", State: "wonderful"},
			},
			Reasons: []vsockrpc.Reason{
				{Code: "unitFailed", Unit: "a.service"},
				{Code: "unitFailed", Unit: "b.service"},
				{Code: "consumerStale", Unit: "web.service", Credential: "db"},
				{Code: "consumerStale", Unit: "cut.service", Credential: "gone"},
				{Code: "newer"},
			},
		},
	}
	got := shown(t, map[string]*State{"web": s, "down": {Guest: "down"}})
	want := map[string]float64{
		"guestagent_up{vm=web}":                                                   1,
		"guestagent_up{vm=down}":                                                  0,
		"guestagent_verdict{verdict=failing,vm=web}":                              1,
		"guestagent_verdict{verdict=healthy,vm=web}":                              0,
		"guestagent_verdict{verdict=unreachable,vm=down}":                         1,
		"guestagent_reasons{code=unitFailed,vm=web}":                              2,
		"guestagent_reasons{code=consumerStale,vm=web}":                           2,
		"guestagent_reasons{code=other,vm=web}":                                   1,
		"guestagent_reasons{code=providerRolledBack,vm=web}":                      1,
		"guestagent_reasons{code=clockOff,vm=web}":                                1,
		"guestagent_last_contact_timestamp_seconds{vm=web}":                       float64(at.Unix()),
		"guestagent_clock_offset_seconds{vm=web}":                                 -90,
		"guestagent_guest_info{agent_version=1.2.3,systemd_version=257,vm=web}":   1,
		"guestagent_failed_units{vm=web}":                                         2,
		"guestagent_credential_installed_timestamp_seconds{credential=db,vm=web}": float64(at.Unix()),
		"guestagent_credential_state{credential=db,state=inForce,vm=web}":         1,
		"guestagent_credential_state{credential=tls,state=shadowed,vm=web}":       1,
		"guestagent_credential_state{credential=new,state=other,vm=web}":          1,
		"guestagent_stale_consumer{credential=db,unit=web.service,vm=web}":        1,
		"guestagent_stale_consumer{credential=gone,unit=cut.service,vm=web}":      1,
		"guestagent_provider_state{state=rolledBack,vm=web}":                      1,
		"guestagent_provider_state{state=inForce,vm=web}":                         0,
		"guestagent_provider_applies_total{outcome=in_force,vm=web}":              4,
		"guestagent_provider_applies_total{outcome=refused,vm=web}":               1,
		"guestagent_provider_applies_total{outcome=rolled_back,vm=web}":           2,
		"guestagent_provider_applies_total{outcome=failed,vm=web}":                3,
		"guestagent_provider_apply_duration_seconds{vm=web}":                      10,
		"guestagent_exporter_truncated{vm=web}":                                   1,
		"guestagent_exporter_truncated{vm=down}":                                  0,
		"guestagent_exporter_registry_readable{}":                                 1,
	}
	for sample, value := range want {
		if v, ok := got[sample]; !ok || v != value {
			t.Errorf("%s = %v, %t, want %v", sample, v, ok, value)
		}
	}
	for metric, n := range map[string]int{
		"verdict": 2 * len(verdictWords), "provider_state": len(providerWords), "credential_installed_timestamp_seconds": 1, "stale_consumer": 2,
		"last_contact_timestamp_seconds": 1, "failed_units": 1, "guest_info": 1, "reasons": 5,
	} {
		if samplesOf(got, metric) != n {
			t.Errorf("%s has %d samples, want %d", metric, samplesOf(got, metric), n)
		}
	}
}

// A guest that says whatever it likes makes neither more nor longer series than
// it may, and none twice, which would cost the whole scrape.
func TestExporterHostile(t *testing.T) {
	report := &vsockrpc.Report{Version: strings.Repeat("v", 5000) + hosttest.Escapes, Verdict: hosttest.Escapes, Systemd: &vsockrpc.SystemdState{Version: "\xff\n\"}"}}
	long := strings.Repeat("x", 1000)
	for i := range 1000 {
		for _, name := range []string{hosttest.Escapes, `\x1b]0;owned\a` + hosttest.Escapes[9:], "\xff", `\xff`, "a\nb", `a\nb`, "", long + fmt.Sprint(i), fmt.Sprint("c", i), "c1"} {
			report.Entries = append(report.Entries, vsockrpc.Entry{
				Name: name, State: fmt.Sprint("state", i), InstalledAt: fmt.Sprintf("%04d-01-01T00:00:00Z", i),
				Consumers: []vsockrpc.Consumer{{Unit: name, Stale: true}, {Unit: name, Stale: true}, {Unit: fmt.Sprint("u", i), Stale: true}},
			})
		}
		report.Reasons = append(report.Reasons, vsockrpc.Reason{Code: fmt.Sprint("code", i), Unit: long}, vsockrpc.Reason{Code: codeConsumerStale, Unit: hosttest.Escapes, Credential: long})
	}
	applies := &vsockrpc.Applies{Count: -1, Refused: -5, RolledBack: 1 << 62, Failed: 1 << 62, Sum: -1}
	for i := range 64 {
		applies.Buckets = append(applies.Buckets, vsockrpc.Bucket{LE: int64(i%7) - 3, Count: int64(5 - i)})
	}
	offset := time.Duration(-1 << 63)
	hostile := &State{
		Reachable: true, Report: report, ClockOffset: &offset,
		Provider: &vsockrpc.ProviderStatus{State: hosttest.Escapes, Problem: hosttest.Escapes, Applies: applies},
	}
	got := shown(t, map[string]*State{"hostile": hostile, "good": {Reachable: true, Report: &vsockrpc.Report{Verdict: vsockrpc.VerdictHealthy}}})
	if got["guestagent_verdict{verdict=healthy,vm=good}"] != 1 || got["guestagent_verdict{verdict=unknown,vm=hostile}"] != 1 || got["guestagent_exporter_truncated{vm=hostile}"] != 1 {
		t.Error("the guests are not shown as what they are")
	}
	for metric, most := range map[string]int{
		"credential_state": digestCredentials, "credential_installed_timestamp_seconds": digestCredentials, "stale_consumer": digestStale, "reasons": len(codeWords) + 1,
	} {
		if n := samplesOf(got, metric); n == 0 || n > most {
			t.Errorf("%s has %d samples, want 1 to %d", metric, n, most)
		}
	}
	if len(got) > 2*digestCredentials+digestStale+200 {
		t.Errorf("there are %d samples", len(got))
	}
}

func FuzzExporterShows(f *testing.F) {
	f.Add("db", "web.service", "inForce", "consumerStale", "2026-01-02T03:04:05Z", int64(5), int64(10))
	f.Add("\xff", `\xff`, hosttest.Escapes, "", "9999-12-31T23:59:59.999999999+23:59", int64(-1), int64(1)<<62)
	f.Fuzz(func(t *testing.T, a, b, word, code, at string, n, m int64) {
		entry := func(name, unit string) vsockrpc.Entry {
			return vsockrpc.Entry{Name: name, State: word, InstalledAt: at, Consumers: []vsockrpc.Consumer{{Unit: unit, Stale: true}, {Unit: name, Stale: true}}}
		}
		offset := time.Duration(n)
		shown(t, map[string]*State{"vm": {
			Reachable: true, ClockOffset: &offset,
			Report: &vsockrpc.Report{
				Version: a, Verdict: word, Systemd: &vsockrpc.SystemdState{Version: b},
				Entries: []vsockrpc.Entry{entry(a, b), entry(b, a), entry(a, a)},
				Reasons: []vsockrpc.Reason{{Code: code}, {Code: code, Unit: a, Credential: b}, {Code: codeConsumerStale, Unit: b, Credential: a}},
			},
			Provider: &vsockrpc.ProviderStatus{State: word, Applies: &vsockrpc.Applies{
				Count: n, Refused: m, RolledBack: n, Failed: m, Sum: m, Buckets: []vsockrpc.Bucket{{LE: n, Count: m}, {LE: m, Count: n}, {LE: n, Count: n}, {LE: m, Count: m}},
			}},
		}})
	})
}

// Every code of a reason has a section in the documentation, by which it is
// known here, too.
func TestExporterCodes(t *testing.T) {
	text, err := os.ReadFile("../../docs/operations.md")
	must(t, err)
	_, section, _ := strings.Cut(string(text), "\n## Reasons\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var documented []string
	for line := range strings.Lines(section) {
		if code, ok := strings.CutPrefix(line, "### "); ok {
			documented = append(documented, strings.TrimSpace(code))
		}
	}
	slices.Sort(documented)
	if known := slices.Sorted(slices.Values(codeWords)); !slices.Equal(documented, known) {
		t.Errorf("docs/operations.md has the reasons\n%v, the exporter knows\n%v", documented, known)
	}
}

// startExporter runs an exporter of the VMs in dir, and returns its URL.
func startExporter(t *testing.T, dir string) (url string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	ready := make(chan struct{})
	e := &Exporter{
		Registry: Registry{Dirs: []string{dir}}, Listeners: []net.Listener{l}, Version: "test", Log: slog.New(slog.DiscardHandler),
		Ready: func() { close(ready) }, every: 10 * time.Millisecond,
	}
	ctx, cancel := context.WithCancel(t.Context())
	end := make(chan error, 1)
	go func() { end <- e.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-end; err != nil {
			t.Errorf("Run() = %v", err)
		}
		if e.watching.Load() {
			t.Error("it says that it watches after its end")
		}
	})
	<-ready
	return "http://" + l.Addr().String()
}

func fetch(t *testing.T, method, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	must(t, err)
	res, err := http.DefaultClient.Do(req)
	must(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	must(t, err)
	return res.StatusCode, string(body)
}

func TestExporterServes(t *testing.T) {
	url := startExporter(t, t.TempDir())
	for _, tt := range []struct {
		method, path string
		status       int
		body         string
	}{
		{"GET", "/healthz", 200, "ok"},
		{"GET", "/", 200, "/metrics"},
		{"GET", "/metrics", 200, "guestagent_exporter_registry_readable 1"},
		{"GET", "/metrics", 200, "process_cpu_seconds_total"},
		{"GET", "/other", 404, ""},
		{"POST", "/metrics", 405, ""},
	} {
		if status, body := fetch(t, tt.method, url+tt.path); status != tt.status || !strings.Contains(body, tt.body) {
			t.Errorf("%s %s = %d, %.200q, want %d, with %q", tt.method, tt.path, status, body, tt.status, tt.body)
		}
	}
}

// endless is a listener to which somebody connects all the time.
type endless struct{ net.Listener }

func (endless) Accept() (net.Conn, error) {
	c, _ := net.Pipe()
	return c, nil
}

func (endless) Close() error { return nil }

// More connections than there may be wait for one of them to end.
func TestExporterConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &limitedListener{Listener: endless{}, slots: make(chan struct{}, 2), closed: make(chan struct{})}
		accepted := make(chan net.Conn, 8)
		end := make(chan error, 1)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					end <- err
					return
				}
				accepted <- c
			}
		}()
		synctest.Wait()
		if len(accepted) != 2 {
			t.Fatalf("%d connections were accepted, want 2", len(accepted))
		}
		c := <-accepted
		_ = c.Close()
		_ = c.Close() // gives back no second one
		synctest.Wait()
		if len(accepted) != 2 {
			t.Errorf("%d connections are there after one has ended, want 2", len(accepted))
		}
		_ = l.Close()
		if err := <-end; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept() = %v after Close", err)
		}
	})
}

// What the registry says is followed, and one slow guest holds up nothing.
func TestExporterFollows(t *testing.T) {
	dir, vms := tempDir(t), tempDir(t)
	put := func(vm, target, provider string) {
		t.Helper()
		replace(t, filepath.Join(vms, vm+".json"), fmt.Sprintf(`{"target": "unix:%s", "provider": {"socket": "%s"}}`, target, provider))
	}
	status := vsockrpc.ProviderStatus{
		Name: "a", State: vsockrpc.GuestInForce, LastContact: time.Now().UTC().Format(time.RFC3339Nano),
		Report: &vsockrpc.Report{Version: "1", Verdict: vsockrpc.VerdictHealthy},
	}
	p, err := hosttest.StartProvider(dir, "a", status)
	must(t, err)
	defer p.Close()
	g, err := hosttest.Start(dir, "b")
	must(t, err)
	defer g.Close()
	h, err := hosttest.Hostile(dir, "c", "silent")
	must(t, err)
	defer h.Close()
	put("a", dir+"/none", p.Socket)
	put("b", g.Socket, dir+"/none")
	put("c", dir+"/c.sock", dir+"/c.sock")
	url := startExporter(t, vms)
	has := func(line string) func() bool {
		return func() bool {
			_, body := fetch(t, "GET", url+"/metrics")
			return slices.Contains(strings.Split(body, "\n"), line)
		}
	}
	await(t, "the guest with a provider", has(`guestagent_verdict{verdict="healthy",vm="a"} 1`))
	await(t, "the guest without one", has(`guestagent_verdict{verdict="healthy",vm="b"} 1`))
	await(t, "the one that hangs", has(`guestagent_up{vm="c"} 0`))
	status.State = vsockrpc.GuestRolledBack
	p.Set(status)
	await(t, "the provider's change", has(`guestagent_provider_state{state="rolledBack",vm="a"} 1`))
	put("d", g.Socket, dir+"/none")
	await(t, "a new guest", has(`guestagent_up{vm="d"} 1`))
	put("d", dir+"/none", p.Socket)
	await(t, "a guest that is elsewhere now", has(`guestagent_provider_state{state="rolledBack",vm="d"} 1`))

	// A file that is not understood is told of, and its guest still watched.
	replace(t, filepath.Join(vms, "a.json"), "{")
	await(t, "the file that is wrong", has(`guestagent_exporter_registry_readable 0`))
	if !has(`guestagent_up{vm="a"} 1`)() {
		t.Error("a guest is not watched any more since its file is wrong")
	}
	must(t, os.Remove(filepath.Join(vms, "a.json")))
	await(t, "the guest that is gone", func() bool {
		_, body := fetch(t, "GET", url+"/metrics")
		return !strings.Contains(body, `vm="a"`)
	})
	if !has(`guestagent_exporter_registry_readable 1`)() {
		t.Error("the registry still counts as not readable")
	}
}
