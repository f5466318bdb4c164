package vm_test

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	nixosConsumers = "testdata/nixos/guest-consumers.nix"
	nixosUpgraded  = "testdata/nixos/guest-upgraded.nix"
	nixosBoot      = "testdata/nixos/guest-boot.nix"
	nixosUnits     = "/etc/systemd/system/"
	credStore      = "/run/credstore"
	storeMount     = "run-credstore.mount"
)

// askingHost is a guest's configuration as NixOS wrote it, and with the provider in its container.
func askingHost(t *testing.T, files []vm.File) vm.File {
	t.Helper()
	i := slices.IndexFunc(files, func(f vm.File) bool { return f.Path == agentConfig })
	var config map[string]any
	if err := json.Unmarshal(files[i].Content, &config); err != nil {
		t.Fatal(err)
	}
	config["provider"] = map[string]string{"address": "unix:" + hostBell}
	b, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	return vm.File{Path: agentConfig, Content: b}
}

// wantOpen waits until a running service has a value open as its standard input, and shows none of it: its shell opens it a
// moment after systemd has started it.
func wantOpen(t *testing.T, m *vm.Machine, unit string, want []byte) {
	t.Helper()
	until(t, "what "+unit+" reads", digest(want), func() string {
		got, err := m.ReadFile(t.Context(), "/proc/"+show(t, m, unit, "MainPID")+"/fd/0")
		if err != nil {
			return err.Error()
		}
		return digest(got)
	})
}

// TestNixOSConsumers has services load credentials as services.guestagent.credentials wires them.
func TestNixOSConsumers(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	files := withGuestctl(t, rendered(t, nixosConsumers))
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		t.Parallel()
		boot := func(more ...vm.File) *vm.Machine {
			return vmtest.StartContainer(t, vm.ContainerConfig{
				Image: vmtest.Image(t, release), WaitFor: vm.UntilGuest, Overlay: slices.Concat(files, more),
			})
		}
		waiting := []string{"waits-simple.service", "waits.service"}

		t.Run("host", func(t *testing.T) {
			web, database, certificate := newValue(), newValue(), newValue()
			m := boot(append(
				hostProvider(), askingHost(t, files),
				vm.File{Path: hostFolder + "web-key", Mode: 0o600, Content: web},
				vm.File{Path: hostFolder + "db.password", Mode: 0o600, Content: database},
				vm.File{Path: hostFolder + "certificate", Mode: 0o600, Content: certificate},
			)...)
			// Who loads a file comes after the host's answer, and nobody else does.
			untilState(t, m, "active", "pooler.service", "reloader.service")
			eventually(t, "the provider is asked", func() bool { return providerState(t, m) == vsockrpc.ProviderWaiting })
			for _, u := range []string{"web.service", "left.service", "right.service", "proxy.service"} {
				wantActive(t, m, u, "inactive")
			}
			untilWaiting(t, m, waiting...)
			hostStart(t, m)
			untilState(t, m, "active", "web.service", "left.service", "right.service", "proxy.service", "lenient.service")
			wantOpen(t, m, "web.service", web)
			wantOpen(t, m, "left.service", database)
			wantOpen(t, m, "right.service", database)
			wantOpen(t, m, "proxy.service", certificate)
			wantOpen(t, m, "lenient.service", nil)
			wantNoFile(t, m, "/run/credentials/lenient.service/maybe")

			t.Run("socket", func(t *testing.T) { testNixOSSocket(t, m, waiting) })
			t.Run("rotate", func(t *testing.T) { testNixOSRotate(t, m, release) })
			t.Run("silence", func(t *testing.T) { wantSilence(t, m) })
		})

		// Without the host a required credential is missing, and an optional one is not missed.
		t.Run("no host", func(t *testing.T) {
			m := boot()
			untilState(t, m, "failed", "web.service", "left.service", "right.service", "proxy.service")
			if got := show(t, m, "web.service", "ExecMainStatus"); got != "243" {
				t.Errorf("web.service failed with status %s, want 243/CREDENTIALS", got)
			}
			untilState(t, m, "active", "lenient.service")
			wantOpen(t, m, "lenient.service", nil)
			web, maybe, database := newValue(), newValue(), newValue()
			mustPush(t, m, creds{"web-key": web, "maybe": maybe, "db.password": database})
			vmtest.Run(t, m, "systemctl", "restart", "web.service", "lenient.service", "left.service", "right.service")
			wantOpen(t, m, "web.service", web)
			wantOpen(t, m, "lenient.service", maybe)
			wantOpen(t, m, "left.service", database)
			database = newValue()
			mustPush(t, m, creds{"db.password": database}).wantUnits(t, "left.service restart done", "right.service restart done")
			wantOpen(t, m, "left.service", database)
			wantOpen(t, m, "right.service", database)
		})
	})
}

