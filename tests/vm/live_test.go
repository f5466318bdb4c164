package vm_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// TestLive boots a guest with real vsock and changes its credentials from the host while it runs.
func TestLive(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	ctl := vmtest.Binary(t, "github.com/guestagent/guestagent/cmd/guestctl")
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		path := vmtest.VsockPath(t)
		m := vmtest.Boot(t, vm.Config{
			Image: vmtest.Image(t, release),
			Vsock: &vm.VsockConfig{Path: path},
			// A string that came at boot, to be replaced, and one to be kept.
			OEMStrings: vm.OEM("io.guestagent.credential:booted="+mark, "io.guestagent.credential:kept="+mark),
			Overlay: append(
				install(t),
				vm.File{Path: "/usr/bin/guestctl", Mode: 0o755, Source: ctl},
				vm.File{Path: "/usr/lib/systemd/varlink-bridges/vsock", Symlink: "/usr/bin/guestctl"},
				// The device chooses the port itself.
				vm.File{Path: "/etc/guestagent/config.json", Content: []byte(`{"peer": {"privilegedPort": "ignored"}}`)},
				vm.File{Path: "/etc/systemd/system/guestagent.service.d/idle.conf", Content: []byte("[Service]\nExecStart=\nExecStart=/usr/bin/guestagent serve --idle=3s --pid1-credentials=/run/guestagent\n")},
			),
		})
		target, err := vsockrpc.ParseTarget("vsock-mux:" + m.VsockPath())
		if err != nil {
			t.Fatal(err)
		}
		// Each call has a connection of its own, as guestctl's do.
		dial := func(t *testing.T) vsockrpc.Credentials {
			t.Helper()
			c, err := vsockrpc.Dial(t.Context(), target)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
			return vsockrpc.Credentials{Client: c}
		}
		list := func(t *testing.T) (lines []string, generation int64) {
			t.Helper()
			c := dial(t)
			res, err := c.List(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_ = c.Client.Close() // an open one keeps the agent
			for _, e := range res.Entries {
				lines = append(lines, e.Name+" "+strconv.FormatInt(e.Size, 10)+" "+string(e.Source)+" "+e.State)
			}
			return lines, res.Generation
		}
		active := func(t *testing.T, unit string) string {
			t.Helper()
			return strings.TrimSpace(string(vmtest.Exec(t, m, vm.Command{Argv: []string{"systemctl", "is-active", unit}}).Stdout))
		}
		mib := allBytes(1 << 20)
		cred := func(name string, value []byte) vsockrpc.Credential {
			return vsockrpc.Credential{Name: name, Value: secret.New(bytes.Clone(value))}
		}

		t.Run("units", func(t *testing.T) {
			for unit, want := range map[string]string{
				"guestagent.socket": "active", "guestagent-local.socket": "active", "guestagent-credentials.socket": "active", "guestagent-report.socket": "active", "guestagent.service": "inactive", "guestagent-import.service": "active",
				"guestagent-pull.service": "active", "guestagent-credentials.target": "active",
			} {
				if got := active(t, unit); got != want {
					t.Errorf("%s is %s, want %s", unit, got, want)
				}
			}
		})

		t.Run("push", func(t *testing.T) {
			res, err := dial(t).Apply(t.Context(), &vsockrpc.ApplyParams{Set: []vsockrpc.Credential{
				cred("booted", []byte(text(30))), cred("p-one", []byte(text(31))), cred("p-mib", mib),
			}})
			if err != nil || res.Generation != 2 {
				t.Fatalf("Apply = %+v, %v", res, err)
			}
			// It is done when the answer is there: a service that starts now has it.
			vmtest.Run(t, m, "systemd-run", "--wait", "--property=LoadCredential=booted", "--property=LoadCredential=p-one",
				"sh", "-c", "mkdir -p /run/seen && cp $CREDENTIALS_DIRECTORY/* /run/seen/")
			wantFile(t, m, "/run/seen/booted", []byte(text(30)))
			wantFile(t, m, "/run/seen/p-one", []byte(text(31)))
			wantFile(t, m, "/run/credstore/p-mib", mib)
			lines, _ := list(t)
			wantLines(t, "list", lines, []string{"booted 30 push inForce", "kept 9 smbios inForce", "p-mib 1048576 push inForce", "p-one 31 push inForce"})
			// What the host pushed stays when the import runs again.
			vmtest.Run(t, m, "systemctl", "restart", "guestagent-import.service")
			wantFile(t, m, "/run/credstore/booted", []byte(text(30)))
		})

		t.Run("change", func(t *testing.T) {
			prune := &vsockrpc.ApplyParams{Set: []vsockrpc.Credential{cred("p-one", []byte(text(32)))}, Prune: true, PrunePrefix: "p-", DryRun: true}
			res, err := dial(t).Apply(t.Context(), prune)
			if err != nil || !slices.Equal(res.Removed, []string{"p-mib"}) {
				t.Fatalf("Apply as a dry run = %+v, %v", res, err)
			}
			wantFile(t, m, "/run/credstore/p-one", []byte(text(31)))
			prune.DryRun = false
			if _, err := dial(t).Apply(t.Context(), prune); err != nil {
				t.Fatal(err)
			}
			wantFile(t, m, "/run/credstore/p-one", []byte(text(32)))
			wantNoFile(t, m, "/run/credstore/p-mib")
			if _, err := dial(t).Rollback(t.Context(), &vsockrpc.RollbackParams{}); err != nil {
				t.Fatal(err)
			}
			wantFile(t, m, "/run/credstore/p-one", []byte(text(31)))
			wantFile(t, m, "/run/credstore/p-mib", mib)
			if _, err := dial(t).Remove(t.Context(), &vsockrpc.RemoveParams{Names: []string{"p-mib", "p-one"}}); err != nil {
				t.Fatal(err)
			}
			wantNoFile(t, m, "/run/credstore/p-mib")
			_, err = dial(t).Apply(t.Context(), &vsockrpc.ApplyParams{Set: []vsockrpc.Credential{cred("tmpfiles.extra", []byte(mark))}})
			if refused, ok := errors.AsType[*vsockrpc.RefusedError](err); !ok || refused.Refusals[0].Reason != "denied" {
				t.Errorf("Apply of tmpfiles.extra = %v, want it denied", err)
			}
		})

		t.Run("unit", func(t *testing.T) {
			lines, generation := list(t)
			wantLines(t, "list", lines, []string{"booted 30 push inForce", "kept 9 smbios inForce"})
			same := func(what string) {
				t.Helper()
				if again, g := list(t); !slices.Equal(again, lines) || g != generation {
					t.Errorf("after %s: %v, generation %d, want %v, %d", what, again, g, lines, generation)
				}
			}
			// It ends when nobody calls, and the next call wakes it.
			for deadline := t.Context(); active(t, "guestagent.service") != "inactive" && deadline.Err() == nil; {
				continue
			}
			same("its idle exit")
			if got := active(t, "guestagent.service"); got != "active" {
				t.Errorf("after a call it is %s", got)
			}
			vmtest.Run(t, m, "systemctl", "restart", "guestagent.service")
			same("a restart")
			vmtest.Run(t, m, "systemctl", "kill", "--signal=KILL", "guestagent.service")
			same("kill -9")
			if failed := vmtest.Run(t, m, "systemctl", "--failed", "--no-legend", "--plain"); failed != "" {
				t.Errorf("failed units:\n%s", failed)
			}
			out := vmtest.Run(t, m, "systemd-analyze", "security", "--no-pager", "guestagent.service")
			level := regexp.MustCompile(`exposure level for guestagent.service: ([0-9.]+)`).FindStringSubmatch(out)
			if level == nil {
				t.Fatalf("systemd-analyze security says no level:\n%s", out)
			}
			if exposure, err := strconv.ParseFloat(level[1], 64); err != nil || exposure >= 2.0 {
				t.Errorf("exposure %s, want below 2.0\n%s", level[1], out)
			}
			t.Logf("exposure level %s; %s", level[1], vmtest.Run(t, m, "systemctl", "show", "--property=MemoryCurrent,MemoryPeak", "guestagent.service"))
		})

		// A client that none of us wrote.
		t.Run("varlinkctl", func(t *testing.T) {
			if release.Systemd < 255 {
				return // there is none
			}
			const socket = "/run/guestagent/varlink.sock"
			if out := vmtest.Run(t, m, "varlinkctl", "info", socket); !strings.Contains(out, "guestagent") || !strings.Contains(out, vsockrpc.CredentialsInterface) {
				t.Errorf("varlinkctl info = %s", out)
			}
			if out := vmtest.Run(t, m, "varlinkctl", "list-interfaces", socket); !strings.Contains(out, vsockrpc.CredentialsInterface) {
				t.Errorf("varlinkctl list-interfaces = %s", out)
			}
			if out := vmtest.Run(t, m, "varlinkctl", "introspect", socket, vsockrpc.CredentialsInterface); !strings.Contains(out, "method Apply") {
				t.Errorf("varlinkctl introspect = %s", out)
			}
			if out := vmtest.Run(t, m, "varlinkctl", "call", socket, vsockrpc.MethodList, "{}"); !strings.Contains(out, `"kept"`) {
				t.Errorf("varlinkctl call List = %s", out)
			}
			out := vmtest.Run(t, m, "varlinkctl", "call", socket, vsockrpc.MethodApply, `{"set": [{"name": "local", "text": "not a secret"}]}`)
			if !strings.Contains(out, `"local"`) {
				t.Errorf("varlinkctl call Apply = %s", out)
			}
			wantFile(t, m, "/run/credstore/local", []byte("not a secret"))
			res := vmtest.Exec(t, m, vm.Command{Argv: []string{"varlinkctl", "call", socket, vsockrpc.MethodApply, `{"set": [{"name": "a/b", "text": "x"}]}`}})
			if res.ExitCode == 0 || !bytes.Contains(slices.Concat(res.Stdout, res.Stderr), []byte("io.guestagent.Credentials.Refused")) {
				t.Errorf("varlinkctl call with a bad name = %d, %s%s", res.ExitCode, res.Stdout, res.Stderr)
			}
			if out := vmtest.Run(t, m, "varlinkctl", "call", "--more", socket, vsockrpc.MethodList, "{}"); !strings.Contains(out, `"kept"`) {
				t.Errorf("varlinkctl call --more List = %s", out)
			}
			files, err := filepath.Glob("../../vsockrpc/*.varlink")
			if err != nil || len(files) < 3 {
				t.Fatalf("interface files: %v, %v", files, err)
			}
			for _, file := range files {
				b, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				vmtest.WriteFile(t, m, "/run/idl", 0o600, b)
				vmtest.Run(t, m, "varlinkctl", "validate-idl", "/run/idl")
			}
		})

		// systemd's own client over vsock, by the bridge that guestctl is. There is no host with systemd 260 here, so the
		// guest plays one: it calls a port of the host, which leads back to the guest's agent.
		t.Run("bridge", func(t *testing.T) {
			if release.Systemd < 260 {
				return // it knows no bridges
			}
			l, err := vm.ListenVsock(t.Context(), path, 1021)
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			defer wg.Wait()
			defer l.Close()
			wg.Go(func() {
				for {
					from, err := l.Accept()
					if err != nil {
						return
					}
					to, err := vm.DialVsock(t.Context(), path, 1022)
					if err != nil {
						t.Error(err)
						_ = from.Close()
						continue
					}
					for _, pair := range [][2]net.Conn{{from, to}, {to, from}} {
						wg.Go(func() {
							_, _ = io.Copy(pair[0], pair[1])
							_ = pair[0].Close()
							_ = pair[1].Close()
						})
					}
				}
			})
			if out := vmtest.Run(t, m, "varlinkctl", "info", "vsock:2:1021"); !strings.Contains(out, vsockrpc.CredentialsInterface) {
				t.Errorf("varlinkctl info through the bridge = %s", out)
			}
			if out := vmtest.Run(t, m, "varlinkctl", "call", "vsock:2:1021", vsockrpc.MethodList, "{}"); !strings.Contains(out, `"kept"`) {
				t.Errorf("varlinkctl call through the bridge = %s", out)
			}
		})

		// The command line, on the host as its users have it.
		t.Run("guestctl", func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "value")
			if err := os.WriteFile(file, []byte(text(40)), 0o600); err != nil {
				t.Fatal(err)
			}
			guestctl := func(args ...string) string {
				t.Helper()
				out, err := exec.CommandContext(t.Context(), ctl, args...).CombinedOutput()
				if err != nil {
					t.Errorf("guestctl %q: %v\n%s", args, err, out)
				}
				return string(out)
			}
			guestctl("push", target.String(), "cli:"+file)
			wantFile(t, m, "/run/credstore/cli", []byte(text(40)))
			if out := guestctl("list", target.String()); !strings.Contains(out, "cli\t-\t40\tpush\tinForce\t") {
				t.Errorf("guestctl list = %s", out)
			}
			guestctl("rm", target.String(), "cli")
			wantNoFile(t, m, "/run/credstore/cli")
		})

		// Rotation over real vsock. Containers have the many cases.
		t.Run("rotate", func(t *testing.T) {
			unit := func(name, text string) {
				t.Helper()
				vmtest.WriteFile(t, m, "/run/systemd/system/"+name, 0o644, []byte(text))
			}
			const show = "ExecStart=/bin/sh -c 'cp $CREDENTIALS_DIRECTORY/rot /run/seen/%p; exec sleep infinity'\n"
			unit("rot-file.service", "[Service]\nType=exec\nLoadCredential=rot\n"+show)
			unit("rot-socket.service", "[Unit]\nAfter=guestagent-credentials.socket\n[Service]\nType=exec\nLoadCredential=rot:/run/guestagent/credentials.sock\n"+
				"ExecStartPre=/usr/bin/test -s ${CREDENTIALS_DIRECTORY}/rot\n"+show)
			// This one cannot live with a bad value, and says so a moment later.
			unit("rot-picky.service", "[Service]\nType=exec\nLoadCredential=rot\nExecStart=/bin/sh -c 'cp $CREDENTIALS_DIRECTORY/rot /run/seen/%p; grep -q bad $CREDENTIALS_DIRECTORY/rot && sleep 3 && exit 1; exec sleep infinity'\n")
			running := []string{"rot-file.service", "rot-picky.service", "rot-socket.service"}
			if release.Systemd >= 260 {
				unit("rot-reload.service", "[Service]\nType=exec\nLoadCredential=rot\nRefreshOnReload=credentials\n"+show+
					"ExecReload=/bin/sh -c 'cp $CREDENTIALS_DIRECTORY/rot /run/seen/%p'\n")
				running = append(running, "rot-reload.service")
			}
			vmtest.Run(t, m, "systemctl", "daemon-reload")
			file := filepath.Join(t.TempDir(), "rot")
			push := func(value string, args ...string) (status int, stderr string) {
				t.Helper()
				if err := os.WriteFile(file, []byte(value), 0o600); err != nil {
					t.Fatal(err)
				}
				cmd := exec.CommandContext(t.Context(), ctl, append([]string{"push", "--timeout=2m", target.String(), "rot:" + file}, args...)...)
				var b bytes.Buffer
				cmd.Stderr = &b
				err := cmd.Run()
				if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
					t.Fatal(err)
				} else if ok {
					status = exit.ExitCode()
				}
				return status, b.String()
			}
			wantSeen := func(value string) {
				t.Helper()
				for _, name := range running {
					// Its shell copies it a moment after systemd has started it.
					eventually(t, name+" has its value", func() bool {
						b, err := m.ReadFile(t.Context(), "/run/seen/"+strings.TrimSuffix(name, ".service"))
						return err == nil && string(b) == value
					})
					if got := active(t, name); got != "active" {
						t.Errorf("%s is %s", name, got)
					}
				}
			}

			// It waits for a value that is not there yet, whatever becomes of the agent.
			vmtest.Run(t, m, "systemctl", "start", "--no-block", "rot-socket.service")
			for deadline := t.Context(); deadline.Err() == nil; {
				c := dial(t)
				list, err := c.ListConsumers(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				_ = c.Client.Close()
				if len(list.Waiting) == 1 && list.Waiting[0].Unit == "rot-socket.service" && list.Waiting[0].Name == "rot" {
					break
				}
			}
			vmtest.Run(t, m, "systemctl", "kill", "--signal=KILL", "guestagent.service")
			vmtest.Run(t, m, "systemctl", "restart", "guestagent.service")
			if got := active(t, "rot-socket.service"); got != "activating" {
				t.Errorf("rot-socket.service is %s, want it to wait", got)
			}
			if status, stderr := push(text(50)); status != 0 {
				t.Fatalf("guestctl push: status %d\n%s", status, stderr)
			}
			vmtest.Run(t, m, append([]string{"systemctl", "start"}, running...)...)
			wantSeen(text(50))

			pid := strings.TrimSpace(vmtest.Run(t, m, "systemctl", "show", "--property=MainPID", "--value", running[len(running)-1]))
			if status, stderr := push(text(51), "--refresh=auto", "--gate=2s"); status != 0 {
				t.Fatalf("guestctl push --refresh --gate: status %d\n%s", status, stderr)
			}
			wantSeen(text(51))
			again := strings.TrimSpace(vmtest.Run(t, m, "systemctl", "show", "--property=MainPID", "--value", running[len(running)-1]))
			if reloads := release.Systemd >= 260; reloads != (pid == again) {
				t.Errorf("%s had main PID %s, and has %s", running[len(running)-1], pid, again)
			}

			status, stderr := push("bad", "--refresh=auto", "--gate=30s")
			if status != 5 || !strings.Contains(stderr, "rot-picky.service failed") {
				t.Errorf("guestctl push of a bad value: status %d, want 5\n%s", status, stderr)
			}
			wantSeen(text(51))
			vmtest.Run(t, m, append([]string{"systemctl", "stop"}, running...)...)
		})

		// A process of the guest is not the host, whatever CID it dials and whoever it is. Root's calls come from a port
		// below 1024, by guestctl's own choice: that is not what makes a host.
		t.Run("loopback", func(t *testing.T) {
			vmtest.Run(t, m, "modprobe", "vsock_loopback")
			for _, cid := range []string{"1", "3"} {
				for _, c := range []vm.Command{
					{Argv: []string{"/usr/bin/guestctl", "--timeout=20s", "list", "vsock:" + cid}},
					asNobody("/usr/bin/guestctl", "--timeout=20s", "list", "vsock:"+cid),
				} {
					if res := vmtest.Exec(t, m, c); res.ExitCode == 0 {
						t.Errorf("%q in the guest = %s, want it refused", c.Argv, res.Stdout)
					}
				}
			}
			journal := vmtest.Run(t, m, "journalctl", "--output=cat", "--unit=guestagent.service", "--grep=refused a peer")
			if n := strings.Count(journal, "peer.cid=1 "); n != 4 {
				t.Errorf("%d refusals of CID 1, want 4:\n%s", n, journal)
			}
			privileged := 0
			for _, port := range regexp.MustCompile(`peer\.port=([0-9]+)`).FindAllStringSubmatch(journal, -1) {
				if n, err := strconv.Atoi(port[1]); err == nil && n < 1024 {
					privileged++
				}
			}
			if privileged != 2 {
				t.Errorf("%d calls from a port below 1024, want root's 2:\n%s", privileged, journal)
			}
			// Several of the host's ends on one machine.
			t.Run("providers", func(t *testing.T) {
				vmtest.RunTests(t, m, vmtest.TestConfig{
					Package: "github.com/guestagent/guestagent/internal/host", Args: []string{"-test.run=^TestLiveVsock$"}, Env: []string{"GUESTAGENT_TEST_VSOCK=1"},
				})
			})
		})

		t.Run("silence", func(t *testing.T) {
			journal, err := m.Journal(t.Context())
			if err != nil || bytes.Contains(journal, []byte(mark)) {
				t.Errorf("journal: %v, or it has values", err)
			}
		})
	})
}
