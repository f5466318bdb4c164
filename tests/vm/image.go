package vm

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

var (
	// ErrArchive means that a package is missing in the archive, cannot be installed or is not what the archive's keys
	// vouch for, or that the archive cannot be reached.
	ErrArchive = errors.New("the Debian archive did not give what is needed")
	// ErrNeedsRoot means that an image has to be built and that only root can.
	ErrNeedsRoot = errors.New("building a guest image needs root, for debootstrap's chroot and device nodes; run this as root")
	// ErrMissingTool means that a program is not installed. The message names the Debian package.
	ErrMissingTool = errors.New("a program is missing")
)

// imageFormat goes up when the code below changes what an image contains.
const imageFormat = 1

const (
	kernelFile = "vmlinuz"
	rootFile   = "root.cpio.zst"
	infoFile   = "info.json"
	treeFile   = "tree.json"
	lockPoll   = 500 * time.Millisecond
	logTail    = 20
)

//go:embed trim.sh
var trimScript string

// basePackages are in every image.
func basePackages() []string {
	return []string{"systemd", "systemd-sysv", "dbus", "udev", "kmod", "libbpf1", "linux-image-cloud-amd64"}
}

// modules are the kernel modules that an image keeps, with those they need. Most are built in on some release.
func modules() []string {
	return []string{
		"virtio_pci", "virtio_console", "virtio_rng", "virtio_net", "virtio_blk", "virtiofs", "qemu_fw_cfg", "dmi_sysfs", "efivarfs",
		"vsock", "vsock_loopback", "vmw_vsock_virtio_transport", "vsock_diag", "vhost_vsock",
		"af_packet", "dummy", "veth", "tun",
		"autofs4", "configfs", "fuse", "loop", "overlay", "ext4", "squashfs", "tpm_crb", "tpm_tis",
	}
}

// Image is a guest image in the cache.
type Image struct {
	// Release is what it was built from.
	Release Release
	// Dir is its folder.
	Dir string
	// Kernel and Root are the files that QEMU boots.
	Kernel, Root string
	// Info says what is in it.
	Info Info

	tree tree
}

// Info says what an image was built from. It is one line of JSON beside the image.
type Info struct {
	// Release is the code name.
	Release string `json:"release"`
	// Systemd is the version of the Debian package systemd, KernelRelease the name of the kernel.
	Systemd       string `json:"systemd"`
	KernelRelease string `json:"kernelRelease"`
	// Bytes is the size of the unpacked root.
	Bytes int64 `json:"bytes"`
	// Built is when it was built, Seconds how long that took.
	Built   time.Time `json:"built"`
	Seconds float64   `json:"seconds"`
}

// CacheDir returns the folder that images are kept in.
func CacheDir() (string, error) {
	if dir := os.Getenv("GUESTAGENT_VM_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("finding the cache folder: %w; GUESTAGENT_VM_CACHE names another", err)
	}
	return filepath.Join(dir, "guestagent", "vm"), nil
}

// BuildImage returns the image of a release from the cache, and builds it first where it is not there. Progress of a
// build goes to log, which may be nil. Two builders at once wait for each other. After a build, older images of the same
// release are removed.
//
// The error matches [ErrArchive], [ErrNeedsRoot] or [ErrMissingTool] where that is the reason.
func BuildImage(ctx context.Context, release Release, log io.Writer) (*Image, error) {
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	if log == nil {
		log = io.Discard
	}
	id := release.Name + "-" + imageHash(release)
	dir := filepath.Join(cache, id)
	if img, err := openImage(release, dir); err == nil {
		return img, nil
	}
	img, err := buildLocked(ctx, release, cache, id, log)
	if err != nil {
		return nil, fmt.Errorf("building image %s: %w", id, err)
	}
	return img, nil
}

// imageHash covers all that goes into an image but the archive's contents.
func imageHash(release Release) string {
	h := sha256.New()
	enc := json.NewEncoder(h)
	// Encoding strings and a number into a hash cannot fail.
	_ = enc.Encode([]any{imageFormat, release.Name, packages(release), modules(), trimScript})
	return hex.EncodeToString(h.Sum(nil))[:16]
}

func packages(release Release) []string {
	return append(basePackages(), release.packages...)
}

func openImage(release Release, dir string) (*Image, error) {
	img := &Image{
		Release: release,
		Dir:     dir,
		Kernel:  filepath.Join(dir, kernelFile),
		Root:    filepath.Join(dir, rootFile),
	}
	for name, into := range map[string]any{infoFile: &img.Info, treeFile: &img.tree} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, fmt.Errorf("opening image: %w", err)
		}
		if err := json.Unmarshal(data, into); err != nil {
			return nil, fmt.Errorf("opening image %s: %w", dir, err)
		}
	}
	return img, nil
}

func buildLocked(ctx context.Context, release Release, cache, id string, log io.Writer) (*Image, error) {
	if os.Geteuid() != 0 {
		return nil, ErrNeedsRoot
	}
	if err := needTools("debootstrap", "zstd"); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lockFile(ctx, filepath.Join(cache, "lock-"+release.Name))
	if err != nil {
		return nil, err
	}
	defer unlock()
	dir := filepath.Join(cache, id)
	if img, err := openImage(release, dir); err == nil {
		return img, nil // somebody else has built it meanwhile
	}
	if err := removeOld(cache, "tmp-"+release.Name+"-", ""); err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(cache, "tmp-"+release.Name+"-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	if err := buildInto(ctx, release, cache, tmp, log); err != nil {
		return nil, err
	}
	// What is there and could not be opened is of no use.
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.Rename(filepath.Join(tmp, "image"), dir); err != nil {
		return nil, err
	}
	if err := removeOld(cache, release.Name+"-", id); err != nil {
		return nil, err
	}
	return openImage(release, dir)
}

