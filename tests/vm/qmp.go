package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/guestagent/guestagent/tests/vm/internal/wire"
)

// channelID is QEMU's name of the channel's character device.
const channelID = "vmguest"

// Pause stops all of QEMU until [Machine.Resume], and so the guest; its clock goes on, as if the host had been busy. The
// program behind vsock runs, so that what the host sends waits and connections stay. A paused machine can be resumed and
// closed; Reset and RestartVsock fail, Run and its like wait.
//
// QEMU's own stop is no use with a vsock device: vhost-device-vsock 0.3.0 does not survive it if the host sends meanwhile,
// and then nobody gets through to the guest any more (seen with QEMU 7.2).
func (m *Machine) Pause(ctx context.Context) error {
	return m.control("pausing the machine", func() error {
		if err := m.process.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			return err
		}
		m.paused = true
		ticker := time.NewTicker(vsockPoll)
		defer ticker.Stop()
		for !stopped(m.process.cmd.Process.Pid) {
			select {
			case <-m.process.done:
				return ErrStopped
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-ticker.C:
			}
		}
		return nil
	})
}

// Resume lets a paused machine go on. Where it is not paused it does nothing.
func (m *Machine) Resume() error {
	return m.control("resuming the machine", func() error {
		if err := m.process.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			return err
		}
		m.paused = false
		return nil
	})
}

// stopped tells whether a signal has stopped all threads of a process.
func stopped(pid int) bool {
	files, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/stat")
	if err != nil || len(files) == 0 {
		return false
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		// The name before the state may hold anything.
		if err != nil || !bytes.HasPrefix(b[bytes.LastIndexByte(b, ')')+1:], []byte(" T")) {
			return false
		}
	}
	return true
}

// Reset turns the machine off and on again without notice, in the same QEMU, and waits for the new boot as [Boot] did. A
// vsock device is a new one on the same paths, with vhost-device-vsock started anew, so that all connections end. What
// runs in the guest ends with [ErrStopped]. After an error the machine can only be closed.
//
// Emulated, this boot takes three times as long as the first (seen): the memory is full of code that was translated.
// [Machine.Close] and Boot with the same [VsockConfig.Path] is quicker, and the same for who only sees the vsock device.
func (m *Machine) Reset(ctx context.Context) error {
	return m.withQMP(ctx, "resetting the machine", func(q *qmp) error { return m.reset(ctx, q) })
}

func (m *Machine) reset(ctx context.Context, q *qmp) error {
	ctx, cancel := context.WithTimeoutCause(ctx, m.timeout, ErrTimeout)
	defer cancel()
	// A channel of its own for each boot: the old one may end within a message.
	socket := filepath.Join(m.dir, wire.SocketName)
	l, err := listen(ctx, socket)
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	if m.vsock != nil {
		// The reset ends what the guest has not done by then.
		if err := q.do("device_del", map[string]any{"id": vsockID}); err != nil {
			return err
		}
	}
	// Else -no-reboot holds for this one too.
	if err := q.do("set-action", map[string]any{"reboot": "reset"}); err != nil {
		return err
	}
	for _, command := range []string{"stop", "system_reset"} {
		if err := q.do(command, nil); err != nil {
			return err
		}
	}
	if err := q.await("RESET", ""); err != nil {
		return err
	}
	if m.vsock != nil {
		if err := m.vsock.replace(ctx, q); err != nil {
			return err
		}
	}
	if err := q.do("cont", nil); err != nil {
		return err
	}
	// QEMU does that only while it runs. The guest is far from opening the channel again.
	if err := q.do("chardev-change", map[string]any{"id": channelID, "backend": socketBackend(socket)}); err != nil {
		return err
	}
	m.guest().close()
	if err := m.await(ctx, l); err != nil {
		return err
	}
	// Only now: the firmware resets once more by itself.
	return q.do("set-action", map[string]any{"reboot": "shutdown"})
}

