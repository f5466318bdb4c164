package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// muxLook is how often a MuxListener looks whether its socket is still there.
	muxLook = time.Second
	// muxLive is how long somebody else's listener is left in peace before it
	// is asked again whether it still listens.
	muxLive = 10 * time.Second
)

// ErrProviderRuns is matched where another provider has the socket, or its lock.
var ErrProviderRuns = errors.New("another provider runs for this VM")

// A MuxConfig says where a [MuxListener] listens.
type MuxConfig struct {
	// Path is the VM's own socket, as in vsock-mux:PATH. The folders above the
	// one that it is in must belong to the administrator, and may be links;
	// that one may belong to anybody, and may not be a link.
	Path string
	// Port is the port that the guest dials: the socket is Path, '_' and Port.
	Port uint32
	// UID and GID are the socket's owner, who must be the VMM's user: nobody
	// else, bar root, may connect. Nil takes the folder's.
	UID, GID *int
	// Log is told of what keeps the socket from being there, once each, and of
	// when it is. Nil is silent.
	Log *slog.Logger

	every time.Duration // between two looks; 0 is muxLook
}

// A MuxListener takes the connections of one guest that a VMM hands over on a
// Unix socket of the host (vsock-mux). The folder is the VMM's, whom nobody
// trusts: a runner removes the socket when the VM starts, or the folder when it
// ends, and somebody may put links in their place. So the listener looks every
// second whether the name still is its socket, and binds anew where it is not.
// It follows no link there, changes owner and mode of nothing but the socket
// that it bound, and removes nothing but sockets that nobody listens on.
//
// It needs Linux, /proc, and of capabilities CAP_DAC_OVERRIDE and CAP_CHOWN
// where the folder is another user's. In a folder with the sticky bit it also
// needs CAP_FOWNER to remove what another user has.
type MuxListener struct {
	cfg       MuxConfig
	dir, name string
	log       *slog.Logger

	conns  chan net.Conn
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	// looking is held during a look, which does system calls in a folder of
	// somebody else.
	looking sync.Mutex
	closed  bool
	cur     *boundSocket
	owner   owner // what cur was given to
	live    liveError
	asked   time.Time // when live was

	mu      sync.Mutex
	problem string
}

var _ net.Listener = (*MuxListener)(nil)

// An owner is who has a file.
type owner struct{ uid, gid int }

// A fileID tells a file from all others that exist at the same time.
type fileID struct{ dev, ino uint64 }

// A boundSocket is one that this process listens on.
type boundSocket struct {
	l   *net.UnixListener
	pin int // holds the socket's file
	id  fileID

	mu    sync.Mutex
	early []net.Conn // came before our own, see reach
}

func (s *boundSocket) accept() (net.Conn, error) {
	s.mu.Lock()
	if len(s.early) > 0 {
		c := s.early[0]
		s.early = s.early[1:]
		s.mu.Unlock()
		return c, nil
	}
	s.mu.Unlock()
	return s.l.Accept()
}

// close ends the socket, not its name.
func (s *boundSocket) close() error {
	err := s.l.Close()
	s.unpin()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.early {
		_ = c.Close()
	}
	s.early = nil
	return err
}

// A liveError is that somebody else listens at the name.
type liveError struct {
	id   fileID
	path string
}

func (e liveError) Error() string {
	return fmt.Sprintf("listening at %q: another program listens there, and is left alone; end it (`ss -xlp` shows which one it is), or give this VM's provider another port", e.path)
}

// ListenMux listens where cfg says. It cannot fail for good: what stands in the
// way is reported, and tried again until Close.
func ListenMux(cfg MuxConfig) *MuxListener {
	m := newMux(cfg)
	m.look()
	m.wg.Go(func() {
		tick := time.NewTicker(cmp.Or(cfg.every, muxLook))
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				m.look()
			case <-m.ctx.Done():
				return
			}
		}
	})
	return m
}

func newMux(cfg MuxConfig) *MuxListener {
	m := &MuxListener{
		cfg: cfg,
		dir: filepath.Dir(cfg.Path), name: filepath.Base(cfg.Path) + "_" + strconv.FormatUint(uint64(cfg.Port), 10),
		log:   cfg.Log,
		conns: make(chan net.Conn),
	}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// Accept returns the next connection, of whichever socket is there. After
// Close it fails with net.ErrClosed, and otherwise it does not fail.
func (m *MuxListener) Accept() (net.Conn, error) {
	if m.ctx.Err() == nil {
		select {
		case c := <-m.conns:
			return c, nil
		case <-m.ctx.Done():
		}
	}
	return nil, &net.OpError{Op: "accept", Net: "unix", Addr: m.Addr(), Err: net.ErrClosed}
}

// Addr is the socket's path, whether it is there or not.
func (m *MuxListener) Addr() net.Addr {
	return &net.UnixAddr{Name: m.path(), Net: "unix"}
}

func (m *MuxListener) path() string { return filepath.Join(m.dir, m.name) }

// Problem is why nobody can connect at present, and the way out, or "".
func (m *MuxListener) Problem() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.problem
}

// Taken returns an error that matches [ErrProviderRuns] if another program
// listened at the name when that was last looked at. Whoever begins to provide
// had better not, then: two would each put their own set in force.
func (m *MuxListener) Taken() error {
	m.looking.Lock()
	defer m.looking.Unlock()
	if m.live == (liveError{}) {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrProviderRuns, m.live)
}

// Close ends Accept, removes the socket if it is still this listener's, and
// waits for what the listener has started. Connections that were accepted go on.
func (m *MuxListener) Close() error {
	m.cancel()
	m.looking.Lock()
	m.closed = true
	if m.cur != nil {
		if f, err := openFolder(m.dir); err == nil {
			_ = f.removeIf(m.name, m.cur.id)
			f.close()
		}
	}
	m.drop()
	m.looking.Unlock()
	m.wg.Wait()
	return nil
}

