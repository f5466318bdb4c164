package host

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/vsockrpc"
)

// set makes credentials of NAME=VALUE or NAME@REVISION=VALUE.
func set(args ...string) []vsockrpc.Credential {
	var creds []vsockrpc.Credential
	for _, arg := range args {
		name, v, _ := strings.Cut(arg, "=")
		name, revision, _ := strings.Cut(name, "@")
		creds = append(creds, vsockrpc.Credential{Name: name, Revision: revision, Value: secret.New([]byte(v))})
	}
	return creds
}

func openTestLabels(t *testing.T, dir string) *Labels {
	t.Helper()
	l, err := OpenLabels(dir)
	must(t, err)
	t.Cleanup(func() { _ = l.Close() }) // many were closed by their tests
	return l
}

// label returns the labels of a set, with a '!' where one is rejected.
func label(t *testing.T, l *Labels, args ...string) []string {
	t.Helper()
	creds := set(args...)
	must(t, l.Label(creds))
	var labels []string
	for _, c := range creds {
		s := c.Revision
		if c.Rejected {
			s += "!"
		}
		labels = append(labels, s)
	}
	return labels
}

func TestLabels(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	l := openTestLabels(t, dir)
	if l.Problem() != "" {
		t.Errorf("Problem() = %q", l.Problem())
	}
	first := label(t, l, "a=1", "b=1", "c@mine=1")
	if len(first[0]) != 16 || first[0] == first[1] || first[2] != "mine" {
		t.Errorf("Label = %q", first)
	}
	same := func(want []string, args ...string) {
		t.Helper()
		if got := label(t, l, args...); !reflect.DeepEqual(got, want) {
			t.Errorf("Label(%q) = %q, want %q", args, got, want)
		}
	}
	same(first, "a=1", "b=1", "c@mine=1")
	must(t, l.Close())
	l = openTestLabels(t, dir)
	same([]string{"mine", first[1], first[0]}, "c@mine=1", "b=1", "a=1")

	// A label that is not given any more is kept, as is one that is given later.
	same([]string{first[0], first[1], "mine"}, "a=1", "b=1", "c=1")
	same([]string{"given", first[1], "mine"}, "a@given=1", "b=1", "c=1")
	same([]string{"given", first[1], "mine"}, "a=1", "b=1", "c=1")

	// There and back again: each is another label.
	second := label(t, l, "a=1", "b=2", "c=2")
	third := label(t, l, "a=1", "b=1", "c=1")
	if second[0] != "given" || second[1] == first[1] || third[1] == second[1] || third[1] == first[1] || second[2] == "mine" || third[2] == "mine" {
		t.Errorf("labels %q, then %q, then %q, want new ones", first, second, third)
	}

	// What is gone is forgotten.
	same(third[1:2], "b=1")
	if got := label(t, l, "a=1", "b=1"); got[0] == "given" || got[1] != third[1] {
		t.Errorf("Label = %q, want another than given, and %q", got, third[1])
	}
	same(nil)
	if got := label(t, l, "b=1"); got[0] == third[1] {
		t.Error("an empty set did not make it forget")
	}
}

func TestLabelsRejected(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o700))
	l := openTestLabels(t, dir)
	marks := func(args ...string) string {
		t.Helper()
		var b strings.Builder
		for _, s := range label(t, l, args...) {
			fmt.Fprint(&b, strings.Count(s, "!"))
		}
		return b.String()
	}
	check := func(want string, args ...string) {
		t.Helper()
		if got := marks(args...); got != want {
			t.Errorf("Label(%q) rejects %s, want %s", args, got, want)
		}
	}
	check("000", "a=1", "b@7=1", "c=1")
	must(t, l.Reject([]string{"a", "b", "none"}, "x.service: it\nfailed\x1b[1m \xff\ufffd"))
	check("110", "a=1", "b@7=1", "c=1")
	must(t, l.Close())
	l = openTestLabels(t, dir)
	want := map[string]string{"a": "x.service: it failed [1m ??", "b": "x.service: it failed [1m ??"}
	if got := l.Rejected(); !reflect.DeepEqual(got, want) || l.Problem() != "" {
		t.Errorf("Rejected() = %q, want %q; Problem() = %q", got, want, l.Problem())
	}
	check("110", "a=1", "b@8=1", "c=1") // the value is rejected, not its label
	check("000", "a=2", "b=1", "c=1")   // another set: a certificate that comes with the right key now
	check("000", "a=1", "b=1", "c=1")   // only the current value is known
	must(t, l.Reject([]string{"a", "b"}, ""))
	must(t, l.Accept([]string{"b", "none"}))
	check("100", "a=1", "b=1", "c=1")
	must(t, l.Accept([]string{"a"}))
	check("000", "a=1", "b=1", "c=1")
	must(t, l.Reject([]string{"c"}, ""))
	check("00", "a=1", "b=1")
	check("000", "a=1", "b=1", "c=1")
	if got := l.Rejected(); len(got) != 0 {
		t.Errorf("Rejected() = %q, want none", got)
	}
}

