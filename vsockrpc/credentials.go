package vsockrpc

import (
	"context"
	_ "embed" // the description of the interface
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
)

// CredentialsDescription is the definition of io.guestagent.Credentials.
//
//go:embed io.guestagent.Credentials.varlink
var CredentialsDescription string

// The full names of io.guestagent.Credentials and what it has.
const (
	CredentialsInterface = "io.guestagent.Credentials"
	MethodApply          = CredentialsInterface + ".Apply"
	MethodList           = CredentialsInterface + ".List"
	MethodRemove         = CredentialsInterface + ".Remove"
	MethodRollback       = CredentialsInterface + ".Rollback"

	errRefused            = CredentialsInterface + ".Refused"
	errGenerationMismatch = CredentialsInterface + ".GenerationMismatch"
	errNoPrevious         = CredentialsInterface + ".NoPrevious"
)

const (
	// MaxRevisionLen is the longest revision, in bytes.
	MaxRevisionLen = 255
	// maxListed bounds the lists that a guest answers with. They may have more
	// than the agent installed: other people's files are listed too.
	maxListed = 1 << 16
	// maxLine bounds the texts that a guest answers with, in bytes.
	maxLine = 4 << 10
	// maxRefusals is how many refusals a set may have before the others are
	// only counted.
	maxRefusals = 64
)

// A Credential is one credential of a set.
type Credential struct {
	Name string
	// Revision is the host's label of the value; it may be empty.
	Revision string
	// Value is on the wire data (base64) or text; a client sends data.
	Value secret.Value
	// AllowShadowed installs it although systemd finds another file first.
	AllowShadowed bool
	// Rejected says that a gate rolled this value back in an earlier boot. It is
	// refused where the guest has another value, and installed where it has none.
	Rejected bool
}

// ApplyParams are the parameters of Apply.
type ApplyParams struct {
	Set    []Credential
	Remove []string
	// Prune removes what the same source brought earlier, whose name begins
	// with PrunePrefix, and the set does not have.
	Prune       bool
	PrunePrefix string
	// ExpectedGeneration, if not nil, is the only one to apply to.
	ExpectedGeneration *int64
	Forget             bool
	DryRun             bool
	// Refresh is empty, none, auto, reload or restart.
	Refresh string
	// Gate is in whole seconds, from MinGate to MaxGate, and needs a refresh
	// other than none. 0 is no gate.
	Gate time.Duration
	// Source is what the set is recorded as: empty, which is push, or one of
	// SourcePush and SourceProvider.
	Source credential.Source
	// Partial leaves out what the guest refuses, and applies the rest. What does
	// not decode still refuses the whole set.
	Partial bool
	// Ephemeral takes names that the provider manages, too. Their values hold
	// until the provider applies its set again.
	Ephemeral bool
}

// Wipe overwrites the values.
func (p *ApplyParams) Wipe() {
	for i := range p.Set {
		p.Set[i].Value.Wipe()
	}
}

// RemoveParams are the parameters of Remove.
type RemoveParams struct {
	Names              []string
	ExpectedGeneration *int64
	Forget             bool
	// Refresh is empty, none, auto, reload or restart.
	Refresh string
}

// RollbackParams are the parameters of Rollback.
type RollbackParams struct {
	ExpectedGeneration *int64
	// Refresh is empty, none, auto, reload or restart.
	Refresh string
}

// ListParams are the parameters of List.
type ListParams struct {
	// Consumers asks for the units that load each credential.
	Consumers bool
}

// ApplyResult is what Apply and Retry answer. The lists are names.
type ApplyResult struct {
	Generation int64    `json:"generation"`
	Installed  []string `json:"installed"`
	Relabelled []string `json:"relabelled"`
	Removed    []string `json:"removed"`
	Unchanged  []string `json:"unchanged"`
	// Refusals are what a partial set was applied without.
	Refusals []credential.Refusal `json:"refusals,omitzero"`
	// Units are the consumers that were to be refreshed.
	Units []Refreshed `json:"units,omitzero"`
	// Progress is nil in the last reply.
	Progress *Progress `json:"progress,omitzero"`
}

