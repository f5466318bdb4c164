package health

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A fakeTrigger is the kernel's word in tests.
type fakeTrigger struct {
	fire chan int
	lost chan struct{}
}

func (f *fakeTrigger) wait(ctx context.Context, fired func(int)) {
	for {
		select {
		case i := <-f.fire:
			fired(i)
		case <-f.lost:
			return
		case <-ctx.Done():
			return
		}
	}
}

// A watching is a watch that runs in a test's bubble.
type watching struct {
	t       *testing.T
	g       *guest
	c       *Collector
	changed chan struct{}
	trigger *fakeTrigger
}

// watch starts a watch, with a trigger or without.
func watch(t *testing.T, tells bool, change func(g *guest)) *watching {
	return watchShown(t, tells, nil, change)
}

// watchShown is watch for a collector with Shown.
func watchShown(t *testing.T, tells bool, shown func() []Reason, change func(g *guest)) *watching {
	w := &watching{t: t, changed: make(chan struct{}, 1), trigger: &fakeTrigger{make(chan int), make(chan struct{})}}
	w.g, w.c = newGuest(t)
	w.c.Shown = shown
	if change != nil {
		change(w.g)
	}
	w.c.triggers = func(file string, stalls []stall) (trigger, error) {
		want := []stall{{"some", 2 * time.Second, 10 * time.Second}, {"full", 3 * time.Second, 10 * time.Second}, {"some", 400 * time.Millisecond, 2 * time.Second}}
		if file != "/proc/pressure/memory" || !slices.Equal(stalls, want) {
			t.Errorf("the triggers are %+v in %s", stalls, file)
		}
		if !tells {
			return nil, errors.New("not permitted")
		}
		return w.trigger, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- w.c.Watch(ctx, Rules{MemoryFailing: 30}, w.changed) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Watch() = %v", err)
		}
		if w.c.isOver(stallSome) || w.c.isOver(stallFull) {
			t.Error("a stall counts after the watch has ended")
		}
	})
	w.within(0, "the start")
	return w
}

// within fails unless the watch tells something in d.
func (w *watching) within(d time.Duration, what string) {
	w.t.Helper()
	synctest.Wait()
	for range d / (watchTick / 2) {
		if len(w.changed) > 0 {
			break
		}
		<-time.After(watchTick / 2)
		synctest.Wait()
	}
	select {
	case <-w.changed:
	default:
		w.t.Errorf("the watch does not tell of %s within %s", what, d)
	}
}

// silent fails if the watch tells something in d.
func (w *watching) silent(d time.Duration) {
	w.t.Helper()
	<-time.After(d)
	synctest.Wait()
	select {
	case <-w.changed:
		w.t.Errorf("the watch tells of something in %s in which nothing happens", d)
	default:
	}
}

func (w *watching) set(change func(g *guest)) {
	w.g.mu.Lock()
	defer w.g.mu.Unlock()
	change(w.g)
}

func (w *watching) judge(want Verdict) {
	w.t.Helper()
	if got, reasons := Judge(Guest{System: running, Figures: w.c.Collect()}, Rules{MemoryFailing: 30}); got != want {
		w.t.Errorf("Judge() = %s (%+v), want %s", got, reasons, want)
	}
}

// TestWatchShown has somebody else collect between two looks of the watch.
func TestWatchShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var shown []Reason
		collect := func(w *watching) {
			_, reasons := Judge(Guest{System: running, Figures: w.c.Collect(), Others: []Reason{{Code: NoSMBIOS}}}, Rules{MemoryFailing: 30})
			mu.Lock()
			defer mu.Unlock()
			shown = reasons
		}
		w := watchShown(t, true, func() []Reason {
			mu.Lock()
			defer mu.Unlock()
			return shown
		}, nil)
		use := func(used uint64) {
			w.set(func(g *guest) {
				s := g.systems["/var"]
				s.used, s.available = used, 1000-used
				g.systems["/var"] = s
			})
		}
		<-time.After(watchTick / 2)
		use(990)
		collect(w)
		use(10)
		w.within(watchTick, "what was shown and is no more")
		w.within(watchTick, "the same, again")
		collect(w)
		w.silent(time.Minute)
		use(990)
		w.within(watchTick, "a full disk")
		collect(w)
		w.silent(time.Minute)

		// What is shown of memory is looked at as well.
		mu.Lock()
		shown = append(shown, Reason{Code: MemoryPressure, Verdict: Failing, Detail: "as it was"})
		mu.Unlock()
		w.within(watchTick, "pressure that is shown and is no more")
	})
}

