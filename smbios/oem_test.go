package smbios

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
)

func TestCredentials(t *testing.T) {
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	longest := strings.Repeat("n", credential.MaxNameLen)
	full := strings.Repeat("v", credential.MaxSize)

	// Each case runs once for each family: F stands for io.guestagent. and
	// for io.systemd.
	tests := []struct {
		name    string
		strs    []string
		creds   []plainCred // without family
		refused []plainRefusal
	}{
		{name: "none"},
		{name: "text", strs: []string{"F.credential:a=hello"}, creds: []plainCred{{name: "a", value: "hello"}}},
		{name: "first '=' splits", strs: []string{"F.credential:a=b=c=="}, creds: []plainCred{{name: "a", value: "b=c=="}}},
		{name: "text is raw", strs: []string{"F.credential:a= \\x41%20\t\r\n\xff\xfe\n"}, creds: []plainCred{{name: "a", value: " \\x41%20\t\r\n\xff\xfe\n"}}},
		{name: "text may be empty", strs: []string{"F.credential:a="}, creds: []plainCred{{name: "a"}}},
		{name: "text of the largest size", strs: []string{"F.credential:a=" + full}, creds: []plainCred{{name: "a", value: full}}},
		{name: "text too large", strs: []string{"F.credential:a=" + full + "v"}, refused: []plainRefusal{{"a", credential.ReasonTooLarge}}},
		{name: "binary", strs: []string{"F.credential.binary:a=" + base64.StdEncoding.EncodeToString(all)}, creds: []plainCred{{name: "a", binary: true, value: string(all)}}},
		{name: "binary, URL alphabet", strs: []string{"F.credential.binary:a=" + base64.URLEncoding.EncodeToString(all)}, creds: []plainCred{{name: "a", binary: true, value: string(all)}}},
		{name: "binary may be empty", strs: []string{"F.credential.binary:a="}, creds: []plainCred{{name: "a", binary: true}}},
		{name: "binary of white space", strs: []string{"F.credential.binary:a= \n"}, creds: []plainCred{{name: "a", binary: true}}},
		{
			name: "binary of the largest size", strs: []string{"F.credential.binary:a=" + base64.StdEncoding.EncodeToString([]byte(full))},
			creds: []plainCred{{name: "a", binary: true, value: full}},
		},
		{
			name: "binary too large", strs: []string{"F.credential.binary:a=" + base64.StdEncoding.EncodeToString([]byte(full+"v"))},
			refused: []plainRefusal{{"a", credential.ReasonTooLarge}},
		},
		{
			name: "bad base64, the others go on", strs: []string{"F.credential.binary:a=AAE", "F.credential.binary:b=AAEC"},
			creds: []plainCred{{name: "b", binary: true, value: "\x00\x01\x02"}}, refused: []plainRefusal{{"a", credential.ReasonBadBase64}},
		},

		{name: "no '='", strs: []string{"F.credential:hunter2"}, refused: []plainRefusal{{"", credential.ReasonNoSeparator}}},
		{name: "nothing behind the key", strs: []string{"F.credential.binary:"}, refused: []plainRefusal{{"", credential.ReasonNoSeparator}}},
		{name: "empty name", strs: []string{"F.credential:=v"}, refused: []plainRefusal{{"", credential.ReasonBadName}}},
		{name: "dot", strs: []string{"F.credential:.=v", "F.credential:..=v", "F.credential:...=v"}, creds: []plainCred{{name: "...", value: "v"}}, refused: []plainRefusal{{"", credential.ReasonBadName}, {"", credential.ReasonBadName}}},
		{name: "slash, colon", strs: []string{"F.credential:a/b=v", "F.credential:a:b=v"}, refused: []plainRefusal{{"", credential.ReasonBadName}, {"", credential.ReasonBadName}}},
		{name: "control, DEL, UTF-8", strs: []string{"F.credential:a\tb=v", "F.credential:a\x7f=v", "F.credential:\xc3\xa4=v"}, refused: slices.Repeat([]plainRefusal{{"", credential.ReasonBadName}}, 3)},
		{name: "odd but good names", strs: []string{"F.credential: a b =v", "F.credential:*=w"}, creds: []plainCred{{name: " a b ", value: "v"}, {name: "*", value: "w"}}},
		{name: "longest name", strs: []string{"F.credential:" + longest + "=v"}, creds: []plainCred{{name: longest, value: "v"}}},
		{name: "name too long", strs: []string{"F.credential:" + longest + "n=v"}, refused: []plainRefusal{{"", credential.ReasonBadName}}},
		{name: "bad name before bad base64", strs: []string{"F.credential.binary:a/=A"}, refused: []plainRefusal{{"", credential.ReasonBadName}}},

		{
			name: "first wins", strs: []string{"F.credential:a=1", "F.credential.binary:a=AAEC", "F.credential:a=1"},
			creds: []plainCred{{name: "a", value: "1"}}, refused: []plainRefusal{{"a", credential.ReasonDuplicate}, {"a", credential.ReasonDuplicate}},
		},
		{
			name: "first good one wins", strs: []string{"F.credential.binary:a=A", "F.credential:a=" + full + "v", "F.credential:a=2", "F.credential:a=3"},
			creds:   []plainCred{{name: "a", value: "2"}},
			refused: []plainRefusal{{"a", credential.ReasonBadBase64}, {"a", credential.ReasonTooLarge}, {"a", credential.ReasonDuplicate}},
		},
		{
			name: "bad base64 of a name that is there", strs: []string{"F.credential:a=1", "F.credential.binary:a=A"},
			creds: []plainCred{{name: "a", value: "1"}}, refused: []plainRefusal{{"a", credential.ReasonBadBase64}},
		},
		{name: "names are case sensitive", strs: []string{"F.credential:a=1", "F.credential:A=2"}, creds: []plainCred{{name: "a", value: "1"}, {name: "A", value: "2"}}},
		{name: "keys are, too", strs: []string{strings.ToUpper("F") + ".Credential:a=1", " F.credential:a=1", "xF.credential:a=1"}, refused: []plainRefusal{{"", credential.ReasonUnknownKind}}},
	}
	for _, f := range []struct {
		prefix string
		family Family
	}{{"io.guestagent", FamilyAgent}, {"io.systemd", FamilySystemd}} {
		for _, tt := range tests {
			t.Run(string(f.family)+"/"+tt.name, func(t *testing.T) {
				var strs []string
				for _, s := range tt.strs {
					strs = append(strs, strings.Replace(s, "F", f.prefix, 1))
				}
				var want []plainCred
				for _, c := range tt.creds {
					c.family = f.family
					want = append(want, c)
				}
				refused := tt.refused
				if f.family == FamilySystemd {
					// Other strings of systemd's are none of our business.
					refused = slices.DeleteFunc(slices.Clone(refused), func(r plainRefusal) bool { return r.reason == credential.ReasonUnknownKind })
				}
				checkCredentials(t, tableOf(strs...), want, refused)
			})
		}
	}
}

