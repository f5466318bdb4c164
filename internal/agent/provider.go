package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/health"
	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/smbios"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// oemProvider begins the OEM string that names the provider.
	oemProvider = "io.guestagent.provider:"
	// cmdlineProvider is the word of the kernel's command line that does.
	cmdlineProvider = "guestagent.provider"
	// credProvider is the system credential that does.
	credProvider = "guestagent.provider"
	// maxAddress bounds an address, in bytes.
	maxAddress = 4096
)

// A pullNote is how asking the provider gets on, as the store keeps it for
// reports.
type pullNote struct {
	Address string `json:"address"`
	// State is one of vsockrpc's words for a provider.
	State string    `json:"state"`
	Since time.Time `json:"since"`
	// Problem is one line on the last attempt.
	Problem string `json:"problem"`
}

// A providerNote is what the provider did in this boot, as the store keeps it.
type providerNote struct {
	// Since is when its set was applied first.
	Since time.Time `json:"since"`
	// Refusals are those of its last set.
	Refusals []credential.Refusal `json:"refusals"`
}

// readNote reads a note; false where there is none, or none that makes sense:
// the next one takes its place.
func readNote[T any](tx *credstore.Tx, n credstore.Note) (v T, ok bool) {
	b, err := tx.Note(n)
	if err != nil || json.Unmarshal(b, &v) != nil {
		return *new(T), false
	}
	return v, true
}

// saveNote keeps a note, unless it is kept already.
func saveNote[T any](tx *credstore.Tx, n credstore.Note, v T) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if have, err := tx.Note(n); err == nil && bytes.Equal(have, b) {
		return nil
	}
	if err := tx.SetNote(n, b); err != nil {
		return fmt.Errorf("keeping the note %s: %w", n, err)
	}
	return nil
}

// provided notes what the provider's set brought.
func provided(tx *credstore.Tx, refusals []credential.Refusal) error {
	old, ok := readNote[providerNote](tx, credstore.NoteProvider)
	note := providerNote{Since: old.Since, Refusals: refusals}
	if !ok {
		note.Since = time.Now().UTC()
	}
	return saveNote(tx, credstore.NoteProvider, note)
}

// hasProvided reports whether the provider's set was applied in this boot.
func hasProvided(tx *credstore.Tx) bool {
	_, ok := readNote[providerNote](tx, credstore.NoteProvider)
	return ok || slices.ContainsFunc(tx.Entries(), func(e credstore.Entry) bool { return e.Source == credential.SourceProvider })
}

// addProvider adds to a report what is known of the provider.
func (r *Report) addProvider(tx *credstore.Tx) {
	pull, asked := readNote[pullNote](tx, credstore.NotePull)
	did, ok := readNote[providerNote](tx, credstore.NoteProvider)
	switch {
	case ok:
		r.Provider = &vsockrpc.ProviderState{Address: pull.Address, State: vsockrpc.ProviderInForce, Since: did.Since.Format(time.RFC3339Nano)}
		r.Refusals = append(r.Refusals, did.Refusals...)
	case asked:
		r.Provider = &vsockrpc.ProviderState{Address: pull.Address, State: pull.State, Since: pull.Since.Format(time.RFC3339Nano), Problem: pull.Problem}
	default:
		r.Provider = &vsockrpc.ProviderState{State: vsockrpc.ProviderNone}
	}
	if r.Provider.State == vsockrpc.ProviderUnreachable {
		r.reason(health.ProviderUnreachable, hintPull, "the provider has not handed over its set in this boot: %s", cmp.Or(pull.Problem, "no answer"))
	}
	var rejected []string
	for _, e := range tx.Entries() {
		if e.Rejected {
			rejected = append(rejected, e.Name)
		}
	}
	if len(rejected) > 0 {
		const most = 5
		list := strings.Join(rejected[:min(most, len(rejected))], ", ")
		if more := len(rejected) - most; more > 0 {
			list += fmt.Sprintf(", and %d more", more)
		}
		r.reason(health.RejectedInForce, "", "the guest booted on values that a gate had rolled back, since it has no others: %s; change them on the host", list)
	}
}

