package host

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/vsockrpc"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// write writes files by their paths below dir, and the folders that they need.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, v := range files {
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, os.WriteFile(path, []byte(v), 0o600))
	}
}

// link puts a link in the place of whatever has its name, at once.
func link(t *testing.T, target, path string) {
	t.Helper()
	must(t, os.Symlink(target, path+".tmp"))
	must(t, os.Rename(path+".tmp", path))
}

// replace puts a file in the place of whatever has its name, at once.
func replace(t *testing.T, path, v string) {
	t.Helper()
	must(t, os.WriteFile(path+".tmp", []byte(v), 0o600))
	must(t, os.Rename(path+".tmp", path))
}

// tempDir is a folder by its path without links.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	return dir
}

func read(f Folder) string {
	creds, err := f.Read()
	if err != nil {
		return "error: " + err.Error()
	}
	defer Wipe(creds)
	return show(creds)
}

func TestFolderRead(t *testing.T) {
	dir := tempDir(t)
	write(t, dir, map[string]string{
		"d/HOST-a": "1", "d/HOST-b": "2", "d/other": "3", "d/.hidden": "4", "elsewhere": "5",
		"k/..2024/a": "6", "k/..2024/b": "7",
		"map":      `{"credentials": [{"source": "b", "name": "x", "revision": "r1"}, {"source": "a"}, {"source": "none", "required": false}, {"source": "b", "name": "y"}]}`,
		"all":      `{"credentials": []}`,
		"required": `{"credentials": [{"source": "a"}, {"source": "none"}]}`,
	})
	link(t, "../elsewhere", filepath.Join(dir, "d/HOST-c"))
	link(t, "d", filepath.Join(dir, "l"))
	link(t, "..2024", filepath.Join(dir, "k/..data"))
	link(t, "..data/a", filepath.Join(dir, "k/a"))
	link(t, "..data/b", filepath.Join(dir, "k/b"))
	must(t, os.Mkdir(filepath.Join(dir, "empty"), 0o700))
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, tt := range []struct {
		f    Folder
		want string
	}{
		{Folder{Dir: in("d")}, `HOST-a@="1" HOST-b@="2" HOST-c@="5" other@="3"`},
		{Folder{Dir: in("l"), Prefix: "HOST-"}, `a@="1" b@="2" c@="5"`},
		{Folder{Dir: in("d"), Prefix: "HOST-", Map: in("map")}, `x@r1="2" a@="1" y@="2"`},
		{Folder{Dir: in("k")}, `a@="6" b@="7"`},
		{Folder{Dir: in("k"), Map: in("map")}, `x@r1="7" a@="6" y@="7"`},
		{Folder{Dir: in("k"), Map: in("all")}, ``},
		{Folder{Dir: in("empty")}, ``},
	} {
		if got := read(tt.f); got != tt.want {
			t.Errorf("%+v.Read() = %s, want %s", tt.f, got, tt.want)
		}
	}
	for _, tt := range []struct {
		f    Folder
		want string // in the error
	}{
		{Folder{}, "no folder is named"},
		{Folder{Dir: in("missing")}, "no such file"},
		{Folder{Dir: in("elsewhere")}, "not a directory"},
		{Folder{Dir: in("d"), Prefix: "."}, "dotfiles"},
		{Folder{Dir: in("d"), Prefix: "x/"}, "it is a path"},
		{Folder{Dir: in("d"), Prefix: "none-"}, "no name of one begins with"},
		{Folder{Dir: in("d"), Prefix: "HOST-a"}, "not a credential name"},
		{Folder{Dir: dir}, `"d": it is a folder`},
		{Folder{Dir: in("k"), Map: in("required")}, `credential none: its file "none" is missing`},
		{Folder{Dir: in("d"), Prefix: "HOST-", Map: in("required")}, `credential none: its file "HOST-none" is missing`},
		{Folder{Dir: in("d"), Prefix: strings.Repeat("x", 255), Map: in("required")}, "credential a: the name of its file"},
		{Folder{Dir: in("d"), Map: in("missing")}, "no such file"},
		{Folder{Dir: in("d"), Map: dir}, "it is a folder"},
		{Folder{Dir: in("d"), Map: in("elsewhere")}, "it should be like"},
	} {
		creds, err := tt.f.Read()
		if err == nil || creds != nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v.Read() = %d credentials, %v, want an error with %q", tt.f, len(creds), err, tt.want)
		}
	}
}

