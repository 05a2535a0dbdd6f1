package nri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/internal/execfile"
)

// limit is the time limit of all tests here: the library has one per process.
const limit = 5 * time.Second

// TestMain is a plugin when the server has started it as one.
func TestMain(m *testing.M) {
	LogTo(slog.New(slog.DiscardHandler))
	if os.Getenv(api.PluginNameEnvVar) == "" {
		os.Exit(m.Run())
	}
	p := &plugin{}
	s, err := stub.New(p, stub.WithOnClose(func() { os.Exit(0) }))
	if err == nil {
		err = s.Run(context.Background())
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// plugin is a plugin through the real stub. It writes down what it is told.
type plugin struct {
	mu      sync.Mutex
	calls   []string
	config  string
	synced  chan struct{}
	pods    []*api.PodSandbox
	members []*api.Container
	last    *api.Container
	limits  *api.LinuxResources
	adjust  *api.ContainerAdjustment
	updates []*api.ContainerUpdate
	on      func(ctx context.Context, call string) error
	stub    stub.Stub
}

func (p *plugin) told(ctx context.Context, call string, c *api.Container) error {
	p.mu.Lock()
	p.calls = append(p.calls, call)
	if c != nil {
		p.last = c
	}
	on := p.on
	p.mu.Unlock()
	if on != nil {
		return on(ctx, call)
	}
	return nil
}

func (p *plugin) Configure(_ context.Context, config, runtime, _ string) (api.EventMask, error) {
	p.config = config
	if config != "" { // of one that was started: the name of a file
		return 0, os.WriteFile(strings.TrimSpace(config), []byte(runtime), 0o600)
	}
	return 0, nil
}

func (p *plugin) Synchronize(ctx context.Context, pods []*api.PodSandbox, members []*api.Container) ([]*api.ContainerUpdate, error) {
	p.mu.Lock()
	p.pods, p.members = pods, members
	p.mu.Unlock()
	err := p.told(ctx, "synchronize", nil)
	if p.synced != nil {
		close(p.synced)
	}
	return p.updates, err
}

func (p *plugin) RunPodSandbox(ctx context.Context, s *api.PodSandbox) error {
	return p.told(ctx, "run "+s.GetName(), nil)
}
func (p *plugin) UpdatePodSandbox(ctx context.Context, s *api.PodSandbox, _, r *api.LinuxResources) error {
	return p.told(ctx, fmt.Sprintf("resize %s %d", s.GetName(), r.GetMemory().GetLimit().GetValue()), nil)
}
func (p *plugin) PostUpdatePodSandbox(ctx context.Context, s *api.PodSandbox) error {
	return p.told(ctx, "resized "+s.GetName(), nil)
}
func (p *plugin) StopPodSandbox(ctx context.Context, s *api.PodSandbox) error {
	return p.told(ctx, "stop "+s.GetName(), nil)
}
func (p *plugin) RemovePodSandbox(ctx context.Context, s *api.PodSandbox) error {
	return p.told(ctx, "remove "+s.GetName(), nil)
}
func (p *plugin) CreateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	return p.adjust, p.updates, p.told(ctx, "create "+c.GetName(), c)
}
func (p *plugin) PostCreateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.told(ctx, "created "+c.GetName(), c)
}
func (p *plugin) StartContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.told(ctx, "start "+c.GetName(), c)
}
func (p *plugin) PostStartContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.told(ctx, "started "+c.GetName(), c)
}
func (p *plugin) UpdateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container, r *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	p.limits = r
	return p.updates, p.told(ctx, "update "+c.GetName(), c)
}
func (p *plugin) PostUpdateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.told(ctx, "updated "+c.GetName(), c)
}
func (p *plugin) StopContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	return p.updates, p.told(ctx, "ended "+c.GetName(), c)
}
func (p *plugin) RemoveContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.told(ctx, "gone "+c.GetName(), c)
}

func (p *plugin) take() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := p.calls
	p.calls = nil
	return out
}

