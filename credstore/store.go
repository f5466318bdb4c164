// Package credstore keeps credentials as plain files in a folder where systemd
// looks them up, normally /run/credstore, and changes them in sets.
//
// Guarantees:
//
//   - A set is applied whole or not at all, also across SIGKILL at any point:
//     whoever opens the store next finishes the set or takes it back.
//   - A consumer that starts sees the old file or the new one, never half of
//     one, and no glob of systemd matches a temporary file.
//   - Only names that the store installed are touched. A name that is somebody
//     else's, that systemd would look up elsewhere first, or that the encrypted
//     store has, is refused with the path that stands in the way.
//   - One writer at a time, among all processes: flock.
//   - The values that the last set replaced are kept, for [Tx.Rollback], until
//     [Tx.DropPrevious].
//   - A set may be on trial: no other set changes anything until the caller says
//     what became of it. One that failed is taken back, kept aside, and refused
//     when it comes again.
//   - Nothing but the credentials' own files holds a value: no state, no error.
//
// It does not survive a reboot and does not try to: nothing is synced, since
// the folder lies in memory. It does not log, and knows no network. It trusts
// root, who can write to the folder, but not the order in which root does so.
package credstore

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
)

// A Place is a folder that systemd searches besides the store.
type Place struct {
	// Dir is where to look.
	Dir string
	// As is what to call Dir when speaking of it, for processes that see it
	// under another path than everybody else; Dir where empty.
	As string
}

// Path is what to call the place's file of that name.
func (p Place) Path(name string) string { return filepath.Join(cmp.Or(p.As, p.Dir), name) }

// A Config says where a store is. The zero value is of no use: Dir is required.
type Config struct {
	// Dir is the folder of the store. It is made, 0700, where it is missing.
	Dir string
	// Shadowing are the folders that systemd searches before Dir, in its
	// order (systemd.exec(5), LoadCredential=).
	Shadowing []Place
	// Encrypted are the folders of the encrypted store. A name found there is
	// refused: LoadCredential= (systemd 254) looks into both, and would hand
	// out the ciphertext for the value, or the other way round.
	Encrypted []Place
}

// A Store is a folder of credentials. It holds no resources; see [Store.Begin].
// Its methods may be called from several goroutines.
type Store struct {
	cfg Config
	// step is called before each change to the file system, with a word for
	// it. Tests kill the process there, or return an error as a full or broken
	// file system would. Nil otherwise.
	step func(string) error
}

// New returns the store that cfg describes. It touches nothing.
func New(cfg Config) *Store { return &Store{cfg: cfg} }

// A State says how an installed credential is doing.
type State string

// The states there are.
const (
	StateInForce  State = "inForce"  // systemd finds it
	StateShadowed State = "shadowed" // systemd finds another file of that name first
	StateForeign  State = "foreign"  // somebody replaced or changed the file
	StateMissing  State = "missing"  // somebody removed the file
)

// An Entry is what may be told of an installed credential: everything but its value.
type Entry struct {
	Name     string            `json:"name"`
	Revision string            `json:"revision"`
	Size     int64             `json:"size"` // bytes
	Source   credential.Source `json:"source"`
	// InstalledAt is when the bytes were put in force.
	InstalledAt time.Time `json:"installedAt"`
	State       State     `json:"state"`
	// Path is where systemd finds the name: the store's file, or the file that
	// shadows it.
	Path string `json:"path"`
	// Generation is the set that brought the bytes, InstalledUSec when that was
	// done, on CLOCK_MONOTONIC in microseconds, the clock of systemd's
	// timestamps of units.
	Generation    uint64 `json:"generation"`
	InstalledUSec uint64 `json:"installedMonotonicUSec"`
	// Ephemeral is a value over a provider's: see [Set].
	Ephemeral bool `json:"ephemeral,omitempty"`
	// Rejected is a value that failed a trial before the guest booted.
	Rejected bool `json:"rejected,omitempty"`
}

// A Tx is the store with its lock held. Close gives the lock back. It must not
// be used from several goroutines at once, nor be held while waiting for
// anything that does not end by itself.
type Tx struct {
	s           *Store
	lock        io.Closer
	dir, own    dir
	st          state
	readOnly    bool
	interrupted bool
	failed      bool // a set is half in force
}

// Begin takes the store's lock, waiting for it, finishes or takes back what a
// killed process left, and reads the state. Folder and lock are made where
// they are missing. The caller must call Close.
func (s *Store) Begin() (_ *Tx, err error) {
	t := &Tx{s: s, dir: noDir, own: noDir}
	defer func() {
		if err != nil {
			t.Close()
			err = fmt.Errorf("opening the credential store: %w", err)
		}
	}()
	if err := mkdir(s.cfg.Dir); err != nil {
		return nil, err
	}
	if t.dir, err = openDir(s.cfg.Dir); err != nil {
		return nil, err
	}
	if err := t.dir.ownedPrivately(); err != nil {
		return nil, err
	}
	if t.own, err = t.dir.sub(ownDir, true); err != nil {
		return nil, err
	}
	if err := t.own.ownedPrivately(); err != nil {
		return nil, err
	}
	if t.lock, err = t.own.flock(lockFile, true, true); err != nil {
		return nil, err
	}
	if err := t.recover(); err != nil {
		return nil, err
	}
	if t.st, err = loadState(t.own); err != nil {
		return nil, err
	}
	return t, t.dropUnkept()
}