// ListResult is what List answers.
type ListResult struct {
	Generation int64                `json:"generation"`
	Entries    []Entry              `json:"entries"`
	Refusals   []credential.Refusal `json:"refusals"`
	Waiting    []Waiting            `json:"waiting,omitzero"`
	Rejected   []Rejected           `json:"rejected,omitzero"`
	// Gate is the generation that is on trial; nil if none is.
	Gate *int64 `json:"gate,omitzero"`
	// ConsumersProblem says in one line why the consumers are not known.
	ConsumersProblem string `json:"consumersProblem,omitzero"`
}

// An Entry is a credential that is in the guest.
type Entry struct {
	Name     string            `json:"name"`
	Revision string            `json:"revision"`
	Size     int64             `json:"size"`
	Source   credential.Source `json:"source"`
	// InstalledAt is a time of RFC 3339.
	InstalledAt string `json:"installedAt"`
	State       string `json:"state"`
	Path        string `json:"path"`
	// Ephemeral is a value that was pushed over one of the provider's. It holds
	// until the provider applies its set again.
	Ephemeral bool `json:"ephemeral,omitzero"`
	// Consumers are there if they were asked for.
	Consumers []Consumer `json:"consumers,omitzero"`
}

// RemoveResult is what Remove answers.
type RemoveResult struct {
	Generation int64    `json:"generation"`
	Removed    []string `json:"removed"`
	Unchanged  []string `json:"unchanged"`
	// Units are the consumers that were to be refreshed.
	Units []Refreshed `json:"units,omitzero"`
	// Progress is nil in the last reply.
	Progress *Progress `json:"progress,omitzero"`
}

// RollbackResult is what Rollback answers.
type RollbackResult struct {
	Generation int64    `json:"generation"`
	Installed  []string `json:"installed"`
	Removed    []string `json:"removed"`
	// Units are the consumers that were to be refreshed.
	Units []Refreshed `json:"units,omitzero"`
	// Progress is nil in the last reply.
	Progress *Progress `json:"progress,omitzero"`
}

// A RefusedError says that a set was not applied.
type RefusedError struct {
	Refusals []credential.Refusal
}

// A GenerationMismatchError says that another generation than the expected one
// is in force.
type GenerationMismatchError struct {
	ExpectedGeneration, Generation int64
}

// A NoPreviousError says that nothing is kept to roll back to.
type NoPreviousError struct{}

// A wireType is an error of one of our interfaces.
type wireType interface {
	WireError
	Unmarshaler
}

var (
	_ wireType = (*RefusedError)(nil)
	_ wireType = (*GenerationMismatchError)(nil)
	_ wireType = (*NoPreviousError)(nil)
)

// Error returns the first refusals in one line. What it quotes may be a guest's
// words: it is escaped and bounded.
func (e *RefusedError) Error() string {
	var b strings.Builder
	b.WriteString("the set was refused")
	for i, r := range e.Refusals {
		if i == 3 {
			fmt.Fprintf(&b, "; and %d more", len(e.Refusals)-i)
			break
		}
		b.WriteString(map[bool]string{true: ": ", false: "; "}[i == 0] + Escape(r.String(), maxQuoted))
	}
	return b.String()
}

func (e *GenerationMismatchError) Error() string {
	return fmt.Sprintf("generation %d is in force, not %d", e.Generation, e.ExpectedGeneration)
}

func (*NoPreviousError) Error() string { return "nothing is kept to roll back to" }

// WireName returns the error's full name.
func (*RefusedError) WireName() string { return errRefused }

// WireName returns the error's full name.
func (*GenerationMismatchError) WireName() string { return errGenerationMismatch }

// WireName returns the error's full name.
func (*NoPreviousError) WireName() string { return errNoPrevious }

