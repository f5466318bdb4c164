package credstore

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/internal/credential"
)

func onTrial(set Set, note string) Set {
	set.Trial = []byte(note)
	return set
}

// kept says which values are kept in one of the store's own folders.
func (f *fixture) kept(folder string) map[string]string {
	f.t.Helper()
	values := map[string]string{}
	files, err := os.ReadDir(filepath.Join(f.dir, ownDir, folder))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.t.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(filepath.Join(f.dir, ownDir, folder, file.Name()))
		if err != nil {
			f.t.Fatal(err)
		}
		values[file.Name()] = string(b)
	}
	return values
}

func (f *fixture) do(what string, do func(*Tx) error) {
	f.t.Helper()
	tx := f.begin()
	defer tx.Close()
	if err := do(tx); err != nil {
		f.t.Fatalf("%s: %v", what, err)
	}
}

func TestTrialPasses(t *testing.T) {
	f := newFixture(t)
	f.apply(push(cred("a", "1"), cred("b", "1")))
	set := onTrial(push(cred("a", "2")), `{"n":1}`)
	set.Forget = true // only when it has passed
	f.apply(set)

	tx := f.begin()
	if got := string(tx.Trial()); got != `{"n":1}` {
		t.Errorf("Trial = %q", got)
	}
	// Nobody changes a value meanwhile, but who changes nothing may say so.
	if _, err := tx.Apply(push(cred("b", "2"))); !errors.Is(err, ErrOnTrial) {
		t.Errorf("Apply = %v, want ErrOnTrial", err)
	}
	if _, err := tx.Rollback(); !errors.Is(err, ErrOnTrial) {
		t.Errorf("Rollback = %v, want ErrOnTrial", err)
	}
	if err := tx.DropPrevious(); !errors.Is(err, ErrOnTrial) {
		t.Errorf("DropPrevious = %v, want ErrOnTrial", err)
	}
	if res, err := tx.Apply(push(cred("b", "1"))); err != nil || !slices.Equal(res.Unchanged, []string{"b"}) {
		t.Errorf("Apply of what is in force = %+v, %v", res, err)
	}
	if err := tx.SetTrial([]byte(`{"n":2}`)); err != nil {
		t.Error(err)
	}
	tx.Close()
	if got := f.kept(previousDir); got["a"] != "1" {
		t.Errorf("previous = %q, want the value before", got)
	}

	f.do("PassTrial", func(tx *Tx) error {
		if got := string(tx.Trial()); got != `{"n":2}` {
			t.Errorf("Trial = %q", got)
		}
		return tx.PassTrial()
	})
	if got := f.kept(previousDir); len(got) != 0 {
		t.Errorf("previous = %q, want nothing", got)
	}
	tx = f.begin()
	defer tx.Close()
	if tx.Trial() != nil || tx.Generation() != 2 {
		t.Errorf("Trial = %q, generation %d", tx.Trial(), tx.Generation())
	}
	if _, ok := tx.Rejected(); ok {
		t.Error("a set that passed is rejected")
	}
	if _, err := tx.Apply(push(cred("b", "2"))); err != nil {
		t.Errorf("Apply after the trial: %v", err)
	}
}

func TestTrialFails(t *testing.T) {
	f := newFixture(t)
	f.apply(push(cred("a", "1"), cred("gone", "1"), cred("stays", "1")))
	bad := push(cred("a", "2"), cred("new", "2"), cred("stays", "1"))
	bad.Remove = []string{"gone"}
	bad.Install[0].Revision = "r2"
	f.apply(onTrial(bad, `1`))
	f.do("FailTrial", func(tx *Tx) error {
		res, err := tx.FailTrial("web.service failed", []byte(`2`))
		if res.Generation != 3 || !slices.Equal(res.Installed, []string{"a", "gone"}) || !slices.Equal(res.Removed, []string{"new"}) {
			t.Errorf("FailTrial = %+v", res)
		}
		return err
	})
	f.wantFiles(map[string]string{"run/credstore/a": "1", "run/credstore/gone": "1", "run/credstore/stays": "1"})
	f.do("EndTrial", func(tx *Tx) error {
		if string(tx.Trial()) != `2` {
			t.Errorf("Trial = %q, want the second note", tx.Trial())
		}
		if _, err := tx.Apply(push(cred("other", "1"))); !errors.Is(err, ErrOnTrial) {
			t.Errorf("Apply = %v, want ErrOnTrial until it has ended", err)
		}
		return tx.EndTrial()
	})
	if got := f.kept(rejectedDir); len(got) != 2 || got["a"] != "2" || got["new"] != "2" {
		t.Errorf("rejected = %q", got)
	}
	if got := f.kept(previousDir); len(got) != 0 {
		t.Errorf("previous = %q, want nothing: rolling back would bring the rejected set", got)
	}

	tx := f.begin()
	r, ok := tx.Rejected()
	if !ok || r.Generation != 2 || !slices.Equal(r.Names, []string{"a", "gone", "new"}) || r.Problem != "web.service failed" {
		t.Errorf("Rejected = %+v, %v", r, ok)
	}
	tx.Close()

	// It is refused as it was, and each part of it; so is removing what it removed.
	again := func() {
		t.Helper()
		tx := f.begin()
		defer tx.Close()
		_, err := tx.Apply(bad)
		refused, ok := errors.AsType[*RefusedError](err)
		if !ok || len(refused.Refusals) != 3 {
			t.Fatalf("Apply of the rejected set = %v, want three refusals", err)
		}
		for _, r := range refused.Refusals {
			if r.Reason != credential.ReasonRejected || !strings.Contains(r.Detail, "web.service failed") || !strings.Contains(r.Detail, "retry") {
				t.Errorf("refusal %s", r)
			}
		}
	}
	again()
	f.refused(push(cred("new", "2")), "new", credential.ReasonRejected)
	f.refused(Set{Source: credential.SourcePush, Remove: []string{"gone"}}, "gone", credential.ReasonRejected)
	// What has nothing to do with it, or is in force, passes, and rejects it still.
	f.apply(push(cred("other", "1"), cred("a", "1")))
	again()

	// One other value makes it another set, and the rejection is over.
	f.apply(push(cred("a", "3"), cred("new", "2")))
	if got := f.kept(rejectedDir); len(got) != 0 {
		t.Errorf("rejected = %q, want nothing", got)
	}
	tx = f.begin()
	defer tx.Close()
	if _, ok := tx.Rejected(); ok {
		t.Error("still rejected")
	}
	if _, err := tx.RejectedSet(); !errors.Is(err, ErrNothingRejected) {
		t.Errorf("RejectedSet = %v, want ErrNothingRejected", err)
	}
}

