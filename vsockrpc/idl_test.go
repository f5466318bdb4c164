package vsockrpc

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// An idl is a parsed .varlink file, as far as ours go.
type idl struct {
	name    string
	types   map[string][]idlField
	methods map[string]idlMethod
	errors  map[string][]idlField
}

type idlMethod struct{ in, out []idlField }

type idlField struct {
	name, typ       string // typ without ? and []
	optional, array bool
}

var idlToken = regexp.MustCompile(`#[^\n]*|[A-Za-z][A-Za-z0-9.-]*|->|\[\]|[?():,]`)

// parseIDL parses what our files use of Varlink's notation, and fails on
// anything else. varlinkctl validate-idl checks them in the VMs.
func parseIDL(t *testing.T, text string) idl {
	t.Helper()
	p := idlParser{t: t}
	for _, tok := range idlToken.FindAllString(text, -1) {
		if !strings.HasPrefix(tok, "#") {
			p.tokens = append(p.tokens, tok)
		}
	}
	if rest := strings.TrimSpace(idlToken.ReplaceAllString(text, "")); rest != "" {
		t.Fatalf("the description has something else: %q", rest)
	}
	x := idl{types: map[string][]idlField{}, methods: map[string]idlMethod{}, errors: map[string][]idlField{}}
	p.want("interface")
	x.name = p.next()
	for len(p.tokens) > 0 {
		kind, name := p.next(), p.next()
		if !validMember(name) {
			t.Fatalf("%q is no name", name)
		}
		switch kind {
		case "type":
			x.types[name] = p.fields()
		case "error":
			x.errors[name] = p.fields()
		case "method":
			in := p.fields()
			p.want("->")
			x.methods[name] = idlMethod{in, p.fields()}
		default:
			t.Fatalf("%q is no definition", kind)
		}
	}
	return x
}

type idlParser struct {
	t      *testing.T
	tokens []string
}

func (p *idlParser) next() string {
	p.t.Helper()
	if len(p.tokens) == 0 {
		p.t.Fatal("the description ends early")
	}
	tok := p.tokens[0]
	p.tokens = p.tokens[1:]
	return tok
}

func (p *idlParser) want(s string) {
	p.t.Helper()
	if tok := p.next(); tok != s {
		p.t.Fatalf("%q where %q belongs", tok, s)
	}
}

func (p *idlParser) fields() []idlField {
	p.t.Helper()
	var fields []idlField
	p.want("(")
	if p.tokens[0] == ")" {
		p.next()
		return nil
	}
	for {
		f := idlField{name: p.next()}
		p.want(":")
		if p.tokens[0] == "?" {
			p.next()
			f.optional = true
		}
		if p.tokens[0] == "[]" {
			p.next()
			f.array = true
		}
		f.typ = p.next()
		fields = append(fields, f)
		if sep := p.next(); sep == ")" {
			return fields
		} else if sep != "," {
			p.t.Fatalf("%q between fields", sep)
		}
	}
}

// A sample is a document with fields, in the order of the description.
type sample [][2]string

func (s sample) String() string {
	parts := make([]string, 0, len(s))
	for _, f := range s {
		parts = append(parts, fmt.Sprintf("%q:%s", f[0], f[1]))
	}
	return "{" + strings.Join(parts, ",") + "}"
}

func (s sample) without(i int) sample { return slices.Delete(slices.Clone(s), i, i+1) }

func (s sample) with(i int, value string) sample {
	s = slices.Clone(s)
	s[i][1] = value
	return s
}

// sampleOf makes a document with every field. Of data and text, which exclude
// each other, it has data.
func (x idl) sampleOf(fields []idlField) sample {
	var s sample
	for _, f := range fields {
		var v string
		switch {
		case f.name == "text":
			continue
		case f.name == "data":
			v = `"aHVudGVyMmh1bnRlcjI="`
		case f.name == "refresh":
			v = `"auto"`
		case f.name == "source":
			v = `"provider"`
		case f.typ == "string":
			v = `"` + f.name + `"`
		case f.typ == "int":
			v = "7"
		case f.typ == "bool":
			v = "true"
		default:
			v = x.sampleOf(x.types[f.typ]).String()
		}
		if f.array {
			v = "[" + v + "]"
		}
		s = append(s, [2]string{f.name, v})
	}
	return s
}

