package smbios

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	godmi "github.com/digitalocean/go-smbios/smbios"
)

func TestParse(t *testing.T) {
	bios := structure(0, 0x0000, make([]byte, 20), "vendor", "1.0")
	system := structure(1, 0x0100, make([]byte, 23))
	many := make([]string, 300)
	manyWant := make([]plain, 300)
	for i := range many {
		many[i] = strings.Repeat("x", i+1)
		manyWant[i] = plain{0x0E00, i + 1, false, many[i]}
	}
	wrongCount := func(n byte) []byte {
		b := oem(0x0E00, "a", "b")
		b[4] = n
		return b
	}
	ab := []plain{{0x0E00, 1, false, "a"}, {0x0E00, 2, false, "b"}}
	abCut := []plain{{0x0E00, 1, false, "a"}, {0x0E00, 2, true, "b"}}

	// The entry point is entry64 of the right size, unless the case has one.
	tests := []struct {
		name       string
		table      []byte
		entryPoint []byte
		want       []plain
		faults     []FaultCode
		structures int
	}{
		{name: "no OEM strings", table: cat(bios, system, end), structures: 3},
		{name: "end only", table: end, structures: 1},
		{name: "nothing", table: nil, faults: []FaultCode{FaultNoEnd}},
		{name: "ordinary", table: cat(bios, oem(0x0E00, "a", "b"), system, end), want: ab, structures: 4},
		{name: "no string in the set", table: cat(oem(0x0E00), end), structures: 2},
		{name: "several structures", table: cat(oem(0x0E00, "a", "b"), bios, oem(0x0E01, "c"), oem(0x0E00, "d"), end), structures: 5, want: []plain{
			{0x0E00, 1, false, "a"}, {0x0E00, 2, false, "b"}, {0x0E01, 1, false, "c"}, {0x0E00, 1, false, "d"},
		}},
		{name: "count byte too small", table: cat(wrongCount(0), end), want: ab, structures: 2},
		{name: "count byte too large", table: cat(wrongCount(200), end), want: ab, structures: 2},
		{name: "more than 255 strings", table: cat(oem(0x0E00, many...), end), want: manyWant, structures: 2},
		{name: "first string empty", table: cat(oem(0x0E00, "", "b"), end), want: []plain{{0x0E00, 2, false, "b"}}, structures: 2},
		{name: "bytes as they are", table: cat(oem(0x0E00, " \xff\t\n\r=,\x01 "), end), want: []plain{{0x0E00, 1, false, " \xff\t\n\r=,\x01 "}}, structures: 2},

		{name: "no end", table: cat(oem(0x0E00, "a", "b"), system), want: ab, faults: []FaultCode{FaultNoEnd}, structures: 2},
		{name: "cut in a header", table: cat(oem(0x0E00, "a", "b"), system[:3]), want: ab, faults: []FaultCode{FaultCut}, structures: 1},
		{name: "cut in a formatted area", table: cat(oem(0x0E00, "a", "b"), system[:8]), want: ab, faults: []FaultCode{FaultCut}, structures: 1},
		{name: "cut in the strings of another", table: cat(oem(0x0E00, "a", "b"), bios[:len(bios)-3]), want: ab, faults: []FaultCode{FaultCut}, structures: 1},
		{name: "cut before the last NUL", table: oem(0x0E00, "a", "b")[:9], want: ab, faults: []FaultCode{FaultCut}},
		{name: "cut before both NULs", table: oem(0x0E00, "a", "bcd")[:10], want: []plain{
			{0x0E00, 1, false, "a"}, {0x0E00, 2, true, "bcd"},
		}, faults: []FaultCode{FaultCut}},
		{name: "cut in the only string", table: oem(0x0E00, "abc")[:7], want: []plain{{0x0E00, 1, true, "ab"}}, faults: []FaultCode{FaultCut}},
		{name: "cut behind the count byte", table: oem(0x0E00, "abc")[:5], faults: []FaultCode{FaultCut}},
		{name: "cut before the count byte", table: oem(0x0E00, "abc")[:4], faults: []FaultCode{FaultCut}},
		{name: "cut behind the first NUL of an empty set", table: oem(0x0E00)[:6], faults: []FaultCode{FaultCut}},
		{name: "cut, first string empty", table: oem(0x0E00, "", "bcd")[:8], want: []plain{{0x0E00, 2, true, "bc"}}, faults: []FaultCode{FaultCut}},
		{
			name: "bad later structure", table: cat(oem(0x0E00, "a", "b"), []byte{1, 3, 0, 1, 0, 0}, oem(0x0E01, "c"), end), want: ab,
			faults: []FaultCode{FaultBadStructure}, structures: 1,
		},
		{name: "zeros behind", table: cat(oem(0x0E00, "a", "b"), make([]byte, 100)), want: ab, faults: []FaultCode{FaultBadStructure}, structures: 1},

		{name: "formatted area of 6", table: cat(structure(typeOEMStrings, 0x0D00, []byte{1, 0}, "x"), oem(0x0E00, "a", "b"), end), want: ab, faults: []FaultCode{FaultBadOEMStructure}, structures: 3},
		{name: "formatted area of 4", table: cat(structure(typeOEMStrings, 0x0D00, nil, "x"), oem(0x0E00, "a", "b"), end), want: ab, faults: []FaultCode{FaultBadOEMStructure}, structures: 3},
		{name: "formatted area of 6, cut", table: structure(typeOEMStrings, 0x0D00, []byte{1, 0}, "x", "y")[:8], faults: []FaultCode{FaultCut, FaultBadOEMStructure}},

		{name: "behind the end", table: cat(oem(0x0E00, "a", "b"), end, oem(0x0E01, "c"), end), want: ab, faults: []FaultCode{FaultTrailing}, structures: 2},
		{name: "garbage behind the end", table: cat(oem(0x0E00, "a", "b"), end, []byte{11}), want: ab, faults: []FaultCode{FaultTrailing}, structures: 2},
		{
			name: "32 bits, behind the end", table: cat(bios, end, oem(0x0E00, "a", "b")), entryPoint: entry32(100, 3), want: ab, structures: 3,
		},
		{
			name: "32 bits, count reached without an end", table: cat(bios, oem(0x0E00, "a", "b")), entryPoint: entry32(100, 2), want: ab, structures: 2,
		},
		{
			name: "32 bits, past the count", table: cat(bios, oem(0x0E00, "a", "b"), oem(0x0E01, "c"), end), entryPoint: entry32(100, 2), want: ab,
			faults: []FaultCode{FaultTrailing}, structures: 2,
		},
		{name: "32 bits, count too large", table: cat(oem(0x0E00, "a", "b"), end), entryPoint: entry32(100, 9), want: ab, structures: 2},
		{name: "32 bits, count too large, no end", table: cat(oem(0x0E00, "a", "b")), entryPoint: entry32(100, 9), want: ab, faults: []FaultCode{FaultNoEnd}, structures: 1},
		{name: "32 bits, count too large, zeros behind", table: cat(oem(0x0E00, "a", "b"), end, make([]byte, 9)), entryPoint: entry32(100, 9), want: ab, faults: []FaultCode{FaultTrailing}, structures: 2},
		{name: "32 bits, count too large, two bytes behind", table: cat(oem(0x0E00, "a", "b"), end, []byte{1, 9}), entryPoint: entry32(100, 9), want: ab, faults: []FaultCode{FaultTrailing}, structures: 2},
		{name: "32 bits, no count", table: cat(oem(0x0E00, "a", "b"), end, oem(0x0E01, "c")), entryPoint: entry32(100, 0), want: ab, faults: []FaultCode{FaultTrailing}, structures: 2},

		// What SeaBIOS before 1.17 makes of 64 KiB and 10 bytes, as Linux shows it from 6.6.39 on and before.
		{name: "cut by firmware, trimmed", table: oem(0x0E00, "a", "b"), entryPoint: entry64(cutSize + 10), want: abCut, faults: []FaultCode{FaultNoEnd, FaultCut}, structures: 1},
		{name: "cut by firmware", table: cat(oem(0x0E00, "a", "b"), make([]byte, cutSize)), want: abCut, faults: []FaultCode{FaultBadStructure, FaultCut}, structures: 1},
		{name: "cut by firmware, no entry point", table: cat(oem(0x0E00, "a", "b"), make([]byte, cutSize)), entryPoint: []byte{}, want: abCut, faults: []FaultCode{FaultEntryPoint, FaultBadStructure, FaultCut}, structures: 1},
		{name: "cut by firmware, behind another", table: cat(oem(0x0E00, "a", "b"), system), entryPoint: entry64(cutSize + 10), want: ab, faults: []FaultCode{FaultNoEnd}, structures: 2},
		{name: "small, zeros behind", table: cat(oem(0x0E00, "a", "b"), make([]byte, cutSize-11)), want: ab, faults: []FaultCode{FaultBadStructure}, structures: 1},
		{name: "large, a bad structure behind", table: cat(oem(0x0E00, "a", "b"), []byte{1, 3, 0, 1}, make([]byte, cutSize)), want: ab, faults: []FaultCode{FaultBadStructure}, structures: 1},

		{name: "entry point broken", table: cat(oem(0x0E00, "a", "b"), end), entryPoint: []byte("_SM3_"), want: ab, faults: []FaultCode{FaultEntryPoint}, structures: 2},
		{name: "entry point missing", table: cat(oem(0x0E00, "a", "b"), end), entryPoint: []byte{}, want: ab, faults: []FaultCode{FaultEntryPoint}, structures: 2},
		{name: "entry point too small", table: cat(oem(0x0E00, "a", "b"), end), entryPoint: entry64(4), want: ab, faults: []FaultCode{FaultSize}, structures: 2},
		{name: "entry point larger", table: cat(oem(0x0E00, "a", "b"), end), entryPoint: entry64(uint32(1 << 31)), want: ab, structures: 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ep := tt.entryPoint
			if ep == nil {
				ep = entry64(len(tt.table))
			}
			got := mustParse(t, tt.table, ep)
			if g := plainStrings(got); !slices.Equal(g, tt.want) {
				t.Errorf("Parse(%q).Strings = %v, want %v", tt.table, g, tt.want)
			}
			if g := codes(got); !slices.Equal(g, tt.faults) {
				t.Errorf("Parse(%q).Faults = %v, want %v", tt.table, got.Faults, tt.faults)
			}
			if got.Structures != tt.structures {
				t.Errorf("Parse(%q).Structures = %d, want %d", tt.table, got.Structures, tt.structures)
			}
			if got.Origin != OriginTables {
				t.Errorf("Parse(%q).Origin = %q, want %q", tt.table, got.Origin, OriginTables)
			}
			checkFaults(t, got)
		})
	}
}

