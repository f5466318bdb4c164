package vm_test

import (
	"strings"
	"testing"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// longGate is a gate that nobody waits for the end of. It ends when a unit fails.
const longGate = "100s"

// TestGate has sets on trial.
func TestGate(t *testing.T) {
	allContainers(t, func(t *testing.T, m *vm.Machine, release vm.Release) {
		t.Run("rolled back", func(t *testing.T) { testRolledBack(t, m, release) })
		t.Run("does not come up", func(t *testing.T) { testNotUp(t, m, release) })
		t.Run("start limit", func(t *testing.T) { testStartLimit(t, m, release) })
		t.Run("passes", func(t *testing.T) { testPasses(t, m, release) })
		t.Run("one at a time", func(t *testing.T) { testOneGate(t, m, release) })
		t.Run("goes on", func(t *testing.T) { testGateGoesOn(t, m, release) })
		t.Run("killed while refreshing", func(t *testing.T) { testKilledRefreshing(t, m, release) })
		t.Run("killed while restoring", func(t *testing.T) { testKilledRestoring(t, m, release) })
		t.Run("caller hangs up", func(t *testing.T) { testCallerGone(t, m, release) })
		t.Run("silence", func(t *testing.T) { wantSilence(t, m) })
	})
}

// dying is a service that does not bear a value of name with "bad" in it for long: it dies after that many seconds.
func dying(seconds, name string, settings ...string) string {
	return lines(append([]string{
		"[Service]", "Type=exec",
		"ExecStart=/bin/sh -c 'if grep -q bad $${CREDENTIALS_DIRECTORY}/" + name + "; then sleep " + seconds + "; exit 7; fi; exec sleep infinity'",
	}, settings...)...)
}

// wantInForce checks what is in force, and that nothing is on trial.
func wantInForce(t *testing.T, m *vm.Machine, set creds) {
	t.Helper()
	for name, value := range set {
		wantFile(t, m, "/run/credstore/"+name, value)
	}
	if l := list(t, m); l.Gate != nil {
		t.Errorf("generation %d is on trial still", *l.Gate)
	}
}

// wantRejected checks that the last set was rolled back, and what is said of it.
func wantRejected(t *testing.T, m *vm.Machine, names, problem string) {
	t.Helper()
	l := list(t, m)
	if len(l.Rejected) != 1 || strings.Join(l.Rejected[0].Names, " ") != names || !strings.HasPrefix(l.Rejected[0].Problem, problem) {
		t.Errorf("list has rejected %+v, want %s for %q", l.Rejected, names, problem)
	}
}

// wantRolledBack checks that guestctl says that the set was rolled back, that everything came back, and why it went.
func (a answer) wantRolledBack(t *testing.T, problem string) {
	t.Helper()
	a.want(t, host.StatusRolledBack, host.CodeRolledBack)
	if !strings.HasPrefix(a.Error.Problem, problem) {
		t.Errorf("the problem is %q, want %q", a.Error.Problem, problem)
	}
	if a.Error.Restored == nil || !*a.Error.Restored {
		t.Errorf("not everything came back: %v\n%s", a.units(), a.stderr)
	}
}

// testRolledBack has a service die three seconds after it got a bad value.
func testRolledBack(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"gate-bad.service":    dying("3", "gate", "LoadCredential=gate"),
		"gate-socket.service": dying("infinity", "gate", bySocket("gate")),
		"gate-other.service":  loads("LoadCredential=gate-other") + lines("[Unit]", "After=gate-idle.service"), // or systemd forgets that
		"gate-idle.service":   loads("LoadCredential=gate"),
	})
	removeCreds(t, m, "gate", "gate-other")
	old := creds{"gate": newValue(), "gate-other": newValue()}
	bad := creds{"gate": badValue(), "gate-other": newValue()}
	mustPush(t, m, old, "--revision", "old")
	units := []string{"gate-bad.service", "gate-socket.service", "gate-other.service"}
	start(t, m, units...)
	generation := *list(t, m).Generation

	const problem = "gate-bad.service failed: failed (result exit-code, exit status 7)"
	restored := func() {
		t.Helper()
		for _, u := range units {
			wantActive(t, m, u, "active")
		}
		wantGiven(t, m, "gate-bad.service", "gate", old["gate"])
		wantGiven(t, m, "gate-socket.service", "gate", old["gate"])
		wantGiven(t, m, "gate-other.service", "gate-other", old["gate-other"])
		wantInForce(t, m, old)
		wantActive(t, m, "gate-idle.service", "inactive")
		for _, e := range list(t, m).Entries {
			for _, c := range e.Consumers {
				if c.Stale || e.Revision != "old" {
					t.Errorf("revision %q is in force, and of %s list says %+v", e.Revision, e.Name, c)
				}
			}
		}
		wantRejected(t, m, "gate gate-other", problem)
	}

	a := push(t, m, bad, "--revision", "new", "--refresh", "auto", "--gate", longGate)
	a.wantRolledBack(t, problem)
	a.wantUnits(t, "gate-bad.service restart done", "gate-socket.service restart done", "gate-other.service restart done", "gate-idle.service none skipped")
	if !strings.Contains(a.stderr, problem) {
		t.Errorf("guestctl says %q, want %q in it", a.stderr, problem)
	}
	restored()
	if got := *list(t, m).Generation; got != generation+2 {
		t.Errorf("generation %d is in force, want %d", got, generation+2)
	}

	// The same set is refused, with and without a gate.
	for _, flags := range [][]string{nil, {"--refresh", "auto", "--gate", longGate}} {
		a = push(t, m, bad, flags...)
		a.want(t, host.StatusFailed, host.CodeRefused)
		if len(a.Error.Refusals) == 0 || a.Error.Refusals[0].Reason != "rejected" {
			t.Errorf("refusals are %+v", a.Error.Refusals)
		}
	}
	restored()
	// It may be tried again, when somebody says so, and no better comes of it.
	ctl(t, m, nil, "retry", "--gate", longGate).wantRolledBack(t, problem)
	restored()
	killAgent(t, m)
	restored()

	// Something else passes.
	good := creds{"gate": newValue(), "gate-other": bad["gate-other"]}
	mustPush(t, m, good, "--refresh", "auto", "--gate", "1s")
	wantInForce(t, m, good)
	if l := list(t, m); len(l.Rejected) != 0 {
		t.Errorf("list has rejected %+v", l.Rejected)
	}
	ctl(t, m, nil, "retry").want(t, host.StatusFailed, host.CodeNothingRejected)
	for _, u := range []string{"gate-bad.service", "gate-socket.service"} {
		wantGiven(t, m, u, "gate", good["gate"])
	}
}

