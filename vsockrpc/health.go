package vsockrpc

import (
	"context"
	_ "embed" // the description of the interface
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
)

// HealthDescription is the definition of io.guestagent.Health.
//
//go:embed io.guestagent.Health.varlink
var HealthDescription string

// The full names of io.guestagent.Health and what it has.
const (
	HealthInterface   = "io.guestagent.Health"
	MethodHealthGet   = HealthInterface + ".Get"
	MethodHealthWatch = HealthInterface + ".Watch"
	MethodHealthPing  = HealthInterface + ".Ping"
)

// The bounds of what a watch takes for its longest silence, and what holds where
// none is asked for. On the wire it is whole seconds.
const (
	MinWatchHeartbeat     = time.Second
	MaxWatchHeartbeat     = time.Hour
	DefaultWatchHeartbeat = 30 * time.Second
)

// The states of [ProviderState].
const (
	ProviderNone        = "none"        // no provider is named
	ProviderWaiting     = "waiting"     // it was asked, and the time-out is not over
	ProviderUnreachable = "unreachable" // the time-out is over; the guest goes on trying
	ProviderInForce     = "inForce"     // its set was applied in this boot
)

// A Report is what a guest says of itself. Its words are the guest's. Newer
// guests say more, which is passed over.
type Report struct {
	// Version is the agent's.
	Version string `json:"version"`
	// BootID and MachineID are empty where they are not known.
	BootID     string `json:"bootId"`
	MachineID  string `json:"machineId"`
	Generation int64  `json:"generation"`
	// Gate is the generation that is on trial; nil if none is.
	Gate    *int64  `json:"gate,omitzero"`
	Entries []Entry `json:"entries"`
	// Refusals are those of the last import and of the provider's last set.
	Refusals []credential.Refusal `json:"refusals"`
	// Reasons are what is not as it should be.
	Reasons  []Reason   `json:"reasons"`
	Rejected []Rejected `json:"rejected,omitzero"`
	// Provider may be nil where the guest does not know about it.
	Provider *ProviderState `json:"provider,omitzero"`
}

// A Reason is something in a guest that is not as it should be.
type Reason struct {
	// Code is one word, for programs.
	Code string `json:"code"`
	// Detail is one line for people.
	Detail string `json:"detail"`
	// Hint is the way out in one line, empty if there is none to name.
	Hint string `json:"hint"`
}

// A ProviderState says how a guest gets on with its provider.
type ProviderState struct {
	// Address is where the guest looks for it, empty if none is named.
	Address string `json:"address"`
	State   string `json:"state"`
	// Since is a time of RFC 3339, empty if none is named.
	Since string `json:"since"`
	// Problem is one line on the last attempt that failed, empty if none did.
	Problem string `json:"problem"`
}

// WatchParams are the parameters of Watch.
type WatchParams struct {
	// Heartbeat is the longest time between two replies, in whole seconds from
	// MinWatchHeartbeat to MaxWatchHeartbeat. 0 is left out, and means
	// DefaultWatchHeartbeat.
	Heartbeat time.Duration
}

// GetResult is what Get answers. Report must not be nil.
type GetResult struct {
	Report *Report `json:"report"`
}

// WatchReply is one reply of Watch.
type WatchReply struct {
	// Report is nil in a heartbeat.
	Report *Report `json:"report,omitzero"`
}

// PingResult is what Ping answers.
type PingResult struct {
	BootID     string `json:"bootId"`
	Generation int64  `json:"generation"`
}

var (
	watchFields = NewFields("heartbeat?")

	getResultFields     = NewFields("report").Open()
	watchReplyFields    = NewFields("report?").Open()
	pingResultFields    = NewFields("bootId", "generation").Open()
	reportFields        = NewFields("version", "bootId", "machineId", "generation", "gate?", "entries", "refusals", "reasons", "rejected?", "provider?").Open()
	reasonFields        = NewFields("code", "detail", "hint").Open()
	providerStateFields = NewFields("address", "state", "since", "problem").Open()
)

// EncodeTo encodes the report.
func (r *Report) EncodeTo(e *Encoder) {
	e.String("version", r.Version)
	e.String("bootId", r.BootID)
	e.String("machineId", r.MachineID)
	e.Int("generation", r.Generation)
	optInt(e, "gate", r.Gate)
	encodeEntries(e, r.Entries)
	encodeRefusals(e, r.Refusals)
	e.Array("reasons", len(r.Reasons), func(i int) {
		e.String("code", r.Reasons[i].Code)
		e.String("detail", r.Reasons[i].Detail)
		e.String("hint", r.Reasons[i].Hint)
	})
	encodeRejected(e, r.Rejected)
	if r.Provider != nil {
		e.Object("provider", func() { encodeProviderState(e, r.Provider) })
	}
}

// DecodeFrom decodes the report.
func (r *Report) DecodeFrom(d *Decoder) {
	d.Object(reportFields, func(key string) {
		switch key {
		case "version":
			r.Version = d.String(maxLine)
		case "bootId":
			r.BootID = d.String(maxLine)
		case "machineId":
			r.MachineID = d.String(maxLine)
		case "generation":
			r.Generation = d.Int()
		case "gate":
			n := d.Int()
			r.Gate = &n
		case "entries":
			r.Entries = decodeEntries(d)
		case "refusals":
			r.Refusals = decodeRefusals(d)
		case "reasons":
			r.Reasons = decodeReasons(d)
		case "rejected":
			r.Rejected = decodeRejected(d)
		case "provider":
			r.Provider = decodeProviderState(d)
		}
	})
	reset(d, r)
}