// socketBackend describes a character device that connects to a Unix socket.
func socketBackend(path string) any {
	return map[string]any{"type": "socket", "data": map[string]any{
		"addr":   map[string]any{"type": "unix", "data": map[string]any{"path": path}},
		"server": false,
	}}
}

// control runs f on a machine that is QEMU. Only one f runs at a time.
func (m *Machine) control(what string, f func() error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", what, err)
		}
	}()
	if m.qemu == nil {
		return fmt.Errorf("%w in a container", errors.ErrUnsupported)
	}
	m.controlMu.Lock()
	defer m.controlMu.Unlock()
	return f()
}

// withQMP is control with a connection to QEMU.
func (m *Machine) withQMP(ctx context.Context, what string, f func(*qmp) error) error {
	return m.control(what, func() error {
		if m.paused {
			return errors.New("it is paused; resume it first")
		}
		q, err := dialQMP(ctx, m.controlSocket())
		if err != nil {
			return err
		}
		defer q.close()
		return f(q)
	})
}

func (m *Machine) controlSocket() string { return filepath.Join(m.dir, "qmp") }

// qmp is a connection to QEMU's control socket, which serves one at a time. The context of dialQMP ends it.
type qmp struct {
	ctx  context.Context //nolint:containedctx // says why the connection ended
	conn net.Conn
	dec  *json.Decoder
	stop func() bool
	// events are those that nobody has waited for yet.
	events []qmpEvent
}

// qmpMessage is what QEMU sends: the greeting, an answer, an error or an event.
type qmpMessage struct {
	QMP    json.RawMessage
	Return json.RawMessage
	qmpEvent
	Error *struct{ Class, Desc string }
}

// qmpEvent is an event, and the device that it is about, if any.
type qmpEvent struct {
	Event string
	Data  struct{ Device string }
}

// dialQMP connects. The caller closes the connection.
func dialQMP(ctx context.Context, path string) (*qmp, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	q := &qmp{ctx: ctx, conn: conn, dec: json.NewDecoder(conn)}
	q.stop = context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	greeting, err := q.read()
	if err == nil && greeting.QMP == nil {
		err = errors.New("no greeting from QEMU")
	}
	if err == nil {
		err = q.do("qmp_capabilities", nil)
	}
	if err != nil {
		q.close()
		return nil, err
	}
	return q, nil
}

func (q *qmp) close() {
	q.stop()
	_ = q.conn.Close()
}

func (q *qmp) read() (m qmpMessage, err error) {
	if err := q.dec.Decode(&m); err != nil {
		return m, errors.Join(err, context.Cause(q.ctx))
	}
	return m, nil
}

// do runs a command and waits for its answer. args may be nil.
func (q *qmp) do(command string, args any) error {
	call := map[string]any{"execute": command}
	if args != nil {
		call["arguments"] = args
	}
	b, err := json.Marshal(call)
	if err != nil {
		return err
	}
	if _, err := q.conn.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("asking QEMU for %s: %w", command, errors.Join(err, context.Cause(q.ctx)))
	}
	for {
		m, err := q.read()
		switch {
		case err != nil:
			return fmt.Errorf("asking QEMU for %s: %w", command, err)
		case m.Error != nil:
			return fmt.Errorf("asking QEMU for %s: %s: %s", command, m.Error.Class, m.Error.Desc)
		case m.Event != "":
			q.events = append(q.events, m.qmpEvent)
		default:
			return nil
		}
	}
}

// await waits for an event since the connection was made. device is "" for an event that is about none.
func (q *qmp) await(event, device string) error {
	for {
		for i, e := range q.events {
			if e.Event == event && e.Data.Device == device {
				q.events = slices.Delete(q.events, i, i+1)
				return nil
			}
		}
		m, err := q.read()
		if err != nil {
			return fmt.Errorf("waiting for QEMU's %s: %w", event, err)
		}
		q.events = append(q.events, m.qmpEvent)
	}
}
