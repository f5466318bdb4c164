package vsockrpc

import (
	"context"
	_ "embed" // the description of the interface
	"fmt"
	"iter"
	"time"
)

// ProviderDescription is the definition of io.guestagent.Provider.
//
//go:embed io.guestagent.Provider.varlink
var ProviderDescription string

// The full names of io.guestagent.Provider and what it has.
const (
	ProviderInterface    = "io.guestagent.Provider"
	MethodRing           = ProviderInterface + ".Ring"
	MethodProviderStatus = ProviderInterface + ".Status"
	MethodProviderWatch  = ProviderInterface + ".Watch"

	errUnavailable = ProviderInterface + ".Unavailable"
)

// The states of [ProviderStatus].
const (
	GuestWaiting    = "waiting"    // the guest does not answer
	GuestApplying   = "applying"   // the set is being applied
	GuestInForce    = "inForce"    // the set is in force
	GuestRefused    = "refused"    // the set is in force, but for some names
	GuestRolledBack = "rolledBack" // the set did not stand its gate
	GuestUnreadable = "unreadable" // the source of the set cannot be read
)

// A ProviderStatus is what a provider knows of its guest.
type ProviderStatus struct {
	// Name is the VM's, as the host knows it.
	Name string `json:"name"`
	// Target is where the guest is dialled.
	Target string `json:"target"`
	State  string `json:"state"`
	// Problem is one line on the state, empty if there is none. It may quote the
	// guest.
	Problem string `json:"problem"`
	// Since and LastContact are times of RFC 3339, of the state and of when the
	// guest was heard last. LastContact is empty if it never was.
	Since       string `json:"since"`
	LastContact string `json:"lastContact"`
	// Report is the guest's last one; nil if there is none.
	Report *Report `json:"report,omitzero"`
	// Trimmed is set where the report was too large to keep all of it: lists were
	// left out.
	Trimmed bool `json:"trimmed,omitzero"`
	// ClockOffset is by how many milliseconds the guest's clock was ahead of the
	// host's when it was heard last; nil if it is not known. The way that the
	// guest's word took makes it seem behind.
	ClockOffset *int64 `json:"clockOffset,omitzero"`
	// Applies is what came of the sets that this provider handed over; nil if it
	// does not say.
	Applies *Applies `json:"applies,omitzero"`
}

// An Applies counts the sets that a provider has handed over since it started.
type Applies struct {
	// Count is all of them. Of those, Refused are in force but for some names,
	// RolledBack were put back by their gate, and Failed were not put in force.
	Count      int64 `json:"count"`
	Refused    int64 `json:"refused"`
	RolledBack int64 `json:"rolledBack"`
	Failed     int64 `json:"failed"`
	// Sum is the time that they took, in microseconds.
	Sum int64 `json:"sum"`
	// Buckets are those of a histogram, with rising bounds; each counts what is
	// in those before it, too.
	Buckets []Bucket `json:"buckets"`
}

// A Bucket counts what took at most so many milliseconds.
type Bucket struct {
	LE    int64 `json:"le"`
	Count int64 `json:"count"`
}

// ProviderWatchReply is one reply of Watch.
type ProviderWatchReply struct {
	// Status is nil in a heartbeat.
	Status *ProviderStatus `json:"status,omitzero"`
	// LastContact is when the guest was heard last, in a heartbeat.
	LastContact string `json:"lastContact,omitzero"`
}

// An UnavailableError says that a provider cannot hand over its set now, and
// that it is worth another try.
type UnavailableError struct {
	Problem string
}

var _ wireType = (*UnavailableError)(nil)

// Error returns the problem in one line, escaped and bounded.
func (e *UnavailableError) Error() string {
	return "the provider cannot hand over its set now: " + Escape(e.Problem, maxQuoted)
}

// WireName returns the error's full name.
func (*UnavailableError) WireName() string { return errUnavailable }

var (
	providerStatusFields     = NewFields("name", "target", "state", "problem", "since", "lastContact", "report?", "trimmed?", "clockOffset?", "applies?").Open()
	appliesFields            = NewFields("count", "refused", "rolledBack", "failed", "sum", "buckets").Open()
	bucketFields             = NewFields("le", "count").Open()
	providerWatchReplyFields = NewFields("status?", "lastContact?").Open()
	unavailableFields        = NewFields("problem").Open()
)

