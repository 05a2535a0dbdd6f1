package engine

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// fakeHooks writes down what it is told: "NAME what", with the names of pods and containers.
type fakeHooks struct {
	mu    sync.Mutex
	calls []string
	held  int
	// on is asked in every call; its error is the hook's.
	on      func(call string) error
	adj     Adjustment
	updates []ContainerUpdate
	shown   map[string]HookContainer // call → what it showed
	idle    bool                     // nobody listens
}

func (h *fakeHooks) told(call string, c *HookContainer) error {
	h.mu.Lock()
	h.calls = append(h.calls, call)
	if h.held == 0 {
		h.calls = append(h.calls, call+" without a hold")
	}
	if c != nil {
		if h.shown == nil {
			h.shown = map[string]HookContainer{}
		}
		h.shown[call] = *c
	}
	on := h.on
	h.mu.Unlock()
	if on != nil {
		return on(call)
	}
	return nil
}

func (h *fakeHooks) Hold() func() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.held++
	return func() { h.mu.Lock(); defer h.mu.Unlock(); h.held-- }
}

func (h *fakeHooks) Idle() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.idle
}

func (h *fakeHooks) RunSandbox(_ context.Context, s Sandbox) error {
	return h.told("run "+s.Config.Name, nil)
}
func (h *fakeHooks) UpdateSandbox(_ context.Context, s Sandbox, _, _ *Resources) error {
	return h.told("resize "+s.Config.Name, nil)
}
func (h *fakeHooks) PostUpdateSandbox(_ context.Context, s Sandbox) error {
	return h.told("resized "+s.Config.Name, nil)
}
func (h *fakeHooks) StopSandbox(_ context.Context, s Sandbox) error {
	return h.told("stop "+s.Config.Name, nil)
}
func (h *fakeHooks) RemoveSandbox(_ context.Context, s Sandbox) error {
	return h.told("remove "+s.Config.Name, nil)
}

func (h *fakeHooks) member(what string, c HookContainer) error {
	return h.told(what+" "+c.Config.Pod.Name, &c)
}
func (h *fakeHooks) CreateContainer(_ context.Context, _ Sandbox, c HookContainer) (Adjustment, []ContainerUpdate, error) {
	err := h.member("create", c)
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.adj, h.updates, err
}
func (h *fakeHooks) PostCreateContainer(_ context.Context, _ Sandbox, c HookContainer) error {
	return h.member("created", c)
}
func (h *fakeHooks) StartContainer(_ context.Context, _ Sandbox, c HookContainer) error {
	return h.member("start", c)
}
func (h *fakeHooks) PostStartContainer(_ context.Context, _ Sandbox, c HookContainer) error {
	return h.member("started", c)
}
func (h *fakeHooks) UpdateContainer(_ context.Context, _ Sandbox, c HookContainer, _ Resources) ([]ContainerUpdate, error) {
	err := h.member("update", c)
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.updates, err
}
func (h *fakeHooks) PostUpdateContainer(_ context.Context, _ Sandbox, c HookContainer) error {
	return h.member("updated", c)
}
func (h *fakeHooks) StopContainer(_ context.Context, _ Sandbox, c HookContainer) ([]ContainerUpdate, error) {
	return nil, h.member("ended", c)
}
func (h *fakeHooks) RemoveContainer(_ context.Context, _ Sandbox, c HookContainer) error {
	return h.member("gone", c)
}

// take gives what was told since the last take.
func (h *fakeHooks) take() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := h.calls
	h.calls = nil
	return out
}

func (h *fakeHooks) do(f func(*fakeHooks)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f(h)
}

func newHookedNode(t *testing.T) (*node, *fakeHooks) {
	t.Helper()
	n := newNode(t)
	h := &fakeHooks{}
	n.hooks = h
	n.crash()
	return n, h
}

