package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// maxShown bounds a word of a guest's, in bytes, and maxLine a line.
	maxShown = 255
	maxLine  = 600
	// maxNames is how many names a line has, and maxRefusals how many refusals
	// are shown; --json has them all.
	maxNames    = 64
	maxRefusals = 64
	// maxUnits is how many units that were not refreshed are shown.
	maxUnits = 32
	// maxStep bounds what the line of progress says of a guest, in bytes.
	maxStep = 60
)

// A writer writes a result that is no failure, as rows of cells.
type writer struct {
	head []string // of a terminal's table; nil if it is no table
	rows func(r host.Result, terminal bool) [][]string
	// below is a second table of the last result, with its own head.
	below func(r host.Result) [][]string
	foot  func(r host.Result) string // below it all, of the last result
	// failures says that there are rows of failures, and what is below, too.
	failures bool
}

// results shows the results of guests as they come.
type results struct {
	p        *program
	writer   writer
	several  bool
	table    *tabwriter.Writer
	notTried []string
	only     host.Result // the last one
	progress bool        // a line on stderr says who is waited for

	guests []host.Guest                 // who is waited for
	steps  map[string]vsockrpc.Progress // how they get on, by name
}

// maxWaiting is how many of the guests that are waited for are named.
const maxWaiting = 3

// waiting says on a terminal which guests are waited for, in a line that the
// next output takes the place of.
func (o *results) waiting(guests []host.Guest) {
	if o.guests = guests; len(guests) == 0 {
		return
	}
	var list []string
	for _, g := range guests[:min(maxWaiting, len(guests))] {
		s := show(g.Name)
		if step, ok := o.steps[g.Name]; ok {
			s += " (" + showProgress(step) + ")"
		}
		list = append(list, s)
	}
	more := ""
	if n := len(guests) - len(list); n > 0 {
		more = fmt.Sprintf(" and %d more", n)
	}
	fmt.Fprintf(o.p.stderr, "%swaiting for %s%s", clearLine, strings.Join(list, ", "), more)
	o.progress = true
}

// step says how a guest gets on, in the same line.
func (o *results) step(g host.Guest, p vsockrpc.Progress) {
	if p.Unit != nil && len(p.WaitingFor) == 0 {
		p.WaitingFor = slices.DeleteFunc(slices.Clone(o.steps[g.Name].WaitingFor), func(unit string) bool { return unit == p.Unit.Unit })
	}
	o.steps[g.Name] = p
	o.waiting(o.guests)
}

// showProgress is one step, fit for a terminal.
func showProgress(p vsockrpc.Progress) string {
	s := p.Phase
	if p.Phase == vsockrpc.PhaseRollingBack {
		s = "rolling back"
	}
	if len(p.WaitingFor) > 0 {
		s += ": " + p.WaitingFor[0]
		if n := len(p.WaitingFor) - 1; n > 0 {
			s += fmt.Sprintf(" and %d more", n)
		}
	}
	return vsockrpc.Escape(s, maxStep)
}

// clearLine goes to the line's begin and makes it empty.
const clearLine = "\r\x1b[K"

func (p *program) results(f *host.Fleet, w writer) *results {
	r := &results{p: p, writer: w, several: len(f.Guests) > 1, steps: map[string]vsockrpc.Progress{}}
	if p.errTerminal {
		f.Waiting, f.Progress = r.waiting, r.step
	}
	if p.terminal && w.head != nil && !p.asJSON {
		r.table = tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
		_, _ = fmt.Fprintln(r.table, strings.Join(w.head, "\t"))
	}
	return r
}

