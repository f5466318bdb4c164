package vm_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// debs are the files that `make deb` makes.
type debs struct{ agent, ctl string }

// makeDebs runs `make deb` with these variables.
func makeDebs(t *testing.T, variables ...string) debs {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "make", append([]string{"--silent", "-C", "../..", "deb", "DIST=" + dir}, variables...)...)
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "SOURCE_DATE_EPOCH=1700000000")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make deb: %v\n%s", err, out)
	}
	files := func(pattern string) string {
		t.Helper()
		names, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(names) != 1 {
			t.Fatalf("make deb made %q of %s, want one", names, pattern)
		}
		return names[0]
	}
	return debs{agent: files("guestagent_*_amd64.deb"), ctl: files("guestctl_*_amd64.deb")}
}

func readHost(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestDebContents builds the packages twice, under other circumstances, and looks into them.
func TestDebContents(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds both programs twice")
	}
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("no dpkg-deb: install dpkg")
	}
	first := makeDebs(t)
	t.Setenv("TMPDIR", t.TempDir())
	t.Setenv("TZ", "Asia/Tokyo")
	t.Setenv("UNITDIR", "/elsewhere")
	t.Setenv("PREFIX", "/elsewhere")
	second := makeDebs(t)
	for name, pair := range map[string][2]string{"guestagent": {first.agent, second.agent}, "guestctl": {first.ctl, second.ctl}} {
		if filepath.Base(pair[0]) != filepath.Base(pair[1]) || !bytes.Equal(readHost(t, pair[0]), readHost(t, pair[1])) {
			t.Errorf("two builds of %s differ: %s and %s", name, pair[0], pair[1])
		}
	}

	dpkgDeb := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "dpkg-deb", args...)
		cmd.Env = append(os.Environ(), "TZ=UTC", "LC_ALL=C")
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("dpkg-deb %q: %v", args, err)
		}
		return string(out)
	}
	entry := regexp.MustCompile(`^([-dl]\S+) (\S+) +\d+ (\S+ \S+) \.(/.*)$`)
	for _, tt := range []struct {
		deb  string
		want []string
	}{
		{first.agent, []string{
			"-rwxr-xr-x /usr/bin/guestagent",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent-credentials.socket",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent-credentials.target",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent-import.service",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent-local.socket",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent-pull.service",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent-report.socket",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent.service",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent.socket",
			"-rw-r--r-- /usr/lib/systemd/system/run-credstore.mount",
			"-rw-r--r-- /usr/share/doc/guestagent/changelog.gz",
			"-rw-r--r-- /usr/share/doc/guestagent/copyright",
			"-rw-r--r-- /usr/share/guestagent/compare.conf",
			"-rw-r--r-- /usr/share/guestagent/hold-boot.conf",
		}},
		{first.ctl, []string{
			"-rwxr-xr-x /usr/bin/guestctl",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent-exporter.service",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent-exporter.socket",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent-provide@.service",
			"-rw-r--r-- /usr/lib/systemd/system/guestagent-ready@.service",
			"-rw-r--r-- /usr/share/bash-completion/completions/guestctl",
			"-rw-r--r-- /usr/share/doc/guestctl/changelog.gz",
			"-rw-r--r-- /usr/share/doc/guestctl/copyright",
			"-rw-r--r-- /usr/share/guestctl/alerts.yml",
			"-rw-r--r-- /usr/share/fish/vendor_completions.d/guestctl.fish",
			"-rw-r--r-- /usr/share/man/man1/guestctl.1.gz",
			"-rw-r--r-- /usr/share/zsh/vendor-completions/_guestctl",
			"lrwxrwxrwx /usr/lib/systemd/varlink-bridges/vsock -> ../../../bin/guestctl",
			"lrwxrwxrwx /usr/lib/systemd/varlink-bridges/vsock-mux -> ../../../bin/guestctl",
		}},
	} {
		var got []string
		for line := range strings.Lines(dpkgDeb("--contents", tt.deb)) {
			e := entry.FindStringSubmatch(strings.TrimSpace(line))
			switch {
			case e == nil:
				t.Fatalf("dpkg-deb --contents says %q", line)
			case e[2] != "root/root" || e[3] != "2023-11-14 22:13" || e[1][0] == 'd' && e[1] != "drwxr-xr-x":
				t.Errorf("entry %q of %s, want it root's, drwxr-xr-x for a folder, and of SOURCE_DATE_EPOCH", line, filepath.Base(tt.deb))
			case e[1][0] != 'd' && !strings.Contains(e[4], "/man1/guestctl-"): // a page for each command
				got = append(got, e[1]+" "+e[4])
			}
		}
		wantLines(t, filepath.Base(tt.deb), slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(tt.want)))
	}
	if got := dpkgDeb("--field", first.agent, "Package", "Architecture", "Depends", "Section", "Priority"); got != "Package: guestagent\nArchitecture: amd64\nDepends: systemd (>= 252)\nSection: admin\nPriority: optional\n" {
		t.Errorf("control file of guestagent: %s", got)
	}
	// It says whose work it contains, and nothing of the machine that it was built on.
	home, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	dpkgDeb("--raw-extract", first.ctl, root)
	if b := readHost(t, filepath.Join(root, "usr/share/doc/guestctl/copyright")); !bytes.Contains(b, []byte("\n== github.com/spf13/cobra v")) || bytes.Contains(b, []byte(home)) {
		t.Errorf("copyright file of guestctl:\n%s", b)
	}
	if b := readHost(t, filepath.Join(root, "usr/bin/guestctl")); bytes.Contains(b, []byte(home)) {
		t.Errorf("guestctl contains %s", home)
	}
}

