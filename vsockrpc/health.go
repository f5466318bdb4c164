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

	// What follows is missing in agents that are older than it.

	// Protocol is [Protocol] of the agent, 0 where it does not say.
	Protocol int64 `json:"protocol,omitzero"`
	// Verdict is one of the Verdict constants, empty where it is not known.
	Verdict string `json:"verdict,omitzero"`
	// Time is the guest's clock when it made the report, of RFC 3339.
	Time     string `json:"time,omitzero"`
	Hostname string `json:"hostname,omitzero"`
	// Uptime is in seconds.
	Uptime  int64         `json:"uptime,omitzero"`
	Systemd *SystemdState `json:"systemd,omitzero"`
	Waiting []Waiting     `json:"waiting,omitzero"`
	Memory  *Memory       `json:"memory,omitzero"`
	// Pressure is nil where the kernel has no pressure stall information.
	Pressure *Pressure `json:"pressure,omitzero"`
	Disks    []Disk    `json:"disks,omitzero"`
	Load     *Load     `json:"load,omitzero"`
	// Unknown are parts of the report that could not be had in time.
	Unknown []string `json:"unknown,omitzero"`
}

// Protocol is the version of what an agent and its host say to each other.
// What is only added leaves it as it is.
const Protocol = 1

// The verdicts of a [Report] and of a [Reason].
const (
	VerdictStarting = "starting" // it boots, or waits for its credentials
	VerdictHealthy  = "healthy"
	VerdictDegraded = "degraded" // it works, and something is not as it should be
	VerdictFailing  = "failing"  // it cannot do its work, or soon will not
)

// A SystemdState is how systemd is doing as a whole.
type SystemdState struct {
	Version string `json:"version"`
	// State is what `systemctl is-system-running` says.
	State  string       `json:"state"`
	Failed []FailedUnit `json:"failed"`
	// Jobs are those that are queued or run.
	Jobs int64 `json:"jobs"`
}

// A FailedUnit is a unit that has failed.
type FailedUnit struct {
	Unit string `json:"unit"`
	// Result is systemd's word, such as exit-code.
	Result string `json:"result"`
	// Since is a time of RFC 3339, empty if it is not known.
	Since string `json:"since"`
}

// A Memory is in bytes. Available is what programs can have without swapping.
type Memory struct {
	Total     int64 `json:"total"`
	Available int64 `json:"available"`
}

// A Pressure is for how much of the time the guest was short of something; nil
// is not known.
type Pressure struct {
	CPU    *Stall `json:"cpu,omitzero"`
	Memory *Stall `json:"memory,omitzero"`
	IO     *Stall `json:"io,omitzero"`
}

// A Stall has the averages of /proc/pressure over 10, 60 and 300 seconds, in
// hundredths of a percent of the time in which some of the processes that had
// something to do, or all of them (full), waited.
type Stall struct {
	Some10  int64 `json:"some10"`
	Some60  int64 `json:"some60"`
	Some300 int64 `json:"some300"`
	Full10  int64 `json:"full10"`
	Full60  int64 `json:"full60"`
	Full300 int64 `json:"full300"`
}

// A Disk is a file system, in bytes as df(1) has them: what is kept for root is
// in neither.
type Disk struct {
	Path      string `json:"path"`
	Used      int64  `json:"used"`
	Available int64  `json:"available"`
	ReadOnly  bool   `json:"readOnly"`
}

// A Load has the load averages over 1, 5 and 15 minutes, in hundredths.
type Load struct {
	Load1  int64 `json:"load1"`
	Load5  int64 `json:"load5"`
	Load15 int64 `json:"load15"`
}

// A Reason is something in a guest that is not as it should be.
type Reason struct {
	// Code is one word, for programs.
	Code string `json:"code"`
	// Detail is one line for people.
	Detail string `json:"detail"`
	// Hint is the way out in one line, empty if there is none to name.
	Hint string `json:"hint"`
	// Verdict is what this reason alone makes of the guest; healthy for a remark.
	// It is empty where the guest is older than that.
	Verdict string `json:"verdict,omitzero"`
	// Unit and Credential are what it is about, where it is about one.
	Unit       string `json:"unit,omitzero"`
	Credential string `json:"credential,omitzero"`
	// Since is a time of RFC 3339, empty if it is not known.
	Since string `json:"since,omitzero"`
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
	// Time is the guest's clock when it sent the reply, of RFC 3339; empty where the
	// guest is older than that. The report may have been made before.
	Time string `json:"time,omitzero"`
}

// PingResult is what Ping answers.
type PingResult struct {
	BootID     string `json:"bootId"`
	Generation int64  `json:"generation"`
}