// backend is an engine with one pod and one container.
type backend struct {
	mu      sync.Mutex
	updates []engine.ContainerUpdate
	evicted chan string
}

func (b *backend) Hooked(context.Context) ([]engine.Sandbox, []engine.HookContainer) {
	return []engine.Sandbox{testPod()}, []engine.HookContainer{testMember()}
}

func (b *backend) UpdateHooked(_ context.Context, updates []engine.ContainerUpdate) (failed []engine.ContainerUpdate, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, u := range updates {
		if u.ID == "missing" {
			failed = append(failed, u)
			if !u.IgnoreFailure {
				err = fmt.Errorf("container %s: %w", u.ID, errdefs.ErrNotFound)
			}
			continue
		}
		b.updates = append(b.updates, u)
	}
	return failed, err
}

func (b *backend) Evict(_ context.Context, id, reason string) error {
	b.evicted <- id + ": " + reason
	return nil
}

func testPod() engine.Sandbox {
	return engine.Sandbox{ID: "pod1", State: engine.SandboxReady, NetNS: "/run/netns/x", IPs: []netip.Addr{netip.MustParseAddr("10.1.2.3")},
		Config: engine.SandboxConfig{Name: "p", Namespace: "ns", UID: "u", CgroupParent: "/pods", Network: engine.NamespacePod,
			Labels: map[string]string{"l": "1"}, Annotations: map[string]string{"a": "1"}, Resources: &engine.Resources{Memory: 5}}}
}

func testMember() engine.HookContainer {
	adj, shares := 7, uint64(99)
	mode := os.FileMode(0o666)
	return engine.HookContainer{
		Container: engine.Container{
			ID: "ctr1", Created: time.Unix(1, 2), ImageName: "docker.io/library/x:1", ImageID: "sha256:abc", Path: "app", Env: []string{"A=1"},
			State: engine.State{Status: engine.StatusRunning, Pid: 42, StartedAt: time.Unix(3, 4)},
			Config: engine.Config{Labels: map[string]string{"l": "2"}, Annotations: map[string]string{"a": "2"},
				Pod: &engine.PodMember{Sandbox: "pod1", Name: "c", User: &engine.PodUser{UID: 5, GID: 6, Groups: []uint32{6, 7}}, CDIDevices: []string{"v/c=d"}}},
		},
		Spec: &specs.Spec{
			Annotations: map[string]string{"io.kubernetes.cri.container-name": "c"},
			Process: &specs.Process{Args: []string{"app", "-x"}, Env: []string{"A=1", "B=2"}, OOMScoreAdj: &adj,
				Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1, Hard: 2}}},
			Mounts: []specs.Mount{{Destination: "/data", Type: "bind", Source: "/x", Options: []string{"ro"}}},
			Linux: &specs.Linux{
				CgroupsPath: "/pods/ctr1", Resources: &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}},
				Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/run/netns/x"}},
				Devices:    []specs.LinuxDevice{{Path: "/dev/gone", Type: "c", Major: 1, Minor: 3, FileMode: &mode}},
				Seccomp:    &specs.LinuxSeccomp{DefaultAction: specs.ActErrno},
				Sysctl:     map[string]string{"net.x": "1"},
			},
		},
	}
}

func newServer(t *testing.T, o Options) (*Server, *backend) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nri") // short: it holds a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if o.Socket == "" {
		o.Socket = filepath.Join(dir, "n.sock")
	}
	o.RequestLimit, o.RegisterLimit, o.Version = limit, limit, "1.2.3"
	if o.PluginDir == "" {
		o.PluginDir = filepath.Join(dir, "none")
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	b := &backend{evicted: make(chan string, 8)}
	if err := s.Start(b); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s, b
}

