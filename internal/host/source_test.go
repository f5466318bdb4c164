package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

func show(creds []vsockrpc.Credential) string {
	var b strings.Builder
	for _, c := range creds {
		fmt.Fprintf(&b, "%s@%s=%q ", c.Name, c.Revision, c.Value.Bytes())
	}
	return strings.TrimSpace(b.String())
}

func TestParseArgument(t *testing.T) {
	for arg, want := range map[string][2]string{
		"api-key:./file": {"api-key", "./file"},
		"a:-":            {"a", "-"},
		"a:b:c":          {"a", "b:c"},
		"a:x=y":          {"a", "x=y"}, // a path may have one
	} {
		name, path, err := ParseArgument(arg)
		if err != nil || name != want[0] || path != want[1] {
			t.Errorf("ParseArgument(%q) = %q, %q, %v, want %q", arg, name, path, err, want)
		}
	}
	for _, arg := range []string{"", "a", "a:", ":x", "a/b:x", "api-key=hunter2", "api-key=hunter2:x", "hunter2"} {
		_, _, err := ParseArgument(arg)
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("ParseArgument(%q) = %v", arg, err)
		}
	}
}

func TestReadArguments(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, []byte("from a file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	large := filepath.Join(dir, "large")
	if err := os.WriteFile(large, make([]byte, credential.MaxSize), 0o600); err != nil {
		t.Fatal(err)
	}
	over := filepath.Join(dir, "over")
	if err := os.WriteFile(over, make([]byte, credential.MaxSize+1), 0o600); err != nil {
		t.Fatal(err)
	}
	creds, err := ReadArguments([]string{"a:" + file, "b:-"}, strings.NewReader("from stdin"))
	if got, want := show(creds), `a@="from a file\n" b@="from stdin"`; err != nil || got != want {
		t.Errorf("ReadArguments = %s, %v, want %s", got, err, want)
	}
	if creds, err := ReadArguments([]string{"a:" + large}, nil); err != nil || creds[0].Value.Len() != credential.MaxSize {
		t.Errorf("ReadArguments of 1 MiB = %d credentials, %v", len(creds), err)
	}
	for _, args := range [][]string{{"a:-", "b:-"}, {"a:" + file, "a:" + file}, {"a:" + over}, {"a:" + dir}, {"a:" + dir + "/missing"}, {"nonsense"}, {"a:hunter2"}, {"a:" + strings.Repeat("hunter2", 100)}} {
		if creds, err := ReadArguments(args, strings.NewReader("hunter2")); err == nil || creds != nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("ReadArguments(%q) = %d credentials, %v, want an error", args, len(creds), err)
		}
	}
}

func TestReadDir(t *testing.T) {
	dir := t.TempDir()
	for name, v := range map[string]string{"HOST-a": "1", "HOST-b": "2", "other": "3", ".hidden": "4"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(v), 0o400); err != nil {
			t.Fatal(err)
		}
	}
	creds, err := ReadDir(dir, "HOST-")
	if got, want := show(creds), `a@="1" b@="2"`; err != nil || got != want {
		t.Errorf("ReadDir = %s, %v, want %s", got, err, want)
	}
	creds, err = ReadDir(dir, "")
	if got, want := show(creds), `HOST-a@="1" HOST-b@="2" other@="3"`; err != nil || got != want {
		t.Errorf("ReadDir = %s, %v, want %s", got, err, want)
	}
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadDir(dir, ""); err == nil {
		t.Error("ReadDir with a folder in it succeeded")
	}
	if _, err := ReadDir(dir, "HOST-a"); err == nil {
		t.Error("ReadDir with a name that is all prefix succeeded")
	}
	if _, err := ReadDir(filepath.Join(dir, "missing"), ""); err == nil {
		t.Error("ReadDir of a missing folder succeeded")
	}
}

func TestReadJSON(t *testing.T) {
	creds, err := ReadJSON(strings.NewReader(`{"systemd.credentials": [{"name": "a", "text": "x\ny"}, {"name": "b", "data": "AAEC", "revision": "r1"}, {"name": "c", "text": ""}]}`))
	if got, want := show(creds), `a@="x\ny" b@r1="\x00\x01\x02" c@=""`; err != nil || got != want {
		t.Errorf("ReadJSON = %s, %v, want %s", got, err, want)
	}
	for _, in := range []string{
		``, `hunter2`, `[]`, `{"systemd.credentials": "hunter2"}`, `{"systemd.credentials": [{"name": "a", "txt": "hunter2"}]}`,
		`{"systemd.credentials": [{"name": "a"}]}`, `{"systemd.credentials": [{"name": "a", "text": "x", "data": ""}]}`,
		`{"systemd.credentials": [{"name": "a", "data": "hunter2"}]}`, `{"systemd.credentials": [{"name": "a", "encrypted": "hunter2"}]}`,
		`{"systemd.credentials": [{"name": "a/hunter2", "text": "x"}]}`, `{"systemd.credentials": []} hunter2`,
		`{"systemd.credentials": [{"name": "a", "text": "hunter2"}, {"name": "a", "text": "x"}]}`,
		"{\"systemd.credentials\": [{\"name\": \"a\", \"text\": \"hunter2\xff\"}]}", `{"systemd.credentials": [{"name": "a", "text": "hunter2\ud800"}]}`,
	} {
		if creds, err := ReadJSON(strings.NewReader(in)); err == nil || creds != nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("ReadJSON(%q) = %d credentials, %v, want an error", in, len(creds), err)
		}
	}
}

func FuzzReadJSON(f *testing.F) {
	f.Add(`{"systemd.credentials": [{"name": "a", "text": "x"}, {"name": "b", "data": "AAEC"}]}`)
	f.Fuzz(func(t *testing.T, in string) {
		creds, err := ReadJSON(strings.NewReader(in))
		if err != nil && creds != nil {
			t.Errorf("ReadJSON(%q) gives something with an error", in)
		}
		for _, c := range creds {
			if credential.CheckName(c.Name) != nil {
				t.Errorf("ReadJSON(%q) has name %q", in, c.Name)
			}
		}
	})
}
