// Package canary finds a secret in places where it must not be.
//
// A test makes a value that occurs nowhere else, lets the programs under test handle it, and looks for it in logs, files,
// arguments and environments. The forms are those that a program makes of a value by mistake, not those that it makes to
// hide it: what is encrypted, compressed or cut in pieces is not found. No function gives the secret out, in an error or
// otherwise.
package canary

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

const (
	// MinSize is the least number of bytes of a secret. The forms of a shorter one would be found by chance.
	MinSize = 16

	bufferSize = 64 << 10
)

// Forms returns what the secret may look like: as it is; in hex, both cases; in base64 with both alphabets, at each of the
// three places that it can have in what was encoded; URL-encoded, with all bytes or only those that need it; as Go prints a
// string that is quoted, and a slice of bytes. It panics where the secret is shorter than [MinSize].
func Forms(secret []byte) [][]byte {
	if len(secret) < MinSize {
		panic("canary: the secret is too short")
	}
	lower := hex.EncodeToString(secret)
	quoted := strconv.Quote(string(secret))
	decimal := fmt.Sprintf("%d", secret)
	var percent strings.Builder
	for i := 0; i < len(lower); i += 2 {
		percent.WriteString("%" + lower[i:i+2])
	}
	all := []string{
		string(secret), lower, strings.ToUpper(lower),
		percent.String(), strings.ToUpper(percent.String()), url.QueryEscape(string(secret)), url.PathEscape(string(secret)),
		quoted[1 : len(quoted)-1], decimal[1 : len(decimal)-1],
	}
	for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for before := range 3 {
			text := e.EncodeToString(append(make([]byte, before), secret...))
			// Without the characters that hold bits of what is before or behind.
			all = append(all, text[(before*8+5)/6:(before+len(secret))*8/6])
		}
	}
	var forms [][]byte
	seen := make(map[string]bool)
	for _, f := range all {
		if !seen[f] {
			forms = append(forms, []byte(f))
		}
		seen[f] = true
	}
	return forms
}

// Scan reads r to its end and returns the offset of the first form that it finds, or -1.
func Scan(r io.Reader, forms [][]byte) (int64, error) {
	longest := 0
	for _, f := range forms {
		longest = max(longest, len(f))
	}
	var (
		buf  []byte
		next = make([]byte, bufferSize)
		base int64 // of buf
	)
	for {
		n, err := r.Read(next)
		buf = append(buf, next[:n]...)
		first := -1
		for _, f := range forms {
			if i := bytes.Index(buf, f); i >= 0 && (first < 0 || i < first) {
				first = i
			}
		}
		switch {
		case first >= 0:
			return base + int64(first), nil
		case errors.Is(err, io.EOF):
			return -1, nil
		case err != nil:
			return -1, err
		}
		// What a form may begin with stays.
		if drop := len(buf) - longest + 1; drop > 0 {
			base += int64(drop)
			buf = append(buf[:0], buf[drop:]...)
		}
	}
}

// ScanFile is [Scan] of a file.
func ScanFile(name string, forms [][]byte) (int64, error) {
	f, err := os.Open(name)
	if err != nil {
		return -1, err
	}
	defer func() { _ = f.Close() }()
	n, err := Scan(f, forms)
	if err != nil {
		return -1, fmt.Errorf("looking into %s: %w", name, err)
	}
	return n, nil
}

// ScanTree looks into all regular files below dir, and returns those that have a form. Sockets and links are left out, and
// what goes away meanwhile.
func ScanTree(dir string, forms [][]byte) ([]string, error) {
	var found []string
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return ignoreGone(err)
		}
		n, err := ScanFile(name, forms)
		if n >= 0 {
			found = append(found, name)
		}
		return ignoreGone(err)
	})
	return found, err
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// ScanProcesses looks into the arguments and the environment of the process root and of all that descend from it, as they
// are now, and returns the files in procfs, "/proc" except in a test, that have a form. It does not see processes that
// were handed to another parent, and neither do those need to be looked for that have ended.
func ScanProcesses(procfs string, root int, forms [][]byte) ([]string, error) {
	stats, err := filepath.Glob(filepath.Join(procfs, "[0-9]*", "stat"))
	if err != nil {
		return nil, err
	}
	parent := make(map[int]int)
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			return nil, err
		}
		// PID (NAME) STATE PARENT: the name may hold anything.
		fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(fields) < 2 {
			return nil, fmt.Errorf("reading %s: it has no parent in it", name)
		}
		if parent[pid], err = strconv.Atoi(fields[1]); err != nil {
			return nil, fmt.Errorf("reading %s: %w", name, err)
		}
	}
	if _, ok := parent[root]; !ok {
		return nil, fmt.Errorf("looking for process %d in %s: %w", root, procfs, fs.ErrNotExist)
	}
	var found []string
	for pid := range parent {
		p, steps := pid, 0
		for p != root && p != 0 && steps <= len(parent) {
			p, steps = parent[p], steps+1
		}
		if p != root {
			continue
		}
		for _, base := range []string{"cmdline", "environ"} {
			name := filepath.Join(procfs, strconv.Itoa(pid), base)
			// An error means that it has ended meanwhile, which a read says with ESRCH.
			if n, err := ScanFile(name, forms); err == nil && n >= 0 {
				found = append(found, name)
			}
		}
	}
	return found, nil
}
