package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/guestagent/guestagent/vsockrpc"
)

// DefaultIdle is how long nobody calls before an activated agent ends. Its
// sockets stay with the service manager, which starts it again.
const DefaultIdle = 30 * time.Second

const (
	// shutdownWait bounds the wait for calls in flight.
	shutdownWait = 20 * time.Second
	// vsockWait bounds the wait for a kernel that has no vsock yet.
	vsockWait = 30 * time.Second
	// vsockConns are the connections that the host may have; what is left of
	// the server's 16 is kept for root in the guest.
	vsockConns = 12
)

// A Serving says how the agent is to be served.
type Serving struct {
	// Listeners are taken over, and closed.
	Listeners []net.Listener
	// Idle is how long nobody calls before Serve returns; 0 is for ever.
	Idle time.Duration
	// Log gets what happens. It must not be nil.
	Log *slog.Logger
	// Ready is called once, when calls are answered; nil for nobody.
	Ready func()
}

// Serve answers the host and root in the guest, until ctx ends, nobody calls
// for a while, or a listener fails for good. Calls in flight are finished. Who
// may call is decided from what the kernel says of the peer.
func (a *Agent) Serve(ctx context.Context, s Serving) error {
	r := &Report{}
	cfg := a.config(r)
	for _, n := range r.Reasons {
		s.Log.Warn("a part of the configuration does not apply", slog.String("code", string(n.Code)), slog.String("detail", n.Detail))
	}
	policy := vsockrpc.Policy{PrivilegedPort: cfg.Peer.PrivilegedPort}
	server := &vsockrpc.Server{
		Vendor: "guestagent", Product: "guestagent", Version: a.Version, URL: "https://github.com/guestagent/guestagent",
		Interfaces:    []vsockrpc.Interface{a.credentialsInterface(cfg)},
		Authorize:     authorize(policy),
		AuthorizeCall: authorizeCall(cfg),
		Log:           s.Log,
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, l := range s.Listeners {
		if l.Addr().Network() == "vsock" {
			l = vsockrpc.Limited{Listener: l, MaxConns: vsockConns}
		}
		wg.Go(func() {
			// The server's own context: ctx ends the waiting below, and calls in
			// flight finish.
			if err := server.Serve(context.WithoutCancel(ctx), l); !errors.Is(err, vsockrpc.ErrServerClosed) {
				cancel(fmt.Errorf("serving %s: %w", l.Addr(), err))
			}
		})
	}
	if s.Ready != nil {
		s.Ready()
	}
	var err error
	if s.Idle > 0 {
		err = server.WaitIdle(ctx, s.Idle)
	} else {
		<-ctx.Done()
		err = ctx.Err()
	}
	if err != nil {
		err = context.Cause(ctx)
	}
	stop, done := context.WithTimeout(context.WithoutCancel(ctx), shutdownWait)
	defer done()
	shutdownErr := server.Shutdown(stop)
	wg.Wait()
	if errors.Is(err, context.Canceled) {
		err = nil // told to end
	}
	return errors.Join(err, shutdownErr)
}

// authorize decides over peers. Whoever runs the agent may call it locally,
// which is root but in tests.
func authorize(policy vsockrpc.Policy) func(vsockrpc.Peer) error {
	return func(peer vsockrpc.Peer) error {
		if peer.Local() && int64(peer.UID) == int64(os.Geteuid()) {
			return nil
		}
		return policy.Authorize(peer)
	}
}

// authorizeCall decides over single methods: a configuration whose peer section
// is at fault keeps the host to reading.
func authorizeCall(cfg Config) func(context.Context, vsockrpc.Peer, string) error {
	return func(_ context.Context, peer vsockrpc.Peer, method string) error {
		if !cfg.Peer.Deny || peer.Local() || method == vsockrpc.MethodList || strings.HasPrefix(method, "org.varlink.service.") {
			return nil
		}
		return fmt.Errorf("%w: peer in the configuration is at fault; guestagent check-config tells where", vsockrpc.ErrRefused)
	}
}

// ServeActivated serves on the sockets that the service manager handed over,
// and tells it how that goes (sd_notify(3)). Without any it listens itself, on
// vsock and on the local socket, and stays. A guest without vsock is served
// locally. An agent that was activated ends when nobody calls for as long as
// idle says, or [DefaultIdle] where that is 0.
func (a *Agent) ServeActivated(ctx context.Context, idle time.Duration, log *slog.Logger) error {
	stayLean()
	named, rest, err := vsockrpc.Activated()
	if err != nil {
		return err
	}
	for _, f := range rest {
		_ = f.Close() // nothing that this version knows
	}
	s := Serving{Log: log, Idle: cmp.Or(idle, DefaultIdle)}
	for _, l := range named {
		s.Listeners = append(s.Listeners, l.Listener)
	}
	if len(named) == 0 {
		s.Idle = 0
		if s.Listeners, err = a.listen(ctx, log); err != nil {
			return err
		}
	}
	notify := func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn("telling systemd failed", slog.String("error", err.Error()))
		}
	}
	s.Ready = func() { notify(daemon.SdNotifyReady) }

	var wg sync.WaitGroup
	defer wg.Wait()
	watch, stop := context.WithCancel(ctx)
	defer stop()
	if every, err := daemon.SdWatchdogEnabled(false); err == nil && every > 0 {
		wg.Go(func() {
			t := time.NewTicker(every / 2)
			defer t.Stop()
			for {
				select {
				case <-t.C:
					notify(daemon.SdNotifyWatchdog)
				case <-watch.Done():
					return
				}
			}
		})
	}
	err = a.Serve(ctx, s)
	notify(daemon.SdNotifyStopping)
	return err
}

