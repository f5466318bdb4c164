package vsockrpc

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// DefaultPort is the vsock port of the agent. It is below 1024, so that no
// other than root of the guest can take its place.
const DefaultPort = 1022

// DefaultProviderPort is the host's vsock port that a guest rings at: see
// [Provider]. It is below 1024, so that no other than root of the host can take
// its place.
const DefaultProviderPort = 1021

// maxTargetLen bounds a target; a socket's path is much shorter.
const maxTargetLen = 4096

// A Scheme says how a target is reached.
type Scheme string

// The schemes there are.
const (
	SchemeVsock Scheme = "vsock"     // AF_VSOCK
	SchemeMux   Scheme = "vsock-mux" // a VMM's Unix socket, and CONNECT
	SchemeUnix  Scheme = "unix"      // a Unix socket of the agent
)

// ErrTarget is matched by the errors of [ParseTarget] and
// [ParseProviderAddress].
var ErrTarget = errors.New("not a target")

// A Target says where a server listens.
type Target struct {
	Scheme Scheme
	CID    uint32 // with SchemeVsock
	Path   string // with SchemeMux and SchemeUnix
	Port   uint32 // with SchemeVsock and SchemeMux
}

// ParseTarget parses vsock:CID[:PORT], vsock-mux:PATH[:PORT] or unix:PATH. The
// port is 1022 if it is left out. Numbers are decimal without a sign and
// leading zeros. What follows the last colon of a vsock-mux path is a port if
// it is all digits; of a path that ends that way the port has to be written.
func ParseTarget(s string) (Target, error) {
	return parseTarget(s, DefaultPort, "vsock:CID[:PORT], vsock-mux:PATH[:PORT] or unix:PATH")
}

// ParseProviderAddress parses where a guest finds its provider: vsock:CID[:PORT],
// whose port is 1021 if it is left out, or unix:PATH, which is for containers and
// tests. What String makes of the target means the same here, since port 1022 is
// refused: it is an agent's.
func ParseProviderAddress(s string) (Target, error) {
	if scheme, _, _ := strings.Cut(s, ":"); Scheme(scheme) == SchemeMux {
		return Target{}, fmt.Errorf("%w: %s is how a host dials; a guest of such a VMM has plain vsock: want vsock:2", ErrTarget, SchemeMux)
	}
	t, err := parseTarget(s, DefaultProviderPort, "vsock:CID[:PORT] or unix:PATH")
	if err == nil && t.Port == DefaultPort {
		err = fmt.Errorf("%w: port %d is an agent's, and a provider's is %d", ErrTarget, DefaultPort, DefaultProviderPort)
	}
	if err != nil {
		return Target{}, err
	}
	return t, nil
}

// parseTarget parses a target; want says in an error what it looks like.
func parseTarget(s string, defaultPort uint32, want string) (Target, error) {
	if len(s) > maxTargetLen {
		return Target{}, fmt.Errorf("%w: longer than %d bytes", ErrTarget, maxTargetLen)
	}
	scheme, rest, _ := strings.Cut(s, ":")
	t := Target{Scheme: Scheme(scheme), Port: defaultPort}
	var err error
	switch t.Scheme {
	case SchemeVsock:
		cid, port, hasPort := strings.Cut(rest, ":")
		if t.CID, err = parseNumber("CID", cid, 1); err == nil && hasPort {
			t.Port, err = parseNumber("port", port, 1)
		}
	case SchemeMux:
		t.Path = rest
		if i := strings.LastIndexByte(rest, ':'); i >= 0 && allDigits(rest[i+1:]) {
			t.Path = rest[:i]
			t.Port, err = parseNumber("port", rest[i+1:], 1)
		}
		if err == nil {
			err = checkPath(t.Path)
		}
	case SchemeUnix:
		t.Path, t.Port = rest, 0
		err = checkPath(t.Path)
	default:
		err = fmt.Errorf("%w: want %s", ErrTarget, want)
	}
	if err != nil {
		return Target{}, err
	}
	return t, nil
}

// parseNumber parses a CID or a port. The largest number means any, and is
// neither.
func parseNumber(what, s string, least uint64) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || !allDigits(s) || len(s) > 1 && s[0] == '0' || n < least || n == math.MaxUint32 {
		return 0, fmt.Errorf("%w: the %s is no number from %d to %d", ErrTarget, what, least, uint32(math.MaxUint32-1))
	}
	return uint32(n), nil
}

// allDigits reports whether s is nothing but digits; the empty string is, so
// that a path does not end in a colon by mistake.
func allDigits(s string) bool {
	for i := range len(s) {
		if !isDigit(s[i]) {
			return false
		}
	}
	return true
}

// checkPath refuses what Go would not take for a path: a socket without a
// file, and a NUL.
func checkPath(path string) error {
	switch {
	case path == "":
		return fmt.Errorf("%w: the path is empty", ErrTarget)
	case path[0] == '@':
		return fmt.Errorf("%w: the path begins with '@': write ./@ for a file of that name", ErrTarget)
	case strings.IndexByte(path, 0) >= 0:
		return fmt.Errorf("%w: the path has a NUL", ErrTarget)
	}
	return nil
}

// String returns the target as ParseTarget takes it, the port left out where
// that says the same.
func (t Target) String() string {
	switch t.Scheme {
	case SchemeVsock:
		if t.Port == DefaultPort {
			return fmt.Sprintf("%s:%d", t.Scheme, t.CID)
		}
		return fmt.Sprintf("%s:%d:%d", t.Scheme, t.CID, t.Port)
	case SchemeMux:
		if i := strings.LastIndexByte(t.Path, ':'); t.Port == DefaultPort && (i < 0 || !allDigits(t.Path[i+1:])) {
			return fmt.Sprintf("%s:%s", t.Scheme, t.Path)
		}
		return fmt.Sprintf("%s:%s:%d", t.Scheme, t.Path, t.Port)
	case SchemeUnix:
		return fmt.Sprintf("%s:%s", t.Scheme, t.Path)
	}
	return "no target"
}
