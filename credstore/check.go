package credstore

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
)

// A Set is what is applied together.
type Set struct {
	// Source is where the set comes from. A set from SMBIOS was made when the
	// VM started: it replaces nothing that came later, and brings nothing back
	// that was removed since.
	Source credential.Source
	// Install are the credentials to put in force, each name once.
	Install []Credential
	// Remove are names to take out of force. A name the store does not have is
	// no error.
	Remove []string
	// Forget keeps no previous value of any of these names for [Tx.Rollback].
	// For a set on trial they are kept until it has passed.
	Forget bool
	// Trial, if not nil, puts a set that changes something on trial: see
	// [Tx.Trial]. It is JSON, and must not hold a value.
	Trial []byte
	// Retry takes a set that was rejected.
	Retry bool
	// Ephemeral takes names, too, that a provider manages: those whose value
	// came from one, see [credential.SourceProvider]. Without it only a set of
	// that source changes or removes them. The value then holds until the
	// provider applies its set again.
	Ephemeral bool
}

// overrides reports whether the set puts its value over a provider's.
func (s *Set) overrides(old record) bool {
	return old.managed() && s.Source != credential.SourceProvider
}

// forgets reports whether no previous values are kept.
func (s *Set) forgets() bool { return s.Forget && s.Trial == nil }

// A Credential is a name and a value to install.
type Credential struct {
	Name string
	// Revision is the host's label for the value, "" for none.
	Revision string
	// Value stays the caller's: the store neither keeps nor wipes it.
	Value secret.Value
	// AllowShadowed installs the name although systemd finds another file of
	// that name first, for names whose consumers all give the full path or load
	// by socket.
	AllowShadowed bool
	// Rejected says that the value failed a trial in an earlier boot, which the
	// store does not remember. It is taken only where the name has no value yet.
	Rejected bool
}

// A RefusedError is returned where a set cannot be applied as it is. Nothing of
// it was.
type RefusedError struct {
	Refusals []credential.Refusal
}

func (e *RefusedError) Error() string {
	lines := make([]string, len(e.Refusals))
	for i, r := range e.Refusals {
		lines[i] = r.String()
	}
	return "the set was not applied: " + strings.Join(lines, "; ")
}

// Check splits the set into what [Tx.Apply] would take and what it would
// refuse. It changes nothing.
func (t *Tx) Check(set Set) (accepted Set, refusals []credential.Refusal) {
	for accepted = set; ; {
		// What is left may be a set that was rejected, where the whole was not.
		var more []credential.Refusal
		if accepted, more = t.check(accepted); len(more) == 0 {
			return accepted, refusals
		}
		refusals = append(refusals, more...)
	}
}

// check is Check of the set as it is, in the order given.
func (t *Tx) check(set Set) (accepted Set, refusals []credential.Refusal) {
	accepted = Set{Source: set.Source, Forget: set.Forget, Trial: set.Trial, Retry: set.Retry, Ephemeral: set.Ephemeral}
	c := newChecker(t)
	c.forget = set.forgets()
	c.source, c.ephemeral = set.Source, set.Ephemeral
	c.rejected = t.rejectedAgain(set)
	refuse := func(name string, reason credential.Reason, format string, a ...any) {
		refusals = append(refusals, credential.Refusal{Name: name, Source: set.Source, Reason: reason, Detail: fmt.Sprintf(format, a...)})
	}
	for _, name := range set.Remove {
		if reason, detail := c.remove(name); reason != "" {
			refuse(printable(name), reason, "%s", detail)
			continue
		}
		accepted.Remove = append(accepted.Remove, name)
	}
	for _, cred := range set.Install {
		if reason, detail := c.install(cred); reason != "" {
			refuse(printable(cred.Name), reason, "%s", detail)
			continue
		}
		accepted.Install = append(accepted.Install, cred)
	}
	return accepted, refusals
}

// printable is name where it may be shown: see credential.CheckName.
func printable(name string) string {
	if credential.CheckName(name) != nil {
		return ""
	}
	return name
}

// A checker goes through a set and keeps account of what the store would hold.
type checker struct {
	t        *Tx
	seen     map[string]bool
	setBytes int64
	setNames int
	// What would be in force and what would be kept for rollback afterwards.
	forceBytes, keptBytes int64
	forceNames, keptNames int
	tombstones            int
	forget                bool
	source                credential.Source
	ephemeral             bool
	rejected              map[string]bool // names of a set that was rejected and comes again
}

func newChecker(t *Tx) *checker {
	c := &checker{t: t, seen: map[string]bool{}}
	for _, r := range t.st.Entries {
		c.forceBytes += r.File.Size
		c.forceNames++
	}
	// The set that changes something also drops what is kept now, but for what
	// was rejected.
	if r := t.st.Rejected; r != nil {
		for _, e := range r.Entries {
			if e != nil {
				c.keptBytes += e.File.Size
				c.keptNames++
			}
		}
	}
	return c
}

func (c *checker) remove(name string) (credential.Reason, string) {
	if reason, detail := c.name(name); reason != "" {
		return reason, detail
	}
	if c.rejected[name] {
		return credential.ReasonRejected, c.t.st.Rejected.detail("removed the name")
	}
	r, ok := c.t.st.Entries[name]
	if _, dead := c.t.st.Removed[name]; !dead {
		if c.tombstones++; len(c.t.st.Removed)+c.tombstones > credential.MaxStoreNames {
			return credential.ReasonTooLarge, fmt.Sprintf("the store remembers %d removed names and can take no more until the guest boots again", credential.MaxStoreNames)
		}
	}
	if !ok {
		return "", ""
	}
	if reason, detail := c.managed(r); reason != "" {
		return reason, detail
	}
	if reason, detail := c.foreign(name); reason != "" {
		return reason, detail
	}
	c.replaced(r)
	return "", ""
}