// connect brings a plugin to the server and waits until it counts.
func connect(t *testing.T, s *Server, index string, p *plugin, more ...stub.Option) {
	t.Helper()
	p.synced = make(chan struct{})
	st, err := stub.New(p, append([]stub.Option{stub.WithPluginName("test" + index), stub.WithPluginIdx(index), stub.WithSocketPath(s.opt.Socket),
		stub.WithLogger(logger{slog.New(slog.DiscardHandler)}), stub.WithOnClose(func() {})}, more...)...)
	if err != nil {
		t.Fatal(err)
	}
	p.stub = st
	if err := st.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Stop)
	select {
	case <-p.synced:
	case <-time.After(5 * time.Minute):
		t.Fatal("the plugin was not brought up to date")
	}
	s.Hold()() // after the synchronization it is in the list
	p.take()
}

var bg = context.Background()

func TestEverythingIsTold(t *testing.T) {
	s, _ := newServer(t, Options{})
	p := &plugin{}
	connect(t, s, "10", p)
	pod, c := testPod(), testMember()
	for _, f := range []func() error{
		func() error { return s.RunSandbox(bg, pod) },
		func() error { return s.UpdateSandbox(bg, pod, nil, &engine.Resources{Memory: 77}) },
		func() error { return s.PostUpdateSandbox(bg, pod) },
		func() error { _, _, err := s.CreateContainer(bg, pod, c); return err },
		func() error { return s.PostCreateContainer(bg, pod, c) },
		func() error { return s.StartContainer(bg, pod, c) },
		func() error { return s.PostStartContainer(bg, pod, c) },
		func() error { _, err := s.UpdateContainer(bg, pod, c, engine.Resources{}); return err },
		func() error { return s.PostUpdateContainer(bg, pod, c) },
		func() error { _, err := s.StopContainer(bg, pod, c); return err },
		func() error { return s.RemoveContainer(bg, pod, c) },
		func() error { return s.StopSandbox(bg, pod) },
		func() error { return s.RemoveSandbox(bg, pod) },
	} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"run p", "resize p 77", "resized p", "create c", "created c", "start c", "started c", "update c", "updated c", "ended c", "gone c", "stop p", "remove p"}
	if got := p.take(); !slices.Equal(got, want) {
		t.Errorf("told %q", got)
	}
	w := p.last
	for _, c := range []struct {
		what string
		ok   bool
	}{
		{"identity", w.GetId() == "ctr1" && w.GetPodSandboxId() == "pod1" && w.GetPid() == 42 && w.GetState() == api.ContainerState_CONTAINER_RUNNING},
		{"times", w.GetCreatedAt() == 1e9+2 && w.GetStartedAt() == 3e9+4 && w.GetFinishedAt() == 0},
		{"labels, annotations", w.GetLabels()["l"] == "2" && w.GetAnnotations()["a"] == "2" && w.GetAnnotations()["io.kubernetes.cri.container-name"] == "c"},
		{"process", slices.Equal(w.GetArgs(), []string{"app", "-x"}) && slices.Equal(w.GetEnv(), []string{"A=1", "B=2"}) && w.GetRlimits()[0].GetHard() == 2},
		{"mounts", w.GetMounts()[0].GetSource() == "/x" && w.GetMounts()[0].GetOptions()[0] == "ro"},
		{"user, image", w.GetUser().GetUid() == 5 && len(w.GetUser().GetAdditionalGids()) == 2 && w.GetImage().GetConfigDigest() == "sha256:abc"},
		{"devices", w.GetCDIDevices()[0].GetName() == "v/c=d" && w.GetLinux().GetDevices()[0].GetMinor() == 3},
		{"linux", w.GetLinux().GetCgroupsPath() == "/pods/ctr1" && w.GetLinux().GetResources().GetCpu().GetShares().GetValue() == 99 &&
			w.GetLinux().GetOomScoreAdj().GetValue() == 7 && w.GetLinux().GetSysctl()["net.x"] == "1" && w.GetLinux().GetSeccompPolicy().GetDefaultAction() == "SCMP_ACT_ERRNO"},
		{"pod", p.pods[0].GetIps()[0] == "10.1.2.3" && p.pods[0].GetLinux().GetPodResources().GetMemory().GetLimit().GetValue() == 5 &&
			p.pods[0].GetLinux().GetNamespaces()[0].GetPath() == "/run/netns/x" && p.pods[0].GetUid() == "u"},
		{"synchronization", len(p.members) == 1 && p.members[0].GetId() == "ctr1"},
	} {
		if !c.ok {
			t.Errorf("%s: %v", c.what, w)
		}
	}
}

