package vm_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/internal/agent/agenttest"
	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
)

// mark is in every value of these tests that is text: nothing but a credential's own file may hold it.
const mark = "Tr0ub4dor"

func text(n int) string { return (mark + strings.Repeat(".", n))[:n] }

func b64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// A unit of the guest, wanted by multi-user.target.
func service(name string, lines ...string) []vm.File {
	return wanted("multi-user.target", name, strings.Join(append(lines, ""), "\n"))
}

func wanted(by, name, content string) []vm.File {
	return []vm.File{
		{Path: "/etc/systemd/system/" + name, Content: []byte(content)},
		{Path: "/etc/systemd/system/" + by + ".wants/" + name, Symlink: "../" + name},
	}
}

// consumer is a service that keeps what it was given where the test can read it.
func consumer(name string, settings ...string) []vm.File {
	return service(name, append([]string{
		"[Service]", "Type=oneshot", "RemainAfterExit=yes",
		"ExecStart=/bin/sh -c 'mkdir -p /run/seen/%p && cp $${CREDENTIALS_DIRECTORY}/* /run/seen/%p/'",
	}, settings...)...)
}

// somebody is a unit that uses the store for itself, before another unit.
func somebody(before, after string) []vm.File {
	return wanted("sysinit.target", "somebody.service", strings.Join([]string{
		"[Unit]", "DefaultDependencies=no", "Before=" + before, "After=" + after, "",
		"[Service]", "Type=oneshot", "UMask=0077",
		"ExecStart=/bin/sh -c 'mkdir -p /run/credstore && echo not yours > /run/credstore/theirs'", "",
	}, "\n"))
}

// install is guestagent as a NixOS guest has it whose configuration says nothing but that it is there.
func install(t testing.TB) []vm.File {
	t.Helper()
	return rendered(t, "testdata/nixos/guest.nix")
}

type status struct {
	Version    string
	Generation int
	SMBIOS     struct{ Origin string }
	Entries    []struct {
		Name, State, Path, Source string
		Size                      int
	}
	Refusals []struct{ Name, Source, Reason, Detail string }
	Reasons  []struct{ Code, Detail, Hint string }
}

func readStatus(t *testing.T, m *vm.Machine) status {
	t.Helper()
	var s status
	out := vmtest.Run(t, m, "guestagent", "status", "--json")
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatalf("guestagent status --json: %v\n%s", err, out)
	}
	return s
}

func (s status) entries() []string {
	var got []string
	for _, e := range s.Entries {
		got = append(got, fmt.Sprintf("%s %d %s %s", e.Name, e.Size, e.State, strings.TrimSuffix(e.Path, "/"+e.Name)))
	}
	return got
}

func (s status) refusals() []string {
	var got []string
	for _, r := range s.Refusals {
		got = append(got, r.Name+" "+r.Reason)
	}
	slices.Sort(got)
	return got
}

// codes are those of the reasons, but for what entries and refusals have already.
func (s status) codes() []string {
	var got []string
	for _, r := range s.Reasons {
		if !slices.Contains([]string{"refused", "shadowed", "foreign", "missing", "mismatch"}, r.Code) {
			got = append(got, r.Code)
		}
	}
	return got
}

