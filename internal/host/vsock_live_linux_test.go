package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// liveEnv asks for the test that needs a machine of its own.
	liveEnv = "GUESTAGENT_TEST_VSOCK"
	// bindEnv has it bind a port, and nothing else: it is another user's process.
	bindEnv = "GUESTAGENT_TEST_BIND"
)

// A vsockGuest is a guest of a rig that is reached over AF_VSOCK.
type vsockGuest struct {
	*rig

	target vsockrpc.Target // of the agent
	bell   vsockrpc.Target // where the guest rings

	mu      sync.Mutex
	callers []vsockrpc.Peer
}

// newVsockGuest makes a guest with its provider. The guest is dialled at cid.
func newVsockGuest(t *testing.T, cid, port, bell uint32, files ...string) *vsockGuest {
	t.Helper()
	g := &vsockGuest{
		rig:    newRig(t, files...).boot(),
		target: vsockrpc.Target{Scheme: vsockrpc.SchemeVsock, CID: cid, Port: port},
		bell:   vsockrpc.Target{Scheme: vsockrpc.SchemeVsock, CID: cid, Port: bell},
	}
	agent, err := vsockrpc.ListenVsock(t.Context(), port, 0)
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := agent.Accept()
			if err != nil {
				return
			}
			peer, _ := vsockrpc.PeerOf(c)
			g.mu.Lock()
			g.callers = append(g.callers, peer)
			g.mu.Unlock()
			wg.Go(func() { join(c, g.guest.Socket) })
		}
	})
	t.Cleanup(func() {
		_ = agent.Close()
		g.stop() // its connections
		wg.Wait()
	})
	g.provide(func(p *Provider) {
		must(t, p.Doorbell.Close())
		p.Doorbell, err = vsockrpc.ListenVsock(t.Context(), bell, 0)
		must(t, err)
		p.Target, p.May = g.target, OnlyCID(cid)
	})
	return g
}

// join leads c to a Unix socket, until either end hangs up.
func join(c net.Conn, socket string) {
	defer c.Close()
	to, err := net.Dial("unix", socket)
	if err != nil {
		return
	}
	var wg sync.WaitGroup
	for _, pair := range [][2]net.Conn{{c, to}, {to, c}} {
		wg.Go(func() {
			_, _ = io.Copy(struct{ io.Writer }{pair[0]}, struct{ io.Reader }{pair[1]})
			_, _ = c.Close(), to.Close()
		})
	}
	wg.Wait()
}

func (g *vsockGuest) peers() []vsockrpc.Peer {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.callers)
}

// ring rings over vsock.
func (g *vsockGuest) ring() error {
	g.t.Helper()
	c, err := vsockrpc.Dial(g.t.Context(), g.bell)
	if err != nil {
		return err
	}
	defer c.Close()
	return vsockrpc.Provider{Client: c}.Ring(g.t.Context())
}

// settle waits until the provider has looked, for all reasons that it had.
func (g *vsockGuest) settle() {
	g.t.Helper()
	for range 2 { // the first one's connection may be a reason
		done := make(chan error, 1)
		g.p.mu.Lock()
		if g.p.rings == nil {
			g.p.rings = map[chan error]bool{}
		}
		g.p.rings[done] = true
		g.p.mu.Unlock()
		g.p.poke()
		if err := <-done; err != nil {
			g.t.Fatalf("a look of the provider = %v", err)
		}
	}
}

