package host

import (
	"errors"
	"fmt"
	"strings"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// The exit statuses of a program that did something to guests. 2, wrong usage,
// is the program's own.
const (
	StatusDone        = 0
	StatusFailed      = 1 // or refused
	StatusNotHealthy  = 3 // it was reached, and is not as it should be
	StatusUnreachable = 4
	StatusRolledBack  = 5 // by a gate
)

// A Code says in one word what went wrong with a guest. The words are part of
// --json: they are added to, never changed.
type Code string

// The codes there are. The first ones are the steps of reaching a guest.
const (
	CodeNoSocket    Code = "noSocket"    // no such socket or guest, or it may not be opened
	CodeNoListener  Code = "noListener"  // nobody listens there
	CodeNotVsockMux Code = "notVsockMux" // what answered CONNECT is no VMM
	CodePeerRefused Code = "peerRefused" // the agent hung up without a word
	CodeNoAnswer    Code = "noAnswer"    // there was none in time

	CodeNotHealthy         Code = "notHealthy"         // the guest says so of itself, or the host of it
	CodeRefused            Code = "refused"            // refusals say which credentials, and why
	CodeGenerationMismatch Code = "generationMismatch" // another generation is in force than the expected one
	CodeNoPrevious         Code = "noPrevious"         // nothing is kept to roll back to
	CodeRolledBack         Code = "rolledBack"         // a unit did not stand the gate, the values before are in force again
	CodeRefreshFailed      Code = "refreshFailed"      // what was asked for is in force, but not every unit was refreshed
	CodeGateInProgress     Code = "gateInProgress"     // another set is on trial
	CodeNothingRejected    Code = "nothingRejected"    // no set was rolled back by a gate
	CodeNoSystemd          Code = "noSystemd"          // a refresh was asked for, and systemd cannot be reached
	CodeAnswered           Code = "error"              // the agent answered with another error
	CodeBadAnswer          Code = "badAnswer"          // the answer makes no sense
	CodeInterrupted        Code = "interrupted"        // somebody stopped this program
	CodeNotTried           Code = "notTried"           // another guest had failed before
	CodeInternal           Code = "internal"           // anything else
)

// A Failure says what went wrong with a guest.
type Failure struct {
	Code Code `json:"code"`
	// Message is one line for people, fit for a terminal.
	Message string `json:"message"`
	// Refusals go with CodeRefused. They are the guest's words as they came.
	Refusals []credential.Refusal `json:"refusals,omitzero"`
	// Generation is the one in force, with CodeGenerationMismatch, and the one
	// on trial, with CodeGateInProgress.
	Generation *int64 `json:"generation,omitzero"`
	// Problem goes with CodeRolledBack and CodeNoSystemd. It is the guest's
	// words as they came.
	Problem string `json:"problem,omitzero"`
	// Restored says, with CodeRolledBack, whether every unit came back.
	Restored *bool `json:"restored,omitzero"`
}

var _ error = (*Failure)(nil)

func (f *Failure) Error() string { return f.Message }

// Status returns the exit status that the failure is worth.
func (f *Failure) Status() int {
	switch f.Code {
	case CodeNoSocket, CodeNoListener, CodeNotVsockMux, CodePeerRefused, CodeNoAnswer:
		return StatusUnreachable
	case CodeRolledBack:
		return StatusRolledBack
	case CodeNotHealthy:
		return StatusNotHealthy
	}
	return StatusFailed
}

// Status returns the exit status that an error of this package is worth.
func Status(err error) int {
	if f, ok := errors.AsType[*Failure](err); ok {
		return f.Status()
	}
	switch {
	case err == nil:
		return StatusDone
	case errors.Is(err, ErrUnknownVM):
		return StatusUnreachable
	}
	return StatusFailed
}

// maxDetail bounds what a message quotes of a guest, in bytes.
const maxDetail = 400

// A fate is what is known of a call that was not answered.
type fate int

const (
	fateUntouched fate = iota // nothing was changed
	fateUnknown               // the guest may have done what it was asked for
	fateBegun                 // the guest said that it had begun
)

// hint says what to do about it.
func (f fate) hint() string {
	switch f {
	case fateUnknown:
		return "; whether it was done is unknown: `guestctl list` tells"
	case fateBegun:
		return "; it was begun, and how it ended is unknown: `guestctl list` tells"
	}
	return ""
}

// failure is the one place where an error of vsockrpc becomes a Failure.
// Interrupted says that this program was stopped.
func failure(err error, fate fate, interrupted bool) *Failure {
	text := vsockrpc.Escape(err.Error(), 4*maxDetail)
	if e, ok := errors.AsType[*vsockrpc.ConnectError](err); ok {
		return connectFailure(e, fate)
	}
	if e, ok := errors.AsType[*vsockrpc.RefusedError](err); ok {
		f := &Failure{Code: CodeRefused, Refusals: e.Refusals, Message: fmt.Sprintf("%d credentials were refused; nothing was changed", len(e.Refusals))}
		if len(e.Refusals) == 1 {
			f.Message = "refused: " + vsockrpc.Escape(e.Refusals[0].String(), maxDetail) + "; nothing was changed"
		}
		return f
	}
	if e, ok := errors.AsType[*vsockrpc.GenerationMismatchError](err); ok {
		return &Failure{
			Code: CodeGenerationMismatch, Generation: &e.Generation,
			Message: text + "; nothing was changed: look at what is there with `guestctl list`, and expect that one",
		}
	}
	if _, ok := errors.AsType[*vsockrpc.NoPreviousError](err); ok {
		return &Failure{Code: CodeNoPrevious, Message: text + "; push the values that should be in force"}
	}
	if f := refreshAnswer(err); f != nil {
		return f
	}
	if e, ok := errors.AsType[*vsockrpc.Error](err); ok {
		return &Failure{Code: CodeAnswered, Message: answered(e)}
	}
	switch {
	case errors.Is(err, vsockrpc.ErrProtocol):
		return &Failure{Code: CodeBadAnswer, Message: text + fate.hint()}
	case interrupted:
		return &Failure{Code: CodeInterrupted, Message: "interrupted" + fate.hint()}
	}
	return &Failure{Code: CodeInternal, Message: text + fate.hint()}
}

// refreshAnswer is failure for the errors that refreshing brings; nil for any
// other.
func refreshAnswer(err error) *Failure {
	if e, ok := errors.AsType[*vsockrpc.RolledBackError](err); ok {
		f := &Failure{Code: CodeRolledBack, Generation: &e.Generation, Problem: e.Problem, Restored: &e.Restored}
		f.Message = fmt.Sprintf("rolled back: %s; the values before are in force again, as generation %d", vsockrpc.Escape(e.Problem, maxDetail), e.Generation)
		if !e.Restored {
			f.Message += ", but not every unit came back: `guestctl list` tells which"
		}
		f.Message += "; change the value, or `guestctl retry` tries the same once more"
		return f
	}
	if e, ok := errors.AsType[*vsockrpc.GateInProgressError](err); ok {
		return &Failure{
			Code: CodeGateInProgress, Generation: &e.Generation,
			Message: fmt.Sprintf("generation %d is on trial; nothing was changed: try again when its gate is through", e.Generation),
		}
	}
	if _, ok := errors.AsType[*vsockrpc.NothingRejectedError](err); ok {
		return &Failure{Code: CodeNothingRejected, Message: "there is nothing to retry: no set was rolled back by a gate, or its names were changed since"}
	}
	if e, ok := errors.AsType[*vsockrpc.NoSystemdError](err); ok {
		return &Failure{
			Code: CodeNoSystemd, Problem: e.Problem,
			Message: "the guest's systemd cannot be reached: " + vsockrpc.Escape(e.Problem, maxDetail) + "; nothing was changed: --refresh none changes the values alone",
		}
	}
	return nil
}

// Refreshed reports whether a unit runs on what is in force as far as it was
// asked to: it was refreshed, or passed over for a reason.
func Refreshed(u vsockrpc.Refreshed) bool {
	return u.Result == vsockrpc.ResultDone || u.Result == vsockrpc.ResultSkipped
}

// refreshFailure is the Failure of a call that was carried out, where a unit did
// not come up; nil if all did.
func refreshFailure(r *Result) *Failure {
	failed := 0
	var first vsockrpc.Refreshed
	for _, u := range r.Units {
		if !Refreshed(u) {
			if failed++; failed == 1 {
				first = u
			}
		}
	}
	f := &Failure{Code: CodeRefreshFailed}
	switch failed {
	case 0:
		return nil
	case 1:
		f.Message = fmt.Sprintf("%s was not refreshed", vsockrpc.Escape(first.Unit, maxDetail))
	default:
		f.Message = fmt.Sprintf("%d of %d units were not refreshed", failed, len(r.Units))
	}
	f.Message += fmt.Sprintf("; generation %d is in force all the same: `guestctl refresh` tries again, `guestctl rollback` puts the values before back", *r.Generation)
	return f
}

// connectFailure names the step that failed, and the way out.
func connectFailure(e *vsockrpc.ConnectError, fate fate) *Failure {
	f := &Failure{Code: CodeInternal}
	what, hint := "it cannot be reached", ""
	switch e.Step {
	case vsockrpc.StepSocket:
		f.Code, what, hint = CodeNoSocket, "no way to it", "does the VM run, and may this user open its socket?"
	case vsockrpc.StepListener:
		f.Code, what, hint = CodeNoListener, "nobody listens", "does guestagent.socket run in the guest?"
	case vsockrpc.StepHandshake:
		f.Code, what, hint = CodeNotVsockMux, "what answers is no VMM", "is that the socket of its vsock device?"
	case vsockrpc.StepRefused:
		f.Code, what, hint = CodePeerRefused, "it hung up without an answer", "it takes calls from root, over AF_VSOCK from a port below 1024 (peer.privilegedPort), and its journal tells whom it refused"
	case vsockrpc.StepAnswer:
		f.Code, what, hint = CodeNoAnswer, "no answer in time", "is the guest up? --timeout waits longer"
	}
	if fate != fateUntouched && e.Step == vsockrpc.StepAnswer {
		hint = strings.TrimPrefix(fate.hint(), "; ") + "; --timeout waits longer"
	}
	f.Message = what
	if e.Err != nil && e.Step != vsockrpc.StepAnswer {
		f.Message += ": " + vsockrpc.Escape(e.Err.Error(), maxDetail)
	}
	if hint != "" {
		f.Message += "; " + hint
	}
	return f
}

// answered says what an error means that any method may answer.
func answered(e *vsockrpc.Error) string {
	switch e.Name {
	case "org.varlink.service.PermissionDenied":
		return "the agent does not let this caller do that; the guest's journal tells why"
	case "org.varlink.service.InterfaceNotFound", "org.varlink.service.MethodNotFound", "org.varlink.service.MethodNotImplemented":
		return "the agent does not know the method: it is older than this guestctl, or not guestagent"
	case "org.varlink.service.InvalidParameter":
		return "the agent does not take what was asked: " + vsockrpc.Escape(e.Error(), maxDetail) + "; it may be older than this guestctl"
	case "io.guestagent.Busy":
		return "the agent has too many callers; try again later"
	case "io.guestagent.MessageTooLarge":
		return "the set is too large for the agent; push it in parts"
	case "io.guestagent.InternalError":
		return "the agent failed; the guest's journal tells why"
	}
	return fmt.Sprintf("the agent answered %s", vsockrpc.Escape(e.Error(), maxDetail))
}