// testNixOSSocket has services wait on the agent's socket, those too that systemd thinks have started.
func testNixOSSocket(t *testing.T, m *vm.Machine, waiting []string) {
	for _, u := range waiting {
		wantActive(t, m, u, "activating")
	}
	first, second := newValue(), newValue()
	mustPush(t, m, creds{"pushed": first})
	untilState(t, m, "active", waiting...)
	for _, u := range waiting {
		wantOpen(t, m, u, first)
	}
	var restarts []string
	for _, u := range waiting {
		restarts = append(restarts, u+" restart done")
	}
	mustPush(t, m, creds{"pushed": second}).wantUnits(t, restarts...)
	for _, u := range waiting {
		wantOpen(t, m, u, second)
	}
	// They do not start with nothing, which is what systemd hands over for a connection that is lost.
	mustPush(t, m, creds{"pushed": {}}, "--refresh", "none")
	if res := vmtest.Exec(t, m, vm.Command{Argv: append([]string{"systemctl", "restart"}, waiting...)}); res.ExitCode == 0 {
		t.Errorf("%q started with an empty credential", waiting)
	}
	for _, u := range waiting {
		wantActive(t, m, u, "failed")
		if got := show(t, m, u, "ExecStartPre"); !strings.Contains(got, "/test -s ${CREDENTIALS_DIRECTORY}/pushed ") || !strings.Contains(got, "status=1") {
			t.Errorf("%s failed, and its check of the credential is %s", u, got)
		}
	}
}

// testNixOSRotate changes credentials, of which the configuration says what comes of it.
func testNixOSRotate(t *testing.T, m *vm.Machine, release vm.Release) {
	pids := map[string]int{}
	for _, u := range []string{"web.service", "left.service", "right.service", "proxy.service", "pooler.service", "reloader.service"} {
		pids[u] = mainPID(t, m, u)
	}
	// The host's files are replaced, one by one.
	web, database, certificate := newValue(), newValue(), newValue()
	replace := func(name string, value []byte) {
		t.Helper()
		vmtest.WriteFile(t, m, hostFolder+name+".new", 0o600, value)
		vmtest.Run(t, m, "mv", hostFolder+name+".new", hostFolder+name)
	}
	replace("db.password", database)
	wantOpen(t, m, "left.service", database)
	wantOpen(t, m, "right.service", database)
	// A reload brings the new one from systemd 260 on (RefreshOnReload=).
	replace("certificate", certificate)
	until(t, "what proxy.service has reloaded", fmt.Sprint(release.Systemd >= 260), func() string {
		got, err := m.ReadFile(t.Context(), "/run/reloaded-proxy")
		if err != nil {
			return err.Error()
		}
		return fmt.Sprint(bytes.Equal(got, certificate))
	})
	if mainPID(t, m, "proxy.service") != pids["proxy.service"] {
		t.Error("proxy.service was restarted")
	}
	// Nobody said that anything comes of a change of this one.
	replace("web-key", web)
	eventually(t, "the change is there", func() bool {
		return bytes.Equal(vmtest.ReadFile(t, m, credStore+"/web-key"), web)
	})
	if mainPID(t, m, "web.service") != pids["web.service"] {
		t.Error("web.service was restarted")
	}

	// Units that do not load what they depend on.
	mustPush(t, m, creds{"pool": newValue()}).wantUnits(t, "pooler.service restart done", "reloader.service reload done")
	if mainPID(t, m, "pooler.service") == pids["pooler.service"] || mainPID(t, m, "reloader.service") != pids["reloader.service"] {
		t.Error("pooler.service was not restarted, or reloader.service was")
	}
	vmtest.Run(t, m, "test", "-e", "/run/reloaded-reloader")
}

