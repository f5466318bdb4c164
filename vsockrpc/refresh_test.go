package vsockrpc

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestRefreshDecode(t *testing.T) {
	for _, c := range []struct {
		into Unmarshaler
		doc  string
		want string // the error, or what was decoded
	}{
		{&ApplyParams{}, `{"refresh":"none"}`, "none 0s"},
		{&ApplyParams{}, `{"refresh":"auto","gate":1}`, "auto 1s"},
		{&ApplyParams{}, `{"gate":3600}`, " 1h0m0s"},
		{&ApplyParams{}, `{"gate":0}`, "byte 8: gate: is not from 1 to 3600 seconds"},
		{&ApplyParams{}, `{"gate":3601}`, "byte 8: gate: is not from 1 to 3600 seconds"},
		{&ApplyParams{}, `{"gate":-1}`, "byte 8: gate: is not from 1 to 3600 seconds"},
		{&ApplyParams{}, `{"gate":9223372036854775807}`, "byte 8: gate: is not from 1 to 3600 seconds"},
		{&ApplyParams{}, `{"gate":30,"refresh":"none"}`, "byte 21: gate needs a refresh other than none"},
		{&ApplyParams{}, `{"refresh":""}`, "byte 11: refresh: is not one of none, auto, reload, restart"},
		{&ApplyParams{}, `{"refresh":"Auto"}`, "byte 11: refresh: is not one of none, auto, reload, restart"},
		{&RemoveParams{}, `{"names":[],"refresh":"reload"}`, "reload"},
		{&RemoveParams{}, `{"names":[],"refresh":"x"}`, "byte 22: refresh: is not one of"},
		{&RemoveParams{}, `{"names":[],"gate":1}`, "byte 12: unknown key"},
		{&RollbackParams{}, `{"expectedGeneration":1,"refresh":"restart"}`, "restart"},
		{&RollbackParams{}, `{"refresh":"x"}`, "byte 11: refresh: is not one of"},
		{&RetryParams{}, `{"refresh":"auto","gate":30,"expectedGeneration":7}`, "auto 30s"},
		{&RetryParams{}, `{"refresh":"none","gate":30}`, "byte 25: gate needs a refresh other than none"},
		{&RefreshParams{}, `{}`, "[]  false"},
		{&RefreshParams{}, `{"names":["a"],"refresh":"reload","all":true}`, "[a] reload true"},
		{&RefreshParams{}, `{"refresh":"auto","names": []}`, "byte 27: names: is empty"},
		{&RefreshParams{}, `{"refresh":"none"}`, "byte 11: refresh: is not one of auto, reload, restart"},
		{&ListParams{}, `{}`, "false"},
		{&ListParams{}, `{"consumers":true}`, "true"},
		{&ListParams{}, `{"consumers":true,"x":1}`, "byte 18: unknown key"},
	} {
		var got string
		err := (&Decoder{buf: []byte(c.doc)}).Decode(c.into)
		switch p := c.into.(type) {
		case *ApplyParams:
			got = fmt.Sprint(p.Refresh, " ", p.Gate)
		case *RemoveParams:
			got = p.Refresh
		case *RollbackParams:
			got = p.Refresh
		case *RetryParams:
			got = fmt.Sprint(p.Refresh, " ", p.Gate)
		case *RefreshParams:
			got = fmt.Sprint(p.Names, " ", p.Refresh, " ", p.All)
		case *ListParams:
			got = fmt.Sprint(p.Consumers)
		}
		if err != nil {
			if strings.Trim(got, "[] 0sfale") != "" {
				t.Errorf("decoding %s gives %q and %v", c.doc, got, err)
			}
			got = err.Error()
		}
		if got != c.want && (err == nil || !strings.Contains(got, c.want)) {
			t.Errorf("decoding %s = %q, want %q", c.doc, got, c.want)
		}
	}
}