func TestFolderLimits(t *testing.T) {
	full := strings.Repeat("x", credential.MaxSize)
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string // in the error
	}{
		{"full", map[string]string{"a": full, "b": full, "c": full, "d": full}, ""},
		{"too much", map[string]string{"a": full, "b": full, "c": full, "d": full, "e": "x"}, "more bytes than a set may have"},
		{"too large", map[string]string{"a": full + "x"}, "more than 1048576 bytes"},
		{"map too large", map[string]string{"../map": `{"credentials": []}` + strings.Repeat(" ", maxMap)}, "more than 1048576 bytes"},
	} {
		dir := filepath.Join(t.TempDir(), "d")
		must(t, os.Mkdir(dir, 0o700))
		write(t, dir, tt.files)
		f := Folder{Dir: dir}
		if _, ok := tt.files["../map"]; ok {
			f.Map = filepath.Join(dir, "../map")
		}
		creds, err := f.Read()
		if tt.want == "" && (err != nil || len(creds) != len(tt.files)) || tt.want != "" && (err == nil || creds != nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: Read() = %d credentials, %v, want an error with %q", tt.name, len(creds), err, tt.want)
		}
		Wipe(creds)
	}
	dir := t.TempDir()
	for i := range credential.MaxSetNames + 1 {
		write(t, dir, map[string]string{strconv.Itoa(i): ""})
	}
	if creds, err := (Folder{Dir: dir}).Read(); err == nil || !strings.Contains(err.Error(), "more than a set may have") {
		t.Errorf("Read() of too many = %d credentials, %v", len(creds), err)
	}
	must(t, os.Remove(filepath.Join(dir, "7")))
	if creds, err := (Folder{Dir: dir}).Read(); err != nil || len(creds) != credential.MaxSetNames {
		t.Errorf("Read() of as many as there may be = %d credentials, %v", len(creds), err)
	}
}

