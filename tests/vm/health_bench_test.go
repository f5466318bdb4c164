package vm_test

import (
	"context"
	"fmt"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// BenchmarkHealthIdle is what it costs to look after a guest in which nothing happens: an iteration is a second, so that
// -benchtime=10m measures ten minutes, once while nobody watches, and once with a watch.
func BenchmarkHealthIdle(b *testing.B) {
	for _, watched := range []bool{false, true} {
		b.Run(map[bool]string{false: "unwatched", true: "watched"}[watched], func(b *testing.B) {
			m, target := benchGuest(b)
			if watched {
				benchWatch(b, target)
			} else {
				vmtest.Run(b, m, "systemctl", "stop", agentService)
			}
			second := time.NewTicker(time.Second)
			defer second.Stop()
			done := measure(b, m, "min", func() float64 { return b.Elapsed().Minutes() })
			for b.Loop() {
				<-second.C
			}
			done()
			if watched {
				logResident(b, m)
			}
		})
	}
}

// BenchmarkHealthGet is what a report costs, without a watch and with one, which makes the agent follow systemd.
func BenchmarkHealthGet(b *testing.B) {
	for _, watched := range []bool{false, true} {
		b.Run(map[bool]string{false: "unwatched", true: "watched"}[watched], func(b *testing.B) {
			m, target := benchGuest(b)
			if watched {
				benchWatch(b, target)
			}
			get := benchGet(b, target)
			done := measure(b, m, "op", func() float64 { return float64(b.N) })
			for b.Loop() {
				get()
			}
			done()
		})
	}
}

// benchGuest is a guest with some credentials and units that use them.
func benchGuest(b *testing.B) (*vm.Machine, vsockrpc.Target) {
	b.Helper()
	m := vmtest.StartContainer(b, vm.ContainerConfig{Overlay: agentFiles(b)})
	set, units, names := creds{}, map[string]string{}, []string{}
	for i := range 5 {
		name := fmt.Sprintf("bench%d", i)
		set[name] = newValue()
		units[name+".service"] = loads("LoadCredential=" + name)
		names = append(names, name+".service")
	}
	addUnits(b, m, units)
	mustPush(b, m, set)
	start(b, m, names...)
	socket, err := m.HostPath("/run/guestagent/varlink.sock")
	if err != nil {
		b.Fatal(err)
	}
	return m, vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: socket}
}

// benchGet returns a function that asks for a report, and has asked once, which starts the agent.
func benchGet(b *testing.B, target vsockrpc.Target) func() {
	b.Helper()
	c, err := vsockrpc.Dial(b.Context(), target)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	get := func() {
		if _, err := (vsockrpc.Health{Client: c}).Get(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	get()
	return get
}

// benchWatch watches until the end of the benchmark, and returns when the agent follows systemd and has asked it all.
func benchWatch(b *testing.B, target vsockrpc.Target) {
	b.Helper()
	ctx, cancel := context.WithCancel(b.Context())
	heard, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		c, err := vsockrpc.Dial(ctx, target)
		if err != nil {
			b.Error(err)
			return
		}
		defer c.Close()
		first := true
		for r, err := range (vsockrpc.Health{Client: c}).Watch(ctx, 20*time.Second) {
			if err != nil {
				if ctx.Err() == nil {
					b.Error(err)
				}
				return
			}
			if first {
				close(heard)
			} else if r.Report != nil {
				b.Logf("a change: %s, %v", r.Report.Verdict, reasonCodes(*r.Report))
			}
			first = false
		}
	}()
	b.Cleanup(func() {
		cancel()
		<-ended
	})
	select {
	case <-heard:
	case <-ended:
	}
	get := benchGet(b, target)
	for range 10 {
		get()
	}
}

// measure reports the time that the agent and PID 1 have run from now on, in milliseconds for each of what per counts.
func measure(b *testing.B, m *vm.Machine, unit string, per func() float64) (done func()) {
	b.Helper()
	agent, pid1 := cpuTime(b, m, agentService), cpuTime(b, m, "init.scope")
	return func() {
		b.Helper()
		n := per()
		b.ReportMetric((cpuTime(b, m, agentService)-agent)/n, "agent-ms/"+unit)
		b.ReportMetric((cpuTime(b, m, "init.scope")-pid1)/n, "pid1-ms/"+unit)
	}
}

// cpuTime is how long the processes of a unit have run, in milliseconds; 0 for one that does not.
func cpuTime(b *testing.B, m *vm.Machine, unit string) float64 {
	b.Helper()
	group := strings.TrimSpace(vmtest.Run(b, m, "systemctl", "show", "--value", "--property=ControlGroup", unit))
	if group == "" {
		return 0
	}
	var used float64
	for line := range strings.Lines(string(vmtest.ReadFile(b, m, path.Join("/sys/fs/cgroup", group, "cpu.stat")))) {
		_, _ = fmt.Sscanf(line, "usage_usec %g", &used)
	}
	if used == 0 {
		b.Fatalf("the kernel does not tell how long %s has run", unit)
	}
	return used / 1000
}
