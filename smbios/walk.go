package smbios

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/digitalocean/go-smbios/smbios"

	"github.com/guestagent/guestagent/internal/secret"
)

const (
	typeOEMStrings = 11
	typeEndOfTable = 127

	// headerLen is the length of a structure's header: type, length, handle.
	headerLen = 4
	// oemLen is the length of the formatted area of a structure of type 11:
	// the header and a count byte. systemd accepts no other
	// (read_smbios11_field in src/shared/smbios11.c).
	oemLen = 5

	// cutSize is the size from which on some firmware cuts tables: see suspect.
	cutSize = 64 << 10
)

// endOfStrings ends the strings of a structure, and so the structure.
var endOfStrings = []byte{0, 0}

// endOfTable is a structure of type 127, put behind each structure that the
// decoder gets: it fails on everything that has no end.
var endOfTable = []byte{typeEndOfTable, headerLen, 0xFF, 0xFE, 0, 0}

// Parse finds the OEM strings in an SMBIOS table, given as Linux shows it in
// tables/DMI, with the entry point beside it, which may be nil. It keeps
// neither and changes neither; the caller wipes them.
//
// The walk is the kernel's (dmi_decode_table in drivers/firmware/dmi_scan.c),
// so that it sees the structures that PID 1 sees. It ends
//
//   - with an entry point that counts the structures (SMBIOS 2), after that
//     many, and not at an end-of-table: there is firmware with OEM structures
//     behind it;
//   - else at the end-of-table structure;
//   - before a structure whose length is below 4, since nothing tells where
//     the next one begins;
//   - at the end of the bytes. Unlike the kernel, it uses the strings of a
//     structure that is cut there: those that have their NUL. The last one,
//     which has not, is marked [String.Truncated].
//
// Where a table of 64 KiB and more breaks off behind a structure of type 11,
// the last string of that structure is marked [String.Truncated] too: some
// firmware cuts such a table so that half a string looks like a whole one.
//
// A structure of type 11 whose formatted area is not 5 bytes long is skipped.
// systemd skips it and every later one; here the later ones are read, for what
// stands in them is sound. Its count byte is ignored, as systemd does.
//
// The only error matches [ErrTooLarge], and the Table then is the zero value.
func Parse(table, entryPoint []byte) (Table, error) {
	return parse(table, entryPoint, nil, decode)
}

// parse is Parse, with what went wrong when the entry point was read, and
// with the decoder that each whole structure of type 11 goes through.
func parse(table, entryPoint []byte, epErr error, dec decoder) (Table, error) {
	if len(table) > MaxTableSize {
		return Table{}, fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, len(table), MaxTableSize)
	}
	c := collector{t: Table{Origin: OriginTables}, dec: dec}
	if epErr == nil {
		c.t.EntryPoint, epErr = parseEntryPoint(entryPoint)
	}
	if epErr != nil {
		c.fault(FaultEntryPoint, "there is no sound entry point, the table is read without: %v", epErr)
	} else if n := c.t.EntryPoint.Size; int64(len(table)) > n {
		c.fault(FaultSize, "the table has %d bytes, its entry point says %d; all are read", len(table), n)
	}
	c.walk(table)
	return c.t, nil
}

// parseEntries makes a Table of files entries/11-N/raw, in their order. It
// reads each as systemd does: what is not a structure of type 11 with a
// formatted area of 5 bytes is skipped (and, unlike there, the later ones are
// read), and the last string needs no NUL.
func parseEntries(raw [][]byte, dec decoder) (Table, error) {
	size := 0
	for _, b := range raw {
		size += len(b)
	}
	if size > MaxTableSize {
		return Table{}, fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, size, MaxTableSize)
	}
	c := collector{t: Table{Origin: OriginEntries}, dec: dec}
	for i, b := range raw {
		switch {
		case len(b) < oemLen:
			c.fault(FaultBadOEMStructure, "entry 11-%d has %d bytes and no whole header; it is skipped", i, len(b))
		case b[0] != typeOEMStrings:
			c.fault(FaultBadOEMStructure, "entry 11-%d holds a structure of type %d; it is skipped", i, b[0])
		default:
			c.t.Structures++
			c.structure(b, false)
		}
	}
	return c.t, nil
}

