package host

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	labelsFile = "labels.json"
	labelsTemp = ".labels.json.new"
	labelsLock = "lock"
	// labelsVersion is the version of the file's form.
	labelsVersion = 1
	// maxLabels bounds the file. What is written is always shorter: 1023 entries
	// with the longest names, labels and problems, each byte escaped.
	maxLabels = 8 << 20
	// maxProblem is how much of a problem is kept, in bytes.
	maxProblem = 1 << 10
	// labelSize is how many random bytes a label is.
	labelSize = 8
)

// Labels keeps a label for each value that a provider gives to its guest, so
// that one which starts again does not seem to rotate what it gives. It also
// keeps which values a gate rejected.
//
// A label is random, and says nothing of its value. To know a value again,
// there is a file with its HMAC, and with the key of that: who can read the
// file can try guesses of a weak secret. So the folder belongs into memory,
// such as below /run, and to the provider alone. Nothing is lost with it that
// matters: a host that starts anew starts its guests anew.
//
// It is used by one goroutine, and a folder by one Labels.
type Labels struct {
	root    *os.Root
	lock    *os.File
	dir     string
	state   labels
	unsaved bool
	problem string
}

// labels is what the file has. It holds no value.
type labels struct {
	Version int         `json:"version"`
	Key     []byte      `json:"key"`
	Labels  []labelling `json:"labels"` // sorted by name
	// Gone says that names went since [Labels.Tried].
	Gone bool `json:"gone,omitzero"`
}

// A labelling is what is kept of one value.
type labelling struct {
	Name     string `json:"name"`
	Revision string `json:"revision"`
	MAC      []byte `json:"mac"`
	// New says that the value has changed since [Labels.Tried].
	New      bool   `json:"new,omitzero"`
	Rejected bool   `json:"rejected,omitzero"`
	Problem  string `json:"problem,omitzero"`
}

// OpenLabels opens the labels that are kept in the folder, and makes it, with
// mode 0700, if it is missing. A folder that is another user's, that others may
// write to, or whose lock another process has, is an error; the last one matches
// [ErrProviderRuns]. Labels that cannot be read are none: see [Labels.Problem].
// The caller closes it.
func OpenLabels(dir string) (*Labels, error) {
	l, err := openLabels(dir)
	if err != nil {
		return nil, fmt.Errorf("opening the labels in %q: %w", dir, err)
	}
	return l, nil
}

func openLabels(dir string) (_ *Labels, err error) {
	if dir == "" {
		return nil, errors.New("no folder is named")
	}
	if err := makePrivate(dir); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = root.Close()
		}
	}()
	fi, err := root.Stat(".")
	switch {
	case err != nil:
		return nil, err
	case !owned(fi):
		return nil, errors.New("the folder is another user's; take one of this user alone, with mode 0700")
	case fi.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("others may write to the folder, its mode is %#o; take one of this user alone, with mode 0700", fi.Mode().Perm())
	}
	lock, err := lockLabels(root)
	if err != nil {
		return nil, err
	}
	l := &Labels{root: root, lock: lock, dir: dir}
	switch b, err := readLabels(root); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		l.problem = err.Error()
	default:
		if l.state, err = parseLabels(b); err != nil {
			l.problem = err.Error()
		}
	}
	if l.problem != "" {
		l.problem = fmt.Sprintf("reading the labels in %q: %s; all values get new labels, and none counts as rejected", dir, l.problem)
	}
	if l.state.Key == nil {
		key := make([]byte, sha256.Size)
		_, _ = rand.Read(key) // it does not fail
		l.state = labels{Version: labelsVersion, Key: key, Labels: []labelling{}}
	}
	return l, nil
}

// lockLabels takes the folder's lock, which its file's end gives back.
func lockLabels(root *os.Root) (*os.File, error) {
	f, err := root.OpenFile(labelsLock, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return f, nil
	}
	_ = f.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, fmt.Errorf("%w, or another provider keeps its labels here; end that one, or take another folder", ErrProviderRuns)
	}
	return nil, fmt.Errorf("taking the lock: %w", err)
}

// Problem is why the labels that were kept could not be read and are as good
// as none, in one line for a log, or empty. It says nothing of any value.
func (l *Labels) Problem() string { return l.problem }

