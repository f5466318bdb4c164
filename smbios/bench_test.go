package smbios

import (
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// BenchmarkParse goes from bytes to credentials, and wipes them.
func BenchmarkParse(b *testing.B) {
	var strs []string
	for i := range 10 {
		strs = append(strs, fmt.Sprintf("io.guestagent.credential:name%d=%s", i, strings.Repeat("v", 100)))
	}
	ordinary := realTables(b)["jc-dmi_v3.bin"]
	offs := boundaries(ordinary)
	last := offs[len(offs)-1]
	text := "io.guestagent.credential:a=" + strings.Repeat("v", 1<<20-27)
	binary := "io.guestagent.credential.binary:a=" + base64.StdEncoding.EncodeToString(make([]byte, 3<<18-27))

	for _, bb := range []struct {
		name  string
		table []byte
		creds int
	}{
		{"typical", cat(ordinary[:last], oem(0x0EEE, strs...), ordinary[last:]), 10},
		{"text1MiB", cat(oem(0x0E00, text), end), 1},
		{"binary1MiB", cat(oem(0x0E00, binary), end), 1},
	} {
		b.Run(bb.name, func(b *testing.B) {
			entryPoint := entry64(len(bb.table))
			b.SetBytes(int64(len(bb.table)))
			b.ReportAllocs()
			for b.Loop() {
				t, err := Parse(bb.table, entryPoint)
				if err != nil || len(t.Faults) != 0 {
					b.Fatal(t.Faults, err)
				}
				creds, _ := Credentials(t)
				if len(creds) != bb.creds {
					b.Fatalf("%d credentials, want %d", len(creds), bb.creds)
				}
				for _, c := range creds {
					c.Value.Wipe()
				}
				t.Wipe()
			}
		})
	}
}

// BenchmarkParseHostile shows that no table of the largest size costs much
// more than its size.
func BenchmarkParseHostile(b *testing.B) {
	tables := hostileTables()
	for _, name := range slices.Sorted(maps.Keys(tables)) {
		table := tables[name]
		b.Run(strings.ReplaceAll(name, " ", "_"), func(b *testing.B) {
			b.SetBytes(int64(len(table)))
			b.ReportAllocs()
			for b.Loop() {
				t, err := Parse(table, nil)
				if err != nil {
					b.Fatal(err)
				}
				Credentials(t)
			}
		})
	}
}
