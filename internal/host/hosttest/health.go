package hosttest

import (
	"cmp"
	"context"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// rejectedInForce is the agent's word for a guest that booted on what a gate
// had rolled back.
const rejectedInForce = "rejectedInForce"

// Says has f change every report from now on, nil for none, and the watches tell.
// The guest is otherwise healthy. F must not keep the report.
func (g *Guest) Says(f func(r *vsockrpc.Report)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.says = f
	g.tell()
}

// Judge has the guest say this of itself from now on.
func (g *Guest) Judge(verdict string, reasons ...vsockrpc.Reason) {
	g.Says(func(r *vsockrpc.Report) {
		r.Verdict = verdict
		r.Reasons = append(r.Reasons, reasons...)
	})
}

// Clock is by how much the guest's clock is ahead of the host's, and has it told
// from the next report or heartbeat on.
func (g *Guest) Clock(ahead time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ahead = ahead
}

// clock is what time it is in the guest.
func (g *Guest) clock() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Now().Add(g.ahead).UTC().Format(time.RFC3339Nano)
}

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
		Protocol: vsockrpc.Protocol, Verdict: vsockrpc.VerdictHealthy, Hostname: "guest", Uptime: 60,
		Systemd: &vsockrpc.SystemdState{Version: "257", State: "running", Failed: []vsockrpc.FailedUnit{}},
		Waiting: slices.Clone(g.waiting),
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
	if g.says != nil {
		g.says(r)
	}
	return r
}

// timed gives a report the guest's time, unless it has one that it shall have.
func (g *Guest) timed(r *vsockrpc.Report) *vsockrpc.Report {
	t := *r
	t.Time = cmp.Or(t.Time, g.clock())
	return &t
}

func (g *Guest) get(_ context.Context, call *vsockrpc.Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	g.mu.Lock()
	g.asked++
	r := g.report()
	g.mu.Unlock()
	return call.Reply(&vsockrpc.GetResult{Report: g.timed(r)})
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
	heart := time.NewTicker(cmp.Or(p.Heartbeat, vsockrpc.DefaultWatchHeartbeat) / 2)
	defer heart.Stop()
	var last *vsockrpc.Report
	for {
		g.mu.Lock()
		r, changed := g.report(), g.changed
		g.mu.Unlock()
		reply := &vsockrpc.WatchReply{}
		if reflect.DeepEqual(r, last) {
			reply.Time = g.clock()
		} else {
			reply.Report, last = g.timed(r), r
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
