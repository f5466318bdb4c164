package vm

import (
	"fmt"
	"slices"
	"strings"
)

// Release is a Debian release that guests are built from.
type Release struct {
	// Name is the code name.
	Name string
	// Systemd is the major version of systemd in it.
	Systemd int
	// Moving says that the archive of this release changes from day to day and may be broken on some: an image
	// that cannot be built is then no fault of ours. Its Systemd is the version of the day this was written.
	Moving bool

	// packages are installed besides those that every image has.
	packages []string
}

// Releases returns the releases that tests run on, oldest first.
func Releases() []Release {
	return []Release{
		{Name: "bookworm", Systemd: 252},
		{Name: "trixie", Systemd: 257},
		// From 262 on systemd loads most libraries at run time and only recommends them.
		{Name: "sid", Systemd: 262, Moving: true, packages: []string{
			"libacl1", "libapparmor1", "libaudit1", "libkmod2", "libseccomp2", "libselinux1", "mount", "systemd-report",
		}},
	}
}

// ParseReleases reads a list of release names separated by commas or spaces, or "all".
func ParseReleases(list string) ([]Release, error) {
	known := Releases()
	names := strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
	if len(names) == 0 {
		return nil, fmt.Errorf("reading list of releases %q: no name in it", list)
	}
	if slices.Contains(names, "all") {
		return known, nil
	}
	var out []Release
	for _, r := range known {
		if slices.Contains(names, r.Name) {
			out = append(out, r)
		}
	}
	for _, n := range names {
		if !slices.ContainsFunc(known, func(r Release) bool { return r.Name == n }) {
			return nil, fmt.Errorf("reading list of releases %q: no release %q; there are bookworm, trixie, sid and all", list, n)
		}
	}
	return out, nil
}
