package vm_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// TestRefresh changes credentials while services run that use them.
func TestRefresh(t *testing.T) {
	allContainers(t, func(t *testing.T, m *vm.Machine, release vm.Release) {
		t.Run("rotate", func(t *testing.T) { testRotate(t, m, release) })
		t.Run("ways", func(t *testing.T) { testWays(t, m, release) })
		t.Run("reload", func(t *testing.T) { testReload(t, m, release) })
		t.Run("left alone", func(t *testing.T) { testLeftAlone(t, m, release) })
		t.Run("masked", func(t *testing.T) { testMasked(t, m, release) })
		t.Run("failing", func(t *testing.T) { testFailing(t, m, release) })
		t.Run("agent", func(t *testing.T) { testAgentConsumer(t, m, release) })
		t.Run("on change", func(t *testing.T) { testOnChange(t, m, release) })
		t.Run("stale", func(t *testing.T) { testStale(t, m, release) })
		t.Run("compare", func(t *testing.T) { testCompare(t, m, release) })
		t.Run("repeated", func(t *testing.T) { testRepeated(t, m, release) })
		t.Run("taken back", func(t *testing.T) { testTakenBack(t, m, release) })
		t.Run("silence", func(t *testing.T) { wantSilence(t, m) })
	})
}

// testRotate is the main path: consumers by file and by socket run on with what they have, and are refreshed when a call
// says so.
func testRotate(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"rot-file.service":   loads("LoadCredential=rot"),
		"rot-two.service":    loads("LoadCredential=rot", "LoadCredential=rot-other"),
		"rot-socket.service": loads(bySocket("rot", "rot-other")),
		"rot-other.service":  loads("LoadCredential=rot-other"),
	})
	removeCreds(t, m, "rot", "rot-other")
	units := []string{"rot-file.service", "rot-two.service", "rot-socket.service"}
	first, second, third, other := newValue(), newValue(), newValue(), newValue()
	// They do not run: nothing is refreshed.
	mustPush(t, m, creds{"rot": first, "rot-other": other}, "--refresh", "auto").wantUnits(t)
	start(t, m, append(units, "rot-other.service")...)
	pids := map[string]int{}
	for _, u := range append(units, "rot-other.service") {
		pids[u] = mainPID(t, m, u)
	}

	mustPush(t, m, creds{"rot": second}).wantUnits(t)
	for _, u := range units {
		wantGiven(t, m, u, "rot", first)
		if got := mainPID(t, m, u); got != pids[u] {
			t.Errorf("a push without --refresh restarted %s", u)
		}
	}
	mustPush(t, m, creds{"rot": third}, "--refresh", "auto").wantUnits(
		t, "rot-file.service restart done", "rot-two.service restart done", "rot-socket.service restart done",
	)
	for _, u := range units {
		wantGiven(t, m, u, "rot", third)
		if got := mainPID(t, m, u); got == pids[u] {
			t.Errorf("%s has the process that it had", u)
		}
	}
	wantGiven(t, m, "rot-socket.service", "rot-other", other)
	if got := mainPID(t, m, "rot-other.service"); got != pids["rot-other.service"] {
		t.Error("rot-other.service was restarted, and does not load what changed")
	}
}

