package host

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/unit"

	"github.com/guestagent/guestagent/vsockrpc"
)

// A Guest is a virtual machine to talk to.
type Guest struct {
	// Name is the VM's name, or the target as it was written.
	Name string
	// Target is how it is reached.
	Target vsockrpc.Target
	// Provider is the host's end that the guest can call.
	Provider ProviderAddress
}

// A ProviderAddress says where the provider of one guest listens on the host.
type ProviderAddress struct {
	// Port is what the guest dials on CID 2. Over AF_VSOCK the VMs of a host
	// share its ports, so that each needs one of its own, from
	// [vsockrpc.FirstProviderPort] to [vsockrpc.LastProviderPort].
	Port uint32
	// Socket is the provider's own Unix socket, for its status, or "" for a
	// guest that has no name.
	Socket string
}

// A Registry is where the VMs of this host are named: a file NAME.json each,
// with {"target": "vsock:3"} or, where its provider listens elsewhere,
//
//	{"target": "vsock:3", "provider": {"port": 1020, "socket": "/run/web.sock"}}
//
// Of two files with one name the first folder's counts.
type Registry struct {
	Dirs []string
}

// DefaultRegistry is /etc/guestagent/vms.d, then /run/guestagent/vms.d.
func DefaultRegistry() Registry {
	return Registry{Dirs: []string{"/etc/guestagent/vms.d", "/run/guestagent/vms.d"}}
}

// maxVMFile bounds a VM's file, in bytes.
const maxVMFile = 64 << 10

// maxVMName is the longest name of a VM, in bytes: with ".json" it is a file's.
const maxVMName = 250

// providerDir is where the providers' own sockets are by default.
const providerDir = "/run/guestagent/provide/"

// privilegedPorts are those below it: the kernel keeps them for root.
const privilegedPorts = 1024

// maxSocketPath is the longest path of a Unix socket, in bytes.
const maxSocketPath = 107

// PathName makes a name of the path of a VM's socket, as systemd-escape --path
// does, so that no two paths have one name.
func PathName(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("making a name of the path %q: %w", path, err)
	}
	return unit.UnitNamePathEscape(abs), nil
}

// ErrUnknownVM is matched where a name is neither a target nor a VM's.
var ErrUnknownVM = errors.New("no such VM")

// ErrTargets is matched where a list of targets is not one.
var ErrTargets = errors.New("not a list of targets")

// checkVMName reports whether name can be a VM's: letters, digits and '.', '_',
// '-', '@', '+', none of which means anything in a list of targets. more are
// other characters that are allowed too.
func checkVMName(name, more string) error {
	if name == "" || len(name) > maxVMName || name[0] == '.' || name[0] == '-' {
		return errors.New("a VM's name has 1 to 250 bytes and begins with neither '.' nor '-'")
	}
	for i := range len(name) {
		c := name[i]
		if (c|0x20 < 'a' || c|0x20 > 'z') && (c < '0' || c > '9') && !strings.ContainsRune("._-@+"+more, rune(c)) {
			return errors.New("a VM's name has letters, digits, '.', '_', '-', '@' and '+'")
		}
	}
	return nil
}

// List returns all VMs by name. A file that is not understood is an error that
// names it; the VMs that are sound come with it.
func (r Registry) List() ([]Guest, error) {
	var guests []Guest
	var errs []error
	seen := map[string]bool{}
	for _, dir := range r.Dirs {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("reading the VMs: %w", err))
			continue
		}
		for _, e := range entries {
			name, ok := strings.CutSuffix(e.Name(), ".json")
			if !ok || strings.HasPrefix(name, ".") || seen[name] {
				continue
			}
			// A file that is wrong hides the second folder's all the same: that
			// one may be another VM's.
			seen[name] = true
			file := filepath.Join(dir, e.Name())
			g, err := readVM(file, name)
			if err != nil {
				errs = append(errs, fmt.Errorf("reading VM %q: %w", file, err))
				continue
			}
			guests = append(guests, g)
		}
	}
	slices.SortFunc(guests, func(a, b Guest) int { return cmp.Compare(a.Name, b.Name) })
	return guests, errors.Join(errs...)
}

func readVM(file, name string) (Guest, error) {
	if err := checkVMName(name, ""); err != nil {
		return Guest{}, err
	}
	f, err := os.Open(file)
	if err != nil {
		return Guest{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxVMFile+1))
	if err != nil {
		return Guest{}, err
	}
	if len(b) > maxVMFile {
		return Guest{}, fmt.Errorf("more than %d bytes", maxVMFile)
	}
	return parseVM(b, name)
}

