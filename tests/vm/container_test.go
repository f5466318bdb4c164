package vm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// show returns one property of a unit in the guest.
func show(t *testing.T, m *vm.Machine, unit, property string) string {
	t.Helper()
	return strings.TrimSpace(vmtest.Run(t, m, "systemctl", "show", "--value", "--property="+property, unit))
}

// TestContainer shows what a container has in common with a virtual machine, and that guestagent runs in it.
func TestContainer(t *testing.T) {
	vmtest.Each(t, testContainer)
}

func testContainer(t *testing.T, release vm.Release) {
	m := vmtest.StartContainer(t, vm.ContainerConfig{
		Image: vmtest.Image(t, release),
		Overlay: append(install(t),
			vm.File{Path: "/lib/guestagent-test", Symlink: "/etc/guestagent-test"},
			vm.File{Path: "/etc/guestagent-test/deep/file", Mode: 0o640, Content: []byte("from the overlay\n")},
		),
	})

	t.Run("system", func(t *testing.T) {
		version := "systemd " + strconv.Itoa(release.Systemd)
		if got := vmtest.Run(t, m, "systemctl", "--version"); !release.Moving && !strings.HasPrefix(got, version) {
			t.Errorf("systemctl --version = %q, want %q at the start", got, version)
		}
		if got := vmtest.Run(t, m, "stat", "--file-system", "--format=%T", "/sys/fs/cgroup"); got != "cgroup2fs\n" {
			t.Errorf("/sys/fs/cgroup is %q, want cgroup2fs", got)
		}
		if got := vmtest.Run(t, m, "systemctl", "--failed", "--no-legend", "--plain"); len(strings.Fields(got)) == 0 ||
			strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "guestagent.socket ") {
			t.Errorf("failed units:\n%swant guestagent.socket alone, since there is no vsock", got)
		}
		if got := vmtest.Run(t, m, "systemd-analyze", "time"); !strings.Contains(got, "(userspace)") {
			t.Errorf("systemd-analyze time = %q", got)
		}
		if got := string(vmtest.ReadFile(t, m, "/usr/lib/guestagent-test/deep/file")); got != "from the overlay\n" {
			t.Errorf("file of the overlay = %q", got)
		}
		if got := vmtest.Run(t, m, "stat", "-c", "%a %U", "/", "/etc", "/etc/guestagent-test/deep/file"); got != "755 root\n755 root\n640 root\n" {
			t.Errorf("stat = %q", got)
		}
		if _, err := m.ReadFile(t.Context(), "/no/such/file"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("ReadFile of a missing file = %v, want %v", err, fs.ErrNotExist)
		}
		if journal, err := m.Journal(t.Context()); err != nil || !strings.Contains(string(journal), "guestagent-import.service") {
			t.Errorf("Journal = %d bytes, %v, want guestagent-import.service in it", len(journal), err)
		}
	})

	t.Run("kept apart", func(t *testing.T) {
		if got := vmtest.Run(t, m, "sh", "-c", "tail -n +3 /proc/net/dev | cut -d: -f1"); strings.TrimSpace(got) != "lo" {
			t.Errorf("network devices = %q, want lo alone", got)
		}
		if got := vmtest.Run(t, m, "ls", "-A", "/sys/firmware"); got != "" {
			t.Errorf("/sys/firmware has %q, want nothing", got)
		}
		// What it said at boot was before the journal.
		vmtest.Exec(t, m, vm.Command{Argv: []string{"systemctl", "start", "guestagent.socket"}})
		journal := vmtest.Run(t, m, "journalctl", "--boot", "--unit=guestagent.socket", "--output=cat")
		if !strings.Contains(journal, "Address family not supported by protocol") {
			t.Errorf("journal of guestagent.socket:\n%swant it to say that there is no vsock", journal)
		}
		// Host and container have the same kernel: nobody is to set its clock, load its modules or look into its memory.
		if got := vmtest.Run(t, m, "grep", "CapBnd", "/proc/1/status"); got != "CapBnd:\t00000000f4ecbfff\n" {
			t.Errorf("%swant systemd-nspawn's default, 00000000fcecbfff, without CAP_MKNOD", got)
		}
	})

	t.Run("guestagent", func(t *testing.T) {
		for unit, want := range map[string]string{
			"run-credstore.mount": "mounted", "guestagent-import.service": "exited", "guestagent-local.socket": "listening", "guestagent-report.socket": "listening",
		} {
			if got := show(t, m, unit, "SubState"); got != want {
				t.Errorf("%s is %s, want %s", unit, got, want)
			}
		}
		if got := vmtest.Run(t, m, "findmnt", "--noheadings", "--output=FSTYPE", "/run/credstore"); got != "ramfs\n" {
			t.Errorf("/run/credstore is on %q, want ramfs", got)
		}
		if s := readStatus(t, m); s.Generation != 0 || len(s.Entries) != 0 || !strings.Contains(strings.Join(s.codes(), " "), "noSmbios") {
			t.Errorf("guestagent status = %+v, want no credential, and noSmbios", s)
		}
		if release.Systemd < 257 {
			return // without a varlinkctl that knows --json=short and call as below
		}
		var info struct{ Product string }
		out := vmtest.Run(t, m, "varlinkctl", "--json=short", "call", "/run/guestagent/varlink.sock", "org.varlink.service.GetInfo", "{}")
		if err := json.Unmarshal([]byte(out), &info); err != nil || info.Product != "guestagent" {
			t.Errorf("GetInfo = %q, %v, want the product guestagent", out, err)
		}
	})

	t.Run("sandbox", func(t *testing.T) {
		vmtest.Run(t, m, "systemctl", "start", "guestagent.service")
		pid := show(t, m, "guestagent.service", "MainPID")
		status := "/proc/" + pid + "/status"
		if got := vmtest.Run(t, m, "grep", "-E", "^(CapBnd|NoNewPrivs|Seccomp):", status); got != "CapBnd:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n" {
			t.Errorf("%s:\n%swant no capability, no new privileges, a filter", status, got)
		}
		for _, ns := range []string{"mnt", "net", "ipc", "uts"} {
			own := vmtest.Run(t, m, "readlink", "/proc/"+pid+"/ns/"+ns)
			if own == vmtest.Run(t, m, "readlink", "/proc/1/ns/"+ns) {
				t.Errorf("guestagent.service is in PID 1's %s namespace", ns)
			}
		}
	})

	t.Run("go test", func(t *testing.T) {
		vmtest.RunTests(t, m, vmtest.TestConfig{
			Package: "../../credstore",
			Args:    []string{"-test.short", "-test.run=Apply"},
			Env:     []string{"GUESTAGENT_TEST_SYSTEMD=1"},
		})
	})

	t.Run("shutdown", func(t *testing.T) {
		if err := m.Collect(t.Context()); err != nil {
			t.Error(err)
		}
		if err := m.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if _, err := m.Run(t.Context(), "true"); !errors.Is(err, vm.ErrStopped) {
			t.Errorf("Run after Shutdown = %v, want %v", err, vm.ErrStopped)
		}
	})
}