// TestNixOSVsock has guests whose configuration says something of vsock and SMBIOS.
func TestNixOSVsock(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	local, port := rendered(t, "testdata/nixos/guest-local.nix"), rendered(t, "testdata/nixos/guest-port.nix")
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		boot := func(files []vm.File) *vm.Machine {
			return vmtest.StartContainer(t, vm.ContainerConfig{Image: vmtest.Image(t, release), Overlay: files})
		}
		// A container has neither, and this one does not miss them: it tells that it was told so.
		m := boot(local)
		if failed := vmtest.Run(t, m, "systemctl", "--failed", "--no-legend", "--plain"); failed != "" {
			t.Errorf("failed units:\n%s", failed)
		}
		wantLines(t, "reasons", readStatus(t, m).codes(), []string{"smbiosOff"})
		wantActive(t, m, "guestagent.socket", "inactive")
		wantActive(t, m, credTarget, "active")

		if got := show(t, boot(port), "guestagent.socket", "Listen"); got != "vsock::1023 (Stream)" {
			t.Errorf("guestagent.socket listens at %q, want port 1023 alone", got)
		}
	})
}

// TestNixOSBoot boots guests that need credentials before any ordinary service starts, for in-guest sops-nix above all, and
// that have sshd's host key and root's password from the host.
func TestNixOSBoot(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	files := rendered(t, nixosBoot)
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		age, key := newValue(), newValue()
		hash := "$6$" + mark + "$" + strings.Repeat(rand.Text(), 4)[:86] // chpasswd of late looks whether it can be one
		m := vmtest.Boot(t, vm.Config{
			Image: vmtest.Image(t, release),
			OEMStrings: vm.OEM(
				"io.guestagent.credential:age-key="+string(age),
				"io.guestagent.credential:ssh-host-key="+string(key),
				"io.guestagent.credential:root-password=root:"+hash,
			),
			// Whoever does not wait for the import comes too early.
			Overlay: append(slices.Clone(files), vm.File{
				Path: nixosUnits + "guestagent-import.service.d/slow.conf", Content: []byte(lines("[Service]", "ExecStartPre=/usr/bin/sleep 2")),
			}),
		})
		untilState(t, m, "active", "sops-install-secrets.service", "sops-install-secrets-for-users.service", "sshd.service", "root-password.service")
		wantFile(t, m, "/run/seen/age-key", age)
		wantFile(t, m, "/run/seen/age-key-for-users", age)
		wantOpen(t, m, "sshd.service", key)
		// sshd takes no host key that others may read.
		if got := vmtest.Run(t, m, "stat", "--dereference", "--format=%a %U", fmt.Sprintf("/proc/%d/fd/0", mainPID(t, m, "sshd.service"))); got != "400 root\n" {
			t.Errorf("the host key's mode and owner are %q", got)
		}
		if got := string(vmtest.ReadFile(t, m, "/etc/shadow")); !strings.Contains("\n"+got, "\nroot:"+hash+":") {
			t.Error("/etc/shadow has another password of root's")
		}
		if out := vmtest.Exec(t, m, vm.Command{Argv: []string{"journalctl", "--boot", "--output=cat", "--grep=ordering cycle"}}); len(out.Stdout) != 0 {
			t.Errorf("the units' order has a cycle:\n%s", out.Stdout)
		}
		if failed := vmtest.Run(t, m, "systemctl", "--failed", "--no-legend", "--plain"); failed != "" {
			t.Errorf("failed units:\n%s", failed)
		}
		wantSilence(t, m)
	})
}

// unitSettings are the settings of a unit in /etc and of its drop-ins, SECTION.KEY, each with its values. There are none
// where there is no such unit.
func unitSettings(files []vm.File, unit string) map[string][]string {
	base := unit
	if template, _, ok := strings.Cut(unit, "@"); ok {
		base = template + "@" + path.Ext(unit)
	}
	var texts []string
	settings := map[string][]string{}
	for _, f := range files {
		switch name := strings.TrimPrefix(f.Path, nixosUnits); {
		case name == f.Path || f.Symlink != "": // elsewhere, or a link of a target's
		case name == unit, name == base:
			texts = slices.Insert(texts, 0, string(f.Content))
		case path.Dir(name) == unit+".d", path.Dir(name) == base+".d":
			texts = append(texts, string(f.Content))
		}
	}
	section := ""
	for line := range strings.Lines(strings.Join(texts, "\n")) {
		line = strings.TrimSpace(line)
		key, value, ok := strings.Cut(line, "=")
		switch {
		case strings.HasPrefix(line, "["):
			section = strings.Trim(line, "[]")
		case !ok || strings.HasPrefix(line, "#") || section == "Install":
		case value == "":
			settings[section+"."+key] = nil
		default:
			settings[section+"."+key] = append(settings[section+"."+key], value)
		}
	}
	return settings
}

