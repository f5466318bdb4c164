package credstore

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
)

// A set goes through these steps. "Prepare" takes all the space the set will
// ever need; from the journal's rename on, only names change.
//
//	prepare  stage/NAME  new values
//	         keep/NAME   second links to the values they replace
//	         state.next  the state afterwards
//	commit   journal.json, by rename: from here on the set is finished
//	finish   stage/NAME → NAME, or unlink NAME, for each
//	         the time into state.next, in place; state.next → state.json
//	         reject → rejected, if a trial failed
//	         keep → previous
//	         unlink journal.json
//
// Whoever finds a journal does "finish" again: each step of it may be repeated.
// Where a name turns out to be taken by somebody who came in between, the
// journal is renamed to journal.undo, and what was done is taken back, which
// may be repeated as well. Whoever finds neither removes stage and keep.

// A Result says what a set changed.
type Result struct {
	// Generation is the number of the set in force: one more than before where
	// values changed, the same where none did.
	Generation uint64
	// Installed have new bytes, Relabelled the same bytes and a new revision,
	// Removed are no longer there, and Unchanged were in force already.
	Installed, Relabelled, Removed, Unchanged []string
}

// Errors that callers tell apart.
var (
	// ErrNoPrevious is returned by Rollback where nothing is kept.
	ErrNoPrevious = errors.New("no previous generation is kept")
	// ErrOnTrial is returned where a set would change something while another
	// one is on trial.
	ErrOnTrial = errors.New("a set is on trial")
	// ErrNothingRejected is returned by RejectedSet where there is none.
	ErrNothingRejected = errors.New("no set was rejected")
)

// A change is one name's part of a set, checked.
type change struct {
	name   string
	record record // what the state will say; its file is not known yet
	value  secret.Value
	remove bool
	forget bool
}

// Apply puts the set in force, all of it or, with an error, nothing: a
// [RefusedError] for what stands in the way, or what the file system said. An
// error after the point of no return says so; the set is then finished by
// whoever opens the store next, and this Tx can only be closed. Applying what
// is in force already changes nothing.
func (t *Tx) Apply(set Set) (Result, error) {
	if err := t.writable(); err != nil {
		return Result{}, err
	}
	p, err := t.plan(set)
	if err != nil {
		return Result{}, err
	}
	switch {
	case len(p.changes) > 0:
		err = t.commit(p.next, p.changes, p.at)
	case p.noted:
		err = t.saveState(p.next)
	}
	if err != nil {
		return Result{}, err
	}
	return p.result, nil
}

// DryRun says what Apply would do with the set. It changes nothing.
func (t *Tx) DryRun(set Set) (Result, error) {
	p, err := t.plan(set)
	return p.result, err
}

// A plan is what becomes of a set.
type plan struct {
	result  Result
	next    state // but for the files, which commit knows
	changes []change
	noted   bool // next differs in more than values
	at      time.Time
}