// A collector puts a Table together.
type collector struct {
	t   Table
	dec decoder
	// oem counts structures of type 11.
	oem int
	// seen counts strings, with empty ones.
	seen int
}

// fault adds a fault. The arguments must not hold content of the table.
func (c *collector) fault(code FaultCode, format string, args ...any) {
	switch n := len(c.t.Faults); {
	case n < MaxFaults-1:
		c.t.Faults = append(c.t.Faults, Fault{code, fmt.Sprintf(format, args...)})
	case n == MaxFaults-1:
		c.t.Faults = append(c.t.Faults, Fault{FaultMore, "there are more faults than are listed"})
	}
}

// walk goes through the structures of a table.
func (c *collector) walk(table []byte) {
	count := c.t.EntryPoint.Count
	ended := false // an end-of-table structure was the last one, or stood before
	oem := false   // the last structure was one of OEM strings
	for off := 0; ; {
		rest := table[off:]
		switch {
		case count > 0 && c.t.Structures == count, count == 0 && ended:
			if len(rest) > 0 {
				c.fault(FaultTrailing, "%d bytes behind the end of the table, from offset %d, are not read", len(rest), off)
			}
			return
		case len(rest) == 0:
			if !ended {
				c.fault(FaultNoEnd, "the table ends at offset %d without an end-of-table structure", off)
				c.suspect(oem, off, rest)
			}
			return
		case c.t.Structures == MaxStructures:
			c.fault(FaultTooManyStructures, "the table has more than %d structures; those from offset %d are not read", MaxStructures, off)
			return
		case ended && (len(rest) < headerLen || rest[1] < headerLen):
			c.fault(FaultTrailing, "%d bytes behind the end of the table, from offset %d, are not read", len(rest), off)
			return
		case len(rest) < headerLen:
			c.fault(FaultCut, "the table ends at offset %d in the middle of a header", len(table))
			return
		case rest[1] < headerLen:
			c.fault(FaultBadStructure, "the structure at offset %d says that it is %d bytes long, shorter than its header; the %d bytes from there are not read",
				off, rest[1], len(rest))
			c.suspect(oem, off, rest)
			return
		}

		formatted := int(rest[1])
		end := -1
		if formatted <= len(rest) {
			end = bytes.Index(rest[formatted:], endOfStrings)
		}
		if end < 0 {
			c.fault(FaultCut, "the table ends at offset %d in the middle of structure 0x%04X (type %d), which begins at offset %d",
				len(table), handle(rest), rest[0], off)
			if rest[0] == typeOEMStrings && len(rest) >= oemLen {
				c.structure(rest, true)
			}
			return
		}
		size := formatted + end + len(endOfStrings)
		c.t.Structures++
		oem = rest[0] == typeOEMStrings
		switch rest[0] {
		case typeOEMStrings:
			c.structure(rest[:size], false)
		case typeEndOfTable:
			ended = true
		}
		off += size
	}
}

// suspect is called where the table breaks off at offset off, behind a
// structure of OEM strings if oem is set. That structure's last string may be
// the first part of one, however whole it looks: of a table of 64 KiB and more,
// SeaBIOS before 1.17 copies as many bytes as its size leaves of a multiple of
// 64 KiB, with zeros behind them, and zeros end a string and a structure. Linux
// from 6.6.39 on drops the rest, so that only the entry point tells the size.
func (c *collector) suspect(oem bool, off int, rest []byte) {
	size := int64(len(rest) + off)
	if c.t.EntryPoint.Bits != 0 {
		size = c.t.EntryPoint.Size
	}
	zeros := len(bytes.Trim(rest, "\x00")) == 0
	if !oem || !zeros || size < cutSize || size <= int64(off) || len(c.t.Strings) == 0 {
		return
	}
	c.t.Strings[len(c.t.Strings)-1].Truncated = true
	c.fault(FaultCut, "the table should have %d bytes and breaks off at offset %d behind OEM strings: the last one may be cut and is not used", size, off)
}