// testWays rotates what is loaded in every way that there is.
func testWays(t *testing.T, m *vm.Machine, release vm.Release) {
	type way struct {
		unit     string
		systemd  int // that it came with
		setting  string
		cred, as string
		way      string
	}
	all := []way{
		{unit: "way-bare.service", setting: "LoadCredential=way-bare", cred: "way-bare", as: "way-bare", way: vsockrpc.WayFile},
		{unit: "way-renamed.service", setting: "LoadCredential=own:way-renamed", cred: "way-renamed", as: "own", way: vsockrpc.WayFile},
		{unit: "way-path.service", setting: "LoadCredential=own:/run/credstore/way-path", cred: "way-path", as: "own", way: vsockrpc.WayPath},
		{unit: "way-folder.service", setting: "LoadCredential=all:/run/credstore", cred: "way-folder", as: "all_way-folder", way: vsockrpc.WayPath},
		{unit: "way-import.service", systemd: 254, setting: "ImportCredential=way-im*", cred: "way-import", as: "way-import", way: vsockrpc.WayImport},
		{unit: "way-imported.service", systemd: 257, setting: "ImportCredential=way-ren.*:own.", cred: "way-ren.amed", as: "own.amed", way: vsockrpc.WayImport},
		{unit: "way-socket.service", setting: bySocket("way-socket"), cred: "way-socket", as: "way-socket", way: vsockrpc.WaySocket},
		{unit: "way@x.service", setting: "LoadCredential=own:way-%i", cred: "way-x", as: "own", way: vsockrpc.WayFile},
		{unit: "ways@y.service", setting: bySocket("way-%i"), cred: "way-y", as: "way-y", way: vsockrpc.WaySocket},
		{unit: "way-dynamic.service", setting: "DynamicUser=yes\nLoadCredential=way-dynamic", cred: "way-dynamic", as: "way-dynamic", way: vsockrpc.WayFile},
		{unit: "way-dynsock.service", setting: "DynamicUser=yes\n" + bySocket("way-dynsock"), cred: "way-dynsock", as: "way-dynsock", way: vsockrpc.WaySocket},
		{unit: "way-sandboxed.service", setting: "PrivateMounts=yes\nProtectSystem=strict\nUser=nobody\nLoadCredential=way-user", cred: "way-user", as: "way-user", way: vsockrpc.WayFile},
	}
	t.Run("credential", func(t *testing.T) {
		ways := slices.DeleteFunc(all, func(w way) bool { return w.systemd > release.Systemd })
		files, first, second := map[string]string{}, creds{}, creds{}
		var units, names, want []string
		for _, w := range ways {
			file := w.unit
			if template, _, ok := strings.Cut(file, "@"); ok {
				file = template + "@.service"
			}
			files[file] = loads(w.setting)
			first[w.cred], second[w.cred] = newValue(), newValue()
			units, names, want = append(units, w.unit), append(names, w.cred), append(want, w.unit+" restart done")
		}
		addUnits(t, m, files)
		removeCreds(t, m, names...)
		mustPush(t, m, first, "--revision", "first")
		start(t, m, units...)
		before := list(t, m)
		pids := map[string]int{}
		for _, w := range ways {
			pids[w.unit] = mainPID(t, m, w.unit)
			wantGiven(t, m, w.unit, w.as, first[w.cred])
			want := vsockrpc.Consumer{
				Unit: w.unit, ActiveState: "active", As: w.as, Way: w.way, Revision: "first", Loaded: vsockrpc.LoadedInForce, Refresh: vsockrpc.ActionRestart,
			}
			if got := before.consumersOf(t, w.cred); !slices.Contains(got, want) {
				t.Errorf("list says of %s: %+v, want %+v in it", w.cred, got, want)
			}
		}
		// Who loads the folder loads everything, under other names.
		for _, e := range before.Entries {
			if n := len(e.Consumers); n != 2 && e.Name != "way-folder" {
				t.Errorf("list says of %s: %+v, want two consumers", e.Name, e.Consumers)
			}
		}
		mustPush(t, m, second, "--refresh", "auto").wantUnits(t, want...)
		for _, w := range ways {
			wantGiven(t, m, w.unit, w.as, second[w.cred])
			if mainPID(t, m, w.unit) == pids[w.unit] {
				t.Errorf("%s has the process that it had", w.unit)
			}
		}
	})

	// A file of the environment is no credential, and many services have one.
	t.Run("environment", func(t *testing.T) {
		addUnits(t, m, map[string]string{"way.service": loads("EnvironmentFile=/run/credstore/way-env", "ExecReload=/bin/true")})
		removeCreds(t, m, "way-env")
		environ := func(want []byte) {
			t.Helper()
			got := vmtest.ReadFile(t, m, fmt.Sprintf("/proc/%d/environ", mainPID(t, m, "way.service")))
			if !bytes.Contains(got, append([]byte("WAY="), want...)) {
				t.Errorf("the environment of way.service has not %s", digest(want))
			}
		}
		first, second := newValue(), newValue()
		mustPush(t, m, creds{"way-env": append([]byte("WAY="), first...)})
		start(t, m, "way.service")
		environ(first)
		if c := consumerOf(t, m, "way.service", "way-env"); c.Way != vsockrpc.WayEnvironment || c.As != "" || c.Loaded != vsockrpc.LoadedInForce {
			t.Errorf("list says %+v", c)
		}
		mustPush(t, m, creds{"way-env": append([]byte("WAY="), second...)}, "--refresh", "auto").wantUnits(t, "way.service restart done")
		environ(second)
	})

	// Sockets and mounts have the settings, and get nothing: systemd sets credentials up for processes whose spawner asks
	// for it (EXEC_WRITE_CREDENTIALS, later EXEC_SETUP_CREDENTIALS in src/core/execute.h), as src/core/service.c does. On
	// 252, 257 and 262 there was no folder for a socket or a mount.
	t.Run("socket and mount units", func(t *testing.T) {
		addUnits(t, m, map[string]string{
			"way.socket":    lines("[Socket]", "ListenStream=/run/way.sock", "LoadCredential=way-others", "ExecStartPre=/usr/bin/true"),
			"way.service":   lines("[Service]", "ExecStart=/usr/bin/sleep infinity"),
			"run-way.mount": lines("[Mount]", "What=tmpfs", "Where=/run/way", "Type=tmpfs", "LoadCredential=way-others"),
		})
		removeCreds(t, m, "way-others")
		mustPush(t, m, creds{"way-others": newValue()})
		units := []string{"way.socket", "run-way.mount"}
		start(t, m, units...)
		started := func() (ids string) {
			t.Helper()
			for _, u := range units {
				ids += show(t, m, u, "InvocationID") + " "
			}
			return ids
		}
		before := started()
		for _, u := range units {
			wantNoFile(t, m, "/run/credentials/"+u)
			if c := consumerOf(t, m, u, "way-others"); c.ActiveState != "active" || c.Refresh != vsockrpc.ActionNone || c.Detail != "only services are refreshed" {
				t.Errorf("list says %+v", c)
			}
		}
		for _, u := range mustPush(t, m, creds{"way-others": newValue()}, "--refresh", "restart").Units {
			if u.Result != vsockrpc.ResultSkipped || u.Detail != "only services are refreshed" {
				t.Errorf("a push says of %s: %+v", u.Unit, u)
			}
		}
		ctl(t, m, nil, "refresh", "--all-consumers", "--refresh", "restart", "way-others").wantUnits(t, "way.socket none skipped", "run-way.mount none skipped")
		if started() != before {
			t.Error("a socket or a mount was restarted")
		}
	})
}

