package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/host/hosttest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// alerts is what is shipped for Prometheus.
const alerts = "../../dist/prometheus/alerts.yml"

// hanging is how many of the guests have one that hangs.
const hanging = 10

// A watched is an exporter as it is shipped, and the providers that it asks,
// which are this process's.
type watched struct {
	t         testing.TB
	providers []*hosttest.Provider // nil for one that hangs
	exporter  *exec.Cmd
	address   string
}

// statusOf is what the provider of guest i says. Every guest has four
// credentials and eight consumers, one of which is stale in the first guest.
func statusOf(i int) vsockrpc.ProviderStatus {
	at := time.Now().UTC().Format(time.RFC3339Nano)
	offset := int64(20)
	r := &vsockrpc.Report{
		Version: "test", BootID: "boot", MachineID: "machine", Generation: 1, Protocol: vsockrpc.Protocol, Verdict: vsockrpc.VerdictHealthy, Time: at,
		Hostname: name(i), Systemd: &vsockrpc.SystemdState{Version: "257", State: "running", Failed: []vsockrpc.FailedUnit{}},
		Refusals: []credential.Refusal{}, Reasons: []vsockrpc.Reason{},
	}
	for _, c := range []string{"api-key", "db", "tls-cert", "tls-key"} {
		e := vsockrpc.Entry{Name: c, Revision: "1", Source: credential.SourceProvider, InstalledAt: at, State: "inForce", Path: "/run/credstore/" + c}
		for _, unit := range []string{"web", "worker"} {
			e.Consumers = append(e.Consumers, vsockrpc.Consumer{
				Unit: unit + ".service", ActiveState: "active", As: c, Way: vsockrpc.WayFile, Revision: "1", Loaded: vsockrpc.LoadedInForce, Refresh: vsockrpc.ActionRestart,
			})
		}
		r.Entries = append(r.Entries, e)
	}
	if i == 0 {
		r.Verdict = vsockrpc.VerdictDegraded
		r.Entries[1].Consumers[0].Stale = true
		r.Reasons = append(r.Reasons, vsockrpc.Reason{Code: "consumerStale", Verdict: vsockrpc.VerdictDegraded, Unit: "web.service", Credential: "db"})
	}
	return vsockrpc.ProviderStatus{
		Name: name(i), Target: "vsock:3:1022", State: vsockrpc.GuestInForce, Since: at, LastContact: at, Report: r, ClockOffset: &offset,
		Applies: &vsockrpc.Applies{Count: 3, Sum: 30_000, Buckets: []vsockrpc.Bucket{
			{LE: 5, Count: 1}, {LE: 10, Count: 2}, {LE: 100, Count: 3}, {LE: 1000, Count: 3}, {LE: 10_000, Count: 3}, {LE: 100_000, Count: 3},
		}},
	}
}

func name(i int) string { return "g" + strconv.Itoa(i) }

// folders are one for sockets, and in it one for the names of VMs.
func folders(t testing.TB) (dir, vms string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "fleet") //nolint:usetesting // a socket's path is short
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	vms = filepath.Join(dir, "vms.d")
	must(t, os.Mkdir(vms, 0o700))
	return dir, vms
}

// watch starts an exporter of n guests, and waits until it has heard of all but
// those that hang.
func watch(t testing.TB, n int) *watched {
	t.Helper()
	w := &watched{t: t, providers: make([]*hosttest.Provider, n)}
	dir, vms := folders(t)
	for i := range n {
		var err error
		if i%hanging == hanging-1 {
			h, err := hosttest.Hostile(dir, name(i), "silent")
			must(t, err)
			t.Cleanup(h.Close)
		} else {
			w.providers[i], err = hosttest.StartProvider(dir, name(i), statusOf(i))
			must(t, err)
			t.Cleanup(w.providers[i].Close)
		}
		vm := fmt.Sprintf(`{"target": "unix:%s/none", "provider": {"socket": "%s/%s.sock"}}`, dir, dir, name(i))
		must(t, os.WriteFile(filepath.Join(vms, name(i)+".json"), []byte(vm), 0o600))
	}
	w.export(vms)
	w.await("all guests that do not hang", func() bool { return w.scrape().sum("guestagent_up") == n-n/hanging })
	return w
}

