package host

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/host/hosttest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// patience bounds every wait for what has to come.
const patience = 20 * time.Second

// await waits until cond is true, which it asks again and again.
func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	for !cond() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("waiting in vain: %s", what)
		}
	}
}

// A rig is one provider over Unix sockets, and what it works with.
type rig struct {
	t      *testing.T
	dir    string // of the sockets
	source string
	state  string
	target string // the guest's socket
	guest  *hosttest.Guest

	p      *Provider
	reload chan struct{}
	told   *told
	stop   func()
}

// told is all that providers told anybody.
type told struct {
	mu  sync.Mutex
	log bytes.Buffer
	// lines are those for the service manager.
	lines []string
}

func (l *told) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.log.Write(b)
}

func (l *told) line(s string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, s)
}

func (l *told) all() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.log.String() + strings.Join(l.lines, "\n")
}

// newRig makes a rig with these credentials, and starts nothing.
func newRig(t *testing.T, files ...string) *rig {
	t.Helper()
	dir := t.TempDir()
	r := &rig{t: t, dir: dir, source: filepath.Join(dir, "source"), state: filepath.Join(dir, "state"), target: filepath.Join(dir, "g.sock"), told: &told{}, stop: func() {}}
	must(t, os.Mkdir(r.source, 0o700))
	for _, file := range files {
		name, value, _ := strings.Cut(file, "=")
		r.put(name, value)
	}
	return r
}

// put replaces a file of the source at once.
func (r *rig) put(name, value string) {
	r.t.Helper()
	tmp := filepath.Join(r.dir, "new")
	must(r.t, os.WriteFile(tmp, []byte(value), 0o600))
	must(r.t, os.Rename(tmp, filepath.Join(r.source, name)))
}

// boot starts the guest.
func (r *rig) boot() *rig {
	r.t.Helper()
	g, err := hosttest.Start(r.dir, "g")
	must(r.t, err)
	r.t.Cleanup(func() { g.Close() })
	r.guest = g
	return r
}

// provide starts the provider. set changes it before.
func (r *rig) provide(set ...func(*Provider)) *rig {
	r.t.Helper()
	labels, err := OpenLabels(r.state)
	must(r.t, err)
	listen := func(name string) net.Listener {
		l, err := net.Listen("unix", filepath.Join(r.dir, name))
		must(r.t, err)
		return l
	}
	r.reload = make(chan struct{})
	r.p = &Provider{
		Name: "web", Target: vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: r.target}, Source: Folder{Dir: r.source},
		Labels: labels, Doorbell: listen("bell"), May: LocalRoot, Local: listen("local"), Reload: r.reload, Version: "test",
		Status: r.told.line, Log: slog.New(slog.NewTextHandler(r.told, nil)),
		again: 10 * time.Millisecond, look: time.Millisecond,
	}
	for _, f := range set {
		f(r.p)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.p.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				r.t.Errorf("Run = %v, want nil", err)
			}
		case <-time.After(patience):
			r.t.Error("Run goes on after the end of its context")
		}
		must(r.t, labels.Close())
	})
	r.t.Cleanup(func() { r.stop() })
	return r
}

// refreshing has the units refreshed, and watched.
func refreshing(p *Provider) { p.Refresh, p.Gate = vsockrpc.RefreshAuto, time.Minute }

func dialTest(t *testing.T, path string) *vsockrpc.Client {
	t.Helper()
	c, err := vsockrpc.Dial(t.Context(), vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: path})
	must(t, err)
	return c
}

func (r *rig) status() *vsockrpc.ProviderStatus {
	r.t.Helper()
	c := dialTest(r.t, filepath.Join(r.dir, "local"))
	defer c.Close()
	s, err := vsockrpc.Provider{Client: c}.Status(r.t.Context())
	must(r.t, err)
	return s
}

// is waits for a state.
func (r *rig) is(state string) *vsockrpc.ProviderStatus {
	r.t.Helper()
	var s *vsockrpc.ProviderStatus
	await(r.t, "the state "+state, func() bool {
		s = r.status()
		return s.State == state
	})
	return s
}

// ring rings as the guest does.
func (r *rig) ring() error {
	r.t.Helper()
	c := dialTest(r.t, filepath.Join(r.dir, "bell"))
	defer c.Close()
	return vsockrpc.Provider{Client: c}.Ring(r.t.Context())
}

func (r *rig) mustRing() {
	r.t.Helper()
	if err := r.ring(); err != nil {
		r.t.Fatalf("Ring = %v, want nil", err)
	}
}

// has checks what the guest has.
func (r *rig) has(files ...string) {
	r.t.Helper()
	for _, file := range files {
		name, want, there := strings.Cut(file, "=")
		if got, ok := r.guest.Value(name); got != want || ok != there {
			r.t.Errorf("Value(%q) = %q, %v, want %q, %v", name, got, ok, want, there)
		}
	}
}