// EncodeTo encodes the set. Its values are base64.
func (p *ApplyParams) EncodeTo(e *Encoder) {
	if len(p.Set) > 0 {
		e.Array("set", len(p.Set), func(i int) {
			c := &p.Set[i]
			e.String("name", c.Name)
			e.OptString("revision", c.Revision)
			e.Base64("data", c.Value)
			e.OptBool("allowShadowed", c.AllowShadowed)
			e.OptBool("rejected", c.Rejected)
		})
	}
	optStrings(e, "remove", p.Remove)
	e.OptBool("prune", p.Prune)
	e.OptString("prunePrefix", p.PrunePrefix)
	optInt(e, "expectedGeneration", p.ExpectedGeneration)
	e.OptBool("forget", p.Forget)
	e.OptBool("dryRun", p.DryRun)
	e.OptString("refresh", p.Refresh)
	encodeGate(e, p.Gate)
	e.OptString("source", string(p.Source))
	e.OptBool("partial", p.Partial)
	e.OptBool("ephemeral", p.Ephemeral)
}

// sizeHint is about what EncodeTo writes, so that the buffer does not grow.
func (p *ApplyParams) sizeHint() int {
	n := 320 + len(p.PrunePrefix)
	for i := range p.Set {
		c := &p.Set[i]
		n += len(c.Name) + len(c.Revision) + (c.Value.Len()+2)/3*4 + 80
	}
	for _, name := range p.Remove {
		n += len(name) + 3
	}
	return n
}

func optStrings(e *Encoder, key string, list []string) {
	if len(list) > 0 {
		e.Strings(key, list)
	}
}

func optInt(e *Encoder, key string, n *int64) {
	if n != nil {
		e.Int(key, *n)
	}
}

var (
	applyFields      = NewFields("set?", "remove?", "prune?", "prunePrefix?", "expectedGeneration?", "forget?", "dryRun?", "refresh?", "gate?", "source?", "partial?", "ephemeral?")
	credentialFields = NewFields("name", "revision?", "data?", "text?", "allowShadowed?", "rejected?")
	removeFields     = NewFields("names", "expectedGeneration?", "forget?", "refresh?")
	rollbackFields   = NewFields("expectedGeneration?", "refresh?")
	listFields       = NewFields("consumers?")

	applyResultFields    = NewFields("generation", "installed", "relabelled", "removed", "unchanged", "refusals?", "units?", "progress?").Open()
	listResultFields     = NewFields("generation", "entries", "refusals", "waiting?", "rejected?", "gate?", "consumersProblem?").Open()
	entryFields          = NewFields("name", "revision", "size", "source", "installedAt", "state", "path", "ephemeral?", "consumers?").Open()
	refusalFields        = NewFields("name", "source", "reason", "detail").Open()
	removeResultFields   = NewFields("generation", "removed", "unchanged", "units?", "progress?").Open()
	rollbackResultFields = NewFields("generation", "installed", "removed", "units?", "progress?").Open()
	refusedFields        = NewFields("refusals").Open()
	mismatchFields       = NewFields("expectedGeneration", "generation").Open()
	noFields             = NewFields().Open()
)

// DecodeFrom decodes the set and applies the limits of one: names and values
// that do not fit are a [RefusedError], whose refusals have no source. After an
// error there are no values.
func (p *ApplyParams) DecodeFrom(d *Decoder) {
	set := setDecoder{d: d}
	d.Object(applyFields, func(key string) {
		switch key {
		case "set":
			d.Array(credential.MaxSetNames, func(i int) { p.Set = append(p.Set, set.credential(i)) })
		case "remove":
			p.Remove = decodeNames(d)
		case "prune":
			p.Prune = d.Bool()
		case "prunePrefix":
			p.PrunePrefix = d.String(credential.MaxNameLen)
		case "expectedGeneration":
			p.ExpectedGeneration = decodeGeneration(d)
		case "forget":
			p.Forget = d.Bool()
		case "dryRun":
			p.DryRun = d.Bool()
		case "refresh":
			p.Refresh = decodeSetRefresh(d)
		case "gate":
			p.Gate = decodeGate(d)
		case "source":
			p.Source = credential.Source(decodeWord(d, string(credential.SourcePush), string(credential.SourceProvider)))
		case "partial":
			p.Partial = d.Bool()
		case "ephemeral":
			p.Ephemeral = d.Bool()
		}
	})
	checkGate(d, p.Gate, p.Refresh)
	if d.Err() == nil && len(p.Set)+len(p.Remove) > credential.MaxSetNames {
		set.refuse("", credential.ReasonTooLarge, fmt.Sprintf("set and remove have more than %d names together", credential.MaxSetNames))
	}
	if len(set.refusals) > 0 {
		d.Fail(&RefusedError{Refusals: set.refusals})
	}
	if d.Err() != nil {
		p.Wipe()
		*p = ApplyParams{}
	}
}

