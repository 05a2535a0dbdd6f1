package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// hostPod is a sandbox that takes no privileges: all its namespaces are the host's.
func hostPod(name string) SandboxConfig {
	return SandboxConfig{
		Name: name, Namespace: "ns", UID: "uid-" + name,
		Network: NamespaceNode, PID: NamespaceContainer, IPC: NamespaceNode, CgroupParent: "/test",
	}
}

// ownPod is a sandbox with namespaces of its own.
func (n *node) ownPod(name string) SandboxConfig {
	n.t.Helper()
	if os.Geteuid() != 0 {
		n.t.Skipf("needs root: %s", n.t.Name())
	}
	if n.nets.realNetns == "" {
		n.nets.realNetns = n.t.TempDir()
		n.t.Cleanup(func() { // whatever a test that failed left
			for _, id := range folders(filepath.Join(n.state, "sandboxes")) {
				_ = RemoveSandboxDir(n.e.sandboxDir(id))
			}
			for path := range n.nets.ns {
				_ = unix.Unmount(path, unix.MNT_DETACH)
			}
		})
	}
	c := hostPod(name)
	c.Network, c.IPC = NamespacePod, NamespacePod
	return c
}

func memberConfig(name string, cmd ...string) Config {
	return Config{Image: "test", Cmd: cmd, Pod: &PodMember{Name: name, PID: NamespaceContainer}}
}

func (n *node) pod(c SandboxConfig) string {
	n.t.Helper()
	id, err := n.e.RunSandbox(bg, c)
	if err != nil {
		n.t.Fatal(err)
	}
	return id
}

func (n *node) member(pod string, c Config) string {
	n.t.Helper()
	id, err := n.e.CreatePodContainer(bg, pod, c)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.e.StartPodContainer(bg, id); err != nil {
		n.t.Fatal(err)
	}
	return id
}

func (n *node) podState(id string) SandboxState {
	n.t.Helper()
	s, err := n.e.Sandbox(bg, id)
	if err != nil {
		n.t.Fatal(err)
	}
	return s.State
}

// empty checks that nothing of pods is left.
func (n *node) empty() {
	n.t.Helper()
	if all := n.e.Sandboxes(bg); len(all) != 0 {
		n.t.Errorf("sandboxes left: %v", all)
	}
	if all := n.e.PodContainers(bg); len(all) != 0 {
		n.t.Errorf("containers left: %d", len(all))
	}
	for _, dir := range []string{"sandboxes", "containers"} {
		if left := folders(filepath.Join(n.state, dir)); len(left) != 0 {
			n.t.Errorf("folders left in %s: %v", dir, left)
		}
	}
	if left := n.sandboxes.count(); left != 0 {
		n.t.Errorf("records left: %d", left)
	}
	if c := n.shims.count(); c != 0 {
		n.t.Errorf("%d shims left", c)
	}
	if paths, _ := n.nets.Netns(bg); len(paths) != 0 {
		n.t.Errorf("network namespaces left: %v", paths)
	}
	for name := range n.e.pods.names {
		n.t.Errorf("name left: %s", name)
	}
}

