package client_test

import (
	"context"
	"testing"

	"github.com/hako-engine/hako/shim/client"
)

// BenchmarkStart is a shim from nothing to its first answer, and its end.
func BenchmarkStart(b *testing.B) {
	binary, err := shimBinary()
	if err != nil {
		b.Fatal(err)
	}
	ctx := context.Background()
	dir := b.TempDir()
	for b.Loop() {
		s, err := client.Manager{}.Start(ctx, client.StartOptions{Binary: binary, Namespace: "bench", ID: "bench", Bundle: dir})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := s.Pid(ctx); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := s.Shutdown(ctx); err != nil {
			b.Fatal(err)
		}
		<-s.Gone()
		s.Close()
		b.StartTimer()
	}
}