// A setDecoder decodes the credentials of a set, and notes what is wrong with
// each, so that the caller learns of all at once.
type setDecoder struct {
	d        *Decoder
	size     int
	refusals []credential.Refusal
}

func (s *setDecoder) refuse(name string, reason credential.Reason, detail string) {
	if len(s.refusals) < maxRefusals {
		s.refusals = append(s.refusals, credential.Refusal{Name: name, Reason: reason, Detail: detail})
	}
}

// credential decodes the i-th credential of the set.
func (s *setDecoder) credential(i int) Credential {
	d := s.d
	var c Credential
	var nameErr error
	values := 0
	problem := stringProblem(0)
	d.Object(credentialFields, func(key string) {
		switch key {
		case "name":
			c.Name = d.String(maxLine)
			nameErr = credential.CheckName(c.Name)
		case "revision":
			c.Revision = d.String(MaxRevisionLen)
		case "data":
			values++
			c.Value.Wipe() // there may be text already
			c.Value, _, problem = d.base64(credential.MaxSize)
		case "text":
			values++
			c.Value.Wipe() // there may be data already
			c.Value, _, problem = d.secretText(credential.MaxSize)
		case "allowShadowed":
			c.AllowShadowed = d.Bool()
		case "rejected":
			c.Rejected = d.Bool()
		}
	})
	switch {
	case d.Err() != nil:
	case values != 1:
		d.Invalid("want exactly one of data and text")
	case nameErr != nil:
		s.refuse("", credential.ReasonBadName, fmt.Sprintf("credential %d of the set: %v", i+1, nameErr))
	case problem == badBase64:
		s.refuse(c.Name, credential.ReasonBadBase64, "data is not base64 with padding")
	case problem == badLength:
		s.refuse(c.Name, credential.ReasonTooLarge, fmt.Sprintf("the value is larger than %d bytes", credential.MaxSize))
	}
	if s.size += c.Value.Len(); s.size > credential.MaxSetSize && s.size-c.Value.Len() <= credential.MaxSetSize {
		s.refuse("", credential.ReasonTooLarge, fmt.Sprintf("the values of the set are larger than %d bytes together", credential.MaxSetSize))
	}
	if d.Err() != nil || len(s.refusals) > 0 {
		c.Value.Wipe() // the set will not be applied
	}
	return c
}

// decodeNames reads the names to remove. What is no name is a refusal of
// whoever removes: it may be there under no name that systemd would take.
func decodeNames(d *Decoder) []string {
	return d.Strings(credential.MaxSetNames, credential.MaxNameLen)
}

func decodeGeneration(d *Decoder) *int64 {
	n := d.Int()
	if n < 0 {
		d.Invalid("is negative")
	}
	return &n
}

// EncodeTo encodes the parameters of Remove.
func (p *RemoveParams) EncodeTo(e *Encoder) {
	e.Strings("names", p.Names)
	optInt(e, "expectedGeneration", p.ExpectedGeneration)
	e.OptBool("forget", p.Forget)
	e.OptString("refresh", p.Refresh)
}

// DecodeFrom decodes the parameters of Remove.
func (p *RemoveParams) DecodeFrom(d *Decoder) {
	d.Object(removeFields, func(key string) {
		switch key {
		case "names":
			p.Names = decodeNames(d)
		case "expectedGeneration":
			p.ExpectedGeneration = decodeGeneration(d)
		case "forget":
			p.Forget = d.Bool()
		case "refresh":
			p.Refresh = decodeSetRefresh(d)
		}
	})
	reset(d, p)
}

// EncodeTo encodes the parameters of Rollback.
func (p *RollbackParams) EncodeTo(e *Encoder) {
	optInt(e, "expectedGeneration", p.ExpectedGeneration)
	e.OptString("refresh", p.Refresh)
}

