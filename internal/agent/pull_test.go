package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/health"
	"github.com/guestagent/guestagent/internal/agent/agenttest"
	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// fromProvider is what a provider asks an agent for.
func fromProvider(set ...vsockrpc.Credential) *vsockrpc.ApplyParams {
	return &vsockrpc.ApplyParams{Set: set, Source: credential.SourceProvider, Partial: true, Prune: true, Refresh: vsockrpc.RefreshNone}
}

func TestProviderAddress(t *testing.T) {
	g := newGuest(t, "somebody's string", oemProvider+"vsock:2:1018", oemProvider+"vsock:2:1")
	g.write("proc/cmdline", "quiet guestagent.provider=vsock:2:1 guestagent.provider=vsock:2:1019\n")
	g.write(pathCredentials+"/@system/"+credProvider, "vsock:2:1020\n")
	ask := func() string {
		t.Helper()
		r := &Report{}
		target, from, err := g.a.providerAddress(t.Context(), g.a.config(r))
		switch {
		case err != nil:
			return err.Error()
		case from == "":
			return "none"
		}
		return target.String()
	}
	want := func(what, want string) {
		t.Helper()
		if got := ask(); got != want && (!strings.HasSuffix(want, "…") || !strings.HasPrefix(got, strings.TrimSuffix(want, "…"))) {
			t.Errorf("the address with %s = %q, want %q", what, got, want)
		}
	}
	g.write(pathConfig, `{"provider": {"address": "vsock:2"}}`)
	want("all places", vsockrpc.Target{Scheme: vsockrpc.SchemeVsock, CID: 2, Port: 1021}.String())
	g.write(pathConfig, `{}`)
	want("an OEM string", "vsock:2:1018")
	g.write(pathConfig, `{"smbios": {"read": "never"}}`)
	want("SMBIOS that is not to be read", "vsock:2:1019")
	g.write(pathConfig, `{}`)
	g.a.confidential = func(context.Context) (string, error) { return "sev-snp", nil }
	want("a host that is not trusted with SMBIOS", "vsock:2:1019")
	g.a.confidential = func(context.Context) (string, error) { return "", nil }

	if err := agenttest.WriteSMBIOS(g.root, "somebody's string"); err != nil {
		t.Fatal(err)
	}
	want("a command line", "vsock:2:1019")
	g.write("proc/cmdline", "quiet\n")
	want("a system credential", "vsock:2:1020")
	if err := os.Remove(filepath.Join(g.root, pathCredentials, "@system", credProvider)); err != nil {
		t.Fatal(err)
	}
	want("none", "none")

	// What makes no sense is not skipped for the next place, and not quoted.
	g.write(pathCredentials+"/@system/"+credProvider, "vsock:2:1020")
	g.write("proc/cmdline", "guestagent.provider=hunter2")
	want("a bad command line", "taking the provider's address from the kernel's command line: …")
	if strings.Contains(ask(), "hunter2") {
		t.Errorf("the error quotes what stands in the address's place: %s", ask())
	}
	g.write(pathConfig, `{"provider": {"address": "hunter2"}}`)
	want("a bad configuration", "provider in the configuration is at fault…")
	g.write(pathConfig, `{"provider": {"adress": "vsock:2"}}`)
	want("a key that is unknown", "taking the provider's address from the kernel's command line: …")
}

// A provider is one on a Unix socket, for tests.
type provider struct {
	address string
	rings   chan struct{}
}

// provide starts a provider that answers each ring with answer.
func (g *guest) provide(path string, answer func(context.Context) error) *provider {
	g.t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		g.t.Fatal(err)
	}
	p := &provider{address: "unix:" + path, rings: make(chan struct{}, 1000)}
	server := &vsockrpc.Server{
		Product: "test", Authorize: func(vsockrpc.Peer) error { return nil },
		Interfaces: []vsockrpc.Interface{{
			Name: vsockrpc.ProviderInterface, Description: vsockrpc.ProviderDescription,
			Methods: map[string]vsockrpc.Handler{"Ring": func(ctx context.Context, call *vsockrpc.Call) error {
				p.rings <- struct{}{}
				if err := answer(ctx); err != nil {
					return err
				}
				return call.Reply(nil)
			}},
		}},
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(context.Background(), l)
	}()
	g.t.Cleanup(func() {
		server.Close()
		<-done
	})
	return p
}

