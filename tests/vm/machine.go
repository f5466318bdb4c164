package vm

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/guestagent/guestagent/tests/vm/internal/wire"
)

// ErrStopped means that the machine has ended, or can no longer be talked to.
var ErrStopped = errors.New("the machine has stopped")

// ErrTimeout means that a boot took longer than [Config.BootTimeout].
var ErrTimeout = errors.New("the boot took too long")

const (
	defaultMemory  = 2048
	defaultCPUs    = 2
	defaultTimeout = 10 * time.Minute
	consoleLines   = 120
	readyPoll      = 200 * time.Millisecond
	initrdAlign    = 512
	maxSocketPath  = 100
	// collectTimeout bounds what only matters to the artifacts.
	collectTimeout = time.Minute
)

//go:embed guest/vm-guest.service
var guestUnit []byte

// WaitFor says what [Boot] waits for.
type WaitFor int

const (
	// UntilReady waits until systemd has finished the boot, see [Machine.WaitReady], and udev has loaded the driver of a
	// vsock device.
	UntilReady WaitFor = iota
	// UntilGuest waits only until programs can be run. That is early in the boot, and works too where the boot
	// hangs later.
	UntilGuest
)

// OEMString is one string of the guest's SMBIOS type 11. It reaches QEMU as a file, never on the command line. It may
// hold any byte but NUL; a newline at its end stays.
type OEMString struct {
	// Value is the string.
	Value []byte
	// File is a file whose content is the string, instead of Value.
	File string
}

// OEM makes OEM strings of values.
func OEM(values ...string) []OEMString {
	out := make([]OEMString, 0, len(values))
	for _, v := range values {
		out = append(out, OEMString{Value: []byte(v)})
	}
	return out
}

// Config says what to boot. Only Image is needed.
type Config struct {
	// Image is the guest's system.
	Image *Image
	// Memory is in MiB; 0 is 2048. CPUs 0 is 2.
	Memory, CPUs int
	// CommandLine is appended to the kernel's.
	CommandLine []string
	// OEMStrings are the strings of the one SMBIOS structure of type 11. Structures that QEMU would not write can be
	// given as files with ExtraArgs, -smbios file=PATH.
	OEMStrings []OEMString
	// SMBIOS64 asks for the 64-bit entry point, which a table of 64 KiB and more needs. Such a table needs more than
	// that: SeaBIOS before 1.17 keeps only its size modulo 65536, and Linux on x86 maps at most 64 pages of it early in
	// the boot, and does as if there were no SMBIOS where it is larger (both seen).
	SMBIOS64 bool
	// Overlay is put into the guest's root.
	Overlay []File
	// Vsock gives the guest a vsock device; without it there is none.
	Vsock *VsockConfig
	// ExtraArgs are appended to QEMU's arguments.
	ExtraArgs []string
	// Artifacts is the folder for the console, the list of commands and what [Machine.Collect] writes. It is made
	// where it is missing. Empty means that they are not kept.
	Artifacts string
	// Console gets a live copy of the console. The guest waits while a Write does.
	Console io.Writer
	// BootTimeout ends a boot that hangs; 0 is ten minutes.
	BootTimeout time.Duration
	// WaitFor says when Boot returns.
	WaitFor WaitFor
	// Guest is the compiled program of tests/vm/guest. Empty means that Boot compiles it, for which the current
	// folder has to be inside the module.
	Guest string
}

// Machine is a running virtual machine or container. Its methods may be called at the same time.
type Machine struct {
	// Accel is "kvm", "tcg" or "container".
	Accel string
	// BootTime is how long it took until what Config.WaitFor asked for.
	BootTime time.Duration

	dir       string
	artifacts string
	timeout   time.Duration
	wait      WaitFor
	console   *tail
	files     []io.Closer
	commands  *commandLog
	// process is what the machine runs in: QEMU, or the supervisor of a container.
	process *process
	qemu    *qemu
	vsock   *vsock
	wg      sync.WaitGroup

	// controlMu is held while QEMU is told something, and guards vsock.end once the machine has been started.
	controlMu sync.Mutex
	paused    bool

	mu sync.Mutex
	// channel is that of the last boot, or nil before there is one.
	channel *channel
}

