package credstore

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
)

// A fixture is a store with the folders around it.
type fixture struct {
	t   *testing.T
	s   *Store
	dir string // the store's own folder
	top string // the folder above all of them
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	return fixtureAt(t, t.TempDir())
}

func fixtureAt(t *testing.T, top string) *fixture {
	t.Helper()
	f := &fixture{t: t, top: top, dir: filepath.Join(top, "run/credstore")}
	f.s = New(Config{
		Dir:       f.dir,
		Shadowing: []Place{{Dir: filepath.Join(top, "bound/system"), As: "/run/credentials/@system"}, {Dir: filepath.Join(top, "etc/credstore")}},
		Encrypted: []Place{{Dir: filepath.Join(top, "etc/credstore.encrypted")}},
	})
	return f
}

// begin opens the store until the test ends or close is called.
func (f *fixture) begin() *Tx {
	f.t.Helper()
	tx, err := f.s.Begin()
	if err != nil {
		f.t.Fatalf("Begin: %v", err)
	}
	f.t.Cleanup(tx.Close)
	return tx
}

func (f *fixture) apply(set Set) Result {
	f.t.Helper()
	tx := f.begin()
	defer tx.Close()
	res, err := tx.Apply(set)
	if err != nil {
		f.t.Fatalf("Apply: %v", err)
	}
	return res
}

// refused applies the set, which must be refused for one reason, and returns the detail.
func (f *fixture) refused(set Set, name string, want credential.Reason) string {
	f.t.Helper()
	before := f.tree()
	tx := f.begin()
	defer tx.Close()
	_, err := tx.Apply(set)
	var refused *RefusedError
	if !errors.As(err, &refused) || len(refused.Refusals) != 1 {
		f.t.Fatalf("Apply = %v, want one refusal", err)
	}
	r := refused.Refusals[0]
	if r.Name != name || r.Reason != want {
		f.t.Errorf("Apply refused %q for %q, want %q for %q", r.Name, r.Reason, name, want)
	}
	if after := f.tree(); !reflect.DeepEqual(before, after) {
		f.t.Errorf("a refused set changed the store:\nbefore %v\nafter  %v", before, after)
	}
	return r.Detail
}

