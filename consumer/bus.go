package consumer

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"reflect"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// ErrLost is matched by the error of a call whose connection to systemd ended,
// as it does with every daemon-reexec. The caller has to dial again.
var ErrLost = errors.New("connection to systemd lost")

const (
	busName      = "org.freedesktop.systemd1"
	managerPath  = dbus.ObjectPath("/org/freedesktop/systemd1")
	ifaceManager = "org.freedesktop.systemd1.Manager"
	ifaceUnit    = "org.freedesktop.systemd1.Unit"
	ifaceService = "org.freedesktop.systemd1.Service"
	unitFolder   = "/org/freedesktop/systemd1/unit/"

	// inFlight is how many units are asked about at once. PID 1 takes one
	// message at a time, so a few keep it busy; and the questions fit into the
	// socket's buffer, so that none waits to be written.
	inFlight = 8

	// writeTimeout bounds the write of one message. It is reached only where
	// PID 1 reads nothing and earlier questions have filled the socket's buffer.
	writeTimeout = 10 * time.Second
)

// A Config says where things are. Every path is absolute.
type Config struct {
	Bus    string // PID 1's own socket, /run/systemd/private
	Store  string // the folder with the credentials, /run/credstore
	Socket string // the credentials socket, /run/guestagent/credentials.sock
}

// A Conn is a connection to PID 1. Its methods may be called at the same time.
// They end with the context's error when the context does, and with [ErrLost]
// when the connection does; only a PID 1 that has stopped reading can hold up a
// call for 10 seconds beyond its context, and then the connection is given up.
type Conn struct {
	cfg     Config
	manager *systemd.Conn // makes its calls on bus
	bus     *dbus.Conn
	signals *signals // of bus
	wire    *wire    // below bus

	mu      sync.Mutex
	unknown map[property]bool // this systemd does not have them
}

// Dial connects to PID 1, which lets only root in. The context bounds
// connecting; the connection then stays until [Conn.Close].
func Dial(ctx context.Context, cfg Config) (*Conn, error) {
	return dial(ctx, cfg, func() (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", cfg.Bus)
	})
}

// dial is Dial over what connect returns.
func dial(ctx context.Context, cfg Config, connect func() (net.Conn, error)) (*Conn, error) {
	raw, err := connect()
	if err != nil {
		return nil, fmt.Errorf("connecting to systemd: %w", err)
	}
	c := &Conn{cfg: cfg, wire: &wire{Conn: raw, r: bufio.NewReader(raw)}, unknown: make(map[property]bool)}
	// Neither the authentication nor go-systemd's first call know a context.
	stop := context.AfterFunc(ctx, func() { _ = c.wire.Close() })
	err = c.introduce()
	stop()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("connecting to systemd: %w", err)
	}
	return c, nil
}

// introduce makes a D-Bus connection of the wire.
func (c *Conn) introduce() (err error) {
	queues, _ := dbus.NewSequentialSignalHandler().(registrar) // as it has promised Signal and Close
	c.signals = &signals{registrar: queues}
	c.bus, err = dbus.NewConn(c.wire, dbus.WithSignalHandler(c.signals))
	if err != nil {
		return err
	}
	// The uid, so that nothing looks up a user's name. There is no Hello: PID 1
	// is the only one at the other end, not a bus.
	if err := c.bus.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Geteuid()))}); err != nil {
		return err
	}
	// go-systemd asks for two connections, so that a signal nobody takes cannot
	// hold up an answer. Here the signal handler has a queue without end, and
	// PID 1, which sends every signal on every connection, has half the work.
	c.manager, err = systemd.NewConnection(func() (*dbus.Conn, error) { return c.bus, nil })
	return err
}

// Close ends the connection. Calls that are under way end with [ErrLost].
func (c *Conn) Close() {
	// First what is below: godbus waits for a write before it closes.
	_ = c.wire.Close()
	if c.bus != nil {
		_ = c.bus.Close()
	}
}

// A wire is what a connection to PID 1 goes over.
type wire struct {
	net.Conn
	r     *bufio.Reader // a message is read in several small pieces
	ended atomic.Bool   // closed, by either side
}

// Read reads from the connection by way of the buffer.
func (w *wire) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if err != nil {
		w.ended.Store(true)
	}
	return n, err
}

// Write writes one message, or gives the connection up: after a part of one
// nothing can follow.
func (w *wire) Write(p []byte) (int, error) {
	err := w.SetWriteDeadline(time.Now().Add(writeTimeout))
	n := 0
	if err == nil {
		n, err = w.Conn.Write(p)
	}
	if err != nil {
		_ = w.Close()
	}
	return n, err
}

