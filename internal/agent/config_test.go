package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/vsockrpc"
)

func TestParseConfig(t *testing.T) {
	tests := []struct {
		in     string
		read   SMBIOSRead
		faults []string
	}{
		{"", ReadAuto, nil},
		{" \n", ReadAuto, nil},
		{"{}", ReadAuto, nil},
		{`{"smbios": {}}`, ReadAuto, nil},
		{`{"smbios": {"read": "always"}}`, ReadAlways, nil},
		{`{"smbios": {"read": "never"}}`, ReadNever, nil},
		{"{\n\"smbios\": {\n\"read\": \"sometimes\"}}", ReadAuto, []string{`line 3: key "smbios.read": want one of auto, always, never`}},
		{"{\n\"smbios\": {\"read\": 7}}", ReadAuto, []string{`line 2: key "smbios.read": want a string, have a number`}},
		{`{"smbios": {"read": ["x", {"y": 1}]}}`, ReadAuto, []string{`line 1: key "smbios.read": want a string, have an array`}},
		{`{"smbios": null}`, ReadAuto, []string{`line 1: key "smbios": want an object, have null`}},
		{`{"smbios": true}`, ReadAuto, []string{`line 1: key "smbios": want an object, have a boolean`}},
		{`{"smbios": "read"}`, ReadAuto, []string{`line 1: key "smbios": want an object, have a string`}},
		// Unknown keys cost nothing but themselves, whatever they hold.
		{"{\n\"smbois\": {\"a\": [1, {\"b\": {}}, []]},\n\"smbios\": {\"Read\": \"never\", \"read\": \"always\"}}", ReadAlways, []string{
			`line 2: key "smbois": unknown; known here: consumers, credentials, health, names, peer, policy, previous, provider, refresh, smbios, socket`, `line 3: key "smbios.Read": unknown; known here: read`,
		}},
		{"{\"smbios\": {\"read\": \"never\"},\n\"smbios\": {\"read\": \"always\"}}", ReadNever, []string{`line 2: key "smbios": stands twice; the first one holds`}},
		{`{"smbios": {"read": "never", "read": "always"}}`, ReadNever, []string{`line 1: key "smbios.read": stands twice; the first one holds`}},
		{`[{"smbios": {"read": "never"}}]`, ReadAuto, []string{"line 1: want an object, have an array"}},
		{`"hunter2"`, ReadAuto, []string{"line 1: want an object, have a string"}},
		// A file that breaks off does not half apply.
		{"{\"smbios\": {\"read\": \"never\"},\n", ReadAuto, []string{"line 2: not JSON, so that nothing in the file applies: unexpected end of JSON input"}},
		{"{\"smbios\": {\"read\": \"never\"}}\n\n{}", ReadAuto, []string{"line 3: not JSON, so that nothing in the file applies: invalid character '{' after top-level value"}},
	}
	for _, tt := range tests {
		cfg, faults := ParseConfig([]byte(tt.in))
		var got []string
		for _, f := range faults {
			got = append(got, f.String())
		}
		if cfg.SMBIOS.Read != tt.read || !slices.Equal(got, tt.faults) {
			t.Errorf("ParseConfig(%q) = %q, %q, want %q, %q", tt.in, cfg.SMBIOS.Read, got, tt.read, tt.faults)
		}
	}
}

func TestParseConfigPeerAndNames(t *testing.T) {
	tests := []struct {
		in     string
		port   vsockrpc.PrivilegedPort
		deny   bool
		allow  []string
		faults int
	}{
		{`{}`, vsockrpc.PortRequired, false, nil, 0},
		{`{"peer": {"privilegedPort": "ignored"}, "names": {"allow": ["tmpfiles.extra", "ssh.*"]}}`, vsockrpc.PortIgnored, false, []string{"tmpfiles.extra", "ssh.*"}, 0},
		// A fault in peer may have been meant to keep somebody out.
		{`{"peer": {"privilegedPort": "no"}}`, vsockrpc.PortRequired, true, nil, 1},
		{`{"peer": {"privilegedport": "ignored"}}`, vsockrpc.PortRequired, true, nil, 1},
		{`{"peer": []}`, vsockrpc.PortRequired, true, nil, 1},
		{`{"peer": {}, "peer": {"privilegedPort": "ignored"}}`, vsockrpc.PortRequired, true, nil, 1},
		{`{"Peer": {}}`, vsockrpc.PortRequired, true, nil, 1},
		{`{"names": {"allow": ["a", 1, {"b": []}]}}`, vsockrpc.PortRequired, false, nil, 2},
		{`{"names": {"allow": "a"}, "smbios": 1}`, vsockrpc.PortRequired, false, nil, 2},
	}
	for _, tt := range tests {
		cfg, faults := ParseConfig([]byte(tt.in))
		if cfg.Peer.PrivilegedPort != tt.port || cfg.Peer.Deny != tt.deny || !slices.Equal(cfg.Names.Allow, tt.allow) || len(faults) != tt.faults {
			t.Errorf("ParseConfig(%q) = %+v, %v", tt.in, cfg, faults)
		}
	}
}