// testReload has services reload, which brings them a new value from systemd 260 on, where they say so.
func testReload(t *testing.T, m *vm.Machine, release vm.Release) {
	const reloading = "ExecReload=/bin/sh -c 'echo >>/run/reloaded-%n'"
	addUnits(t, m, map[string]string{
		"rel-plain.service":  loads("LoadCredential=rel", reloading),
		"rel-cannot.service": loads("LoadCredential=rel"),
		// systemd before 260 says that it does not know the setting.
		"rel-file.service":   loads("LoadCredential=rel", "RefreshOnReload=credentials", reloading),
		"rel-path.service":   loads("LoadCredential=rel:/run/credstore/rel", "RefreshOnReload=credentials", reloading),
		"rel-socket.service": loads("LoadCredential=rel:"+credSocket, "RefreshOnReload=credentials", reloading),
		"rel-notify.service": lines("[Service]", "Type=notify-reload", "LoadCredential=rel", "RefreshOnReload=credentials", "NotifyAccess=all",
			`ExecStart=/bin/bash -c 'trap "systemd-notify --reloading; systemd-notify --ready" HUP; systemd-notify --ready; while true; do sleep infinity & wait $!; kill $!; done'`),
	})
	removeCreds(t, m, "rel")
	atEnd(t, m, "sh", "-c", "rm -f /run/reloaded-*")
	units := []string{"rel-plain.service", "rel-cannot.service", "rel-file.service", "rel-path.service", "rel-socket.service"}
	if release.Systemd >= 260 { // notify-reload is 253's, but without the setting it is rel-plain.service once more
		units = append(units, "rel-notify.service")
	}
	first, second, third := newValue(), newValue(), newValue()
	mustPush(t, m, creds{"rel": first})
	start(t, m, units...)
	pids := map[string]int{}
	for _, u := range units {
		pids[u] = mainPID(t, m, u)
	}
	reloads := func(unit string) bool {
		return release.Systemd >= 260 && unit != "rel-plain.service" && unit != "rel-cannot.service"
	}

	// Only reloads: nobody has another process, and who can has the new value.
	a := mustPush(t, m, creds{"rel": second}, "--refresh", "reload")
	var want []string
	for _, u := range units {
		if u == "rel-cannot.service" {
			want = append(want, u+" none skipped")
			continue
		}
		want = append(want, u+" reload done")
	}
	a.wantUnits(t, want...)
	if got := a.detail(t, "rel-cannot.service"); got != "it cannot be reloaded" {
		t.Errorf("of rel-cannot.service it is said: %q", got)
	}
	for _, u := range units {
		if mainPID(t, m, u) != pids[u] {
			t.Errorf("%s was restarted by a reload", u)
		}
		if reloads(u) {
			wantGiven(t, m, u, "rel", second)
			wantLoaded(t, m, u, "rel", vsockrpc.LoadedInForce, false)
		} else {
			wantGiven(t, m, u, "rel", first)
			wantLoaded(t, m, u, "rel", vsockrpc.LoadedPrevious, true)
		}
	}
	if got := vmtest.Run(t, m, "sh", "-c", "cat /run/reloaded-rel-plain.service"); got != "\n" {
		t.Errorf("rel-plain.service was reloaded %d times, want once", len(got))
	}

	// Auto: who gets a new value by a reload is reloaded, all others are restarted.
	a = mustPush(t, m, creds{"rel": third}, "--refresh", "auto")
	want = nil
	for _, u := range units {
		if reloads(u) {
			want = append(want, u+" reload done")
		} else {
			want = append(want, u+" restart done")
		}
	}
	a.wantUnits(t, want...)
	for _, u := range units {
		wantGiven(t, m, u, "rel", third)
		wantLoaded(t, m, u, "rel", vsockrpc.LoadedInForce, false)
		if same := mainPID(t, m, u) == pids[u]; same != reloads(u) {
			t.Errorf("%s has the process that it had: %v, want %v", u, same, reloads(u))
		}
	}
}

