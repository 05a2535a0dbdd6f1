package integration

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestPodsKilledAtRandom kills the daemon at random points while 8 clients let pods live, each
// as a kubelet would: it lists what there is, and asks again. Whatever a client was told stays
// true, pods that run are not touched, no exit code is wrong, and nothing is left.
func TestPodsKilledAtRandom(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	const kills, clients = 20, 8
	type resident struct {
		pod, container string
		started        int64
	}
	var residents []resident
	for _, pid := range []cri.NamespaceMode{cri.NamespaceMode_CONTAINER, cri.NamespaceMode_POD} {
		pc := k.config("stays"+strings.ToLower(pid.String()), pid)
		r := resident{pod: k.runPod(pc)}
		r.container = k.run(r.pod, pc, "stays"+pid.String(), "sleep", "1000")
		r.started = k.status(r.container).StartedAt
		residents = append(residents, r)
	}
	n.killAtRandom(t, kills, clients, k.live, func(kill int) {
		for _, r := range residents {
			if s := k.podStatus(r.pod); s.State != cri.PodSandboxState_SANDBOX_READY {
				t.Errorf("after kill %d: %v", kill, s)
			}
			if s := k.status(r.container); s.State != cri.ContainerState_CONTAINER_RUNNING || s.StartedAt != r.started {
				t.Errorf("after kill %d: %v", kill, s)
			}
		}
	})
	for _, r := range residents {
		k.end(r.pod)
	}
	if l, err := k.ListPodSandbox(ctx(t), &cri.ListPodSandboxRequest{}); err != nil || len(l.Items) != 0 {
		t.Errorf("sandboxes left: %v, %v", l, err)
	}
}

// lost tells that a call had no answer: the daemon went away, or is not there yet.
func lost(err error) bool {
	c := status.Code(err)
	return c == codes.Unavailable || c == codes.Canceled || c == codes.Unknown && strings.Contains(err.Error(), "shutting down")
}

// ask repeats a call until it has an answer.
func ask[Q, A any](k *kubelet, call func(context.Context, *Q, ...grpc.CallOption) (*A, error), q *Q) (*A, error) {
	for deadline := time.Now().Add(hangLimit); ; time.Sleep(20 * time.Millisecond) {
		c, cancel := context.WithTimeout(context.Background(), hangLimit)
		a, err := call(c, q)
		cancel()
		if err == nil || !lost(err) || time.Now().After(deadline) {
			return a, err
		}
	}
}

// live takes a pod with one container from its run to its removal.
func (k *kubelet) live(name string, exit int) bool {
	fail := func(what string, args ...any) bool {
		k.t.Errorf("%s: %s", name, fmt.Sprintf(what, args...))
		return false
	}
	pc := k.config(name, cri.NamespaceMode_CONTAINER)
	if exit%4 == 0 {
		pc.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
	}
	// A run whose answer was lost may have ended well: the kubelet looks at the list first.
	var pod string
	for deadline := time.Now().Add(hangLimit); pod == ""; {
		l, err := ask(k, k.ListPodSandbox, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: pc.Labels}})
		if err != nil || time.Now().After(deadline) {
			return fail("list: %v", err)
		}
		if len(l.Items) > 0 {
			if pod = l.Items[0].Id; l.Items[0].State != cri.PodSandboxState_SANDBOX_READY {
				return fail("is %v before anybody stopped it", l.Items[0])
			}
			break
		}
		r, err := ask(k, k.RunPodSandbox, &cri.RunPodSandboxRequest{Config: pc})
		if err != nil && status.Code(err) != codes.FailedPrecondition {
			return fail("run: %v", err)
		}
		pod = r.GetPodSandboxId()
	}
	create := &cri.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: pc, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: testImage}, LogPath: name + ".log",
		Command: []string{"sh", "-c", fmt.Sprintf("echo %s; sleep 0.3; exit %d", name, exit)},
		Linux:   &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: pc.Linux.SecurityContext.NamespaceOptions}},
	}}
	if c, err := ask(k, k.CreateContainer, create); err != nil && status.Code(err) != codes.FailedPrecondition {
		return fail("create: %v %v", c, err)
	}
	l, err := ask(k, k.ListContainers, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: pod}})
	if err != nil || len(l.Containers) != 1 {
		return fail("containers: %v, %v", l, err)
	}
	id := l.Containers[0].Id
	for deadline := time.Now().Add(hangLimit); ; time.Sleep(20 * time.Millisecond) {
		r, err := ask(k, k.ContainerStatus, &cri.ContainerStatusRequest{ContainerId: id})
		if err != nil || time.Now().After(deadline) {
			return fail("status: %v, %v", r, err)
		}
		switch s := r.Status; s.State {
		case cri.ContainerState_CONTAINER_CREATED:
			if _, err := ask(k, k.StartContainer, &cri.StartContainerRequest{ContainerId: id}); err != nil && status.Code(err) != codes.FailedPrecondition {
				return fail("start: %v", err)
			}
			continue
		case cri.ContainerState_CONTAINER_RUNNING:
			continue
		default:
			if s.ExitCode != int32(exit) || s.Reason != "Error" || s.FinishedAt-s.StartedAt < int64(300*time.Millisecond) {
				return fail("ended with %v, want %d", s, exit)
			}
		}
		break
	}
	if log := k.log(name); !strings.HasSuffix(log, " stdout F "+name+"\n") {
		return fail("log %q", log)
	}
	if _, err := ask(k, k.StopPodSandbox, &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		return fail("stop: %v", err)
	}
	if _, err := ask(k, k.RemovePodSandbox, &cri.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		return fail("remove: %v", err)
	}
	if _, err := ask(k, k.PodSandboxStatus, &cri.PodSandboxStatusRequest{PodSandboxId: pod}); status.Code(err) != codes.NotFound {
		return fail("was removed, and is there: %v", err)
	}
	return true
}
