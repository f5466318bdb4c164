package vsockrpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestCredentialsOverUnix(t *testing.T) {
	s, fake := testServer()
	c := Credentials{Client: dialTest(t, serveUnix(t, s))}
	big := bytes.Repeat([]byte{0, 1, 254, 255}, (1<<20)/4)
	r, err := c.Apply(t.Context(), &ApplyParams{Set: []Credential{{Name: "a", Revision: "r", Value: value(marker)}, {Name: "big", Value: value(string(big))}}})
	if err != nil || r.Generation != 1 || len(r.Installed) != 2 || r.Removed == nil {
		t.Errorf("Apply = %+v, %v", r, err)
	}
	if string(fake.values["a"]) != marker || !bytes.Equal(fake.values["big"], big) {
		t.Errorf("the values did not arrive")
	}
	list, err := c.List(t.Context())
	if err != nil || len(list.Entries) != 2 || list.Generation != 1 || list.Refusals == nil {
		t.Errorf("List = %+v, %v", list, err)
	}
	wrong := int64(7)
	_, err = c.Apply(t.Context(), &ApplyParams{ExpectedGeneration: &wrong})
	if e, ok := errors.AsType[*GenerationMismatchError](err); !ok || *e != (GenerationMismatchError{7, 1}) {
		t.Errorf("Apply to another generation = %v", err)
	}
	_, err = c.Apply(t.Context(), &ApplyParams{Set: []Credential{{Name: "foreign", Value: value(marker)}}})
	if e, ok := errors.AsType[*RefusedError](err); !ok || len(e.Refusals) != 1 || e.Refusals[0].Reason != "foreign" {
		t.Errorf("Apply of a foreign name = %v", err)
	}
	if _, err := c.Remove(t.Context(), &RemoveParams{Names: []string{"a"}}); err != nil {
		t.Errorf("Remove: %v", err)
	}
	if _, err := c.Rollback(t.Context(), &RollbackParams{}); !errors.As(err, new(*NoPreviousError)) {
		t.Errorf("Rollback = %v", err)
	}
}

func TestCallMore(t *testing.T) {
	s, _ := testServer()
	target := serveUnix(t, s)
	c := dialTest(t, target)
	for range 2 {
		var got []int64
		for d, err := range c.CallMore(t.Context(), "org.example.test.Count", nil) {
			if err != nil {
				t.Fatalf("CallMore: %v", err)
			}
			d.Object(NewFields("i"), func(string) { got = append(got, d.Int()) })
		}
		if fmt.Sprint(got) != "[0 1 2]" {
			t.Errorf("CallMore yields %v", got)
		}
	}
	turns := 0
	for _, err := range c.CallMore(t.Context(), "org.example.test.Fail", nil) {
		turns++
		if e, ok := errors.AsType[*Error](err); !ok || e.Name != errInternal {
			t.Errorf("CallMore yields %v", err)
		}
	}
	if turns != 1 {
		t.Errorf("CallMore yields %d times, want 1", turns)
	}
	if err := c.CallOneway(t.Context(), "org.example.test.Nothing", nil); err != nil {
		t.Errorf("CallOneway: %v", err)
	}
	// The end of the context ends a stream.
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	enough := errors.New("enough")
	var last error
	for _, err := range c.CallMore(ctx, "org.example.test.Stream", nil) {
		last = err
		cancel(enough)
	}
	if !errors.Is(last, enough) {
		t.Errorf("CallMore ends with %v", last)
	}
	if err := c.Call(t.Context(), "org.example.test.Nothing", nil, nil); !errors.Is(err, errBroken) {
		t.Errorf("Call afterwards = %v", err)
	}
	// So does leaving the loop.
	c = dialTest(t, target)
	for _, err := range c.CallMore(t.Context(), "org.example.test.Stream", nil) {
		if err != nil {
			t.Errorf("CallMore: %v", err)
		}
		break
	}
	if err := c.Call(t.Context(), "org.example.test.Nothing", nil, nil); !errors.Is(err, errBroken) {
		t.Errorf("Call after a loop that was left = %v", err)
	}
	c = dialTest(t, target)
	for _, err := range c.CallMore(t.Context(), "org.example.test.Nothing", nil) {
		if err != nil {
			t.Errorf("CallMore: %v", err)
		}
		break
	}
	if err := c.Call(t.Context(), "org.example.test.Nothing", nil, nil); err != nil {
		t.Errorf("Call after the last reply = %v", err)
	}
}