// checkFaults checks what holds of every list of faults.
func checkFaults(t testing.TB, table Table) {
	t.Helper()
	if n := len(table.Faults); n > MaxFaults {
		t.Errorf("%d faults, want at most %d", n, MaxFaults)
	}
	for _, f := range table.Faults {
		if f.Code == "" || f.Detail == "" || strings.ContainsAny(f.Detail, "\n\r\x00") || !strings.HasPrefix(f.String(), string(f.Code)+": ") {
			t.Errorf("fault %q, want a code and one line", f)
		}
	}
}

// A table that is cut anywhere gives the strings that were whole before the
// cut, and a truncated one only as such.
func TestParseCutAnywhere(t *testing.T) {
	strs := []string{"io.guestagent.credential:a=first", "second", "io.systemd.credential:b=third"}
	table := cat(structure(1, 0x0100, make([]byte, 23), "x"), oem(0x0E00, strs...), end)
	for n := range table {
		got := mustParse(t, table[:n], entry64(len(table)))
		whole := 0
		for i, s := range got.Strings {
			v := string(s.Value.Bytes())
			switch {
			case !s.Truncated && v == strs[i]:
				whole++
			case s.Truncated && i == len(got.Strings)-1 && strings.HasPrefix(strs[i], v):
			default:
				t.Errorf("cut at %d: string %d = %q, truncated %v, want %q", n, i+1, v, s.Truncated, strs[i])
			}
		}
		want := 0
		for i := range strs {
			if bytes.Contains(table[:n], append([]byte(strs[i]), 0)) {
				want++
			}
		}
		if whole != want {
			t.Errorf("cut at %d: %d whole strings, want %d", n, whole, want)
		}
	}
}