func TestPodLife(t *testing.T) {
	t.Parallel()
	for kind, config := range map[string]SandboxConfig{"host": hostPod("p"), "own": {}} {
		t.Run(kind, func(t *testing.T) {
			n := newNode(t)
			if kind == "own" {
				config = n.ownPod("p")
			}
			ctx, cancel := context.WithCancel(bg)
			defer cancel()
			events, err := n.e.Events(ctx, time.Time{}, time.Time{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			pod := n.pod(config)
			if s := n.podState(pod[:10]); s != SandboxReady {
				t.Errorf("new sandbox is %s", s)
			}
			if _, err := n.e.RunSandbox(bg, config); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("the same sandbox again: %v", err)
			}
			a := n.member(pod, memberConfig("a", "sleep"))
			b := n.member(pod, memberConfig("b", "exit", "7"))
			if n.shims.count() != 1 {
				t.Errorf("%d shims for one pod", n.shims.count())
			}
			if _, err := n.e.CreatePodContainer(bg, pod, memberConfig("a", "sleep")); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("the same container again: %v", err)
			}
			n.eventually("b has ended", func() bool { return n.state_(b).Status == StatusExited })
			if s := n.state_(b); s.ExitCode != 7 || s.Lost {
				t.Errorf("state of b: %+v", s)
			}
			for _, id := range []string{a, b} {
				if err := n.e.StartPodContainer(bg, id); !errdefs.IsFailedPrecondition(err) {
					t.Errorf("second start: %v", err)
				}
			}
			// They are Docker's containers, too, but Kubernetes' to restart and to remove.
			for what, err := range map[string]error{"start": n.e.StartContainer(bg, b), "restart": n.e.RestartContainer(bg, a, StopOptions{})} {
				if !errdefs.IsConflict(err) {
					t.Errorf("%s: %v", what, err)
				}
			}
			if p, err := n.e.PruneContainers(bg, nil); err != nil || len(p.IDs) != 0 {
				t.Errorf("pruned %v, %v", p, err)
			}
			if err := n.e.StopSandbox(bg, pod); err != nil {
				t.Fatal(err)
			}
			if s := n.state_(a); s.Status != StatusExited || s.ExitCode != 137 {
				t.Errorf("state of a: %+v", s)
			}
			if err := n.e.StopSandbox(bg, pod); err != nil {
				t.Errorf("second stop: %v", err)
			}
			if s := n.podState(pod); s != SandboxNotReady {
				t.Errorf("stopped sandbox is %s", s)
			}
			if _, err := n.e.CreatePodContainer(bg, pod, memberConfig("c")); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("a container in a stopped sandbox: %v", err)
			}
			if err := n.e.RemoveSandbox(bg, pod); err != nil {
				t.Fatal(err)
			}
			n.empty()
			if _, err := n.e.Sandbox(bg, pod); !errdefs.IsNotFound(err) {
				t.Errorf("removed sandbox: %v", err)
			}
			var told []string
			for ev := range events {
				if ev.Type == EventSandbox || ev.ID == a && slices.Contains([]string{"create", "start", "die", "destroy"}, ev.Action) {
					told = append(told, ev.Type+" "+ev.Action)
					// Who reads it when the pod is gone knows by it whose it was.
					if ev.Attributes[AttrPodName] == "" || ev.Attributes[AttrPodUID] == "" {
						t.Errorf("%s %s does not name the pod: %v", ev.Type, ev.Action, ev.Attributes)
					}
				}
				if ev.Type == EventSandbox && ev.Action == "destroy" {
					break
				}
			}
			want := []string{"sandbox create", "sandbox start", "container create", "container start", "container die", "sandbox stop", "container destroy", "sandbox destroy"}
			if !slices.Equal(told, want) {
				t.Errorf("events %v, want %v", told, want)
			}
		})
	}
}

