package vm_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// A container has its provider inside, on Unix sockets: all but vsock is as on a host.
const (
	pullService   = "guestagent-pull.service"
	credTarget    = "guestagent-credentials.target"
	hostFolder    = "/var/lib/host/credentials/"
	hostService   = "host-provider.service"
	hostBell      = "/run/host-bell.sock"
	hostStarted   = "/run/host-started"
	hostArguments = "--listen unix:" + hostBell + " --target unix:/run/guestagent/varlink.sock --dir " + hostFolder
	asks          = `{"provider": {"address": "unix:` + hostBell + `"}}`
	asksOnce      = `{"provider": {"address": "unix:` + hostBell + `", "timeout": 1}}`
	requires      = `{"provider": {"address": "unix:` + hostBell + `", "timeout": 1, "required": true}}`
	falseBell     = "/run/false.sock"
	asksElsewhere = `{"provider": {"address": "unix:` + falseBell + `", "timeout": 1}}`
)

// hostProvider is the provider of a container. It starts when it is told to, so early that nothing has to wait for the
// boot.
func hostProvider() []vm.File {
	return wanted("sysinit.target", hostService, lines(
		"[Unit]", "DefaultDependencies=no", "[Service]", "Type=notify", "TimeoutStartSec=infinity",
		"ExecStartPre=/bin/sh -c 'until test -e "+hostStarted+"; do sleep 0.05; done'",
		"ExecStart=/usr/bin/guestctl provide "+hostArguments,
	))
}

// hostStart lets the provider start.
func hostStart(t testing.TB, m *vm.Machine) {
	t.Helper()
	vmtest.Run(t, m, "touch", hostStarted)
}

// providerState is what the guest's report says of its provider.
func providerState(t testing.TB, m *vm.Machine) string {
	t.Helper()
	return guestReport(t, m).Provider.State
}