// emit shows one result.
func (o *results) emit(r host.Result) {
	o.only = r
	if o.progress {
		fmt.Fprint(o.p.stderr, clearLine)
		o.progress = false
	}
	if o.p.asJSON {
		o.p.wrote(writeJSON(o.p.stdout, r))
	}
	refreshFailed := r.Error != nil && r.Error.Code == host.CodeRefreshFailed
	if r.Error != nil && r.Reachable == nil && !refreshFailed && !o.writer.failures {
		o.failed(r)
		return
	}
	if o.p.asJSON {
		if refreshFailed {
			o.failed(r)
		}
		return
	}
	w := o.p.stdout
	if o.table != nil {
		w = o.table
	}
	for _, row := range o.writer.rows(r, o.p.terminal) {
		_, err := fmt.Fprintln(w, strings.Join(row, "\t"))
		o.p.wrote(err)
	}
	for i, refusal := range r.Refusals {
		if i == maxRefusals {
			fmt.Fprintf(o.p.stderr, "guestctl: %s: %d more were refused\n", name(r), len(r.Refusals)-i)
			break
		}
		fmt.Fprintf(o.p.stderr, "guestctl: %s: the last import refused %s\n", name(r), vsockrpc.Escape(refusal.String(), maxLine))
	}
	o.remarks(r)
	if refreshFailed {
		o.failed(r)
	} else {
		o.units(r, func(u vsockrpc.Refreshed) bool { return u.Result != vsockrpc.ResultDone })
	}
}

// remarks shows what a list has beside credentials and refusals.
func (o *results) remarks(r host.Result) {
	remark := func(format string, args ...any) {
		fmt.Fprintf(o.p.stderr, "guestctl: %s: %s\n", name(r), vsockrpc.Escape(fmt.Sprintf(format, args...), maxLine))
	}
	for i, w := range r.Waiting {
		if i == maxUnits {
			remark("%d more units wait for a credential", len(r.Waiting)-i)
			break
		}
		remark("%s waits for %s, since %s", w.Unit, w.Name, w.Since)
	}
	for i, j := range r.Rejected {
		if i == maxUnits {
			remark("%d more sets were rolled back", len(r.Rejected)-i)
			break
		}
		remark("generation %d (%s) was rolled back at %s: %s; change the value, or `guestctl retry` tries the same once more",
			j.Generation, names(j.Names), j.At, j.Problem)
	}
	if r.Gate != nil {
		remark("generation %d is on trial", *r.Gate)
	}
	if r.ConsumersProblem != "" {
		remark("which units load them is not known: %s", r.ConsumersProblem)
	}
}

// units shows the units of a result that are worth it.
func (o *results) units(r host.Result, worth func(vsockrpc.Refreshed) bool) {
	shown, more := 0, 0
	for _, u := range r.Units {
		if !worth(u) {
			continue
		}
		if shown++; shown > maxUnits {
			more++
			continue
		}
		what := u.Action + " " + u.Result
		if u.Action == vsockrpc.ActionNone {
			what = u.Result
		}
		words := []string{u.Unit + ": " + what}
		for _, s := range []string{u.State, u.Detail} {
			if s != "" {
				words = append(words, s)
			}
		}
		fmt.Fprintf(o.p.stderr, "guestctl: %s: %s\n", name(r), vsockrpc.Escape(strings.Join(words, "; "), maxLine))
	}
	if more > 0 {
		fmt.Fprintf(o.p.stderr, "guestctl: %s: and %d more units; --json has them all\n", name(r), more)
	}
}

// failed shows what went wrong with one of several guests. With one guest, that
// is the error that the program ends with.
func (o *results) failed(r host.Result) {
	if r.Error.Code == host.CodeNotTried {
		o.notTried = append(o.notTried, name(r))
		return
	}
	if len(r.Error.Refusals) > 1 {
		for _, refusal := range r.Error.Refusals[:min(maxRefusals, len(r.Error.Refusals))] {
			fmt.Fprintf(o.p.stderr, "guestctl: %s: refused: %s\n", name(r), vsockrpc.Escape(refusal.String(), maxLine))
		}
	}
	switch r.Error.Code {
	case host.CodeRefreshFailed:
		o.units(r, func(u vsockrpc.Refreshed) bool { return u.Result != vsockrpc.ResultDone })
	case host.CodeRolledBack:
		// A unit whose job was done may have failed after that: its state tells.
		o.units(r, func(vsockrpc.Refreshed) bool { return true })
	}
	if o.several {
		fmt.Fprintf(o.p.stderr, "guestctl: %s: %s\n", failedName(r), r.Error.Message)
	}
}

