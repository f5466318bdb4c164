package smbios

import (
	"bytes"
	"encoding/base64"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/internal/credential"
)

// checkTable checks what holds of every Table, whatever it was made of.
func checkTable(t *testing.T, got Table, sources ...[]byte) {
	t.Helper()
	checkFaults(t, got)
	if len(got.Strings) > MaxStrings || got.Structures > MaxStructures {
		t.Errorf("%d strings, %d structures, want at most %d and %d", len(got.Strings), got.Structures, MaxStrings, MaxStructures)
	}
	total, size := 0, 0
	for i, s := range got.Strings {
		b := s.Value.Bytes()
		total += len(b) + 1
		if len(b) == 0 || bytes.IndexByte(b, 0) >= 0 || s.Index < 1 {
			t.Errorf("string %d = %q, index %d, want no NUL, not empty, from 1", i, b, s.Index)
		}
		if !slices.ContainsFunc(sources, func(src []byte) bool { return bytes.Contains(src, b) }) {
			t.Errorf("string %d = %q does not stand in the table", i, b)
		}
		if s.Truncated && i != len(got.Strings)-1 {
			t.Errorf("string %d of %d is truncated, want the last one only", i+1, len(got.Strings))
		}
	}
	for _, src := range sources {
		size += len(src)
	}
	if total > size+1 {
		t.Errorf("the strings have %d bytes, the table %d", total, size)
	}
}

func FuzzParse(f *testing.F) {
	for _, table := range realTables(f) {
		f.Add(table, entry64(len(table)))
		f.Add(cat(oem(0x0E00, "io.guestagent.credential:a=b"), table), entry32(len(table), 70))
	}
	table := cat(oem(0x0E00, "a", "b"), oem(1), oem(2, "", "c"), end)
	f.Add(table, entry64(len(table)))
	f.Add(table, append(entryLegacy(60, 2), 0x21))
	f.Add(table[:10], []byte{})
	f.Fuzz(func(t *testing.T, table, entryPoint []byte) {
		got := mustParse(t, table, entryPoint)
		checkTable(t, got, table)
		for _, fault := range got.Faults {
			if fault.Code == FaultDecoder {
				t.Errorf("fault %v: on whole structures go-smbios and the walk must agree", fault)
			}
		}
		creds, refused := Credentials(got)
		if len(creds)+len(refused) > len(got.Strings) {
			t.Errorf("%d credentials and %d refusals of %d strings", len(creds), len(refused), len(got.Strings))
		}

		// A table made of what was found gives it again: each run of rising
		// indices is one structure.
		var again []byte
		want := plainStrings(got)
		for i := 0; i < len(want); {
			var strs []string
			first := i
			for ; i < len(want) && want[i].handle == want[first].handle && want[i].index == want[first].index+i-first; i++ {
				want[i].truncated = false
				strs = append(strs, want[i].value)
			}
			if want[first].index > 1 {
				strs = append([]string{""}, strs...) // an empty one stood before
			}
			again = append(again, oem(want[first].handle, strs...)...)
		}
		again = append(again, end...)
		if g := plainStrings(mustParse(t, again, entry64(len(again)))); !slices.Equal(g, want) {
			t.Errorf("Parse(%q).Strings = %v, want %v", again, g, want)
		}
	})
}

// FuzzEntries checks the reading of entries/11-N/raw against a plain account
// of what systemd does.
func FuzzEntries(f *testing.F) {
	f.Add(oem(1, "a", "b"))
	f.Add(oem(1, "a", "b")[:8])
	f.Add(oem(1))
	f.Add(append(oem(1, "", "a"), "b\x00\x00\x00c"...))
	f.Add(structure(typeOEMStrings, 1, []byte{1, 2}, "a"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		good := oem(7, "good")
		got, err := parseEntries([][]byte{raw, good}, decode)
		if err != nil {
			t.Fatal(err)
		}
		checkTable(t, got, raw, good)
		var want []string
		if len(raw) >= 5 && raw[0] == 11 && raw[1] == 5 {
			for s := range bytes.SplitSeq(raw[5:], []byte{0}) {
				if len(s) > 0 {
					want = append(want, string(s))
				}
			}
		}
		want = append(want, "good")
		var g []string
		for _, s := range got.Strings {
			g = append(g, string(s.Value.Bytes()))
		}
		if !slices.Equal(g, want) {
			t.Errorf("parseEntries(%q) = %q, want %q", raw, g, want)
		}
	})
}

