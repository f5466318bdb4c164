package consumer

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

var testConfig = Config{Bus: "/nowhere", Store: "/run/credstore", Socket: "/run/guestagent/credentials.sock"}

// A fakeManager answers like PID 1 on its own socket: it knows properties, and
// has one function for all else that is called.
type fakeManager struct {
	mu     sync.Mutex
	units  map[string]map[property]any // that of "" are the manager's
	listed []systemd.UnitStatus        // what the units' states are that have none in units
	call   func(member string, args []any) ([]any, error)
	silent bool                          // reads, and answers nothing but the authentication
	busy   chan struct{}                 // if not nil, it does nothing more until this is closed
	asked  []string                      // every property, "UNIT INTERFACE.NAME"
	got    func(unit string, p property) // if not nil, called before a property is answered
	conns  []*fakeConn
}

// A fakeConn is one connection to a fakeManager.
type fakeConn struct {
	net.Conn
	mu sync.Mutex // one message at a time
}

// newFake returns a fake PID 1 and a connection to it, over pipes, which end
// with the test.
func newFake(t testing.TB) (*fakeManager, *Conn) {
	t.Helper()
	m := &fakeManager{units: make(map[string]map[property]any)}
	c, err := dial(t.Context(), testConfig, m.connect(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return m, c
}

// connect returns a function that connects to the fake.
func (m *fakeManager) connect(t testing.TB) func() (net.Conn, error) {
	return func() (net.Conn, error) {
		ours, theirs := net.Pipe()
		conn := &fakeConn{Conn: ours}
		m.mu.Lock()
		m.conns = append(m.conns, conn)
		m.mu.Unlock()
		done := make(chan struct{})
		go func() {
			defer close(done)
			m.serve(conn)
		}()
		t.Cleanup(func() {
			_ = conn.Close()
			<-done
		})
		return theirs, nil
	}
}

// hangUp ends all connections, as a daemon-reexec does.
func (m *fakeManager) hangUp() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, conn := range m.conns {
		_ = conn.Close()
	}
}

// serve answers one connection until it ends.
func (m *fakeManager) serve(conn *fakeConn) {
	in := bufio.NewReader(conn)
	if _, err := in.ReadByte(); err != nil { // the NUL that comes first
		return
	}
	answers := map[string]string{"AUTH": "REJECTED EXTERNAL", "AUTH EXTERNAL": "DATA", "DATA": "OK 0123456789abcdef0123456789abcdef"}
	for {
		line, err := in.ReadString('\n')
		line = strings.TrimSpace(line)
		if err != nil || line == "BEGIN" {
			break
		}
		if _, err := conn.Write([]byte(answers[line] + "\r\n")); err != nil {
			return
		}
	}
	for {
		msg, err := dbus.DecodeMessage(in)
		if err != nil {
			return
		}
		body, err := m.answer(msg)
		if errors.Is(err, errSilent) {
			continue
		}
		reply := &dbus.Message{
			Type:    dbus.TypeMethodReply,
			Headers: map[dbus.HeaderField]dbus.Variant{dbus.FieldReplySerial: dbus.MakeVariant(msg.Serial())},
			Body:    body,
		}
		if e, ok := errors.AsType[dbus.Error](err); ok {
			reply.Type = dbus.TypeError
			reply.Headers[dbus.FieldErrorName] = dbus.MakeVariant(e.Name)
			reply.Body = e.Body
		}
		if conn.send(reply) != nil {
			return
		}
	}
}

// send writes one message.
func (conn *fakeConn) send(msg *dbus.Message) error {
	if len(msg.Body) > 0 {
		msg.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(msg.Body...))
	}
	conn.mu.Lock()
	defer conn.mu.Unlock()
	return msg.EncodeTo(conn, binary.LittleEndian)
}

var errSilent = errors.New("no answer")

// busError returns an error as systemd answers it.
func busError(name, text string) error { return dbus.Error{Name: name, Body: []any{text}} }

// answer returns what a call is answered with.
func (m *fakeManager) answer(msg *dbus.Message) ([]any, error) {
	iface, _ := msg.Headers[dbus.FieldInterface].Value().(string)
	member, _ := msg.Headers[dbus.FieldMember].Value().(string)
	path, _ := msg.Headers[dbus.FieldPath].Value().(dbus.ObjectPath)
	m.mu.Lock()
	silent, busy, call := m.silent, m.busy, m.call
	m.mu.Unlock()
	if busy != nil {
		<-busy
	}
	switch {
	case iface == "org.freedesktop.DBus":
		return nil, busError("org.freedesktop.DBus.Error.UnknownObject", "PID 1 is no bus")
	case silent:
		return nil, errSilent
	case iface == "org.freedesktop.DBus.Properties" && member == "Get":
		return m.property(path, property{msg.Body[0].(string), msg.Body[1].(string)})
	case iface == ifaceManager && call != nil:
		return call(member, msg.Body)
	default:
		return nil, busError("org.freedesktop.DBus.Error.UnknownMethod", iface+"."+member)
	}
}