// pulling runs a pull, and says when the boot may go on, and how the pull ended.
func (g *guest) pulling() (ready <-chan struct{}, ended <-chan error, log *syncBuffer) {
	g.t.Helper()
	r, e := make(chan struct{}), make(chan error, 1)
	log = &syncBuffer{}
	ctx, cancel := context.WithCancel(g.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		e <- g.a.Pull(ctx, Pulling{Log: slog.New(slog.NewTextHandler(log, nil)), Ready: func() { close(r) }})
	}()
	g.t.Cleanup(func() {
		cancel()
		<-done
	})
	return r, e, log
}

func (g *guest) socketPath(name string) string {
	g.t.Helper()
	dir, err := os.MkdirTemp("", "pull")
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, name)
}

func (g *guest) providerState() string {
	g.t.Helper()
	r, err := g.a.Status()
	if err != nil {
		g.t.Fatal(err)
	}
	return r.Provider.State
}

func TestPull(t *testing.T) {
	g := newGuest(t)
	if got := g.providerState(); got != vsockrpc.ProviderNone {
		t.Errorf("the provider's state before = %q, want none", got)
	}
	ready, ended, _ := g.pulling()
	<-ready
	if err := <-ended; err != nil {
		t.Errorf("Pull where no provider is named = %v, want nil", err)
	}

	s := g.serve(0)
	p := g.provide(g.socketPath("s"), func(ctx context.Context) error {
		_, err := s.client().Apply(ctx, fromProvider(value("a", "1"), value("tmpfiles.x", "1")))
		return err
	})
	g.write(pathConfig, `{"provider": {"address": "`+p.address+`"}}`)
	ready, ended, _ = g.pulling()
	<-ready
	g.wantStore(map[string]string{"a": "1"})
	if err := <-ended; err != nil {
		t.Errorf("Pull = %v, want nil", err)
	}
	r, err := g.a.Status()
	if err != nil || r.Provider.State != vsockrpc.ProviderInForce || r.Provider.Address != p.address {
		t.Errorf("Status: %+v, %v", r.Provider, err)
	}
	wantEqual(t, "refusals", refusals(r), []string{"tmpfiles.x: denied"})

	// Once more in the same boot: nobody waits for it.
	ready, ended, _ = g.pulling()
	<-ready
	if err := <-ended; err != nil || len(p.rings) != 2 {
		t.Errorf("Pull again = %v after %d rings, want nil after 2", err, len(p.rings))
	}
}

// The provider may call before it answers, or without having been rung.
func TestPullWithoutAnswer(t *testing.T) {
	g := newGuest(t)
	s := g.serve(0)
	p := g.provide(g.socketPath("s"), func(ctx context.Context) error {
		if _, err := s.client().Apply(ctx, fromProvider()); err != nil {
			t.Error(err)
		}
		<-ctx.Done()
		return ctx.Err()
	})
	g.write(pathConfig, `{"provider": {"address": "`+p.address+`", "required": true}}`)
	ready, ended, _ := g.pulling()
	<-ready
	if err := <-ended; err != nil {
		t.Errorf("Pull = %v, want nil", err)
	}
}

