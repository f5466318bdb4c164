// Package vmtest is package vm for tests: it boots machines that end with the test, keeps artifacts of those that
// failed, and decides which tests run.
//
// Tests in virtual machines and containers are asked for by the environment variable VM, a list of releases or "all".
// Without it they skip and say so. With it nothing skips: a missing program or permission is a failure. There are two
// exceptions. A release, or vhost-device-vsock, that a broken archive does not give that day is left out under VM=all,
// loudly, and named in the file LEFT-OUT of the artifacts. A host that cannot run containers, which need root and
// systemd-nspawn, is a failure with CI=true only.
//
// Artifacts are kept in the folder GUESTAGENT_VM_ARTIFACTS, below the test's name. Where it is not set, they go to a
// temporary folder that only a failed test leaves behind.
package vmtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/tests/vm"
)

const (
	// SelectEnv is the environment variable that asks for tests in virtual machines.
	SelectEnv = "VM"
	// ArtifactsEnv is the environment variable that names the folder for artifacts.
	ArtifactsEnv = "GUESTAGENT_VM_ARTIFACTS"
	// LeftOutFile is the file in the artifacts that names the releases that could not be tested.
	LeftOutFile = "LEFT-OUT"
	// ContainerRelease is the release of the containers that no release was named for.
	ContainerRelease = "trixie"

	collectTimeout = time.Minute
	commandTimeout = 5 * time.Minute
)

// Releases returns the releases that VM asks for. It skips the test where none is asked for.
func Releases(t testing.TB) []vm.Release {
	t.Helper()
	list := os.Getenv(SelectEnv)
	if list == "" {
		t.Skipf("tests in virtual machines were not asked for: run make test, or set %s to a list of releases or to all", SelectEnv)
	}
	releases, err := vm.ParseReleases(list)
	if err != nil {
		t.Fatalf("%s: %v", SelectEnv, err)
	}
	return releases
}

// Each runs f as a subtest for each release that VM asks for, one after another.
func Each(t *testing.T, f func(t *testing.T, release vm.Release)) {
	t.Helper()
	for _, release := range Releases(t) {
		t.Run(release.Name, func(t *testing.T) { f(t, release) })
	}
}

// Image returns the image of a release, which may take minutes to build. It skips the test only where the release is
// left out: see the package comment.
func Image(t testing.TB, release vm.Release) *vm.Image {
	t.Helper()
	Releases(t) // skips where nothing was asked for
	log := &strings.Builder{}
	img, err := vm.BuildImage(t.Context(), release, log)
	if err == nil {
		return img
	}
	save(t, "image-"+release.Name+".log", log.String())
	if errors.Is(err, vm.ErrArchive) && release.Moving && os.Getenv(SelectEnv) == "all" {
		leaveOut(t, release.Name, err)
	}
	t.Fatalf("no image of %s: %v", release.Name, err)
	return nil
}

// leaveOut skips the test so that it is seen.
func leaveOut(t testing.TB, what string, err error) {
	t.Helper()
	line := fmt.Sprintf("LEFT OUT: %s is not to be had today, nothing is tested with it: %v\n", what, err)
	_, _ = io.WriteString(os.Stderr, line)
	if dir := os.Getenv(ArtifactsEnv); dir != "" {
		if err := appendLine(dir, line); err != nil {
			t.Errorf("noting that %s is left out: %v", what, err)
		}
	}
	t.Skip(line)
}

func appendLine(dir, line string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	name := filepath.Join(dir, LeftOutFile)
	f, err := os.OpenFile(name, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line)
	return errors.Join(err, f.Close())
}

// Boot boots a machine that ends with the test. The test fails where it does not come up. At the end the journal is
// saved beside the console; a failed test says where. cfg.Artifacts may name another folder.
func Boot(t testing.TB, cfg vm.Config) *vm.Machine {
	t.Helper()
	Releases(t) // skips where nothing was asked for
	if cfg.Artifacts == "" {
		cfg.Artifacts = Artifacts(t)
	}
	m, err := vm.Boot(t.Context(), cfg)
	if emulationFault(err) {
		t.Logf("the kernel fell over the emulation, and is booted once more: %v", err)
		m, err = vm.Boot(t.Context(), cfg)
	}
	if errors.Is(err, vm.ErrArchive) && os.Getenv(SelectEnv) == "all" {
		leaveOut(t, "vhost-device-vsock", err) // nothing else is fetched for a boot
	}
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, m)
	t.Logf("booted %s with %s in %s", cfg.Image.Release.Name, m.Accel, m.BootTime.Round(time.Second/10))
	return m
}