func TestAdjustmentsArrive(t *testing.T) {
	s, _ := newServer(t, Options{})
	a := &api.ContainerAdjustment{}
	a.AddAnnotation("k", "v")
	a.RemoveAnnotation("drop")
	a.AddMount(&api.Mount{Destination: "/m", Type: "bind", Source: "/s", Options: []string{"rbind"}})
	a.RemoveMount("/data")
	a.AddEnv("NEW", "1")
	a.RemoveEnv("B")
	a.SetArgs([]string{"other"})
	a.AddHooks(&api.Hooks{Poststop: []*api.Hook{{Path: "/bin/true", Timeout: api.Int(3)}}})
	a.AddRlimit("RLIMIT_CORE", 2, 1)
	a.AddDevice(&api.LinuxDevice{Path: "/dev/x", Type: "c", Major: 4, Minor: 5, FileMode: api.FileMode(os.FileMode(0o600))})
	a.RemoveDevice("/dev/gone")
	a.AddCDIDevice(&api.CDIDevice{Name: "v/c=e"})
	a.AddOrReplaceNamespace(&api.LinuxNamespace{Type: "ipc", Path: "/i"})
	a.RemoveNamespace(&api.LinuxNamespace{Type: "uts"})
	a.AddLinuxNetDevice("eth9", &api.LinuxNetDevice{Name: "lan"})
	a.SetLinuxMemoryPolicy(api.MpolMode_MPOL_BIND, "0", api.MpolFlag_MPOL_F_STATIC_NODES)
	a.SetLinuxMemoryLimit(100)
	a.SetLinuxMemorySwappiness(10)
	a.SetLinuxCPUShares(11)
	a.SetLinuxCPUQuota(12)
	a.SetLinuxCPUPeriod(13)
	a.SetLinuxCPUSetCPUs("0-1")
	a.SetLinuxPidLimits(-1)
	a.AddLinuxHugepageLimit("2MB", 14)
	a.AddLinuxUnified("memory.high", "15")
	a.SetLinuxRDTClass("gold")
	a.SetLinuxCgroupsPath("/c")
	score := -5
	a.SetLinuxOomScoreAdj(&score)
	a.SetLinuxIOPriority(&api.LinuxIOPriority{Class: api.IOPrioClass_IOPRIO_CLASS_IDLE})
	a.SetLinuxSeccompPolicy(&api.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW", DefaultErrno: api.UInt32(uint32(1)), Architectures: []string{"SCMP_ARCH_X86_64"},
		Syscalls: []*api.LinuxSyscall{{Names: []string{"x"}, Action: "SCMP_ACT_LOG"}}})
	a.SetLinuxSysctl("net.y", "2")
	a.SetLinuxScheduler(&api.LinuxScheduler{Policy: api.LinuxSchedulerPolicy_SCHED_BATCH, Nice: 3})
	connect(t, s, "10", &plugin{adjust: a})
	// Another one, which sees what the first has made of it.
	second := &plugin{}
	connect(t, s, "20", second)
	got, updates, err := s.CreateContainer(bg, testPod(), testMember())
	if err != nil || len(updates) != 0 {
		t.Fatal(updates, err)
	}
	errno, mode, timeout := uint(1), os.FileMode(0o600), 3
	want := engine.Adjustment{
		Annotations: map[string]string{"k": "v"}, RemoveAnnotations: []string{"drop"},
		Mounts: []specs.Mount{{Destination: "/m", Type: "bind", Source: "/s", Options: []string{"rbind"}}}, RemoveMounts: []string{"/data"},
		Env: []string{"NEW=1"}, RemoveEnv: []string{"B"}, Args: []string{"other"},
		Hooks:   &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/true", Timeout: &timeout}}},
		Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Hard: 2, Soft: 1}}, CDIDevices: []string{"v/c=e"},
		Devices: []specs.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 4, Minor: 5, FileMode: &mode}}, RemoveDevices: []string{"/dev/gone"},
		Resources: engine.Resources{Memory: 100, MemorySwappiness: ptr[int64](10), CPUShares: 11, CPUQuota: 12, CPUPeriod: 13, CpusetCPUs: "0-1",
			PidsLimit: ptr[int64](-1), Hugepages: map[string]uint64{"2MB": 14}, Unified: map[string]string{"memory.high": "15"}},
		OOMScoreAdj: &score, CgroupsPath: "/c", IOPriority: &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_IDLE},
		Scheduler: &specs.Scheduler{Policy: specs.SchedBatch, Nice: 3},
		Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, DefaultErrnoRet: &errno, Architectures: []specs.Arch{specs.ArchX86_64},
			Syscalls: []specs.LinuxSyscall{{Names: []string{"x"}, Action: specs.ActLog, Args: []specs.LinuxSeccompArg{}}}},
		Namespaces: []specs.LinuxNamespace{{Type: specs.IPCNamespace, Path: "/i"}}, RemoveNamespaces: []specs.LinuxNamespaceType{specs.UTSNamespace},
		Sysctl: map[string]string{"net.y": "2"}, NetDevices: map[string]specs.LinuxNetDevice{"eth9": {Name: "lan"}},
		RDT:          &specs.LinuxIntelRdt{ClosID: "gold"},
		MemoryPolicy: &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: []specs.MemoryPolicyFlagType{specs.MpolFStaticNodes}},
	}
	g, w := reflect.ValueOf(got), reflect.ValueOf(want)
	for i := range g.NumField() {
		if !reflect.DeepEqual(g.Field(i).Interface(), w.Field(i).Interface()) {
			t.Errorf("%s: %+v, not %+v", g.Type().Field(i).Name, g.Field(i).Interface(), w.Field(i).Interface())
		}
	}
	if !slices.Contains(second.last.GetEnv(), "NEW=1") || slices.Contains(second.last.GetEnv(), "B=2") {
		t.Errorf("the second plugin is shown %q", second.last.GetEnv())
	}
}

