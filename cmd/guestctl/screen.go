package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// enterScreen switches to the alternate screen, without a cursor, and cuts
	// lines that are too long. leaveScreen takes it all back.
	enterScreen = "\x1b[?1049h\x1b[?25l\x1b[?7l"
	leaveScreen = "\x1b[?7h\x1b[?25h\x1b[?1049l"
	// showAgain is how often the screen is drawn where nothing changes: times go on.
	showAgain = 30 * time.Second
)

// A screen shows a table of guests on the whole of a terminal.
type screen struct {
	w io.Writer
	// size is the terminal's, in characters.
	size func() (width, height int)
	// resized tells of another size. Whoever got leave and enter has them called
	// when the program is stopped and goes on (SIGTSTP).
	resized func(ctx context.Context, leave, enter func()) <-chan struct{}
}

// run shows the board until ctx ends.
func (t *screen) run(ctx context.Context, b *board) (err error) {
	write := func(s string) error {
		if _, err := io.WriteString(t.w, s); err != nil {
			return fmt.Errorf("writing to the terminal: %w", err)
		}
		return nil
	}
	if err := write(enterScreen); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, write(leaveScreen)) }()
	resized := t.resized(ctx, func() { _ = write(leaveScreen) }, func() { _ = write(enterScreen) })
	tick := time.NewTicker(showAgain)
	defer tick.Stop()
	drawing := make(chan struct{})
	done := make(chan struct{})
	defer func() {
		close(drawing)
		<-done
	}()
	go func() {
		defer close(done)
		for {
			select {
			case <-resized:
			case <-tick.C:
			case <-drawing:
				return
			}
			b.poke()
		}
	}()
	b.poke() // an empty table until the first guest is heard
	return b.each(ctx, showPause, func(states []*host.State, _ map[int]bool) error {
		width, height := t.size()
		return write(draw(b.guests, states, width, height, time.Now()))
	})
}

// weights order the verdicts, the worst first.
var weights = map[string]int{
	host.VerdictUnreachable: 1, vsockrpc.VerdictFailing: 2, vsockrpc.VerdictStarting: 3, vsockrpc.VerdictDegraded: 4,
	host.VerdictUnknown: 5, vsockrpc.VerdictHealthy: 6, notAsked: 7,
}

// notAsked is the verdict of a guest that nothing is known of yet.
const notAsked = "-"

// draw is the whole screen. A state is nil where nothing is known yet.
func draw(guests []host.Guest, states []*host.State, width, height int, now time.Time) string {
	type weighed struct {
		weight int
		cells  []string
	}
	rows := make([]weighed, len(guests))
	counts := map[string]int{}
	for i, g := range guests {
		cells := []string{show(g.Name), notAsked, "-", "-", "-", "-"}
		if s := states[i]; s != nil {
			cells = row(viewOf(s), now)
		}
		rows[i] = weighed{weights[cells[1]], cells}
		counts[cells[1]]++
	}
	slices.SortStableFunc(rows, func(a, b weighed) int { return cmp.Or(a.weight-b.weight, strings.Compare(a.cells[0], b.cells[0])) })
	var title strings.Builder
	fmt.Fprintf(&title, "%s  %d guests", now.Local().Format(time.TimeOnly), len(guests))
	verdicts := make([]string, 0, len(counts))
	for v := range counts {
		verdicts = append(verdicts, v)
	}
	slices.SortFunc(verdicts, func(a, b string) int { return weights[a] - weights[b] })
	for _, v := range verdicts {
		word := v
		if v == notAsked {
			word = "not heard yet"
		}
		fmt.Fprintf(&title, ", %d %s", counts[v], word)
	}
	// A title, an empty line and the head; the last line says what is left out.
	room := max(0, height-3)
	left := 0
	if len(rows) > room {
		left = len(rows) - max(0, room-1)
		rows = rows[:len(rows)-left]
	}
	table := [][]string{statusHead}
	for _, r := range rows {
		table = append(table, r.cells)
	}
	lines := append([]string{title.String(), ""}, columns(table)...)
	if left > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", left))
	}
	var b strings.Builder
	b.WriteString("\x1b[H")
	for i, line := range lines[:min(len(lines), max(1, height))] {
		if i > 0 {
			b.WriteString("\r\n")
		}
		b.WriteString(cut(line, width) + "\x1b[K")
	}
	b.WriteString("\x1b[J")
	return b.String()
}

// maxColumn is the widest that a column gets which is not the last, in
// characters.
const maxColumn = 40

// columns makes lines of rows, with the cells below each other.
func columns(rows [][]string) []string {
	widths := make([]int, len(rows[0]))
	for i := range rows {
		rows[i] = slices.Clone(rows[i])
		for j := range rows[i] {
			if j < len(rows[i])-1 {
				rows[i][j] = cut(rows[i][j], maxColumn)
			}
			widths[j] = max(widths[j], utf8.RuneCountInString(rows[i][j]))
		}
	}
	lines := make([]string, len(rows))
	for i, row := range rows {
		var b strings.Builder
		for j, cell := range row {
			b.WriteString(cell)
			if j < len(row)-1 {
				b.WriteString(strings.Repeat(" ", widths[j]-utf8.RuneCountInString(cell)+2))
			}
		}
		lines[i] = b.String()
	}
	return lines
}

// cut cuts a line to a width in characters.
func cut(line string, width int) string {
	n := 0
	for i := range line {
		if n == width {
			return line[:i]
		}
		n++
	}
	return line
}