// checkCodec checks that a Go type decodes and encodes just these fields.
func (x idl) checkCodec(t *testing.T, what string, fields []idlField, fresh func() any, open bool) {
	t.Helper()
	decode := func(s sample) (string, error) {
		v := fresh()
		if err := (&Decoder{buf: []byte(s.String())}).Decode(v.(Unmarshaler)); err != nil {
			return "", err
		}
		var e Encoder
		e.raw("{")
		v.(Marshaler).EncodeTo(&e)
		e.raw("}")
		return string(e.buf), nil
	}
	all := x.sampleOf(fields)
	if got, err := decode(all); err != nil || got != all.String() {
		t.Errorf("%s: %s becomes %s, %v", what, all, got, err)
	}
	if _, err := decode(append(slices.Clone(all), [2]string{"surplus", "1"})); (err == nil) != open {
		t.Errorf("%s: with a key too many: %v", what, err)
	}
	for i := range all {
		f := fields[slices.IndexFunc(fields, func(f idlField) bool { return f.name == all[i][0] })]
		// Data is optional only where there is text.
		optional := f.optional && f.name != "data"
		if _, err := decode(all.without(i)); (err == nil) != optional {
			t.Errorf("%s without %s: %v, want an error %v", what, f.name, err, !optional)
		}
		if _, err := decode(all.with(i, "null")); (err == nil) != optional {
			t.Errorf("%s with %s null: %v, want an error %v", what, f.name, err, !optional)
		}
		for _, wrong := range []string{`{}`, `[{}]`, `1.5`, `"x"`, `7`, `true`, `[]`, `["x"]`} {
			kind := map[byte]string{'{': "object", '[': "array", '"': "string", '7': "int", 't': "bool", '1': "float"}
			if kind[wrong[0]] == kind[all[i][1][0]] {
				continue
			}
			if _, err := decode(all.with(i, wrong)); err == nil {
				t.Errorf("%s takes %s for %s", what, wrong, f.name)
			}
		}
		if twice := append(slices.Clone(all), all[i]); true {
			if _, err := decode(twice); err == nil {
				t.Errorf("%s takes %s twice", what, f.name)
			}
		}
	}
}

// A goMethod is a method as Go has it.
type goMethod struct {
	name    string
	in, out func() any
}

// checkInterface checks that the Go types have every field of the description,
// and no other.
func (x idl) checkInterface(t *testing.T, name string, methods map[string]goMethod, wireErrors []func() any) {
	t.Helper()
	if x.name != name {
		t.Errorf("the interface is %s, want %s", x.name, name)
	}
	for name, m := range x.methods {
		g, ok := methods[name]
		if !ok || g.name != x.name+"."+name {
			t.Errorf("method %s is missing in Go", name)
			continue
		}
		x.checkCodec(t, name, m.in, g.in, false)
		x.checkCodec(t, name+"'s answer", m.out, g.out, true)
	}
	if len(methods) != len(x.methods) {
		t.Errorf("Go has %d methods, the description %d", len(methods), len(x.methods))
	}
	for _, fresh := range wireErrors {
		name := strings.TrimPrefix(fresh().(WireError).WireName(), x.name+".")
		fields, ok := x.errors[name]
		if !ok {
			t.Errorf("the description has no error %s", name)
		}
		x.checkCodec(t, name, fields, fresh, true)
	}
	if len(wireErrors) != len(x.errors) {
		t.Errorf("Go has %d errors, the description %d", len(wireErrors), len(x.errors))
	}
}

// noParams is what a method without parameters takes, and nothing what one
// without an answer gives.
type (
	noParams struct{}
	nothing  struct{}
)

func (noParams) DecodeFrom(d *Decoder) { d.Empty() }
func (noParams) EncodeTo(*Encoder)     {}

func (nothing) DecodeFrom(d *Decoder) { d.Object(noFields, func(string) {}) }
func (nothing) EncodeTo(*Encoder)     {}

