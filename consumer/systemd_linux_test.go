package consumer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// These tests speak with a real PID 1. They write units to /run, whose names
// begin with gatest-, and remove them again.

// liveConfig is where things are on a real system, but for the socket: the
// agent may be running.
var liveConfig = Config{Bus: "/run/systemd/private", Store: "/run/credstore", Socket: "/run/gatest/credentials.sock"}

// liveTimeout bounds every test here. Nothing waits for it to pass.
const liveTimeout = 2 * time.Minute

// live returns a connection to the real PID 1, in a folder /run/gatest and a
// store with some credentials.
func live(t testing.TB) (context.Context, *Conn) {
	t.Helper()
	if os.Getenv("GUESTAGENT_TEST_SYSTEMD") == "" {
		t.Skip("needs root and a systemd that it may start units of: in a container or a VM, " +
			"build it with go test -c and run it with GUESTAGENT_TEST_SYSTEMD=1")
	}
	ctx, cancel := context.WithTimeout(t.Context(), liveTimeout)
	t.Cleanup(cancel)
	for _, dir := range []string{liveConfig.Store, "/run/gatest"} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	c, err := Dial(ctx, liveConfig)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	t.Cleanup(func() {
		systemctl(t, "stop", "gatest-*", "run-gatest-mount.mount")
		files, _ := filepath.Glob("/run/systemd/system/*gatest*")
		for _, f := range append(files, "/run/gatest") {
			if err := os.RemoveAll(f); err != nil {
				t.Error(err)
			}
		}
		credentials, _ := filepath.Glob(filepath.Join(liveConfig.Store, "*gatest-*"))
		for _, f := range credentials {
			if err := os.Remove(f); err != nil {
				t.Error(err)
			}
		}
		systemctl(t, "daemon-reload")
		systemctl(t, "reset-failed")
	})
	return ctx, c
}

// systemctl runs systemctl, and does not mind how it ends: the units tell.
func systemctl(t testing.TB, args ...string) {
	t.Helper()
	//nolint:usetesting // it cleans up, too, when the test's context has ended
	out, err := exec.CommandContext(context.Background(), "systemctl", args...).CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("systemctl %v: %v\n%s", args, err, out)
	}
}

// store puts credentials into the store. Their values are their names.
func store(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(liveConfig.Store, name), []byte(name), 0o400); err != nil {
			t.Fatal(err)
		}
	}
}

