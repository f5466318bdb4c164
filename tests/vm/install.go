package vm

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// Installed returns what `make install` puts into a guest, with the units enabled as `systemctl enable` does it. The
// files stay in dir, which the caller removes when the guest has booted.
func Installed(ctx context.Context, dir string) ([]File, error) {
	files, err := installed(ctx, dir)
	if err != nil {
		return nil, fmt.Errorf("installing guestagent for a guest: %w", err)
	}
	return files, nil
}

func installed(ctx context.Context, dir string) ([]File, error) {
	gomod, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "make", "--silent", "-C", filepath.Dir(strings.TrimSpace(string(gomod))), "install", "DESTDIR="+dir)
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("running make: %w\n%s", err, lastLines(out, logTail))
	}
	var files []File
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		files = append(files, File{Path: "/" + rel, Mode: info.Mode().Perm(), Source: name})
		if !strings.Contains(rel, "systemd/system/") {
			return nil
		}
		unit, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		files = append(files, enable("/"+rel, unit)...)
		return nil
	})
	return files, err
}

// enable returns the links that `systemctl enable` makes for a unit.
func enable(file string, unit []byte) []File {
	var links []File
	for sc := bufio.NewScanner(bytes.NewReader(unit)); sc.Scan(); {
		key, value, _ := strings.Cut(sc.Text(), "=")
		suffix, ok := map[string]string{"WantedBy": ".wants", "RequiredBy": ".requires"}[key]
		if !ok {
			continue
		}
		for target := range strings.FieldsSeq(value) {
			links = append(links, File{Path: path.Join("/etc/systemd/system", target+suffix, path.Base(file)), Symlink: file})
		}
	}
	return links
}
