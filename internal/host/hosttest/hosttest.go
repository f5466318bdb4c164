// Package hosttest has guests for tests: an agent in memory, and some that mean
// no good. It knows nothing of systemd and checks little; the agent's own tests
// do that.
package hosttest

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// A Guest is an agent on a Unix socket, with a store in memory. It lets in the
// user that the test runs as.
type Guest struct {
	// Socket is where it listens.
	Socket string

	close func()

	mu         sync.Mutex
	calls      int
	generation int64
	store      map[string]entry
	previous   map[string]entry // nil if there is none
}

type entry struct{ value, revision string }

// Refuses is a name that every Guest refuses, for a reason with an escape
// sequence in it.
const Refuses = "refused"

// Start starts a guest that listens on dir/name.sock.
func Start(dir, name string) (*Guest, error) {
	g := &Guest{Socket: filepath.Join(dir, name+".sock"), store: map[string]entry{}}
	s := &vsockrpc.Server{
		Product: "guestagent", Version: "test",
		Authorize: func(p vsockrpc.Peer) error {
			if p.Local() && int(p.UID) == os.Getuid() {
				return nil
			}
			return vsockrpc.ErrRefused
		},
		Interfaces: []vsockrpc.Interface{{
			Name: vsockrpc.CredentialsInterface, Description: vsockrpc.CredentialsDescription,
			Methods: map[string]vsockrpc.Handler{"Apply": g.apply, "List": g.list, "Remove": g.remove, "Rollback": g.rollback},
		}},
	}
	l, err := net.Listen("unix", g.Socket)
	if err != nil {
		return nil, err
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(context.Background(), l) })
	g.close = func() {
		s.Close()
		wg.Wait()
	}
	return g, nil
}

// Close ends the guest.
func (g *Guest) Close() { g.close() }

// Value returns the value of a credential.
func (g *Guest) Value(name string) (value string, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	e, ok := g.store[name]
	return e.value, ok
}

// Calls returns how many calls there were.
func (g *Guest) Calls() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.calls
}

func (g *Guest) expect(generation *int64) error {
	g.calls++
	if generation != nil && *generation != g.generation {
		return &vsockrpc.GenerationMismatchError{ExpectedGeneration: *generation, Generation: g.generation}
	}
	return nil
}

// replace puts next in force, if it is anything else.
func (g *Guest) replace(next map[string]entry, forget bool) {
	if maps.Equal(next, g.store) {
		return
	}
	g.previous, g.store = g.store, next
	if forget {
		g.previous = nil
	}
	g.generation++
}

func (g *Guest) apply(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.ApplyParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	defer p.Wipe()
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.expect(p.ExpectedGeneration); err != nil {
		return err
	}
	next := maps.Clone(g.store)
	r := &vsockrpc.ApplyResult{}
	inSet := map[string]bool{}
	for _, c := range p.Set {
		if c.Name == Refuses && !c.AllowShadowed {
			return &vsockrpc.RefusedError{Refusals: []credential.Refusal{
				{Name: c.Name, Source: credential.SourcePush, Reason: credential.ReasonShadowed, Detail: "by \x1b[31m/etc/credstore/" + c.Name},
			}}
		}
		inSet[c.Name] = true
		e := entry{value: string(c.Value.Bytes()), revision: c.Revision}
		switch old, ok := g.store[c.Name]; {
		case !ok || old.value != e.value:
			r.Installed = append(r.Installed, c.Name)
		case old.revision != e.revision:
			r.Relabelled = append(r.Relabelled, c.Name)
		default:
			r.Unchanged = append(r.Unchanged, c.Name)
		}
		next[c.Name] = e
	}
	remove := p.Remove
	if p.Prune {
		for _, name := range slices.Sorted(maps.Keys(g.store)) {
			if strings.HasPrefix(name, p.PrunePrefix) && !inSet[name] {
				remove = append(remove, name)
			}
		}
	}
	for _, name := range remove {
		if _, ok := next[name]; ok {
			r.Removed = append(r.Removed, name)
		} else {
			r.Unchanged = append(r.Unchanged, name)
		}
		delete(next, name)
	}
	if !p.DryRun {
		g.replace(next, p.Forget)
	}
	r.Generation = g.generation
	return call.Reply(r)
}