// stayLean trades some time for memory: the agent does little, in guests that
// may be small. Without it the collector lets the heap grow to 4 MiB for each
// of many processors before it looks.
func stayLean() {
	debug.SetGCPercent(25)
	runtime.GOMAXPROCS(min(2, runtime.GOMAXPROCS(0)))
}

// listen opens the sockets that the units open otherwise.
func (a *Agent) listen(ctx context.Context, log *slog.Logger) ([]net.Listener, error) {
	path := a.path(pathLocalSocket)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // others look there, too
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var lc net.ListenConfig
	local, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, local.Close())
	}
	return []net.Listener{local, newLateVsock(ctx, log)}, nil
}

// A lateVsock listens on vsock as soon as the kernel has it, so that root in
// the guest is answered meanwhile. Where that does not come about it says so,
// and accepts nobody.
type lateVsock struct {
	ready chan struct{} // closed when listener is set, or will never be
	ended context.Context
	end   context.CancelFunc

	listener net.Listener // nil if there is no vsock
}

var _ net.Listener = (*lateVsock)(nil)

func newLateVsock(ctx context.Context, log *slog.Logger) *lateVsock {
	l := &lateVsock{ready: make(chan struct{})}
	l.ended, l.end = context.WithCancel(ctx)
	go func() {
		defer close(l.ready)
		var err error
		if l.listener, err = vsockrpc.ListenVsock(l.ended, vsockrpc.DefaultPort, vsockWait); err != nil && l.ended.Err() == nil {
			log.Warn("the host cannot call; root in the guest can", slog.String("error", err.Error()))
		}
	}()
	return l
}

// Accept waits for vsock first.
func (l *lateVsock) Accept() (net.Conn, error) {
	<-l.ready
	if l.listener == nil {
		<-l.ended.Done()
		return nil, net.ErrClosed
	}
	return l.listener.Accept()
}

// Close ends the waiting, too, and waits for its goroutine.
func (l *lateVsock) Close() error {
	l.end()
	<-l.ready
	if l.listener == nil {
		return nil
	}
	return l.listener.Close()
}

// Addr is an address of vsock, whether there is one or not.
func (*lateVsock) Addr() net.Addr { return vsockAddr{} }

type vsockAddr struct{}

func (vsockAddr) Network() string { return "vsock" }
func (vsockAddr) String() string  { return fmt.Sprintf("port %d", vsockrpc.DefaultPort) }