// look sees to it that the socket is there, and reports what is in the way.
func (m *MuxListener) look() {
	m.looking.Lock()
	defer m.looking.Unlock()
	if m.closed {
		return
	}
	err := m.lookLocked()
	problem := ""
	if err != nil {
		problem = err.Error()
	}
	m.mu.Lock()
	before := m.problem
	m.problem = problem
	m.mu.Unlock()
	switch {
	case problem == "" || problem == before:
	case errors.Is(err, fs.ErrNotExist):
		m.log.Info("the VM's folder is not there yet", slog.String("problem", problem))
	default:
		m.log.Warn("a guest cannot reach its provider", slog.String("problem", problem))
	}
}

func (m *MuxListener) lookLocked() error {
	f, err := openFolder(m.dir)
	if err != nil {
		// Without its folder nobody finds the socket any more. What else is
		// wrong, such as too many open files, says nothing of that.
		if _, ok := errors.AsType[folderError](err); ok || errors.Is(err, fs.ErrNotExist) {
			m.drop()
		}
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("listening at %q: %w; it is waited for: the VM's runner should make it", m.path(), err)
		}
		return fmt.Errorf("listening at %q: %w", m.path(), err)
	}
	defer f.close()
	want := f.owner
	if m.cfg.UID != nil {
		want.uid = *m.cfg.UID
	}
	if m.cfg.GID != nil {
		want.gid = *m.cfg.GID
	}

	id, err := f.id(m.name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("listening at %q: looking at the name: %w", m.path(), err)
	}
	if m.cur != nil && err == nil && id == m.cur.id {
		// systemd-tmpfiles and others make a folder first, and give it away then.
		if want == m.owner {
			return nil
		}
		return m.give(m.cur, want)
	}
	m.drop()

	if err == nil && id == m.live.id && time.Since(m.asked) < muxLive {
		return m.live
	}
	m.live = liveError{}
	s, err := f.listen(m.name)
	if id, ok := errors.AsType[liveID](err); ok {
		m.live, m.asked = liveError{fileID(id), m.path()}, time.Now()
		return m.live
	}
	if err != nil {
		return fmt.Errorf("listening at %q: %w", m.path(), err)
	}
	if err := m.give(s, want); err != nil {
		_ = f.removeIf(m.name, s.id)
		_ = s.close()
		return err
	}
	m.cur = s
	m.wg.Go(func() { m.accept(s) })
	m.log.Info("a guest can reach its provider", slog.String("socket", m.path()), slog.Int("uid", want.uid), slog.Int("gid", want.gid))
	return nil
}

// give makes to the owner of the socket.
func (m *MuxListener) give(s *boundSocket, to owner) error {
	if err := s.chown(to); err != nil {
		return fmt.Errorf("listening at %q: giving the socket to user %d and group %d: %w; run the provider as root with CAP_CHOWN, or as the VMM's user", m.path(), to.uid, to.gid, err)
	}
	m.owner = to
	return nil
}

// drop gives up the socket, not its name.
func (m *MuxListener) drop() {
	if m.cur != nil {
		_ = m.cur.close()
		m.cur = nil
	}
}

// accept hands on the connections of one socket, until that is closed.
func (m *MuxListener) accept(s *boundSocket) {
	for {
		c, err := s.accept()
		switch {
		case err == nil:
			m.deliver(c)
		case errors.Is(err, net.ErrClosed):
			return
		default:
			m.log.Warn("accepting a connection of a guest", slog.String("socket", m.path()), slog.String("error", err.Error()))
			select {
			case <-time.After(muxLook):
			case <-m.ctx.Done():
			}
		}
	}
}

func (m *MuxListener) deliver(c net.Conn) {
	select {
	case m.conns <- c:
	case <-m.ctx.Done():
		_ = c.Close()
	}
}

// ParseOwner parses USER[:GROUP], or :GROUP, by name or by number, for
// [MuxConfig]. What is left out is nil.
func ParseOwner(s string) (uid, gid *int, err error) {
	name, group, hasGroup := strings.Cut(s, ":")
	if name == "" && group == "" || hasGroup && group == "" {
		return nil, nil, fmt.Errorf("parsing the owner %q: want USER, USER:GROUP or :GROUP, by name or by number", s)
	}
	if name != "" {
		u, err := user.Lookup(name)
		if err == nil {
			name = u.Uid
		}
		if uid, err = parseID(name, err); err != nil {
			return nil, nil, fmt.Errorf("parsing the owner %q: %w; give the number of a user that only NSS knows", s, err)
		}
	}
	if hasGroup {
		if gid, err = lookupGroup(group); err != nil {
			return nil, nil, fmt.Errorf("parsing the owner %q: %w", s, err)
		}
	}
	return uid, gid, nil
}

func lookupGroup(name string) (*int, error) {
	g, err := user.LookupGroup(name)
	if err == nil {
		name = g.Gid
	}
	gid, err := parseID(name, err)
	if err != nil {
		return nil, fmt.Errorf("%w; give the number of a group that only NSS knows", err)
	}
	return gid, nil
}

// parseID parses the number of a user or group. The largest means no change to
// chown(2), and is nobody's. lookup is what is wrong if it is no number.
func parseID(s string, lookup error) (*int, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n == math.MaxUint32 || n > math.MaxInt {
		if lookup == nil {
			lookup = fmt.Errorf("%q is no number from 0 to %d", s, uint32(math.MaxUint32-1))
		}
		return nil, lookup
	}
	id := int(n)
	return &id, nil
}