func (g *Guest) list(_ context.Context, call *vsockrpc.Call) error {
	if err := call.Decode(&vsockrpc.ListParams{}); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls++
	r := &vsockrpc.ListResult{Generation: g.generation}
	for name, e := range g.store {
		r.Entries = append(r.Entries, vsockrpc.Entry{
			Name: name, Revision: e.revision, Size: int64(len(e.value)), Source: credential.SourcePush,
			InstalledAt: "2026-01-02T03:04:05Z", State: "inForce", Path: "/run/credstore/" + name,
		})
	}
	slices.SortFunc(r.Entries, func(a, b vsockrpc.Entry) int { return cmp.Compare(a.Name, b.Name) })
	return call.Reply(r)
}

func (g *Guest) remove(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RemoveParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.expect(p.ExpectedGeneration); err != nil {
		return err
	}
	next := maps.Clone(g.store)
	r := &vsockrpc.RemoveResult{}
	for _, name := range p.Names {
		if _, ok := next[name]; ok {
			r.Removed = append(r.Removed, name)
		} else {
			r.Unchanged = append(r.Unchanged, name)
		}
		delete(next, name)
	}
	g.replace(next, p.Forget)
	r.Generation = g.generation
	return call.Reply(r)
}

func (g *Guest) rollback(_ context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.RollbackParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.expect(p.ExpectedGeneration); err != nil {
		return err
	}
	if g.previous == nil {
		return &vsockrpc.NoPreviousError{}
	}
	r := &vsockrpc.RollbackResult{}
	for _, name := range slices.Sorted(maps.Keys(g.previous)) {
		if g.previous[name] != g.store[name] {
			r.Installed = append(r.Installed, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(g.store)) {
		if _, ok := g.previous[name]; !ok {
			r.Removed = append(r.Removed, name)
		}
	}
	g.replace(g.previous, false)
	r.Generation = g.generation
	return call.Reply(r)
}

// Hostile starts a guest that answers every message with what kind says, until
// it is closed:
//
//	flood    bytes without an end
//	escapes  a list of credentials with control sequences for terminals
//	garbage  what is no JSON
//	error    an error that nobody knows, with control sequences
//	silent   nothing at all
//	hangup   the end of the connection
func Hostile(dir, name, kind string) (*HostileGuest, error) {
	answer, ok := hostile[kind]
	if !ok {
		return nil, fmt.Errorf("there is no kind %s", kind)
	}
	l, err := net.Listen("unix", filepath.Join(dir, name+".sock"))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	g := &HostileGuest{called: make(chan struct{}, 1)}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
				b := make([]byte, 4096)
				if _, err := conn.Read(b); err != nil {
					return
				}
				select {
				case g.called <- struct{}{}:
				default:
				}
				answer(ctx, conn)
			})
		}
	})
	g.close = func() {
		cancel()
		_ = l.Close()
		wg.Wait()
	}
	return g, nil
}

// A HostileGuest is a guest that means no good.
type HostileGuest struct {
	called chan struct{}
	close  func()
}

// Called has something to receive after a call.
func (g *HostileGuest) Called() <-chan struct{} { return g.called }

// Close ends the guest.
func (g *HostileGuest) Close() { g.close() }

// Escapes is what the hostile guests put into every text.
const Escapes = "\x1b]0;owned\a\u009b31m\u202e\x7f"

var hostile = map[string]func(ctx context.Context, conn net.Conn){
	"flood": func(_ context.Context, conn net.Conn) {
		b := []byte(strings.Repeat("[", 1<<16))
		for {
			if _, err := conn.Write(b); err != nil {
				return
			}
		}
	},
	"escapes": func(_ context.Context, conn net.Conn) {
		_ = answer(conn, map[string]any{"parameters": map[string]any{
			"generation": 1, "installed": []string{Escapes}, "relabelled": []string{}, "removed": []string{}, "unchanged": []string{},
			"product": Escapes, "version": Escapes,
			"entries":  []vsockrpc.Entry{{Name: Escapes, Revision: Escapes, Source: Escapes, InstalledAt: Escapes, State: Escapes, Path: Escapes}},
			"refusals": []credential.Refusal{{Name: Escapes, Source: Escapes, Reason: Escapes, Detail: Escapes}},
		}})
	},
	"garbage": func(_ context.Context, conn net.Conn) { _, _ = conn.Write([]byte("\x1b[31mhello\x00")) },
	"error": func(_ context.Context, conn net.Conn) {
		_ = answer(conn, map[string]any{"error": "com.example.Error", "parameters": map[string]any{"text": Escapes}})
	},
	"silent": func(ctx context.Context, _ net.Conn) { <-ctx.Done() },
	"hangup": func(context.Context, net.Conn) {},
}

func answer(conn net.Conn, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return errors.New("encoding an answer")
	}
	_, err = conn.Write(append(b, 0))
	return err
}
