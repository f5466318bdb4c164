package vm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/guestagent/guestagent/tests/vm/internal/wire"
)

func TestParseTargets(t *testing.T) {
	const (
		main     = "Debian|Debian|bookworm|main|Packages|http://mirror.test/debian/\n"
		updates  = "Debian|Debian|bookworm-updates|main|Packages|http://other.test/debian/\n"
		security = "Debian|Debian-Security|bookworm-security|main|Packages|http://sec.test/debian-security/\n"
		foreign  = "Vendor|Vendor|bookworm|main|Packages|https://vendor.test/apt/\n"
	)
	for _, tt := range []struct{ name, in, want string }{
		{"empty", "", ""},
		{"main", main, "http://mirror.test/debian/"},
		{"last", security + foreign + updates + main, "http://mirror.test/debian/"},
		{"only updates", security + updates, "http://other.test/debian/"},
		{"only others", security + foreign, ""},
		{"security under the main label", "Debian|Debian|stable-security|main|Packages|http://sec.test/s/\n", ""},
		{"other index", "Debian|Debian|bookworm|main|DEP-11|http://mirror.test/debian/\n", ""},
		{"other component", "Debian|Debian|bookworm|contrib|Packages|http://mirror.test/debian/\n", ""},
		{"other scheme", "Debian|Debian|bookworm|main|Packages|cdrom://x/debian/\n" + updates, "http://other.test/debian/"},
		{"no origin known", "$(ORIGIN)|$(LABEL)|trixie|main|Packages|https://vendor.test/apt/\n" +
			"$(ORIGIN)|$(LABEL)|trixie-security|main|Packages|http://m.test/debian-security/\n" +
			"$(ORIGIN)|$(LABEL)|trixie|main|Packages|http://m.test/debian\n", "http://m.test/debian"},
		{"not apt's", "Debian|main\nE: something\n", ""},
	} {
		if got := parseTargets(tt.in); got != tt.want {
			t.Errorf("%s: parseTargets = %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestMirrorOverride(t *testing.T) {
	t.Setenv("MIRROR", "http://mirror.test/debian")
	if got := mirror(t.Context()); got != "http://mirror.test/debian" {
		t.Errorf("mirror = %q, want that of MIRROR", got)
	}
}

func TestParseProxies(t *testing.T) {
	got := parseProxies("http_proxy='http://proxy.test:3142'\nhttps_proxy='DIRECT'\nother='x'\n")
	if want := []string{"http_proxy=http://proxy.test:3142"}; !slices.Equal(got, want) {
		t.Errorf("parseProxies = %q, want %q", got, want)
	}
	if got := parseProxies(""); got != nil {
		t.Errorf("parseProxies of nothing = %q, want none", got)
	}
}

func TestParseReleases(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want []string
	}{
		{"all", []string{"bookworm", "trixie", "sid"}},
		{"trixie", []string{"trixie"}},
		{"sid, bookworm", []string{"bookworm", "sid"}},
		{"", nil},
		{"potato", nil},
		{"trixie,potato", nil},
	} {
		got, err := ParseReleases(tt.in)
		var names []string
		for _, r := range got {
			names = append(names, r.Name)
		}
		if !slices.Equal(names, tt.want) || (err == nil) != (tt.want != nil) {
			t.Errorf("ParseReleases(%q) = %q, %v, want %q", tt.in, names, err, tt.want)
		}
	}
}

func TestImageHash(t *testing.T) {
	seen := make(map[string]string)
	for _, r := range Releases() {
		h := imageHash(r)
		if h != imageHash(r) || seen[h] != "" {
			t.Errorf("imageHash(%s) = %s, not its own or not the same twice", r.Name, h)
		}
		seen[h] = r.Name
		r.packages = append(slices.Clone(r.packages), "another")
		if imageHash(r) == h {
			t.Errorf("imageHash(%s) does not see another package", r.Name)
		}
	}
}

func TestOpenImageMissing(t *testing.T) {
	if img, err := openImage(Releases()[0], t.TempDir()); img != nil || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("openImage of an empty folder = %v, %v, want %v", img, err, fs.ErrNotExist)
	}
}

func TestBuildNeedsRoot(t *testing.T) {
	t.Setenv("GUESTAGENT_VM_CACHE", t.TempDir())
	t.Setenv("PATH", t.TempDir())
	_, err := BuildImage(t.Context(), Releases()[0], nil)
	want := ErrNeedsRoot
	if os.Geteuid() == 0 {
		want = ErrMissingTool
	}
	if !errors.Is(err, want) {
		t.Errorf("BuildImage = %v, want %v", err, want)
	}
	_, err = Boot(t.Context(), Config{Image: &Image{Release: Releases()[0]}})
	if !errors.Is(err, ErrMissingTool) || !strings.Contains(err.Error(), "qemu-system-x86") {
		t.Errorf("Boot without QEMU = %v, want %v naming the package", err, ErrMissingTool)
	}
}

func TestRenderedNeedsNix(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := Rendered(t.Context(), "testdata/nixos/guest.nix", t.TempDir())
	if !errors.Is(err, ErrMissingTool) || !strings.Contains(err.Error(), "nix-bin") {
		t.Errorf("Rendered without Nix = %v, want %v naming the package", err, ErrMissingTool)
	}
}

func TestCheckContainers(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	want := ErrNeedsRoot
	switch {
	case runtime.GOOS != "linux" || runtime.GOARCH != "amd64":
		want = errors.ErrUnsupported
	case os.Geteuid() == 0:
		want = ErrMissingTool
	}
	_, err := StartContainer(t.Context(), ContainerConfig{Image: &Image{Release: Releases()[0]}})
	if !errors.Is(err, want) {
		t.Errorf("StartContainer = %v, want %v", err, want)
	}
	if os.Geteuid() == 0 && runtime.GOOS == "linux" && !strings.Contains(err.Error(), "systemd-container") {
		t.Errorf("StartContainer without systemd-nspawn = %v, want the package in it", err)
	}
}

// TestUnpacked packs a tree and unpacks it into an image's folder, twice, and then one that is damaged.
func TestUnpacked(t *testing.T) {
	if err := needTools("cpio", "zstd"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	from := t.TempDir()
	if err := os.WriteFile(filepath.Join(from, "file"), bytes.Repeat([]byte("1234"), 1<<18), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("file", filepath.Join(from, "link")); err != nil {
		t.Fatal(err)
	}
	cache := t.TempDir()
	img := &Image{Release: Releases()[0], Dir: filepath.Join(cache, "image"), Root: filepath.Join(cache, "image", rootFile)}
	if err := os.Mkdir(img.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, _, err := packRoot(t.Context(), from, img.Root); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(img.Root)
	if err != nil {
		t.Fatal(err)
	}
	for n, damaged := range map[string][]byte{"cut": good[:len(good)/2], "empty": {}, "no archive": []byte("no archive")} {
		if err := os.WriteFile(img.Root, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if root, err := img.unpacked(t.Context()); root != "" || err == nil {
			t.Errorf("%s: unpacked = %q, %v, want an error", n, root, err)
		}
	}
	if err := os.WriteFile(img.Root, good, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		root, err := img.unpacked(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		// Through the link, too.
		if got, err := os.ReadFile(filepath.Join(root, "link")); err != nil || len(got) != 1<<20 {
			t.Errorf("ReadFile of what was unpacked = %d bytes, %v, want %d", len(got), err, 1<<20)
		}
	}
	// It has programs that are set-user-ID: nobody else is to reach them.
	if info, err := os.Stat(filepath.Join(img.Dir, treeDir)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("Stat = %v, %v, want 0700", info, err)
	}
	if left, err := filepath.Glob(filepath.Join(cache, "tmp-*")); err != nil || len(left) != 0 {
		t.Errorf("left are %q, %v", left, err)
	}
}

func TestLockFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lockFile(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lockFile(ctx, path); !errors.Is(err, context.Canceled) {
		t.Errorf("lockFile of a held lock = %v, want %v", err, context.Canceled)
	}
	unlock()
	again, err := lockFile(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	again()
}

func TestRemoveOld(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"sid-1", "sid-2", "trixie-1", "debs"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeOld(dir, "sid-", "sid-2"); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{"debs", "sid-2", "trixie-1"}; !slices.Equal(names, want) {
		t.Errorf("left are %q, want %q", names, want)
	}
}

func TestTail(t *testing.T) {
	tl := newTail(10)
	var all []byte
	for i := range 100 {
		p := bytes.Repeat([]byte{byte('a' + i%26)}, i%7)
		all = append(all, p...)
		if n, err := tl.Write(p); n != len(p) || err != nil {
			t.Fatalf("Write = %d, %v, want %d", n, err, len(p))
		}
		if got, want := tl.Bytes(), all[max(0, len(all)-10):]; !bytes.Equal(got, want) {
			t.Fatalf("Bytes = %q, want %q", got, want)
		}
	}
}

func TestLastLines(t *testing.T) {
	for _, tt := range []struct {
		in, want string
		n        int
	}{
		{"", "", 2},
		{"a\nb\nc\n", "b\nc", 2},
		{"a\nb\nc", "b\nc", 2},
		{"a", "a", 2},
	} {
		if got := lastLines([]byte(tt.in), tt.n); got != tt.want {
			t.Errorf("lastLines(%q, %d) = %q, want %q", tt.in, tt.n, got, tt.want)
		}
	}
}

func testTree() tree {
	return tree{
		"/usr": "", "/usr/lib": "", "/etc": "", "/run": "", "/var": "", "/usr/lib/loop": "loop",
		"/lib": "usr/lib", "/var/run": "/run", "/usr/lib/up": "../../etc",
	}
}

func TestResolve(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"/", "/"},
		{"/usr/lib/x", "/usr/lib/x"},
		{"/lib", "/usr/lib"},
		{"/lib/systemd/system", "/usr/lib/systemd/system"},
		{"/var/run/x", "/run/x"},
		{"/lib/up/x", "/etc/x"},
		{"/library", "/library"},
		{"/lib/loop/x", ""},
	} {
		got, err := testTree().resolve(tt.in)
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("resolve(%q) = %q, %v, want %q", tt.in, got, err, tt.want)
		}
	}
}

// TestOverlay unpacks an overlay with cpio, if it is installed.
func TestOverlay(t *testing.T) {
	tool, err := exec.LookPath("cpio")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("cpio is not installed")
		}
		t.Skip("cpio is not installed: apt-get install cpio")
	}
	source := filepath.Join(t.TempDir(), "source")
	if err := os.WriteFile(source, []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	err = testTree().writeOverlay(&archive, []File{
		{Path: "/lib/new/deep/file", Content: []byte("content"), Mode: 0o750 | fs.ModeSetuid},
		{Path: "/lib/new/deep/other", Source: source},
		{Path: "/etc/link", Symlink: "/lib/new"},
		{Path: "/etc/link/through", Content: []byte("link")},
		{Path: "/srv/folder", Dir: true, Mode: 0o700},
		{Path: "/etc/empty"},
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), tool, "--list", "--quiet")
	cmd.Stdin = &archive
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("cpio --list: %v\n%s", err, out)
	}
	// Folders of the image are not in it.
	want := "usr/lib/new\nusr/lib/new/deep\nusr/lib/new/deep/file\nusr/lib/new/deep/other\netc/link\nusr/lib/new/through\n" +
		"srv\nsrv/folder\netc/empty\n"
	if string(out) != want {
		t.Errorf("cpio --list = %q, want %q", out, want)
	}
	for _, f := range []File{
		{Path: "relative"},
		{Path: "/"},
		{Path: "/x", Content: []byte{1}, Symlink: "y"},
		{Path: "/x", Source: source + "-missing"},
		{Path: "/x", Source: t.TempDir()},
		{Path: "/lib/loop/x"},
	} {
		if err := testTree().writeOverlay(io.Discard, []File{f}); err == nil {
			t.Errorf("writeOverlay(%+v) worked", f)
		}
	}
}

// TestArchive packs a tree, as the builder does.
func TestArchive(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"etc", "dev/pts"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{"etc/file": "1234", "dev/other": "", "dev/console": ""} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("etc", filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	dirs, size, err := archive(&buf, root)
	if err != nil {
		t.Fatal(err)
	}
	if len(dirs) != 3 || dirs["/link"] != "etc" || size != 7 {
		t.Errorf("archive = %q, %d, want /dev, /etc and /link, 7", dirs, size)
	}
	if strings.Contains(buf.String(), "dev/other") || strings.Contains(buf.String(), "dev/pts") {
		t.Error("the archive holds more of /dev than it needs")
	}
	if !strings.Contains(buf.String(), "dev/console") {
		t.Error("the archive lacks dev/console")
	}
}

func TestArguments(t *testing.T) {
	m := &Machine{dir: "/a,b"}
	args := m.arguments(&Config{
		Image:       &Image{Kernel: "kernel"},
		OEMStrings:  append(OEM("secret"), OEMString{File: "/c,d"}),
		SMBIOS64:    true,
		CommandLine: []string{"one", "two"},
		ExtraArgs:   []string{"-device", "last"},
	}, accelTCG, "/a,b/s")
	line := strings.Join(args, " ")
	for _, want := range []string{
		"-machine q35,smbios-entry-point-type=64", "-smbios type=11,path=/a,,b/oem-0", "-smbios type=11,path=/c,,d",
		"-m 2048", "-smp 2", "path=/a,,b/s", " one two ", "-nic none",
	} {
		if !strings.Contains(line, want) {
			t.Errorf("arguments = %q, want %q in it", line, want)
		}
	}
	if strings.Contains(line, "secret") || !strings.HasSuffix(line, "-device last") {
		t.Errorf("arguments = %q, want no value in it and the extra ones last", line)
	}
}

// fakeGuest answers as the guest program does, except that it never answers "hang" before it is told to kill it.
func fakeGuest(t *testing.T, conn net.Conn, started chan<- struct{}) {
	t.Helper()
	if err := wire.Write(conn, &wire.Message{Op: wire.OpHello}); err != nil {
		t.Error(err)
		return
	}
	for {
		m, err := wire.Read(conn)
		if err != nil {
			return
		}
		answer := &wire.Message{ID: m.ID, Op: wire.OpResult}
		switch {
		case m.Op == wire.OpRead:
			answer.Error, answer.Errno = "no", int(syscall.ENOENT)
		case m.Op == wire.OpKill:
			answer.ExitCode = 137
		case m.Argv[0] == "hang":
			started <- struct{}{}
			continue
		default:
			answer.Body, answer.Stdout = []byte("outerr"), 3
		}
		if err := wire.Write(conn, answer); err != nil {
			return
		}
	}
}

func TestChannel(t *testing.T) {
	host, guest := net.Pipe()
	started := make(chan struct{}, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		fakeGuest(t, guest, started)
	}()
	ended := make(chan struct{})
	close(ended)
	var list bytes.Buffer
	m := &Machine{
		channel:  newChannel(host),
		commands: &commandLog{w: &list},
		console:  newTail(tailBytes),
		process:  &process{cmd: &exec.Cmd{Path: "/bin/qemu"}, done: ended, stderr: newTail(tailBytes)},
	}
	<-m.channel.hello

	res, err := m.Run(t.Context(), "echo")
	if err != nil || string(res.Stdout) != "out" || string(res.Stderr) != "err" {
		t.Errorf("Run = %q, %q, %v, want out, err", res.Stdout, res.Stderr, err)
	}
	if _, err := m.ReadFile(t.Context(), "/x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ReadFile = %v, want %v", err, fs.ErrNotExist)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-started
		cancel()
	}()
	if _, err := m.Run(ctx, "hang"); !errors.Is(err, context.Canceled) {
		t.Errorf("Run with a context that ended = %v, want %v", err, context.Canceled)
	}
	if _, err := m.Run(t.Context(), "echo"); err != nil {
		t.Errorf("Run after that = %v", err)
	}
	_ = guest.Close()
	<-m.channel.done
	if _, err := m.Run(t.Context(), "echo"); !errors.Is(err, ErrStopped) {
		t.Errorf("Run after the end = %v, want %v", err, ErrStopped)
	}
	m.channel.close()
	<-done
	if got := strings.Count(list.String(), "\n"); got != 4 {
		t.Errorf("the list of commands has %d lines, want 4:\n%s", got, list.String())
	}
}
