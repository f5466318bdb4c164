package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/guestagent/guestagent/health"
	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

// maxConfigSize bounds the configuration file, in bytes.
const maxConfigSize = 1 << 20

// A Config is what /etc/guestagent/config.json may say. The zero value is the
// safe default for every key.
type Config struct {
	SMBIOS struct {
		// Read says whether the OEM strings of the VM are read.
		Read SMBIOSRead
	}
	Peer struct {
		// PrivilegedPort says whether the host has to call from a port below
		// 1024, which only its root can.
		PrivilegedPort vsockrpc.PrivilegedPort
		// Deny is set where something in peer was not understood. Then the host
		// is refused: the fault may have been meant to keep somebody out.
		Deny bool
	}
	Names struct {
		// Allow are names, or prefixes that end in '*', that the host may set
		// although systemd itself acts on them: see deniedPrefixes.
		Allow []string
	}
	// Credentials says, by name, what a change of the credential brings about.
	Credentials map[string]CredentialConfig
	Refresh     struct {
		// Never are units, with wildcards as in systemctl(1), that are never
		// refreshed for loading a credential. It replaces [DefaultNever].
		Never []string
	}
	Socket struct {
		// Wait is how long a unit may wait on the credentials socket; 0 is as
		// long as its own start may take.
		Wait time.Duration
	}
	Policy struct {
		// Load says which units may load a name from the credentials socket:
		// names, or prefixes that end in '*', and units with wildcards. What no
		// pattern matches, any unit may load.
		Load map[string][]string
		// Deny is set where something in policy was not understood. Then nobody
		// is given anything over that socket.
		Deny bool
	}
	Consumers struct {
		// Compare tells what a consumer has by reading it, and not by the clock.
		Compare bool
	}
	Provider struct {
		// Address is where the host's provider listens, as
		// [vsockrpc.ParseProviderAddress] takes it; "" to look elsewhere.
		Address string
		// Timeout is how long a boot waits for it.
		Timeout time.Duration
		// Required has guestagent-pull.service fail when time is up, and with it
		// guestagent-credentials.target.
		Required bool
		// Fault is set where the address was not understood. Then nobody is asked.
		Fault bool
	}
	Health struct {
		// IgnoreUnits are units, with wildcards as in systemctl(1), whose failure
		// does not count.
		IgnoreUnits []string
		// Rules have the thresholds.
		Rules health.Rules
	}
	Previous struct {
		// TTL is how long the values that a set replaced are kept for rollback;
		// 0 is until the next set.
		TTL time.Duration
	}
}

// rules are what is judged by.
func (c *Config) rules() health.Rules {
	r := c.Health.Rules
	r.Ignore = func(unit string) bool { return matchesUnit(unit, c.Health.IgnoreUnits) }
	return r
}

// A CredentialConfig is what the configuration says of one credential.
type CredentialConfig struct {
	// OnChange is how its consumers are refreshed where the call does not say.
	OnChange string
	// RestartUnits and ReloadUnits are refreshed as well, though they may not
	// load it.
	RestartUnits, ReloadUnits []string
}

// DefaultNever are the units whose end would take somebody's session, or the
// system, with it.
var DefaultNever = []string{"systemd-*", "*getty@*", "user@*", "sshd*@*", "dbus*"}

// DefaultProviderTimeout is how long a boot waits for the provider.
const DefaultProviderTimeout = 30 * time.Second

// maxSeconds bounds a time in the configuration, to a year.
const maxSeconds = 366 * 24 * 60 * 60

// SMBIOSRead is the key smbios.read.
type SMBIOSRead string

// The values of smbios.read.
const (
	// ReadAuto reads SMBIOS but in a confidential VM, where the host is not
	// trusted, as PID 1 does. It is the default.
	ReadAuto SMBIOSRead = "auto"
	// ReadAlways reads SMBIOS in a confidential VM too, for a firmware that
	// measures the table.
	ReadAlways SMBIOSRead = "always"
	// ReadNever leaves SMBIOS alone.
	ReadNever SMBIOSRead = "never"
)

