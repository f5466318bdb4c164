package agent

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/health"
	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// A Report says what arrived in the guest and what was refused. It never
// holds a value. The JSON names are the ones of the wire.
type Report struct {
	Version string `json:"version"` // of the agent
	BootID  string `json:"bootId"`
	// ImportedAt is when SMBIOS was last imported; nil where it never was.
	ImportedAt *time.Time `json:"importedAt,omitempty"`
	DryRun     bool       `json:"dryRun,omitempty"`
	// Verdict is how the guest is, as the agent that serves has it; "" where it
	// was not asked.
	Verdict    string `json:"verdict,omitempty"`
	Generation uint64 `json:"generation"`
	SMBIOS     SMBIOS `json:"smbios"`
	// Entries are the store's credentials, and those that PID 1 took from
	// SMBIOS, sorted by name.
	Entries  []Entry              `json:"entries"`
	Refusals []credential.Refusal `json:"refusals"`
	// Reasons are what else somebody should know, the weightiest first.
	Reasons []Reason `json:"reasons"`
	// Provider is nil in the report of an import.
	Provider *vsockrpc.ProviderState `json:"provider,omitempty"`
}

// SMBIOS says what was read.
type SMBIOS struct {
	Origin     string `json:"origin,omitempty"`  // the file below /sys/firmware/dmi; "" where nothing was read
	Version    string `json:"version,omitempty"` // of SMBIOS
	Structures int    `json:"structures,omitempty"`
	Strings    int    `json:"strings,omitempty"` // of all owners
	// Provider is where the host's provider is, as an OEM string says, or "?" if
	// that is no address.
	Provider string `json:"provider,omitempty"`
}

// An Entry is a credential that is somewhere in the guest.
type Entry struct {
	Name        string            `json:"name"`
	Revision    string            `json:"revision"`
	Size        int64             `json:"size"` // bytes; of the OEM string's value, where PID 1 has other bytes
	Source      credential.Source `json:"source"`
	InstalledAt *time.Time        `json:"installedAt,omitempty"` // nil for PID 1's
	State       credstore.State   `json:"state"`
	Path        string            `json:"path"` // where systemd finds it
	// Ephemeral is a value over the provider's, until that applies its set again.
	Ephemeral bool `json:"ephemeral,omitempty"`
}

// StateMismatch is the state of a credential that PID 1 took, but not as the
// OEM string has it.
const StateMismatch credstore.State = "mismatch"

// A Reason is something about the guest that is not as it should be.
type Reason struct {
	Code   health.Code `json:"code"`
	Detail string      `json:"detail"`
	Hint   string      `json:"hint,omitempty"` // the next command to type
	// Verdict is what this reason makes of the guest; "" where nobody judged it.
	Verdict string `json:"verdict,omitempty"`
	// Unit and Credential are what it is about, where it is about one.
	Unit       string `json:"unit,omitempty"`
	Credential string `json:"credential,omitempty"`
}

// maxDetail bounds the detail of a reason, in bytes: it may quote what others
// wrote, and the wire bounds its lines.
const maxDetail = 1024

func (r *Report) reason(code health.Code, hint, format string, a ...any) {
	r.Reasons = append(r.Reasons, Reason{Code: code, Detail: vsockrpc.Escape(fmt.Sprintf(format, a...), maxDetail), Hint: hint})
}

// WriteText writes the report for people. With warn, the lines about what is
// wrong begin with that text, such as the journal's "<4>".
func (r *Report) WriteText(w io.Writer, warn string) error {
	var b strings.Builder
	if r.DryRun {
		b.WriteString("dry run: nothing was changed\n")
	}
	if len(r.Entries) > 0 {
		t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "NAME\tREVISION\tSIZE\tSOURCE\tSTATE\tPATH")
		for _, e := range r.Entries {
			revision := e.Revision
			if revision == "" {
				revision = "-"
			}
			source := string(e.Source)
			if e.Ephemeral {
				source += " (ephemeral)"
			}
			fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\t%s\n", e.Name, revision, e.Size, source, e.State, e.Path)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	for _, f := range r.Refusals {
		fmt.Fprintf(&b, "%srefused %s\n", warn, f)
	}
	for _, n := range r.Reasons {
		if n.Code == health.Refused {
			continue // told above
		}
		fmt.Fprintf(&b, "%s%s: %s", warn, n.Code, n.Detail)
		if n.Hint != "" {
			fmt.Fprintf(&b, " (next: %s)", n.Hint)
		}
		b.WriteByte('\n')
	}
	if p := r.Provider; p != nil && p.State != vsockrpc.ProviderNone {
		fmt.Fprintf(&b, "provider %s: %s since %s\n", cmp.Or(p.Address, "(calls by itself)"), p.State, p.Since)
	}
	if r.Verdict != "" {
		fmt.Fprintf(&b, "the guest is %s\n", r.Verdict)
	}
	good := 0
	for _, e := range r.Entries {
		if e.State == credstore.StateInForce {
			good++
		}
	}
	fmt.Fprintf(&b, "generation %d: %d credentials in force, %d refused\n", r.Generation, good, len(r.Refusals))
	_, err := io.WriteString(w, b.String())
	return err
}
