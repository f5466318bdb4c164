package credstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
)

// Rollback puts back what the last set replaced: the bytes, the revisions and
// the sources, as a new generation. Rolling back twice is back where it began.
func (t *Tx) Rollback() (Result, error) {
	if err := t.writable(); err != nil {
		return Result{}, err
	}
	if t.st.Trial != nil {
		return Result{}, ErrOnTrial
	}
	return t.back(t.st.clone(), false)
}

// back puts back what the last set replaced. Next is the state afterwards, but
// for what follows from the values.
func (t *Tx) back(next state, forget bool) (Result, error) {
	if len(t.st.Previous.Entries) == 0 {
		return Result{}, ErrNoPrevious
	}
	prev, err := t.own.sub(previousDir, false)
	if err != nil {
		return Result{}, fmt.Errorf("rolling back: %w", err)
	}
	defer prev.close()
	res := Result{Generation: t.st.Generation + 1}
	now := time.Now().UTC()
	var changes []change
	defer func() {
		for _, c := range changes {
			c.value.Wipe()
		}
	}()
	var refusals []credential.Refusal
	check := newChecker(t)
	for _, name := range slices.Sorted(maps.Keys(t.st.Previous.Entries)) {
		if reason, detail := check.foreign(name); reason != "" {
			refusals = append(refusals, credential.Refusal{Name: name, Reason: reason, Detail: detail})
			continue
		}
		old := t.st.Previous.Entries[name]
		if old == nil {
			if _, ok := t.st.Entries[name]; ok {
				changes = append(changes, change{name: name, remove: true, forget: forget})
				res.Removed = append(res.Removed, name)
			}
			continue
		}
		b, _, err := prev.read(name, credential.MaxSize)
		if err != nil {
			return Result{}, fmt.Errorf("rolling back: %w", err)
		}
		r := *old
		r.Generation, r.InstalledAt = res.Generation, now
		if !forget && t.st.Entries[name].managed() && !r.managed() {
			r.Ephemeral = true // what a provider manages stays its own
		}
		changes = append(changes, change{name: name, record: r, value: secret.New(b), forget: forget})
		res.Installed = append(res.Installed, name)
	}
	if len(refusals) > 0 {
		return Result{}, &RefusedError{refusals}
	}
	if len(changes) == 0 {
		return Result{}, ErrNoPrevious
	}
	if next.Rejected == t.st.Rejected && next.Rejected.concerns(changes) {
		next.Rejected = nil
	}
	if err := t.commit(next, changes, now); err != nil {
		return Result{}, err
	}
	return res, nil
}

// PreviousEntry returns what the store knows of the value of name that the last
// set replaced, as it was when it was in force.
func (t *Tx) PreviousEntry(name string) (Entry, bool) {
	r := t.st.Previous.Entries[name]
	if r == nil {
		return Entry{}, false
	}
	return t.entry(name, *r), true
}

// HoldsPrevious reports whether the value of name that the last set replaced is
// v. The time it takes tells the length of v and no more.
func (t *Tx) HoldsPrevious(name string, v secret.Value) bool {
	r := t.st.Previous.Entries[name]
	return r != nil && t.keeps(previousDir, name, r, v)
}

// keeps reports whether the folder has v as the value of name.
func (t *Tx) keeps(folder, name string, r *record, v secret.Value) bool {
	if r.File.Size != int64(v.Len()) {
		return false
	}
	d, err := t.own.sub(folder, false)
	if err != nil {
		return false
	}
	defer d.close()
	b, _, err := d.read(name, credential.MaxSize)
	defer secret.Zero(b)
	return err == nil && secret.New(b).Equal(v)
}

// HasPrevious reports whether anything is kept for Rollback. That was replaced
// at [Tx.ChangedUSec].
func (t *Tx) HasPrevious() bool { return len(t.st.Previous.Entries) > 0 }

// ChangedUSec is when a set last changed a value, on CLOCK_MONOTONIC in
// microseconds; 0 where none has.
func (t *Tx) ChangedUSec() uint64 { return uint64(t.st.Stamp) }

// DropPrevious keeps nothing for Rollback any more. It must not be called while
// a set is on trial.
func (t *Tx) DropPrevious() error {
	if err := t.writable(); err != nil {
		return err
	}
	if t.st.Trial != nil {
		return ErrOnTrial
	}
	next := t.st.clone()
	next.Previous.Entries = map[string]*record{}
	return t.settle(next)
}

// settle writes a state that knows of fewer values, and removes them.
func (t *Tx) settle(next state) error {
	if err := t.saveState(next); err != nil {
		return err
	}
	return t.dropUnkept()
}

// Trial returns the note on the set that is on trial, nil where none is. While
// there is one, nothing else changes a value: the note is put in force together
// with its set, and goes with [Tx.PassTrial], or with [Tx.FailTrial] and
// [Tx.EndTrial], which may be the work of another process than began it.
func (t *Tx) Trial() []byte { return t.st.Trial }

// Changed returns the names that the last set changed, as far as its previous
// values are kept, and those of them that it removed.
func (t *Tx) Changed() (changed, removed []string) {
	for _, name := range slices.Sorted(maps.Keys(t.st.Previous.Entries)) {
		changed = append(changed, name)
		if _, ok := t.st.Entries[name]; !ok {
			removed = append(removed, name)
		}
	}
	return changed, removed
}