// A ConfigFault is one thing in the configuration that was not understood. Its
// key keeps its default, everything else holds.
type ConfigFault struct {
	// Line is where it stands, from 1.
	Line int
	// Key is the path of the key at fault, its parts joined by dots; "" for
	// the file as a whole.
	Key string
	// Problem says what is wrong and, where it can, what would be right.
	Problem string
}

func (f ConfigFault) String() string {
	if f.Key == "" {
		return fmt.Sprintf("line %d: %s", f.Line, f.Problem)
	}
	return fmt.Sprintf("line %d: key %q: %s", f.Line, f.Key, f.Problem)
}

// ReadConfig reads the configuration file. That it is missing is fine; any
// other error is about the file, not its content. Faults of the content never
// stop the agent: each costs its key, a file that is not JSON costs all.
func ReadConfig(path string) (Config, []ConfigFault, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		cfg, faults := ParseConfig(nil)
		return cfg, faults, nil
	}
	if err != nil {
		return unreadable(), nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfigSize+1))
	if err == nil && len(b) > maxConfigSize {
		err = fmt.Errorf("reading %s: more than %d bytes", path, maxConfigSize)
	}
	if err != nil {
		return unreadable(), nil, err
	}
	cfg, faults := ParseConfig(b)
	return cfg, faults, nil
}

// unreadable is the configuration of a guest whose file cannot be understood:
// the defaults, but nobody is given anything that a policy might keep from him.
func unreadable() Config {
	cfg, _ := ParseConfig(nil)
	cfg.Policy.Deny = true
	return cfg
}

// ParseConfig parses the configuration. Empty input is an empty configuration.
func ParseConfig(b []byte) (Config, []ConfigFault) {
	cfg := Config{Credentials: map[string]CredentialConfig{}}
	cfg.SMBIOS.Read, cfg.Peer.PrivilegedPort = ReadAuto, vsockrpc.PortRequired
	cfg.Refresh.Never = DefaultNever
	cfg.Provider.Timeout = DefaultProviderTimeout
	if len(bytes.TrimSpace(b)) == 0 {
		return cfg, nil
	}
	// The grammar first, so that a file that breaks off does not half apply.
	if err := json.Unmarshal(b, new(any)); err != nil {
		offset := int64(len(b))
		if syntax := (*json.SyntaxError)(nil); errors.As(err, &syntax) {
			offset = syntax.Offset
		}
		return unreadable(), []ConfigFault{{Line: lineOf(b, offset), Problem: "not JSON, so that nothing in the file applies: " + err.Error()}}
	}
	p := configParser{b: b, dec: json.NewDecoder(bytes.NewReader(b))}
	p.dec.UseNumber()
	p.object("", map[string]func(string){
		"consumers": func(key string) {
			p.object(key, map[string]func(string){
				"compare": func(key string) { p.bool(key, &cfg.Consumers.Compare) },
			})
		},
		"credentials": func(key string) {
			p.entries(key, credential.CheckName, func(key, name string) {
				var c CredentialConfig
				p.object(key, map[string]func(string){
					"onChange": func(key string) {
						p.choice(key, &c.OnChange, vsockrpc.RefreshNone, vsockrpc.RefreshAuto, vsockrpc.RefreshReload, vsockrpc.RefreshRestart)
					},
					"reloadUnits":  func(key string) { p.strings(key, &c.ReloadUnits) },
					"restartUnits": func(key string) { p.strings(key, &c.RestartUnits) },
				})
				cfg.Credentials[name] = c
			})
		},
		"health": func(key string) {
			p.object(key, map[string]func(string){
				"disk":        func(key string) { p.thresholds(key, &cfg.Health.Rules.DiskDegraded, &cfg.Health.Rules.DiskFailing) },
				"ignoreUnits": func(key string) { p.units(key, &cfg.Health.IgnoreUnits) },
				"memory":      func(key string) { p.thresholds(key, &cfg.Health.Rules.MemoryDegraded, &cfg.Health.Rules.MemoryFailing) },
			})
		},
		"names": func(key string) {
			p.object(key, map[string]func(string){
				"allow": func(key string) { p.strings(key, &cfg.Names.Allow) },
			})
		},
		"peer": func(key string) {
			p.object(key, map[string]func(string){
				"privilegedPort": func(key string) {
					p.choice(key, (*string)(&cfg.Peer.PrivilegedPort), string(vsockrpc.PortRequired), string(vsockrpc.PortIgnored))
				},
			})
		},
		"policy": func(key string) {
			p.object(key, map[string]func(string){
				"load": func(key string) {
					cfg.Policy.Load = map[string][]string{}
					p.entries(key, checkPattern, func(key, pattern string) {
						units := []string{} // an empty list lets nobody
						p.units(key, &units)
						cfg.Policy.Load[pattern] = units
					})
				},
			})
		},
		"previous": func(key string) {
			p.object(key, map[string]func(string){
				"ttl": func(key string) { p.seconds(key, &cfg.Previous.TTL) },
			})
		},
		"provider": func(key string) {
			p.object(key, map[string]func(string){
				"address":  func(key string) { p.address(key, &cfg.Provider.Address) },
				"required": func(key string) { p.bool(key, &cfg.Provider.Required) },
				"timeout":  func(key string) { p.seconds(key, &cfg.Provider.Timeout) },
			})
		},
		"refresh": func(key string) {
			p.object(key, map[string]func(string){
				"never": func(key string) { p.units(key, &cfg.Refresh.Never) },
			})
		},
		"smbios": func(key string) {
			p.object(key, map[string]func(string){
				"read": func(key string) {
					p.choice(key, (*string)(&cfg.SMBIOS.Read), string(ReadAuto), string(ReadAlways), string(ReadNever))
				},
			})
		},
		"socket": func(key string) {
			p.object(key, map[string]func(string){
				"wait": func(key string) { p.seconds(key, &cfg.Socket.Wait) },
			})
		},
	})
	for _, f := range p.faults {
		// A section that stands twice, or in another case, may have been meant.
		section, _, _ := strings.Cut(f.Key, ".")
		cfg.Peer.Deny = cfg.Peer.Deny || strings.EqualFold(section, "peer")
		// A guest that must not boot without does not for a typing error.
		cfg.Provider.Required = cfg.Provider.Required || strings.EqualFold(f.Key, "provider.required")
		cfg.Provider.Fault = cfg.Provider.Fault || strings.EqualFold(f.Key, "provider") || strings.EqualFold(f.Key, "provider.address")
		cfg.Policy.Deny = cfg.Policy.Deny || strings.EqualFold(section, "policy")
	}
	return cfg, p.faults
}