// parseVM parses what stands in a VM's file.
func parseVM(b []byte, name string) (Guest, error) {
	var doc struct {
		Target   string `json:"target"`
		Provider struct {
			Port   *uint32 `json:"port"`
			Socket *string `json:"socket"`
		} `json:"provider"`
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	err := dec.Decode(&doc)
	if err == nil {
		if _, end := dec.Token(); !errors.Is(end, io.EOF) {
			err = errors.New("something follows the end")
		}
	}
	if err != nil {
		return Guest{}, fmt.Errorf("%w; it should be like {\"target\": \"vsock:3\"}, or {\"target\": \"vsock:3\", \"provider\": {\"port\": 1020, \"socket\": \"/run/web.sock\"}}", err)
	}
	t, err := vsockrpc.ParseTarget(doc.Target)
	if err != nil {
		return Guest{}, err
	}
	g := Guest{Name: name, Target: t, Provider: ProviderAddress{Port: vsockrpc.DefaultProviderPort, Socket: providerDir + name + ".sock"}}
	if p := doc.Provider.Port; p != nil {
		if err := checkProviderPort(*p, t.Scheme); err != nil {
			return Guest{}, err
		}
		g.Provider.Port = *p
	}
	if p := doc.Provider.Socket; p != nil {
		if err := checkProviderSocket(*p); err != nil {
			return Guest{}, err
		}
		g.Provider.Socket = *p
	}
	return g, nil
}

func checkProviderPort(port uint32, scheme vsockrpc.Scheme) error {
	switch {
	case port == 0 || port == math.MaxUint32:
		return fmt.Errorf("the provider's port %d is no number from 1 to %d", port, uint32(math.MaxUint32-1))
	case scheme == vsockrpc.SchemeUnix:
		return errors.New("the provider's port is for a guest that has vsock, and over unix:PATH none can call; leave it out")
	case port == vsockrpc.DefaultPort:
		return fmt.Errorf("the provider's port %d is an agent's, and no guest takes it; the provider's is %d where it need not be another", port, vsockrpc.DefaultProviderPort)
	case scheme == vsockrpc.SchemeVsock:
		return CheckProviderPort(port)
	}
	return nil
}

// CheckProviderPort refuses a port that a provider should not listen on over
// AF_VSOCK.
func CheckProviderPort(port uint32) error {
	const first, last = vsockrpc.FirstProviderPort, vsockrpc.LastProviderPort
	why := ""
	switch {
	case port >= privilegedPorts:
		why = "any user of this host could listen there in its place"
	case port > last:
		why = fmt.Sprintf("%d is an agent's, and %d is kept free", vsockrpc.DefaultPort, privilegedPorts-1)
	case port < first:
		why = "it could be taken, since guests are called from those below"
	default:
		return nil
	}
	return fmt.Errorf("the provider's port %d is not from %d to %d: %s; choose one there that no other VM's provider has", port, first, last, why)
}

func checkProviderSocket(path string) error {
	switch {
	case !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" || strings.IndexByte(path, 0) >= 0:
		return errors.New("the provider's socket is no absolute path of a file, without \"..\" and the like")
	case len(path) > maxSocketPath:
		return fmt.Errorf("the path of the provider's socket has %d bytes, and nobody can connect to one of more than %d; choose a shorter one", len(path), maxSocketPath)
	}
	return nil
}

// All returns all VMs, or an error if one is not understood: whoever means all
// of them does not mean all but one.
func (r Registry) All() ([]Guest, error) {
	guests, err := r.List()
	switch {
	case err != nil:
		return nil, err
	case len(guests) == 0:
		return nil, fmt.Errorf("%w: there is none in %s", ErrUnknownVM, strings.Join(r.Dirs, ", "))
	}
	return guests, nil
}

// Resolve returns the guests that a list names: targets, names of VMs and globs
// over those, separated by commas. Each guest stands once. What stands where a
// name belongs is not quoted unless it can be one.
func (r Registry) Resolve(list string) ([]Guest, error) {
	var all, found []Guest
	listed := false
	var listErr error
	add := func(g Guest) {
		if !slices.ContainsFunc(found, func(h Guest) bool { return h.Target == g.Target }) {
			found = append(found, g)
		}
	}
	for word := range strings.SplitSeq(list, ",") {
		// A VM's name holds no ':', and every target does.
		if strings.Contains(word, ":") {
			t, err := vsockrpc.ParseTarget(word)
			if err != nil {
				return nil, fmt.Errorf("%w: %w, or the name of a VM", ErrTargets, err)
			}
			add(Guest{Name: word, Target: t, Provider: ProviderAddress{Port: vsockrpc.DefaultProviderPort}})
			continue
		}
		const meta = `*?[]^\`
		if strings.Contains(word, "=") {
			return nil, fmt.Errorf("%w: one of them has a '=': every user of this machine can read a secret there; change it if it is one", ErrTargets)
		}
		_, err := path.Match(word, "")
		if err != nil || checkVMName(word, meta) != nil {
			return nil, fmt.Errorf("%w: one of them is neither a VM's name, nor a glob, nor vsock:CID, vsock-mux:PATH or unix:PATH", ErrTargets)
		}
		if !listed {
			all, listErr = r.List()
			listed = true
		}
		if listErr != nil && strings.ContainsAny(word, meta) {
			return nil, fmt.Errorf("matching %s: %w", word, listErr)
		}
		matched := false
		for _, g := range all {
			if ok, _ := path.Match(word, g.Name); ok {
				add(g)
				matched = true
			}
		}
		if !matched {
			// A file that was not understood may be the one that is missed.
			return nil, errors.Join(fmt.Errorf("%w: %s is in none of %s; `guestctl list` shows those that are", ErrUnknownVM, word, strings.Join(r.Dirs, ", ")), listErr)
		}
	}
	return found, nil
}