func (c *checker) install(cred Credential) (credential.Reason, string) {
	if reason, detail := c.name(cred.Name); reason != "" {
		return reason, detail
	}
	if c.rejected[cred.Name] {
		return credential.ReasonRejected, c.t.st.Rejected.detail("had this value")
	}
	size := int64(cred.Value.Len())
	if size > credential.MaxSize {
		return credential.ReasonTooLarge, fmt.Sprintf("%d bytes are more than systemd takes, %d", size, credential.MaxSize)
	}
	if path, ok := find(c.t.s.cfg.Encrypted, cred.Name); ok {
		return credential.ReasonEncrypted, fmt.Sprintf("the encrypted store has this name, and systemd could hand out one for the other; remove %s or choose another name", path)
	}
	if path, ok := find(c.t.s.cfg.Shadowing, cred.Name); ok && !cred.AllowShadowed {
		return credential.ReasonShadowed, fmt.Sprintf("systemd finds %s first; remove that, or choose another name", path)
	}
	if reason, detail := c.foreign(cred.Name); reason != "" {
		return reason, detail
	}
	old, installed := c.t.st.Entries[cred.Name]
	same := c.t.Holds(cred.Name, cred.Value)
	if cred.Rejected && installed && !same && c.there(cred.Name) {
		return credential.ReasonRejected, "a gate rolled this value back before the guest booted, and another one is in force; change the value"
	}
	if c.source == credential.SourceSMBIOS && !same {
		if installed && old.Source != credential.SourceSMBIOS {
			return credential.ReasonSuperseded, fmt.Sprintf("a value with source %q, installed later, is in force and stays", old.Source)
		}
		if _, dead := c.t.st.Removed[cred.Name]; dead {
			return credential.ReasonRemoved, "it was removed since the guest booted, and stays so until it boots again or somebody pushes it"
		}
	}
	if installed && c.source != credential.SourceSMBIOS {
		if reason, detail := c.managed(old); reason != "" {
			return reason, detail
		}
	}

	if c.setBytes+size > credential.MaxSetSize {
		return credential.ReasonTooLarge, fmt.Sprintf("with its %d bytes the set would pass %d", size, credential.MaxSetSize)
	}
	if c.setNames+1 > credential.MaxSetNames {
		return credential.ReasonTooLarge, fmt.Sprintf("the set has more than %d names", credential.MaxSetNames)
	}
	if !same {
		// The value that is replaced is kept for rollback, or at least until
		// the set is through.
		if c.forceBytes+c.keptBytes+size > credential.MaxStoreSize {
			return credential.ReasonTooLarge, fmt.Sprintf("with its %d bytes the store, and what is kept for rollback, would pass %d; remove what is not needed first", size, credential.MaxStoreSize)
		}
		if c.forceNames+c.keptNames+1 > credential.MaxStoreNames {
			return credential.ReasonTooLarge, fmt.Sprintf("the store, and what is kept for rollback, would pass %d values; remove what is not needed first", credential.MaxStoreNames)
		}
		c.forceBytes += size
		c.forceNames++
		if installed {
			c.replaced(old)
		}
	}
	c.setBytes += size
	c.setNames++
	return "", ""
}

// there reports whether the name has a file.
func (c *checker) there(name string) bool {
	if c.t.dir == noDir {
		return false
	}
	_, err := c.t.dir.stat(name)
	return err == nil
}

// managed says whether a provider manages the name, and the set is not its own.
func (c *checker) managed(r record) (credential.Reason, string) {
	if !r.managed() || c.ephemeral || c.source == credential.SourceProvider {
		return "", ""
	}
	return credential.ReasonManaged, "the VM's provider on the host manages it; change it there, or set it with --ephemeral until the provider applies its set again"
}

// replaced accounts for a value that goes out of force.
func (c *checker) replaced(r record) {
	c.forceBytes -= r.File.Size
	c.forceNames--
	if !c.forget {
		c.keptBytes += r.File.Size
		c.keptNames++
	}
}

// name checks the name itself, and that it stands once in the set.
func (c *checker) name(name string) (credential.Reason, string) {
	if err := credential.CheckName(name); err != nil {
		return credential.ReasonBadName, err.Error()
	}
	if name == ownDir {
		return credential.ReasonBadName, "the store keeps its own files under this name; choose another"
	}
	if c.seen[name] {
		return credential.ReasonDuplicate, "the name stands in the set twice"
	}
	c.seen[name] = true
	return "", ""
}

// foreign says whether somebody else's file has the name. A file of ours that
// was changed is theirs from then on; one that was removed is not.
func (c *checker) foreign(name string) (credential.Reason, string) {
	if c.t.dir == noDir {
		return "", ""
	}
	id, err := c.t.dir.stat(name)
	path := filepath.Join(c.t.s.cfg.Dir, name)
	r, installed := c.t.st.Entries[name]
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && installed && id.same(r.File):
		return "", ""
	case installed:
		return credential.ReasonForeign, fmt.Sprintf("somebody changed or replaced %s after it was installed; remove it to give the name back", path)
	}
	return credential.ReasonForeign, fmt.Sprintf("%s is somebody else's; remove it or choose another name", path)
}
