package chaos

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hako-engine/hako/snapshot"
)

// node is a daemon that is killed and started again.
type node struct {
	t           *testing.T
	dir, binary string
	snapshotter string
	flags       []string
	log         *os.File
	cmd         *exec.Cmd
}

func newNode(t *testing.T, snapshotter string) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("%s needs root", t.Name())
	}
	dir, err := os.MkdirTemp("", "hkc") // short: sockets' paths are bounded
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	n := &node{t: t, dir: dir, snapshotter: snapshotter, binary: filepath.Join(dir, "hakod")}
	for _, name := range []string{"hakod", "hako-shim"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, name), "../../cmd/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, b)
		}
	}
	if n.log, err = os.Create(filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.kill()
		if t.Failed() {
			b, _ := os.ReadFile(n.log.Name())
			t.Logf("hakod's log ends:\n%s", b[max(0, len(b)-4000):])
			if keep := os.Getenv("HAKO_CHAOS_KEEP"); keep != "" {
				_ = exec.Command("cp", "-a", dir, keep).Run()
			}
		}
		n.log.Close()
		if out, err := exec.Command(n.binary, n.args("cleanup")...).CombinedOutput(); err != nil {
			t.Errorf("cleanup: %v\n%s", err, out)
		}
	})
	return n
}

func (n *node) args(args ...string) []string {
	return append(append(args, n.flags...),
		"--config", os.DevNull, "--root", filepath.Join(n.dir, "lib"), "--state", filepath.Join(n.dir, "run"),
		"--snapshotter", n.snapshotter, "--registry-dir", n.dir, "--bridge-name", fmt.Sprintf("hkc%d", os.Getpid()%100000),
		"--bridge-subnet", fmt.Sprintf("10.199.%d.0/24", os.Getpid()%250), "--network", "builtin",
	)
}

func (n *node) start() {
	n.t.Helper()
	n.cmd = exec.Command(n.binary, n.args()...)
	n.cmd.Stdout, n.cmd.Stderr = n.log, n.log
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) kill() {
	if n.cmd == nil {
		return
	}
	_ = n.cmd.Process.Kill()
	_ = n.cmd.Wait()
	n.cmd = nil
}

func env(t *testing.T, name string, absent time.Duration) time.Duration {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return absent
	}
	d, err := time.ParseDuration(v)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return d
}

// TestClientsAndKills has 16 clients work on a daemon that is killed again and again:
// nothing that was acknowledged is lost, and a check of everything finds nothing.
// HAKO_CHAOS_TIME and HAKO_CHAOS_KILL (durations) make it longer than 10 s for each snapshotter.
func TestClientsAndKills(t *testing.T) {
	for _, name := range []string{"overlayfs", "erofs"} {
		t.Run(name, func(t *testing.T) { clientsAndKills(t, name) })
	}
	// Each image that has layers to merge has them merged.
	t.Run("merged", func(t *testing.T) { clientsAndKills(t, "erofs", "--erofs-merge-layers", "2") })
}

func clientsAndKills(t *testing.T, snapshotter string, flags ...string) {
	if snapshotter == "erofs" && os.Geteuid() == 0 {
		if err := snapshot.ErofsSupported(t.TempDir()); err != nil {
			t.Skipf("%s needs EROFS below overlayfs: %v", t.Name(), err)
		}
	}
	n := newNode(t, snapshotter)
	n.flags = flags
	images := NewRegistry(64 << 10)
	server := httptest.NewServer(images)
	t.Cleanup(server.Close)
	host := strings.TrimPrefix(server.URL, "http://")
	model := &Model{}
	journal := NewJournal(io.Discard)
	journal.Note = model.Add
	load := &Load{Socket: filepath.Join(n.dir, "run", "docker.sock"), Registry: host, Images: images, Clients: 16, Journal: journal}
	const enough = 100 // operations acknowledged: fewer prove little
	end := time.Now().Add(env(t, "HAKO_CHAOS_TIME", 10*time.Second))
	every := env(t, "HAKO_CHAOS_KILL", 3*time.Second)
	for round := 0; (time.Now().Before(end) || load.Done.Load() < enough) && !t.Failed(); round++ {
		n.start()
		limit, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		if err := load.Ready(limit); err != nil {
			t.Fatalf("round %d: the daemon does not answer: %v", round, err)
		}
		state, err := load.State(limit)
		cancel()
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		for _, w := range model.Judge(state, false) {
			t.Errorf("round %d: %s", round, w)
		}
		ctx, stop := context.WithTimeout(t.Context(), every)
		done := make(chan struct{})
		go func() { load.Run(ctx); close(done) }()
		// A check beside all this finds nothing that is merely under way.
		for ctx.Err() == nil {
			found, err := load.Check(ctx, false)
			if err != nil && ctx.Err() == nil && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("round %d: %v", round, err)
			}
			for _, f := range found {
				t.Errorf("round %d: while clients work: %+v", round, f)
			}
			select {
			case <-ctx.Done():
			case <-time.After(every / 5):
			}
		}
		n.kill() // with requests under way
		<-done
		stop()
	}
	n.start()
	limit, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	if err := load.Ready(limit); err != nil {
		t.Fatal(err)
	}
	state, err := load.State(limit)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d operations acknowledged of %d, now there are %s", load.Done.Load(), load.Tried.Load(), model.Summary())
	for _, w := range model.Judge(state, false) {
		t.Error(w)
	}
	found, err := load.Check(limit, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		t.Errorf("after all: %+v", f)
	}
	torn, files, err := CheckLayers(filepath.Join(n.dir, "lib"))
	if err != nil || files == 0 && snapshotter == "overlayfs" { // what is in images, the check reads
		t.Errorf("%d files of layers, %v", files, err)
	}
	for _, f := range torn {
		t.Errorf("torn: %s", f)
	}
}