// changedSettings are the settings that differ, those left out that NixOS does not look at.
func changedSettings(from, to map[string][]string) (keys []string) {
	ignored := []string{
		"Unit.Description", "Unit.Documentation", "Unit.OnFailure", "Unit.OnSuccess", "Unit.OnFailureJobMode", "Unit.IgnoreOnIsolate",
		"Unit.StopWhenUnneeded", "Unit.RefuseManualStart", "Unit.RefuseManualStop", "Unit.AllowIsolate", "Unit.CollectMode", "Unit.SourcePath",
	}
	all := maps.Clone(from)
	maps.Copy(all, to)
	for key := range all {
		if !slices.Contains(ignored, key) && !slices.Equal(from[key], to[key]) {
			keys = append(keys, key)
		}
	}
	return keys
}

// switchTo does to a guest what NixOS' switch-to-configuration does when the files of one configuration take the place of
// another's. It returns what did not come up, which is what a switch complains of. Restart triggers, which are store paths,
// are left to the caller.
func switchTo(t *testing.T, m *vm.Machine, from, to []vm.File) (complaints string) {
	t.Helper()
	flag := func(settings map[string][]string, key string, unset bool) bool {
		values := settings[key]
		if len(values) == 0 {
			return unset
		}
		return slices.Contains([]string{"1", "yes", "true", "on"}, values[len(values)-1])
	}
	var stop, reload, restart, started, targets []string
	active := vmtest.Run(t, m, "systemctl", "list-units", "--plain", "--no-legend", "--state=active,activating")
	for line := range strings.Lines(active) {
		unit := strings.Fields(line)[0]
		before, after := unitSettings(from, unit), unitSettings(to, unit)
		changed := changedSettings(before, after)
		onlyMount := func(key string) bool { return key == "Mount.Options" && before[key] != nil && after[key] != nil }
		switch {
		case len(before) == 0:
			// NixOS has systemd's own targets among its files.
			if slices.Contains([]string{"sysinit.target", "sockets.target", "basic.target", "multi-user.target"}, unit) {
				targets = append(targets, unit)
			}
		case len(after) == 0:
			if flag(before, "Unit.X-StopOnRemoval", true) {
				stop = append(stop, unit)
			}
		case strings.HasSuffix(unit, ".target"):
			targets = append(targets, unit)
		case len(changed) == 0:
		case !slices.ContainsFunc(changed, func(key string) bool { return key != "Unit.X-Reload-Triggers" && !onlyMount(key) }):
			reload = append(reload, unit)
		case strings.HasSuffix(unit, ".mount"):
			restart = append(restart, unit)
		case strings.HasSuffix(unit, ".socket"):
		case flag(after, "Service.X-ReloadIfChanged", false):
			reload = append(reload, unit)
		case !flag(after, "Service.X-RestartIfChanged", true), flag(after, "Unit.RefuseManualStop", false):
		case !flag(after, "Service.X-StopIfChanged", true):
			restart = append(restart, unit)
		default:
			stop, started = append(stop, unit), append(started, unit)
		}
	}
	// No service of ours that is stopped has a socket of its name, which would be stopped, too.
	for _, unit := range stop {
		socket := strings.TrimSuffix(unit, ".service") + ".socket"
		if slices.Contains(started, unit) && len(unitSettings(from, socket)) > 0 {
			t.Errorf("a switch stops %s with its socket", unit)
		}
	}
	systemctl := func(units []string, args ...string) {
		if len(units) == 0 {
			return
		}
		t.Logf("systemctl %s %s", strings.Join(args, " "), strings.Join(units, " "))
		res := vmtest.Exec(t, m, vm.Command{Argv: slices.Concat([]string{"systemctl"}, args, units)})
		if args[0] != "stop" { // of which it does not look what came
			complaints += string(res.Stderr)
		}
	}
	systemctl(stop, "stop")
	for _, f := range from {
		if !slices.ContainsFunc(to, func(g vm.File) bool { return g.Path == f.Path }) {
			vmtest.Run(t, m, "rm", f.Path)
		}
	}
	for _, f := range to {
		i := slices.IndexFunc(from, func(g vm.File) bool { return g.Path == f.Path })
		switch {
		case f.Symlink != "":
			vmtest.Run(t, m, "mkdir", "-p", path.Dir(f.Path))
			vmtest.Run(t, m, "ln", "-sfn", f.Symlink, f.Path)
		case i < 0 || !bytes.Equal(from[i].Content, f.Content):
			vmtest.WriteFile(t, m, f.Path, f.Mode, f.Content)
		}
	}
	vmtest.Run(t, m, "systemctl", "reset-failed")
	vmtest.Run(t, m, "systemctl", "daemon-reload")
	systemctl(reload, "reload")
	systemctl(restart, "restart")
	systemctl(started, "start")
	// It would wait for those that a target starts, and these may wait for a credential.
	systemctl(targets, "start", "--no-block")
	return complaints
}

