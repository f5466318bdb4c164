package credsocket

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/guestagent/guestagent/internal/credential"
)

// ErrAddress is matched by every error that [ParseAddress] returns.
var ErrAddress = errors.New("not the address of a unit that loads a credential")

const (
	// maxAddress is the longest path of a Unix address that systemd binds to
	// (sockaddr_un_set_path in src/basic/socket-util.c): all of sun_path but
	// one byte.
	maxAddress = 107
	// maxUnit is the longest name of a unit (UNIT_NAME_MAX is 256, with its NUL).
	maxUnit = 255
)

// ParseAddress takes apart the abstract address that systemd binds to before it
// asks for a credential: "@<hex>/unit/UNIT/NAME", the leading NUL written as
// '@' like everywhere in Go. The hex part is a random number of 64 bits as
// printf's %x writes it. Errors match [ErrAddress] and do not quote.
func ParseAddress(addr string) (Request, error) {
	if len(addr) > maxAddress {
		return Request{}, fmt.Errorf("%w: %d bytes are longer than %d", ErrAddress, len(addr), maxAddress)
	}
	rest, ok := strings.CutPrefix(addr, "@")
	if !ok {
		return Request{}, fmt.Errorf("%w: it is not abstract", ErrAddress)
	}
	// Neither name can have a slash in it.
	part := strings.Split(rest, "/")
	if len(part) != 4 || part[1] != "unit" {
		return Request{}, fmt.Errorf("%w: it is not of the form HEX/unit/UNIT/NAME", ErrAddress)
	}
	if n, err := strconv.ParseUint(part[0], 16, 64); err != nil || strconv.FormatUint(n, 16) != part[0] {
		return Request{}, fmt.Errorf("%w: it does not begin with a hexadecimal number", ErrAddress)
	}
	if !validUnit(part[2]) {
		return Request{}, fmt.Errorf("%w: it has no unit's name", ErrAddress)
	}
	if err := credential.CheckName(part[3]); err != nil {
		return Request{}, fmt.Errorf("%w: %v", ErrAddress, err)
	}
	return Request{Unit: part[2], Name: part[3]}, nil
}

// unitTypes are all that systemd knows (unit_type_table in
// src/basic/unit-def.c). Only some of them load credentials.
var unitTypes = []string{
	"service", "mount", "swap", "socket", "target", "device",
	"automount", "timer", "path", "slice", "scope",
}

// validUnit reports whether name is that of a unit that can run
// (unit_name_is_valid with UNIT_NAME_PLAIN|UNIT_NAME_INSTANCE in
// src/basic/unit-name.c): not a template. Only the first '@' is special.
func validUnit(name string) bool {
	dot := strings.LastIndexByte(name, '.')
	if dot <= 0 || len(name) > maxUnit || !slices.Contains(unitTypes, name[dot+1:]) {
		return false
	}
	for _, c := range []byte(name[:dot]) {
		switch {
		case '0' <= c && c <= '9', 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z':
		case strings.IndexByte(`:-_.\@`, c) >= 0:
		default:
			return false
		}
	}
	at := strings.IndexByte(name[:dot], '@')
	return at != 0 && at != dot-1
}
