package agent

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/guestagent/guestagent/consumer"
	"github.com/guestagent/guestagent/health"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// reportPause is the least time from one report to the next of a watch.
	reportPause = 500 * time.Millisecond
	// lookEvery is when a watch looks at what nothing tells of: a file of the store
	// that somebody wrote over.
	lookEvery = 15 * time.Second
	// followPause is the time after which PID 1 is tried again.
	followPause = time.Second
)

// An observer makes reports. While somebody watches, it learns of changes from
// systemd, the store, the kernel's pressure stall information and the file
// systems, and all watches have the same report.
type observer struct {
	c   credentials
	log *slog.Logger
	// ctx ends with the agent.
	ctx context.Context
	wg  *sync.WaitGroup
	// collecting has room for one who makes a report: two cost twice and say the
	// same.
	collecting chan struct{}
	parts      *reportParts
	// looking is held while the collector watches: it does one at a time.
	looking sync.Mutex

	mu        sync.Mutex
	watches   int
	stop      context.CancelFunc // ends what the watches need
	now       *vsockrpc.Report   // nil before the first
	err       error
	another   chan struct{} // closed when there is another report, or error
	following *followed     // nil where PID 1 is not followed
	// made is the last report that was asked for, and when it was begun.
	made  *vsockrpc.Report
	begun time.Time
}

// report makes a report of what is so now. Who has to wait for another's takes
// one that was begun meanwhile.
func (o *observer) report(ctx context.Context) (*vsockrpc.Report, error) {
	asked := time.Now()
	select {
	case o.collecting <- struct{}{}:
		defer func() { <-o.collecting }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	o.mu.Lock()
	f, made, begun := o.following, o.made, o.begun
	o.mu.Unlock()
	if made != nil && begun.After(asked) {
		return made, nil
	}
	begun = time.Now()
	r, err := o.parts.report(ctx, f)
	if err != nil {
		return nil, err
	}
	if made == nil || !sameNews(r, made) {
		o.c.giveBack()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.made, o.begun = r, begun
	return r, nil
}

// join begins a watch, and returns what ends it.
func (o *observer) join() (leave func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.watches++; o.watches == 1 {
		ctx, stop := context.WithCancel(o.ctx)
		// What the last watch saw may be old.
		o.stop, o.now, o.err, o.another = stop, nil, nil, make(chan struct{})
		o.wg.Go(func() { o.run(ctx) })
	}
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.watches--; o.watches == 0 {
			o.stop()
		}
	}
}

// latest returns the report, or why there is none, and what is closed when
// there is another one. Both are nil before the first. The report may not be
// changed.
func (o *observer) latest() (r *vsockrpc.Report, another <-chan struct{}, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.now, o.another, o.err
}

// shown are the reasons in the report.
func (o *observer) shown() []health.Reason {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.now == nil {
		return nil
	}
	list := make([]health.Reason, 0, len(o.now.Reasons))
	for _, n := range o.now.Reasons {
		list = append(list, health.Reason{Code: health.Code(n.Code), Verdict: health.Verdict(n.Verdict), Detail: n.Detail})
	}
	return list
}

// run makes reports until ctx ends.
func (o *observer) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	dirty := make(chan struct{}, 1)
	wg.Go(func() { o.follow(ctx, dirty) })
	wg.Go(func() {
		o.looking.Lock()
		defer o.looking.Unlock()
		if err := o.parts.collector.Watch(ctx, o.parts.rules, dirty); err != nil && ctx.Err() == nil {
			o.log.Warn("watching memory and file systems failed; they are looked at now and then", slog.String("error", err.Error()))
		}
	})
	for _, place := range o.c.a.shadowing() {
		parent := make(chan struct{}, 1)
		wg.Go(func() { _ = inotify(ctx, filepath.Dir(place.Dir), filesChange, parent) })
		wg.Go(func() { watchPlace(ctx, place.Dir, dirty, parent) })
	}
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		stored := o.c.changes.next()
		r, err := o.report(ctx)
		if ctx.Err() != nil {
			return
		}
		o.publish(ctx, r, err)
		pause := time.NewTimer(reportPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return
		}
		select {
		case <-dirty:
		case <-stored:
		case <-look.C:
		case <-ctx.Done():
			return
		}
	}
}

// watchPlace is inotify for a folder that may not be there yet: parent has
// something when it may have come.
func watchPlace(ctx context.Context, dir string, changed chan<- struct{}, parent <-chan struct{}) {
	for errors.Is(inotify(ctx, dir, filesChange, changed), fs.ErrNotExist) {
		select {
		case <-parent:
			if _, err := os.Stat(dir); err != nil {
				continue
			}
			select {
			case changed <- struct{}{}: // it may have come with files
			default:
			}
		case <-ctx.Done():
			return
		}
	}
}

// publish gives the watches the report, if it says something new.
func (o *observer) publish(ctx context.Context, r *vsockrpc.Report, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if ctx.Err() != nil { // others watch now
		return
	}
	if err == nil && o.now != nil && sameNews(r, o.now) {
		return
	}
	if err != nil && o.err != nil {
		return
	}
	o.now, o.err = r, err
	close(o.another)
	o.another = make(chan struct{})
}

// followed is a connection to PID 1 that is followed.
type followed struct {
	bus  systemd
	find func(ctx context.Context, names []string) ([]consumer.Unit, error)
	own  string // the unit that the agent runs in
	// hangs is told when PID 1 did not answer in time: what was asked over a
	// connection that nobody reads fills it up. Nil where nobody is to be told.
	hangs chan struct{}
}

// follow stays connected to PID 1, and tells when it says that something
// changed. A connection ends with each daemon-reexec.
func (o *observer) follow(ctx context.Context, dirty chan<- struct{}) {
	poke := func() {
		select {
		case dirty <- struct{}{}:
		default:
		}
	}
	for ctx.Err() == nil {
		err := o.followOnce(ctx, poke)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			o.log.Debug("following systemd failed; it is tried again", slog.String("error", err.Error()))
		}
		t := time.NewTimer(followPause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

var (
	errFollowEnded = errors.New("the connection to systemd ended")
	errNoAnswer    = errors.New("systemd did not answer in time")
)

func (o *observer) followOnce(ctx context.Context, poke func()) error {
	bus, err := o.c.a.pid1(ctx)
	if err != nil {
		return err
	}
	defer bus.Close()
	f, err := bus.Follow(ctx)
	if err != nil {
		return err
	}
	defer f.Close()
	own, err := ownUnit(ctx, bus)
	if err != nil {
		return err
	}
	now := &followed{bus: bus, find: f.Find, own: own, hangs: make(chan struct{}, 1)}
	o.mu.Lock()
	o.following = now
	o.mu.Unlock()
	defer func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.following == now { // and not the next watch's
			o.following = nil
		}
	}()
	poke()
	for {
		select {
		case <-f.Changed():
			poke()
		case <-f.Lost():
			return errFollowEnded
		case <-now.hangs:
			return errNoAnswer
		case <-ctx.Done():
			return nil
		}
	}
}