// View takes the store's lock together with other readers, and reads the
// state. It changes nothing, so that it also serves somebody who only wants to
// know; what a killed process left stays, see [Tx.Interrupted]. A store that is
// not there is empty. The caller must call Close.
func (s *Store) View() (_ *Tx, err error) {
	t := &Tx{s: s, dir: noDir, own: noDir, readOnly: true, st: newState()}
	defer func() {
		if err != nil {
			t.Close()
			err = fmt.Errorf("reading the credential store: %w", err)
		}
	}()
	if t.dir, err = openDir(s.cfg.Dir); errors.Is(err, fs.ErrNotExist) {
		return t, nil
	} else if err != nil {
		return nil, err
	}
	if t.own, err = t.dir.sub(ownDir, false); errors.Is(err, fs.ErrNotExist) {
		return t, nil
	} else if err != nil {
		return nil, err
	}
	if t.lock, err = t.own.flock(lockFile, false, false); errors.Is(err, fs.ErrNotExist) {
		return t, nil
	} else if err != nil {
		return nil, err
	}
	for _, name := range []string{journalFile, undoFile} {
		if _, err := t.own.stat(name); err == nil {
			t.interrupted = true
		}
	}
	t.st, err = loadState(t.own)
	return t, err
}

// Close gives the lock back. It may be called more than once.
func (t *Tx) Close() {
	if t.lock != nil {
		_ = t.lock.Close()
		t.lock = nil
	}
	t.own.close()
	t.dir.close()
	t.own, t.dir = noDir, noDir
}

// Generation is the number of the set in force; 0 where there never was one.
func (t *Tx) Generation() uint64 { return t.st.Generation }

// Interrupted reports whether a set was being applied when its process died,
// and nobody has finished it or taken it back yet. It is never true after Begin.
func (t *Tx) Interrupted() bool { return t.interrupted }

// Entries returns what the store installed, by name.
func (t *Tx) Entries() []Entry {
	es := make([]Entry, 0, len(t.st.Entries))
	for name, r := range t.st.Entries {
		e := t.entry(name, r)
		id, err := t.dir.stat(name)
		path, shadowed := find(t.s.cfg.Shadowing, name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			e.State = StateMissing
		case err != nil || !id.same(r.File):
			e.State = StateForeign
		case shadowed:
			e.State, e.Path = StateShadowed, path
		}
		es = append(es, e)
	}
	slices.SortFunc(es, func(a, b Entry) int { return cmp.Compare(a.Name, b.Name) })
	return es
}

// Holds reports whether the value in force of name is v. The time it takes
// tells the length of v and no more.
func (t *Tx) Holds(name string, v secret.Value) bool {
	r, ok := t.st.Entries[name]
	if !ok || r.File.Size != int64(v.Len()) {
		return false
	}
	b, id, err := t.dir.read(name, credential.MaxSize)
	defer secret.Zero(b)
	return err == nil && id.same(r.File) && secret.New(b).Equal(v)
}

// Open opens the value in force of name, for reading from its beginning. The
// file stays what it is when another value is put in force, or the Tx is
// closed; the caller closes it. A name that the store does not have, or that
// somebody took from it, matches [fs.ErrNotExist].
func (t *Tx) Open(name string) (*os.File, Entry, error) {
	r, ok := t.st.Entries[name]
	if !ok {
		return nil, Entry{}, fmt.Errorf("opening credential %s: %w", name, fs.ErrNotExist)
	}
	f, id, err := t.dir.open(name)
	if err != nil {
		return nil, Entry{}, err
	}
	if !id.same(r.File) {
		return nil, Entry{}, errors.Join(fmt.Errorf("opening credential %s: somebody replaced it: %w", name, fs.ErrNotExist), f.Close())
	}
	return f, t.entry(name, r), nil
}

// entry is what a record says of a value that systemd finds in the store.
func (t *Tx) entry(name string, r record) Entry {
	return Entry{
		Name: name, Revision: r.Revision, Size: r.File.Size, Source: r.Source, InstalledAt: r.InstalledAt,
		State: StateInForce, Path: filepath.Join(t.s.cfg.Dir, name), Generation: r.Generation, InstalledUSec: r.InstalledUSec,
		Ephemeral: r.Ephemeral, Rejected: r.Rejected,
	}
}

// Folders are those in which a file gets its name or loses it whenever
// something changes that the store tells of, for watching them.
func (s *Store) Folders() []string { return []string{s.cfg.Dir, filepath.Join(s.cfg.Dir, ownDir)} }

// A Note is a file of the caller's beside the store's state. It is kept until
// the next one of its name or a reboot, and must not hold a value.
type Note string

// The notes there are.
const (
	NoteReport Note = "report.json" // what the last import said
	NoteLoads  Note = "loads.json"  // who was handed what
	// NotePull is how asking the provider got on, NoteProvider what the provider
	// did.
	NotePull     Note = "pull.json"
	NoteProvider Note = "provider.json"
)

var notes = []Note{NoteReport, NoteLoads, NotePull, NoteProvider}

// SetNote keeps a note.
func (t *Tx) SetNote(n Note, b []byte) error {
	if err := t.writable(); err != nil {
		return err
	}
	return t.own.replace(string(n), 0o600, b)
}

// Note returns what SetNote kept; an error that matches [fs.ErrNotExist] where
// it never did.
func (t *Tx) Note(n Note) ([]byte, error) {
	if t.own == noDir {
		return nil, fs.ErrNotExist
	}
	b, _, err := t.own.read(string(n), maxStateSize)
	return b, err
}

var errReadOnly = errors.New("the credential store was opened for reading")

// find returns the path of the first place that has name. A place that cannot
// be looked into counts as one that has it: systemd might find it there.
func find(places []Place, name string) (string, bool) {
	for _, p := range places {
		// The folder may be a link, as /etc/credstore is on NixOS, and so may
		// the file: whatever stands there, systemd opens it first.
		_, err := os.Lstat(filepath.Join(p.Dir, name))
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
			return p.Path(name), true
		}
	}
	return "", false
}