// answer makes a client whose server sends an answer to whatever comes, and
// then hangs up, or not.
func answer(t *testing.T, s string, hangUp bool) *Client {
	t.Helper()
	ours, theirs := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(io.Discard, theirs) })
	wg.Go(func() {
		_, _ = io.WriteString(theirs, s)
		if hangUp {
			_ = theirs.Close()
		}
	})
	t.Cleanup(func() {
		_ = ours.Close()
		_ = theirs.Close()
		wg.Wait()
	})
	return NewClient(ours, 1000)
}

// The guest is not trusted: whatever it answers is an error or a reply, and
// nothing in an error moves the cursor.
func TestClientHostileAnswers(t *testing.T) {
	reply := func(s string) string { return `{"parameters":` + s + "}\x00" }
	good := `"removed":[],"unchanged":[]`
	for s, want := range map[string]string{
		reply(`{"generation":1,` + good + `}`):                      "",
		reply(`{"generation":1,` + good + `,"new":{"a":[1,null]}}`): "", // a guest that is newer
		reply(`{"generation":1,"generation":2,` + good + `}`):       "byte 30: generation: the key stands twice",
		reply(`{"generation":"\u001b[31m",` + good + `}`):           "byte 28: generation: want a number, have a string",
		reply(`{"generation":1,"removed":[],"unchanged":null}`):     "byte 55: unchanged: want an array, have null",
		reply(`{"generation":1,"removed":[]}`):                      "byte 43: unchanged: is missing",
		reply(`[]`):                                                 "byte 14: parameters: want an object, have an array",
		"garbage\x1b[31m\x00":                                       "byte 0: want an object, have no JSON",
		`{"parameters":{},"x":1}` + "\x00":                          "byte 17: unknown key",
		`{"continues":true}` + "\x00":                               "more than one reply",
		`{"error":"a.b.C","continues":true}` + "\x00":               "an error that continues",
		`{"error":"\u001b[31mred"}` + "\x00":                        "byte 9: error: not the name of an error",
		`{"error":"no"}` + "\x00":                                   "byte 9: error: not the name of an error",
		`{}x` + "\x00":                                              "byte 2: something follows the end",
		strings.Repeat("x", 2000):                                   "message is too large: more than 1000 bytes",
		strings.Repeat(" ", 1001) + "\x00":                          "message is too large: more than 1000 bytes",
		reply(`{"a":` + strings.Repeat("[", 99)):                    "nested deeper than 8",
		`{"error":"io.guestagent.Credentials.Refused","parameters":{"refusals":7}}` + "\x00":                                                                     "parameters of io.guestagent.Credentials.Refused: byte 12: refusals: want an array, have a number",
		`{"error":"org.example.Odd","parameters":{"a":"\u001b[2J` + "\u202e" + strings.Repeat("x", 500) + `"}}` + "\x00":                                         `org.example.Odd {"a":"\u001b[2J\u202e`,
		`{"error":"io.guestagent.Credentials.Refused","parameters":{"refusals":[{"name":"\u001b[2J\u202ex","source":"","reason":"r","detail":"d\n"}]}}` + "\x00": `the set was refused: \x1b[2J\u202ex: r: d\n`,
	} {
		for _, hangUp := range []bool{true, false} {
			c := answer(t, s, hangUp)
			_, err := Credentials{Client: c}.Remove(t.Context(), &RemoveParams{})
			if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("after %.60q: %v, want %q", s, err, want)
			}
			if err != nil && (strings.ContainsAny(err.Error(), "\x1b\u202e\n") || len(err.Error()) > 400) {
				t.Errorf("after %.60q the error is raw or long: %q", s, err)
			}
			var wire *Error
			typed := errors.As(err, &wire) || errors.As(err, new(*RefusedError))
			if err != nil && !typed && !errors.Is(err, ErrProtocol) {
				t.Errorf("after %.60q: %v, want ErrProtocol", s, err)
			}
		}
	}
}