func TestRetry(t *testing.T) {
	f := newFixture(t)
	f.apply(push(cred("a", "1"), cred("gone", "1")))
	bad := push(cred("a", "2"))
	bad.Remove = []string{"gone"}
	f.apply(onTrial(bad, `1`))
	f.do("FailTrial", func(tx *Tx) error {
		_, err := tx.FailTrial("", []byte(`2`))
		return errors.Join(err, tx.EndTrial())
	})
	f.do("Apply", func(tx *Tx) error {
		set, err := tx.RejectedSet()
		if err != nil {
			return err
		}
		if set.Source != credential.SourcePush || len(set.Install) != 1 || !slices.Equal(set.Remove, []string{"gone"}) {
			t.Errorf("RejectedSet = %+v", set)
		}
		_, err = tx.Apply(set)
		return err
	})
	f.wantFiles(map[string]string{"run/credstore/a": "2"})
	if got := f.kept(rejectedDir); len(got) != 0 {
		t.Errorf("rejected = %q, want nothing", got)
	}
}

// Who loaded a value before it was in force is to be told apart by the clock:
// the time of a set is taken when all of it is in force, not before.
func TestInstalledUSec(t *testing.T) {
	f := newFixture(t)
	f.apply(push(cred("a", "1")))
	var last uint64
	f.s.step = func(at string) error {
		if at == "stamp" {
			last = MonotonicUSec()
		}
		return nil
	}
	f.apply(push(cred("b", "1")))
	f.s.step = nil
	tx := f.begin()
	es := tx.Entries()
	tx.Close()
	if a, b := es[0], es[1]; a.InstalledUSec == 0 || b.InstalledUSec < last || a.InstalledUSec >= b.InstalledUSec {
		t.Errorf("a was installed at %d µs, b at %d, after %d", a.InstalledUSec, b.InstalledUSec, last)
	}
	// It stays what it is, whatever comes later.
	f.apply(push(cred("c", "1")))
	tx = f.begin()
	defer tx.Close()
	for i, e := range tx.Entries()[:2] {
		if e.InstalledUSec != es[i].InstalledUSec {
			t.Errorf("%s was installed at %d µs, and later at %d", e.Name, es[i].InstalledUSec, e.InstalledUSec)
		}
	}
}

// A value that was opened stays what it was.
func TestOpen(t *testing.T) {
	f := newFixture(t)
	f.apply(push(cred("a", "1")))
	tx := f.begin()
	if _, _, err := tx.Open("b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open of what is not there = %v", err)
	}
	file, e, err := tx.Open("a")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if e.Name != "a" || e.Size != 1 || e.Generation != 1 {
		t.Errorf("Open = %+v", e)
	}
	tx.Close()
	set := push(cred("a", "2"))
	set.Forget = true
	f.apply(set)
	if b, err := io.ReadAll(file); err != nil || string(b) != "1" {
		t.Errorf("the open value = %q, %v", b, err)
	}
	tx = f.begin()
	defer tx.Close()
	f.write("run/credstore/a", "theirs")
	if _, _, err := tx.Open("a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open of somebody else's = %v", err)
	}
}

func TestDropPrevious(t *testing.T) {
	f := newFixture(t)
	f.apply(push(cred("a", "1")))
	f.apply(push(cred("a", "2")))
	f.do("DropPrevious", func(tx *Tx) error {
		e, ok := tx.PreviousEntry("a")
		if !tx.HasPrevious() || tx.ChangedUSec() == 0 || !ok || e.Generation != 1 {
			t.Errorf("PreviousEntry = %+v, %v", e, ok)
		}
		if !tx.HoldsPrevious("a", cred("", "1").Value) || tx.HoldsPrevious("a", cred("", "2").Value) {
			t.Error("HoldsPrevious does not tell the value")
		}
		return tx.DropPrevious()
	})
	if got := f.kept(previousDir); len(got) != 0 {
		t.Errorf("previous = %q", got)
	}
	tx := f.begin()
	defer tx.Close()
	if _, err := tx.Rollback(); !errors.Is(err, ErrNoPrevious) {
		t.Errorf("Rollback = %v, want ErrNoPrevious", err)
	}
}