func TestWatchDisks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, true, nil)
		use := func(path string, used uint64) {
			w.set(func(g *guest) {
				s := g.systems[path]
				s.used, s.available = used, 1000-used
				g.systems[path] = s
			})
		}
		w.silent(10 * time.Minute)
		use("/var", 899)
		w.silent(time.Minute)
		use("/var", 900)
		w.within(watchTick, "a disk that is low")
		w.judge(Degraded)
		use("/var", 970)
		w.silent(time.Minute)
		use("/var", 980)
		w.within(watchTick, "a disk that is full")
		w.judge(Failing)
		w.silent(time.Minute)
		use("/var", 10)
		w.within(watchTick, "a disk with room")
		w.judge(Healthy)

		// A view that is read-only of a file system that is not.
		use("/", 990)
		w.within(watchTick, "a disk that is full behind a read-only mount")
		w.judge(Failing)
		use("/", 10)
		w.within(watchTick, "a disk with room behind a read-only mount")
		w.silent(time.Minute)

		hang := make(chan struct{})
		w.set(func(g *guest) { g.hang["/var"] = hang })
		w.within(watchTick+partTime, "a disk that hangs")
		w.judge(Degraded)
		n := w.g.count("/var")
		w.silent(10 * time.Minute)
		if m := w.g.count("/var"); m != n {
			t.Errorf("a disk that hangs was asked %d times more", m-n)
		}
		w.set(func(g *guest) { delete(g.hang, "/var") })
		close(hang)
		w.within(watchTick, "a disk that is back")
		w.judge(Healthy)
	})
}

// Of two paths on one file system the watch judges the first, as Collect does,
// though stat(2) has a device for each subvolume.
func TestWatchSubvolumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, c := newGuest(t)
		g.files["proc/self/mountinfo"] = "22 1 0:40 /@ / rw - btrfs /dev/vda rw\n130 22 0:40 /@var /var rw - btrfs /dev/vda rw\n"
		full := fileSystem{mount: 22, device: "0:77", total: 1000, used: 990, available: 10}
		g.systems["/"] = full
		full.mount, full.device = 130, "0:78"
		g.systems["/var"] = full
		delete(g.systems, "/nix/store")
		_, shown := Judge(Guest{System: running, Figures: c.Collect()}, Rules{})
		if len(shown) != 1 || shown[0].Code != DiskFull {
			t.Fatalf("the reasons are %+v", shown)
		}
		c.Shown = func() []Reason { return shown }
		c.triggers = func(string, []stall) (trigger, error) { return nil, errors.New("not permitted") }
		changed := make(chan struct{}, 1)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.Watch(ctx, Rules{}, changed) }()
		<-changed
		<-time.After(time.Minute)
		if len(changed) > 0 {
			t.Error("the watch tells of something that Collect has told")
		}
		cancel()
		<-done
	})
}

// A threshold that is never reached does not cost the others their triggers.
func TestWatchNever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, c := newGuest(t)
		tr := &fakeTrigger{make(chan int), make(chan struct{})}
		c.triggers = func(_ string, stalls []stall) (trigger, error) {
			for _, s := range stalls {
				if s.time > s.window {
					t.Errorf("the kernel refuses %+v", s)
				}
			}
			return tr, nil
		}
		changed := make(chan struct{}, 1)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.Watch(ctx, Rules{MemoryDegraded: 101, MemoryFailing: 101}, changed) }()
		<-changed
		for _, i := range []int{stallSome, stallFull, stallSign} {
			tr.fire <- i
		}
		<-time.After(watchTick)
		if c.isOver(stallSome) || c.isOver(stallFull) || len(changed) > 0 {
			t.Error("a stall counts that never does")
		}
		cancel()
		<-done
	})
}