// checkCredentials checks what Credentials makes of a table, and every
// refusal for what holds of all of them.
func checkCredentials(t *testing.T, table Table, want []plainCred, wantRefused []plainRefusal) {
	t.Helper()
	creds, refused := Credentials(table)
	if got := plainCreds(creds); !slices.Equal(got, want) {
		t.Errorf("Credentials() = %.200v, want %.200v", got, want)
	}
	if got := plainRefusals(refused); !slices.Equal(got, wantRefused) {
		t.Errorf("refused = %v, want %v", refused, wantRefused)
	}
	for _, r := range refused {
		if r.Source != credential.SourceSMBIOS {
			t.Errorf("refusal %v has source %q, want %q", r, r.Source, credential.SourceSMBIOS)
		}
		if strings.ContainsAny(r.Detail, "\n\r") || !strings.HasPrefix(r.Detail, "OEM string ") {
			t.Errorf("refusal %q, want one line that says where", r.Detail)
		}
	}
}

func TestCredentialsOfBothFamilies(t *testing.T) {
	checkCredentials(t, tableOf(
		"unrelated", "io.systemd.credential:a=1", "io.guestagent.credential:a=2", "io.systemd.credential.binary:a=AAEC", "io.systemd.unit-dropin:x=y", "io.systemd.boot.kernel-cmdline-extra=z",
	), []plainCred{{"a", FamilySystemd, false, "1"}, {"a", FamilyAgent, false, "2"}}, []plainRefusal{{"a", credential.ReasonDuplicate}})
}

