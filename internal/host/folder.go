package host

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// maxMap is the largest map, in bytes.
	maxMap = 1 << 20
	// maxSourceLen is the longest name of a file, in bytes.
	maxSourceLen = 255
	// maxLinks is how many links a path may lead through, as in the kernel.
	maxLinks = 40

	// maxReadings is how often Read begins again. The pauses between double,
	// and are half a second together.
	maxReadings      = 9
	maxMissing       = 3 // of them, where something is not there
	firstReadPause   = 2 * time.Millisecond
	maxSurveys       = 5
	settleQuiet      = 100 * time.Millisecond
	settleAtMost     = 2 * time.Second
	lookWhenNotified = 30 * time.Second
	lookWhenBlind    = time.Second
)

// A Folder is where a VM's credentials come from on the host: a folder that
// somebody else writes, such as $CREDENTIALS_DIRECTORY or one of sops-nix, and
// changes while it is read and watched. Its files are trusted, and so is who
// writes them; what is guarded against is a reading in the middle of a change.
type Folder struct {
	// Dir is the folder. It is opened anew by each Read, by its path.
	Dir string
	// Prefix is what the names of the files begin with: others are not read.
	// Without a Map it is taken off.
	Prefix string
	// Map is a file, at most 1 MiB, that says which files to take, by what
	// name, and nothing else is taken then. It is like
	//
	//	{"credentials": [{"source": "db-password", "name": "password", "revision": "7", "required": true}]}
	//
	// Prefix and source together are the name of the file. The name in the guest
	// defaults to source, revision to none, and required to true.
	Map string
}

// Read reads all files, and gives what was there at one time: where something
// changes meanwhile it begins again, and errs after half a second of that. A
// set that cannot be read as a whole is an error and no credentials, never
// fewer; a folder that is missing is one, and so is a prefix that none of its
// files has. An empty folder is an empty set.
// Without a map, dotfiles are passed over, and a folder or a name that no
// credential can have is an error. Links are followed; what is not a regular
// file is refused, and never waited for.
//
// A file that is rewritten in place may be seen half written by anybody: only
// a length that changed, or the file's time, gives that away. Whoever writes
// should rename a complete file to its name.
//
// The caller wipes what it gets.
func (f Folder) Read() ([]vsockrpc.Credential, error) {
	err := f.check()
	if err == nil {
		var creds []vsockrpc.Credential
		if creds, err = steadily(f.take); err == nil {
			return creds, nil
		}
	}
	return nil, fmt.Errorf("reading credentials in %q: %w", f.Dir, err)
}

// steadily takes until nothing changes meanwhile. What take gives with an
// error, or while something changes, is wiped, and what it says then is not
// repeated.
func steadily(take func(*snapshot) ([]vsockrpc.Credential, error)) ([]vsockrpc.Credential, error) {
	once := func() (creds []vsockrpc.Credential, steady bool, err error) {
		var s snapshot
		defer s.close()
		creds, err = take(&s)
		steady = s.steady()
		if err != nil || !steady {
			Wipe(creds)
			creds = nil
		}
		return creds, steady, err
	}
	pause := firstReadPause
	for i := range maxReadings {
		if i > 0 {
			<-time.After(pause)
			pause *= 2
		}
		creds, steady, err := once()
		// A folder that is switched while it is looked for may seem not to be there.
		if steady && (i >= maxMissing || !errors.Is(err, fs.ErrNotExist)) {
			return creds, err
		}
		Wipe(creds)
	}
	return nil, fmt.Errorf("something changed during each of %d readings; whoever writes the files should write a complete one, or a folder of them, and rename it to its name", maxReadings)
}

// A stamp tells whether a file is another one, or has other bytes, than when
// it was looked at.
type stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime int64
	mode         fs.FileMode
}

// A sighting is a file that was looked at: its stamp, or that there was none.
type sighting struct {
	stat  func() (stamp, error)
	stamp stamp
	there bool
}

// A snapshot is what one reading looked at.
type snapshot struct {
	dir   *pinned
	names []string // of the folder, if they are listed
	seen  []sighting
	// files stay open until all has been compared: no other file gets their
	// inode numbers before.
	files []*os.File
	torn  bool
}

