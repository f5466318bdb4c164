package credsocket

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// finishWait is how long answers in progress get once ctx has ended. What
	// a peer has not read by then stays with the store, and the next process
	// fails that unit.
	finishWait = 5 * time.Second
	// acceptPause is how long nothing is accepted after accept(2) failed, as
	// it does where descriptors are short.
	acceptPause = time.Second
	// strangerPause is how far apart warnings about strangers are at least.
	strangerPause = time.Minute
	// mark is the send time-out that says "an answer has begun". See conn.
	mark = time.Second
)

var (
	errNoDecide    = errors.New("nobody here decides over requests")
	errOver        = errors.New("the credential did not arrive in time")
	errTold        = errors.New("the agent ends and cannot keep the request")
	errInterrupted = errors.New("the agent ended in the middle of an answer")
)

// state is what a Server has besides its fields.
type state struct {
	// mu guards what follows. It is held for moments only.
	mu      sync.Mutex
	loop    *loop // since Serve was called, for ever
	retry   bool  // Retry was called
	fail    bool  // FailWaiting was called
	waiting map[*conn]Waiting
	stops   []stop
	done    chan struct{} // closed when Serve returns; nil before it was called

	// For tests. step is called with a word for it before each system call
	// that somebody else can notice; clock is time since boot.
	step  func(string)
	clock func() time.Duration
}

// A stop asks the loop to accept nothing any more, if force is set or nothing is
// held. It gets the number of what is held.
type stop struct {
	force bool
	held  chan<- int
}

// A conn is a connection that was accepted, in this process or in one before it.
//
// The kernel's socket remembers the one thing that the next process cannot find
// out, whether a first byte may have been written, as a send time-out that is
// not 0. Descriptors' copies share it. The time-out itself has no effect:
// nothing here blocks. (A second name in the store would not do: PID 1 takes no
// descriptor that it has already, service_add_fd_store in src/core/service.c.
// O_NONBLOCK would not do: PID 1 sets it when it hands descriptors over.)
type conn struct {
	fd       int
	file     *os.File // owns fd, where it was restored
	name     string   // in the store
	accepted time.Duration
	req      Request
	queued   bool    // to be decided on
	answer   *answer // nil: waits
	gone     bool    // closed
}

// A loop is a call of Serve. Its fields belong to that goroutine.
type loop struct {
	*Server
	log      *slog.Logger
	listener int
	wakefd   int
	held     []*conn // oldest first
	queue    []*conn // to be decided on, in this order
	asked    *conn   // being decided on
	ask      chan Request
	decided  chan Decision
	seq      uint64
	failing  bool // FailWaiting was called
	stopped  bool // Stop was called
	stopping bool // ctx has ended
	reported int  // what Busy knows
	buf      []byte

	fds    []unix.PollFd // of wait
	polled []*conn       // whose they are

	acceptAgain   time.Duration
	strangers     int
	strangerAgain time.Duration
}

