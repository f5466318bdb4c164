package vm_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/internal/canary"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// A vmHost is the host of one VM: its provider, and what that has.
type vmHost struct {
	// t is the test's own, and not one of its parts: the provider lives as long.
	t testing.TB

	vsock, dir, state, status string

	provider *vmtest.Host
}

func newVMHost(t testing.TB) *vmHost {
	t.Helper()
	dir := t.TempDir()
	h := &vmHost{t: t, vsock: vmtest.VsockPath(t), dir: filepath.Join(dir, "credentials"), state: filepath.Join(dir, "state"), status: filepath.Join(dir, "status.sock")}
	if err := os.Mkdir(h.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return h
}

// provide starts the provider and waits until it listens.
func (h *vmHost) provide(t testing.TB) {
	t.Helper()
	h.provider = vmtest.StartHost(h.t, vmtest.HostConfig{
		Args: []string{"provide", "--listen-mux", h.vsock, "--dir", h.dir, "--state", h.state, "--socket", h.status, "--refresh", "auto"},
		Dir:  h.t.TempDir(),
	})
	h.provider.AwaitNotify(t, "READY=1")
}

// put replaces a file as one should.
func (h *vmHost) put(t testing.TB, name string, value []byte) {
	t.Helper()
	tmp := filepath.Join(h.dir, "."+name)
	if err := os.WriteFile(tmp, value, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(h.dir, name)); err != nil {
		t.Fatal(err)
	}
}

// report asks the provider what it last heard of its guest.
func (h *vmHost) report(t *testing.T) *vsockrpc.ProviderStatus {
	t.Helper()
	c, err := vsockrpc.Dial(t.Context(), vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: h.status})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := (vsockrpc.Provider{Client: c}).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// untilInForce waits until the guest has the set, in another generation or boot than the report before, if there is one.
func (h *vmHost) untilInForce(t *testing.T, before *vsockrpc.Report) *vsockrpc.Report {
	t.Helper()
	var r *vsockrpc.Report
	eventually(t, "the set is in force", func() bool {
		s := h.report(t)
		r = s.Report
		return s.State == vsockrpc.GuestInForce && r != nil && r.Provider.State == vsockrpc.ProviderInForce &&
			(before == nil || r.BootID != before.BootID || r.Generation != before.Generation)
	})
	return r
}

// revisions are the labels that the guest has, by name.
func revisions(r *vsockrpc.Report) map[string]string {
	m := map[string]string{}
	for _, e := range r.Entries {
		m[e.Name] = e.Revision
	}
	return m
}

// TestProvideVM boots guests without a secret in SMBIOS or on a command line, over real vsock, and does to them what
// happens to guests.
func TestProvideVM(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	files := append(agentFiles(t), vsockPeerFile(t))
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		h := newVMHost(t)
		value := newValue()
		h.put(t, "boot", value)
		h.provide(t)
		cfg := vm.Config{
			Image: vmtest.Image(t, release), Vsock: &vm.VsockConfig{Path: h.vsock},
			Overlay: slices.Concat(files, consumersOfBoot("boot"), []vm.File{
				{Path: agentConfig, Content: []byte(`{"peer": {"privilegedPort": "ignored"}}`)},
			}),
		}
		all := []string{"ordered.service", "waiting.service"}
		var booted []byte
		// Each release is told in another way, and one holds the boot.
		switch {
		case release.Systemd >= 260:
			cfg.CommandLine = []string{"guestagent.provider=vsock:2:1021"}
			cfg.OEMStrings = vm.OEM("io.systemd.credential:vmm.notify_socket=vsock-stream:2:1019")
			cfg.Overlay = append(cfg.Overlay, nixosDropIn(t, credTarget, "hold-boot.conf"))
			all = []string{"ordered.service", "plain.service", "waiting.service"}
		case release.Systemd >= 255:
			// With one credential that comes the other way, in files that guestctl made for QEMU.
			booted = newValue()
			cfg.ExtraArgs = bootArgs(t, map[string][]byte{"booted": booted}, "--string", "io.guestagent.provider:vsock:2:1021")
		default:
			cfg.OEMStrings = vm.OEM("io.systemd.credential:guestagent.provider=vsock:2")
		}
		told := listenPID1(t, h.vsock, 1019)
		m := vmtest.Boot(t, cfg)
		untilState(t, m, "active", append(all, credTarget)...)
		if release.Systemd >= 260 {
			// The host learns of the target from PID 1 itself.
			eventually(t, "PID 1 tells of the target", func() bool { return slices.Contains(told(), "X_SYSTEMD_UNIT_ACTIVE="+credTarget) })
		}
		if got := given(t, m, "boot", value, all...); !slices.Equal(got, all) {
			t.Errorf("%q have the credential at their first start, want %q", got, all)
		}
		for _, u := range all {
			if got := show(t, m, u, "NRestarts"); got != "0" {
				t.Errorf("%s was restarted %s times", u, got)
			}
		}
		first := h.untilInForce(t, nil)
		if booted != nil {
			if got := vmtest.ReadFile(t, m, "/run/credstore/booted"); !bytes.Equal(got, booted) {
				t.Errorf("booted is %s, want %s", digest(got), digest(booted))
			}
		}

		t.Run("nobody", func(t *testing.T) { testDoorbell(t, m, value) })
		t.Run("rotate", func(t *testing.T) {
			value = newValue()
			h.put(t, "boot", value)
			r := h.untilInForce(t, first)
			eventually(t, "the services run on it", func() bool { return slices.Equal(given(t, m, "boot", value, all...), all) })
			if r.BootID != first.BootID || r.Generation != first.Generation+1 || revisions(r)["boot"] == revisions(first)["boot"] {
				t.Errorf("the report = %+v, want one generation more than %+v", r, first)
			}
			first = r
		})
		t.Run("provider restarted", func(t *testing.T) {
			if status := h.provider.Stop(t); status != 0 {
				t.Errorf("the provider ended with status %d", status)
			}
			h.provide(t)
			r := h.untilInForce(t, nil)
			if r.Generation != first.Generation || revisions(r)["boot"] != revisions(first)["boot"] {
				t.Errorf("the report = %+v, want it as before, %+v", r, first)
			}
		})
		t.Run("paused", func(t *testing.T) {
			if err := m.Pause(t.Context()); err != nil {
				t.Fatal(err)
			}
			value = newValue()
			h.put(t, "boot", value)
			if err := m.Resume(); err != nil {
				t.Fatal(err)
			}
			first = h.untilInForce(t, first)
		})
		t.Run("vsock anew", func(t *testing.T) {
			// What a restore from a snapshot does: connections end, and the guest has another CID.
			if err := m.RestartVsock(t.Context(), 77); err != nil {
				t.Fatal(err)
			}
			r := h.untilInForce(t, nil)
			if r.BootID != first.BootID || r.Generation != first.Generation {
				t.Errorf("the report = %+v, want nothing changed since %+v", r, first)
			}
			value = newValue()
			h.put(t, "boot", value)
			first = h.untilInForce(t, first)
		})
		t.Run("canary", func(t *testing.T) { testCanary(t, m, h, value) })
		if release.Systemd >= 260 { // one is enough for what the host does
			t.Run("reset", func(t *testing.T) {
				if err := m.Reset(t.Context()); err != nil {
					t.Fatal(err)
				}
				checkBooted(t, m, h, first, value, all)
			})
		}
		t.Run("VMM restarted", func(t *testing.T) {
			before := h.untilInForce(t, nil)
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
			m = vmtest.Boot(t, cfg)
			untilState(t, m, "active", append(all, credTarget)...)
			checkBooted(t, m, h, before, value, all)
			wantSilence(t, m)
		})
		t.Run("core", func(t *testing.T) { testNoCore(t, h, value) })
	})
}