func wantLines(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n  %s\nwant:\n  %s", what, strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

// wantFile compares a file in the guest bit for bit, and shows none of it: it is a secret's test.
func wantFile(t *testing.T, m *vm.Machine, path string, want []byte) {
	t.Helper()
	if got := vmtest.ReadFile(t, m, path); !bytes.Equal(got, want) {
		t.Errorf("%s has %d bytes with SHA-256 %x, want %d with %x", path, len(got), sha256.Sum256(got), len(want), sha256.Sum256(want))
	}
}

func wantNoFile(t *testing.T, m *vm.Machine, path string) {
	t.Helper()
	if vmtest.Exec(t, m, vm.Command{Argv: []string{"test", "-e", path}}).ExitCode == 0 {
		t.Errorf("%s exists", path)
	}
}

// TestImport boots a guest whose host gave it good and bad OEM strings, and shows what reaches its services.
func TestImport(t *testing.T) {
	every := allBytes(256)
	// More than fits a page or two, and less than what firmware cuts (TestCutTable).
	large := allBytes(32_000)
	const (
		store  = "/run/credstore"
		system = "/run/credentials/@system"
	)
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		cuts := release.Systemd < 257 // 4096 bytes of a structure
		oem := vm.OEM(
			"io.systemd.credential:systemd-text="+text(20),
			"io.systemd.credential.binary:systemd-bin="+b64(every),
			"io.guestagent.credential:agent-text="+text(21),
			"io.guestagent.credential.binary:agent-bin="+b64(every),
			"io.guestagent.credential:agent-text=second "+mark,
			"io.guestagent.credential:bad/name="+mark,
			"io.guestagent.credential.binary:bad-base64=A"+mark,
			"io.guestagent.credential:"+mark,
			"io.guestagent.credental:typo="+mark,
			"io.systemd.credential:bad/name="+mark,
			"com.example.license:"+mark,
			"io.guestagent.credential:systemd-text=shadowed "+mark,
			"io.guestagent.credential:static=shadowed "+mark,
			"io.guestagent.credential:theirs="+mark,
			"io.systemd.credential:cut="+text(6000),
			"io.systemd.credential:late="+text(22),
			"io.guestagent.credential:whole="+text(6000),
			"io.guestagent.credential.binary:large="+b64(large),
		)
		overlay := slices.Concat(
			install(t),
			[]vm.File{{Path: "/etc/credstore/static", Mode: 0o600, Content: []byte("static")}},
			somebody("guestagent-import.service", "run-credstore.mount"),
			consumer("by-name.service", "LoadCredential=agent-text", "LoadCredential=agent-bin", "LoadCredential=systemd-text", "LoadCredential=systemd-bin"),
			consumer("by-path.service", "LoadCredential=renamed:/run/credstore/agent-text", "LoadCredential=large:/run/credstore/large"),
			consumer("by-six.service", "LoadCredential=whole", "LoadCredential=late"),
		)
		if release.Systemd >= 254 { // ImportCredential= is new there
			overlay = append(overlay, consumer("by-import.service", "ImportCredential=agent-*", "ImportCredential=systemd-text")...)
		}
		m := vmtest.Boot(t, vm.Config{Image: vmtest.Image(t, release), SMBIOS64: true, OEMStrings: oem, Overlay: overlay})

		t.Run("services", func(t *testing.T) {
			want := map[string][]byte{
				"by-name/agent-text": []byte(text(21)), "by-name/agent-bin": every,
				"by-name/systemd-text": []byte(text(20)), "by-name/systemd-bin": every,
				"by-path/renamed": []byte(text(21)), "by-path/large": large,
				"by-six/whole": []byte(text(6000)), "by-six/late": []byte(text(22)),
			}
			if release.Systemd >= 254 {
				want["by-import/agent-text"], want["by-import/agent-bin"], want["by-import/systemd-text"] = []byte(text(21)), every, []byte(text(20))
			}
			for name, b := range want {
				wantFile(t, m, "/run/seen/"+name, b)
			}
		})

		t.Run("status", func(t *testing.T) {
			s := readStatus(t, m)
			refusals := []string{
				" badName", " badName", " noSeparator", " unknownKind",
				"agent-text duplicate", "bad-base64 badBase64", "static shadowed", "systemd-text shadowed", "theirs foreign",
			}
			entries := []string{
				"agent-bin 256 inForce " + store, "agent-text 21 inForce " + store,
				"cut 6000 inForce " + system, "large 32000 inForce " + store, "late 22 inForce " + system,
				"systemd-bin 256 inForce " + system, "systemd-text 20 inForce " + system, "whole 6000 inForce " + store,
			}
			if cuts {
				refusals = append(refusals, "cut mismatch")
				slices.Sort(refusals)
				entries[2] = "cut 6000 mismatch " + system
				entries[4] = "late 22 inForce " + store // lost by PID 1, and repaired
			}
			wantLines(t, "refusals", s.refusals(), refusals)
			wantLines(t, "entries", s.entries(), entries)
			wantLines(t, "reasons", s.codes(), nil)
			for _, r := range s.Refusals {
				for name, want := range map[string]string{
					"static": "/etc/credstore/static", "systemd-text": "/run/credentials/@system/systemd-text",
					"theirs": "/run/credstore/theirs", "cut": "io.guestagent.credential:cut=",
				} {
					if r.Name == name && !strings.Contains(r.Detail, want) {
						t.Errorf("refusal of %s says %q, want %q in it", name, r.Detail, want)
					}
				}
			}
			if cuts {
				// So that the case is what it says: systemd really cut it.
				if n := len(vmtest.ReadFile(t, m, system+"/cut")); n == 0 || n >= 4096 {
					t.Errorf("PID 1 has %d bytes of cut, want some below 4096", n)
				}
			}
			wantFile(t, m, store+"/theirs", []byte("not yours\n"))
			t.Logf("systemd %d:\n%s", release.Systemd, vmtest.Run(t, m, "guestagent", "status"))
		})

		t.Run("unit", func(t *testing.T) {
			props := vmtest.Run(t, m, "systemctl", "show", "--property=ActiveState,SubState,Result,CPUUsageNSec,MemoryPeak", "guestagent-import.service")
			for _, want := range []string{"ActiveState=active\n", "SubState=exited\n", "Result=success\n"} {
				if !strings.Contains(props, want) {
					t.Errorf("guestagent-import.service is %s, want %s", props, want)
				}
			}
			t.Logf("guestagent-import.service: %s", props)
			if failed := vmtest.Run(t, m, "systemctl", "--failed", "--no-legend", "--plain"); failed != "" {
				t.Errorf("failed units:\n%s", failed)
			}
			out := vmtest.Run(t, m, "systemd-analyze", "security", "--no-pager", "guestagent-import.service")
			level := regexp.MustCompile(`exposure level for guestagent-import.service: ([0-9.]+)`).FindStringSubmatch(out)
			if level == nil {
				t.Fatalf("systemd-analyze security says no level:\n%s", out)
			}
			if exposure, err := strconv.ParseFloat(level[1], 64); err != nil || exposure >= 2.0 {
				t.Errorf("exposure %s, want below 2.0\n%s", level[1], out)
			}
			t.Logf("exposure level %s", level[1])
			units := []string{"guestagent-import.service", "run-credstore.mount", "guestagent.socket", "guestagent-local.socket", "guestagent-credentials.socket", "guestagent-report.socket", "guestagent.service", "guestagent-pull.service", "guestagent-credentials.target"}
			for line := range strings.Lines(string(vmtest.Exec(t, m, vm.Command{Argv: append([]string{"systemd-analyze", "verify", "--man=no"}, units...)}).Stderr)) {
				if release.Systemd < 254 && (strings.Contains(line, "'FileDescriptorStorePreserve'") || strings.Contains(line, "'RestartMode'")) {
					continue // they are not there yet, and ignored
				}
				if strings.Contains(line, "guestagent") || strings.Contains(line, "run-credstore") {
					t.Errorf("systemd-analyze verify says: %s", line)
				}
			}
		})

		t.Run("memory", func(t *testing.T) {
			fields := strings.Fields(vmtest.Run(t, m, "findmnt", "--noheadings", "--output=FSTYPE,OPTIONS", "--mountpoint", store))
			if len(fields) != 2 || fields[0] != "ramfs" {
				t.Fatalf("the store is mounted as %q, want ramfs, which never swaps", fields)
			}
			for _, want := range []string{"nosuid", "nodev", "noexec", "nosymfollow"} {
				if !slices.Contains(strings.Split(fields[1], ","), want) {
					t.Errorf("mount options %s, want %s", fields[1], want)
				}
			}
			if got := vmtest.Run(t, m, "stat", "--format=%a %U %G", store, store+"/.guestagent", store+"/agent-text"); got != "700 root root\n700 root root\n400 root root\n" {
				t.Errorf("modes and owners = %q", got)
			}
		})

		t.Run("silence", func(t *testing.T) {
			leaks := vmtest.Exec(t, m, vm.Command{Argv: []string{
				"grep", "-rl", mark, store + "/.guestagent", "/run/log", "/var/log", "/run/systemd", "/run/guestagent",
			}})
			if out := string(leaks.Stdout); out != "" {
				t.Errorf("values stand in:\n%s", out)
			}
			journal, err := m.Journal(t.Context())
			if err != nil || bytes.Contains(journal, []byte(mark)) {
				t.Errorf("journal: %v, or it has values", err)
			}
			// Refusals are there, as warnings.
			if out := vmtest.Run(t, m, "journalctl", "--priority=warning", "--output=cat", "--unit=guestagent-import.service"); !strings.Contains(out, "refused theirs: foreign: ") {
				t.Errorf("warnings in the journal = %q", out)
			}
		})

		t.Run("again", func(t *testing.T) {
			vmtest.Run(t, m, "systemctl", "restart", "guestagent-import.service")
			if s := readStatus(t, m); s.Generation != 1 {
				t.Errorf("generation after a second import = %d, want 1", s.Generation)
			}
			vmtest.Run(t, m, "systemctl", "stop", "guestagent-import.service")
			wantFile(t, m, store+"/agent-text", []byte(text(21)))
		})

		// The largest value there may be, and the largest that systemd hands to a service, whose name counts too. They
		// stand in a table that is put where the kernel shows its own, since Linux takes none that large from firmware;
		// all that follows is real.
		t.Run("1 MiB", func(t *testing.T) {
			mib := allBytes(1 << 20)
			table, _ := agenttest.Table(
				"io.guestagent.credential.binary:mib="+b64(mib),
				"io.guestagent.credential.binary:loaded="+b64(mib[len("loaded"):]),
				"io.guestagent.credential:over="+strings.Repeat("x", 1<<20+1),
			)
			vmtest.WriteFile(t, m, "/run/table", 0o400, table)
			vmtest.Run(t, m, "mount", "--bind", "/run/table", dmiTable)
			vmtest.Run(t, m, "systemctl", "restart", "guestagent-import.service")
			vmtest.Run(t, m, "umount", dmiTable)
			wantLines(t, "refusals", readStatus(t, m).refusals(), []string{"over tooLarge"})
			wantFile(t, m, store+"/mib", mib)
			vmtest.Run(t, m, "systemd-run", "--wait", "--property=LoadCredential=loaded", "sh", "-c", "cp $CREDENTIALS_DIRECTORY/loaded /run/seen/loaded")
			wantFile(t, m, "/run/seen/loaded", mib[len("loaded"):])
			wantLines(t, "reasons", readStatus(t, m).codes(), []string{"smbiosDamaged"}) // the entry point is the firmware's, and speaks of another table
		})

		// The store's own tests, on the file system that it is made for.
		t.Run("credstore", func(t *testing.T) {
			vmtest.Run(t, m, "mkdir", "/run/ramfs")
			vmtest.Run(t, m, "mount", "-t", "ramfs", "-o", "mode=0700", "ramfs", "/run/ramfs")
			vmtest.GoTest(t, m, "../../credstore", "-test.short")
		})
	})
}