// Close closes the folder, and gives its lock back. What was not saved is lost.
func (l *Labels) Close() error { return errors.Join(l.root.Close(), l.lock.Close()) }

// Label labels all values of a set. One that has no Revision gets that which
// its value has had so far, or a new one if the value has changed, were it back
// to what it was earlier. It sets Rejected where a gate has rejected the value,
// under whatever label, as long as all values that were rejected with it are as
// they were. What is kept of names that are not in the set is
// forgotten.
//
// Where something cannot be saved, all is labelled nevertheless, and the next
// call tries again. After the error of a set that is none, nothing is.
func (l *Labels) Label(creds []vsockrpc.Credential) error {
	if err := checkLabelled(creds); err != nil {
		return fmt.Errorf("labelling: %w", err)
	}
	old := make(map[string]labelling, len(l.state.Labels))
	for _, x := range l.state.Labels {
		old[x.Name] = x
	}
	kept := make(map[string]labelling, len(creds))
	again := 0 // rejected values that are still as they were
	for i := range creds {
		c := &creds[i]
		mac := l.mac(*c)
		x, ok := old[c.Name]
		if !ok || !hmac.Equal(x.MAC, mac) {
			x = labelling{Name: c.Name, Revision: c.Revision, MAC: mac, New: true}
		}
		switch {
		case c.Revision != "":
			x.Revision = c.Revision
		case x.Revision != "":
			c.Revision = x.Revision
		default:
			x.Revision = newLabel()
			c.Revision = x.Revision
		}
		if x.Rejected {
			again++
		}
		kept[c.Name] = x
	}
	rejected := len(l.Rejected())
	for i := range creds {
		x := kept[creds[i].Name]
		if again < rejected {
			// It is another set: a certificate comes again with the right key.
			x.Rejected, x.Problem = false, ""
			kept[x.Name] = x
		}
		creds[i].Rejected = x.Rejected
	}
	gone := l.state.Gone
	for name := range old {
		if _, ok := kept[name]; !ok {
			gone = true
		}
	}
	list := slices.SortedFunc(maps.Values(kept), func(a, b labelling) int { return strings.Compare(a.Name, b.Name) })
	return l.update(list, gone)
}

// Pending returns the names whose values have changed since [Labels.Tried], in
// this process or in one before, and whether anything has: a name may have gone.
func (l *Labels) Pending() (names []string, pending bool) {
	for _, x := range l.state.Labels {
		if x.New {
			names = append(names, x.Name)
		}
	}
	return names, l.state.Gone || len(names) > 0
}

// Tried notes that the guest was given the set as [Labels.Label] saw it last,
// whatever came of it.
func (l *Labels) Tried() error {
	list := slices.Clone(l.state.Labels)
	for i := range list {
		list[i].New = false
	}
	return l.update(list, false)
}

// checkLabelled refuses what parseLabels would not take back.
func checkLabelled(creds []vsockrpc.Credential) error {
	if len(creds) > credential.MaxSetNames {
		return fmt.Errorf("%d credentials are more than a set may have, %d", len(creds), credential.MaxSetNames)
	}
	seen := make(map[string]bool, len(creds))
	for i, c := range creds {
		if err := credential.CheckName(c.Name); err != nil {
			return fmt.Errorf("credential %d: %w", i+1, err)
		}
		if err := checkRevision(c.Revision); err != nil {
			return fmt.Errorf("credential %s: its revision: %w", c.Name, err)
		}
		if seen[c.Name] {
			return fmt.Errorf("credential %s stands twice", c.Name)
		}
		seen[c.Name] = true
	}
	return nil
}

// mac is of the name, too: it does not show that two have one value.
func (l *Labels) mac(c vsockrpc.Credential) []byte {
	h := hmac.New(sha256.New, l.state.Key)
	h.Write([]byte(c.Name))
	h.Write([]byte{0})
	h.Write(c.Value.Bytes())
	return h.Sum(nil)
}

func newLabel() string {
	b := make([]byte, labelSize)
	_, _ = rand.Read(b) // it does not fail
	return hex.EncodeToString(b)
}

// Reject notes that a gate has rejected the values of these names, those that
// [Labels.Label] saw last, and why, in one line. That lasts until the value
// changes, or [Labels.Accept]. Names that are not known are passed over.
func (l *Labels) Reject(names []string, problem string) error {
	return l.mark(names, true, oneLine(problem))
}