// Serve answers requests until ctx ends, and then returns nil. It may be called
// once. The listening socket stays the caller's; it is made non-blocking. Nil is
// none: then nobody comes besides who was restored. The restored files are what the service manager handed over with names that
// [IsStored] knows, their names being those; Serve takes them.
//
// When ctx ends, nothing is accepted any more: the backlog stays with the
// service manager. Answers in progress get some seconds. Who waits still waits:
// the connections stay open for the rest of the process's life, and in the
// store. See [Server.FailWaiting] for where there is no such store.
func (s *Server) Serve(ctx context.Context, listener *os.File, restored []*os.File) error {
	defer runtime.KeepAlive(listener)
	l := &loop{
		Server:   s,
		log:      cmp.Or(s.Log, slog.New(slog.DiscardHandler)),
		listener: -1,
		ask:      make(chan Request, 1),
		decided:  make(chan Decision, 1),
	}
	if listener != nil {
		l.listener = int(listener.Fd())
		if err := unix.SetNonblock(l.listener, true); err != nil {
			return fmt.Errorf("serving credentials: %w", err)
		}
	}
	var err error
	if l.wakefd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return fmt.Errorf("serving credentials: opening an eventfd: %w", err)
	}
	s.mu.Lock()
	if s.loop != nil {
		s.mu.Unlock()
		_ = unix.Close(l.wakefd)
		return errors.New("serving credentials: served already")
	}
	s.loop, s.waiting, s.done = l, make(map[*conn]Waiting), make(chan struct{})
	s.mu.Unlock()
	defer close(s.done)

	defer context.AfterFunc(ctx, s.wake)()
	var worker sync.WaitGroup
	worker.Go(func() {
		for r := range l.ask {
			l.decided <- s.decide(ctx, l.log, r)
			s.wake()
		}
	})
	defer func() {
		close(l.ask)
		worker.Wait()
		select {
		case d := <-l.decided:
			d.discard()
		default:
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		_ = unix.Close(l.wakefd)
		l.wakefd = -1
	}()
	if err := l.run(ctx, restored); err != nil {
		return fmt.Errorf("serving credentials: %w", err)
	}
	return nil
}

// Retry has everybody who waits decided on anew: a value may have arrived. It
// returns at once, and may be called from any goroutine at any time.
func (s *Server) Retry() {
	s.mu.Lock()
	s.retry = true
	s.mu.Unlock()
	s.wake()
}

// FailWaiting fails the units that wait, and accepts no connection any more. It
// is for a process that is about to end where its store ends with it: before
// systemd 254, which has FileDescriptorStorePreserve=, and with no store at
// all. It returns at once. Call it before the context of Serve ends: then Serve
// lets the answers finish. It may be called from any goroutine, also before Serve.
func (s *Server) FailWaiting() {
	s.mu.Lock()
	s.fail = true
	s.mu.Unlock()
	s.wake()
}

// Stop has nothing accepted any more, for good, and returns how many connections
// are held. Before Serve and after it there are none, and it changes nothing.
func (s *Server) Stop() int { return s.stop(true) }

// StopIfIdle is Stop where no connection is held, and else does nothing. It
// returns whether none is: what comes from then on stays in the backlog.
func (s *Server) StopIfIdle() bool { return s.stop(false) == 0 }

func (s *Server) stop(force bool) int {
	held := make(chan int, 1)
	s.mu.Lock()
	done := s.done
	s.stops = append(s.stops, stop{force, held})
	s.mu.Unlock()
	if done == nil {
		return 0
	}
	s.wake()
	select {
	case n := <-held:
		return n
	case <-done:
		return 0
	}
}

// Waiting returns the requests that are not answered yet, oldest first.
func (s *Server) Waiting() []Waiting {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Waiting, 0, len(s.waiting))
	for _, w := range s.waiting {
		all = append(all, w)
	}
	slices.SortFunc(all, func(a, b Waiting) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Unit, b.Unit), cmp.Compare(a.Name, b.Name))
	})
	return all
}

// wake makes the loop look around.
func (s *Server) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.loop != nil && s.loop.wakefd >= 0 {
		// It fails only where the counter is full, and then the loop wakes anyway.
		_, _ = unix.Write(s.loop.wakefd, binary.NativeEndian.AppendUint64(nil, 1))
	}
}

// decide calls Decide, and refuses where that panics. What was decided while ctx
// ended lets the request wait: it may be a refusal that nobody meant. The next
// process asks again.
func (s *Server) decide(ctx context.Context, log *slog.Logger, r Request) (d Decision) {
	if s.Decide == nil {
		return Decision{Refuse: errNoDecide}
	}
	defer func() {
		if ctx.Err() != nil {
			d.discard()
			d = Decision{}
		}
	}()
	defer func() {
		if v := recover(); v != nil {
			// Not the value: nobody knows what is in it.
			log.Error("a decision panicked", slog.String("type", fmt.Sprintf("%T", v)), slog.String("stack", string(debug.Stack())))
			d = Decision{Refuse: fmt.Errorf("deciding: panic with a %T", v)}
		}
	}()
	return s.Decide(ctx, r)
}

