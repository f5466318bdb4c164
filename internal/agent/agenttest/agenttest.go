// Package agenttest makes the folders of a guest that tests hand to the agent.
package agenttest

import (
	"encoding/binary"
	"os"
	"path/filepath"
)

// Table returns an SMBIOS 3 table whose one structure of type 11 has the given
// OEM strings, and its entry point.
func Table(oem ...string) (table, entryPoint []byte) {
	table = []byte{0, 18, 0, 0} // a BIOS structure without strings comes first
	table = append(table, make([]byte, 14+2)...)
	table = append(table, 11, 5, 0x00, 0x0E, byte(len(oem))) //nolint:gosec // QEMU lets it wrap, too
	for _, s := range oem {
		table = append(append(table, s...), 0)
	}
	if len(oem) == 0 {
		table = append(table, 0)
	}
	table = append(table, 0)
	table = append(table, 127, 4, 0x00, 0x7F, 0, 0)

	entryPoint = make([]byte, 24)
	copy(entryPoint, "_SM3_")
	entryPoint[6], entryPoint[7], entryPoint[8], entryPoint[10] = 24, 3, 2, 1
	binary.LittleEndian.PutUint32(entryPoint[12:], uint32(len(table))) //nolint:gosec // a test's table is small
	sum := byte(0)
	for _, b := range entryPoint {
		sum += b
	}
	entryPoint[5] = -sum
	return table, entryPoint
}

// WriteSMBIOS puts such a table where the kernel would show it below root.
func WriteSMBIOS(root string, oem ...string) error {
	table, entryPoint := Table(oem...)
	dir := filepath.Join(root, "sys/firmware/dmi/tables")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "DMI"), table, 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "smbios_entry_point"), entryPoint, 0o600)
}
