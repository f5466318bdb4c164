package vm

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
)

const (
	vsockProgram = "vhost-device-vsock"
	// vsockSuite is the first release that has the program. The one from there runs on Debian 12 too.
	vsockSuite = "sid"
	vsockLibs  = "it needs glibc 2.34 and libgcc-s1, which Debian has from 12 on"

	maxRelease = 8 << 20
	maxIndex   = 256 << 20
	maxPackage = 64 << 20
	maxLine    = 1 << 20
)

// VhostDeviceVsock returns the program vhost-device-vsock: the one in PATH, else one in the cache folder. Where there is
// none either, it takes Debian's package from the archive that images are built from, which needs no root: archive
// keys of the package debian-archive-keyring vouch for the release, that for the package index, and the index for the
// package. The program then stays in the cache. Progress goes to log, which may be nil. Two callers at once wait for each
// other.
//
// The date until which a release is valid is not looked at, as debootstrap does not: a mirror may be a snapshot.
//
// The error matches [ErrArchive] or [ErrMissingTool] where that is the reason.
func VhostDeviceVsock(ctx context.Context, log io.Writer) (string, error) {
	if log == nil {
		log = io.Discard
	}
	program, err := findVsockProgram(ctx, log)
	if err != nil {
		return "", fmt.Errorf("getting %s: %w", vsockProgram, err)
	}
	return program, nil
}

func findVsockProgram(ctx context.Context, log io.Writer) (string, error) {
	if program, err := exec.LookPath(vsockProgram); err == nil {
		return program, tryVsockProgram(ctx, program)
	}
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	if program, ok := cachedVsockProgram(ctx, cache); ok {
		return program, nil
	}
	if err := needTools("gpgv", "dpkg-deb"); err != nil {
		return "", err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	unlock, err := lockFile(ctx, filepath.Join(cache, "lock-"+vsockProgram))
	if err != nil {
		return "", err
	}
	defer unlock()
	if program, ok := cachedVsockProgram(ctx, cache); ok {
		return program, nil // somebody else has got it meanwhile
	}
	if err := removeOld(cache, "tmp-"+vsockProgram+"-", ""); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cache, "tmp-"+vsockProgram+"-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	version, err := fetchVsockProgram(ctx, tmp, log)
	if err != nil {
		return "", err
	}
	name := vsockProgram + "-" + version
	if err := os.Rename(filepath.Join(tmp, vsockProgram), filepath.Join(cache, name)); err != nil {
		return "", err
	}
	return filepath.Join(cache, name), removeOld(cache, vsockProgram+"-", name)
}

// cachedVsockProgram returns the program in the cache, if it runs here.
func cachedVsockProgram(ctx context.Context, cache string) (string, bool) {
	found, err := filepath.Glob(filepath.Join(cache, vsockProgram+"-*"))
	if err != nil || len(found) != 1 {
		return "", false
	}
	return found[0], tryVsockProgram(ctx, found[0]) == nil
}

// tryVsockProgram runs the program, which shows whether its libraries are there.
func tryVsockProgram(ctx context.Context, program string) error {
	out, err := exec.CommandContext(ctx, program, "--version").CombinedOutput()
	if err != nil {
		return fmt.Errorf("running %s --version: %w: %s; %s", program, err, lastLines(out, logTail), vsockLibs)
	}
	return nil
}

// fetchVsockProgram puts the program into tmp and returns its version.
func fetchVsockProgram(ctx context.Context, tmp string, log io.Writer) (string, error) {
	a, err := openArchive(ctx, tmp, log)
	if err != nil {
		return "", err
	}
	release, err := a.release(ctx, vsockSuite)
	if err != nil {
		return "", err
	}
	p, err := a.find(ctx, release, vsockProgram)
	if err != nil {
		return "", err
	}
	deb, err := a.fetch(ctx, p.file)
	if err != nil {
		return "", err
	}
	program := filepath.Join(tmp, vsockProgram)
	if err := unpackFile(ctx, deb, "usr/bin/"+vsockProgram, program); err != nil {
		return "", fmt.Errorf("unpacking %s: %w: %w", path.Base(p.file.path), ErrArchive, err)
	}
	return p.version, tryVsockProgram(ctx, program)
}

// debArchive is a mirror of the Debian archive.
type debArchive struct {
	base   string
	client *http.Client
	tmp    string
	log    io.Writer
}

func openArchive(ctx context.Context, tmp string, log io.Writer) (*debArchive, error) {
	base := strings.TrimRight(mirror(ctx), "/")
	if base == "" {
		return nil, fmt.Errorf("%w: apt names no Debian mirror to take it from; install %s, or name one in MIRROR",
			ErrMissingTool, vsockProgram)
	}
	proxyOf := make(map[string]*url.URL)
	for _, env := range proxies(ctx) {
		name, value, _ := strings.Cut(env, "=")
		u, err := url.Parse(value)
		if err != nil {
			return nil, errors.New("reading apt's configuration: its proxy is not a URL")
		}
		proxyOf[strings.TrimSuffix(name, "_proxy")] = u
	}
	transport := &http.Transport{
		Proxy: func(r *http.Request) (*url.URL, error) {
			if u := proxyOf[r.URL.Scheme]; u != nil {
				return u, nil
			}
			return http.ProxyFromEnvironment(r)
		},
		// An index is what its hash says, not what it unpacks to.
		DisableCompression: true,
		DisableKeepAlives:  true,
	}
	return &debArchive{base: base, client: &http.Client{Transport: transport}, tmp: tmp, log: log}, nil
}

// archiveFile is a file of the archive. One without a hash is checked by other means.
type archiveFile struct {
	path   string
	sha256 string
	size   int64
}

// fetch downloads a file into tmp and checks it.
func (a *debArchive) fetch(ctx context.Context, f archiveFile) (string, error) {
	fmt.Fprintf(a.log, "fetching %s\n", f.path)
	name := filepath.Join(a.tmp, path.Base(f.path))
	if err := a.fetchInto(ctx, f, name); err != nil {
		if ctx.Err() != nil {
			return "", fmt.Errorf("fetching %s: %w", f.path, context.Cause(ctx))
		}
		return "", fmt.Errorf("fetching %s: %w: %w", f.path, ErrArchive, err)
	}
	return name, nil
}

func (a *debArchive) fetchInto(ctx context.Context, f archiveFile, name string) (err error) {
	in, err := a.open(ctx, f.path)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(out, sum), io.LimitReader(in, f.size+1))
	switch {
	case err != nil:
		return err
	case n > f.size:
		return fmt.Errorf("it is larger than %d bytes", f.size)
	case f.sha256 != "" && hex.EncodeToString(sum.Sum(nil)) != f.sha256:
		return fmt.Errorf("its SHA-256 is %x, not %s", sum.Sum(nil), f.sha256)
	}
	return nil
}

