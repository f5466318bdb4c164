package credstore

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/guestagent/guestagent/internal/credential"
)

// inMountNamespace runs the test again in a mount namespace of its own, as
// root there, and returns true in that second run.
func inMountNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv("CREDSTORE_NAMESPACE") == t.Name() {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatalf("making mounts private: %v", err)
		}
		return true
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "CREDSTORE_NAMESPACE="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		t.Logf("in a namespace:\n%s", out)
	case errors.As(err, &exit):
		t.Errorf("in a namespace: %v\n%s", err, out)
	case os.Getenv("CI") == "true":
		t.Fatalf("making a mount namespace: %v", err)
	default:
		t.Skipf("making a mount namespace: %v; run as root, allow user namespaces to everybody, or run `make test`, which has it in a VM", err)
	}
	return false
}

// A store that is full refuses the next set with what the kernel said, keeps
// the old one and leaves nothing behind; what still fits is taken.
func TestFullFileSystem(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	for _, tt := range []struct{ name, options string }{
		{"blocks", "mode=0700,size=128k"},
		{"inodes", "mode=0700,nr_inodes=40"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			if err := os.MkdirAll(f.dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", f.dir, "tmpfs", 0, tt.options); err != nil {
				t.Fatalf("mounting a small tmpfs: %v", err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(f.dir, 0); err != nil {
					t.Errorf("unmounting: %v", err)
				}
			})
			f.write("run/credstore/theirs", "foreign")
			f.write("run/credstore/.theirs", "hidden")
			f.apply(phaseSet(1))
			before := f.tree()

			big := many(40)
			big[10] = cred("c10", strings.Repeat("x", 100_000))
			tx := f.begin()
			_, err := tx.Apply(push(big...))
			if !errors.Is(err, unix.ENOSPC) {
				t.Errorf("Apply = %v, want ENOSPC", err)
			}
			if err != nil && !strings.Contains(err.Error(), filepath.Join(f.dir, ownDir)) {
				t.Errorf("Apply = %v, want it to say where", err)
			}
			tx.Close()
			if got := f.tree(); len(got) != len(before) {
				t.Errorf("files = %q, want %q", got, before)
			}
			f.wantWhole()
			f.apply(phaseSet(2))
			f.wantWhole()
		})
	}
}

// The store's own idea of what lies in memory for good.
func TestBacking(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	for _, tt := range []struct {
		fstype, options string
		want            Backing
	}{
		{"ramfs", "mode=0700", Backing{FSType: "ramfs"}},
		{"tmpfs", "mode=0700", Backing{FSType: "tmpfs", Swappable: true}},
	} {
		dir := t.TempDir()
		if err := unix.Mount(tt.fstype, dir, tt.fstype, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, tt.options); err != nil {
			t.Errorf("mounting %s: %v", tt.fstype, err)
			continue
		}
		if got, err := BackingOf(dir); err != nil || got != tt.want {
			t.Errorf("BackingOf(%s) = %+v, %v, want %+v", tt.fstype, got, err, tt.want)
		}
		// Sets work the same there; RENAME_NOREPLACE is what a file system may lack.
		f := fixtureAt(t, dir)
		f.apply(push(cred("a", "x")))
		f.refused(Set{Install: []Credential{cred("a/b", "x")}}, "", credential.ReasonBadName)
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmounting: %v", err)
		}
	}
}
