package vsockrpc

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The full names of what io.guestagent.Credentials has for refreshing.
const (
	MethodRefresh = CredentialsInterface + ".Refresh"
	MethodRetry   = CredentialsInterface + ".Retry"

	errGateInProgress  = CredentialsInterface + ".GateInProgress"
	errRolledBack      = CredentialsInterface + ".RolledBack"
	errNothingRejected = CredentialsInterface + ".NothingRejected"
	errNoSystemd       = CredentialsInterface + ".NoSystemd"
)

// How the consumers of what a call changes are refreshed: the words of the
// parameter refresh. Where it is left out, Refresh takes auto, and the other
// methods take what the guest's configuration says.
const (
	RefreshNone    = "none"    // not at all
	RefreshAuto    = "auto"    // reload where systemd then loads credentials anew, else restart
	RefreshReload  = "reload"  // reload, never restart
	RefreshRestart = "restart" // restart, never reload
)

// The bounds of a gate. On the wire it is whole seconds.
const (
	MinGate = time.Second
	MaxGate = time.Hour
)

// Heartbeat is the longest time between two replies of a call with more, while
// units are refreshed or watched.
const Heartbeat = 10 * time.Second

// The ways of [Consumer].
const (
	WayFile        = "file"        // LoadCredential=NAME, found in the store
	WayPath        = "path"        // LoadCredential=NAME:PATH
	WayImport      = "import"      // ImportCredential=
	WaySocket      = "socket"      // LoadCredential=NAME:SOCKET, served by the agent
	WayEnvironment = "environment" // EnvironmentFile=, read at the start only
)

// What a [Consumer] has loaded.
const (
	LoadedInForce  = "inForce"
	LoadedPrevious = "previous"
	LoadedUnknown  = "unknown"
	LoadedNone     = "none" // it does not run
)

// The actions of [Refreshed], and how a [Consumer] would be refreshed.
const (
	ActionReload  = "reload"
	ActionRestart = "restart"
	ActionNone    = "none"
)

// The results of [Refreshed]. All but skipped are systemd's, of a job.
const (
	ResultDone       = "done"
	ResultFailed     = "failed"
	ResultCanceled   = "canceled"
	ResultTimeout    = "timeout"
	ResultDependency = "dependency"
	ResultSkipped    = "skipped" // the detail says why
)

// The phases of [Progress].
const (
	PhaseApplied     = "applied"     // the set is in force
	PhaseRefreshing  = "refreshing"  // its consumers are reloaded and restarted
	PhaseWatching    = "watching"    // the gate
	PhaseRollingBack = "rollingBack" // what was in force before is put back
)

// A Consumer is a unit that loads a credential. Its words are the guest's.
type Consumer struct {
	Unit        string `json:"unit"`
	ActiveState string `json:"activeState"`
	// As is the name that the unit knows the credential by.
	As  string `json:"as"`
	Way string `json:"way"`
	// Revision is that of the value it runs with, empty if unknown.
	Revision string `json:"revision"`
	Loaded   string `json:"loaded"`
	Stale    bool   `json:"stale"`
	// Refresh is the action that would refresh it. If none, Detail says why.
	Refresh string `json:"refresh"`
	Detail  string `json:"detail"`
}

// A Waiting is a unit that waits on the credentials socket for a name.
type Waiting struct {
	Unit string `json:"unit"`
	Name string `json:"name"`
	// Since is a time of RFC 3339.
	Since string `json:"since"`
}

// A Rejected is a set that its gate rolled back. It is kept until another set
// changes the same names, or Retry.
type Rejected struct {
	Generation int64 `json:"generation"`
	// At is a time of RFC 3339.
	At      string   `json:"at"`
	Names   []string `json:"names"`
	Problem string   `json:"problem"`
}

// A Refreshed is a unit that was refreshed, or was not and why.
type Refreshed struct {
	Unit   string `json:"unit"`
	Action string `json:"action"`
	Result string `json:"result"`
	// State is one line on the unit afterwards.
	State  string `json:"state"`
	Detail string `json:"detail"`
}

// A Progress is what a call with more tells before its result.
type Progress struct {
	Phase string `json:"phase"`
	// Unit has just ended its refresh; nil in a heartbeat.
	Unit *Refreshed `json:"unit,omitzero"`
	// WaitingFor are the units that are waited for. Beside Unit it may be left
	// out: they are those that were told before, without that one.
	WaitingFor []string `json:"waitingFor,omitzero"`
}

// RefreshParams are the parameters of Refresh.
type RefreshParams struct {
	// Names are those whose consumers are meant; none means all names.
	Names []string
	// Refresh is empty, auto, reload or restart.
	Refresh string
	// All refreshes running consumers that are not stale, too.
	All bool
}

