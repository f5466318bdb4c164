package credsocket

import (
	"context"
	"fmt"
	"runtime"
	"testing"
)

// BenchmarkWake is what it costs to look around while as many units wait as
// may: each Retry that brings nothing costs that, and 512 calls of Decide.
func BenchmarkWake(b *testing.B) {
	for _, n := range []int{0, 1, DefaultMaxWaiting} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			polls := make(chan bool)
			asked := make(chan bool, n)
			l, addr := listen(b)
			s := &Server{Decide: func(context.Context, Request) Decision {
				asked <- true
				return Decision{}
			}}
			var before, after runtime.MemStats
			for i := range n {
				connect(b, addr, Request{fmt.Sprintf("u%d.service", i), "k"})
			}
			runtime.GC()
			runtime.ReadMemStats(&before)
			quiet := make(chan bool)
			s.step = func(at string) {
				select {
				case <-quiet:
					if at == "poll" {
						polls <- true
					}
				default:
				}
			}
			r := start(b, s, l, nil)
			for range n {
				<-asked
			}
			r.logs.Reset()
			runtime.GC()
			runtime.ReadMemStats(&after)
			close(quiet)
			s.wake()
			<-polls
			b.ReportAllocs()
			for b.Loop() {
				s.wake()
				<-polls
			}
			if n == DefaultMaxWaiting {
				b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n), "heap-B/waiter")
			}
			// Whatever wakes it from here on is not waited for.
			go func() {
				for range polls {
					continue
				}
			}()
			r.stop()
			close(polls)
		})
	}
}

// BenchmarkGive is a whole load: connect, ask, give, read.
func BenchmarkGive(b *testing.B) {
	for _, size := range []int{1 << 10, 1 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			want := value(size)
			l, addr := listen(b)
			s := start(b, &Server{Store: newStore(b), Decide: func(context.Context, Request) Decision { return given(b, want) }}, l, nil)
			b.SetBytes(int64(size))
			for b.Loop() {
				connect(b, addr, web).read().wants(b, want)
			}
			s.stop()
		})
	}
}
