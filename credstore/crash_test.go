package credstore

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/guestagent/guestagent/internal/credential"
)

// TestMain lets the test binary be the process that is killed.
func TestMain(m *testing.M) {
	if top := os.Getenv("CREDSTORE_CRASH_DIR"); top != "" {
		crash(top)
		return
	}
	os.Exit(m.Run())
}

const intruder = "somebody else's"

// phaseSet is the set that leads to phase p. Four names change in each phase,
// one comes and one goes, and one stays as it is. Each fourth set forgets.
func phaseSet(p int) Set {
	value := func(name string) Credential {
		return cred(name, fmt.Sprintf("%d %s", p, strings.Repeat(name, 1+p%7*300)))
	}
	return Set{
		Source:  credential.SourcePush,
		Install: []Credential{value("a"), value("b"), value("c"), value("d"), value([]string{"even", "odd"}[p%2]), cred("stays", "the same")},
		Remove:  []string{[]string{"even", "odd"}[(p+1)%2]},
		Forget:  p%4 == 0,
	}
}

// phaseOf reads the phase out of a value.
func phaseOf(b []byte) (int, error) {
	n, _, _ := bytes.Cut(b, []byte(" "))
	return strconv.Atoi(string(n))
}

// crash applies three sets, one of them a rollback now and then, or on trial,
// and kills itself before the change that the environment names. It may have a
// foreign file appear in the middle of a set.
func crash(top string) {
	die := func(err error) {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(1)
	}
	kill, err := strconv.Atoi(os.Getenv("CREDSTORE_CRASH_STEP"))
	if err != nil {
		die(err)
	}
	intrude := os.Getenv("CREDSTORE_CRASH_INTRUDE") != ""
	s := New(Config{Dir: filepath.Join(top, "run/credstore")})
	steps, next := 0, 0
	s.step = func(at string) error {
		if steps++; steps == kill {
			if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
				die(err)
			}
			select {}
		}
		if at == "install" && intrude && next != 0 {
			intrude = false
			path := filepath.Join(top, "run/credstore", []string{"even", "odd"}[next%2])
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if errors.Is(err, fs.ErrExist) {
				return nil
			}
			if err == nil {
				_, err = f.WriteString(intruder)
			}
			if err != nil {
				die(err)
			}
		}
		return nil
	}
	for i := range 3 {
		tx, err := s.Begin()
		if err != nil {
			die(err)
		}
		switch {
		case tx.Trial() != nil && kill%2 == 0:
			err = tx.PassTrial()
		case tx.Trial() != nil:
			// A note that says that it is to be ended is all that is left to do.
			if string(tx.Trial()) != `"failed"` {
				_, err = tx.FailTrial("it was on trial", []byte(`"failed"`))
			}
			if err == nil {
				err = tx.EndTrial()
			}
		case i == 1 && kill%3 == 0:
			_, err = tx.Rollback()
		default:
			next = 1
			if b, _, err := tx.dir.read("a", credential.MaxSize); err == nil {
				if next, err = phaseOf(b); err != nil {
					die(err)
				}
				next++
			}
			set := phaseSet(next)
			set.Retry = kill%5 == 0
			if kill%7 < 4 {
				set.Trial = []byte(`"on trial"`)
			}
			_, err = tx.Apply(set)
			if refused, ok := errors.AsType[*RefusedError](err); ok && refused.Refusals[0].Reason == credential.ReasonRejected {
				next++
				_, err = tx.Apply(phaseSet(next))
			}
		}
		if refused := (*RefusedError)(nil); err != nil && !errors.As(err, &refused) && !errors.Is(err, ErrNoPrevious) {
			die(err)
		}
		tx.Close()
	}
}