// TestLiveVsock has two providers on one machine, as a host of QEMU or crosvm has.
// The kernel tells of a local process that it is CID 1, whatever it dials: so one
// of the providers is for that CID, and the other, for the machine's own, is never
// rung.
func TestLiveVsock(t *testing.T) {
	if port := os.Getenv(bindEnv); port != "" {
		bindAsOther(t, port)
		return
	}
	if os.Getenv(liveEnv) == "" {
		t.Skip("needs root and the kernel module vsock_loopback, in a machine whose ports are free: in a VM, " +
			"build it with go test -c and run it with " + liveEnv + "=1")
	}
	own, err := vsock.ContextID()
	must(t, err)
	if own < 3 || own == unix.VMADDR_CID_ANY {
		t.Fatalf("the machine's CID is %d, want a guest's", own)
	}
	const (
		bellA, bellB   = vsockrpc.DefaultProviderPort, vsockrpc.DefaultProviderPort - 1
		agentA, agentB = 101, 102 // below the source ports
	)
	a := newVsockGuest(t, unix.VMADDR_CID_LOCAL, agentA, bellA, "a=1")
	b := newVsockGuest(t, own, agentB, bellB, "b=1")

	// Both are called, without a ring.
	a.is(vsockrpc.GuestInForce)
	b.is(vsockrpc.GuestInForce)
	a.has("a=1", "b")
	b.has("b=1", "a")

	t.Run("ring", func(t *testing.T) {
		for i := range 3 {
			value := fmt.Sprint("a=", i+2)
			a.put("a", value[2:])
			if err := a.ring(); err != nil {
				t.Fatalf("Ring = %v, want nil; the provider says\n%s", err, a.told.all())
			}
			a.has(value)
		}
	})

	t.Run("refused", func(t *testing.T) {
		b.settle()
		asked, applies := b.guest.Asked(), len(b.guest.Applies())
		for range 3 {
			if err, ok := errors.AsType[*vsockrpc.UnavailableError](b.ring()); ok {
				t.Errorf("Ring of another CID = %v, want no answer", err)
			}
			if err := b.ring(); err == nil || errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("Ring of another CID = %v, want the connection to end", err)
			}
		}
		if got := b.guest.Asked(); got != asked || len(b.guest.Applies()) != applies {
			t.Errorf("the guest was asked %d times, and %d before", got, asked)
		}
		if log := b.told.all(); !strings.Contains(log, "refused a peer") || !strings.Contains(log, "peer.cid=1 ") || !strings.Contains(log, fmt.Sprint("this provider is for CID ", own)) {
			t.Errorf("the provider tells of no refusal of CID 1:\n%s", log)
		}
		if log := a.told.all(); strings.Contains(log, "refused a peer") {
			t.Errorf("the other provider refused somebody:\n%s", log)
		}
		// What changes comes all the same.
		b.put("b", "2")
		b.gets("b=2")
	})

	t.Run("calls", func(t *testing.T) {
		a.has("b")
		b.has("a")
		for _, g := range []*vsockGuest{a, b} {
			peers := g.peers()
			for _, p := range peers {
				if p.Kind != vsockrpc.PeerVsock || p.Port >= 1024 {
					t.Errorf("the agent at %s was called by %s, want a port below 1024", g.target, p)
				}
			}
			if len(peers) == 0 {
				t.Errorf("the agent at %s was not called", g.target)
			}
		}
	})

	// Providers stay connected, and nobody can listen on a port that one calls
	// from: so those are no providers' ports.
	t.Run("ports", func(t *testing.T) {
		await(t, "two ports are taken", func() bool {
			taken := 0
			for port := uint32(vsockrpc.FirstProviderPort - 1); port >= 128; port-- {
				l, err := vsockrpc.ListenVsock(t.Context(), port, 0)
				if err == nil {
					must(t, l.Close())
				}
				if errors.Is(err, unix.EADDRINUSE) {
					taken++
				}
			}
			return taken >= 2
		})
		for _, p := range slices.Concat(a.peers(), b.peers()) {
			if p.Port >= vsockrpc.FirstProviderPort || p.Port < 128 {
				t.Errorf("a provider called from port %d, where another may listen", p.Port)
			}
		}
	})

	t.Run("nobody", func(t *testing.T) {
		for _, port := range []string{strconv.Itoa(bellA), strconv.Itoa(bellB), "511", "1"} {
			cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestLiveVsock$") // its path may be for this user alone
			cmd.Dir = "/"
			cmd.Env = append(os.Environ(), bindEnv+"="+port)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("binding port %s as nobody: %v\n%s", port, err, out)
			}
		}
	})
}

// bindAsOther checks that this process cannot listen on the port.
func bindAsOther(t *testing.T, port string) {
	n, err := strconv.ParseUint(port, 10, 32)
	must(t, err)
	l, err := vsockrpc.ListenVsock(context.Background(), uint32(n), 0) //nolint:usetesting // it does not wait
	if err == nil {
		_ = l.Close()
	}
	if os.Getuid() == 0 || !errors.Is(err, unix.EACCES) {
		t.Errorf("ListenVsock(%d) as user %d = %v, want EACCES", n, os.Getuid(), err)
	}
}