// RetryParams are the parameters of Retry.
type RetryParams struct {
	// Refresh is empty, none, auto, reload or restart.
	Refresh string
	// Gate is in whole seconds, from MinGate to MaxGate. 0 is no gate.
	Gate               time.Duration
	ExpectedGeneration *int64
}

// RefreshResult is what Refresh answers.
type RefreshResult struct {
	Generation int64       `json:"generation"`
	Units      []Refreshed `json:"units"`
	// Progress is nil in the last reply.
	Progress *Progress `json:"progress,omitzero"`
}

// A GateInProgressError says that a set is on trial.
type GateInProgressError struct {
	Generation int64
}

// A RolledBackError says that a set was applied, that a consumer did not stand
// its gate, and that what was in force before is in force again, as Generation.
type RolledBackError struct {
	Generation int64
	Units      []Refreshed
	Problem    string
	// Restored says whether every consumer came back.
	Restored bool
}

// A NothingRejectedError says that there is no set to retry.
type NothingRejectedError struct{}

// A NoSystemdError says that a refresh was asked for, that systemd cannot be
// reached, and that nothing was changed.
type NoSystemdError struct {
	Problem string
}

var (
	_ wireType = (*GateInProgressError)(nil)
	_ wireType = (*RolledBackError)(nil)
	_ wireType = (*NothingRejectedError)(nil)
	_ wireType = (*NoSystemdError)(nil)
)

func (e *GateInProgressError) Error() string {
	return fmt.Sprintf("generation %d is on trial", e.Generation)
}

// Error returns the problem in one line. It is a guest's words: it is escaped
// and bounded.
func (e *RolledBackError) Error() string {
	s := fmt.Sprintf("the set was rolled back, by generation %d: %s", e.Generation, Escape(e.Problem, maxQuoted))
	if !e.Restored {
		s += "; not every unit came back"
	}
	return s
}

func (*NothingRejectedError) Error() string { return "no set was rejected" }

// Error returns the problem in one line. It is a guest's words: it is escaped
// and bounded.
func (e *NoSystemdError) Error() string {
	return "the guest's systemd cannot be reached: " + Escape(e.Problem, maxQuoted)
}

// WireName returns the error's full name.
func (*GateInProgressError) WireName() string { return errGateInProgress }

// WireName returns the error's full name.
func (*RolledBackError) WireName() string { return errRolledBack }

// WireName returns the error's full name.
func (*NothingRejectedError) WireName() string { return errNothingRejected }

// WireName returns the error's full name.
func (*NoSystemdError) WireName() string { return errNoSystemd }

var (
	refreshFields = NewFields("names?", "refresh?", "all?")
	retryFields   = NewFields("refresh?", "gate?", "expectedGeneration?")

	refreshResultFields  = NewFields("generation", "units", "progress?").Open()
	consumerFields       = NewFields("unit", "activeState", "as", "way", "revision", "loaded", "stale", "refresh", "detail").Open()
	waitingFields        = NewFields("unit", "name", "since").Open()
	rejectedFields       = NewFields("generation", "at", "names", "problem").Open()
	refreshedFields      = NewFields("unit", "action", "result", "state", "detail").Open()
	progressFields       = NewFields("phase", "unit?", "waitingFor?").Open()
	gateInProgressFields = NewFields("generation").Open()
	rolledBackFields     = NewFields("generation", "units", "problem", "restored").Open()
	noSystemdFields      = NewFields("problem").Open()
)

// decodeWord reads one of the words.
func decodeWord(d *Decoder, words ...string) string {
	s := d.String(maxNameLen)
	if d.Err() == nil && !slices.Contains(words, s) {
		d.Invalid("is not one of " + strings.Join(words, ", "))
		return ""
	}
	return s
}

// decodeSetRefresh reads how the consumers of a set are refreshed.
func decodeSetRefresh(d *Decoder) string {
	return decodeWord(d, RefreshNone, RefreshAuto, RefreshReload, RefreshRestart)
}

func decodeGate(d *Decoder) time.Duration { return decodeSeconds(d, MinGate, MaxGate) }

// decodeSeconds reads whole seconds.
func decodeSeconds(d *Decoder, least, most time.Duration) time.Duration {
	n := d.Int()
	if low, high := int64(least/time.Second), int64(most/time.Second); n < low || n > high {
		d.Invalid(fmt.Sprintf("is not from %d to %d seconds", low, high))
		return 0
	}
	return time.Duration(n) * time.Second
}

// checkGate refuses a gate that has nothing to watch.
func checkGate(d *Decoder, gate time.Duration, refresh string) {
	if gate != 0 && refresh == RefreshNone {
		d.Invalid("gate needs a refresh other than none")
	}
}

func encodeGate(e *Encoder, gate time.Duration) {
	if gate != 0 {
		e.Int("gate", int64(gate/time.Second))
	}
}