// BenchmarkBootVM is how long PID 1 takes to boot a VM, by turns with a pull over vsock and without. The image is the same,
// and the provider runs.
func BenchmarkBootVM(b *testing.B) {
	release := vmtest.Releases(b)[0] // skips before anything is built
	h := newVMHost(b)
	h.put(b, "boot", newValue())
	h.provide(b)
	cfg := vm.Config{
		Image: vmtest.Image(b, release), Vsock: &vm.VsockConfig{Path: h.vsock},
		Overlay: append(agentFiles(b), vm.File{Path: agentConfig, Content: []byte(`{"peer": {"privilegedPort": "ignored"}}`)}),
	}
	var without, with []float64
	for b.Loop() {
		for _, line := range [][]string{nil, {"guestagent.provider=vsock:2:1021"}} {
			cfg.CommandLine = line
			m := vmtest.Boot(b, cfg)
			if took := bootTime(b, m); line == nil {
				without = append(without, took)
			} else {
				with = append(with, took)
			}
			if err := m.Close(); err != nil {
				b.Fatal(err)
			}
		}
	}
	slices.Sort(without)
	slices.Sort(with)
	b.ReportMetric(without[len(without)/2], "ms-without")
	b.ReportMetric(with[len(with)/2], "ms-with")
}

// listenPID1 takes what a guest's PID 1 says to its VMM on a vsock port (vmm.notify_socket), and returns what it has said.
func listenPID1(t *testing.T, vsock string, port uint32) (told func() []string) {
	t.Helper()
	l, err := vm.ListenVsock(t.Context(), vsock, port)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var lines []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			// One message per connection, whose end PID 1 waits for.
			b := make([]byte, 4096)
			n, _ := conn.Read(b)
			_ = conn.Close()
			mu.Lock()
			lines = append(lines, strings.Fields(string(b[:n]))...)
			mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(lines)
	}
}

