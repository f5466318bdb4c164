package hosttest

import (
	"cmp"
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/guestagent/guestagent/vsockrpc"
)

// A Provider is the local socket of a guest's provider. It tells what it is
// given, and costs little: a test may have a thousand. One that hangs from the
// beginning is the [Hostile] guest that is silent.
type Provider struct {
	// Socket is where it listens, if it was started.
	Socket string

	close func()

	mu      sync.Mutex
	status  vsockrpc.ProviderStatus
	changed chan struct{} // closed at the next change
	hung    bool
	calls   int
}

// StartProvider starts one on dir/name.sock that has a status.
func StartProvider(dir, name string, s vsockrpc.ProviderStatus) (*Provider, error) {
	p := NewProvider(s)
	p.Socket = filepath.Join(dir, name+".sock")
	return p, p.Start()
}

// NewProvider makes one that has a status, and is to be served.
func NewProvider(s vsockrpc.ProviderStatus) *Provider {
	return &Provider{status: s, changed: make(chan struct{}), close: func() {}}
}

// Start has it listen again, after Stop.
func (p *Provider) Start() error {
	l, err := net.Listen("unix", p.Socket)
	if err != nil {
		return err
	}
	p.close = p.Serve(l)
	return nil
}

// Serve serves it on a listener, which is taken over, and returns what ends that
// and all connections.
func (p *Provider) Serve(l net.Listener) (stop func()) {
	s := &vsockrpc.Server{
		Product: "guestctl", Version: "test",
		Authorize: func(peer vsockrpc.Peer) error {
			if peer.Local() && int(peer.UID) != os.Getuid() {
				return vsockrpc.ErrRefused
			}
			return nil
		},
		Interfaces: []vsockrpc.Interface{{
			Name: vsockrpc.ProviderInterface, Description: vsockrpc.ProviderDescription,
			Methods: map[string]vsockrpc.Handler{"Ring": nil, "Status": p.tell, "Watch": p.watch},
		}},
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(context.Background(), l) })
	return sync.OnceFunc(func() {
		s.Close()
		wg.Wait()
	})
}

// Stop ends its listener and all connections. It keeps its status.
func (p *Provider) Stop() { p.close() }

// Close ends the provider.
func (p *Provider) Close() { p.close() }

// Set gives it another status, which is not to be changed any more.
func (p *Provider) Set(s vsockrpc.ProviderStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status = s
	p.tellAll()
}

// Hang has it answer nobody from now on, and keep the connections.
func (p *Provider) Hang() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hung = true
	p.tellAll()
}

// Calls is how often it was called.
func (p *Provider) Calls() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls
}

// tellAll has the watches look. The caller has mu.
func (p *Provider) tellAll() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// look is what there is to tell now, and what is closed when it is something
// else. It waits where the provider hangs.
func (p *Provider) look(ctx context.Context) (*vsockrpc.ProviderStatus, <-chan struct{}, error) {
	p.mu.Lock()
	s, changed, hung := p.status, p.changed, p.hung
	p.mu.Unlock()
	if hung {
		<-ctx.Done()
		return nil, nil, context.Cause(ctx)
	}
	return &s, changed, nil
}

func (p *Provider) called() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls++
}

func (p *Provider) tell(ctx context.Context, call *vsockrpc.Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	p.called()
	s, _, err := p.look(ctx)
	if err != nil {
		return err
	}
	return call.Reply(s)
}

func (p *Provider) watch(ctx context.Context, call *vsockrpc.Call) error {
	var params vsockrpc.WatchParams
	if err := call.Decode(&params); err != nil {
		return err
	}
	if !call.More {
		return vsockrpc.ErrExpectedMore
	}
	p.called()
	heart := time.NewTicker(cmp.Or(params.Heartbeat, vsockrpc.DefaultWatchHeartbeat) / 2)
	defer heart.Stop()
	var told <-chan struct{}
	for {
		s, changed, err := p.look(ctx)
		if err != nil {
			return err
		}
		reply := &vsockrpc.ProviderWatchReply{LastContact: s.LastContact}
		if changed != told {
			reply, told = &vsockrpc.ProviderWatchReply{Status: s}, changed
		}
		if err := call.ReplyMore(reply); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-heart.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