// end shows what is left, and returns the error that the program ends with.
func (o *results) end(err error) error {
	if o.table != nil {
		o.p.wrote(o.table.Flush())
		if o.writer.below != nil && (err == nil || o.writer.failures) {
			if rows := o.writer.below(o.only); len(rows) > 1 {
				_, _ = fmt.Fprintln(o.table)
				for _, row := range rows {
					_, _ = fmt.Fprintln(o.table, strings.Join(row, "\t"))
				}
				_, _ = fmt.Fprintln(o.table)
				o.p.wrote(o.table.Flush())
			}
		}
		if o.writer.foot != nil && err == nil {
			_, err := fmt.Fprintln(o.p.stdout, o.writer.foot(o.only))
			o.p.wrote(err)
		}
	}
	if len(o.notTried) > 0 {
		fmt.Fprintf(o.p.stderr, "guestctl: not tried: %s\n", names(o.notTried))
	}
	if err != nil && !o.several {
		return fmt.Errorf("%s: %w", failedName(o.only), err)
	}
	return err
}

// wrote notes the first error of writing to stdout. The guests are done with
// all the same: to stop halfway since nobody reads would be worse.
func (p *program) wrote(err error) {
	if err != nil && p.writeErr == nil {
		p.writeErr = fmt.Errorf("writing the results: %w", err)
	}
}

func name(r host.Result) string { return vsockrpc.Escape(r.Guest, maxLine) }

// failedName is the name, and how the guest was looked for.
func failedName(r host.Result) string {
	if r.Guest == r.Target {
		return name(r)
	}
	return fmt.Sprintf("%s (%s)", name(r), vsockrpc.Escape(r.Target, maxLine))
}

// show is a guest's word, fit for a terminal.
func show(s string) string {
	if s == "" {
		return "-"
	}
	return vsockrpc.Escape(s, maxShown)
}

// names is a list of names, fit for a terminal.
func names(list []string) string {
	more := ""
	if n := len(list) - maxNames; n > 0 {
		list, more = list[:maxNames], fmt.Sprintf(" and %d more", n)
	}
	shown := make([]string, len(list))
	for i, s := range list {
		shown[i] = show(s)
	}
	return strings.Join(shown, ", ") + more
}

func generation(r host.Result) string {
	if r.Generation == nil {
		return "-"
	}
	return strconv.FormatInt(*r.Generation, 10)
}

// writeChange writes what a call changed, one line per guest.
var writeChange = writer{rows: func(r host.Result, _ bool) [][]string {
	var parts []string
	for _, part := range []struct {
		word string
		list []string
	}{
		{"installed", r.Installed}, {"relabelled", r.Relabelled}, {"removed", r.Removed}, {"unchanged", r.Unchanged},
	} {
		if len(part.list) > 0 {
			parts = append(parts, part.word+" "+names(part.list))
		}
	}
	what := strings.Join(append(parts, refreshed(r)...), "; ")
	if what == "" {
		what = "nothing changed"
	}
	if r.DryRun {
		return [][]string{{fmt.Sprintf("%s: dry run, nothing changed; it would be: %s", name(r), what)}}
	}
	return [][]string{{fmt.Sprintf("%s: generation %s: %s", name(r), generation(r), what)}}
}}

// refreshed says which units were refreshed. Of those that were not, there is a
// line each.
func refreshed(r host.Result) []string {
	var parts []string
	for _, action := range []struct{ word, past string }{
		{vsockrpc.ActionReload, "reloaded"}, {vsockrpc.ActionRestart, "restarted"},
	} {
		var units []string
		for _, u := range r.Units {
			if u.Action == action.word && u.Result == vsockrpc.ResultDone {
				units = append(units, u.Unit)
			}
		}
		if len(units) > 0 {
			parts = append(parts, action.past+" "+names(units))
		}
	}
	return parts
}

// writeRefresh writes which units were refreshed, one line per guest.
var writeRefresh = writer{rows: func(r host.Result, _ bool) [][]string {
	what := strings.Join(refreshed(r), "; ")
	switch {
	case what != "":
	case len(r.Units) > 0:
		what = "no unit was refreshed"
	default:
		what = "there is no unit to refresh"
	}
	return [][]string{{fmt.Sprintf("%s: generation %s: %s", name(r), generation(r), what)}}
}}

