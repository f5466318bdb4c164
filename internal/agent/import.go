package agent

import (
	"bytes"
	"cmp"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/health"
	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/smbios"
)

// Import takes the credentials that the VM's SMBIOS brought into the store,
// and checks what PID 1 made of those that are its own. Good ones arrive
// whatever stands beside them; the report says what did not and why. With
// dryRun nothing is changed.
//
// An error means that the job could not be done: the table is there and cannot
// be read, or the store cannot be written. The report is good as far as it
// goes then, too.
func (a *Agent) Import(ctx context.Context, dryRun bool) (*Report, error) {
	now := time.Now().UTC()
	r := &Report{Version: a.Version, BootID: a.bootID(), ImportedAt: &now, DryRun: dryRun}
	cfg := a.config(r)

	creds, readErr := a.readSMBIOS(ctx, cfg, r)
	defer func() {
		for _, c := range creds {
			c.Value.Wipe()
		}
	}()

	open := a.store().Begin
	if dryRun {
		open = a.store().View
	}
	tx, err := open()
	if err != nil {
		return r, errors.Join(readErr, err)
	}
	defer tx.Close()
	set := a.judge(creds, r)
	accepted, refusals := tx.Check(set)
	r.Refusals = append(r.Refusals, refusals...)
	var applyErr error
	if !dryRun {
		if _, applyErr = tx.Apply(accepted); applyErr == nil {
			applyErr = saveImport(tx, r)
		}
	}
	a.complete(tx, r)
	if dryRun {
		r.foresee(a.path(pathStore), accepted)
	}
	return r, errors.Join(readErr, applyErr)
}

// Status tells how the guest's credentials are doing now, and what the last
// import said. It changes nothing.
func (a *Agent) Status() (*Report, error) {
	tx, err := a.store().View()
	if err != nil {
		return nil, err
	}
	defer tx.Close()
	r := &Report{}
	b, err := tx.Note(credstore.NoteReport)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		r.reason(health.NotImported, hintImport, "no import has run since the guest booted")
	case err != nil:
		return nil, err
	default:
		if err := json.Unmarshal(b, r); err != nil {
			return nil, fmt.Errorf("reading the last import's report: %w", err)
		}
	}
	r.Version, r.BootID = a.Version, a.bootID()
	if tx.Interrupted() {
		r.reason(health.Interrupted, hintImport, "a program was killed while it applied a set; whoever writes to the store next finishes it")
	}
	r.addProvider(tx)
	a.complete(tx, r)
	return r, nil
}

// CheckConfig reads the configuration and returns what is wrong with it.
func (a *Agent) CheckConfig() (path string, faults []ConfigFault, err error) {
	path = a.path(pathConfig)
	_, faults, err = ReadConfig(path)
	return path, faults, err
}

// config reads the configuration; what is wrong with it is reported and costs
// nothing else.
func (a *Agent) config(r *Report) Config {
	path := a.path(pathConfig)
	cfg, faults, err := ReadConfig(path)
	if err != nil {
		r.reason(health.ConfigFault, hintCheckConfig, "reading the configuration: %v; defaults hold", err)
	}
	for _, f := range faults {
		r.reason(health.ConfigFault, hintCheckConfig, "%s: %s", path, f)
	}
	return cfg
}

