package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	defaultCID = 3
	vsockPoll  = 20 * time.Millisecond
	// maxVsockPath leaves room for the underscore and the digits of a port in a socket's address of 107 bytes.
	maxVsockPath = 96
	// vsockID is QEMU's name of the device, and of the character device behind it.
	vsockID     = "vsock"
	vsockBus    = "vsock-port"
	vsockDriver = "vhost-user-vsock-pci"
	// vsockBound is there in a guest whose driver has the device.
	vsockBound = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*"
	// maxVsockReply bounds the line "OK NUMBER".
	maxVsockReply = 32
)

// VsockConfig is a vsock device of a guest. On the host's side the program vhost-device-vsock is behind it, so that
// neither /dev/vhost-vsock nor root is needed: a Unix socket leads into the guest, by the protocol of [DialVsock], and
// when the guest dials a port of CID 2, the program connects to another one, see [ListenVsock].
//
// The guest sees the host as CID 2, as always, with a small source port: the program counts them up from 0, one for each
// connection.
//
// Version 0.3.0 wants "CONNECT PORT" in one write and nothing behind it before its answer: half a line ends the connection,
// what follows the line is lost, and a client that connects and leaves without a line makes it spin for ever. A half-close
// ends both directions, and loses data. A client that leaves after its line and before the answer, as one does that has
// waited long enough for a guest that hangs, makes it panic: all connections then hang, old and new ones, until
// [Machine.RestartVsock]. When the guest dials a port that nobody on the host listens on, nothing answers:
// the guest's connect ends after 2 s with ETIMEDOUT.
//
// A host with /dev/vhost-vsock can have that instead: ExtraArgs with -device vhost-vsock-pci,guest-cid=CID, and a CID
// that no other guest of the host has.
type VsockConfig struct {
	// CID is the guest's; 0 is 3. Guests with the same one do not disturb each other.
	CID uint32
	// Path is the Unix socket, of at most 96 bytes. Empty means one in the machine's own folder. To listen before the
	// guest boots, give a path in a folder of yours; nothing may be there, and the end of the machine removes it. The sockets of
	// [ListenVsock] beside it stay, so that the next machine with the same Path finds them.
	Path string
	// Program is vhost-device-vsock. Empty means that Boot calls [VhostDeviceVsock].
	Program string
}

// DialVsock connects to a port of the guest through the Unix socket path, as [Machine.VsockPath] returns it. The error
// matches io.EOF where nobody in the guest listens.
func DialVsock(ctx context.Context, path string, port uint32) (net.Conn, error) {
	conn, err := dialVsock(ctx, path, port)
	if err != nil {
		return nil, fmt.Errorf("dialling vsock port %d through %s: %w", port, path, err)
	}
	return conn, nil
}

func dialVsock(ctx context.Context, path string, port uint32) (_ net.Conn, err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	// The deadline is not renewed, so that an answer of one byte at a time cannot hold us.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			_ = conn.Close()
		}
	}()
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return nil, errors.Join(err, context.Cause(ctx))
	}
	// Byte by byte: what follows the line is not ours.
	var line []byte
	for b := make([]byte, 1); !bytes.HasSuffix(line, []byte("\n")); line = append(line, b...) {
		if len(line) == maxVsockReply {
			return nil, fmt.Errorf("the answer %q is too long", line)
		}
		if _, err := io.ReadFull(conn, b); err != nil {
			return nil, errors.Join(err, context.Cause(ctx))
		}
	}
	number, ok := strings.CutPrefix(string(line), "OK ")
	if _, err := strconv.ParseUint(strings.TrimSuffix(number, "\n"), 10, 32); !ok || err != nil {
		return nil, fmt.Errorf("the answer is %q, not OK and a number", line)
	}
	return conn, nil
}

// ListenVsock listens for guests that dial a port of CID 2. path is the Unix socket as for [DialVsock], which need not
// be there yet. The caller closes the listener.
func ListenVsock(ctx context.Context, path string, port uint32) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path+"_"+strconv.FormatUint(uint64(port), 10))
	if err != nil {
		return nil, fmt.Errorf("listening on vsock port %d: %w", port, err)
	}
	return l, nil
}

// VsockPath returns the Unix socket that leads to the guest's vsock device, or "" where it has none. The socket is there
// once Boot has returned, and gone after the end of the machine.
func (m *Machine) VsockPath() string {
	if m.vsock == nil {
		return ""
	}
	return m.vsock.cfg.Path
}

// vsock is the host's side of a vsock device.
type vsock struct {
	cfg VsockConfig
	// control is the socket that QEMU connects to.
	control string
	log     io.Writer
	// end ends the program and removes what it leaves behind. It is nil before start.
	end func()
}