// The file does not show a value, nor anything by which one may be tried
// without the key; and it is not written where nothing changes.
func TestLabelsFile(t *testing.T) {
	const canary = "hunter2-hunter2"
	dir := filepath.Join(t.TempDir(), "a", "state")
	l := openTestLabels(t, dir)
	file := filepath.Join(dir, "labels.json")
	write(t, dir, map[string]string{".labels.json.new": "left by another"})
	look := func() (string, fs.FileInfo) {
		t.Helper()
		b, err := os.ReadFile(file)
		must(t, err)
		fi, err := os.Stat(file)
		must(t, err)
		return string(b), fi
	}
	label(t, l, "a="+canary, "b="+canary)
	must(t, l.Reject([]string{"a"}, "it failed"))
	b, fi := look()
	sum, named := sha256.Sum256([]byte(canary)), sha256.Sum256([]byte("a\x00"+canary))
	for _, s := range []string{
		canary, base64.StdEncoding.EncodeToString([]byte(canary))[:16], hex.EncodeToString([]byte(canary)),
		hex.EncodeToString(sum[:]), base64.StdEncoding.EncodeToString(sum[:]), base64.StdEncoding.EncodeToString(named[:]),
	} {
		if strings.Contains(strings.ToLower(b), strings.ToLower(s)) {
			t.Errorf("the file has %q", s)
		}
	}
	var doc labels
	must(t, json.Unmarshal([]byte(b), &doc))
	if bytes.Equal(doc.Labels[0].MAC, doc.Labels[1].MAC) {
		t.Error("the file shows that two have one value")
	}
	if fi.Mode() != 0o600 {
		t.Errorf("the file has mode %v, want 0600", fi.Mode())
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode() != fs.ModeDir|0o700 {
		t.Errorf("the folder has mode %v, %v, want 0700", fi.Mode(), err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("the folder has %v, %v, want the file and its lock", entries, err)
	}

	label(t, l, "a="+canary, "b="+canary)
	must(t, l.Reject([]string{"a", "none"}, "it failed"))
	must(t, l.Accept([]string{"b", "none"}))
	if _, now := look(); !os.SameFile(fi, now) {
		t.Error("it was written although nothing changed")
	}
	must(t, l.Accept([]string{"a"}))
	if _, now := look(); os.SameFile(fi, now) {
		t.Error("it was written in place, or not at all")
	}
}

func TestLabelsDamaged(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "labels.json")
	l := openTestLabels(t, dir)
	first := label(t, l, "a=1")
	good, err := os.ReadFile(file)
	must(t, errors.Join(err, l.Close()))
	for name, tt := range map[string]struct{ in, want string }{
		"empty":     {"", "is damaged"},
		"cut":       {string(good[:len(good)/2]), "is damaged"},
		"more":      {string(good) + "x", "is damaged"},
		"bytes":     {"\xff\x00hunter2", "is damaged"},
		"unknown":   {strings.Replace(string(good), "{", `{"hunter2": 1, `, 1), "is damaged"},
		"version":   {strings.Replace(string(good), `"version":1`, `"version":2`, 1), "version 2, not 1"},
		"key":       {`{"version":1,"key":"aHVudGVyMg==","labels":[]}`, "lacks its key"},
		"label":     {strings.Replace(string(good), first[0], "", 1), "its label 1 is none"},
		"name":      {strings.Replace(string(good), `"name":"a"`, `"name":"hunter2/"`, 1), "its label 1 is none"},
		"too large": {strings.Repeat(" ", maxLabels+1), "more than 8388608 bytes"},
	} {
		must(t, os.WriteFile(file, []byte(tt.in), 0o600))
		l := openTestLabels(t, dir)
		if p := l.Problem(); !strings.Contains(p, tt.want) || !strings.Contains(p, dir) || strings.Contains(p, "hunter2") || strings.Contains(p, "\n") {
			t.Errorf("%s: Problem() = %q, want %q in one line", name, p, tt.want)
		}
		second := label(t, l, "a=1")
		must(t, l.Close())
		again := openTestLabels(t, dir)
		if third := label(t, again, "a=1"); second[0] == first[0] || third[0] != second[0] || again.Problem() != "" {
			t.Errorf("%s: labels %q, %q, %q, want another that is kept; Problem() = %q", name, first, second, third, again.Problem())
		}
		must(t, again.Close())
	}

	// A folder in its place is a problem that saving has, too, and labels there are.
	must(t, os.Remove(file))
	must(t, os.MkdirAll(filepath.Join(file, "x"), 0o700))
	l = openTestLabels(t, dir)
	if l.Problem() == "" {
		t.Error("a folder in the place of the file is no problem")
	}
	creds := set("a=1")
	if err := l.Label(creds); err == nil || creds[0].Revision == "" {
		t.Errorf("Label where nothing can be saved = %v, label %q", err, creds[0].Revision)
	}
	must(t, os.RemoveAll(file))
	if got := label(t, l, "a=1"); got[0] != creds[0].Revision {
		t.Errorf("Label = %q, want %q", got, creds[0].Revision)
	}
	must(t, l.Close())
	if got := label(t, openTestLabels(t, dir), "a=1"); got[0] != creds[0].Revision {
		t.Errorf("Label after what could not be saved was saved = %q, want %q", got, creds[0].Revision)
	}
}

func TestOpenLabelsRefuses(t *testing.T) {
	dir := t.TempDir()
	for _, mode := range []fs.FileMode{0o770, 0o707, 0o777} {
		d := filepath.Join(dir, strconv.FormatInt(int64(mode), 8))
		must(t, os.Mkdir(d, 0o700))
		must(t, os.Chmod(d, mode))
		if _, err := OpenLabels(d); err == nil || !strings.Contains(err.Error(), "others may write") {
			t.Errorf("OpenLabels of a folder with mode %v = %v, want an error", mode, err)
		}
	}
	write(t, dir, map[string]string{"file": ""})
	for _, d := range []string{"", filepath.Join(dir, "file"), filepath.Join(dir, "file", "x")} {
		if l, err := OpenLabels(d); err == nil || l != nil {
			t.Errorf("OpenLabels(%q) = %v, want an error", d, err)
		}
	}
	foreign := "/"
	if os.Geteuid() == 0 {
		foreign = filepath.Join(dir, "foreign")
		must(t, os.Mkdir(foreign, 0o700))
		must(t, os.Chown(foreign, 65534, 65534))
	}
	if _, err := OpenLabels(foreign); err == nil || !strings.Contains(err.Error(), "another user's") {
		t.Errorf("OpenLabels of another user's folder = %v, want an error", err)
	}
}

// Two that share a folder would write over each other's labels.
func TestLabelsLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "labels", "web")
	l := openTestLabels(t, dir)
	if other, err := OpenLabels(dir); !errors.Is(err, ErrProviderRuns) || other != nil || !strings.Contains(err.Error(), "keeps its labels here") {
		t.Errorf("OpenLabels of a folder in use = %v, %v, want %v", other, err, ErrProviderRuns)
	}
	must(t, l.Close())
	openTestLabels(t, dir)
	for path, want := range map[string]fs.FileMode{dir: 0o700, filepath.Dir(dir): 0o755} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("the folder %s has mode %v, %v, want %v", path, st.Mode(), err, want)
		}
	}
}

