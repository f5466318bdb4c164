package consumer

import (
	"cmp"
	"path"
	"slices"
	"strings"
)

// settings are what a unit says about its credentials, as D-Bus shows it:
// specifiers are expanded, and of two LoadCredential= lines with one ID there
// is only the last (exec_context_put_load_credential in
// src/core/exec-credential.c).
type settings struct {
	load         []loadCredential   // LoadCredential= and LoadCredentialEncrypted=
	imports      []importCredential // in the order of the unit file
	environments []string           // paths of EnvironmentFile=, which may be globs
}

// A loadCredential is an ID and where its value comes from.
type loadCredential struct{ ID, Path string }

// An importCredential is a name that may end in *, and what takes the place of
// the glob's fixed part; "" means that the name stays.
type importCredential struct{ Glob, Rename string }

// loads returns which of names a unit with these settings loads, sorted and
// without duplicates. The rules are acquire_credentials' in
// src/core/exec-credential.c: an ID goes to LoadCredential= before
// ImportCredential=, and among the latter to the line that comes first.
//
// Two things cannot be seen from here, and then there is a load too many, never
// one too few: whether systemd finds a bare name elsewhere before it gets to
// the store, and whether the store has a name that was not asked for and
// that an earlier glob renames to the same ID.
func (s settings) loads(names []string, cfg Config) []Load {
	var found []Load
	taken := make(map[string]bool)

	// First the IDs, wherever their values come from. One that a folder would
	// bring as well is the ID's own, in whichever order systemd gets to them.
	for _, l := range s.load {
		if !isStore(l.Path, cfg) {
			taken[l.ID] = true
		}
	}
	for _, l := range s.load {
		for _, name := range names {
			switch as := l.ID + "_" + name; {
			case isStore(l.Path, cfg):
				// What is in a folder is called after the ID and its path in
				// the folder, and names with a leading dot are passed over.
				if !strings.HasPrefix(name, ".") && !taken[as] {
					taken[as] = true
					found = append(found, Load{Name: name, As: as, Way: WayPath})
				}
			case l.Path == name:
				found = append(found, Load{Name: name, As: l.ID, Way: WayFile})
			case path.Clean(l.Path) == path.Join(cfg.Store, name):
				found = append(found, Load{Name: name, As: l.ID, Way: WayPath})
			case path.Clean(l.Path) == path.Clean(cfg.Socket) && l.ID == name:
				found = append(found, Load{Name: name, As: l.ID, Way: WaySocket})
			}
		}
	}
	for _, i := range s.imports {
		for _, name := range names {
			if as, ok := i.match(name); ok && !taken[as] {
				taken[as] = true
				found = append(found, Load{Name: name, As: as, Way: WayImport})
			}
		}
	}
	for _, pattern := range s.environments {
		for _, name := range names {
			if matchFile(pattern, cfg.Store, name) {
				found = append(found, Load{Name: name, Way: WayEnvironment})
			}
		}
	}
	slices.SortFunc(found, compareLoads)
	return slices.Compact(found)
}

// socketNames returns the IDs that are loaded by the credentials socket.
func (s settings) socketNames(cfg Config) []string {
	var names []string
	for _, l := range s.load {
		if path.Clean(l.Path) == path.Clean(cfg.Socket) {
			names = append(names, l.ID)
		}
	}
	return names
}

// isStore reports whether LoadCredential= names the store itself.
func isStore(p string, cfg Config) bool { return path.Clean(p) == path.Clean(cfg.Store) }

// match returns what name is imported as. Only a * at the end is a glob
// (credential_glob_valid in src/shared/creds-util.c); what it stands for follows
// the new name (load_credential_glob in src/core/exec-credential.c). A * alone
// does not match a leading dot: see glob(7).
func (i importCredential) match(name string) (as string, ok bool) {
	prefix, glob := strings.CutSuffix(i.Glob, "*")
	rest, ok := strings.CutPrefix(name, prefix)
	switch {
	case !ok, !glob && rest != "", prefix == "" && strings.HasPrefix(name, "."):
		return "", false
	case i.Rename == "":
		return name, true
	default:
		return i.Rename + rest, true
	}
}

// matchFile reports whether an EnvironmentFile= means a file of the store.
// systemd hands it to glob(3) (exec_context_load_environment in
// src/core/execute.c), which knows [!...] where Go knows [^...], takes either,
// and does not let a wildcard stand for a leading dot.
func matchFile(pattern, store, name string) bool {
	pattern = path.Clean(pattern)
	if strings.HasPrefix(name, ".") && !strings.HasPrefix(path.Base(pattern), ".") {
		return false
	}
	ok, err := path.Match(strings.ReplaceAll(pattern, "[!", "[^"), path.Join(store, name))
	return ok && err == nil
}

// compareLoads orders loads by what is in the store, then by what the unit
// makes of it.
func compareLoads(a, b Load) int {
	return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.As, b.As), cmp.Compare(a.Way, b.Way))
}
