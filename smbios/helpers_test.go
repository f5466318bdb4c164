package smbios

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
)

// end is an end-of-table structure as firmware writes it.
var end = structure(typeEndOfTable, 0xFEFF, nil)

// structure builds a structure of any type.
func structure(typ byte, handle uint16, formatted []byte, strs ...string) []byte {
	b := binary.LittleEndian.AppendUint16([]byte{typ, byte(headerLen + len(formatted))}, handle) //nolint:gosec // tests give small ones
	b = append(b, formatted...)
	for _, s := range strs {
		b = append(b, s...)
		b = append(b, 0)
	}
	if len(strs) == 0 {
		b = append(b, 0)
	}
	return append(b, 0)
}

// oem builds a structure of OEM strings, whose count byte wraps as QEMU's does.
func oem(handle uint16, strs ...string) []byte {
	return structure(typeOEMStrings, handle, []byte{byte(len(strs))}, strs...) //nolint:gosec // it is to wrap
}

func cat(parts ...[]byte) []byte { return slices.Concat(parts...) }

// entry64 builds the entry point of an SMBIOS 3.2 table.
func entry64[N int | uint32](size N) []byte {
	b := append([]byte("_SM3_"), 0, 24, 3, 2, 1, 1, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(size))
	b = binary.LittleEndian.AppendUint64(b, 0xE0000)
	b[5] = -sum(b)
	return b
}

// entry32 builds the entry point of an SMBIOS 2.8 table.
func entry32(size, count int) []byte {
	b := append([]byte("_SM_"), 0, 31, 2, 8, 0xFF, 0, 0, 0, 0, 0, 0, 0)
	b = append(b, entryLegacy(size, count)...)
	b = append(b, 0x28)
	b[21] = 0
	b[21] = -sum(b[16:31])
	b[30] = 0x28
	b[4] = -sum(b)
	return b
}

// entryLegacy builds the inner 14 bytes of entry32, without a BCD revision.
func entryLegacy(size, count int) []byte {
	b := append([]byte("_DMI_"), 0)
	b = binary.LittleEndian.AppendUint16(b, uint16(size)) //nolint:gosec // tests give small ones
	b = binary.LittleEndian.AppendUint32(b, 0xE0000)
	return binary.LittleEndian.AppendUint16(b, uint16(count)) //nolint:gosec // tests give small ones
}

// mustParse parses a table that is not too large.
func mustParse(t testing.TB, table, entryPoint []byte) Table {
	t.Helper()
	before := bytes.Clone(table)
	got, err := Parse(table, entryPoint)
	if err != nil {
		t.Fatalf("Parse() = %v, want no error", err)
	}
	if !bytes.Equal(table, before) {
		t.Fatal("Parse changed the table")
	}
	return got
}

// plain is a String that shows its value.
type plain struct {
	handle    uint16
	index     int
	truncated bool
	value     string
}

func plainStrings(t Table) (out []plain) {
	for _, s := range t.Strings {
		out = append(out, plain{s.Handle, s.Index, s.Truncated, string(s.Value.Bytes())})
	}
	return out
}

func codes(t Table) (out []FaultCode) {
	for _, f := range t.Faults {
		out = append(out, f.Code)
	}
	return out
}

// plainCred is a Credential that shows its value.
type plainCred struct {
	name   string
	family Family
	binary bool
	value  string
}

func plainCreds(creds []Credential) (out []plainCred) {
	for _, c := range creds {
		out = append(out, plainCred{c.Name, c.Family, c.Binary, string(c.Value.Bytes())})
	}
	return out
}

type plainRefusal struct {
	name   string
	reason credential.Reason
}

func plainRefusals(refused []credential.Refusal) (out []plainRefusal) {
	for _, r := range refused {
		out = append(out, plainRefusal{r.Name, r.Reason})
	}
	return out
}

// tableOf makes a Table of strings, without a table.
func tableOf(strs ...string) Table {
	var t Table
	for i, s := range strs {
		t.Strings = append(t.Strings, String{Handle: 0x0E00, Index: i + 1, Value: secret.New([]byte(s))})
	}
	return t
}

// realTables returns the tables in testdata/dmi by name.
func realTables(t testing.TB) map[string][]byte {
	t.Helper()
	out := make(map[string][]byte)
	for _, pattern := range []string{"*.dmi", "*.bin"} {
		names, err := filepath.Glob(filepath.Join("testdata", "dmi", pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if strings.Contains(name, "entry") {
				continue
			}
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			out[filepath.Base(name)] = b
		}
	}
	if len(out) != 7 {
		t.Fatalf("testdata/dmi has %d tables, want 7", len(out))
	}
	return out
}

// boundaries returns where structures begin in a table, up to the
// end-of-table, a structure that is too short, or the end of the bytes. It is
// not the package's own walk.
func boundaries(table []byte) (offs []int) {
	for off := 0; ; {
		offs = append(offs, off)
		if off+4 > len(table) || table[off+1] < 4 || table[off] == typeEndOfTable {
			return offs
		}
		off += int(table[off+1])
		for table[off] != 0 || table[off+1] != 0 {
			off++
		}
		off += 2
	}
}