// Time is up at once: the boot goes on, the report says so, and the set comes
// when it can.
func TestPullLate(t *testing.T) {
	g := newGuest(t)
	s := g.serve(0)
	path := g.socketPath("s")
	g.write(pathConfig, `{"provider": {"address": "unix:`+path+`", "timeout": 0}}`)
	ready, ended, log := g.pulling()
	<-ready
	if got := g.providerState(); got != vsockrpc.ProviderUnreachable {
		t.Errorf("the provider's state = %q, want unreachable", got)
	}
	r, err := g.a.Status()
	if err != nil || !slices.Contains(codes(r), health.ProviderUnreachable) {
		t.Errorf("the reasons = %v, %v", codes(r), err)
	}
	n := 0
	g.provide(path, func(ctx context.Context) error {
		switch n++; n {
		case 1:
			return &vsockrpc.UnavailableError{Problem: "not yet"}
		case 2:
			return nil // and nothing was done
		}
		_, err := s.client().Apply(ctx, fromProvider(value("a", "1")))
		return err
	})
	if err := <-ended; err != nil {
		t.Errorf("Pull = %v, want nil", err)
	}
	g.wantStore(map[string]string{"a": "1"})
	if got := g.providerState(); got != vsockrpc.ProviderInForce {
		t.Errorf("the provider's state = %q, want inForce", got)
	}
	for _, want := range []string{"provider unreachable", "not yet", "none has come"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log has no %q: %s", want, log)
		}
	}
}

func TestPullRequired(t *testing.T) {
	g := newGuest(t)
	g.write(pathConfig, `{"provider": {"address": "unix:/nowhere", "timeout": 0, "required": true}}`)
	ready, ended, _ := g.pulling()
	if err := <-ended; !errors.Is(err, ErrProviderUnreachable) {
		t.Errorf("Pull = %v, want ErrProviderUnreachable", err)
	}
	select {
	case <-ready:
		t.Error("the boot may go on without a provider that is required")
	default:
	}

	// An address that makes no sense is not waited for.
	g.write(pathConfig, `{"provider": {"address": "vsock-mux:/x", "required": true}}`)
	_, ended, _ = g.pulling()
	if err := <-ended; !errors.Is(err, ErrProviderUnreachable) {
		t.Errorf("Pull with a bad address = %v, want ErrProviderUnreachable", err)
	}
	g.write(pathConfig, `{"provider": {"address": "vsock-mux:/x"}}`)
	ready, ended, _ = g.pulling()
	<-ready
	if err := <-ended; err != nil {
		t.Errorf("Pull with a bad address that is not required = %v, want nil", err)
	}
	if got := g.providerState(); got != vsockrpc.ProviderUnreachable {
		t.Errorf("the provider's state = %q, want unreachable", got)
	}
}

// Providers that mean no good cost the guest nothing but time.
func TestPullHostile(t *testing.T) {
	for name, serve := range map[string]func(net.Conn){
		"hangs up":       func(c net.Conn) { _ = c.Close() },
		"garbage":        func(c net.Conn) { _, _ = c.Write([]byte("HTTP/1.0 400\r\n\r\n\x00")) },
		"half an answer": func(c net.Conn) { _, _ = c.Write([]byte(`{"parameters":{`)) },
		"too much":       func(c net.Conn) { _, _ = c.Write(bytes.Repeat([]byte("x"), 2*maxRingAnswer)) },
		"another's word": func(c net.Conn) { _, _ = c.Write([]byte("{\"error\":\"org.example.No\"}\x00")) },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			s := g.serve(0)
			path := g.socketPath("s")
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			tried := make(chan struct{}, 1)
			served := make(chan struct{})
			go func() {
				defer close(served)
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					_, _ = c.Read(make([]byte, 4096))
					serve(c)
					_ = c.Close()
					select {
					case tried <- struct{}{}:
					default:
					}
				}
			}()
			g.write(pathConfig, `{"provider": {"address": "unix:`+path+`", "timeout": 0}}`)
			ready, ended, _ := g.pulling()
			<-ready
			<-tried
			_ = l.Close()
			<-served
			g.provide(path, func(ctx context.Context) error {
				_, err := s.client().Apply(ctx, fromProvider(value("a", "1")))
				return err
			})
			if err := <-ended; err != nil {
				t.Errorf("Pull = %v, want nil", err)
			}
			g.wantStore(map[string]string{"a": "1"})
		})
	}
}

