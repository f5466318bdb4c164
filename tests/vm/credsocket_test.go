package vm_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
)

const (
	credPeer = "/run/vm-test/credpeer"
	keeper   = "/run/vm-test/keep"
	// keepScript has a unit keep in /run/seen what it was given: a line for each credential, with its name, length and
	// SHA-256. The file is there as a whole or not at all.
	keepScript = `#!/bin/sh
set -e
cd "$CREDENTIALS_DIRECTORY"
for f in *; do
  echo "$f $(wc -c <"$f") $(sha256sum <"$f" | cut -c -64)"
done >"/run/seen/.$1.$$"
mv "/run/seen/.$1.$$" "/run/seen/$1"
`
)

// TestCredentialsSocket has units of real systemd load credentials from the agent's socket.
func TestCredentialsSocket(t *testing.T) {
	eachContainer(t, testCredentialsSocket)
}

func testCredentialsSocket(t *testing.T, m *vm.Machine, release vm.Release) {
	prepareAskers(t, m)
	for _, tt := range []struct {
		name string
		test func(*testing.T, *vm.Machine, vm.Release)
	}{
		{"there", testSocketThere},
		{"later", testSocketLater},
		{"stop", testSocketStop},
		{"idle", testSocketIdle},
		{"wait", testSocketWait},
		{"burst of kills", testSocketBurst},
		{"kills at any time", testSocketKills},
		{"broken configuration", testSocketConfig},
		{"broken agent", testSocketBroken},
		{"more than may wait", testSocketMany},
		{"forged", testSocketForged},
		{"policy", testSocketPolicy},
		{"one generation", testSocketGeneration},
		{"reload", testSocketReload},
		{"audit", testSocketAudit},
		{"sizes", testSocketSizes},
		{"names", testSocketNames},
		{"kinds", testSocketKinds},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, m, release) })
	}
	t.Run("silence", func(t *testing.T) { wantSilence(t, m) })
}

// An asker is a service that loads credentials over the socket, and keeps what it was given.
type asker struct {
	kind  string // Type=; a oneshot that stays active where it is empty
	naked bool   // without the check that a consumer is to have
	more  string // further settings of [Service], each with its newline
}

func (a asker) loading(names ...string) string {
	keep := keeper + " %n"
	s := []string{"[Unit]", "After=guestagent-credentials.socket", "[Service]"}
	switch a.kind {
	case "":
		s = append(s, "Type=oneshot", "RemainAfterExit=yes", "ExecStart="+keep)
	case "notify":
		s = append(s, "Type=notify", "NotifyAccess=all", "ExecStart=/bin/sh -c '"+keep+"; systemd-notify --ready; exec sleep infinity'")
	default:
		s = append(s, "Type="+a.kind, "ExecStart=/bin/sh -c '"+keep+"; exec sleep infinity'")
	}
	for _, name := range names {
		s = append(s, "LoadCredential="+name+":"+credSocket)
		if !a.naked {
			s = append(s, "ExecStartPre=/usr/bin/test -s ${CREDENTIALS_DIRECTORY}/"+name)
		}
	}
	return lines(s...) + a.more
}

// prepareAskers makes what askers need.
func prepareAskers(t *testing.T, m *vm.Machine) {
	t.Helper()
	vmtest.WriteFile(t, m, keeper, 0o755, []byte(keepScript))
	vmtest.Run(t, m, "install", "-d", "-m", "1777", "/run/seen")
}

// everyAsker are services of every type, with the check and without, by name.
func everyAsker(prefix string, names ...string) map[string]string {
	units := map[string]string{}
	for _, kind := range []string{"exec", "notify", "simple", ""} {
		suffix := cmp.Or(kind, "oneshot") + ".service"
		units[prefix+"-"+suffix] = asker{kind: kind}.loading(names...)
		units[prefix+"-naked-"+suffix] = asker{kind: kind, naked: true}.loading(names...)
	}
	return units
}

// sortedNames are the names of units.
func sortedNames(units map[string]string) []string { return slices.Sorted(maps.Keys(units)) }

// kept is what the script keeps of a set.
func (c creds) kept() string {
	var s strings.Builder
	for _, name := range slices.Sorted(maps.Keys(c)) {
		fmt.Fprintf(&s, "%s %d %x\n", name, len(c[name]), sha256.Sum256(c[name]))
	}
	return s.String()
}

// largeValue is a value of n bytes, text with mark all over it.
func largeValue(n int) []byte {
	v := append(newValue(), '\n')
	return bytes.Repeat(v, n/len(v)+1)[:n]
}

// begin starts units and does not wait.
func begin(t *testing.T, m *vm.Machine, units ...string) {
	t.Helper()
	vmtest.Run(t, m, append([]string{"systemctl", "start", "--no-block"}, units...)...)
}

// showAll is one property of each of the units.
func showAll(t *testing.T, m *vm.Machine, property string, units ...string) []string {
	t.Helper()
	return strings.Fields(vmtest.Run(t, m, append([]string{"systemctl", "show", "--value", "--property=" + property}, units...)...))
}

// until waits until get returns want.
func until(t *testing.T, what, want string, get func() string) {
	t.Helper()
	var got string
	defer func() {
		if got != want {
			t.Logf("%s: %q, want %q", what, got, want)
		}
	}()
	eventually(t, what, func() bool {
		got = get()
		return got == want
	})
}

// untilState waits until all units are in a state.
func untilState(t *testing.T, m *vm.Machine, state string, units ...string) {
	t.Helper()
	want := slices.Repeat([]string{state}, len(units))
	until(t, fmt.Sprintf("%s are %s", units, state), fmt.Sprint(want), func() string {
		return fmt.Sprint(showAll(t, m, "ActiveState", units...))
	})
}

