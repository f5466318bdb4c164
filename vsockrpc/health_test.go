package vsockrpc

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
)

func TestHealthOverUnix(t *testing.T) {
	s, _ := testServer()
	target := serveUnix(t, s)
	h := Health{Client: dialTest(t, target)}
	if got, err := h.Ping(t.Context()); err != nil || got != (PingResult{"b1", 1}) {
		t.Errorf("Ping = %+v, %v", got, err)
	}
	want := testReport()
	want.Entries, want.Refusals = []Entry{}, []credential.Refusal{}
	if got, err := h.Get(t.Context()); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("Get = %+v, %v, want %+v", got, err, want)
	}
	var got []string
	for reply, err := range h.Watch(t.Context(), 0) {
		r := reply.Report
		if err != nil {
			t.Fatalf("Watch: %v", err)
		}
		if r == nil {
			got = append(got, "heartbeat")
			continue
		}
		if got = append(got, fmt.Sprint(r.Generation)); r.Generation == 2 {
			break
		}
	}
	if want := "1 heartbeat 2"; strings.Join(got, " ") != want {
		t.Errorf("Watch yields %q, want %q", got, want)
	}
	if _, err := h.Ping(t.Context()); !errors.Is(err, errBroken) {
		t.Errorf("Ping after a watch that was left = %v", err)
	}
	for _, heartbeat := range []time.Duration{-time.Second, MaxWatchHeartbeat + time.Second} {
		for reply, err := range (Health{Client: dialTest(t, target)}).Watch(t.Context(), heartbeat) {
			r := reply.Report
			if e, ok := errors.AsType[*Error](err); !ok || e.Name != errInvalidParameter || r != nil {
				t.Errorf("Watch with a heartbeat of %v yields %+v, %v", heartbeat, r, err)
			}
		}
	}
}

// What is left out is not on the wire, and a report has every list.
func TestHealthEncode(t *testing.T) {
	for _, c := range []struct {
		from Marshaler
		want string
	}{
		{&WatchParams{}, ``},
		{&WatchParams{Heartbeat: 90 * time.Second}, `"heartbeat":90`},
		{&WatchReply{}, ``},
		{&WatchReply{Time: "t"}, `"time":"t"`},
		{&Report{Rejected: []Rejected{}}, `"version":"","bootId":"","machineId":"","generation":0,"entries":[],"refusals":[],"reasons":[]`},
		{&WatchReply{Report: &Report{}}, `"report":{"version":"","bootId":"","machineId":"","generation":0,"entries":[],"refusals":[],"reasons":[]}`},
		{&PingResult{BootID: "b", Generation: 7}, `"bootId":"b","generation":7`},
	} {
		var e Encoder
		c.from.EncodeTo(&e)
		if got := string(e.buf); got != c.want {
			t.Errorf("%T is encoded as %s, want %s", c.from, got, c.want)
		}
	}
}

// No limit of a connection holds for a watch: it may be silent as long as its
// heartbeat is. When its caller goes, so does the handler.
func TestHealthWatchQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := testServer()
		h := Health{Client: NewClient(serve(t, s).dial(), 0)}
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		enough := errors.New("enough")
		begin, turns := time.Now(), 0
		var last error
		for reply, err := range h.Watch(ctx, MaxWatchHeartbeat) {
			r := reply.Report
			if last = err; err != nil {
				break
			}
			if turns++; turns <= 3 { // what the fake tells at once
				continue
			}
			if d := time.Since(begin); r != nil || reply.Time == "" || d != time.Duration(turns-3)*time.Hour {
				t.Errorf("turn %d is %+v, after %v", turns, r, d)
			}
			if turns == 6 {
				cancel(enough)
			}
		}
		if !errors.Is(last, enough) || turns != 6 {
			t.Errorf("the watch ended after %d turns with %v", turns, last)
		}
		synctest.Wait()
		if a := s.Activity(); a.Calls != 0 || a.Conns != 0 {
			t.Errorf("after the caller went %+v", a)
		}
	})
}

// Shutdown does not wait for a watch.
func TestHealthWatchShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := testServer()
		h := Health{Client: NewClient(serve(t, s).dial(), 0)}
		begin, turns := time.Now(), 0
		for reply, err := range h.Watch(t.Context(), 0) {
			r := reply.Report
			turns++
			switch {
			case turns == 3:
				go func() { _ = s.Shutdown(context.WithoutCancel(t.Context())) }()
			case turns == 4 && (r != nil || err == nil || time.Since(begin) != 0):
				t.Errorf("after the shutdown %+v, %v, after %v", r, err, time.Since(begin))
			}
		}
		if turns != 4 {
			t.Errorf("the watch had %d turns, want 4", turns)
		}
	})
}

