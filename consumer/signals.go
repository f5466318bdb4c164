package consumer

import (
	"slices"
	"sync"

	"github.com/godbus/dbus/v5"
)

// A registrar is what go-dbus asks of a signal handler.
type registrar interface {
	dbus.SignalHandler
	dbus.SignalRegistrar
	dbus.Terminator
}

// signals hands on what systemd signals: to the channels of [Conn.subscribe] by
// way of queues without end, but to the followers in the goroutine that reads
// the connection. So they have seen a signal before anybody gets to see an
// answer that systemd sent after it.
type signals struct {
	registrar // the queues

	mu        sync.Mutex
	followers []*Follower
}

// DeliverSignal hands on one signal.
func (s *signals) DeliverSignal(iface, member string, signal *dbus.Signal) {
	s.mu.Lock()
	for _, f := range s.followers {
		f.note(iface, member, signal)
	}
	s.mu.Unlock()
	s.registrar.DeliverSignal(iface, member, signal)
}

func (s *signals) add(f *Follower) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.followers = append(s.followers, f)
}

func (s *signals) remove(f *Follower) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.followers = slices.DeleteFunc(s.followers, func(other *Follower) bool { return other == f })
}