// discard closes the value of a decision that is not carried out.
func (d Decision) discard() {
	if d.Value != nil {
		_ = d.Value.Close()
	}
}

func (l *loop) run(ctx context.Context, restored []*os.File) error {
	for _, f := range restored {
		l.restore(f)
	}
	slices.SortStableFunc(l.held, func(a, b *conn) int { return cmp.Compare(a.accepted, b.accepted) })
	for _, c := range slices.Clone(l.held) {
		l.meet(c)
	}
	var end time.Duration
	for {
		if !l.stopping && ctx.Err() != nil {
			l.stopping, end = true, l.now()+finishWait
		}
		l.heed()
		l.settle()
		if !l.stopping {
			l.expire()
			l.next()
		}
		l.report()
		now := l.now()
		if l.stopping && (now >= end || !slices.ContainsFunc(l.held, func(c *conn) bool { return c.answer != nil && !c.answer.stuck })) {
			return nil
		}
		until := end
		if !l.stopping {
			until = l.nextDeadline()
		}
		if err := l.wait(now, until); err != nil {
			return err
		}
	}
}

// heed does what other goroutines asked for.
func (l *loop) heed() {
	l.mu.Lock()
	retry, fail, stops := l.retry, l.fail, l.stops
	l.retry, l.stops = false, nil
	l.mu.Unlock()
	l.failing = fail
	for _, stop := range stops {
		l.stopped = l.stopped || stop.force || len(l.held) == 0
		stop.held <- len(l.held)
	}
	if !retry && !fail {
		return
	}
	for _, c := range slices.Clone(l.held) {
		switch {
		case c.answer != nil:
		case fail:
			l.refuse(c, errTold)
		case retry:
			l.enqueue(c)
		}
	}
}

func (l *loop) enqueue(c *conn) {
	if !c.queued {
		c.queued = true
		l.queue = append(l.queue, c)
	}
}

// next hands the worker one request, where it has none.
func (l *loop) next() {
	for l.asked == nil && len(l.queue) > 0 {
		c := l.queue[0]
		l.queue = slices.Delete(l.queue, 0, 1)
		c.queued = false
		if c.gone || c.answer != nil {
			continue
		}
		l.asked = c
		l.ask <- c.req
	}
}

// settle carries out what the worker brought.
func (l *loop) settle() {
	var d Decision
	select {
	case d = <-l.decided:
	default:
		return
	}
	c := l.asked
	l.asked = nil
	switch {
	case l.stopping, c.gone, c.answer != nil:
		d.discard()
	case d.Refuse != nil:
		d.discard()
		l.refuse(c, d.Refuse)
	case d.Value != nil:
		l.give(c, d)
	}
}

// expire fails who has waited for too long.
func (l *loop) expire() {
	if l.Wait <= 0 {
		return
	}
	now := l.now()
	for _, c := range slices.Clone(l.held) {
		if c.answer == nil && now >= c.accepted+l.Wait {
			l.refuse(c, errOver)
		}
	}
}

// nextDeadline is the time since boot at which the loop has something to do by
// itself; 0 is never.
func (l *loop) nextDeadline() time.Duration {
	var at time.Duration
	sooner := func(t time.Duration) {
		if at == 0 || t < at {
			at = t
		}
	}
	if l.acceptAgain > l.now() {
		sooner(l.acceptAgain)
	}
	if l.Wait > 0 {
		for _, c := range l.held {
			if c.answer == nil {
				sooner(c.accepted + l.Wait)
			}
		}
	}
	return at
}

// report tells Busy where there is news.
func (l *loop) report() {
	if n := len(l.held); n != l.reported {
		l.reported = n
		if l.Busy != nil {
			l.Busy(n)
		}
	}
}