// Accept takes back that the values of these names are rejected.
func (l *Labels) Accept(names []string) error {
	return l.mark(names, false, "")
}

func (l *Labels) mark(names []string, rejected bool, problem string) error {
	list := slices.Clone(l.state.Labels)
	for i := range list {
		if slices.Contains(names, list[i].Name) {
			list[i].Rejected, list[i].Problem = rejected, problem
		}
	}
	return l.update(list, l.state.Gone)
}

// Rejected returns the names whose values are rejected, and why.
func (l *Labels) Rejected() map[string]string {
	rejected := map[string]string{}
	for _, x := range l.state.Labels {
		if x.Rejected {
			rejected[x.Name] = x.Problem
		}
	}
	return rejected
}

// oneLine makes one line of what a guest says, and cuts it.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == utf8.RuneError:
			return '?'
		case unicode.IsControl(r):
			return ' '
		}
		return r
	}, s)
	if len(s) > maxProblem {
		s = s[:maxProblem]
		for !utf8.ValidString(s) {
			s = s[:len(s)-1]
		}
	}
	return s
}

// update keeps the list, and saves it if it is another one.
func (l *Labels) update(list []labelling, gone bool) error {
	same := func(a, b labelling) bool {
		return a.Name == b.Name && a.Revision == b.Revision && bytes.Equal(a.MAC, b.MAC) && a.Rejected == b.Rejected && a.Problem == b.Problem && a.New == b.New
	}
	if gone != l.state.Gone || !slices.EqualFunc(list, l.state.Labels, same) {
		l.unsaved = true
	}
	l.state.Labels, l.state.Gone = list, gone
	if !l.unsaved {
		return nil
	}
	if err := l.save(); err != nil {
		return fmt.Errorf("saving the labels in %q: %w", l.dir, err)
	}
	l.unsaved = false
	return nil
}

func (l *Labels) save() (err error) {
	b, err := encodeLabels(l.state)
	if err != nil {
		return err
	}
	// One that an earlier process left there.
	if err := l.root.Remove(labelsTemp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := l.root.OpenFile(labelsTemp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = l.root.Remove(labelsTemp)
		}
	}()
	if _, err := f.Write(b); err != nil {
		_ = f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return l.root.Rename(labelsTemp, labelsFile)
}

func readLabels(root *os.Root) ([]byte, error) {
	fi, err := root.Lstat(labelsFile)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, errors.New(labelsFile + " is not a regular file")
	}
	f, err := root.Open(labelsFile)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxLabels+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxLabels {
		return nil, fmt.Errorf("%s has more than %d bytes", labelsFile, maxLabels)
	}
	return b, nil
}

func encodeLabels(l labels) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(l)
	return b.Bytes(), err
}

// parseLabels parses what the file has. Its errors quote nothing of it.
func parseLabels(b []byte) (labels, error) {
	var l labels
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	err := dec.Decode(&l)
	if err == nil {
		if _, end := dec.Token(); !errors.Is(end, io.EOF) {
			err = errors.New("something follows the end")
		}
	}
	switch {
	case err != nil || !utf8.Valid(b):
		return labels{}, fmt.Errorf("%s is damaged, or of another version, near byte %d", labelsFile, dec.InputOffset())
	case l.Version != labelsVersion:
		return labels{}, fmt.Errorf("%s has version %d, not %d", labelsFile, l.Version, labelsVersion)
	case len(l.Key) != sha256.Size || l.Labels == nil || len(l.Labels) > credential.MaxSetNames:
		return labels{}, fmt.Errorf("%s is damaged: it lacks its key, or has no list of labels", labelsFile)
	}
	for i, x := range l.Labels {
		switch {
		case credential.CheckName(x.Name) != nil,
			i > 0 && x.Name <= l.Labels[i-1].Name,
			x.Revision == "" || checkRevision(x.Revision) != nil,
			len(x.MAC) != sha256.Size,
			len(x.Problem) > maxProblem || checkPrintable(x.Problem) != nil,
			!x.Rejected && x.Problem != "":
			return labels{}, fmt.Errorf("%s is damaged: its label %d is none", labelsFile, i+1)
		}
	}
	return l, nil
}