// Thousands of kills, before every single change to the file system that an
// apply, a rollback, taking a set back, or a recovery makes. Whatever was
// going on, whoever opens the store next finds one whole set.
func TestKilledAtEveryStep(t *testing.T) {
	rounds := 2500
	if testing.Short() {
		rounds = 100
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f := newFixture(t)
	f.write("run/credstore/theirs", "foreign")
	f.write("run/credstore/.theirs", "hidden")
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	killed, finished, taken := 0, 0, 0
	for i := range rounds {
		cmd := exec.Command(self)
		step := 1 + i%75
		cmd.Env = append(os.Environ(), "CREDSTORE_CRASH_DIR="+f.top, fmt.Sprintf("CREDSTORE_CRASH_STEP=%d", step))
		if rng.IntN(3) == 0 {
			cmd.Env = append(cmd.Env, "CREDSTORE_CRASH_INTRUDE=1")
		}
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		switch {
		case err == nil:
			finished++
		case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL:
			killed++
		default:
			t.Fatalf("round %d, step %d: %v\n%s", i, step, err, out)
		}
		// Now and then the next child recovers, and is killed while it does.
		if rng.IntN(4) != 0 {
			if tookBack := f.wantWhole(); tookBack {
				taken++
			}
		}
		if t.Failed() {
			t.Fatalf("round %d, killed at step %d", i, step)
		}
	}
	f.wantWhole()
	t.Logf("%d killed, %d ran to their end, %d sets met an intruder", killed, finished, taken)
	if killed < rounds/2 || taken == 0 {
		t.Errorf("killed %d of %d, %d intruders: the test does not test what it says", killed, rounds, taken)
	}
}

// wantWhole opens the store, which recovers it, and checks that what is in
// force and what is kept for rollback are each one whole set, and that nothing
// else was left or touched. An intruder's file is removed for the next round.
func (f *fixture) wantWhole() (intruded bool) {
	f.t.Helper()
	tx := f.begin()
	defer tx.Close()

	for _, name := range []string{"even", "odd"} {
		if b, err := os.ReadFile(filepath.Join(f.dir, name)); err == nil && string(b) == intruder {
			intruded = true
			if _, ok := tx.st.Entries[name]; ok {
				f.t.Errorf("%s is an intruder's and the store's", name)
			}
			if err := os.Remove(filepath.Join(f.dir, name)); err != nil {
				f.t.Fatal(err)
			}
		}
	}
	check := func(what string, phases map[string]int) {
		if len(phases) == 0 {
			return
		}
		p, ok := phases["a"]
		if !ok {
			f.t.Errorf("%s has no a: %v", what, phases)
		}
		want := []string{"a", "b", "c", "d", []string{"even", "odd"}[p%2]}
		for _, name := range want {
			if phases[name] != p {
				f.t.Errorf("%s mixes sets: %v", what, phases)
			}
		}
		if len(phases) != len(want) {
			f.t.Errorf("%s mixes sets: %v", what, phases)
		}
	}
	read := func(d dir, name string, id identity) int {
		b, got, err := d.read(name, credential.MaxSize)
		if err != nil || !got.same(id) {
			f.t.Errorf("reading %s: %v, or another file", name, err)
			return -1
		}
		p, err := phaseOf(b)
		if err != nil {
			f.t.Error(err)
		}
		for _, c := range phaseSet(p).Install {
			if c.Name == name && !bytes.Equal(c.Value.Bytes(), b) {
				f.t.Errorf("%s holds half a value: %d bytes", name, len(b))
			}
		}
		return p
	}
	inForce := map[string]int{}
	for name, r := range tx.st.Entries {
		if name != "stays" {
			inForce[name] = read(tx.dir, name, r.File)
		}
	}
	check("what is in force", inForce)

	if prev, err := tx.own.sub(previousDir, false); err == nil {
		kept := map[string]int{}
		for name, r := range tx.st.Previous.Entries {
			if r != nil && name != "stays" {
				kept[name] = read(prev, name, r.File)
			}
		}
		check("what is kept", kept)
		names, err := prev.list()
		if err != nil || len(names) != len(kept) {
			f.t.Errorf("previous holds %v, %v, want %v", names, err, kept)
		}
		prev.close()
	}
	owned := []string{lockFile, stateFile, previousDir}
	if r := tx.st.Rejected; r != nil {
		owned = append(owned, rejectedDir)
		rejected := map[string]int{}
		d, err := tx.own.sub(rejectedDir, false)
		if err != nil {
			f.t.Fatal(err)
		}
		for name, r := range r.Entries {
			if r != nil {
				rejected[name] = read(d, name, r.File)
			}
		}
		check("what was rejected", rejected)
		d.close()
	}
	for name, r := range tx.st.Entries {
		if r.InstalledUSec == 0 || r.InstalledUSec > MonotonicUSec() {
			f.t.Errorf("%s was installed at %d µs", name, r.InstalledUSec)
		}
	}

	own, err := tx.own.list()
	if err != nil {
		f.t.Fatal(err)
	}
	for _, name := range own {
		if !slices.Contains(owned, name) {
			f.t.Errorf("%s is left in the store's folder", name)
		}
	}
	files, err := tx.dir.list()
	if err != nil {
		f.t.Fatal(err)
	}
	for _, name := range files {
		if _, ok := tx.st.Entries[name]; !ok && name != "theirs" && name != ".theirs" && name != ownDir {
			f.t.Errorf("%s is left in the store", name)
		}
	}
	for name, want := range map[string]string{"theirs": "foreign", ".theirs": "hidden"} {
		if b, err := os.ReadFile(filepath.Join(f.dir, name)); err != nil || string(b) != want {
			f.t.Errorf("somebody's %s = %q, %v", name, b, err)
		}
	}
	return intruded
}

// Every change to the file system fails once, as it does where the file system
// is full or broken. Before the point of no return the old set stays and
// nothing is left; after it the next one who opens the store finishes the set.
func TestFailureAtEveryStep(t *testing.T) {
	broken := errors.New("no space left")
	committed := false
	for n := 1; ; n++ {
		f := newFixture(t)
		f.write("run/credstore/theirs", "foreign")
		f.write("run/credstore/.theirs", "hidden")
		f.apply(phaseSet(1))
		step, at := 0, ""
		f.s.step = func(s string) error {
			if step++; step == n {
				at = s
				return broken
			}
			return nil
		}
		tx := f.begin()
		_, err := tx.Apply(phaseSet(2))
		if at == "" {
			if err != nil {
				t.Fatalf("Apply without a failure = %v", err)
			}
			if n < 15 {
				t.Errorf("only %d steps", n)
			}
			break
		}
		if !errors.Is(err, broken) {
			t.Fatalf("Apply, failing at %q = %v, want that failure", at, err)
		}
		// From the first rename on the set is bound to get through.
		committed = committed || at == "install"
		if committed {
			if !strings.Contains(err.Error(), "half in force") {
				t.Errorf("Apply, failing at %q = %v, want it to say what is in force", at, err)
			}
			if _, err := tx.Apply(phaseSet(3)); err == nil {
				t.Error("Apply after that succeeded on the same Tx")
			}
		}
		tx.Close()
		f.s.step = nil
		f.wantWhole()
		want := map[bool]string{false: "1", true: "2"}[committed]
		if got := f.tree()["run/credstore/a"]; !strings.HasPrefix(got, want+" ") {
			t.Errorf("failing at %q left phase %.1q, want %s", at, got, want)
		}
	}
}

// A file of somebody else's that appears between the check and the rename is
// not replaced, and the whole set is taken back.
func TestIntruder(t *testing.T) {
	f := newFixture(t)
	f.apply(push(cred("a", "1"), cred("gone", "1")))
	f.s.step = func(at string) error {
		if at == "install" {
			f.write("run/credstore/new", intruder)
		}
		return nil
	}
	tx := f.begin()
	_, err := tx.Apply(Set{Install: []Credential{cred("a", "2"), cred("new", "2")}, Remove: []string{"gone"}})
	var refused *RefusedError
	if !errors.As(err, &refused) || refused.Refusals[0].Name != "new" || refused.Refusals[0].Reason != credential.ReasonForeign {
		t.Errorf("Apply = %v, want new refused as foreign", err)
	}
	if len(tx.Entries()) != 2 || tx.Generation() != 1 {
		t.Errorf("entries %v, generation %d, want the old ones", tx.Entries(), tx.Generation())
	}
	f.wantFiles(map[string]string{"run/credstore/a": "1", "run/credstore/gone": "1", "run/credstore/new": intruder})
	// The same transaction is still good.
	f.s.step = nil
	if _, err := tx.Apply(push(cred("a", "3"))); err != nil {
		t.Errorf("Apply after that: %v", err)
	}
}

// Writers from several goroutines, each with a transaction of its own, go one
// after the other.
func TestConcurrentWriters(t *testing.T) {
	f := newFixture(t)
	const writers, each = 8, 10
	errs := make(chan error)
	for range writers {
		go func() {
			var err error
			for i := range each {
				tx, e := f.s.Begin()
				if e != nil {
					err = e
					break
				}
				_, e = tx.Apply(phaseSet(1 + i))
				tx.Close()
				if e != nil {
					err = e
				}
			}
			errs <- err
		}()
	}
	for range writers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	f.write("run/credstore/theirs", "foreign")
	f.write("run/credstore/.theirs", "hidden")
	f.wantWhole()
}