// emulationFault reports whether a boot ended since the kernel met a breakpoint that it had set itself while it patched its
// code: seen with two emulated processors, before there was any program in the guest.
func emulationFault(err error) bool {
	return errors.Is(err, vm.ErrStopped) && strings.Contains(err.Error(), "Oops: int3:")
}

// Container boots a container of [ContainerRelease] that ends with the test, with files put into its root. It is a
// machine like any other for all the functions here; [vm.StartContainer] says what differs. It skips the test where VM
// does not ask for that release, and where containers cannot run; with CI=true the latter is a failure.
func Container(t testing.TB, overlay ...vm.File) *vm.Machine {
	t.Helper()
	return StartContainer(t, vm.ContainerConfig{Overlay: overlay})
}

// StartContainer is Container for what needs more than files, and for other releases. The fields Image and Artifacts may
// be left out.
func StartContainer(t testing.TB, cfg vm.ContainerConfig) *vm.Machine {
	t.Helper()
	needContainers(t)
	if cfg.Image == nil {
		cfg.Image = ContainerImage(t)
	}
	if cfg.Artifacts == "" {
		cfg.Artifacts = Artifacts(t)
	}
	m, err := vm.StartContainer(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, m)
	t.Logf("booted %s in a container in %s", cfg.Image.Release.Name, m.BootTime.Round(time.Second/100))
	return m
}

// ContainerImage returns the image of [ContainerRelease]. It skips or fails as Container does.
func ContainerImage(t testing.TB) *vm.Image {
	t.Helper()
	releases := Releases(t) // skips where nothing was asked for
	i := slices.IndexFunc(releases, func(r vm.Release) bool { return r.Name == ContainerRelease })
	if i < 0 {
		t.Skipf("tests in containers were not asked for: they run where %s names %s", SelectEnv, ContainerRelease)
	}
	needContainers(t)
	return Image(t, releases[i])
}

// needContainers skips the test where containers cannot run, or fails it with CI=true.
func needContainers(t testing.TB) {
	t.Helper()
	Releases(t) // skips where nothing was asked for
	err := vm.CheckContainers()
	switch {
	case err == nil:
	case os.Getenv("CI") == "true":
		t.Fatalf("containers cannot run here: %v", err)
	default:
		t.Skipf("containers cannot run here: %v", err)
	}
}