// checkBooted checks a guest that has booted anew since the report.
func checkBooted(t *testing.T, m *vm.Machine, h *vmHost, before *vsockrpc.Report, value []byte, units []string) {
	t.Helper()
	r := h.untilInForce(t, before)
	if r.BootID == before.BootID || revisions(r)["boot"] != revisions(before)["boot"] {
		t.Errorf("the report = %+v, want the labels of %+v in another boot", r, before)
	}
	untilState(t, m, "active", units...)
	if got := given(t, m, "boot", value, units...); !slices.Equal(got, units) {
		t.Errorf("%q have the credential at their first start, want %q", got, units)
	}
}

// bootArgs are the arguments that guestctl boot-args gives for QEMU.
func bootArgs(t *testing.T, files map[string][]byte, flags ...string) []string {
	t.Helper()
	dir := t.TempDir()
	in := filepath.Join(dir, "in")
	if err := os.Mkdir(in, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, value := range files {
		if err := os.WriteFile(filepath.Join(in, name), value, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(vmtest.Guestctl(t), append([]string{"boot-args", "--vmm", "qemu", "--dir", in, "--out", filepath.Join(dir, "out")}, flags...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
}

// testDoorbell has nobody in the guest dial the provider: the answers have nothing of what it has.
func testDoorbell(t *testing.T, m *vm.Machine, value []byte) {
	forms := canary.Forms(value)
	call := func(message string) (answer struct {
		Error      string
		Parameters map[string]any
	},
	) {
		t.Helper()
		res := vmtest.Exec(t, m, asNobody(vsockPeer, "call", "2", "1021", message))
		if n, err := canary.Scan(bytes.NewReader(res.Stdout), forms); n >= 0 || err != nil {
			t.Errorf("the answer to %s has the value", message)
		}
		if err := json.Unmarshal(bytes.TrimRight(res.Stdout, "\x00"), &answer); err != nil {
			t.Errorf("the answer to %s = %q, %v\n%s", message, res.Stdout, err, res.Stderr)
		}
		return answer
	}
	if a := call(`{"method":"io.guestagent.Provider.Ring"}`); a.Error != "" || len(a.Parameters) != 0 {
		t.Errorf("Ring = %+v, want an empty answer", a)
	}
	for _, method := range []string{
		"io.guestagent.Provider.Fetch", "io.guestagent.Provider.Confirm", "io.guestagent.Provider.Status", "io.guestagent.Credentials.List",
		"io.guestagent.Credentials.Apply", "io.guestagent.Health.Get",
	} {
		if a := call(`{"method":"` + method + `"}`); !strings.HasPrefix(a.Error, "org.varlink.service.") {
			t.Errorf("%s = %+v, want it refused", method, a)
		}
	}
	// Nor can he be where the provider calls.
	res := vmtest.Exec(t, m, asNobody(vsockPeer, "bind", "1022"))
	if got := strings.TrimSpace(string(res.Stdout)); res.ExitCode == 0 || got != "EACCES" {
		t.Errorf("binding port 1022 as nobody = %q, status %d, want EACCES", got, res.ExitCode)
	}
}

// testCanary looks for the value where it must not be, on the host and in the guest.
func testCanary(t *testing.T, m *vm.Machine, h *vmHost, value []byte) {
	forms := canary.Forms(value)
	found, err := canary.ScanProcesses("/proc", os.Getpid(), forms)
	if err != nil || len(found) > 0 {
		t.Errorf("on the host, %q have the value, %v", found, err)
	}
	for _, dir := range []string{m.Artifacts(), h.state} {
		if found, err := canary.ScanTree(dir, forms); err != nil || len(found) > 0 {
			t.Errorf("on the host, %q have the value, %v", found, err)
		}
	}
	for _, file := range []string{h.provider.Stdout, h.provider.Stderr, h.provider.Notify} {
		if n, err := canary.ScanFile(file, forms); err != nil || n >= 0 {
			t.Errorf("%s has the value at %d, %v", filepath.Base(file), n, err)
		}
	}
	journal, err := m.Journal(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for what, b := range map[string][]byte{
		"journal":   journal,
		"processes": []byte(vmtest.Run(t, m, "sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null || true")),
		"state":     []byte(vmtest.Run(t, m, "sh", "-c", "cat /run/credstore/.guestagent/*.json")),
		"SMBIOS":    []byte(vmtest.Run(t, m, "sh", "-c", "cat /sys/firmware/dmi/tables/DMI /proc/cmdline")),
	} {
		if n, err := canary.Scan(bytes.NewReader(b), forms); n >= 0 || err != nil {
			t.Errorf("in the guest, %s has the value at %d, %v", what, n, err)
		}
	}

	// Neither the agent nor the pull leaves a core.
	vmtest.Run(t, m, "sh", "-c", "mkdir -p /var/tmp/cores && echo /var/tmp/cores/%p > /proc/sys/kernel/core_pattern")
	for _, unit := range []string{agentService} {
		vmtest.Run(t, m, "prlimit", "--core=unlimited", "--pid", show(t, m, unit, "MainPID"))
		vmtest.Run(t, m, "systemctl", "kill", "--signal=ABRT", unit)
	}
	h.untilInForce(t, nil)
	if got := vmtest.Run(t, m, "ls", "/var/tmp/cores"); got != "" {
		t.Errorf("there is a core: %s", got)
	}
}

// testNoCore ends the provider as a crash would, and looks at what it leaves.
func testNoCore(t *testing.T, h *vmHost, value []byte) {
	h.provider.Signal(t, syscall.SIGABRT)
	h.provider.Wait(t)
	forms := canary.Forms(value)
	for _, file := range []string{h.provider.Stdout, h.provider.Stderr} {
		if n, err := canary.ScanFile(file, forms); err != nil || n >= 0 {
			t.Errorf("%s has the value at %d, %v", filepath.Base(file), n, err)
		}
	}
}