func TestCredentialsUnknownKind(t *testing.T) {
	for _, s := range []string{
		"io.guestagent.", "io.guestagent.credentials:a=hunter2", "io.guestagent.credential=hunter2", "io.guestagent.credential.base64:a=hunter2",
		"io.guestagent.credential.binary=hunter2", "io.guestagent.provider=vsock:2:1021", "io.guestagent. credential:a=hunter2", "io.guestagent.Credential:a=hunter2",
	} {
		checkCredentials(t, tableOf(s), nil, []plainRefusal{{"", credential.ReasonUnknownKind}})
	}
	for _, s := range []string{"io.guestagent", "io.guestagent:", "io.guestagentx.credential:a=b", "IO.GUESTAGENT.credential:a=b", "io.guestagent.provider:vsock:2:1021", "io.guestagent.provider:"} {
		checkCredentials(t, tableOf(s), nil, nil)
	}
}

func TestCredentialsTruncated(t *testing.T) {
	tests := []struct {
		s    string
		want []plainRefusal
	}{
		{"io.guestagent.credential:a=hun", []plainRefusal{{"a", credential.ReasonTruncated}}},
		{"io.guestagent.credential:a=", []plainRefusal{{"a", credential.ReasonTruncated}}},
		{"io.systemd.credential.binary:a=AAEC", []plainRefusal{{"a", credential.ReasonTruncated}}},
		{"io.guestagent.credential:a", []plainRefusal{{"", credential.ReasonTruncated}}},
		{"io.guestagent.credential:a/b=c", []plainRefusal{{"", credential.ReasonTruncated}}},
		{"io.systemd.credential:", []plainRefusal{{"", credential.ReasonTruncated}}},
		{"io.systemd.credential.bin", []plainRefusal{{"", credential.ReasonTruncated}}},
		{"io.systemd.credential", []plainRefusal{{"", credential.ReasonTruncated}}},
		{"io.guestagent.cred", []plainRefusal{{"", credential.ReasonTruncated}}},
		{"io.guestagent.provider:vsock", []plainRefusal{{"", credential.ReasonTruncated}}},
		{"io.guestagent", nil},
		{"io.systemd.cred", nil},
		{"io.systemd.credential.other", nil},
		{"somebody else's", nil},
	}
	for _, tt := range tests {
		table := tableOf("io.guestagent.credential:z=1", tt.s)
		table.Strings[1].Truncated = true
		checkCredentials(t, table, []plainCred{{"z", FamilyAgent, false, "1"}}, tt.want)
	}
	// It does not stand in the way of a whole one.
	table := tableOf("io.guestagent.credential:a=hun", "io.guestagent.credential:a=hunter2")
	table.Strings[0].Truncated = true
	checkCredentials(t, table, []plainCred{{"a", FamilyAgent, false, "hunter2"}}, []plainRefusal{{"a", credential.ReasonTruncated}})
}

func TestCredentialsManyRefusals(t *testing.T) {
	strs := slices.Repeat([]string{"io.guestagent.credential:x"}, MaxRefusals)
	if _, refused := Credentials(tableOf(strs...)); len(refused) != MaxRefusals || refused[MaxRefusals-1].Reason != credential.ReasonNoSeparator {
		t.Errorf("%d refusals, want %d", len(refused), MaxRefusals)
	}
	strs = append(strs, "io.guestagent.credential:y", "io.guestagent.credential:z", "io.guestagent.credential:a=1")
	creds, refused := Credentials(tableOf(strs...))
	if len(creds) != 1 || len(refused) != MaxRefusals+1 || !strings.HasPrefix(refused[MaxRefusals].Detail, "2 more ") {
		t.Errorf("%d credentials, %d refusals, want 1 and %d", len(creds), len(refused), MaxRefusals+1)
	}
}