// endWith ends the machine with the test, and saves the journal before.
func endWith(t testing.TB, m *vm.Machine) {
	t.Helper()
	t.Cleanup(func() {
		// The test's own context has ended by now.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), collectTimeout)
		defer cancel()
		select {
		case <-m.Done():
			// A test may end its machine; the journal has gone with it.
		default:
			if err := m.Collect(ctx); err != nil {
				t.Errorf("saving the journal: %v", err)
			}
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Artifacts returns the folder for the artifacts of this test, and has a failed test say where it is.
func Artifacts(t testing.TB) string {
	t.Helper()
	dir, keep := os.Getenv(ArtifactsEnv), true
	var err error
	if dir == "" {
		keep = false

		//nolint:usetesting // t.TempDir would be gone when somebody wants to look at it
		dir, err = os.MkdirTemp("", "guestagent-vm-artifacts-")
	} else {
		dir = filepath.Join(dir, filepath.FromSlash(t.Name()))
		err = os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		t.Fatalf("making the folder for artifacts: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("artifacts are in %s", dir)
			return
		}
		if !keep {
			_ = os.RemoveAll(dir)
		}
	})
	return dir
}

// VsockPath returns a path for vm.VsockConfig.Path: in a folder that is there before the boot and is removed after the
// test. It is short, which those in t.TempDir are not.
func VsockPath(t testing.TB) string {
	t.Helper()

	//nolint:usetesting // see above
	dir, err := os.MkdirTemp("", "guestagent-vsock-")
	if err != nil {
		t.Fatalf("making a folder for vsock: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "vsock")
}

// save puts a text into the artifacts.
func save(t testing.TB, name, text string) {
	t.Helper()
	name = filepath.Join(Artifacts(t), name)
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Errorf("saving artifacts: %v", err)
	}
}

// Run runs a program in the guest and fails the test if its exit status is not 0. It returns standard output.
func Run(t testing.TB, m *vm.Machine, argv ...string) string {
	t.Helper()
	res := Exec(t, m, vm.Command{Argv: argv})
	if res.ExitCode != 0 {
		t.Fatalf("%q in the guest: exit status %d\nstandard output:\n%s\nstandard error:\n%s",
			strings.Join(argv, " "), res.ExitCode, res.Stdout, res.Stderr)
	}
	return string(res.Stdout)
}

// Exec runs a program in the guest. The test fails if that is not possible; any exit status is fine.
func Exec(t testing.TB, m *vm.Machine, c vm.Command) vm.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandTimeout)
	defer cancel()
	res, err := m.Exec(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// ReadFile reads a file in the guest; the test fails if that is not possible.
func ReadFile(t testing.TB, m *vm.Machine, path string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandTimeout)
	defer cancel()
	data, err := m.ReadFile(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// WriteFile puts a file in place in the guest; the test fails if that is not possible.
func WriteFile(t testing.TB, m *vm.Machine, path string, mode os.FileMode, data []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandTimeout)
	defer cancel()
	if err := m.WriteFile(ctx, path, mode, data); err != nil {
		t.Fatal(err)
	}
}

// Binary compiles the main package pkg for a guest and returns the file.
func Binary(t testing.TB, pkg string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	if err := vm.BuildBinary(t.Context(), pkg, out); err != nil {
		t.Fatal(err)
	}
	return out
}

// GoTest compiles the tests of pkg, runs them in the guest as root with the arguments (-test.run=… and so on), and
// fails the test if one fails, or skips: what skips elsewhere should be able to run in the guest.
func GoTest(t testing.TB, m *vm.Machine, pkg string, args ...string) {
	t.Helper()
	RunTests(t, m, TestConfig{Package: pkg, Args: args})
}

// TestConfig says which tests to run in a guest.
type TestConfig struct {
	// Package is the package, as for go test.
	Package string
	// Args are the test program's, -test.run=… and so on. -test.v is always there.
	Args []string
	// Env is added to the environment that every program in a guest has, and CI=true, which makes our tests fail
	// rather than skip.
	Env []string
}

// RunTests is GoTest for what needs more than arguments.
func RunTests(t testing.TB, m *vm.Machine, cfg TestConfig) {
	t.Helper()
	pkg := cfg.Package
	out := filepath.Join(t.TempDir(), "test")
	if err := vm.BuildTest(t.Context(), pkg, out); err != nil {
		t.Fatal(err)
	}
	binary, err := os.ReadFile(out)
	if err != nil {
		t.Fatalf("%s has no tests: %v", pkg, err)
	}
	dir := "/run/vm-test/" + filepath.Base(pkg)
	WriteFile(t, m, dir+"/test", 0o755, binary)
	res := Exec(t, m, vm.Command{
		Argv: append([]string{dir + "/test", "-test.v"}, cfg.Args...),
		Env:  append([]string{"CI=true"}, cfg.Env...),
		Dir:  dir,
	})
	output := string(res.Stdout) + string(res.Stderr)
	switch {
	case res.ExitCode != 0:
		t.Errorf("tests of %s in the guest: exit status %d\n%s", pkg, res.ExitCode, output)
	case strings.Contains(output, "--- SKIP:"):
		t.Errorf("tests of %s in the guest skipped\n%s", pkg, output)
	case strings.Contains(output, "no tests to run"):
		t.Errorf("tests of %s in the guest: none ran\n%s", pkg, output)
	default:
		t.Logf("tests of %s in the guest:\n%s", pkg, output)
	}
}