func (t *Tx) plan(set Set) (plan, error) {
	if _, refusals := t.check(set); len(refusals) > 0 {
		return plan{}, &RefusedError{refusals}
	}
	p := plan{result: Result{Generation: t.st.Generation}, next: t.st.clone(), at: time.Now().UTC()}
	for _, c := range set.Install {
		if t.Holds(c.Name, c.Value) {
			old := t.st.Entries[c.Name]
			// A boot-time source does not relabel what came later, and a provider
			// takes over what it brings.
			taken := set.Source == credential.SourceProvider && (old.Source != set.Source || old.Ephemeral || old.Rejected != c.Rejected)
			if old.Revision == c.Revision && !taken || set.Source == credential.SourceSMBIOS {
				p.result.Unchanged = append(p.result.Unchanged, c.Name)
				continue
			}
			old.Revision, old.Source, old.Ephemeral, old.Rejected = c.Revision, set.Source, set.overrides(old), c.Rejected
			p.next.Entries[c.Name] = old
			p.noted = true
			p.result.Relabelled = append(p.result.Relabelled, c.Name)
			continue
		}
		r := record{
			Revision: c.Revision, Source: set.Source, Generation: t.st.Generation + 1, InstalledAt: p.at,
			Ephemeral: set.overrides(t.st.Entries[c.Name]), Rejected: c.Rejected,
		}
		p.changes = append(p.changes, change{name: c.Name, record: r, value: c.Value, forget: set.forgets()})
		p.result.Installed = append(p.result.Installed, c.Name)
	}
	for _, name := range set.Remove {
		if _, ok := t.st.Entries[name]; ok {
			p.changes = append(p.changes, change{name: name, remove: true, forget: set.forgets()})
			p.result.Removed = append(p.result.Removed, name)
			continue
		}
		// Removing what is not there is remembered too: SMBIOS may bring it.
		if _, ok := p.next.Removed[name]; !ok {
			p.next.Removed[name] = tombstone{Generation: t.st.Generation, At: p.at}
			p.noted = true
		}
		p.result.Unchanged = append(p.result.Unchanged, name)
	}
	if len(p.changes) == 0 {
		return p, nil
	}
	if t.st.Trial != nil {
		return plan{}, ErrOnTrial
	}
	p.result.Generation++
	p.next.Trial = set.Trial
	if p.next.Rejected.concerns(p.changes) {
		p.next.Rejected = nil
	}
	return p, nil
}

// commit puts changes in force, and next, which it completes, as the state.
// What the changes take out of force is kept as the previous generation; if
// next has this set's rejection, as rejected values.
func (t *Tx) commit(next state, changes []change, now time.Time) (err error) {
	j := journal{Version: stateVersion, Generation: t.st.Generation + 1}
	next.Generation = j.Generation
	next.Previous = past{Generation: t.st.Generation, Entries: map[string]*record{}}
	defer func() {
		if err != nil {
			err = fmt.Errorf("applying generation %d: %w", j.Generation, err)
		}
	}()

	if err := t.prepare(&next, &j, changes, now); err != nil {
		return errors.Join(err, t.clean())
	}
	at, err := t.finish(j)
	if err != nil {
		refused := (*RefusedError)(nil)
		t.failed = !errors.As(err, &refused)
		return err
	}
	next.stamp(at)
	t.st = next
	return t.dropUnkept()
}

func (t *Tx) prepare(next *state, j *journal, changes []change, now time.Time) error {
	stage, err := t.mkSub(stageDir)
	if err != nil {
		return err
	}
	defer stage.close()
	keep, err := t.mkSub(keepDir)
	if err != nil {
		return err
	}
	defer keep.close()
	reject := noDir
	if next.Rejected != t.st.Rejected && next.Rejected != nil {
		if reject, err = t.mkSub(rejectDir); err != nil {
			return err
		}
		defer reject.close()
	}

	for _, c := range changes {
		o := op{Name: c.name, Forget: c.forget}
		next.Previous.Entries[c.name] = nil
		if old, ok := t.st.Entries[c.name]; ok {
			next.Previous.Entries[c.name] = &old
			o.Old = &old.File
			if err := t.at("keep"); err != nil {
				return err
			}
			// A file that somebody removed is not kept, only forgotten.
			if err := link(t.dir, c.name, keep, c.name); errors.Is(err, fs.ErrNotExist) {
				next.Previous.Entries[c.name], o.Old = nil, nil
			} else if err != nil {
				return err
			}
			if r := next.Rejected; reject != noDir && o.Old != nil && r.Entries[c.name] != nil {
				if err := t.at("reject"); err != nil {
					return err
				}
				if err := link(keep, c.name, reject, c.name); err != nil {
					return err
				}
			}
		}
		if c.remove {
			delete(next.Entries, c.name)
			next.Removed[c.name] = tombstone{Generation: j.Generation, At: now}
		} else {
			if err := t.at("stage"); err != nil {
				return err
			}
			id, err := stage.create(c.name, 0o400, c.value.Bytes())
			if err != nil {
				return err
			}
			o.New = &id
			c.record.File = id
			next.Entries[c.name] = c.record
			delete(next.Removed, c.name)
		}
		if c.forget {
			delete(next.Previous.Entries, c.name)
		}
		j.Ops = append(j.Ops, o)
	}

	b, err := encode(next)
	if err != nil {
		return err
	}
	if err := t.at("next"); err != nil {
		return err
	}
	if _, err := t.own.create(nextFile, 0o600, b); err != nil {
		return err
	}
	if b, err = encode(j); err != nil {
		return err
	}
	if err := t.at("journal"); err != nil {
		return err
	}
	if _, err := t.own.create(journalFile+tmpSuffix, 0o600, b); err != nil {
		return err
	}
	if err := t.at("commit"); err != nil {
		return err
	}
	return rename(t.own, journalFile+tmpSuffix, t.own, journalFile, false)
}