// steady reports whether all is still as it was seen.
func (s *snapshot) steady() bool {
	if s.torn {
		return false
	}
	if s.dir != nil && !s.dir.current() {
		return false
	}
	if s.names != nil {
		names, err := s.dir.names()
		if err != nil || !slices.Equal(names, s.names) {
			return false
		}
	}
	for _, x := range s.seen {
		now, err := x.stat()
		if (err == nil) != x.there || x.there && now != x.stamp {
			return false
		}
	}
	return true
}

func (s *snapshot) close() {
	for _, f := range s.files {
		_ = f.Close()
	}
	if s.dir != nil {
		s.dir.close()
	}
}

// file reads a regular file up to limit bytes.
func (s *snapshot) file(stat func() (stamp, error), open func() (*os.File, error), limit int) (secret.Value, error) {
	st, err := stat()
	s.seen = append(s.seen, sighting{stat: stat, stamp: st, there: err == nil})
	switch {
	case err != nil:
		return secret.Value{}, err
	case st.mode.IsDir():
		return secret.Value{}, errors.New("it is a folder; name the files that are to be taken in a map")
	case !st.mode.IsRegular():
		return secret.Value{}, errors.New("it is not a regular file; put one there")
	}
	f, err := open()
	if err != nil {
		return secret.Value{}, err
	}
	s.files = append(s.files, f)
	fi, err := f.Stat()
	if err != nil {
		return secret.Value{}, err
	}
	if stampOf(fi) != st {
		s.torn = true
		return secret.Value{}, errors.New("it changes")
	}
	v, err := readValue(f, limit)
	if err == nil && st.size != 0 && int64(v.Len()) != st.size {
		s.torn = true // in place, within one tick of the clock of files
	}
	return v, err
}

// take reads what is to be taken. What it read comes with an error, too.
func (f Folder) take(s *snapshot) (creds []vsockrpc.Credential, err error) {
	var list []mapped
	if f.Map != "" {
		if list, err = readMap(s, f.Map); err != nil {
			return nil, fmt.Errorf("reading the map %q: %w", f.Map, err)
		}
	}
	if s.dir, err = pin(f.Dir); err != nil {
		return nil, err
	}
	if f.Map == "" {
		if s.names, err = s.dir.names(); err != nil {
			return nil, err
		}
		for _, file := range s.names {
			if !f.takes(file) {
				continue
			}
			name := strings.TrimPrefix(file, f.Prefix)
			if err := credential.CheckName(name); err != nil {
				return nil, fmt.Errorf("file %q: %w; give it another name, or name the files that are to be taken in a map", file, err)
			}
			list = append(list, mapped{Source: name, Name: name, Required: true})
		}
		if f.Prefix != "" && len(list) == 0 && slices.ContainsFunc(s.names, Folder{}.takes) {
			// An empty set would take everything away, for a typing error.
			return nil, fmt.Errorf("there are files, and no name of one begins with %q; mend the prefix, or say with the map {\"credentials\": []} that there is nothing to hand over", f.Prefix)
		}
	}
	if len(list) > credential.MaxSetNames {
		return nil, fmt.Errorf("%d credentials are more than a set may have, %d; take fewer by a prefix or a map", len(list), credential.MaxSetNames)
	}
	size := 0
	for _, m := range list {
		file := f.Prefix + m.Source
		if err := checkSource(file); err != nil {
			return creds, fmt.Errorf("credential %s: the name of its file, with the prefix: %w", m.Name, err)
		}
		v, err := s.file(
			func() (stamp, error) { return s.dir.stat(file) },
			func() (*os.File, error) { return s.dir.open(file) },
			credential.MaxSize)
		if errors.Is(err, fs.ErrNotExist) && !m.Required {
			continue
		}
		if errors.Is(err, fs.ErrNotExist) && f.Map != "" {
			return creds, fmt.Errorf("credential %s: its file %q is missing; put it there, or set \"required\": false in the map %q", m.Name, file, f.Map)
		}
		if err != nil {
			return creds, fmt.Errorf("credential %s: reading its file %q: %w", m.Name, file, err)
		}
		creds = append(creds, vsockrpc.Credential{Name: m.Name, Revision: m.Revision, Value: v})
		if size += v.Len(); size > credential.MaxSetSize {
			return creds, fmt.Errorf("together they have more bytes than a set may have, %d; take fewer by a prefix or a map", credential.MaxSetSize)
		}
	}
	return creds, nil
}