// What changes between a reading and its comparison is seen.
func TestFolderSteady(t *testing.T) {
	later := time.Now().Add(time.Hour)
	for name, change := range map[string]func(dir string){
		"replaced":  func(dir string) { replace(t, filepath.Join(dir, "secrets/a"), "1") },
		"removed":   func(dir string) { must(t, os.Remove(filepath.Join(dir, "secrets/b"))) },
		"longer":    func(dir string) { write(t, dir, map[string]string{"secrets/a": "longer"}) },
		"same size": func(dir string) { must(t, os.Chtimes(filepath.Join(dir, "secrets/a"), later, later)) },
		"new":       func(dir string) { write(t, dir, map[string]string{"secrets/new": ""}) },
		"dotfile":   func(dir string) { write(t, dir, map[string]string{"secrets/.new": ""}) },
		"switched":  func(dir string) { link(t, "2", filepath.Join(dir, "secrets")) },
		"gone":      func(dir string) { must(t, os.Remove(filepath.Join(dir, "secrets"))) },
		"elsewhere": func(dir string) { replace(t, filepath.Join(dir, "elsewhere"), "3") },
		"to a link": func(dir string) { link(t, "../elsewhere", filepath.Join(dir, "secrets/a")) },
	} {
		dir := tempDir(t)
		write(t, dir, map[string]string{"1/a": "1", "1/b": "2", "2/a": "1", "2/b": "2", "elsewhere": "3"})
		link(t, "1", filepath.Join(dir, "secrets"))
		link(t, "../elsewhere", filepath.Join(dir, "1/c"))
		link(t, "../elsewhere", filepath.Join(dir, "2/c"))
		var s snapshot
		creds, err := Folder{Dir: filepath.Join(dir, "secrets")}.take(&s)
		if err != nil || show(creds) != `a@="1" b@="2" c@="3"` || !s.steady() {
			t.Errorf("%s: take = %s, %v, steady %v", name, show(creds), err, s.steady())
		}
		change(dir)
		if s.steady() {
			t.Errorf("%s: it was not seen", name)
		}
		s.close()
	}
	// What a map names, and the map itself.
	for name, change := range map[string]func(dir string){
		"map":     func(dir string) { replace(t, filepath.Join(dir, "map"), `{"credentials": []}`) },
		"appears": func(dir string) { write(t, dir, map[string]string{"d/b": "2"}) },
	} {
		dir := tempDir(t)
		write(t, dir, map[string]string{"d/a": "1", "map": `{"credentials": [{"source": "a"}, {"source": "b", "required": false}]}`})
		var s snapshot
		creds, err := Folder{Dir: filepath.Join(dir, "d"), Map: filepath.Join(dir, "map")}.take(&s)
		if err != nil || show(creds) != `a@="1"` || !s.steady() {
			t.Errorf("%s: take = %s, %v, steady %v", name, show(creds), err, s.steady())
		}
		write(t, dir, map[string]string{"d/other": ""})
		if !s.steady() {
			t.Errorf("%s: a file that the map does not name matters", name)
		}
		change(dir)
		if s.steady() {
			t.Errorf("%s: it was not seen", name)
		}
		s.close()
	}
}

func TestSteadily(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var taken []secret.Value
		take := func(torn int, err error) func(s *snapshot) ([]vsockrpc.Credential, error) {
			taken = nil
			return func(s *snapshot) ([]vsockrpc.Credential, error) {
				v := secret.New([]byte("hunter2"))
				taken = append(taken, v)
				s.torn = len(taken) <= torn
				return []vsockrpc.Credential{{Name: "a", Value: v}}, err
			}
		}
		begin := time.Now()
		creds, err := steadily(take(2, nil))
		if err != nil || show(creds) != `a@="hunter2"` || len(taken) != 3 || taken[0].Len()+taken[1].Len() != 0 {
			t.Errorf("steadily = %s, %v after %d readings, want a after 3", show(creds), err, len(taken))
		}
		creds, err = steadily(take(maxReadings, errors.New("it changes")))
		if creds != nil || err == nil || !strings.Contains(err.Error(), "during each of 9 readings") || len(taken) != maxReadings {
			t.Errorf("steadily = %s, %v after %d readings, want an error after %d", show(creds), err, len(taken), maxReadings)
		}
		if d := time.Since(begin); d > time.Second {
			t.Errorf("it took %v", d)
		}
		want := errors.New("it is missing")
		creds, err = steadily(take(0, want))
		if creds != nil || !errors.Is(err, want) || len(taken) != 1 {
			t.Errorf("steadily = %s, %v after %d readings, want %v after one", show(creds), err, len(taken), want)
		}
		for _, v := range taken {
			if v.Len() != 0 {
				t.Error("a value was not wiped")
			}
		}
	})
}