func TestRefusalDetail(t *testing.T) {
	_, refused := Credentials(tableOf("io.guestagent.credential:a=1", "x", "io.guestagent.credential:a=2"))
	const want = "a: duplicate: OEM string 3 of structure 0x0E00: OEM string 1 of structure 0x0E00 has the same name, and the first one wins; give each name once"
	if len(refused) != 1 || refused[0].String() != want {
		t.Errorf("refused = %v, want %q", refused, want)
	}
}

func TestDecodeBase64(t *testing.T) {
	good := []struct{ in, want string }{
		// RFC 4648, section 10.
		{"", ""},
		{"Zg==", "f"},
		{"Zm8=", "fo"},
		{"Zm9v", "foo"},
		{"Zm9vYg==", "foob"},
		{"Zm9vYmE=", "fooba"},
		{"Zm9vYmFy", "foobar"},

		{"+/+/", "\xfb\xff\xbf"},
		{"-_-_", "\xfb\xff\xbf"},
		{"+_-/", "\xfb\xff\xbf"},
		{" \t\r\n", ""},
		{" Z\tm\r\n8 = ", "fo"},
		{"Z g = \n = ", "f"},
		{"AAAA", "\x00\x00\x00"},
		{"////", "\xff\xff\xff"},
	}
	for _, tt := range good {
		got, err := decodeBase64([]byte(tt.in))
		if err != nil || string(got) != tt.want {
			t.Errorf("decodeBase64(%q) = %q, %v, want %q", tt.in, got, err, tt.want)
		}
	}
	bad := []string{
		"Z", "Zg", "Zg=", "Zm8", "Zm9vY", "Zm9vYg", "Zm9vYg=", // padding is mandatory
		"=", "==", "===", "====", "Z=", "Z==", "Z===", "Z=g=", "Zg=v", "Zm9v=", "Zm9v====", // and in its place
		"Zh==", "Zn==", "Zm9=", "Zm+=", "Z/==", // zero pad bits
		"Zg==Zg==", "Zg== Zg==", "Zg==Z", "Zm8=Zm8=", "Zg===", "Zm8==", "Zg==\x00", // nothing behind it
		"Zm9\v", "Zm9\f", "Zm9\x00", "Zm9\u00a0", "Zm 9!", "Zm9,", "Zm9.", "\xffm9v", "Zm9v\\n", "%Zm9v",
	}
	for _, in := range bad {
		if got, err := decodeBase64([]byte(in)); err == nil || got != nil {
			t.Errorf("decodeBase64(%q) = %q, %v, want nil and an error", in, got, err)
		}
	}
}

// The set of digits, against the standard library.
func TestBase64Digits(t *testing.T) {
	for c := range 256 {
		in := []byte{byte(c), 'A', '=', '='}
		got, err := decodeBase64(in)
		if c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == '=' {
			if err == nil {
				t.Errorf("decodeBase64(%q) = %q, want an error", in, got)
			}
			continue
		}
		want, wantErr := base64.StdEncoding.Strict().DecodeString(string(in))
		if wantErr != nil {
			want, wantErr = base64.URLEncoding.Strict().DecodeString(string(in))
		}
		if (err == nil) != (wantErr == nil) || err == nil && !bytes.Equal(got, want) {
			t.Errorf("decodeBase64(%q) = %q, %v, want %q, %v", in, got, err, want, wantErr)
		}
	}
}