// agentGeneration is the generation that the agent is in.
func agentGeneration(t *testing.T, m *vm.Machine) int64 {
	t.Helper()
	return guestReport(t, m).Generation
}

// edited returns the files, with a unit's text changed.
func edited(t *testing.T, files []vm.File, unit, old, text string) []vm.File {
	t.Helper()
	files = slices.Clone(files)
	for i, f := range files {
		if f.Path != nixosUnits+unit {
			continue
		}
		content := strings.Replace(string(f.Content), old, text, 1)
		if content == string(f.Content) {
			t.Fatalf("%s has no %q", unit, old)
		}
		files[i].Content = []byte(content)
		return files
	}
	t.Fatalf("there is no %s", unit)
	return nil
}

// TestNixOSSwitch takes a guest from one NixOS configuration to another while units run and wait. No value is lost, and who
// waits for one waits on.
func TestNixOSSwitch(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	first := rendered(t, nixosConsumers)
	booted := withGuestctl(t, slices.Clone(first))
	// What is below /usr is in the store, and nothing that a switch removes.
	inEtc := func(f vm.File) bool { return !strings.HasPrefix(f.Path, "/etc/") }
	first = slices.DeleteFunc(first, inEtc)
	configured := slices.DeleteFunc(rendered(t, nixosUpgraded), inEtc)
	configured = edited(t, configured, agentService, "[Unit]\n", "[Unit]\nX-Restart-Triggers=another\n")
	upgraded := slices.Clone(configured)
	for _, unit := range []string{agentService, pullService, "guestagent-import.service"} {
		upgraded = edited(t, upgraded, unit, "/usr/bin/guestagent ", "/usr/bin/guestagent-2 ")
	}
	remounted := edited(t, upgraded, storeMount, "Options=mode=0700,", "Options=mode=0700,noatime,")
	moved := edited(t, remounted, storeMount, "What=ramfs", "What=other")

	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		t.Parallel()
		m := vmtest.StartContainer(t, vm.ContainerConfig{
			Image: vmtest.Image(t, release), WaitFor: vm.UntilGuest, Overlay: slices.Concat(booted, []vm.File{
				// These are nobody's that a switch could stop.
				{Path: unitDir + "other.service", Content: []byte(loads("LoadCredential=web-key:" + credStore + "/web-key"))},
				{Path: unitDir + "other-waits.service", Content: []byte(loads(bySocket("pushed")))},
			}),
		})
		vmtest.Run(t, m, "cp", "/usr/bin/guestagent", "/usr/bin/guestagent-2")
		untilState(t, m, "failed", "web.service", "left.service", "right.service", "proxy.service")
		value := creds{"web-key": newValue(), "db.password": newValue(), "certificate": newValue()}
		mustPush(t, m, value)
		running := []string{"web.service", "left.service", "right.service", "proxy.service", "lenient.service", "other.service"}
		start(t, m, running...)
		begin(t, m, "other-waits.service")
		waiting := []string{"other-waits.service", "waits-simple.service", "waits.service"}
		untilWaiting(t, m, waiting...)

		ids := func(units ...string) string { return fmt.Sprint(showAll(t, m, "InvocationID", units...)) }
		mounted := func() string {
			return vmtest.Run(t, m, "findmnt", "--noheadings", "--output=ID,FSTYPE", "--mountpoint", credStore)
		}
		store := mounted()
		runningIDs, waitingIDs := ids(running...), ids(waiting...)
		generation := agentGeneration(t, m)
		wantStore := func() {
			t.Helper()
			if got := mounted(); got != store {
				t.Errorf("the store's mount is %s, want %s", got, store)
			}
			for name, v := range value {
				wantFile(t, m, credStore+"/"+name, v)
			}
		}
		// wantAll checks that a switch did nothing to anybody but the agent, which answers.
		wantAll := func(program string) {
			t.Helper()
			wantStore()
			if got := agentGeneration(t, m); got != generation {
				t.Errorf("the agent is in generation %d, want %d", got, generation)
			}
			untilWaiting(t, m, waiting...)
			if got := ids(waiting...); got != waitingIDs {
				t.Errorf("who waits was started anew: %s, want %s", got, waitingIDs)
			}
			if got := ids(running...); got != runningIDs {
				t.Errorf("who runs was started anew: %s, want %s", got, runningIDs)
			}
			if got := strings.TrimSpace(vmtest.Run(t, m, "readlink", fmt.Sprintf("/proc/%d/exe", mainPID(t, m, agentService)))); got != program {
				t.Errorf("the agent is %s, want %s", got, program)
			}
		}
		wantNoComplaints := func(complaints string) {
			t.Helper()
			if complaints != "" {
				t.Errorf("the switch complains: %s", complaints)
			}
		}

		wantNoComplaints(switchTo(t, m, first, configured))
		wantAll("/usr/bin/guestagent")
		// It has read its configuration.
		mustPush(t, m, creds{"later": newValue()}).wantUnits(t, "pooler.service restart done")
		generation = agentGeneration(t, m)

		wantNoComplaints(switchTo(t, m, configured, upgraded))
		wantAll("/usr/bin/guestagent-2")
		wantActive(t, m, "guestagent-import.service", "active")

		wantNoComplaints(switchTo(t, m, upgraded, remounted))
		wantAll("/usr/bin/guestagent-2")
		if got := vmtest.Run(t, m, "findmnt", "--noheadings", "--output=OPTIONS", "--mountpoint", credStore); !strings.Contains(got, "noatime") {
			t.Errorf("the store's options are %s, want them changed", got)
		}

		// What would take the store away is refused, and complained of.
		if complaints := switchTo(t, m, remounted, moved); !strings.Contains(complaints, storeMount) {
			t.Errorf("the switch that would mount the store anew complains: %q", complaints)
		}
		wantAll("/usr/bin/guestagent-2")

		// The module goes, and with it all that it wired; the store stays.
		switchTo(t, m, moved, nil)
		wantStore()
		for _, u := range []string{agentService, "guestagent.socket", "guestagent-credentials.socket", "guestagent-import.service", credTarget} {
			if got := show(t, m, u, "ActiveState"); got == "active" {
				t.Errorf("%s is %s without the module", u, got)
			}
		}
		vmtest.Run(t, m, "systemctl", "restart", "other.service")
		wantGiven(t, m, "other.service", "web-key", value["web-key"])
		// Who waited has not started without its credential. Where systemd keeps the connections of a service that has no
		// unit any more, it waits on.
		if got := show(t, m, "other-waits.service", "ExecMainStartTimestampMonotonic"); got != "0" {
			t.Error("other-waits.service has started without the module")
		}
		keeps := show(t, m, agentService, "SubState") == "dead-resources-pinned"
		untilState(t, m, "active", "multi-user.target")

		// And it comes back, with what it knew.
		wantNoComplaints(switchTo(t, m, nil, first))
		untilState(t, m, "active", "web.service", "left.service", "right.service", "proxy.service", "lenient.service", credTarget)
		wantStore()
		if got := agentGeneration(t, m); got != generation {
			t.Errorf("the agent is in generation %d, want %d", got, generation)
		}
		wantOpen(t, m, "web.service", value["web-key"])
		if !keeps {
			waiting = []string{"waits-simple.service", "waits.service"}
		}
		untilWaiting(t, m, waiting...)
		pushed := newValue()
		mustPush(t, m, creds{"pushed": pushed})
		untilState(t, m, "active", append(waiting, "multi-user.target")...)
		wantOpen(t, m, "waits.service", pushed)
		for _, u := range waiting {
			wantGiven(t, m, u, "pushed", pushed)
		}
		t.Logf("systemd %d kept who waited: %v", release.Systemd, keeps)
		wantSilence(t, m)
	})
}
