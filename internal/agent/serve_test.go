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
	"sync"
	"testing"
	"time"

	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/vsockrpc"
)

// served is a guest whose agent answers on a Unix socket.
type served struct {
	*guest
	target vsockrpc.Target
	log    *syncBuffer
	stop   func() error // ends the agent, and says how it ended
}

// A syncBuffer is a buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (g *guest) serve(idle time.Duration) *served {
	g.t.Helper()
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		g.t.Fatal(err)
	}
	s := &served{guest: g, log: &syncBuffer{}}
	if s.target, err = vsockrpc.ParseTarget("unix:" + path); err != nil {
		g.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(g.t.Context())
	done := make(chan error, 1)
	go func() {
		done <- g.a.Serve(ctx, Serving{Listeners: []net.Listener{l}, Idle: idle, Log: slog.New(slog.NewTextHandler(s.log, nil))})
	}()
	s.stop = sync.OnceValue(func() error {
		if idle == 0 {
			cancel()
		}
		defer cancel()
		return <-done
	})
	g.t.Cleanup(func() {
		cancel()
		if err := s.stop(); err != nil {
			g.t.Errorf("Serve: %v", err)
		}
	})
	return s
}

func (s *served) client() vsockrpc.Credentials {
	s.t.Helper()
	c, err := vsockrpc.Dial(s.t.Context(), s.target)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() })
	return vsockrpc.Credentials{Client: c}
}

func value(name, v string) vsockrpc.Credential {
	return vsockrpc.Credential{Name: name, Revision: "r-" + v, Value: secret.New([]byte(v))}
}