// TestStoreInUse boots a guest in which somebody uses the folder of the store before it can be mounted, and whose PID 1
// was told not to import.
func TestStoreInUse(t *testing.T) {
	release := newestStable(t)
	m := vmtest.Boot(t, vm.Config{
		Image:       vmtest.Image(t, release),
		CommandLine: []string{"systemd.import_credentials=no"},
		OEMStrings:  vm.OEM("io.guestagent.credential:agent="+mark, "io.systemd.credential:systemd="+mark),
		Overlay:     slices.Concat(install(t), somebody("run-credstore.mount", "-.mount"), consumer("by-name.service", "LoadCredential=agent")),
	})
	s := readStatus(t, m)
	wantLines(t, "reasons", s.codes(), []string{"storeSwappable"})
	wantLines(t, "refusals", s.refusals(), []string{"systemd disabled"})
	wantLines(t, "entries", s.entries(), []string{"agent 9 inForce /run/credstore"})
	wantFile(t, m, "/run/credstore/theirs", []byte("not yours\n"))
	wantFile(t, m, "/run/seen/by-name/agent", []byte(mark))
	wantNoFile(t, m, "/run/credentials/@system/systemd")
	if got := vmtest.Run(t, m, "systemctl", "is-active", "guestagent-import.service"); got != "active\n" {
		t.Errorf("guestagent-import.service is %s", got)
	}
}

