package store

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// fsync is what the file system takes for one: the unit of the others.
func BenchmarkFsync(b *testing.B) {
	dir := b.TempDir()
	f := openRaw(b, dir)
	defer f.Close()
	for b.Loop() {
		if _, err := f.WriteAt([]byte("x"), 0); err != nil {
			b.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkUpdate(b *testing.B) {
	for _, n := range []int{1, 16} {
		b.Run(fmt.Sprint("writers=", n), func(b *testing.B) {
			s := openTest(b, b.TempDir())
			r := s.Records("r")
			var next atomic.Int64
			var wg sync.WaitGroup
			b.ResetTimer()
			for range n {
				wg.Go(func() {
					for {
						i := next.Add(1)
						if i > int64(b.N) {
							return
						}
						if err := r.Put(context.Background(), fmt.Sprint(i%1000), i); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

func BenchmarkCommitBlob(b *testing.B) {
	for _, size := range []int{1 << 10, 16 << 20} {
		b.Run(fmt.Sprint("bytes=", size), func(b *testing.B) {
			s := openTest(b, b.TempDir())
			ctx := inNamespace("a")
			data := make([]byte, size)
			b.SetBytes(int64(size))
			i := 0
			for b.Loop() {
				i++
				copy(data, fmt.Sprint(i))
				if err := content.WriteBlob(ctx, s.Content(), "r", bytes.NewReader(data), ocispec.Descriptor{Size: int64(size)}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkGC(b *testing.B) {
	s := openTest(b, b.TempDir())
	ctx := inNamespace("a")
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := range 60 {
				blob(b, ctx, s, fmt.Sprint(w, "/", i), labelRoot, "x")
			}
		})
	}
	wg.Wait()
	for b.Loop() {
		if _, err := s.GC(ctx); err != nil {
			b.Fatal(err)
		}
	}
}

func openRaw(b *testing.B, dir string) *os.File {
	b.Helper()
	f, err := os.Create(filepath.Join(dir, "f"))
	if err != nil {
		b.Fatal(err)
	}
	return f
}