func TestServe(t *testing.T) {
	g := newGuest(t, "io.guestagent.credential:booted=1")
	g.imports()
	s := g.serve(0)
	c := s.client()
	ctx := t.Context()

	res, err := c.Apply(ctx, &vsockrpc.ApplyParams{Set: []vsockrpc.Credential{value("a", "1"), value("p-b", "1"), value("p-c", "1")}})
	if err != nil || res.Generation != 2 {
		t.Fatalf("Apply = %+v, %v", res, err)
	}
	wantEqual(t, "installed", res.Installed, []string{"a", "p-b", "p-c"})
	g.wantStore(map[string]string{"booted": "1", "a": "1", "p-b": "1", "p-c": "1"})

	// The same again is no new generation, so that a host may retry.
	res, err = c.Apply(ctx, &vsockrpc.ApplyParams{Set: []vsockrpc.Credential{value("a", "1")}})
	if err != nil || res.Generation != 2 || len(res.Unchanged) != 1 {
		t.Errorf("Apply of what is in force = %+v, %v", res, err)
	}

	// A dry run says what would come of it.
	dry := &vsockrpc.ApplyParams{Set: []vsockrpc.Credential{value("p-b", "2")}, Prune: true, PrunePrefix: "p-", DryRun: true}
	res, err = c.Apply(ctx, dry)
	if err != nil || res.Generation != 3 {
		t.Errorf("Apply as a dry run = %+v, %v", res, err)
	}
	wantEqual(t, "removed in a dry run", res.Removed, []string{"p-c"})
	g.wantStore(map[string]string{"booted": "1", "a": "1", "p-b": "1", "p-c": "1"})

	// Pruning touches names of the same source below the prefix, and no others.
	dry.DryRun = false
	expected := int64(2)
	dry.ExpectedGeneration = &expected
	if res, err = c.Apply(ctx, dry); err != nil {
		t.Fatalf("Apply with prune: %v", err)
	}
	g.wantStore(map[string]string{"booted": "1", "a": "1", "p-b": "2"})

	// That generation has gone.
	_, err = c.Apply(ctx, dry)
	if mismatch, ok := errors.AsType[*vsockrpc.GenerationMismatchError](err); !ok || mismatch.Generation != 3 {
		t.Errorf("Apply to an old generation = %v", err)
	}

	list, err := c.List(ctx)
	if err != nil || list.Generation != 3 {
		t.Fatalf("List = %+v, %v", list, err)
	}
	var names []string
	for _, e := range list.Entries {
		names = append(names, fmt.Sprintf("%s %s %s %s", e.Name, e.Revision, e.Source, e.State))
	}
	wantEqual(t, "list", names, []string{"a r-1 local inForce", "booted  smbios inForce", "p-b r-2 local inForce"})

	if back, err := c.Rollback(ctx, &vsockrpc.RollbackParams{}); err != nil || back.Generation != 4 {
		t.Errorf("Rollback = %+v, %v", back, err)
	}
	g.wantStore(map[string]string{"booted": "1", "a": "1", "p-b": "1", "p-c": "1"})

	rm, err := c.Remove(ctx, &vsockrpc.RemoveParams{Names: []string{"a", "never"}, Forget: true})
	if err != nil || !slices.Equal(rm.Removed, []string{"a"}) || !slices.Equal(rm.Unchanged, []string{"never"}) {
		t.Errorf("Remove = %+v, %v", rm, err)
	}
	if _, err := c.Rollback(ctx, &vsockrpc.RollbackParams{}); !errors.As(err, new(*vsockrpc.NoPreviousError)) {
		t.Errorf("Rollback of what is forgotten = %v", err)
	}

	// An import that runs again yields, and removed stays removed.
	g.imports()
	g.wantStore(map[string]string{"booted": "1", "p-b": "1", "p-c": "1"})

	_, err = c.Apply(ctx, &vsockrpc.ApplyParams{Set: []vsockrpc.Credential{value("x", "1"), value("bad/name", "hunter2"), value("x", "2")}})
	refused, ok := errors.AsType[*vsockrpc.RefusedError](err)
	if !ok || len(refused.Refusals) == 0 || refused.Refusals[0].Reason != credential.ReasonBadName || refused.Refusals[0].Source != credential.SourceLocal {
		t.Errorf("Apply of a bad set = %v", err)
	}
	if err := s.stop(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if out := s.log.String(); strings.Contains(out, "hunter2") {
		t.Errorf("the log has a value: %s", out)
	}
}

// An agent that nobody calls ends, and what it knows is in the store.
func TestServeIdle(t *testing.T) {
	g := newGuest(t)
	s := g.serve(time.Nanosecond)
	if err := s.stop(); err != nil {
		t.Errorf("Serve = %v, want nil", err)
	}
}

// Clients that push overlapping sets at once: each generation is whole, and a
// list never shows half a set.
func TestServeRaces(t *testing.T) {
	const clients, each = 16, 10
	g := newGuest(t)
	s := g.serve(0)
	var wg sync.WaitGroup
	var all []vsockrpc.Credentials
	for n := range clients { // as many as the agent takes
		c := s.client()
		all = append(all, c)
		wg.Go(func() {
			for i := range each {
				v := fmt.Sprintf("%d-%d", n, i)
				set := []vsockrpc.Credential{value("a", v), value("b", v), value("c", v)}
				if _, err := c.Apply(t.Context(), &vsockrpc.ApplyParams{Set: set}); err != nil {
					t.Errorf("Apply: %v", err)
				}
				list, err := c.List(t.Context())
				if err != nil || len(list.Entries) != 3 {
					t.Errorf("List = %+v, %v", list, err)
					return
				}
				for _, e := range list.Entries {
					if e.Revision != list.Entries[0].Revision {
						t.Errorf("List shows half a set: %+v", list.Entries)
					}
				}
			}
		})
	}
	wg.Wait()
	list, err := all[0].List(t.Context())
	if err != nil || list.Generation != clients*each {
		t.Errorf("generation = %d, %v, want %d", list.Generation, err, clients*each)
	}
}

// Who may do what, from what the kernel says of the peer.
func TestAuthorize(t *testing.T) {
	host := vsockrpc.Peer{Kind: vsockrpc.PeerVsock, CID: 2, Port: 1000}
	root := vsockrpc.Peer{Kind: vsockrpc.PeerUnix}
	check := authorize(vsockrpc.Policy{})
	for _, tt := range []struct {
		peer vsockrpc.Peer
		ok   bool
	}{
		{host, true},
		{root, true},
		{vsockrpc.Peer{Kind: vsockrpc.PeerVsock, CID: 2, Port: 1024}, false},
		{vsockrpc.Peer{Kind: vsockrpc.PeerVsock, CID: 1, Port: 1000}, false},
		{vsockrpc.Peer{Kind: vsockrpc.PeerVsock, CID: 3, Port: 1000}, false},
		{vsockrpc.Peer{}, false},
		{vsockrpc.Peer{Kind: vsockrpc.PeerUnix, UID: 4_000_000_000}, false},
	} {
		if err := check(tt.peer); (err == nil) != tt.ok {
			t.Errorf("authorize(%v) = %v, want it to pass: %v", tt.peer, err, tt.ok)
		}
	}

	faulty := Config{}
	faulty.Peer.Deny = true
	call := authorizeCall(faulty)
	for _, tt := range []struct {
		peer   vsockrpc.Peer
		method string
		ok     bool
	}{
		{host, vsockrpc.MethodApply, false},
		{host, vsockrpc.MethodRemove, false},
		{host, vsockrpc.MethodRollback, false},
		{host, vsockrpc.MethodList, true},
		{host, "org.varlink.service.GetInfo", true},
		{root, vsockrpc.MethodApply, true},
	} {
		if err := call(t.Context(), tt.peer, tt.method); (err == nil) != tt.ok {
			t.Errorf("%s of %v with a faulty configuration = %v, want it to pass: %v", tt.method, tt.peer, err, tt.ok)
		}
	}
	if err := authorizeCall(Config{})(t.Context(), host, vsockrpc.MethodApply); err != nil {
		t.Errorf("Apply of the host = %v", err)
	}
}

// What systemd acts on is not the host's to set while the guest runs.
func TestDeniedNames(t *testing.T) {
	g := newGuest(t)
	cfg := Config{}
	cfg.Names.Allow = []string{"network.dns", "ssh.*"}
	for name, want := range map[string]bool{
		"tmpfiles.extra": true, "passwd.hashed-password.root": true, "sysusers.extra": true, "network.hosts": true, "udev.rules.x": true,
		"network.dns": false, "ssh.authorized_keys.root": false, "api-key": false, "tmpfiles": false,
	} {
		set := credstore.Set{Source: credential.SourcePush, Install: []credstore.Credential{{Name: name}}}
		_, refusals := credentials{a: g.a, cfg: cfg}.denied(set)
		if (len(refusals) > 0) != want {
			t.Errorf("denied(%q) = %v, want %v", name, refusals, want)
		}
		set.Source = credential.SourceLocal
		if _, refusals := (credentials{a: g.a, cfg: cfg}).denied(set); len(refusals) > 0 {
			t.Errorf("denied(%q) to root in the guest: %v", name, refusals)
		}
	}
}