func TestCredentialsDescription(t *testing.T) {
	x := parseIDL(t, CredentialsDescription)
	methods := map[string]goMethod{
		"Apply":    {MethodApply, func() any { return &ApplyParams{} }, func() any { return &ApplyResult{} }},
		"List":     {MethodList, func() any { return &ListParams{} }, func() any { return &ListResult{} }},
		"Remove":   {MethodRemove, func() any { return &RemoveParams{} }, func() any { return &RemoveResult{} }},
		"Rollback": {MethodRollback, func() any { return &RollbackParams{} }, func() any { return &RollbackResult{} }},
		"Refresh":  {MethodRefresh, func() any { return &RefreshParams{} }, func() any { return &RefreshResult{} }},
		"Retry":    {MethodRetry, func() any { return &RetryParams{} }, func() any { return &ApplyResult{} }},
	}
	x.checkInterface(t, CredentialsInterface, methods, []func() any{
		func() any { return &RefusedError{} }, func() any { return &GenerationMismatchError{} }, func() any { return &NoPreviousError{} },
		func() any { return &GateInProgressError{} }, func() any { return &RolledBackError{} }, func() any { return &NothingRejectedError{} },
		func() any { return &NoSystemdError{} },
	})
	// The nested types, each alone: one of a set, an entry and so on.
	x.checkCodec(t, "Credential", x.types["Credential"], nest("set", "", methods["Apply"].in), false)
	x.checkCodec(t, "Entry", x.types["Entry"], nest("entries", `"generation":1,"refusals":[],`, methods["List"].out), true)
	x.checkCodec(t, "Refusal", x.types["Refusal"], nest("refusals", `"generation":1,"entries":[],`, methods["List"].out), true)
	x.checkCodec(t, "Waiting", x.types["Waiting"], nest("waiting", `"generation":1,"entries":[],"refusals":[],`, methods["List"].out), true)
	x.checkCodec(t, "Rejected", x.types["Rejected"], nest("rejected", `"generation":1,"entries":[],"refusals":[],`, methods["List"].out), true)
	x.checkCodec(t, "Refreshed", x.types["Refreshed"], nest("units", `"generation":1,`, methods["Refresh"].out), true)
	x.checkCodec(t, "Consumer", x.types["Consumer"], func() any { return &nestedConsumer{} }, true)
	x.checkCodec(t, "Progress", x.types["Progress"], func() any { return &nestedProgress{} }, true)
}

func TestHealthDescription(t *testing.T) {
	x := parseIDL(t, HealthDescription)
	x.checkInterface(t, HealthInterface, map[string]goMethod{
		"Get":   {MethodHealthGet, func() any { return noParams{} }, func() any { return &GetResult{} }},
		"Watch": {MethodHealthWatch, func() any { return &WatchParams{} }, func() any { return &WatchReply{} }},
		"Ping":  {MethodHealthPing, func() any { return noParams{} }, func() any { return &PingResult{} }},
	}, nil)
	report := func() any { return &Report{} }
	rest := `"version":"","bootId":"","machineId":"","generation":1,"entries":[],"refusals":[],`
	x.checkCodec(t, "Report", x.types["Report"], report, true)
	x.checkCodec(t, "Reason", x.types["Reason"], nest("reasons", rest, report), true)
	x.checkCodec(t, "ProviderState", x.types["ProviderState"], func() any { return &nestedProvider{} }, true)
	rest += `"reasons":[],`
	x.checkCodec(t, "Systemd", x.types["Systemd"], inside("systemd", rest, report), true)
	x.checkCodec(t, "FailedUnit", x.types["FailedUnit"], nest("failed", `"version":"","state":"","jobs":1,`, inside("systemd", rest, report)), true)
	x.checkCodec(t, "Memory", x.types["Memory"], inside("memory", rest, report), true)
	x.checkCodec(t, "Pressure", x.types["Pressure"], inside("pressure", rest, report), true)
	x.checkCodec(t, "Stall", x.types["Stall"], inside("io", "", inside("pressure", rest, report)), true)
	x.checkCodec(t, "Disk", x.types["Disk"], nest("disks", rest, report), true)
	x.checkCodec(t, "Load", x.types["Load"], inside("load", rest, report), true)
	x.checkCodec(t, "Waiting", x.types["Waiting"], nest("waiting", rest, report), true)
}

func TestProviderDescription(t *testing.T) {
	x := parseIDL(t, ProviderDescription)
	x.checkInterface(t, ProviderInterface, map[string]goMethod{
		"Ring":   {MethodRing, func() any { return noParams{} }, func() any { return nothing{} }},
		"Status": {MethodProviderStatus, func() any { return noParams{} }, func() any { return &ProviderStatus{} }},
		"Watch":  {MethodProviderWatch, func() any { return &WatchParams{} }, func() any { return &ProviderWatchReply{} }},
	}, []func() any{func() any { return &UnavailableError{} }})
	status := func() any { return &ProviderStatus{} }
	rest := `"name":"","target":"","state":"","problem":"","since":"","lastContact":"",`
	x.checkCodec(t, "ProviderStatus", x.types["ProviderStatus"], status, true)
	x.checkCodec(t, "Applies", x.types["Applies"], inside("applies", rest, status), true)
	x.checkCodec(t, "Bucket", x.types["Bucket"],
		nest("buckets", `"count":1,"refused":1,"rolledBack":1,"failed":1,"sum":1,`, inside("applies", rest, status)), true)
}