// The provider is the truth: its names are nobody else's to change, but for a
// while.
func TestManaged(t *testing.T) {
	g := newGuest(t)
	s := g.serve(0)
	c := s.client()
	ctx := t.Context()
	must := func(p *vsockrpc.ApplyParams) vsockrpc.ApplyResult {
		t.Helper()
		res, err := c.Apply(ctx, p)
		if err != nil {
			t.Fatalf("Apply: %v", err)
		}
		return res
	}
	shown := func() (lines []string) {
		t.Helper()
		list, err := c.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list.Entries {
			line := e.Name + " " + e.Revision + " " + string(e.Source)
			if e.Ephemeral {
				line += " ephemeral"
			}
			lines = append(lines, line)
		}
		return lines
	}
	wantManaged := func(what string, err error) {
		t.Helper()
		refused, ok := errors.AsType[*vsockrpc.RefusedError](err)
		if !ok || refused.Refusals[0].Reason != credential.ReasonManaged || !strings.Contains(refused.Refusals[0].Detail, "--ephemeral") {
			t.Errorf("%s = %v, want a refusal as managed", what, err)
		}
	}
	must(apply(value("own", "1"), value("taken", "1")))
	res := must(fromProvider(value("a", "1"), value("b", "1"), value("taken", "1")))
	wantEqual(t, "what the provider takes over", res.Relabelled, []string{"taken"})
	wantEqual(t, "list", shown(), []string{"a r-1 provider", "b r-1 provider", "own r-1 local", "taken r-1 provider"})

	_, err := c.Apply(ctx, apply(value("a", "2")))
	wantManaged("Apply", err)
	_, err = c.Remove(ctx, &vsockrpc.RemoveParams{Names: []string{"a"}})
	wantManaged("Remove", err)
	must(apply(value("own", "2")))

	over := apply(value("a", "2"))
	over.Ephemeral = true
	must(over)
	g.wantStore(map[string]string{"a": "2", "b": "1", "own": "2", "taken": "1"})
	wantEqual(t, "list", shown(), []string{"a r-2 local ephemeral", "b r-1 provider", "own r-2 local", "taken r-1 provider"})
	_, err = c.Apply(ctx, apply(value("a", "3")))
	wantManaged("Apply over what is ephemeral", err)

	// Until the provider comes again, which prunes its own names alone.
	res = must(fromProvider(value("a", "1")))
	wantEqual(t, "removed", res.Removed, []string{"b", "taken"})
	wantEqual(t, "list", shown(), []string{"a r-1 provider", "own r-2 local"})
	must(over)
	res = must(fromProvider())
	wantEqual(t, "removed", res.Removed, []string{"a"})
	wantEqual(t, "list", shown(), []string{"own r-2 local"})
}

// What is refused costs the rest nothing, and is not taken for what is gone.
func TestPartial(t *testing.T) {
	g := newGuest(t)
	s := g.serve(0)
	c := s.client()
	ctx := t.Context()
	if _, err := c.Apply(ctx, fromProvider(value("a", "1"), value("b", "1"))); err != nil {
		t.Fatal(err)
	}
	g.write("etc/credstore/b", "in the way")
	res, err := c.Apply(ctx, fromProvider(value("a", "2"), value("b", "2"), value("passwd.x", "1")))
	if err != nil || len(res.Refusals) != 2 {
		t.Fatalf("Apply = %+v, %v", res, err)
	}
	wantEqual(t, "installed", res.Installed, []string{"a"})
	wantEqual(t, "removed", res.Removed, nil)
	g.wantStore(map[string]string{"a": "2", "b": "1"})

	whole := fromProvider(value("a", "3"), value("b", "3"))
	whole.Partial = false
	if _, err := c.Apply(ctx, whole); !errors.As(err, new(*vsockrpc.RefusedError)) {
		t.Errorf("Apply of the whole set = %v, want a refusal", err)
	}
	g.wantStore(map[string]string{"a": "2", "b": "1"})
}

