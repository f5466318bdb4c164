package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/guestagent/guestagent/tests/vm/internal/wire"
)

const (
	nspawnProgram = "systemd-nspawn"
	// accelContainer is [Machine.Accel] of a container.
	accelContainer = "container"
	// treeDir is the folder in an image's folder that holds its unpacked root, for the host's root only: there are
	// set-user-ID programs in it.
	treeDir = "container"
)

// ContainerConfig says what to boot in a container. Only Image is needed. The fields mean what they do in [Config], less
// those here that say more.
type ContainerConfig struct {
	Image *Image
	// Binds are folders and files of the host that the container sees too, from its start on, and may write to. The keys
	// are absolute paths in the container, the values those on the host, where they have to be. A socket in such a folder
	// can be connected to from both sides, whenever it was made, and the next container with the same bind has it too.
	Binds       map[string]string
	Overlay     []File
	Artifacts   string
	Console     io.Writer
	BootTimeout time.Duration
	WaitFor     WaitFor
	Guest       string
}

// CheckContainers says whether containers can run here. The error matches errors.ErrUnsupported off Linux,
// [ErrNeedsRoot] or [ErrMissingTool].
func CheckContainers() error {
	switch {
	case runtime.GOOS != "linux" || runtime.GOARCH != "amd64":
		return fmt.Errorf("looking for containers: %w on %s/%s: use linux/amd64", errors.ErrUnsupported, runtime.GOOS, runtime.GOARCH)
	case os.Geteuid() != 0:
		return fmt.Errorf("looking for containers: %w", ErrNeedsRoot)
	}
	return needTools(nspawnProgram, "cpio", "zstd")
}

// StartContainer boots an image's system in a container of systemd-nspawn and waits as cfg.WaitFor says. That takes half a
// second, where a virtual machine without KVM takes twenty. The context ends the waiting, not the container: the caller
// calls [Machine.Close]. Nothing of a container outlives this process for longer than its killing takes.
//
// What differs from a virtual machine: it has the host's kernel, systemd-nspawn's default capabilities less CAP_MKNOD, no
// SMBIOS, no vsock (socket fails with EAFNOSUPPORT), no udev, no device, and no network but loopback. Control groups are
// of version 2 without controllers, and no BPF program is attached to them, so that MemoryMax=, IPAddressDeny= and their
// like do nothing; namespaces, capabilities and system call filters of a sandbox work. The kernel's log is not in the
// journal, nor what PID 1 said before there was one. After a reboot nothing reaches it.
//
// Errors match those of [Boot] and of [CheckContainers].
func StartContainer(ctx context.Context, cfg ContainerConfig) (*Machine, error) {
	if cfg.Image == nil {
		return nil, errors.New("starting a container: no image")
	}
	m, err := startContainer(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("starting a container of %s: %w", cfg.Image.Release.Name, err)
	}
	return m, nil
}