// A type is the same in every description that has it: there is no way to share
// one.
func TestSharedTypes(t *testing.T) {
	first := map[string][]idlField{}
	for _, description := range []string{CredentialsDescription, HealthDescription, ProviderDescription} {
		x := parseIDL(t, description)
		for name, fields := range x.types {
			if have, ok := first[name]; ok && !slices.Equal(have, fields) {
				t.Errorf("type %s of %s = %v, want %v as elsewhere", name, x.name, fields, have)
			}
			first[name] = fields
			for _, f := range fields {
				if _, ok := x.types[f.typ]; !ok && !slices.Contains([]string{"string", "int", "bool"}, f.typ) {
					t.Errorf("%s has no type %s, which %s.%s is", x.name, f.typ, name, f.name)
				}
			}
		}
	}
}

// nest makes a [nested] for checkCodec, of an object in a list.
func nest(key string, rest string, fresh func() any) func() any {
	return func() any { return &nested{key: key, rest: rest, inner: fresh(), list: true} }
}

// inside is nest of an object that stands alone.
func inside(key string, rest string, fresh func() any) func() any {
	return func() any { return &nested{key: key, rest: rest, inner: fresh()} }
}

// nested is one object in a document, taken for the document.
type nested struct {
	key, rest string
	inner     any
	list      bool // it is in a list
}

func (n *nested) DecodeFrom(d *Decoder) {
	from, to := d.view()
	if d.Err() == nil {
		object := string(d.buf[from:to])
		if n.list {
			object = "[" + object + "]"
		}
		doc := "{" + n.rest + `"` + n.key + `":` + object + "}"
		d.Fail((&Decoder{buf: []byte(doc)}).Decode(n.inner.(Unmarshaler)))
	}
}

func (n *nested) EncodeTo(e *Encoder) {
	var inner Encoder
	inner.raw("{")
	n.inner.(Marshaler).EncodeTo(&inner)
	inner.raw("}")
	d := Decoder{buf: inner.buf}
	d.Object(NewFields(n.key).Open(), func(string) {
		object := func(int) {
			from, to := d.view()
			e.raw(string(d.buf[from+1 : to-1]))
		}
		if n.list {
			d.Array(1, object)
		} else {
			object(0)
		}
	})
}

type nestedConsumer struct{ consumers []Consumer }

func (n *nestedConsumer) DecodeFrom(d *Decoder) {
	from, to := d.view()
	if d.Err() == nil {
		list := Decoder{buf: []byte("[" + string(d.buf[from:to]) + "]")}
		n.consumers = decodeConsumers(&list)
		d.Fail(list.End())
	}
}

func (n *nestedConsumer) EncodeTo(e *Encoder) {
	(&nested{key: "consumers", list: true, inner: EncodeFunc(func(e *Encoder) { encodeConsumers(e, n.consumers) })}).EncodeTo(e)
}

type nestedProgress struct{ progress *Progress }

func (n *nestedProgress) DecodeFrom(d *Decoder) { n.progress = decodeProgress(d) }

func (n *nestedProgress) EncodeTo(e *Encoder) {
	var inner Encoder
	encodeProgress(&inner, n.progress)
	all := strings.TrimPrefix(string(inner.buf), `"progress":`)
	e.raw(all[1 : len(all)-1])
}

type nestedProvider struct{ provider *ProviderState }

func (n *nestedProvider) DecodeFrom(d *Decoder) { n.provider = decodeProviderState(d) }

func (n *nestedProvider) EncodeTo(e *Encoder) { encodeProviderState(e, n.provider) }

// Our other descriptions have the methods and errors that the server has.
func TestServiceDescriptions(t *testing.T) {
	s := &Server{}
	for _, i := range s.ownInterfaces() {
		x := parseIDL(t, i.Description)
		if x.name != i.Name || len(x.methods) != len(i.Methods) {
			t.Errorf("%s has %d methods, its description %s has %d", i.Name, len(i.Methods), x.name, len(x.methods))
		}
		for name := range x.methods {
			if i.Methods[name] == nil {
				t.Errorf("%s.%s is missing in Go", x.name, name)
			}
		}
		for _, full := range []string{
			errInterfaceNotFound, errMethodNotFound, errMethodNotImplemented, errInvalidParameter, errPermissionDenied, errExpectedMore,
			errInternal, errBusy, errMessageTooLarge, errBadMessage,
		} {
			iface, name := splitMethod(full)
			if _, ok := x.errors[name]; iface == x.name && !ok {
				t.Errorf("%s has no error %s", x.name, name)
			}
			if iface == x.name {
				delete(x.errors, name)
			}
		}
		if len(x.errors) > 0 {
			t.Errorf("%s has errors that nobody answers: %v", x.name, x.errors)
		}
	}
}
