//go:build !linux

package host

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// A pinned is a folder by its path without links: where that is another folder
// later, the files of both may be mixed.
type pinned struct{ path, end string }

func pin(path string) (*pinned, error) {
	end, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	return &pinned{path: path, end: end}, nil
}

func (*pinned) close() {}

func (p *pinned) open(name string) (*os.File, error) {
	return os.OpenFile(filepath.Join(p.end, name), os.O_RDONLY|syscall.O_NONBLOCK, 0)
}

func (p *pinned) stat(name string) (stamp, error) {
	fi, err := os.Stat(filepath.Join(p.end, name))
	if err != nil {
		return stamp{}, err
	}
	return stampOf(fi), nil
}

func (p *pinned) names() ([]string, error) {
	d, err := os.Open(p.end)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	if names == nil {
		names = []string{}
	}
	return names, nil
}

func (p *pinned) current() bool {
	end, err := filepath.EvalSymlinks(p.path)
	return err == nil && end == p.end
}

func stampOf(fi fs.FileInfo) stamp {
	return stamp{size: fi.Size(), mtime: fi.ModTime().UnixNano(), mode: fi.Mode()}
}

// owned does not know whose a file is here.
func owned(fs.FileInfo) bool { return true }

// A notifier notifies of nothing here.
type notifier struct{ events chan struct{} }

func newNotifier() *notifier { return &notifier{} }

func (*notifier) close() {}

func (*notifier) arm(map[string]interest) (altered, complete bool) { return false, false }