// testLeftAlone has units that nobody may restart for a credential.
func testLeftAlone(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"systemd-alone.service": loads("LoadCredential=alone"),
		"alonegetty@.service":   loads("LoadCredential=alone"),
		"alone-refuse.service":  loads("LoadCredential=alone") + lines("[Unit]", "RefuseManualStop=yes"),
		"alone-idle.service":    loads("LoadCredential=alone"),
		// What somebody refers to stays known to systemd.
		"alone.service": loads("LoadCredential=alone") + lines("[Unit]", "After=alone-idle.service"),
	})
	// Or nobody could stop it.
	atEnd(t, m, "systemctl", "daemon-reload")
	atEnd(t, m, "sed", "-i", "/RefuseManualStop/d", unitDir+"alone-refuse.service")
	removeCreds(t, m, "alone")
	first, second := newValue(), newValue()
	mustPush(t, m, creds{"alone": first})
	running := []string{"systemd-alone.service", "alonegetty@tty1.service", "alone-refuse.service"}
	start(t, m, append(running, "alone.service")...)
	pids := map[string]int{}
	for _, u := range running {
		pids[u] = mainPID(t, m, u)
	}
	wantLoaded(t, m, "alone-idle.service", "alone", vsockrpc.LoadedNone, false)

	a := mustPush(t, m, creds{"alone": second}, "--refresh", "restart")
	a.wantUnits(t, "systemd-alone.service none skipped", "alonegetty@tty1.service none skipped", "alone-refuse.service none skipped",
		"alone-idle.service none skipped", "alone.service restart done")
	for unit, want := range map[string]string{
		"systemd-alone.service":   "refresh.never in the guest's configuration has it",
		"alonegetty@tty1.service": "refresh.never in the guest's configuration has it",
		"alone-refuse.service":    "it has RefuseManualStop=",
		"alone-idle.service":      "it does not run",
	} {
		if got := a.detail(t, unit); got != want {
			t.Errorf("of %s it is said: %q, want %q", unit, got, want)
		}
	}
	for _, u := range running {
		if mainPID(t, m, u) != pids[u] {
			t.Errorf("%s was restarted", u)
		}
		wantGiven(t, m, u, "alone", first)
		wantLoaded(t, m, u, "alone", vsockrpc.LoadedPrevious, true)
	}
	wantActive(t, m, "alone-idle.service", "inactive")
	wantGiven(t, m, "alone.service", "alone", second)

	// The configuration's list takes the place of the built-in one.
	configure(t, m, `{"refresh": {"never": ["no-such.*"]}}`)
	ctl(t, m, nil, "refresh", "alone").wantUnits(t, "systemd-alone.service restart done", "alonegetty@tty1.service restart done",
		"alone-refuse.service none skipped", "alone-idle.service none skipped")
}

// testMasked masks a service while it runs. A reload of PID 1 forgets its settings, and that it loads anything.
func testMasked(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"mask.service":       loads("LoadCredential=mask"),
		"mask-other.service": loads("LoadCredential=mask"),
	})
	removeCreds(t, m, "mask")
	first, second := newValue(), newValue()
	mustPush(t, m, creds{"mask": first})
	start(t, m, "mask.service", "mask-other.service")
	pid := mainPID(t, m, "mask.service")
	vmtest.Run(t, m, "systemctl", "mask", "--runtime", "mask.service")
	atEnd(t, m, "systemctl", "unmask", "--runtime", "mask.service")
	a := mustPush(t, m, creds{"mask": second}, "--refresh", "restart")
	a.wantUnits(t, "mask-other.service restart done")
	wantActive(t, m, "mask.service", "active")
	if mainPID(t, m, "mask.service") != pid {
		t.Error("mask.service was restarted")
	}
	wantGiven(t, m, "mask.service", "mask", first)
	wantGiven(t, m, "mask-other.service", "mask", second)

	// Named by the configuration, it is told of.
	configure(t, m, `{"credentials": {"mask": {"restartUnits": ["mask.service"]}}}`)
	a = mustPush(t, m, creds{"mask": newValue()})
	a.wantUnits(t, "mask.service none skipped")
	if got := a.detail(t, "mask.service"); got != "it is masked" {
		t.Errorf("of mask.service it is said: %q", got)
	}
}

// dislikes is a setting of a service that does not start with a value of name that has "bad" in it.
func dislikes(name string) string {
	return "ExecStartPre=/bin/sh -c '! grep -q bad $${CREDENTIALS_DIRECTORY}/" + name + "'"
}

// picky is such a service.
func picky(name string, settings ...string) string {
	return loads(append([]string{dislikes(name)}, settings...)...)
}

// badValue is a value that services of these tests do not like.
func badValue() []byte { return append(newValue(), "bad"...) }

// testFailing has a service that does not come up with the new value. Without a gate the value stays.
func testFailing(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"fail.service":       picky("fail", "LoadCredential=fail"),
		"fail-other.service": loads("LoadCredential=fail"),
		"fail-after.service": loads("LoadCredential=fail") + lines("[Unit]", "Requires=fail.service", "After=fail.service"),
		"fail-oneshot.service": lines("[Service]", "Type=oneshot", "RemainAfterExit=yes", "LoadCredential=fail",
			"ExecStart=/bin/sh -c '! grep -q bad $${CREDENTIALS_DIRECTORY}/fail'"),
	})
	removeCreds(t, m, "fail")
	mustPush(t, m, creds{"fail": newValue()})
	start(t, m, "fail.service", "fail-other.service", "fail-after.service", "fail-oneshot.service")
	bad := badValue()
	a := push(t, m, creds{"fail": bad}, "--refresh", "auto")
	a.want(t, host.StatusFailed, host.CodeRefreshFailed)
	a.wantUnits(t, "fail.service restart failed", "fail-other.service restart done", "fail-after.service restart dependency", "fail-oneshot.service restart failed")
	for _, u := range a.Units {
		if want := "failed (result exit-code)"; u.Unit == "fail.service" && u.State != want {
			t.Errorf("the state of %s is %q, want %q", u.Unit, u.State, want)
		}
	}
	wantActive(t, m, "fail.service", "failed")
	wantGiven(t, m, "fail-other.service", "fail", bad)
	if l := list(t, m); len(l.Rejected) != 0 || l.Gate != nil {
		t.Errorf("list has rejected %+v, gate %v", l.Rejected, l.Gate)
	}
}