// EncodeTo encodes the status.
func (s *ProviderStatus) EncodeTo(e *Encoder) {
	e.String("name", s.Name)
	e.String("target", s.Target)
	e.String("state", s.State)
	e.String("problem", s.Problem)
	e.String("since", s.Since)
	e.String("lastContact", s.LastContact)
	if s.Report != nil {
		e.Object("report", func() { s.Report.EncodeTo(e) })
	}
	e.OptBool("trimmed", s.Trimmed)
	optInt(e, "clockOffset", s.ClockOffset)
	if a := s.Applies; a != nil {
		e.Object("applies", func() {
			e.Int("count", a.Count)
			e.Int("refused", a.Refused)
			e.Int("rolledBack", a.RolledBack)
			e.Int("failed", a.Failed)
			e.Int("sum", a.Sum)
			e.Array("buckets", len(a.Buckets), func(i int) {
				e.Int("le", a.Buckets[i].LE)
				e.Int("count", a.Buckets[i].Count)
			})
		})
	}
}

// DecodeFrom decodes the status.
func (s *ProviderStatus) DecodeFrom(d *Decoder) {
	d.Object(providerStatusFields, func(key string) {
		switch key {
		case "name":
			s.Name = d.String(maxLine)
		case "target":
			s.Target = d.String(maxLine)
		case "state":
			s.State = d.String(maxLine)
		case "problem":
			s.Problem = d.String(maxLine)
		case "since":
			s.Since = d.String(maxLine)
		case "lastContact":
			s.LastContact = d.String(maxLine)
		case "report":
			s.Report = decodeReport(d)
		case "trimmed":
			s.Trimmed = d.Bool()
		case "clockOffset":
			n := d.Int()
			s.ClockOffset = &n
		case "applies":
			s.Applies = decodeApplies(d)
		}
	})
	reset(d, s)
}

func decodeApplies(d *Decoder) *Applies {
	a := &Applies{Buckets: []Bucket{}}
	d.Object(appliesFields, func(key string) {
		switch key {
		case "count":
			a.Count = d.Int()
		case "refused":
			a.Refused = d.Int()
		case "rolledBack":
			a.RolledBack = d.Int()
		case "failed":
			a.Failed = d.Int()
		case "sum":
			a.Sum = d.Int()
		case "buckets":
			d.Array(maxBuckets, func(int) {
				var b Bucket
				decodeInts(d, bucketFields, map[string]*int64{"le": &b.LE, "count": &b.Count})
				a.Buckets = append(a.Buckets, b)
			})
		}
	})
	return a
}

// maxBuckets is how many buckets a histogram may have.
const maxBuckets = 64

// EncodeTo encodes the reply.
func (r *ProviderWatchReply) EncodeTo(e *Encoder) {
	if r.Status != nil {
		e.Object("status", func() { r.Status.EncodeTo(e) })
	}
	e.OptString("lastContact", r.LastContact)
}

// DecodeFrom decodes the reply.
func (r *ProviderWatchReply) DecodeFrom(d *Decoder) {
	d.Object(providerWatchReplyFields, func(key string) {
		switch key {
		case "status":
			r.Status = &ProviderStatus{}
			r.Status.DecodeFrom(d)
		case "lastContact":
			r.LastContact = d.String(maxLine)
		}
	})
	reset(d, r)
}

// EncodeTo encodes the error's parameters.
func (e *UnavailableError) EncodeTo(enc *Encoder) { enc.String("problem", e.Problem) }

// DecodeFrom decodes the error's parameters.
func (e *UnavailableError) DecodeFrom(d *Decoder) {
	d.Object(unavailableFields, func(string) { e.Problem = d.String(maxLine) })
	reset(d, e)
}

// Provider calls io.guestagent.Provider. The interface's own error comes back as
// [UnavailableError].
type Provider struct {
	Client *Client
}

// Ring asks the provider for the guest's set, and returns when that is in force.
// It is called with more, though there is one reply, so that the provider learns
// of a guest that hangs up.
func (p Provider) Ring(ctx context.Context) error {
	done := false
	for d, err := range p.Client.CallMore(ctx, MethodRing, nil) {
		if err != nil {
			return typed(MethodRing, err)
		}
		d.Object(noFields, func(string) {})
		if err = d.End(); err == nil && done {
			err = errAfterResult
		}
		if err != nil {
			return fmt.Errorf("calling %s: %w: %w", MethodRing, ErrProtocol, err)
		}
		done = true
	}
	return nil
}

// Status returns what the provider knows of its guest. It is answered on the
// provider's local socket.
func (p Provider) Status(ctx context.Context) (*ProviderStatus, error) {
	s, err := call[ProviderStatus](ctx, p.Client, MethodProviderStatus, nil)
	if err != nil {
		return nil, err
	}
	return &s, nil
}

// Watch yields what the provider knows of its guest, and again whenever that
// changed, as [Health.Watch] does. It is answered on the provider's local socket.
func (p Provider) Watch(ctx context.Context, heartbeat time.Duration) iter.Seq2[ProviderWatchReply, error] {
	return watch(ctx, p.Client, MethodProviderWatch, heartbeat, func(d *Decoder) (ProviderWatchReply, bool, error) {
		var r ProviderWatchReply
		err := d.Decode(&r)
		return r, r.Status != nil, err
	})
}