func TestOEMString(t *testing.T) {
	tests := []struct {
		c    Credential
		want string
	}{
		{Credential{Name: "a", Family: FamilyAgent, Value: secret.New([]byte("hello, you = ~"))}, "io.guestagent.credential:a=hello, you = ~"},
		{Credential{Name: "a", Family: FamilySystemd, Value: secret.New([]byte("hello"))}, "io.systemd.credential:a=hello"},
		{Credential{Name: "a", Family: FamilyAgent}, "io.guestagent.credential:a="},
		{Credential{Name: "a", Family: FamilyAgent, Binary: true}, "io.guestagent.credential.binary:a="},
		{Credential{Name: "a", Family: FamilySystemd, Binary: true, Value: secret.New([]byte("hello"))}, "io.systemd.credential.binary:a=aGVsbG8="},
		{Credential{Name: "a", Family: FamilyAgent, Value: secret.New([]byte("line\n"))}, "io.guestagent.credential.binary:a=bGluZQo="},
		{Credential{Name: "a", Family: FamilyAgent, Value: secret.New([]byte{0})}, "io.guestagent.credential.binary:a=AA=="},
		{Credential{Name: "a", Family: FamilyAgent, Value: secret.New([]byte("\x7f"))}, "io.guestagent.credential.binary:a=fw=="},
		{Credential{Name: "a", Family: FamilyAgent, Value: secret.New([]byte("\xfb\xff"))}, "io.guestagent.credential.binary:a=+/8="},
	}
	for _, tt := range tests {
		got, err := tt.c.OEMString()
		if err != nil || string(got.Bytes()) != tt.want {
			t.Errorf("OEMString() = %q, %v, want %q", got.Bytes(), err, tt.want)
		}
	}
	for _, tt := range []struct {
		c    Credential
		want error
	}{
		{Credential{Name: "", Family: FamilyAgent}, credential.ErrName},
		{Credential{Name: "a/b", Family: FamilyAgent}, credential.ErrName},
		{Credential{Name: "a=b", Family: FamilyAgent}, credential.ErrName},
		{Credential{Name: "a"}, nil},
		{Credential{Name: "a", Family: "other"}, nil},
		{Credential{Name: "a", Family: FamilyAgent, Value: secret.New(make([]byte, credential.MaxSize+1))}, nil},
	} {
		got, err := tt.c.OEMString()
		if err == nil || got.Len() != 0 || (tt.want != nil && !errors.Is(err, tt.want)) {
			t.Errorf("OEMString() of %q = %d bytes, %v, want an error", tt.c.Name, got.Len(), err)
		}
	}
}

// Whatever prints, encodes or logs what this package gives shows no value.
func TestNothingPrints(t *testing.T) {
	const value = "hunter2"
	hidden := []string{value, "unter", "aHVudGVyMg", fmt.Sprintf("%x", value), fmt.Sprintf("%X", value), fmt.Sprintf("%v", []byte(value))[1:20]}
	table := cat(oem(0x0E00,
		"io.guestagent.credential:good="+value,
		"io.guestagent.credential.binary:bin=aHVudGVyMg==",
		"io.guestagent.credential:good="+value,
		"io.guestagent.credential:"+value,
		"io.guestagent.credential:/"+value+"=x",
		"io.guestagent.credential.binary:bad="+value,
		"io.guestagent."+value,
		"io.guestagent.provider:"+value,
		value,
	), structure(typeOEMStrings, 0x0E01, []byte{0, 0}, value), append([]byte{11, 5, 0, 0, 1}, "io.guestagent.credential:cut="+value...))
	parsed := mustParse(t, table, []byte(value))
	creds, refused := Credentials(parsed)
	if len(creds) != 2 || len(refused) != 6 || len(parsed.Faults) != 3 {
		t.Fatalf("%d credentials, %d refusals, %d faults, want 2, 6 and 3", len(creds), len(refused), len(parsed.Faults))
	}
	str, err := creds[0].OEMString()
	if err != nil {
		t.Fatal(err)
	}
	_, errName := Credential{Name: "/" + value, Family: FamilyAgent}.OEMString()

	type nested struct{ hidden any }
	things := []any{parsed, &parsed, parsed.Strings, parsed.Strings[0], &parsed.Strings[0], parsed.Faults, creds, creds[0], &creds[0], refused, refused[0], str, errName}
	for _, thing := range things {
		for _, v := range []any{thing, nested{thing}, []any{thing}, map[string]any{"k": thing}} {
			var out bytes.Buffer
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%c"} {
				fmt.Fprintf(&out, verb+"\n", v)
			}
			if b, err := json.Marshal(v); err == nil {
				out.Write(b)
			}
			slog.New(slog.NewTextHandler(&out, nil)).Info("m", slog.Any("v", v))
			slog.New(slog.NewJSONHandler(&out, nil)).Info("m", slog.Any("v", v))
			for _, h := range hidden {
				if i := strings.Index(out.String(), h); i >= 0 {
					t.Errorf("%T shows a value: %q", thing, out.String()[max(0, i-40):i+len(h)])
				}
			}
		}
	}
}
