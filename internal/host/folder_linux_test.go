package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Nothing waits for the other end of a pipe, and no device is read.
func TestFolderIrregular(t *testing.T) {
	dir := tempDir(t)
	write(t, dir, map[string]string{"map": `{"credentials": [{"source": "x"}]}`})
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	for _, target := range []string{filepath.Join(dir, "fifo"), "/dev/zero"} {
		d := filepath.Join(dir, "d")
		must(t, os.MkdirAll(d, 0o700))
		link(t, target, filepath.Join(d, "x"))
		for _, f := range []Folder{{Dir: d}, {Dir: d, Map: filepath.Join(dir, "map")}, {Dir: d, Map: target}} {
			creds, err := f.Read()
			if err == nil || creds != nil || !strings.Contains(err.Error(), "not a regular file") {
				t.Errorf("%+v.Read() with %s = %d credentials, %v, want an error", f, target, len(creds), err)
			}
		}
	}
	// Not even between looking at it and opening it.
	p, err := pin(dir)
	must(t, err)
	defer p.close()
	file, err := p.open("fifo")
	must(t, err)
	must(t, file.Close())
}

// Notified, it finds everything that it would find by looking.
func TestWatch(t *testing.T) {
	in := filepath.Join
	for _, tt := range []struct {
		name  string
		files map[string]string
		links [][2]string // target and path
		f     Folder      // its paths are below the test's folder
		steps []func(t *testing.T, dir string)
		want  []string // after each step
	}{
		{
			name:  "switched like sops-nix",
			files: map[string]string{"run/secrets.d/1/a": "1", "run/secrets.d/2/a": "2", "run/secrets.d/3/a": "3"},
			links: [][2]string{{"secrets.d/1", "run/secrets"}},
			f:     Folder{Dir: "run/secrets"},
			steps: []func(t *testing.T, dir string){
				func(t *testing.T, dir string) { link(t, in(dir, "run/secrets.d/2"), in(dir, "run/secrets")) },
				func(t *testing.T, dir string) {
					link(t, "secrets.d/3", in(dir, "run/secrets"))
					must(t, os.RemoveAll(in(dir, "run/secrets.d/2")))
				},
				func(t *testing.T, dir string) { replace(t, in(dir, "run/secrets.d/3/a"), "4") },
				func(t *testing.T, dir string) {
					link(t, "secrets.d/1", in(dir, "run/secrets"))
					link(t, "secrets.d/3", in(dir, "run/secrets"))
					link(t, "secrets.d/1", in(dir, "run/secrets"))
				},
			},
			want: []string{`a@="2"`, `a@="3"`, `a@="4"`, `a@="1"`},
		},
		{
			name:  "files change",
			files: map[string]string{"d/a": "1"},
			f:     Folder{Dir: "d"},
			steps: []func(t *testing.T, dir string){
				func(t *testing.T, dir string) { replace(t, in(dir, "d/a"), "2") },
				func(t *testing.T, dir string) { write(t, dir, map[string]string{"d/a": "3"}) },
				func(t *testing.T, dir string) { write(t, dir, map[string]string{"d/b": "4"}) },
				func(t *testing.T, dir string) { must(t, os.Remove(in(dir, "d/a"))) },
				func(t *testing.T, dir string) { must(t, os.Mkdir(in(dir, "d/c"), 0o700)) },
				func(t *testing.T, dir string) { must(t, os.Rename(in(dir, "d/c"), in(dir, "c"))) },
			},
			want: []string{`a@="2"`, `a@="3"`, `a@="3" b@="4"`, `b@="4"`, "error", `b@="4"`},
		},
		{
			name:  "the folder goes and comes",
			files: map[string]string{"x/d/a": "1"},
			f:     Folder{Dir: "x/d"},
			steps: []func(t *testing.T, dir string){
				func(t *testing.T, dir string) { must(t, os.RemoveAll(in(dir, "x/d"))) },
				func(t *testing.T, dir string) { write(t, dir, map[string]string{"x/d/a": "2"}) },
				func(t *testing.T, dir string) { must(t, os.RemoveAll(in(dir, "x"))) },
				func(t *testing.T, dir string) { write(t, dir, map[string]string{"x/d/a": "3"}) },
				func(t *testing.T, dir string) { must(t, os.Rename(in(dir, "x"), in(dir, "y"))) },
				func(t *testing.T, dir string) { link(t, "y", in(dir, "x")) },
				func(t *testing.T, dir string) { replace(t, in(dir, "y/d/a"), "4") },
			},
			want: []string{"error", `a@="2"`, "error", `a@="3"`, "error", `a@="3"`, `a@="4"`},
		},
		{
			name: "there is nothing at first",
			f:    Folder{Dir: "x/y/d"},
			steps: []func(t *testing.T, dir string){
				func(t *testing.T, dir string) { write(t, dir, map[string]string{"x/y/d/a": "1"}) },
				func(t *testing.T, dir string) { replace(t, in(dir, "x/y/d/a"), "2") },
			},
			want: []string{`a@="1"`, `a@="2"`},
		},
		{
			name:  "as Kubernetes has it",
			files: map[string]string{"d/..1/a": "1", "d/..2/a": "2"},
			links: [][2]string{{"..1", "d/..data"}, {"..data/a", "d/a"}},
			f:     Folder{Dir: "d"},
			steps: []func(t *testing.T, dir string){
				func(t *testing.T, dir string) {
					link(t, "..2", in(dir, "d/..data"))
					must(t, os.RemoveAll(in(dir, "d/..1")))
				},
				func(t *testing.T, dir string) {
					write(t, dir, map[string]string{"d/..3/a": "3", "d/..3/b": "4"})
					link(t, "..3", in(dir, "d/..data"))
					link(t, "..data/b", in(dir, "d/b"))
					must(t, os.RemoveAll(in(dir, "d/..2")))
				},
			},
			want: []string{`a@="2"`, `a@="3" b@="4"`},
		},
		{
			name:  "links elsewhere",
			files: map[string]string{"e/1/a": "1", "e/2/a": "2"},
			links: [][2]string{{"1", "e/current"}, {"../e/current/a", "d/a"}},
			f:     Folder{Dir: "d"},
			steps: []func(t *testing.T, dir string){
				func(t *testing.T, dir string) { link(t, "2", in(dir, "e/current")) },
				func(t *testing.T, dir string) { replace(t, in(dir, "e/2/a"), "3") },
				func(t *testing.T, dir string) { must(t, os.Rename(in(dir, "e"), in(dir, "f"))) },
				func(t *testing.T, dir string) { link(t, "../f/1/a", in(dir, "d/a")) },
			},
			want: []string{`a@="2"`, `a@="3"`, "error", `a@="1"`},
		},
		{
			name:  "the map",
			files: map[string]string{"d/p-a": "1", "d/p-b": "2", "m/1": `{"credentials": [{"source": "a"}]}`, "m/2": `{"credentials": [{"source": "b"}]}`},
			links: [][2]string{{"m/1", "map"}},
			f:     Folder{Dir: "d", Prefix: "p-", Map: "map"},
			steps: []func(t *testing.T, dir string){
				func(t *testing.T, dir string) { link(t, "m/2", in(dir, "map")) },
				func(t *testing.T, dir string) {
					write(t, dir, map[string]string{"m/2": `{"credentials": [{"source": "a", "name": "x"}]}`})
				},
				func(t *testing.T, dir string) { must(t, os.Remove(in(dir, "map"))) },
				func(t *testing.T, dir string) {
					replace(t, in(dir, "map"), `{"credentials": [{"source": "b", "revision": "r"}]}`)
				},
			},
			want: []string{`b@="2"`, `x@="1"`, "error", `b@r="2"`},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := tempDir(t)
			write(t, dir, tt.files)
			for _, l := range tt.links {
				must(t, os.MkdirAll(filepath.Dir(in(dir, l[1])), 0o700))
				link(t, l[0], in(dir, l[1]))
			}
			f := tt.f
			f.Dir = in(dir, f.Dir)
			if f.Map != "" {
				f.Map = in(dir, f.Map)
			}
			ctx, cancel := context.WithCancel(t.Context())
			changed, end := make(chan struct{}, 1), make(chan error, 1)
			n := needNotifier(t)
			n.start()
			go func() { end <- f.watch(ctx, changed, n, time.Hour, time.Hour) }()
			deadline := time.After(time.Minute)
			await := func(what string) {
				t.Helper()
				select {
				case <-changed:
				case <-deadline:
					t.Fatalf("nothing was told %s", what)
				}
			}
			await("at the beginning")
			for i, step := range tt.steps {
				step(t, dir)
				for {
					await("of step " + string(rune('1'+i)))
					got := read(f)
					if got == tt.want[i] || tt.want[i] == "error" && strings.HasPrefix(got, "error: ") {
						break
					}
				}
			}
			cancel()
			if err := <-end; !errors.Is(err, context.Canceled) {
				t.Errorf("Watch = %v, want %v", err, context.Canceled)
			}
		})
	}
}

