package main

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/internal/host/hosttest"
	"github.com/guestagent/guestagent/vsockrpc"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"guestctl": main, "vsock": main}) // vsock is the bridge
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			// A program with the race detector waits a second at its end.
			env.Setenv("GORACE", "atexit_sleep_ms=0")
			env.Values["hostile"] = map[string]*hosttest.HostileGuest{}
			env.Values["guests"] = map[string]*hosttest.Guest{}
			env.Values["notify"] = map[string]*net.UnixConn{}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"interrupt": interrupt, "vm": vm, "guest": guest, "hostile": hostile, "value": value, "calls": calls,
			"waits": waits, "trial": trial, "nosystemd": noSystemd,
			"notify": notify, "told": told, "gets": gets, "signal": signalAll, "hup": hup,
			"says": says, "down": down, "up": up, "appears": appears,
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

func guests(ts *testscript.TestScript) map[string]*hosttest.Guest {
	return ts.Value("guests").(map[string]*hosttest.Guest)
}

func register(dir, name, target string) error {
	dir = filepath.Join(dir, "vms")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	b, err := json.Marshal(map[string]string{"target": target})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".json"), b, 0o600)
}

// vm NAME TARGET enters a VM into vms/.
func vm(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: vm NAME TARGET")
	}
	ts.Check(register(ts.MkAbs("."), args[0], args[1]))
}

// guest NAME… starts guests, and enters them into vms/.
func guest(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: guest NAME…")
	}
	for _, name := range args {
		g, err := hosttest.Start(ts.MkAbs("."), name)
		ts.Check(err)
		ts.Defer(g.Close)
		guests(ts)[name] = g
		ts.Check(register(ts.MkAbs("."), name, "unix:"+g.Socket))
	}
}

// hostile KIND… starts guests that mean no good, named after what they do.
func hostile(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: hostile KIND…")
	}
	for _, kind := range args {
		g, err := hosttest.Hostile(ts.MkAbs("."), kind, kind)
		ts.Check(err)
		ts.Defer(g.Close)
		ts.Value("hostile").(map[string]*hosttest.HostileGuest)[kind] = g
		ts.Check(register(ts.MkAbs("."), kind, "unix:"+ts.MkAbs(kind+".sock")))
	}
}

// [!] value GUEST NAME [FILE] checks that a guest has a value, or none.
func value(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 || len(args) == 2 != neg {
		ts.Fatalf("usage: [!] value GUEST NAME [FILE]")
	}
	got, ok := guests(ts)[args[0]].Value(args[1])
	if ok == neg {
		ts.Fatalf("%s in %s: %v, want %v", args[1], args[0], ok, !neg)
	}
	if !neg && got != ts.ReadFile(args[2]) {
		ts.Fatalf("%s in %s = %q", args[1], args[0], got)
	}
}

// interrupt GUEST interrupts what runs in the background as soon as the guest,
// a silent one, was called.
func interrupt(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: interrupt GUEST")
	}
	<-ts.Value("hostile").(map[string]*hosttest.HostileGuest)[args[0]].Called()
	for _, c := range ts.BackgroundCmds() {
		ts.Check(c.Process.Signal(os.Interrupt))
	}
}

// calls GUEST N checks how often a guest was called.
func calls(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: calls GUEST N")
	}
	if got := strconv.Itoa(guests(ts)[args[0]].Calls()); got != args[1] {
		ts.Fatalf("%s was called %s times, want %s", args[0], got, args[1])
	}
}

// waits GUEST UNIT NAME makes a unit of a guest wait for a credential.
func waits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: waits GUEST UNIT NAME")
	}
	guests(ts)[args[0]].Wait(args[1], args[2])
}

// trial GUEST N makes a generation be on trial.
func trial(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: trial GUEST N")
	}
	n, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	guests(ts)[args[0]].OnTrial(n)
}

