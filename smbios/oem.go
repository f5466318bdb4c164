package smbios

import (
	"bytes"
	"encoding/base64"
	"fmt"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
)

// A Family says for whom an OEM string with a credential is.
type Family string

// The families there are.
const (
	// FamilySystemd is for PID 1, which puts the value where nothing can
	// replace it.
	FamilySystemd Family = "systemd"
	// FamilyAgent is for guestagent; PID 1 ignores it.
	FamilyAgent Family = "guestagent"
)

// What the strings begin with. The first two are systemd's
// (parse_smbios_strings in src/core/import-creds.c).
const (
	keySystemd       = "io.systemd.credential:"
	keySystemdBinary = "io.systemd.credential.binary:"

	// agentPrefix begins every string of ours: one that goes on with no key
	// of ours is a mistake that must be told.
	agentPrefix    = "io.guestagent."
	keyAgent       = agentPrefix + "credential:"
	keyAgentBinary = agentPrefix + "credential.binary:"
	// keyProvider names the host's provider. It is no credential.
	keyProvider = agentPrefix + "provider:"
)

// keys are the four kinds of strings with a credential.
var keys = [...]struct {
	key    string
	family Family
	binary bool
}{
	{keySystemd, FamilySystemd, false},
	{keySystemdBinary, FamilySystemd, true},
	{keyAgent, FamilyAgent, false},
	{keyAgentBinary, FamilyAgent, true},
}

// A Credential is a named value from an OEM string. Its owner wipes the Value.
type Credential struct {
	Name   string
	Family Family
	// Binary says that the string had the value in base64. Value is decoded.
	Binary bool
	Value  secret.Value
	// Handle and Index say where the string stands: see [String].
	Handle uint16
	Index  int
}

// Credentials picks the credentials out of a table's OEM strings, in their
// order, and tells of each string that should have been one why it is not.
// Strings of other owners are passed over.
//
// Both families follow the rules of systemd's parse_smbios_strings
// (src/core/import-creds.c): the first '=' ends the name; text is taken as it
// stands and may be empty; the value of a .binary string is base64, of the
// kind that systemd's unbase64mem takes. Within a family the first string of
// a name that could be taken wins; one that was refused does not stand in the
// way of a later one. The same name in both families is no duplicate: they
// have different owners.
//
// What PID 1 does beyond that is not done here: it stops taking credentials
// when all of them pass 1 MiB.
//
// The values are copies, and survive [Table.Wipe]. A refusal never quotes a
// value, nor what stands in a name's place unless that is a valid name.
func Credentials(t Table) (creds []Credential, refused []credential.Refusal) {
	first := make(map[string]String) // by key of the family, and name
	unlisted := 0
	for _, s := range t.Strings {
		c, r := fromOEMString(s)
		if c != nil {
			id := string(c.Family) + ":" + c.Name
			if f, ok := first[id]; ok {
				c.Value.Wipe()
				r = refuse(s, c.Name, credential.ReasonDuplicate, "%s has the same name, and the first one wins; give each name once", f.where())
				c = nil
			} else {
				first[id] = s
				creds = append(creds, *c)
			}
		}
		switch {
		case r == nil:
		case len(refused) == MaxRefusals:
			unlisted++
		default:
			refused = append(refused, *r)
		}
	}
	if unlisted > 0 {
		refused = append(refused, credential.Refusal{
			Source: credential.SourceSMBIOS,
			Reason: credential.ReasonMore,
			Detail: fmt.Sprintf("%d more OEM strings were refused; only %d are listed", unlisted, MaxRefusals),
		})
	}
	return creds, refused
}