// check refuses what would read as an empty folder, or as another.
func (f Folder) check() error {
	switch {
	case f.Dir == "":
		return errors.New("no folder is named")
	case strings.HasPrefix(f.Prefix, "."):
		return fmt.Errorf("no file can have the prefix %q: dotfiles are passed over", f.Prefix)
	case strings.Contains(f.Prefix, "/"):
		return fmt.Errorf("no file can have the prefix %q: it is a path; it should be what the names of the files begin with", f.Prefix)
	}
	return nil
}

// takes reports whether a file of that name may be a credential.
func (f Folder) takes(name string) bool {
	return strings.HasPrefix(name, f.Prefix) && !strings.HasPrefix(name, ".")
}

// A mapped is one entry of a map.
type mapped struct {
	Source   string `json:"source"`
	Name     string `json:"name"`
	Revision string `json:"revision"`
	Required bool   `json:"required"`
}

func readMap(s *snapshot, path string) ([]mapped, error) {
	v, err := s.file(
		func() (stamp, error) {
			fi, err := os.Stat(path)
			if err != nil {
				return stamp{}, err
			}
			return stampOf(fi), nil
		},
		func() (*os.File, error) { return os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) },
		maxMap)
	if err != nil {
		return nil, err
	}
	defer v.Wipe()
	return parseMap(v.Bytes())
}

// errMap is what a map should be. encoding/json may quote what it reads, so
// that its own errors are not repeated.
var errMap = errors.New(`it should be like {"credentials": [{"source": "db-password", "name": "password", "revision": "7", "required": true}]}`)

// parseMap parses a map. Its errors quote nothing but a name that a credential
// can have.
func parseMap(b []byte) ([]mapped, error) {
	if !utf8.Valid(b) {
		return nil, errors.New("it is not UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	list := []mapped{}
	seen := map[string]bool{}
	listed := false
	err := readObject(dec, func(key string) error {
		if key != "credentials" {
			return errors.New("it has a key that is not credentials")
		}
		listed = true
		if err := expect(dec, json.Delim('[')); err != nil {
			return err
		}
		for dec.More() {
			m, err := parseMapped(dec)
			switch {
			case err != nil:
			case seen[m.Name]:
				err = fmt.Errorf("another one before it has the name %s; give one of them another", m.Name)
			case len(list) == credential.MaxSetNames:
				err = fmt.Errorf("a set may have %d; leave some out", credential.MaxSetNames)
			}
			if err != nil {
				return fmt.Errorf("credential %d: %w", len(list)+1, err)
			}
			seen[m.Name] = true
			list = append(list, m)
		}
		return expect(dec, json.Delim(']'))
	})
	if err == nil && !listed {
		err = errMap
	}
	if err == nil {
		if _, end := dec.Token(); !errors.Is(end, io.EOF) {
			err = errors.New("something follows the end")
		}
	}
	if err != nil {
		return nil, fmt.Errorf("near byte %d: %w", dec.InputOffset(), err)
	}
	return list, nil
}

func parseMapped(dec *json.Decoder) (mapped, error) {
	m := mapped{Required: true}
	named, sourced := false, false
	err := readObject(dec, func(key string) (err error) {
		switch key {
		case "source":
			sourced = true
			if m.Source, err = readToken[string](dec); err == nil {
				err = checkSource(m.Source)
			}
		case "name":
			named = true
			m.Name, err = readToken[string](dec)
		case "revision":
			if m.Revision, err = readToken[string](dec); err == nil {
				err = checkRevision(m.Revision)
			}
		case "required":
			m.Required, err = readToken[bool](dec)
		default:
			return errors.New("it has a key that is not source, name, revision or required")
		}
		if err != nil {
			return fmt.Errorf("its %s: %w", key, err)
		}
		return nil
	})
	switch {
	case err != nil:
		return mapped{}, err
	case !sourced:
		return mapped{}, errors.New("it has no source, the name of a file")
	case !named:
		m.Name = m.Source
	}
	if err := credential.CheckName(m.Name); err != nil {
		return mapped{}, fmt.Errorf("its name: %w", err)
	}
	return m, nil
}

// readObject reads an object. field reads the value that follows its key.
func readObject(dec *json.Decoder, field func(key string) error) error {
	if err := expect(dec, json.Delim('{')); err != nil {
		return err
	}
	seen := map[string]bool{}
	for dec.More() {
		key, err := readToken[string](dec)
		if err != nil {
			return err
		}
		if seen[key] {
			return errors.New("a key stands twice")
		}
		seen[key] = true
		if err := field(key); err != nil {
			return err
		}
	}
	return expect(dec, json.Delim('}'))
}

func readToken[T string | bool | json.Delim](dec *json.Decoder) (T, error) {
	t, err := dec.Token()
	v, ok := t.(T)
	if err != nil || !ok {
		return v, errMap
	}
	return v, nil
}

func expect(dec *json.Decoder, want json.Delim) error {
	if d, err := readToken[json.Delim](dec); err != nil || d != want {
		return errMap
	}
	return nil
}

// checkSource reports whether name can be a file's that is a credential.
func checkSource(name string) error {
	switch {
	case name == "" || len(name) > maxSourceLen:
		return fmt.Errorf("the name of a file has 1 to %d bytes", maxSourceLen)
	case name[0] == '.':
		return errors.New("it begins with a '.', and dotfiles are passed over")
	case strings.Contains(name, "/"):
		return errors.New("it is a path; it should be the name of a file in the folder")
	}
	return checkPrintable(name)
}

func checkRevision(revision string) error {
	if len(revision) > vsockrpc.MaxRevisionLen {
		return fmt.Errorf("%d bytes are more than %d", len(revision), vsockrpc.MaxRevisionLen)
	}
	return checkPrintable(revision)
}

func checkPrintable(s string) error {
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return r == utf8.RuneError || unicode.IsControl(r) }) {
		return errors.New("it has bytes that are not UTF-8, or control characters")
	}
	return nil
}