// Whoever reads while a folder is switched gets one generation of it, as
// sops-nix and Kubernetes have it, and as links elsewhere lead to it.
func TestFolderSwitched(t *testing.T) {
	const files, generations = 8, 50
	generation := func(t *testing.T, dir string, n int) {
		for i := range files {
			write(t, dir, map[string]string{fmt.Sprintf("f%d", i): strconv.Itoa(n)})
		}
	}
	for _, tt := range []struct {
		name  string
		start func(t *testing.T, dir string)
		next  func(t *testing.T, dir string, n int)
	}{
		{
			"sops-nix",
			func(*testing.T, string) {},
			func(t *testing.T, dir string, n int) {
				generation(t, fmt.Sprintf("%s/secrets.d/%d", dir, n), n)
				link(t, fmt.Sprintf("%s/secrets.d/%d", dir, n), dir+"/secrets")
				must(t, os.RemoveAll(fmt.Sprintf("%s/secrets.d/%d", dir, n-1)))
			},
		},
		{
			"kubernetes",
			func(t *testing.T, dir string) {
				must(t, os.Mkdir(dir+"/secrets", 0o700))
				for i := range files {
					link(t, fmt.Sprintf("..data/f%d", i), fmt.Sprintf("%s/secrets/f%d", dir, i))
				}
			},
			func(t *testing.T, dir string, n int) {
				generation(t, fmt.Sprintf("%s/secrets/..%d", dir, n), n)
				link(t, fmt.Sprintf("..%d", n), dir+"/secrets/..data")
				must(t, os.RemoveAll(fmt.Sprintf("%s/secrets/..%d", dir, n-1)))
			},
		},
		{
			"links elsewhere",
			func(t *testing.T, dir string) {
				must(t, os.Mkdir(dir+"/secrets", 0o700))
				for i := range files {
					link(t, fmt.Sprintf("%s/run/f%d", dir, i), fmt.Sprintf("%s/secrets/f%d", dir, i))
				}
			},
			func(t *testing.T, dir string, n int) {
				generation(t, fmt.Sprintf("%s/run.d/%d", dir, n), n)
				link(t, fmt.Sprintf("run.d/%d", n), dir+"/run")
				must(t, os.RemoveAll(fmt.Sprintf("%s/run.d/%d", dir, n-1)))
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := tempDir(t)
			tt.start(t, dir)
			tt.next(t, dir, 1)
			f := Folder{Dir: dir + "/secrets"}
			done := make(chan struct{})
			defer func() { <-done }()
			go func() {
				defer close(done)
				for n := 2; n <= generations; n++ {
					tt.next(t, dir, n)
				}
			}()
			last := 0
			check := func() {
				creds, err := f.Read()
				if err != nil {
					if !strings.Contains(err.Error(), "changed during each") {
						t.Fatalf("Read() = %v", err)
					}
					return
				}
				defer Wipe(creds)
				n, err := strconv.Atoi(string(creds[0].Value.Bytes()))
				if err != nil || n < last || len(creds) != files {
					t.Fatalf("Read() = %s after generation %d", show(creds), last)
				}
				for _, c := range creds {
					if string(c.Value.Bytes()) != strconv.Itoa(n) {
						t.Fatalf("Read() = %s, want one generation", show(creds))
					}
				}
				last = n
			}
			for reading := true; reading; {
				select {
				case <-done:
					reading = false // once more, in peace
				default:
				}
				check()
			}
			if last != generations {
				t.Errorf("at the end it is generation %d, want %d", last, generations)
			}
		})
	}
}

