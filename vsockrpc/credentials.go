package vsockrpc

import (
	"context"
	_ "embed" // the description of the interface
	"errors"
	"fmt"
	"strings"

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
}

// RollbackParams are the parameters of Rollback.
type RollbackParams struct {
	ExpectedGeneration *int64
}

// ListParams are the parameters of List: none.
type ListParams struct{}

// ApplyResult is what Apply answers. The lists are names.
type ApplyResult struct {
	Generation int64    `json:"generation"`
	Installed  []string `json:"installed"`
	Relabelled []string `json:"relabelled"`
	Removed    []string `json:"removed"`
	Unchanged  []string `json:"unchanged"`
}

// ListResult is what List answers.
type ListResult struct {
	Generation int64                `json:"generation"`
	Entries    []Entry              `json:"entries"`
	Refusals   []credential.Refusal `json:"refusals"`
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
}

// RemoveResult is what Remove answers.
type RemoveResult struct {
	Generation int64    `json:"generation"`
	Removed    []string `json:"removed"`
	Unchanged  []string `json:"unchanged"`
}

// RollbackResult is what Rollback answers.
type RollbackResult struct {
	Generation int64    `json:"generation"`
	Installed  []string `json:"installed"`
	Removed    []string `json:"removed"`
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

var (
	_ WireError   = (*RefusedError)(nil)
	_ WireError   = (*GenerationMismatchError)(nil)
	_ WireError   = (*NoPreviousError)(nil)
	_ Unmarshaler = (*RefusedError)(nil)
	_ Unmarshaler = (*GenerationMismatchError)(nil)
	_ Unmarshaler = (*NoPreviousError)(nil)
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
		})
	}
	if len(p.Remove) > 0 {
		e.Strings("remove", p.Remove)
	}
	e.OptBool("prune", p.Prune)
	e.OptString("prunePrefix", p.PrunePrefix)
	optInt(e, "expectedGeneration", p.ExpectedGeneration)
	e.OptBool("forget", p.Forget)
	e.OptBool("dryRun", p.DryRun)
}

// sizeHint is about what EncodeTo writes, so that the buffer does not grow.
func (p *ApplyParams) sizeHint() int {
	n := 256
	for i := range p.Set {
		c := &p.Set[i]
		n += len(c.Name) + len(c.Revision) + (c.Value.Len()+2)/3*4 + 80
	}
	for _, name := range p.Remove {
		n += len(name) + 3
	}
	return n
}

func optInt(e *Encoder, key string, n *int64) {
	if n != nil {
		e.Int(key, *n)
	}
}

var (
	applyFields      = NewFields("set?", "remove?", "prune?", "prunePrefix?", "expectedGeneration?", "forget?", "dryRun?")
	credentialFields = NewFields("name", "revision?", "data?", "text?", "allowShadowed?")
	removeFields     = NewFields("names", "expectedGeneration?", "forget?")
	rollbackFields   = NewFields("expectedGeneration?")

	applyResultFields    = NewFields("generation", "installed", "relabelled", "removed", "unchanged").Open()
	listResultFields     = NewFields("generation", "entries", "refusals").Open()
	entryFields          = NewFields("name", "revision", "size", "source", "installedAt", "state", "path").Open()
	refusalFields        = NewFields("name", "source", "reason", "detail").Open()
	removeResultFields   = NewFields("generation", "removed", "unchanged").Open()
	rollbackResultFields = NewFields("generation", "installed", "removed").Open()
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
		}
	})
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
		}
	})
	reset(d, p)
}

// EncodeTo encodes the parameters of Rollback.
func (p *RollbackParams) EncodeTo(e *Encoder) {
	optInt(e, "expectedGeneration", p.ExpectedGeneration)
}

// DecodeFrom decodes the parameters of Rollback.
func (p *RollbackParams) DecodeFrom(d *Decoder) {
	d.Object(rollbackFields, func(string) { p.ExpectedGeneration = decodeGeneration(d) })
	reset(d, p)
}

// EncodeTo encodes nothing.
func (*ListParams) EncodeTo(*Encoder) {}

// DecodeFrom decodes an object without keys.
func (*ListParams) DecodeFrom(d *Decoder) { d.Empty() }

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
		}
	})
	reset(d, r)
}

func listed(d *Decoder) []string { return d.Strings(maxListed, maxLine) }

// EncodeTo encodes the result.
func (r *ListResult) EncodeTo(e *Encoder) {
	e.Int("generation", r.Generation)
	e.Array("entries", len(r.Entries), func(i int) {
		entry := &r.Entries[i]
		e.String("name", entry.Name)
		e.String("revision", entry.Revision)
		e.Int("size", entry.Size)
		e.String("source", string(entry.Source))
		e.String("installedAt", entry.InstalledAt)
		e.String("state", entry.State)
		e.String("path", entry.Path)
	})
	encodeRefusals(e, r.Refusals)
}

// DecodeFrom decodes the result.
func (r *ListResult) DecodeFrom(d *Decoder) {
	d.Object(listResultFields, func(key string) {
		switch key {
		case "generation":
			r.Generation = d.Int()
		case "entries":
			r.Entries = []Entry{}
			d.Array(maxListed, func(int) { r.Entries = append(r.Entries, decodeEntry(d)) })
		case "refusals":
			r.Refusals = decodeRefusals(d)
		}
	})
	reset(d, r)
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
		}
	})
	reset(d, r)
}

// EncodeTo encodes the result.
func (r *RollbackResult) EncodeTo(e *Encoder) {
	e.Int("generation", r.Generation)
	e.Strings("installed", r.Installed)
	e.Strings("removed", r.Removed)
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
// back as [RefusedError], [GenerationMismatchError] and [NoPreviousError].
type Credentials struct {
	Client *Client
}

// Apply puts a set in force. It does not wipe its values.
func (c Credentials) Apply(ctx context.Context, p *ApplyParams) (ApplyResult, error) {
	return call[ApplyResult](ctx, c.Client, MethodApply, p)
}

// List lists what is in the guest.
func (c Credentials) List(ctx context.Context) (ListResult, error) {
	return call[ListResult](ctx, c.Client, MethodList, &ListParams{})
}

// Remove removes names.
func (c Credentials) Remove(ctx context.Context, p *RemoveParams) (RemoveResult, error) {
	return call[RemoveResult](ctx, c.Client, MethodRemove, p)
}

// Rollback puts back what the last set replaced.
func (c Credentials) Rollback(ctx context.Context, p *RollbackParams) (RollbackResult, error) {
	return call[RollbackResult](ctx, c.Client, MethodRollback, p)
}

// call calls a method of io.guestagent.Credentials, and gives the interface's
// own errors their types.
func call[R any, P interface {
	*R
	Unmarshaler
}](ctx context.Context, c *Client, method string, params Marshaler) (R, error) {
	var r R
	err := c.Call(ctx, method, params, P(&r))
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return r, err
	}
	var typed interface {
		error
		Unmarshaler
	}
	switch e.Name {
	case errRefused:
		typed = &RefusedError{}
	case errGenerationMismatch:
		typed = &GenerationMismatchError{}
	case errNoPrevious:
		typed = &NoPreviousError{}
	default:
		return r, err
	}
	if err := e.Decode(typed); err != nil {
		return r, fmt.Errorf("calling %s: %w: parameters of %s: %w", method, ErrProtocol, e.Name, err)
	}
	return r, typed
}