// testNotUp has services that do not come up with a bad value, or not for long, each in its own way.
func testNotUp(t *testing.T, m *vm.Machine, _ vm.Release) {
	for _, tt := range []struct{ name, unit, problem string }{
		{
			"restarts itself", dying("0.5", "up", "Restart=always", "RestartSec=100ms", "LoadCredential=up"),
			"up.service ", // "restarted itself", or about to: systemd decides which is seen first
		},
		{
			"ends well", lines("[Service]", "Type=exec", "LoadCredential=up",
				"ExecStart=/bin/sh -c 'grep -q bad $${CREDENTIALS_DIRECTORY}/up && exec sleep 0.5; exec sleep infinity'"),
			"up.service ended: inactive (dead)",
		},
		{
			"fails at once", picky("up", "LoadCredential=up"),
			"up.service: restart failed, failed (result exit-code)",
		},
		{
			"fails at once by socket", picky("up", bySocket("up")),
			"up.service: restart failed, failed (result exit-code)",
		},
		{
			"does not get ready", lines("[Service]", "Type=notify", "NotifyAccess=all", "TimeoutStartSec=2", "LoadCredential=up",
				"ExecStart=/bin/sh -c 'grep -q bad $${CREDENTIALS_DIRECTORY}/up || systemd-notify --ready; exec sleep infinity'"),
			"up.service: restart failed, failed (result timeout",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addUnits(t, m, map[string]string{"up.service": tt.unit, "up-other.service": loads("LoadCredential=up")})
			removeCreds(t, m, "up")
			old := newValue()
			mustPush(t, m, creds{"up": old})
			start(t, m, "up.service", "up-other.service")
			push(t, m, creds{"up": badValue()}, "--refresh", "auto", "--gate", longGate).wantRolledBack(t, tt.problem)
			wantActive(t, m, "up.service", "active")
			wantGiven(t, m, "up.service", "up", old)
			wantGiven(t, m, "up-other.service", "up", old)
			wantInForce(t, m, creds{"up": old})
			wantRejected(t, m, "up", tt.problem)
		})
	}
}

