package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// statusTimeout bounds how long a guest may take, if --timeout is not given. One
	// that has no memory left takes its time.
	statusTimeout = 10 * time.Second
	// maxDetails is how many reasons, units or disks of a guest are shown.
	maxDetails = 32
)

func (p *program) status() *cobra.Command {
	return &cobra.Command{
		Use:   "status TARGETS",
		Short: "Tell how guests are",
		Long: `status tells how each guest is: its verdict, and the first of the reasons for it.
Of a single guest a terminal gets all of them, with what to type next, and the
guest's figures.

healthy: nothing is wrong. degraded: it works, and something is not as it should be.
starting: it boots, or waits for its credentials. failing: it cannot do its work, or
soon will not. unreachable: it does not answer. unknown: its agent gives no verdict.
What a code means is in docs/operations.md. Details and hints are the guest's words.

Where a guest does not let the caller ask, what its provider heard in the last minute
holds. Guests are asked at the same time, and all of them, whatever comes of one.

Exit status: 0 all are healthy, 3 one is not, 4 one is unreachable.`,
		Example:           "  guestctl status web\n  guestctl status --all\n  guestctl status 'web*' --json",
		ValidArgsFunction: p.completeTargets,
		RunE: func(cmd *cobra.Command, args []string) error {
			guests, err := p.everyGuest(cmd, args)
			if len(guests) == 0 {
				return err
			}
			fleet := host.Fleet{Guests: guests, KeepGoing: true, Timeout: p.timeout}
			if cmd.Flags().Changed("batch") {
				fleet.Batch = p.batch
			}
			if !cmd.Flags().Changed("timeout") {
				fleet.Timeout = statusTimeout
			}
			write := writeStatus
			if len(guests) == 1 {
				write.below = func(r host.Result) [][]string { return details(resultView(&r), time.Now()) }
			}
			return errors.Join(p.do(cmd, fleet, write, host.Fleet.Status), err)
		},
	}
}

var statusHead = []string{"GUEST", "VERDICT", "UPTIME", "GENERATION", "CONTACT", "REASONS"}

// writeStatus writes how a guest is, in one line.
var writeStatus = writer{
	head: statusHead,
	rows: func(r host.Result, terminal bool) [][]string {
		now := time.Now()
		if terminal {
			return [][]string{row(resultView(&r), now)}
		}
		return [][]string{plainRow(resultView(&r), now)}
	},
	failures: true,
}

// row is how a guest is, for people.
func row(v *view, now time.Time) []string {
	return []string{show(v.guest), v.verdict, showUptime(uptime(v, now)), showGeneration(v), showContact(v, now), showReasons(v)}
}

// plainRow is the same for programs: seconds, and a time of RFC 3339.
func plainRow(v *view, now time.Time) []string {
	up, contact := "-", "-"
	if n := uptime(v, now); n > 0 {
		up = strconv.FormatInt(n, 10)
	}
	if !v.contact.IsZero() {
		contact = v.contact.UTC().Format(time.RFC3339)
	}
	return []string{show(v.guest), v.verdict, up, showGeneration(v), contact, showReasons(v)}
}

// details are rows of a word and what there is to say to it; the word is empty
// where a row goes on. All of it is fit for a terminal.
func details(v *view, now time.Time) [][]string {
	var rows [][]string
	add := func(word string, lines ...string) {
		for _, line := range lines {
			rows = append(rows, []string{word, line})
			word = ""
		}
	}
	add("target", show(v.target))
	for i, r := range v.reasons {
		if i == maxDetails {
			add("", fmt.Sprintf("and %d more; --json has them all", len(v.reasons)-i))
			break
		}
		word, lines := reasonDetails(v.guest, r, now)
		add(word, lines...)
	}
	rep := v.report
	if rep == nil {
		return rows
	}
	if sd := rep.Systemd; sd != nil {
		add("systemd", systemdDetails(sd, now)...)
	}
	if m := rep.Memory; m != nil {
		add("memory", fmt.Sprintf("%s of %s available", showBytes(m.Available), showBytes(m.Total)))
	}
	if pr := rep.Pressure; pr != nil {
		var stalls []string
		for _, stall := range []string{showStall("cpu", pr.CPU), showStall("memory", pr.Memory), showStall("io", pr.IO)} {
			if stall != "" {
				stalls = append(stalls, stall)
			}
		}
		if len(stalls) > 0 {
			add("pressure", strings.Join(stalls, ", ")+" of the last 10 s")
		}
	}
	for i, d := range rep.Disks[:min(maxDetails, len(rep.Disks))] {
		word := "disks"
		if i > 0 {
			word = ""
		}
		add(word, show(d.Path)+": "+showDisk(d))
	}
	if l := rep.Load; l != nil {
		add("load", fmt.Sprintf("%s %s %s", showHundredths(l.Load1), showHundredths(l.Load5), showHundredths(l.Load15)))
	}
	if v.offset != nil {
		add("clock", showOffset(*v.offset))
	}
	add("provider", providerDetails(v, now)...)
	agent := "version " + show(rep.Version)
	if rep.Hostname != "" {
		agent += " on " + show(rep.Hostname)
	}
	add("agent", agent)
	if len(rep.Unknown) > 0 {
		add("unknown", names(rep.Unknown))
	}
	if v.trimmed {
		add("report", "too large for the provider to keep all of it")
	}
	return rows
}

// reasonDetails are the rows of a reason.
func reasonDetails(guest string, r vsockrpc.Reason, now time.Time) (word string, lines []string) {
	line := vsockrpc.Escape(about(r), maxLine)
	if r.Since != "" {
		line += ", since " + showSince(r.Since, now)
	}
	lines = append(lines, line)
	if r.Detail != "" {
		lines = append(lines, vsockrpc.Escape(r.Detail, maxLine))
	}
	if r.Hint != "" {
		lines = append(lines, showHint(r, guest))
	}
	switch r.Verdict {
	case vsockrpc.VerdictHealthy, "":
		return "remark", lines
	}
	return show(r.Verdict), lines
}

func systemdDetails(sd *vsockrpc.SystemdState, now time.Time) []string {
	lines := []string{fmt.Sprintf("%s %s, %d units failed, %d jobs", show(sd.Version), show(sd.State), len(sd.Failed), sd.Jobs)}
	for i, u := range sd.Failed {
		if i == maxDetails {
			return append(lines, fmt.Sprintf("and %d more", len(sd.Failed)-i))
		}
		line := fmt.Sprintf("%s: %s", show(u.Unit), show(u.Result))
		if u.Since != "" {
			line += ", since " + showSince(u.Since, now)
		}
		lines = append(lines, line)
	}
	return lines
}

// providerDetails are what the guest says of its provider, and the provider of
// the guest.
func providerDetails(v *view, now time.Time) []string {
	var lines []string
	if p := v.report.Provider; p != nil {
		line := show(p.State)
		if p.Address != "" {
			line += " at " + show(p.Address)
		}
		if p.Since != "" {
			line += ", since " + showSince(p.Since, now)
		}
		if p.Problem != "" {
			line += ": " + vsockrpc.Escape(p.Problem, maxLine)
		}
		lines = append(lines, line)
	}
	if p := v.provider; p != nil {
		line := "it says: " + show(p.State)
		if p.Problem != "" {
			line += ": " + vsockrpc.Escape(p.Problem, maxLine)
		}
		lines = append(lines, line)
	}
	return lines
}
