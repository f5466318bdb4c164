package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestOwnGroup(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"version 2", "0::/user.slice/session-1.scope\n", "/user.slice/session-1.scope"},
		{"root", "0::/\n", "/"},
		{"hybrid", "4:memory:/a\n1:name=systemd:/b\n0::/c\n", "/c"},
		{"a colon", "0::/a:0::b\n", "/a:0::b"},
		{"version 1", "4:memory:/a\n1:name=systemd:/b\n", ""},
		{"outside of the namespace", "0::/../../other\n", ""},
		{"nothing", "", ""},
	} {
		got, err := ownGroup(tt.in)
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%s: ownGroup(%q) = %q, %v, want %q", tt.name, tt.in, got, err, tt.want)
		}
	}
}

func TestGroups(t *testing.T) {
	g, err := openGroups()
	if errors.Is(err, fs.ErrPermission) && os.Getenv("CI") != "true" {
		t.Skipf("%v: run it as root", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	cgroup, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	own, err := ownGroup(string(cgroup))
	if err != nil {
		t.Fatal(err)
	}
	group := filepath.Join(own, filepath.Base(t.TempDir())+"-"+filepath.Base(os.Args[0]))
	if err := g.make(group); err != nil {
		t.Fatal(err)
	}
	if err := g.make(group); !errors.Is(err, fs.ErrExist) {
		t.Errorf("make of a group that is there = %v, want %v", err, fs.ErrExist)
	}
	if err := g.make(filepath.Join(group, "below")); err != nil {
		t.Error(err)
	}
	if err := g.remove(group); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(g.path(group)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Lstat of a group that was removed = %v, want %v", err, fs.ErrNotExist)
	}
	if err := g.remove(group); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("remove of a group that is not there = %v, want %v", err, fs.ErrNotExist)
	}
}