func TestClientHangUp(t *testing.T) {
	// Before any answer: that is what a refused peer sees.
	err := answer(t, "", true).Call(t.Context(), "a.b.C", nil, nil)
	if e, ok := errors.AsType[*ConnectError](err); !ok || e.Step != StepRefused {
		t.Errorf("Call = %v, want step %s", err, StepRefused)
	}
	err = answer(t, `{"para`, true).Call(t.Context(), "a.b.C", nil, nil)
	if e, ok := errors.AsType[*ConnectError](err); !ok || e.Step != StepRefused || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Call = %v, want step %s", err, StepRefused)
	}
	// After one: the connection was fine, and ended.
	c := answer(t, "{}\x00", true)
	if err := c.Call(t.Context(), "a.b.C", nil, nil); err != nil {
		t.Errorf("Call = %v", err)
	}
	if err := c.Call(t.Context(), "a.b.C", nil, nil); err == nil || errors.As(err, new(*ConnectError)) {
		t.Errorf("Call = %v, want no ConnectError", err)
	}
	// With a word: that is an Error, though the call could not be written.
	ours, theirs := net.Pipe()
	go func() {
		_, _ = theirs.Write([]byte(`{"error":"io.guestagent.Busy"}` + "\x00"))
		_ = theirs.Close()
	}()
	c = NewClient(halfConn{ours}, 0)
	if e, ok := errors.AsType[*Error](c.Call(t.Context(), "a.b.C", nil, nil)); !ok || e.Name != errBusy {
		t.Errorf("Call = %v, want %s", e, errBusy)
	}
	if err := c.Call(t.Context(), "a.b.C", nil, nil); !errors.Is(err, errBroken) {
		t.Errorf("Call afterwards = %v", err)
	}
}

// A halfConn cannot be written to.
type halfConn struct{ net.Conn }

func (halfConn) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestClientContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		go func() { _, _ = io.Copy(io.Discard, theirs) }()
		c := NewClient(ours, 0)
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if err := c.Call(gone, "a.b.C", nil, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("Call without time = %v", err)
		}
		// Nothing was sent, so the connection is good.
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		begin := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() { // it waits for its turn
			if err := c.Call(ctx, "a.b.D", nil, nil); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errBroken) {
				t.Errorf("the second Call = %v", err)
			}
		})
		err := c.Call(ctx, "a.b.C", nil, nil)
		if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errBroken) || time.Since(begin) != time.Minute {
			t.Errorf("Call = %v after %v", err, time.Since(begin))
		}
		wg.Wait()
		if err := c.Call(t.Context(), "a.b.C", nil, nil); !errors.Is(err, errBroken) {
			t.Errorf("Call afterwards = %v", err)
		}
	})
	c := answer(t, "", false)
	for _, method := range []string{"", "a", "a.B", "a.b.c", "a.b.", ".b.C", "1.b.C", "a..C", "a.-b.C", "a.b.C d", strings.Repeat("a", 300) + ".b.C"} {
		if err := c.Call(t.Context(), method, nil, nil); err == nil {
			t.Errorf("Call(%q) = nil", method)
		}
	}
}