// Boot starts a machine and waits as Config.WaitFor says. The context ends the waiting, not the machine: the caller
// calls [Machine.Close], also after [Machine.Shutdown]. An error of a guest that did not come up contains the last lines
// of its console, and matches [ErrTimeout] or [ErrStopped].
func Boot(ctx context.Context, cfg Config) (*Machine, error) {
	if cfg.Image == nil {
		return nil, errors.New("booting a machine: no image")
	}
	m, err := boot(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("booting %s: %w", cfg.Image.Release.Name, err)
	}
	return m, nil
}

func boot(ctx context.Context, cfg Config) (*Machine, error) {
	if err := needTools(qemuProgram); err != nil {
		return nil, err
	}
	m, err := newMachine(cfg.Artifacts, cfg.BootTimeout)
	if err != nil {
		return nil, err
	}
	if err := m.prepare(ctx, &cfg); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	accel, probed, err := chooseAccel(ctx, cfg.Image, cfg.Guest, m.dir)
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	err = m.start(ctx, &cfg, accel)
	if err != nil && probed && m.qemu != nil && m.qemu.kvmBroken() {
		// The probe was too small to see it.
		saveVerdict(verdict{Host: hostID(), KVM: false})
		if err = m.stop(); err == nil {
			err = m.start(ctx, &cfg, accelTCG)
		}
	}
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// newMachine makes a machine's temporary folder. The caller closes the machine.
func newMachine(artifacts string, timeout time.Duration) (*Machine, error) {
	dir, err := os.MkdirTemp("", "guestagent-vm-")
	if err != nil {
		return nil, err
	}
	m := &Machine{dir: dir, artifacts: artifacts, timeout: timeout}
	if m.timeout == 0 {
		m.timeout = defaultTimeout
	}
	if m.artifacts == "" {
		m.artifacts = dir
	}
	return m, nil
}

// record opens the artifacts and returns what the console is to be written to, with a copy to live, which may be nil.
func (m *Machine) record(live io.Writer) (io.Writer, error) {
	if err := os.MkdirAll(m.artifacts, 0o755); err != nil {
		return nil, err
	}
	console, err := os.Create(filepath.Join(m.artifacts, "console.log"))
	if err != nil {
		return nil, err
	}
	m.files = append(m.files, console)
	commands, err := os.Create(filepath.Join(m.artifacts, "commands.log"))
	if err != nil {
		return nil, err
	}
	m.files = append(m.files, commands)
	m.commands = &commandLog{w: commands}
	m.console = newTail(tailBytes)
	writers := []io.Writer{console, m.console}
	if live != nil {
		writers = append(writers, live)
	}
	return io.MultiWriter(writers...), nil
}

// prepare makes all files that QEMU needs, and opens the artifacts.
func (m *Machine) prepare(ctx context.Context, cfg *Config) (err error) {
	if cfg.Console, err = m.record(cfg.Console); err != nil {
		return err
	}
	if cfg.Guest == "" {
		if cfg.Guest, err = buildGuest(ctx, m.dir); err != nil {
			return err
		}
	}
	if cfg.Vsock != nil {
		if err := m.prepareVsock(ctx, *cfg.Vsock); err != nil {
			return fmt.Errorf("preparing vsock: %w", err)
		}
	}
	for i, s := range cfg.OEMStrings {
		if s.File != "" {
			continue
		}
		if strings.ContainsRune(string(s.Value), 0) || len(s.Value) == 0 {
			return fmt.Errorf("writing OEM string %d: it is empty or has a NUL byte", i)
		}
		name := filepath.Join(m.dir, "oem-"+strconv.Itoa(i))
		if err := os.WriteFile(name, s.Value, 0o600); err != nil {
			return err
		}
	}
	if err := writeInitrd(m.initrd(), cfg.Image, guestFiles(cfg.Guest, cfg.Overlay)); err != nil {
		return fmt.Errorf("writing the guest's root: %w", err)
	}
	return nil
}

func (m *Machine) initrd() string { return filepath.Join(m.dir, "initrd") }

// guestFiles returns the overlay with the guest program in front.
func guestFiles(guest string, overlay []File) []File {
	return append([]File{
		{Path: "/usr/lib/vm-guest/vm-guest", Mode: 0o755, Source: guest},
		{Path: "/etc/systemd/system/vm-guest.service", Content: guestUnit},
		{Path: "/etc/systemd/system/sysinit.target.wants/vm-guest.service", Symlink: "../vm-guest.service"},
	}, overlay...)
}

// writeInitrd puts the image's root and the overlay into one file. The kernel skips zeroes between two archives, and
// wants the second one aligned.
func writeInitrd(name string, img *Image, files []File) (err error) {
	out, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	root, err := os.Open(img.Root)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	n, err := io.Copy(out, root)
	if err != nil {
		return err
	}
	if _, err := out.Write(make([]byte, (initrdAlign-n%initrdAlign)%initrdAlign)); err != nil {
		return err
	}
	return img.tree.writeOverlay(out, files)
}

// arguments are QEMU's.
func (m *Machine) arguments(cfg *Config, accel, socket string) []string {
	memory, cpus := cfg.Memory, cfg.CPUs
	if memory == 0 {
		memory = defaultMemory
	}
	if cpus == 0 {
		cpus = defaultCPUs
	}
	machine := "q35"
	if cfg.SMBIOS64 {
		machine += ",smbios-entry-point-type=64"
	}
	kernel := []string{
		"console=ttyS0", "panic=-1", "random.trust_cpu=on", "systemd.crash_reboot=yes", "systemd.firstboot=off",
		// A loaded host makes the kernel's check of the timer fail.
		"no_timer_check",
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-machine", machine, "-accel", accel, "-cpu", cpuModel(accel),
		"-smp", strconv.Itoa(cpus), "-m", strconv.Itoa(memory), "-nic", "none", "-display", "none", "-no-reboot",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-device", "virtio-rng-pci",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=" + channelID + ",path=" + comma(socket),
		"-device", "virtserialport,chardev=" + channelID + ",name=" + wire.PortName,
		"-qmp", "unix:" + comma(m.controlSocket()) + ",server=on,wait=off",
		"-kernel", cfg.Image.Kernel, "-initrd", m.initrd(),
		"-append", strings.Join(append(kernel, cfg.CommandLine...), " "),
	}
	if m.vsock != nil {
		args = append(args, m.vsock.arguments(memory)...)
	}
	for i, s := range cfg.OEMStrings {
		file := s.File
		if file == "" {
			file = filepath.Join(m.dir, "oem-"+strconv.Itoa(i))
		}
		args = append(args, "-smbios", "type=11,path="+comma(file))
	}
	return append(args, cfg.ExtraArgs...)
}

// comma quotes a value of a QEMU option.
func comma(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// start runs QEMU and waits as cfg says.
func (m *Machine) start(ctx context.Context, cfg *Config, accel string) error {
	start := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, m.timeout, ErrTimeout)
	defer cancel()
	socket := filepath.Join(m.dir, wire.SocketName)
	// QEMU dials, so that the port has its other side before the guest opens it.
	l, err := listen(ctx, socket)
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	args := m.arguments(cfg, accel, socket)
	line := qemuProgram + " " + strings.Join(args, " ") + "\n"
	if err := os.WriteFile(filepath.Join(m.artifacts, "qemu.log"), []byte(line), 0o644); err != nil {
		return err
	}
	if m.vsock != nil {
		if err := m.vsock.start(ctx); err != nil {
			return err
		}
	}
	if m.qemu, err = startQEMU(args, cfg.Console); err != nil {
		return err
	}
	m.process, m.Accel, m.wait = m.qemu.process, accel, cfg.WaitFor
	m.follow()
	if err := m.await(ctx, l); err != nil {
		return err
	}
	m.BootTime = time.Since(start)
	return nil
}

// listen makes the socket of the channel.
func listen(ctx context.Context, socket string) (net.Listener, error) {
	if len(socket) > maxSocketPath {
		return nil, fmt.Errorf("making a socket: the path %s is too long; set TMPDIR to a shorter folder", socket)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("making a socket: %w", err)
	}
	return l, nil
}

// follow ends what the machine leaves behind when it ends by itself. It is called once the machine has been started.
func (m *Machine) follow() {
	m.wg.Go(func() {
		<-m.process.done
		m.controlMu.Lock()
		defer m.controlMu.Unlock()
		m.vsock.stop()
	})
}

// await waits for the guest program of a machine that has been started, and then as m.wait says.
func (m *Machine) await(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	m.wg.Go(func() {
		<-m.process.done
		_ = l.Close()
	})
	conn, err := l.Accept()
	if err != nil {
		return m.bootError(ctx)
	}
	c := newChannel(conn)
	m.mu.Lock()
	m.channel = c
	m.mu.Unlock()
	select {
	case <-c.hello:
	case <-c.done:
		return m.bootError(ctx)
	case <-ctx.Done():
		return m.bootError(ctx)
	}
	if m.wait == UntilReady {
		if _, err := m.WaitReady(ctx); err != nil {
			if errors.Is(err, ErrStopped) || ctx.Err() != nil {
				return m.bootError(ctx)
			}
			return m.withConsole(err)
		}
		if m.vsock != nil {
			// systemd does not wait for udev to load the driver. A guest without udev has loaded it by itself, or has none.
			if _, err := m.Run(ctx, "udevadm", "settle"); err != nil {
				return m.bootError(ctx)
			}
		}
	}
	return nil
}

// guest returns the channel of the last boot, or nil.
func (m *Machine) guest() *channel {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.channel
}

// bootError says why there is no guest.
func (m *Machine) bootError(ctx context.Context) error {
	if ctx.Err() == nil {
		return m.stoppedError()
	}
	cause := context.Cause(ctx)
	if errors.Is(cause, ErrTimeout) {
		cause = fmt.Errorf("%w: more than %s", cause, m.timeout)
	}
	return m.withConsole(cause)
}

// stoppedError says how the machine ended. It is called when the channel has ended, which m.process does too, or
// will.
func (m *Machine) stoppedError() error {
	select {
	case <-m.process.done:
		return m.withConsole(fmt.Errorf("%w: %s ended with %s", ErrStopped, m.process.name(), m.process.ended()))
	case <-time.After(killGrace):
	}
	reason := "the channel was closed"
	if c := m.guest(); c != nil && c.reason() != nil {
		reason = c.reason().Error()
	}
	return m.withConsole(fmt.Errorf("%w: %s", ErrStopped, reason))
}

func (m *Machine) withConsole(err error) error {
	return fmt.Errorf("%w\nlast lines of the console:\n%s", err, m.ConsoleTail(consoleLines))
}

// ConsoleTail returns the last n lines of the guest's console, without colours.
func (m *Machine) ConsoleTail(n int) string {
	text := regexp.MustCompile(`\x1b(\[[0-9;?]*[A-Za-z]|[c78=>])|\r`).ReplaceAll(m.console.Bytes(), nil)
	return lastLines(text, n)
}

// Artifacts returns the folder that the console and other records are in.
func (m *Machine) Artifacts() string { return m.artifacts }

// Done is closed when the machine has ended, however that came about.
func (m *Machine) Done() <-chan struct{} { return m.process.done }

// WaitReady waits until systemd has finished the boot and returns the state it is in: "running", or "degraded" when a
// unit has failed. Any other state is an error.
func (m *Machine) WaitReady(ctx context.Context) (string, error) {
	ticker := time.NewTicker(readyPoll)
	defer ticker.Stop()
	for {
		// Renewed now and then, lest a wait that began early in the boot misses its end.
		res, err := m.Run(ctx, "timeout", "20", "systemctl", "is-system-running", "--wait")
		if err != nil {
			return "", fmt.Errorf("waiting for the end of the boot: %w", err)
		}
		switch state := strings.TrimSpace(string(res.Stdout)); state {
		case "running", "degraded":
			return state, nil
		case "", "unknown", "offline", "initializing", "starting":
			// PID 1 does not answer yet, or not in that time.
		default:
			return state, fmt.Errorf("waiting for the end of the boot: the system is in state %q", state)
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("waiting for the end of the boot: %w", context.Cause(ctx))
		case <-ticker.C:
		}
	}
}

// Journal returns the guest's journal of this boot.
func (m *Machine) Journal(ctx context.Context) ([]byte, error) {
	res, err := m.Run(ctx, "journalctl", "--boot", "--no-pager", "--output=short-monotonic")
	if err != nil {
		return nil, fmt.Errorf("reading the journal: %w", err)
	}
	if res.ExitCode != 0 {
		return nil, fmt.Errorf("reading the journal: exit status %d: %s", res.ExitCode, lastLines(res.Stderr, logTail))
	}
	return res.Stdout, nil
}

// Collect writes the journal, the failed units and the waiting jobs into the artifacts.
func (m *Machine) Collect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, collectTimeout)
	defer cancel()
	journal, err := m.Journal(ctx)
	if err != nil {
		return err
	}
	var units []byte
	for _, argv := range [][]string{
		{"systemctl", "--no-pager", "--failed", "--full"},
		{"systemctl", "--no-pager", "list-jobs", "--full"},
	} {
		res, err := m.Run(ctx, argv...)
		if err != nil {
			return fmt.Errorf("collecting artifacts: %w", err)
		}
		units = append(append(units, res.Stdout...), res.Stderr...)
	}
	for name, data := range map[string][]byte{"journal.txt": journal, "units.txt": units} {
		if err := os.WriteFile(filepath.Join(m.artifacts, name), data, 0o644); err != nil {
			return fmt.Errorf("collecting artifacts: %w", err)
		}
	}
	return nil
}