// structure takes the strings of one structure of type 11. s is at least
// oemLen long. With cut, the table ends where s does.
func (c *collector) structure(s []byte, cut bool) {
	h := handle(s)
	if s[1] != oemLen {
		c.fault(FaultBadOEMStructure, "structure 0x%04X (OEM strings) says that it is %d bytes long and must be %d, as for systemd; it is skipped", h, s[1], oemLen)
		return
	}
	if c.oem++; c.oem > MaxOEMStructures {
		c.fault(FaultTooManyStructures, "there are more than %d structures of OEM strings; structure 0x%04X is not read", MaxOEMStructures, h)
		return
	}

	own, more := split(s[oemLen:], MaxStrings-c.seen)
	c.seen += len(own)
	if more {
		c.fault(FaultTooManyStrings, "there are more than %d OEM strings; the rest of structure 0x%04X is not read", MaxStrings, h)
	}

	// The decoder gets whole structures only, and what it says is used only
	// if it says what stands there: it is old, and a bug in it must not lose
	// or change a credential.
	var decoded []string
	if !cut && !more {
		var err error
		if decoded, err = c.dec.whole(s); err != nil {
			c.fault(FaultDecoder, "structure 0x%04X (OEM strings) is read without go-smbios: %v", h, err)
			decoded = nil
		} else if !same(decoded, own) {
			c.fault(FaultDecoder, "structure 0x%04X (OEM strings) is read without go-smbios, which reads it differently", h)
			decoded = nil
		}
	}

	for i, b := range own {
		if len(b) == 0 {
			continue
		}
		str := String{Handle: h, Index: i + 1}
		if decoded != nil {
			str.Value = secret.New([]byte(decoded[i]))
		} else {
			str.Value = secret.New(bytes.Clone(b))
			str.Truncated = cut && !more && i == len(own)-1 && s[len(s)-1] != 0
		}
		c.t.Strings = append(c.t.Strings, str)
	}
}

// split cuts NUL-separated strings apart, with empty ones before the last
// that is not, so that an index in the result is the string's number less
// one. It returns at most limit of them, and whether there were more. The
// results share their bytes with b.
func split(b []byte, limit int) (own [][]byte, more bool) {
	b = bytes.TrimRight(b, "\x00")
	if len(b) == 0 {
		return nil, false
	}
	for str := range bytes.SplitSeq(b, []byte{0}) {
		if len(own) == limit {
			return own, true
		}
		own = append(own, str)
	}
	return own, false
}

// same reports whether the decoder's strings are those that we see.
func same(decoded []string, own [][]byte) bool {
	if len(decoded) != len(own) {
		return false
	}
	for i := range own {
		if decoded[i] != string(own[i]) {
			return false
		}
	}
	return true
}

// handle returns the handle of a structure.
func handle(s []byte) uint16 { return binary.LittleEndian.Uint16(s[2:]) }

// A decoder decodes the first structure in a stream. It is decode, but for
// tests that need one which fails.
type decoder func(io.Reader) ([]string, error)

// whole has a structure of type 11 decoded, with the NULs that it may lack at
// its end.
func (d decoder) whole(s []byte) (strs []string, err error) {
	defer func() {
		if r := recover(); r != nil {
			// What it panicked with may quote the structure.
			strs, err = nil, errors.New("it panics")
		}
	}()
	var pad []byte
	if content := s[oemLen:]; !bytes.HasSuffix(content, endOfStrings) {
		pad = endOfStrings
		if len(content) > 0 && content[len(content)-1] == 0 {
			pad = pad[:1]
		}
	}
	return d(io.MultiReader(bytes.NewReader(s), bytes.NewReader(pad), bytes.NewReader(endOfTable)))
}

// decode decodes a structure of type 11 with an end-of-table behind it, by
// means of go-smbios.
func decode(r io.Reader) ([]string, error) {
	ss, err := smbios.NewDecoder(r).Decode()
	if err != nil {
		// Nothing of it is quoted: what it says is not ours to vouch for.
		return nil, errors.New("it fails")
	}
	if len(ss) != 2 || ss[0].Header.Type != typeOEMStrings {
		return nil, fmt.Errorf("it finds %d structures where there are 2", len(ss))
	}
	return ss[0].Strings, nil
}