func TestParseMap(t *testing.T) {
	list, err := parseMap([]byte(`{"credentials": [{"source": "a b:ü", "name": "a"}, {"name": "b", "required": false, "revision": "", "source": "x"}, {"source": "c", "revision": "7"}]}`))
	want := []mapped{{"a b:ü", "a", "", true}, {"x", "b", "", false}, {"c", "c", "7", true}}
	if err != nil || !reflect.DeepEqual(list, want) {
		t.Errorf("parseMap = %v, %v, want %v", list, err, want)
	}
	entry := func(s string) string { return `{"credentials": [` + s + `]}` }
	for in, want := range map[string]string{
		``: "it should be like", `hunter2`: "it should be like", `[]`: "it should be like", `{}`: "it should be like", `null`: "it should be like",
		`{"credentials": null}`:                                                       "it should be like",
		`{"credentials": [null]}`:                                                     "it should be like",
		`{"credentials": {"hunter2": 1}}`:                                             "it should be like",
		`{"credentials": [`:                                                           "it should be like",
		`{"credentials": []} hunter2`:                                                 "something follows the end",
		`{"credentials": [], "credentials": []}`:                                      "a key stands twice",
		`{"Credentials": []}`:                                                         "a key that is not credentials",
		`{"credentials": [], "hunter2": 1}`:                                           "a key that is not credentials",
		entry(`{}`):                                                                   "credential 1: it has no source",
		entry(`{"name": "a"}`):                                                        "credential 1: it has no source",
		entry(`{"source": "a", "Name": "b"}`):                                         "a key that is not source, name",
		entry(`{"source": "a", "hunter2": "b"}`):                                      "a key that is not source, name",
		entry(`{"source": "a", "source": "b"}`):                                       "a key stands twice",
		entry(`{"source": "a", "required": "x"}`):                                     "its required: it should be like",
		entry(`{"source": "a", "revision": 7}`):                                       "its revision: it should be like",
		entry(`{"source": "hunter2/a"}`):                                              "its source: it is a path",
		entry(`{"source": ""}`):                                                       "its source: the name of a file has",
		entry(`{"source": ".hunter2"}`):                                               "its source: it begins with a '.'",
		entry(`{"source": "hunter2\u0000"}`):                                          "its source: it has bytes",
		entry(`{"source": "hunter2\ud800"}`):                                          "its source: it has bytes",
		entry("{\"source\": \"hunter2\xff\"}"):                                        "it is not UTF-8",
		entry(`{"source": "` + strings.Repeat("hunter2", 40) + `"}`):                  "its source: the name of a file has",
		entry(`{"source": "a", "name": "hunter2/"}`):                                  "its name: not a credential name",
		entry(`{"source": "hunter2ü"}`):                                               "its name: not a credential name",
		entry(`{"source": "a", "name": ""}`):                                          "its name: not a credential name",
		entry(`{"source": "a", "revision": "` + strings.Repeat("x", 256) + `"}`):      "its revision: 256 bytes are more than 255",
		entry(`{"source": "a", "revision": "\n"}`):                                    "its revision: it has bytes",
		entry(`{"source": "a"}, {"source": "b", "name": "a"}`):                        "credential 2: another one before it has the name a",
		entry(strings.TrimSuffix(strings.Repeat(`{"source": "a"},`, 2), ",")):         "credential 2: another",
		`{"credentials": [` + many(credential.MaxSetNames+1) + `]}`:                   "credential 1024: a set may have 1023",
		`{"credentials": [[[[[[[[[[[[[[[[` + strings.Repeat("[", 10000) + `]]]]]]]]]`: "it should be like",
	} {
		list, err := parseMap([]byte(in))
		if err == nil || list != nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("parseMap(%.200q) = %v, %v, want an error with %q", in, list, err, want)
		}
	}
	if list, err := parseMap([]byte(`{"credentials": [` + many(credential.MaxSetNames) + `]}`)); err != nil || len(list) != credential.MaxSetNames {
		t.Errorf("parseMap of as many as there may be = %d, %v", len(list), err)
	}
}