func ptr[T any](v T) *T { return &v }

func TestNoAdjustment(t *testing.T) {
	s, _ := newServer(t, Options{})
	for _, connected := range []bool{false, true} {
		if connected {
			connect(t, s, "10", &plugin{})
		}
		a, updates, err := s.CreateContainer(bg, testPod(), testMember())
		if err != nil || updates != nil || !reflect.DeepEqual(a, engine.Adjustment{}) {
			t.Errorf("connected %v: %+v, %v, %v", connected, a, updates, err)
		}
		if u, err := s.UpdateContainer(bg, testPod(), testMember(), engine.Resources{CPUShares: 3}); err != nil || len(u) != 0 {
			t.Errorf("connected %v: %+v, %v", connected, u, err)
		}
	}
}

// Two plugins that want different things of the same are an error, which says so.
func TestPluginsThatDisagree(t *testing.T) {
	s, _ := newServer(t, Options{})
	for _, index := range []string{"10", "20"} {
		a := &api.ContainerAdjustment{}
		a.AddEnv("X", index)
		connect(t, s, index, &plugin{adjust: a})
	}
	if _, _, err := s.CreateContainer(bg, testPod(), testMember()); err == nil || !strings.Contains(err.Error(), "10-test10") || !strings.Contains(err.Error(), "20-test20") {
		t.Errorf("created with %v", err)
	}
}

// validator is a plugin that looks at what the others want.
type validator struct {
	plugin
	refuse error
	seen   *api.ValidateContainerAdjustmentRequest
}

func (v *validator) ValidateContainerAdjustment(_ context.Context, r *api.ValidateContainerAdjustmentRequest) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.seen = r
	return v.refuse
}

