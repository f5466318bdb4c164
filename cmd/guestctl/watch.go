package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// showPause is the least time from one look at what changed to the next, so
	// that a guest that never stops changing can be read.
	showPause = 200 * time.Millisecond
	// maxChanges is how many reasons a line has; --json has them all.
	maxChanges = 8
)

func (p *program) watch() *cobra.Command {
	return &cobra.Command{
		Use:   "watch TARGETS",
		Short: "Tell how guests are, whenever that changes",
		Long: `watch tells how each guest is, and again whenever that changes, in one line: the
time, the guest, its verdict, and which reasons came (+), went (-) or are others now
(~), with the generation of its credentials. A guest that never stops changing has
five lines per second.

On a terminal several guests have a table instead, the worst first.

A guest that cannot be reached is called again and again. A VM's provider is asked
where there is one that answers, which needs no privilege; otherwise the guest is.
Which VMs there are is looked up once, at the start.

It ends by SIGINT or SIGTERM, with status 0.`,
		Example: `  guestctl watch web
  guestctl watch --all
  guestctl watch --all --json | jq 'select(.verdict == "failing")'`,
		ValidArgsFunction: p.completeTargets,
		RunE: func(cmd *cobra.Command, args []string) error {
			guests, err := p.everyGuest(cmd, args)
			if len(guests) == 0 {
				return err
			}
			if err != nil {
				fmt.Fprintln(p.stderr, "guestctl:", err)
			}
			var t *screen
			signals := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
			if len(guests) > 1 && !p.asJSON {
				if t = p.screen(); t != nil {
					// Whatever ends it, the screen is given back.
					signals = append(signals, syscall.SIGHUP, syscall.SIGQUIT)
				}
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), signals...)
			var wg sync.WaitGroup
			defer wg.Wait()
			defer stop()
			defer context.AfterFunc(ctx, stop)() // a second one ends what cannot be written
			b := newBoard(guests)
			wg.Go(func() { b.watch(ctx) })
			if t != nil {
				return t.run(ctx, b)
			}
			return b.each(ctx, showPause, p.lines(guests))
		},
	}
}

// everyGuest returns the guests of TARGETS. With --all, files that are not
// understood are an error, and the VMs that are sound come with it: who looks at
// all of them is not kept from the others by one.
func (p *program) everyGuest(cmd *cobra.Command, args []string) ([]host.Guest, error) {
	if err := p.checkTargets(cmd, args); err != nil {
		return nil, err
	}
	if p.all {
		guests, err := p.registry().List()
		if len(guests) == 0 && err == nil {
			err = fmt.Errorf("%w: there is none in %s", host.ErrUnknownVM, strings.Join(p.registry().Dirs, ", "))
		}
		return guests, err
	}
	f, err := p.fleet(cmd, args)
	if err != nil {
		return nil, err
	}
	return f.Guests, nil
}

// lines shows what changed, a line per guest.
func (p *program) lines(guests []host.Guest) func([]*host.State, map[int]bool) error {
	last := make([]*host.State, len(guests))
	width := 0
	if p.terminal {
		for _, g := range guests {
			width = max(width, min(utf8.RuneCountInString(show(g.Name)), maxColumn))
		}
	}
	return func(states []*host.State, fresh map[int]bool) error {
		now := time.Now()
		for i := range guests {
			if !fresh[i] {
				continue
			}
			c, worth := compare(last[i], states[i], now)
			if last[i] = states[i]; !worth {
				continue
			}
			if p.asJSON {
				p.wrote(writeJSON(p.stdout, c))
			} else {
				_, err := fmt.Fprintln(p.stdout, c.line(now, width))
				p.wrote(err)
			}
		}
		return p.writeErr
	}
}

// A seen is how a guest is, in JSON. It has a guest's words as they came.
type seen struct {
	// Time is when that was known, of RFC 3339.
	Time   string `json:"time"`
	Guest  string `json:"guest"`
	Target string `json:"target"`
	// Verdict is the report's, unreachable or unknown.
	Verdict   string `json:"verdict"`
	Reachable bool   `json:"reachable"`
	// Reasons are all there are.
	Reasons    []vsockrpc.Reason `json:"reasons"`
	Generation *int64            `json:"generation,omitzero"`
	BootID     string            `json:"bootId,omitzero"`
	// LastContact is a time of RFC 3339, empty if there was none.
	LastContact string `json:"lastContact,omitzero"`
	// ClockOffset is by how many milliseconds the guest's clock is ahead.
	ClockOffset *int64 `json:"clockOffset,omitzero"`
	// Provider is what the guest's provider says of the set, if it was asked.
	Provider string        `json:"provider,omitzero"`
	Error    *host.Failure `json:"error,omitzero"`
}