// Watch tells, by sends that do not block, that Read may give something else
// than before: once at its beginning, when from then on nothing is missed, and
// after each change, when nothing else has changed for 100 ms, or after 2 s.
// It tells too often rather than too seldom. It goes on while the folder is
// removed, replaced or made again, and runs until ctx ends, whose error it
// returns; by then all that it started has ended.
//
// On Linux it is notified (inotify(7)), and looks by itself each 30 s, since
// nobody is told of a mount. Where it cannot be notified, for the lack of
// permission or of watches, and on other systems, it looks each second. To look
// is to compare the files' metadata; nothing is read.
func (f Folder) Watch(ctx context.Context, changed chan<- struct{}) error {
	return f.watch(ctx, changed, newNotifier(), lookWhenNotified, lookWhenBlind)
}

// watch closes n.
func (f Folder) watch(ctx context.Context, changed chan<- struct{}, n *notifier, notified, blind time.Duration) error {
	defer n.close()
	if err := f.check(); err != nil {
		return fmt.Errorf("watching credentials in %q: %w", f.Dir, err)
	}
	return watcher{
		events: n.events,
		look: func() ([sha256.Size]byte, time.Duration) {
			return f.look(n, notified, blind)
		},
		changed: changed,
	}.run(ctx)
}

// A watcher is what Watch does apart from the files.
type watcher struct {
	// events has something after a change.
	events <-chan struct{}
	// look sees to it that events will have something after the next change. It
	// returns a fingerprint of what is there, and how long to rely on events.
	look    func() ([sha256.Size]byte, time.Duration)
	changed chan<- struct{}
}

func (w watcher) run(ctx context.Context) error {
	told, next := w.look()
	for {
		select {
		case w.changed <- struct{}{}:
		default:
		}
		timer := time.NewTimer(next)
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				timer.Stop()
				return ctx.Err()
			case <-w.events:
				waiting = false
			case <-timer.C:
				var now [sha256.Size]byte
				now, next = w.look()
				waiting = now == told
				timer.Reset(next)
			}
		}
		timer.Stop()
		var err error
		if told, next, err = w.settle(ctx); err != nil {
			return err
		}
	}
}

// settle returns when nothing has changed for a while, but not too late.
func (w watcher) settle(ctx context.Context) (last [sha256.Size]byte, next time.Duration, err error) {
	last, _ = w.look() // what is new is watched from here on
	quiet, late := time.NewTimer(settleQuiet), time.NewTimer(settleAtMost)
	defer quiet.Stop()
	defer late.Stop()
	for {
		select {
		case <-ctx.Done():
			return last, 0, ctx.Err()
		case <-w.events:
			quiet.Reset(settleQuiet)
		case <-late.C:
			last, next = w.look()
			return last, next, nil
		case <-quiet.C:
			before := last
			if last, next = w.look(); last == before {
				return last, next, nil
			}
			quiet.Reset(settleQuiet)
		}
	}
}

