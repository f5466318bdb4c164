//go:build !linux

package vm

import (
	"context"
	"errors"
	"io/fs"
	"os/exec"

	"github.com/guestagent/guestagent/tests/vm/internal/cpio"
)

func lockFile(context.Context, string) (func(), error) {
	return nil, errors.New("guest images are built on Linux only")
}

func ownGroup(*exec.Cmd) {}

func dieWithThread(*exec.Cmd) {}

func ownSession(*exec.Cmd) {}

func fileHeader(string, fs.FileInfo) (cpio.Header, bool) { return cpio.Header{}, false }

func kernelRelease() string { return "" }