// EncodeTo encodes the parameters of Refresh.
func (p *RefreshParams) EncodeTo(e *Encoder) {
	optStrings(e, "names", p.Names)
	e.OptString("refresh", p.Refresh)
	e.OptBool("all", p.All)
}

// DecodeFrom decodes the parameters of Refresh. An empty list of names is an
// error: whoever has none to name does not mean all of them.
func (p *RefreshParams) DecodeFrom(d *Decoder) {
	d.Object(refreshFields, func(key string) {
		switch key {
		case "names":
			at := d.pos
			if p.Names = decodeNames(d); len(p.Names) == 0 {
				d.failAt(at, "is empty")
			}
		case "refresh":
			p.Refresh = decodeWord(d, RefreshAuto, RefreshReload, RefreshRestart)
		case "all":
			p.All = d.Bool()
		}
	})
	reset(d, p)
}

// EncodeTo encodes the parameters of Retry.
func (p *RetryParams) EncodeTo(e *Encoder) {
	e.OptString("refresh", p.Refresh)
	encodeGate(e, p.Gate)
	optInt(e, "expectedGeneration", p.ExpectedGeneration)
}

// DecodeFrom decodes the parameters of Retry.
func (p *RetryParams) DecodeFrom(d *Decoder) {
	d.Object(retryFields, func(key string) {
		switch key {
		case "refresh":
			p.Refresh = decodeSetRefresh(d)
		case "gate":
			p.Gate = decodeGate(d)
		case "expectedGeneration":
			p.ExpectedGeneration = decodeGeneration(d)
		}
	})
	checkGate(d, p.Gate, p.Refresh)
	reset(d, p)
}

// EncodeTo encodes the result.
func (r *RefreshResult) EncodeTo(e *Encoder) {
	e.Int("generation", r.Generation)
	encodeUnits(e, r.Units)
	encodeProgress(e, r.Progress)
}

// DecodeFrom decodes the result.
func (r *RefreshResult) DecodeFrom(d *Decoder) {
	d.Object(refreshResultFields, func(key string) {
		switch key {
		case "generation":
			r.Generation = d.Int()
		case "units":
			r.Units = decodeUnits(d)
		case "progress":
			r.Progress = decodeProgress(d)
		}
	})
	reset(d, r)
}

func encodeUnits(e *Encoder, units []Refreshed) {
	e.Array("units", len(units), func(i int) { encodeRefreshed(e, &units[i]) })
}

func encodeOptUnits(e *Encoder, units []Refreshed) {
	if len(units) > 0 {
		encodeUnits(e, units)
	}
}

func encodeRefreshed(e *Encoder, u *Refreshed) {
	e.String("unit", u.Unit)
	e.String("action", u.Action)
	e.String("result", u.Result)
	e.String("state", u.State)
	e.String("detail", u.Detail)
}

func decodeUnits(d *Decoder) []Refreshed {
	units := []Refreshed{}
	d.Array(maxListed, func(int) { units = append(units, decodeRefreshed(d)) })
	return units
}

func decodeRefreshed(d *Decoder) Refreshed {
	var u Refreshed
	d.Object(refreshedFields, func(key string) {
		s := d.String(maxLine)
		switch key {
		case "unit":
			u.Unit = s
		case "action":
			u.Action = s
		case "result":
			u.Result = s
		case "state":
			u.State = s
		case "detail":
			u.Detail = s
		}
	})
	return u
}

func encodeProgress(e *Encoder, p *Progress) {
	if p == nil {
		return
	}
	e.Object("progress", func() {
		e.String("phase", p.Phase)
		if p.Unit != nil {
			e.Object("unit", func() { encodeRefreshed(e, p.Unit) })
		}
		optStrings(e, "waitingFor", p.WaitingFor)
	})
}

func decodeProgress(d *Decoder) *Progress {
	var p Progress
	d.Object(progressFields, func(key string) {
		switch key {
		case "phase":
			p.Phase = d.String(maxLine)
		case "unit":
			u := decodeRefreshed(d)
			p.Unit = &u
		case "waitingFor":
			p.WaitingFor = listed(d)
		}
	})
	return &p
}

func encodeConsumers(e *Encoder, consumers []Consumer) {
	if len(consumers) == 0 {
		return
	}
	e.Array("consumers", len(consumers), func(i int) {
		c := &consumers[i]
		e.String("unit", c.Unit)
		e.String("activeState", c.ActiveState)
		e.String("as", c.As)
		e.String("way", c.Way)
		e.String("revision", c.Revision)
		e.String("loaded", c.Loaded)
		e.Bool("stale", c.Stale)
		e.String("refresh", c.Refresh)
		e.String("detail", c.Detail)
	})
}