// DecodeFrom decodes the parameters of Rollback.
func (p *RollbackParams) DecodeFrom(d *Decoder) {
	d.Object(rollbackFields, func(key string) {
		switch key {
		case "expectedGeneration":
			p.ExpectedGeneration = decodeGeneration(d)
		case "refresh":
			p.Refresh = decodeSetRefresh(d)
		}
	})
	reset(d, p)
}

// EncodeTo encodes the parameters of List.
func (p *ListParams) EncodeTo(e *Encoder) { e.OptBool("consumers", p.Consumers) }

// DecodeFrom decodes the parameters of List.
func (p *ListParams) DecodeFrom(d *Decoder) {
	d.Object(listFields, func(string) { p.Consumers = d.Bool() })
	reset(d, p)
}

// reset gives nothing on error.
func reset[T any](d *Decoder, v *T) {
	if d.Err() != nil {
		var zero T
		*v = zero
	}
}

// EncodeTo encodes the result.
func (r *ApplyResult) EncodeTo(e *Encoder) {
	e.Int("generation", r.Generation)
	e.Strings("installed", r.Installed)
	e.Strings("relabelled", r.Relabelled)
	e.Strings("removed", r.Removed)
	e.Strings("unchanged", r.Unchanged)
	if len(r.Refusals) > 0 {
		encodeRefusals(e, r.Refusals)
	}
	encodeOptUnits(e, r.Units)
	encodeProgress(e, r.Progress)
}

// DecodeFrom decodes the result.
func (r *ApplyResult) DecodeFrom(d *Decoder) {
	d.Object(applyResultFields, func(key string) {
		switch key {
		case "generation":
			r.Generation = d.Int()
		case "installed":
			r.Installed = listed(d)
		case "relabelled":
			r.Relabelled = listed(d)
		case "removed":
			r.Removed = listed(d)
		case "unchanged":
			r.Unchanged = listed(d)
		case "refusals":
			r.Refusals = decodeRefusals(d)
		case "units":
			r.Units = decodeUnits(d)
		case "progress":
			r.Progress = decodeProgress(d)
		}
	})
	reset(d, r)
}

func listed(d *Decoder) []string { return d.Strings(maxListed, maxLine) }

// EncodeTo encodes the result.
func (r *ListResult) EncodeTo(e *Encoder) {
	e.Int("generation", r.Generation)
	encodeEntries(e, r.Entries)
	encodeRefusals(e, r.Refusals)
	encodeWaiting(e, r.Waiting)
	encodeRejected(e, r.Rejected)
	optInt(e, "gate", r.Gate)
	e.OptString("consumersProblem", r.ConsumersProblem)
}

// DecodeFrom decodes the result.
func (r *ListResult) DecodeFrom(d *Decoder) {
	d.Object(listResultFields, func(key string) {
		switch key {
		case "generation":
			r.Generation = d.Int()
		case "entries":
			r.Entries = decodeEntries(d)
		case "refusals":
			r.Refusals = decodeRefusals(d)
		case "waiting":
			r.Waiting = decodeWaiting(d)
		case "rejected":
			r.Rejected = decodeRejected(d)
		case "gate":
			n := d.Int()
			r.Gate = &n
		case "consumersProblem":
			r.ConsumersProblem = d.String(maxLine)
		}
	})
	reset(d, r)
}

func encodeEntries(e *Encoder, entries []Entry) {
	e.Array("entries", len(entries), func(i int) {
		entry := &entries[i]
		e.String("name", entry.Name)
		e.String("revision", entry.Revision)
		e.Int("size", entry.Size)
		e.String("source", string(entry.Source))
		e.String("installedAt", entry.InstalledAt)
		e.String("state", entry.State)
		e.String("path", entry.Path)
		e.OptBool("ephemeral", entry.Ephemeral)
		encodeConsumers(e, entry.Consumers)
	})
}

func decodeEntries(d *Decoder) []Entry {
	entries := []Entry{}
	d.Array(maxListed, func(int) { entries = append(entries, decodeEntry(d)) })
	return entries
}

