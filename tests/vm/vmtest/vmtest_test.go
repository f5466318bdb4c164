package vmtest_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
)

// recorder is a testing.TB that only takes notes. Skipping and failing end the goroutine, as they do elsewhere.
type recorder struct {
	testing.TB
	skipped, failed string
}

type stop struct{}

func (r *recorder) Helper() {}

func (r *recorder) Skipf(format string, args ...any) {
	r.skipped = fmt.Sprintf(format, args...)
	panic(stop{})
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.failed = fmt.Sprintf(format, args...)
	panic(stop{})
}

// record runs f until it skips or fails.
func record(t *testing.T, f func(testing.TB)) (r *recorder) {
	t.Helper()
	r = &recorder{TB: t}
	defer func() {
		if v := recover(); v != nil {
			if _, ok := v.(stop); !ok {
				panic(v)
			}
		}
	}()
	f(r)
	return r
}

func TestReleases(t *testing.T) {
	for _, tt := range []struct {
		env           string
		count         int
		skips, failed bool
	}{
		{"", 0, true, false},
		{"trixie", 1, false, false},
		{"all", len(vm.Releases()), false, false},
		{"potato", 0, false, true},
	} {
		t.Setenv(vmtest.SelectEnv, tt.env)
		var got []vm.Release
		r := record(t, func(tb testing.TB) { got = vmtest.Releases(tb) })
		if len(got) != tt.count || (r.skipped != "") != tt.skips || (r.failed != "") != tt.failed {
			t.Errorf("Releases with %s=%q = %d, skipped %q, failed %q", vmtest.SelectEnv, tt.env, len(got), r.skipped, r.failed)
		}
		if tt.skips && !strings.Contains(r.skipped, "make test") {
			t.Errorf("the skip says %q, want the way out in it", r.skipped)
		}
	}
}

func TestContainerImage(t *testing.T) {
	t.Setenv("PATH", t.TempDir()) // no host can run containers without systemd-nspawn
	for _, tt := range []struct {
		name, env, ci string
		skip, fail    string
	}{
		{"nothing asked for", "", "true", "make test", ""},
		{"another release", "sid", "true", vmtest.SelectEnv, ""},
		{"cannot run", vmtest.ContainerRelease, "", "containers cannot run here", ""},
		{"cannot run in CI", vmtest.ContainerRelease, "true", "", "containers cannot run here"},
	} {
		t.Setenv(vmtest.SelectEnv, tt.env)
		t.Setenv("CI", tt.ci)
		r := record(t, func(tb testing.TB) { vmtest.ContainerImage(tb) })
		if !strings.Contains(r.skipped, tt.skip) || (r.skipped == "") != (tt.skip == "") ||
			!strings.Contains(r.failed, tt.fail) || (r.failed == "") != (tt.fail == "") {
			t.Errorf("%s: skipped %q, failed %q, want %q, %q", tt.name, r.skipped, r.failed, tt.skip, tt.fail)
		}
	}
}

func TestArtifacts(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(vmtest.ArtifactsEnv, dir)
	t.Run("sub", func(t *testing.T) {
		got := vmtest.Artifacts(t)
		if want := filepath.Join(dir, "TestArtifacts", "sub"); got != want {
			t.Errorf("Artifacts = %q, want %q", got, want)
		}
	})
	t.Setenv(vmtest.ArtifactsEnv, "")
	var gone string
	t.Run("temporary", func(t *testing.T) { gone = vmtest.Artifacts(t) })
	if _, err := os.Stat(gone); !os.IsNotExist(err) {
		t.Errorf("Stat of the folder of a test that passed = %v, want it gone", err)
	}
}
