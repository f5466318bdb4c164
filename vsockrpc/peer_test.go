package vsockrpc

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestPolicy(t *testing.T) {
	for _, test := range []struct {
		policy Policy
		peer   Peer
		ok     bool
	}{
		{Policy{}, Peer{Kind: PeerVsock, CID: 2, Port: 1023}, true},
		{Policy{}, Peer{Kind: PeerVsock, CID: 2, Port: 1}, true},
		{Policy{}, Peer{Kind: PeerVsock, CID: 2, Port: 1024}, false},
		{Policy{}, Peer{Kind: PeerVsock, CID: 2, Port: 1 << 30}, false},
		{Policy{PortRequired}, Peer{Kind: PeerVsock, CID: 2, Port: 1023}, true},
		{Policy{PortRequired}, Peer{Kind: PeerVsock, CID: 2, Port: 1024}, false},
		{Policy{PortIgnored}, Peer{Kind: PeerVsock, CID: 2, Port: 1 << 30}, true},
		{Policy{PortIgnored}, Peer{Kind: PeerVsock, CID: 2, Port: 45}, true},
		{Policy{"Ignored"}, Peer{Kind: PeerVsock, CID: 2, Port: 1}, false},
		{Policy{"yes"}, Peer{Kind: PeerVsock, CID: 2, Port: 1}, false},
		{Policy{}, Peer{}, false},
		{Policy{PortIgnored}, Peer{}, false},
		{Policy{PortIgnored}, Peer{CID: 2, Port: 1}, false},
		{Policy{}, Peer{Kind: PeerUnix}, true},
		{Policy{"yes"}, Peer{Kind: PeerUnix}, true}, // a fault in the setting leaves the local socket alone
		{Policy{PortIgnored}, Peer{Kind: PeerUnix, UID: 1}, false},
		{Policy{}, Peer{Kind: PeerUnix, UID: 65534}, false},
		{Policy{PortIgnored}, Peer{Kind: 9}, false},
	} {
		if err := test.policy.Authorize(test.peer); (err == nil) != test.ok || err != nil && !errors.Is(err, ErrRefused) {
			t.Errorf("%+v.Authorize(%v) = %v, want ok %v", test.policy, test.peer, err, test.ok)
		}
	}
	// The hypervisor, the guest itself by its two names, other guests, any.
	for _, cid := range []uint32{0, 1, 3, 4, 52, 1<<32 - 1} {
		for _, policy := range []Policy{{}, {PortIgnored}} {
			if err := policy.Authorize(Peer{Kind: PeerVsock, CID: cid, Port: 1}); !errors.Is(err, ErrRefused) {
				t.Errorf("%+v lets CID %d in: %v", policy, cid, err)
			}
		}
	}
}

func TestPeerString(t *testing.T) {
	for want, p := range map[string]Peer{
		"unknown peer": {}, "vsock CID 2 port 77": {Kind: PeerVsock, CID: 2, Port: 77}, "uid 5 pid 6": {Kind: PeerUnix, UID: 5, PID: 6},
	} {
		if got := p.String(); got != want {
			t.Errorf("String() = %q, want %q", got, want)
		}
		if p.Local() != (p.Kind == PeerUnix) {
			t.Errorf("%v.Local() = %v", p, p.Local())
		}
		if log := fmt.Sprint(p.LogValue()); strings.Contains(want, "77") && !strings.Contains(log, "77") {
			t.Errorf("LogValue() = %s", log)
		}
	}
}

func TestLogLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l logLimit
		count := func(n int) (allowed, suppressed int) {
			for range n {
				if s, ok := l.allow(); ok {
					allowed++
					suppressed += s
				}
			}
			return allowed, suppressed
		}
		for _, step := range []struct {
			wait                time.Duration
			n, allowed, silence int
		}{{0, 100, logBurst, 0}, {logEvery - 1, 1, 0, 0}, {1, 5, 1, 93}, {3 * logEvery, 5, 3, 4}, {time.Hour, 20, logBurst, 2}} {
			<-time.After(step.wait)
			if allowed, suppressed := count(step.n); allowed != step.allowed || suppressed != step.silence {
				t.Errorf("after %v: %d lines, %d left out, want %d, %d", step.wait, allowed, suppressed, step.allowed, step.silence)
			}
		}
	})
}
