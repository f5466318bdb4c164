package agent

import (
	"context"
	"log/slog"
	"os"
	"time"

	"github.com/guestagent/guestagent/credstore"
)

// dropPause is the least time between two attempts to drop old values.
const dropPause = time.Second

// watchStore looks after what another process, such as the import, changes in
// the store: units that wait may have what they wait for. It also drops values
// that are kept for rollback once they are old enough.
func (c credentials) watchStore() {
	changed := make(chan struct{}, 1)
	changed <- struct{}{} // look at what is there
	for _, dir := range c.a.store().Folders() {
		c.work.wg.Go(func() {
			if err := watchFolder(c.work.ctx, dir, changed); err != nil && c.work.ctx.Err() == nil {
				c.log.Error("watching the store failed; units that wait learn of what the host pushes only", slog.String("error", err.Error()))
			}
		})
	}
	c.work.wg.Go(func() {
		var release func()
		for {
			var timer <-chan time.Time
			if left, ok := c.previousLeft(); ok {
				timer = time.After(max(left, dropPause))
				if release == nil {
					release = c.work.busy.hold()
				}
			} else if release != nil {
				release()
				release = nil
			}
			select {
			case <-changed:
				c.changes.tell()
				if c.hand != nil {
					c.hand.server.Retry()
				}
			case <-timer:
				c.dropPrevious()
			case <-c.work.ctx.Done():
				if release != nil {
					release()
				}
				return
			}
		}
	})
}

// watchFolder makes the folder where it is missing, and says when a file in it
// got its name or lost it, until ctx ends.
func watchFolder(ctx context.Context, dir string, changed chan<- struct{}) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return inotify(ctx, dir, namesChange, changed)
}

// previousLeft is how long what is kept for rollback is kept still; false where
// nothing is, or for as long as there is no other set.
func (c credentials) previousLeft() (time.Duration, bool) {
	if c.cfg.Previous.TTL == 0 {
		return 0, false
	}
	tx, err := c.a.store().View()
	if err != nil {
		return 0, false
	}
	defer tx.Close()
	if !tx.HasPrevious() || tx.Trial() != nil {
		return 0, false
	}
	age := time.Duration(credstore.MonotonicUSec()-tx.ChangedUSec()) * time.Microsecond //nolint:gosec // since boot
	return max(0, c.cfg.Previous.TTL-age), true
}

func (c credentials) dropPrevious() {
	if left, ok := c.previousLeft(); !ok || left > 0 {
		return // another set came in between
	}
	tx, err := c.a.store().Begin()
	if err == nil {
		err = tx.DropPrevious()
		tx.Close()
	}
	if err != nil {
		c.log.Warn("dropping previous values failed", slog.String("error", err.Error()))
	}
}