func startContainer(ctx context.Context, cfg ContainerConfig) (*Machine, error) {
	if err := CheckContainers(); err != nil {
		return nil, err
	}
	m, err := newMachine(cfg.Artifacts, cfg.BootTimeout)
	if err != nil {
		return nil, err
	}
	m.Accel = accelContainer
	if err := m.contain(ctx, cfg); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// contain makes all that the supervisor needs, and starts it.
func (m *Machine) contain(ctx context.Context, cfg ContainerConfig) error {
	console, err := m.record(cfg.Console)
	if err != nil {
		return err
	}
	if cfg.Guest == "" {
		if cfg.Guest, err = buildGuest(ctx, m.dir); err != nil {
			return err
		}
	}
	supervisor := filepath.Join(m.dir, "nspawn")
	if err := BuildBinary(ctx, "github.com/guestagent/guestagent/tests/vm/nspawn", supervisor); err != nil {
		return err
	}
	tree, err := cfg.Image.unpacked(ctx)
	if err != nil {
		return fmt.Errorf("unpacking the image: %w", err)
	}
	overlay, err := os.OpenFile(filepath.Join(m.dir, "overlay.cpio"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = cfg.Image.tree.writeOverlay(overlay, guestFiles(cfg.Guest, cfg.Overlay))
	if err := errors.Join(err, overlay.Close()); err != nil {
		return fmt.Errorf("writing the overlay: %w", err)
	}

	start := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, m.timeout, ErrTimeout)
	defer cancel()
	channel := filepath.Join(m.dir, "channel")
	if err := os.Mkdir(channel, 0o700); err != nil {
		return err
	}
	l, err := listen(ctx, filepath.Join(channel, wire.SocketName))
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	binds, err := bindArgs(cfg.Binds)
	if err != nil {
		return err
	}
	p := newProcess(supervisor, append([]string{m.dir, tree}, binds...)...)
	p.stderr = newTail(tailBytes)
	p.cmd.Stdout, p.cmd.Stderr = console, p.stderr
	if p.leash, err = p.cmd.StdinPipe(); err != nil {
		return err
	}
	if err := p.start(); err != nil {
		return err
	}
	m.process, m.wait = p, cfg.WaitFor
	m.follow()
	if err := m.await(ctx, l); err != nil {
		return err
	}
	m.BootTime = time.Since(start)
	return nil
}

// bindArgs returns the supervisor's arguments for binds.
func bindArgs(binds map[string]string) ([]string, error) {
	var args []string
	for _, inside := range slices.Sorted(maps.Keys(binds)) {
		outside := binds[inside]
		for _, path := range []string{outside, inside} {
			if !filepath.IsAbs(path) {
				return nil, fmt.Errorf("binding %s to %s: %s is not absolute", outside, inside, path)
			}
		}
		if _, err := os.Stat(outside); err != nil {
			return nil, fmt.Errorf("binding to %s: %w", inside, err)
		}
		args = append(args, outside, inside)
	}
	return args, nil
}

// HostPath returns where the host finds a path of a running container, a socket to connect to above all. It holds until
// the container's end, and leads out of the container where a part of path is an absolute symbolic link. A virtual
// machine's files are out of reach: the error then matches errors.ErrUnsupported.
func (m *Machine) HostPath(path string) (string, error) {
	if m.Accel != accelContainer {
		return "", fmt.Errorf("looking for %s: %w in a virtual machine", path, errors.ErrUnsupported)
	}
	// The guest program sees what PID 1 sees, and lives as long as the channel.
	pid, err := peerPID(m.guest().conn)
	if err != nil {
		return "", fmt.Errorf("looking for %s: %w", path, err)
	}
	return filepath.Join("/proc", strconv.Itoa(pid), "root", path), nil
}

// unpacked returns the folder with the image's root, which it unpacks first where that has not been done. Nobody writes
// to it afterwards.
func (img *Image) unpacked(ctx context.Context) (string, error) {
	root := filepath.Join(img.Dir, treeDir, "root")
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	cache := filepath.Dir(img.Dir)
	unlock, err := lockFile(ctx, filepath.Join(cache, "lock-"+img.Release.Name))
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(root); err == nil {
		return root, nil // somebody else has unpacked it meanwhile
	}
	// The prefix of a builder's folders, one of which removes this one if we are killed.
	tmp, err := os.MkdirTemp(cache, "tmp-"+img.Release.Name+"-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	if err := os.Mkdir(filepath.Join(tmp, "root"), 0o755); err != nil {
		return "", err
	}
	if err := unpackRoot(ctx, img.Root, filepath.Join(tmp, "root")); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, filepath.Join(img.Dir, treeDir)); err != nil {
		return "", err
	}
	return root, nil
}

// unpackRoot is the reverse of packRoot.
func unpackRoot(ctx context.Context, file, root string) error {
	unzstd := exec.CommandContext(ctx, "zstd", "-q", "-d", "-c", file)
	cpio := exec.CommandContext(ctx, "cpio", "--extract", "--make-directories", "--preserve-modification-time", "--quiet", "--directory", root)
	unzstdErr, cpioErr := newTail(tailBytes), newTail(tailBytes)
	unzstd.Stderr, cpio.Stderr = unzstdErr, cpioErr
	pipe, err := unzstd.StdoutPipe()
	if err != nil {
		return err
	}
	cpio.Stdin = pipe
	if err := unzstd.Start(); err != nil {
		return err
	}
	if err = cpio.Run(); err != nil {
		err = fmt.Errorf("running cpio: %w: %s", err, lastLines(cpioErr.Bytes(), logTail))
		_ = pipe.Close() // or the other would write for ever
	} else {
		// The padding, which cpio need not read.
		_, err = io.Copy(io.Discard, pipe)
	}
	if waitErr := unzstd.Wait(); waitErr != nil {
		waitErr = fmt.Errorf("running zstd: %w: %s", waitErr, lastLines(unzstdErr.Bytes(), logTail))
		err = errors.Join(err, waitErr)
	}
	return err
}