// readSMBIOS returns the credentials in the VM's OEM strings, or none and a
// reason. Their owner wipes them.
func (a *Agent) readSMBIOS(ctx context.Context, cfg Config, r *Report) ([]smbios.Credential, error) {
	switch cfg.SMBIOS.Read {
	case ReadNever:
		r.reason(health.SMBIOSOff, "", "smbios.read is %q: OEM strings were not read", ReadNever)
		return nil, nil
	case ReadAlways:
	default:
		kind, err := a.askKind(ctx)
		if err != nil {
			// Fail closed: an attacker's host may be what keeps us from knowing.
			r.reason(health.Confidential, hintImport, "cannot tell whether this is a confidential VM, so that SMBIOS was not read: %v; set smbios.read to %q where the host is trusted", err, ReadAlways)
			return nil, err
		}
		if kind != "" {
			r.reason(health.Confidential, "", "this is a confidential VM (%s), whose host is not trusted: SMBIOS was not read; set smbios.read to %q to read it all the same", kind, ReadAlways)
			return nil, nil
		}
	}
	table, err := smbios.Read(a.path("sys"))
	switch {
	case errors.Is(err, smbios.ErrNotFound):
		r.reason(health.NoSMBIOS, "", "this VM has no SMBIOS, or its kernel does not show it")
		return nil, nil
	case err != nil:
		r.reason(health.SMBIOSUnreadable, "", "%v; nothing was imported", err)
		return nil, err
	}
	defer table.Wipe()
	r.SMBIOS = SMBIOS{
		Origin: string(table.Origin), Version: table.EntryPoint.Version, Structures: table.Structures, Strings: len(table.Strings),
		Provider: namedProvider(table),
	}
	for _, f := range table.Faults {
		if f.Code == smbios.FaultNoEnd || f.Code == smbios.FaultTrailing {
			continue // common in sound machines, and costs nothing
		}
		r.reason(health.SMBIOSDamaged, "", "%s", f)
	}
	creds, refusals := smbios.Credentials(table)
	r.Refusals = append(r.Refusals, refusals...)
	return creds, nil
}

// askKind returns the kind of confidential VM that this is, "" where it is none.
func (a *Agent) askKind(ctx context.Context) (string, error) {
	ask := a.confidential
	if ask == nil {
		ask = a.askConfidential
	}
	kind, err := ask(ctx)
	if err != nil {
		return "", fmt.Errorf("asking for the kind of virtualization: %w", err)
	}
	return kind, nil
}

// judge decides what becomes of each credential. Systemd's family belongs to
// PID 1: what it took is compared, what it missed is for the store to repair.
// Our own family is for the store.
func (a *Agent) judge(creds []smbios.Credential, r *Report) credstore.Set {
	set := credstore.Set{Source: credential.SourceSMBIOS}
	agents := map[string]bool{}
	for _, c := range creds {
		if c.Family == smbios.FamilyAgent {
			agents[c.Name] = true
			set.Install = append(set.Install, credstore.Credential{Name: c.Name, Value: c.Value})
		}
	}
	importing := a.pid1Imports()
	for _, c := range creds {
		if c.Family != smbios.FamilySystemd {
			continue
		}
		refuse := func(reason credential.Reason, format string, args ...any) {
			r.Refusals = append(r.Refusals, credential.Refusal{
				Name: c.Name, Source: credential.SourceSMBIOS, Reason: reason, Detail: fmt.Sprintf(format, args...),
			})
		}
		place := a.pid1Place("system")
		path := place.Path(c.Name)
		switch got, detail := compare(filepath.Join(place.Dir, c.Name), path, c.Value); got {
		case same:
			r.Entries = append(r.Entries, pid1Entry(c, path, credstore.StateInForce))
		case different:
			r.Entries = append(r.Entries, pid1Entry(c, path, StateMismatch))
			refuse(credential.ReasonMismatch, "%s; pass it as io.guestagent.credential%s:%s=… instead, which PID 1 leaves alone", detail, map[bool]string{true: ".binary"}[c.Binary], c.Name)
		case missing:
			switch {
			case !importing:
				refuse(credential.ReasonDisabled, "systemd.import_credentials=no on the kernel command line keeps PID 1 from taking it, and so it is not repaired; pass it as io.guestagent.credential:%s=…", c.Name)
			case agents[c.Name]:
				refuse(credential.ReasonDuplicate, "PID 1 did not take it, and there is a string io.guestagent.credential:%s=…, which wins", c.Name)
			default:
				set.Install = append(set.Install, credstore.Credential{Name: c.Name, Value: c.Value})
			}
		}
	}
	return set
}

func pid1Entry(c smbios.Credential, path string, state credstore.State) Entry {
	return Entry{Name: c.Name, Size: int64(c.Value.Len()), Source: credential.SourceSMBIOS, State: state, Path: path}
}