// The kernel tells, and its average follows.
func TestWatchPressureTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, true, nil)
		const file = "proc/pressure/memory"
		n := w.g.count(file)
		w.silent(10 * time.Minute)
		if m := w.g.count(file); m != n {
			t.Errorf("without pressure it was looked at %d times", m-n)
		}

		w.judge(Healthy)
		w.trigger.fire <- stallSome
		w.within(0, "a stall of some")
		w.judge(Degraded)
		// It tells once more, of all now, before the average is up.
		w.trigger.fire <- stallFull
		w.within(0, "a stall of all")
		w.judge(Failing)
		w.set(func(g *guest) { g.files[file] = stalls("60.00", "50.00") })
		w.silent(time.Minute)
		w.judge(Failing)
		w.set(func(g *guest) { g.files[file] = stalls("60.00", "29.99") })
		w.within(watchTick, "a stall of all that goes")
		w.judge(Degraded)
		w.silent(time.Minute)
		w.set(func(g *guest) { g.files[file] = stalls("19.99", "0.00") })
		w.within(watchTick, "a stall that goes")
		w.judge(Healthy)
		n = w.g.count(file)
		w.silent(10 * time.Minute)
		if m := w.g.count(file); m > n+1 {
			t.Errorf("after the pressure it was looked at %d times", m-n)
		}

		// A stall that the average never shows counts for a while, and each anew.
		w.trigger.fire <- stallSome
		w.within(0, "a short stall")
		w.silent(stallHold - 2*watchTick)
		w.trigger.fire <- stallSome
		w.silent(stallHold - 2*watchTick)
		w.judge(Degraded)
		w.within(3*watchTick, "a short stall that is over")
		w.judge(Healthy)

		// The average rises by stalls that are each too short for the kernel.
		w.trigger.fire <- stallSign
		w.silent(watchTick)
		w.judge(Healthy)
		w.set(func(g *guest) { g.files[file] = stalls("20.00", "0.00") })
		w.within(watchTick, "an average that rises")
		w.judge(Degraded)
		w.silent(time.Minute)
		w.set(func(g *guest) { g.files[file] = stalls("0.00", "0.00") })
		w.within(watchTick, "an average that falls")
		w.trigger.fire <- stallSign
		w.silent(time.Minute)

		// The kernel has taken its word back.
		close(w.trigger.lost)
		w.silent(time.Minute)
		w.set(func(g *guest) { g.files[file] = stalls("20.00", "0.00") })
		w.within(watchTick, "a stall")
	})
}

// The kernel does not tell, and is asked.
func TestWatchPressureAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, false, nil)
		const file = "proc/pressure/memory"
		w.silent(time.Minute)
		w.set(func(g *guest) { g.files[file] = stalls("20.00", "0.00") })
		w.within(watchTick, "a stall")
		w.judge(Degraded)
		w.silent(time.Minute)
		w.set(func(g *guest) { g.files[file] = stalls("30.00", "30.00") })
		w.within(watchTick, "a stall of all")
		w.judge(Failing)
		w.set(func(g *guest) { g.files[file] = stalls("0.00", "0.00") })
		w.within(watchTick, "a stall that goes")
		w.judge(Healthy)
	})
}

func TestWatchWithoutPSI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const file = "proc/pressure/memory"
		w := watch(t, false, func(g *guest) { delete(g.files, file) })
		w.silent(10 * time.Minute)
		if n := w.g.count(file); n != 1 {
			t.Errorf("what is not there was looked for %d times", n)
		}
	})
}

// Who does not take what is told does not hold up the watch.
func TestWatchTellsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, c := newGuest(t)
		c.triggers = func(string, []stall) (trigger, error) { return nil, errors.New("not permitted") }
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := c.Watch(ctx, Rules{}, make(chan struct{})); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Watch() = %v", err)
		}
	})
}