// wait waits until something happens, or until a time since boot that is not 0,
// and deals with what happened to descriptors.
func (l *loop) wait(now, until time.Duration) error {
	// The peers shut their writing sides before they came, so reading says
	// nothing. Without any event asked for, poll(2) tells that a peer is gone.
	fds := l.fds[:0]
	l.polled = append(l.polled[:0], l.held...)
	for _, c := range l.polled {
		p := unix.PollFd{Fd: int32(c.fd)} //nolint:gosec // descriptors are small
		if c.answer != nil && !c.answer.stuck {
			p.Events = unix.POLLOUT
		}
		fds = append(fds, p)
	}
	fds = append(fds, unix.PollFd{Fd: int32(l.wakefd), Events: unix.POLLIN}) //nolint:gosec // descriptors are small
	if l.accepting(now) {
		fds = append(fds, unix.PollFd{Fd: int32(l.listener), Events: unix.POLLIN}) //nolint:gosec // descriptors are small
	}
	l.fds = fds
	timeout := -1
	if until > 0 {
		// Rounded up, so that the time has come afterwards.
		timeout = int(min(max(0, until-now+time.Millisecond-1)/time.Millisecond, 1<<30))
	}
	l.at("poll")
	if _, err := unix.Poll(fds, timeout); err != nil {
		if errors.Is(err, unix.EINTR) {
			return nil
		}
		return fmt.Errorf("polling: %w", err)
	}
	for i, c := range l.polled {
		switch e := fds[i].Revents; {
		case e&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0:
			l.log.Debug("a unit does not want its credential any more", c.attrs()...)
			l.remove(c)
		case e&unix.POLLOUT != 0:
			l.write(c)
		}
	}
	if rest := fds[len(fds)-1]; int(rest.Fd) == l.listener && rest.Revents != 0 {
		if rest.Revents&unix.POLLNVAL != 0 {
			return errors.New("the listening socket was closed")
		}
		l.accept()
	}
	var n [8]byte
	_, _ = unix.Read(l.wakefd, n[:])
	return nil
}

func (l *loop) accepting(now time.Duration) bool {
	return l.listener >= 0 && !l.stopping && !l.stopped && !l.failing && len(l.held) < cmp.Or(max(0, l.MaxWaiting), DefaultMaxWaiting) && now >= l.acceptAgain
}

// accept takes what is in the backlog, as much as may be held.
func (l *loop) accept() {
	for l.accepting(l.now()) {
		c := &conn{accepted: l.now()}
		c.name = storedName(c.accepted, l.seq)
		l.seq++
		l.at("accept")
		fd, _, err := unix.Accept4(l.listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if err != nil {
			l.notAccepted(err)
			return
		}
		// Until it lies in the store, a kill hands out an empty credential.
		// Nothing but Keep's one system call belongs here.
		c.fd = fd
		if l.Store != nil {
			err = l.Store.Keep(c.name, fd)
		}
		l.held = append(l.held, c)
		l.at("kept")
		if err != nil {
			l.log.Warn("a connection could not be stored, and would not survive this process", slog.Any("error", err))
		}
		l.meet(c)
	}
}

func (l *loop) notAccepted(err error) {
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNABORTED):
	default:
		// Most likely descriptors are short. The backlog keeps.
		l.acceptAgain = l.now() + acceptPause
		l.log.Warn("accepting a connection", slog.Any("error", err))
	}
}

// restore takes up a connection that came out of the store.
func (l *loop) restore(f *os.File) {
	c := &conn{fd: int(f.Fd()), file: f, name: f.Name()}
	var ok bool
	if c.accepted, ok = parseStoredName(c.name); !ok || c.accepted > l.now() {
		c.accepted = l.now()
	}
	l.held = append(l.held, c)
	if err := connected(c.fd); err != nil {
		l.log.Warn("what was stored is no connection", slog.String("name", c.name), slog.Any("error", err))
		l.remove(c)
		return
	}
	if err := unix.SetNonblock(c.fd, true); err != nil {
		l.log.Warn("taking up a connection", slog.Any("error", err))
	}
}

