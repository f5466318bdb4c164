package hosttest

import (
	"context"
	"reflect"
	"strings"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// rejectedInForce is the agent's word for a guest that booted on what a gate
// had rolled back.
const rejectedInForce = "rejectedInForce"

// tell has the watches look. The caller has mu.
func (g *Guest) tell() {
	close(g.changed)
	g.changed = make(chan struct{})
}

// report is the guest's. The caller has mu.
func (g *Guest) report() *vsockrpc.Report {
	r := &vsockrpc.Report{
		Version: "test", BootID: g.bootID, MachineID: "machine", Generation: g.generation, Gate: g.trial,
		Entries: g.entries(), Refusals: append([]credential.Refusal{}, g.refusals...), Reasons: []vsockrpc.Reason{},
		Provider: &vsockrpc.ProviderState{State: vsockrpc.ProviderNone},
	}
	if g.rejected != nil {
		r.Rejected = []vsockrpc.Rejected{g.rejection}
	}
	if g.provided {
		r.Provider = &vsockrpc.ProviderState{State: vsockrpc.ProviderInForce, Since: now}
	}
	if len(g.onRejected) > 0 {
		r.Reasons = append(r.Reasons, vsockrpc.Reason{Code: rejectedInForce, Detail: strings.Join(g.onRejected, ", ")})
	}
	return r
}

func (g *Guest) get(_ context.Context, call *vsockrpc.Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	g.mu.Lock()
	g.asked++
	r := g.report()
	g.mu.Unlock()
	return call.Reply(&vsockrpc.GetResult{Report: r})
}

func (g *Guest) ping(_ context.Context, call *vsockrpc.Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	g.mu.Lock()
	r := &vsockrpc.PingResult{BootID: g.bootID, Generation: g.generation}
	g.mu.Unlock()
	return call.Reply(r)
}

func (g *Guest) watch(ctx context.Context, call *vsockrpc.Call) error {
	var p vsockrpc.WatchParams
	if err := call.Decode(&p); err != nil {
		return err
	}
	if !call.More {
		return vsockrpc.ErrExpectedMore
	}
	if p.Heartbeat == 0 {
		p.Heartbeat = vsockrpc.DefaultWatchHeartbeat
	}
	heart := time.NewTicker(p.Heartbeat / 2)
	defer heart.Stop()
	var last *vsockrpc.Report
	for {
		g.mu.Lock()
		r, changed := g.report(), g.changed
		g.mu.Unlock()
		reply := &vsockrpc.WatchReply{}
		if !reflect.DeepEqual(r, last) {
			reply.Report, last = r, r
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