func TestParseTooLarge(t *testing.T) {
	table := make([]byte, MaxTableSize+1)
	copy(table, oem(1, "a"))
	got, err := Parse(table, nil)
	if !errors.Is(err, ErrTooLarge) || !reflect.DeepEqual(got, Table{}) {
		t.Errorf("Parse(%d bytes) = %v, %v, want the zero Table and %v", len(table), got, err, ErrTooLarge)
	}
	if _, err := Parse(table[:MaxTableSize], nil); err != nil {
		t.Errorf("Parse(%d bytes) = %v, want no error", MaxTableSize, err)
	}
	got, err = parseEntries([][]byte{table[:MaxTableSize], {0}}, decode)
	if !errors.Is(err, ErrTooLarge) || !reflect.DeepEqual(got, Table{}) {
		t.Errorf("parseEntries(%d bytes) = %v, %v, want the zero Table and %v", len(table), got, err, ErrTooLarge)
	}
}

// fill repeats b up to the largest table.
func fill(b []byte) []byte { return bytes.Repeat(b, MaxTableSize/len(b)) }

// hostileTables are of the largest size and made to cost as much as they can.
func hostileTables() map[string][]byte {
	unterminated := append(oem(1, "x")[:5], bytes.Repeat([]byte("ab"), MaxTableSize/2-3)...)
	return map[string][]byte{
		"tiny structures":      fill(structure(1, 1, nil)),
		"tiny OEM structures":  fill(oem(1, "x")),
		"bad OEM structures":   fill(structure(typeOEMStrings, 1, nil)),
		"one million strings":  append(oem(1, "x")[:5], fill([]byte("x\x00"))[:MaxTableSize-8]...),
		"one long string":      cat(oem(1, string(bytes.Repeat([]byte("x"), MaxTableSize-14))), end),
		"one cut string":       unterminated,
		"zeros":                make([]byte, MaxTableSize),
		"noSeparators":         fill(oem(1, slices.Repeat([]string{"io.guestagent.credential:"}, 255)...)),
		"duplicates":           fill(oem(1, slices.Repeat([]string{"io.guestagent.credential:a="}, 255)...)),
		"NULs in one raw file": append(oem(1, "x")[:5], fill([]byte("\x00x"))[:MaxTableSize-5]...),
	}
}

