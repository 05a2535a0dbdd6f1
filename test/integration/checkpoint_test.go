package integration

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
)

// needsCRIU skips a test on a machine that has no CRIU, or one that does not know the kernel. In the virtual machine it works:
// RUN=Checkpoint test/vm/suite.sh ./test/integration
func needsCRIU(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("criu"); err != nil {
		t.Skipf("needs CRIU: %s", t.Name())
	}
	if out, err := exec.Command("criu", "check").CombinedOutput(); err != nil {
		t.Skipf("needs a CRIU that knows this kernel: %s: %.200s", t.Name(), out)
	}
}

// numbers are what a counting container has written, as far as its lines are whole.
func numbers(s string) (out []int) {
	for line := range strings.Lines(s) {
		if n, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && strings.HasSuffix(line, "\n") {
			out = append(out, n)
		}
	}
	return out
}

// counted waits until a container has written so many numbers, and gives the first and the last one.
func counted(t *testing.T, b *syncBuffer, n int) (first, last int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d numbers", n), func() bool { return len(numbers(b.String())) >= n })
	got := numbers(b.String())
	for i, v := range got {
		if v != got[0]+i {
			t.Fatalf("it counts %v", got)
		}
	}
	return got[0], got[len(got)-1]
}

// TestContainerdCheckpoint: what ctr(8) does for "container checkpoint" and "restore", and "task checkpoint": a task is written to an
// image and goes on; another container, made from the image, counts on from there, with the files that the first one had
// written. Also with the end of the first one, and through folders.
func TestContainerdCheckpoint(t *testing.T) {
	needs(t, "docker")
	needsCRIU(t)
	_, c := ownContainerd(t)
	ts := c.watch()
	// Without a limit for all of it: CRIU takes its time in an emulated machine.
	cx := namespaces.WithNamespace(t.Context(), "k8s.io")
	// CRIU 3.17 does not keep no_new_privs, and hako refuses to lose it.
	count := append(args("sh", "-c", "echo kept >/new; i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done"), oci.WithNewPrivileges)
	delete := func(ctr client.Container, task client.Task) {
		t.Helper()
		if _, err := task.Delete(cx, client.WithProcessKill); err != nil {
			t.Fatal(err)
		}
		if err := ctr.Delete(cx, client.WithSnapshotCleanup); err != nil {
			t.Fatal(err)
		}
	}
	start := func(ctr client.Container, o ...client.NewTaskOpts) (client.Task, *syncBuffer) {
		t.Helper()
		out := &syncBuffer{}
		task, err := ctr.NewTask(cx, cio.NewCreator(cio.WithStreams(nil, out, out)), o...)
		if err != nil {
			t.Fatal(err)
		}
		if err := task.Start(cx); err != nil {
			t.Fatal(err)
		}
		return task, out
	}
	status := func(task client.Task, want client.ProcessStatus) {
		t.Helper()
		var st client.Status
		var err error
		// A shim that takes longer than the daemon waits for it is of no known state, as in containerd.
		eventually(t, "an answer of the shim", func() bool {
			st, err = task.Status(cx)
			return err != nil || st.Status != client.Unknown
		})
		if err != nil || st.Status != want {
			t.Errorf("it is %v, %v, not %s", st.Status, err, want)
		}
	}

	ctr := c.container("counting", count)
	task, out := start(ctr)
	counted(t, out, 3)
	image, err := ctr.Checkpoint(cx, "checkpoint:live", client.WithCheckpointImage, client.WithCheckpointRW, client.WithCheckpointRuntime, client.WithCheckpointTask)
	if err != nil {
		t.Fatal(err)
	}
	status(task, client.Running)
	_, last := counted(t, out, len(numbers(out.String()))+3) // it goes on
	again, err := ctr.Checkpoint(cx, "checkpoint:ended", client.WithCheckpointTaskExit, client.WithCheckpointImage, client.WithCheckpointRW, client.WithCheckpointRuntime, client.WithCheckpointTask)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of what was checkpointed with its end", func() bool { st, err := task.Status(cx); return err == nil && st.Status == client.Stopped })
	delete(ctr, task)
	ts.expect(t, "counting", "create", "start", "checkpointed", "exit", "checkpointed", "delete") // its end is part of the second one

	for _, from := range []struct {
		image client.Image
		after int // the number that it had written
	}{{image, 3}, {again, last}} {
		id := strings.ReplaceAll(from.image.Name(), ":", "-")
		ctr, err := c.Restore(cx, id, from.image, client.WithRestoreImage, client.WithRestoreSpec, client.WithRestoreRuntime, client.WithRestoreRW)
		if err != nil {
			t.Fatal(err)
		}
		task, out := start(ctr, client.WithTaskCheckpoint(from.image))
		if first, _ := counted(t, out, 3); first <= from.after {
			t.Errorf("%s begins to count with %d, and had come to %d", id, first, from.after)
		}
		status(task, client.Running)
		if text := printed(cx, t, task, "cat", "/new"); text != "kept\n" {
			t.Errorf("the file that it had written holds %q", text)
		}
		if err := task.Pause(cx); err != nil {
			t.Error(err)
		}
		status(task, client.Paused)
		if err := task.Resume(cx); err != nil {
			t.Error(err)
		}
		delete(ctr, task)
	}

	// Into a folder of the host, and back from there in the same container.
	ctr = c.container("folder", count)
	task, out = start(ctr)
	counted(t, out, 3)
	dir := filepath.Join(t.TempDir(), "images")
	exit := func(i *client.CheckpointTaskInfo) error {
		i.Options.(*options.CheckpointOptions).Exit = true
		return nil
	}
	if _, err := task.Checkpoint(cx, client.WithCheckpointImagePath(dir), exit); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of what was written to a folder", func() bool { st, err := task.Status(cx); return err == nil && st.Status == client.Stopped })
	if _, err := task.Delete(cx); err != nil { // which waits for the output
		t.Fatal(err)
	}
	_, last = counted(t, out, 3)
	task, out = start(ctr, client.WithRestoreImagePath(dir))
	if first, _ := counted(t, out, 3); first != last+1 {
		t.Errorf("it goes on with %d after %d", first, last)
	}
	// What is no checkpoint is none, and leaves nothing.
	delete(ctr, task)
	ctr = c.container("none", count)
	if _, err := ctr.NewTask(cx, cio.NullIO, client.WithRestoreImagePath(t.TempDir())); err == nil {
		t.Error("a task from an empty folder")
	}
	if _, err := ctr.Task(cx, nil); !errdefs.IsNotFound(err) {
		t.Errorf("after a restore that failed: %v", err)
	}
	for _, name := range []string{image.Name(), again.Name()} {
		if err := c.ImageService().Delete(cx, name); err != nil {
			t.Error(err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(c.n.dir, "run", "*checkpoint*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}