// testStartLimit has services that systemd would not start again by the time the old value is back: one that failed, and
// one that is well.
func testStartLimit(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"limit.service": picky("limit", "LoadCredential=limit", "Restart=always", "RestartSec=0") +
			lines("[Unit]", "StartLimitIntervalSec=1h", "StartLimitBurst=3"),
		"limit-other.service": loads("LoadCredential=limit") + lines("[Unit]", "StartLimitIntervalSec=1h", "StartLimitBurst=2"),
	})
	removeCreds(t, m, "limit")
	old := newValue()
	mustPush(t, m, creds{"limit": old})
	units := []string{"limit.service", "limit-other.service"}
	restored := func() {
		t.Helper()
		for _, u := range units {
			wantActive(t, m, u, "active")
			wantGiven(t, m, u, "limit", old)
		}
		wantInForce(t, m, creds{"limit": old})
	}
	start(t, m, units...)
	push(t, m, creds{"limit": badValue()}, "--refresh", "auto", "--gate", longGate).wantRolledBack(t, "limit.service: restart failed")
	restored()

	// Starts that a refresh brings about do not count.
	vmtest.Run(t, m, "systemctl", "restart", units[1])
	old = newValue()
	mustPush(t, m, creds{"limit": old}, "--refresh", "auto", "--gate", "1s")
	restored()
}

// testPasses has sets that nobody minds.
func testPasses(t *testing.T, m *vm.Machine, release vm.Release) {
	addUnits(t, m, map[string]string{
		"pass.service":        loads("LoadCredential=pass"),
		"pass-reload.service": loads("LoadCredential=pass", "RefreshOnReload=credentials", "ExecReload=/bin/true"),
		"pass-once.service":   lines("[Service]", "Type=oneshot", "RemainAfterExit=yes", "LoadCredential=pass", "ExecStart=/bin/true"),
	})
	removeCreds(t, m, "pass", "pass-alone")
	mustPush(t, m, creds{"pass": newValue()})
	start(t, m, "pass.service", "pass-reload.service", "pass-once.service")
	value := newValue()
	reload := "pass-reload.service restart done"
	if release.Systemd >= 260 {
		reload = "pass-reload.service reload done"
	}
	mustPush(t, m, creds{"pass": value}, "--gate", "1s").wantUnits(t, "pass.service restart done", reload, "pass-once.service restart done")
	wantInForce(t, m, creds{"pass": value})
	wantGiven(t, m, "pass.service", "pass", value)
	wantGiven(t, m, "pass-reload.service", "pass", value)
	// What was before is not kept any longer.
	ctl(t, m, nil, "rollback").want(t, host.StatusFailed, host.CodeNoPrevious)

	// Nobody is watched, nobody is waited for.
	mustPush(t, m, creds{"pass-alone": newValue()}, "--gate", "1h").wantUnits(t)
	mustPush(t, m, creds{"pass": value}, "--gate", "1h").wantUnits(t) // in force already
	if l := list(t, m); l.Gate != nil || len(l.Rejected) != 0 {
		t.Errorf("list has gate %v, rejected %+v", l.Gate, l.Rejected)
	}
}

// onTrial puts a new value of a running unit's on trial for that long, and returns when it is watched. The function
// that it returns waits for guestctl.
func onTrial(t *testing.T, m *vm.Machine, set creds, gate string) func() answer {
	t.Helper()
	end := startPush(t, m, set, "--refresh", "auto", "--gate", gate)
	waitPhase(t, m, "watching")
	return end
}

// fail kills a service's process.
func fail(t *testing.T, m *vm.Machine, unit string) {
	t.Helper()
	vmtest.Run(t, m, "systemctl", "kill", "--signal=KILL", unit)
}

// killed is what is said of it.
const killed = " failed: failed (result signal, killed by signal 9)"