// export starts the exporter.
func (w *watched) export(vms string) {
	t := w.t
	t.Helper()
	guestctl := build(t, "guestctl")
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	defer l.Close()
	f, err := l.File()
	must(t, err)
	defer f.Close()
	w.address = l.Addr().String()
	// As systemd starts it: see start.
	w.exporter = exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh", guestctl, "exporter", "--vms", vms)
	w.exporter.Env = append(os.Environ(), "LISTEN_FDS=1")
	w.exporter.ExtraFiles = []*os.File{f}
	var stderr bytes.Buffer
	w.exporter.Stderr = &stderr
	must(t, w.exporter.Start())
	t.Cleanup(func() {
		if err := w.exporter.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		if err := w.exporter.Wait(); err != nil || stderr.Len() > 0 {
			t.Errorf("the exporter ended with %v\n%.2000s", err, &stderr)
		}
	})
}

func (w *watched) await(what string, cond func() bool) {
	w.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	for !cond() {
		select {
		case <-tick.C:
		case <-late:
			w.t.Fatalf("waiting in vain: %s", what)
		}
	}
}

// get asks an HTTP server on this machine.
func get(ctx context.Context, address, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %.200s", res.Status, body)
	}
	return body, err
}

// A scraped is what one scrape brought.
type scraped []byte

func (w *watched) scrape() scraped {
	w.t.Helper()
	body, err := get(w.t.Context(), w.address, "/metrics")
	must(w.t, err)
	return body
}

// sum adds up the samples of a metric, count counts them.
func (s scraped) sum(metric string) int {
	sum, _ := s.samples(metric)
	return sum
}

func (s scraped) count(metric string) int {
	_, count := s.samples(metric)
	return count
}

func (s scraped) samples(metric string) (sum, count int) {
	for line := range bytes.Lines(s) {
		if !bytes.HasPrefix(line, []byte(metric+"{")) {
			continue
		}
		value, _ := strconv.ParseFloat(string(bytes.TrimSpace(line[bytes.LastIndexByte(line, ' '):])), 64)
		sum, count = sum+int(value), count+1
	}
	return sum, count
}

// tool is a program of Debian's package prometheus.
func tool(t *testing.T, name string) string {
	t.Helper()
	if program, err := exec.LookPath(name); err == nil {
		return program
	}
	cache, err := os.UserCacheDir()
	must(t, err)
	program := filepath.Join(cache, "guestagent/deps/usr/bin", name)
	if _, err := os.Stat(program); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("there is no %s: %v", name, err)
		}
		t.Skipf("there is no %s: DEPS=1 tools/deps prometheus", name)
	}
	return program
}