func FuzzEntryPoint(f *testing.F) {
	f.Add(entry64(5000))
	f.Add(entry32(700, 7))
	legacy := append(entryLegacy(700, 7), 0x23)
	legacy[5] = -sum(legacy)
	f.Add(legacy)
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseEntryPoint(b)
		if err != nil {
			if got != (EntryPoint{}) {
				t.Errorf("parseEntryPoint(%q) = %+v, %v, want the zero value", b, got, err)
			}
			return
		}
		if got.Version == "" || (got.Bits != 32 && got.Bits != 64) || got.Size < 0 || got.Count < 0 {
			t.Errorf("parseEntryPoint(%q) = %+v", b, got)
		}
	})
}

// FuzzCredentials takes OEM strings, separated by NULs.
func FuzzCredentials(f *testing.F) {
	for _, s := range []string{
		"io.guestagent.credential:a=hello\x00io.guestagent.credential:a=again",
		"io.systemd.credential.binary:b=AAEC\x00io.systemd.credential:b=",
		"io.guestagent.credential.binary:c= A_-/ Zg=\n=",
		"io.guestagent.credential.binary:c=Zh==\x00io.guestagent.credential.binary:c=Zg",
		"io.guestagent.credential:\x00io.systemd.credential:a/b=c\x00io.guestagent.provider:vsock",
		"io.guestagent.x\x00other",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		strs := strings.FieldsFunc(string(b), func(r rune) bool { return r == 0 })
		table := tableOf(strs...)
		creds, refused := Credentials(table)
		for i, s := range table.Strings {
			if got := string(s.Value.Bytes()); got != strs[i] {
				t.Errorf("Credentials changed string %d to %q, want %q", i+1, got, strs[i])
			}
		}
		wantCreds, wantRefused := oracle(strs)
		if got := plainCreds(creds); !slices.Equal(got, wantCreds) {
			t.Errorf("Credentials(%q) = %+v, want %+v", strs, got, wantCreds)
		}
		if len(refused) <= MaxRefusals {
			if got := plainRefusals(refused); !slices.Equal(got, wantRefused) {
				t.Errorf("refused of %q = %v, want %v", strs, refused, wantRefused)
			}
		}

		for _, c := range creds {
			str, err := c.OEMString()
			if err != nil {
				t.Errorf("OEMString() of %q = %v", strs[c.Index-1], err)
				continue
			}
			again, none := Credentials(tableOf(string(str.Bytes())))
			if len(again) != 1 || len(none) != 0 {
				t.Fatalf("Credentials(%q) = %v, %v, want one", str.Bytes(), again, none)
			}
			if a := again[0]; a.Name != c.Name || a.Family != c.Family || !a.Value.Equal(c.Value) || (c.Binary && !a.Binary) {
				t.Errorf("Credentials(%q) = %+v, want what %q gave", str.Bytes(), plainCreds(again), strs[c.Index-1])
			}
			// What is canonical already comes back byte for byte.
			second, err := again[0].OEMString()
			if err != nil || !second.Equal(str) {
				t.Errorf("OEMString() of %q = %q, %v, want the same", str.Bytes(), second.Bytes(), err)
			}
			canonical := !c.Binary && !strings.ContainsFunc(strs[c.Index-1], func(r rune) bool { return r < 0x20 || r > 0x7E }) ||
				c.Binary && strings.HasSuffix(strs[c.Index-1], "="+base64.StdEncoding.EncodeToString(c.Value.Bytes()))
			if canonical && string(str.Bytes()) != strs[c.Index-1] {
				t.Errorf("OEMString() = %q, want %q", str.Bytes(), strs[c.Index-1])
			}
		}
	})
}