// unit writes a unit file. Lines stand in the section of the unit's kind, but
// for those with "Unit:" before them.
func unit(t testing.TB, name string, lines ...string) {
	t.Helper()
	kind := strings.TrimPrefix(filepath.Ext(name), ".")
	var text strings.Builder
	text.WriteString("[Unit]\n")
	for _, line := range lines {
		if line, ok := strings.CutPrefix(line, "Unit:"); ok {
			text.WriteString(line + "\n")
		}
	}
	text.WriteString("[" + strings.ToUpper(kind[:1]) + kind[1:] + "]\n")
	for _, line := range lines {
		if !strings.HasPrefix(line, "Unit:") {
			text.WriteString(line + "\n")
		}
	}
	if err := os.WriteFile(filepath.Join("/run/systemd/system", name), []byte(text.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// forever is a service's command that runs until it is stopped. With Type=exec
// it counts as started once it has its credentials; with simple, before.
const forever = "Type=exec\nExecStart=/bin/sleep infinity"

// monotonic returns CLOCK_MONOTONIC in µs.
func monotonic(t *testing.T) uint64 {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	return uint64(now.Nano() / 1000) //nolint:gosec // it counts from the boot
}

// version returns systemd's major version.
func version(t *testing.T) int {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "systemctl", "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	var v int
	if _, err := fmt.Sscanf(string(out), "systemd %d", &v); err != nil {
		t.Fatalf("systemctl --version: %v", err)
	}
	return v
}

func TestLiveFind(t *testing.T) {
	ctx, c := live(t)
	v := version(t)
	store(t, "gatest-a", "gatest-b", ".gatest-dot")
	if err := os.WriteFile("/run/gatest/elsewhere", []byte("elsewhere"), 0o400); err != nil {
		t.Fatal(err)
	}
	serveCredentials(t, nil)

	type want struct {
		loads []Load
		lines []string
		since int // the version of systemd that knows how
	}
	a, b := "gatest-a", "gatest-b"
	wants := map[string]want{
		"gatest-file.service": {
			lines: []string{forever, "LoadCredential=gatest-a", "Unit:After=gatest-inactive.service"},
			loads: []Load{{a, a, WayFile}},
		},
		"gatest-rename.service": {
			lines: []string{forever, "LoadCredential=other:gatest-a", "LoadCredential=another:gatest-a"},
			loads: []Load{{a, "another", WayFile}, {a, "other", WayFile}},
		},
		"gatest-last.service": {
			lines: []string{forever, "LoadCredential=x:gatest-a", "LoadCredential=x:gatest-b"},
			loads: []Load{{b, "x", WayFile}},
		},
		"gatest-path.service": {
			lines: []string{forever, "LoadCredential=x:/run/credstore/gatest-a"},
			loads: []Load{{a, "x", WayPath}},
		},
		"gatest-folder.service": {
			lines: []string{forever, "LoadCredential=all:/run/credstore/"},
			loads: []Load{{a, "all_gatest-a", WayPath}, {b, "all_gatest-b", WayPath}},
		},
		"gatest-socketed.service": {
			lines: []string{forever, "LoadCredential=gatest-b:/run/gatest/credentials.sock"},
			loads: []Load{{b, b, WaySocket}},
		},
		"gatest-import.service": {
			lines: []string{forever, "ImportCredential=gatest-*"},
			loads: []Load{{a, a, WayImport}, {b, b, WayImport}},
			since: 254,
		},
		"gatest-renamed.service": {
			lines: []string{forever, "ImportCredential=gatest-*:new.", "ImportCredential=gatest-a"},
			loads: []Load{{a, a, WayImport}, {a, "new.a", WayImport}, {b, "new.b", WayImport}},
			since: 257,
		},
		"gatest-first.service": {
			lines: []string{forever, "ImportCredential=gatest-*", "LoadCredential=gatest-a:/run/gatest/elsewhere"},
			loads: []Load{{b, b, WayImport}},
			since: 254,
		},
		"gatest-tmpl@a.service": {
			loads: []Load{{a, "inst", WayFile}},
		},
		"gatest-dynamic.service": {
			lines: []string{forever, "LoadCredential=gatest-a", "DynamicUser=yes"},
			loads: []Load{{a, a, WayFile}},
		},
		"gatest-env.service": {
			lines: []string{forever, "EnvironmentFile=-/run/credstore/gatest-[!b]"},
			loads: []Load{{a, "", WayEnvironment}},
		},
		"gatest-listen.socket": {
			lines: []string{"ListenStream=/run/gatest/listen", "LoadCredential=gatest-a", "ExecStartPre=/bin/true"},
			loads: []Load{{a, a, WayFile}},
		},
		"run-gatest-mount.mount": {
			lines: []string{"What=tmpfs", "Type=tmpfs", "Where=/run/gatest/mount", "LoadCredential=gatest-a"},
			loads: []Load{{a, a, WayFile}},
		},
	}
	unit(t, "gatest-tmpl@.service", forever, "LoadCredential=inst:gatest-%i")
	unit(t, "gatest-listen.service", forever)
	unit(t, "gatest-inactive.service", forever, "LoadCredential=gatest-a")
	unit(t, "gatest-none.service", forever, "SetCredential=gatest-a:mine", "LoadCredential=x:/run/gatest/elsewhere")
	var start []string
	for name, w := range wants {
		if w.since > v {
			delete(wants, name)
			continue
		}
		if w.lines != nil {
			unit(t, name, w.lines...)
		}
		start = append(start, name)
	}
	systemctl(t, "daemon-reload")
	before := monotonic(t)
	systemctl(t, append([]string{"start", "gatest-none.service"}, start...)...)
	after := monotonic(t)

	units, err := c.Find(ctx, []string{a, b, ".gatest-dot"})
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range units {
		if u.Name == "gatest-inactive.service" {
			if u.ActiveState != "inactive" || u.LoadedUSec != 0 || u.InvocationID != "" {
				t.Errorf("Find: %+v, want it inactive, never started", u)
			}
			continue
		}
		w, ok := wants[u.Name]
		if !ok {
			t.Errorf("Find: %s, which loads nothing: %v", u.Name, u.Loads)
			continue
		}
		delete(wants, u.Name)
		if !reflect.DeepEqual(u.Loads, w.loads) {
			t.Errorf("Find: %s loads %v, want %v", u.Name, u.Loads, w.loads)
		}
		if u.LoadState != "loaded" || u.ActiveState != "active" || len(u.InvocationID) != 32 {
			t.Errorf("Find: %+v, want it loaded and active", u)
		}
		if u.LoadedUSec < before || u.LoadedUSec > after {
			t.Errorf("Find: %s loaded at %d, want it between %d and %d", u.Name, u.LoadedUSec, before, after)
		}
		if filepath.Ext(u.Name) == ".service" && u.Type != "exec" {
			t.Errorf("Find: %s is of type %q, want exec", u.Name, u.Type)
		}
		checkLoaded(t, u)
		if one, err := c.Unit(ctx, u.Name, []string{a, b}); err != nil || !reflect.DeepEqual(one, u) {
			t.Errorf("Unit(%s) = %+v, %v, want what Find returned, %+v", u.Name, one, err, u)
		}
	}
	for name := range wants {
		t.Errorf("Find: %s is missing", name)
	}
}

// checkLoaded compares what Find says with what systemd handed over, where
// something still runs to whom it did. A socket's and a mount's is gone with
// the command it was for.
func checkLoaded(t *testing.T, u Unit) {
	t.Helper()
	if filepath.Ext(u.Name) != ".service" {
		return
	}
	for _, l := range u.Loads {
		if l.Way == WayEnvironment {
			continue
		}
		got, err := os.ReadFile(filepath.Join("/run/credentials", u.Name, l.As))
		if err != nil || string(got) != l.Name {
			t.Errorf("%s: %s is %q (%v), want the store's %s", u.Name, l.As, got, err, l.Name)
		}
	}
	entries, err := os.ReadDir(filepath.Join("/run/credentials", u.Name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.Contains(e.Name(), "gatest") && u.Name != "gatest-first.service" &&
			!slices.ContainsFunc(u.Loads, func(l Load) bool { return l.As == e.Name() }) {
			t.Errorf("%s: has %s, which Find does not know of", u.Name, e.Name())
		}
	}
}

// serveCredentials answers at the credentials socket with the name that is
// asked for. asked, if not nil, is called before.
func serveCredentials(t *testing.T, asked func(unit, name string)) {
	t.Helper()
	l, err := net.Listen("unix", liveConfig.Socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			// "@HEX/unit/UNIT/NAME"
			address := strings.Split(conn.RemoteAddr().String(), "/")
			if asked != nil {
				asked(address[2], address[3])
			}
			_, _ = conn.Write([]byte(address[3]))
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
}

func TestLiveMasked(t *testing.T) {
	ctx, c := live(t)
	store(t, "gatest-a")
	unit(t, "gatest-masked.service", forever, "LoadCredential=gatest-a")
	systemctl(t, "daemon-reload")
	systemctl(t, "start", "gatest-masked.service")
	if err := os.Remove("/run/systemd/system/gatest-masked.service"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/null", "/run/systemd/system/gatest-masked.service"); err != nil {
		t.Fatal(err)
	}
	systemctl(t, "daemon-reload")

	units, err := c.Find(ctx, []string{"gatest-a"})
	if err != nil || len(units) != 0 {
		t.Errorf("Find: %+v, %v, want nothing: systemd has forgotten the settings", units, err)
	}
	u, err := c.Unit(ctx, "gatest-masked.service", []string{"gatest-a"})
	if err != nil || u.LoadState != "masked" || u.ActiveState != "active" || u.LoadedUSec == 0 {
		t.Errorf("Unit: %+v, %v, want it masked, and active", u, err)
	}
	results, err := c.Run(ctx, []Job{{u.Name, ActionTryRestart}}, nil)
	if err != nil || len(results) != 1 || results[0].Result != ResultRefused || !strings.HasPrefix(results[0].Problem, "UnitMasked: ") {
		t.Errorf("Run: %+v, %v, want it refused: the unit is masked", results, err)
	}
	if u, err := c.Unit(ctx, "gatest-nothing.service", nil); err != nil || u.LoadState != "not-found" {
		t.Errorf("Unit: %+v, %v, want not-found", u, err)
	}
	if u, err := c.Unit(ctx, "basic.target", nil); err != nil || u.ActiveState != "active" || u.Loads != nil {
		t.Errorf("Unit: %+v, %v, want an active target", u, err)
	}
	if u, err := c.Unit(ctx, "no unit's name", nil); err == nil {
		t.Errorf("Unit: %+v, %v, want an error", u, err)
	}
}

func TestLiveStarting(t *testing.T) {
	ctx, c := live(t)
	starts := make(chan Start, 8)
	serveCredentials(t, func(unit, name string) {
		s, err := c.Starting(ctx, unit)
		if err != nil {
			t.Error(err)
		}
		if !slices.Contains(s.SocketNames, name) {
			t.Errorf("Starting: %v, want it to have %q", s.SocketNames, name)
		}
		starts <- s
	})
	unit(t, "gatest-start.service", forever, "LoadCredential=one:/run/gatest/credentials.sock",
		"LoadCredential=two:/run/gatest/credentials.sock", "LoadCredential=three:/run/gatest/elsewhere/..//credentials.sock")
	systemctl(t, "daemon-reload")

	for _, jobType := range []string{"start", "restart"} {
		systemctl(t, jobType, "gatest-start.service")
		u, err := c.Unit(ctx, "gatest-start.service", nil)
		if err != nil || u.ActiveState != "active" {
			t.Fatalf("%s: %+v, %v, want it active", jobType, u, err)
		}
		for range 2 {
			s := <-starts
			if s.InvocationID != u.InvocationID || s.ActiveState != "activating" || s.Job == 0 || s.JobType != "start" {
				t.Errorf("%s: Starting = %+v, want a start of %s", jobType, s, u.InvocationID)
			}
		}
	}
}

func TestLiveRun(t *testing.T) {
	ctx, c := live(t)
	if err := unix.Mkfifo("/run/gatest/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	type want struct {
		action  Action
		lines   []string
		stopped bool // before the jobs
		result  string
		problem string
		status  string
		same    bool // the same invocation as before
	}
	wants := map[string]want{
		"gatest-reload.service":   {ActionReload, []string{forever, "ExecReload=/bin/true"}, false, "done", "", "active (running)", true},
		"gatest-badload.service":  {ActionReload, []string{forever, "ExecReload=/bin/false"}, false, "failed", "", "active (running)", true},
		"gatest-noload.service":   {ActionReload, []string{forever}, false, ResultRefused, "JobTypeNotApplicable", "active (running)", true},
		"gatest-offload.service":  {ActionReload, []string{forever, "ExecReload=/bin/true"}, true, "invalid", "", "inactive (dead)", true},
		"gatest-off.service":      {ActionTryRestart, []string{forever}, true, "done", "", "inactive (dead)", true},
		"gatest-on.service":       {ActionRestart, []string{forever}, true, "done", "", "active (running)", false},
		"gatest-fail.service":     {ActionRestart, []string{"Type=oneshot", "ExecStart=/bin/sh -c 'exit 7'"}, true, "failed", "", "failed (result exit-code, exit status 7)", false},
		"gatest-needs.service":    {ActionRestart, []string{forever, "Unit:Requires=gatest-fail.service", "Unit:After=gatest-fail.service"}, true, "dependency", "", "inactive (dead)", true},
		"gatest-missing.service":  {ActionTryRestart, []string{forever, "LoadCredential=x:/run/gatest/nothing"}, true, "done", "", "inactive (dead)", true},
		"gatest-missing2.service": {ActionRestart, []string{forever, "LoadCredential=x:/run/gatest/nothing"}, true, "failed", "", "failed (result exit-code, exit status 243/CREDENTIALS)", false},
		"gatest-manual.service":   {ActionTryRestart, []string{forever, "Unit:RefuseManualStop=yes"}, false, ResultRefused, "OnlyByDependency", "active (running)", true},
		"gatest-wait.service":     {ActionRestart, []string{"Type=oneshot", "ExecStart=/bin/cat /run/gatest/fifo"}, true, "canceled", "", "", false},
		"gatest-oneshot.service":  {ActionRestart, []string{"Type=oneshot", "RemainAfterExit=yes", "ExecStart=/bin/true"}, true, "done", "", "active (exited)", false},
	}
	for i := range 7 {
		wants[fmt.Sprintf("gatest-many%d.service", i)] = want{ActionTryRestart, []string{forever}, false, "done", "", "active (running)", false}
	}
	var (
		jobs  []Job
		start []string
	)
	for name, w := range wants {
		unit(t, name, w.lines...)
		jobs = append(jobs, Job{name, w.action})
		if !w.stopped {
			start = append(start, name)
		}
	}
	systemctl(t, "daemon-reload")
	systemctl(t, append([]string{"start"}, start...)...)
	before := make(map[string]Status)
	for name := range wants {
		s, err := c.Status(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		before[name] = s
	}
	jobs = append(jobs, Job{"gatest-nothing.service", ActionTryRestart})
	wants["gatest-nothing.service"] = want{ActionTryRestart, nil, true, ResultRefused, "NoSuchUnit", "inactive (dead)", true}

	var seen []JobResult
	results, err := c.Run(ctx, jobs, func(r JobResult) {
		seen = append(seen, r)
		if len(seen) == len(jobs)-1 {
			// What is left waits for the pipe.
			systemctl(t, "stop", "gatest-wait.service")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(seen, results) {
		t.Errorf("Run: done saw %v, want %v", seen, results)
	}
	for _, r := range results {
		w, ok := wants[r.Unit]
		if !ok {
			t.Errorf("Run: %q came twice, or was not asked for", r.Unit)
		}
		delete(wants, r.Unit)
		if r.Action != w.action || r.Result != w.result || !strings.HasPrefix(r.Problem, w.problem) || (r.Problem == "") != (w.problem == "") {
			t.Errorf("Run: %s %s = %q, %q, want %q, %q", r.Action, r.Unit, r.Result, r.Problem, w.result, w.problem)
		}
		if w.status != "" && r.Status.String() != w.status {
			t.Errorf("Run: %s is %v, want %v", r.Unit, r.Status, w.status)
		}
		if same := r.Status.InvocationID == before[r.Unit].InvocationID; same != w.same {
			t.Errorf("Run: %s has the same invocation: %v, want %v", r.Unit, same, w.same)
		}
	}
	for name := range wants {
		t.Errorf("Run: %s is missing", name)
	}
}

// TestLiveStartLimit has a unit that failed so often that systemd does not
// start it any more.
func TestLiveStartLimit(t *testing.T) {
	ctx, c := live(t)
	unit(t, "gatest-limit.service", forever, "ExecCondition=/bin/sh -c 'test -e /run/gatest/good || exit 255'",
		"Unit:StartLimitBurst=1", "Unit:StartLimitIntervalSec=1h")
	systemctl(t, "daemon-reload")
	systemctl(t, "start", "gatest-limit.service")
	systemctl(t, "start", "gatest-limit.service")
	if s, err := c.Status(ctx, "gatest-limit.service"); err != nil || s.ActiveState != "failed" {
		t.Fatalf("Status = %v, %v, want it failed", s, err)
	}
	if err := os.WriteFile("/run/gatest/good", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	results, err := c.Run(ctx, []Job{{"gatest-limit.service", ActionRestart}}, nil)
	if err != nil || len(results) != 1 || results[0].Result != "done" || results[0].Status.String() != "active (running)" {
		t.Errorf("Run = %+v, %v, want it active again", results, err)
	}
}

// TestLiveRestartsDoNotCount has more restarts asked for than the start limit
// lets through.
func TestLiveRestartsDoNotCount(t *testing.T) {
	ctx, c := live(t)
	unit(t, "gatest-often.service", forever, "Unit:StartLimitBurst=2", "Unit:StartLimitIntervalSec=1h")
	systemctl(t, "daemon-reload")
	systemctl(t, "start", "gatest-often.service")
	for range 4 {
		results, err := c.Run(ctx, []Job{{"gatest-often.service", ActionTryRestart}}, nil)
		if err != nil || len(results) != 1 || results[0].Result != "done" || results[0].Status.ActiveState != "active" {
			t.Fatalf("Run = %+v, %v, want it to run", results, err)
		}
	}
}

func TestLiveWatch(t *testing.T) {
	ctx, c := live(t)
	fifo := func(name string) (release func()) {
		path := "/run/gatest/" + name
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := os.WriteFile(path, []byte("x\n"), 0); err != nil {
				t.Error(err)
			}
		}
	}
	unit(t, "gatest-healthy.service", forever)
	unit(t, "gatest-oneshot.service", "Type=oneshot", "ExecStart=/bin/true")
	unit(t, "gatest-remain.service", "Type=oneshot", "RemainAfterExit=yes", "ExecStart=/bin/true")
	unit(t, "gatest-dies.service", "ExecStart=/bin/sh -c 'read x < /run/gatest/dies; exit 3'")
	unit(t, "gatest-ends.service", "ExecStart=/bin/sh -c 'read x < /run/gatest/ends'")
	unit(t, "gatest-again.service", "ExecStart=/bin/sh -c 'read x < /run/gatest/again; kill -KILL $$$$'", "Restart=always", "RestartSec=1ms")
	unit(t, "gatest-later.service", "ExecStart=/bin/sh -c 'read x < /run/gatest/later; exit 3'", "Restart=on-failure", "RestartSec=1h")
	systemctl(t, "daemon-reload")

	healthy := []Job{{"gatest-healthy.service", ActionRestart}, {"gatest-oneshot.service", ActionRestart}, {"gatest-remain.service", ActionRestart}}
	base := func(jobs ...Job) map[string]Status {
		results, err := c.Run(ctx, append(jobs, healthy...), nil)
		if err != nil {
			t.Fatal(err)
		}
		statuses := make(map[string]Status)
		for _, r := range results {
			if r.Result != "done" {
				t.Fatalf("Run: %+v, want it done", r)
			}
			statuses[r.Unit] = r.Status
		}
		return statuses
	}
	if failed, err := c.Watch(ctx, base(), time.Second); err != nil || failed != nil {
		t.Errorf("Watch = %+v, %v, want nothing", failed, err)
	}
	// A restart by somebody else is none of systemd's own.
	statuses := base()
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		systemctl(t, "restart", "gatest-healthy.service")
	}()
	if failed, err := c.Watch(ctx, statuses, time.Second); err != nil || failed != nil {
		t.Errorf("Watch = %+v, %v, want nothing", failed, err)
	}
	<-restarted

	for _, tt := range []struct{ name, problem, status string }{
		{"dies", "failed", "failed (result exit-code, exit status 3)"},
		{"ends", "ended", "inactive (dead)"},
		{"again", "", ""}, // see below
		{"later", "", ""},
	} {
		release := fifo(tt.name)
		name := "gatest-" + tt.name + ".service"
		statuses := base(Job{name, ActionRestart})
		go release()
		failed, err := c.Watch(ctx, statuses, liveTimeout)
		if err != nil || len(failed) != 1 || failed[0].Unit != name {
			t.Fatalf("Watch = %+v, %v, want %s", failed, err, name)
		}
		t.Logf("%s: %s: %v", name, failed[0].Problem, failed[0].Status)
		if tt.problem != "" && (failed[0].Problem != tt.problem || failed[0].Status.String() != tt.status) {
			t.Errorf("Watch = %q, %v, want %q, %v", failed[0].Problem, failed[0].Status, tt.problem, tt.status)
		}
	}
}

// TestLiveRefreshOnReload has a service that gets a new value without a restart.
func TestLiveRefreshOnReload(t *testing.T) {
	ctx, c := live(t)
	if v := version(t); v < 260 {
		t.Skipf("systemd %d does not know RefreshOnReload=credentials: run it where systemd is 260 or later", v)
	}
	store(t, "gatest-a")
	const name, file = "gatest-refresh.service", "/run/credstore/gatest-a"
	unit(t, name, forever, "ExecReload=/bin/true", "RefreshOnReload=credentials", "LoadCredential=x:"+file)
	systemctl(t, "daemon-reload")
	systemctl(t, "start", name)
	get := func() (u Unit, value string) {
		u, err := c.Unit(ctx, name, []string{"gatest-a"})
		if err != nil || !u.RefreshOnReload || !u.ReloadTells || !u.CanReload || u.ActiveState != "active" {
			t.Fatalf("Unit = %+v, %v, want it active, with RefreshOnReload and ReloadTells", u, err)
		}
		b, err := os.ReadFile("/run/credentials/" + name + "/x")
		if err != nil {
			t.Fatal(err)
		}
		return u, string(b)
	}
	reload := func() string {
		results, err := c.Run(ctx, []Job{{name, ActionReload}}, nil)
		if err != nil || len(results) != 1 {
			t.Fatalf("Run = %+v, %v", results, err)
		}
		return results[0].Result
	}
	started, value := get()
	if value != "gatest-a" {
		t.Fatalf("the value is %q, want %q", value, "gatest-a")
	}

	if err := errors.Join(os.Remove(file), os.WriteFile(file, []byte("new"), 0o400)); err != nil {
		t.Fatal(err)
	}
	installed := monotonic(t)
	if started.LoadedUSec >= installed {
		t.Errorf("loaded at %d, want it before %d", started.LoadedUSec, installed)
	}
	if result := reload(); result != "done" {
		t.Fatalf("Run = %s, want done", result)
	}
	reloaded, value := get()
	if value != "new" || reloaded.InvocationID != started.InvocationID || reloaded.LoadedUSec <= installed {
		t.Errorf("after the reload: %q, %+v, want the new value in the same invocation, loaded after %d", value, reloaded, installed)
	}

	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if result := reload(); result != "failed" {
		t.Errorf("Run without the file = %s, want failed", result)
	}
	kept, value := get()
	if value != "new" || kept.LoadedUSec > reloaded.LoadedUSec {
		t.Errorf("after the failed reload: %q, %+v, want the old value, loaded not after %d", value, kept, reloaded.LoadedUSec)
	}
	store(t, "gatest-a") // which the end removes
}

// TestLiveFollow compares what is kept with what systemd answers, at once after
// each change, and waits for Changed alone.
func TestLiveFollow(t *testing.T) {
	ctx, c := live(t)
	store(t, "gatest-a")
	f, err := c.Follow(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const loads = "LoadCredential=gatest-a"
	check := func(when string, want ...string) {
		t.Helper()
		kept, err := f.Find(ctx, []string{"gatest-a"})
		if err != nil {
			t.Fatal(err)
		}
		asked, err := c.Find(ctx, []string{"gatest-a"})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, u := range kept {
			got = append(got, u.Name)
		}
		if !slices.Equal(got, want) || !reflect.DeepEqual(kept, asked) {
			t.Errorf("%s: Find = %+v, want %q as systemd has them, %+v", when, kept, want, asked)
		}
	}
	// await waits until something is so, looking only when Changed tells.
	await := func(what string, is func() bool) {
		t.Helper()
		for !is() {
			select {
			case <-f.Changed():
			case <-f.Lost():
				t.Fatalf("the connection was lost before %s", what)
			case <-ctx.Done():
				t.Fatalf("Changed did not tell that %s", what)
			}
		}
	}
	check("at first")

	unit(t, "gatest-one.service", forever, loads, "Unit:After=gatest-stub.service")
	systemctl(t, "daemon-reload")
	systemctl(t, "start", "gatest-one.service")
	check("started", "gatest-one.service")
	unit(t, "gatest-one.service", forever, "Unit:After=gatest-stub.service")
	check("edited, not reloaded", "gatest-one.service")
	systemctl(t, "daemon-reload")
	check("without credentials")
	unit(t, "gatest-one.service", forever, loads, "Unit:After=gatest-stub.service")
	systemctl(t, "daemon-reload")
	check("with credentials again", "gatest-one.service")

	// Transient ones: a new one, one of the same name with other settings, and
	// one that has been known, as not found, all along.
	transient := func(name string, args ...string) {
		args = append([]string{"--quiet", "--unit=" + name, "--property=Type=exec"}, args...)
		if out, err := exec.CommandContext(ctx, "systemd-run", append(args, "/bin/sleep", "infinity")...).CombinedOutput(); err != nil {
			t.Fatalf("systemd-run %v: %v\n%s", args, err, out)
		}
	}
	transient("gatest-two.service", "--property="+loads)
	check("a transient one", "gatest-one.service", "gatest-two.service")
	systemctl(t, "stop", "gatest-two.service")
	check("the transient one is gone", "gatest-one.service")
	transient("gatest-two.service")
	check("a transient one without credentials", "gatest-one.service")
	transient("gatest-stub.service", "--property="+loads)
	check("a transient one that was not found", "gatest-one.service", "gatest-stub.service")
	systemctl(t, "stop", "gatest-two.service", "gatest-stub.service")
	check("one is gone, and one still known", "gatest-one.service", "gatest-stub.service")

	// What Find tells of it.
	before, err := c.Unit(ctx, "gatest-one.service", []string{"gatest-a"})
	if err != nil {
		t.Fatal(err)
	}
	now := func() Unit {
		units, err := f.Find(ctx, []string{"gatest-a"})
		if err != nil || len(units) == 0 || units[0].Name != before.Name {
			t.Fatalf("Find = %+v, %v, want %s", units, err, before.Name)
		}
		return units[0]
	}
	systemctl(t, "restart", "--no-block", before.Name)
	await("it was restarted", func() bool {
		u := now()
		return u.InvocationID != before.InvocationID && u.ActiveState == "active" && u.LoadedUSec > before.LoadedUSec
	})
	// It would be forgotten if nothing referred to it.
	unit(t, "gatest-other.service", forever, "Unit:After="+before.Name)
	systemctl(t, "start", "gatest-other.service")
	systemctl(t, "stop", "--no-block", before.Name)
	await("it was stopped", func() bool { return now().ActiveState == "inactive" })

	systemctl(t, "daemon-reexec")
	select {
	case <-f.Lost():
	case <-ctx.Done():
		t.Fatal("the connection is there after a daemon-reexec")
	}
	if _, err := f.Find(ctx, []string{"gatest-a"}); !errors.Is(err, ErrLost) {
		t.Errorf("Find = %v, want ErrLost", err)
	}
}

func TestLiveSystem(t *testing.T) {
	ctx, c := live(t)
	f, err := c.Follow(ctx)
	if err != nil {
		t.Fatal(err)
	}
	system := func() System {
		t.Helper()
		s, err := c.System(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	// failed returns what is said of a unit, once Changed tells that it failed, or
	// that it no longer does.
	failed := func(name string, want bool) (u FailedUnit) {
		t.Helper()
		for {
			s := system()
			i := slices.IndexFunc(s.Failed, func(u FailedUnit) bool { return u.Unit == name })
			if (i >= 0) == want {
				if want {
					u = s.Failed[i]
				}
				return u
			}
			select {
			case <-f.Changed():
			case <-ctx.Done():
				t.Fatalf("Changed did not tell of %s", name)
			}
		}
	}
	if s := system(); !strings.HasPrefix(s.Version, strconv.Itoa(version(t))) {
		t.Errorf("System = %+v, want version %d", s, version(t))
	}
	unit(t, "gatest-bad.service", "Type=oneshot", "ExecStart=/bin/sh -c 'exit 7'")
	unit(t, "gatest-slow.service", "Type=oneshot", "ExecStart=/bin/sleep infinity")
	systemctl(t, "daemon-reload")
	began := time.Now().UnixMicro()
	systemctl(t, "start", "--no-block", "gatest-bad.service")
	u := failed("gatest-bad.service", true)
	if since := int64(u.SinceUSec); u.Result != "exit-code" || since < began || since > time.Now().UnixMicro() { //nolint:gosec // it is of now
		t.Errorf("System: %+v, want exit-code since between %d and now", u, began)
	}
	systemctl(t, "reset-failed", "gatest-bad.service")
	failed("gatest-bad.service", false)
	systemctl(t, "start", "--no-block", "gatest-bad.service")
	failed("gatest-bad.service", true)

	systemctl(t, "start", "--no-block", "gatest-slow.service")
	s := system()
	if s.Jobs < 1 {
		t.Errorf("System: %d jobs, want one or more", s.Jobs)
	}
	out, _ := exec.CommandContext(ctx, "systemctl", "is-system-running").Output() // it tells by its exit status, too
	if state := strings.TrimSpace(string(out)); s.State != state {
		t.Errorf("System: state %q, want systemctl's %q", s.State, state)
	}
	if !slices.IsSortedFunc(s.Failed, func(a, b FailedUnit) int { return strings.Compare(a.Unit, b.Unit) }) {
		t.Errorf("System: %+v, want them sorted", s.Failed)
	}
}

func TestLiveOwn(t *testing.T) {
	ctx, c := live(t)
	cgroup, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	var want string
	for line := range strings.Lines(string(cgroup)) {
		if name := filepath.Base(strings.TrimSpace(line)); strings.HasSuffix(name, ".service") {
			want = name
		}
	}
	if want == "" {
		t.Skipf("this process is in no service: run it with systemd-run --wait --pipe\n%s", cgroup)
	}
	name, jobType, preserve, err := c.Own(ctx)
	if err != nil || name != want || preserve {
		t.Errorf("Own = %q, %q, %v, %v, want %q", name, jobType, preserve, err, want)
	}
}

// BenchmarkLive refreshes 200 services that load one credential, discovery
// included, and does the same by hand, in turns: the ratio is what counts.
func BenchmarkLive(b *testing.B) {
	ctx, c := live(b)
	store(b, "gatest-a")
	var names []string
	for i := range 200 {
		names = append(names, fmt.Sprintf("gatest-%d.service", i))
		unit(b, names[i], forever, "LoadCredential=gatest-a", "Unit:StartLimitIntervalSec=0")
	}
	systemctl(b, "daemon-reload")
	systemctl(b, append([]string{"start"}, names...)...)

	var find, refresh, byHand time.Duration
	for b.Loop() {
		began := time.Now()
		units, err := c.Find(ctx, []string{"gatest-a"})
		if err != nil || len(units) != len(names) {
			b.Fatalf("Find = %d units, %v, want %d", len(units), err, len(names))
		}
		find += time.Since(began)
		var jobs []Job
		for _, u := range units {
			jobs = append(jobs, Job{u.Name, ActionTryRestart})
		}
		if _, err := c.Run(ctx, jobs, nil); err != nil {
			b.Fatal(err)
		}
		refresh += time.Since(began)
		began = time.Now()
		systemctl(b, append([]string{"try-restart"}, names...)...)
		byHand += time.Since(began)
	}
	b.ReportMetric(find.Seconds()/float64(b.N), "find-s/op")
	b.ReportMetric(refresh.Seconds()/float64(b.N), "refresh-s/op")
	b.ReportMetric(byHand.Seconds()/float64(b.N), "systemctl-s/op")
	b.ReportMetric(refresh.Seconds()/byHand.Seconds(), "ratio")
}