func (n *node) told(h *fakeHooks, want ...string) {
	n.t.Helper()
	if got := h.take(); !slices.Equal(got, want) {
		n.t.Errorf("hooks were told\n%q, not\n%q", got, want)
	}
}

func TestHooksOrder(t *testing.T) {
	t.Parallel()
	n, h := newHookedNode(t)
	pod := n.pod(hostPod("p"))
	n.told(h, "run p")
	a := n.member(pod, memberConfig("a", "sleep"))
	n.told(h, "create a", "created a", "start a", "started a")
	if err := n.e.UpdatePodContainer(bg, a, Resources{CPUShares: 512}, nil); err != nil {
		t.Fatal(err)
	}
	n.told(h, "update a", "updated a")
	if got := *h.shown["updated a"].Spec.Linux.Resources.CPU.Shares; got != 512 {
		t.Errorf("after the update %d shares are shown", got)
	}
	if err := n.e.UpdateSandboxResources(bg, pod, nil, &Resources{Memory: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	n.told(h, "resize p", "resized p")
	b := n.member(pod, memberConfig("b", "exit", "3"))
	n.eventually("the end of b is told", func() bool { return slices.Contains(h.snapshot(), "ended b") })
	h.take()
	if v := h.shown["ended b"]; v.State.ExitCode != 3 || v.State.Status != StatusExited {
		t.Errorf("the end of b shows %+v", v.State)
	}
	if err := n.e.RemoveContainer(bg, b, RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	n.told(h, "gone b")
	if _, err := n.e.CreatePodContainer(bg, pod, memberConfig("c", "sleep")); err != nil {
		t.Fatal(err)
	}
	n.told(h, "create c", "created c")
	stopped := false
	h.do(func(h *fakeHooks) {
		h.on = func(call string) error {
			if call == "stop p" {
				stopped = n.state_(a).Status == StatusExited
				if _, err := n.e.Sandbox(bg, pod); err != nil {
					t.Errorf("the sandbox during its stop: %v", err)
				}
			}
			return errors.New("nobody cares")
		}
	})
	for range 2 {
		if err := n.e.StopSandbox(bg, pod); err != nil {
			t.Fatal(err)
		}
	}
	if !stopped {
		t.Error("the stop of the sandbox was told before that of its container")
	}
	n.told(h, "ended a", "stop p")
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	got := h.take()
	slices.Sort(got[:3]) // the containers go side by side
	if !slices.Equal(got, []string{"ended c", "gone a", "gone c", "remove p"}) {
		t.Errorf("the removal told %q", got)
	}
	n.empty()
}

func (h *fakeHooks) snapshot() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.calls)
}

func TestHooksKeepQuietAboutLoneContainers(t *testing.T) {
	t.Parallel()
	n, h := newHookedNode(t)
	id := n.run("lone", Config{Cmd: []string{"sleep"}})
	if err := n.e.RemoveContainer(bg, id, RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	n.told(h)
	n.clean()
}

func TestHooksRefuse(t *testing.T) {
	t.Parallel()
	n, h := newHookedNode(t)
	refuse := func(what string) {
		h.do(func(h *fakeHooks) {
			h.on = func(call string) error {
				if call == what {
					return errors.New("not today")
				}
				return nil
			}
		})
	}
	check := func(err error) {
		t.Helper()
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "refused by a plugin: not today") {
			t.Errorf("refused with %v", err)
		}
	}
	refuse("run p")
	_, err := n.e.RunSandbox(bg, hostPod("p"))
	check(err)
	n.told(h, "run p", "stop p", "remove p")
	n.empty()

	refuse("create a")
	pod := n.pod(hostPod("p"))
	h.take()
	_, err = n.e.CreatePodContainer(bg, pod, memberConfig("a", "sleep"))
	check(err)
	n.told(h, "create a", "ended a", "gone a")
	n.clean_()

	refuse("start a")
	a, err := n.e.CreatePodContainer(bg, pod, memberConfig("a", "sleep"))
	if err != nil {
		t.Fatal(err)
	}
	check(n.e.StartPodContainer(bg, a))
	if s := n.state_(a); s.Status != StatusExited || !s.StartedAt.IsZero() {
		t.Errorf("refused, the container is %+v", s)
	}
	n.told(h, "create a", "created a", "start a", "ended a")

	refuse("update b")
	b := n.member(pod, memberConfig("b", "sleep"))
	h.take()
	check(n.e.UpdatePodContainer(bg, b, Resources{CPUShares: 512}, nil))
	if v, _ := n.e.Container(bg, b); v.Config.Resources.CPUShares != 0 {
		t.Error("a refused update took place")
	}
	refuse("resize p")
	check(n.e.UpdateSandboxResources(bg, pod, nil, &Resources{Memory: 1 << 30}))
	n.told(h, "update b", "resize p")
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

// clean_ asserts that no container is left.
func (n *node) clean_() {
	n.t.Helper()
	if left := n.containers.count() + n.snaps.count() + len(folders(filepath.Join(n.root, "containers"))); left != 0 {
		n.t.Errorf("%d records, snapshots and folders are left", left)
	}
}

// While a hook is asked nobody can see what it is asked about.
func TestHooksBeforeAnybodySees(t *testing.T) {
	t.Parallel()
	n, h := newHookedNode(t)
	h.on = func(call string) error {
		switch call {
		case "run p":
			if len(n.e.Sandboxes(bg)) != 0 {
				t.Error("the sandbox is listed")
			}
		case "create a":
			if len(n.e.PodContainers(bg)) != 0 {
				t.Error("the container is listed")
			}
		}
		return nil
	}
	pod := n.pod(hostPod("p"))
	n.member(pod, memberConfig("a", "sleep"))
	if pods, members := n.e.Hooked(bg); len(pods) != 1 || len(members) != 1 || members[0].Spec == nil {
		t.Errorf("a new listener is shown %d pods, %d containers", len(pods), len(members))
	}
	if err := n.e.StopSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	if pods, members := n.e.Hooked(bg); len(pods)+len(members) != 0 {
		t.Errorf("a new listener is shown what has stopped: %d pods, %d containers", len(pods), len(members))
	}
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
}

// As long as nobody listens, nothing is made for eyes that are not there; who comes later is shown all of it, and told what follows.
func TestHooksOfALateListener(t *testing.T) {
	t.Parallel()
	n, h := newHookedNode(t)
	h.mu.Lock()
	h.idle = true
	h.mu.Unlock()
	pod := n.pod(hostPod("p"))
	a := n.member(pod, memberConfig("a", "sleep"))
	gone := n.member(pod, memberConfig("b", "sleep"))
	if err := n.e.RemoveContainer(bg, gone, RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	c, err := n.e.containers.get(a)
	if err != nil {
		t.Fatal(err)
	}
	if c.spec != nil {
		t.Error("a configuration was made for nobody")
	}
	h.take()
	h.mu.Lock()
	h.idle = false
	h.mu.Unlock()
	pods, members := n.e.Hooked(bg)
	if len(pods) != 1 || len(members) != 1 || members[0].ID != a || members[0].Spec == nil || members[0].Spec.Linux.Seccomp != nil {
		t.Fatalf("a listener that comes late is shown %d pods, %+v", len(pods), members)
	}
	limits := members[0].Spec.Linux.Resources
	if err := n.e.UpdatePodContainer(bg, a, Resources{Memory: 64 << 20}, nil); err != nil {
		t.Fatal(err)
	}
	if _, members = n.e.Hooked(bg); *members[0].Spec.Linux.Resources.Memory.Limit != 64<<20 || limits == members[0].Spec.Linux.Resources {
		t.Errorf("the new limits are not shown: %+v", members[0].Spec.Linux.Resources.Memory)
	}
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.told(h, "update a", "updated a", "ended a", "stop p", "gone a", "remove p")
	n.empty()
}

// A restarted daemon shows what lives, and goes on telling of it.
func TestHooksAfterARestart(t *testing.T) {
	t.Parallel()
	n, h := newHookedNode(t)
	h.adj = Adjustment{Env: []string{"PLUGIN=was here"}}
	pod := n.pod(hostPod("p"))
	a := n.member(pod, memberConfig("a", "sleep"))
	stopped := n.pod(hostPod("q"))
	if err := n.e.StopSandbox(bg, stopped); err != nil {
		t.Fatal(err)
	}
	n.crash()
	h.take()
	pods, members := n.e.Hooked(bg)
	if len(pods) != 1 || pods[0].ID != pod || len(members) != 1 || members[0].ID != a {
		t.Fatalf("shown are %d pods, %d containers", len(pods), len(members))
	}
	if !slices.Contains(members[0].Spec.Process.Env, "PLUGIN=was here") {
		t.Errorf("what the plugin made of it is lost: %q", members[0].Spec.Process.Env)
	}
	for _, id := range []string{pod, stopped} {
		if err := n.e.RemoveSandbox(bg, id); err != nil {
			t.Fatal(err)
		}
	}
	n.told(h, "ended a", "stop p", "gone a", "remove p", "remove q")
	n.empty()
}

func TestHooksUpdateOthers(t *testing.T) {
	t.Parallel()
	n, h := newHookedNode(t)
	pod := n.pod(hostPod("p"))
	a := n.member(pod, memberConfig("a", "sleep"))
	shares := func(id string) int64 {
		v, err := n.e.Container(bg, id)
		if err != nil {
			t.Fatal(err)
		}
		return v.Config.Resources.CPUShares
	}
	h.do(func(h *fakeHooks) {
		h.updates = []ContainerUpdate{{ID: a, Resources: Resources{CPUShares: 100}}, {ID: "missing", IgnoreFailure: true}}
	})
	b := n.member(pod, memberConfig("b", "sleep"))
	if got := shares(a); got != 100 {
		t.Errorf("with the creation of another %d shares", got)
	}
	h.do(func(h *fakeHooks) {
		h.updates = []ContainerUpdate{{ID: a, Resources: Resources{CPUShares: 200}}, {ID: b, Resources: Resources{CPUShares: 300}}}
	})
	if err := n.e.UpdatePodContainer(bg, b, Resources{CPUShares: 1}, nil); err != nil {
		t.Fatal(err)
	}
	if shares(a) != 200 || shares(b) != 300 {
		t.Errorf("with the update of another %d and %d shares", shares(a), shares(b))
	}
	h.do(func(h *fakeHooks) { h.updates = []ContainerUpdate{{ID: "missing"}} })
	if _, err := n.e.CreatePodContainer(bg, pod, memberConfig("c", "sleep")); !errdefs.IsNotFound(err) {
		t.Errorf("an update that may not fail: %v", err)
	}
	h.do(func(h *fakeHooks) { h.updates = nil })
	failed, err := n.e.UpdateHooked(bg, []ContainerUpdate{
		{ID: "missing", IgnoreFailure: true}, {ID: a, Resources: Resources{Unified: map[string]string{"memory.high": "max"}}},
	})
	if err != nil || len(failed) != 1 || failed[0].ID != "missing" {
		t.Errorf("an update out of its own: %v, %v", failed, err)
	}
	if _, err := n.e.UpdateHooked(bg, []ContainerUpdate{{ID: a, Resources: Resources{CPUShares: -1}}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an impossible update: %v", err)
	}
	if err := n.e.Evict(bg, a, "test"); err != nil || n.state_(a).Status != StatusExited {
		t.Errorf("evicted: %v, %s", err, n.state_(a).Status)
	}
	if err := n.e.Evict(bg, a, "again"); err != nil {
		t.Errorf("evicted again: %v", err)
	}
	lone := n.run("lone", Config{Cmd: []string{"sleep"}})
	if err := n.e.Evict(bg, lone, "not yours"); !errdefs.IsNotFound(err) || n.state_(lone).Status != StatusRunning {
		t.Errorf("a container in no pod: %v", err)
	}
	for _, err := range []error{
		n.e.RemoveContainer(bg, lone, RemoveOptions{Force: true}), n.e.RemoveSandbox(bg, pod),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	n.empty()
}

// A hook that hangs holds up what it was asked about, and nothing else.
func TestHooksThatHang(t *testing.T) {
	t.Parallel()
	n, h := newHookedNode(t)
	hang, reached := make(chan struct{}), make(chan struct{})
	h.on = func(call string) error {
		if call == "create slow" {
			close(reached)
			<-hang
		}
		return nil
	}
	pod := n.pod(hostPod("p"))
	slow := make(chan error, 1)
	go func() {
		_, err := n.e.CreatePodContainer(bg, pod, memberConfig("slow", "sleep"))
		slow <- err
	}()
	<-reached
	n.member(pod, memberConfig("quick", "sleep"))
	ctx, cancel := context.WithTimeout(bg, 10*time.Millisecond)
	defer cancel()
	if _, err := n.e.CreatePodContainer(ctx, pod, memberConfig("slow", "sleep")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a client's deadline: %v", err)
	}
	close(hang)
	if err := <-slow; err != nil {
		t.Fatal(err)
	}
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

func TestAdjustedContainer(t *testing.T) {
	t.Parallel()
	n, h := newHookedNode(t)
	adj := 417
	h.adj = Adjustment{
		Annotations: map[string]string{"example.com/plugin": "yes"},
		Env:         []string{"A=plugin"}, RemoveEnv: []string{"HOSTNAME"},
		Args:      []string{"sleep", "adjusted"},
		Resources: Resources{Memory: 64 << 20, PidsLimit: ptr[int64](33)}, OOMScoreAdj: &adj,
	}
	pod := n.pod(hostPod("p"))
	a, err := n.e.CreatePodContainer(bg, pod, memberConfig("a", "sleep", "asked"))
	if err != nil {
		t.Fatal(err)
	}
	n.crash() // what was made of it lies in the record
	if err := n.e.StartPodContainer(bg, a); err != nil {
		t.Fatal(err)
	}
	v, err := n.e.Container(bg, a)
	if err != nil {
		t.Fatal(err)
	}
	if v.Config.Resources.Memory != 64<<20 || v.Config.OOMScoreAdj != adj {
		t.Errorf("limits shown: %d, %d", v.Config.Resources.Memory, v.Config.OOMScoreAdj)
	}
	s := n.spec(a)
	if !slices.Equal(s.Process.Args, h.adj.Args) || !slices.Contains(s.Process.Env, "A=plugin") || slices.Contains(s.Process.Env, "A=image") ||
		s.Annotations["example.com/plugin"] != "yes" || *s.Linux.Resources.Memory.Limit != 64<<20 || *s.Linux.Resources.Pids.Limit != 33 || *s.Process.OOMScoreAdj != adj {
		t.Errorf("configuration: %+v %+v", s.Process, s.Linux.Resources)
	}
	for _, kv := range s.Process.Env {
		if strings.HasPrefix(kv, "HOSTNAME=") {
			t.Errorf("%s was not removed", kv)
		}
	}
	if v.Config.Annotations["example.com/plugin"] != "" {
		t.Error("the client sees an annotation that it did not give")
	}
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

// spec is the configuration that a container was started with.
func (n *node) spec(id string) (s specs.Spec) {
	n.t.Helper()
	raw, err := os.ReadFile(filepath.Join(n.e.bundle(id), "config.json"))
	if err == nil {
		err = json.Unmarshal(raw, &s)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

func ptr[T any](v T) *T { return &v }