func TestParseHostile(t *testing.T) {
	for name, table := range hostileTables() {
		t.Run(name, func(t *testing.T) {
			check := func(got Table) {
				t.Helper()
				if n := len(got.Strings); n > MaxStrings {
					t.Errorf("%d strings, want at most %d", n, MaxStrings)
				}
				if got.Structures > MaxStructures {
					t.Errorf("%d structures, want at most %d", got.Structures, MaxStructures)
				}
				if len(got.Faults) == 0 && name != "one long string" {
					t.Error("no faults")
				}
				checkFaults(t, got)
				creds, refused := Credentials(got)
				if n := len(refused); n > MaxRefusals+1 {
					t.Errorf("%d refusals, want at most %d", n, MaxRefusals+1)
				}
				if name == "duplicates" && (len(creds) != 1 || len(refused) != MaxRefusals+1) {
					t.Errorf("%d credentials and %d refusals, want 1 and %d", len(creds), len(refused), MaxRefusals+1)
				}
			}
			check(mustParse(t, table, entry64(len(table))))
			got, err := parseEntries([][]byte{table}, decode)
			if err != nil {
				t.Fatal(err)
			}
			if table[0] == typeOEMStrings && name != "one long string" && name != "one cut string" {
				check(got)
			}
		})
	}
}