func TestLabelRefuses(t *testing.T) {
	l := openTestLabels(t, filepath.Join(t.TempDir(), "s"))
	var much []string
	for i := range credential.MaxSetNames + 1 {
		much = append(much, fmt.Sprintf("%d=", i))
	}
	for _, args := range [][]string{{"a=1", "a=2"}, {"a/b=1"}, {"a@" + strings.Repeat("x", 256) + "=1"}, {"a@\n=1"}, much} {
		if err := l.Label(set(args...)); err == nil {
			t.Errorf("Label(%.100q) succeeded", args)
		}
	}
	// The most that there may be is less than what is read.
	creds := set(much[1:]...)
	var names []string
	for i := range creds {
		creds[i].Name = strings.Repeat("\\", credential.MaxNameLen-4) + fmt.Sprintf("%04d", i)
		creds[i].Revision = strings.Repeat("\u2028", vsockrpc.MaxRevisionLen/3)
		names = append(names, creds[i].Name)
	}
	must(t, l.Label(creds))
	must(t, l.Reject(names, strings.Repeat("\u2028", maxProblem)))
	must(t, l.Close())
	again := openTestLabels(t, l.dir)
	if got := again.Rejected(); again.Problem() != "" || len(got) != len(creds) || len(got[names[0]]) > maxProblem {
		t.Errorf("after %d rejections there are %d; Problem() = %q", len(creds), len(got), again.Problem())
	}
}

func FuzzParseLabels(f *testing.F) {
	key, mac := base64.StdEncoding.EncodeToString(make([]byte, 32)), base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32))
	f.Add(fmt.Sprintf(`{"version":1,"key":%q,"labels":[]}`, key))
	f.Add(fmt.Sprintf(`{"version":1,"key":%q,"labels":[{"name":"a","revision":"x","mac":%q},{"name":"b","revision":"y","mac":%q,"rejected":true,"problem":"z"}]}`, key, mac, mac))
	f.Add(fmt.Sprintf(`{"version":2,"key":%q,"labels":[]}`, key))
	f.Add(`{"version":1,"key":"","labels":null} {`)
	f.Fuzz(func(t *testing.T, in string) {
		l, err := parseLabels([]byte(in))
		if err != nil {
			if !reflect.DeepEqual(l, labels{}) {
				t.Errorf("parseLabels(%q) gives something with an error", in)
			}
			return
		}
		b, err := encodeLabels(l)
		must(t, err)
		again, err := parseLabels(b)
		if err != nil || !reflect.DeepEqual(again, l) {
			t.Errorf("parseLabels(%q) = %+v, which parses as %+v, %v", in, l, again, err)
		}
	})
}