var (
	watchFields = NewFields("heartbeat?")

	getResultFields  = NewFields("report").Open()
	watchReplyFields = NewFields("report?", "time?").Open()
	pingResultFields = NewFields("bootId", "generation").Open()
	reportFields     = NewFields("version", "bootId", "machineId", "generation", "gate?", "entries", "refusals", "reasons", "rejected?", "provider?",
		"protocol?", "verdict?", "time?", "hostname?", "uptime?", "systemd?", "waiting?", "memory?", "pressure?", "disks?", "load?", "unknown?").Open()
	reasonFields        = NewFields("code", "detail", "hint", "verdict?", "unit?", "credential?", "since?").Open()
	systemdFields       = NewFields("version", "state", "failed", "jobs").Open()
	failedUnitFields    = NewFields("unit", "result", "since").Open()
	memoryFields        = NewFields("total", "available").Open()
	pressureFields      = NewFields("cpu?", "memory?", "io?").Open()
	stallFields         = NewFields("some10", "some60", "some300", "full10", "full60", "full300").Open()
	diskFields          = NewFields("path", "used", "available", "readOnly").Open()
	loadFields          = NewFields("load1", "load5", "load15").Open()
	providerStateFields = NewFields("address", "state", "since", "problem").Open()
)

// Size returns how many bytes the report has on the wire. It encodes it.
func (r *Report) Size() int {
	var e Encoder
	r.EncodeTo(&e)
	return len(e.buf) + len("{}")
}

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
		e.OptString("verdict", r.Reasons[i].Verdict)
		e.OptString("unit", r.Reasons[i].Unit)
		e.OptString("credential", r.Reasons[i].Credential)
		e.OptString("since", r.Reasons[i].Since)
	})
	encodeRejected(e, r.Rejected)
	if r.Provider != nil {
		e.Object("provider", func() { encodeProviderState(e, r.Provider) })
	}
	if r.Protocol != 0 {
		e.Int("protocol", r.Protocol)
	}
	e.OptString("verdict", r.Verdict)
	e.OptString("time", r.Time)
	e.OptString("hostname", r.Hostname)
	if r.Uptime != 0 {
		e.Int("uptime", r.Uptime)
	}
	if r.Systemd != nil {
		e.Object("systemd", func() { encodeSystemd(e, r.Systemd) })
	}
	encodeWaiting(e, r.Waiting)
	if r.Memory != nil {
		e.Object("memory", func() {
			e.Int("total", r.Memory.Total)
			e.Int("available", r.Memory.Available)
		})
	}
	if r.Pressure != nil {
		e.Object("pressure", func() { encodePressure(e, r.Pressure) })
	}
	if len(r.Disks) > 0 {
		e.Array("disks", len(r.Disks), func(i int) {
			e.String("path", r.Disks[i].Path)
			e.Int("used", r.Disks[i].Used)
			e.Int("available", r.Disks[i].Available)
			e.Bool("readOnly", r.Disks[i].ReadOnly)
		})
	}
	if r.Load != nil {
		e.Object("load", func() {
			e.Int("load1", r.Load.Load1)
			e.Int("load5", r.Load.Load5)
			e.Int("load15", r.Load.Load15)
		})
	}
	optStrings(e, "unknown", r.Unknown)
}

func encodeSystemd(e *Encoder, s *SystemdState) {
	e.String("version", s.Version)
	e.String("state", s.State)
	e.Array("failed", len(s.Failed), func(i int) {
		e.String("unit", s.Failed[i].Unit)
		e.String("result", s.Failed[i].Result)
		e.String("since", s.Failed[i].Since)
	})
	e.Int("jobs", s.Jobs)
}

func encodePressure(e *Encoder, p *Pressure) {
	for _, part := range []struct {
		key string
		s   *Stall
	}{{"cpu", p.CPU}, {"memory", p.Memory}, {"io", p.IO}} {
		if part.s == nil {
			continue
		}
		e.Object(part.key, func() {
			e.Int("some10", part.s.Some10)
			e.Int("some60", part.s.Some60)
			e.Int("some300", part.s.Some300)
			e.Int("full10", part.s.Full10)
			e.Int("full60", part.s.Full60)
			e.Int("full300", part.s.Full300)
		})
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
		case "protocol":
			r.Protocol = d.Int()
		case "verdict":
			r.Verdict = d.String(maxLine)
		case "time":
			r.Time = d.String(maxLine)
		case "hostname":
			r.Hostname = d.String(maxLine)
		case "uptime":
			r.Uptime = d.Int()
		case "systemd":
			r.Systemd = decodeSystemd(d)
		case "waiting":
			r.Waiting = decodeWaiting(d)
		case "memory":
			r.Memory = &Memory{}
			decodeInts(d, memoryFields, map[string]*int64{"total": &r.Memory.Total, "available": &r.Memory.Available})
		case "pressure":
			r.Pressure = decodePressure(d)
		case "disks":
			r.Disks = decodeDisks(d)
		case "load":
			r.Load = &Load{}
			decodeInts(d, loadFields, map[string]*int64{"load1": &r.Load.Load1, "load5": &r.Load.Load5, "load15": &r.Load.Load15})
		case "unknown":
			r.Unknown = listed(d)
		}
	})
	reset(d, r)
}