type comparison int

const (
	missing comparison = iota
	same
	different
)

// compare says whether the file holds v. Detail names the file as and says in
// what it differs, in sizes only.
func compare(file, as string, v secret.Value) (comparison, string) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return missing, ""
	}
	if err != nil {
		return different, fmt.Sprintf("PID 1's %s cannot be compared: %v", as, err)
	}
	defer f.Close()
	want := v.Bytes()
	b := make([]byte, len(want)+1) // one more tells a longer file
	defer secret.Zero(b)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return different, fmt.Sprintf("PID 1's %s cannot be compared: %v", as, err)
	}
	switch b := b[:n]; {
	case subtle.ConstantTimeCompare(b, want) == 1:
		return same, ""
	case n < len(want) && bytes.HasPrefix(want, b):
		return different, fmt.Sprintf("PID 1 has the first %d of its %d bytes in %s: systemd before 257 cuts what is past 4096 bytes of a structure", n, len(want), as)
	default:
		return different, fmt.Sprintf("PID 1 has other bytes in %s than the string's %d: cut on the way, or from a source it asks earlier, such as fw_cfg", as, len(want))
	}
}

// pid1Imports reports whether PID 1 takes credentials from outside. A command
// line that cannot be read says nothing, as for systemd.
func (a *Agent) pid1Imports() bool {
	b, err := os.ReadFile(a.path(pathCmdline))
	return err != nil || importCredentials(string(b))
}

func (a *Agent) bootID() string {
	b, err := os.ReadFile(a.path(pathBootID))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// saveImport keeps what only the import knows: later reports add the rest.
func saveImport(tx *credstore.Tx, r *Report) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := tx.SetNote(credstore.NoteReport, b); err != nil {
		return fmt.Errorf("keeping the import's report: %w", err)
	}
	return nil
}

// complete adds what the store says at this moment.
func (a *Agent) complete(tx *credstore.Tx, r *Report) {
	r.Generation = tx.Generation()
	for _, e := range tx.Entries() {
		r.Entries = append(r.Entries, Entry{
			Name: e.Name, Revision: e.Revision, Size: e.Size, Source: e.Source, InstalledAt: &e.InstalledAt, State: e.State, Path: e.Path, Ephemeral: e.Ephemeral,
		})
	}
	dir := a.path(pathStore)
	b, err := credstore.BackingOf(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		r.reason(health.StoreSwappable, "", "cannot tell what %s lies on: %v", dir, err)
	case b.Swappable:
		r.reason(health.StoreSwappable, "findmnt --target "+dir, "%s lies on a file system (%s) that may write it to a disk; run-credstore.mount puts it into memory, but leaves a folder alone that somebody uses already", dir, b.FSType)
	}
	slices.SortStableFunc(r.Entries, func(x, y Entry) int { return cmp.Or(cmp.Compare(x.Name, y.Name), cmp.Compare(x.Path, y.Path)) })
	slices.SortStableFunc(r.Reasons, func(x, y Reason) int { return health.Compare(x.Code, y.Code) })
	// No list is null on the wire.
	if r.Entries == nil {
		r.Entries = []Entry{}
	}
	if r.Refusals == nil {
		r.Refusals = []credential.Refusal{}
	}
	if r.Reasons == nil {
		r.Reasons = []Reason{}
	}
}

// foresee adds what a dry run would have installed.
func (r *Report) foresee(dir string, set credstore.Set) {
	have := map[string]bool{}
	for _, e := range r.Entries {
		have[e.Path] = true
	}
	for _, c := range set.Install {
		path := filepath.Join(dir, c.Name)
		if !have[path] {
			r.Entries = append(r.Entries, Entry{Name: c.Name, Size: int64(c.Value.Len()), Source: set.Source, State: "wouldInstall", Path: path})
		}
	}
	slices.SortStableFunc(r.Entries, func(x, y Entry) int { return cmp.Compare(x.Name, y.Name) })
}