// TestValidator: a plugin that validates is shown what the others together want, and who wants it, and its refusal holds.
func TestValidator(t *testing.T) {
	s, _ := newServer(t, Options{})
	a := &api.ContainerAdjustment{}
	a.AddEnv("X", "1")
	connect(t, s, "10", &plugin{adjust: a})
	v := &validator{}
	v.synced = make(chan struct{})
	st, err := stub.New(v, stub.WithPluginName("judge"), stub.WithPluginIdx("90"), stub.WithSocketPath(s.opt.Socket),
		stub.WithLogger(logger{slog.New(slog.DiscardHandler)}), stub.WithOnClose(func() {}))
	if err == nil {
		err = st.Start(bg)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Stop)
	<-v.synced
	s.Hold()()
	if adj, _, err := s.CreateContainer(bg, testPod(), testMember()); err != nil || reflect.DeepEqual(adj, engine.Adjustment{}) {
		t.Errorf("a validator that agrees: %+v, %v", adj, err)
	}
	v.mu.Lock()
	if v.seen == nil || len(v.seen.GetAdjust().GetEnv()) != 1 || len(v.seen.GetPlugins()) != 2 {
		t.Errorf("the validator was shown %v", v.seen)
	}
	v.refuse = errors.New("no environment today")
	v.mu.Unlock()
	if _, _, err := s.CreateContainer(bg, testPod(), testMember()); err == nil || !strings.Contains(err.Error(), "no environment today") {
		t.Errorf("refused with %v", err)
	}
}

func TestImpossibleOnTheWire(t *testing.T) {
	for text, r := range map[string]*api.LinuxResources{
		"kernel's memory":     {Memory: &api.LinuxMemory{Kernel: api.Int64(int64(1))}},
		"TCP buffers":         {Memory: &api.LinuxMemory{KernelTcp: api.Int64(int64(1))}},
		"swappiness 200":      {Memory: &api.LinuxMemory{Swappiness: api.UInt64(uint64(200))}},
		"CPU shares":          {Cpu: &api.LinuxCPU{Shares: api.UInt64(uint64(1 << 63))}},
		"block I/O class \"g": {BlockioClass: api.String("gold")},
	} {
		_, err := resourcesOf(r)
		if err == nil || !strings.Contains(err.Error(), text) || !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v", text, err)
		}
		if _, err := updatesOf([]*api.ContainerUpdate{{ContainerId: "x", Linux: &api.LinuxContainerUpdate{Resources: r}}}); err == nil {
			t.Errorf("%s: possible as an update", text)
		}
	}
	if u, err := updatesOf([]*api.ContainerUpdate{nil, {ContainerId: "x"}}); err != nil || u != nil {
		t.Errorf("updates of nothing: %v, %v", u, err)
	}
	if _, err := adjustmentOf(nil); err != nil {
		t.Error(err)
	}
}

func update(id string, shares uint64, ignore bool) *api.ContainerUpdate {
	u := &api.ContainerUpdate{}
	u.SetContainerId(id)
	u.SetLinuxCPUShares(shares)
	if ignore {
		u.SetIgnoreFailure()
	}
	return u
}