func TestParseLimits(t *testing.T) {
	small := slices.Repeat([][]byte{structure(1, 1, nil)}, MaxStructures-1)
	table := cat(append(small, end)...)
	if got := mustParse(t, table, entry64(len(table))); got.Structures != MaxStructures || len(got.Faults) != 0 {
		t.Errorf("%d structures, faults %v, want %d and none", got.Structures, got.Faults, MaxStructures)
	}
	table = cat(append(small, oem(1, "a"), oem(2, "b"), end)...)
	got := mustParse(t, table, entry64(len(table)))
	if len(got.Strings) != 1 || !slices.Equal(codes(got), []FaultCode{FaultTooManyStructures}) {
		t.Errorf("%d strings, faults %v, want 1 and %v", len(got.Strings), got.Faults, FaultTooManyStructures)
	}

	table = cat(append(slices.Repeat([][]byte{oem(1, "a")}, MaxOEMStructures+1), end)...)
	got = mustParse(t, table, entry64(len(table)))
	if len(got.Strings) != MaxOEMStructures || !slices.Equal(codes(got), []FaultCode{FaultTooManyStructures}) {
		t.Errorf("%d strings, faults %v, want %d and %v", len(got.Strings), got.Faults, MaxOEMStructures, FaultTooManyStructures)
	}

	strs := slices.Repeat([]string{"a"}, MaxStrings)
	table = cat(oem(1, strs...), end)
	if got = mustParse(t, table, entry64(len(table))); len(got.Strings) != MaxStrings || len(got.Faults) != 0 {
		t.Errorf("%d strings, faults %v, want %d and none", len(got.Strings), got.Faults, MaxStrings)
	}
	table = cat(oem(1, "b"), oem(2, strs...), oem(3, "c"), end)
	got = mustParse(t, table, entry64(len(table)))
	if len(got.Strings) != MaxStrings || !slices.Equal(codes(got), []FaultCode{FaultTooManyStrings, FaultTooManyStrings}) {
		t.Errorf("%d strings, faults %v, want %d and %v twice", len(got.Strings), got.Faults, MaxStrings, FaultTooManyStrings)
	}

	// The string that the table cuts is past the limit: none is truncated.
	got = mustParse(t, cat(oem(2, strs...), oem(3, "cut"))[:len(oem(2, strs...))+7], entry64(len(table)))
	for _, s := range got.Strings {
		if s.Truncated {
			t.Errorf("string %d of structure %d is truncated, want none", s.Index, s.Handle)
		}
	}
	got = mustParse(t, oem(2, append(slices.Clone(strs), "cut")...)[:5+2*MaxStrings+2], entry64(len(table)))
	if n := len(got.Strings); n != MaxStrings || got.Strings[n-1].Truncated {
		t.Errorf("%d strings, want %d, none truncated", n, MaxStrings)
	}
}

// Whatever go-smbios does, the strings are those in the table.
func TestParseDecoderFails(t *testing.T) {
	table := cat(oem(0x0E00, "io.guestagent.credential:a=1", "b"), oem(0x0E01), end)
	want := plainStrings(mustParse(t, table, entry64(len(table))))
	if len(want) != 2 {
		t.Fatalf("%d strings, want 2", len(want))
	}
	for name, dec := range map[string]decoder{
		"fails":   func(io.Reader) ([]string, error) { return nil, errors.New("no") },
		"panics":  func(io.Reader) ([]string, error) { panic("b") },
		"loses":   func(io.Reader) ([]string, error) { return []string{"b"}, nil },
		"changes": func(io.Reader) ([]string, error) { return []string{"io.guestagent.credential:a=2", "b"}, nil },
		"adds":    func(io.Reader) ([]string, error) { return []string{"io.guestagent.credential:a=1", "b", "c"}, nil },
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parse(table, entry64(len(table)), nil, dec)
			if err != nil {
				t.Fatal(err)
			}
			if g := plainStrings(got); !slices.Equal(g, want) {
				t.Errorf("Strings = %v, want %v", g, want)
			}
			if g := codes(got); !slices.Equal(g, []FaultCode{FaultDecoder, FaultDecoder}) {
				t.Errorf("Faults = %v, want %v twice", got.Faults, FaultDecoder)
			}
			checkFaults(t, got)
		})
	}
}

func TestParseEntries(t *testing.T) {
	tests := []struct {
		name   string
		raw    [][]byte
		want   []plain
		faults []FaultCode
	}{
		{name: "none"},
		{name: "ordinary", raw: [][]byte{oem(0x0E00, "a", "b"), oem(0x0E01, "c")}, want: []plain{
			{0x0E00, 1, false, "a"}, {0x0E00, 2, false, "b"}, {0x0E01, 1, false, "c"},
		}},
		{name: "no string", raw: [][]byte{oem(0x0E00)}},
		{name: "header only", raw: [][]byte{oem(0x0E00)[:5]}},
		{name: "one NUL", raw: [][]byte{oem(0x0E00)[:6]}},
		{name: "one NUL behind the last", raw: [][]byte{oem(0x0E00, "a")[:7]}, want: []plain{{0x0E00, 1, false, "a"}}},
		{name: "no NUL behind the last", raw: [][]byte{oem(0x0E00, "a", "bcd")[:9]}, want: []plain{{0x0E00, 1, false, "a"}, {0x0E00, 2, false, "bc"}}},
		{
			name: "empty in the middle", raw: [][]byte{append(oem(0x0E00, "a"), "b"...)},
			want: []plain{{0x0E00, 1, false, "a"}, {0x0E00, 3, false, "b"}}, faults: []FaultCode{FaultDecoder},
		},
		{
			name: "empty ones at the end", raw: [][]byte{append(oem(0x0E00, "a"), 0, 0, 0)},
			want: []plain{{0x0E00, 1, false, "a"}}, faults: []FaultCode{FaultDecoder},
		},
		{
			name: "bad ones between", raw: [][]byte{nil, oem(0x0D00)[:4], structure(1, 0x0D01, []byte{1}, "x"), structure(typeOEMStrings, 0x0D02, []byte{1, 0}, "x"), oem(0x0E00, "a")},
			want: []plain{{0x0E00, 1, false, "a"}}, faults: []FaultCode{FaultBadOEMStructure, FaultBadOEMStructure, FaultBadOEMStructure, FaultBadOEMStructure},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseEntries(tt.raw, decode)
			if err != nil {
				t.Fatal(err)
			}
			if g := plainStrings(got); !slices.Equal(g, tt.want) {
				t.Errorf("parseEntries(%q).Strings = %v, want %v", tt.raw, g, tt.want)
			}
			if g := codes(got); !slices.Equal(g, tt.faults) {
				t.Errorf("parseEntries(%q).Faults = %v, want %v", tt.raw, got.Faults, tt.faults)
			}
			if got.Origin != OriginEntries {
				t.Errorf("Origin = %q, want %q", got.Origin, OriginEntries)
			}
			checkFaults(t, got)
		})
	}
}