// fromOEMString makes a credential or a refusal of a string, or neither where
// the string is none of our business.
func fromOEMString(s String) (*Credential, *credential.Refusal) {
	b := s.Value.Bytes()
	for _, k := range keys {
		assignment, ok := bytes.CutPrefix(b, []byte(k.key))
		if !ok {
			continue
		}
		rawName, rawValue, ok := bytes.Cut(assignment, []byte{'='})
		if s.Truncated {
			// Without its '=' a name may be cut, too.
			name := ""
			if ok && credential.CheckName(string(rawName)) == nil {
				name = string(rawName)
			}
			return nil, refuseTruncated(s, name)
		}
		if !ok {
			return nil, refuse(s, "", credential.ReasonNoSeparator, "there is no '=' in it; write %sNAME=VALUE", k.key)
		}
		name := string(rawName)
		if err := credential.CheckName(name); err != nil {
			return nil, refuse(s, "", credential.ReasonBadName, "%v; rename it on the host", err)
		}
		var value []byte
		if k.binary {
			var err error
			if value, err = decodeBase64(rawValue); err != nil {
				return nil, refuse(s, name, credential.ReasonBadBase64, "its value is not base64 with padding; encode it with 'base64 -w0', or leave '.binary' out of the key if it is text")
			}
		} else {
			value = bytes.Clone(rawValue)
		}
		if len(value) > credential.MaxSize {
			n := len(value)
			secret.Zero(value)
			return nil, refuse(s, name, credential.ReasonTooLarge, "its value has %d bytes, the limit is %d; split it", n, credential.MaxSize)
		}
		return &Credential{
			Name: name, Family: k.family, Binary: k.binary, Value: secret.New(value),
			Handle: s.Handle, Index: s.Index,
		}, nil
	}

	switch {
	case s.Truncated:
		// The key itself may be cut: take for one of ours what begins like it.
		if bytes.HasPrefix(b, []byte(agentPrefix)) || begins(keySystemd, b) || begins(keySystemdBinary, b) {
			return nil, refuseTruncated(s, "")
		}
	case bytes.HasPrefix(b, []byte(keyProvider)):
	case bytes.HasPrefix(b, []byte(agentPrefix)):
		return nil, refuse(s, "", credential.ReasonUnknownKind, "it begins with %s and goes on with nothing that this version knows; known are %s, %s and %s",
			agentPrefix, keyAgent, keyAgentBinary, keyProvider)
	}
	return nil, nil
}

// begins reports whether key begins with b, and b is long enough to be
// nobody else's.
func begins(key string, b []byte) bool {
	const least = len("io.systemd.credential")
	return len(b) >= least && bytes.HasPrefix([]byte(key), b)
}

// refuse makes a refusal. name must be valid or empty, and the arguments must
// not hold content of the string.
func refuse(s String, name string, reason credential.Reason, format string, args ...any) *credential.Refusal {
	return &credential.Refusal{
		Name:   name,
		Source: credential.SourceSMBIOS,
		Reason: reason,
		Detail: s.where() + ": " + fmt.Sprintf(format, args...),
	}
}

// refuseTruncated refuses a string in whose middle the table ends.
func refuseTruncated(s String, name string) *credential.Refusal {
	return refuse(s, name, credential.ReasonTruncated,
		"the table ends in the middle of it, or may do so; keep the table below 64 KiB, or use SeaBIOS 1.17 and a 64-bit entry point (QEMU: -machine smbios-entry-point-type=64)")
}

// OEMString returns the string that a host has to pass for this credential,
// without a final NUL. The caller owns and wipes it.
//
// The encoding is canonical, of two forms. A value of printable ASCII stands
// as it is, unless Binary is set: it passes command lines and JSON unharmed.
// Every other value is in base64, of the standard alphabet and in one line.
// [Credentials] makes the same name, family and value of the result.
//
// A name that breaks systemd's grammar is an error, which matches
// [credential.ErrName]; so is one with a '=', which is fit for every way but
// this. The other errors are a family that does not exist and a value larger
// than [credential.MaxSize].
func (c Credential) OEMString() (secret.Value, error) {
	if err := credential.CheckName(c.Name); err != nil {
		return secret.Value{}, fmt.Errorf("encoding a credential as OEM string: %w", err)
	}
	if i := bytes.IndexByte([]byte(c.Name), '='); i >= 0 {
		return secret.Value{}, fmt.Errorf("encoding credential %q as OEM string: %w: byte %d is '=', which ends a name there", c.Name, credential.ErrName, i+1)
	}
	value := c.Value.Bytes()
	if len(value) > credential.MaxSize {
		return secret.Value{}, fmt.Errorf("encoding credential %q as OEM string: %d bytes are more than %d", c.Name, len(value), credential.MaxSize)
	}
	binary := c.Binary || !printable(value)
	for _, k := range keys {
		if k.family != c.Family || k.binary != binary {
			continue
		}
		size := len(value)
		if binary {
			size = base64.StdEncoding.EncodedLen(len(value))
		}
		// Its full size from the start: append must not leave copies behind.
		b := make([]byte, 0, len(k.key)+len(c.Name)+1+size)
		b = append(b, k.key...)
		b = append(b, c.Name...)
		b = append(b, '=')
		if binary {
			b = base64.StdEncoding.AppendEncode(b, value)
		} else {
			b = append(b, value...)
		}
		return secret.New(b), nil
	}
	return secret.Value{}, fmt.Errorf("encoding credential %q as OEM string: there is no family %q", c.Name, c.Family)
}

// printable reports whether b is printable ASCII, spaces included.
func printable(b []byte) bool {
	for _, c := range b {
		if c < 0x20 || c > 0x7E {
			return false
		}
	}
	return true
}
