package vsockrpc

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
)

func decodeApply(s string) (*ApplyParams, error) {
	p := &ApplyParams{}
	return p, (&Decoder{buf: []byte(s)}).Decode(p)
}

func TestApplyDecode(t *testing.T) {
	p, err := decodeApply(`{"set":[{"name":"a","text":"x\u0000\n"},{"data":"","name":"b","revision":"r","allowShadowed":true}],"prune":true,"expectedGeneration":0}`)
	if err != nil || len(p.Set) != 2 || string(p.Set[0].Value.Bytes()) != "x\x00\n" || p.Set[1].Value.Len() != 0 || !p.Set[1].AllowShadowed || !p.Prune || *p.ExpectedGeneration != 0 {
		t.Errorf("decoding = %+v, %v", p, err)
	}
	for doc, want := range map[string]string{
		`{"set":[{"name":"a"}]}`:                                              "set[0]: want exactly one of data and text",
		`{"set":[{"name":"a","text":"` + marker + `","data":""}]}`:            "set[0]: want exactly one of data and text",
		`{"set":[{"text":"` + marker + `"}]}`:                                 "set[0].name: is missing",
		`{"set":[{"name":"a","data":null}]}`:                                  "set[0]: want exactly one of data and text",
		`{"source":"local"}`:                                                  "source: is not one of push, provider",
		`{"source":""}`:                                                       "source: is not one of push, provider",
		`{"source":"` + marker + `"}`:                                         "source: is not one of push, provider",
		`{"partial":"provider"}`:                                              "partial: want a boolean, have a string",
		`{"expectedGeneration":-1}`:                                           "expectedGeneration: is negative",
		`{"set":[` + strings.Repeat(`{"name":"a","text":""},`, 1024) + `{}]}`: "set: has more than 1023 values",
	} {
		p, err := decodeApply(doc)
		if err == nil || !strings.Contains(err.Error(), want) || !errors.As(err, new(*DecodeError)) || p.Set != nil || strings.Contains(err.Error(), marker) {
			t.Errorf("decoding %.80s = %+v, %v, want %q", doc, p, err, want)
		}
	}
}

// What a provider says of its set, on the wire and off it.
func TestApplyProvider(t *testing.T) {
	for _, want := range []ApplyParams{
		{},
		{Source: credential.SourcePush, Ephemeral: true},
		{Source: credential.SourceProvider, Partial: true, Set: []Credential{{Name: "a", Rejected: true}, {Name: "b", AllowShadowed: true}}},
	} {
		var e Encoder
		e.raw("{")
		want.EncodeTo(&e)
		e.raw("}")
		got, err := decodeApply(string(e.buf))
		if err != nil || got.Source != want.Source || got.Partial != want.Partial || got.Ephemeral != want.Ephemeral || len(got.Set) != len(want.Set) {
			t.Fatalf("%s decodes to %+v, %v", e.buf, got, err)
		}
		for i, c := range want.Set {
			if got.Set[i].Rejected != c.Rejected || got.Set[i].AllowShadowed != c.AllowShadowed {
				t.Errorf("%s decodes to %+v", e.buf, got.Set[i])
			}
		}
		if want.Source == "" && string(e.buf) != "{}" {
			t.Errorf("nothing is encoded as %s", e.buf)
		}
	}
	// What does not decode is no refusal that a partial set goes without.
	p, err := decodeApply(`{"partial":true,"set":[{"name":"a","text":"x"},{"name":"b","data":"!"}]}`)
	if e, ok := errors.AsType[*RefusedError](err); !ok || len(e.Refusals) != 1 || p.Set != nil || p.Partial {
		t.Errorf("decoding a part = %+v, %v, want a RefusedError", p, err)
	}
	// Nor do refusals without partial stay in an answer where there are none.
	var e Encoder
	(&ApplyResult{Refusals: []credential.Refusal{}}).EncodeTo(&e)
	if strings.Contains(string(e.buf), "refusals") {
		t.Errorf("no refusals are encoded as %s", e.buf)
	}
}