// testOneGate has others call while a set is on trial.
func testOneGate(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"one.service":       loads("LoadCredential=one"),
		"one-other.service": loads("LoadCredential=one-other"),
	})
	removeCreds(t, m, "one", "one-other")
	old := creds{"one": newValue(), "one-other": newValue()}
	mustPush(t, m, old)
	start(t, m, "one.service", "one-other.service")
	pid := mainPID(t, m, "one-other.service")
	next := creds{"one": newValue()}
	end := onTrial(t, m, next, longGate)
	generation := *list(t, m).Generation
	for _, call := range [][]string{
		{"push", "--json-file", "-"},
		{"push", "--json-file", "-", "--refresh", "restart", "--gate", "1s"},
		{"rm", "one"},
		{"rollback"},
		{"refresh"},
	} {
		a := ctl(t, m, creds{"one-other": newValue()}.encode(), call...)
		a.want(t, host.StatusFailed, host.CodeGateInProgress)
		if a.Error.Generation == nil || *a.Error.Generation != generation {
			t.Errorf("%v: generation %v is on trial, want %d", call, a.Error.Generation, generation)
		}
	}
	l := list(t, m)
	if l.Gate == nil || *l.Gate != generation || *l.Generation != generation {
		t.Errorf("list has gate %v, generation %d, want %d", l.Gate, *l.Generation, generation)
	}
	wantFile(t, m, "/run/credstore/one", next["one"])
	wantFile(t, m, "/run/credstore/one-other", old["one-other"])
	if mainPID(t, m, "one-other.service") != pid {
		t.Error("one-other.service was restarted")
	}
	// Who is no consumer of the set may fail.
	fail(t, m, "one-other.service")
	// Who is may be restarted by somebody.
	vmtest.Run(t, m, "systemctl", "restart", "one.service")
	if got := gatePhase(t, m); got != "watching" {
		t.Errorf("after a restart by hand the gate's phase is %q", got)
	}
	fail(t, m, "one.service")
	end().wantRolledBack(t, "one.service"+killed)
	wantInForce(t, m, old)
	wantGiven(t, m, "one.service", "one", old["one"])
}

// testGateGoesOn disturbs a gate in many ways, and it goes on: to its good end, and to its bad one.
func testGateGoesOn(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"on-file.service":   loads("LoadCredential=on"),
		"on-socket.service": loads(bySocket("on")),
	})
	removeCreds(t, m, "on")
	old := newValue()
	mustPush(t, m, creds{"on": old})
	units := []string{"on-file.service", "on-socket.service"}
	start(t, m, units...)

	for _, tt := range []struct {
		name    string
		disturb func(t *testing.T)
		cut     bool // guestctl cannot see the end
	}{
		{"daemon-reexec", func(t *testing.T) { vmtest.Run(t, m, "systemctl", "daemon-reexec") }, false},
		{"daemon-reload", func(t *testing.T) { vmtest.Run(t, m, "systemctl", "daemon-reload") }, false},
		{"import", func(t *testing.T) { vmtest.Run(t, m, "systemctl", "restart", "guestagent-import.service") }, false},
		{"kill -9", func(t *testing.T) { killAgent(t, m) }, true},
		{"agent's restart", func(t *testing.T) { vmtest.Run(t, m, "systemctl", "restart", agentService) }, true},
		{"agent's stop", func(t *testing.T) {
			vmtest.Run(t, m, "systemctl", "stop", agentService)
			if list(t, m).Gate == nil { // the call wakes it
				t.Error("nothing is on trial")
			}
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pids := func() [2]int {
				t.Helper()
				return [2]int{mainPID(t, m, units[0]), mainPID(t, m, units[1])}
			}
			next := newValue()
			end := onTrial(t, m, creds{"on": next}, longGate)
			before := pids()
			tt.disturb(t)
			if tt.cut {
				if a := end(); a.exit == 0 || a.exit == host.StatusRolledBack {
					t.Errorf("guestctl ended with %+v", a.Result)
				}
			}
			eventually(t, "the agent is up", func() bool { return show(t, m, agentService, "ActiveState") == "active" })
			if pids() != before {
				t.Error("the consumers were restarted")
			}
			if got := gatePhase(t, m); got != "watching" {
				t.Errorf("the gate's phase is %q", got)
			}
			wantFile(t, m, "/run/credstore/on", next)
			fail(t, m, units[1])
			if !tt.cut {
				end().wantRolledBack(t, units[1]+killed)
			}
			waitPhase(t, m, "")
			for _, u := range units {
				wantActive(t, m, u, "active")
				wantGiven(t, m, u, "on", old)
			}
			wantInForce(t, m, creds{"on": old})
			wantRejected(t, m, "on", units[1]+killed)

			// And to its good end.
			good := newValue()
			end = onTrial(t, m, creds{"on": good}, "2s")
			tt.disturb(t)
			a := end()
			if !tt.cut {
				a.want(t, 0, "")
			}
			waitPhase(t, m, "")
			wantInForce(t, m, creds{"on": good})
			for _, u := range units {
				wantGiven(t, m, u, "on", good)
			}
			if l := list(t, m); len(l.Rejected) != 0 {
				t.Errorf("list has rejected %+v", l.Rejected)
			}
			old = good
		})
	}
}

