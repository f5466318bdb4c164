package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/guestagent/guestagent/vsockrpc"
)

// exporterLook is how often an exporter reads the registry.
const exporterLook = 10 * time.Second

// An Exporter shows Prometheus, over HTTP, how all VMs of a registry are. It has
// a [Watcher] for each, and keeps what it is told of a guest as figures, in a
// form that the guest cannot make grow: a scrape is answered from memory, and
// waits for no guest.
//
// What a guest says is escaped and bounded, each text and their number. Nobody
// is asked who they are: whoever can connect may read.
type Exporter struct {
	// Registry is where the VMs are named. It is read anew each 10 s.
	Registry Registry
	// Listeners are where it is scraped, and are taken over.
	Listeners []net.Listener
	// Version is this program's.
	Version string
	// Ready, if not nil, is called once when the guests are watched.
	Ready func()
	// Log gets what happens. It must not be nil.
	Log *slog.Logger

	dial     func(context.Context, vsockrpc.Target) (*vsockrpc.Client, error) // nil is the watcher's
	every    time.Duration                                                    // 0 is exporterLook
	watching atomic.Bool
	problem  string // with the registry, as it was told last

	mu      sync.Mutex
	faulty  bool // the registry could not be read as a whole
	watched map[string]*watchedGuest
}

// A watchedGuest is one that has a watcher.
type watchedGuest struct {
	guest  Guest
	cancel context.CancelFunc
	digest atomic.Pointer[digest] // never nil
}

// Run watches the guests and serves scrapes until ctx ends, or a listener fails
// for good, which is an error.
func (e *Exporter) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	var failed error
	e.watched = map[string]*watchedGuest{}
	e.look(ctx, &wg)
	wg.Go(func() {
		failed = e.serve(ctx)
		cancel()
	})
	e.watching.Store(true)
	defer e.watching.Store(false)
	if e.Ready != nil {
		e.Ready()
	}
	tick := time.NewTicker(cmp.Or(e.every, exporterLook))
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-tick.C:
			e.look(ctx, &wg)
		case <-ctx.Done():
		}
	}
	wg.Wait()
	return failed
}

// look has a watcher for each VM that is in the registry now.
func (e *Exporter) look(ctx context.Context, wg *sync.WaitGroup) {
	guests, err := e.Registry.List()
	problem := ""
	if err != nil {
		problem = vsockrpc.Escape(err.Error(), maxDetail)
	}
	if problem != "" && problem != e.problem {
		e.Log.Warn("not every VM can be watched", slog.String("problem", problem))
	}
	e.problem = problem

	e.mu.Lock()
	defer e.mu.Unlock()
	e.faulty = err != nil
	there := map[string]bool{}
	for _, g := range guests {
		there[g.Name] = true
		if w := e.watched[g.Name]; w != nil {
			if w.guest == g {
				continue
			}
			w.cancel()
		}
		e.watched[g.Name] = e.watch(ctx, wg, g)
	}
	for name, w := range e.watched {
		// One whose file cannot be read at present is not gone.
		if err == nil && !there[name] {
			w.cancel()
			delete(e.watched, name)
		}
	}
}

// watch starts a watcher.
func (e *Exporter) watch(ctx context.Context, wg *sync.WaitGroup, g Guest) *watchedGuest {
	ctx, cancel := context.WithCancel(ctx)
	w := &watchedGuest{guest: g, cancel: cancel}
	w.digest.Store(&digest{verdict: VerdictUnreachable, failedUnits: -1})
	wg.Go(func() {
		defer cancel()
		// It reads no faster than is good, and keeps a report that is too large to be
		// kept only in part.
		err := (&Watcher{Guest: g, dial: e.dial}).Run(ctx, func(s State) { w.digest.Store(newDigest(&s)) })
		if ctx.Err() == nil {
			e.Log.Error("watching a guest ended", slog.String("vm", g.Name), slog.String("error", vsockrpc.Escape(fmt.Sprint(err), maxDetail)))
		}
	})
	return w
}

// ErrListenAddress is matched where an address to listen on makes no sense.
var ErrListenAddress = errors.New("not an address to listen on")

// ListenExporter takes the sockets that systemd hands over, if there are any,
// and otherwise listens at address, HOST:PORT.
func ListenExporter(ctx context.Context, address string) ([]net.Listener, error) {
	listeners, err := activated()
	if err != nil || len(listeners) > 0 {
		return listeners, err
	}
	if _, _, err := net.SplitHostPort(address); err != nil {
		return nil, fmt.Errorf("%w: want HOST:PORT, such as 127.0.0.1:9774 or [::1]:9774", ErrListenAddress)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	return []net.Listener{l}, nil
}