func decodeReasons(d *Decoder) []Reason {
	reasons := []Reason{}
	d.Array(maxListed, func(int) {
		var r Reason
		d.Object(reasonFields, func(key string) {
			s := d.String(maxLine)
			switch key {
			case "code":
				r.Code = s
			case "detail":
				r.Detail = s
			case "hint":
				r.Hint = s
			}
		})
		reasons = append(reasons, r)
	})
	return reasons
}

func encodeProviderState(e *Encoder, p *ProviderState) {
	e.String("address", p.Address)
	e.String("state", p.State)
	e.String("since", p.Since)
	e.String("problem", p.Problem)
}

func decodeProviderState(d *Decoder) *ProviderState {
	var p ProviderState
	d.Object(providerStateFields, func(key string) {
		s := d.String(maxLine)
		switch key {
		case "address":
			p.Address = s
		case "state":
			p.State = s
		case "since":
			p.Since = s
		case "problem":
			p.Problem = s
		}
	})
	return &p
}

// decodeReport decodes a report into one of its own.
func decodeReport(d *Decoder) *Report {
	r := &Report{}
	r.DecodeFrom(d)
	return r
}

// EncodeTo encodes the parameters of Watch.
func (p *WatchParams) EncodeTo(e *Encoder) {
	if p.Heartbeat != 0 {
		e.Int("heartbeat", int64(p.Heartbeat/time.Second))
	}
}

// DecodeFrom decodes the parameters of Watch.
func (p *WatchParams) DecodeFrom(d *Decoder) {
	d.Object(watchFields, func(string) { p.Heartbeat = decodeSeconds(d, MinWatchHeartbeat, MaxWatchHeartbeat) })
	reset(d, p)
}

// EncodeTo encodes the result.
func (r *GetResult) EncodeTo(e *Encoder) { e.Object("report", func() { r.Report.EncodeTo(e) }) }

// DecodeFrom decodes the result.
func (r *GetResult) DecodeFrom(d *Decoder) {
	d.Object(getResultFields, func(string) { r.Report = decodeReport(d) })
	reset(d, r)
}

// EncodeTo encodes the reply.
func (r *WatchReply) EncodeTo(e *Encoder) {
	if r.Report != nil {
		e.Object("report", func() { r.Report.EncodeTo(e) })
	}
}

// DecodeFrom decodes the reply.
func (r *WatchReply) DecodeFrom(d *Decoder) {
	d.Object(watchReplyFields, func(string) { r.Report = decodeReport(d) })
	reset(d, r)
}

// EncodeTo encodes the result.
func (r *PingResult) EncodeTo(e *Encoder) {
	e.String("bootId", r.BootID)
	e.Int("generation", r.Generation)
}

// DecodeFrom decodes the result.
func (r *PingResult) DecodeFrom(d *Decoder) {
	d.Object(pingResultFields, func(key string) {
		switch key {
		case "bootId":
			r.BootID = d.String(maxLine)
		case "generation":
			r.Generation = d.Int()
		}
	})
	reset(d, r)
}

// errNoReport and errWatchEnded are watches that are none of ours.
var (
	errNoReport   = errors.New("a heartbeat where the first report belongs")
	errWatchEnded = errors.New("the watch has ended")
)

// Health calls io.guestagent.Health.
type Health struct {
	Client *Client
}

// Get returns the guest's report.
func (h Health) Get(ctx context.Context) (*Report, error) {
	r, err := call[GetResult](ctx, h.Client, MethodHealthGet, nil)
	return r.Report, err
}

// Watch yields the guest's report, and another one whenever it changed. A nil
// report is a heartbeat: there is a turn at least every heartbeat, 0 being
// DefaultWatchHeartbeat, and a guest that misses it by much has stopped. It is
// the caller's to lose patience, by the end of ctx. A watch has no end of its
// own: the last turn has an error. Leaving the loop ends the connection, which
// serves nothing else meanwhile.
func (h Health) Watch(ctx context.Context, heartbeat time.Duration) iter.Seq2[*Report, error] {
	return func(yield func(*Report, error) bool) {
		first := true
		for d, err := range h.Client.CallMore(ctx, MethodHealthWatch, &WatchParams{Heartbeat: heartbeat}) {
			if err != nil {
				yield(nil, typed(MethodHealthWatch, err))
				return
			}
			var r WatchReply
			err := d.Decode(&r)
			if err == nil && first && r.Report == nil {
				err = errNoReport
			}
			if err != nil {
				yield(nil, fmt.Errorf("calling %s: %w: %w", MethodHealthWatch, ErrProtocol, err))
				return
			}
			if first = false; !yield(r.Report, nil) {
				return
			}
		}
		yield(nil, fmt.Errorf("calling %s: %w: %w", MethodHealthWatch, ErrProtocol, errWatchEnded))
	}
}

// Ping asks which boot and generation the guest is in, for a sign of life.
func (h Health) Ping(ctx context.Context) (PingResult, error) {
	return call[PingResult](ctx, h.Client, MethodHealthPing, nil)
}