// testKilledRefreshing kills the agent while it waits for the consumers.
func testKilledRefreshing(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"kill-held.service":   loads(held, dislikes("kill"), "LoadCredential=kill"),
		"kill-file.service":   loads("LoadCredential=kill"),
		"kill-socket.service": loads(bySocket("kill")),
	})
	removeCreds(t, m, "kill")
	old := newValue()
	mustPush(t, m, creds{"kill": old})
	units := []string{"kill-held.service", "kill-file.service", "kill-socket.service"}
	start(t, m, units...)
	for _, tt := range []struct {
		name  string
		value []byte
		gate  string
	}{
		{"passes", newValue(), "1s"},
		{"fails", badValue(), longGate},
	} {
		t.Run(tt.name, func(t *testing.T) {
			holdStart(t, m)
			end := startPush(t, m, creds{"kill": tt.value}, "--refresh", "auto", "--gate", tt.gate)
			waitHeld(t, m, units[0])
			if got := gatePhase(t, m); got != "refreshing" {
				t.Errorf("the gate's phase is %q", got)
			}
			killAgent(t, m)
			if a := end(); a.exit == 0 || a.exit == host.StatusRolledBack {
				t.Errorf("guestctl ended with %+v", a.Result)
			}
			letGo(t, m)
			waitPhase(t, m, "")
			want := tt.value
			if tt.gate == longGate {
				want = old
				// Its state says no more where the next agent has reset it before its own try.
				wantRejected(t, m, "kill", "kill-held.service: restart failed, ")
			} else if l := list(t, m); len(l.Rejected) != 0 {
				t.Errorf("list has rejected %+v", l.Rejected)
			}
			wantInForce(t, m, creds{"kill": want})
			for _, u := range units {
				wantActive(t, m, u, "active")
				wantGiven(t, m, u, "kill", want)
			}
			old = want
		})
	}
}

// testKilledRestoring kills the agent while it brings the old value back.
func testKilledRestoring(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"undo-held.service":   loads(held, "LoadCredential=undo"),
		"undo-socket.service": loads(bySocket("undo")),
	})
	removeCreds(t, m, "undo")
	old := newValue()
	mustPush(t, m, creds{"undo": old})
	units := []string{"undo-held.service", "undo-socket.service"}
	start(t, m, units...)
	end := onTrial(t, m, creds{"undo": newValue()}, longGate)
	holdStart(t, m)
	fail(t, m, units[0])
	waitHeld(t, m, units[0])
	if got := gatePhase(t, m); got != "restoring" {
		t.Errorf("the gate's phase is %q", got)
	}
	wantFile(t, m, "/run/credstore/undo", old)
	killAgent(t, m)
	if a := end(); a.exit == 0 {
		t.Errorf("guestctl ended with %+v", a.Result)
	}
	letGo(t, m)
	waitPhase(t, m, "")
	wantInForce(t, m, creds{"undo": old})
	wantRejected(t, m, "undo", units[0]+killed)
	for _, u := range units {
		wantActive(t, m, u, "active")
		wantGiven(t, m, u, "undo", old)
	}
}

// testCallerGone kills guestctl. What it began goes on.
func testCallerGone(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{"gone.service": loads("LoadCredential=gone")})
	removeCreds(t, m, "gone")
	old := newValue()
	mustPush(t, m, creds{"gone": old})
	start(t, m, "gone.service")
	call := func(value []byte, gate string) {
		t.Helper()
		vmtest.WriteFile(t, m, "/run/gone", 0o600, value)
		atEnd(t, m, "rm", "-f", "/run/gone")
		vmtest.Run(t, m, "systemd-run", "--unit=caller", "--collect", "guestctl", "push", agentTarget, "gone:/run/gone", "--gate", gate)
		waitPhase(t, m, "watching")
		vmtest.Run(t, m, "systemctl", "kill", "--signal=KILL", "caller.service")
		eventually(t, "guestctl has ended", func() bool { return show(t, m, "caller.service", "LoadState") == "not-found" })
	}
	call(newValue(), longGate)
	if c := consumerOf(t, m, "gone.service", "gone"); c.Loaded != vsockrpc.LoadedInForce || gatePhase(t, m) != "watching" {
		t.Errorf("list says %+v, and the gate's phase is %q", c, gatePhase(t, m))
	}
	fail(t, m, "gone.service")
	waitPhase(t, m, "")
	wantInForce(t, m, creds{"gone": old})
	wantRejected(t, m, "gone", "gone.service"+killed)
	wantGiven(t, m, "gone.service", "gone", old)

	next := newValue()
	call(next, "2s")
	waitPhase(t, m, "")
	wantInForce(t, m, creds{"gone": next})
	wantGiven(t, m, "gone.service", "gone", next)
}
