package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
)

// A writer writes a result that is no failure, as rows of cells.
type writer struct {
	head []string // of a terminal's table; nil if it is no table
	rows func(r host.Result, terminal bool) [][]string
	foot func(r host.Result) string // below it, of the last result
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
}

// maxWaiting is how many of the guests that are waited for are named.
const maxWaiting = 3

// waiting says on a terminal which guests are waited for, in a line that the
// next output takes the place of.
func (o *results) waiting(guests []host.Guest) {
	if len(guests) == 0 {
		return
	}
	var list []string
	for _, g := range guests[:min(maxWaiting, len(guests))] {
		list = append(list, show(g.Name))
	}
	more := ""
	if n := len(guests) - len(list); n > 0 {
		more = fmt.Sprintf(" and %d more", n)
	}
	fmt.Fprintf(o.p.stderr, "%swaiting for %s%s", clearLine, strings.Join(list, ", "), more)
	o.progress = true
}

// clearLine goes to the line's begin and makes it empty.
const clearLine = "\r\x1b[K"

func (p *program) results(f *host.Fleet, w writer) *results {
	r := &results{p: p, writer: w, several: len(f.Guests) > 1}
	if p.errTerminal {
		f.Waiting = r.waiting
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
	if r.Error != nil && r.Reachable == nil {
		o.failed(r)
		return
	}
	if o.p.asJSON {
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
	if o.several {
		fmt.Fprintf(o.p.stderr, "guestctl: %s: %s\n", failedName(r), r.Error.Message)
	}
}

// end shows what is left, and returns the error that the program ends with.
func (o *results) end(err error) error {
	if o.table != nil {
		o.p.wrote(o.table.Flush())
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
	what := strings.Join(parts, "; ")
	if what == "" {
		what = "nothing changed"
	}
	if r.DryRun {
		return [][]string{{fmt.Sprintf("%s: dry run, nothing changed; it would be: %s", name(r), what)}}
	}
	return [][]string{{fmt.Sprintf("%s: generation %s: %s", name(r), generation(r), what)}}
}}

// writeEntries writes the credentials of the only guest.
var writeEntries = writer{
	head: []string{"NAME", "REVISION", "SIZE", "SOURCE", "STATE", "INSTALLED"},
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
			rows = append(rows, []string{show(e.Name), show(e.Revision), strconv.FormatInt(e.Size, 10), show(string(e.Source)), state, at})
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
func writeJSON(w io.Writer, r host.Result) error {
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
