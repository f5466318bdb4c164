package smbios

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"syscall"

	"github.com/guestagent/guestagent/internal/secret"
)

// Where Linux shows SMBIOS, below the folder that is usually /sys. All of it
// is readable by root only.
const (
	pathTable      = "firmware/dmi/tables/DMI"
	pathEntryPoint = "firmware/dmi/tables/smbios_entry_point"
	pathEntries    = "firmware/dmi/entries"
)

// Read reads the SMBIOS table that Linux shows below the folder sysfs,
// usually "/sys": firmware/dmi/tables/DMI with the entry point beside it.
// Where that file does not exist it reads firmware/dmi/entries/11-N/raw for N
// from 0 until one is missing; there, as for systemd, the last string of a
// structure needs no NUL. Symbolic links may not lead out of sysfs, and only
// regular files are read.
//
// An entry point that is missing or cannot be read is a fault in the Table.
// The error matches [ErrNotFound] where neither tables/DMI nor the entries
// folder exists, and [ErrTooLarge] past [MaxTableSize] bytes; every other
// error is the operating system's, such as [fs.ErrPermission]. With an error
// the Table is the zero value.
//
// The buffers that it reads into are wiped before it returns.
func Read(sysfs string) (Table, error) {
	root, err := os.OpenRoot(sysfs)
	if errors.Is(err, fs.ErrNotExist) {
		return Table{}, fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	if err != nil {
		return Table{}, fmt.Errorf("opening sysfs: %w", err)
	}
	defer root.Close()

	table, err := readFile(root, pathTable, MaxTableSize)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return readEntries(root)
	case err != nil:
		return Table{}, fmt.Errorf("reading the SMBIOS table: %w", err)
	}
	defer secret.Zero(table)
	entryPoint, epErr := readFile(root, pathEntryPoint, maxEntryPointSize)
	return parse(table, entryPoint, epErr, decode)
}

// readEntries reads what dmi-sysfs shows of the structures of type 11.
func readEntries(root *os.Root) (Table, error) {
	st, err := root.Stat(pathEntries)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Table{}, fmt.Errorf("%w: there is neither %s nor %s in %s", ErrNotFound, pathTable, pathEntries, root.Name())
	case err != nil:
		return Table{}, fmt.Errorf("looking for SMBIOS entries: %w", err)
	case !st.IsDir():
		return Table{}, fmt.Errorf("looking for SMBIOS entries: %s is not a folder", pathEntries)
	}

	var raw [][]byte
	defer func() {
		for _, b := range raw {
			secret.Zero(b)
		}
	}()
	// One more than is used, so that what is left out is told.
	left := MaxTableSize
	for i := range MaxOEMStructures + 1 {
		b, err := readFile(root, path.Join(pathEntries, "11-"+strconv.Itoa(i), "raw"), left)
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if errors.Is(err, ErrTooLarge) {
			return Table{}, fmt.Errorf("reading SMBIOS entries: %w: entries 11-0 to 11-%d have more than %d bytes", ErrTooLarge, i, MaxTableSize)
		}
		if err != nil {
			return Table{}, fmt.Errorf("reading SMBIOS entries: %w", err)
		}
		raw = append(raw, b)
		left -= len(b)
	}
	return parseEntries(raw, decode)
}

// readFile reads a regular file of at most limit bytes. The caller wipes the
// result.
func readFile(root *os.Root, name string, limit int) ([]byte, error) {
	// O_NONBLOCK, or opening a FIFO would wait for a writer.
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	b, err := readAll(f, st.Size(), limit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// readAll reads r to its end, in a loop: the kernel may give less than was
// asked for. size is what the file says of its size, which for a file of
// sysfs may be 0 whatever is in it. More than limit bytes are refused, without
// reading on. Buffers that it does not return it wipes.
func readAll(r io.Reader, size int64, limit int) ([]byte, error) {
	tooLarge := fmt.Errorf("%w: more than %d bytes", ErrTooLarge, limit)
	if size > int64(limit) {
		return nil, tooLarge
	}
	// One byte more than expected, to see the end without growing.
	buf := make([]byte, max(int(size)+1, min(4096, limit+1)))
	n := 0
	for {
		if n > limit {
			secret.Zero(buf)
			return nil, tooLarge
		}
		if n == len(buf) {
			grown := make([]byte, min(2*len(buf), limit+1))
			copy(grown, buf)
			secret.Zero(buf)
			buf = grown
		}
		m, err := r.Read(buf[n:])
		n += m
		if errors.Is(err, io.EOF) && n <= limit {
			return buf[:n:n], nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			secret.Zero(buf)
			return nil, err
		}
	}
}
