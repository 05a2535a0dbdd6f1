package client_test

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/hako-engine/hako/shim/client"
)

// BenchmarkStart is a shim from nothing to its first answer.
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
		end(b, s)
		b.StartTimer()
	}
}

func end(b *testing.B, s *client.Shim) {
	if err := s.Shutdown(context.Background()); err != nil {
		b.Fatal(err)
	}
	<-s.Gone()
	s.Close()
}

// BenchmarkLife is a container's whole life, with a shim of its own: what the engine
// waits for in `run --rm`.
func BenchmarkLife(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skipf("needs root: %s", b.Name())
	}
	binary, err := shimBinary()
	if err != nil {
		b.Fatal(err)
	}
	root, err := rootfs()
	if err != nil {
		b.Fatal(err)
	}
	for _, runtime := range []string{"", "runc"} {
		if runtime != "" {
			if runtime, err = exec.LookPath(runtime); err != nil {
				continue
			}
		}
		b.Run(name(runtime), func(b *testing.B) {
			ctx := context.Background()
			dir := b.TempDir()
			conf, err := json.Marshal(spec("bench"))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, "config.json"), conf, 0o600)
			}
			check := func(err error) {
				if err != nil {
					b.Fatal(err)
				}
			}
			check(err)
			for b.Loop() {
				s, err := client.Manager{}.Start(ctx, client.StartOptions{Binary: binary, Namespace: "bench", ID: "bench", Bundle: dir, Runtime: runtime})
				check(err)
				_, err = s.Create(ctx, client.CreateOptions{
					ID: "bench", Bundle: dir, Rootfs: []client.Mount{{Type: "bind", Source: root, Options: []string{"rbind", "ro"}}},
				})
				check(err)
				_, err = s.Start(ctx, "bench", "")
				check(err)
				_, err = s.Wait(ctx, "bench", "")
				check(err)
				_, err = s.Delete(ctx, "bench", "")
				check(err)
				b.StopTimer()
				end(b, s)
				b.StartTimer()
			}
		})
	}
}