func decodeEntry(d *Decoder) Entry {
	var e Entry
	d.Object(entryFields, func(key string) {
		switch key {
		case "name":
			e.Name = d.String(maxLine)
		case "revision":
			e.Revision = d.String(maxLine)
		case "size":
			e.Size = d.Int()
		case "source":
			e.Source = credential.Source(d.String(maxLine))
		case "installedAt":
			e.InstalledAt = d.String(maxLine)
		case "state":
			e.State = d.String(maxLine)
		case "path":
			e.Path = d.String(maxLine)
		case "ephemeral":
			e.Ephemeral = d.Bool()
		case "consumers":
			e.Consumers = decodeConsumers(d)
		}
	})
	return e
}

func encodeRefusals(e *Encoder, refusals []credential.Refusal) {
	e.Array("refusals", len(refusals), func(i int) {
		r := &refusals[i]
		e.String("name", r.Name)
		e.String("source", string(r.Source))
		e.String("reason", string(r.Reason))
		e.String("detail", r.Detail)
	})
}

func decodeRefusals(d *Decoder) []credential.Refusal {
	refusals := []credential.Refusal{}
	d.Array(maxListed, func(int) {
		var r credential.Refusal
		d.Object(refusalFields, func(key string) {
			switch key {
			case "name":
				r.Name = d.String(maxLine)
			case "source":
				r.Source = credential.Source(d.String(maxLine))
			case "reason":
				r.Reason = credential.Reason(d.String(maxLine))
			case "detail":
				r.Detail = d.String(maxLine)
			}
		})
		refusals = append(refusals, r)
	})
	return refusals
}

// EncodeTo encodes the result.
func (r *RemoveResult) EncodeTo(e *Encoder) {
	e.Int("generation", r.Generation)
	e.Strings("removed", r.Removed)
	e.Strings("unchanged", r.Unchanged)
	encodeOptUnits(e, r.Units)
	encodeProgress(e, r.Progress)
}

// DecodeFrom decodes the result.
func (r *RemoveResult) DecodeFrom(d *Decoder) {
	d.Object(removeResultFields, func(key string) {
		switch key {
		case "generation":
			r.Generation = d.Int()
		case "removed":
			r.Removed = listed(d)
		case "unchanged":
			r.Unchanged = listed(d)
		case "units":
			r.Units = decodeUnits(d)
		case "progress":
			r.Progress = decodeProgress(d)
		}
	})
	reset(d, r)
}

// EncodeTo encodes the result.
func (r *RollbackResult) EncodeTo(e *Encoder) {
	e.Int("generation", r.Generation)
	e.Strings("installed", r.Installed)
	e.Strings("removed", r.Removed)
	encodeOptUnits(e, r.Units)
	encodeProgress(e, r.Progress)
}

// DecodeFrom decodes the result.
func (r *RollbackResult) DecodeFrom(d *Decoder) {
	d.Object(rollbackResultFields, func(key string) {
		switch key {
		case "generation":
			r.Generation = d.Int()
		case "installed":
			r.Installed = listed(d)
		case "removed":
			r.Removed = listed(d)
		case "units":
			r.Units = decodeUnits(d)
		case "progress":
			r.Progress = decodeProgress(d)
		}
	})
	reset(d, r)
}

// EncodeTo encodes the error's parameters.
func (e *RefusedError) EncodeTo(enc *Encoder) { encodeRefusals(enc, e.Refusals) }

// DecodeFrom decodes the error's parameters.
func (e *RefusedError) DecodeFrom(d *Decoder) {
	d.Object(refusedFields, func(string) { e.Refusals = decodeRefusals(d) })
	reset(d, e)
}

// EncodeTo encodes the error's parameters.
func (e *GenerationMismatchError) EncodeTo(enc *Encoder) {
	enc.Int("expectedGeneration", e.ExpectedGeneration)
	enc.Int("generation", e.Generation)
}

// DecodeFrom decodes the error's parameters.
func (e *GenerationMismatchError) DecodeFrom(d *Decoder) {
	d.Object(mismatchFields, func(key string) {
		switch key {
		case "expectedGeneration":
			e.ExpectedGeneration = d.Int()
		case "generation":
			e.Generation = d.Int()
		}
	})
	reset(d, e)
}