func TestParseConfigRefresh(t *testing.T) {
	cfg, faults := ParseConfig([]byte(`{
		"credentials": {"db": {"onChange": "auto", "restartUnits": ["a.service"], "reloadUnits": ["b.service", "c.service"]}, "x y": {}},
		"refresh": {"never": []}, "socket": {"wait": 60}, "consumers": {"compare": true}, "previous": {"ttl": 3600},
		"policy": {"load": {"db*": ["web.service", "worker@*.service"], "*": []}}}`))
	if len(faults) != 0 {
		t.Fatalf("faults: %v", faults)
	}
	want := CredentialConfig{OnChange: "auto", RestartUnits: []string{"a.service"}, ReloadUnits: []string{"b.service", "c.service"}}
	if got := cfg.Credentials["db"]; !reflect.DeepEqual(got, want) || len(cfg.Credentials) != 2 {
		t.Errorf("credentials = %+v", cfg.Credentials)
	}
	if len(cfg.Refresh.Never) != 0 || cfg.Socket.Wait != time.Minute || !cfg.Consumers.Compare || cfg.Previous.TTL != time.Hour || cfg.Policy.Deny {
		t.Errorf("ParseConfig = %+v", cfg)
	}
	for unit, want := range map[string]bool{"web.service": true, "worker@1.service": true, "other.service": false, "worker@1.socket": false} {
		if got := cfg.mayLoad(unit, "db-password") == nil; got != want {
			t.Errorf("mayLoad(%q, db-password) = %v, want %v", unit, got, want)
		}
	}
	for pattern, want := range map[string]bool{`web[!x].service`: true, `web[^x].service`: true, `web[y-z].service`: true, `web[x].service`: false, `*`: true} {
		if got := matchesUnit("weby.service", []string{pattern}); got != want {
			t.Errorf("matchesUnit(weby.service, %q) = %v, want %v", pattern, got, want)
		}
	}
	if !matchesUnit(`a\x2db.service`, []string{`a\x2d?.service`}) {
		t.Error("matchesUnit does not take a backslash for what it is")
	}
	if cfg.mayLoad("web.service", "other") == nil {
		t.Error("a pattern without units lets somebody load")
	}
	cfg.Policy.Load = map[string][]string{"db": {"web.service"}}
	if cfg.mayLoad("any.service", "other") != nil || cfg.mayLoad("any.service", "db") == nil {
		t.Error("mayLoad restricts what no pattern matches, or does not what one does")
	}
}

// What cannot be understood in policy may have been meant to keep somebody out.
func TestParseConfigPolicyFault(t *testing.T) {
	for _, tt := range []struct {
		in     string
		deny   bool
		faults int
	}{
		{`{}`, false, 0},
		{`{"policy": {}}`, false, 0},
		{`{"policy": {"load": {"a": "web.service"}}}`, true, 1},
		{`{"policy": {"load": {"a/b": []}}}`, true, 1},
		{`{"policy": {"Load": {}}}`, true, 1},
		{`{"policy": []}`, true, 1},
		{`{"policy": {"load": {}}, "policy": {"load": {"*": []}}}`, true, 1},
		{`{"Policy": {}}`, true, 1},
		{`{"policy": {"load": {"a": ["web[.service"]}}}`, true, 1},
		{`{"refresh": {"never": ["web[.service"]}}`, false, 1},
		{`{"policy": {"load": {"a": []}`, true, 1},
		{`{"socket": {"wait": "60"}, "previous": {"ttl": -1}, "consumers": {"compare": 1}, "credentials": {"a:b": {}, "c": {"onChange": "perhaps"}}}`, false, 5},
		{`{"socket": {"wait": 1.5}}`, false, 1},
	} {
		cfg, faults := ParseConfig([]byte(tt.in))
		if cfg.Policy.Deny != tt.deny || len(faults) != tt.faults {
			t.Errorf("ParseConfig(%q): deny = %v, faults %v, want %v and %d", tt.in, cfg.Policy.Deny, faults, tt.deny, tt.faults)
		}
		if err := cfg.mayLoad("web.service", "b"); (err != nil) != tt.deny {
			t.Errorf("mayLoad with %q = %v", tt.in, err)
		}
	}
}