// nosystemd GUEST PROBLEM makes systemd unreachable.
func noSystemd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: nosystemd GUEST PROBLEM")
	}
	guests(ts)[args[0]].NoSystemd(args[1])
}

// patience bounds the wait for what a program should do by itself.
const patience = 30 * time.Second

// await waits until cond is true, which it asks again and again.
func await(ts *testscript.TestScript, what string, cond func() bool) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	for !cond() {
		select {
		case <-tick.C:
		case <-late:
			ts.Fatalf("waiting in vain for %s", what)
		}
	}
}

// notify plays the service manager for what is started from then on.
func notify(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: notify")
	}
	path := ts.MkAbs("notify.sock")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	ts.Check(err)
	ts.Defer(func() { _ = conn.Close() })
	ts.Value("notify").(map[string]*net.UnixConn)["notify"] = conn
	ts.Setenv("NOTIFY_SOCKET", path)
}

// told REGEXP waits until the service manager is told that, and passes over
// what comes before.
func told(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: told REGEXP")
	}
	re, err := regexp.Compile(args[0])
	ts.Check(err)
	conn := ts.Value("notify").(map[string]*net.UnixConn)["notify"]
	ts.Check(conn.SetReadDeadline(time.Now().Add(patience)))
	b := make([]byte, 64<<10)
	for {
		n, err := conn.Read(b)
		if err != nil {
			ts.Fatalf("waiting to be told %s: %v", re, err)
		}
		ts.Logf("told %q", b[:n])
		if re.Match(b[:n]) {
			return
		}
	}
}

// [!] gets GUEST NAME [FILE] waits until a guest has a value, or none.
func gets(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 || len(args) == 2 != neg {
		ts.Fatalf("usage: [!] gets GUEST NAME [FILE]")
	}
	await(ts, strings.Join(args, " "), func() bool {
		got, ok := guests(ts)[args[0]].Value(args[1])
		return ok == !neg && (neg || got == ts.ReadFile(args[2]))
	})
}

// signal NAME sends a signal to what runs in the background.
func signalAll(ts *testscript.TestScript, neg bool, args []string) {
	sig, ok := map[string]os.Signal{"TERM": syscall.SIGTERM, "HUP": syscall.SIGHUP}[strings.Join(args, " ")]
	if neg || !ok {
		ts.Fatalf("usage: signal TERM|HUP")
	}
	for _, c := range ts.BackgroundCmds() {
		ts.Check(c.Process.Signal(sig))
	}
}

// hup GUEST sends SIGHUP to what runs in the background, which has to look at
// the guest then.
func hup(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: hup GUEST")
	}
	g := guests(ts)[args[0]]
	before := g.Asked()
	signalAll(ts, false, []string{"HUP"})
	await(ts, "a look at "+args[0], func() bool { return g.Asked() > before })
}

// says GUEST [FILE] has a guest say what FILE has over its report, or the report
// as it is.
func says(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 || len(args) > 2 {
		ts.Fatalf("usage: says GUEST [FILE]")
	}
	if len(args) == 1 {
		guests(ts)[args[0]].Says(nil)
		return
	}
	over := []byte(ts.ReadFile(args[1]))
	ts.Check(json.Unmarshal(over, &vsockrpc.Report{}))
	guests(ts)[args[0]].Says(func(r *vsockrpc.Report) { _ = json.Unmarshal(over, r) })
}

// down GUEST… ends guests, which keep what they have.
func down(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: down GUEST…")
	}
	for _, name := range args {
		guests(ts)[name].Stop()
	}
}

// up GUEST… has guests listen again.
func up(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: up GUEST…")
	}
	for _, name := range args {
		ts.Check(guests(ts)[name].Start())
	}
}

// appears FILE REGEXP waits until a file has a line.
func appears(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: appears FILE REGEXP")
	}
	re, err := regexp.Compile("(?m)" + args[1])
	ts.Check(err)
	await(ts, args[1]+" in "+args[0], func() bool {
		b, _ := os.ReadFile(ts.MkAbs(args[0]))
		return re.Match(b)
	})
}