// gets waits until the guest has that.
func (r *rig) gets(file string) {
	r.t.Helper()
	name, want, there := strings.Cut(file, "=")
	await(r.t, file, func() bool {
		got, ok := r.guest.Value(name)
		return got == want && ok == there
	})
}

// applied is the last call of Apply, and of calls there were want.
func (r *rig) applied(want int) hosttest.Applied {
	r.t.Helper()
	list := r.guest.Applies()
	if len(list) != want || want == 0 {
		r.t.Fatalf("%d calls of Apply, want %d: %+v", len(list), want, list)
	}
	return list[want-1]
}

// check compares names of credentials.
func (r *rig) check(what string, got []string, want ...string) {
	r.t.Helper()
	if !slices.Equal(got, want) {
		r.t.Errorf("%s = %q, want %q", what, got, want)
	}
}

// revisions are what the guest calls its values.
func (r *rig) revisions() map[string]string {
	r.t.Helper()
	c := dialTest(r.t, r.guest.Socket)
	defer c.Close()
	report, err := vsockrpc.Health{Client: c}.Get(r.t.Context())
	must(r.t, err)
	m := map[string]string{"": fmt.Sprint(report.Generation)}
	for _, e := range report.Entries {
		m[e.Name] = e.Revision
	}
	return m
}

// kept is what the provider keeps as rejected.
func (r *rig) kept() []string {
	r.t.Helper()
	b, err := os.ReadFile(filepath.Join(r.state, labelsFile))
	must(r.t, err)
	l, err := parseLabels(b)
	must(r.t, err)
	var names []string
	for _, x := range l.Labels {
		if x.Rejected {
			names = append(names, x.Name)
		}
	}
	return names
}

// push pushes as guestctl does.
func (r *rig) push(p *vsockrpc.ApplyParams) error {
	r.t.Helper()
	c := dialTest(r.t, r.guest.Socket)
	defer c.Close()
	_, err := vsockrpc.Credentials{Client: c}.Apply(r.t.Context(), p)
	return err
}

func TestProviderFirst(t *testing.T) {
	t.Run("guest", func(t *testing.T) {
		r := newRig(t, "a=1", "b=2").boot().provide(refreshing)
		r.is(vsockrpc.GuestInForce)
		r.has("a=1", "b=2")
		a := r.applied(1)
		r.check("Installed", a.Installed, "a", "b")
		want := vsockrpc.ApplyParams{Source: credential.SourceProvider, Partial: true, Prune: true, Refresh: vsockrpc.RefreshAuto}
		if !reflect.DeepEqual(a.Params, want) {
			t.Errorf("Apply(%+v), want %+v", a.Params, want)
		}
	})
	t.Run("provider", func(t *testing.T) {
		r := newRig(t, "a=1").provide()
		var s *vsockrpc.ProviderStatus
		await(t, "an attempt", func() bool { s = r.status(); return s.Problem != "" })
		if s.State != vsockrpc.GuestWaiting || s.LastContact != "" || s.Report != nil || s.Name != "web" || s.Target != "unix:"+r.target {
			t.Errorf("Status = %+v, want one that waits", s)
		}
		if err, ok := errors.AsType[*vsockrpc.UnavailableError](r.ring()); !ok || strings.Contains(err.Problem, r.dir) {
			t.Errorf("Ring = %v, want that the guest is not reached, and no path", err)
		}
		r.boot()
		if s = r.is(vsockrpc.GuestInForce); s.Problem != "" || s.Since == "" || s.LastContact == "" {
			t.Errorf("Status = %+v, want one in force, with times", s)
		}
		r.has("a=1")
		r.applied(1)
	})
	// A guest that somebody pushed to before keeps that, unless it is one of the
	// provider's names.
	t.Run("pushed", func(t *testing.T) {
		r := newRig(t, "a=1").boot()
		must(t, r.push(&vsockrpc.ApplyParams{Set: set("a=0", "other=x")}))
		r.provide()
		r.gets("a=1")
		r.has("other=x")
		if err := r.push(&vsockrpc.ApplyParams{Set: set("a=0")}); err == nil {
			t.Error("a push of the provider's name = nil, want a refusal")
		}
	})
}

// The set is in force when the guest gets its answer.
func TestProviderRing(t *testing.T) {
	r := newRig(t, "a=0").boot().provide()
	for i := range 5 {
		value := fmt.Sprint(i)
		r.put("a", value)
		r.mustRing()
		r.has("a=" + value)
	}
	var wg sync.WaitGroup
	for range ringConns / 2 {
		wg.Go(func() {
			if err := r.ring(); err != nil {
				t.Errorf("one of several: Ring = %v, want nil", err)
			}
		})
	}
	wg.Wait()
}