func TestUpdates(t *testing.T) {
	s, b := newServer(t, Options{})
	p := &plugin{updates: []*api.ContainerUpdate{update("other", 5, false)}}
	connect(t, s, "10", p)
	s.work.Wait() // what it asked for when it came
	b.mu.Lock()
	if len(b.updates) != 1 || b.updates[0].ID != "other" || b.updates[0].Resources.CPUShares != 5 {
		t.Errorf("asked for with the synchronization: %+v", b.updates)
	}
	b.updates = nil
	b.mu.Unlock()
	p.updates = []*api.ContainerUpdate{update("ctr1", 50, false), update("other", 6, true)}
	got, err := s.UpdateContainer(bg, testPod(), testMember(), engine.Resources{CPUShares: 3, CPUQuota: 1000})
	if err != nil {
		t.Fatal(err)
	}
	if p.limits.GetCpu().GetShares().GetValue() != 3 {
		t.Errorf("asked about %v", p.limits)
	}
	var own engine.ContainerUpdate
	for _, u := range got {
		if u.ID == "ctr1" {
			own = u
		}
	}
	if len(got) != 2 || own.Resources.CPUShares != 50 || own.Resources.CPUQuota != 1000 {
		t.Errorf("answered %+v", got)
	}
	if got, err = s.StopContainer(bg, testPod(), testMember()); err != nil || len(got) != 2 {
		t.Errorf("with the end: %+v, %v", got, err)
	}
	failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{update("ctr1", 9, false), update("missing", 1, true)})
	if err != nil || len(failed) != 1 || failed[0].GetContainerId() != "missing" {
		t.Errorf("out of its own: %v, %v", failed, err)
	}
	b.mu.Lock()
	if len(b.updates) != 1 || b.updates[0].Resources.CPUShares != 9 {
		t.Errorf("out of its own: %+v", b.updates)
	}
	b.mu.Unlock()
	if _, err := p.stub.UpdateContainers([]*api.ContainerUpdate{update("missing", 1, false)}); err == nil {
		t.Error("an update that failed was taken for done")
	}
}