// terminal runs guestctl as on a terminal.
func terminal(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errOut strings.Builder
	p := &program{stdin: strings.NewReader("value"), stdout: &out, stderr: &errOut, terminal: true}
	root := p.root()
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&errOut)
	err = root.ExecuteContext(t.Context())
	return out.String(), errOut.String(), err
}

func TestTables(t *testing.T) {
	t.Setenv("TZ", "UTC")
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		g, err := hosttest.Start(dir, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(g.Close)
		if err := register(dir, name, "unix:"+g.Socket); err != nil {
			t.Fatal(err)
		}
	}
	vms := "--vms=" + filepath.Join(dir, "vms")
	for _, args := range [][]string{
		{"push", "a", "api-key:-", "--revision", "r0", "--refresh", "auto"},
		{"push", "a", "api-key:-", "--revision", "r1"},
	} {
		if _, _, err := terminal(t, append(args, vms)...); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "new"), []byte("new value"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := terminal(t, vms, "push", "a", hosttest.Never+":"+filepath.Join(dir, "new")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"list", "a"}, []string{
			"NAME REVISION SIZE SOURCE STATE INSTALLED USED BY",
			"api-key r1 5 push inForce 2026-01-02 03:04:05 1",
			"never - 9 push inForce 2026-01-02 03:04:05 1 (1 stale)",
			"",
			"CREDENTIAL UNIT STATE LOADED VIA REFRESH",
			"api-key api-key.service active inForce r0 file restart",
			"never never.service active unknown (stale) file none: refresh.never names it",
			"",
			"2 credentials, generation 2",
		}},
		{[]string{"list", "b"}, []string{"NAME REVISION SIZE SOURCE STATE INSTALLED USED BY", "0 credentials, generation 0"}},
		{[]string{"list", "a,b"}, []string{"GUEST GENERATION CREDENTIALS", "a 2 api-key, never", "b 0 -"}},
		{[]string{"list", "--all", "--batch=2"}, []string{"GUEST GENERATION CREDENTIALS", "a 2 api-key, never", "b 0 -"}},
		{[]string{"list"}, []string{"VM TARGET STATE AGENT", "reachable guestagent test", "reachable guestagent test"}},
	} {
		stdout, stderr, err := terminal(t, append(c.args, vms)...)
		lines := strings.Split(strings.TrimSpace(stdout), "\n")
		ok := err == nil && stderr == "" && len(lines) == len(c.want)
		for i := range min(len(lines), len(c.want)) {
			ok = ok && len(lines[i]) <= 100 && strings.Contains(strings.Join(strings.Fields(lines[i]), " "), c.want[i])
		}
		if !ok {
			t.Errorf("guestctl %q = %q, %q, %v, want %q", c.args, stdout, stderr, err, c.want)
		}
	}
}

func TestJSONIsPrintable(t *testing.T) {
	in := host.Result{Guest: hosttest.Escapes + "é\U000E0001\u2028", Entries: []vsockrpc.Entry{}}
	var b strings.Builder
	if err := writeJSON(&b, in); err != nil {
		t.Fatal(err)
	}
	if want := `{"guest":"\u001b]0;owned\u0007\u009b31m\u202e\u007fé\udb40\udc01\u2028","target":"","entries":[]}` + "\n"; b.String() != want {
		t.Errorf("writeJSON = %s, want %s", b.String(), want)
	}
	var out host.Result
	if err := json.Unmarshal([]byte(b.String()), &out); err != nil || out.Guest != in.Guest {
		t.Errorf("decoded = %q, %v, want %q", out.Guest, err, in.Guest)
	}
}