// Shutdown turns the guest off in order and waits for its end.
func (m *Machine) Shutdown(ctx context.Context) error {
	if _, err := m.Run(ctx, "systemctl", "poweroff", "--no-block"); err != nil && !errors.Is(err, ErrStopped) {
		return fmt.Errorf("shutting down: %w", err)
	}
	select {
	case <-m.process.done:
		return nil
	case <-ctx.Done():
		return m.withConsole(fmt.Errorf("shutting down: %w", ctx.Err()))
	}
}

// Close ends the machine at once, waits for what it started and removes its temporary files. It may be called twice.
func (m *Machine) Close() error {
	errs := []error{m.stop()}
	for _, f := range m.files {
		errs = append(errs, f.Close())
	}
	m.files = nil
	if err := errors.Join(append(errs, os.RemoveAll(m.dir))...); err != nil {
		return fmt.Errorf("closing machine: %w", err)
	}
	return nil
}

// stop ends what the machine runs in, its vsock device and the channel.
func (m *Machine) stop() error {
	var err error
	if m.process != nil {
		err = m.process.end()
	}
	m.controlMu.Lock() // what is under way fails now
	m.vsock.stop()
	m.controlMu.Unlock()
	if c := m.guest(); c != nil {
		c.close()
	}
	m.wg.Wait()
	return err
}