// property answers with a property of a unit, or of the manager.
func (m *fakeManager) property(path dbus.ObjectPath, p property) ([]any, error) {
	unit, v, err := m.look(path, p)
	m.mu.Lock()
	got := m.got
	m.mu.Unlock()
	if got != nil {
		got(unit, p)
	}
	return v, err
}

// look finds a property.
func (m *fakeManager) look(path dbus.ObjectPath, p property) (unit string, v []any, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for unit, properties := range m.units {
		if unitPath(unit) != path && (unit != "" || path != managerPath) {
			continue
		}
		m.asked = append(m.asked, unit+" "+p.iface+"."+p.name)
		if v, ok := properties[p]; ok {
			return unit, []any{dbus.MakeVariant(v)}, nil
		}
		for _, u := range m.listed {
			if state, ok := map[property]string{{ifaceUnit, "ActiveState"}: u.ActiveState, {ifaceUnit, "SubState"}: u.SubState}[p]; ok && u.Name == unit {
				return unit, []any{dbus.MakeVariant(state)}, nil
			}
		}
		return unit, nil, busError("org.freedesktop.DBus.Error.UnknownProperty", "Unknown property "+p.name)
	}
	return "", nil, busError("org.freedesktop.systemd1.NoSuchUnit", fmt.Sprintf("Unit at %s not loaded.", path))
}

// set changes properties of a unit, and with tell says so to everybody.
func (m *fakeManager) set(t testing.TB, unit string, tell bool, changed map[property]any) {
	t.Helper()
	m.mu.Lock()
	if m.units[unit] == nil {
		m.units[unit] = make(map[property]any)
	}
	byInterface := make(map[string]map[string]dbus.Variant)
	for p, v := range changed {
		m.units[unit][p] = v
		if byInterface[p.iface] == nil {
			byInterface[p.iface] = make(map[string]dbus.Variant)
		}
		byInterface[p.iface][p.name] = dbus.MakeVariant(v)
	}
	m.mu.Unlock()
	if !tell {
		return
	}
	for _, iface := range []string{execInterface(unit), ifaceUnit} { // in systemd's order
		if len(byInterface[iface]) > 0 {
			m.signal(t, unitPath(unit), "org.freedesktop.DBus.Properties", "PropertiesChanged", iface, byInterface[iface], []string{})
		}
	}
}

// signal sends a signal to everybody.
func (m *fakeManager) signal(t testing.TB, path dbus.ObjectPath, iface, member string, body ...any) {
	t.Helper()
	m.mu.Lock()
	conns := m.conns
	m.mu.Unlock()
	for _, conn := range conns {
		err := conn.send(&dbus.Message{
			Type: dbus.TypeSignal,
			Headers: map[dbus.HeaderField]dbus.Variant{
				dbus.FieldPath:      dbus.MakeVariant(path),
				dbus.FieldInterface: dbus.MakeVariant(iface),
				dbus.FieldMember:    dbus.MakeVariant(member),
			},
			Body: body,
		})
		if err != nil {
			t.Errorf("sending %s: %v", member, err)
		}
	}
}

// removed says that a job has ended.
func (m *fakeManager) removed(t *testing.T, id uint32, unit, result string) {
	t.Helper()
	m.signal(t, "/org/freedesktop/systemd1", ifaceManager, "JobRemoved", id, jobPath(id), unit, result)
}

func jobPath(id uint32) dbus.ObjectPath {
	return dbus.ObjectPath(fmt.Sprintf("/org/freedesktop/systemd1/job/%d", id))
}

// unitStatus returns a unit as systemd lists it.
func unitStatus(name, load, active, sub string) systemd.UnitStatus {
	return systemd.UnitStatus{Name: name, LoadState: load, ActiveState: active, SubState: sub, Path: unitPath(name), JobPath: "/"}
}

// serviceState returns the properties of a service that is doing well.
func serviceState(unit string) map[property]any {
	return map[property]any{
		{ifaceUnit, "Id"}:                unit,
		{ifaceUnit, "ActiveState"}:       "active",
		{ifaceUnit, "SubState"}:          "running",
		{ifaceUnit, "InvocationID"}:      []byte{15: 1},
		{ifaceUnit, "Job"}:               noJob,
		{ifaceService, "Result"}:         "success",
		{ifaceService, "Type"}:           "simple",
		{ifaceService, "ExecMainCode"}:   int32(0),
		{ifaceService, "ExecMainStatus"}: int32(0),
		{ifaceService, "NRestarts"}:      uint32(0),
	}
}

// A pendingJob is the value of the property Job.
type pendingJob struct {
	ID   uint32
	Path dbus.ObjectPath
}

var noJob = pendingJob{0, "/"}

// newContext returns the test's context with a way to end it.
func newContext(t *testing.T) (context.Context, context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	return ctx, cancel
}
