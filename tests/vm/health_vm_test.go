package vm_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// storeFill is in a small file system of its own, which is there from the boot on: the agent's sandbox sees it read-only.
const storeFill = "/nix/store/fill"

// TestHealthVM has a guest on real vsock fall ill in the ways that a verdict knows, and get well, while the host watches.
func TestHealthVM(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	files := slices.Concat(agentFiles(t), wanted("local-fs.target", "nix-store.mount", lines(
		"[Mount]", "What=tmpfs", "Where=/nix/store", "Type=tmpfs", "Options=size=16M")), []vm.File{
		// The device chooses the port itself.
		{Path: agentConfig, Content: []byte(`{"peer": {"privilegedPort": "ignored"}}`)},
	})
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		vsock := vmtest.VsockPath(t)
		w := watchGuest(t, "vsock-mux:"+vsock)
		w.await(t, "it is not there", func(s sight) bool { return s.Verdict == "unreachable" && s.Error != nil })
		w.m = vmtest.Boot(t, vm.Config{Image: vmtest.Image(t, release), Vsock: &vm.VsockConfig{Path: vsock}, Overlay: files})
		var boot []string
		w.await(t, "it has booted", func(s sight) bool {
			boot = append(boot, s.Verdict)
			if s.Verdict != "unreachable" && s.Verdict != vsockrpc.VerdictStarting && !w.well(s) {
				t.Errorf("while it boots, the watch says %s", s)
			}
			return w.well(s)
		})
		t.Logf("the watch of the boot: %s", strings.Join(boot, ", "))
		if s, status := w.status(t); !w.well(s) || status != 0 {
			t.Fatalf("guestctl status: %s, exit status %d, want it healthy", s, status)
		}
		addUnits(t, w.m, healthUnits())
		for _, ill := range illnesses(w) {
			if !t.Run(ill.name, func(t *testing.T) { w.test(t, ill) }) {
				w.untilWell(t)
			}
		}
		t.Run("metrics", func(t *testing.T) { testMetrics(t, w.m, release) })
		t.Run("memory", func(t *testing.T) { wantSmall(t, w.m) })
		wantSilence(t, w.m)
	})
}

// The units of these tests.
func healthUnits() map[string]string {
	late := loads(bySocket("late") + "StartLimitIntervalSec=0")
	return map[string]string{
		"ill.service":  lines("[Service]", "Type=oneshot", "ExecStart=/bin/false"),
		"used.service": loads("LoadCredential=used"),
		"late.service": late, "late@.service": late,
		// It asks for more memory than it may have, and is made to wait for what nobody has. Should that not hold it up,
		// it ends before the guest has none left.
		"hungry.service": lines("[Service]", "ExecStart=/usr/bin/tail /dev/zero", "MemoryHigh=20M", "MemoryMax=400M"),
	}
}