// Of a thousand guests, those that hang cost the others nothing, nor whoever
// scrapes.
func TestExporter(t *testing.T) {
	n := 1000
	if testing.Short() {
		n = 50
	}
	w := watch(t, n)
	up := n - n/hanging
	s := w.scrape()
	for metric, want := range map[string][2]int{ // the number of samples, and their sum
		"guestagent_up":                                     {n, up},
		"guestagent_verdict":                                {6 * n, n},
		"guestagent_exporter_truncated":                     {n, 0},
		"guestagent_last_contact_timestamp_seconds":         {up, -1},
		"guestagent_credential_state":                       {4 * up, 4 * up},
		"guestagent_credential_installed_timestamp_seconds": {4 * up, -1},
		"guestagent_failed_units":                           {up, 0},
		"guestagent_provider_applies_total":                 {4 * up, 3 * up},
		"guestagent_provider_apply_duration_seconds_count":  {up, 3 * up},
		"guestagent_stale_consumer":                         {1, 1},
		"guestagent_reasons":                                {1, 1},
	} {
		if s.count(metric) != want[0] || want[1] >= 0 && s.sum(metric) != want[1] {
			t.Errorf("%s has %d samples, which add up to %d, want %d and %d", metric, s.count(metric), s.sum(metric), want[0], want[1])
		}
	}
	for _, line := range []string{
		`guestagent_stale_consumer{credential="db",unit="web.service",vm="g0"} 1`, `guestagent_verdict{verdict="degraded",vm="g0"} 1`,
		`guestagent_verdict{verdict="healthy",vm="g1"} 1`, fmt.Sprintf(`guestagent_verdict{verdict="unreachable",vm="%s"} 1`, name(n-1)),
	} {
		if !bytes.Contains(s, []byte(line+"\n")) {
			t.Errorf("there is no %s", line)
		}
	}
	if body, err := get(t.Context(), w.address, "/healthz"); err != nil {
		t.Errorf("GET /healthz: %q, %v", body, err)
	}

	// What changes is there with the next scrape but a few.
	changed := statusOf(0)
	changed.State = vsockrpc.GuestRolledBack
	w.providers[0].Set(changed)
	w.providers[1].Stop()
	w.await("the changes", func() bool {
		s := w.scrape()
		return bytes.Contains(s, []byte(`guestagent_provider_state{state="rolledBack",vm="g0"} 1`)) && s.sum("guestagent_up") == up-1
	})

	cmd := exec.Command(tool(t, "promtool"), "check", "metrics")
	cmd.Stdin = bytes.NewReader(w.scrape())
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// Guests that mean no good are shown as what they are, and cost the others and
// the exporter little.
func TestExporterHostile(t *testing.T) {
	w := &watched{t: t}
	dir, vms := folders(t)
	kinds := []string{"flood", "escapes", "garbage", "error", "reports", "large", "silent", "hangup"}
	guests := map[string]*hosttest.HostileGuest{}
	for _, kind := range kinds {
		var err error
		guests[kind], err = hosttest.Hostile(dir, kind, kind)
		must(t, err)
		t.Cleanup(guests[kind].Close)
		vm := fmt.Sprintf(`{"target": "unix:%s/%s.sock", "provider": {"socket": "%s/none"}}`, dir, kind, dir)
		must(t, os.WriteFile(filepath.Join(vms, kind+".json"), []byte(vm), 0o600))
	}
	good, err := hosttest.StartProvider(dir, "good", statusOf(1))
	must(t, err)
	t.Cleanup(good.Close)
	must(t, os.WriteFile(filepath.Join(vms, "good.json"), fmt.Appendf(nil, `{"target": "unix:%s/none", "provider": {"socket": "%s"}}`, dir, good.Socket), 0o600))
	w.export(vms)
	for _, kind := range kinds {
		select {
		case <-guests[kind].Called():
		case <-time.After(patience):
			t.Fatalf("%s was not called", kind)
		}
	}
	w.await("what they say", func() bool {
		s := w.scrape()
		shows := func(line string) bool { return bytes.Contains(s, []byte(line+"\n")) }
		return shows(`guestagent_verdict{verdict="healthy",vm="good"} 1`) && shows(`guestagent_exporter_truncated{vm="large"} 1`) &&
			shows(`guestagent_up{vm="reports"} 1`) && bytes.Contains(s, []byte(`credential="\\x1b]0;owned\\a\\u009b31m\\u202e\\x7f"`))
	})
	s := w.scrape()
	for _, kind := range []string{"flood", "garbage", "error", "silent", "hangup"} {
		if !bytes.Contains(s, fmt.Appendf(nil, "guestagent_verdict{verdict=\"unreachable\",vm=\"%s\"} 1\n", kind)) {
			t.Errorf("%s is not shown as unreachable", kind)
		}
	}
	if i := bytes.IndexFunc(s, func(r rune) bool { return r != '\n' && !strconv.IsPrint(r) }); i >= 0 {
		t.Errorf("the scrape has %q", s[max(i-50, 0):min(i+10, len(s))])
	}
	memory := resident(t, w.exporter.Process.Pid, "VmRSS")
	t.Logf("%d bytes, and the exporter has %d MiB", len(s), memory>>20)
	if len(s) > 1<<20 || memory > 256<<20 {
		t.Errorf("the scrape has %d bytes, and the exporter %d MiB", len(s), memory>>20)
	}
	cmd := exec.Command(tool(t, "promtool"), "check", "metrics")
	cmd.Stdin = bytes.NewReader(s)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// Prometheus itself scrapes, is asked, and has the alert.
func TestPrometheus(t *testing.T) {
	prometheus := tool(t, "prometheus")
	w := watch(t, 3)
	rules, err := filepath.Abs(alerts)
	must(t, err)
	dir := t.TempDir()
	config := fmt.Sprintf(`
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs:
  - {job_name: guestagent, static_configs: [{targets: [%q]}]}
`, rules, w.address)
	must(t, os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	address := l.Addr().String()
	must(t, l.Close())
	cmd := exec.Command(prometheus, "--config.file="+filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s", &log)
		}
	})
	for _, tt := range []struct {
		query string
		want  map[string]string
	}{
		{`guestagent_stale_consumer`, map[string]string{"vm": "g0", "unit": "web.service", "credential": "db"}},
		{`guestagent_verdict{vm="g1"} == 1`, map[string]string{"verdict": "healthy"}},
		{`ALERTS{alertname="CredentialStale"}`, map[string]string{"vm": "g0", "alertstate": "pending", "severity": "warning"}},
		{`histogram_quantile(0.5, guestagent_provider_apply_duration_seconds_bucket{vm="g1"})`, map[string]string{"vm": "g1"}},
	} {
		w.await(tt.query, func() bool {
			body, err := get(t.Context(), address, "/api/v1/query?query="+url.QueryEscape(tt.query))
			if err != nil {
				return false // it starts
			}
			var answer struct {
				Data struct {
					Result []struct {
						Metric map[string]string `json:"metric"`
					} `json:"result"`
				} `json:"data"`
			}
			must(t, json.Unmarshal(body, &answer))
			for _, r := range answer.Data.Result {
				for label, value := range tt.want {
					if r.Metric[label] != value {
						t.Fatalf("%s = %s, want %v", tt.query, body, tt.want)
					}
				}
			}
			return len(answer.Data.Result) == 1
		})
	}
}

// The alerts are sound, fire when they should, and lead to what to do.
func TestAlerts(t *testing.T) {
	text, err := os.ReadFile(alerts)
	must(t, err)
	docs, err := os.ReadFile("../../docs/operations.md")
	must(t, err)
	anchors := map[string]bool{}
	for line := range strings.Lines(string(docs)) {
		if heading := strings.TrimLeft(line, "#"); heading != line {
			anchors[anchor(strings.TrimSpace(heading))] = true
		}
	}
	_, first, _ := strings.Cut(string(text), "- alert: ")
	tests, err := os.ReadFile("testdata/alerts_test.yml")
	must(t, err)
	link := regexp.MustCompile(`runbook_url: https://github.com/guestagent/guestagent/blob/main/docs/operations\.md#(\S+)`)
	for rule := range strings.SplitSeq(first, "- alert: ") {
		alert, _, _ := strings.Cut(rule, "\n")
		for _, part := range []string{"severity: ", "summary: ", "description: "} {
			if !strings.Contains(rule, part) {
				t.Errorf("%s has no %s", alert, part)
			}
		}
		if m := link.FindStringSubmatch(rule); m == nil || !anchors[m[1]] {
			t.Errorf("%s has the link %q, for which docs/operations.md has no heading", alert, m)
		}
		if !strings.Contains(string(tests), "alertname: "+alert+"\n") {
			t.Errorf("testdata/alerts_test.yml does not see %s fire", alert)
		}
	}
	promtool := tool(t, "promtool")
	for _, args := range [][]string{{"check", "rules", alerts}, {"test", "rules", "testdata/alerts_test.yml"}} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// anchor is what GitHub makes of a heading.
func anchor(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z':
			return r
		}
		return -1
	}, strings.ToLower(heading))
}

