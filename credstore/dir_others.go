//go:build !linux

package credstore

import (
	"errors"
	"io"
	"os"
)

// The store is systemd's, and systemd runs on Linux. Elsewhere the package
// compiles, so that programs that share code with it do, and every operation
// fails with errors.ErrUnsupported.

type dir struct{ path string }

var noDir = dir{}

func openDir(string) (dir, error) { return dir{}, errors.ErrUnsupported }

func (dir) sub(string, bool) (dir, error) { return dir{}, errors.ErrUnsupported }

func (dir) close() {}

func (dir) ownedPrivately() error { return errors.ErrUnsupported }

func (dir) create(string, uint32, []byte) (identity, error) {
	return identity{}, errors.ErrUnsupported
}

func (dir) replace(string, uint32, []byte) error { return errors.ErrUnsupported }

func (dir) overwrite(string, int64, []byte) error { return errors.ErrUnsupported }

func (dir) open(string) (*os.File, identity, error) { return nil, identity{}, errors.ErrUnsupported }

func (dir) read(string, int64) ([]byte, identity, error) {
	return nil, identity{}, errors.ErrUnsupported
}

func (dir) stat(string) (identity, error) { return identity{}, errors.ErrUnsupported }

func (dir) unlink(string) error { return errors.ErrUnsupported }

func (dir) list() ([]string, error) { return nil, errors.ErrUnsupported }

func (dir) removeSub(string) error { return errors.ErrUnsupported }

func rename(dir, string, dir, string, bool) error { return errors.ErrUnsupported }

func link(dir, string, dir, string) error { return errors.ErrUnsupported }

func (dir) flock(string, bool, bool) (io.Closer, error) { return nil, errors.ErrUnsupported }

func mkdir(string) error { return errors.ErrUnsupported }

func MonotonicUSec() uint64 { return 0 }

func backing(string) (Backing, error) { return Backing{}, errors.ErrUnsupported }
