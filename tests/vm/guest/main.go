//go:build linux

// Command guest runs programs in a test's virtual machine or container and sends back what they wrote.
//
// It is started by vm-guest.service as root and talks to package vm over a virtio-serial port, in a container over a Unix
// socket; see package wire. It trusts the host without reserve and is for tests only: never install it in a real system. As PID 1, which it is in the
// harness's probe for KVM, it says that it got there and turns the machine off.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/guestagent/guestagent/tests/vm/internal/wire"
)

const (
	poll       = 100 * time.Millisecond
	waitDelay  = 2 * time.Second
	searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

func main() {
	if os.Getpid() == 1 {
		probe(os.Stdout)
	}
	if err := run(context.Background(), filepath.Join(wire.SocketDir, wire.SocketName), "/sys/class/virtio-ports", "/dev"); err != nil {
		logLine("/dev/kmsg", fmt.Sprintf("vm-guest: %v\n", err))
		os.Exit(1)
	}
}

// probe is what runs as PID 1 in the probe for KVM.
func probe(console io.Writer) {
	_, _ = io.WriteString(console, wire.ProbeMarker+"\n")
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// logLine writes to the kernel's log, since the journal may not be up.
func logLine(path, line string) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer func() { _ = f.Close() }()
	_, _ = io.WriteString(f, line)
}

func run(ctx context.Context, socket, ports, dev string) error {
	channel, err := openChannel(ctx, socket, ports, dev)
	if err != nil {
		return err
	}
	defer func() { _ = channel.Close() }()
	return serve(ctx, channel)
}

// openChannel connects to the socket, which a container has from its start, or else opens the port.
func openChannel(ctx context.Context, socket, ports, dev string) (io.ReadWriteCloser, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err == nil {
		return conn, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("connecting to the harness: %w", err)
	}
	// Built in on some kernels; where it is a module, udev may not have come to it yet.
	_ = exec.CommandContext(ctx, "/sbin/modprobe", "--all", "virtio_pci", "virtio_console").Run()
	return openPort(ctx, ports, dev)
}

// openPort waits for the port with our name and opens it.
func openPort(ctx context.Context, ports, dev string) (*os.File, error) {
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	for {
		entries, err := os.ReadDir(ports)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("looking for the port: %w", err)
		}
		for _, e := range entries {
			name, err := os.ReadFile(filepath.Join(ports, e.Name(), "name"))
			if err != nil || strings.TrimSpace(string(name)) != wire.PortName {
				continue
			}
			f, err := os.OpenFile(filepath.Join(dev, e.Name()), os.O_RDWR, 0)
			if err == nil {
				return f, nil
			}
			if !errors.Is(err, os.ErrNotExist) {
				return nil, fmt.Errorf("opening the port: %w", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-ticker.C:
		}
	}
}

// server answers the requests that come over one channel.
type server struct {
	writeMu sync.Mutex
	w       io.Writer

	mu      sync.Mutex
	running map[uint64]context.CancelFunc
}

// serve answers requests until the channel ends, and waits for those that run.
func serve(ctx context.Context, channel io.ReadWriter) error {
	ctx, cancel := context.WithCancel(ctx)
	s := &server{w: channel, running: make(map[uint64]context.CancelFunc)}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	if err := s.send(&wire.Message{Op: wire.OpHello}); err != nil {
		return err
	}
	for {
		m, err := wire.Read(channel)
		if err != nil {
			return err
		}
		if m.Op == wire.OpKill {
			s.kill(m.ID)
			continue
		}
		runCtx, done := s.register(ctx, m.ID)
		wg.Go(func() {
			defer done()
			answer := handle(runCtx, m)
			answer.ID, answer.Op = m.ID, wire.OpResult
			if err := s.send(answer); err != nil {
				logLine("/dev/kmsg", fmt.Sprintf("vm-guest: answering: %v\n", err))
			}
		})
	}
}

func (s *server) send(m *wire.Message) error {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	return wire.Write(s.w, m)
}

func (s *server) register(ctx context.Context, id uint64) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running[id] = cancel
	return ctx, func() {
		cancel()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.running, id)
	}
}

func (s *server) kill(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cancel, ok := s.running[id]; ok {
		cancel()
	}
}

func handle(ctx context.Context, m *wire.Message) *wire.Message {
	switch m.Op {
	case wire.OpRun:
		return runProgram(ctx, m)
	case wire.OpRead:
		data, err := readFile(m.Path)
		if err != nil {
			return failure(err)
		}
		return &wire.Message{Body: data}
	case wire.OpWrite:
		if err := writeFile(m.Path, os.FileMode(m.Mode), m.Body); err != nil {
			return failure(err)
		}
		return &wire.Message{}
	case wire.OpHello, wire.OpKill, wire.OpResult:
	}
	return &wire.Message{Error: fmt.Sprintf("no operation %q", m.Op)}
}

func failure(err error) *wire.Message {
	m := &wire.Message{Error: err.Error()}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		m.Errno = int(errno)
	}
	return m
}

// bounded keeps what fits and fails after that, which ends the program.
type bounded struct {
	name string
	buf  bytes.Buffer
	over func(string)
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.buf.Len()+len(p) > wire.MaxData {
		b.over(b.name)
		return 0, io.ErrShortWrite
	}
	return b.buf.Write(p)
}

// runProgram runs a program in a process group of its own, which dies with ctx, with a clean environment.
func runProgram(ctx context.Context, m *wire.Message) *wire.Message {
	if len(m.Argv) == 0 {
		return &wire.Message{Error: "no program to run"}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	over := func(name string) {
		cancel(fmt.Errorf("%s is larger than %d bytes", name, wire.MaxData))
	}
	stdout := &bounded{name: "standard output", over: over}
	stderr := &bounded{name: "standard error", over: over}
	cmd := exec.CommandContext(ctx, m.Argv[0], m.Argv[1:]...)
	cmd.Dir = "/"
	if m.Dir != "" {
		cmd.Dir = m.Dir
	}
	cmd.Env = append([]string{"PATH=" + searchPath, "HOME=/root", "LANG=C.UTF-8"}, m.Env...)
	cmd.Stdin = bytes.NewReader(m.Body)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A daemon that was started may keep the pipes open for ever.
	cmd.WaitDelay = waitDelay
	err := cmd.Run()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return &wire.Message{Error: cause.Error()}
	}
	if cmd.ProcessState == nil {
		return failure(err)
	}
	answer := &wire.Message{ExitCode: cmd.ProcessState.ExitCode()}
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		answer.Signal = int(status.Signal())
		answer.ExitCode = 128 + answer.Signal
	}
	answer.Stdout = stdout.buf.Len()
	answer.Body = append(stdout.buf.Bytes(), stderr.buf.Bytes()...)
	return answer
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, wire.MaxData+1))
	if err != nil {
		return nil, err
	}
	if len(data) > wire.MaxData {
		return nil, fmt.Errorf("reading %s: larger than %d bytes", path, wire.MaxData)
	}
	return data, nil
}

// writeFile puts a file in place as a whole, and makes the folders it needs.
func writeFile(path string, mode os.FileMode, data []byte) (err error) {
	dir, base := filepath.Split(filepath.Clean(path))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+base+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
