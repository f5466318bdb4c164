package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/journal"

	"github.com/guestagent/guestagent/consumer"
	"github.com/guestagent/guestagent/credsocket"
	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/vsockrpc"
)

var discard = slog.New(slog.DiscardHandler)

// loader is a service that starts, and loads names from the socket.
func loader(name string, names ...string) *fakeUnit {
	u := service(name)
	u.ActiveState = "activating"
	for _, n := range names {
		u.Loads = append(u.Loads, consumer.Load{Name: n, As: n, Way: consumer.WaySocket})
	}
	return u
}

func (g *guest) handout(config string) *handout {
	g.t.Helper()
	if g.a.sendJournal == nil {
		g.a.sendJournal = func(string, journal.Priority, map[string]string) error { return nil }
	}
	cfg, faults := ParseConfig([]byte(config))
	if len(faults) > 0 {
		g.t.Fatal(faults)
	}
	h := g.a.newHandout(cfg, discard)
	g.t.Cleanup(h.close)
	return h
}

// ask returns what a unit is given: the value, "…" if it waits, or "refused".
func (h *handout) ask(t testing.TB, unit, name string) string {
	t.Helper()
	d := h.decide(t.Context(), credsocket.Request{Unit: unit, Name: name})
	switch {
	case d.Refuse != nil:
		return "refused: " + d.Refuse.Error()
	case d.Value == nil:
		return "…"
	}
	defer d.Value.Close()
	b, err := io.ReadAll(io.NewSectionReader(d.Value, 0, d.Size+1))
	if err != nil || int64(len(b)) != d.Size {
		t.Errorf("reading a value: %d bytes of %d, %v", len(b), d.Size, err)
	}
	d.Given()
	return string(b)
}

func (g *guest) putNamed(values map[string]string) {
	g.t.Helper()
	tx, err := g.a.store().Begin()
	if err != nil {
		g.t.Fatal(err)
	}
	defer tx.Close()
	var set credstore.Set
	for name, v := range values {
		set.Install = append(set.Install, credstore.Credential{Name: name, Revision: "r-" + v, Value: value(name, v).Value})
	}
	if _, err := tx.Apply(set); err != nil {
		g.t.Fatal(err)
	}
}

// One start of a unit gets all it loads from one generation, or waits for it.
func TestOneStartOneGeneration(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(loader("web.service", "a", "b"))
	h := g.handout("{}")
	g.putNamed(map[string]string{"a": "1"})
	if got := h.ask(t, "web.service", "a"); got != "…" {
		t.Errorf("a = %q, want it to wait for b, which may come with another a", got)
	}
	g.putNamed(map[string]string{"a": "2", "b": "2"})
	if got := h.ask(t, "web.service", "a"); got != "2" {
		t.Errorf("a = %q", got)
	}
	// Changed twice in the middle, and removed.
	g.putNamed(map[string]string{"a": "3", "b": "3"})
	g.putNamed(map[string]string{"a": "4", "b": "4"})
	for _, name := range []string{"b", "a", "b"} {
		if got := h.ask(t, "web.service", name); got != "2" {
			t.Errorf("%s = %q, want what the start began with", name, got)
		}
	}
	// Another run has what is in force.
	f.units["web.service"].InvocationID = "2"
	if a, b := h.ask(t, "web.service", "a"), h.ask(t, "web.service", "b"); a != "4" || b != "4" {
		t.Errorf("a, b = %q, %q in the next run", a, b)
	}
	h.save()

	// An agent that comes in the middle of a start goes on with it, as long as
	// it can.
	again := g.handout("{}")
	if got := again.ask(t, "web.service", "b"); got != "4" {
		t.Errorf("b = %q after a restart of the agent", got)
	}
	again.save()
	g.putNamed(map[string]string{"b": "5"})
	third := g.handout("{}")
	if got := third.ask(t, "web.service", "a"); !strings.HasPrefix(got, "refused: b changed in the middle of this start") {
		t.Errorf("a = %q, want it refused: b is no longer what the start began with", got)
	}
	// Once it has started, nothing is in the middle of anything.
	f.units["web.service"].InvocationID = "3"
	if a, b := third.ask(t, "web.service", "a"), third.ask(t, "web.service", "b"); a != "4" || b != "5" {
		t.Errorf("a, b = %q, %q in the next run", a, b)
	}
}

type reloading struct {
	*fakeConn
	job uint32
}

func (r reloading) Starting(ctx context.Context, unit string) (consumer.Start, error) {
	s, err := r.fakeConn.Starting(ctx, unit)
	s.Job, s.JobType, s.ActiveState = r.job, "reload", "reloading"
	return s, err
}

// A reload is a start of its own, and does not make the unit forget.
func TestReloadLoadsAnew(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(loader("web.service", "a", "b"))
	h := g.handout("{}")
	g.putNamed(map[string]string{"a": "1", "b": "1"})
	h.ask(t, "web.service", "a")
	h.ask(t, "web.service", "b")
	g.putNamed(map[string]string{"a": "2"})
	for job := range uint32(2) {
		h.bus.close()
		g.a.dialSystemd = func(context.Context) (systemd, error) { return reloading{&fakeConn{f}, job + 1}, nil }
		h.bus.dial = g.a.pid1
		if got, want := h.ask(t, "web.service", "a"), string(rune('2'+job)); got != want {
			t.Errorf("a = %q in reload %d, want %q", got, job, want)
		}
		g.putNamed(map[string]string{"a": "3"})
		if got, want := h.ask(t, "web.service", "a"), string(rune('2'+job)); got != want {
			t.Errorf("a = %q at the second time in reload %d, want %q", got, job, want)
		}
	}
	h.save()
	tx, err := g.a.store().View()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Close()
	l := readLoads(tx)
	a, aOK := l["web.service"].of("1", "a")
	b, bOK := l["web.service"].of("1", "b")
	if !aOK || !bOK || a.Generation != 3 || b.Generation != 1 {
		t.Errorf("loads = %+v", l)
	}
}