// testAgentConsumer has the agent among those that would be restarted.
func testAgentConsumer(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"self.service":                    loads("LoadCredential=self") + lines("[Unit]", "Requires=guestagent.service", "After=guestagent.service"),
		"guestagent.service.d/self.conf":  lines("[Service]", "LoadCredential=self"),
		"self-before.service":             loads("LoadCredential=self") + lines("[Unit]", "Before=guestagent.service"),
		"self-socket.service":             loads(bySocket("self")) + lines("[Unit]", "BindsTo=guestagent.service", "After=guestagent.service"),
		"self-partof.service.d/unit.conf": lines("[Unit]", "PartOf=guestagent.service"),
		"self-partof.service":             loads("LoadCredential=self"),
		"self-upheld.service.d/unit.conf": lines("[Unit]", "Wants=guestagent.service"),
		"self-upheld.service":             loads("LoadCredential=self"),
	})
	atEnd(t, m, "systemctl", "restart", agentService)
	removeCreds(t, m, "self")
	mustPush(t, m, creds{"self": newValue()})
	vmtest.Run(t, m, "systemctl", "restart", agentService)
	units := []string{"self.service", "self-before.service", "self-socket.service", "self-partof.service", "self-upheld.service"}
	start(t, m, units...)
	pid := mainPID(t, m, agentService)
	value := newValue()
	a := mustPush(t, m, creds{"self": value}, "--refresh", "restart")
	want := []string{agentService + " none skipped"}
	for _, u := range units {
		want = append(want, u+" restart done")
	}
	a.wantUnits(t, want...)
	if got := a.detail(t, agentService); got != "it is the agent, which does not refresh itself" {
		t.Errorf("of the agent it is said: %q", got)
	}
	for _, u := range units {
		wantGiven(t, m, u, "self", value)
	}
	if mainPID(t, m, agentService) != pid {
		t.Error("the agent was restarted")
	}
	wantLoaded(t, m, agentService, "self", vsockrpc.LoadedPrevious, true)

	// Not even where it is named.
	configure(t, m, `{"credentials": {"self": {"restartUnits": ["guestagent.service"], "onChange": "restart"}}}`)
	pid = mainPID(t, m, agentService)
	a = mustPush(t, m, creds{"self": newValue()})
	if got := strings.Join(a.units(), "\n"); !strings.Contains(got, agentService+" none skipped") || mainPID(t, m, agentService) != pid {
		t.Errorf("the agent was restarted, or not told of:\n%s", got)
	}
}

// testOnChange lets the guest's configuration say what a change brings about.
func testOnChange(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"chg-user.service":   loads("LoadCredential=chg", "ExecReload=/bin/true"),
		"chg-other.service":  loads("LoadCredential=chg-other", "ExecReload=/bin/true"),
		"chg-extra.service":  loads(""),
		"chg-reload.service": loads("ExecReload=/bin/true"),
		"chg-cannot.service": loads(""),
		"chg-idle.service":   loads(""),
	})
	removeCreds(t, m, "chg", "chg-other", "chg-not")
	configure(t, m, `{"credentials": {
		"chg": {"onChange": "restart", "restartUnits": ["chg-extra.service", "chg-idle.service", "chg-no-such.service"],
			"reloadUnits": ["chg-reload.service", "chg-cannot.service", "chg-extra.service"]},
		"chg-other": {"onChange": "reload"},
		"chg-not": {"onChange": "none", "reloadUnits": ["chg-reload.service"]}
	}}`)
	mustPush(t, m, creds{"chg": newValue(), "chg-other": newValue(), "chg-not": newValue()}, "--refresh", "none").wantUnits(t)
	start(t, m, "chg-user.service", "chg-other.service", "chg-extra.service", "chg-reload.service", "chg-cannot.service")
	besides := []string{
		"chg-extra.service restart done", "chg-reload.service reload done",
		"chg-cannot.service none skipped", "chg-idle.service none skipped", "chg-no-such.service none skipped",
	}

	value := newValue()
	set := creds{"chg": value}
	mustPush(t, m, set).wantUnits(t, append(besides, "chg-user.service restart done")...)
	wantGiven(t, m, "chg-user.service", "chg", value)
	// What is in force already changes nothing.
	mustPush(t, m, set).wantUnits(t)
	mustPush(t, m, creds{"chg-other": newValue()}).wantUnits(t, "chg-other.service reload done")
	mustPush(t, m, creds{"chg-not": newValue()}).wantUnits(t, "chg-reload.service reload done")

	// The call has the last word.
	mustPush(t, m, creds{"chg": newValue(), "chg-other": newValue()}, "--refresh", "none").wantUnits(t)
	mustPush(t, m, creds{"chg": newValue()}, "--refresh", "reload").wantUnits(t, append(besides, "chg-user.service reload done")...)
	mustPush(t, m, creds{"chg-other": newValue()}, "--refresh", "restart").wantUnits(t, "chg-other.service restart done")

	// A removal is a change.
	a := ctl(t, m, nil, "rm", "chg-not")
	a.want(t, 0, "")
	a.wantUnits(t, "chg-reload.service reload done")
}

