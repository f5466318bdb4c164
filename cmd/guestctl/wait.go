package main

import (
	"context"
	"fmt"
	"io"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/vsockrpc"
)

// The words that --for takes. A credential and a consumer have a name after them.
const (
	forReady      = "ready"
	forHealthy    = "healthy"
	forCredential = "credential="
	forConsumer   = "consumer="
)

// waitHeartbeat is the longest silence of whoever is asked: soon after a provider
// has heard of a guest that has nothing new to say, the provider says so.
const waitHeartbeat = 2 * time.Second

// A waitError is a wait that ended before what it was for came true.
type waitError struct {
	status int
	msg    string
}

func (e waitError) Error() string { return e.msg }

func (p *program) wait() *cobra.Command {
	var what string
	var limit time.Duration
	cmd := &cobra.Command{
		Use:   "wait TARGET --for ready|healthy|credential=NAME[@REVISION]|consumer=UNIT",
		Short: "Wait until a guest is ready",
		Long: `wait returns when what it is for is true of one guest; at once if it is. The guest
need not run yet: it is called again and again.

ready: it has booted, its provider's credentials are in force where it has a
provider, and it is healthy or degraded. healthy: nothing is wrong with it.
credential=NAME: the credential is in force, with @REVISION that revision of it. A
name that has an @ itself is written with another one behind it. consumer=UNIT: the
unit loads at least one credential, is active, and is stale in none.

A VM's provider is asked where there is one that answers, which needs no privilege;
otherwise the guest is. What a provider heard before the wait began does not count.

Exit status: 0 it is true, 3 the time is over, 4 the time is over and the guest
was never reached. What is missing is said then.`,
		Example: `  guestctl wait web --for ready --timeout 2m
  guestctl wait web --for credential=db-password@r2
  guestctl wait vsock:3 --for consumer=nginx.service`,
		ValidArgsFunction: p.completeTargets,
		RunE: func(cmd *cobra.Command, args []string) error {
			if p.all {
				return usage(cmd, "wait takes one target, and not --all")
			}
			if err := p.checkTargets(cmd, args); err != nil {
				return err
			}
			if limit < 0 {
				return usage(cmd, "--timeout is below 0")
			}
			missing, err := parseFor(cmd, what)
			if err != nil {
				return err
			}
			fleet, err := p.fleet(cmd, args)
			if err != nil {
				return err
			}
			if len(fleet.Guests) != 1 {
				return usage(cmd, "wait takes one target")
			}
			return p.waitFor(cmd.Context(), fleet.Guests[0], missing, limit)
		},
	}
	f := cmd.Flags()
	f.StringVar(&what, "for", "", "wait for `WHAT`: ready, healthy, credential=NAME[@REVISION] or consumer=UNIT")
	// It takes the place of the flag that all commands have.
	f.DurationVar(&limit, "timeout", 0, "give up after `TIME`, 0 for never")
	_ = cmd.RegisterFlagCompletionFunc("for", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return []string{forReady, forHealthy, forCredential, forConsumer}, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	})
	return cmd
}

// A condition says what is missing until something is true of a guest, in one
// line with the guest's words as they came; "" if it is true. The guest is
// reachable and has a report.
type condition func(s *host.State) string

// parseFor parses the value of --for.
func parseFor(cmd *cobra.Command, what string) (condition, error) {
	if what == forReady {
		return missingReady, nil
	}
	if what == forHealthy {
		return missingHealthy, nil
	}
	if name, ok := strings.CutPrefix(what, forCredential); ok {
		revision := "" // any
		if i := strings.LastIndexByte(name, '@'); i >= 0 {
			name, revision = name[:i], name[i+1:]
		}
		if err := host.CheckNames([]string{name}); err != nil {
			return nil, usage(cmd, "--for credential=NAME[@REVISION]: "+err.Error())
		}
		return func(s *host.State) string { return missingCredential(s, name, revision) }, nil
	}
	if unit, ok := strings.CutPrefix(what, forConsumer); ok && strings.Contains(unit, ".") {
		return func(s *host.State) string { return missingConsumer(s, unit) }, nil
	} else if ok {
		return nil, usage(cmd, "--for consumer=UNIT takes the whole name of a unit, such as nginx.service")
	}
	return nil, usage(cmd, "--for takes ready, healthy, credential=NAME[@REVISION] or consumer=UNIT")
}

// missingReady says why a guest is not ready.
func missingReady(s *host.State) string {
	if s.Ready() {
		return ""
	}
	switch s.Verdict() {
	case host.VerdictUnknown:
		return "its agent gives no verdict that this guestctl knows"
	case vsockrpc.VerdictHealthy, vsockrpc.VerdictDegraded:
	default:
		return missingHealthy(s)
	}
	if p := s.Report.Provider; p != nil && p.State != vsockrpc.ProviderNone && p.State != vsockrpc.ProviderInForce {
		if p.Problem != "" {
			return fmt.Sprintf("its provider has not handed over the credentials (%s): %s", p.State, p.Problem)
		}
		return fmt.Sprintf("its provider has not handed over the credentials (%s)", p.State)
	}
	if s.Report.Systemd == nil {
		return "its systemd is too busy to say how it is"
	}
	return "its systemd is " + s.Report.Systemd.State
}

