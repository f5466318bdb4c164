package main

import (
	"context"
	"sync"
	"time"

	"github.com/guestagent/guestagent/internal/host"
)

// A board has what is known of guests that are watched. Of what changed in
// between, who looks at it sees the last.
type board struct {
	guests []host.Guest
	wake   chan struct{} // there is something to look at

	mu     sync.Mutex
	states []*host.State // of each guest; nil until the first attempt to reach it
	fresh  map[int]bool  // who was told of since the last look
}

func newBoard(guests []host.Guest) *board {
	return &board{guests: guests, wake: make(chan struct{}, 1), states: make([]*host.State, len(guests)), fresh: map[int]bool{}}
}

// watch watches the guests until ctx ends.
func (b *board) watch(ctx context.Context) {
	var wg sync.WaitGroup
	for i, g := range b.guests {
		wg.Go(func() {
			w := host.Watcher{Guest: g}
			_ = w.Run(ctx, func(s host.State) { b.put(i, s) })
		})
	}
	wg.Wait()
}

// put notes what is known of a guest.
func (b *board) put(i int, s host.State) {
	b.mu.Lock()
	b.states[i], b.fresh[i] = &s, true
	b.mu.Unlock()
	b.poke()
}

// poke has the board looked at.
func (b *board) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// look returns what is known of every guest, and whom something new is known of.
func (b *board) look() (states []*host.State, fresh map[int]bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	states, fresh = append(states, b.states...), b.fresh
	b.fresh = map[int]bool{}
	return states, fresh
}

// each calls show whenever there is something to look at, and not before pause
// has passed since the last time. It ends with ctx, which is no error, or with
// show's error.
func (b *board) each(ctx context.Context, pause time.Duration, show func(states []*host.State, fresh map[int]bool) error) error {
	for {
		select {
		case <-b.wake:
		case <-ctx.Done():
			return nil
		}
		if err := show(b.look()); err != nil {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}