// buildInto builds the image in tmp/image, using tmp/root for the tree.
func buildInto(ctx context.Context, release Release, cache, tmp string, log io.Writer) error {
	start := time.Now()
	root, out := filepath.Join(tmp, "root"), filepath.Join(tmp, "image")
	debs := filepath.Join(cache, "debs")
	for _, dir := range []string{out, debs, filepath.Join(root, "etc/dpkg/dpkg.cfg.d")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	// The tree is thrown away, so syncing it is a waste of time.
	speed := filepath.Join(root, "etc/dpkg/dpkg.cfg.d/vm")
	if err := os.WriteFile(speed, []byte("force-unsafe-io\n"), 0o644); err != nil {
		return err
	}
	if err := debootstrap(ctx, release, root, debs, log); err != nil {
		return err
	}
	info := Info{Release: release.Name, Built: start.UTC().Truncate(time.Second)}
	var err error
	if info.Systemd, err = packageVersion(ctx, root, "systemd"); err != nil {
		return err
	}
	kernels, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return fmt.Errorf("looking for the kernel: %w: %d files match boot/vmlinuz-*", ErrArchive, len(kernels))
	}
	info.KernelRelease = strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	if err := os.Rename(kernels[0], filepath.Join(out, kernelFile)); err != nil {
		return err
	}
	trim := exec.CommandContext(ctx, "sh", append([]string{"-s", "--", root}, modules()...)...)
	trim.Stdin = strings.NewReader(trimScript)
	if err := runLogged(trim, log); err != nil {
		return fmt.Errorf("trimming the tree: %w", err)
	}
	var dirs tree
	if dirs, info.Bytes, err = packRoot(ctx, root, filepath.Join(out, rootFile)); err != nil {
		return fmt.Errorf("packing the tree: %w", err)
	}
	info.Seconds = time.Since(start).Round(time.Second / 10).Seconds()
	for name, from := range map[string]any{treeFile: dirs, infoFile: info} {
		data, err := json.Marshal(from)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(out, name), append(data, '\n'), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func debootstrap(ctx context.Context, release Release, root, debs string, log io.Writer) error {
	args := []string{
		"--variant=minbase", "--arch=amd64", "--cache-dir=" + debs,
		"--include=" + strings.Join(packages(release), ","), release.Name, root,
	}
	if m := mirror(ctx); m != "" {
		args = append(args, m)
	}
	cmd := exec.CommandContext(ctx, "debootstrap", args...)
	// The guest's initrd is the image itself: building another one takes a quarter of the time.
	cmd.Env = append(os.Environ(), "INITRD=No", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.Env = append(cmd.Env, proxies(ctx)...)
	if err := runLogged(cmd, log); err != nil {
		// debootstrap's own log has what dpkg said.
		own, _ := os.ReadFile(filepath.Join(root, "debootstrap/debootstrap.log"))
		if ctx.Err() != nil {
			return fmt.Errorf("running debootstrap: %w", ctx.Err())
		}
		return fmt.Errorf("running debootstrap: %w: %w\n%s", ErrArchive, err, lastLines(own, logTail))
	}
	return nil
}

func packageVersion(ctx context.Context, root, name string) (string, error) {
	cmd := exec.CommandContext(ctx, "chroot", root, "dpkg-query", "-W", "-f", "${Version}", name)
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("asking for the version of %s: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// runLogged runs cmd with its output to log, and puts the last lines into the error.
func runLogged(cmd *exec.Cmd, log io.Writer) error {
	last := newTail(tailBytes)
	cmd.Stdout = io.MultiWriter(log, last)
	cmd.Stderr = cmd.Stdout
	ownGroup(cmd)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w\n%s", err, lastLines(last.Bytes(), logTail))
	}
	return nil
}

// removeOld removes what starts with prefix in the cache, but keep.
func removeOld(cache, prefix, keep string) error {
	entries, err := os.ReadDir(cache)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) && e.Name() != keep {
			if err := os.RemoveAll(filepath.Join(cache, e.Name())); err != nil {
				return fmt.Errorf("removing an old image: %w", err)
			}
		}
	}
	return nil
}

// needTools checks that programs are installed, and names all packages that are not.
func needTools(names ...string) error {
	pkg := map[string]string{
		"debootstrap": "debootstrap", "zstd": "zstd", qemuProgram: "qemu-system-x86", "gpgv": "gpgv", "dpkg-deb": "dpkg",
		nspawnProgram: "systemd-container", "cpio": "cpio", "nix-instantiate": "nix-bin",
	}
	var missing, install []string
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			missing = append(missing, n)
			install = append(install, pkg[n])
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("looking for %s: %w: apt-get install %s",
		strings.Join(missing, ", "), ErrMissingTool, strings.Join(install, " "))
}

// lastLines returns the last n lines of b.
func lastLines(b []byte, n int) string {
	lines := slices.Collect(bytes.Lines(b))
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.TrimRight(string(bytes.Join(lines, nil)), "\n")
}
