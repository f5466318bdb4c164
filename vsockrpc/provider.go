package vsockrpc

import (
	"context"
	_ "embed" // the description of the interface
	"fmt"
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
	providerStatusFields = NewFields("name", "target", "state", "problem", "since", "lastContact", "report?").Open()
	unavailableFields    = NewFields("problem").Open()
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
		}
	})
	reset(d, s)
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