// The stub has no word for evictions: they are put on the wire by hand.
func TestEvictions(t *testing.T) {
	s, b := newServer(t, Options{})
	evict := []*api.ContainerEviction{{ContainerId: "victim", Reason: "test"}}
	p := &plugin{}
	connect(t, s, "10", p, stub.WithTTRPCOptions(
		[]ttrpc.ClientOpts{ttrpc.WithUnaryClientInterceptor(func(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, next ttrpc.Invoker) error {
			if req.Method == "UpdateContainers" {
				m := &api.UpdateContainersRequest{Evict: evict}
				req.Payload, _ = m.MarshalVT()
			}
			return next(ctx, req, resp)
		})},
		[]ttrpc.ServerOpt{ttrpc.WithUnaryServerInterceptor(func(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, next ttrpc.Method) (any, error) {
			resp, err := next(ctx, unmarshal)
			switch r := resp.(type) {
			case *api.CreateContainerResponse:
				r.Evict = evict
			case *api.UpdateContainerResponse:
				r.Evict = evict
			}
			return resp, err
		})}))
	for what, f := range map[string]func() error{
		"creation":       func() error { _, _, err := s.CreateContainer(bg, testPod(), testMember()); return err },
		"update":         func() error { _, err := s.UpdateContainer(bg, testPod(), testMember(), engine.Resources{}); return err },
		"out of its own": func() error { _, err := p.stub.UpdateContainers(nil); return err },
	} {
		if err := f(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		select {
		case got := <-b.evicted:
			if got != "victim: test" {
				t.Errorf("%s: evicted %s", what, got)
			}
		case <-time.After(5 * time.Minute):
			t.Errorf("%s: nothing was evicted", what)
		}
	}
}

func TestPluginThatRefuses(t *testing.T) {
	s, _ := newServer(t, Options{})
	p := &plugin{on: func(_ context.Context, call string) error {
		if call == "run p" {
			return errors.New("not today")
		}
		return nil
	}}
	connect(t, s, "10", p)
	if err := s.RunSandbox(bg, testPod()); err == nil || !strings.Contains(err.Error(), "not today") {
		t.Errorf("refused with %v", err)
	}
	if err := s.StopSandbox(bg, testPod()); err != nil {
		t.Error(err)
	}
	if got := p.take(); !slices.Equal(got, []string{"run p", "stop p"}) {
		t.Errorf("a plugin that refuses is not dropped, and was told %q", got)
	}
}

// A plugin that hangs, or dies, is dropped; others are not kept waiting longer than its limit.
func TestPluginThatHangsOrDies(t *testing.T) {
	for kind, do := range map[string]func(p *plugin, over <-chan struct{}){
		"hangs": func(_ *plugin, over <-chan struct{}) { <-over },
		"dies":  func(p *plugin, over <-chan struct{}) { go p.stub.Stop(); <-over },
	} {
		t.Run(kind, func(t *testing.T) {
			over := make(chan struct{})
			s, _ := newServer(t, Options{})
			bad, good := &plugin{}, &plugin{}
			bad.on = func(ctx context.Context, call string) error {
				if call == "run p" {
					do(bad, over)
				}
				return nil
			}
			connect(t, s, "10", bad)
			connect(t, s, "20", good)
			t.Cleanup(func() { close(over) }) // until then it hangs, and whoever waited for it would, too
			if err := s.RunSandbox(bg, testPod()); err != nil {
				t.Fatal(err)
			}
			bad.take()
			if err := s.StopSandbox(bg, testPod()); err != nil {
				t.Fatal(err)
			}
			if got := good.take(); !slices.Equal(got, []string{"run p", "stop p"}) {
				t.Errorf("the other was told %q", got)
			}
			if got := bad.take(); len(got) != 0 {
				t.Errorf("it was told %q", got)
			}
		})
	}
}

// A plugin that hangs while it is brought up to date keeps nobody longer than its limit.
func TestPluginThatHangsWhenItComes(t *testing.T) {
	s, _ := newServer(t, Options{})
	reached := make(chan struct{})
	over := make(chan struct{})
	p := &plugin{on: func(context.Context, string) error { close(reached); <-over; return nil }}
	st, err := stub.New(p, stub.WithPluginName("x"), stub.WithPluginIdx("10"), stub.WithSocketPath(s.opt.Socket), stub.WithOnClose(func() {}))
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Start(bg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Stop)
	t.Cleanup(func() { close(over) })
	<-reached
	s.Hold()()
	if err := s.RunSandbox(bg, testPod()); err != nil {
		t.Error(err)
	}
}

// What happens while somebody holds a plugin off is in what it is shown.
func TestHold(t *testing.T) {
	s, _ := newServer(t, Options{})
	release := s.Hold()
	p := &plugin{synced: make(chan struct{})}
	st, err := stub.New(p, stub.WithPluginName("x"), stub.WithPluginIdx("10"), stub.WithSocketPath(s.opt.Socket), stub.WithOnClose(func() {}))
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Start(bg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Stop)
	select {
	case <-p.synced:
		t.Error("the plugin was not held off")
	case <-time.After(limit / 4):
	}
	release()
	select {
	case <-p.synced:
	case <-time.After(5 * time.Minute):
		t.Error("the plugin was held off for ever")
	}
}

func TestPreinstalledPlugin(t *testing.T) {
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	plugins, configs, witness := filepath.Join(dir, "plugins"), filepath.Join(dir, "conf.d"), filepath.Join(dir, "witness")
	for _, d := range []string{plugins, configs} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		os.Symlink(exe, filepath.Join(plugins, "10-self")),
		os.WriteFile(filepath.Join(configs, "10-self.conf"), []byte(witness), 0o600),
		execfile.Write(filepath.Join(plugins, "20-broken"), []byte("#!/bin/false\n"), 0o700),
		os.WriteFile(filepath.Join(plugins, "README"), nil, 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s, _ := newServer(t, Options{PluginDir: plugins, ConfigDir: configs})
	if got, err := os.ReadFile(witness); err != nil || string(got) != "hako" {
		t.Errorf("the plugin was configured by %q: %v", got, err)
	}
	if err := s.RunSandbox(bg, testPod()); err != nil {
		t.Error(err)
	}
}

func TestSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "nri")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "sub", "n.sock")
	s, _ := newServer(t, Options{Socket: path})
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", fi.Mode(), err)
	}
	other, err := New(Options{Socket: path, PluginDir: dir, RequestLimit: limit, RegisterLimit: limit})
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(&backend{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second server: %v", err)
	}
	s.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	other.opt.Socket = file
	if err := other.Start(&backend{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a file in its place: %v", err)
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file was removed")
	}
}