// providerAddress returns where the provider is, and who says so. A zero target
// is none. A name that makes no sense is an error, and what stands behind it in
// the order is not asked: a guest does not turn to somebody else because of a
// typing error. A place that cannot be read is passed over, and is an error
// where no other has a name.
func (a *Agent) providerAddress(ctx context.Context, cfg Config) (t vsockrpc.Target, from string, err error) {
	if cfg.Provider.Fault {
		return t, "", errors.New("provider in the configuration is at fault; guestagent check-config tells where")
	}
	places := []struct {
		from string
		get  func() (string, error)
	}{
		{"the configuration", func() (string, error) { return cfg.Provider.Address, nil }},
		{"the OEM string " + oemProvider, func() (string, error) { return a.oemAddress(ctx, cfg) }},
		{"the kernel's command line", a.cmdlineAddress},
		{"the system credential " + credProvider, a.credentialAddress},
	}
	var unread error
	for _, p := range places {
		s, err := p.get()
		if err != nil {
			unread = errors.Join(unread, fmt.Errorf("looking for the provider's address in %s: %w", p.from, err))
			continue
		}
		if s == "" {
			continue
		}
		// Not quoted: it may be a secret that went astray.
		if t, err = vsockrpc.ParseProviderAddress(s); err != nil {
			return t, p.from, fmt.Errorf("taking the provider's address from %s: %w", p.from, err)
		}
		return t, p.from, nil
	}
	return t, "", unread
}

// oemAddress looks into SMBIOS where the import would. The first string counts.
func (a *Agent) oemAddress(ctx context.Context, cfg Config) (string, error) {
	if cfg.SMBIOS.Read == ReadNever {
		return "", nil
	}
	// Whoever asks for long should not have had the table's secrets in memory.
	if address, ok := a.imported(); ok {
		return address, nil
	}
	switch cfg.SMBIOS.Read {
	case ReadAlways:
	default:
		kind, err := a.askKind(ctx)
		if err != nil || kind != "" {
			return "", err
		}
	}
	table, err := smbios.Read(a.path("sys"))
	if errors.Is(err, smbios.ErrNotFound) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer table.Wipe()
	return namedProvider(table), nil
}

// imported is the address that the last import found, if one has run.
func (a *Agent) imported() (address string, ok bool) {
	tx, err := a.store().View()
	if err != nil {
		return "", false
	}
	defer tx.Close()
	r, ok := readNote[Report](tx, credstore.NoteReport)
	return r.SMBIOS.Provider, ok && r.ImportedAt != nil
}

// namedProvider is the address in the first OEM string that has one.
func namedProvider(table smbios.Table) string {
	for _, s := range table.Strings {
		rest, ok := bytes.CutPrefix(s.Value.Bytes(), []byte(oemProvider))
		if !ok || s.Truncated {
			continue
		}
		address := string(rest)
		if _, err := vsockrpc.ParseProviderAddress(address); err != nil {
			return badAddress // not kept: it may be a secret that went astray
		}
		return address
	}
	return ""
}

// badAddress stands for an address that makes no sense.
const badAddress = "?"

// cmdlineAddress looks for guestagent.provider=. As for systemd the last one
// counts.
func (a *Agent) cmdlineAddress() (string, error) {
	b, err := os.ReadFile(a.path(pathCmdline))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	address := ""
	for _, word := range splitCmdline(string(b)) {
		if key, value, ok := strings.Cut(word, "="); ok && key == cmdlineProvider {
			address = value
		}
	}
	return address, nil
}

// credentialAddress looks at what PID 1 took.
func (a *Agent) credentialAddress() (string, error) {
	f, err := os.Open(filepath.Join(a.pid1Place("system").Dir, credProvider))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxAddress))
	return strings.TrimSpace(string(b)), err
}