func (a *debArchive) open(ctx context.Context, name string) (io.ReadCloser, error) {
	u, err := url.Parse(a.base + "/" + name)
	if err != nil {
		return nil, err
	}
	if u.Scheme == "file" {
		return os.Open(u.Path)
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	response, err := a.client.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		_ = response.Body.Close()
		return nil, fmt.Errorf("the mirror says %s", response.Status)
	}
	return response.Body, nil
}

// release fetches the description of a release and returns the part of it that the archive's keys have signed.
func (a *debArchive) release(ctx context.Context, suite string) ([]byte, error) {
	keyring, err := archiveKeyring()
	if err != nil {
		return nil, err
	}
	in, err := a.fetch(ctx, archiveFile{path: "dists/" + suite + "/InRelease", size: maxRelease})
	if err != nil {
		return nil, err
	}
	out := filepath.Join(a.tmp, "Release")
	var status, said bytes.Buffer
	cmd := exec.CommandContext(ctx, "gpgv", "--status-fd", "1", "--keyring", keyring, "--output", out, in)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdout, cmd.Stderr = &status, &said
	// A release is signed by keys of several years, of which an older keyring lacks some: then gpgv fails, though
	// others are good.
	runErr := cmd.Run()
	if ctx.Err() != nil {
		return nil, fmt.Errorf("running gpgv: %w", context.Cause(ctx))
	}
	if !goodSignature(status.String()) {
		return nil, fmt.Errorf("verifying the release of %s: %w: no good signature by a key of %s (gpgv: %w)\n%s",
			suite, ErrArchive, keyring, runErr, lastLines(said.Bytes(), logTail))
	}
	return os.ReadFile(out)
}

// archiveKeyring returns the keys of the Debian archive.
func archiveKeyring() (string, error) {
	for _, name := range []string{
		"/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp",
	} {
		if _, err := os.Stat(name); err == nil {
			return name, nil
		}
	}
	return "", fmt.Errorf("looking for the Debian archive's keys: %w: apt-get install debian-archive-keyring", ErrMissingTool)
}

// goodSignature reads what gpgv writes to its status file descriptor. A key that has expired or is revoked makes no
// GOODSIG, and one bad signature spoils the others.
func goodSignature(status string) bool {
	good := false
	for line := range strings.Lines(status) {
		switch f := strings.Fields(line); {
		case len(f) < 2 || f[0] != "[GNUPG:]":
		case f[1] == "BADSIG":
			return false
		case f[1] == "GOODSIG":
			good = true
		}
	}
	return good
}

