package smbios

import (
	"errors"

	"github.com/guestagent/guestagent/internal/secret"
)

// errBase64 is what decodeBase64 returns. It says no more, for an offset or a
// byte would be content.
var errBase64 = errors.New("not base64")

// decodeBase64 decodes what systemd's unbase64mem (src/basic/hexdecoct.c)
// decodes, since v255, and refuses what it refuses: padding is mandatory, the
// bits that it leaves unused must be zero, and nothing but white space may
// follow it; space, tab, line feed and carriage return are skipped wherever
// they stand; '-' and '_' may stand for '+' and '/', in one text with them.
// Nothing at all decodes to nothing.
//
// encoding/base64 is no help here: it skips line ends only, and knows one
// alphabet at a time.
//
// The result is the caller's, in a buffer of its own. On error that was wiped.
func decodeBase64(src []byte) ([]byte, error) {
	out := make([]byte, 0, len(src)/4*3)
	fail := func() ([]byte, error) {
		secret.Zero(out)
		return nil, errBase64
	}

	var group uint32 // the six-bit digits of a group of four, the first one highest
	var digits, pads int
	for _, c := range src {
		switch c {
		case ' ', '\t', '\n', '\r':
			continue
		}
		if pads > 0 && digits == 0 {
			return fail() // the padded group is the last one
		}
		if c == '=' {
			if digits < 2 {
				return fail()
			}
			pads++
			group <<= 6
		} else {
			v, ok := base64Digit(c)
			if !ok || pads > 0 {
				return fail()
			}
			group = group<<6 | v
		}
		if digits++; digits < 4 {
			continue
		}
		if unused := uint32(1)<<(8*pads) - 1; group&unused != 0 {
			return fail()
		}
		b := [3]byte{byte(group >> 16), byte(group >> 8), byte(group)}
		out = append(out, b[:3-pads]...)
		group, digits = 0, 0
	}
	if digits != 0 {
		return fail()
	}
	return out, nil
}

// base64Digit returns what a digit of either alphabet stands for.
func base64Digit(c byte) (uint32, bool) {
	switch {
	case c >= 'A' && c <= 'Z':
		return uint32(c - 'A'), true
	case c >= 'a' && c <= 'z':
		return uint32(c-'a') + 26, true
	case c >= '0' && c <= '9':
		return uint32(c-'0') + 52, true
	case c == '+', c == '-':
		return 62, true
	case c == '/', c == '_':
		return 63, true
	}
	return 0, false
}