func TestRemoveRunningPod(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	pod := n.pod(n.ownPod("p"))
	n.member(pod, memberConfig("a", "stubborn"))
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

// TestRemovalsSideBySide: whoever removes what somebody else is removing is no error.
func TestRemovalsSideBySide(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	for range 20 {
		pod := n.pod(hostPod("p"))
		id := n.member(pod, memberConfig("a", "sleep"))
		s, err := n.e.pods.get(pod)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for _, f := range []func() error{
			func() error { return n.e.RemovePodContainer(bg, id) }, func() error { return n.e.RemovePodContainer(bg, id) },
			func() error { return n.e.StopSandbox(bg, pod) }, func() error { return n.e.RemoveSandbox(bg, pod) },
			func() error { return n.e.RemoveSandbox(bg, pod) },
			// A client cancelled in the moment in which it was ready: others see it before it is taken back.
			func() error { return n.e.dropSandbox(bg, s) },
		} {
			wg.Go(func() {
				if err := f(); err != nil && !errdefs.IsNotFound(err) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		n.empty()
	}
}

// TestSharedPIDs: only a pod that shares a PID namespace has a process of its own.
func TestSharedPIDs(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	c := n.ownPod("p")
	c.PID = NamespacePod
	if _, err := n.e.RunSandbox(bg, c); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without an init binary: %v", err)
	}
	n.empty()
	n.e.opt.InitBinary = "/bin/true"
	pod := n.pod(c)
	if s, _ := n.e.Sandbox(bg, pod); s.Pid == 0 {
		t.Error("no init")
	}
	m := memberConfig("a", "sleep")
	m.Pod.PID = NamespacePod
	n.member(pod, m)
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

func TestFailedRunLeavesNothing(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	c := n.ownPod("p")
	c.PID = NamespacePod
	n.e.opt.InitBinary = "/bin/true"
	broken := errors.New("broken")
	for _, step := range []string{"netns", "connect", "sandboxes.put", "shim.start", "task.create", "task.start"} {
		n.breakStep(step, broken)
		if _, err := n.e.RunSandbox(bg, c); !errors.Is(err, broken) {
			t.Errorf("%s broken: %v", step, err)
		}
		n.breakStep("", nil)
		n.empty()
	}
	c.Userns = &Userns{UIDs: []IDMap{{0, 1000, 1}}, GIDs: []IDMap{{0, 2000, 1}}}
	if _, err := n.e.RunSandbox(bg, c); !errdefs.IsInvalidArgument(err) {
		t.Errorf("different maps: %v", err)
	}
}

func TestFailedStartEndsContainer(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	pod := n.pod(hostPod("p"))
	id, err := n.e.CreatePodContainer(bg, pod, memberConfig("a", "sleep"))
	if err != nil {
		t.Fatal(err)
	}
	n.breakStep("task.start", errors.New("no such file or directory"))
	if err := n.e.StartPodContainer(bg, id); err == nil {
		t.Error("the start succeeded")
	}
	n.breakStep("", nil)
	s := n.state_(id)
	if s.Status != StatusExited || s.ExitCode != 128 || s.FinishedAt.IsZero() || !s.StartedAt.IsZero() || s.Error == "" {
		t.Errorf("state %+v", s)
	}
	// The pod lives on, in the same shim.
	n.member(pod, memberConfig("b", "sleep"))
	if n.shims.count() != 1 {
		t.Errorf("%d shims", n.shims.count())
	}
}

// podNet is a network of pods that notes the namespace that each teardown was given.
type podNet struct {
	PodNetwork
	setup func(context.Context) error // nil: nothing happens
	mu    sync.Mutex
	torn  map[string]string
	fails int           // of the next teardowns
	hangs chan struct{} // teardowns wait for its end; nil: they do not
}

func (p *podNet) Ready() error { return nil }

func (p *podNet) Setup(ctx context.Context, _ PodEndpoint) (PodAddresses, error) {
	if p.setup != nil {
		if err := p.setup(ctx); err != nil {
			return PodAddresses{}, err
		}
	}
	return PodAddresses{IPs: []netip.Addr{netip.MustParseAddr("10.1.2.3")}}, nil
}

func (p *podNet) Teardown(_ context.Context, e PodEndpoint) error {
	if p.hangs != nil {
		<-p.hangs
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.torn[e.ID] = e.NetNS
	if p.fails > 0 {
		p.fails--
		return errors.New("the plugin failed")
	}
	return nil
}

// newNetNode is a node whose pods have a network that takes its time, and so their shim with it.
func newNetNode(t *testing.T) (*node, *podNet) {
	n := newNode(t)
	net := &podNet{torn: map[string]string{}}
	n.pods = net
	n.crash()
	return n, net
}

// TestShimAhead: the shim of a pod is there as soon as its network is, and is the one of its containers.
func TestShimAhead(t *testing.T) {
	t.Parallel()
	n, _ := newNetNode(t)
	pod := n.pod(n.ownPod("p"))
	if c := n.shims.count(); c != 1 {
		t.Fatalf("%d shims", c)
	}
	n.member(pod, memberConfig("a", "sleep"))
	n.member(pod, memberConfig("b", "sleep"))
	if c := n.shims.count(); c != 1 {
		t.Errorf("%d shims", c)
	}
	if err := n.e.StopSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	if c := n.shims.count(); c != 0 {
		t.Errorf("%d shims of a stopped pod", c)
	}
	idle := n.pod(n.ownPod("idle"))
	n.crash() // the next daemon finds it
	if err := errors.Join(n.e.RemoveSandbox(bg, idle), n.e.RemoveSandbox(bg, pod)); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

// TestShimAheadUndone: nothing is left of a run whose network fails, or whose client goes away, when the shim is there.
func TestShimAheadUndone(t *testing.T) {
	t.Parallel()
	n, net := newNetNode(t)
	ctx, cancel := context.WithCancel(bg)
	defer cancel()
	var then func(context.Context) error
	net.setup = func(ctx context.Context) error {
		for n.shims.count() == 0 && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		return then(ctx)
	}
	then = func(context.Context) error { return errors.New("no network") }
	if _, err := n.e.RunSandbox(bg, n.ownPod("fails")); err == nil {
		t.Error("a sandbox without its network")
	}
	n.empty()
	then = func(ctx context.Context) error { cancel(); <-ctx.Done(); return ctx.Err() }
	if _, err := n.e.RunSandbox(ctx, n.ownPod("cancelled")); err == nil {
		t.Error("a sandbox for nobody")
	}
	n.eventually("the run is undone", func() bool {
		n.e.pods.mu.RLock()
		defer n.e.pods.mu.RUnlock()
		return len(n.e.pods.names) == 0 // the last step
	})
	n.empty()
}

// TestStopAgain: a stop whose network fails has let all else go, and can be made again, also by the next daemon.
func TestStopAgain(t *testing.T) {
	t.Parallel()
	for _, crash := range []bool{false, true} {
		n, net := newNetNode(t)
		pod := n.pod(n.ownPod("p"))
		n.member(pod, memberConfig("a", "sleep"))
		net.fails = 1
		if err := n.e.StopSandbox(bg, pod); err == nil {
			t.Fatal("the network failed, the stop did not")
		}
		if s := n.podState(pod); s != SandboxNotReady {
			t.Errorf("the sandbox is %s", s)
		}
		if c := n.shims.count(); c != 0 {
			t.Errorf("%d shims", c)
		}
		if crash {
			n.crash()
		}
		if err := n.e.StopSandbox(bg, pod); err != nil {
			t.Fatal(err)
		}
		if net.torn[pod] != filepath.Join(n.nets.realNetns, pod) {
			t.Errorf("torn down with the namespace %q", net.torn[pod])
		}
		if err := n.e.RemoveSandbox(bg, pod); err != nil {
			t.Fatal(err)
		}
		n.empty()
	}
}

func TestMemberName(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, c := range []struct {
		pod    SandboxConfig
		member PodMember
	}{
		{SandboxConfig{Name: "p", Namespace: "n", UID: "u"}, PodMember{Name: "c"}},
		{SandboxConfig{Name: "p", Namespace: "n", UID: "u"}, PodMember{Name: "c", Attempt: 1}},
		{SandboxConfig{Name: "p", Namespace: "n", UID: "u", Attempt: 1}, PodMember{Name: "c"}},
		{SandboxConfig{Name: "p", Namespace: "n/", UID: "u"}, PodMember{Name: "c"}},
		{SandboxConfig{Name: "p", Namespace: "n!", UID: "u"}, PodMember{Name: "c"}},
	} {
		name := memberName(c.pod, c.member)
		if seen[name] || !validName.MatchString(name) {
			t.Errorf("name %q", name)
		}
		seen[name] = true
	}
	if !seen["k8s_c_p_n_u_0"] {
		t.Errorf("names %v", seen)
	}
}

func TestResolveMember(t *testing.T) {
	t.Parallel()
	acs := accounts{
		passwd: []byte("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n"),
		group:  []byte("root:x:0:\nuser:x:1000:\nextra:x:50000:user\n"),
	}
	id := func(n int64) *int64 { return &n }
	for name, c := range map[string]struct {
		image string
		p     PodMember
		want  string
	}{
		"image":            {"user", PodMember{}, "1000 1000 [1000 50000]"},
		"image with group": {"user:extra", PodMember{}, "1000 50000 [50000]"},
		"uid":              {"user", PodMember{RunAsUser: id(0)}, "0 0 [0]"},
		"uid of image":     {"", PodMember{RunAsUser: id(1000), Groups: []int64{1234}}, "1000 1000 [1000 50000 1234]"},
		"strict":           {"", PodMember{RunAsUser: id(1000), Groups: []int64{1234}, StrictGroups: true}, "1000 1000 [1000 1234]"},
		"group":            {"", PodMember{RunAsUser: id(1000), RunAsGroup: id(7)}, "1000 7 [7 50000]"},
		"name":             {"", PodMember{RunAsUserName: "user", RunAsUser: id(5)}, "1000 1000 [1000 50000]"},
		"unknown uid":      {"", PodMember{RunAsUser: id(77)}, "77 0 [0]"},
		"unknown name":     {"", PodMember{RunAsUserName: "nobody"}, "unable to find user nobody: no matching entries in passwd file"},
	} {
		acc, err := acs.resolveMember(c.image, c.p)
		got := fmt.Sprint(acc.UID, acc.GID, acc.Groups)
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

func TestMountOf(t *testing.T) {
	t.Parallel()
	const info = "1 0 8:1 / / rw shared:1 - ext4 /dev/a rw\n2 1 0:2 / /a\\040b rw master:3 - tmpfs t rw\n3 2 0:3 / /a\\040b/c rw - tmpfs t rw\n"
	for path, want := range map[string]string{"/x": "/ [shared:1]", "/a b/d": "/a b [master:3]", "/a b/c": "/a b/c []", "/a bc": "/ [shared:1]"} {
		point, options := mountOf(info, path)
		if got := fmt.Sprint(point, " ", options); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
}

// TestPodCgroup: the cgroup is there with the sandbox, and goes with it unless somebody else made it.
func TestPodCgroup(t *testing.T) {
	n := newNode(t)
	n.hierarchies = []string{t.TempDir(), t.TempDir()}
	n.e.host.Hierarchies = n.hierarchies
	there := func(path string) (out int) {
		for _, h := range n.hierarchies {
			if _, err := os.Stat(filepath.Join(h, path)); err == nil {
				out++
			}
		}
		return out
	}
	c := hostPod("a")
	c.CgroupParent = "/kubepods/poda"
	id := n.pod(c)
	if there(c.CgroupParent) != 2 {
		t.Error("the cgroup that the client named is not there")
	}
	n.crash() // the next daemon knows that it was made
	if err := n.e.RemoveSandbox(bg, id); err != nil || there(c.CgroupParent) != 0 {
		t.Errorf("remove: %v; left in %d hierarchies", err, there(c.CgroupParent))
	}

	for _, h := range n.hierarchies {
		if err := os.MkdirAll(filepath.Join(h, c.CgroupParent), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.e.RemoveSandbox(bg, n.pod(c)); err != nil || there(c.CgroupParent) != 2 {
		t.Errorf("remove: %v; the kubelet's own is in %d hierarchies", err, there(c.CgroupParent))
	}

	c = hostPod("b")
	c.CgroupParent = ""
	id = n.pod(c)
	if there(n.e.podCgroup(id, c)) != 2 {
		t.Error("the cgroup of a sandbox without a parent is not there")
	}
	if err := n.e.RemoveSandbox(bg, id); err != nil || there(n.e.podCgroup(id, c)) != 0 {
		t.Errorf("remove: %v; left in %d hierarchies", err, there(n.e.podCgroup(id, c)))
	}
	n.breakStep("sandboxes.put", errors.New("no"))
	if _, err := n.e.RunSandbox(bg, c); err == nil {
		t.Fatal("a sandbox without a record")
	}
	for _, h := range n.hierarchies {
		if left, _ := filepath.Glob(filepath.Join(h, "hako/*")); len(left) > 0 {
			t.Errorf("a sandbox that failed left %q", left)
		}
	}
}

// TestAccountsOfKnownImage: whom the container of an image runs as is found once, and kept apart from what its files say later.
func TestAccountsOfKnownImage(t *testing.T) {
	var c accountCache
	for i := range cachedAccounts + 10 {
		c.add(fmt.Sprint("image", i), accounts{passwd: fmt.Append(nil, i)})
	}
	if _, ok := c.get("image0"); ok || len(c.files) != cachedAccounts || len(c.order) != cachedAccounts {
		t.Errorf("%d images are kept", len(c.files))
	}
	if a, ok := c.get(fmt.Sprint("image", cachedAccounts+9)); !ok || string(a.passwd) != fmt.Sprint(cachedAccounts+9) {
		t.Errorf("the newest: %q, %v", a.passwd, ok)
	}
	c.add("big", accounts{group: make([]byte, cachedAccountSize+1)})
	if _, ok := c.get("big"); ok {
		t.Error("a big file is kept")
	}

	n := newNode(t)
	id := n.pod(hostPod("p"))
	for i := range 3 { // the first reads the files, the others do not
		m := memberConfig(fmt.Sprint("c", i), "sleep")
		uid := int64(1000 + i)
		m.Pod.RunAsUser = &uid
		ctr, err := n.e.CreatePodContainer(bg, id, m)
		if err != nil {
			t.Fatal(err)
		}
		v, err := n.e.Container(bg, ctr)
		if err != nil || v.Config.Pod.User == nil || v.Config.Pod.User.UID != uint32(uid) {
			t.Errorf("container %d runs as %+v, %v", i, v.Config.Pod.User, err)
		}
		if len(n.e.accounts.files) != 1 {
			t.Errorf("the files of %d images are known", len(n.e.accounts.files))
		}
	}
	m := memberConfig("nobody", "sleep")
	m.Pod.RunAsUserName = "nobody-knows"
	if _, err := n.e.CreatePodContainer(bg, id, m); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an unknown user: %v", err)
	}
	if got := len(n.e.containers.all()); got != 3 {
		t.Errorf("%d containers, want 3", got)
	}
}