// testStale tells who runs with what.
func testStale(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"stale-file.service":   loads("LoadCredential=stale"),
		"stale-socket.service": loads(bySocket("stale")),
		"stale-idle.service":   loads("LoadCredential=stale"),
		"stale-env.service":    loads("EnvironmentFile=/run/credstore/stale") + lines("[Unit]", "After=stale-idle.service"),
	})
	removeCreds(t, m, "stale")
	units := []string{"stale-file.service", "stale-socket.service", "stale-env.service"}
	value := func() []byte { return append([]byte("A="), newValue()...) }
	all := func(when, loaded, revision string, stale bool) {
		t.Helper()
		consumers := list(t, m).consumersOf(t, "stale")
		if len(consumers) != len(units)+1 {
			t.Fatalf("%s: consumers are %+v", when, consumers)
		}
		for _, c := range consumers {
			loaded, revision, stale := loaded, revision, stale
			if c.Unit == "stale-idle.service" {
				loaded, revision, stale = vsockrpc.LoadedNone, "", false
			}
			if c.Loaded != loaded || c.Revision != revision || c.Stale != stale {
				t.Errorf("%s, list says of %s: loaded %s, revision %q, stale %v, want %s, %q, %v",
					when, c.Unit, c.Loaded, c.Revision, c.Stale, loaded, revision, stale)
			}
		}
	}
	restart := func() { t.Helper(); vmtest.Run(t, m, "systemctl", "restart", agentService) }
	last := value()
	mustPush(t, m, creds{"stale": value()}, "--revision", "one")
	start(t, m, units...)
	all("started", vsockrpc.LoadedInForce, "one", false)
	restart()
	all("started, after the agent's restart", vsockrpc.LoadedInForce, "one", false)
	mustPush(t, m, creds{"stale": value()}, "--revision", "two")
	all("pushed", vsockrpc.LoadedPrevious, "one", true)
	restart()
	all("pushed, after the agent's restart", vsockrpc.LoadedPrevious, "one", true)
	mustPush(t, m, creds{"stale": last}, "--revision", "three")
	all("pushed twice", vsockrpc.LoadedUnknown, "", true)
	killAgent(t, m)
	all("pushed twice, after kill -9 of the agent", vsockrpc.LoadedUnknown, "", true)

	a := ctl(t, m, nil, "refresh")
	a.want(t, 0, "")
	a.wantUnits(t, "stale-file.service restart done", "stale-socket.service restart done", "stale-env.service restart done", "stale-idle.service none skipped")
	all("refreshed", vsockrpc.LoadedInForce, "three", false)
	restart()
	all("refreshed, after the agent's restart", vsockrpc.LoadedInForce, "three", false)
	wantGiven(t, m, "stale-file.service", "stale", last)
	wantGiven(t, m, "stale-socket.service", "stale", last)
	// Nobody is stale: nothing to do, but for who insists.
	ctl(t, m, nil, "refresh", "stale").wantUnits(t, "stale-idle.service none skipped")
	ctl(t, m, nil, "refresh", "--all-consumers", "stale").wantUnits(
		t, "stale-file.service restart done", "stale-socket.service restart done", "stale-env.service restart done", "stale-idle.service none skipped",
	)
	// The same bytes under another label are no change.
	mustPush(t, m, creds{"stale": last}, "--revision", "four", "--refresh", "auto").wantUnits(t, "stale-idle.service none skipped")
	all("relabelled", vsockrpc.LoadedInForce, "four", false)
	// Who is restarted by somebody else is not stale either.
	mustPush(t, m, creds{"stale": value()}, "--revision", "five")
	vmtest.Run(t, m, append([]string{"systemctl", "restart"}, units...)...)
	all("restarted by hand", vsockrpc.LoadedInForce, "five", false)
}

// testCompare has the agent read what services were given. Then it can tell what the clock cannot.
func testCompare(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"cmp.service":      loads("LoadCredential=own:cmp"),
		"cmp-user.service": loads("LoadCredential=cmp", "DynamicUser=yes", "PrivateMounts=yes"),
		"cmp-late.service": loads("LoadCredential=cmp"),
	})
	removeCreds(t, m, "cmp")
	first, second := newValue(), newValue()
	mustPush(t, m, creds{"cmp": first}, "--revision", "one")
	start(t, m, "cmp.service", "cmp-user.service")
	mustPush(t, m, creds{"cmp": second}, "--revision", "two")
	start(t, m, "cmp-late.service")
	mustPush(t, m, creds{"cmp": first}, "--revision", "one again")
	// The clock errs towards stale.
	for _, u := range []string{"cmp.service", "cmp-user.service"} {
		wantLoaded(t, m, u, "cmp", vsockrpc.LoadedUnknown, true)
	}
	wantLoaded(t, m, "cmp-late.service", "cmp", vsockrpc.LoadedPrevious, true)

	compare := nixosDropIn(t, agentService, "compare.conf")
	vmtest.WriteFile(t, m, compare.Path, compare.Mode, compare.Content)
	atEnd(t, m, "systemctl", "restart", agentService)
	atEnd(t, m, "systemctl", "daemon-reload")
	atEnd(t, m, "rm", compare.Path)
	vmtest.Run(t, m, "systemctl", "daemon-reload")
	configure(t, m, `{"consumers": {"compare": true}}`)
	for _, u := range []string{"cmp.service", "cmp-user.service"} {
		wantLoaded(t, m, u, "cmp", vsockrpc.LoadedInForce, false)
		if c := consumerOf(t, m, u, "cmp"); c.Revision != "one again" {
			t.Errorf("list says that %s has revision %q", u, c.Revision)
		}
	}
	wantLoaded(t, m, "cmp-late.service", "cmp", vsockrpc.LoadedPrevious, true)
	ctl(t, m, nil, "refresh", "cmp").wantUnits(t, "cmp-late.service restart done")
	wantLoaded(t, m, "cmp-late.service", "cmp", vsockrpc.LoadedInForce, false)
	wantGiven(t, m, "cmp-late.service", "cmp", first)
	// A service that begins after the agent is seen as well.
	vmtest.Run(t, m, "systemctl", "restart", "cmp-user.service")
	mustPush(t, m, creds{"cmp": newValue()})
	wantLoaded(t, m, "cmp-user.service", "cmp", vsockrpc.LoadedPrevious, true)
	mustPush(t, m, creds{"cmp": newValue()})
	wantLoaded(t, m, "cmp-user.service", "cmp", vsockrpc.LoadedUnknown, true)
	mustPush(t, m, creds{"cmp": first})
	vmtest.Run(t, m, "systemctl", "restart", "cmp-user.service")
	wantLoaded(t, m, "cmp-user.service", "cmp", vsockrpc.LoadedInForce, false)
	wantLoaded(t, m, "cmp.service", "cmp", vsockrpc.LoadedInForce, false)
}