// finish does what the journal says, and returns when that was in force. It may
// be repeated after any of its steps.
func (t *Tx) finish(j journal) (stamp, error) {
	if err := t.install(j); err != nil {
		return 0, err
	}
	at, err := t.record()
	if err != nil {
		return 0, unfinished(err)
	}
	if err := t.keep(j); err != nil {
		return 0, unfinished(err)
	}
	if err := t.at("done"); err != nil {
		return 0, unfinished(err)
	}
	if err := t.own.unlink(journalFile); err != nil {
		return 0, unfinished(err)
	}
	// The set is in force and recorded: what is left to tidy is no reason to
	// report otherwise, and the next one who opens the store tidies again.
	_ = t.clean()
	return at, nil
}

// install brings every name to where the journal wants it, or takes the set back.
func (t *Tx) install(j journal) error {
	stage, err := t.own.sub(stageDir, true)
	if err != nil {
		return err
	}
	defer stage.close()
	for _, o := range j.Ops {
		if err := t.at("install"); err != nil {
			return unfinished(err)
		}
		switch err := t.do(o, stage); {
		case errors.Is(err, fs.ErrExist):
			// Somebody took the name since it was checked.
			if err := rename(t.own, journalFile, t.own, undoFile, false); err != nil {
				return unfinished(err)
			}
			if err := t.undo(j); err != nil {
				return unfinished(err)
			}
			return &RefusedError{[]credential.Refusal{{
				Name: o.Name, Reason: credential.ReasonForeign,
				Detail: "somebody made a file of that name while the set was being applied; remove it or choose another name",
			}}}
		case err != nil:
			return unfinished(err)
		}
	}
	return nil
}

// record puts the next state in force, with the time, which it returns.
func (t *Tx) record() (stamp, error) {
	if err := t.at("stamp"); err != nil {
		return 0, err
	}
	at := stamp(MonotonicUSec())
	err := t.own.overwrite(nextFile, stampOffset, at.digits())
	if errors.Is(err, fs.ErrNotExist) {
		return at, nil // done before, and what it says is earlier
	}
	if err != nil {
		return 0, err
	}
	if err := t.at("state"); err != nil {
		return 0, err
	}
	return at, rename(t.own, nextFile, t.own, stateFile, false)
}

// keep puts aside what went out of force.
func (t *Tx) keep(j journal) error {
	if err := t.move(rejectDir, rejectedDir); err != nil {
		return err
	}
	keep, err := t.own.sub(keepDir, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // done before
	}
	if err != nil {
		return err
	}
	defer keep.close()
	for _, o := range j.Ops {
		if !o.Forget {
			continue
		}
		if err := t.at("forget"); err != nil {
			return err
		}
		if err := keep.unlink(o.Name); err != nil {
			return err
		}
	}
	return t.move(keepDir, previousDir)
}

