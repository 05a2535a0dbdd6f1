package integration

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// quiet keeps the stub from writing to the test's output.
type quiet struct{}

func (quiet) Debugf(context.Context, string, ...any)           {}
func (quiet) Infof(context.Context, string, ...any)            {}
func (quiet) Warnf(_ context.Context, format string, a ...any) { slog.Debug(fmt.Sprintf(format, a...)) }
func (quiet) Errorf(_ context.Context, format string, a ...any) {
	slog.Debug(fmt.Sprintf(format, a...))
}

// nriPlugin is a plugin beside the daemon, through the real stub.
type nriPlugin struct {
	stub   stub.Stub
	ready  chan struct{}
	once   sync.Once
	mu     sync.Mutex
	calls  []string
	known  []string // containers of the synchronization, and those whose creation was told
	adjust func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error)
	run    func(context.Context) error
	sync   func()
}

func (p *nriPlugin) told(call, id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, call)
	if id != "" {
		p.known = append(p.known, id)
	}
}

func (p *nriPlugin) Synchronize(_ context.Context, _ []*api.PodSandbox, cs []*api.Container) ([]*api.ContainerUpdate, error) {
	for _, c := range cs {
		p.told("sync "+c.GetName(), c.GetId())
	}
	if p.sync != nil {
		p.sync()
	}
	p.once.Do(func() { close(p.ready) })
	return nil, nil
}

func (p *nriPlugin) RunPodSandbox(ctx context.Context, s *api.PodSandbox) error {
	p.told("run "+s.GetName(), "")
	if p.run != nil {
		return p.run(ctx)
	}
	return nil
}

func (p *nriPlugin) StopPodSandbox(_ context.Context, s *api.PodSandbox) error {
	p.told("stop "+s.GetName(), "")
	return nil
}

func (p *nriPlugin) CreateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	p.told("create "+c.GetName(), c.GetId())
	if p.adjust != nil {
		return p.adjust(c)
	}
	return nil, nil, nil
}

func (p *nriPlugin) StopContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	p.told(fmt.Sprintf("ended %s %d", c.GetName(), c.GetExitCode()), "")
	return nil, nil
}

func (p *nriPlugin) has(call string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Contains(p.calls, call)
}