func TestParseEntryPoint(t *testing.T) {
	legacy := append(entryLegacy(700, 7), 0x23)
	legacy[5] = -sum(legacy)
	short32 := entry32(700, 7) // as the specification of 2.1 has it
	short32[5], short32[4] = 30, short32[4]+1+short32[30]
	real64, err := os.ReadFile(filepath.Join("testdata", "dmi", "jc-entry_v3.bin"))
	if err != nil {
		t.Fatal(err)
	}
	table := realTables(t)["jc-dmi_v3.bin"]
	if got := mustParse(t, table, real64); len(got.Faults) != 0 || got.EntryPoint.Size != int64(len(table)) {
		t.Errorf("Parse(jc-dmi_v3.bin) has faults %v and entry point %v, want none and size %d", got.Faults, got.EntryPoint, len(table))
	}

	change := func(b []byte, at int) []byte { b = bytes.Clone(b); b[at]++; return b }
	tests := []struct {
		name string
		b    []byte
		want EntryPoint
	}{
		{"64 bits", entry64(5000), EntryPoint{"3.2", 64, 5000, 0}},
		{"64 bits, largest", entry64(uint32(1<<32 - 1)), EntryPoint{"3.2", 64, 1<<32 - 1, 0}},
		{"64 bits, real", real64, EntryPoint{"3.0", 64, 0x1595, 0}},
		{"64 bits, bytes behind", append(entry64(5000), 1, 2, 3), EntryPoint{"3.2", 64, 5000, 0}},
		{"32 bits", entry32(700, 7), EntryPoint{"2.8", 32, 700, 7}},
		{"32 bits of length 30", short32, EntryPoint{"2.8", 32, 700, 7}},
		{"legacy", legacy, EntryPoint{"2.3", 32, 700, 7}},

		{"nothing", nil, EntryPoint{}},
		{"no anchor", []byte("_SMX_ and so on"), EntryPoint{}},
		{"anchor only", []byte("_SM_"), EntryPoint{}},
		{"too long", append(entry64(5000), make([]byte, 64)...), EntryPoint{}},
		{"64 bits, cut", entry64(5000)[:23], EntryPoint{}},
		{"64 bits, checksum", change(entry64(5000), 12), EntryPoint{}},
		{"64 bits, length", change(entry64(5000), 6), EntryPoint{}},
		{"32 bits, cut", entry32(700, 7)[:30], EntryPoint{}},
		{"32 bits, checksum", change(entry32(700, 7), 22), EntryPoint{}},
		{"32 bits, inner anchor", change(change(entry32(700, 7), 16), 16), EntryPoint{}},
		{"legacy, cut", legacy[:14], EntryPoint{}},
		{"legacy, checksum", change(legacy, 8), EntryPoint{}},
	}
	for _, tt := range tests {
		got, err := parseEntryPoint(tt.b)
		if got != tt.want || (err == nil) != (tt.want != EntryPoint{}) {
			t.Errorf("%s: parseEntryPoint(%q) = %+v, %v, want %+v", tt.name, tt.b, got, err, tt.want)
		}
	}
	inner := entry32(700, 7)
	inner[16], inner[4] = 'x', inner[4]+'_'-'x'
	if got, err := parseEntryPoint(inner); err == nil || (got != EntryPoint{}) {
		t.Errorf("parseEntryPoint(%q) = %+v, %v, want an error", inner, got, err)
	}
	short := entry64(5000)
	short[6], short[5] = 8, 0
	short[5] = -sum(short[:8])
	if got, err := parseEntryPoint(short); err == nil || (got != EntryPoint{}) {
		t.Errorf("parseEntryPoint(%q) = %+v, %v, want an error", short, got, err)
	}
}

