//go:build linux

// Command nspawn boots a test's container with systemd-nspawn, and leaves nothing of it behind.
//
//	nspawn DIR TREE [OUTSIDE INSIDE]…
//
// DIR is a folder of package vm, with the archive overlay.cpio and the folder channel, which the container sees as
// wire.SocketDir. TREE is an image's root, which is not changed: what the container writes is in memory. It also sees each OUTSIDE, a folder
// or file of the host, as INSIDE.
//
// Standard input is a leash. When it ends, which it does with the harness at the latest, or a signal asks for it, the
// container is killed, its control groups are removed, and DIR too. When the container ends by itself DIR stays, since
// the harness is there. Standard output is the container's console.
//
// The container has control groups of version 2, without controllers, also where the host uses version 1: systemd 258 and
// later do not boot on that.
//
// There are two processes. The outer one makes the control group and removes it. The inner one is PID 1 of a PID
// namespace, so that nothing outlives it, and has the mounts in a mount namespace of its own. If the outer one is killed
// the kernel kills the inner one, and only empty control groups and DIR are left.
//
// The container has systemd-nspawn's default privileges, less CAP_MKNOD, and less AF_VSOCK, which the kernel before Linux 7
// does not keep apart in network namespaces. Its root is the host's root without some capabilities: it is for code that is trusted.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/guestagent/guestagent/tests/vm/internal/wire"
)

// stageInside is the first argument of the inner process.
const stageInside = "inside"

func main() {
	if err := run(os.Args[1:], os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "nspawn:", err)
		os.Exit(1)
	}
}

func run(args []string, leash io.Reader) error {
	switch {
	case len(args) >= 4 && len(args)%2 == 0 && args[0] == stageInside:
		return inside(args[1], args[2], args[3], args[4:])
	case len(args) >= 2 && len(args)%2 == 0:
		return supervise(args[0], args[1], args[2:], leash)
	default:
		return errors.New("usage: nspawn DIR TREE [OUTSIDE INSIDE ...]")
	}
}

// supervise is the outer process.
func supervise(dir, tree string, binds []string, leash io.Reader) (err error) {
	// Whoever reads our output may be gone when there is something to say. Caught rather than ignored: a program that
	// is started would inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	go func() { // ends with the process: a read of standard input cannot be interrupted
		_, _ = io.Copy(io.Discard, leash)
		cancel()
	}()
	cgroup, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	// Below the own group, so that whoever limits or ends us does so to the container.
	own, err := ownGroup(string(cgroup))
	if err != nil {
		return err
	}
	group := filepath.Join(own, filepath.Base(dir))
	hierarchy, err := openGroups()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, hierarchy.Close()) }()
	if err := hierarchy.make(group); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, hierarchy.remove(group)) }()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{stageInside, dir, tree, group}, binds...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	// The kernel kills the child when the thread that started it ends.
	runtime.LockOSThread()
	// Run returns when all of the PID namespace has gone, so that the control groups are empty.
	err = cmd.Run()
	if ctx.Err() != nil {
		return os.RemoveAll(dir)
	}
	return err
}

// inside is the inner process: it prepares the root, runs systemd-nspawn and ends with it.
func inside(dir, tree, group string, binds []string) error {
	if err := os.Chdir(dir); err != nil {
		return err
	}
	// The container's root folder is to be 0755, whoever calls.
	syscall.Umask(0o022)
	if err := mountRoot(tree); err != nil {
		return err
	}
	// 0 is the writer, whatever its number is in the PID namespace.
	if err := os.WriteFile(filepath.Join("/sys/fs/cgroup", group, "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("entering control group: %w", err)
	}
	// Paths come from package vm, which has resolved the links in the tree.
	archive, err := os.Open("overlay.cpio")
	if err != nil {
		return err
	}
	defer func() { _ = archive.Close() }()
	unpack := exec.Command("cpio", "--extract", "--unconditional", "--quiet", "--directory", "mem/root")
	unpack.Stdin, unpack.Stderr = archive, os.Stderr
	if err := unpack.Run(); err != nil {
		return fmt.Errorf("unpacking the overlay: %w", err)
	}
	// The filter holds for this thread, and for what it starts.
	runtime.LockOSThread()
	if err := denyVsock(); err != nil {
		return err
	}
	cmd := exec.Command("systemd-nspawn", nspawnArgs(dir, binds)...)
	// The host's environment can change what systemd-nspawn does.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running systemd-nspawn: %w", err)
	}
	return nil
}

// mountRoot puts the container's root at mem/root: the tree, with an empty file system in memory over it. Paths in the
// options are relative, so that no character of dir or tree means something there.
func mountRoot(tree string) error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making the mounts private: %w", err)
	}
	for _, m := range []struct {
		source, target, fstype string
		flags                  uintptr
		options                string
	}{
		{"tmpfs", "mem", "tmpfs", 0, "mode=0700"},
		{tree, "mem/lower", "", syscall.MS_BIND, ""},
		{"overlay", "mem/root", "overlay", 0, "lowerdir=mem/lower,upperdir=mem/upper,workdir=mem/work"},
		// Of this PID namespace.
		{"proc", "/proc", "proc", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
		// All that systemd-nspawn looks at to find out which version there is.
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
		// systemd-nspawn keeps locks and folders there by the container's name, which all our containers share.
		{"tmpfs", "/run/systemd", "tmpfs", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=0755"},
	} {
		// upper's mode is the container's root's.
		for _, dir := range []string{m.target, "mem/upper", "mem/work"} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
		if err := syscall.Mount(m.source, m.target, m.fstype, m.flags, m.options); err != nil {
			return fmt.Errorf("mounting %s: %w", m.target, err)
		}
	}
	return nil
}

// nspawnArgs are the arguments of systemd-nspawn 252 and later, systemd-nspawn(1). binds are pairs.
func nspawnArgs(dir string, binds []string) []string {
	args := []string{
		"--quiet", "--boot", "--directory", filepath.Join(dir, "mem/root"),
		// The host name too, as in the virtual machines.
		"--machine=guest",
		// Neither machined nor a systemd on the host, nor its settings.
		"--register=no", "--keep-unit", "--settings=no", "--link-journal=no", "--timezone=off", "--resolv-conf=off",
		"--private-network",
		// Without a scope unit no device policy keeps the host's disks away, so nobody may make their nodes.
		"--drop-capability=CAP_MKNOD",
		// The host's SMBIOS is none of the container's business. systemd-nspawn 252 does not show it anyway.
		"--tmpfs=/sys/firmware",
		"--console=read-only",
	}
	binds = append([]string{filepath.Join(dir, "channel"), wire.SocketDir}, binds...)
	quote := strings.NewReplacer(`\`, `\\`, ":", `\:`)
	for pair := range slices.Chunk(binds, 2) {
		args = append(args, "--bind="+quote.Replace(pair[0])+":"+quote.Replace(pair[1]))
	}
	return args
}
