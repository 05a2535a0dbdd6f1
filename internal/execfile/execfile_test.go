package execfile

import (
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// TestWrite executes what it has just written, while others fork without pause.
func TestWrite(t *testing.T) {
	t.Parallel()
	stop := make(chan struct{})
	var others sync.WaitGroup
	for range 4 {
		others.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = exec.Command("/bin/true").Run()
				}
			}
		})
	}
	path := filepath.Join(t.TempDir(), "script")
	for range 50 {
		if err := Write(path, []byte("#!/bin/sh\necho ran\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(path).CombinedOutput(); err != nil || string(out) != "ran\n" {
			t.Errorf("%q, %v", out, err)
		}
	}
	close(stop)
	others.Wait()
}