// needNotifier waits for one of the 128 instances of inotify that a user has:
// a fleet that another test starts at this time takes them all.
func needNotifier(t *testing.T) *notifier {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		n := openNotifier()
		if n.f != nil {
			return n
		}
		select {
		case <-deadline:
			t.Fatal("all instances of inotify are taken (fs.inotify.max_user_instances)")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func TestWatchEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (Folder{Dir: t.TempDir()}).Watch(ctx, make(chan struct{})); !errors.Is(err, context.Canceled) {
		t.Errorf("Watch = %v, want %v", err, context.Canceled)
	}
	if err := (Folder{}).Watch(t.Context(), make(chan struct{})); err == nil || t.Context().Err() != nil {
		t.Errorf("Watch of no folder = %v", err)
	}
}

// Of what happens nearby there are events, and they are passed over.
func TestNotifierMatters(t *testing.T) {
	dir := tempDir(t)
	write(t, dir, map[string]string{"run/1/p-a": "", "run/2/p-a": ""})
	link(t, "1", dir+"/run/secrets")
	n := needNotifier(t)
	defer n.f.Close()
	f := Folder{Dir: dir + "/run/secrets", Prefix: "p-"}
	if _, next := f.look(n, time.Hour, time.Second); next != time.Hour {
		t.Fatal("not all is watched")
	}
	b := make([]byte, 1<<16)
	matters := func() bool {
		k, err := unix.Read(n.fd, b)
		if err != nil {
			t.Fatalf("reading the events: %v", err)
		}
		return n.matters(b[:k])
	}
	write(t, dir, map[string]string{"other": "", "run/other": "", "run/1/.p-b": "", "run/1/other": ""})
	must(t, os.RemoveAll(dir+"/run/other"))
	if matters() {
		t.Error("something nearby matters")
	}
	write(t, dir, map[string]string{"run/1/p-a": "x"})
	if !matters() {
		t.Error("the file that was written does not matter")
	}
	link(t, "2", dir+"/run/secrets")
	if !matters() {
		t.Error("the link that was switched does not matter")
	}
	if _, next := f.look(n, time.Hour, time.Second); next != time.Hour {
		t.Fatal("not all is watched")
	}
	// That the old folder is not watched any more is an event, too.
	write(t, dir, map[string]string{"run/1/p-a": "y"})
	if matters() {
		t.Error("a folder that is not in use any more matters")
	}
	write(t, dir, map[string]string{"run/2/p-a": "y"})
	if !matters() {
		t.Error("the file in the new folder does not matter")
	}
	must(t, os.RemoveAll(dir+"/run/2"))
	if !matters() {
		t.Error("the folder that was removed does not matter")
	}
}

// Without inotify it looks each second.
func TestNotifierBroken(t *testing.T) {
	n := newNotifier()
	n.close()
	dir := t.TempDir()
	if _, next := (Folder{Dir: dir}).look(n, time.Hour, time.Second); next != time.Second {
		t.Errorf("it looks each %v, want %v", next, time.Second)
	}
	select {
	case <-n.done:
	default:
		t.Error("it goes on after its end")
	}
}
