package host

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/vsockrpc"
)

// BenchmarkPush pushes 1 KiB to every one of many guests, which run in the same
// process: the memory is that of both sides.
func BenchmarkPush(b *testing.B) {
	for _, n := range []int{1, 10, 100, 1000} {
		for _, batch := range []int{1, 16} {
			b.Run(fmt.Sprintf("guests=%d/batch=%d", n, batch), func(b *testing.B) {
				dir := b.TempDir()
				f := Fleet{Batch: batch}
				for i := range n {
					f.Guests = append(f.Guests, start(b, dir, fmt.Sprint(i))...)
				}
				value := bytes.Repeat([]byte("v"), 1<<10)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					p := &vsockrpc.ApplyParams{Set: []vsockrpc.Credential{{Name: "x", Value: secret.New(fmt.Appendf(bytes.Clone(value), "%d", i))}}}
					if err := f.Push(b.Context(), p, func(Result) {}); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