// waitingUnits are the units that wait, as guestctl list has it. An agent that was just killed may not answer.
func waitingUnits(t *testing.T, m *vm.Machine) string {
	t.Helper()
	a, err := runCtl(t.Context(), m, nil, "list")
	if err != nil {
		t.Fatal(err)
	}
	if a.exit != 0 {
		return a.stderr
	}
	var units []string
	for _, w := range a.Waiting {
		units = append(units, w.Unit)
	}
	slices.Sort(units)
	return fmt.Sprint(units)
}

// untilWaiting waits until these units wait at the agent, and no other.
func untilWaiting(t *testing.T, m *vm.Machine, units ...string) {
	t.Helper()
	slices.Sort(units)
	until(t, "units wait", fmt.Sprint(units), func() string { return waitingUnits(t, m) })
}

// forget removes what was kept by former starts.
func forget(t *testing.T, m *vm.Machine) {
	t.Helper()
	vmtest.Run(t, m, "find", "/run/seen", "-type", "f", "-delete")
}

// wantKept checks what a unit was given. It waits for it: a Type=simple unit is active before that.
func wantKept(t *testing.T, m *vm.Machine, label string, want creds) {
	t.Helper()
	until(t, "what "+label+" was given", want.kept(), func() string { return kept(t, m, label) })
}

func kept(t *testing.T, m *vm.Machine, label string) string {
	t.Helper()
	return string(vmtest.Exec(t, m, vm.Command{Argv: []string{"cat", "/run/seen/" + label}}).Stdout)
}

// wantNothingKept checks that no unit has run its ExecStart= so far.
func wantNothingKept(t *testing.T, m *vm.Machine) {
	t.Helper()
	if got := vmtest.Run(t, m, "ls", "-A", "/run/seen"); got != "" {
		t.Errorf("these have run: %s", got)
	}
}

// wantFailed waits until units have failed for want of a credential, and checks that they have not run.
func wantFailed(t *testing.T, m *vm.Machine, units ...string) {
	t.Helper()
	untilState(t, m, "failed", units...)
	for _, unit := range units {
		// The main process, or the one before it.
		out := vmtest.Run(t, m, "systemctl", "show", "--property=ExecMainStatus,ExecStartPre", unit)
		if !strings.Contains(out, "tatus=243") {
			t.Errorf("%s failed, want it to with status 243/CREDENTIALS:\n%s", unit, out)
		}
		wantNoFile(t, m, "/run/seen/"+unit)
	}
}

// wantLog waits until the agent's journal has a line with all of the words.
func wantLog(t *testing.T, m *vm.Machine, since string, words ...string) {
	t.Helper()
	var log string
	defer func() {
		if t.Failed() {
			t.Logf("the agent's journal:\n%s", log)
		}
	}()
	eventually(t, fmt.Sprintf("a line with %q is in the agent's journal", words), func() bool {
		log = agentJournal(t, m, since)
		return slices.ContainsFunc(strings.Split(log, "\n"), func(line string) bool {
			return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) })
		})
	})
}

// connections counts the sockets that a unit's request led to, in the agent or in PID 1's store; not the listening one.
func connections(t *testing.T, m *vm.Machine) string {
	t.Helper()
	n := strings.Count(string(vmtest.ReadFile(t, m, "/proc/net/unix")), " "+credSocket+"\n")
	return strconv.Itoa(n - 1)
}