// writeEntries writes the credentials of the only guest, and who loads them.
// Only a terminal gets the second table: a line of the first is what a script
// takes apart.
var writeEntries = writer{
	head: []string{"NAME", "REVISION", "SIZE", "SOURCE", "STATE", "INSTALLED", "USED BY"},
	rows: func(r host.Result, terminal bool) [][]string {
		var rows [][]string
		for _, e := range r.Entries {
			at, state := show(e.InstalledAt), show(e.State)
			if terminal {
				if t, err := time.Parse(time.RFC3339, e.InstalledAt); err == nil {
					at = t.Local().Format(time.DateTime)
				}
				if e.State != stateInForce {
					state += " (" + show(e.Path) + ")"
				}
			}
			source := show(string(e.Source))
			if e.Ephemeral {
				source += " (ephemeral)"
			}
			rows = append(rows, []string{show(e.Name), show(e.Revision), strconv.FormatInt(e.Size, 10), source, state, at, usedBy(r, e, terminal)})
		}
		return rows
	},
	below: func(r host.Result) [][]string {
		rows := [][]string{{"CREDENTIAL", "UNIT", "STATE", "LOADED", "VIA", "REFRESH"}}
		for _, e := range r.Entries {
			for _, c := range e.Consumers {
				loaded, via, refresh := c.Loaded, c.Way, c.Refresh
				if c.Revision != "" {
					loaded += " " + c.Revision
				}
				if c.Stale {
					loaded += stale
				}
				if c.As != e.Name {
					via += " as " + c.As
				}
				if c.Detail != "" {
					refresh += ": " + c.Detail
				}
				rows = append(rows, []string{show(e.Name), show(c.Unit), show(c.ActiveState), show(loaded), show(via), show(refresh)})
			}
		}
		return rows
	},
	foot: func(r host.Result) string {
		what := "credentials"
		if len(r.Entries) == 1 {
			what = "credential"
		}
		return fmt.Sprintf("%d %s, generation %s", len(r.Entries), what, generation(r))
	},
}

// stale marks a unit.
const stale = " (stale)"

// usedBy says which units load a credential: on a terminal how many, since they
// have a table of their own.
func usedBy(r host.Result, e vsockrpc.Entry, terminal bool) string {
	units := make([]string, len(e.Consumers))
	old := 0
	for i, c := range e.Consumers {
		if units[i] = c.Unit; c.Stale {
			units[i] += stale
			old++
		}
	}
	switch {
	case r.ConsumersProblem != "":
		return "?"
	case len(units) == 0:
		return "-"
	case !terminal:
		return names(units)
	case old > 0:
		return fmt.Sprintf("%d (%d stale)", len(units), old)
	}
	return strconv.Itoa(len(units))
}

const stateInForce = "inForce"

// writeSummary writes one of several guests in one line.
var writeSummary = writer{
	head: []string{"GUEST", "GENERATION", "CREDENTIALS"},
	rows: func(r host.Result, _ bool) [][]string {
		list := make([]string, len(r.Entries))
		for i, e := range r.Entries {
			if list[i] = e.Name; e.State != stateInForce {
				list[i] += " (" + e.State + ")"
			}
		}
		all := names(list)
		if all == "" {
			all = "-"
		}
		return [][]string{{name(r), generation(r), all}}
	},
}

// writeVM writes a VM and whether its agent answers.
var writeVM = writer{
	head: []string{"VM", "TARGET", "STATE", "AGENT"},
	rows: func(r host.Result, _ bool) [][]string {
		state := "reachable"
		if r.Error != nil {
			state = string(r.Error.Code)
		}
		agent := strings.TrimSpace(vsockrpc.Escape(r.Product, maxShown) + " " + vsockrpc.Escape(r.Version, maxShown))
		return [][]string{{name(r), show(r.Target), state, show(agent)}}
	},
}

// writeJSON writes a line of JSON. Every character that is not printable is
// escaped, and no less the same string: who reads it may be a terminal.
func writeJSON(w io.Writer, r any) error {
	b, err := json.Marshal(r)
	if err != nil {
		return errors.New("encoding a result")
	}
	var s strings.Builder
	for _, c := range string(b) {
		switch {
		case c > 0xFFFF && !unicode.IsPrint(c):
			c -= 0x10000
			fmt.Fprintf(&s, `\u%04x\u%04x`, 0xD800+(c>>10), 0xDC00+(c&0x3FF))
		case !unicode.IsPrint(c):
			fmt.Fprintf(&s, `\u%04x`, c)
		default:
			s.WriteRune(c)
		}
	}
	s.WriteByte('\n')
	_, err = io.WriteString(w, s.String())
	return err
}
