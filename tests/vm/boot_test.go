package vm_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
)

// dmiTable is the whole SMBIOS table as the guest's kernel sees it.
const dmiTable = "/sys/firmware/dmi/tables/DMI"

// allBytes returns n bytes with all values.
func allBytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

// TestBoot shows that the harness itself works, with one boot for each release.
func TestBoot(t *testing.T) {
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		// What fits 64 KiB: see Config.SMBIOS64.
		large := bytes.Repeat([]byte("0123456789abcde\n"), 48<<10/16)
		oem := append(vm.OEM("guestagent-test:one", "guestagent-test:two, with commas,,\xff and\ta line\n"),
			vm.OEMString{Value: large})
		m := vmtest.Boot(t, vm.Config{
			Image:      vmtest.Image(t, release),
			OEMStrings: oem,
			SMBIOS64:   true,
			Overlay: []vm.File{
				{Path: "/etc/guestagent-test/deep/file", Mode: 0o640, Content: []byte("from the overlay\n")},
				{Path: "/lib/guestagent-test", Symlink: "/etc/guestagent-test"},
			},
		})

		t.Run("systemd", func(t *testing.T) {
			version := vmtest.Run(t, m, "systemctl", "--version")
			want := "systemd " + strconv.Itoa(release.Systemd)
			if !release.Moving && !strings.HasPrefix(version, want) {
				t.Errorf("systemctl --version = %q, want %q at the start", version, want)
			}
			t.Logf("%s on %s", strings.SplitN(version, "\n", 2)[0], strings.TrimSpace(vmtest.Run(t, m, "uname", "-r")))
			if failed := vmtest.Run(t, m, "systemctl", "--failed", "--no-legend", "--plain"); failed != "" {
				t.Errorf("failed units:\n%s", failed)
			}
		})

		t.Run("SMBIOS", func(t *testing.T) {
			table := vmtest.ReadFile(t, m, dmiTable)
			for i, s := range oem {
				if !bytes.Contains(table, append([]byte(s.Value), 0)) {
					t.Errorf("OEM string %d, %d bytes, is not in the table of %d bytes", i, len(s.Value), len(table))
				}
			}
			// What PID 1 reads.
			if entry := vmtest.ReadFile(t, m, "/sys/firmware/dmi/entries/11-0/raw"); !bytes.Contains(entry, oem[0].Value) {
				t.Errorf("OEM string 0 is not in entries/11-0/raw of %d bytes", len(entry))
			}
		})

		t.Run("run", func(t *testing.T) {
			res := vmtest.Exec(t, m, vm.Command{
				Argv:  []string{"sh", "-c", `cat; echo "$WORD in $PWD" >&2; exit 7`},
				Stdin: allBytes(70000),
				Env:   []string{"WORD=hello"},
				Dir:   "/etc",
			})
			if !bytes.Equal(res.Stdout, allBytes(70000)) || string(res.Stderr) != "hello in /etc\n" || res.ExitCode != 7 {
				t.Errorf("Exec = %d bytes, %q, %d, want 70000, %q, 7", len(res.Stdout), res.Stderr, res.ExitCode, "hello in /etc\n")
			}
			res = vmtest.Exec(t, m, vm.Command{Argv: []string{"sh", "-c", "kill -TERM $$"}})
			if res.Signal != 15 || res.ExitCode != 143 {
				t.Errorf("Exec of a killed program = signal %d, exit code %d, want 15, 143", res.Signal, res.ExitCode)
			}
			if _, err := m.Run(t.Context(), "/no/such/program"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Run of a missing program = %v, want %v", err, fs.ErrNotExist)
			}
		})

		t.Run("cancel", func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			if _, err := m.Run(ctx, "sleep", "4217"); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Run past its deadline = %v, want %v", err, context.DeadlineExceeded)
			}
			left := vmtest.Exec(t, m, vm.Command{Argv: []string{"sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep [4]217'"}})
			if got := strings.TrimSpace(string(left.Stdout)); got != "0" {
				t.Errorf("%s programs are left after the deadline, want 0", got)
			}
		})

		t.Run("files", func(t *testing.T) {
			want := allBytes(1 << 20)
			vmtest.WriteFile(t, m, "/run/guestagent-test/file", 0o600, want)
			if got := vmtest.ReadFile(t, m, "/run/guestagent-test/file"); !bytes.Equal(got, want) {
				t.Errorf("ReadFile after WriteFile = %d bytes, want the %d written", len(got), len(want))
			}
			if got := vmtest.Run(t, m, "stat", "-c", "%a %U %s", "/run/guestagent-test/file"); got != "600 root 1048576\n" {
				t.Errorf("stat = %q", got)
			}
			if _, err := m.ReadFile(t.Context(), "/no/such/file"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("ReadFile of a missing file = %v, want %v", err, fs.ErrNotExist)
			}
			if got := string(vmtest.ReadFile(t, m, "/usr/lib/guestagent-test/deep/file")); got != "from the overlay\n" {
				t.Errorf("file of the overlay = %q", got)
			}
			// The overlay must not change the folders of the image.
			if got := vmtest.Run(t, m, "stat", "-c", "%a %N", "/lib", "/etc/guestagent-test/deep/file"); got !=
				"777 '/lib' -> 'usr/lib'\n640 '/etc/guestagent-test/deep/file'\n" {
				t.Errorf("stat = %q", got)
			}
		})

		t.Run("modules", func(t *testing.T) {
			for _, name := range []string{"vsock_loopback", "vmw_vsock_virtio_transport", "dmi_sysfs", "virtio_console"} {
				vmtest.Run(t, m, "modprobe", name)
			}
		})

		t.Run("go test", func(t *testing.T) {
			vmtest.GoTest(t, m, "github.com/guestagent/guestagent/tests/vm/internal/wire", "-test.run=TestRoundTrip")
		})

		t.Run("journal", func(t *testing.T) {
			journal, err := m.Journal(t.Context())
			if err != nil || !bytes.Contains(journal, []byte("Linux version")) {
				t.Errorf("Journal = %d bytes, %v, want the kernel's first line in it", len(journal), err)
			}
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
	})
}

// TestBootErrors shows what a boot that fails says. One release is enough.
func TestBootErrors(t *testing.T) {
	release := vmtest.Releases(t)[0]
	img := vmtest.Image(t, release)
	for _, tt := range []struct {
		name string
		cfg  vm.Config
		want error
		text string
	}{
		{"panic", vm.Config{CommandLine: []string{"rdinit=/no/such/init", "root=/dev/nothing"}}, vm.ErrStopped, "Kernel panic"},
		{"bad argument", vm.Config{ExtraArgs: []string{"-no-such-option"}}, vm.ErrStopped, "no-such-option"},
		{"hang", vm.Config{BootTimeout: 15 * time.Second, CommandLine: []string{"rdinit=/usr/bin/cat"}}, vm.ErrTimeout, "Run /usr/bin/cat as init"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.cfg.Image = img
			tt.cfg.Artifacts = vmtest.Artifacts(t)
			m, err := vm.Boot(t.Context(), tt.cfg)
			if err == nil {
				t.Fatal(errors.Join(errors.New("it booted"), m.Close()))
			}
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("Boot = %v, want %v with %q", err, tt.want, tt.text)
			}
		})
	}
}
