package vm

import (
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
)

const qemuProgram = "qemu-system-x86_64"

// process is a program that does not outlive this one.
type process struct {
	cmd *exec.Cmd
	// leash, where there is one, is what the program ends by when it is closed, as it is when this process ends.
	// Without one the program is killed.
	leash io.Closer
	// stderr, where there is one, is what the program wrote.
	stderr *tail
	// done is closed when the process has ended and err is set.
	done chan struct{}
	err  error
}

func newProcess(program string, args ...string) *process {
	return &process{cmd: exec.Command(program, args...), done: make(chan struct{})}
}

// StartHost starts a program on the host. The kernel kills it when this process ends, also where that has no chance to.
// done is closed when the program has ended and cmd.ProcessState is set; the caller calls no method of cmd.
func StartHost(cmd *exec.Cmd) (done <-chan struct{}, err error) {
	p := &process{cmd: cmd, done: make(chan struct{})}
	if err := p.start(); err != nil {
		return nil, err
	}
	return p.done, nil
}

// start starts the process. The caller waits for done.
func (p *process) start() error {
	if p.leash == nil {
		dieWithThread(p.cmd)
	} else {
		ownSession(p.cmd)
	}
	started := make(chan error, 1)
	go func() {
		// The kernel kills the process when this thread ends: no other goroutine may end it before.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("starting %s: %w", p.name(), err)
	}
	return nil
}

// name returns the program's name.
func (p *process) name() string { return filepath.Base(p.cmd.Path) }

// kill ends the process at once and waits for its end.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// end ends the process in its own way and waits for its end. It returns what went wrong while the process ended.
func (p *process) end() error {
	if p.leash == nil {
		p.kill()
		return nil
	}
	select {
	case <-p.done:
		return nil // by itself, and whoever waited for it has been told
	default:
	}
	_ = p.leash.Close()
	<-p.done
	if p.err != nil {
		return fmt.Errorf("ending %s: %s", p.name(), p.ended())
	}
	return nil
}

// ended says how the process ended. It is called after done.
func (p *process) ended() string {
	s := "exit status 0"
	if p.err != nil {
		s = p.err.Error()
	}
	if p.stderr == nil {
		return s
	}
	var said []string
	for line := range strings.Lines(string(p.stderr.Bytes())) {
		// Each boot of an emulated machine warns of what the processor lacks.
		if line = strings.TrimSpace(line); line != "" && !strings.Contains(line, "warning: TCG doesn't support") {
			said = append(said, line)
		}
	}
	if len(said) > 0 {
		s += "; it wrote: " + strings.Join(said, "; ")
	}
	return s
}

// qemu is one QEMU process.
type qemu struct {
	*process

	mu     sync.Mutex
	broken bool
}

// startQEMU starts QEMU. What it writes to standard output, where args put the console, goes to console. The caller
// waits for done.
func startQEMU(args []string, console io.Writer) (*qemu, error) {
	q := &qemu{process: newProcess(qemuProgram, args...)}
	q.stderr = newTail(tailBytes)
	q.cmd.Stdout = console
	q.cmd.Stderr = stderrWatch{q}
	if err := q.start(); err != nil {
		return nil, err
	}
	return q, nil
}

// kvmBroken tells whether QEMU said that KVM cannot run this guest.
func (q *qemu) kvmBroken() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.broken
}

// stderrWatch keeps what QEMU writes. After an error inside KVM, QEMU pauses the guest for ever instead of ending.
type stderrWatch struct{ q *qemu }

func (w stderrWatch) Write(p []byte) (int, error) {
	n, err := w.q.stderr.Write(p)
	if bytes.Contains(w.q.stderr.Bytes(), []byte("KVM internal error")) {
		w.q.mu.Lock()
		w.q.broken = true
		w.q.mu.Unlock()
		_ = w.q.cmd.Process.Kill()
	}
	return n, err
}
