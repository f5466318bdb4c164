package agent

import (
	"context"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/guestagent/guestagent/vsockrpc"
)

// healthServer serves io.guestagent.Health.
type healthServer struct {
	c        credentials
	observer *observer
}

// iface is io.guestagent.Health, ready to be served.
func (h healthServer) iface() vsockrpc.Interface {
	return vsockrpc.Interface{
		Name:        vsockrpc.HealthInterface,
		Description: vsockrpc.HealthDescription,
		Methods:     map[string]vsockrpc.Handler{"Get": h.get, "Ping": h.ping, "Watch": h.watch},
	}
}

func (h healthServer) get(ctx context.Context, call *vsockrpc.Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	r, err := h.observer.report(ctx)
	if err != nil {
		return err
	}
	return call.Reply(&vsockrpc.GetResult{Report: r})
}

func (h healthServer) ping(_ context.Context, call *vsockrpc.Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	tx, err := h.c.a.store().View()
	if err != nil {
		return err
	}
	g := generation(tx.Generation())
	tx.Close() // before a caller that may read slowly is waited for
	return call.Reply(&vsockrpc.PingResult{BootID: h.c.a.bootID(), Generation: g})
}

// watch tells the report, and then whenever there is another one.
func (h healthServer) watch(ctx context.Context, call *vsockrpc.Call) error {
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
	defer h.observer.join()()
	// Half of what is promised: the caller's clock may be faster.
	heart := time.NewTicker(p.Heartbeat / 2)
	defer heart.Stop()
	var last *vsockrpc.Report
	for {
		r, changed, err := h.observer.latest()
		reply := &vsockrpc.WatchReply{Time: clock()}
		switch {
		case err != nil:
			return err
		case r != last:
			reply.Report, last = r, r // it may have been made for others, a while ago
		case last == nil: // the first report is being made
			reply = nil
		}
		if reply != nil {
			if err := call.ReplyMore(reply); err != nil {
				return err
			}
			heart.Reset(p.Heartbeat / 2)
		}
		for beat := false; !beat; {
			select {
			case <-changed:
				beat = true
			case <-heart.C:
				beat = last != nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
}

// clock is the time of now, as the wire has it.
func clock() string { return time.Now().UTC().Format(time.RFC3339Nano) }

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
