package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// BuildBinary compiles the main package pkg to the file out, static and stripped, as it is shipped. It runs in the
// current folder, which has to be inside the module, and so does [BuildTest].
func BuildBinary(ctx context.Context, pkg, out string) error {
	return goBuild(ctx, pkg, "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
}

// BuildTest compiles the tests of pkg to the file out, static, to be run in a guest.
func BuildTest(ctx context.Context, pkg, out string) error {
	return goBuild(ctx, pkg, "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
}

func goBuild(ctx context.Context, pkg string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	output, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("compiling %s: %w\n%s", pkg, err, lastLines(output, logTail))
	}
	return nil
}

// buildGuest compiles the guest program into dir and returns the file.
func buildGuest(ctx context.Context, dir string) (string, error) {
	out := filepath.Join(dir, "vm-guest")
	return out, BuildBinary(ctx, "github.com/guestagent/guestagent/tests/vm/guest", out)
}