func TestParseConfigProvider(t *testing.T) {
	for _, tt := range []struct {
		in      string
		address string
		timeout time.Duration
		faults  int
	}{
		{`{}`, "", DefaultProviderTimeout, 0},
		{`{"provider": {"address": "vsock:2:1020", "timeout": 5, "required": true}}`, "vsock:2:1020", 5 * time.Second, 0},
		{`{"provider": {"address": "tcp:host", "timeout": 5}}`, "", 5 * time.Second, 1},
		{`{"provider": {"address": 7, "timeout": "5", "required": 1, "adress": ""}}`, "", DefaultProviderTimeout, 4},
		{`{"provider": "vsock:2"}`, "", DefaultProviderTimeout, 1},
	} {
		cfg, faults := ParseConfig([]byte(tt.in))
		if cfg.Provider.Address != tt.address || cfg.Provider.Timeout != tt.timeout || len(faults) != tt.faults {
			t.Errorf("ParseConfig(%q) = %+v, %v, want %q, %s and %d faults", tt.in, cfg.Provider, faults, tt.address, tt.timeout, tt.faults)
		}
		if cfg.Provider.Fault != (tt.faults > 0) {
			t.Errorf("ParseConfig(%q): the provider's fault = %v", tt.in, cfg.Provider.Fault)
		}
	}
}

func TestReadConfig(t *testing.T) {
	dir := t.TempDir()
	if cfg, faults, err := ReadConfig(filepath.Join(dir, "missing")); err != nil || len(faults) != 0 || cfg.SMBIOS.Read != ReadAuto {
		t.Errorf("ReadConfig of a missing file = %+v, %v, %v", cfg, faults, err)
	}
	if cfg, _, err := ReadConfig(dir); err == nil || !cfg.Policy.Deny {
		t.Errorf("ReadConfig of a folder = %v, or it lets everybody load", err)
	}
	large := filepath.Join(dir, "large")
	if err := os.WriteFile(large, []byte(strings.Repeat(" ", maxConfigSize+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ReadConfig(large); err == nil {
		t.Error("ReadConfig of a large file succeeded")
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(`{"smbios":{"read":"never","read":1},"x":[{}]}`))
	f.Add([]byte(`{"a":{"b":[1,2,{"c":null}]},"smbios":{"Read":"never"}}`))
	f.Add([]byte("[[["))
	f.Fuzz(func(t *testing.T, b []byte) {
		cfg, faults := ParseConfig(b)
		if !slices.Contains([]SMBIOSRead{ReadAuto, ReadAlways, ReadNever}, cfg.SMBIOS.Read) {
			t.Errorf("ParseConfig(%q) = %q", b, cfg.SMBIOS.Read)
		}
		for _, fault := range faults {
			if fault.Line < 1 || fault.Line > 1+strings.Count(string(b), "\n") || fault.Problem == "" {
				t.Errorf("ParseConfig(%q) has fault %+v", b, fault)
			}
		}
	})
}

func TestImportCredentials(t *testing.T) {
	tests := []struct {
		cmdline string
		want    bool
	}{
		{"", true},
		{"quiet root=/dev/vda", true},
		{"systemd.import_credentials=no", false},
		{"a systemd.import_credentials=0\n", false},
		{"systemd.import-credentials=Off b", false},
		{`"systemd.import_credentials=no"`, false},
		{"systemd.import_credentials='no'", false},
		{"systemd.import_credentials", true},
		{"systemd.import_credentials=no systemd.import_credentials=yes", true},
		{"systemd.import_credentials=yes systemd.import_credentials=false", false},
		{"systemd.import_credentials=no systemd.import_credentials=perhaps", false},
		{"xsystemd.import_credentials=no", true},
		{"rd.systemd.import_credentials=no", true}, // the initrd's; the host system imports then
		{`x="a systemd.import_credentials=no"`, true},
		{`systemd.import_credentials=no\`, true}, // a backslash is an ordinary character
	}
	for _, tt := range tests {
		if got := importCredentials(tt.cmdline); got != tt.want {
			t.Errorf("importCredentials(%q) = %v, want %v", tt.cmdline, got, tt.want)
		}
	}
}

func FuzzSplitCmdline(f *testing.F) {
	f.Add(`a="b c" 'd"e' f\ g`)
	f.Fuzz(func(t *testing.T, s string) {
		words := splitCmdline(s)
		if n := len(fmt.Sprint(words)); n > len(s)+len(words)+2 {
			t.Errorf("splitCmdline(%q) = %q: longer than what went in", s, words)
		}
	})
}