// On a terminal a line says who is waited for, and is gone afterwards.
func TestProgress(t *testing.T) {
	dir := t.TempDir()
	g, err := hosttest.Start(dir, "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	var out, errOut strings.Builder
	p := &program{stdout: &out, stderr: &errOut, errTerminal: true}
	root := p.root()
	root.SetArgs([]string{"rm", "unix:" + g.Socket, "a"})
	err = root.ExecuteContext(t.Context())
	if want := "\r\x1b[Kwaiting for unix:" + g.Socket + "\r\x1b[K"; err != nil || errOut.String() != want {
		t.Errorf("stderr = %q, %v, want %q", errOut.String(), err, want)
	}
}

// The line says how the guests get on.
func TestProgressOfRefresh(t *testing.T) {
	dir := t.TempDir()
	g, err := hosttest.Start(dir, "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	if err := register(dir, "a", "unix:"+g.Socket); err != nil {
		t.Fatal(err)
	}
	var out, errOut strings.Builder
	p := &program{stdin: strings.NewReader(`{"systemd.credentials": [{"name": "x", "text": "v"}, {"name": "y", "text": "bad"}, {"name": "z", "text": "v"}]}`), stdout: &out, stderr: &errOut, errTerminal: true}
	root := p.root()
	root.SetArgs([]string{"push", "a", "--json-file=-", "--gate=1s", "--vms", filepath.Join(dir, "vms")})
	if err := root.ExecuteContext(t.Context()); host.Status(err) != host.StatusRolledBack {
		t.Errorf("push = %v, want status %d", err, host.StatusRolledBack)
	}
	lines := strings.Split(errOut.String(), clearLine)
	for i, want := range []string{
		"", "waiting for a", "waiting for a (applied)",
		"waiting for a (refreshing: x.service and 2 more)", "waiting for a (refreshing: y.service and 1 more)",
		"waiting for a (refreshing: z.service)", "waiting for a (refreshing)",
		"waiting for a (watching: everything)", "waiting for a (rolling back)",
		"guestctl: a: x.service: restart done; active (running)\n" +
			"guestctl: a: y.service: restart failed; failed (\\x1b[31mexit-code 1)\n" +
			"guestctl: a: z.service: restart done; active (running)\n",
	} {
		if i >= len(lines) || lines[i] != want {
			t.Fatalf("stderr = %q, want %q as line %d", lines, want, i)
		}
	}
}

// A guest that has much to say is not let say all of it.
func TestManyUnits(t *testing.T) {
	var errOut strings.Builder
	p := &program{stdout: io.Discard, stderr: &errOut}
	units := make([]vsockrpc.Refreshed, 1000)
	for i := range units {
		units[i] = vsockrpc.Refreshed{Unit: strings.Repeat("u", 4000), Result: vsockrpc.ResultSkipped}
	}
	generation := int64(1)
	p.results(&host.Fleet{}, writeRefresh).emit(host.Result{
		Guest: "a", Generation: &generation, Units: units, Waiting: make([]vsockrpc.Waiting, 1000), Rejected: make([]vsockrpc.Rejected, 1000),
	})
	lines := strings.Split(strings.TrimSpace(errOut.String()), "\n")
	if len(lines) != 3*(maxUnits+1) || len(errOut.String()) > 3*(maxUnits+1)*(maxLine+40) || !strings.Contains(errOut.String(), "and 968 more units") {
		t.Errorf("%d lines, %d bytes, the last %.200q", len(lines), errOut.Len(), lines[len(lines)-1])
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, errors.New("no space") }

func TestWriteError(t *testing.T) {
	dir := t.TempDir()
	g, err := hosttest.Start(dir, "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	for _, args := range [][]string{{"rm", "unix:" + g.Socket, "a"}, {"rm", "unix:" + g.Socket, "a", "--json"}, {"list", "unix:" + g.Socket, "--json"}} {
		var stderr strings.Builder
		if err := run(t.Context(), args, nil, fullDisk{}, &stderr); err == nil || !strings.Contains(err.Error(), "writing the results") {
			t.Errorf("run(%q) = %v, want an error of writing", args, err)
		}
	}
}