// What is left out is not on the wire.
func TestRefreshEncode(t *testing.T) {
	generation := int64(7)
	unit := Refreshed{Unit: "u", Action: ActionNone, Result: ResultSkipped, Detail: "masked"}
	for _, c := range []struct {
		from Marshaler
		want string
	}{
		{&ApplyParams{}, ``},
		{&ApplyParams{Refresh: RefreshAuto, Gate: 90 * time.Second}, `"refresh":"auto","gate":90`},
		{&RemoveParams{Names: []string{"a"}, Refresh: RefreshReload}, `"names":["a"],"refresh":"reload"`},
		{&RollbackParams{}, ``},
		{&RetryParams{Gate: time.Second, ExpectedGeneration: &generation}, `"gate":1,"expectedGeneration":7`},
		{&RefreshParams{Names: []string{}}, ``},
		{&ListParams{}, ``},
		{&ListResult{Waiting: []Waiting{}, Rejected: []Rejected{}, Entries: []Entry{}}, `"generation":0,"entries":[],"refusals":[]`},
		{&RefreshResult{}, `"generation":0,"units":[]`},
		{
			&RemoveResult{Units: []Refreshed{}, Progress: &Progress{Phase: PhaseWatching, Unit: &unit}},
			`"generation":0,"removed":[],"unchanged":[],"progress":{"phase":"watching","unit":{"unit":"u","action":"none","result":"skipped","state":"","detail":"masked"}}`,
		},
	} {
		var e Encoder
		c.from.EncodeTo(&e)
		if got := string(e.buf); got != c.want {
			t.Errorf("%T is encoded as %s, want %s", c.from, got, c.want)
		}
	}
}

// A call with Progress tells each step, and returns the last reply.
func TestProgress(t *testing.T) {
	s, _ := testServer()
	c := Credentials{Client: dialTest(t, serveUnix(t, s))}
	set := []Credential{{Name: "a", Value: value("v")}}
	r, err := c.Apply(t.Context(), &ApplyParams{Set: set, Refresh: RefreshAuto})
	if err != nil || len(r.Units) != 1 || r.Progress != nil {
		t.Errorf("Apply without Progress = %+v, %v", r, err)
	}
	var steps []string
	c.Progress = func(p Progress) {
		step := p.Phase + fmt.Sprint(p.WaitingFor)
		if p.Unit != nil {
			step += p.Unit.Unit + "=" + p.Unit.Result
		}
		steps = append(steps, step)
	}
	r, err = c.Apply(t.Context(), &ApplyParams{Set: set, Refresh: RefreshAuto})
	want := "applied[] refreshing[web.service] refreshing[]web.service=done"
	if err != nil || r.Generation != 2 || fmt.Sprint(r.Installed) != "[a]" || len(r.Units) != 1 || r.Progress != nil || strings.Join(steps, " ") != want {
		t.Errorf("Apply = %+v, %v, with %q, want %q", r, err, steps, want)
	}
	// An error ends it as any other call.
	steps = nil
	_, err = c.Apply(t.Context(), &ApplyParams{Set: set, Refresh: RefreshRestart, Gate: MinGate})
	if e, ok := errors.AsType[*RolledBackError](err); !ok || e.Generation != 4 || len(e.Units) != 1 || e.Problem != "web.service failed" || !e.Restored || len(steps) != 3 {
		t.Errorf("Apply = %v, with %q", err, steps)
	}
	// So do those that have nothing to tell.
	if r, err := c.Remove(t.Context(), &RemoveParams{Names: []string{"a"}}); err != nil || fmt.Sprint(r.Removed) != "[a]" {
		t.Errorf("Remove = %+v, %v", r, err)
	}
	if _, err := c.Rollback(t.Context(), &RollbackParams{}); !errors.As(err, new(*NoPreviousError)) {
		t.Errorf("Rollback = %v", err)
	}
	if _, err := c.Refresh(t.Context(), &RefreshParams{}); !errors.As(err, new(*NoSystemdError)) {
		t.Errorf("Refresh = %v", err)
	}
	if _, err := c.Retry(t.Context(), &RetryParams{}); !errors.As(err, new(*NothingRejectedError)) {
		t.Errorf("Retry = %v", err)
	}
	if l, err := c.ListConsumers(t.Context()); err != nil || l.ConsumersProblem == "" {
		t.Errorf("ListConsumers = %+v, %v", l, err)
	}
}

