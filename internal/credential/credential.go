// Package credential has the words that every room of guestagent uses to
// speak of a credential: the grammar of its name, the limits, where it came
// from, and why one was not taken.
//
// It holds no values and does no I/O. The rooms that exchange these words
// (smbios, credstore, the wire) do not import each other; they import this.
package credential

import (
	"errors"
	"fmt"
)

// Limits. The first two are systemd's (CREDENTIAL_NAME_MAX is NAME_MAX,
// CREDENTIAL_SIZE_MAX in src/shared/creds-util.h), the others are ours.
const (
	// MaxNameLen is the longest name, in bytes.
	MaxNameLen = 255
	// MaxSize is the largest value of one credential, in bytes.
	MaxSize = 1 << 20
	// MaxSetSize is the most that the values of one set may add up to, in bytes.
	MaxSetSize = 4 << 20
	// MaxSetNames is the most names one set may have.
	MaxSetNames = 1023
	// MaxStoreSize is the most that all values in force and all values kept
	// for rollback may add up to, in bytes. ramfs has no limit of its own.
	MaxStoreSize = 16 << 20
	// MaxStoreNames is the most values in force and kept for rollback, counted together.
	MaxStoreNames = 4096
)

// ErrName is matched by every error that [CheckName] returns.
var ErrName = errors.New("not a credential name")

// CheckName reports whether name follows systemd's grammar of credential
// names (credential_name_valid in src/shared/creds-util.c, by way of
// filename_is_valid and fdname_is_valid): 1 to 255 bytes from 0x20 to 0x7E
// without '/' and ':', and neither "." nor "..".
//
// The error does not quote the name. What stands in a name's place may be a
// secret whose owner forgot the name.
func CheckName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("%w: it is empty", ErrName)
	case len(name) > MaxNameLen:
		return fmt.Errorf("%w: %d bytes are longer than %d", ErrName, len(name), MaxNameLen)
	case name == "." || name == "..":
		return fmt.Errorf("%w: it is a folder", ErrName)
	}
	for i := range len(name) {
		switch c := name[i]; {
		case c < 0x20 || c > 0x7E:
			return fmt.Errorf("%w: byte %d of %d is not printable ASCII", ErrName, i+1, len(name))
		case c == '/' || c == ':':
			return fmt.Errorf("%w: byte %d of %d is %q", ErrName, i+1, len(name), c)
		}
	}
	return nil
}

// A Source says where a value came from.
type Source string

// The sources there are.
const (
	SourceSMBIOS   Source = "smbios"   // an OEM string, read at boot
	SourceProvider Source = "provider" // the host's provider, asked at boot
	SourcePush     Source = "push"     // the host, while the guest runs
	SourceLocal    Source = "local"    // somebody inside the guest, over the local socket
)

// A Reason says in one word why a credential was not taken. The words are
// part of the wire and of --json: they are added to, never changed.
type Reason string

// The reasons there are.
const (
	ReasonBadName     Reason = "badName"     // the name breaks systemd's grammar, or is the store's own
	ReasonNoSeparator Reason = "noSeparator" // there is no '=' between name and value
	ReasonBadBase64   Reason = "badBase64"   // the value of a .binary string does not decode
	ReasonUnknownKind Reason = "unknownKind" // io.guestagent. and then no word this version knows
	ReasonDuplicate   Reason = "duplicate"   // the same name stood before; the first one wins
	ReasonTooLarge    Reason = "tooLarge"    // the value, the set or the store would pass a limit
	ReasonTruncated   Reason = "truncated"   // the table ends in the middle of the value
	ReasonShadowed    Reason = "shadowed"    // systemd looks elsewhere first, and finds the name there
	ReasonEncrypted   Reason = "encrypted"   // the encrypted store has the name
	ReasonForeign     Reason = "foreign"     // somebody else's file has the name
	ReasonMismatch    Reason = "mismatch"    // PID 1 has other bytes than the string
	ReasonSuperseded  Reason = "superseded"  // a value that came later is in force
	ReasonRemoved     Reason = "removed"     // it was removed since the last boot
	ReasonDisabled    Reason = "disabled"    // systemd.import_credentials=no
	ReasonDenied      Reason = "denied"      // systemd itself acts on the name
	ReasonRejected    Reason = "rejected"    // a gate rolled this value back
	ReasonManaged     Reason = "managed"     // the provider on the host manages the name
	ReasonMore        Reason = "more"        // there were more refusals than are listed
)

// A Refusal is a credential that was not taken, and why. It never carries a
// value. Name is empty where there is no valid name: see [CheckName].
type Refusal struct {
	Name   string `json:"name"`
	Source Source `json:"source"`
	Reason Reason `json:"reason"`
	// Detail is one line for people: where it stood, why it was refused and,
	// where there is one, the way out.
	Detail string `json:"detail"`
}

// String returns the refusal as one line.
func (r Refusal) String() string {
	if r.Name == "" {
		return fmt.Sprintf("%s: %s", r.Reason, r.Detail)
	}
	return fmt.Sprintf("%s: %s: %s", r.Name, r.Reason, r.Detail)
}
