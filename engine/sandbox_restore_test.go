package engine

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestPodsAfterACrash(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	pod := n.pod(n.ownPod("p"))
	running, ended := n.member(pod, memberConfig("a", "sleep")), n.member(pod, memberConfig("b", "sleep"))
	before, _ := n.e.Sandbox(bg, pod)

	// A run that was cut short, with and without a record.
	n.cutShort(hostPod("cut0"), true)
	n.cutShort(hostPod("cut1"), false)
	n.e.cancel(errClosed)
	n.e.work.Wait()
	s := n.shims.live[n.e.sandboxDir(pod)]
	s.mu.Lock()
	s.procs[procKey(ended, "")].end(5)
	s.mu.Unlock()
	n.boot()

	if all := n.e.Sandboxes(bg); len(all) != 1 {
		t.Errorf("sandboxes: %v", all)
	}
	after, err := n.e.Sandbox(bg, pod)
	if err != nil || after.State != SandboxReady || !slices.Equal(after.IPs, before.IPs) || after.NetNS != before.NetNS {
		t.Errorf("sandbox after a crash: %+v, %v", after, err)
	}
	if s := n.state_(running); s.Status != StatusRunning {
		t.Errorf("running: %+v", s)
	}
	if s := n.state_(ended); s.Status != StatusExited || s.ExitCode != 5 {
		t.Errorf("ended: %+v", s)
	}
	if _, err := n.e.RunSandbox(bg, n.ownPod("p")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the name is free: %v", err)
	}
	n.member(pod, memberConfig("c", "sleep"))
	if n.shims.count() != 1 {
		t.Errorf("%d shims", n.shims.count())
	}
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.awaitUndone()
	n.empty()
}

// awaitUndone waits, without a limit, for the end of what was cut short.
func (n *node) awaitUndone() {
	for _, gone := range n.e.pods.undone() {
		<-gone
	}
}

// cutShort leaves what a daemon leaves that dies in the middle of a run of a sandbox, before or after it wrote the record.
func (n *node) cutShort(c SandboxConfig, record bool) {
	n.t.Helper()
	id := newID()
	dir := n.e.sandboxDir(id)
	r := sandboxRecord{Version: sandboxVersion, ID: id, Config: c}
	err := errors.Join(mkdir(dir, 0o711), writeSandboxRun(dir, sandboxRun{Version: runVersion, Record: r}))
	if record {
		err = errors.Join(err, n.sandboxes.Put(bg, id, &r))
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// TestUndoThatHangs: a network that does not give back what a run that was cut short had does not keep the daemon from its
// start. Nobody sees that run; who asks for its name waits for the end of it.
func TestUndoThatHangs(t *testing.T) {
	t.Parallel()
	n, net := newNetNode(t)
	other := n.pod(hostPod("other"))
	c := n.ownPod("cut")
	n.cutShort(c, true)
	n.cutShort(c, false)
	n.e.cancel(errClosed)
	n.e.work.Wait()
	net.hangs = make(chan struct{})
	n.boot()
	if all := n.e.Sandboxes(bg); len(all) != 1 || all[0].ID != other || all[0].State != SandboxReady {
		t.Errorf("sandboxes: %v", all)
	}
	n.member(other, memberConfig("a", "sleep"))
	ctx, cancel := context.WithTimeout(bg, 50*time.Millisecond)
	defer cancel()
	if _, err := n.e.RunSandbox(ctx, c); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the name of what is being undone: %v", err)
	}
	close(net.hangs)
	for _, p := range []string{n.pod(c), other} {
		if err := n.e.RemoveSandbox(bg, p); err != nil {
			t.Fatal(err)
		}
	}
	n.awaitUndone()
	n.empty()
}

// TestStopCutShort: the daemon died in a stop, or in a run before anything was written down. The namespace is
// there when the network is torn down, for the plugins that look in there, and not afterwards.
func TestStopCutShort(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	stopped, cut := n.pod(n.ownPod("stopped")), n.pod(n.ownPod("cut"))
	net := &podNet{torn: map[string]string{}}
	n.pods = net
	for id, change := range map[string]func(*sandboxRun){
		stopped: func(r *sandboxRun) { r.Ready, r.Stopping = false, true },
		cut:     func(r *sandboxRun) { r.Ready, r.NetNS = false, "" },
	} {
		r, err := readSandboxRun(n.e.sandboxDir(id))
		if err != nil {
			t.Fatal(err)
		}
		change(&r)
		if err := writeSandboxRun(n.e.sandboxDir(id), r); err != nil {
			t.Fatal(err)
		}
	}
	n.crash()
	if err := n.e.RemoveSandbox(bg, stopped); err != nil {
		t.Error(err)
	}
	for _, id := range []string{stopped, cut} {
		if net.torn[id] != filepath.Join(n.nets.realNetns, id) {
			t.Errorf("torn down with the namespace %q", net.torn[id])
		}
	}
	if len(n.nets.ns) != 0 {
		t.Errorf("namespaces left: %v", n.nets.ns)
	}
	if all := n.e.Sandboxes(bg); len(all) != 0 {
		t.Errorf("sandboxes: %v", all)
	}
}

func TestPodsAfterAReboot(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	c := n.ownPod("p")
	c.PID = NamespacePod
	n.e.opt.InitBinary = "/bin/true"
	pod := n.pod(c)
	id := n.member(pod, memberConfig("a", "sleep"))
	config := n.ownPod("shared")
	n.e.opt.InitBinary = "/bin/true"
	config.PID = NamespacePod // has an init, which the shim is asked for
	shared := n.pod(config)
	n.e.cancel(errClosed)
	n.e.work.Wait()
	// What a reboot takes: mounts, processes, the volatile folder.
	if err := errors.Join(RemoveSandboxDir(n.e.sandboxDir(pod)), RemoveSandboxDir(n.e.sandboxDir(shared)), RemoveBundle(n.e.bundle(id))); err != nil {
		t.Fatal(err)
	}
	for _, s := range n.shims.live {
		s.die()
	}
	n.boot()
	if s := n.podState(pod); s != SandboxNotReady {
		t.Errorf("the sandbox is %s", s)
	}
	if s := n.state_(id); s.Status != StatusExited || !s.Lost {
		t.Errorf("the container: %+v", s)
	}
	if eps, _ := n.nets.Endpoints(bg, "bridge"); len(eps) != 0 {
		t.Errorf("addresses still taken: %v", eps)
	}
	for _, p := range []string{pod, shared} {
		if err := errors.Join(n.e.StopSandbox(bg, p), n.e.RemoveSandbox(bg, p)); err != nil {
			t.Fatal(err)
		}
	}
	n.empty()
}

// TestDamagedSandbox: one record that cannot be read keeps no other, and nothing is deleted.
func TestDamagedSandbox(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	pod := n.pod(hostPod("p"))
	n.sandboxes.damage("zz", `{"version":`)
	n.crash()
	if s := n.podState(pod); s != SandboxReady {
		t.Errorf("the other sandbox is %s", s)
	}
}

func TestDeadPodShim(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	pod := n.pod(hostPod("p"))
	id := n.member(pod, memberConfig("a", "sleep"))
	n.shims.mu.Lock()
	s := n.shims.live[n.e.sandboxDir(pod)]
	n.shims.mu.Unlock()
	s.die()
	n.eventually("the container has ended", func() bool { return n.state_(id).Status == StatusExited })
	if s := n.podState(pod); s != SandboxReady {
		t.Errorf("the sandbox is %s", s)
	}
	n.member(pod, memberConfig("b", "sleep"))
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.empty()
}