func TestProviderUnreadable(t *testing.T) {
	r := newRig(t, "a=1").boot().provide()
	r.is(vsockrpc.GuestInForce)
	must(t, os.Rename(r.source, r.source+".away"))
	err, ok := errors.AsType[*vsockrpc.UnavailableError](r.ring())
	if !ok || err.Problem == "" || strings.ContainsAny(err.Problem, `/"`) {
		t.Errorf("Ring = %v, want UnavailableError without a path", err)
	}
	if s := r.is(vsockrpc.GuestUnreadable); !strings.Contains(s.Problem, r.source) {
		t.Errorf("Problem = %q, want the folder in it", s.Problem)
	}
	r.has("a=1")
	must(t, os.Rename(r.source+".away", r.source))
	r.is(vsockrpc.GuestInForce)
	r.applied(1)
}

// What changes arrives once, and nothing else does.
func TestProviderChanges(t *testing.T) {
	r := newRig(t, "a=1", "b=2")
	r.source = filepath.Join(r.dir, "link")
	must(t, os.Symlink("source", r.source))
	r.boot().provide()
	r.is(vsockrpc.GuestInForce)
	for i, c := range []struct {
		what               string
		do                 func()
		comes              string
		installed, removed []string
		unchanged          []string
	}{
		{"replaced", func() { r.put("a", "3") }, "a=3", []string{"a"}, nil, []string{"b"}},
		{"added", func() { r.put("c", "4") }, "c=4", []string{"c"}, nil, []string{"a", "b"}},
		{"removed", func() { must(t, os.Remove(filepath.Join(r.source, "b"))) }, "b", nil, []string{"b"}, []string{"a", "c"}},
		{"switched", func() {
			write(t, r.dir, map[string]string{"second/a": "5", "second/c": "4", "second/d": ""})
			must(t, os.Symlink("second", r.source+".new"))
			must(t, os.Rename(r.source+".new", r.source))
		}, "d=", []string{"a", "d"}, nil, []string{"c"}},
	} {
		before := r.revisions()
		c.do()
		r.gets(c.comes)
		r.mustRing()
		a := r.applied(i + 2)
		r.check(c.what+": Installed", a.Installed, c.installed...)
		r.check(c.what+": Relabelled", a.Relabelled)
		r.check(c.what+": Removed", a.Removed, c.removed...)
		r.check(c.what+": Unchanged", a.Unchanged, c.unchanged...)
		after := r.revisions()
		for _, name := range c.unchanged {
			if before[name] != after[name] {
				t.Errorf("%s: the label of %s is %s, and was %s", c.what, name, after[name], before[name])
			}
		}
		for _, name := range c.installed {
			if before[name] == after[name] {
				t.Errorf("%s: the label of %s is still %s", c.what, name, after[name])
			}
		}
	}
}

// looked does something that has the provider look, and waits until it has.
func (r *rig) looked(what string, do func()) {
	r.t.Helper()
	before := r.guest.Asked()
	do()
	await(r.t, what+" has it look", func() bool { return r.guest.Asked() > before })
	r.mustRing() // what was begun is done
	r.is(vsockrpc.GuestInForce)
}

// Where nothing is another than it was, nothing is handed over.
func TestProviderUnchanged(t *testing.T) {
	r := newRig(t, "a=1", "b=2").boot().provide()
	r.is(vsockrpc.GuestInForce)
	before := r.revisions()
	for _, c := range []struct {
		what string
		do   func()
	}{
		{"touch", func() { must(t, os.Chtimes(filepath.Join(r.source, "a"), time.Time{}, time.Unix(1, 0))) }},
		{"the same bytes", func() { r.put("a", "1") }},
		{"SIGHUP", func() { r.reload <- struct{}{} }},
		{"a reconnect", func() {
			r.guest.Stop()
			r.is(vsockrpc.GuestWaiting)
			must(t, r.guest.Start())
		}},
		{"a restart", func() {
			r.stop()
			r.provide()
		}},
	} {
		r.looked(c.what, c.do)
		r.applied(1)
		if after := r.revisions(); !reflect.DeepEqual(after, before) {
			t.Errorf("after %s the labels are %v, and were %v", c.what, after, before)
		}
	}
}

// Without its labels the provider gives new ones, and nothing else.
func TestProviderLabels(t *testing.T) {
	relabelled := func(t *testing.T, r *rig, generation string) {
		t.Helper()
		r.is(vsockrpc.GuestInForce)
		a := r.applied(2)
		r.check("Installed", a.Installed)
		r.check("Relabelled", a.Relabelled, "a", "b")
		if got := r.revisions()[""]; got != generation {
			t.Errorf("generation %s, want %s", got, generation)
		}
	}
	t.Run("lost", func(t *testing.T) {
		r := newRig(t, "a=1", "b=2").boot().provide()
		r.is(vsockrpc.GuestInForce)
		r.stop()
		must(t, os.RemoveAll(r.state))
		r.provide()
		await(t, "labels", func() bool { return len(r.guest.Applies()) > 1 })
		relabelled(t, r, "1")
	})
	t.Run("moved", func(t *testing.T) {
		r := newRig(t, "a=1", "b=2").boot().provide()
		r.is(vsockrpc.GuestInForce)
		r.stop()
		other := newRig(t, "a=1", "b=2")
		other.guest, other.target = r.guest, r.target
		other.provide()
		await(t, "labels", func() bool { return len(r.guest.Applies()) > 1 })
		relabelled(t, other, "1")
	})
	// A folder that is gone is no reason for a guest to go without.
	t.Run("unkept", func(t *testing.T) {
		r := newRig(t, "a=1").boot().provide()
		r.is(vsockrpc.GuestInForce)
		must(t, os.RemoveAll(r.state))
		r.put("a", "2")
		r.gets("a=2")
		r.is(vsockrpc.GuestInForce)
		r.looked("SIGHUP", func() { r.reload <- struct{}{} })
		r.applied(2)
		if !strings.Contains(r.told.all(), "keeping the labels failed") {
			t.Error("the log does not have that the labels are not kept")
		}
	})
}