// move puts the folder from, if it is there, in the place of to.
func (t *Tx) move(from, to string) error {
	d, err := t.own.sub(from, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	d.close()
	if err := t.at("drop"); err != nil {
		return err
	}
	if err := t.own.removeSub(to); err != nil {
		return err
	}
	if err := t.at("move"); err != nil {
		return err
	}
	return rename(t.own, from, t.own, to, false)
}

func unfinished(err error) error {
	return fmt.Errorf("%w; the set is half in force, and whoever opens the store next finishes it", err)
}

// do brings one name to where the journal wants it. An error that matches
// fs.ErrExist means that somebody else has the name.
func (t *Tx) do(o op, stage dir) error {
	id, err := t.dir.stat(o.Name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	exists := err == nil
	ours := exists && o.Old != nil && id.same(*o.Old)
	if o.New == nil {
		if ours {
			return t.dir.unlink(o.Name)
		}
		return nil
	}
	switch _, err := stage.stat(o.Name); {
	case errors.Is(err, fs.ErrNotExist):
		return nil // done before, whatever became of the file since
	case err != nil:
		return err
	case exists && !ours:
		return fs.ErrExist
	}
	return rename(stage, o.Name, t.dir, o.Name, !ours)
}

// undo takes back what finish did of the journal. It may be repeated after any
// of its steps.
func (t *Tx) undo(j journal) error {
	keep, err := t.own.sub(keepDir, true)
	if err != nil {
		return err
	}
	defer keep.close()
	for _, o := range slices.Backward(j.Ops) {
		if err := t.at("undo"); err != nil {
			return err
		}
		id, err := t.dir.stat(o.Name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		exists := err == nil
		installed := exists && o.New != nil && id.same(*o.New)
		switch {
		case installed && o.Old == nil:
			if err := t.dir.unlink(o.Name); err != nil {
				return err
			}
		case o.Old != nil && (installed || !exists):
			// Missing in keep: an earlier attempt has put it back already.
			err := rename(keep, o.Name, t.dir, o.Name, !installed)
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
				return err
			}
		}
	}
	if err := t.at("undone"); err != nil {
		return err
	}
	// The journal goes last: without it nobody would know keep's meaning.
	if err := t.own.unlink(undoFile); err != nil {
		return err
	}
	return t.clean()
}

// recover finishes or takes back what a killed process left.
func (t *Tx) recover() error {
	version := func(j *journal) int { return j.Version }
	j, err := load(t.own, undoFile, version)
	if err == nil {
		return t.undo(j)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	j, err = load(t.own, journalFile, version)
	if err == nil {
		_, err = t.finish(j)
		if refused := (*RefusedError)(nil); errors.As(err, &refused) {
			return nil // taken back; the state in force is the old one
		}
		return err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return t.clean()
}

// clean removes what a set needs before it is committed. It must not be called
// while there is a journal.
func (t *Tx) clean() error {
	var errs []error
	for _, name := range []string{nextFile, nextFile + tmpSuffix, journalFile + tmpSuffix, stateFile + tmpSuffix} {
		errs = append(errs, t.own.unlink(name))
	}
	for _, n := range notes {
		errs = append(errs, t.own.unlink(string(n)+tmpSuffix))
	}
	return errors.Join(append(errs, t.own.removeSub(stageDir), t.own.removeSub(keepDir), t.own.removeSub(rejectDir))...)
}

// dropUnkept removes values that the state no longer knows. It is done after
// the state was written: a process that is killed in between leaves them to
// the next one.
func (t *Tx) dropUnkept() error {
	if len(t.st.Previous.Entries) == 0 {
		if err := t.own.removeSub(previousDir); err != nil {
			return err
		}
	}
	if t.st.Rejected == nil {
		return t.own.removeSub(rejectedDir)
	}
	return nil
}

// saveState writes a state in which no value changed.
func (t *Tx) saveState(next state) error {
	b, err := encode(next)
	if err != nil {
		return err
	}
	if err := t.at("save"); err != nil {
		return err
	}
	if err := t.own.replace(stateFile, 0o600, b); err != nil {
		return err
	}
	t.st = next
	return nil
}

// mkSub makes a folder for a set; what an earlier one left there goes first.
func (t *Tx) mkSub(name string) (dir, error) {
	if err := t.own.removeSub(name); err != nil {
		return noDir, err
	}
	return t.own.sub(name, true)
}

func (t *Tx) writable() error {
	if t.failed {
		return errors.New("an earlier set of this transaction is half in force; close it and begin anew")
	}
	if t.readOnly {
		return errReadOnly
	}
	return nil
}

func (t *Tx) at(step string) error {
	if t.s.step == nil {
		return nil
	}
	return t.s.step(step)
}