// cpu is what /proc says a process has used so far.
func cpu(b *testing.B, pid int) time.Duration {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(b, err)
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		must(b, err)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100
}

// BenchmarkExporter is one scrape, of which one in ten guests hangs, as whoever
// scrapes sees it. cpu-ms/op is the exporter's, rest-cpu-ms/s its own use while
// nobody scrapes, over half a minute, and MiB what it has resident at first and
// in the end.
func BenchmarkExporter(b *testing.B) {
	const rests = 30 * time.Second
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("guests=%d", n), func(b *testing.B) {
			w := watch(b, n)
			pid := w.exporter.Process.Pid
			first := resident(b, pid, "VmRSS")
			before := cpu(b, pid)
			<-time.After(rests)
			rest := cpu(b, pid) - before
			before = cpu(b, pid)
			size := 0
			for b.Loop() {
				size = len(w.scrape())
			}
			b.ReportMetric(float64((cpu(b, pid)-before).Milliseconds())/float64(b.N), "cpu-ms/op")
			b.ReportMetric(float64(rest.Milliseconds())/rests.Seconds(), "rest-cpu-ms/s")
			b.ReportMetric(float64(size)/1024, "KiB/op")
			b.ReportMetric(float64(first)/(1<<20), "first-MiB")
			b.ReportMetric(float64(resident(b, pid, "VmRSS"))/(1<<20), "MiB")
		})
	}
}
