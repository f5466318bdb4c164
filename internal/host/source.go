package host

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/vsockrpc"
)

// maxJSON bounds the JSON form: the largest set in base64, with names.
const maxJSON = 8 << 20

// Wipe wipes the values of all of them.
func Wipe(creds []vsockrpc.Credential) {
	for _, c := range creds {
		c.Value.Wipe()
	}
}

// ParseArgument takes NAME:PATH or NAME:- apart, as LoadCredential= does. What
// has a '=' where NAME:PATH belongs is somebody's secret on a command line, and
// is not repeated.
func ParseArgument(arg string) (name, path string, err error) {
	name, path, ok := strings.Cut(arg, ":")
	switch {
	case !ok && strings.Contains(arg, "="):
		return "", "", errors.New("it has a '=' and no ':': every user of this machine can read a secret there; change it if it is one, put it into a file, and write NAME:PATH, or NAME:- for standard input")
	case !ok:
		return "", "", errors.New("it is not NAME:PATH, or NAME:- for standard input")
	case strings.Contains(name, "="):
		return "", "", errors.New("it has a '=' in the place of its name; write NAME:PATH, or NAME:- for standard input, and never a value")
	case path == "":
		return "", "", errors.New("it has no path behind its ':'; write NAME:PATH, or NAME:- for standard input")
	}
	if err := credential.CheckName(name); err != nil {
		return "", "", err
	}
	return name, path, nil
}

// CheckArguments reports whether all arguments are NAME:PATH, no name stands
// twice, and not more than one is standard input. Nothing is read. It does not
// repeat what may be a value.
func CheckArguments(args []string) error {
	seen := map[string]bool{}
	stdin := false
	for i, arg := range args {
		name, path, err := ParseArgument(arg)
		switch {
		case err != nil:
			return fmt.Errorf("credential %d: %w", i+1, err)
		case seen[name]:
			return fmt.Errorf("credential %s stands twice", name)
		case path == "-" && stdin:
			return errors.New("standard input can be read once, and two credentials want it")
		}
		seen[name] = true
		stdin = stdin || path == "-"
	}
	return nil
}

// ReadArguments reads the credentials that the arguments NAME:PATH name, as
// [CheckArguments] takes them.
func ReadArguments(args []string, stdin io.Reader) (creds []vsockrpc.Credential, err error) {
	if err := CheckArguments(args); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			Wipe(creds)
			creds = nil
		}
	}()
	for _, arg := range args {
		name, path, err := ParseArgument(arg)
		if err != nil {
			return creds, err
		}
		var v secret.Value
		if path == "-" {
			v, err = readValue(stdin, credential.MaxSize)
		} else {
			v, err = readFile(path, credential.MaxSize)
			if e, ok := errors.AsType[*fs.PathError](err); ok && !exists(path) {
				err = fmt.Errorf("%v; its path is not repeated, since it may be a value: write NAME:PATH, or NAME:- for standard input, and never a value", e.Err)
			}
		}
		if err != nil {
			return creds, fmt.Errorf("reading credential %s: %w", name, err)
		}
		creds = append(creds, vsockrpc.Credential{Name: name, Value: v})
	}
	return creds, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// ReadDir reads the files of a folder, such as $CREDENTIALS_DIRECTORY: each is
// a credential by the name of the file. With a prefix only files that begin
// with it are read, and it is taken off. Dotfiles are passed over, as systemd
// does; a folder, or a name that no credential can have, is an error.
func ReadDir(dir, prefix string) (creds []vsockrpc.Credential, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("reading credentials: %w", err)
	}
	defer func() {
		if err != nil {
			Wipe(creds)
			creds = nil
		}
	}()
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), prefix)
		if !ok || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if err := credential.CheckName(name); err != nil {
			return creds, fmt.Errorf("reading credentials in %s: file %q: %w", dir, e.Name(), err)
		}
		v, err := readFile(filepath.Join(dir, e.Name()), credential.MaxSize)
		if err != nil {
			return creds, fmt.Errorf("reading credential %s: %w", name, err)
		}
		creds = append(creds, vsockrpc.Credential{Name: name, Value: v})
	}
	return creds, nil
}