func TestEscape(t *testing.T) {
	for s, want := range map[string]string{
		"plain é 😀": "plain é 😀", "\x1b[31m\x00\n\t\x7f": `\x1b[31m\x00\n\t\x7f`, "\xff\xc3": `\xff\xc3`, "\u202e\u2028\u00ad": `\u202e\u2028\u00ad`, "'\"\\": `'"\`,
	} {
		if got := Escape(s, 100); got != want {
			t.Errorf("Escape(%q) = %q, want %q", s, got, want)
		}
	}
	if got := Escape(strings.Repeat("\x1b", 100), 10); got != `\x1b\x1b…` {
		t.Errorf("Escape = %q", got)
	}
}

func FuzzReply(f *testing.F) {
	f.Add([]byte(`{"parameters":{"generation":1,"removed":[],"unchanged":[]}}`))
	f.Add([]byte(`{"error":"io.guestagent.Credentials.Refused","parameters":{"refusals":[{"name":"n","source":"s","reason":"r","detail":"d"}]}}`))
	f.Add([]byte(`{"parameters":{"generation":1,"entries":[{"name":"n","revision":"","size":1,"source":"","installedAt":"","state":"","path":""}],"refusals":[]},"continues":true}`))
	f.Add([]byte(`{"parameters":{"generation":1,"installed":[],"relabelled":[],"removed":[],"unchanged":[],"units":[{"unit":"u","action":"a","result":"r","state":"s","detail":"d"}],"progress":{"phase":"p","unit":{"unit":"u","action":"a","result":"r","state":"s","detail":"d"},"waitingFor":["u"]}},"continues":true}`))
	f.Add([]byte(`{"error":"io.guestagent.Credentials.RolledBack","parameters":{"generation":1,"units":[],"problem":"p","restored":true}}`))
	f.Add([]byte(`{"parameters":{"generation":1,"entries":[{"name":"n","revision":"","size":1,"source":"","installedAt":"","state":"","path":"","consumers":[{"unit":"u","activeState":"a","as":"n","way":"file","revision":"r","loaded":"inForce","stale":true,"refresh":"none","detail":"d"}]}],"refusals":[],"waiting":[{"unit":"u","name":"n","since":""}],"rejected":[{"generation":1,"at":"","names":["n"],"problem":"p"}],"gate":2,"consumersProblem":"p"}}`))
	f.Add([]byte(`{"parameters":{"generation":1,"installed":[],"relabelled":[],"removed":[],"unchanged":[],"refusals":[{"name":"n","source":"provider","reason":"managed","detail":"d"}]}}`))
	f.Add([]byte(`{"parameters":{"report":{"version":"v","bootId":"b","machineId":"m","generation":1,"gate":2,"entries":[{"name":"n","revision":"","size":1,"source":"","installedAt":"","state":"","path":"","ephemeral":true}],"refusals":[],"reasons":[{"code":"c","detail":"d","hint":"h"}],"rejected":[{"generation":1,"at":"","names":["n"],"problem":"p"}],"provider":{"address":"vsock:2:1021","state":"waiting","since":"","problem":"p"}}},"continues":true}`))
	f.Add([]byte(`{"parameters":{"bootId":"b","generation":1}}`))
	f.Add([]byte(`{"parameters":{"name":"n","target":"vsock:3","state":"inForce","problem":"","since":"","lastContact":"","report":null}}`))
	f.Add([]byte(`{"error":"io.guestagent.Provider.Unavailable","parameters":{"problem":"p"}}`))
	report := `"report":{"version":"v","bootId":"b","machineId":"m","generation":1,"entries":[],"refusals":[],"reasons":[{"code":"c","detail":"d","hint":"h","verdict":"degraded","unit":"u","credential":"n","since":""}],` +
		`"protocol":1,"verdict":"failing","time":"t","hostname":"h","uptime":7,"systemd":{"version":"257","state":"running","failed":[{"unit":"u","result":"exit-code","since":""}],"jobs":1},` +
		`"waiting":[{"unit":"u","name":"n","since":""}],"memory":{"total":2,"available":1},"pressure":{"cpu":{"some10":1,"some60":2,"some300":3,"full10":4,"full60":5,"full300":6},"io":null},` +
		`"disks":[{"path":"/","used":2,"available":1,"readOnly":true}],"load":{"load1":1,"load5":2,"load15":3},"unknown":["bus"]}`
	f.Add([]byte(`{"parameters":{` + report + `},"continues":true}`))
	f.Add([]byte(`{"parameters":{"time":"t"},"continues":true}`))
	f.Add([]byte(`{"parameters":{"lastContact":"t"},"continues":true}`))
	f.Add([]byte(`{"parameters":{"status":{"name":"n","target":"vsock:3","state":"inForce","problem":"","since":"","lastContact":"",` + report + `,"trimmed":true,"clockOffset":-7,` +
		`"applies":{"count":1,"refused":2,"rolledBack":3,"failed":4,"sum":5,"buckets":[{"le":10,"count":1}]}}},"continues":true}`))
	f.Fuzz(func(t *testing.T, msg []byte) {
		r, err := decodeReply(msg)
		if err != nil {
			if r.err != "" || r.raw != nil || r.continues {
				t.Errorf("decodeReply(%q) = %+v, %v", msg, r, err)
			}
			return
		}
		if text := (&Error{Name: r.err, Parameters: r.raw}).Error(); len(text) > maxNameLen+maxQuoted+8 || strings.ContainsAny(text, "\x1b\n\x00") {
			t.Errorf("decodeReply(%q): the error is %q", msg, text)
		}
		for _, v := range []Unmarshaler{&ApplyResult{}, &ListResult{}, &RemoveResult{}, &RollbackResult{}, &RefreshResult{}, &RefusedError{}, &GenerationMismatchError{}, &NoPreviousError{}, &GateInProgressError{}, &RolledBackError{}, &NothingRejectedError{}, &NoSystemdError{}, &GetResult{}, &WatchReply{}, &PingResult{}, &ProviderStatus{}, &ProviderWatchReply{}, &UnavailableError{}} {
			d := r.parameters
			if err := d.Decode(v); err != nil {
				continue
			}
			// What was decoded encodes to what decodes to the same.
			var first, second Encoder
			encodeReply(&first, "", v.(Marshaler), false)
			again, err := decodeReply(bytes.TrimSuffix(first.buf, []byte{0}))
			if err == nil {
				err = again.parameters.Decode(v)
			}
			encodeReply(&second, "", v.(Marshaler), false)
			if err != nil || !bytes.Equal(first.buf, second.buf) {
				t.Errorf("decodeReply(%q) as %T: %s, then %s, %v", msg, v, first.buf, second.buf, err)
			}
		}
	})
}