// illnesses are the ways that a guest falls ill, and gets well.
func illnesses(w *watched) []illness {
	var (
		degraded = []string{vsockrpc.VerdictDegraded}
		failing  = []string{vsockrpc.VerdictFailing}
	)
	run := func(argv ...string) func(*testing.T) {
		return func(t *testing.T) {
			t.Helper()
			vmtest.Run(t, w.m, argv...)
		}
	}
	shell := func(script string) func(*testing.T) { return run("sh", "-c", script) }
	push := func(name string) func(*testing.T) {
		return func(t *testing.T) {
			t.Helper()
			w.push(t, name, newValue())
		}
	}
	// What comes before makes the agent learn anew what it follows.
	fails := func(name string, prepare func(*testing.T)) illness {
		return illness{
			name: name, prepare: prepare, reason: vsockrpc.Reason{Code: "unitFailed", Unit: "ill.service"}, verdicts: degraded,
			begin: run("systemctl", "start", "--no-block", "ill.service"), heal: run("systemctl", "reset-failed", "ill.service"),
		}
	}
	return []illness{
		fails("unit", nil),
		{
			name: "stale consumer", reason: vsockrpc.Reason{Code: "consumerStale", Unit: "used.service", Credential: "used"}, verdicts: degraded,
			prepare: func(t *testing.T) {
				push("used")(t)
				start(t, w.m, "used.service")
			},
			begin: push("used"),
			heal: func(t *testing.T) {
				t.Helper()
				w.mustRun(t, nil, "refresh", "--timeout=1m", w.target, "used")
			},
		},
		{
			name: "disk filling up", reason: vsockrpc.Reason{Code: "diskLow"}, verdicts: degraded,
			begin: shell("head --bytes=15M /dev/zero > " + storeFill), heal: run("rm", storeFill),
		},
		{
			name: "full disk", reason: vsockrpc.Reason{Code: "diskFull"}, verdicts: failing,
			begin: shell("cat /dev/zero > " + storeFill + " || true"), heal: run("rm", storeFill),
		},
		{
			// Where nothing else has anything to do, all that there is waits.
			name: "memory pressure", reason: vsockrpc.Reason{Code: "memoryPressure"}, verdicts: slices.Concat(degraded, failing),
			begin: run("systemctl", "start", "hungry.service"), heal: run("systemctl", "stop", "hungry.service"),
		},
		{
			name: "waiting consumer", reason: vsockrpc.Reason{Code: "consumerWaiting", Unit: "late.service", Credential: "late"}, verdicts: degraded,
			begin: run("systemctl", "start", "--no-block", "late.service"), heal: push("late"),
		},
		{
			name: "shadowed credential", reason: vsockrpc.Reason{Code: "shadowed", Credential: "covered"}, verdicts: degraded,
			// systemd 252 makes no such folder.
			prepare: push("covered"), begin: shell("mkdir -p /etc/credstore && echo other > /etc/credstore/covered"), heal: run("rm", "/etc/credstore/covered"),
		},
		fails("unit after systemd was executed anew", run("systemctl", "daemon-reexec")),
		fails("unit after the agent was killed", func(t *testing.T) { killAgent(t, w.m) }),
	}
}

// testMetrics has systemd's own client show our figures beside its own.
func testMetrics(t *testing.T, m *vm.Machine, release vm.Release) {
	if release.Systemd < 260 {
		return // there is none
	}
	const report = "/usr/lib/systemd/systemd-report"
	// Each in an object of its own, in a text of RFC 7464 or without its separators.
	metrics := func(verb string) map[string][]map[string]any {
		t.Helper()
		found := map[string][]map[string]any{}
		d := json.NewDecoder(strings.NewReader(strings.ReplaceAll(vmtest.Run(t, m, report, verb, "--json=short"), "\x1e", "")))
		for d.More() {
			var v map[string]any
			if err := d.Decode(&v); err != nil {
				t.Fatalf("what systemd-report %s says: %v", verb, err)
			}
			name, _ := v["name"].(string)
			found[name] = append(found[name], v)
		}
		return found
	}
	families, values := metrics("describe"), metrics("metrics")
	ours := 0
	for name, f := range families {
		if strings.HasPrefix(name, "io.guestagent.") {
			if ours++; len(f) != 1 || f[0]["description"] == "" || f[0]["type"] == "" {
				t.Errorf("systemd-report describes %s as %v", name, f)
			}
		}
	}
	for name := range values {
		if strings.HasPrefix(name, "io.guestagent.") && families[name] == nil {
			t.Errorf("systemd-report has values of %s, which it does not describe", name)
		}
	}
	if len(values["io.systemd.Manager.UnitsTotal"])+len(families) == ours {
		t.Errorf("systemd-report has nothing of systemd's own: %v", families)
	}
	for name, want := range map[string]any{
		"io.guestagent.Verdict": vsockrpc.VerdictHealthy, "io.guestagent.FailedUnits": 0.0, "io.guestagent.StaleUnits": 0.0,
		"io.guestagent.ProviderState": vsockrpc.ProviderNone,
	} {
		if got := values[name]; len(got) != 1 || got[0]["value"] != want {
			t.Errorf("systemd-report says of %s: %v, want %v", name, got, want)
		}
	}
	if len(values["io.guestagent.DiskAvailable"]) == 0 || len(values["io.guestagent.Credentials"]) == 0 {
		t.Errorf("systemd-report has no disks or credentials: %v", values)
	}
}