func TestTableWipe(t *testing.T) {
	table := cat(oem(1, "io.guestagent.credential:a=hush", "b"), end)
	got := mustParse(t, table, entry64(len(table)))
	creds, _ := Credentials(got)
	views := [][]byte{got.Strings[0].Value.Bytes(), got.Strings[1].Value.Bytes()}
	got.Wipe()
	for i, v := range views {
		if !bytes.Equal(v, make([]byte, len(v))) || got.Strings[i].Value.Len() != 0 {
			t.Errorf("string %d = %q after Wipe, want zeros", i+1, v)
		}
	}
	if len(creds) != 1 || string(creds[0].Value.Bytes()) != "hush" {
		t.Errorf("credentials = %v after Wipe of the table, want them untouched", plainCreds(creds))
	}
	got.Wipe()
}

func TestRealTables(t *testing.T) {
	oemStrings := map[string]int{
		"Beelink-EQ12.dmi":                     1,
		"HyperV.dmi":                           3,
		"jc-dmi.bin":                           0,
		"jc-dmi_v3.bin":                        6,
		"jc-dmi_v3_short.bin":                  2,
		"uroot-satellite_pro_l70_testdata.bin": 5,
		"uroot-smbios_table.bin":               0,
	}
	faults := map[string][]FaultCode{
		"Beelink-EQ12.dmi": {FaultNoEnd},
		"HyperV.dmi":       {FaultBadStructure},
	}
	ours := []string{
		"io.guestagent.credential:text=hello",
		"io.systemd.credential.binary:bin=AAEC",
		"somebody else's",
		"io.guestagent.credential:empty=",
	}
	wantCreds := []plainCred{
		{"text", FamilyAgent, false, "hello"},
		{"bin", FamilySystemd, true, "\x00\x01\x02"},
		{"empty", FamilyAgent, false, ""},
	}

	tables := realTables(t)
	for _, name := range slices.Sorted(maps.Keys(tables)) {
		t.Run(name, func(t *testing.T) {
			table := tables[name]
			got := mustParse(t, table, entry64(len(table)))
			if n := len(got.Strings); n != oemStrings[name] {
				t.Errorf("%d OEM strings %v, want %d", n, plainStrings(got), oemStrings[name])
			}
			if g := codes(got); !slices.Equal(g, faults[name]) {
				t.Errorf("faults %v, want %v", got.Faults, faults[name])
			}
			offs := boundaries(table)
			if want := len(offs) - 1; got.Structures < want || got.Structures > want+1 {
				t.Errorf("%d structures, want %d or one more for the end", got.Structures, want)
			}
			if creds, refused := Credentials(got); len(creds)+len(refused) != 0 {
				t.Errorf("Credentials() = %v, %v, want none", creds, refused)
			}

			// The library alone fails on these two, and that is why there is
			// a walk of our own.
			_, err := godmi.NewDecoder(bytes.NewReader(table)).Decode()
			if broken := faults[name] != nil; (err != nil) != broken {
				t.Errorf("go-smbios alone: %v, want an error: %v", err, broken)
			}

			for _, off := range offs {
				added := cat(table[:off], oem(0x0EEE, ours...), table[off:])
				got := mustParse(t, added, entry64(len(added)))
				creds, refused := Credentials(got)
				if g := plainCreds(creds); !slices.Equal(g, wantCreds) || len(refused) != 0 {
					t.Errorf("ours at offset %d: Credentials() = %v, %v, want %v and none", off, g, refused, wantCreds)
				}
				if g := codes(got); !slices.Equal(g, faults[name]) || len(got.Strings) != oemStrings[name]+len(ours) {
					t.Errorf("ours at offset %d: %d strings, faults %v, want %d and %v", off, len(got.Strings), got.Faults, oemStrings[name]+len(ours), faults[name])
				}
			}
		})
	}
}
