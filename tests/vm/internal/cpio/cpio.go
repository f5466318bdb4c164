// Package cpio writes archives in the "newc" format, which the Linux kernel unpacks as its initial root.
//
// It is only a writer, and only for that purpose: no checksums, no hard links, files below 4 GiB. Archives may be
// concatenated: each one ends with a trailer and is padded to a multiple of 512 bytes, so the next one starts where the
// kernel looks for it. Owner, mode and time are taken from the [Header] as they are; the caller is trusted.
package cpio

import (
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
)

// File type bits of [Header.Mode], as in st_mode.
const (
	TypeMask    = 0o170000
	TypeRegular = 0o100000
	TypeDir     = 0o040000
	TypeSymlink = 0o120000
	TypeChar    = 0o020000
	TypeBlock   = 0o060000
	TypeFIFO    = 0o010000
)

const (
	trailer   = "TRAILER!!!"
	blockSize = 512
	maxName   = 4096
)

// Header describes one entry.
type Header struct {
	// Name is the path below the root, without a leading slash.
	Name string
	// Mode is type and permission, as in st_mode.
	Mode uint32
	// UID and GID own the entry.
	UID, GID uint32
	// ModTime is in seconds since 1970.
	ModTime uint32
	// Size is the number of bytes that follow: of the content, or of a symbolic link's target.
	Size int64
	// DevMajor and DevMinor are the number of a device node.
	DevMajor, DevMinor uint32
}

// Writer writes one archive.
type Writer struct {
	w      io.Writer
	offset int64
	inode  uint32
	closed bool
}

// NewWriter returns a Writer on w. The caller closes the Writer to complete the archive; w stays open.
func NewWriter(w io.Writer) *Writer {
	return &Writer{w: w}
}

// Add writes one entry with h.Size bytes of content, which may be nil when h.Size is 0. Fewer bytes are an error; what
// is left in content beyond h.Size is not read.
func (w *Writer) Add(h Header, content io.Reader) error {
	if w.closed {
		return errors.New("adding to an archive that is closed")
	}
	name := h.Name
	if name == "" || name == trailer || strings.HasPrefix(name, "/") || strings.ContainsRune(name, 0) || len(name) >= maxName {
		return fmt.Errorf("adding %q: not a name the archive can hold", name)
	}
	if h.Size < 0 || h.Size > math.MaxUint32 {
		return fmt.Errorf("adding %q: %d bytes do not fit the archive", name, h.Size)
	}
	if err := w.add(h, content); err != nil {
		return fmt.Errorf("adding %q: %w", name, err)
	}
	return nil
}

// Close writes the trailer and the padding.
func (w *Writer) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	if err := w.header(Header{Name: trailer}, 0); err != nil {
		return fmt.Errorf("closing archive: %w", err)
	}
	if err := w.pad(blockSize); err != nil {
		return fmt.Errorf("closing archive: %w", err)
	}
	return nil
}

func (w *Writer) add(h Header, content io.Reader) error {
	w.inode++
	if err := w.header(h, w.inode); err != nil {
		return err
	}
	if h.Size == 0 {
		return nil
	}
	n, err := io.CopyN(w.w, content, h.Size)
	w.offset += n
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%d bytes instead of %d: %w", n, h.Size, io.ErrUnexpectedEOF)
	}
	if err != nil {
		return err
	}
	return w.pad(4)
}

// header writes the 110 bytes of ASCII and the name.
func (w *Writer) header(h Header, inode uint32) error {
	links := uint32(1)
	if h.Mode&TypeMask == TypeDir {
		links = 2
	}
	size := uint32(h.Size) //nolint:gosec // Add has checked the range
	s := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		inode, h.Mode, h.UID, h.GID, links, h.ModTime, size,
		0, 0, h.DevMajor, h.DevMinor, len(h.Name)+1, 0, h.Name)
	n, err := io.WriteString(w.w, s)
	w.offset += int64(n)
	if err != nil {
		return err
	}
	return w.pad(4)
}

func (w *Writer) pad(to int64) error {
	n := (to - w.offset%to) % to
	if n == 0 {
		return nil
	}
	written, err := w.w.Write(make([]byte, n))
	w.offset += int64(written)
	return err
}