// stored is how many descriptors PID 1 keeps for the agent.
func stored(t *testing.T, m *vm.Machine) int {
	t.Helper()
	n, err := strconv.Atoi(show(t, m, agentService, "NFileDescriptorStore"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// changeAgent gives the agent's service a drop-in and restarts it. At the end of the test, it is as before.
func changeAgent(t *testing.T, m *vm.Machine, settings ...string) {
	t.Helper()
	t.Cleanup(func() {
		if res, err := m.Run(context.WithoutCancel(t.Context()), "systemctl", "restart", agentService); err != nil || res.ExitCode != 0 {
			t.Errorf("restarting the agent: %v\n%s", err, res.Stderr)
		}
	})
	addUnits(t, m, map[string]string{agentService + ".d/test.conf": lines(append([]string{"[Service]"}, settings...)...)})
	vmtest.Run(t, m, "systemctl", "restart", agentService)
}

// testSocketThere starts units whose value is there.
func testSocketThere(t *testing.T, m *vm.Machine, _ vm.Release) {
	set := creds{"there": newValue()}
	removeCreds(t, m, "there")
	mustPush(t, m, set)
	units := everyAsker("there", "there")
	addUnits(t, m, units)
	start(t, m, sortedNames(units)...)
	for unit := range units {
		wantKept(t, m, unit, set)
	}
}

// testSocketLater starts units before their value is there, and has them start by themselves when it comes, whatever
// becomes of the agent meanwhile.
func testSocketLater(t *testing.T, m *vm.Machine, release vm.Release) {
	for _, tt := range []struct {
		name    string
		disturb func(t *testing.T)
	}{
		{"nothing", func(*testing.T) {}},
		{"kill", func(t *testing.T) {
			for range 3 {
				killAgent(t, m)
			}
		}},
		{"restart", func(t *testing.T) { vmtest.Run(t, m, "systemctl", "restart", agentService) }},
		{"upgrade", func(t *testing.T) { // as tools/deb's postinst does it
			vmtest.Run(t, m, "systemctl", "daemon-reload")
			vmtest.Run(t, m, "systemctl", "try-restart", agentService)
		}},
		{"reexec", func(t *testing.T) { vmtest.Run(t, m, "systemctl", "daemon-reexec") }},
		{"stop", func(t *testing.T) { vmtest.Run(t, m, "systemctl", "stop", agentService) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			forget(t, m)
			name := "later-" + tt.name
			set := creds{name: newValue()}
			removeCreds(t, m, name)
			units := everyAsker(name, name)
			names := sortedNames(units)
			addUnits(t, m, units)
			begin(t, m, names...)
			untilWaiting(t, m, names...)
			for i, state := range showAll(t, m, "ActiveState", names...) {
				want := "activating"
				if names[i] == name+"-naked-simple.service" {
					want = "active" // that is what the check is good for
				}
				if state != want {
					t.Errorf("%s is %s while it waits, want %s", names[i], state, want)
				}
			}
			if n := stored(t, m); n != len(units) {
				t.Errorf("PID 1 keeps %d descriptors for the agent, want %d", n, len(units))
			}
			tt.disturb(t)
			if tt.name == "stop" && release.Systemd < 254 {
				// PID 1 keeps nothing of a service that was stopped.
				wantFailed(t, m, names...)
				return
			}
			if n := stored(t, m); n != len(units) {
				t.Errorf("afterwards PID 1 keeps %d descriptors for the agent, want %d", n, len(units))
			}
			wantNothingKept(t, m)
			mustPush(t, m, set)
			untilState(t, m, "active", names...)
			for unit := range units {
				wantKept(t, m, unit, set)
			}
			untilWaiting(t, m)
		})
	}
}

// testSocketStop stops units that wait, which leaves nothing behind.
func testSocketStop(t *testing.T, m *vm.Machine, _ vm.Release) {
	forget(t, m)
	units := everyAsker("stop", "stop-never")
	names := sortedNames(units)
	addUnits(t, m, units)
	begin(t, m, names...)
	untilWaiting(t, m, names...)
	if got, want := connections(t, m), strconv.Itoa(len(units)); got != want {
		t.Errorf("%s connections while %s units wait", got, want)
	}
	vmtest.Run(t, m, append([]string{"systemctl", "stop"}, names...)...)
	untilWaiting(t, m)
	until(t, "connections that are left", "0", func() string { return connections(t, m) })
	until(t, "descriptors that PID 1 keeps", "0", func() string { return strconv.Itoa(stored(t, m)) })
	wantNothingKept(t, m)
}

// testSocketIdle has an agent that ends when nobody needs it, and stays while a unit waits. The unit's own time-out, which
// bounds its waiting, is the clock.
func testSocketIdle(t *testing.T, m *vm.Machine, _ vm.Release) {
	set := creds{"idle": newValue()}
	removeCreds(t, m, "idle")
	const clock = "TimeoutStartSec=3s\n"
	addUnits(t, m, map[string]string{
		"idle-exec.service":    asker{kind: "exec", more: clock}.loading("idle-never"),
		"idle-oneshot.service": asker{naked: true, more: clock}.loading("idle-never"),
		"idle-stopped.service": asker{}.loading("idle-never"),
		"idle.service":         asker{}.loading("idle"),
	})
	mustPush(t, m, set)
	changeAgent(t, m, "ExecStart=", "ExecStart=/usr/bin/guestagent serve --idle=1s --pid1-credentials=/run/guestagent")
	begin(t, m, "idle-exec.service", "idle-oneshot.service", "idle-stopped.service")
	untilWaiting(t, m, "idle-exec.service", "idle-oneshot.service", "idle-stopped.service")
	run := show(t, m, agentService, "InvocationID")
	untilState(t, m, "failed", "idle-exec.service", "idle-oneshot.service")
	for _, unit := range []string{"idle-exec.service", "idle-oneshot.service"} {
		if got := show(t, m, unit, "Result"); got != "timeout" {
			t.Errorf("%s failed with result %s, want timeout", unit, got)
		}
	}
	if show(t, m, agentService, "InvocationID") != run {
		t.Error("the agent has ended while units waited")
	}
	vmtest.Run(t, m, "systemctl", "stop", "idle-stopped.service")
	untilState(t, m, "inactive", agentService)
	if n := stored(t, m); n != 0 {
		t.Errorf("PID 1 keeps %d descriptors for an agent that ended with nobody waiting", n)
	}
	// The next request wakes it.
	start(t, m, "idle.service")
	wantKept(t, m, "idle.service", set)
	untilState(t, m, "inactive", agentService)
}

// testSocketWait has the agent bound the waiting, from the first acceptance on, whichever process that was in.
func testSocketWait(t *testing.T, m *vm.Machine, _ vm.Release) {
	forget(t, m)
	configure(t, m, `{"socket": {"wait": 2}}`)
	since := cursor(t, m)
	units := everyAsker("wait", "wait-never")
	names := sortedNames(units)
	addUnits(t, m, units)
	begin(t, m, names...)
	untilWaiting(t, m, names...)
	killAgent(t, m)
	wantFailed(t, m, names...)
	for _, unit := range names {
		wantLog(t, m, since, "failing a unit that asks for a credential", "unit="+unit, "credential=wait-never", "did not arrive in time")
	}
}

// testSocketBurst kills the agent far more often than any start limit allows.
func testSocketBurst(t *testing.T, m *vm.Machine, _ vm.Release) {
	forget(t, m)
	set := creds{"burst": newValue()}
	removeCreds(t, m, "burst")
	addUnits(t, m, map[string]string{"burst@.service": asker{naked: true}.loading("burst")})
	var names []string
	for i := range 20 {
		names = append(names, fmt.Sprintf("burst@%d.service", i))
	}
	begin(t, m, names...)
	untilWaiting(t, m, names...)
	vmtest.Run(t, m, "bash", "-ec", killing(40, ""))
	untilWaiting(t, m, names...)
	wantNothingKept(t, m)
	mustPush(t, m, set)
	untilState(t, m, "active", names...)
	for _, unit := range names {
		wantKept(t, m, unit, set)
	}
}

// killing is a script that kills n processes of the agent, each as soon as there is one and after a pause.
func killing(n int, pause string) string {
	return fmt.Sprintf(`for ((n = 0; n < %d; )); do
  pid=$(systemctl show --value --property=MainPID %s)
  [ "$pid" != 0 ] || continue
  %s
  kill -9 "$pid" 2>/dev/null || continue
  n=$((n + 1))
done`, n, agentService, pause)
}

// testSocketKills kills the agent at random moments while it hands out large values. A unit gets them whole, or fails.
func testSocketKills(t *testing.T, m *vm.Machine, _ vm.Release) {
	forget(t, m)
	set := creds{"kills-64k": largeValue(64 << 10), "kills-900k": largeValue(900 << 10)}
	names := slices.Sorted(maps.Keys(set)) // of the credentials
	removeCreds(t, m, names...)
	mustPush(t, m, set)
	addUnits(t, m, map[string]string{
		"kills@.service":       asker{}.loading(names...),
		"kills-naked@.service": asker{naked: true}.loading(names...),
	})
	var units []string
	for i := range 25 {
		units = append(units, fmt.Sprintf("kills@%d.service", i), fmt.Sprintf("kills-naked@%d.service", i))
	}
	begin(t, m, units...)
	// Before an agent is ready, and while it hands out: its start takes some 60 ms.
	vmtest.Run(t, m, "bash", "-ec", killing(12, "sleep 0.0$((RANDOM % 10))"))
	var states []string
	eventually(t, "all have started or failed", func() bool {
		states = showAll(t, m, "ActiveState", units...)
		return !slices.Contains(states, "activating") && !slices.Contains(states, "inactive")
	})
	count := map[string]int{}
	for i, unit := range units {
		count[states[i]]++
		if states[i] == "active" {
			wantKept(t, m, unit, set)
		} else {
			wantFailed(t, m, unit)
		}
	}
	t.Logf("of %d units are %v", len(units), count)
	if count["active"] == 0 {
		t.Error("no unit has started")
	}
}

// testSocketConfig breaks the agent's configuration while a unit waits. What may have been meant to keep a unit from a
// credential keeps everybody from it, any other fault nobody; no unit gets an empty one.
func testSocketConfig(t *testing.T, m *vm.Machine, _ vm.Release) {
	for _, tt := range []struct {
		name, config string
		served       bool
	}{
		{"cut", `{"policy": {"load": `, false},
		{"policy", `{"policy": {"lod": {}}}`, false},
		{"pattern", `{"policy": {"load": {"a/b": ["*"]}}}`, false},
		{"elsewhere", `{"sockets": {}, "peer": {"privilegedPort": 7}, "socket": {"wait": "long"}}`, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			forget(t, m)
			waits, there := "config-"+tt.name+"-later", "config-"+tt.name
			set := creds{waits: newValue(), there: newValue()}
			removeCreds(t, m, waits, there)
			mustPush(t, m, creds{there: set[there]})
			addUnits(t, m, map[string]string{
				waits + ".service": asker{}.loading(waits), there + ".service": asker{}.loading(there),
				waits + "-naked.service": asker{naked: true}.loading(waits), there + "-naked.service": asker{naked: true}.loading(there),
			})
			waiting, starting := []string{waits + ".service", waits + "-naked.service"}, []string{there + ".service", there + "-naked.service"}
			begin(t, m, waiting...)
			untilWaiting(t, m, waiting...)
			since := cursor(t, m)
			configure(t, m, tt.config)
			begin(t, m, starting...)
			if !tt.served {
				wantFailed(t, m, slices.Concat(waiting, starting)...)
				for _, unit := range slices.Concat(waiting, starting) {
					wantLog(t, m, since, "unit="+unit, "credential="+strings.TrimSuffix(strings.TrimSuffix(unit, ".service"), "-naked"),
						"policy in the guest's configuration is at fault")
				}
				return
			}
			untilState(t, m, "active", starting...)
			mustPush(t, m, creds{waits: set[waits]})
			untilState(t, m, "active", waiting...)
			for _, unit := range waiting {
				wantKept(t, m, unit, creds{waits: set[waits]})
			}
			for _, unit := range starting {
				wantKept(t, m, unit, creds{there: set[there]})
			}
		})
	}
}

// testSocketBroken has a unit wait at an agent that cannot start any more, until it is repaired.
func testSocketBroken(t *testing.T, m *vm.Machine, _ vm.Release) {
	forget(t, m)
	set := creds{"broken": newValue()}
	removeCreds(t, m, "broken")
	addUnits(t, m, map[string]string{
		"broken.service": asker{}.loading("broken"), "broken-naked.service": asker{naked: true}.loading("broken"),
		"broken-new.service": asker{naked: true}.loading("broken"),
	})
	waiting := []string{"broken.service", "broken-naked.service"}
	begin(t, m, waiting...)
	untilWaiting(t, m, waiting...)
	t.Run("for a time", func(t *testing.T) {
		// Its cleanup is the repair.
		t.Cleanup(func() {
			if res, err := m.Run(context.WithoutCancel(t.Context()), "systemctl", "restart", agentService); err != nil || res.ExitCode != 0 {
				t.Errorf("restarting the agent: %v\n%s", err, res.Stderr)
			}
		})
		addUnits(t, m, map[string]string{agentService + ".d/broken.conf": lines("[Service]", "ExecStart=", "ExecStart=/bin/false")})
		restarts := func() int {
			n, err := strconv.Atoi(show(t, m, agentService, "NRestarts"))
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		before := restarts()
		vmtest.Run(t, m, "systemctl", "kill", "--signal=KILL", agentService)
		begin(t, m, "broken-new.service") // waits in the socket's backlog
		eventually(t, "the agent has failed to start more often than a start limit allows", func() bool { return restarts() > before+6 })
		wantNothingKept(t, m)
	})
	mustPush(t, m, set)
	waiting = append(waiting, "broken-new.service")
	untilState(t, m, "active", waiting...)
	for _, unit := range waiting {
		wantKept(t, m, unit, set)
	}
}

// testSocketMany has more units wait than the agent holds: the rest waits in the socket's backlog.
func testSocketMany(t *testing.T, m *vm.Machine, _ vm.Release) {
	const holds, more = 512, 8
	forget(t, m)
	set := creds{"many": newValue()}
	removeCreds(t, m, "many")
	addUnits(t, m, map[string]string{"many@.service": asker{naked: true}.loading("many")})
	var units []string
	for i := range holds + more {
		units = append(units, fmt.Sprintf("many@%d.service", i))
	}
	begin(t, m, units...)
	full := func() bool {
		n := stored(t, m)
		if n > holds {
			t.Errorf("PID 1 keeps %d descriptors for the agent, want no more than %d", n, holds)
		}
		return n == holds && connections(t, m) == strconv.Itoa(holds+more)
	}
	eventually(t, "all wait", full)
	killAgent(t, m)
	eventually(t, "all wait again", full)
	if n := len(list(t, m).Waiting); n != holds {
		t.Errorf("%d units wait, want %d", n, holds)
	}
	wantNothingKept(t, m)
	mustPush(t, m, set)
	until(t, "connections that are left", "0", func() string { return connections(t, m) })
	until(t, "units that have not started", "", func() string {
		return vmtest.Run(t, m, "systemctl", "list-units", "--plain", "--no-legend", "--state=activating", "many@*")
	})
	got := vmtest.Run(t, m, "sh", "-c", "cat /run/seen/many@* | sort | uniq -c")
	if want := fmt.Sprintf("%d %s", holds+more, set.kept()); strings.TrimLeft(got, " ") != want {
		t.Errorf("the units were given:\n%s\nwant:\n%s", got, want)
	}
}

// testSocketForged asks for a credential from the address of a unit without being PID 1.
func testSocketForged(t *testing.T, m *vm.Machine, _ vm.Release) {
	vmtest.WriteFile(t, m, credPeer, 0o755, readHost(t, vmtest.Binary(t, "github.com/guestagent/guestagent/tests/vm/credpeer")))
	set := creds{"forged": newValue()}
	removeCreds(t, m, "forged")
	mustPush(t, m, set)
	addUnits(t, m, map[string]string{"forged.service": asker{}.loading("forged")})
	start(t, m, "forged.service")
	const address = "@77aa77aa/unit/forged.service/forged"

	if res := vmtest.Exec(t, m, asNobody(credPeer, address, credSocket)); res.ExitCode == 0 || !bytes.Contains(res.Stderr, []byte("permission denied")) {
		t.Errorf("nobody: exit status %d, %s%s, want permission denied", res.ExitCode, res.Stdout, res.Stderr)
	}

	t.Run("with an open socket", func(t *testing.T) {
		since := cursor(t, m)
		reopen := func(ctx context.Context) {
			for _, argv := range [][]string{{"systemctl", "stop", agentService}, {"systemctl", "restart", "guestagent-credentials.socket"}} {
				if res, err := m.Run(ctx, argv...); err != nil || res.ExitCode != 0 {
					t.Errorf("%q: %v\n%s", argv, err, res.Stderr)
				}
			}
		}
		t.Cleanup(func() { reopen(context.WithoutCancel(t.Context())) })
		addUnits(t, m, map[string]string{"guestagent-credentials.socket.d/open.conf": lines("[Socket]", "SocketMode=0666")})
		reopen(t.Context())
		res := vmtest.Exec(t, m, asNobody(credPeer, address, credSocket))
		if got := string(res.Stdout); got != "0 bytes, 0 not 0\n" {
			t.Errorf("nobody was given %q%s, want 0 bytes", got, res.Stderr)
		}
		uid := strings.TrimSpace(vmtest.Run(t, m, "id", "-u", "nobody"))
		wantLog(t, m, since, "a peer that is not the service manager asked for a credential", "uid="+uid)
		start(t, m, "forged.service")
	})
	if got := vmtest.Run(t, m, "stat", "-c", "%a", credSocket); got != "600\n" {
		t.Errorf("afterwards the socket's mode is %s", got)
	}

	// Root, but not systemd. What fails a unit is no value.
	for _, from := range []string{
		"@77aa77aa/unit/no-such.service/forged", "@77aa77aa/unit/forged.service", "@forged", "/run/vm-test/forged",
	} {
		since := cursor(t, m)
		if got := vmtest.Run(t, m, credPeer, from, credSocket); got != "1048577 bytes, 0 not 0\n" {
			t.Errorf("root as %s was given %q, want too much of nothing", from, got)
		}
		wantLog(t, m, since, "failing a unit that asks for a credential")
	}
}

// testSocketPolicy has units that may load a name, and one that may not.
func testSocketPolicy(t *testing.T, m *vm.Machine, _ vm.Release) {
	forget(t, m)
	set := creds{"policy-key": newValue(), "policy-free": newValue()}
	removeCreds(t, m, "policy-key", "policy-free")
	mustPush(t, m, set)
	configure(t, m, `{"policy": {"load": {"policy-k*": ["policy-good.service", "policy-t@*.service"], "policy-none": []}}}`)
	addUnits(t, m, map[string]string{
		"policy-good.service":  asker{}.loading("policy-key"),
		"policy-t@.service":    asker{}.loading("policy-key"),
		"policy-free.service":  asker{}.loading("policy-free"),
		"policy-bad.service":   asker{}.loading("policy-key"),
		"policy-naked.service": asker{naked: true, kind: "exec"}.loading("policy-key"),
		// A name that is not there: it is denied, and does not wait.
		"policy-none.service": asker{naked: true}.loading("policy-none"),
	})
	since := cursor(t, m)
	start(t, m, "policy-good.service", "policy-t@1.service", "policy-free.service")
	wantKept(t, m, "policy-good.service", creds{"policy-key": set["policy-key"]})
	wantKept(t, m, "policy-t@1.service", creds{"policy-key": set["policy-key"]})
	wantKept(t, m, "policy-free.service", creds{"policy-free": set["policy-free"]})
	for unit, name := range map[string]string{"policy-bad": "policy-key", "policy-naked": "policy-key", "policy-none": "policy-none"} {
		unit += ".service"
		if res := vmtest.Exec(t, m, vm.Command{Argv: []string{"systemctl", "start", unit}}); res.ExitCode == 0 {
			t.Errorf("%s has started", unit)
		}
		wantFailed(t, m, unit)
		wantLog(t, m, since, "failing a unit that asks for a credential", "unit="+unit, "credential="+name, "policy.load")
		if loaded := auditOf(t, m, name, unit); len(loaded) != 0 {
			t.Errorf("the audit says that %s loaded %s: %+v", unit, name, loaded)
		}
	}
}

// A loadEntry is an entry of the journal about a load.
type loadEntry struct {
	Unit       string `json:"UNIT"`
	Credential string `json:"CREDENTIAL"`
	Revision   string `json:"REVISION"`
	Generation string `json:"GENERATION"`
	Message    string `json:"MESSAGE"`
}

// auditOf are the journal's entries about loads of a name by a unit.
func auditOf(t *testing.T, m *vm.Machine, name, unit string) []loadEntry {
	t.Helper()
	var all []loadEntry
	out := vmtest.Exec(t, m, vm.Command{Argv: []string{"journalctl", "--no-pager", "--output=json", "CREDENTIAL=" + name, "UNIT=" + unit}}).Stdout
	for line := range bytes.Lines(out) {
		var e loadEntry
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("journalctl: %v", err)
		}
		all = append(all, e)
	}
	return all
}

// testSocketGeneration changes values while units start. Each start has all of one generation.
func testSocketGeneration(t *testing.T, m *vm.Machine, _ vm.Release) {
	t.Run("two names", func(t *testing.T) {
		forget(t, m)
		removeCreds(t, m, "gen-a", "gen-b")
		set := creds{"gen-a": newValue(), "gen-b": newValue()}
		units := everyAsker("gen", "gen-a", "gen-b")
		names := sortedNames(units)
		addUnits(t, m, units)
		mustPush(t, m, creds{"gen-a": newValue()})
		begin(t, m, names...)
		untilWaiting(t, m, names...)
		mustPush(t, m, creds{"gen-a": set["gen-a"]})
		untilWaiting(t, m, names...)
		mustPush(t, m, creds{"gen-b": set["gen-b"]})
		untilState(t, m, "active", names...)
		for _, unit := range names {
			wantKept(t, m, unit, set)
		}
	})

	// The value changes between the first process of a start and its last.
	for _, tt := range []struct {
		name         string
		change, kill bool
	}{{"change", true, false}, {"kill", false, true}, {"change and kill", true, true}} {
		t.Run(tt.name, func(t *testing.T) {
			forget(t, m)
			name := "slow-" + strings.ReplaceAll(tt.name, " ", "-")
			unit := name + ".service"
			old := creds{name: newValue(), name + "-2": newValue()}
			removeCreds(t, m, name, name+"-2")
			mustPush(t, m, old)
			fifo := "/run/vm-test/" + name
			vmtest.Run(t, m, "mkfifo", fifo)
			addUnits(t, m, map[string]string{
				unit: asker{more: lines("ExecStartPre="+keeper+" "+name+".before", "ExecStartPre=/bin/sh -c 'touch "+fifo+".open; read x <"+fifo+"'")}.loading(name, name+"-2"),
			})
			begin(t, m, unit)
			wantKept(t, m, name+".before", old)
			// The second process asked, too; what comes now meets the third.
			eventually(t, unit+" is in the middle of its start", func() bool {
				return vmtest.Exec(t, m, vm.Command{Argv: []string{"test", "-e", fifo + ".open"}}).ExitCode == 0
			})
			if tt.change {
				mustPush(t, m, creds{name: newValue(), name + "-2": newValue()})
			}
			if tt.kill {
				killAgent(t, m)
			}
			vmtest.Run(t, m, "sh", "-c", "echo >"+fifo)
			if tt.change && tt.kill {
				// The values of this start are gone.
				wantFailed(t, m, unit)
				return
			}
			untilState(t, m, "active", unit)
			wantKept(t, m, unit, old)
		})
	}
}

// testSocketReload reloads services whose credentials come from the socket.
func testSocketReload(t *testing.T, m *vm.Machine, release vm.Release) {
	if release.Systemd < 260 {
		return // it knows no RefreshOnReload=credentials
	}
	names := []string{"reload-a", "reload-b"}
	removeCreds(t, m, "reload-b")
	const unit = "reload.service"
	addUnits(t, m, map[string]string{
		unit: asker{kind: "exec", more: lines("RefreshOnReload=credentials", "ExecReload=/bin/true", "TimeoutStartSec=3s")}.loading(names...),
	})
	wantSet := func(want creds) {
		t.Helper()
		for name, value := range want {
			wantGiven(t, m, unit, name, value)
		}
	}
	before := creds{"reload-a": newValue(), "reload-b": newValue()}
	mustPush(t, m, before)
	start(t, m, unit)
	pid := mainPID(t, m, unit)
	after := creds{"reload-a": newValue(), "reload-b": newValue()}
	mustPush(t, m, after, "--refresh", "none")
	wantSet(before)
	vmtest.Run(t, m, "systemctl", "reload", unit)
	wantSet(after)
	// Through a kill: what a reload gets it gets from the process of the day.
	killAgent(t, m)
	again := creds{"reload-a": newValue(), "reload-b": newValue()}
	mustPush(t, m, again, "--refresh", "none")
	vmtest.Run(t, m, "systemctl", "reload", unit)
	wantSet(again)

	// One is gone: the reload waits for it, and fails.
	ctl(t, m, nil, "rm", "--refresh", "none", "reload-a").want(t, 0, "")
	if res := vmtest.Exec(t, m, vm.Command{Argv: []string{"systemctl", "reload", unit}}); res.ExitCode == 0 {
		t.Error("a reload without a value succeeded")
	}
	wantActive(t, m, unit, "active")
	if got := mainPID(t, m, unit); got != pid {
		t.Errorf("the service's process is %d, want still %d", got, pid)
	}
	wantSet(again)
	untilWaiting(t, m)
}

// testSocketAudit looks for what a load leaves in the journal, and for the value, which is nowhere.
func testSocketAudit(t *testing.T, m *vm.Machine, _ vm.Release) {
	set := creds{"audit": newValue()}
	removeCreds(t, m, "audit")
	addUnits(t, m, map[string]string{"audit.service": asker{naked: true}.loading("audit")})
	var want []loadEntry
	for _, revision := range []string{"r1", ""} {
		set["audit"] = newValue()
		a := mustPush(t, m, set, "--revision", revision)
		vmtest.Run(t, m, "systemctl", "restart", "audit.service")
		want = append(want, loadEntry{
			Unit: "audit.service", Credential: "audit", Revision: revision, Generation: strconv.FormatInt(*a.Generation, 10),
			Message: "audit.service loaded credential audit",
		})
	}
	until(t, "entries of the journal", fmt.Sprintf("%+v", want), func() string {
		return fmt.Sprintf("%+v", auditOf(t, m, "audit", "audit.service"))
	})
	pid := mainPID(t, m, agentService)
	for _, places := range []string{"/run/credstore/.guestagent/*.json", fmt.Sprintf("/proc/%d/environ /proc/%d/cmdline", pid, pid)} {
		res := vmtest.Exec(t, m, vm.Command{Argv: []string{"sh", "-c", "cat " + places}})
		if res.ExitCode != 0 || len(res.Stdout) == 0 || bytes.Contains(res.Stdout, []byte(mark)) {
			t.Errorf("%s: exit status %d, or nothing in it, or values", places, res.ExitCode)
		}
	}
	wantSilence(t, m)
}

// testSocketSizes loads the shortest and the longest value.
func testSocketSizes(t *testing.T, m *vm.Machine, _ vm.Release) {
	forget(t, m)
	const limit = 1 << 20
	set := creds{"size-none": {}, "size-most": largeValue(limit - len("size-most")), "size-over": largeValue(limit - len("size-over") + 1)}
	units := map[string]string{"size-none-check.service": asker{}.loading("size-none")}
	for name := range set {
		units[name+".service"] = asker{naked: true}.loading(name)
		removeCreds(t, m, name)
		mustPush(t, m, creds{name: set[name]})
	}
	addUnits(t, m, units)
	// An empty one on purpose is one.
	start(t, m, "size-none.service", "size-most.service")
	wantKept(t, m, "size-none.service", creds{"size-none": {}})
	wantKept(t, m, "size-most.service", creds{"size-most": set["size-most"]})
	begin(t, m, "size-none-check.service", "size-over.service")
	untilState(t, m, "failed", "size-none-check.service")
	wantNoFile(t, m, "/run/seen/size-none-check.service")
	// systemd's limit for a unit counts the names.
	wantFailed(t, m, "size-over.service")
}

// testSocketNames loads by names that fit into an address, and by names that do not.
func testSocketNames(t *testing.T, m *vm.Machine, _ vm.Release) {
	forget(t, m)
	// Of an address of 107 bytes, 24 are for a number of up to 16 digits and what stands between.
	const most = 83
	unit := "names-" + strings.Repeat("u", 40-len("names-.service")) + ".service"
	fits := strings.Repeat("n", most-len(unit))
	over := strings.Repeat("n", most-len(unit)+17) // however short the number
	set := creds{fits: newValue(), over: newValue()}
	removeCreds(t, m, fits, over)
	mustPush(t, m, set)
	overUnit := strings.Replace(unit, "u.service", "o.service", 1)
	addUnits(t, m, map[string]string{unit: asker{}.loading(fits), overUnit: asker{}.loading(over)})
	start(t, m, unit)
	wantKept(t, m, unit, creds{fits: set[fits]})
	begin(t, m, overUnit)
	wantFailed(t, m, overUnit)
}

// testSocketKinds has units of every kind load over the socket. The commands of a socket unit are given no credentials by
// any systemd up to 262, mount(8) of a mount unit by none up to 257, whatever their settings say.
func testSocketKinds(t *testing.T, m *vm.Machine, release vm.Release) {
	forget(t, m)
	const mount = "run-kinds.mount"
	set := creds{"kinds": newValue()}
	addUnits(t, m, map[string]string{
		"kinds-dynamic.service": asker{more: lines("DynamicUser=yes", "ReadWritePaths=/run/seen")}.loading("kinds"),
		"kinds-user.service":    asker{more: lines("User=daemon")}.loading("kinds"),
		"kinds-box.service": asker{more: lines(
			"User=daemon", "ProtectSystem=strict", "ReadWritePaths=/run/seen", "PrivateMounts=yes", "PrivateTmp=yes", "PrivateNetwork=yes",
			"ProtectHome=yes", "NoNewPrivileges=yes", "RestrictAddressFamilies=AF_INET", "InaccessiblePaths=/run/guestagent",
		)}.loading("kinds"),
		"kinds@.service": asker{}.loading("kinds"),
		mount: lines("[Unit]", "After=guestagent-credentials.socket",
			"[Mount]", "What=tmpfs", "Type=tmpfs", "Where=/run/kinds", "LoadCredential=kinds:"+credSocket),
	})
	units := []string{"kinds-dynamic.service", "kinds-user.service", "kinds-box.service", "kinds@a-b.service"}
	if release.Systemd > 257 {
		units = append(units, mount)
	}
	removeCreds(t, m, "kinds")
	begin(t, m, units...)
	untilWaiting(t, m, units...)
	wantNothingKept(t, m)
	mustPush(t, m, set)
	untilState(t, m, "active", units...)
	for _, unit := range units {
		if unit != mount {
			wantKept(t, m, unit, set)
		}
		eventually(t, "the audit has "+unit, func() bool { return len(auditOf(t, m, "kinds", unit)) > 0 })
	}
}

// TestCredentialsSocketUpgrade has a unit wait while dpkg replaces the agent with its next version.
func TestCredentialsSocketUpgrade(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	dev, release := makeDebs(t, "VERSION=0.1.0-dev"), makeDebs(t, "VERSION=0.1.0")
	vmtest.Each(t, func(t *testing.T, r vm.Release) {
		m := vmtest.StartContainer(t, vm.ContainerConfig{Image: vmtest.Image(t, r)})
		prepareAskers(t, m)
		install := func(files debs) {
			for _, file := range []string{files.agent, files.ctl} {
				path := "/run/vm-test/" + filepath.Base(file)
				vmtest.WriteFile(t, m, path, 0o644, readHost(t, file))
				vmtest.Run(t, m, "dpkg", "--install", path)
			}
		}
		install(dev)
		set := creds{"upgrade": newValue()}
		units := everyAsker("upgrade", "upgrade")
		names := sortedNames(units)
		addUnits(t, m, units)
		begin(t, m, names...)
		untilWaiting(t, m, names...)
		if v := readStatus(t, m).Version; v != "0.1.0-dev" {
			t.Errorf("the agent's version is %q, want 0.1.0-dev", v)
		}
		run := show(t, m, agentService, "InvocationID")
		install(release)
		untilWaiting(t, m, names...)
		if v := readStatus(t, m).Version; v != "0.1.0" || show(t, m, agentService, "InvocationID") == run {
			t.Errorf("the agent's version is %q, want 0.1.0, and a new process", v)
		}
		wantNothingKept(t, m)
		mustPush(t, m, set)
		untilState(t, m, "active", names...)
		for _, unit := range names {
			wantKept(t, m, unit, set)
		}
		wantSilence(t, m)
	})
}

// TestCredentialsSocketEarly has a unit that the boot waits for load a credential that comes later: whoever brings it is
// not held up.
func TestCredentialsSocketEarly(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	files := agentFiles(t)
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		early := func(target, name string) []vm.File {
			return wanted(target, name+".service", lines("[Unit]", "DefaultDependencies=no", "Before="+target)+asker{}.loading(name))
		}
		m := vmtest.StartContainer(t, vm.ContainerConfig{
			Image:   vmtest.Image(t, release),
			Overlay: slices.Concat(files, early("sysinit.target", "early-sysinit"), early("basic.target", "early-basic")),
			WaitFor: vm.UntilGuest,
		})
		prepareAskers(t, m)
		set := creds{"early-sysinit": newValue(), "early-basic": newValue()}
		untilWaiting(t, m, "early-sysinit.service", "early-basic.service")
		for _, target := range []string{"sysinit.target", "basic.target"} {
			wantActive(t, m, target, "inactive")
		}
		mustPush(t, m, creds{"early-sysinit": set["early-sysinit"]})
		untilState(t, m, "active", "sysinit.target")
		mustPush(t, m, creds{"early-basic": set["early-basic"]})
		if _, err := m.WaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
		for name, value := range set {
			wantActive(t, m, name+".service", "active")
			wantKept(t, m, name+".service", creds{name: value})
		}
	})
}