// SetTrial replaces the note.
func (t *Tx) SetTrial(note []byte) error {
	if err := t.writable(); err != nil {
		return err
	}
	if t.st.Trial == nil {
		return errNoTrial
	}
	next := t.st.clone()
	next.Trial = json.RawMessage(note)
	return t.saveState(next)
}

// PassTrial ends the trial: the set stays, and nothing is kept for Rollback.
func (t *Tx) PassTrial() error {
	if err := t.writable(); err != nil {
		return err
	}
	next := t.st.clone()
	next.Trial = nil
	next.Previous.Entries = map[string]*record{}
	return t.settle(next)
}

// FailTrial takes the set on trial back, as Rollback does, and rejects it:
// [Tx.Apply] then refuses it, until one of its names has another value, or the
// set says Retry. The trial goes on, with another note, for whatever is to be
// done before other sets may follow. Problem is one line for people, without a
// value in it.
func (t *Tx) FailTrial(problem string, note []byte) (Result, error) {
	if err := t.writable(); err != nil {
		return Result{}, err
	}
	if t.st.Trial == nil {
		return Result{}, errNoTrial
	}
	next := t.st.clone()
	next.Trial = json.RawMessage(note)
	next.Rejected = &rejection{
		Generation: t.st.Generation, At: time.Now().UTC(), Problem: problem, Entries: map[string]*record{},
	}
	for name := range t.st.Previous.Entries {
		next.Rejected.Entries[name] = nil
		if r, ok := t.st.Entries[name]; ok {
			next.Rejected.Entries[name] = &r
		}
	}
	return t.back(next, true)
}

// EndTrial ends the trial. What is kept for Rollback stays.
func (t *Tx) EndTrial() error {
	if err := t.writable(); err != nil {
		return err
	}
	next := t.st.clone()
	next.Trial = nil
	return t.saveState(next)
}

var errNoTrial = errors.New("no set is on trial")

// A Rejection tells of a set that failed its trial.
type Rejection struct {
	Generation uint64    `json:"generation"` // that it had
	At         time.Time `json:"at"`         // when it was taken back
	Names      []string  `json:"names"`      // that it changed, sorted
	Problem    string    `json:"problem"`
}

// Rejected tells of the last set that failed its trial, unless one of its names
// has got another value since; false where there is none.
func (t *Tx) Rejected() (Rejection, bool) {
	r := t.st.Rejected
	if r == nil {
		return Rejection{}, false
	}
	return Rejection{Generation: r.Generation, At: r.At, Names: slices.Sorted(maps.Keys(r.Entries)), Problem: r.Problem}, true
}

// RejectedSet returns the set that failed its trial, to be applied again. Its
// source is that of its values. The caller wipes them. The error matches
// [ErrNothingRejected] where there is none.
func (t *Tx) RejectedSet() (_ Set, err error) {
	if t.st.Rejected == nil {
		return Set{}, ErrNothingRejected
	}
	d, err := t.own.sub(rejectedDir, false)
	if err != nil {
		return Set{}, fmt.Errorf("reading the rejected set: %w", err)
	}
	defer d.close()
	set := Set{Retry: true, Ephemeral: true} // what was allowed once
	defer func() {
		if err != nil {
			for _, c := range set.Install {
				c.Value.Wipe()
			}
		}
	}()
	for _, name := range slices.Sorted(maps.Keys(t.st.Rejected.Entries)) {
		r := t.st.Rejected.Entries[name]
		if r == nil {
			set.Remove = append(set.Remove, name)
			continue
		}
		b, _, err := d.read(name, credential.MaxSize)
		if errors.Is(err, fs.ErrNotExist) {
			continue // somebody had removed it before it was taken back
		}
		if err != nil {
			return set, fmt.Errorf("reading the rejected set: %w", err)
		}
		// It was allowed where it was applied; whether it is still shadowed is
		// what its state says.
		set.Install = append(set.Install, Credential{Name: name, Revision: r.Revision, Value: secret.New(b), AllowShadowed: true})
		set.Source = r.Source
	}
	return set, nil
}

// rejectedAgain returns the names of the set that were rejected, if it is the
// rejected set once more: it has some of its names, and each of them as it was.
func (t *Tx) rejectedAgain(set Set) map[string]bool {
	if t.st.Rejected == nil || set.Retry {
		return nil
	}
	again := map[string]bool{}
	for _, c := range set.Install {
		r, ok := t.st.Rejected.Entries[c.Name]
		if !ok {
			continue
		}
		if r == nil || !t.keeps(rejectedDir, c.Name, r, c.Value) {
			return nil
		}
		again[c.Name] = true
	}
	for _, name := range set.Remove {
		r, ok := t.st.Rejected.Entries[name]
		if !ok {
			continue
		}
		if r != nil {
			return nil
		}
		again[name] = true
	}
	return again
}

// concerns reports whether the changes are about a name that was rejected.
func (r *rejection) concerns(changes []change) bool {
	return r != nil && slices.ContainsFunc(changes, func(c change) bool {
		_, ok := r.Entries[c.name]
		return ok
	})
}

func (r *rejection) detail(what string) string {
	return fmt.Sprintf("generation %d %s, and was rolled back by its gate: %s; change the value, or have the set tried again with guestctl retry", r.Generation, what, r.Problem)
}