// TestContainersApart runs two at once.
func TestContainersApart(t *testing.T) {
	img := vmtest.ContainerImage(t)
	start := func() *vm.Machine {
		return vmtest.StartContainer(t, vm.ContainerConfig{Image: img, Artifacts: t.TempDir()})
	}
	one, two := start(), start()
	vmtest.WriteFile(t, one, "/usr/lib/systemd/system/one.service", 0o644, []byte("[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=true\n"))
	vmtest.Run(t, one, "systemctl", "start", "one.service")
	if got := show(t, two, "one.service", "LoadState"); got != "not-found" {
		t.Errorf("one container's unit in the other is %s, want not-found", got)
	}
	if err := one.Close(); err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(vmtest.Run(t, two, "systemctl", "is-system-running")); got != "running" {
		t.Errorf("one container after the end of the other is %s, want running", got)
	}
	// Nothing was written to the image.
	if three := start(); show(t, three, "one.service", "LoadState") != "not-found" {
		t.Error("a container's unit is in a later one")
	}
}

// TestContainerErrors shows what a container that does not boot says, and that nothing is left of it.
func TestContainerErrors(t *testing.T) {
	img := vmtest.ContainerImage(t)
	const init = "/usr/lib/systemd/systemd"
	for _, tt := range []struct {
		name string
		init string
		boot time.Duration
		want error
		text string
	}{
		{"ends", "echo no boot; exit 7", 0, vm.ErrStopped, "no boot"},
		{"hangs", "echo no end; exec sleep infinity", 2 * time.Second, vm.ErrTimeout, "no end"},
		{"is not there", "", 0, vm.ErrStopped, "nspawn"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tmp := t.TempDir()
			t.Setenv("TMPDIR", tmp)
			file := vm.File{Path: init, Mode: 0o755, Content: []byte("#!/bin/sh\n" + tt.init + "\n")}
			if tt.init == "" {
				file = vm.File{Path: init, Symlink: "/no/such/init"}
			}
			m, err := vm.StartContainer(t.Context(), vm.ContainerConfig{
				Image: img, Overlay: []vm.File{file}, BootTimeout: tt.boot, Artifacts: t.TempDir(),
			})
			if err == nil {
				t.Fatal(errors.Join(errors.New("it booted"), m.Close()))
			}
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("StartContainer = %v, want %v with %q", err, tt.want, tt.text)
			}
			if left, err := os.ReadDir(tmp); err != nil || len(left) != 0 {
				t.Errorf("left in TMPDIR are %v, %v, want nothing", left, err)
			}
		})
	}
}