// A value that a gate rolled back before the guest booted is put in force where
// there is no other, and reported.
func TestRejectedInForce(t *testing.T) {
	g := newGuest(t)
	s := g.serve(0)
	c := s.client()
	bad := value("a", "bad")
	bad.Rejected = true
	if _, err := c.Apply(t.Context(), fromProvider(bad)); err != nil {
		t.Fatal(err)
	}
	r, err := g.a.Status()
	if err != nil || !slices.Contains(codes(r), health.RejectedInForce) {
		t.Errorf("the reasons = %v, %v", codes(r), err)
	}
	if _, err := c.Apply(t.Context(), fromProvider(value("a", "good"))); err != nil {
		t.Fatal(err)
	}
	bad = value("a", "bad")
	bad.Rejected = true
	res, err := c.Apply(t.Context(), fromProvider(bad))
	if err != nil || len(res.Refusals) != 1 || res.Refusals[0].Reason != credential.ReasonRejected {
		t.Errorf("Apply of a value that was rejected = %+v, %v", res, err)
	}
	g.wantStore(map[string]string{"a": "good"})
	if r, err := g.a.Status(); err != nil || slices.Contains(codes(r), health.RejectedInForce) {
		t.Errorf("the reasons = %v, %v", codes(r), err)
	}
}

func TestHealthWatch(t *testing.T) {
	g := newGuest(t)
	g.write(pathBootID, "0123\n")
	g.write(pathMachineID, "4567\n")
	s := g.serve(0)
	c := s.client()
	watcher := vsockrpc.Health{Client: s.client().Client}
	var seen []string
	for reply, err := range watcher.Watch(t.Context(), vsockrpc.MinWatchHeartbeat) {
		r := reply.Report
		if err != nil {
			t.Fatalf("Watch: %v", err)
		}
		if r == nil {
			continue // a heartbeat
		}
		if r.BootID != "0123" || r.MachineID != "4567" || r.Version != "1.2.3" {
			t.Errorf("the report = %+v", r)
		}
		var names []string
		for _, e := range r.Entries {
			names = append(names, e.Name)
		}
		line := strings.Join(names, " ")
		if len(seen) > 0 && seen[len(seen)-1] == line {
			continue // something else has changed
		}
		seen = append(seen, line)
		if len(seen) == 3 {
			break
		}
		if _, err := c.Apply(t.Context(), apply(value([]string{"a", "b"}[len(seen)-1], "1"))); err != nil {
			t.Fatal(err)
		}
	}
	wantEqual(t, "what was seen", seen, []string{"", "a", "a b"})
	if _, err := (vsockrpc.Health{Client: c.Client}).Get(t.Context()); err != nil {
		t.Errorf("Get: %v", err)
	}
	if p, err := (vsockrpc.Health{Client: c.Client}).Ping(t.Context()); err != nil || p.BootID != "0123" || p.Generation != 2 {
		t.Errorf("Ping = %+v, %v", p, err)
	}
}

// A note that does not make sense, or cannot be kept, costs nothing but what it
// would have said.
func TestNotes(t *testing.T) {
	g := newGuest(t)
	s := g.serve(0)
	tx, err := g.a.store().Begin()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []credstore.Note{credstore.NoteProvider, credstore.NotePull} {
		if err := tx.SetNote(n, []byte("{")); err != nil {
			t.Fatal(err)
		}
	}
	tx.Close()
	if got := g.providerState(); got != vsockrpc.ProviderNone {
		t.Errorf("the provider's state with damaged notes = %q, want none", got)
	}
	note := filepath.Join(g.root, pathStore, ".guestagent", string(credstore.NoteProvider))
	if err := os.Remove(note); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(note, "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	if res, err := s.client().Apply(t.Context(), fromProvider(value("a", "1"))); err != nil || len(res.Installed) != 1 {
		t.Errorf("Apply whose note cannot be kept = %+v, %v", res, err)
	}
	if !g.a.providerDid() || !strings.Contains(s.log.String(), "noting what the provider did failed") {
		t.Errorf("providerDid() = %v; the log: %s", g.a.providerDid(), s.log)
	}
}

