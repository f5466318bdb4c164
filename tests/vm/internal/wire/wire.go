// Package wire is the protocol between the harness and the program it puts into the guest.
//
// A frame is four bytes of magic, the lengths of a JSON header and of a raw body as 32-bit big-endian numbers, the
// header, the body. Both lengths are bounded, so neither side can make the other allocate without limit. The protocol
// has no authentication: the channel is a virtio-serial port, or in a container a Unix socket, that only the harness and
// root in the guest can open.
package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

const (
	// PortName is the name of the virtio-serial port.
	PortName = "org.guestagent.vm"
	// SocketDir is the folder in a container that holds the socket instead.
	SocketDir = "/run/vm-guest"
	// SocketName is the name of the socket in that folder.
	SocketName = "guest.sock"
	// MaxData bounds one file, and each of a program's input and its two outputs.
	MaxData = 32 << 20

	// ProbeMarker is what the guest program writes to the console when it runs as PID 1.
	ProbeMarker = "vm-guest: user space reached"

	maxHeader = 1 << 20
	maxBody   = 2 * MaxData
	magic     = "vmg1"
	prefix    = len(magic) + 8
)

// ErrFrame means that the bytes read are not a frame. The channel cannot be used any more.
var ErrFrame = errors.New("not a frame")

// Op says what a message asks for or answers.
type Op string

// The operations.
const (
	// OpHello is sent once by the guest, when it opens the channel.
	OpHello Op = "hello"
	// OpRun runs a program: Argv, Env, Dir, and the body as its standard input.
	OpRun Op = "run"
	// OpKill ends the program that the message with the same ID started. It has no answer of its own.
	OpKill Op = "kill"
	// OpRead reads the file Path into the answer's body.
	OpRead Op = "read"
	// OpWrite puts the body into the file Path, with Mode.
	OpWrite Op = "write"
	// OpResult answers the message with the same ID.
	OpResult Op = "result"
)

// Message is one frame.
type Message struct {
	ID   uint64   `json:"id,omitempty"`
	Op   Op       `json:"op"`
	Argv []string `json:"argv,omitempty"`
	Env  []string `json:"env,omitempty"`
	Dir  string   `json:"dir,omitempty"`
	Path string   `json:"path,omitempty"`
	Mode uint32   `json:"mode,omitempty"`

	// ExitCode is the program's, Signal the number of the signal that ended it.
	ExitCode int `json:"exitCode,omitempty"`
	Signal   int `json:"signal,omitempty"`
	// Stdout is how much of the body is standard output; the rest is standard error.
	Stdout int `json:"stdout,omitempty"`
	// Error says why the operation was not done; Errno is the system's error number, where there is one.
	Error string `json:"error,omitempty"`
	Errno int    `json:"errno,omitempty"`

	Body []byte `json:"-"`
}

// Write writes m as one frame, in one call of w.Write per part.
func Write(w io.Writer, m *Message) error {
	header, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encoding message: %w", err)
	}
	if len(header) > maxHeader || len(m.Body) > maxBody {
		return fmt.Errorf("encoding message: header of %d and body of %d bytes, limits are %d and %d",
			len(header), len(m.Body), maxHeader, maxBody)
	}
	buf := make([]byte, 0, prefix+len(header))
	buf = append(buf, magic...)
	buf = binary.BigEndian.AppendUint32(buf, uint32(len(header))) //nolint:gosec // bounded above
	buf = binary.BigEndian.AppendUint32(buf, uint32(len(m.Body))) //nolint:gosec // bounded above
	buf = append(buf, header...)
	if _, err := w.Write(buf); err != nil {
		return fmt.Errorf("writing message: %w", err)
	}
	if len(m.Body) == 0 {
		return nil
	}
	if _, err := w.Write(m.Body); err != nil {
		return fmt.Errorf("writing message: %w", err)
	}
	return nil
}

// Read reads one frame. It returns io.EOF only when r ends between two frames, and nothing but an error otherwise when
// it ends early.
func Read(r io.Reader) (*Message, error) {
	var head [prefix]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, io.EOF
		}
		return nil, fmt.Errorf("reading message: %w", err)
	}
	if string(head[:len(magic)]) != magic {
		return nil, fmt.Errorf("reading message: %w: starts with %q", ErrFrame, head[:len(magic)])
	}
	headerLen := binary.BigEndian.Uint32(head[len(magic):])
	bodyLen := binary.BigEndian.Uint32(head[len(magic)+4:])
	if headerLen > maxHeader || bodyLen > maxBody {
		return nil, fmt.Errorf("reading message: %w: header of %d and body of %d bytes, limits are %d and %d",
			ErrFrame, headerLen, bodyLen, maxHeader, maxBody)
	}
	header, err := readN(r, headerLen)
	if err != nil {
		return nil, fmt.Errorf("reading message: %w", err)
	}
	m := new(Message)
	dec := json.NewDecoder(bytes.NewReader(header))
	dec.DisallowUnknownFields()
	if err := dec.Decode(m); err != nil {
		return nil, fmt.Errorf("reading message: %w: %w", ErrFrame, err)
	}
	if dec.More() || m.Stdout < 0 || int64(m.Stdout) > int64(bodyLen) {
		return nil, fmt.Errorf("reading message: %w: inconsistent header", ErrFrame)
	}
	if m.Body, err = readN(r, bodyLen); err != nil {
		return nil, fmt.Errorf("reading message: %w", err)
	}
	return m, nil
}

// readN reads n bytes, allocating no more than was sent so far and a little.
func readN(r io.Reader, n uint32) ([]byte, error) {
	if n == 0 {
		return nil, nil
	}
	var buf bytes.Buffer
	if _, err := io.CopyN(&buf, r, int64(n)); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return buf.Bytes(), nil
}