// A label that somebody gives may stay while the value changes.
func TestProviderMap(t *testing.T) {
	r := newRig(t, "one=1", "two=2").boot()
	list := filepath.Join(r.dir, "map")
	must(t, os.WriteFile(list, []byte(`{"credentials": [{"source": "one", "name": "a", "revision": "7"}]}`), 0o600))
	r.provide(func(p *Provider) { p.Source.Map = list })
	r.is(vsockrpc.GuestInForce)
	r.has("a=1", "one", "two")
	r.put("one", "3")
	r.gets("a=3")
	if got := r.revisions(); got["a"] != "7" {
		t.Errorf("the label is %q, want 7", got["a"])
	}
}

func TestProviderReboot(t *testing.T) {
	r := newRig(t, "a=1", "b=2").boot().provide(refreshing)
	r.is(vsockrpc.GuestInForce)
	for i := range 3 {
		before := r.revisions()
		must(t, r.guest.Reboot())
		r.gets("b=2")
		r.is(vsockrpc.GuestInForce)
		a := r.applied(i + 2)
		r.check("Installed", a.Installed, "a", "b")
		if a.Params.Gate != 0 {
			t.Errorf("Gate = %v, want none for a boot's first set", a.Params.Gate)
		}
		if after := r.revisions(); !reflect.DeepEqual(after, before) {
			t.Errorf("after a boot the labels are %v, and were %v", after, before)
		}
	}
}

func TestProviderRestore(t *testing.T) {
	r := newRig(t, "a=1", "b=2").boot()
	empty := r.guest.Snapshot()
	r.provide(refreshing)
	r.is(vsockrpc.GuestInForce)
	full := r.guest.Snapshot()
	r.put("a", "3")
	r.gets("a=3")
	r.is(vsockrpc.GuestInForce)
	n := len(r.guest.Applies())
	if a := r.applied(2); a.Params.Gate != time.Minute {
		t.Errorf("Gate = %v, want %v for a later set", a.Params.Gate, time.Minute)
	}

	must(t, full())
	r.gets("a=3")
	r.is(vsockrpc.GuestInForce)
	r.check("Installed", r.applied(n+1).Installed, "a")
	r.has("b=2")

	must(t, empty())
	r.gets("a=3")
	r.is(vsockrpc.GuestInForce)
	r.check("Installed", r.applied(n+2).Installed, "a", "b")
}

// What somebody pushed over a name holds until the set changes.
func TestProviderEphemeral(t *testing.T) {
	r := newRig(t, "a=1", "b=2").boot().provide()
	r.is(vsockrpc.GuestInForce)
	must(t, r.push(&vsockrpc.ApplyParams{Set: set("a=mine"), Ephemeral: true}))
	r.looked("a reconnect", func() {
		r.guest.Stop()
		r.is(vsockrpc.GuestWaiting)
		must(t, r.guest.Start())
	})
	r.applied(2) // the push is one of them
	r.has("a=mine")
	r.put("b", "3")
	r.gets("b=3")
	r.has("a=1")
	r.check("Installed", r.applied(3).Installed, "a", "b")

	// Its own change is one, also where a provider was not there for it.
	must(t, r.push(&vsockrpc.ApplyParams{Set: set("a=mine"), Ephemeral: true}))
	r.put("a", "4")
	r.gets("a=4")
	must(t, r.push(&vsockrpc.ApplyParams{Set: set("a=mine"), Ephemeral: true}))
	r.stop()
	r.put("a", "5")
	r.provide()
	r.gets("a=5")
}

// A name that the guest refuses has no ring bring anything about.
func TestProviderRefusedRing(t *testing.T) {
	r := newRig(t, "a=1", hosttest.Refuses+"=2").boot().provide()
	r.is(vsockrpc.GuestRefused)
	must(t, r.push(&vsockrpc.ApplyParams{Set: set("a=mine"), Ephemeral: true}))
	for range 3 {
		r.mustRing()
	}
	r.is(vsockrpc.GuestRefused)
	r.applied(2) // the push is one of them
	r.has("a=mine")
	// Whoever took away what stood in the way says so.
	r.reload <- struct{}{}
	r.gets("a=1")
	r.is(vsockrpc.GuestRefused)
}