// The hint holds for the longest of everything.
func TestApplySizeHint(t *testing.T) {
	generation := int64(-1 << 63)
	p := &ApplyParams{
		Prune: true, PrunePrefix: strings.Repeat("p", credential.MaxNameLen), ExpectedGeneration: &generation, Forget: true, DryRun: true,
		Refresh: RefreshRestart, Gate: MaxGate, Source: credential.SourceProvider, Partial: true, Ephemeral: true,
	}
	for range credential.MaxSetNames {
		p.Set = append(p.Set, Credential{Name: "n", Revision: "r", Value: value("v"), AllowShadowed: true, Rejected: true})
	}
	var e Encoder
	encodeCall(&e, MethodApply, p, true, false)
	if hint := p.sizeHint() + len(MethodApply) + 128; len(e.buf) > hint {
		t.Errorf("the message has %d bytes, the hint said %d", len(e.buf), hint)
	}
}

// What breaks the rules of a credential is refused by name, everything at once.
func TestApplyRefusals(t *testing.T) {
	large := base64.StdEncoding.EncodeToString(make([]byte, credential.MaxSize+1))
	fits := base64.StdEncoding.EncodeToString(make([]byte, credential.MaxSize))
	p, err := decodeApply(`{"set":[{"name":"` + marker + `/","text":""},{"data":"` + large + `","name":"large"},{"name":"bad","data":"` + marker + `!"},` +
		`{"name":"fits","data":"` + fits + `"},{"name":"textLarge","text":"` + strings.Repeat("x", credential.MaxSize+1) + `"},{"name":"ok","text":"y"}]}`)
	e, ok := errors.AsType[*RefusedError](err)
	var got []string
	if ok {
		for _, r := range e.Refusals {
			got = append(got, r.String())
		}
	}
	want := "badName: credential 1 of the set: not a credential name: byte 15 of 15 is '/'|" +
		"large: tooLarge: the value is larger than 1048576 bytes|bad: badBase64: data is not base64 with padding|" +
		"textLarge: tooLarge: the value is larger than 1048576 bytes"
	if strings.Join(got, "|") != want || p.Set != nil {
		t.Errorf("decoding = %v, %q, want %q", p, strings.Join(got, "|"), want)
	}
	if p, err := decodeApply(`{"set":[` + strings.Repeat(`{"name":"a","data":"`+fits+`"},`, 4) + `{"name":"b","text":""}]}`); err != nil || len(p.Set) != 5 {
		t.Errorf("a set of 4 MiB: %v", err)
	}
	_, err = decodeApply(`{"set":[` + strings.Repeat(`{"name":"a","data":"`+fits+`"},`, 4) + `{"name":"b","text":"y"},{"name":"c","text":"y"}]}`)
	if e, ok := errors.AsType[*RefusedError](err); !ok || len(e.Refusals) != 1 || e.Refusals[0].Reason != credential.ReasonTooLarge {
		t.Errorf("a set of more: %v", err)
	}
	_, err = decodeApply(`{"set":[` + strings.Repeat(`{"name":"/","text":""},`, 1000) + `{"name":"b","text":"y"}]}`)
	if e, ok := errors.AsType[*RefusedError](err); !ok || len(e.Refusals) != maxRefusals {
		t.Errorf("many refusals: %v", err)
	}
	names := `"` + strings.Repeat(`x","`, 1022) + `x"`
	if _, err := decodeApply(`{"remove":[` + names + `]}`); err != nil {
		t.Errorf("1,023 names to remove: %v", err)
	}
	if _, err := decodeApply(`{"set":[{"name":"a","text":""}],"remove":[` + names + `]}`); !errors.As(err, new(*RefusedError)) {
		t.Errorf("1,024 names to set and remove: %v", err)
	}
}

// After an error there is no value left, decoded or not.
func TestApplyWipes(t *testing.T) {
	var values []secret.Value
	for _, doc := range []string{
		`{"set":[{"name":"a","text":"` + marker + `"},{"name":"b","data":"AAAA"},{"name":"/","text":"` + marker + `"}]}`,
		`{"set":[{"name":"a","text":"` + marker + `"},{"name":"b","text":"` + marker + `"}],"unknown":1}`,
		`{"set":[{"name":"a","text":"` + marker + `","surplus":1}]}`,
	} {
		p := &spyApply{}
		if err := (&Decoder{buf: []byte(doc)}).Decode(p); err == nil {
			t.Errorf("decoding %s works", doc)
		}
		values = append(values, p.seen...)
		if len(p.Set) > 0 {
			t.Errorf("after the error there is a set: %+v", p.Set)
		}
	}
	for _, v := range values {
		if v.Len() > 0 {
			t.Errorf("a value of %d bytes is left", v.Len())
		}
	}
}