// ReadJSON reads the form that systemd-imds and systemd's tests use:
//
//	{"systemd.credentials": [{"name": "…", "text": "…"}, {"name": "…", "data": "<base64>"}]}
//
// Encrypted ones are for the machine that has the key, and an error here.
// encoding/json leaves copies of the values in memory that nobody wipes.
func ReadJSON(r io.Reader) ([]vsockrpc.Credential, error) {
	b, err := readValue(r, maxJSON)
	if err != nil {
		return nil, fmt.Errorf("reading JSON: %w", err)
	}
	defer b.Wipe()
	var doc struct {
		Credentials []struct {
			Name      string  `json:"name"`
			Revision  string  `json:"revision"`
			Text      *string `json:"text"`
			Data      *string `json:"data"`
			Encrypted *string `json:"encrypted"`
		} `json:"systemd.credentials"`
	}
	dec := json.NewDecoder(bytes.NewReader(b.Bytes()))
	dec.DisallowUnknownFields()
	err = dec.Decode(&doc)
	if err == nil {
		if _, end := dec.Token(); !errors.Is(end, io.EOF) {
			err = errors.New("something follows the end")
		}
	}
	if err != nil {
		// encoding/json may quote what it reads.
		return nil, fmt.Errorf("reading JSON: it is not {\"systemd.credentials\": [{\"name\", \"text\" or \"data\"}, …]} near byte %d", dec.InputOffset())
	}
	var creds []vsockrpc.Credential
	seen := map[string]bool{}
	for i, c := range doc.Credentials {
		if err := credential.CheckName(c.Name); err != nil {
			Wipe(creds)
			return nil, fmt.Errorf("reading JSON: credential %d: %w", i+1, err)
		}
		var v []byte
		switch {
		case c.Encrypted != nil:
			err = errors.New("it is encrypted, for the machine that has the key; put it there by other means")
		case (c.Text == nil) == (c.Data == nil):
			err = errors.New("it needs one of text and data")
		case c.Text != nil && strings.ContainsRune(*c.Text, utf8.RuneError):
			// encoding/json puts that where a string is not Unicode.
			err = errors.New("its text has bytes that are not UTF-8, or U+FFFD in their place; give it as data")
		case c.Text != nil:
			v = []byte(*c.Text)
		default:
			if v, err = base64.StdEncoding.DecodeString(*c.Data); err != nil {
				err = errors.New("its data is not base64")
			}
		}
		switch {
		case err == nil && len(v) > credential.MaxSize:
			err = fmt.Errorf("%d bytes are more than %d", len(v), credential.MaxSize)
		case err == nil && seen[c.Name]:
			err = errors.New("it stands twice")
		}
		seen[c.Name] = true
		if err != nil {
			Wipe(creds)
			return nil, fmt.Errorf("reading JSON: credential %s: %w", c.Name, err)
		}
		creds = append(creds, vsockrpc.Credential{Name: c.Name, Revision: c.Revision, Value: secret.New(v)})
	}
	return creds, nil
}

// readFile reads a regular file, or a pipe such as /dev/stdin, up to limit bytes.
func readFile(path string, limit int) (secret.Value, error) {
	f, err := os.Open(path)
	if err != nil {
		return secret.Value{}, err
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.IsDir() {
		return secret.Value{}, &fs.PathError{Op: "read", Path: path, Err: errors.New("it is a folder")}
	}
	return readValue(f, limit)
}

// readValue reads up to limit bytes, and leaves no copy behind.
func readValue(r io.Reader, limit int) (secret.Value, error) {
	buf := make([]byte, 0, 4096)
	for {
		if len(buf) == cap(buf) {
			bigger := slices.Grow([]byte(nil), 2*cap(buf))[:len(buf)]
			copy(bigger, buf)
			secret.Zero(buf)
			buf = bigger
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		switch {
		case len(buf) > limit:
			secret.Zero(buf)
			return secret.Value{}, fmt.Errorf("more than %d bytes", limit)
		case errors.Is(err, io.EOF):
			return secret.New(buf), nil
		case err != nil:
			secret.Zero(buf)
			return secret.Value{}, err
		}
	}
}

// ReadJSONFile is [ReadJSON] of a file, or of standard input if path is "-".
func ReadJSONFile(path string, stdin io.Reader) ([]vsockrpc.Credential, error) {
	if path == "-" {
		return ReadJSON(stdin)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading JSON: %w", err)
	}
	defer f.Close()
	return ReadJSON(f)
}

// CheckSet reports whether the credentials are a set that a guest may take. An
// empty one is refused: with prune it removes everything.
func CheckSet(creds []vsockrpc.Credential) error {
	size := 0
	for _, c := range creds {
		size += c.Value.Len()
	}
	switch {
	case len(creds) == 0:
		return errors.New("there is no credential to push; `guestctl rm` removes those that are there")
	case len(creds) > credential.MaxSetNames:
		return fmt.Errorf("%d credentials are more than a set may have, %d; push them in parts", len(creds), credential.MaxSetNames)
	case size > credential.MaxSetSize:
		return fmt.Errorf("%d bytes are more than a set may have, %d; push them in parts", size, credential.MaxSetSize)
	}
	return nil
}

// CheckNames reports whether all can be names of credentials.
func CheckNames(names []string) error {
	for i, name := range names {
		if err := credential.CheckName(name); err != nil {
			return fmt.Errorf("credential %d: %w", i+1, err)
		}
	}
	return nil
}