func newSeen(s *host.State, now time.Time) seen {
	out := seen{
		Time: now.UTC().Format(time.RFC3339), Guest: s.Guest, Target: s.Target,
		Verdict: s.Verdict(), Reachable: s.Reachable, Reasons: append([]vsockrpc.Reason{}, s.Reasons()...), Error: s.Problem,
	}
	if s.Report != nil {
		out.Generation, out.BootID = &s.Report.Generation, s.Report.BootID
	}
	if !s.LastContact.IsZero() {
		out.LastContact = s.LastContact.UTC().Format(time.RFC3339)
	}
	if s.ClockOffset != nil {
		ms := s.ClockOffset.Milliseconds()
		out.ClockOffset = &ms
	}
	if s.Provider != nil {
		out.Provider = s.Provider.State
	}
	return out
}

// A change is how a guest is, and what that changes.
type change struct {
	seen
	// Came and Gone are reasons. One whose detail or verdict is another now is in
	// Changed.
	Came    []vsockrpc.Reason `json:"came,omitzero"`
	Gone    []vsockrpc.Reason `json:"gone,omitzero"`
	Changed []vsockrpc.Reason `json:"changed,omitzero"`
	// Booted says that the guest booted anew.
	Booted bool `json:"booted,omitzero"`

	was           string // the verdict before
	generationNew bool
}

// compare says what is new in s, and whether that is worth a line: figures that
// go up and down are not. Old is nil at the start.
func compare(old, s *host.State, now time.Time) (c change, worth bool) {
	c = change{seen: newSeen(s, now)}
	if old == nil {
		c.Came, c.generationNew = c.Reasons, s.Report != nil
		return c, true
	}
	before := newSeen(old, now)
	c.was = before.Verdict
	c.Came, c.Gone, c.Changed = compareReasons(before.Reasons, c.Reasons)
	c.Booted = before.BootID != "" && c.BootID != "" && before.BootID != c.BootID
	c.generationNew = c.Generation != nil && (before.Generation == nil || *before.Generation != *c.Generation || c.Booted)
	problem := c.Error != nil && (before.Error == nil || before.Error.Code != c.Error.Code)
	return c, before.Verdict != c.Verdict || before.Reachable != c.Reachable || before.Provider != c.Provider ||
		len(c.Came)+len(c.Gone)+len(c.Changed) > 0 || c.Booted || c.generationNew || problem
}

// compareReasons says which reasons came, went, or are others now: about the
// same unit and credential, with another detail or verdict.
func compareReasons(before, after []vsockrpc.Reason) (came, gone, changed []vsockrpc.Reason) {
	// When it began and the way out may become clearer, and are not worth a line.
	key := func(r vsockrpc.Reason) vsockrpc.Reason {
		r.Hint, r.Since = "", ""
		return r
	}
	there := func(list []vsockrpc.Reason) map[vsockrpc.Reason]bool {
		m := map[vsockrpc.Reason]bool{}
		for _, r := range list {
			m[key(r)] = true
		}
		return m
	}
	was, is := there(before), there(after)
	thing := func(r vsockrpc.Reason) vsockrpc.Reason {
		return vsockrpc.Reason{Code: r.Code, Unit: r.Unit, Credential: r.Credential}
	}
	went := map[vsockrpc.Reason]bool{}
	for _, r := range before {
		if !is[key(r)] {
			gone = append(gone, r)
			went[thing(r)] = true
		}
	}
	again := map[vsockrpc.Reason]bool{}
	for _, r := range after {
		switch {
		case was[key(r)]:
		case r.Unit+r.Credential != "" && went[thing(r)]:
			changed = append(changed, r)
			again[thing(r)] = true
		default:
			came = append(came, r)
		}
	}
	kept := gone[:0]
	for _, r := range gone {
		if !again[thing(r)] {
			kept = append(kept, r)
		}
	}
	return came, kept, changed
}

// line is the change for people, fit for a terminal. There guests have this width;
// 0 is for programs.
func (c *change) line(now time.Time, width int) string {
	var what []string
	switch {
	case c.Error != nil:
		what = append(what, vsockrpc.Escape(c.Error.Message, maxLine))
	case c.was == host.VerdictUnreachable:
		what = append(what, "it answers")
	}
	if c.Booted {
		what = append(what, "it booted")
	}
	more := 0
	for _, list := range []struct {
		mark    string
		reasons []vsockrpc.Reason
	}{{"+", c.Came}, {"~", c.Changed}, {"-", c.Gone}} {
		for _, r := range list.reasons {
			if len(what) > maxChanges {
				more++
				continue
			}
			what = append(what, list.mark+showReason(r))
		}
	}
	if more > 0 {
		what = append(what, fmt.Sprintf("and %d more", more))
	}
	if c.generationNew {
		what = append(what, fmt.Sprintf("generation %d", *c.Generation))
	}
	switch {
	case len(what) > 0:
	case c.was != c.Verdict:
		what = []string{"was " + c.was}
	default:
		what = []string{"its provider: " + show(c.Provider)}
	}
	text := strings.Join(what, "; ")
	if width == 0 {
		return strings.Join([]string{c.Time, show(c.Guest), c.Verdict, text}, "\t")
	}
	return fmt.Sprintf("%s  %-*s  %-11s  %s", now.Local().Format(time.TimeOnly), width, show(c.Guest), c.Verdict, text)
}