func decodeSystemd(d *Decoder) *SystemdState {
	s := &SystemdState{Failed: []FailedUnit{}}
	d.Object(systemdFields, func(key string) {
		switch key {
		case "version":
			s.Version = d.String(maxLine)
		case "state":
			s.State = d.String(maxLine)
		case "failed":
			d.Array(maxListed, func(int) {
				var u FailedUnit
				d.Object(failedUnitFields, func(key string) {
					text := d.String(maxLine)
					switch key {
					case "unit":
						u.Unit = text
					case "result":
						u.Result = text
					case "since":
						u.Since = text
					}
				})
				s.Failed = append(s.Failed, u)
			})
		case "jobs":
			s.Jobs = d.Int()
		}
	})
	return s
}

func decodePressure(d *Decoder) *Pressure {
	p := &Pressure{}
	d.Object(pressureFields, func(key string) {
		s := &Stall{}
		decodeInts(d, stallFields, map[string]*int64{
			"some10": &s.Some10, "some60": &s.Some60, "some300": &s.Some300, "full10": &s.Full10, "full60": &s.Full60, "full300": &s.Full300,
		})
		switch key {
		case "cpu":
			p.CPU = s
		case "memory":
			p.Memory = s
		case "io":
			p.IO = s
		}
	})
	return p
}

func decodeDisks(d *Decoder) []Disk {
	disks := []Disk{}
	d.Array(maxListed, func(int) {
		var disk Disk
		d.Object(diskFields, func(key string) {
			switch key {
			case "path":
				disk.Path = d.String(maxLine)
			case "used":
				disk.Used = d.Int()
			case "available":
				disk.Available = d.Int()
			case "readOnly":
				disk.ReadOnly = d.Bool()
			}
		})
		disks = append(disks, disk)
	})
	return disks
}

// decodeInts reads an object of integers.
func decodeInts(d *Decoder, f *Fields, to map[string]*int64) {
	d.Object(f, func(key string) { *to[key] = d.Int() })
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
			case "verdict":
				r.Verdict = s
			case "unit":
				r.Unit = s
			case "credential":
				r.Credential = s
			case "since":
				r.Since = s
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
	e.OptString("time", r.Time)
}

// DecodeFrom decodes the reply.
func (r *WatchReply) DecodeFrom(d *Decoder) {
	d.Object(watchReplyFields, func(key string) {
		switch key {
		case "report":
			r.Report = decodeReport(d)
		case "time":
			r.Time = d.String(maxLine)
		}
	})
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

// Watch yields the guest's report, and another one whenever it changed. A reply
// without a report is a heartbeat: there is a turn at least every heartbeat, 0
// being DefaultWatchHeartbeat, and a guest that misses it by much has stopped. It
// is the caller's to lose patience, by the end of ctx. A watch has no end of its
// own: the last turn has an error. Leaving the loop ends the connection, which
// serves nothing else meanwhile.
func (h Health) Watch(ctx context.Context, heartbeat time.Duration) iter.Seq2[WatchReply, error] {
	return watch(ctx, h.Client, MethodHealthWatch, heartbeat, func(d *Decoder) (WatchReply, bool, error) {
		var r WatchReply
		err := d.Decode(&r)
		return r, r.Report != nil, err
	})
}

// watch calls a method that has a report in its first reply and in any other.
func watch[R any](ctx context.Context, c *Client, method string, heartbeat time.Duration, decode func(*Decoder) (r R, report bool, err error)) iter.Seq2[R, error] {
	return func(yield func(R, error) bool) {
		var none R
		first := true
		for d, err := range c.CallMore(ctx, method, &WatchParams{Heartbeat: heartbeat}) {
			if err != nil {
				yield(none, typed(method, err))
				return
			}
			r, report, err := decode(d)
			if err == nil && first && !report {
				err = errNoReport
			}
			if err != nil {
				yield(none, fmt.Errorf("calling %s: %w: %w", method, ErrProtocol, err))
				return
			}
			if first = false; !yield(r, nil) {
				return
			}
		}
		yield(none, fmt.Errorf("calling %s: %w: %w", method, ErrProtocol, errWatchEnded))
	}
}

// Ping asks which boot and generation the guest is in, for a sign of life.
func (h Health) Ping(ctx context.Context) (PingResult, error) {
	return call[PingResult](ctx, h.Client, MethodHealthPing, nil)
}