// TestContainerBinds talks between host and container in both directions, over Unix sockets.
func TestContainerBinds(t *testing.T) {
	img := vmtest.ContainerImage(t)
	dir := filepath.Join(t.TempDir(), `a:b \c`)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cfg := vm.ContainerConfig{Image: img, Overlay: install(t), Binds: map[string]string{"/run/host": dir}, Artifacts: vmtest.Artifacts(t)}
	for _, start := range []string{"first", "second"} {
		m := vmtest.StartContainer(t, cfg)

		// This one is made after the start. systemd is the client.
		var lc net.ListenConfig
		l, err := lc.Listen(t.Context(), "unix", filepath.Join(dir, "sock"))
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() {
			conn, err := l.Accept()
			if err == nil {
				_, err = io.WriteString(conn, start)
				err = errors.Join(err, conn.Close())
			}
			served <- err
		}()
		got := vmtest.Run(t, m, "systemd-run", "--quiet", "--wait", "--pipe", "--property=LoadCredential=x:/run/host/sock", "sh", "-c", "cat $CREDENTIALS_DIRECTORY/x")
		if err := errors.Join(<-served, l.Close()); err != nil || got != start {
			t.Errorf("%s: the container got %q, %v, want %q", start, got, err, start)
		}

		socket, err := m.HostPath("/run/guestagent/varlink.sock")
		if err != nil {
			t.Fatal(err)
		}
		target, err := vsockrpc.ParseTarget("unix:" + socket)
		if err != nil {
			t.Fatal(err)
		}
		c, err := vsockrpc.Dial(t.Context(), target)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (vsockrpc.Credentials{Client: c}).List(t.Context()); err != nil {
			t.Errorf("%s: List from the host: %v", start, err)
		}
		_ = c.Close()
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, binds := range []map[string]string{{"/run/host": filepath.Join(dir, "none")}, {"run/host": dir}, {"/run/host": "."}} {
		cfg.Binds, cfg.Artifacts = binds, t.TempDir()
		if m, err := vm.StartContainer(t.Context(), cfg); err == nil {
			t.Error(errors.Join(fmt.Errorf("it started with the binds %v", binds), m.Close()))
		}
	}
}