// connected reports whether fd is a connected Unix stream socket.
func connected(fd int) error {
	for _, o := range []struct {
		option, want int
		other        string
	}{
		{unix.SO_DOMAIN, unix.AF_UNIX, "not a Unix socket"},
		{unix.SO_TYPE, unix.SOCK_STREAM, "not a stream"},
		{unix.SO_ACCEPTCONN, 0, "a listening socket"},
	} {
		switch v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, o.option); {
		case err != nil:
			return os.NewSyscallError("getsockopt", err)
		case v != o.want:
			return errors.New(o.other)
		}
	}
	_, err := unix.Getpeername(fd)
	return os.NewSyscallError("getpeername", err)
}

// meet looks at who came, by what the kernel says, and has it decided on.
func (l *loop) meet(c *conn) {
	cred, err := unix.GetsockoptUcred(c.fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || int64(cred.Uid) != int64(l.UID) {
		// It is not PID 1, and an empty credential of its own making is no harm.
		l.stranger(cred)
		l.remove(c)
		return
	}
	sa, err := unix.Getpeername(c.fd)
	if err == nil {
		addr := ""
		if u, ok := sa.(*unix.SockaddrUnix); ok {
			addr = u.Name
		}
		c.req, err = ParseAddress(addr)
	}
	if err != nil {
		// Root, but nobody we know: perhaps a later systemd. Not to close is
		// the one thing that cannot be wrong.
		l.refuse(c, err)
		return
	}
	if begun, err := unix.GetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO); err != nil || begun.Nano() != 0 {
		l.refuse(c, errInterrupted)
		return
	}
	l.log.Debug("a unit asks for a credential", append(c.attrs(), slog.Bool("restored", c.file != nil))...)
	l.mu.Lock()
	l.waiting[c] = Waiting{c.req, time.Now().Add(c.accepted - l.now())}
	l.mu.Unlock()
	l.enqueue(c)
}

// stranger warns of a peer that is not root, now and then.
func (l *loop) stranger(cred *unix.Ucred) {
	l.strangers++
	now := l.now()
	if now < l.strangerAgain {
		return
	}
	l.strangerAgain = now + strangerPause
	attrs := []any{slog.Int("since_last", l.strangers)}
	if cred != nil {
		attrs = append(attrs, slog.Int64("uid", int64(cred.Uid)), slog.Int64("pid", int64(cred.Pid)))
	}
	l.strangers = 0
	l.log.Warn("a peer that is not the service manager asked for a credential", attrs...)
}

// remove closes a connection, here and in the store.
func (l *loop) remove(c *conn) {
	c.gone = true
	l.mu.Lock()
	delete(l.waiting, c)
	l.mu.Unlock()
	if c.answer != nil {
		c.answer.close()
	}
	if l.Store != nil {
		l.at("drop")
		if err := l.Store.Drop(c.name); err != nil {
			l.log.Warn("dropping a connection from the store", slog.Any("error", err))
		}
	}
	l.at("close")
	if c.file != nil {
		_ = c.file.Close()
	} else {
		_ = unix.Close(c.fd)
	}
	l.held = slices.DeleteFunc(l.held, func(o *conn) bool { return o == c })
}

// attrs says for the log whose connection it is. Both names follow systemd's
// grammars, or are empty.
func (c *conn) attrs() []any {
	return []any{slog.String("unit", c.req.Unit), slog.String("credential", c.req.Name)}
}

func (l *loop) at(step string) {
	if l.step != nil {
		l.step(step)
	}
}

// now is the time since boot: CLOCK_MONOTONIC, which is the same for every
// process of this boot.
func (l *loop) now() time.Duration {
	if l.clock != nil {
		return l.clock()
	}
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // it cannot fail
	return time.Duration(ts.Nano())
}
