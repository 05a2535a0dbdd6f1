package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	callLimit = 2 * time.Minute // the kubelet's
	lifeLimit = 5 * time.Minute
	exitCode  = 3
	script    = `trap "exit 3" TERM; touch /up; i=0; while :; do echo $i; i=$((i+1)); sleep 0.2 & wait $!; done`
	probe     = `until [ -e /up ]; do sleep 0.02; done; echo hi`
)

// life is one pod with one container.
type life struct {
	*driver
	name   string
	config *cri.PodSandboxConfig

	pod, container string
	startedAt      int64
	probed         bool // its container is known to run
	stopping       bool // a stop was asked for
	ended          bool // the exit code was right
}

func (d *driver) newLife(name string, i int) *life {
	ns := &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}
	if d.net == "host" {
		ns.Network = cri.NamespaceMode_NODE
	}
	if i%3 == 2 {
		ns.Pid = cri.NamespaceMode_POD
	}
	parent := ""
	if i%2 == 1 {
		parent = d.cgroup
	}
	return &life{driver: d, name: name, config: &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: "uid-" + name},
		Labels:   map[string]string{"pod": name}, LogDirectory: d.logs,
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: parent, SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: ns}},
	}}
}

// timed makes one call.
func timed[Q, R any](ctx context.Context, l *life, name string, call func(context.Context, Q, ...grpc.CallOption) (R, error), req Q) (R, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	start := time.Now()
	resp, err := call(ctx, req)
	if err == nil {
		l.times.add(name, time.Since(start))
		return resp, nil
	}
	return resp, fmt.Errorf("%s: %w", name, err)
}

// live brings the pod from what is there to its end.
func (l *life) live(ctx context.Context) error {
	return l.until(ctx, func() (bool, error) {
		if !l.ended {
			if up, err := l.step(ctx); !up || err != nil {
				return false, err
			}
			return false, l.end(ctx)
		}
		if _, err := timed(ctx, l, "StopPodSandbox", l.StopPodSandbox, &cri.StopPodSandboxRequest{PodSandboxId: l.pod}); err != nil {
			return false, err
		}
		if _, err := timed(ctx, l, "RemovePodSandbox", l.RemovePodSandbox, &cri.RemovePodSandboxRequest{PodSandboxId: l.pod}); err != nil {
			return false, err
		}
		return true, nil
	})
}

// up brings the pod to where its container runs.
func (l *life) up(ctx context.Context) error {
	return l.until(ctx, func() (bool, error) { return l.step(ctx) })
}

// until repeats f until it is done. A daemon that went away is waited for: nothing that
// is told of it then may be wrong.
func (l *life) until(ctx context.Context, f func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, lifeLimit)
	defer cancel()
	for {
		done, err := f()
		switch {
		case err == nil && done:
			return nil
		case err == nil:
		case status.Code(err) == codes.Unavailable && l.kill > 0:
			if werr := l.daemon.wait(ctx); werr != nil {
				return fmt.Errorf("%w, and then %w", err, werr)
			}
		default:
			return fmt.Errorf("%s: %w", l.name, err)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", l.name, ctx.Err())
		}
	}
}

