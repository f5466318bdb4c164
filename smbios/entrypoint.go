package smbios

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// An EntryPoint is what the entry point says of a table. The kernel has
// already followed it; here it only tells where the table ends.
type EntryPoint struct {
	// Version is the SMBIOS version, "3.2".
	Version string
	// Bits is 64 for the entry point of SMBIOS 3 and 32 for the older ones; 0
	// where there is no sound entry point.
	Bits int
	// Size is the declared size of the table in bytes: exact with 32 bits, at
	// most that with 64.
	Size int64
	// Count is the declared number of structures; 0 with 64 bits, which do
	// not say.
	Count int
}

// maxEntryPointSize bounds what is read of an entry point. The kernel keeps
// at most 32 bytes of it.
const maxEntryPointSize = 64

// Entry points by their anchors, with the fields' places. The first two are
// in DSP0134, 5.2; the last is what stands inside the second, and what Linux
// shows of machines from before SMBIOS 2.1.
var (
	anchor64     = []byte("_SM3_")
	anchor32     = []byte("_SM_")
	anchorLegacy = []byte("_DMI_")
)

const (
	size64     = 24
	size32     = 31
	sizeLegacy = 15
	offLegacy  = 16 // where anchorLegacy stands in a 32-bit entry point
)

// parseEntryPoint parses the three kinds of entry points that Linux shows in
// tables/smbios_entry_point. The zero value comes with every error.
func parseEntryPoint(b []byte) (EntryPoint, error) {
	le := binary.LittleEndian
	switch {
	case len(b) == 0:
		return EntryPoint{}, errors.New("it is empty")
	case len(b) > maxEntryPointSize:
		return EntryPoint{}, fmt.Errorf("%d bytes are longer than %d", len(b), maxEntryPointSize)

	case bytes.HasPrefix(b, anchor64):
		if err := checkSum(b, 6, size64); err != nil {
			return EntryPoint{}, err
		}
		return EntryPoint{
			Version: fmt.Sprintf("%d.%d", b[7], b[8]),
			Bits:    64,
			Size:    int64(le.Uint32(b[12:])),
		}, nil

	case bytes.HasPrefix(b, anchor32):
		// The specification of SMBIOS 2.1 gave the length as 30, and firmware
		// that copied it is still about (DSP0134, 5.2.1). The bytes up to 30
		// are all that is needed here.
		if err := checkSum(b, 5, size32-1); err != nil {
			return EntryPoint{}, err
		}
		if !bytes.HasPrefix(b[offLegacy:], anchorLegacy) {
			return EntryPoint{}, errors.New("it lacks the anchor _DMI_")
		}
		return EntryPoint{
			Version: fmt.Sprintf("%d.%d", b[6], b[7]),
			Bits:    32,
			Size:    int64(le.Uint16(b[22:])),
			Count:   int(le.Uint16(b[28:])),
		}, nil

	case bytes.HasPrefix(b, anchorLegacy):
		if len(b) < sizeLegacy {
			return EntryPoint{}, fmt.Errorf("%d bytes are shorter than %d", len(b), sizeLegacy)
		}
		if sum(b[:sizeLegacy]) != 0 {
			return EntryPoint{}, errors.New("its checksum is wrong")
		}
		return EntryPoint{
			Version: fmt.Sprintf("%d.%d", b[14]>>4, b[14]&0x0F),
			Bits:    32,
			Size:    int64(le.Uint16(b[6:])),
			Count:   int(le.Uint16(b[12:])),
		}, nil
	}
	return EntryPoint{}, errors.New("it has no known anchor")
}

// checkSum checks that b is as long as the byte at offset off says, that this
// is at least least, and that those bytes add up to zero.
func checkSum(b []byte, off, least int) error {
	if len(b) < least {
		return fmt.Errorf("%d bytes are shorter than %d", len(b), least)
	}
	switch n := int(b[off]); {
	case n < least:
		return fmt.Errorf("its length is %d, which is less than %d", n, least)
	case n > len(b):
		return fmt.Errorf("its length is %d, but there are %d bytes", n, len(b))
	case sum(b[:n]) != 0:
		return errors.New("its checksum is wrong")
	}
	return nil
}

// sum adds up bytes modulo 256.
func sum(b []byte) (s byte) {
	for _, c := range b {
		s += c
	}
	return s
}