func decodeConsumers(d *Decoder) []Consumer {
	consumers := []Consumer{}
	d.Array(maxListed, func(int) {
		var c Consumer
		d.Object(consumerFields, func(key string) {
			switch key {
			case "unit":
				c.Unit = d.String(maxLine)
			case "activeState":
				c.ActiveState = d.String(maxLine)
			case "as":
				c.As = d.String(maxLine)
			case "way":
				c.Way = d.String(maxLine)
			case "revision":
				c.Revision = d.String(maxLine)
			case "loaded":
				c.Loaded = d.String(maxLine)
			case "stale":
				c.Stale = d.Bool()
			case "refresh":
				c.Refresh = d.String(maxLine)
			case "detail":
				c.Detail = d.String(maxLine)
			}
		})
		consumers = append(consumers, c)
	})
	return consumers
}

func encodeWaiting(e *Encoder, waiting []Waiting) {
	if len(waiting) == 0 {
		return
	}
	e.Array("waiting", len(waiting), func(i int) {
		e.String("unit", waiting[i].Unit)
		e.String("name", waiting[i].Name)
		e.String("since", waiting[i].Since)
	})
}

func decodeWaiting(d *Decoder) []Waiting {
	waiting := []Waiting{}
	d.Array(maxListed, func(int) {
		var w Waiting
		d.Object(waitingFields, func(key string) {
			switch key {
			case "unit":
				w.Unit = d.String(maxLine)
			case "name":
				w.Name = d.String(maxLine)
			case "since":
				w.Since = d.String(maxLine)
			}
		})
		waiting = append(waiting, w)
	})
	return waiting
}

func encodeRejected(e *Encoder, rejected []Rejected) {
	if len(rejected) == 0 {
		return
	}
	e.Array("rejected", len(rejected), func(i int) {
		r := &rejected[i]
		e.Int("generation", r.Generation)
		e.String("at", r.At)
		e.Strings("names", r.Names)
		e.String("problem", r.Problem)
	})
}

func decodeRejected(d *Decoder) []Rejected {
	rejected := []Rejected{}
	d.Array(maxListed, func(int) {
		var r Rejected
		d.Object(rejectedFields, func(key string) {
			switch key {
			case "generation":
				r.Generation = d.Int()
			case "at":
				r.At = d.String(maxLine)
			case "names":
				r.Names = listed(d)
			case "problem":
				r.Problem = d.String(maxLine)
			}
		})
		rejected = append(rejected, r)
	})
	return rejected
}

// EncodeTo encodes the error's parameters.
func (e *GateInProgressError) EncodeTo(enc *Encoder) { enc.Int("generation", e.Generation) }

// DecodeFrom decodes the error's parameters.
func (e *GateInProgressError) DecodeFrom(d *Decoder) {
	d.Object(gateInProgressFields, func(string) { e.Generation = d.Int() })
	reset(d, e)
}

// EncodeTo encodes the error's parameters.
func (e *RolledBackError) EncodeTo(enc *Encoder) {
	enc.Int("generation", e.Generation)
	encodeUnits(enc, e.Units)
	enc.String("problem", e.Problem)
	enc.Bool("restored", e.Restored)
}

// DecodeFrom decodes the error's parameters.
func (e *RolledBackError) DecodeFrom(d *Decoder) {
	d.Object(rolledBackFields, func(key string) {
		switch key {
		case "generation":
			e.Generation = d.Int()
		case "units":
			e.Units = decodeUnits(d)
		case "problem":
			e.Problem = d.String(maxLine)
		case "restored":
			e.Restored = d.Bool()
		}
	})
	reset(d, e)
}

// EncodeTo encodes nothing.
func (*NothingRejectedError) EncodeTo(*Encoder) {}

// DecodeFrom decodes an object without parameters.
func (*NothingRejectedError) DecodeFrom(d *Decoder) { d.Object(noFields, func(string) {}) }

// EncodeTo encodes the error's parameters.
func (e *NoSystemdError) EncodeTo(enc *Encoder) { enc.String("problem", e.Problem) }

// DecodeFrom decodes the error's parameters.
func (e *NoSystemdError) DecodeFrom(d *Decoder) {
	d.Object(noSystemdFields, func(string) { e.Problem = d.String(maxLine) })
	reset(d, e)
}

// A streamed result says whether it is the last one.
type streamed interface {
	progress() *Progress
}

func (r *ApplyResult) progress() *Progress    { return r.Progress }
func (r *RemoveResult) progress() *Progress   { return r.Progress }
func (r *RollbackResult) progress() *Progress { return r.Progress }
func (r *RefreshResult) progress() *Progress  { return r.Progress }

// errNoResult and errAfterResult are streams that are none of ours.
var (
	errNoResult    = errors.New("progress and no result")
	errAfterResult = errors.New("a reply after the result")
)