// Whatever a guest streams is a result or an error, and what it says in one is
// escaped.
func TestProgressHostile(t *testing.T) {
	result := `{"parameters":{"generation":1,"units":[]}}` + "\x00"
	step := func(phase string) string {
		return `{"parameters":{"generation":1,"units":[],"progress":{"phase":"` + phase + `"}},"continues":true}` + "\x00"
	}
	last := strings.ReplaceAll(step("watching"), `,"continues":true`, "")
	typed := func(name, parameters string) string {
		return `{"error":"` + CredentialsInterface + "." + name + `","parameters":` + parameters + "}\x00"
	}
	for s, want := range map[string]string{
		result:                     "",
		step("new") + result:       "", // a guest that is newer
		last:                       "progress and no result",
		step("applied") + last:     "progress and no result",
		step("applied") + "{}\x00": "generation: is missing",
		strings.Replace(result, "}}", `},"continues":true}`, 1) + step("applied") + result:              "a reply after the result",
		strings.Replace(step("x"), `"x"`, `7`, 1):                                                       "progress.phase: want a string, have a number",
		strings.Replace(step("x"), `"x"`, `"x","unit":{}`, 1):                                           "progress.unit.unit: is missing",
		typed("RolledBack", `{"generation":1,"units":[],"problem":"\u001b[2J\u202e","restored":false}`): `by generation 1: \x1b[2J\u202e; not every unit came back`,
		typed("RolledBack", `{"generation":1,"units":[{}],"problem":"","restored":true}`):               "parameters of io.guestagent.Credentials.RolledBack: ",
		typed("NoSystemd", `{"problem":"\n"}`):                                                          `cannot be reached: \n`,
		typed("NoSystemd", `{}`):                                                                        "problem: is missing",
		typed("GateInProgress", `{"generation":"x"}`):                                                   "generation: want a number, have a string",
		typed("GateInProgress", `{"generation":7}`):                                                     "generation 7 is on trial",
	} {
		steps := 0
		_, err := Credentials{Client: answer(t, s, true), Progress: func(Progress) { steps++ }}.Refresh(t.Context(), &RefreshParams{})
		if (err == nil) != (want == "") || err != nil && !strings.Contains(strings.ReplaceAll(err.Error(), "\n", "NEWLINE"), want) {
			t.Errorf("after %.90q: %v, want %q", s, err, want)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\x1b\u202e\n") {
			t.Errorf("after %.90q the error is raw: %q", s, err)
		}
		if got := strings.Count(s, `"progress":{"phase":"`); want == "" && steps != got {
			t.Errorf("after %.90q there were %d steps, want %d", s, steps, got)
		}
	}
	// Who did not ask for progress gets none.
	if _, err := (Credentials{Client: answer(t, last, true)}).Refresh(t.Context(), &RefreshParams{}); !errors.Is(err, ErrProtocol) {
		t.Errorf("Refresh = %v, want ErrProtocol", err)
	}
	if _, err := (Credentials{Client: answer(t, step("applied")+result, true)}).Refresh(t.Context(), &RefreshParams{}); !errors.Is(err, ErrProtocol) {
		t.Errorf("Refresh = %v, want ErrProtocol", err)
	}
}

// The parameters that have no values: nothing after an error, and what was
// decoded encodes to what decodes to the same.
func FuzzParams(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"names":["a"],"refresh":"auto","all":true}`, `{"refresh":"restart","gate":3600,"expectedGeneration":7}`,
		`{"names":["a"],"expectedGeneration":7,"forget":true,"refresh":"none"}`, `{"expectedGeneration":0,"refresh":"reload"}`, `{"consumers":true}`,
		`{"heartbeat":1}`, `{"heartbeat":3600}`, `{"heartbeat":0}`, `{"heartbeat":null}`, `{"refresh":"none","gate":1}`, `{"names":[]}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, fresh := range []func() any{
			func() any { return &RefreshParams{} }, func() any { return &RetryParams{} }, func() any { return &RemoveParams{} },
			func() any { return &RollbackParams{} }, func() any { return &ListParams{} }, func() any { return &WatchParams{} },
		} {
			v := fresh()
			d := Decoder{buf: []byte(s)}
			if v.(Unmarshaler).DecodeFrom(&d); d.Err() != nil {
				if !reflect.DeepEqual(v, fresh()) {
					t.Errorf("decoding %q = %+v, %v, want nothing", s, v, d.Err())
				}
				continue
			}
			var e Encoder
			e.raw("{")
			v.(Marshaler).EncodeTo(&e)
			e.raw("}")
			again := fresh()
			if err := (&Decoder{buf: e.buf}).Decode(again.(Unmarshaler)); err != nil || !reflect.DeepEqual(v, again) {
				t.Errorf("%q: %+v became %+v, %v", s, v, again, err)
			}
		}
	})
}