// TestNoSMBIOS boots a guest whose table is so large that Linux does as if there were none. The boot goes on, and the
// report says so.
func TestNoSMBIOS(t *testing.T) {
	release := newestStable(t)
	m := vmtest.Boot(t, vm.Config{
		Image:      vmtest.Image(t, release),
		SMBIOS64:   true,
		OEMStrings: vm.OEM("io.guestagent.credential:a="+mark, "com.example:"+strings.Repeat("x", 300_000)),
		Overlay:    install(t),
	})
	s := readStatus(t, m)
	wantLines(t, "reasons", s.codes(), []string{"noSmbios"})
	wantLines(t, "entries", s.entries(), nil)
	if got := vmtest.Run(t, m, "systemctl", "is-active", "guestagent-import.service"); got != "active\n" {
		t.Errorf("guestagent-import.service is %s", got)
	}
}

// TestCutTable boots a guest with a table of more than 64 KiB. SeaBIOS before 1.17 keeps the first bytes of it, so that
// half a secret looks like a whole one. It arrives whole or it is refused; never half.
func TestCutTable(t *testing.T) {
	release := newestStable(t)
	value := allBytes(60_000)
	m := vmtest.Boot(t, vm.Config{
		Image:      vmtest.Image(t, release),
		SMBIOS64:   true,
		OEMStrings: vm.OEM("io.guestagent.credential:before="+mark, "io.guestagent.credential.binary:large="+b64(value)),
		Overlay:    install(t),
	})
	wantFile(t, m, "/run/credstore/before", []byte(mark))
	s := readStatus(t, m)
	t.Logf("%s", vmtest.Run(t, m, "guestagent", "status"))
	if refusals := s.refusals(); len(refusals) == 0 {
		wantFile(t, m, "/run/credstore/large", value)
		wantLines(t, "reasons", s.codes(), nil)
		return
	}
	wantLines(t, "refusals", s.refusals(), []string{"large truncated"})
	wantLines(t, "reasons", s.codes(), []string{"smbiosDamaged"})
	wantNoFile(t, m, "/run/credstore/large")
}

// newestStable is the release that one boot is enough for: the newest that does not move, among those asked for.
func newestStable(t *testing.T) vm.Release {
	t.Helper()
	releases := vmtest.Releases(t)
	for _, r := range slices.Backward(releases) {
		if !r.Moving {
			return r
		}
	}
	return releases[0]
}