// A set is rejected as one: a value that was not at fault comes again with a
// better one.
func TestProviderGatePair(t *testing.T) {
	r := newRig(t, "cert=1", "key=1").boot().provide(refreshing)
	r.is(vsockrpc.GuestInForce)
	r.stop()
	r.put("cert", "2")
	r.put("key", hosttest.Bad)
	r.provide(refreshing)
	r.is(vsockrpc.GuestRolledBack)
	r.check("kept", r.kept(), "cert", "key")
	r.put("key", "3")
	r.gets("cert=2")
	r.gets("key=3")
	r.is(vsockrpc.GuestInForce)
	r.check("kept", r.kept())
}

func TestProviderGate(t *testing.T) {
	r := newRig(t, "a=1", "b=2").boot().provide(refreshing)
	r.is(vsockrpc.GuestInForce)
	r.put("a", hosttest.Bad)
	s := r.is(vsockrpc.GuestRolledBack)
	if !strings.Contains(s.Problem, "a.service") || strings.ContainsFunc(s.Problem, unicode.IsControl) {
		t.Errorf("Problem = %q, want the unit, escaped", s.Problem)
	}
	r.has("a=1", "b=2")
	if a := r.applied(2); a.Params.Gate != time.Minute || a.Rejected != nil {
		t.Errorf("Apply with gate %v, rejected %q, want %v and none", a.Params.Gate, a.Rejected, time.Minute)
	}
	r.check("kept", r.kept(), "a")

	// It is not sent again, whoever rings, and whoever is restarted.
	r.mustRing()
	r.is(vsockrpc.GuestRolledBack)
	r.stop()
	r.provide(refreshing)
	r.mustRing()
	r.is(vsockrpc.GuestRolledBack)
	r.applied(2)
	r.has("a=1")

	// Another name may change meanwhile, and it is refused.
	r.put("b", "3")
	r.gets("b=3")
	r.is(vsockrpc.GuestRolledBack)
	r.has("a=1")
	a := r.applied(3)
	r.check("Rejected", a.Rejected, "a")
	r.check("Refused", a.Refused, "a")

	// Whoever boots with nothing else gets it, however often, and after a
	// restart of the provider, too.
	for i := range 3 {
		if i == 2 {
			r.stop()
			r.provide(refreshing)
			r.is(vsockrpc.GuestInForce)
		}
		must(t, r.guest.Reboot())
		r.gets("a=" + hosttest.Bad)
		r.is(vsockrpc.GuestInForce)
		list := r.guest.Applies()
		r.check("Rejected", list[len(list)-1].Rejected, "a")
		r.mustRing()
		r.check("kept", r.kept(), "a")
		if s := r.status(); len(s.Report.Reasons) != 1 {
			t.Errorf("Reasons = %v, want that it booted on what was rejected", s.Report.Reasons)
		}
	}

	r.put("a", "4")
	r.gets("a=4")
	r.is(vsockrpc.GuestInForce)
	list := r.guest.Applies()
	r.check("Rejected", list[len(list)-1].Rejected)
	r.check("kept", r.kept())
}

// What somebody had tried again in the guest, and stood, counts as any other.
func TestProviderRetry(t *testing.T) {
	r := newRig(t, "a=1", "b=2").boot().provide(refreshing)
	r.is(vsockrpc.GuestInForce)
	r.put("a", hosttest.Bad)
	r.is(vsockrpc.GuestRolledBack)
	n := len(r.guest.Applies())
	c := dialTest(t, r.guest.Socket)
	defer c.Close()
	_, err := vsockrpc.Credentials{Client: c}.Retry(t.Context(), &vsockrpc.RetryParams{Refresh: vsockrpc.RefreshNone})
	must(t, err)
	r.mustRing()
	r.is(vsockrpc.GuestInForce)
	r.applied(n)
	r.check("kept", r.kept())
	r.put("b", "3")
	r.gets("b=3")
	r.check("Rejected", r.applied(n+1).Rejected)
}

// attempts waits for more calls of Apply than a change and a ring bring.
func (r *rig) attempts() {
	r.t.Helper()
	n := len(r.guest.Applies())
	await(r.t, "more attempts", func() bool { return len(r.guest.Applies()) > n+9 })
}