// oracle is what Credentials must give, by other means.
func oracle(strs []string) (creds []plainCred, refused []plainRefusal) {
	taken := make(map[plainCred]bool)
	for _, s := range strs {
		var c plainCred
		var rest string
		switch {
		case strings.HasPrefix(s, "io.systemd.credential:"):
			c.family, rest = "systemd", s[22:]
		case strings.HasPrefix(s, "io.systemd.credential.binary:"):
			c.family, c.binary, rest = "systemd", true, s[29:]
		case strings.HasPrefix(s, "io.guestagent.credential:"):
			c.family, rest = "guestagent", s[25:]
		case strings.HasPrefix(s, "io.guestagent.credential.binary:"):
			c.family, c.binary, rest = "guestagent", true, s[32:]
		case strings.HasPrefix(s, "io.guestagent.provider:"):
			continue
		case strings.HasPrefix(s, "io.guestagent."):
			refused = append(refused, plainRefusal{"", credential.ReasonUnknownKind})
			continue
		default:
			continue
		}
		before, after, ok := strings.Cut(rest, "=")
		if !ok {
			refused = append(refused, plainRefusal{"", credential.ReasonNoSeparator})
			continue
		}
		c.name, c.value = before, after
		if credential.CheckName(c.name) != nil {
			refused = append(refused, plainRefusal{"", credential.ReasonBadName})
			continue
		}
		if c.binary {
			// One alphabet and no white space, and the standard library can.
			v, err := base64.StdEncoding.Strict().DecodeString(strings.NewReplacer("-", "+", "_", "/", " ", "", "\t", "", "\n", "", "\r", "").Replace(c.value))
			if err != nil {
				refused = append(refused, plainRefusal{c.name, credential.ReasonBadBase64})
				continue
			}
			c.value = string(v)
		}
		switch id := (plainCred{name: c.name, family: c.family}); {
		case len(c.value) > credential.MaxSize:
			refused = append(refused, plainRefusal{c.name, credential.ReasonTooLarge})
		case taken[id]:
			refused = append(refused, plainRefusal{c.name, credential.ReasonDuplicate})
		default:
			taken[id] = true
			creds = append(creds, c)
		}
	}
	return creds, refused
}

// FuzzOEMString goes the other way: from a credential to a string and back.
func FuzzOEMString(f *testing.F) {
	f.Add("name", true, false, []byte("value"))
	f.Add("name", false, true, []byte{0, 1, 255})
	f.Add("a=b", false, false, []byte("\n"))
	f.Fuzz(func(t *testing.T, name string, agent, binary bool, value []byte) {
		c := Credential{Name: name, Family: FamilySystemd, Binary: binary}
		if agent {
			c.Family = FamilyAgent
		}
		c.Value = tableOf(string(value)).Strings[0].Value
		str, err := c.OEMString()
		if bad := credential.CheckName(name) != nil || strings.Contains(name, "=") || len(value) > credential.MaxSize; (err != nil) != bad {
			t.Fatalf("OEMString() of %q = %v, want an error: %v", name, err, bad)
		}
		if err != nil {
			if !reflect.ValueOf(str).IsZero() {
				t.Errorf("OEMString() of %q = %d bytes and an error", name, str.Len())
			}
			return
		}
		table := cat(oem(1, string(str.Bytes())), end)
		got := mustParse(t, table, entry64(len(table)))
		creds, refused := Credentials(got)
		if len(creds) != 1 || len(refused) != 0 || creds[0].Name != name || creds[0].Family != c.Family || !creds[0].Value.Equal(c.Value) {
			t.Errorf("Credentials(%q) = %+v, %v, want %q = %q", str.Bytes(), plainCreds(creds), refused, name, value)
		}
	})
}
