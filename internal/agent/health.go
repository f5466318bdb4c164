package agent

import (
	"context"
	"io"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/guestagent/guestagent/vsockrpc"
)

// health serves io.guestagent.Health.
type health struct {
	a       *Agent
	log     *slog.Logger
	changes *changes
}

// iface is io.guestagent.Health, ready to be served.
func (h health) iface() vsockrpc.Interface {
	return vsockrpc.Interface{
		Name:        vsockrpc.HealthInterface,
		Description: vsockrpc.HealthDescription,
		Methods:     map[string]vsockrpc.Handler{"Get": h.get, "Ping": h.ping, "Watch": h.watch},
	}
}

func (h health) get(_ context.Context, call *vsockrpc.Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	r, err := h.a.report()
	if err != nil {
		return err
	}
	return call.Reply(&vsockrpc.GetResult{Report: r})
}

func (h health) ping(_ context.Context, call *vsockrpc.Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	tx, err := h.a.store().View()
	if err != nil {
		return err
	}
	g := generation(tx.Generation())
	tx.Close() // before a caller that may read slowly is waited for
	return call.Reply(&vsockrpc.PingResult{BootID: h.a.bootID(), Generation: g})
}

// watch tells the report, and then whenever there is another one.
func (h health) watch(ctx context.Context, call *vsockrpc.Call) error {
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
	// Half of what is promised: the caller's clock may be faster.
	heart := time.NewTicker(p.Heartbeat / 2)
	defer heart.Stop()
	var last *vsockrpc.Report
	for beat := false; ; {
		changed := h.changes.next()
		r, err := h.a.report()
		if err != nil {
			return err
		}
		switch {
		case !reflect.DeepEqual(r, last):
			err = call.ReplyMore(&vsockrpc.WatchReply{Report: r})
			last = r
		case beat:
			err = call.ReplyMore(&vsockrpc.WatchReply{})
		}
		if err != nil {
			return err
		}
		beat = false
		select {
		case <-changed:
		case <-heart.C:
			// Not all that is reported tells of its changes.
			beat = true
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// report is what the wire tells of the guest.
func (a *Agent) report() (*vsockrpc.Report, error) {
	s, err := a.Status()
	if err != nil {
		return nil, err
	}
	r := &vsockrpc.Report{
		Version: s.Version, BootID: s.BootID, MachineID: a.machineID(), Generation: generation(s.Generation),
		Entries: wireEntries(s.Entries), Refusals: s.Refusals, Reasons: []vsockrpc.Reason{}, Provider: s.Provider,
	}
	for _, n := range s.Reasons {
		r.Reasons = append(r.Reasons, vsockrpc.Reason{Code: string(n.Code), Detail: n.Detail, Hint: n.Hint})
	}
	r.Gate, r.Rejected, err = a.trials()
	return r, err
}

func (a *Agent) machineID() string {
	f, err := os.Open(a.path(pathMachineID))
	if err != nil {
		return ""
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, 64)) // machine-id(5): 32 digits, or "uninitialized"
	return strings.TrimSpace(string(b))
}

// wireEntries are entries as the wire has them.
func wireEntries(entries []Entry) []vsockrpc.Entry {
	list := make([]vsockrpc.Entry, 0, len(entries))
	for _, e := range entries {
		entry := vsockrpc.Entry{
			Name: e.Name, Revision: e.Revision, Size: e.Size, Source: e.Source, State: string(e.State), Path: e.Path, Ephemeral: e.Ephemeral,
		}
		if e.InstalledAt != nil {
			entry.InstalledAt = e.InstalledAt.Format(time.RFC3339Nano)
		}
		list = append(list, entry)
	}
	return list
}

// changes tells those who watch that the store may have something new to say.
type changes struct {
	mu sync.Mutex
	ch chan struct{} // closed at the next change; nil if nobody waits for it
}

// next returns what is closed at the next change.
func (c *changes) next() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ch == nil {
		c.ch = make(chan struct{})
	}
	return c.ch
}

func (c *changes) tell() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ch != nil {
		close(c.ch)
		c.ch = nil
	}
}
