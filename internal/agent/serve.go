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
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/guestagent/guestagent/credsocket"
	"github.com/guestagent/guestagent/health"
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
	// Credentials is the listening credentials socket, nil for none. Restored
	// are connections of units that waited on it when an agent before this one
	// ended, whether the socket is there still or not. Store is where such
	// connections are kept; nil for nowhere. Files are taken over.
	Credentials *os.File
	Restored    []*os.File
	Store       credsocket.FDStore
	// Keeps says, when the agent is told to end, whether Store outlives it. If
	// not, or if it is nil, units that wait are failed: their connections would
	// end, and hand them an empty credential.
	Keeps func() bool
	// Idle is how long nobody calls before Serve returns; 0 is for ever. While
	// units wait or are refreshed or watched, it does not.
	Idle time.Duration
	// Log gets what happens. It must not be nil.
	Log *slog.Logger
	// Ready is called once, when calls are answered; nil for nobody.
	Ready func()
}

// Serve answers the host and root in the guest, and hands credentials to units,
// until ctx ends, nobody needs it for a while, or a listener fails for good.
// Calls in flight are finished; what goes on in the guest because of them is
// left to the next start. Who may call is decided from what the kernel says of
// the peer.
func (a *Agent) Serve(ctx context.Context, s Serving) error {
	r := &Report{}
	cfg := a.config(r)
	for _, n := range r.Reasons {
		s.Log.Warn("a part of the configuration does not apply", slog.String("code", string(n.Code)), slog.String("detail", n.Detail))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	busy := &activity{}
	workCtx, stopWork := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWork()
	c := credentials{a: a, cfg: cfg, log: s.Log, work: &work{ctx: workCtx, busy: busy}, giving: new(atomic.Bool), changes: &changes{}}
	var loading sync.WaitGroup
	stopLoading := func() {}
	if s.Credentials != nil || len(s.Restored) > 0 {
		if s.Credentials != nil {
			defer s.Credentials.Close()
		}
		hand := a.newHandout(cfg, s.Log)
		defer hand.close()
		c.hand = hand
		hand.server.Store, hand.hold, hand.tell = s.Store, busy.hold, c.changes.tell
		hand.server.Busy = func(n int) {
			busy.setWaiting(n)
			c.changes.tell() // one that waited may be gone
		}
		loadCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
		stopLoading = stop
		loading.Go(func() {
			if err := hand.server.Serve(loadCtx, s.Credentials, s.Restored); err != nil {
				cancel(err)
			}
		})
	}
	c.resume()
	c.watchStore()

	h := healthServer{c: c, observer: &observer{
		c: c, log: s.Log, ctx: workCtx, wg: &c.work.wg, collecting: make(chan struct{}, 1),
		parts: &reportParts{c: c, collector: &health.Collector{Root: cmp.Or(a.Root, "/")}, rules: cfg.rules()},
	}}
	h.observer.parts.collector.Shown = h.observer.shown
	server := &vsockrpc.Server{
		Vendor: "guestagent", Product: "guestagent", Version: a.Version, URL: "https://github.com/guestagent/guestagent",
		Interfaces:    []vsockrpc.Interface{c.iface(), h.iface(), metrics{h.observer.report}.iface()},
		Authorize:     authorize(vsockrpc.Policy{PrivilegedPort: cfg.Peer.PrivilegedPort}),
		AuthorizeCall: authorizeCall(cfg),
		Log:           s.Log,
	}
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
	err := waitIdle(ctx, server, busy, s.Idle)
	for err == nil && c.hand != nil && !c.hand.server.StopIfIdle() {
		// Somebody came in the last moment.
		err = waitIdle(ctx, server, busy, s.Idle)
	}
	if err != nil {
		err = context.Cause(ctx)
	}
	if c.hand != nil && c.hand.server.Stop() > 0 && (s.Keeps == nil || !s.Keeps()) {
		c.hand.server.FailWaiting()
	}
	stopLoading()
	stopWork()
	stop, done := context.WithTimeout(context.WithoutCancel(ctx), shutdownWait)
	defer done()
	shutdownErr := server.Shutdown(stop)
	wg.Wait()
	c.work.wg.Wait()
	loading.Wait()
	if errors.Is(err, context.Canceled) {
		err = nil // told to end
	}
	return errors.Join(err, shutdownErr)
}

// waitIdle returns nil when nobody has called for as long as idle says, and
// there is nothing else to stay for; or ctx's error. An idle of 0 is for ever.
func waitIdle(ctx context.Context, server *vsockrpc.Server, busy *activity, idle time.Duration) error {
	if idle == 0 {
		<-ctx.Done()
		return ctx.Err()
	}
	for {
		if err := server.WaitIdle(ctx, idle); err != nil {
			return err
		}
		if waited, err := busy.wait(ctx); err != nil || !waited {
			return err
		}
	}
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
		if !cfg.Peer.Deny || peer.Local() || method == vsockrpc.MethodList ||
			strings.HasPrefix(method, vsockrpc.HealthInterface+".") || strings.HasPrefix(method, "org.varlink.service.") {
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
	s := Serving{Log: log, Idle: cmp.Or(idle, DefaultIdle)}
	if store, ok := credsocket.SystemdStore(); ok {
		s.Store, s.Keeps = store, func() bool { return a.storeKept(context.WithoutCancel(ctx), log) }
	}
	for _, f := range rest {
		if credsocket.IsStored(f.Name()) {
			s.Restored = append(s.Restored, f)
			continue
		}
		// Nothing that this version knows, and it takes a place in the store.
		if s.Store != nil {
			_ = s.Store.Drop(f.Name())
		}
		_ = f.Close()
	}
	for _, l := range named {
		if l.Name != fdCredentials {
			s.Listeners = append(s.Listeners, l.Listener)
			continue
		}
		if s.Credentials, err = listenerFile(l.Listener); err != nil {
			return err
		}
	}
	if len(named) == 0 {
		s.Idle = 0
		if err := a.listen(ctx, &s); err != nil {
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

// fdCredentials is FileDescriptorName= of guestagent-credentials.socket.
const fdCredentials = "credentials"

// listenerFile is the socket of a listener, which is closed.
func listenerFile(l net.Listener) (*os.File, error) {
	defer l.Close()
	unix, ok := l.(*net.UnixListener)
	if !ok {
		return nil, fmt.Errorf("taking over the socket %s: it is no Unix socket", fdCredentials)
	}
	unix.SetUnlinkOnClose(false)
	return unix.File()
}

// storeKept reports whether connections in the service manager's store outlive
// this process, which has been told to end: a restart keeps them on every
// version of systemd, a stop where FileDescriptorStorePreserve= says so (254).
// What cannot be told is no.
func (a *Agent) storeKept(ctx context.Context, log *slog.Logger) bool {
	ctx, cancel := context.WithTimeout(ctx, pid1Timeout)
	defer cancel()
	bus, err := a.pid1(ctx)
	if err != nil {
		log.Warn("asking systemd what becomes of the units that wait failed, and so they fail", slog.String("error", err.Error()))
		return false
	}
	defer bus.Close()
	_, job, preserve, err := bus.Own(ctx)
	if err != nil {
		log.Warn("asking systemd what becomes of the units that wait failed, and so they fail", slog.String("error", err.Error()))
		return false
	}
	return preserve || job == "restart"
}

// listen opens the sockets that the units open otherwise.
func (a *Agent) listen(ctx context.Context, s *Serving) error {
	local, err := listenUnix(ctx, a.path(pathLocalSocket))
	if err != nil {
		return err
	}
	credentials, err := listenUnix(ctx, a.path(pathCredentialsSocket))
	if err != nil {
		return errors.Join(err, local.Close())
	}
	if s.Credentials, err = listenerFile(credentials); err != nil {
		return errors.Join(err, local.Close())
	}
	s.Listeners = []net.Listener{local, newLateVsock(ctx, s.Log)}
	return nil
}

// listenUnix listens at path for this user alone.
func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // others look there, too
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
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