// An interest is which entries of a folder matter: those that are named, and
// where it is the folder of the credentials, all that may be one.
type interest struct {
	names map[string]bool
	of    *Folder
}

func (i interest) in(name string) bool {
	return i.names[name] || i.of != nil && i.of.takes(name)
}

func (i interest) equal(j interest) bool {
	return maps.Equal(i.names, j.names) && (i.of == nil) == (j.of == nil)
}

// look has n watch what there is to watch, and nothing else.
func (f Folder) look(n *notifier, notified, blind time.Duration) ([sha256.Size]byte, time.Duration) {
	// What appears between a survey and its watches is in the next survey.
	var sum [sha256.Size]byte
	for range maxSurveys {
		var want map[string]interest
		want, sum = f.survey()
		altered, complete := n.arm(want)
		switch {
		case !complete:
			return sum, blind
		case !altered:
			return sum, notified
		}
	}
	return sum, blind
}

// survey returns the folders whose entries matter, by their paths without
// links, and a fingerprint of all that Read would look at.
func (f Folder) survey() (map[string]interest, [sha256.Size]byte) {
	want := map[string]interest{}
	visit := func(dir, name string) {
		i, ok := want[dir]
		if !ok {
			i.names = map[string]bool{}
			want[dir] = i
		}
		i.names[name] = true
	}
	h := sha256.New()
	note := func(path string) {
		if fi, err := os.Stat(path); err == nil {
			fmt.Fprintf(h, "%+v\n", stampOf(fi))
		} else {
			fmt.Fprintf(h, "%v\n", err)
		}
	}

	if f.Map != "" {
		end, err := resolve(f.Map, visit)
		fmt.Fprintf(h, "%q %v ", end, err)
		note(f.Map)
	}
	dir, err := resolve(f.Dir, visit)
	fmt.Fprintf(h, "%q %v\n", dir, err)
	if err != nil {
		return want, [sha256.Size]byte(h.Sum(nil))
	}
	i, ok := want[dir]
	if !ok {
		i.names = map[string]bool{}
	}
	i.of = &f
	want[dir] = i
	if fi, err := os.Stat(dir); err == nil {
		st := stampOf(fi)
		fmt.Fprintf(h, "%d %d %v\n", st.dev, st.ino, st.mode) // its times change with dotfiles, too
	}
	entries, err := os.ReadDir(dir)
	fmt.Fprintf(h, "%v\n", err)
	for _, e := range entries {
		if !f.takes(e.Name()) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		if e.Type()&fs.ModeSymlink != 0 {
			end, err := resolve(path, visit)
			fmt.Fprintf(h, "%q %v ", end, err)
		}
		fmt.Fprintf(h, "%q ", e.Name())
		note(path)
	}
	return want, [sha256.Size]byte(h.Sum(nil))
}

// resolve follows path through all links. visit learns of each folder, by its
// path without links, in which an entry decides where path leads, up to the
// first that is missing.
func resolve(path string, visit func(dir, name string)) (string, error) {
	if !filepath.IsAbs(path) {
		// Not filepath.Abs, which takes the '..' behind a link for nothing.
		wd, err := os.Getwd()
		if err != nil {
			return "", err
		}
		path = wd + string(filepath.Separator) + path
	}
	root := filepath.VolumeName(path) + string(filepath.Separator)
	dir, links := root, 0
	parts := split(path)
	for len(parts) > 0 {
		part := parts[0]
		parts = parts[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			dir = filepath.Dir(dir)
			continue
		}
		visit(dir, part)
		next := filepath.Join(dir, part)
		fi, err := os.Lstat(next)
		if err != nil {
			return "", err
		}
		if fi.Mode()&fs.ModeSymlink == 0 {
			dir = next
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("following %q: more than %d links", path, maxLinks)
		}
		target, err := os.Readlink(next)
		if err != nil {
			return "", err
		}
		if filepath.IsAbs(target) {
			dir = root
		}
		parts = append(split(target), parts...)
	}
	return dir, nil
}

func split(path string) []string {
	return strings.Split(path[len(filepath.VolumeName(path)):], string(filepath.Separator))
}
