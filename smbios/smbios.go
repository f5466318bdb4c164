// Package smbios goes from the bytes of an SMBIOS table to OEM strings, and
// from OEM strings to named values.
//
// A host hands a virtual machine its first secrets in OEM strings (SMBIOS
// structures of type 11). [Read] takes the table from sysfs, [Parse] from
// memory; [Credentials] picks out the strings of systemd's family and of our
// own, and says of each one that it did not take why.
//
// The package guarantees that a damaged table costs only what is damaged: a
// missing end, a cut tail or a bad structure loses nothing that stands before
// it, and is reported as a [Fault]. Time and memory are linear in the size of
// the table, which is bounded, as are the structures, strings, faults and
// refusals. Nothing that it returns prints a value: what OEM strings hold is a
// [secret.Value] from the moment it leaves the table, foreign strings included.
//
// It has no policy and logs nothing. It does not decide whether SMBIOS may be
// read at all (in a confidential VM it should not), it does not know what
// PID 1 did with the same strings, it does not apply the limits of a set, and
// it never reads /dev/mem.
//
// It trusts nobody. The table is the host's, or, in a confidential VM, an
// attacker's: every length in it is checked before it is used.
//
// Wiping is best effort. [Read] zeroes the buffers it read into, and [Table.Wipe]
// what was kept, but the decoder that each structure goes through
// (github.com/digitalocean/go-smbios) makes Go strings, which nobody can wipe.
// They are gone when the process is: read SMBIOS in a short-lived one.
package smbios

import (
	"errors"
	"fmt"

	"github.com/guestagent/guestagent/internal/secret"
)

// Limits. What passes one of them is left out and reported; only a table
// larger than MaxTableSize is refused as a whole.
const (
	// MaxTableSize is the largest table, in bytes.
	MaxTableSize = 4 << 20
	// MaxStructures is the most structures that are walked. Handles have 16
	// bits and name one structure each, so no sound table has more.
	MaxStructures = 1 << 16
	// MaxOEMStructures is the most structures of type 11 that are read. Real
	// machines have one or two.
	MaxOEMStructures = 1 << 10
	// MaxStrings is the most OEM strings that are read, over all structures.
	// The count byte of a structure says at most 255, but is not a limit:
	// QEMU lets it wrap.
	MaxStrings = 1 << 16
	// MaxFaults is the most faults that a [Table] lists; the last one then is
	// [FaultMore].
	MaxFaults = 64
	// MaxRefusals is the most refusals that [Credentials] lists, not counting
	// a last one that says how many more there were.
	MaxRefusals = 1 << 10
)

var (
	// ErrNotFound is matched by the error of [Read] where the machine has no
	// SMBIOS that the kernel shows: neither tables/DMI nor the entries folder
	// is there. A table that may not be read is another error.
	ErrNotFound = errors.New("no SMBIOS table")
	// ErrTooLarge is matched by the error of [Read] and [Parse] where the
	// table is larger than [MaxTableSize].
	ErrTooLarge = errors.New("SMBIOS table is too large")
)

// An Origin says which file of sysfs a [Table] was read from.
type Origin string

// The origins there are.
const (
	// OriginTables is firmware/dmi/tables/DMI, the whole table, which every
	// kernel with CONFIG_DMI shows.
	OriginTables Origin = "tables/DMI"
	// OriginEntries is firmware/dmi/entries/11-N/raw, which needs dmi-sysfs
	// and is where PID 1 reads.
	OriginEntries Origin = "entries"
)

// A Table is what was found in an SMBIOS table. It owns the values of its
// strings.
type Table struct {
	// Strings are the OEM strings in the order of the table, without empty
	// ones.
	Strings []String
	// Faults are the things that are wrong with the table, in the order in
	// which they were found. None of them cost more than it says.
	Faults []Fault
	// EntryPoint is the zero value where there is no sound one.
	EntryPoint EntryPoint
	Origin     Origin
	// Structures counts the whole structures that were walked: of every type
	// with [OriginTables], of type 11 with [OriginEntries].
	Structures int
}

// Wipe overwrites the values of all strings. Values that [Credentials] made
// of them are not touched: they are copies.
func (t Table) Wipe() {
	for i := range t.Strings {
		t.Strings[i].Value.Wipe()
	}
}

// A String is one OEM string.
type String struct {
	// Handle is the handle of the structure it stands in.
	Handle uint16
	// Index is its place in that structure, from 1, as dmidecode numbers them.
	Index int
	// Truncated says that the table ends before the string does, or may do so.
	// Value then is the part that is there, and must not be taken for the whole.
	Truncated bool
	// Value holds its bytes, without the final NUL. It may be anybody's
	// string, and a secret of theirs.
	Value secret.Value
}

// where says for people where the string stands.
func (s String) where() string {
	return fmt.Sprintf("OEM string %d of structure 0x%04X", s.Index, s.Handle)
}

// A FaultCode says in one word what is wrong with a table. The words may
// reach the wire and --json: they are added to, never changed.
type FaultCode string

// The codes there are.
const (
	FaultEntryPoint        FaultCode = "entryPoint"        // the entry point is missing, cannot be read or is not sound
	FaultSize              FaultCode = "size"              // the table is longer than its entry point says
	FaultNoEnd             FaultCode = "noEnd"             // the table ends between two structures, without an end-of-table
	FaultCut               FaultCode = "cut"               // the table ends in the middle of a structure
	FaultBadStructure      FaultCode = "badStructure"      // a structure is shorter than its own header; what follows cannot be found
	FaultBadOEMStructure   FaultCode = "badOEMStructure"   // a structure of type 11 is not what systemd accepts, and is skipped
	FaultTrailing          FaultCode = "trailing"          // there is something behind the end of the table
	FaultDecoder           FaultCode = "decoder"           // go-smbios fails on a structure, or reads it differently
	FaultTooManyStructures FaultCode = "tooManyStructures" // past MaxStructures or MaxOEMStructures
	FaultTooManyStrings    FaultCode = "tooManyStrings"    // past MaxStrings
	FaultMore              FaultCode = "more"              // past MaxFaults
)

// A Fault is something wrong with a table. It never carries content of it.
type Fault struct {
	Code FaultCode `json:"code"`
	// Detail is one line for people: what, where, and what it costs.
	Detail string `json:"detail"`
}

// String returns the fault as one line.
func (f Fault) String() string { return string(f.Code) + ": " + f.Detail }