// The time-out and the set may come at once: the set counts.
func TestPullAtTheLastMoment(t *testing.T) {
	for range 20 {
		g := newGuest(t)
		s := g.serve(0)
		g.write(pathConfig, `{"provider": {"address": "unix:/nowhere", "timeout": 1, "required": true}}`)
		p := &pull{
			a: g.a, log: slog.New(slog.DiscardHandler), ready: func() {}, status: func(string) {},
			target: vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: "/nowhere"},
		}
		p.cfg.Provider.Required = true
		if _, err := s.client().Apply(t.Context(), fromProvider()); err != nil {
			t.Fatal(err)
		}
		changed, up := make(chan struct{}, 1), make(chan time.Time, 1)
		changed <- struct{}{}
		up <- time.Time{}
		if done, err := p.await(t.Context(), make(chan error), changed, up, false); !done || err != nil {
			t.Fatalf("await with the set in force and time up = %v, %v, want it done", done, err)
		}
		// Nor does it need the store to tell: the end of an attempt is enough.
		attempt := make(chan error, 1)
		attempt <- errors.New("no answer")
		if done, err := p.await(t.Context(), attempt, nil, nil, false); !done || err != nil {
			t.Fatalf("await after an attempt = %v, %v, want it done", done, err)
		}
	}
}

// A pull that is not told of a provider any more takes back what it said.
func TestPullForgets(t *testing.T) {
	g := newGuest(t)
	g.write(pathConfig, `{"provider": {"address": "vsock-mux:/x"}}`)
	_, ended, _ := g.pulling()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	g.write(pathConfig, `{}`)
	_, ended, _ = g.pulling()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if got := g.providerState(); got != vsockrpc.ProviderNone {
		t.Errorf("the provider's state = %q, want none", got)
	}
}

// An ephemeral value is nobody's to prune or to roll back to for good.
func TestEphemeralIsTheProviders(t *testing.T) {
	g := newGuest(t)
	s := g.serve(0)
	c := s.client()
	ctx := t.Context()
	apply := func(p *vsockrpc.ApplyParams) {
		t.Helper()
		if _, err := c.Apply(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	apply(&vsockrpc.ApplyParams{Set: []vsockrpc.Credential{value("db", "0")}})
	apply(fromProvider(value("db", "1")))
	apply(&vsockrpc.ApplyParams{Set: []vsockrpc.Credential{value("db", "2")}, Ephemeral: true})
	apply(&vsockrpc.ApplyParams{Set: []vsockrpc.Credential{value("other", "1")}, Prune: true})
	g.wantStore(map[string]string{"db": "2", "other": "1"})

	apply(fromProvider(value("db", "3")))
	if _, err := c.Rollback(ctx, &vsockrpc.RollbackParams{}); err != nil {
		t.Fatal(err)
	}
	g.wantStore(map[string]string{"db": "2", "other": "1"})
	if _, err := c.Apply(ctx, &vsockrpc.ApplyParams{Set: []vsockrpc.Credential{value("db", "4")}}); !errors.As(err, new(*vsockrpc.RefusedError)) {
		t.Errorf("Apply over what was rolled back to = %v, want it refused", err)
	}
	list, err := c.List(ctx)
	if err != nil || !list.Entries[0].Ephemeral {
		t.Errorf("List after a rollback = %+v, %v, want db ephemeral", list.Entries, err)
	}
}

// However many names there are, whoever asks can read the answer.
func TestReportIsBounded(t *testing.T) {
	g := newGuest(t)
	g.write(pathMachineID, strings.Repeat("x", 1<<16))
	g.write(pathConfig, `{"provider": {"address": "`+strings.Repeat("y", 1<<16)+`"}}`)
	s := g.serve(0)
	var set []vsockrpc.Credential
	for i := range 200 {
		c := value(fmt.Sprintf("%s-%d", strings.Repeat("n", 40), i), "bad")
		c.Rejected = true
		set = append(set, c)
	}
	c := s.client()
	if _, err := c.Apply(t.Context(), fromProvider(set...)); err != nil {
		t.Fatal(err)
	}
	r, err := (vsockrpc.Health{Client: c.Client}).Get(t.Context())
	if err != nil || len(r.Entries) != 200 {
		t.Errorf("Get = %v", err)
	}
}