// A configParser goes through JSON that is known to be well-formed, token by
// token: encoding/json by itself takes duplicate keys, keys in another case,
// and does not say on which line a key stands.
type configParser struct {
	b      []byte
	dec    *json.Decoder
	faults []ConfigFault
}

func (p *configParser) next() json.Token {
	t, err := p.dec.Token()
	if err != nil {
		return nil
	}
	return t
}

func (p *configParser) fault(key, format string, a ...any) {
	p.faults = append(p.faults, ConfigFault{Line: lineOf(p.b, p.dec.InputOffset()), Key: key, Problem: fmt.Sprintf(format, a...)})
}

// object reads an object whose keys are those of known, each with the function
// that reads its value.
func (p *configParser) object(key string, known map[string]func(string)) {
	check := func(name string) error {
		if _, ok := known[name]; !ok {
			return fmt.Errorf("unknown; known here: %s", strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
		return nil
	}
	p.entries(key, check, func(path, name string) { known[name](path) })
}

// entries reads an object with read, key by key, but those that do not pass check.
func (p *configParser) entries(key string, check func(name string) error, read func(path, name string)) {
	t := p.next()
	if t != json.Delim('{') {
		p.fault(key, "want an object, have %s", kind(t))
		p.skip(t)
		return
	}
	seen := map[string]bool{}
	for p.dec.More() {
		name, _ := p.next().(string)
		path := strings.TrimPrefix(key+"."+name, ".")
		err := check(name)
		switch {
		case err != nil:
			p.fault(path, "%v", err)
			p.skip(p.next())
		case seen[name]:
			p.fault(path, "stands twice; the first one holds")
			p.skip(p.next())
		default:
			seen[name] = true
			read(path, name)
		}
	}
	p.next() // the closing brace
}

// bool reads true or false.
func (p *configParser) bool(key string, to *bool) {
	t := p.next()
	b, ok := t.(bool)
	if !ok {
		p.fault(key, "want true or false, have %s", kind(t))
		p.skip(t)
		return
	}
	*to = b
}

// address reads a provider's address.
func (p *configParser) address(key string, to *string) {
	t := p.next()
	s, ok := t.(string)
	if !ok {
		p.fault(key, "want a string, have %s", kind(t))
		p.skip(t)
		return
	}
	if s == "" {
		return
	}
	if _, err := vsockrpc.ParseProviderAddress(s); err != nil {
		p.fault(key, "%v", err)
		return
	}
	*to = s
}

// seconds reads a time in whole seconds.
func (p *configParser) seconds(key string, to *time.Duration) {
	t := p.next()
	number, ok := t.(json.Number)
	if !ok {
		p.fault(key, "want a number of seconds, have %s", kind(t))
		p.skip(t)
		return
	}
	n, err := number.Int64()
	if err != nil || n < 0 || n > maxSeconds {
		p.fault(key, "want whole seconds from 0 to %d", maxSeconds)
		return
	}
	*to = time.Duration(n) * time.Second
}

// thresholds reads from how many percent on something is not as it should be.
func (p *configParser) thresholds(key string, degraded, failing *int) {
	p.object(key, map[string]func(string){
		"degraded": func(key string) { p.percent(key, degraded) },
		"failing":  func(key string) { p.percent(key, failing) },
	})
}

// percent reads whole percent from 1; 101 is never reached.
func (p *configParser) percent(key string, to *int) {
	t := p.next()
	number, ok := t.(json.Number)
	if !ok {
		p.fault(key, "want a number of percent, have %s", kind(t))
		p.skip(t)
		return
	}
	n, err := number.Int64()
	if err != nil || n < 1 || n > 101 {
		p.fault(key, "want whole percent from 1 to 100, or 101 for never")
		return
	}
	*to = int(n)
}

// checkPattern checks a credential's name that may end in '*'.
func checkPattern(pattern string) error {
	if pattern == "*" {
		return nil
	}
	return credential.CheckName(strings.TrimSuffix(pattern, "*"))
}

// choice reads a string that is one of values.
func (p *configParser) choice(key string, to *string, values ...string) {
	t := p.next()
	s, ok := t.(string)
	switch {
	case !ok:
		p.fault(key, "want a string, have %s", kind(t))
		p.skip(t)
	case !slices.Contains(values, s):
		p.fault(key, "want one of %s", strings.Join(values, ", "))
	default:
		*to = s
	}
}

// strings reads an array of strings. One that is none costs the whole array.
func (p *configParser) strings(key string, to *[]string) {
	t := p.next()
	if t != json.Delim('[') {
		p.fault(key, "want an array of strings, have %s", kind(t))
		p.skip(t)
		return
	}
	var list []string
	good := true
	for p.dec.More() {
		t := p.next()
		s, ok := t.(string)
		if !ok {
			p.fault(key, "want an array of strings, have %s in it", kind(t))
			p.skip(t)
			good = false
		}
		list = append(list, s)
	}
	p.next() // the closing bracket
	if good {
		*to = list
	}
}

// units reads an array of patterns for names of units. One that is none costs
// the whole array.
func (p *configParser) units(key string, to *[]string) {
	var list []string
	before := len(p.faults)
	p.strings(key, &list)
	for _, pattern := range list {
		if err := checkUnitPattern(pattern); err != nil {
			p.fault(key, "%v", err)
		}
	}
	if len(p.faults) == before {
		*to = list
	}
}

// skip passes over the value that begins with the token t.
func (p *configParser) skip(t json.Token) {
	for depth := 0; ; t = p.next() {
		switch t {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
		if depth <= 0 {
			return
		}
	}
}

// kind names what a token begins, never its content: a secret may have strayed
// into the file.
func kind(t json.Token) string {
	switch t := t.(type) {
	case json.Delim:
		if t == '{' {
			return "an object"
		}
		return "an array"
	case string:
		return "a string"
	case json.Number:
		return "a number"
	case bool:
		return "a boolean"
	}
	return "null"
}

func lineOf(b []byte, offset int64) int {
	return 1 + bytes.Count(b[:min(max(offset, 0), int64(len(b)))], []byte("\n"))
}