func (f *fixture) write(path, content string) {
	f.t.Helper()
	path = filepath.Join(f.top, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// tree is what a consumer could read, and everybody else's files: all but the store's own folder.
func (f *fixture) tree() map[string]string {
	f.t.Helper()
	m := map[string]string{}
	err := filepath.WalkDir(f.top, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			if e.Name() == ownDir {
				return filepath.SkipDir
			}
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(f.top, path)
		m[rel] = string(b)
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}

func (f *fixture) wantFiles(want map[string]string) {
	f.t.Helper()
	got := f.tree()
	for k, v := range got {
		if len(v) > 40 {
			got[k] = fmt.Sprintf("%.20s… (%d bytes)", v, len(v))
		}
	}
	if !reflect.DeepEqual(got, want) {
		f.t.Errorf("files = %q, want %q", got, want)
	}
}

func push(creds ...Credential) Set { return Set{Source: credential.SourcePush, Install: creds} }

func boot(creds ...Credential) Set { return Set{Source: credential.SourceSMBIOS, Install: creds} }

func cred(name, value string) Credential {
	return Credential{Name: name, Value: secret.New([]byte(value))}
}

func TestApply(t *testing.T) {
	f := newFixture(t)
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	res := f.apply(push(cred("api-key", "one"), cred("empty", ""), Credential{Name: "all bytes", Revision: "r1", Value: secret.New(all)}))
	if want := (Result{Generation: 1, Installed: []string{"api-key", "empty", "all bytes"}}); !reflect.DeepEqual(res, want) {
		t.Errorf("Apply = %+v, want %+v", res, want)
	}
	if got := f.tree()["run/credstore/all bytes"]; got != string(all) {
		t.Errorf("256 byte values came out as %d bytes", len(got))
	}
	for path, want := range map[string]fs.FileMode{"": 0o700 | fs.ModeDir, "api-key": 0o400, ownDir: 0o700 | fs.ModeDir, ownDir + "/" + stateFile: 0o600} {
		st, err := os.Stat(filepath.Join(f.dir, path))
		if err != nil || st.Mode() != want {
			t.Errorf("mode of %q = %v, %v, want %v", path, st.Mode(), err, want)
		}
	}

	// The same again changes nothing, so that a host may retry.
	res = f.apply(push(cred("api-key", "one")))
	if want := (Result{Generation: 1, Unchanged: []string{"api-key"}}); !reflect.DeepEqual(res, want) {
		t.Errorf("Apply of what is in force = %+v, want %+v", res, want)
	}
	// The same bytes under another revision are relabelled.
	again := cred("api-key", "one")
	again.Revision = "r2"
	res = f.apply(push(again))
	if want := (Result{Generation: 1, Relabelled: []string{"api-key"}}); !reflect.DeepEqual(res, want) {
		t.Errorf("Apply under a new revision = %+v, want %+v", res, want)
	}
	res = f.apply(Set{Source: credential.SourcePush, Install: []Credential{cred("api-key", "two")}, Remove: []string{"empty", "never-there"}})
	if want := (Result{Generation: 2, Installed: []string{"api-key"}, Removed: []string{"empty"}, Unchanged: []string{"never-there"}}); !reflect.DeepEqual(res, want) {
		t.Errorf("Apply = %+v, want %+v", res, want)
	}
	if got := f.tree(); got["run/credstore/api-key"] != "two" || len(got) != 2 {
		t.Errorf("files = %q", got)
	}

	tx := f.begin()
	es := tx.Entries()
	if len(es) != 2 || es[0].Name != "all bytes" || es[0].Size != 256 || es[0].Revision != "r1" || es[0].State != StateInForce || es[0].Source != credential.SourcePush ||
		es[1].Name != "api-key" || es[1].Path != filepath.Join(f.dir, "api-key") || es[1].InstalledAt.IsZero() {
		t.Errorf("Entries() = %+v", es)
	}
}

func TestRefusals(t *testing.T) {
	f := newFixture(t)
	f.write("run/credstore/theirs", "foreign")
	f.write("bound/system/booted", "x")
	f.write("etc/credstore/static", "x")
	f.write("etc/credstore.encrypted/sealed", "x")
	if err := os.Symlink("/nowhere", filepath.Join(f.dir, "dangling")); err != nil {
		t.Fatal(err)
	}
	// Somebody's link stays out of tree().
	t.Cleanup(func() { _ = os.Remove(filepath.Join(f.dir, "dangling")) })
	f2 := newFixture(t)

	tests := []struct {
		f      *fixture
		set    Set
		name   string
		reason credential.Reason
		detail string
	}{
		{f2, push(cred("", "x")), "", credential.ReasonBadName, "empty"},
		{f2, push(cred("a/b", "x")), "", credential.ReasonBadName, "byte 2 of 3"},
		{f2, push(cred(".guestagent", "x")), ".guestagent", credential.ReasonBadName, "own files"},
		{f2, push(cred("a", "x"), cred("a", "x")), "a", credential.ReasonDuplicate, "twice"},
		{f2, Set{Install: []Credential{cred("a", "x")}, Remove: []string{"a"}}, "a", credential.ReasonDuplicate, "twice"},
		{f2, push(cred("a", strings.Repeat("x", credential.MaxSize+1))), "a", credential.ReasonTooLarge, "1048577 bytes"},
		{f2, push(megabytes(5)...), "c4", credential.ReasonTooLarge, "the set would pass 4194304"},
		{f2, push(many(1024)...), "c1023", credential.ReasonTooLarge, "more than 1023 names"},
	}
	for _, tt := range tests {
		if detail := tt.f.refused(tt.set, tt.name, tt.reason); !strings.Contains(detail, tt.detail) {
			t.Errorf("refused %q with %q, want %q in it", tt.name, detail, tt.detail)
		}
	}

	// The link would make tree() fail; look at it on its own.
	tx := f.begin()
	_, refusals := tx.Check(push(cred("theirs", "x"), cred("booted", "x"), cred("static", "x"), cred("sealed", "x"), cred("dangling", "x"), cred("fine", "x")))
	tx.Close()
	var got []string
	for _, r := range refusals {
		got = append(got, r.String())
	}
	for i, want := range []string{
		"theirs: foreign: " + f.dir + "/theirs is somebody else's",
		"booted: shadowed: systemd finds /run/credentials/@system/booted first",
		"static: shadowed: systemd finds " + f.top + "/etc/credstore/static first",
		"sealed: encrypted: the encrypted store has this name",
		"dangling: foreign: ",
	} {
		if i >= len(got) || !strings.HasPrefix(got[i], want) {
			t.Errorf("Check refused %q, want %q at %d", got, want, i)
		}
	}
	if len(got) != 5 {
		t.Errorf("Check refused %d, want 5", len(got))
	}

	// Where all consumers give the full path, shadowing does no harm.
	c := cred("static", "x")
	c.AllowShadowed = true
	if err := os.Remove(filepath.Join(f.dir, "dangling")); err != nil {
		t.Fatal(err)
	}
	f.apply(push(c))
	tx = f.begin()
	if es := tx.Entries(); len(es) != 1 || es[0].State != StateShadowed || es[0].Path != f.top+"/etc/credstore/static" {
		t.Errorf("Entries() = %+v, want static shadowed", es)
	}
}

func megabytes(n int) (cs []Credential) {
	for i := range n {
		cs = append(cs, cred(fmt.Sprintf("c%d", i), strings.Repeat("m", credential.MaxSize)))
	}
	return cs
}

func many(n int) (cs []Credential) {
	for i := range n {
		cs = append(cs, cred(fmt.Sprintf("c%d", i), "x"))
	}
	return cs
}

func TestStoreLimits(t *testing.T) {
	f := newFixture(t)
	for i := range 4 { // 16 MiB in force
		cs := megabytes(4)
		for j := range cs {
			cs[j].Name = fmt.Sprintf("m%d-%d", i, j)
		}
		f.apply(push(cs...))
	}
	f.refused(push(cred("one", "more")), "one", credential.ReasonTooLarge)
	// What is in force may be applied again, but a new value would be kept beside the old one.
	if res := f.apply(push(Credential{Name: "m0-0", Value: secret.New(bytes.Repeat([]byte("m"), credential.MaxSize))})); len(res.Unchanged) != 1 {
		t.Errorf("Apply of what is in force = %+v", res)
	}
	f.refused(push(cred("m0-0", "y")), "m0-0", credential.ReasonTooLarge)
	f.apply(Set{Source: credential.SourcePush, Remove: []string{"m0-0"}})
	f.apply(push(cred("small", "x")))
	f.apply(push(cred("one", "more")))
}

// A file of ours that somebody touched is theirs from then on, and one that
// was removed is ours to install again.
func TestForeignHands(t *testing.T) {
	f := newFixture(t)
	f.apply(push(cred("edited", "1"), cred("replaced", "1"), cred("removed", "1")))
	if err := os.Chmod(filepath.Join(f.dir, "edited"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.dir, "edited"), []byte("22"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.write("run/credstore/new", "3")
	if err := os.Rename(filepath.Join(f.dir, "new"), filepath.Join(f.dir, "replaced")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(f.dir, "removed")); err != nil {
		t.Fatal(err)
	}
	tx := f.begin()
	var states []State
	for _, e := range tx.Entries() {
		states = append(states, e.State)
	}
	tx.Close()
	if want := []State{StateForeign, StateMissing, StateForeign}; !slices.Equal(states, want) {
		t.Errorf("states = %v, want %v", states, want)
	}
	for _, name := range []string{"edited", "replaced"} {
		f.refused(push(cred(name, "x")), name, credential.ReasonForeign)
		f.refused(Set{Remove: []string{name}}, name, credential.ReasonForeign)
	}
	f.apply(push(cred("removed", "again")))
	f.wantFiles(map[string]string{"run/credstore/edited": "22", "run/credstore/replaced": "3", "run/credstore/removed": "again"})
}

// What came later than the boot is not replaced by an import that runs again,
// and what was removed is not brought back.
func TestSMBIOSYields(t *testing.T) {
	f := newFixture(t)
	f.apply(boot(cred("a", "boot"), cred("b", "boot"), cred("c", "boot")))
	f.apply(Set{Source: credential.SourcePush, Install: []Credential{cred("a", "pushed")}, Remove: []string{"b", "never"}})
	f.refused(boot(cred("a", "boot")), "a", credential.ReasonSuperseded)
	f.refused(boot(cred("b", "boot")), "b", credential.ReasonRemoved)
	f.refused(boot(cred("never", "boot")), "never", credential.ReasonRemoved)
	if res := f.apply(boot(cred("a", "pushed"), cred("c", "boot"))); len(res.Unchanged) != 2 || res.Generation != 2 {
		t.Errorf("Apply of what is in force = %+v, want it unchanged", res)
	}
	f.apply(boot(cred("c", "new boot")))
	f.apply(push(cred("b", "pushed again")))
	f.refused(boot(cred("b", "boot")), "b", credential.ReasonSuperseded)
	f.wantFiles(map[string]string{"run/credstore/a": "pushed", "run/credstore/b": "pushed again", "run/credstore/c": "new boot"})
}

func TestRollback(t *testing.T) {
	f := newFixture(t)
	tx := f.begin()
	if _, err := tx.Rollback(); !errors.Is(err, ErrNoPrevious) {
		t.Errorf("Rollback of an empty store = %v, want ErrNoPrevious", err)
	}
	tx.Close()
	one := cred("changed", "1")
	one.Revision = "r1"
	f.apply(boot(one, cred("gone", "1"), cred("stays", "1")))
	f.apply(Set{Source: credential.SourcePush, Install: []Credential{cred("changed", "2"), cred("new", "2")}, Remove: []string{"gone"}})
	after := f.tree()

	tx = f.begin()
	res, err := tx.Rollback()
	if err != nil || res.Generation != 3 {
		t.Fatalf("Rollback = %+v, %v", res, err)
	}
	if e := tx.Entries()[0]; e.Revision != "r1" || e.Source != credential.SourceSMBIOS {
		t.Errorf("after Rollback entry = %+v, want revision and source as before", e)
	}
	tx.Close()
	f.wantFiles(map[string]string{"run/credstore/changed": "1", "run/credstore/gone": "1", "run/credstore/stays": "1"})

	tx = f.begin()
	if _, err := tx.Rollback(); err != nil {
		t.Fatalf("second Rollback: %v", err)
	}
	tx.Close()
	if got := f.tree(); !reflect.DeepEqual(got, after) {
		t.Errorf("after two rollbacks files = %q, want %q", got, after)
	}
}

// A set that forgets leaves nothing to roll back to, for its own names only.
func TestForget(t *testing.T) {
	f := newFixture(t)
	f.apply(push(cred("a", "1"), cred("b", "1"), cred("c", "1")))
	set := push(cred("a", "2"), cred("new", "2"))
	set.Remove, set.Forget = []string{"b"}, true
	f.apply(set)
	f.wantFiles(map[string]string{"run/credstore/a": "2", "run/credstore/c": "1", "run/credstore/new": "2"})
	if left, err := os.ReadDir(filepath.Join(f.dir, ownDir, previousDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("previous holds %v, %v, want nothing", left, err)
	}
	tx := f.begin()
	if _, err := tx.Rollback(); !errors.Is(err, ErrNoPrevious) {
		t.Errorf("Rollback = %v, want ErrNoPrevious", err)
	}
}

func TestView(t *testing.T) {
	f := newFixture(t)
	view := func() *Tx {
		t.Helper()
		tx, err := f.s.View()
		if err != nil {
			t.Fatalf("View: %v", err)
		}
		t.Cleanup(tx.Close)
		return tx
	}
	tx := view()
	if _, err := tx.Note(NoteReport); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Report of no store = %v, want ErrNotExist", err)
	}
	if accepted, refusals := tx.Check(push(cred("a", "x"))); len(accepted.Install) != 1 || len(refusals) != 0 {
		t.Errorf("Check = %v, %v", accepted, refusals)
	}
	if _, err := tx.Apply(push(cred("a", "x"))); err == nil {
		t.Error("Apply on a view succeeded")
	}
	if res, err := tx.DryRun(push(cred("a", "x"))); err != nil || res.Generation != 1 || len(res.Installed) != 1 {
		t.Errorf("DryRun on a view = %+v, %v", res, err)
	}
	if _, err := os.Stat(f.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a view made the store: %v", err)
	}
	tx.Close()

	f.apply(push(cred("a", "x")))
	w := f.begin()
	if err := w.SetNote(NoteReport, []byte(`{"n":1}`)); err != nil {
		t.Fatal(err)
	}
	w.Close()
	tx = view()
	if b, err := tx.Note(NoteReport); err != nil || string(b) != `{"n":1}` {
		t.Errorf("Report = %q, %v", b, err)
	}
	if len(tx.Entries()) != 1 || tx.Generation() != 1 || tx.Interrupted() {
		t.Errorf("view = %+v, generation %d, interrupted %v", tx.Entries(), tx.Generation(), tx.Interrupted())
	}
}

// What cannot be trusted is not used, and the error says what to do.
func TestUntrustedFolders(t *testing.T) {
	t.Run("others may write", func(t *testing.T) {
		f := newFixture(t)
		f.write("run/credstore/x", "")
		if err := os.Chmod(f.dir, 0o770); err != nil {
			t.Fatal(err)
		}
		if _, err := f.s.Begin(); err == nil || !strings.Contains(err.Error(), "chmod it to 0700") {
			t.Errorf("Begin = %v", err)
		}
	})
	t.Run("link", func(t *testing.T) {
		f := newFixture(t)
		if err := os.MkdirAll(filepath.Join(f.top, "run/elsewhere"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("elsewhere", f.dir); err != nil {
			t.Fatal(err)
		}
		if _, err := f.s.Begin(); err == nil {
			t.Error("Begin followed a link")
		}
	})
	t.Run("broken state", func(t *testing.T) {
		f := newFixture(t)
		f.apply(push(cred("a", "x")))
		if err := os.WriteFile(filepath.Join(f.dir, ownDir, stateFile), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := f.s.Begin(); err == nil || !strings.Contains(err.Error(), "remove the folder") {
			t.Errorf("Begin = %v", err)
		}
		f.wantFiles(map[string]string{"run/credstore/a": "x"})
	})
	t.Run("later layout", func(t *testing.T) {
		f := newFixture(t)
		f.apply(push(cred("a", "x")))
		if err := os.WriteFile(filepath.Join(f.dir, ownDir, stateFile), []byte(`{"version":2}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := f.s.Begin(); err == nil || !strings.Contains(err.Error(), "layout 2") {
			t.Errorf("Begin = %v", err)
		}
	})
}

// No error, state or journal of the store holds a value.
func TestNoValueOutsideItsFile(t *testing.T) {
	const value = "correct horse battery staple"
	f := newFixture(t)
	f.apply(push(cred("a", value)))
	f.apply(push(cred("a", value+"2")))
	tx := f.begin()
	_, err := tx.Apply(push(cred("a", value+"3"), cred("a:"+value, value), cred("a", value)))
	if err == nil || strings.Contains(err.Error(), "horse") {
		t.Errorf("Apply = %v", err)
	}
	if s := fmt.Sprintf("%v %+v %#v", tx.Entries(), tx.st, cred("a", value)); strings.Contains(s, "horse") {
		t.Errorf("printed: %s", s)
	}
	own := filepath.Join(f.dir, ownDir)
	for _, name := range []string{stateFile, lockFile} {
		b, err := os.ReadFile(filepath.Join(own, name))
		if err != nil || bytes.Contains(b, []byte("horse")) {
			t.Errorf("%s: %v, or holds the value", name, err)
		}
	}
}