// TestDeb boots a plain guest and does with the packages what an administrator does.
func TestDeb(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	dev, release := makeDebs(t, "VERSION=0.1.0-dev"), makeDebs(t, "VERSION=0.1.0")
	vmtest.Each(t, func(t *testing.T, r vm.Release) { testDeb(t, r, dev, release) })
}

func testDeb(t *testing.T, r vm.Release, dev, release debs) {
	m := vmtest.Boot(t, vm.Config{
		Image:      vmtest.Image(t, r),
		Vsock:      &vm.VsockConfig{},
		OEMStrings: vm.OEM("io.guestagent.credential:booted=" + mark),
		// The device chooses the port itself.
		Overlay: []vm.File{{Path: "/etc/guestagent/config.json", Content: []byte(`{"peer": {"privilegedPort": "ignored"}}`)}},
	})
	target, err := vsockrpc.ParseTarget("vsock-mux:" + m.VsockPath())
	if err != nil {
		t.Fatal(err)
	}
	dpkg := func(t *testing.T, option string, args ...string) string {
		t.Helper()
		res := vmtest.Exec(t, m, vm.Command{Argv: append([]string{"dpkg", option}, args...)})
		// The images keep no lists of files.
		said := regexp.MustCompile(`(?m)^dpkg: warning: files list file .*\n`).ReplaceAllString(string(res.Stderr), "")
		t.Logf("dpkg %s %q:\n%s%s", option, args, res.Stdout, said)
		if res.ExitCode != 0 {
			t.Fatalf("dpkg %s %q: exit status %d", option, args, res.ExitCode)
		}
		return said
	}
	install := func(t *testing.T, files ...string) string {
		t.Helper()
		var paths []string
		for _, f := range files {
			path := "/run/debs/" + filepath.Base(f)
			vmtest.WriteFile(t, m, path, 0o644, readHost(t, f))
			paths = append(paths, path)
		}
		return dpkg(t, "--install", paths...)
	}
	units := []string{"guestagent.socket", "guestagent-local.socket", "guestagent-credentials.socket", "guestagent-report.socket", "guestagent-import.service", "guestagent-credentials.target"}
	// states are what systemctl says of the units, whatever its exit status.
	states := func(t *testing.T, verb string) []string {
		t.Helper()
		return strings.Fields(string(vmtest.Exec(t, m, vm.Command{Argv: append([]string{"systemctl", verb}, units...)}).Stdout))
	}
	noneFailed := func(t *testing.T) {
		t.Helper()
		if failed := vmtest.Run(t, m, "systemctl", "--failed", "--no-legend", "--plain"); failed != "" {
			t.Errorf("failed units:\n%s", failed)
		}
	}
	entries := []string{"booted 9 inForce /run/credstore", "pushed 30 inForce /run/credstore"}

	t.Run("install", func(t *testing.T) {
		install(t, dev.agent, dev.ctl)
		wantLines(t, "systemctl is-enabled", states(t, "is-enabled"), []string{"enabled", "enabled", "enabled", "enabled", "enabled", "enabled"})
		wantLines(t, "systemctl is-active", states(t, "is-active"), []string{"active", "active", "active", "active", "active", "active"})
		s := readStatus(t, m)
		wantLines(t, "entries", s.entries(), entries[:1])
		wantLines(t, "reasons", s.codes(), nil)
		wantFile(t, m, "/run/credstore/booted", []byte(mark))
		if s.Version != "0.1.0-dev" {
			t.Errorf("the agent's version is %q", s.Version)
		}
		if got := vmtest.Run(t, m, "guestctl", "version"); got != "guestctl 0.1.0-dev\n" {
			t.Errorf("guestctl version = %q", got)
		}
		for _, bridge := range []string{"vsock", "vsock-mux"} {
			if got := vmtest.Run(t, m, "readlink", "-e", "/usr/lib/systemd/varlink-bridges/"+bridge); got != "/usr/bin/guestctl\n" {
				t.Errorf("the bridge %s is %q", bridge, got)
			}
		}
		for line := range strings.Lines(string(vmtest.Exec(t, m, vm.Command{Argv: []string{
			"systemd-analyze", "verify", "--man=no", "guestagent-provide@.service", "guestagent-ready@web.service", "guestagent-exporter.service", "guestagent-exporter.socket",
		}}).Stderr)) {
			if strings.Contains(line, "guestagent-") && !strings.Contains(line, "guestagent-pull.service") { // it is loaded, too; RestartMode= is of 254
				t.Errorf("systemd-analyze verify says: %s", line)
			}
		}
		noneFailed(t)
	})

	t.Run("push", func(t *testing.T) {
		c, err := vsockrpc.Dial(t.Context(), target)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		res, err := vsockrpc.Credentials{Client: c}.Apply(t.Context(), &vsockrpc.ApplyParams{
			Set: []vsockrpc.Credential{{Name: "pushed", Value: secret.New([]byte(text(30)))}},
		})
		if err != nil || res.Generation != 2 {
			t.Fatalf("Apply = %+v, %v", res, err)
		}
		vmtest.Run(t, m, "systemd-run", "--wait", "--property=LoadCredential=pushed", "--property=LoadCredential=booted",
			"sh", "-c", "mkdir -p /run/seen && cp $CREDENTIALS_DIRECTORY/* /run/seen/")
		wantFile(t, m, "/run/seen/pushed", []byte(text(30)))
		wantFile(t, m, "/run/seen/booted", []byte(mark))
	})

	t.Run("upgrade", func(t *testing.T) {
		vmtest.Run(t, m, "systemctl", "disable", "guestagent-import.service")
		pull := []string{"guestagent-pull.service", "guestagent-credentials.target"}
		before := showAll(t, m, "InvocationID", pull...)
		install(t, release.agent, release.ctl)
		wantLines(t, "systemctl is-enabled", states(t, "is-enabled"), []string{"enabled", "enabled", "enabled", "enabled", "disabled", "enabled"})
		wantLines(t, "systemctl is-active", states(t, "is-active"), []string{"active", "active", "active", "active", "active", "active"})
		// With a restart of it everything would be restarted that requires guestagent-credentials.target.
		wantLines(t, "InvocationID of a pull and its target", showAll(t, m, "InvocationID", pull...), before)
		s := readStatus(t, m)
		wantLines(t, "entries", s.entries(), entries)
		if s.Version != "0.1.0" || s.Generation != 2 {
			t.Errorf("the agent's version is %q and the generation %d, want 0.1.0 and still 2", s.Version, s.Generation)
		}
		wantFile(t, m, "/run/credstore/pushed", []byte(text(30)))
		if got := vmtest.Run(t, m, "dpkg-query", "--show", "guestagent", "guestctl"); got != "guestagent\t0.1.0\nguestctl\t0.1.0\n" {
			t.Errorf("installed packages: %s", got)
		}
		noneFailed(t)
	})

	t.Run("remove", func(t *testing.T) {
		dpkg(t, "--remove", "guestagent")
		wantLines(t, "systemctl is-active", states(t, "is-active"), []string{"inactive", "inactive", "inactive", "inactive", "inactive", "inactive"})
		if got := show(t, m, "guestagent-pull.service", "ActiveState"); got != "inactive" {
			t.Errorf("guestagent-pull.service is %s", got)
		}
		if got := vmtest.Run(t, m, "find", "/usr/bin", "/usr/lib/systemd", "/etc/systemd", "-name", "guestagent*",
			"!", "-name", "guestagent-provide@.service", "!", "-name", "guestagent-ready@.service", "!", "-name", "guestagent-exporter.*"); got != "" {
			t.Errorf("left behind:\n%s", got)
		}
		wantNoFile(t, m, "/run/guestagent")
		wantNoFile(t, m, "/run/guestagent.fresh") // preinst's word to postinst
		wantFile(t, m, "/run/credstore/booted", []byte(mark))
		wantFile(t, m, "/run/credstore/pushed", []byte(text(30)))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if conn, err := vm.DialVsock(ctx, m.VsockPath(), 1022); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("somebody listens on the agent's port: %v, %v", conn, err)
		}
		noneFailed(t)
	})

	// A kernel without vsock: installing again works, and all but the one socket with it.
	t.Run("no vsock", func(t *testing.T) {
		vmtest.WriteFile(t, m, "/etc/modprobe.d/no-vsock.conf", 0o644, []byte("install vsock /bin/false\n"))
		vmtest.Run(t, m, "modprobe", "-r", "vsock_diag", "vsock_loopback", "vmw_vsock_virtio_transport", "vsock")
		if out := install(t, release.agent); !strings.Contains(out, "without vsock in the kernel") {
			t.Errorf("dpkg --install says nothing of vsock: %s", out)
		}
		wantLines(t, "systemctl is-enabled", states(t, "is-enabled"), []string{"enabled", "enabled", "enabled", "enabled", "enabled", "enabled"})
		wantLines(t, "systemctl is-active", states(t, "is-active"), []string{"failed", "active", "active", "active", "active", "active"})
		wantLines(t, "entries", readStatus(t, m).entries(), entries)
		if got := vmtest.Run(t, m, "dpkg-query", "--show", "--showformat=${Status}", "guestagent"); got != "install ok installed" {
			t.Errorf("guestagent is %q", got)
		}
	})

	t.Run("purge", func(t *testing.T) {
		dpkg(t, "--purge", "guestagent", "guestctl")
		for _, path := range []string{"/etc/guestagent", "/run/guestagent", "/usr/bin/guestagent", "/usr/bin/guestctl", "/usr/lib/systemd/varlink-bridges"} {
			wantNoFile(t, m, path)
		}
		wantFile(t, m, "/run/credstore/pushed", []byte(text(30)))
		noneFailed(t)
		journal, err := m.Journal(t.Context())
		if err != nil || bytes.Contains(journal, []byte(mark)) {
			t.Errorf("journal: %v, or it has values", err)
		}
	})
}
