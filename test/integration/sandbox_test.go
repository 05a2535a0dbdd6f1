package integration

import (
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestSandboxShutdown: a sandbox that is shut down ends what is in it, whoever's shim it is. The tasks' clients hear of it, and
// delete them, also through a daemon that began after that; nothing is left then.
func TestSandboxShutdown(t *testing.T) {
	t.Parallel()
	n, c := ownContainerd(t)
	cx := c.shared()
	for name, program := range map[string]string{"own": "io.containerd.hako.v2", "grpc": filepath.Join(workDir, "grpcshim")} {
		box, err := c.NewSandbox(cx, "box-"+name, client.WithSandboxRuntime(program, nil), client.WithSandboxSpec(&specs.Spec{}))
		if err != nil {
			t.Fatal(name, err)
		}
		if err := box.Start(cx); err != nil {
			t.Fatal(name, err)
		}
		boxEnded, err := box.Wait(cx)
		if err != nil {
			t.Fatal(name, err)
		}
		ts := c.watch()
		in := []client.NewContainerOpts{client.WithRuntime(program, nil), client.WithSandbox(box.ID())}
		_, runs := c.sleeping("runs-"+name, in...)
		waits := c.task(c.container("waits-"+name, args("sleep", "100000"), in...), cio.NullIO)
		ts.expect(t, "runs-"+name, "create", "start")
		var ends []<-chan client.ExitStatus
		for _, task := range []client.Task{runs, waits} {
			ch, err := task.Wait(cx)
			if err != nil {
				t.Fatal(name, err)
			}
			ends = append(ends, ch)
		}
		if err := box.Shutdown(cx); err != nil {
			t.Fatal(name, err)
		}
		for i, ch := range append(ends, boxEnded) {
			select {
			case s := <-ch:
				if i < len(ends) && s.ExitCode() != 137 || s.Error() != nil {
					t.Errorf("%s: end %d: %v", name, i, s)
				}
			case <-time.After(hangLimit):
				t.Fatalf("%s: nobody tells of end %d", name, i)
			}
		}
		ts.expect(t, "runs-"+name, "create", "start", "exit")
		if _, err := c.LoadSandbox(cx, box.ID()); !errdefs.IsNotFound(err) {
			t.Errorf("%s: the record: %v", name, err)
		}
		if _, err := c.SandboxController("shim").Status(cx, box.ID(), false); !errdefs.IsNotFound(err) {
			t.Errorf("%s: the status: %v", name, err)
		}
		if err := box.Shutdown(cx); err != nil {
			t.Errorf("%s: again: %v", name, err)
		}
		if err := n.signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := n.start(); err != nil {
			t.Fatal(err)
		}
		c.back()
		for _, task := range []client.Task{runs, waits} {
			eventually(t, "the end to be known", func() bool { s, err := task.Status(cx); return err == nil && s.Status == client.Stopped })
			if s, err := task.Status(cx); err != nil || s.Status != client.Stopped || s.ExitStatus != 137 {
				t.Errorf("%s: %s after a restart: %+v, %v", name, task.ID(), s, err)
			}
			if s, err := task.Delete(cx); err != nil || s.ExitCode() != 137 {
				t.Errorf("%s: delete %s: %v, %v", name, task.ID(), s, err)
			}
		}
		for _, folder := range []string{"io.containerd.runtime.v2.task/*", "io.containerd.sandbox.controller.v1.shim/*", "shims"} {
			if left, err := filepath.Glob(filepath.Join(n.dir, "run", folder, "*")); err != nil || len(left) != 0 {
				t.Errorf("%s: bundles left: %v, %v", name, left, err)
			}
		}
	}
}

// TestPodShutdown: a pod is shut down through containerd's API with a container running in it; the CRI sees neither any more.
func TestPodShutdown(t *testing.T) {
	t.Parallel()
	n, c := ownContainerd(t)
	k := newKubelet(t, n)
	cx := c.shared()
	config := k.config("down", cri.NamespaceMode_POD)
	pod := k.runPod(config)
	id := k.run(pod, config, "in", "sleep", "100000")
	ctr, err := c.LoadContainer(cx, id)
	if err != nil {
		t.Fatal(err)
	}
	task, err := ctr.Task(cx, nil)
	if err != nil {
		t.Fatal(err)
	}
	ended, err := task.Wait(cx)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SandboxController("podsandbox").Shutdown(cx, pod); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(hangLimit):
		t.Error("nobody tells of the end of a container in a pod that was shut down")
	}
	pods, err := k.ListPodSandbox(ctx(t), &cri.ListPodSandboxRequest{})
	if err != nil || len(pods.Items) != 0 {
		t.Errorf("pods: %v, %v", pods, err)
	}
	list, err := k.ListContainers(ctx(t), &cri.ListContainersRequest{})
	if err != nil || len(list.Containers) != 0 {
		t.Errorf("containers: %v, %v", list, err)
	}
	for _, of := range []string{pod, id} {
		if _, err := c.LoadContainer(cx, of); !errdefs.IsNotFound(err) {
			t.Errorf("container %s: %v", of, err)
		}
	}
	if err := c.SandboxController("podsandbox").Shutdown(cx, pod); err != nil {
		t.Errorf("again: %v", err)
	}
}