// What may pass is tried again.
func TestProviderAgain(t *testing.T) {
	t.Run("gate", func(t *testing.T) {
		r := newRig(t, "a=1").boot().provide(refreshing)
		r.is(vsockrpc.GuestInForce)
		r.guest.OnTrial(1)
		r.put("a", "2")
		if err, ok := errors.AsType[*vsockrpc.UnavailableError](r.ring()); !ok {
			t.Errorf("Ring = %v, want UnavailableError", err)
		}
		s := r.is(vsockrpc.GuestApplying)
		await(t, "the reason", func() bool { s = r.status(); return strings.Contains(s.Problem, "on trial") })
		r.attempts()
		r.guest.TrialOver()
		r.gets("a=2")
		r.is(vsockrpc.GuestInForce)
	})
	t.Run("systemd", func(t *testing.T) {
		r := newRig(t, "a=1").boot()
		r.guest.NoSystemd("no bus\x1b")
		r.provide(refreshing)
		r.is(vsockrpc.GuestInForce) // so early nobody has loaded anything
		if a := r.applied(2); a.Params.Refresh != vsockrpc.RefreshNone {
			t.Errorf("Refresh = %q, want %q", a.Params.Refresh, vsockrpc.RefreshNone)
		}
		r.put("a", "2")
		await(t, "the reason", func() bool { return strings.Contains(r.status().Problem, `no bus\x1b`) })
		r.has("a=1")
		r.attempts()
		r.guest.NoSystemd("")
		r.gets("a=2")
		r.is(vsockrpc.GuestInForce)
	})
}

// What the guest does not take keeps nothing else from it.
func TestProviderRefused(t *testing.T) {
	r := newRig(t, "a=1", hosttest.Refuses+"=2").boot().provide()
	s := r.is(vsockrpc.GuestRefused)
	if !strings.Contains(s.Problem, hosttest.Refuses) || strings.ContainsFunc(s.Problem, unicode.IsControl) {
		t.Errorf("Problem = %q, want the name, escaped", s.Problem)
	}
	r.has("a=1", hosttest.Refuses)
	r.mustRing()
	must(t, os.Remove(filepath.Join(r.source, hosttest.Refuses)))
	r.is(vsockrpc.GuestInForce)
}

// A unit that does not come up without a gate is a problem of a set in force,
// and stays one while that is.
func TestProviderNotRefreshed(t *testing.T) {
	r := newRig(t, "a="+hosttest.Bad).boot().provide(refreshing)
	for _, c := range []struct {
		what string
		do   func()
	}{
		{"the set", func() {}},
		{"a ring", r.mustRing},
		{"a reconnect", func() {
			r.guest.Stop()
			r.is(vsockrpc.GuestWaiting)
			must(t, r.guest.Start())
		}},
	} {
		c.do()
		if s := r.is(vsockrpc.GuestInForce); !strings.Contains(s.Problem, "a.service") {
			t.Errorf("after %s: Problem = %q, want the unit", c.what, s.Problem)
		}
	}
	r.put("a", "1")
	r.gets("a=1")
	if s := r.is(vsockrpc.GuestInForce); s.Problem != "" {
		t.Errorf("Problem = %q, want none", s.Problem)
	}
}

// A guest that means no good costs nobody anything.
func TestProviderHostile(t *testing.T) {
	for _, kind := range []string{"flood", "escapes", "garbage", "error", "rolledBack", "silent", "hangup"} {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t, "a=canary")
			g, err := hosttest.Hostile(r.dir, "g", kind)
			must(t, err)
			defer g.Close()
			r.provide(refreshing)
			calls := 3
			if kind == "silent" {
				calls = 1
			}
			for range calls {
				await(t, "a call", func() bool {
					select {
					case <-g.Called():
						return true
					default:
						return false
					}
				})
				s := r.status()
				if strings.ContainsFunc(s.State+s.Problem+s.Since+s.LastContact, unicode.IsControl) {
					t.Errorf("Status = %q, %q, want no control characters", s.State, s.Problem)
				}
			}
			r.stop()
			for line := range strings.Lines(r.told.all()) {
				if strings.ContainsFunc(strings.TrimSuffix(line, "\n"), func(c rune) bool { return unicode.IsControl(c) || c == '\u202e' }) {
					t.Errorf("it told %q, want no control characters", line)
				}
			}
			if strings.Contains(r.told.all(), "canary") {
				t.Error("it told the value")
			}
		})
	}
}

func TestProviderPeers(t *testing.T) {
	uid := uint32(os.Geteuid()) //nolint:gosec // a user
	peers := []vsockrpc.Peer{
		{},
		{Kind: vsockrpc.PeerVsock, CID: 3, Port: 1},
		{Kind: vsockrpc.PeerVsock, CID: 3, Port: 4294967294},
		{Kind: vsockrpc.PeerVsock, CID: 2, Port: 1},
		{Kind: vsockrpc.PeerVsock, CID: 4, Port: 1},
		{Kind: vsockrpc.PeerVsock}, // CID 0
		{Kind: vsockrpc.PeerUnix, UID: 0},
		{Kind: vsockrpc.PeerUnix, UID: uid},
		{Kind: vsockrpc.PeerUnix, UID: 54321},
		{Kind: vsockrpc.PeerUnix, UID: 54322, CID: 3},
		{UID: 0, CID: 3, Port: 1},
	}
	for _, c := range []struct {
		name string
		may  func(vsockrpc.Peer) error
		want func(vsockrpc.Peer) bool
	}{
		{"OnlyCID", OnlyCID(3), func(p vsockrpc.Peer) bool { return p.Kind == vsockrpc.PeerVsock && p.CID == 3 }},
		{"LocalRoot", LocalRoot, func(p vsockrpc.Peer) bool {
			return p.Kind == vsockrpc.PeerUnix && (p.UID == 0 || p.UID == uid)
		}},
		{"May", (&MuxListener{owner: owner{uid: 54321}}).May, func(p vsockrpc.Peer) bool {
			return p.Kind == vsockrpc.PeerUnix && (p.UID == 0 || p.UID == 54321)
		}},
		{"May without a socket", (&MuxListener{}).May, func(p vsockrpc.Peer) bool { return p.Kind == vsockrpc.PeerUnix && p.UID == 0 }},
	} {
		for _, p := range peers {
			err := c.may(p)
			if (err == nil) != c.want(p) || err != nil && !errors.Is(err, vsockrpc.ErrRefused) {
				t.Errorf("%s(%v) = %v, want %v", c.name, p, err, c.want(p))
			}
		}
	}
}

