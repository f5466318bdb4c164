package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/guestagent/guestagent/tests/vm/internal/cpio"
)

// File is put into the guest's root before it boots, owned by root. Exactly one of Content, Source and Symlink says what
// it is; none of them is an empty file. Folders on the way are made, 0755, where the image has none.
type File struct {
	// Path is absolute, in the guest.
	Path string
	// Mode is the permission; 0 is 0644, for a folder 0755.
	Mode fs.FileMode
	// Content is the file's content.
	Content []byte
	// Source is a file on the host to take the content from.
	Source string
	// Symlink makes it a symbolic link to this target.
	Symlink string
	// Dir makes it a folder.
	Dir bool
}

// tree holds the folders of an image, and the symbolic links with their targets; folders have the target "". The kernel
// would set owner and mode of a folder that is there already, so an overlay must not name it.
type tree map[string]string

// maxLinks bounds the symbolic links followed in one path.
const maxLinks = 32

// packRoot writes the tree under root as a compressed archive, and returns its folders and its size.
func packRoot(ctx context.Context, root, file string) (tree, int64, error) {
	cmd := exec.CommandContext(ctx, "zstd", "-q", "-f", "-T0", "-9", "-o", file)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, 0, err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return nil, 0, err
	}
	dirs, size, err := archive(in, root)
	closeErr := in.Close()
	if waitErr := cmd.Wait(); waitErr != nil {
		return nil, 0, fmt.Errorf("running zstd: %w: %s", waitErr, stderr.String())
	}
	return dirs, size, errors.Join(err, closeErr)
}

func archive(out io.Writer, root string) (tree, int64, error) {
	w := cpio.NewWriter(out)
	dirs := make(tree)
	var size int64
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil || rel == "." {
			return err
		}
		// The kernel makes /dev at run time; only what is needed before that stays.
		if strings.HasPrefix(rel, "dev/") && rel != "dev/console" && rel != "dev/null" {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		h, ok := fileHeader(rel, info)
		if !ok {
			return nil
		}
		var content io.Reader
		switch {
		case d.IsDir():
			dirs["/"+rel] = ""
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			dirs["/"+rel] = target
			h.Size, content = int64(len(target)), strings.NewReader(target)
		case info.Mode().IsRegular():
			f, err := os.Open(name)
			if err != nil {
				return err
			}
			defer func() { _ = f.Close() }()
			h.Size, content = info.Size(), f
		}
		size += h.Size
		return w.Add(h, content)
	})
	if err != nil {
		return nil, 0, err
	}
	return dirs, size, w.Close()
}

// resolve follows symbolic links in p, which is clean and absolute, and returns the path without any.
func (t tree) resolve(p string) (string, error) {
	for range maxLinks {
		next, changed := t.followFirst(p)
		if !changed {
			return p, nil
		}
		p = next
	}
	return "", fmt.Errorf("resolving %s: too many symbolic links", p)
}

// followFirst replaces the first component of p that is a symbolic link.
func (t tree) followFirst(p string) (string, bool) {
	for i := 1; i <= len(p); i++ {
		if i < len(p) && p[i] != '/' {
			continue
		}
		target := t[p[:i]]
		if target == "" {
			continue
		}
		if !path.IsAbs(target) {
			target = path.Join(path.Dir(p[:i]), target)
		}
		return path.Join(target, p[i:]), true
	}
	return p, false
}

// writeOverlay writes files as an archive that the kernel unpacks over the image with these folders.
func (t tree) writeOverlay(out io.Writer, files []File) error {
	w := cpio.NewWriter(out)
	made := maps.Clone(t)
	if made == nil {
		made = make(tree)
	}
	for _, f := range files {
		if err := made.add(w, f); err != nil {
			return fmt.Errorf("adding %s to the guest: %w", f.Path, err)
		}
	}
	return w.Close()
}

func (t tree) add(w *cpio.Writer, f File) error {
	if !path.IsAbs(f.Path) || path.Clean(f.Path) == "/" {
		return errors.New("not an absolute path of a file")
	}
	dir, err := t.resolve(path.Dir(path.Clean(f.Path)))
	if err != nil {
		return err
	}
	if err := t.addParents(w, dir); err != nil {
		return err
	}
	name := path.Join(dir, path.Base(path.Clean(f.Path)))
	mode := cpioMode(f.Mode)
	h := cpio.Header{Name: strings.TrimPrefix(name, "/"), Mode: cpio.TypeRegular | mode}
	if mode == 0 {
		h.Mode |= 0o644
	}
	var content io.Reader
	switch {
	case set(f.Content != nil, f.Source != "", f.Symlink != "", f.Dir) > 1:
		return errors.New("more than one of Content, Source, Symlink and Dir")
	case f.Dir:
		h.Mode = cpio.TypeDir | mode
		if mode == 0 {
			h.Mode |= 0o755
		}
		t[name] = ""
	case f.Symlink != "":
		h.Mode = cpio.TypeSymlink | 0o777
		h.Size, content = int64(len(f.Symlink)), strings.NewReader(f.Symlink)
		t[name] = f.Symlink
	case f.Source != "":
		src, err := os.Open(f.Source)
		if err != nil {
			return err
		}
		defer func() { _ = src.Close() }()
		info, err := src.Stat()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s is not a regular file", f.Source)
		}
		h.Size, content = info.Size(), src
	default:
		h.Size, content = int64(len(f.Content)), bytes.NewReader(f.Content)
	}
	return w.Add(h, content)
}

// addParents adds dir and the folders above it where they are missing.
func (t tree) addParents(w *cpio.Writer, dir string) error {
	var missing []string
	for d := dir; d != "/"; d = path.Dir(d) {
		if _, ok := t[d]; ok {
			break
		}
		missing = append(missing, d)
	}
	for _, d := range slices.Backward(missing) {
		if err := w.Add(cpio.Header{Name: strings.TrimPrefix(d, "/"), Mode: cpio.TypeDir | 0o755}, nil); err != nil {
			return err
		}
		t[d] = ""
	}
	return nil
}

// cpioMode returns the permission as in st_mode.
func cpioMode(m fs.FileMode) uint32 {
	out := uint32(m.Perm())
	for bit, value := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			out |= value
		}
	}
	return out
}

func set(conditions ...bool) int {
	n := 0
	for _, c := range conditions {
		if c {
			n++
		}
	}
	return n
}
