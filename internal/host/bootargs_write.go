package host

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// tempPrefix begins the name of a file that is being written.
const tempPrefix = ".guestctl-"

// isBootFile reports whether a name is one of those that [Boot.Write] gives to
// a file, or to a temporary one.
func isBootFile(name string) bool {
	if name == crosvmFile {
		return true
	}
	for _, f := range []struct{ prefix, digits string }{
		{"oem-", "0123456789"}, {"fw-cfg-", "0123456789"}, {tempPrefix, "0123456789abcdef"},
	} {
		if rest, ok := strings.CutPrefix(name, f.prefix); ok && len(rest) >= 3 && strings.Trim(rest, f.digits) == "" {
			return true
		}
	}
	return false
}

// A fileOwner is who may read the files.
type fileOwner struct {
	other    bool // it is somebody else than us
	uid, gid int
}

// lookupOwner takes USER or USER:GROUP, names or numbers. Without GROUP it is
// the user's own. The empty string is the user we are.
func lookupOwner(s string) (o fileOwner, err error) {
	if s == "" {
		return o, nil
	}
	uid, gid, err := ParseOwner(s)
	if err != nil {
		return o, fmt.Errorf("%w; --owner is USER or USER:GROUP", err)
	}
	if uid == nil {
		return o, fmt.Errorf("looking up the owner %q: --owner is USER or USER:GROUP", s)
	}
	if gid == nil {
		u, err := user.LookupId(strconv.Itoa(*uid))
		if err == nil {
			gid, err = lookupGroup(u.Gid)
		}
		if err != nil {
			return o, fmt.Errorf("looking up the group of user %d: %w; --owner is USER:GROUP then", *uid, err)
		}
	}
	o.uid, o.gid = *uid, *gid
	o.other = o.uid != os.Geteuid()
	return o, nil
}

// Write writes the files into their folder, of mode 0600, each by renaming it
// into place, and removes those that an earlier run has left there. The folder
// is made, of mode 0700, if it is not there, and those above it of mode 0755;
// else it has to be ours alone. With an owner the files are theirs, and their group may pass the folder. Files of
// other names are left alone. Whether a file is on a disk is the caller's
// affair: the place for the folder is below /run.
func (b *Boot) Write() error {
	if b.out == "" {
		return nil
	}
	who, err := lookupOwner(b.owner)
	if err != nil {
		return err
	}
	root, err := openOut(b.out, who)
	if err != nil {
		return err
	}
	defer root.Close()
	current := map[string]bool{}
	for _, f := range b.files {
		if err := writeBootFile(root, f, who); err != nil {
			return fmt.Errorf("writing %s: %w", b.path(f), err)
		}
		current[f.name] = true
	}
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return fmt.Errorf("looking for files of an earlier run in %s: %w", b.out, err)
	}
	for _, e := range entries {
		if isBootFile(e.Name()) && !current[e.Name()] {
			if err := root.Remove(e.Name()); err != nil {
				return fmt.Errorf("removing a file of an earlier run: %w", err)
			}
		}
	}
	return nil
}

// openOut makes the folder or checks that it is ours alone, and opens it.
func openOut(out string, who fileOwner) (root *os.Root, err error) {
	if err := makePrivate(out); err != nil {
		return nil, fmt.Errorf("making the folder: %w", err)
	}
	named, err := os.Lstat(out)
	if err != nil {
		return nil, fmt.Errorf("looking at the folder: %w", err)
	}
	if !named.IsDir() {
		return nil, fmt.Errorf("the folder %s is a link, and not taken: whoever made it may change it; name what it points to", out)
	}
	if root, err = os.OpenRoot(out); err != nil {
		return nil, fmt.Errorf("opening the folder: %w", err)
	}
	defer func() {
		if err != nil {
			_ = root.Close()
		}
	}()
	dir, err := root.Open(".")
	if err != nil {
		return root, fmt.Errorf("opening the folder: %w", err)
	}
	defer dir.Close()
	st, err := dir.Stat()
	if err != nil {
		return root, fmt.Errorf("looking at the folder: %w", err)
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	switch {
	case !ok || !os.SameFile(named, st):
		return root, fmt.Errorf("the folder %s is replaced while it is looked at; find out by whom", out)
	case int(sys.Uid) != os.Geteuid():
		return root, fmt.Errorf("the folder %s belongs to user %d, who could replace the files; choose one that is yours, and have --owner say who reads the files", out, sys.Uid)
	case st.Mode().Perm()&0o067 != 0:
		return root, fmt.Errorf("the folder %s has mode %04o, so that others may look into it; choose one of mode 0700, or one that does not exist", out, st.Mode().Perm())
	}
	mode := fs.FileMode(0o700)
	if who.other {
		if err := dir.Chown(-1, who.gid); err != nil {
			return root, fmt.Errorf("giving the group of --owner the folder: %w; that takes root", err)
		}
		mode = 0o710
	}
	if st.Mode().Perm() != mode {
		if err := dir.Chmod(mode); err != nil {
			return root, fmt.Errorf("setting the mode of the folder: %w", err)
		}
	}
	return root, nil
}

// makePrivate makes a folder of mode 0700, and those above it that are missing
// of mode 0755: others may have theirs there, too.
func makePrivate(path string) error {
	path = filepath.Clean(path)
	switch st, err := os.Stat(path); {
	case err == nil && !st.IsDir():
		return &fs.PathError{Op: "mkdir", Path: path, Err: syscall.ENOTDIR}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := mkdirAll(filepath.Dir(path)); err != nil {
		return err
	}
	err := os.Mkdir(path, 0o700)
	if st, errStat := os.Lstat(path); errors.Is(err, fs.ErrExist) && errStat == nil && st.IsDir() {
		return nil
	}
	return err
}

// mkdirAll is os.MkdirAll with mode 0755, whatever the umask.
func mkdirAll(path string) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if parent := filepath.Dir(path); parent != path {
		if err := mkdirAll(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, 0o755); err != nil { //nolint:gosec // /run/guestagent is for everybody to pass through
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	return os.Chmod(path, 0o755) //nolint:gosec // as above
}

// writeBootFile writes one file.
func writeBootFile(root *os.Root, f bootFile, who fileOwner) (err error) {
	var id [8]byte
	_, _ = rand.Read(id[:])
	temp := tempPrefix + hex.EncodeToString(id[:])
	w, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = root.Remove(temp)
		}
	}()
	err = w.Chmod(0o600) // whatever the umask was
	if err == nil && who.other {
		err = w.Chown(who.uid, who.gid)
	}
	if err == nil {
		_, err = w.Write(f.value.Bytes())
	}
	if err := errors.Join(err, w.Close()); err != nil {
		return err
	}
	return root.Rename(temp, filepath.Base(f.name))
}