// prepareVsock finds the program and decides on the paths.
func (m *Machine) prepareVsock(ctx context.Context, cfg VsockConfig) error {
	var err error
	if cfg.CID == 0 {
		cfg.CID = defaultCID
	}
	if cfg.Path == "" {
		cfg.Path = filepath.Join(m.dir, "vsock")
	}
	if len(cfg.Path) > maxVsockPath {
		return fmt.Errorf("the path %s is too long for a socket; take a shorter folder, by TMPDIR for example", cfg.Path)
	}
	if _, err := os.Lstat(cfg.Path); err == nil {
		// The program would remove it.
		return fmt.Errorf("there is something at %s already", cfg.Path)
	}
	if cfg.Program == "" {
		if cfg.Program, err = VhostDeviceVsock(ctx, nil); err != nil {
			return err
		}
	}
	log, err := os.Create(filepath.Join(m.artifacts, "vsock.log"))
	if err != nil {
		return err
	}
	m.files = append(m.files, log)
	m.vsock = &vsock{cfg: cfg, control: filepath.Join(m.dir, "vsock-control"), log: log}
	return nil
}

// arguments are QEMU's. The program maps the guest's memory, which has to be one that can be shared.
func (v *vsock) arguments(memory int) []string {
	return []string{
		"-object", fmt.Sprintf("memory-backend-memfd,id=memory,size=%dM,share=on", memory),
		"-machine", "memory-backend=memory",
		"-chardev", "socket,id=" + vsockID + ",path=" + comma(v.control),
		// Where a device can be taken out and put in.
		"-device", "pcie-root-port,id=" + vsockBus,
		"-device", vsockDriver + ",id=" + vsockID + ",bus=" + vsockBus + ",chardev=" + vsockID,
	}
}

// RestartVsock takes the vsock device out of the running guest, starts vhost-device-vsock anew on the same paths, and puts
// a new device in, with that CID; 0 keeps the old one. It returns when the guest has it. For the guest that is what a
// snapshot's restore does: all connections end, who listens on any CID goes on. In between a dial in the guest fails with
// ENODEV, and on the host nobody listens on [Machine.VsockPath]. The kernel has to be up, since it lets the device go.
//
// A new program behind the same device is no use: QEMU 7.2 does not set it up, also not at a reset of the guest, which then
// has no vsock, and with reconnect=1 it does not even start (seen).
func (m *Machine) RestartVsock(ctx context.Context, cid uint32) error {
	return m.withQMP(ctx, "restarting vsock", func(q *qmp) error {
		if m.vsock == nil {
			return errors.New("the machine has no vsock device; boot it with Config.Vsock")
		}
		if cid != 0 {
			m.vsock.cfg.CID = cid
		}
		if err := q.do("device_del", map[string]any{"id": vsockID}); err != nil {
			return err
		}
		if err := m.vsock.replace(ctx, q); err != nil {
			return err
		}
		_, err := m.Run(ctx, "sh", "-c", "until test -e "+vsockBound+"; do sleep 0.1; done")
		return err
	})
}

// replace waits until the device has gone, and puts in a new one.
func (v *vsock) replace(ctx context.Context, q *qmp) error {
	if err := q.await("DEVICE_DELETED", vsockID); err != nil {
		return err
	}
	if err := q.do("chardev-remove", map[string]any{"id": vsockID}); err != nil {
		return err
	}
	v.stop()
	if err := v.start(ctx); err != nil {
		return err
	}
	if err := q.do("chardev-add", map[string]any{"id": vsockID, "backend": socketBackend(v.control)}); err != nil {
		return err
	}
	return q.do("device_add", map[string]any{"driver": vsockDriver, "id": vsockID, "bus": vsockBus, "chardev": vsockID})
}

// start starts the program and waits until QEMU can connect to it.
func (v *vsock) start(ctx context.Context) error {
	said := newTail(tailBytes)
	p := newProcess(v.cfg.Program, "--guest-cid", strconv.FormatUint(uint64(v.cfg.CID), 10),
		"--socket", v.control, "--uds-path", v.cfg.Path)
	p.cmd.Stdout = io.MultiWriter(v.log, said)
	p.cmd.Stderr = p.cmd.Stdout
	if err := p.start(); err != nil {
		return err
	}
	v.end = sync.OnceFunc(func() {
		p.kill()
		for _, path := range []string{v.control, v.cfg.Path} {
			_ = os.Remove(path)
		}
	})
	ticker := time.NewTicker(vsockPoll)
	defer ticker.Stop()
	// The program binds both sockets before it listens on this one. To try it by a connection would use it up.
	for !listening(v.control) {
		select {
		case <-p.done:
			return fmt.Errorf("starting %s: it ended (%w): %s", vsockProgram, p.err, lastLines(said.Bytes(), logTail))
		case <-ctx.Done():
			return fmt.Errorf("starting %s: %w", vsockProgram, context.Cause(ctx))
		case <-ticker.C:
		}
	}
	return nil
}

// stop ends the program, if there is one.
func (v *vsock) stop() {
	if v != nil && v.end != nil {
		v.end()
	}
}

// listening tells whether some process listens on the Unix socket path.
func listening(path string) bool {
	const acceptsConnections = "00010000"
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) > 3 && f[3] == acceptsConnections && strings.HasSuffix(line, " "+path+"\n") {
			return true
		}
	}
	return false
}
