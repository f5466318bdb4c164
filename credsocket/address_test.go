package credsocket

import (
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestParseAddress(t *testing.T) {
	for addr, want := range map[string]Request{
		"@7e1c0a9d52b3f846/unit/web.service/api-key":     {"web.service", "api-key"},
		"@0/unit/a.b.mount/x":                            {"a.b.mount", "x"},
		`@ab/unit/web@a\x2db@c.service/k=v *`:            {`web@a\x2db@c.service`, "k=v *"},
		"@f/unit/:.socket/..." + strings.Repeat("n", 80): {":.socket", "..." + strings.Repeat("n", 80)},
	} {
		if got, err := ParseAddress(addr); err != nil || got != want {
			t.Errorf("ParseAddress(%q) = %+v, %v, want %+v", addr, got, err, want)
		}
	}
	for _, addr := range []string{
		"", "@", "@/unit/a.service/b", "7e/unit/a.service/b", "\x007e/unit/a.service/b", "/run/credentials.sock",
		"@07/unit/a.service/b", "@7E/unit/a.service/b", "@0x7/unit/a.service/b", "@-7/unit/a.service/b", "@+7/unit/a.service/b",
		"@1ffffffffffffffff/unit/a.service/b", "@7e/user/a.service/b", "@7e/unit/a.service", "@7e/unit/a.service/b/c",
		"@7e/unit//b", "@7e/unit/a.service/", "@7e/unit/a.service/..", "@7e/unit/a.service/a:b", "@7e/unit/a.service/é",
		"@7e/unit/service/b", "@7e/unit/.service/b", "@7e/unit/a.services/b", "@7e/unit/a./b", "@7e/unit/a.Service/b",
		"@7e/unit/a b.service/b", "@7e/unit/@a.service/b", "@7e/unit/a@.service/b", "@7e/unit/@.service/b",
		"@7e/unit/a\n.service/b", "@7e/unit/a%.service/b",
		"@7e/unit/a.service/" + strings.Repeat("n", 89), // one byte more than an address has room for
	} {
		if got, err := ParseAddress(addr); !errors.Is(err, ErrAddress) || got != (Request{}) {
			t.Errorf("ParseAddress(%q) = %+v, %v, want ErrAddress", addr, got, err)
		}
	}
}

func FuzzParseAddress(f *testing.F) {
	f.Add("@7e1c0a9d52b3f846/unit/web.service/api-key")
	f.Add(`@0/unit/web@a\x2db.service/k=v`)
	f.Add("@7e/unit/a@.service/b")
	f.Fuzz(func(t *testing.T, addr string) {
		r, err := ParseAddress(addr)
		if err != nil {
			if r != (Request{}) || !errors.Is(err, ErrAddress) {
				t.Errorf("ParseAddress(%q) = %+v, %v", addr, r, err)
			}
			return
		}
		hex, ok := strings.CutSuffix(strings.TrimPrefix(addr, "@"), "/unit/"+r.Unit+"/"+r.Name)
		n, err := strconv.ParseUint(hex, 16, 64)
		if !ok || err != nil || "@"+strconv.FormatUint(n, 16)+"/unit/"+r.Unit+"/"+r.Name != addr {
			t.Errorf("ParseAddress(%q) = %+v does not give the address back", addr, r)
		}
		if strings.ContainsAny(r.Unit+r.Name, "/\x00\n") || !strings.Contains(r.Unit, ".") {
			t.Errorf("ParseAddress(%q) = %+v", addr, r)
		}
	})
}

func TestStoredName(t *testing.T) {
	seen := make(map[string]bool)
	for _, at := range []time.Duration{0, time.Microsecond, 17 * time.Hour, 290 * 365 * 24 * time.Hour} {
		for _, seq := range []uint64{0, 1, 1<<64 - 1} {
			name := storedName(at, seq)
			if got, ok := parseStoredName(name); !ok || got != at {
				t.Errorf("parseStoredName(%q) = %v, %v, want %v", name, got, ok, at)
			}
			if seen[name] || len(name) > 255 || strings.ContainsAny(name, ":") {
				t.Errorf("storedName = %q", name)
			}
			seen[name] = true
		}
	}
	for _, name := range []string{
		"", "stored", "credential-", "credential-1", "credential-1-", "credential--1", "credential-01-1", "credential-1-01", "credential-+1-1",
		"credential--1-1", "credential-1-1-1", "credential-G-1", "credential-7fffffffffffffff-1", "Credential-1-1", "credential-A-1",
	} {
		if IsStored(name) {
			t.Errorf("IsStored(%q) = true", name)
		}
	}
}

func FuzzStoredName(f *testing.F) {
	f.Add("credential-1a2b3c-4d")
	f.Add("credential-7fffffffffffffff-1")
	f.Fuzz(func(t *testing.T, name string) {
		at, ok := parseStoredName(name)
		if !ok {
			if at != 0 {
				t.Errorf("parseStoredName(%q) = %v, false", name, at)
			}
			return
		}
		prefix, _, _ := strings.Cut(storedName(at, 0)[len(storedPrefix):], "-")
		if at < 0 || at%time.Microsecond != 0 || !strings.HasPrefix(name, storedPrefix+prefix+"-") {
			t.Errorf("parseStoredName(%q) = %v", name, at)
		}
	})
}