// spyApply keeps what was decoded before an error.
type spyApply struct {
	ApplyParams
	seen []secret.Value
}

func (p *spyApply) DecodeFrom(d *Decoder) {
	p.Set = make([]Credential, 0, 8)
	set := p.Set
	p.ApplyParams.DecodeFrom(d)
	for _, c := range set[:8] {
		p.seen = append(p.seen, c.Value)
	}
}

// The client writes the message into one buffer, which is empty afterwards.
func TestEncodeWipes(t *testing.T) {
	p := &ApplyParams{Set: []Credential{{Name: "a", Value: value(strings.Repeat(marker, 1000))}, {Name: "b", Value: value(strings.Repeat(marker, 70_000))}}}
	var e Encoder
	encodeCall(&e, MethodApply, p, false, false)
	buf := e.buf
	if hint := p.sizeHint() + len(MethodApply) + 128; cap(buf) != hint || len(buf) > hint {
		t.Errorf("the buffer grew to %d, the hint was %d", cap(buf), hint)
	}
	m, err := decodeCall(bytes.TrimSuffix(buf, []byte{0}))
	var got ApplyParams
	if err == nil {
		err = m.parameters.Decode(&got)
	}
	if err != nil || len(got.Set) != 2 || !got.Set[1].Value.Equal(p.Set[1].Value) {
		t.Errorf("what was encoded decodes to %v", err)
	}
	e.wipe()
	if len(bytes.Trim(buf, "\x00")) > 0 || e.buf != nil {
		t.Errorf("the buffer is not empty")
	}
	// Where it grows, nothing stays behind.
	var small Encoder
	small.Base64("a", value(strings.Repeat(marker, 10)))
	old := small.buf
	small.Base64("b", value(strings.Repeat(marker, 1000)))
	if len(bytes.Trim(old, "\x00")) > 0 {
		t.Errorf("the buffer before is not empty: %q", old)
	}
}

// No error and no log line shows what stood in any place of a message.
func TestNothingShowsSecrets(t *testing.T) {
	data := base64.StdEncoding.EncodeToString([]byte(marker))
	for _, doc := range []string{
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"%s/","text":"%s"}]}}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"a","text":"%s","revision":"%s","%s":"%s"}]}}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"a","data":"%s!"}]}}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"a","data":"%s","text":"%s"}],"prunePrefix":"%s"}}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":"%s"}}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"a","text":"%s"}],"remove":{"%s":"%s"}}}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"a","text":"%s"}],"expectedGeneration":"%s"}}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"foreign","text":"%s"}]}}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"a","text":"%s`,
		`{"method":"io.guestagent.Credentials.Apply","%s":"%s"}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"a","text":"%s"}],"source":"%s"}}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"a/","text":"%s"}],"partial":true}}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"a","text":"%s","rejected":"%s"}]}}`,
		`{"method":"io.guestagent.Health.Get","parameters":{"%s":"%s"}}`,
		`{"method":"io.guestagent.Health.Watch","more":true,"parameters":{"heartbeat":"%s"}}`,
		`{"method":"io.guestagent.Health.Watch","more":true,"parameters":{"%s":"%s"}}`,
		`{"method":"io.guestagent.Provider.Ring","parameters":{"%s":"%s"}}`,
		`{"method":"io.guestagent.Provider.Status","parameters":{"%s":"%s"}}`,
		`{"method":"io.guestagent.Credentials.Remove","parameters":{"names":["%s",1]}}`,
		`{"method":"io.guestagent.Credentials.Apply","parameters":{"set":[{"name":"a","text":"%s"}],"refresh":"%s"}}`,
		`{"method":"io.guestagent.Credentials.Refresh","parameters":{"names":["%s",1]}}`,
		`{"method":"io.guestagent.Credentials.Retry","parameters":{"refresh":"auto","%s":"%s"}}`,
		`{"method":"%s","parameters":{"set":[{"name":"a","text":"%s"}]}}`,
		`{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"%s"}}`,
		`"%s"`, `%s`, `{"%s`,
	} {
		for _, s := range []string{marker, data} {
			args := make([]any, strings.Count(doc, "%s"))
			for i := range args {
				args[i] = s
			}
			server, _ := testServer()
			log := &logBuffer{}
			server.Log = log.logger()
			c := serve(t, server).dial()
			send(t, c, fmt.Sprintf(doc, args...)+"\n")
			answer := readMessage(t, c)
			_ = c.Close()
			if !strings.Contains(answer, `"error"`) {
				t.Errorf("%s is answered with %s", doc, answer)
			}
			for what, text := range map[string]string{"answer": answer, "log": log.String()} {
				if strings.Contains(text, marker) || strings.Contains(text, data[:8]) {
					t.Errorf("%s: the %s has content: %s", doc, what, text)
				}
			}
		}
	}
}

