package health

import (
	"context"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

const (
	// watchTick is how often a watch looks at what nothing tells of.
	watchTick = time.Second
	// stallWindow is the time that [Rules] counts stalls in. It is the longest that
	// the kernel takes.
	stallWindow = 10 * time.Second
	// averageWindow is how often the kernel adds to its averages. None of them rises
	// above a share unless the last window has it.
	averageWindow = 2 * time.Second
	// stallHold is how long a stall counts that the kernel told of. It tells again
	// after a window if it goes on, and without CAP_SYS_RESOURCE it looks only every
	// 2 s.
	stallHold = stallWindow + 3*time.Second
	// signHold is how long the average is looked at after a sign.
	signHold = 2 * averageWindow
)

// The stalls that a watch has the kernel tell of: those that count, by the index in
// Collector.over, and a sign that the average may rise above a threshold.
const (
	stallSome = iota
	stallFull
	stallSign
)

// A stall is one that the kernel shall tell of.
type stall struct {
	word   string        // some or full
	time   time.Duration // within window
	window time.Duration // a multiple of 2 s: others take CAP_SYS_RESOURCE
}

// A trigger is the kernel's word to tell of stalls.
type trigger interface {
	// wait calls fired with the index of each stall that the kernel tells of, until
	// ctx ends or the kernel has taken its word back. It must be called once, and
	// closes what it waits for.
	wait(ctx context.Context, fired func(i int))
}

// Watch tells whenever the disks or the pressure for memory, as [Judge] has them
// under r, may make something else of the guest: it sends to changed, or leaves it
// if nobody takes it and the buffer is full. So the buffer has to have room for one;
// whoever takes it collects anew. It sends once at the start, and, with
// [Collector.Shown], each second until that says what it finds. Watch returns when ctx
// ends, with its error.
//
// Nothing tells of a file system that fills up, so that each is asked once a second.
//
// Of pressure the kernel tells (Documentation/accounting/psi.rst): of tasks that have
// waited for memory for their share of ten seconds, which it notices after two to
// four seconds where they wait all the time. The average that it shows follows later,
// and until then its word counts, for 13 seconds from when it last said so:
// [Share.Over]. Collect has it as well, so that both agree. The average is looked at
// once a second while there is pressure, to see it go, and where it may rise: a stall
// comes and goes, so that it alone reaches the threshold. Where the kernel tells a
// process without CAP_SYS_RESOURCE of nothing, which is before Linux 6.4, the average
// is looked at once a second all the time, and alone counts.
func (c *Collector) Watch(ctx context.Context, r Rules, changed chan<- struct{}) error {
	r = r.withDefaults()
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer c.clearOver()

	fired := make(chan int)
	lost := make(chan struct{})
	// The kernel refuses more than a window.
	share := func(window time.Duration, percent int) time.Duration {
		return window / 100 * time.Duration(min(percent, 100))
	}
	stalls := []stall{
		stallSome: {"some", share(stallWindow, r.MemoryDegraded), stallWindow},
		stallFull: {"full", share(stallWindow, r.MemoryFailing), stallWindow},
		// When all wait, some do.
		stallSign: {"some", share(averageWindow, min(r.MemoryDegraded, r.MemoryFailing)), averageWindow},
	}
	t, err := c.openTrigger(stalls)
	if err == nil {
		wg.Go(func() {
			defer close(lost)
			t.wait(ctx, func(i int) {
				select {
				case fired <- i:
				case <-ctx.Done():
				}
			})
		})
	}

	ticker := time.NewTicker(watchTick)
	defer ticker.Stop()
	tells, psi, pressed := err == nil, true, false
	var sign time.Time // until when one counts
	var last []Reason
	for first := true; ; first = false {
		shown := c.shown()
		pressed = pressed || slices.ContainsFunc(shown, func(r Reason) bool { return r.Code == MemoryPressure })
		f := c.look(first || psi && (!tells || pressed || c.isOver(stallSome) || c.isOver(stallFull) || time.Now().Before(sign)), r)
		psi = psi && (!first || f.Pressure.Memory != nil || slices.Contains(f.Unknown, "pressure"))
		_, now := Judge(Guest{System: System{State: "running"}, Figures: f}, r)
		if first || !slices.Equal(last, now) || c.Shown != nil && !slices.Equal(shown, watchedReasons(now)) {
			select {
			case changed <- struct{}{}:
			default:
			}
		}
		last = now
		pressed = memoryVerdict(f.Pressure.Memory, r) != Healthy || slices.Contains(f.Unknown, "pressure")
		select {
		case <-ctx.Done():
			return ctx.Err()
		case i := <-fired:
			switch {
			case i == stallSign:
				sign = time.Now().Add(signHold)
			case i == stallSome && r.MemoryDegraded > 100, i == stallFull && r.MemoryFailing > 100:
				// What is never reached is not reached by all of the time.
			default:
				c.setOver(i)
			}
		case <-lost:
			tells, lost = false, nil
		case <-ticker.C:
		}
	}
}

// shown is what Shown says of what Watch looks at.
func (c *Collector) shown() []Reason {
	if c.Shown == nil {
		return nil
	}
	return watchedReasons(c.Shown())
}

// watchedReasons are the reasons that Watch alone tells of, without what two that
// say the same may differ in.
func watchedReasons(reasons []Reason) []Reason {
	var list []Reason
	for _, r := range reasons {
		if r.Code == DiskFull || r.Code == DiskLow || r.Code == MemoryPressure {
			list = append(list, Reason{Code: r.Code, Verdict: r.Verdict, Detail: r.Detail})
		}
	}
	return list
}

// look reads what a watch compares, with the pressure if it is asked for.
func (c *Collector) look(pressure bool, r Rules) Figures {
	parts := c.disks()
	if pressure {
		parts = append(parts, c.pressure())
	}
	f := c.run(parts)
	c.settle(f, false)
	// Mountinfo is long, and says something new only of what would be full.
	if slices.ContainsFunc(f.Disks, func(d Disk) bool {
		d.ReadOnly = false
		return diskVerdict(d, r) != Healthy
	}) {
		f.mountinfo, f.Disks = c.run([]part{c.mounts()}).mountinfo, nil
		c.settle(f, true)
	}
	return f.Figures
}

func (c *Collector) openTrigger(stalls []stall) (trigger, error) {
	file := filepath.Join(c.root(), "proc/pressure/memory")
	if c.triggers != nil {
		return c.triggers(file, stalls)
	}
	return openTrigger(file, stalls)
}

// setOver notes that the kernel told of a stall.
func (c *Collector) setOver(i int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over[i] = time.Now().Add(stallHold)
}

func (c *Collector) isOver(i int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Before(c.over[i])
}

func (c *Collector) clearOver() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.over[:])
}