func TestHandoutRefuses(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(loader("web.service", "a"), loader("other.service", "a", "free"))
	var mu sync.Mutex
	var audit []string
	g.a.sendJournal = func(message string, _ journal.Priority, vars map[string]string) error {
		mu.Lock()
		defer mu.Unlock()
		audit = append(audit, vars["UNIT"]+" "+vars["CREDENTIAL"]+" "+vars["REVISION"]+" "+vars["GENERATION"])
		if strings.Contains(message, "xyz") {
			t.Errorf("message = %q", message)
		}
		return nil
	}
	h := g.handout(`{"policy": {"load": {"a*": ["web.service"]}}}`)
	g.putNamed(map[string]string{"a": "xyz", "free": "xyz"})
	if got := h.ask(t, "other.service", "a"); !strings.Contains(got, "policy.load") {
		t.Errorf("a = %q, want it refused by the policy", got)
	}
	// What it may not have does not keep it from the rest.
	if got := h.ask(t, "other.service", "free"); got != "xyz" {
		t.Errorf("free = %q", got)
	}
	if got := h.ask(t, "web.service", "a"); got != "xyz" {
		t.Errorf("a = %q", got)
	}
	h.saving.Wait()
	wantEqual(t, "audit", slices.Sorted(slices.Values(audit)), []string{"other.service free r-xyz 1", "web.service a r-xyz 1"})
	if got := h.ask(t, "forged.service", "free"); !strings.HasPrefix(got, "refused: systemd has not started") {
		t.Errorf("free = %q for a unit that is none", got)
	}
	// PID 1 that does not answer is waited for.
	f.gone = errors.New("connection refused")
	h.bus.close()
	if got := h.ask(t, "web.service", "a"); got != "…" {
		t.Errorf("a = %q without systemd, want it to wait", got)
	}

	broken := g.handout("{}")
	broken.cfg.Policy.Deny = true
	if got := broken.ask(t, "web.service", "a"); !strings.Contains(got, "check-config") {
		t.Errorf("a = %q with a policy at fault", got)
	}
}

// A value that somebody replaced by hand is not handed out as ours.
func TestHandoutForeign(t *testing.T) {
	g := newGuest(t)
	g.systemd(loader("web.service", "a"))
	h := g.handout("{}")
	g.putNamed(map[string]string{"a": "1"})
	if err := os.Remove(g.a.path(pathStore + "/a")); err != nil {
		t.Fatal(err)
	}
	g.write(pathStore+"/a", "theirs")
	if got := h.ask(t, "web.service", "a"); got != "…" {
		t.Errorf("a = %q, want it to wait for one that was put in force", got)
	}
}

func TestDropPrevious(t *testing.T) {
	g := newGuest(t)
	g.put("1", "")
	g.put("2", "")
	c := credentials{a: g.a, log: discard}
	if _, ok := c.previousLeft(); ok {
		t.Error("previous values are dropped though nobody said so")
	}
	c.cfg.Previous.TTL = time.Hour
	if left, ok := c.previousLeft(); !ok || left <= 0 || left > time.Hour {
		t.Errorf("previousLeft = %v, %v", left, ok)
	}
	c.dropPrevious() // too early
	if _, ok := c.previousLeft(); !ok {
		t.Error("dropped too early")
	}
	c.cfg.Previous.TTL = time.Nanosecond
	c.dropPrevious()
	if _, ok := c.previousLeft(); ok {
		t.Error("previous values are there still")
	}
	if _, err := g.serve(0).client().Rollback(t.Context(), &vsockrpc.RollbackParams{}); !errors.As(err, new(*vsockrpc.NoPreviousError)) {
		t.Errorf("Rollback = %v", err)
	}
}

// An agent that is killed after it handed out a value, and before it could
// record that, has noted which generation the start is of.
func TestKilledAfterHandout(t *testing.T) {
	g := newGuest(t)
	g.systemd(loader("web.service", "a"))
	g.putNamed(map[string]string{"a": "1"})
	d := g.handout("{}").decide(t.Context(), credsocket.Request{Unit: "web.service", Name: "a"})
	if d.Value == nil {
		t.Fatalf("decide = %+v", d)
	}
	defer d.Value.Close()
	next := g.handout("{}")
	g.putNamed(map[string]string{"a": "2"})
	if got := next.ask(t, "web.service", "a"); !strings.HasPrefix(got, "refused: a changed in the middle") {
		t.Errorf("a = %q in the start that has the value before", got)
	}
}

// The values of a start are kept open until it is over, and the agent stays.
func TestUnpin(t *testing.T) {
	g := newGuest(t)
	f := g.systemd(loader("web.service", "a"))
	busy := &activity{}
	h := g.handout("{}")
	h.hold = busy.hold
	g.putNamed(map[string]string{"a": "1"})
	h.ask(t, "web.service", "a")
	g.putNamed(map[string]string{"a": "2"})
	for range 3 {
		h.unpin()
	}
	if got := h.ask(t, "web.service", "a"); got != "1" || busy.n != 1 {
		t.Errorf("a = %q, %d reasons to stay, want the pinned value and one", got, busy.n)
	}
	f.over = true
	h.unpin()
	if len(h.pins) != 1 {
		t.Error("a service that was just started may still ask")
	}
	h.unpin()
	if len(h.pins) != 0 || busy.n != 0 {
		t.Errorf("%d pins, %d reasons to stay after the start", len(h.pins), busy.n)
	}
}