// Nobody may ring where nobody is named. The doorbell tells no status, and the
// other socket cannot be rung at.
func TestProviderDoors(t *testing.T) {
	r := newRig(t, "a=1").boot().provide(func(p *Provider) { p.May = nil })
	r.is(vsockrpc.GuestInForce)
	if err := r.ring(); err == nil {
		t.Error("Ring without May = nil, want a refusal")
	}
	r.stop()
	r.provide()
	bell, local := dialTest(t, filepath.Join(r.dir, "bell")), dialTest(t, filepath.Join(r.dir, "local"))
	defer bell.Close()
	defer local.Close()
	if s, err := (vsockrpc.Provider{Client: bell}).Status(t.Context()); err == nil {
		t.Errorf("Status at the doorbell = %v, want an error", s)
	}
	if err := (vsockrpc.Provider{Client: local}).Ring(t.Context()); err == nil {
		t.Error("Ring at the local socket = nil, want an error")
	}
}

// Of two guests neither gets what is the other's, and no socket has a value.
func TestProviderApart(t *testing.T) {
	const canary1, canary2 = "first canary", "second canary"
	one, two := newRig(t, "a="+canary1, "one="+canary1).boot().provide(), newRig(t, "a="+canary2, "two="+canary2).boot().provide()
	for _, r := range []*rig{one, two} {
		r.is(vsockrpc.GuestInForce)
	}
	one.has("a="+canary1, "one="+canary1, "two")
	two.has("a="+canary2, "two="+canary2, "one")
	for _, r := range []*rig{one, two} {
		await(t, "the report with the names", func() bool { s := r.status(); return s.Report != nil && len(s.Report.Entries) == 2 })
	}
	for _, r := range []*rig{one, two} {
		var all []byte
		for socket, call := range map[string]string{
			"local": `{"method":"io.guestagent.Provider.Status"}`, "bell": `{"method":"io.guestagent.Provider.Ring","more":true}`,
		} {
			conn, err := net.Dial("unix", filepath.Join(r.dir, socket))
			must(t, err)
			defer conn.Close()
			must(t, conn.SetDeadline(time.Now().Add(patience)))
			_, err = conn.Write(append([]byte(call), 0))
			must(t, err)
			b := make([]byte, 1)
			for {
				_, err := conn.Read(b)
				must(t, err)
				if b[0] == 0 {
					break
				}
				all = append(all, b[0])
			}
		}
		if !bytes.Contains(all, []byte(`"one"`)) && !bytes.Contains(all, []byte(`"two"`)) {
			t.Errorf("the sockets answered %q, want the names", all)
		}
		for _, file := range []string{labelsFile} {
			b, err := os.ReadFile(filepath.Join(r.state, file))
			must(t, err)
			all = append(all, b...)
		}
		all = append(all, r.told.all()...)
		for _, canary := range []string{canary1, canary2} {
			if bytes.Contains(all, []byte(canary)) || bytes.Contains(all, []byte(base64.StdEncoding.EncodeToString([]byte(canary)))) {
				t.Errorf("the sockets, the state or the log of %s have a value", r.status().Name)
			}
		}
	}
}

// Run ends with its context, whatever goes on, and leaves nothing behind.
func TestProviderEnds(t *testing.T) {
	life := func(rings int) {
		r := newRig(t, "a=1")
		g, err := hosttest.Hostile(r.dir, "g", "silent")
		must(t, err)
		defer g.Close()
		r.provide()
		<-g.Called()
		var wg sync.WaitGroup
		for range rings {
			wg.Go(func() {
				c, err := vsockrpc.Dial(context.Background(), vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: filepath.Join(r.dir, "bell")}) //nolint:usetesting // the provider's end ends it
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				if err := (vsockrpc.Provider{Client: c}).Ring(context.Background()); err == nil { //nolint:usetesting // the same
					t.Error("Ring = nil, want an error")
				}
			})
		}
		await(t, "the rings", func() bool {
			r.p.mu.Lock()
			defer r.p.mu.Unlock()
			return len(r.p.rings) == rings
		})
		idle := dialTest(t, filepath.Join(r.dir, "local"))
		defer idle.Close()
		r.stop()
		wg.Wait()

		whole := newRig(t, "a=1").boot().provide()
		whole.is(vsockrpc.GuestInForce)
		whole.mustRing()
		whole.put("a", "2")
		whole.gets("a=2")
		whole.stop()
		whole.guest.Close()
	}
	files := func() int {
		list, _ := os.ReadDir("/proc/self/fd") // none where there is none
		return len(list)
	}
	life(0) // what is made once
	runtime.GC()
	goroutines, descriptors := runtime.NumGoroutine(), files()
	life(3)
	await(t, "the end of all goroutines", func() bool { return runtime.NumGoroutine() <= goroutines })
	await(t, "the end of all files", func() bool { return files() <= descriptors })
}

