package vsockrpc

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestProviderOverUnix(t *testing.T) {
	s, _ := testServer()
	p := Provider{Client: dialTest(t, serveUnix(t, s))}
	err := p.Ring(t.Context())
	if e, ok := errors.AsType[*UnavailableError](err); !ok || e.Problem != "the guest does not answer" {
		t.Errorf("Ring = %v, want an UnavailableError", err)
	}
	if err := p.Ring(t.Context()); err != nil {
		t.Errorf("Ring again: %v", err)
	}
	got, err := p.Status(t.Context())
	if want := testStatus(); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("Status = %+v, %v, want %+v", got, err, want)
	}
	var e Encoder
	(&ProviderStatus{Name: "n", State: GuestWaiting}).EncodeTo(&e)
	if want := `"name":"n","target":"","state":"waiting","problem":"","since":"","lastContact":""`; string(e.buf) != want {
		t.Errorf("a status without a report is encoded as %s, want %s", e.buf, want)
	}
}

func TestProviderWatch(t *testing.T) {
	s, _ := testServer()
	p := Provider{Client: dialTest(t, serveUnix(t, s))}
	var got []string
	for r, err := range p.Watch(t.Context(), MinWatchHeartbeat) {
		if err != nil {
			t.Fatalf("Watch: %v", err)
		}
		if r.Status == nil {
			got = append(got, r.LastContact)
			continue
		}
		if got = append(got, r.Status.State); r.Status.State == GuestInForce {
			if want := testStatus(); !reflect.DeepEqual(r.Status, want) {
				t.Errorf("Watch yields %+v, want %+v", r.Status, want)
			}
			break
		}
	}
	if want := "waiting 2026-11-22T00:00:02Z inForce"; strings.Join(got, " ") != want {
		t.Errorf("Watch yields %q, want %q", got, want)
	}
}

// Whatever a provider streams is statuses and heartbeats, and then an error.
func TestProviderWatchHostile(t *testing.T) {
	status := `{"parameters":{"status":{"name":"n","target":"","state":"inForce","problem":"","since":"","lastContact":""}},"continues":true}` + "\x00"
	beat := `{"continues":true}` + "\x00"
	for s, want := range map[string]struct {
		turns int
		err   string
	}{
		"":                     {0, ""},
		status + beat + status: {3, "unexpected EOF"},
		beat + status:          {0, "a heartbeat where the first"},
		status + "{}\x00":      {2, "the watch has ended"},
		strings.Replace(status, `"since"`, `"new":[{}],"since"`, 1):                                {1, "unexpected EOF"},
		strings.Replace(status, `"since"`, `"clockOffset":1e30,"since"`, 1):                        {0, "status.clockOffset: "},
		strings.Replace(status, `"since"`, `"applies":{},"since"`, 1):                              {0, "status.applies.count: is missing"},
		`{"error":"org.varlink.service.MethodNotFound","parameters":{"method":"\u001b"}}` + "\x00": {0, "MethodNotFound"},
	} {
		turns := 0
		var last error
		for r, err := range (Provider{Client: answer(t, s, true)}).Watch(t.Context(), 0) {
			if last = err; err == nil {
				turns++
			} else if r.Status != nil {
				t.Errorf("after %.90q a status and %v", s, err)
			}
		}
		if turns != want.turns || last == nil || !strings.Contains(last.Error(), want.err) || strings.ContainsAny(last.Error(), "\x1b\n") {
			t.Errorf("after %.90q: %d turns and %v, want %d and %q", s, turns, last, want.turns, want.err)
		}
	}
}

// A histogram has no end that its sender chooses.
func TestProviderBuckets(t *testing.T) {
	for n, good := range map[int]bool{0: true, maxBuckets: true, maxBuckets + 1: false} {
		var e Encoder
		e.raw("{")
		(&ProviderStatus{Applies: &Applies{Buckets: make([]Bucket, n)}}).EncodeTo(&e)
		e.raw("}")
		var s ProviderStatus
		if err := (&Decoder{buf: e.buf}).Decode(&s); (err == nil) != good || good && len(s.Applies.Buckets) != n {
			t.Errorf("%d buckets are decoded to %+v, %v, want an error %v", n, s.Applies, err, !good)
		}
	}
}