func FuzzApply(f *testing.F) {
	f.Add(`{"set":[{"name":"a","text":"x"},{"name":"b","data":"AAAA","revision":"r","allowShadowed":true}],"remove":["c"],"prune":true,"prunePrefix":"p","expectedGeneration":7,"forget":true,"dryRun":true,"refresh":"auto","gate":30}`)
	f.Add(`{"set":[{"name":"a","text":"x","rejected":true}],"source":"provider","partial":true,"ephemeral":true}`)
	f.Add(`{"source":"push","partial":false}`)
	f.Add(`{"set":[{"name":"a/","text":"x"}]}`)
	f.Add(`{"set":null}`)
	f.Fuzz(func(t *testing.T, s string) {
		p, err := decodeApply(s)
		if err != nil {
			if p.Set != nil || p.Remove != nil || p.Prune || p.ExpectedGeneration != nil || p.Source != "" || p.Partial || p.Ephemeral {
				t.Errorf("decoding %q = %+v, %v, want nothing", s, p, err)
			}
			return
		}
		// What was decoded goes over the wire and comes out the same.
		var e Encoder
		encodeCall(&e, MethodApply, p, false, false)
		if hint := p.sizeHint() + len(MethodApply) + 128; len(e.buf) > hint && !strings.ContainsRune(s, '\\') {
			t.Errorf("%q: the message has %d bytes, the hint said %d", s, len(e.buf), hint)
		}
		m, err := decodeCall(bytes.TrimSuffix(e.buf, []byte{0}))
		var again ApplyParams
		if err == nil {
			err = m.parameters.Decode(&again)
		}
		if err != nil || len(again.Set) != len(p.Set) || fmt.Sprint(again.Remove) != fmt.Sprint(p.Remove) || again.Prune != p.Prune || again.PrunePrefix != p.PrunePrefix || again.Refresh != p.Refresh || again.Gate != p.Gate ||
			again.Source != p.Source || again.Partial != p.Partial || again.Ephemeral != p.Ephemeral {
			t.Fatalf("%q: %+v became %+v, %v", s, p, again, err)
		}
		for i, c := range p.Set {
			if a := again.Set[i]; a.Name != c.Name || a.Revision != c.Revision || !a.Value.Equal(c.Value) || a.AllowShadowed != c.AllowShadowed || a.Rejected != c.Rejected {
				t.Errorf("%q: credential %d changed", s, i)
			}
		}
	})
}

func FuzzCall(f *testing.F) {
	f.Add([]byte(`{"method":"a.b.C","parameters":{"x":[1]},"more":true}`))
	f.Add([]byte(`{"parameters":null,"method":"org.varlink.service.GetInfo","oneway":true}`))
	f.Fuzz(func(t *testing.T, msg []byte) {
		c, err := decodeCall(msg)
		if err != nil {
			if c.name != "" || c.more || !errors.As(err, new(*DecodeError)) {
				t.Errorf("decodeCall(%q) = %+v, %v", msg, c, err)
			}
			return
		}
		if c.iface+"."+c.method != c.name || !validInterface(c.iface) || !validMember(c.method) {
			t.Errorf("decodeCall(%q) = %+v", msg, c)
		}
		d := c.parameters
		if d.Skip(); d.End() != nil {
			t.Errorf("decodeCall(%q): the parameters do not decode: %v", msg, d.Err())
		}
	})
}