// Whatever a guest streams is reports and heartbeats, and then an error.
func TestHealthHostile(t *testing.T) {
	report := `{"parameters":{"report":{"version":"v","bootId":"b","machineId":"m","generation":1,"entries":[],"refusals":[],"reasons":[]}},"continues":true}` + "\x00"
	beat := `{"continues":true}` + "\x00"
	for s, want := range map[string]struct {
		turns string
		err   string
	}{
		"":                                     {"", ""},
		report:                                 {"r", "unexpected EOF"},
		report + beat + report:                 {"r-r", "unexpected EOF"},
		beat + report:                          {"", "a heartbeat where the first report belongs"},
		report + "{}\x00":                      {"r-", "the watch has ended"},
		report + strings.Repeat(beat, 5) + "x": {"r-----", "unexpected EOF"},
		strings.Replace(report, `"v"`, `"v","new":{"a":[[[1]]]}`, 1):                                                          {"r", "unexpected EOF"}, // a guest that is newer
		strings.Replace(report, `"v"`, `7`, 1):                                                                                {"", "report.version: want a string, have a number"},
		strings.Replace(report, `"reasons":[]`, `"reasons":[{}]`, 1):                                                          {"", "report.reasons[0].code: is missing"},
		strings.Replace(report, `"reasons":[]`, `"reasons":null`, 1):                                                          {"", "report.reasons: want an array, have null"},
		strings.Replace(report, `"reasons":[]`, `"reasons":[],"provider":{}`, 1):                                              {"", "report.provider.address: is missing"},
		strings.Replace(report, `"reasons":[]`, `"reasons":[],"systemd":{"version":"","state":"","failed":[{}],"jobs":1}`, 1): {"", "report.systemd.failed[0].unit: is missing"},
		strings.Replace(report, `"reasons":[]`, `"reasons":[],"uptime":1e99`, 1):                                              {"", "report.uptime: "},
		strings.Replace(report, `"reasons":[]`, `"reasons":[],"disks":[{"path":"","used":1,"available":1,"readOnly":0}]`, 1):  {"", "report.disks[0].readOnly: want"},
		strings.Replace(report, `"reasons":[]`, `"reasons":[],"pressure":{"gpu":{},"cpu":{"some10":1}}`, 1):                   {"", "report.pressure.cpu.some60: is missing"},
		report + `{"error":"io.guestagent.InternalError"}` + "\x00":                                                           {"r", "io.guestagent.InternalError"},
		report + "\x1b[31m\x00": {"r", "have no JSON"},
	} {
		var got strings.Builder
		var last error
		for reply, err := range (Health{Client: answer(t, s, true)}).Watch(t.Context(), 0) {
			r := reply.Report
			switch {
			case last != nil:
				t.Errorf("after %.90q there is a turn after the error", s)
			case err != nil:
				if last = err; r != nil {
					t.Errorf("after %.90q a report and %v", s, err)
				}
			case r == nil:
				got.WriteString("-")
			default:
				got.WriteString("r")
			}
		}
		if got.String() != want.turns || last == nil || !strings.Contains(last.Error(), want.err) {
			t.Errorf("after %.90q: %q and %v, want %q and %q", s, got.String(), last, want.turns, want.err)
		}
		if last != nil && strings.ContainsAny(last.Error(), "\x1b\n") {
			t.Errorf("after %.90q the error is raw: %q", s, last)
		}
	}
	long := `{"version":"v","bootId":"b","machineId":"m","generation":1,"entries":[],"refusals":[],"reasons":[],"verdict":"` + strings.Repeat("x", maxLine+1) + `"}`
	if err := (&Decoder{buf: []byte(long)}).Decode(&Report{}); err == nil || !strings.Contains(err.Error(), "verdict: ") {
		t.Errorf("a report with a verdict of %d bytes is decoded with %v, want an error", maxLine+1, err)
	}
	for _, s := range []string{"{}\x00", `{"parameters":{"report":null}}` + "\x00", strings.ReplaceAll(report, `"b"`, `null`)} {
		if r, err := (Health{Client: answer(t, s, true)}).Get(t.Context()); r != nil || !errors.Is(err, ErrProtocol) {
			t.Errorf("after %.90q Get = %+v, %v, want ErrProtocol", s, r, err)
		}
	}
}

// A report's size is what it has on the wire.
func TestReportSize(t *testing.T) {
	for _, r := range []*Report{{}, testReport()} {
		var e Encoder
		e.Object("report", func() { r.EncodeTo(&e) })
		if want := len(e.buf) - len(`"report":`); r.Size() != want {
			t.Errorf("Size of %+v = %d, want %d", r, r.Size(), want)
		}
	}
}