// ringer answers a ring when it is told to, or its context ends.
func ringer(release <-chan struct{}) (s *Server, ended <-chan error) {
	ends := make(chan error, 1)
	s, _ = newServer(Interface{Name: ProviderInterface, Methods: map[string]Handler{
		"Ring": func(ctx context.Context, call *Call) error {
			select {
			case <-release:
				return call.Reply(nil)
			case <-ctx.Done():
				ends <- ctx.Err()
				return ctx.Err()
			}
		},
	}})
	return s, ends
}

// A guest may take long before its set is in force: no limit of a connection
// holds meanwhile, with more or without.
func TestRingWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		s, _ := ringer(release)
		l := serve(t, s)
		plain := l.dial()
		defer plain.Close()
		send(t, plain, `{"method":"io.guestagent.Provider.Ring"}`+"\n")
		c := NewClient(l.dial(), 0)
		defer c.Close()
		rung := make(chan error, 1)
		go func() { rung <- Provider{Client: c}.Ring(t.Context()) }()
		<-time.After(24 * time.Hour)
		synctest.Wait()
		if a := s.Activity(); a.Calls != 2 || a.Conns != 2 {
			t.Errorf("after a day %+v", a)
		}
		close(release)
		if err := <-rung; err != nil {
			t.Errorf("Ring = %v", err)
		}
		expect(t, plain, `{"parameters":{}}`)
		// Both connections are as good as new.
		send(t, plain, `{"method":"io.guestagent.Provider.Ring"}`+"\n")
		expect(t, plain, `{"parameters":{}}`)
		if err := (Provider{Client: c}).Ring(t.Context()); err != nil {
			t.Errorf("Ring again = %v", err)
		}
	})
}

// A guest that no longer waits is not waited for.
func TestRingHangUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ended := ringer(nil)
		c := NewClient(serve(t, s).dial(), 0)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := (Provider{Client: c}).Ring(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Ring = %v, want the end of its time", err)
		}
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the handler's context ended with %v", err)
		}
		synctest.Wait()
		if a := s.Activity(); a.Calls != 0 || a.Conns != 0 {
			t.Errorf("after the guest hung up %+v", a)
		}
	})
}

// Whatever rings back is an answer or an error, which is escaped.
func TestProviderHostile(t *testing.T) {
	for s, want := range map[string]string{
		"{}\x00":                                 "",
		`{"parameters":{"new":1}}` + "\x00":      "", // a provider that is newer
		`{"continues":true}` + "\x00" + "{}\x00": "a reply after the result",
		`{"continues":true}` + "\x00":            "unexpected EOF",
		`{"parameters":[]}` + "\x00":             "want an object, have an array",
		`{"error":"io.guestagent.Provider.Unavailable","parameters":{"problem":"\u001b[2J\u202e\n"}}` + "\x00": `cannot hand over its set now: \x1b[2J\u202e\n`,
		`{"error":"io.guestagent.Provider.Unavailable","parameters":{}}` + "\x00":                              "problem: is missing",
		`{"error":"org.varlink.service.PermissionDenied"}` + "\x00":                                            "PermissionDenied",
		"\x1b[31m\x00": "have no JSON",
	} {
		err := Provider{Client: answer(t, s, true)}.Ring(t.Context())
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("after %.90q: %v, want %q", s, err, want)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\x1b\u202e\n") {
			t.Errorf("after %.90q the error is raw: %q", s, err)
		}
	}
	for _, s := range []string{"{}\x00", `{"parameters":{"name":"n","target":"","state":7,"problem":"","since":"","lastContact":""}}` + "\x00"} {
		if got, err := (Provider{Client: answer(t, s, true)}).Status(t.Context()); got != nil || !errors.Is(err, ErrProtocol) {
			t.Errorf("after %.90q Status = %+v, %v, want ErrProtocol", s, got, err)
		}
	}
}
