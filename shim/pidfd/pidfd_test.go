package pidfd

import (
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestWaitAndKill(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := Open(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- p.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("ended: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := p.Kill(1000); !errdefs.IsInvalidArgument(err) {
		t.Errorf("signal 1000: %v", err)
	}
	if err := p.Kill(unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	cmd.Wait()
	if err := p.Kill(unix.SIGKILL); !errdefs.IsNotFound(err) {
		t.Errorf("kill after the end: %v", err)
	}
	if err := p.Wait(); err != nil {
		t.Errorf("wait after the end: %v", err)
	}
	p.Close()
	if err := p.Wait(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("wait after close: %v", err)
	}
	if err := p.Kill(unix.SIGKILL); !errdefs.IsNotFound(err) {
		t.Errorf("kill after close: %v", err)
	}
}