const fifo = "/run/hold"

// held is a setting of a service whose start waits while fifo is there.
const held = "ExecStartPre=/bin/sh -c 'if test -p " + fifo + "; then read -r x <" + fifo + "; fi'"

// holdStart has the start of held services wait, until letGo or the end of the test.
func holdStart(t *testing.T, m *vm.Machine) {
	t.Helper()
	vmtest.Run(t, m, "mkfifo", fifo)
	atEnd(t, m, "rm", "-f", fifo)
}

// letGo has a held service that waits go on. It waits for one that does.
func letGo(t *testing.T, m *vm.Machine) {
	t.Helper()
	vmtest.Exec(t, m, vm.Command{Argv: []string{"sh", "-c", "exec 3>" + fifo + "; rm " + fifo + "; echo go >&3"}})
}

// waitHeld waits until a service's start is held.
func waitHeld(t *testing.T, m *vm.Machine, unit string) {
	t.Helper()
	eventually(t, unit+" is about to start", func() bool { return show(t, m, unit, "SubState") == "start-pre" })
}

// testRepeated does the same once more: what is done is not done again, what was cut off is.
func testRepeated(t *testing.T, m *vm.Machine, _ vm.Release) {
	addUnits(t, m, map[string]string{
		"rep-file.service":   loads("LoadCredential=rep", held),
		"rep-socket.service": loads("LoadCredential=rep:" + credSocket),
	})
	removeCreds(t, m, "rep")
	mustPush(t, m, creds{"rep": newValue()})
	start(t, m, "rep-file.service", "rep-socket.service")
	both := []string{"rep-file.service restart done", "rep-socket.service restart done"}
	pids := func() [2]int {
		t.Helper()
		return [2]int{mainPID(t, m, "rep-file.service"), mainPID(t, m, "rep-socket.service")}
	}

	set := creds{"rep": newValue()}
	mustPush(t, m, set, "--refresh", "auto").wantUnits(t, both...)
	before := pids()
	mustPush(t, m, set, "--refresh", "auto").wantUnits(t)
	mustPush(t, m, set, "--refresh", "restart").wantUnits(t)
	if pids() != before {
		t.Error("a push of what is in force restarted its consumers")
	}

	// The set is in force, and nobody was refreshed.
	set = creds{"rep": newValue()}
	mustPush(t, m, set)
	mustPush(t, m, set, "--refresh", "auto").wantUnits(t, both...)

	// The agent is killed while it waits for the restarts. They go on, and the next call finds nothing stale.
	set = creds{"rep": newValue()}
	holdStart(t, m)
	cut := startPush(t, m, set, "--refresh", "auto")
	waitHeld(t, m, "rep-file.service")
	killAgent(t, m)
	if a := cut(); a.exit == 0 {
		t.Errorf("a push whose agent was killed ended with %+v", a.Result)
	}
	letGo(t, m)
	vmtest.Run(t, m, "systemctl", "start", "rep-file.service") // returns when it has started
	before = pids()
	mustPush(t, m, set, "--refresh", "auto").wantUnits(t)
	if pids() != before {
		t.Error("a push of what is in force restarted its consumers")
	}
	wantGiven(t, m, "rep-file.service", "rep", set["rep"])
	wantGiven(t, m, "rep-socket.service", "rep", set["rep"])
}