// step does what comes next on the way up, from what the daemon tells. It is done when the container runs
// and answers, or has been stopped.
func (l *life) step(ctx context.Context) (up bool, err error) {
	pods, err := timed(ctx, l, "ListPodSandbox", l.ListPodSandbox, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{"pod": l.name}}})
	switch {
	case err != nil:
		return false, err
	case len(pods.Items) > 1:
		return false, fmt.Errorf("%d sandboxes: %v", len(pods.Items), pods.Items)
	case l.container != "" && (len(pods.Items) == 0 || pods.Items[0].Id != l.pod || pods.Items[0].State != cri.PodSandboxState_SANDBOX_READY):
		return false, fmt.Errorf("the sandbox %s of a running container was lost: %v", l.pod, pods.Items)
	case len(pods.Items) == 0:
		resp, err := timed(ctx, l, "RunPodSandbox", l.RunPodSandbox, &cri.RunPodSandboxRequest{Config: l.config})
		if err != nil {
			return false, err
		}
		l.pod = resp.PodSandboxId
		fmt.Fprintln(os.Stderr, "pods: sandbox", l.name, l.pod)
		return false, nil
	case pods.Items[0].State != cri.PodSandboxState_SANDBOX_READY:
		_, err := timed(ctx, l, "RemovePodSandbox", l.RemovePodSandbox, &cri.RemovePodSandboxRequest{PodSandboxId: pods.Items[0].Id})
		return false, err
	}
	l.pod = pods.Items[0].Id
	list, err := timed(ctx, l, "ListContainers", l.ListContainers, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: l.pod}})
	switch {
	case err != nil:
		return false, err
	case len(list.Containers) > 1:
		return false, fmt.Errorf("%d containers: %v", len(list.Containers), list.Containers)
	case l.container != "" && (len(list.Containers) == 0 || list.Containers[0].Id != l.container):
		return false, fmt.Errorf("container %s was lost: %v", l.container, list.Containers)
	case len(list.Containers) == 0:
		_, err := timed(ctx, l, "CreateContainer", l.CreateContainer, &cri.CreateContainerRequest{PodSandboxId: l.pod, SandboxConfig: l.config, Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"}, Image: &cri.ImageSpec{Image: l.image}, Command: []string{"sh", "-c", script},
			LogPath: l.name + ".log", Labels: map[string]string{"pod": l.name},
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: l.config.Linux.SecurityContext.NamespaceOptions}},
		}})
		return false, err
	}
	c := list.Containers[0]
	switch c.State {
	case cri.ContainerState_CONTAINER_CREATED:
		if l.container != "" {
			return false, fmt.Errorf("container %s, which ran, was not started", c.Id)
		}
		_, err := timed(ctx, l, "StartContainer", l.StartContainer, &cri.StartContainerRequest{ContainerId: c.Id})
		return false, err
	case cri.ContainerState_CONTAINER_RUNNING:
		if l.probed {
			return true, nil
		}
		resp, err := timed(ctx, l, "ExecSync", l.ExecSync, &cri.ExecSyncRequest{ContainerId: c.Id, Cmd: []string{"sh", "-c", probe}, Timeout: 60})
		if err != nil {
			return false, err
		}
		if string(resp.Stdout) != "hi\n" || resp.ExitCode != 0 {
			return false, fmt.Errorf("exec gave %q, %q and code %d", resp.Stdout, resp.Stderr, resp.ExitCode)
		}
		st, err := l.status(ctx, c.Id)
		if err != nil {
			return false, err
		}
		l.container, l.startedAt, l.probed = c.Id, st.StartedAt, true
		return true, nil
	}
	if !l.stopping {
		st, err := l.status(ctx, c.Id)
		return false, fmt.Errorf("container %s ended by itself: %v %w", c.Id, st, err)
	}
	return true, nil
}

// end stops the container and compares its exit code.
func (l *life) end(ctx context.Context) error {
	l.stopping = true
	if _, err := timed(ctx, l, "StopContainer", l.StopContainer, &cri.StopContainerRequest{ContainerId: l.container, Timeout: 30}); err != nil {
		return err
	}
	st, err := l.status(ctx, l.container)
	if err != nil {
		return err
	}
	if st.State != cri.ContainerState_CONTAINER_EXITED || st.ExitCode != exitCode || st.StartedAt != l.startedAt || st.FinishedAt < st.StartedAt {
		return fmt.Errorf("stopped, and then: %v", st)
	}
	l.ended = true
	return nil
}

// check tells whether the container is the same that it was.
func (l *life) check(ctx context.Context) error {
	st, err := l.status(ctx, l.container)
	if err != nil {
		return fmt.Errorf("%s: %w", l.name, err)
	}
	if st.State != cri.ContainerState_CONTAINER_RUNNING || st.StartedAt != l.startedAt {
		return fmt.Errorf("%s, which runs on: %v", l.name, st)
	}
	return nil
}

func (l *life) status(ctx context.Context, id string) (*cri.ContainerStatus, error) {
	resp, err := timed(ctx, l, "ContainerStatus", l.ContainerStatus, &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		return nil, err
	}
	return resp.Status, nil
}