// EncodeTo encodes nothing.
func (*NoPreviousError) EncodeTo(*Encoder) {}

// DecodeFrom decodes an object without parameters.
func (*NoPreviousError) DecodeFrom(d *Decoder) { d.Object(noFields, func(string) {}) }

// Credentials calls io.guestagent.Credentials. The interface's own errors come
// back in their types, such as [RefusedError].
type Credentials struct {
	Client *Client
	// Progress, if not nil, is told how Apply, Remove, Rollback, Refresh and
	// Retry get on, before they return. They are then called with more.
	Progress func(Progress)
}

// Apply puts a set in force. It does not wipe its values.
func (c Credentials) Apply(ctx context.Context, p *ApplyParams) (ApplyResult, error) {
	return change[ApplyResult](ctx, c, MethodApply, p)
}

// List lists what is in the guest, without consumers.
func (c Credentials) List(ctx context.Context) (ListResult, error) {
	return call[ListResult](ctx, c.Client, MethodList, &ListParams{})
}

// ListConsumers lists what is in the guest, and which units load it.
func (c Credentials) ListConsumers(ctx context.Context) (ListResult, error) {
	return call[ListResult](ctx, c.Client, MethodList, &ListParams{Consumers: true})
}

// Remove removes names.
func (c Credentials) Remove(ctx context.Context, p *RemoveParams) (RemoveResult, error) {
	return change[RemoveResult](ctx, c, MethodRemove, p)
}

// Rollback puts back what the last set replaced.
func (c Credentials) Rollback(ctx context.Context, p *RollbackParams) (RollbackResult, error) {
	return change[RollbackResult](ctx, c, MethodRollback, p)
}

// Refresh refreshes the consumers of credentials.
func (c Credentials) Refresh(ctx context.Context, p *RefreshParams) (RefreshResult, error) {
	return change[RefreshResult](ctx, c, MethodRefresh, p)
}

// Retry puts a set in force again that its gate rolled back.
func (c Credentials) Retry(ctx context.Context, p *RetryParams) (ApplyResult, error) {
	return change[ApplyResult](ctx, c, MethodRetry, p)
}

// call calls a method that answers once.
func call[R any, P interface {
	*R
	Unmarshaler
}](ctx context.Context, c *Client, method string, params Marshaler) (R, error) {
	var r R
	err := c.Call(ctx, method, params, P(&r))
	return r, typed(method, err)
}

// change calls a method that tells its progress to whoever wants to know.
func change[R any, P interface {
	*R
	Unmarshaler
	streamed
}](ctx context.Context, c Credentials, method string, params Marshaler) (R, error) {
	if c.Progress == nil {
		r, err := call[R, P](ctx, c.Client, method, params)
		if err == nil && P(&r).progress() != nil {
			err = fmt.Errorf("calling %s: %w: %w", method, ErrProtocol, errNoResult)
		}
		return r, err
	}
	var none, result R
	done := false
	for d, err := range c.Client.CallMore(ctx, method, params) {
		if err != nil {
			return none, typed(method, err)
		}
		var r R
		err := d.Decode(P(&r))
		if err == nil && done {
			err = errAfterResult
		}
		if err != nil {
			return none, fmt.Errorf("calling %s: %w: %w", method, ErrProtocol, err)
		}
		if p := P(&r).progress(); p != nil {
			c.Progress(*p)
		} else {
			result, done = r, true
		}
	}
	if !done {
		return none, fmt.Errorf("calling %s: %w: %w", method, ErrProtocol, errNoResult)
	}
	return result, nil
}

// typed gives our interfaces' own errors their types.
func typed(method string, err error) error {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return err
	}
	for _, t := range []wireType{
		&RefusedError{}, &GenerationMismatchError{}, &NoPreviousError{},
		&GateInProgressError{}, &RolledBackError{}, &NothingRejectedError{}, &NoSystemdError{},
		&UnavailableError{},
	} {
		if t.WireName() != e.Name {
			continue
		}
		if err := e.Decode(t); err != nil {
			return fmt.Errorf("calling %s: %w: parameters of %s: %w", method, ErrProtocol, e.Name, err)
		}
		return t
	}
	return err
}