// Close ends whatever waits for the connection.
func (w *wire) Close() error {
	w.ended.Store(true)
	return w.Conn.Close()
}

// failure explains why a call ended with err: first of all by ctx's end, then
// by the connection's.
func (c *Conn) failure(ctx context.Context, doing string, err error) error {
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
	case c.wire.ended.Load():
		err = ErrLost
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// A property is one of an object of systemd's.
type property struct{ iface, name string }

// values are the properties that an object has, by their names. None of those
// that this package asks for is in two interfaces.
type values map[string]dbus.Variant

// errMoved is matched by the error of get where a property that was asked for
// twice was not the same both times.
var errMoved = errors.New("it changed meanwhile")

// get asks for properties of an object, all at once. What this systemd does not
// know is missing in the result. An error that systemd answered is a dbus.Error.
//
// systemd answers in this order, and does other things in between: what is asked
// for first and last, and is the same, was the same all the time.
func (c *Conn) get(ctx context.Context, path dbus.ObjectPath, wanted ...property) (values, error) {
	c.mu.Lock()
	wanted = slices.DeleteFunc(slices.Clone(wanted), func(p property) bool { return c.unknown[p] })
	c.mu.Unlock()

	obj := c.bus.Object(busName, path)
	calls := make([]*dbus.Call, len(wanted))
	for i, p := range wanted {
		calls[i] = obj.GoWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, make(chan *dbus.Call, 1), p.iface, p.name)
	}
	found := make(values, len(wanted))
	var firstErr error
	for i, call := range calls {
		<-call.Done
		var v dbus.Variant
		err := call.Store(&v)
		switch {
		case err == nil:
			if before, ok := found[wanted[i].name]; ok && firstErr == nil && !reflect.DeepEqual(before.Value(), v.Value()) {
				firstErr = fmt.Errorf("asking systemd for %s: %w", wanted[i].name, errMoved)
			}
			found[wanted[i].name] = v
		case isAnswer(err, "org.freedesktop.DBus.Error.UnknownProperty"):
			c.mu.Lock()
			c.unknown[wanted[i]] = true
			c.mu.Unlock()
		case firstErr == nil:
			firstErr = c.failure(ctx, "asking systemd for "+wanted[i].name, err)
		}
	}
	return found, firstErr
}

// isAnswer reports whether err is what systemd answered, and one of the named
// errors if there are any.
func isAnswer(err error, names ...string) bool {
	answer, ok := errors.AsType[dbus.Error](err)
	return ok && (len(names) == 0 || slices.Contains(names, answer.Name))
}

// text returns a string property, "" if it is missing.
func (v values) text(name string) string {
	s, _ := v[name].Value().(string)
	return s
}

// length returns how many elements a list has, 0 if it is missing.
func (v values) length(name string) int {
	list := reflect.ValueOf(v[name].Value())
	if list.Kind() != reflect.Slice {
		return 0
	}
	return list.Len()
}

// flag returns a boolean property, false if it is missing.
func (v values) flag(name string) bool {
	b, _ := v[name].Value().(bool)
	return b
}

// number returns an unsigned property of any size, 0 if it is missing.
func (v values) number(name string) uint64 {
	switch n := v[name].Value().(type) {
	case uint32:
		return uint64(n)
	case uint64:
		return n
	}
	return 0
}

// id returns a 128-bit property in hexadecimal, "" if it is missing or zero.
func (v values) id(name string) string {
	b, _ := v[name].Value().([]byte)
	if !slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) {
		return ""
	}
	return hex.EncodeToString(b)
}

// list stores an array property in dst, nothing if it is missing.
func (v values) list(name string, dst any) error {
	value, ok := v[name]
	if !ok {
		return nil
	}
	if err := value.Store(dst); err != nil {
		return fmt.Errorf("decoding systemd's %s: %w", name, err)
	}
	return nil
}

// unitPath returns the object path of a unit.
func unitPath(unit string) dbus.ObjectPath {
	return dbus.ObjectPath(unitFolder + systemd.PathBusEscape(unit))
}

// each calls f for 0 to n-1, a few at once, and returns the first error, after
// which it begins no other.
func each(n int, f func(i int) error) error {
	var (
		wg       sync.WaitGroup
		next     atomic.Int64
		once     sync.Once
		firstErr error
	)
	for range min(n, inFlight) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				if err := f(int(i)); err != nil {
					once.Do(func() { firstErr = err })
					next.Store(int64(n))
				}
			}
		})
	}
	wg.Wait()
	return firstErr
}