// missingHealthy says why a guest is not healthy, by the first of its reasons.
func missingHealthy(s *host.State) string {
	if s.Healthy() {
		return ""
	}
	msg := "it is " + s.Verdict()
	if reasons := s.Reasons(); len(reasons) > 0 {
		msg += ": " + about(reasons[0])
		if reasons[0].Detail != "" {
			msg += ": " + reasons[0].Detail
		}
		if n := len(reasons) - 1; n > 0 {
			msg += fmt.Sprintf(", and %d more", n)
		}
	}
	return msg
}

// missingCredential says why a revision of a credential, "" for any, is not in
// force.
func missingCredential(s *host.State, name, revision string) string {
	i := slices.IndexFunc(s.Report.Entries, func(e vsockrpc.Entry) bool { return e.Name == name })
	if i < 0 {
		return name + " is not there" + trimmed(s)
	}
	e := s.Report.Entries[i]
	switch {
	case revision == "" || e.Revision == revision:
	case e.Revision == "":
		return fmt.Sprintf("%s has no revision, not %s", name, revision)
	default:
		return fmt.Sprintf("%s is revision %s, not %s", name, e.Revision, revision)
	}
	if e.State != stateInForce {
		return fmt.Sprintf("%s is %s (%s)", name, e.State, e.Path)
	}
	return ""
}

// missingConsumer says why a unit does not run with what is in force.
func missingConsumer(s *host.State, unit string) string {
	found := false
	for _, e := range s.Report.Entries {
		for _, c := range e.Consumers {
			if c.Unit != unit {
				continue
			}
			found = true
			switch {
			case c.ActiveState != "active":
				for _, w := range s.Report.Waiting {
					if w.Unit == unit {
						return fmt.Sprintf("%s is %s, and waits for %s", unit, c.ActiveState, w.Name)
					}
				}
				return fmt.Sprintf("%s is %s", unit, c.ActiveState)
			case c.Stale:
				return fmt.Sprintf("%s is stale in %s", unit, e.Name)
			}
		}
	}
	if found {
		return ""
	}
	for _, w := range s.Report.Waiting {
		if w.Unit == unit {
			return fmt.Sprintf("%s waits for %s", unit, w.Name)
		}
	}
	return unit + " loads no credential that is there" + trimmed(s)
}

// trimmed says that what is missing may be there all the same.
func trimmed(s *host.State) string {
	if !s.Trimmed {
		return ""
	}
	return ", or not in what the provider keeps of a large report: wait for the guest by vsock:CID or vsock-mux:PATH"
}

// missing is a condition's word on any state.
func (c condition) missing(s *host.State) string {
	switch {
	case s.Problem != nil:
		return s.Problem.Message
	case !s.Reachable || s.Report == nil:
		return "it has not said how it is"
	}
	return vsockrpc.Escape(c(s), maxLine)
}

// fresh reports whether the guest was heard after a time. What its provider knows
// of it may be of before it stopped, or of the boot before.
func fresh(s *host.State, since time.Time) bool {
	return s.Reachable && (s.Provider == nil || s.LastContact.After(since))
}

// A waited is how a guest was when a wait ended, in JSON.
type waited struct {
	seen
	// Done says that what was waited for is true. Missing is one line on why it
	// is not.
	Done    bool   `json:"done"`
	Missing string `json:"missing,omitzero"`
}

// waitFor waits until nothing is missing in the guest. Limit 0 is none.
func (p *program) waitFor(ctx context.Context, g host.Guest, c condition, limit time.Duration) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	over := context.WithoutCancel(ctx) // never
	if limit > 0 {
		var cancel context.CancelFunc
		over, cancel = context.WithTimeout(over, limit)
		defer cancel()
	}
	watch, done := context.WithCancel(ctx)
	defer done()
	defer context.AfterFunc(over, done)()
	label := vsockrpc.Escape(g.Name, maxLine)
	progress := progressLine{w: p.stderr, on: p.errTerminal}
	var last *host.State
	reached := false
	missing := "no answer yet"
	progress.say(fmt.Sprintf("waiting for %s: %s", label, missing))
	begun := time.Now()
	w := host.Watcher{Guest: g, Heartbeat: waitHeartbeat, MaxPause: host.WaitPause}
	_ = w.Run(watch, func(s host.State) {
		if watch.Err() != nil {
			return // that the watch ends is no news of the guest
		}
		last = &s
		reached = reached || fresh(&s, begun)
		if missing = c.missing(&s); missing == "" && !fresh(&s, begun) {
			missing = "its provider has not heard of it since this began"
		}
		if missing == "" {
			done()
			return
		}
		progress.say(fmt.Sprintf("waiting for %s: %s", label, missing))
	})
	progress.say("")
	if p.asJSON && last != nil {
		p.wrote(writeJSON(p.stdout, waited{newSeen(last, time.Now()), missing == "", missing}))
	}
	switch {
	case missing == "":
		return nil
	case over.Err() == nil:
		return fmt.Errorf("%s: interrupted: %s", label, missing)
	case reached:
		return waitError{host.StatusNotHealthy, fmt.Sprintf("%s: the time is over: %s", label, missing)}
	}
	return waitError{host.StatusUnreachable, fmt.Sprintf("%s: the time is over, and it was never reached: %s", label, missing)}
}

// A progressLine is a line on a terminal that the next one takes the place of.
type progressLine struct {
	w    io.Writer
	on   bool
	last string
}

// say shows the line, or, with "", none.
func (l *progressLine) say(line string) {
	if l.on && line != l.last {
		fmt.Fprint(l.w, clearLine, line)
		l.last = line
	}
}