// A doorbell that fails for good ends the provider.
func TestProviderBellFails(t *testing.T) {
	r := newRig(t, "a=1")
	labels, err := OpenLabels(r.state)
	must(t, err)
	defer labels.Close()
	l, err := net.Listen("unix", filepath.Join(r.dir, "bell"))
	must(t, err)
	must(t, l.Close())
	p := &Provider{Name: "web", Source: Folder{Dir: r.source}, Labels: labels, Doorbell: l, Log: slog.New(slog.DiscardHandler)}
	if err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "serving") {
		t.Errorf("Run with a closed doorbell = %v, want an error", err)
	}
}

// A guest that has what the labels say is left alone.
func TestOutcomeStands(t *testing.T) {
	o := outcome{want: map[string]string{"a": "1", "b": "2", "no": "1"}, refused: map[string]bool{"no": true}}
	a, b := vsockrpc.Entry{Name: "a", Revision: "1", Source: credential.SourceProvider}, vsockrpc.Entry{Name: "b", Revision: "2", Source: credential.SourceProvider}
	with := func(e vsockrpc.Entry, f func(*vsockrpc.Entry)) vsockrpc.Entry {
		f(&e)
		return e
	}
	inForceNow := &vsockrpc.ProviderState{State: vsockrpc.ProviderInForce}
	generation := int64(1)
	for _, c := range []struct {
		what   string
		report vsockrpc.Report
		want   bool
	}{
		{"all", vsockrpc.Report{Provider: inForceNow, Entries: []vsockrpc.Entry{a, b}}, true},
		{"another's, too", vsockrpc.Report{Provider: inForceNow, Entries: []vsockrpc.Entry{a, b, {Name: "c", Source: credential.SourcePush}}}, true},
		{"one ephemeral", vsockrpc.Report{Provider: inForceNow, Entries: []vsockrpc.Entry{with(a, func(e *vsockrpc.Entry) { e.Ephemeral, e.Revision = true, "x" }), b}}, true},
		{"what it refused", vsockrpc.Report{Provider: inForceNow, Entries: []vsockrpc.Entry{a, b, with(a, func(e *vsockrpc.Entry) { e.Name, e.Revision = "no", "0" })}}, true},
		{"another boot", vsockrpc.Report{BootID: "x", Provider: inForceNow, Entries: []vsockrpc.Entry{a, b}}, false},
		{"no state", vsockrpc.Report{Entries: []vsockrpc.Entry{a, b}}, false},
		{"waiting", vsockrpc.Report{Provider: &vsockrpc.ProviderState{State: vsockrpc.ProviderWaiting}, Entries: []vsockrpc.Entry{a, b}}, false},
		{"a gate", vsockrpc.Report{Provider: inForceNow, Gate: &generation, Entries: []vsockrpc.Entry{a, b}}, false},
		{"one missing", vsockrpc.Report{Provider: inForceNow, Entries: []vsockrpc.Entry{a}}, false},
		{"one too many", vsockrpc.Report{Provider: inForceNow, Entries: []vsockrpc.Entry{a, b, with(a, func(e *vsockrpc.Entry) { e.Name = "c" })}}, false},
		{"one too many, ephemeral", vsockrpc.Report{Provider: inForceNow, Entries: []vsockrpc.Entry{a, b, {Name: "c", Source: credential.SourcePush, Ephemeral: true}}}, false},
		{"another label", vsockrpc.Report{Provider: inForceNow, Entries: []vsockrpc.Entry{a, with(b, func(e *vsockrpc.Entry) { e.Revision = "3" })}}, false},
		{"another source", vsockrpc.Report{Provider: inForceNow, Entries: []vsockrpc.Entry{a, with(b, func(e *vsockrpc.Entry) { e.Source = credential.SourcePush })}}, false},
		{"no file", vsockrpc.Report{Provider: inForceNow, Entries: []vsockrpc.Entry{a, with(b, func(e *vsockrpc.Entry) { e.State = stateMissing })}}, false},
	} {
		if got := o.stands(&c.report); got != c.want {
			t.Errorf("%s: stands = %v, want %v", c.what, got, c.want)
		}
	}
}
