package credstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"strconv"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
)

// The files below the store's own folder. Only root can enter it, and a glob
// or a folder load of systemd passes over it, since its name begins with a dot.
const (
	ownDir      = ".guestagent"
	lockFile    = "lock"         // flock: one writer at a time
	stateFile   = "state.json"   // what is in force; no values
	nextFile    = "state.next"   // the state after the set that is being applied
	journalFile = "journal.json" // there is a set to finish
	undoFile    = "journal.undo" // there is a set to take back
	stageDir    = "stage"        // new values, not in force yet
	keepDir     = "keep"         // links to the values that the set replaces
	previousDir = "previous"     // the values that the last set replaced
	rejectDir   = "reject"       // links to the values that a failed trial takes out of force
	rejectedDir = "rejected"     // the values of the last set that failed its trial
	tmpSuffix   = ".tmp"
)

// stateVersion is the version of the state's and the journal's layout. They
// do not outlive a boot, but an agent may be upgraded while the guest runs.
const stateVersion = 1

// maxStateSize bounds what is read back: 4,096 names of 255 bytes with their
// records are below 4 MiB.
const maxStateSize = 8 << 20

// An identity tells one file from another that took its name. Nobody can
// write to or rename over a file of ours without changing it.
type identity struct {
	Ino   uint64 `json:"ino"`
	Size  int64  `json:"size"`
	MTime int64  `json:"mtime"` // nanoseconds

	regular bool
}

func (id identity) same(other identity) bool {
	return id.Ino == other.Ino && id.Size == other.Size && id.MTime == other.MTime
}

// A record is what the store knows of a value it installed.
type record struct {
	Revision    string            `json:"revision"`
	Source      credential.Source `json:"source"`
	Generation  uint64            `json:"generation"` // the set that brought the bytes
	InstalledAt time.Time         `json:"installedAt"`
	// InstalledUSec is when the bytes were in force, on CLOCK_MONOTONIC in
	// microseconds: whoever loaded the name before may have other bytes. Of the
	// last set the state knows it, see [state.stamp].
	InstalledUSec uint64   `json:"installedMonotonicUSec"`
	File          identity `json:"file"`
	// Ephemeral is a value that somebody else put over a provider's.
	Ephemeral bool `json:"ephemeral,omitempty"`
	// Rejected is a value that failed a trial in an earlier boot.
	Rejected bool `json:"rejected,omitempty"`
}

// managed reports whether a provider manages the name.
func (r record) managed() bool { return r.Source == credential.SourceProvider || r.Ephemeral }

// A tombstone says that a name was removed on purpose.
type tombstone struct {
	Generation uint64    `json:"generation"`
	At         time.Time `json:"at"`
}

// A past is what a rollback restores: for each name that the last set changed,
// the record it had before, nil where there was none.
type past struct {
	Generation uint64             `json:"generation"`
	Entries    map[string]*record `json:"entries"`
}

// A rejection is a set that failed its trial: for each name that it changed,
// the record of the value that was taken back, nil where the set removed it.
type rejection struct {
	Generation uint64             `json:"generation"`
	At         time.Time          `json:"at"`
	Problem    string             `json:"problem"`
	Entries    map[string]*record `json:"entries"`
}

type state struct {
	// Stamp is first: see stampOffset.
	Stamp      stamp                `json:"stamp"`
	Version    int                  `json:"version"`
	Generation uint64               `json:"generation"`
	Entries    map[string]record    `json:"entries"`
	Removed    map[string]tombstone `json:"removed,omitempty"`
	Previous   past                 `json:"previous"`
	// Trial is the caller's note on the last set, if that is on trial.
	Trial    json.RawMessage `json:"trial,omitempty"`
	Rejected *rejection      `json:"rejected,omitempty"`
}

// A stamp is when the last set was in force, on CLOCK_MONOTONIC in
// microseconds. The state is written before its set is, since from then on
// nothing may need space; the stamp, of a fixed width, is written over in place.
type stamp uint64

const (
	stampWidth  = 20 // the digits of 2^64-1
	stampOffset = int64(len(`{"stamp":"`))
)

func (s stamp) digits() []byte { return fmt.Appendf(nil, "%0*d", stampWidth, uint64(s)) }

// MarshalJSON returns a string of digits.
func (s stamp) MarshalJSON() ([]byte, error) { return fmt.Appendf(nil, "%q", s.digits()), nil }

// UnmarshalJSON reads what MarshalJSON writes.
func (s *stamp) UnmarshalJSON(b []byte) error {
	digits, err := strconv.Unquote(string(b))
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	*s = stamp(n)
	return err
}

// stamp says when the last set was in force.
func (s *state) stamp(at stamp) {
	s.Stamp = at
	for name, r := range s.Entries {
		if r.Generation == s.Generation {
			r.InstalledUSec = uint64(at)
			s.Entries[name] = r
		}
	}
}

func newState() state {
	return state{
		Version: stateVersion,
		Entries: map[string]record{},
		Removed: map[string]tombstone{},
		Previous: past{
			Entries: map[string]*record{},
		},
	}
}

func (s *state) clone() state {
	c := *s
	c.Entries = maps.Clone(s.Entries)
	c.Removed = maps.Clone(s.Removed)
	c.Previous.Entries = maps.Clone(s.Previous.Entries)
	return c
}

// An op is one step of a set that is being applied.
type op struct {
	Name string `json:"name"`
	// Old is the file in force before, nil where there was none. New is the
	// file in force afterwards, nil where the name is removed.
	Old *identity `json:"old,omitempty"`
	New *identity `json:"new,omitempty"`
	// Forget drops the old file when the set is through.
	Forget bool `json:"forget,omitempty"`
}

type journal struct {
	Version    int    `json:"version"`
	Generation uint64 `json:"generation"`
	Ops        []op   `json:"ops"`
}

// load reads a JSON file of the store's own. A missing one matches fs.ErrNotExist.
func load[T any](d dir, name string, version func(*T) int) (T, error) {
	var v T
	b, _, err := d.read(name, maxStateSize)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return *new(T), fmt.Errorf("reading %s/%s: %w; it is not what this program wrote: save the credentials you need and remove the folder", d.path, name, err)
	}
	if got := version(&v); got != stateVersion {
		return *new(T), fmt.Errorf("reading %s/%s: layout %d is unknown to this version, which writes %d; use the agent that wrote it, or reboot", d.path, name, got, stateVersion)
	}
	return v, nil
}

func loadState(own dir) (state, error) {
	s, err := load(own, stateFile, func(s *state) int { return s.Version })
	if errors.Is(err, fs.ErrNotExist) {
		return newState(), nil
	}
	if err != nil {
		return state{}, err
	}
	// Maps that were empty come back nil.
	n := newState()
	n.Generation, n.Previous.Generation = s.Generation, s.Previous.Generation
	n.Trial, n.Rejected = s.Trial, s.Rejected
	maps.Copy(n.Entries, s.Entries)
	maps.Copy(n.Removed, s.Removed)
	maps.Copy(n.Previous.Entries, s.Previous.Entries)
	n.stamp(s.Stamp)
	return n, nil
}

func encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}