// guestReport is what `guestagent status` says.
func guestReport(t testing.TB, m *vm.Machine) (r vsockrpc.Report) {
	t.Helper()
	if err := json.Unmarshal([]byte(vmtest.Run(t, m, "guestagent", "status", "--json")), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func reasonCodes(r vsockrpc.Report) (list []string) {
	for _, n := range r.Reasons {
		list = append(list, n.Code)
	}
	return list
}

// consumersOfBoot are services that a boot starts, each with a way of its own to come after its credential.
func consumersOfBoot(name string) []vm.File {
	return slices.Concat(
		wanted("multi-user.target", "ordered.service", loads("LoadCredential="+name)+lines("[Unit]", "Requires="+credTarget, "After="+credTarget)),
		wanted("multi-user.target", "waiting.service", loads(bySocket(name))),
		wanted("multi-user.target", "plain.service", loads("LoadCredential="+name)),
	)
}

// given are those of the services whose process has the value, and no other.
func given(t testing.TB, m *vm.Machine, name string, value []byte, units ...string) (list []string) {
	t.Helper()
	for _, u := range units {
		got, err := m.ReadFile(t.Context(), "/run/credentials/"+u+"/"+name)
		if err == nil && string(got) == string(value) {
			list = append(list, u)
		}
	}
	return list
}

// TestProvide boots guests whose provider is there, is late, or is not there at all.
func TestProvide(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	files := append(agentFiles(t), hostProvider()...)
	boot := func(t *testing.T, release vm.Release, value []byte, config string, more ...vm.File) *vm.Machine {
		return vmtest.StartContainer(t, vm.ContainerConfig{
			Image: vmtest.Image(t, release), WaitFor: vm.UntilGuest,
			Overlay: slices.Concat(files, consumersOfBoot("boot"), more, []vm.File{
				{Path: agentConfig, Content: []byte(config)},
				{Path: hostFolder + "boot", Mode: 0o600, Content: value},
			}),
		})
	}
	ready := func(t *testing.T, m *vm.Machine) {
		t.Helper()
		if _, err := m.WaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	all := []string{"ordered.service", "plain.service", "waiting.service"}
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		t.Parallel()
		t.Run("late", func(t *testing.T) {
			value := newValue()
			m := boot(t, release, value, asks)
			// Who comes after the target waits, and nobody else does.
			untilState(t, m, "active", "plain.service", "sysinit.target", "basic.target")
			wantActive(t, m, credTarget, "inactive")
			wantActive(t, m, "ordered.service", "inactive")
			eventually(t, "the provider is asked", func() bool { return providerState(t, m) == vsockrpc.ProviderWaiting })
			hostStart(t, m)
			ready(t, m)
			untilState(t, m, "active", "ordered.service", "waiting.service", credTarget)
			wantLines(t, "who has it at its first start", given(t, m, "boot", value, all...), []string{"ordered.service", "waiting.service"})
			if got := providerState(t, m); got != vsockrpc.ProviderInForce {
				t.Errorf("the provider's state = %q, want inForce", got)
			}
			t.Run("afterwards", func(t *testing.T) { testProvided(t, m, value) })
			wantSilence(t, m)
		})
		t.Run("held", func(t *testing.T) {
			value := newValue()
			m := boot(t, release, value, asks, nixosDropIn(t, credTarget, "hold-boot.conf"))
			untilState(t, m, "active", "sysinit.target", "sockets.target")
			wantActive(t, m, "basic.target", "inactive")
			hostStart(t, m)
			ready(t, m)
			wantLines(t, "who has it at its first start", given(t, m, "boot", value, all...), all)
		})
		t.Run("absent", func(t *testing.T) {
			value := newValue()
			m := boot(t, release, value, asksOnce)
			untilState(t, m, "active", "ordered.service", pullService, credTarget)
			r := guestReport(t, m)
			if r.Provider.State != vsockrpc.ProviderUnreachable || !slices.Contains(reasonCodes(r), "providerUnreachable") {
				t.Errorf("the report = %+v, %v", r.Provider, r.Reasons)
			}
			if got := show(t, m, pullService, "StatusText"); !strings.Contains(got, "provider unreachable") {
				t.Errorf("the pull's status = %q", got)
			}
			hostStart(t, m)
			untilState(t, m, "active", "waiting.service")
			wantGiven(t, m, "waiting.service", "boot", value)
			eventually(t, "the pull has ended", func() bool { return show(t, m, pullService, "SubState") == "exited" })
			ready(t, m)
			if got := reasonCodes(guestReport(t, m)); slices.Contains(got, "providerUnreachable") {
				t.Errorf("the reasons = %q", got)
			}
		})
		// Somebody else listens there. The boot ends, and the provider calls when it comes.
		answering := func(command string) []vm.File {
			return slices.Concat(
				wanted("sysinit.target", "false.socket", lines("[Unit]", "DefaultDependencies=no", "[Socket]", "ListenStream="+falseBell, "Accept=yes")),
				[]vm.File{{Path: unitDir + "false@.service", Content: []byte(lines(
					"[Unit]", "DefaultDependencies=no", "[Service]", "StandardInput=socket", "StandardError=journal", "ExecStart=/bin/sh -c '"+command+"'",
				))}},
			)
		}
		for name, command := range map[string]string{
			"hanging":  "exec sleep infinity",
			"garbage":  "echo garbage; head -c 1 /dev/zero",
			"too much": "yes | head -c 2000000",
		} {
			t.Run(name, func(t *testing.T) {
				value := newValue()
				m := boot(t, release, value, asksElsewhere, answering(command)...)
				untilState(t, m, "active", "ordered.service", credTarget)
				if got := providerState(t, m); got != vsockrpc.ProviderUnreachable {
					t.Errorf("the provider's state = %q, want unreachable", got)
				}
				if got := show(t, m, "false.socket", "NAccepted"); got == "0" {
					t.Error("nobody was asked")
				}
				hostStart(t, m)
				untilState(t, m, "active", "waiting.service")
				wantGiven(t, m, "waiting.service", "boot", value)
				eventually(t, "the pull has ended", func() bool { return show(t, m, pullService, "SubState") == "exited" })
			})
		}
		t.Run("dying", func(t *testing.T) {
			// A provider that is killed again and again while it is asked, and while it hands over.
			value := newValue()
			m := boot(t, release, value, asks, vm.File{
				Path: "/etc/systemd/system/" + hostService + ".d/dying.conf",
				Content: []byte(lines("[Unit]", "StartLimitIntervalSec=0", "[Service]", "NotifyAccess=all", "Restart=always", "RestartSec=10ms", "ExecStart=",
					"ExecStart=/bin/sh -c 'n=$$(cat /run/deaths || echo 10); echo $$((n+1)) > /run/deaths; "+
						"test $$n -ge 40 || exec timeout --signal=KILL 0.0$$n guestctl provide "+hostArguments+"; exec guestctl provide "+hostArguments+"'")),
			})
			hostStart(t, m)
			untilState(t, m, "active", "ordered.service", "waiting.service")
			wantLines(t, "who has it", given(t, m, "boot", value, "ordered.service", "waiting.service"), []string{"ordered.service", "waiting.service"})
			untilState(t, m, "active", hostService)
		})
		t.Run("killed", func(t *testing.T) {
			// A pull that is killed while it asks, and once the boot has gone on without.
			value := newValue()
			m := boot(t, release, value, asksOnce)
			kill := func() {
				t.Helper()
				before := show(t, m, pullService, "MainPID")
				vmtest.Run(t, m, "systemctl", "kill", "--signal=KILL", pullService)
				eventually(t, "the pull is back", func() bool {
					pid := show(t, m, pullService, "MainPID")
					return pid != before && pid != "0"
				})
			}
			eventually(t, "the provider is asked", func() bool { return providerState(t, m) != vsockrpc.ProviderNone })
			if release.Systemd >= 254 {
				kill()
			}
			untilState(t, m, "active", "ordered.service", pullService, credTarget)
			pid := mainPID(t, m, "ordered.service")
			if release.Systemd >= 254 {
				kill()
				untilState(t, m, "active", pullService)
			}
			hostStart(t, m)
			untilState(t, m, "active", "waiting.service")
			eventually(t, "the pull has ended", func() bool { return show(t, m, pullService, "SubState") == "exited" })
			wantActive(t, m, credTarget, "active")
			if got := mainPID(t, m, "ordered.service"); got != pid {
				t.Error("a pull that was killed restarted who requires the target")
			}
		})
		t.Run("required", func(t *testing.T) {
			value := newValue()
			m := boot(t, release, value, requires)
			untilState(t, m, "failed", pullService)
			untilState(t, m, "active", "plain.service")
			wantActive(t, m, credTarget, "inactive")
			wantActive(t, m, "ordered.service", "inactive")
			hostStart(t, m)
			// It comes all the same, and the way out is to start what was not.
			untilState(t, m, "active", "waiting.service")
			start(t, m, "ordered.service")
			wantGiven(t, m, "ordered.service", "boot", value)
			wantActive(t, m, credTarget, "active")
		})
	})
}

// testProvided changes what the host has while the guest runs.
func testProvided(t *testing.T, m *vm.Machine, first []byte) {
	entry := func(name string) (e vsockrpc.Entry) {
		t.Helper()
		for _, e := range guestReport(t, m).Entries {
			if e.Name == name {
				return e
			}
		}
		return vsockrpc.Entry{}
	}
	generation := func() int64 { return guestReport(t, m).Generation }
	before, g := entry("boot"), generation()

	// What is there already does not come again, whoever is started anew.
	vmtest.Run(t, m, "systemctl", "restart", hostService)
	killAgent(t, m)
	vmtest.Run(t, m, "systemctl", "kill", "--signal=HUP", hostService)
	vmtest.Run(t, m, "touch", hostFolder+"boot")
	second := newValue()
	vmtest.WriteFile(t, m, hostFolder+"more", 0o600, second)
	eventually(t, "the second credential is there", func() bool { return entry("more").Name != "" })
	if after := entry("boot"); after.Revision != before.Revision || after.InstalledAt != before.InstalledAt || generation() != g+1 {
		t.Errorf("boot = %+v in generation %d, want %+v and %d", after, generation(), before, g+1)
	}
	wantGiven(t, m, "ordered.service", "boot", first)

	// A change by whoever is not the provider is for a while.
	ctl(t, m, newValue(), "push", "boot:-").want(t, 1, "refused")
	ctl(t, m, newValue(), "push", "boot:-", "--ephemeral").want(t, 0, "")
	if e := entry("boot"); !e.Ephemeral {
		t.Errorf("boot = %+v, want it ephemeral", e)
	}
	third := newValue()
	vmtest.WriteFile(t, m, hostFolder+"boot.new", 0o600, third)
	vmtest.Run(t, m, "sh", "-c", "rm "+hostFolder+"more && mv "+hostFolder+"boot.new "+hostFolder+"boot")
	eventually(t, "the change is there", func() bool {
		e := entry("boot")
		return e.Source == "provider" && !e.Ephemeral && e.Revision != before.Revision && entry("more").Name == "" && entry("boot.new").Name == ""
	})
	vmtest.Run(t, m, "systemctl", "restart", "ordered.service", "waiting.service")
	wantGiven(t, m, "ordered.service", "boot", third)
	wantGiven(t, m, "waiting.service", "boot", third)

	// What the provider says of its guest, and what it does not.
	eventually(t, "the provider's status says so", func() bool {
		return strings.Contains(show(t, m, hostService, "StatusText"), "the set is in force")
	})
}

// BenchmarkBoot is how long PID 1 takes to boot a container: with a provider beside it that nobody asks, with one that hands
// over a credential, and with the boot held until it has. The provider is in the container, and takes its share each time.
func BenchmarkBoot(b *testing.B) {
	vmtest.Releases(b) // skips before anything is built
	files := append(agentFiles(b), hostProvider()...)
	files = append(files, vm.File{
		Path: "/etc/systemd/system/" + hostService + ".d/at-once.conf", Content: []byte("[Service]\nExecStartPre=\n"),
	}, vm.File{Path: hostFolder + "boot", Mode: 0o600, Content: newValue()})
	files = append(files, consumersOfBoot("boot")...)
	pulls := vm.File{Path: agentConfig, Content: []byte(asks)}
	holds := nixosDropIn(b, credTarget, "hold-boot.conf")
	// Nobody hands over what a service waits for.
	silent := vm.File{Path: "/etc/systemd/system/waiting.service", Symlink: "/dev/null"}
	for _, bb := range []struct {
		name string
		more []vm.File
	}{{"not asked", nil}, {"pulled", []vm.File{pulls}}, {"held", []vm.File{pulls, holds}}} {
		b.Run(bb.name, func(b *testing.B) {
			var times []float64
			for b.Loop() {
				m := vmtest.StartContainer(b, vm.ContainerConfig{Overlay: slices.Concat(files, bb.more, []vm.File{silent})})
				times = append(times, bootTime(b, m))
				if err := m.Close(); err != nil {
					b.Fatal(err)
				}
			}
			slices.Sort(times)
			b.ReportMetric(times[len(times)/2], "ms/boot")
		})
	}
}

// bootTime is how long PID 1 took to boot, in milliseconds.
func bootTime(b *testing.B, m *vm.Machine) float64 {
	b.Helper()
	out := vmtest.Run(b, m, "systemctl", "show", "--property=UserspaceTimestampMonotonic", "--property=FinishTimestampMonotonic")
	var begin, end float64
	for line := range strings.Lines(out) {
		_, _ = fmt.Sscanf(line, "UserspaceTimestampMonotonic=%g", &begin)
		_, _ = fmt.Sscanf(line, "FinishTimestampMonotonic=%g", &end)
	}
	if begin == 0 || end <= begin {
		b.Fatalf("systemctl show says %q, want two times", out)
	}
	return (end - begin) / 1000
}