func many(n int) string {
	var b strings.Builder
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"source": "f%d"}`, i)
	}
	return b.String()
}

func FuzzParseMap(f *testing.F) {
	f.Add(`{"credentials": [{"source": "db-password", "name": "password", "revision": "7", "required": true}]}`)
	f.Add(`{"credentials": [{"source": "a"}, {"source": "b", "required": false}]}`)
	f.Add(`{"credentials": [{"source": "a", "name": "b"}, {"source": "b"}]}`)
	f.Add(`{"credentials": []} {`)
	f.Add(`{"credentials": [{"source": "a\ud800", "name": null}]}`)
	f.Fuzz(func(t *testing.T, in string) {
		list, err := parseMap([]byte(in))
		if err != nil {
			if list != nil {
				t.Errorf("parseMap(%q) gives something with an error", in)
			}
			return
		}
		for _, m := range list {
			if credential.CheckName(m.Name) != nil || len(m.Revision) > vsockrpc.MaxRevisionLen || m.Source == "" || strings.ContainsAny(m.Source, "/\x00") {
				t.Errorf("parseMap(%q) has %+v", in, m)
			}
		}
		b, err := json.Marshal(map[string][]mapped{"credentials": list})
		must(t, err)
		again, err := parseMap(b)
		if err != nil || !reflect.DeepEqual(again, list) {
			t.Errorf("parseMap(%q) = %+v, which parses as %+v, %v", in, list, again, err)
		}
	})
}

// A fingerprint is what look returns.
type fingerprint = [sha256.Size]byte

// startWatcher runs a watcher in a bubble, and returns how many times it told.
func startWatcher(t *testing.T, w watcher) *atomic.Int64 {
	t.Helper()
	told := new(atomic.Int64)
	changed := make(chan struct{})
	w.changed = changed
	ctx, cancel := context.WithCancel(t.Context())
	end := make(chan error, 1)
	go func() { end <- w.run(ctx) }()
	go func() {
		for {
			select {
			case <-changed:
				told.Add(1)
			case <-ctx.Done():
				return
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-end; !errors.Is(err, context.Canceled) {
			t.Errorf("the watch ended with %v", err)
		}
	})
	return told
}

// pass lets time pass in a bubble.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func TestWatchSettles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now atomic.Int64
		events := make(chan struct{}, 1)
		told := startWatcher(t, watcher{events: events, look: func() (fingerprint, time.Duration) {
			return sha256.Sum256([]byte(strconv.FormatInt(now.Load(), 10))), lookWhenNotified
		}})
		event := func() {
			select {
			case events <- struct{}{}:
			default:
			}
		}
		expect := func(what string, want int64) {
			t.Helper()
			if told.Load() != want {
				t.Errorf("%s: it told %d times, want %d", what, told.Load(), want)
			}
		}
		pass(time.Millisecond)
		// The first one is dropped where nobody takes it yet.
		base := told.Load()

		for range 5 { // a file that is written in steps
			event()
			pass(settleQuiet - time.Millisecond)
		}
		expect("while it changes", base)
		pass(2 * time.Millisecond)
		expect("when it has settled", base+1)
		pass(time.Hour)
		expect("after an hour without a change", base+1)

		// It is told of even if it looks the same: a clock of files has ticks.
		event()
		pass(settleQuiet + time.Millisecond)
		expect("after an event", base+2)

		// Something that never settles is told of all the same.
		begin := time.Now()
		for told.Load() == base+2 && time.Since(begin) < time.Minute {
			event()
			pass(settleQuiet / 2)
		}
		if d := time.Since(begin); d > settleAtMost+settleQuiet {
			t.Errorf("it told after %v of changes, want %v", d, settleAtMost)
		}
		pass(time.Second)
		base = told.Load()

		// Of what there is no event, such as of a mount, it learns by itself, and
		// waits until it has settled, too.
		now.Add(1)
		begin = time.Now()
		for told.Load() == base && time.Since(begin) < time.Hour {
			pass(settleQuiet / 4)
			if d := time.Since(begin); d > lookWhenNotified && d < lookWhenNotified+time.Second {
				now.Add(1)
			}
		}
		if d := time.Since(begin); d < settleQuiet || d > lookWhenNotified+settleAtMost+settleQuiet {
			t.Errorf("it told after %v, want at most %v", d, lookWhenNotified+settleAtMost)
		}
		pass(time.Hour)
		expect("after an hour without a change", base+1)
	})
}

// Where there are no events, what changes is found by looking.
func TestWatchBlind(t *testing.T) {
	dir := tempDir(t)
	write(t, dir, map[string]string{"1/a": "1", "2/a": "1", "k/..1/x": "1", "k/..2/x": "1", "elsewhere": "", "map": `{"credentials": []}`})
	link(t, "1", filepath.Join(dir, "secrets"))
	link(t, "../elsewhere", filepath.Join(dir, "1/b"))
	link(t, "../elsewhere", filepath.Join(dir, "2/b"))
	f := Folder{Dir: filepath.Join(dir, "secrets"), Map: filepath.Join(dir, "map")}
	synctest.Test(t, func(t *testing.T) {
		told := startWatcher(t, watcher{look: func() (fingerprint, time.Duration) {
			_, sum := f.survey()
			return sum, lookWhenBlind
		}})
		pass(10 * time.Second)
		for _, step := range []struct {
			what string
			do   func()
		}{
			{"switched", func() { link(t, "2", filepath.Join(dir, "secrets")) }},
			{"replaced", func() { replace(t, filepath.Join(dir, "2/a"), "2") }},
			{"rewritten", func() { write(t, dir, map[string]string{"2/a": "longer"}) }},
			{"elsewhere", func() { replace(t, filepath.Join(dir, "elsewhere"), "2") }},
			{"map", func() { replace(t, filepath.Join(dir, "map"), `{"credentials": [{"source": "a"}]}`) }},
			{"new", func() { write(t, dir, map[string]string{"2/c": ""}) }},
			{"file removed", func() { must(t, os.Remove(filepath.Join(dir, "2/c"))) }},
			{"folder removed", func() { must(t, os.RemoveAll(filepath.Join(dir, "2"))) }},
			{"made again", func() { write(t, dir, map[string]string{"2/a": "again"}) }},
			{"link removed", func() { must(t, os.Remove(filepath.Join(dir, "secrets"))) }},
			{"a folder instead", func() { write(t, dir, map[string]string{"secrets/a": "new"}) }},
		} {
			before := told.Load()
			step.do()
			pass(lookWhenBlind + settleAtMost)
			if told.Load() != before+1 {
				t.Errorf("%s: it told %d times, want once", step.what, told.Load()-before)
			}
		}
		before := told.Load()
		write(t, dir, map[string]string{"other": "", "secrets/.new": ""})
		pass(time.Hour)
		if told.Load() != before {
			t.Error("it told of what is none of its business")
		}
	})
}

// What links lead through is found, as far as it is there.
func TestFolderResolve(t *testing.T) {
	dir := tempDir(t)
	write(t, dir, map[string]string{"secrets.d/1/web/a": ""})
	link(t, dir+"/secrets.d/./1", dir+"/secrets")
	link(t, "../loop", dir+"/secrets.d/loop")
	link(t, "secrets.d/loop", dir+"/loop")
	for _, tt := range []struct{ path, want, visits string }{
		{"secrets/web", "secrets.d/1/web", "/secrets /secrets.d secrets.d/1 secrets.d/1/web"},
		{"secrets/web/../../1//web/a", "secrets.d/1/web/a", "/secrets /secrets.d secrets.d/1 secrets.d/1/web secrets.d/1 secrets.d/1/web secrets.d/1/web/a"},
		{"secrets/db/x", "", "/secrets /secrets.d secrets.d/1 secrets.d/1/db"},
		{"none/x", "", "/none"},
		{"loop", "", ""},
	} {
		var visits []string
		end, err := resolve(dir+"/"+tt.path, func(in, name string) {
			if in, ok := strings.CutPrefix(in, dir); ok {
				visits = append(visits, strings.TrimPrefix(in, "/")+"/"+name)
			}
		})
		if got := strings.Join(visits, " "); tt.visits != "" && got != tt.visits {
			t.Errorf("resolve(%q) visits %s, want %s", tt.path, got, tt.visits)
		}
		if tt.want == "" && err == nil || tt.want != "" && (err != nil || end != dir+"/"+tt.want) {
			t.Errorf("resolve(%q) = %q, %v, want %q", tt.path, end, err, tt.want)
		}
	}
}
