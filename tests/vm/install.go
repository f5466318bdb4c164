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
	files, err := makeInstall(ctx, dir)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		if !strings.Contains(f.Path, "systemd/system/") {
			continue
		}
		unit, err := os.ReadFile(f.Source)
		if err != nil {
			return nil, err
		}
		files = append(files, enable(f.Path, unit)...)
	}
	return files, nil
}

// Rendered returns what NixOS would have in a guest for the module in the file config, its units with their drop-ins and
// links, as tests/nix/render writes it, and what `make install` has besides units: no `systemctl enable` adds to that. It
// needs nix-instantiate. The files stay in dir, which the caller removes when the guest has booted.
func Rendered(ctx context.Context, config, dir string) ([]File, error) {
	files, err := rendered(ctx, config, dir)
	if err != nil {
		return nil, fmt.Errorf("rendering %s for a guest: %w", config, err)
	}
	return files, nil
}

func rendered(ctx context.Context, config, dir string) ([]File, error) {
	if err := needTools("nix-instantiate"); err != nil {
		return nil, err
	}
	root, err := moduleRoot(ctx)
	if err != nil {
		return nil, err
	}
	nixos := filepath.Join(dir, "nixos")
	cmd := exec.CommandContext(ctx, filepath.Join(root, "tests/nix/render"), config, nixos)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("running tests/nix/render: %w\n%s", err, lastLines(out, logTail))
	}
	files, err := filesBelow(nixos)
	if err != nil {
		return nil, err
	}
	all, err := makeInstall(ctx, filepath.Join(dir, "make"))
	if err != nil {
		return nil, err
	}
	for _, f := range all {
		if !strings.Contains(f.Path, "systemd/system/") {
			files = append(files, f)
		}
	}
	return files, nil
}

// moduleRoot is the folder that the Makefile is in.
func moduleRoot(ctx context.Context) (string, error) {
	gomod, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("running go env: %w", err)
	}
	return filepath.Dir(strings.TrimSpace(string(gomod))), nil
}

// makeInstall has `make install` put its files into dir.
func makeInstall(ctx context.Context, dir string) ([]File, error) {
	root, err := moduleRoot(ctx)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "make", "--silent", "-C", root, "install", "DESTDIR="+dir)
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("running make: %w\n%s", err, lastLines(out, logTail))
	}
	return filesBelow(dir)
}

// filesBelow are the files and links in dir, as they are to be in the guest.
func filesBelow(dir string) ([]File, error) {
	var files []File
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(name)
			files = append(files, File{Path: "/" + rel, Symlink: target})
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		files = append(files, File{Path: "/" + rel, Mode: info.Mode().Perm(), Source: name})
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