// testTakenBack removes credentials and rolls sets back, with their consumers.
func testTakenBack(t *testing.T, m *vm.Machine, release vm.Release) {
	addUnits(t, m, map[string]string{
		"back.service":        loads("LoadCredential=back", "LoadCredential=back-kept"),
		"back-path.service":   loads("LoadCredential=back:/run/credstore/back"),
		"back-socket.service": loads("TimeoutStartSec=2", bySocket("back")),
		"back-reload.service": loads("LoadCredential=back", "RefreshOnReload=credentials", "ExecReload=/bin/true"),
	})
	removeCreds(t, m, "back", "back-kept")
	first, second, kept := newValue(), newValue(), newValue()
	mustPush(t, m, creds{"back": first, "back-kept": kept})
	units := []string{"back.service", "back-path.service", "back-socket.service", "back-reload.service"}
	start(t, m, units...)
	reload := "back-reload.service restart done"
	if release.Systemd >= 260 {
		reload = "back-reload.service reload done"
	}
	all := []string{"back.service restart done", "back-path.service restart done", "back-socket.service restart done", reload}

	mustPush(t, m, creds{"back": second}, "--refresh", "auto").wantUnits(t, all...)
	a := ctl(t, m, nil, "rollback", "--refresh", "auto")
	a.want(t, 0, "")
	a.wantUnits(t, all...)
	for _, u := range units {
		wantGiven(t, m, u, "back", first)
	}

	// Without its credential a service that names the file does not come up. One that would wait is left as it is.
	a = ctl(t, m, nil, "rm", "--refresh", "auto", "back")
	a.want(t, host.StatusFailed, host.CodeRefreshFailed)
	if got := strings.Join(a.Removed, " "); got != "back" {
		t.Errorf("removed: %s", got)
	}
	a.wantUnits(t, "back.service restart done", "back-path.service restart failed", "back-socket.service none skipped", reload)
	wantActive(t, m, "back-socket.service", "active")
	wantGiven(t, m, "back-socket.service", "back", first)
	for _, u := range []string{"back.service", "back-reload.service"} {
		file := fmt.Sprintf("/proc/%d/root/run/credentials/%s/back", mainPID(t, m, u), u)
		if _, err := m.ReadFile(t.Context(), file); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s has what was removed: %v", u, err)
		}
	}
	wantGiven(t, m, "back.service", "back-kept", kept)

	// Taking the removal back makes those right that run. The others are their owner's to start.
	a = ctl(t, m, nil, "rollback", "--refresh", "auto")
	a.want(t, 0, "")
	wantGiven(t, m, "back.service", "back", first)
	wantGiven(t, m, "back-reload.service", "back", first)
	wantActive(t, m, "back-path.service", "failed")
	start(t, m, "back-path.service")
	wantGiven(t, m, "back-path.service", "back", first)
	wantGiven(t, m, "back-socket.service", "back", first)
}

// manyUnits is how many consumers of one credential there are where there are many.
const manyUnits = 200

// startMany boots a container and starts them in it.
func startMany(t testing.TB) (m *vm.Machine, units []string) {
	t.Helper()
	img := vmtest.ContainerImage(t) // skips before anything is built
	m = vmtest.StartContainer(t, vm.ContainerConfig{Image: img, Overlay: agentFiles(t)})
	addUnits(t, m, map[string]string{"many@.service": loads("LoadCredential=many")})
	mustPush(t, m, creds{"many": newValue()})
	for i := range manyUnits {
		units = append(units, fmt.Sprintf("many@%d.service", i))
	}
	start(t, m, units...)
	return m, units
}

// refreshMany has all of them refreshed by one push, and says how long that took.
func refreshMany(t testing.TB, m *vm.Machine, value []byte) (answer, time.Duration) {
	t.Helper()
	set := creds{"many": value}
	began := time.Now()
	a := mustPush(t, m, set, "--refresh", "restart")
	return a, time.Since(began)
}

// restartMany is the same by hand.
func restartMany(t testing.TB, m *vm.Machine) time.Duration {
	t.Helper()
	// Or systemd would soon refuse to start them so often.
	vmtest.Run(t, m, "systemctl", "reset-failed", "many@*.service")
	began := time.Now()
	vmtest.Run(t, m, "systemctl", "restart", "many@*.service")
	return time.Since(began)
}

// TestRefreshMany refreshes very many units at once.
func TestRefreshMany(t *testing.T) {
	m, units := startMany(t)
	value := newValue()
	a, took := refreshMany(t, m, value)
	want := make([]string, len(units))
	for i, u := range units {
		want[i] = u + " restart done"
	}
	a.wantUnits(t, want...)
	for _, u := range []string{units[0], units[len(units)-1]} {
		wantGiven(t, m, u, "many", value)
	}
	consumers := list(t, m).consumersOf(t, "many")
	if len(consumers) != len(units) {
		t.Errorf("list says that there are %d consumers, want %d", len(consumers), len(units))
	}
	for _, c := range consumers {
		if c.Stale || c.Loaded != vsockrpc.LoadedInForce {
			t.Errorf("after the refresh: %+v", c)
		}
	}
	byHand := restartMany(t, m)
	ratio := took.Seconds() / byHand.Seconds()
	t.Logf("refreshing %d units took %s, systemctl restart %s, that is %.2f times as long",
		len(units), took.Round(time.Millisecond), byHand.Round(time.Millisecond), ratio)
	if ratio > 3 {
		t.Errorf("refreshing takes %.2f times as long as systemctl restart", ratio)
	}
}

// BenchmarkRefreshMany measures both, in turn, and reports the ratio of the medians.
func BenchmarkRefreshMany(b *testing.B) {
	m, _ := startMany(b)
	var refreshed, restarted []time.Duration
	for b.Loop() {
		_, took := refreshMany(b, m, newValue())
		refreshed, restarted = append(refreshed, took), append(restarted, restartMany(b, m))
	}
	median := func(d []time.Duration) float64 {
		slices.Sort(d)
		return (d[(len(d)-1)/2] + d[len(d)/2]).Seconds() / 2
	}
	b.ReportMetric(median(refreshed), "s/refresh")
	b.ReportMetric(median(restarted), "s/restart")
	b.ReportMetric(median(refreshed)/median(restarted), "ratio")
}