// debPackage is an entry of a package index.
type debPackage struct {
	version string
	file    archiveFile
}

// find looks a package up in the index of main.
func (a *debArchive) find(ctx context.Context, release []byte, name string) (debPackage, error) {
	// The standard library has no xz.
	index := "main/binary-" + runtime.GOARCH + "/Packages.gz"
	f, err := parseRelease(release, vsockSuite, index)
	if err != nil {
		return debPackage{}, fmt.Errorf("reading the release of %s: %w: %w", vsockSuite, ErrArchive, err)
	}
	file, err := a.fetch(ctx, f)
	if err != nil {
		return debPackage{}, err
	}
	in, err := os.Open(file)
	if err != nil {
		return debPackage{}, err
	}
	defer func() { _ = in.Close() }()
	zip, err := gzip.NewReader(in)
	if err != nil {
		return debPackage{}, fmt.Errorf("reading %s: %w: %w", index, ErrArchive, err)
	}
	p, err := parsePackages(zip, name)
	if err != nil {
		return debPackage{}, fmt.Errorf("reading %s: %w: %w", index, ErrArchive, err)
	}
	return p, nil
}

// parseRelease returns where the index is, and its hash. It is fetched by that, lest an update of the mirror come in
// between.
func parseRelease(release []byte, suite, index string) (archiveFile, error) {
	named, in := false, false
	for line := range strings.Lines(string(release)) {
		line = strings.TrimRight(line, "\r\n")
		if !strings.HasPrefix(line, " ") {
			named = named || line == "Codename: "+suite
			in = line == "SHA256:"
			continue
		}
		f := strings.Fields(line)
		if !in || len(f) != 3 || f[2] != index {
			continue
		}
		size, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil || size < 0 || size > maxIndex || !isSHA256(f[0]) {
			return archiveFile{}, fmt.Errorf("the line of %s has no sound hash and size", index)
		}
		if !named {
			return archiveFile{}, fmt.Errorf("it is not one of %s", suite)
		}
		return archiveFile{
			path:   "dists/" + suite + "/" + path.Dir(index) + "/by-hash/SHA256/" + f[0],
			sha256: f[0],
			size:   size,
		}, nil
	}
	return archiveFile{}, fmt.Errorf("it has no %s", index)
}

// parsePackages looks a package up in an index.
func parsePackages(in io.Reader, name string) (debPackage, error) {
	sc := bufio.NewScanner(in)
	sc.Buffer(nil, maxLine)
	fields := make(map[string]string)
	for sc.Scan() {
		if sc.Text() != "" {
			if key, value, ok := strings.Cut(sc.Text(), ": "); ok {
				fields[key] = value
			}
			continue
		}
		if fields["Package"] == name {
			break
		}
		clear(fields)
	}
	if err := sc.Err(); err != nil {
		return debPackage{}, err
	}
	if fields["Package"] != name {
		return debPackage{}, fmt.Errorf("it has no %s", name)
	}
	size, err := strconv.ParseInt(fields["Size"], 10, 64)
	p := debPackage{
		version: fields["Version"],
		file:    archiveFile{path: fields["Filename"], sha256: fields["SHA256"], size: size},
	}
	// The version becomes a part of a file's name.
	if err != nil || size < 0 || size > maxPackage || !isSHA256(p.file.sha256) || !fs.ValidPath(p.file.path) ||
		!regexp.MustCompile(`^[0-9][0-9A-Za-z.+~:-]*$`).MatchString(p.version) {
		return debPackage{}, fmt.Errorf("the entry of %s is not sound", name)
	}
	return p, nil
}

func isSHA256(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size
}

// unpackFile writes the file name of a package to out, as a program.
func unpackFile(ctx context.Context, deb, name, out string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = untar(in, name, out)
	// The rest of the package is of no use.
	cancel()
	waitErr := cmd.Wait()
	if err != nil {
		return fmt.Errorf("%w (dpkg-deb: %w: %s)", err, waitErr, stderr.String())
	}
	return nil
}

func untar(in io.Reader, name, out string) error {
	for tr := tar.NewReader(in); ; {
		h, err := tr.Next()
		if err != nil {
			return fmt.Errorf("looking for %s: %w", name, err)
		}
		if h.Typeflag != tar.TypeReg || path.Clean(h.Name) != name {
			continue
		}
		if h.Size > maxPackage {
			return fmt.Errorf("%s has %d bytes, which is too much", name, h.Size)
		}
		data := make([]byte, h.Size)
		if _, err := io.ReadFull(tr, data); err != nil {
			return err
		}
		return os.WriteFile(out, data, 0o700)
	}
}