// join connects the plugin and waits until it has been brought up to date.
func (p *nriPlugin) join(t *testing.T, socket, index string) {
	t.Helper()
	p.ready = make(chan struct{})
	var err error
	p.stub, err = stub.New(p, stub.WithPluginName("test"), stub.WithPluginIdx(index), stub.WithSocketPath(socket),
		stub.WithLogger(quiet{}), stub.WithOnClose(func() {}))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.stub.Start(ctx(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.stub.Stop)
	select {
	case <-p.ready:
	case <-time.After(5 * time.Minute):
		t.Fatal("the plugin was not brought up to date")
	}
}

// ownWithNRI is a daemon that serves plugins.
func ownWithNRI(t *testing.T) (n *node, k *kubelet, socket string) {
	t.Helper()
	needs(t, "docker")
	cdi := t.TempDir()
	err := os.WriteFile(filepath.Join(cdi, "hako.json"), []byte(`{"cdiVersion":"0.6.0","kind":"hako.test/thing","devices":[
		{"name":"one","containerEdits":{"env":["THING=one"],"deviceNodes":[{"path":"/dev/thing","hostPath":"/dev/full"}]}}]}`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(cdi, "nri.sock")
	n = own(t, "--nri-socket", socket, "--nri-plugin-dir", t.TempDir(), "--cdi-spec-dirs", cdi, "--nri-timeout", "8")
	return n, newKubelet(t, n), socket
}

func TestNRIAdjustsContainers(t *testing.T) {
	n, k, socket := ownWithNRI(t)
	shared := t.TempDir()
	if err := os.WriteFile(filepath.Join(shared, "f"), []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	hookFile := filepath.Join(shared, "hook")
	var first string
	p := &nriPlugin{}
	p.adjust = func(c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
		switch c.GetName() {
		case "adjusted":
			first = c.GetId()
			a := &api.ContainerAdjustment{}
			a.AddEnv("PLUGIN", "was here")
			a.RemoveEnv("HOSTNAME")
			a.AddAnnotation("hako.test/plugin", "yes")
			a.AddMount(&api.Mount{Destination: "/shared", Type: "bind", Source: shared, Options: []string{"rbind", "ro"}})
			a.AddDevice(&api.LinuxDevice{Path: "/dev/mine", Type: "c", Major: 1, Minor: 5, FileMode: api.FileMode(os.FileMode(0o666))})
			a.AddCDIDevice(&api.CDIDevice{Name: "hako.test/thing=one"})
			a.AddHooks(&api.Hooks{CreateRuntime: []*api.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > " + hookFile}}}})
			a.AddRlimit("RLIMIT_NOFILE", 77, 77)
			a.SetLinuxMemoryLimit(48 << 20)
			a.SetLinuxPidLimits(99)
			score := 555
			a.SetLinuxOomScoreAdj(&score)
			a.SetLinuxSysctl("net.ipv4.ip_default_ttl", "99")
			a.SetArgs([]string{"sh", "-c", "echo by the plugin; exec sleep 1000"})
			a.SetLinuxSeccompPolicy(&api.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW",
				Syscalls: []*api.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: "SCMP_ACT_ERRNO", ErrnoRet: api.UInt32(uint32(syscall.EOWNERDEAD))}}})
			a.AddOrReplaceNamespace(&api.LinuxNamespace{Type: "uts"}) // its own, not the pod's
			return a, nil, nil
		case "second":
			u := &api.ContainerUpdate{}
			u.SetContainerId(first)
			u.SetLinuxCPUShares(333)
			return nil, []*api.ContainerUpdate{u}, nil
		case "wrong":
			a := &api.ContainerAdjustment{}
			a.AddMount(&api.Mount{Destination: "/x", Type: "bind", Source: "/no/such/path"})
			return a, nil, nil
		case "refused":
			return nil, nil, errors.New("not on my node")
		}
		return nil, nil, nil
	}
	p.join(t, socket, "10")
	pc := k.config("nri", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	id := k.create(pod, pc, "adjusted", "sleep", "1")
	if first != id || !p.has("run nri") {
		t.Fatalf("the plugin was told %q", p.calls)
	}
	// What the plugin made of it is kept over a restart before its first start.
	if err := n.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	p.stub.Stop()
	p.once = sync.Once{}
	p.join(t, socket, "10")
	if !p.has("sync adjusted") {
		t.Errorf("after the restart the plugin was told %q", p.calls)
	}
	if _, err := k.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	for script, want := range map[string]string{
		"tr '\\0' '\\n' </proc/1/environ | grep -e PLUGIN -e HOSTNAME -e THING | sort": "PLUGIN=was here\nTHING=one",
		"cat /shared/f; touch /shared/g 2>&1 | grep -c Read-only":                      "from the host1",
		"head -c 3 /dev/mine | wc -c":                                                  "3",
		"echo x 2>/dev/null >/dev/thing || echo full":                                  "full",
		"grep 'open files' /proc/1/limits | tr -s ' '":                                 "Max open files 77 77 files",
		"cat /proc/1/oom_score_adj":                                                    "555",
		"cat /proc/sys/net/ipv4/ip_default_ttl":                                        "99",
		"tr '\\0' ' ' </proc/1/cmdline":                                                "sleep 1000",
		"mkdir /tmp/x 2>&1 | grep -c 'Owner died'":                                     "1",
	} {
		// The kernel shows the arguments and the environment of a program a moment after its start.
		eventually(t, fmt.Sprintf("%s: %q", script, want), func() bool { return k.sh(id, script) == want })
	}
	if b, err := os.ReadFile(hookFile); err != nil || !strings.Contains(string(b), id) {
		t.Errorf("the hook wrote %q, %v", b, err)
	}
	if s := k.status(id); s.Resources.Linux.MemoryLimitInBytes != 48<<20 || s.Annotations["hako.test/plugin"] != "" {
		t.Errorf("status: %v", s)
	}
	eventually(t, "the plugin's own arguments", func() bool { return strings.Contains(k.log("adjusted"), "by the plugin") })

	k.run(pod, pc, "second", "sleep", "1000")
	if got := k.status(id).Resources.Linux.CpuShares; got != 333 {
		t.Errorf("updated by the creation of another: %d shares", got)
	}
	u := &api.ContainerUpdate{}
	u.SetContainerId(id)
	u.SetLinuxMemoryLimit(40 << 20)
	if failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{u}); err != nil || len(failed) != 0 {
		t.Errorf("update out of its own: %v, %v", failed, err)
	}
	if got := k.status(id).Resources.Linux.MemoryLimitInBytes; got != 40<<20 {
		t.Errorf("updated out of its own: %d", got)
	}
	request := func(name string) error {
		_, err := k.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: pc, Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: testImage}, Command: []string{"true"},
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}}}})
		return err
	}
	if err := request("wrong"); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "source of mount /x") {
		t.Errorf("an impossible adjustment: %v", err)
	}
	if err := request("refused"); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "not on my node") {
		t.Errorf("refused: %v", err)
	}
	k.end(pod)
	for _, call := range []string{"ended adjusted 137", "ended second 137", "stop nri"} {
		if !p.has(call) {
			t.Errorf("%s was not told: %q", call, p.calls)
		}
	}
}

// TestNRISynchronization: a plugin that comes while containers are made misses none, and one
// that hangs or dies holds up nobody for longer than its limit.
func TestNRISynchronization(t *testing.T) {
	_, k, socket := ownWithNRI(t)
	pc := k.config("sync", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	var mu sync.Mutex
	var made []string
	stop := make(chan struct{})
	var makers sync.WaitGroup
	for m := range 4 {
		makers.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				id := k.create(pod, pc, fmt.Sprintf("m%d-%d", m, i), "true")
				mu.Lock()
				made = append(made, id)
				mu.Unlock()
			}
		})
	}
	var plugins []*nriPlugin
	for i := range 5 {
		p := &nriPlugin{sync: func() { time.Sleep(50 * time.Millisecond) }}
		p.join(t, socket, fmt.Sprint(10+i))
		plugins = append(plugins, p)
	}
	eventually(t, "some containers", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(made) >= 5
	})
	close(stop)
	makers.Wait()
	for i, p := range plugins {
		for _, id := range made {
			if got := len(slices.DeleteFunc(slices.Clone(p.known), func(k string) bool { return k != id })); got != 1 {
				t.Errorf("plugin %d was told %d times of container %s", i, got, id)
			}
		}
	}

	over := make(chan struct{}) // until then it hangs, and whoever waited for it would, too
	defer close(over)
	hung := &nriPlugin{run: func(context.Context) error { <-over; return nil }}
	hung.join(t, socket, "90")
	start := time.Now()
	k.end(k.runPod(k.config("hung", cri.NamespaceMode_CONTAINER)))
	if took := time.Since(start); took < time.Second {
		t.Errorf("with a plugin that hangs a pod took %v: it was not asked", took)
	}
	k.end(k.runPod(k.config("again", cri.NamespaceMode_CONTAINER)))
	if hung.has("run again") {
		t.Error("a plugin that was dropped is asked again")
	}
	k.end(pod)
}
