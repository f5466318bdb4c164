package credential

import (
	"errors"
	"strings"
	"testing"
)

func TestCheckName(t *testing.T) {
	for _, name := range []string{"a", "api-key", "a b", "~", "...", ".hidden", "a=b", "*", "network.network.50-x", strings.Repeat("n", 255)} {
		if err := CheckName(name); err != nil {
			t.Errorf("CheckName(%q) = %v, want nil", name, err)
		}
	}
	for _, name := range []string{"", ".", "..", "/", "a/b", "a:b", ":", "a\x00", "\x1f", "\x7f", "é", "tab\t", "line\n", strings.Repeat("n", 256)} {
		err := CheckName(name)
		if !errors.Is(err, ErrName) {
			t.Errorf("CheckName(%q) = %v, want ErrName", name, err)
		}
	}
}

// What is no name is not quoted: it may be a secret.
func TestCheckNameDoesNotQuote(t *testing.T) {
	for _, name := range []string{"hunter2/hunter2", "hunter2\nhunter2", strings.Repeat("hunter2", 50)} {
		if err := CheckName(name); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("CheckName = %v", err)
		}
	}
}

func FuzzCheckName(f *testing.F) {
	for _, s := range []string{"", ".", "..", "a", "a/b", "a:b", "a=b", "\x7f", "é", strings.Repeat("n", 255), strings.Repeat("n", 256)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		err := CheckName(name)
		// systemd's words: a file name, printable ASCII, no colon.
		want := name != "" && len(name) <= 255 && name != "." && name != ".."
		for _, r := range []byte(name) {
			want = want && r >= ' ' && r <= '~' && r != '/' && r != ':'
		}
		if (err == nil) != want {
			t.Errorf("CheckName(%q) = %v, want valid %v", name, err, want)
		}
	})
}

func TestRefusalString(t *testing.T) {
	r := Refusal{Name: "a", Source: SourceSMBIOS, Reason: ReasonDuplicate, Detail: "why"}
	if got, want := r.String(), "a: duplicate: why"; got != want {
		t.Errorf("String() = %q, want %q", got, want)
	}
	r.Name = ""
	if got, want := r.String(), "duplicate: why"; got != want {
		t.Errorf("String() = %q, want %q", got, want)
	}
}
