package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

func sandbox(id string, state engine.SandboxState, labels map[string]string) engine.Sandbox {
	return engine.Sandbox{ID: id, State: state, Created: time.Unix(9, 1), IPs: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")},
		Config: engine.SandboxConfig{Name: "n-" + id, Namespace: "ns", UID: "u", Network: engine.NamespacePod, PID: engine.NamespaceContainer, IPC: engine.NamespacePod, Labels: labels}}
}

func container(id, sandbox string, state engine.State) engine.Container {
	return engine.Container{ID: id, Created: time.Unix(10, 0), ImageID: digest.FromString("i").String(), ImageName: "img", State: state,
		Config: engine.Config{Labels: map[string]string{"l": id}, Pod: &engine.PodMember{Sandbox: sandbox, Name: "c-" + id}}}
}

// A container is listed as it is, in the answer of a list and in the stream, also when its state has changed since it was listed first.
func TestContainerList(t *testing.T) {
	f := &fake{}
	r, _ := clients(t, f)
	var want []*api.Container
	for i := range 2 * partLength {
		c := container(fmt.Sprintf("c%d", i), "s", engine.State{})
		c.Config.Annotations = map[string]string{"a": strings.Repeat("x", i)}
		c.Config.Pod.Attempt, c.Config.Pod.UserImage, c.Config.Pod.ImageAnnotations = uint32(i), "user", map[string]string{"i": "1"}
		f.containers = append(f.containers, c)
		want = append(want, &api.Container{Id: c.ID, PodSandboxId: "s", Metadata: &api.ContainerMetadata{Name: "c-" + c.ID, Attempt: uint32(i)},
			Image:    &api.ImageSpec{Image: "img", UserSpecifiedImage: "user", Annotations: map[string]string{"i": "1"}},
			ImageRef: c.ImageID, ImageId: c.ImageID, CreatedAt: c.Created.UnixNano(), Labels: c.Config.Labels, Annotations: c.Config.Annotations})
	}
	states := map[engine.Status]api.ContainerState{
		engine.StatusCreated: api.ContainerState_CONTAINER_CREATED, engine.StatusRunning: api.ContainerState_CONTAINER_RUNNING,
		engine.StatusExited: api.ContainerState_CONTAINER_EXITED, "": api.ContainerState_CONTAINER_UNKNOWN,
	}
	check := func(what string, got []*api.Container) {
		t.Helper()
		if len(got) != len(want) {
			t.Fatalf("%s: %d containers", what, len(got))
		}
		for i := range want {
			if !proto.Equal(got[i], want[i]) {
				t.Fatalf("%s:\n%v\n%v", what, got[i], want[i])
			}
		}
	}
	for shift := range len(states) {
		order := slices.Sorted(maps.Keys(states))
		for i := range f.containers {
			s := order[(i+i/3+shift)%len(order)]
			f.containers[i].State.Status, want[i].State = s, states[s]
		}
		l, err := r.ListContainers(t.Context(), &api.ListContainersRequest{})
		if err != nil {
			t.Fatal(err)
		}
		check("list", l.Containers)
		stream, err := r.StreamContainers(t.Context(), &api.StreamContainersRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var all []*api.Container
		for {
			m, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			all = append(all, m.Containers...)
		}
		check("stream", all)
	}
}

// TestEmptyRequests calls every method with a request in which nothing is set, and with one in
// which every message is there and empty: fields may be missing, and nothing panics.
func TestEmptyRequests(t *testing.T) {
	f := &fake{events: make(chan engine.Event), exec: func(context.Context, []string, time.Duration, int) (engine.ExecOutput, error) {
		return engine.ExecOutput{}, nil
	}}
	close(f.events)
	f.sandboxes = []engine.Sandbox{{ID: "s"}}
	f.containers = []engine.Container{{ID: "c", Config: engine.Config{Pod: &engine.PodMember{Sandbox: "s"}}}, {ID: "lone"}}
	f.images = []engine.ImageDetail{{}}
	conn := serve(t, f)
	services := api.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			m := methods.Get(j)
			name := fmt.Sprintf("/%s/%s", services.Get(i).FullName(), m.Name())
			for depth := range 5 {
				req := dynamicpb.NewMessage(m.Input())
				fill(req, depth)
				err := invoke(conn, name, m, req)
				if c := status.Code(err); c == codes.Internal {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
	}
}

// fill sets the messages of a request down to a depth, and ids that exist.
func fill(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		switch {
		case fd.Name() == "container_id" && fd.Kind() == protoreflect.StringKind && depth > 0:
			m.Set(fd, protoreflect.ValueOfString("c"))
		case fd.Name() == "pod_sandbox_id" && depth > 0:
			m.Set(fd, protoreflect.ValueOfString("s"))
		case fd.IsMap():
		case fd.Kind() == protoreflect.MessageKind && depth > 0 && fd.IsList():
			fill(m.Mutable(fd).List().AppendMutable().Message(), depth-1)
		case fd.Kind() == protoreflect.MessageKind && depth > 0:
			fill(m.Mutable(fd).Message(), depth-1)
		case fd.Kind() == protoreflect.EnumKind && depth > 2:
			m.Set(fd, protoreflect.ValueOfEnum(77)) // one that a newer API may have
		}
	}
}

func invoke(conn *grpc.ClientConn, name string, m protoreflect.MethodDescriptor, req proto.Message) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	resp := dynamicpb.NewMessage(m.Output())
	if !m.IsStreamingServer() {
		return conn.Invoke(ctx, name, req, resp)
	}
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, name)
	if err != nil {
		return err
	}
	if err := errors.Join(s.SendMsg(req), s.CloseSend()); err != nil {
		return err
	}
	for {
		if err := s.RecvMsg(resp); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

func TestCodes(t *testing.T) {
	for want, err := range map[codes.Code]error{
		codes.NotFound: errdefs.ErrNotFound, codes.InvalidArgument: errdefs.ErrInvalidArgument, codes.AlreadyExists: errdefs.ErrAlreadyExists,
		codes.FailedPrecondition: errdefs.ErrConflict, codes.Unavailable: errdefs.ErrUnavailable, codes.Unimplemented: errdefs.ErrNotImplemented,
		codes.ResourceExhausted: errdefs.ErrResourceExhausted, codes.DeadlineExceeded: context.DeadlineExceeded, codes.Canceled: context.Canceled,
		codes.PermissionDenied: errdefs.ErrPermissionDenied, codes.Unauthenticated: errdefs.ErrUnauthenticated, codes.Unknown: errors.New("x"),
		codes.Internal: errdefs.ErrInternal, codes.DataLoss: errdefs.ErrDataLoss, codes.OutOfRange: errdefs.ErrOutOfRange,
	} {
		st, _ := status.FromError(statusOf(fmt.Errorf("do it: %w", err)))
		if st.Code() != want || !strings.HasPrefix(st.Message(), "do it") {
			t.Errorf("%v: %v %q, want %v", err, st.Code(), st.Message(), want)
		}
	}
}

// TestUnknownObjects: what the kubelet repeats until it succeeds is no error for what is gone.
func TestUnknownObjects(t *testing.T) {
	ctx := t.Context()
	f := &fake{containers: []engine.Container{{ID: "lone"}}}
	r, i := clients(t, f)
	for name, err := range map[string]error{
		"stop sandbox":   second(r.StopPodSandbox(ctx, &api.StopPodSandboxRequest{PodSandboxId: "x"})),
		"remove sandbox": second(r.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{PodSandboxId: "x"})),
		"stop":           second(r.StopContainer(ctx, &api.StopContainerRequest{ContainerId: "x"})),
		"remove":         second(r.RemoveContainer(ctx, &api.RemoveContainerRequest{ContainerId: "x"})),
		"remove lone":    second(r.RemoveContainer(ctx, &api.RemoveContainerRequest{ContainerId: "lone"})),
		"image":          second(i.ImageStatus(ctx, &api.ImageStatusRequest{Image: &api.ImageSpec{Image: "x"}})),
		"remove image":   second(i.RemoveImage(ctx, &api.RemoveImageRequest{Image: &api.ImageSpec{Image: "x"}})),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, err := range map[string]error{
		"sandbox":        second(r.PodSandboxStatus(ctx, &api.PodSandboxStatusRequest{PodSandboxId: "x"})),
		"container":      second(r.ContainerStatus(ctx, &api.ContainerStatusRequest{ContainerId: "x"})),
		"lone container": second(r.ContainerStatus(ctx, &api.ContainerStatusRequest{ContainerId: "lone"})),
		"start":          second(r.StartContainer(ctx, &api.StartContainerRequest{ContainerId: "x"})),
		"create":         second(r.CreateContainer(ctx, &api.CreateContainerRequest{PodSandboxId: "x"})),
		"exec":           second(r.ExecSync(ctx, &api.ExecSyncRequest{ContainerId: "x"})),
		"log":            second(r.ReopenContainerLog(ctx, &api.ReopenContainerLogRequest{ContainerId: "x"})),
		"update":         second(r.UpdateContainerResources(ctx, &api.UpdateContainerResourcesRequest{ContainerId: "x"})),
		"stats":          second(r.ContainerStats(ctx, &api.ContainerStatsRequest{ContainerId: "x"})),
		"sandbox stats":  second(r.PodSandboxStats(ctx, &api.PodSandboxStatsRequest{PodSandboxId: "x"})),
	} {
		if status.Code(err) != codes.NotFound {
			t.Errorf("%s: %v", name, err)
		}
	}
	if l, err := r.ListContainers(ctx, &api.ListContainersRequest{}); err != nil || len(l.Containers) != 0 {
		t.Errorf("a container in no pod is listed: %v, %v", l, err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestRunPodSandbox(t *testing.T) {
	ctx := t.Context()
	f := &fake{}
	r, _ := clients(t, f)
	req := &api.RunPodSandboxRequest{RuntimeHandler: "runc", Config: &api.PodSandboxConfig{
		Metadata: &api.PodSandboxMetadata{Name: "n", Namespace: "ns", Uid: "u", Attempt: 3}, Hostname: "h", LogDirectory: "/l",
		DnsConfig: &api.DNSConfig{Servers: []string{"1.1.1.1"}}, Labels: map[string]string{"a": "b"}, Annotations: map[string]string{"c": "d"},
		PortMappings: []*api.PortMapping{{Protocol: api.Protocol_SCTP, ContainerPort: 80, HostPort: 8080, HostIp: "::1"}, {ContainerPort: 81, HostIp: "0.0.0.0"}},
		Linux: &api.LinuxPodSandboxConfig{CgroupParent: "/p", Sysctls: map[string]string{"k": "v"}, SecurityContext: &api.LinuxSandboxSecurityContext{
			NamespaceOptions: &api.NamespaceOption{Network: api.NamespaceMode_NODE, Pid: api.NamespaceMode_CONTAINER, UsernsOptions: &api.UserNamespace{
				Uids: []*api.IDMapping{{HostId: 65536, Length: 65536}}, Gids: []*api.IDMapping{{HostId: 65536, Length: 65536}},
			}},
		}, Overhead: &api.LinuxContainerResources{MemoryLimitInBytes: 5}},
	}}
	if _, err := r.RunPodSandbox(ctx, req); err != nil {
		t.Fatal(err)
	}
	maps := []engine.IDMap{{Container: 0, Host: 65536, Size: 65536}}
	want := engine.SandboxConfig{
		Name: "n", Namespace: "ns", UID: "u", Attempt: 3, Hostname: "h", LogDirectory: "/l", DNS: &engine.DNS{Servers: []string{"1.1.1.1"}},
		Labels: map[string]string{"a": "b"}, Annotations: map[string]string{"c": "d"}, CgroupParent: "/p", Sysctls: map[string]string{"k": "v"},
		Ports:   []engine.PortMapping{{Proto: "sctp", ContainerPort: 80, HostPort: 8080, HostIP: netip.MustParseAddr("::1")}, {Proto: "tcp", ContainerPort: 81}},
		Network: engine.NamespaceNode, PID: engine.NamespaceContainer, IPC: engine.NamespacePod, Runtime: "runc",
		Userns: &engine.Userns{UIDs: maps, GIDs: maps}, Overhead: &engine.Resources{Memory: 5},
	}
	if !reflect.DeepEqual(*f.ran, want) {
		t.Errorf("got  %+v\nwant %+v", *f.ran, want)
	}
	for name, change := range map[string]func(c *api.PodSandboxConfig){
		"no metadata": func(c *api.PodSandboxConfig) { c.Metadata = nil },
		"port":        func(c *api.PodSandboxConfig) { c.PortMappings[0].HostPort = 1 << 20 },
		"host ip":     func(c *api.PodSandboxConfig) { c.PortMappings[0].HostIp = "x" },
		"group without user": func(c *api.PodSandboxConfig) {
			c.Linux.SecurityContext.RunAsGroup = &api.Int64Value{Value: 1}
		},
		"userns of container": func(c *api.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions.Mode = api.NamespaceMode_CONTAINER
		},
	} {
		bad := proto.Clone(req).(*api.RunPodSandboxRequest)
		change(bad.Config)
		if _, err := r.RunPodSandbox(ctx, bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCreateContainer(t *testing.T) {
	ctx := t.Context()
	f := &fake{sandboxes: []engine.Sandbox{sandbox("s1", engine.SandboxReady, nil)}}
	f.sandboxes[0].Config.LogDirectory = "/logs"
	r, _ := clients(t, f)
	profile := filepath.Join(t.TempDir(), "p.json")
	if err := os.WriteFile(profile, []byte(`{"defaultAction":"SCMP_ACT_ALLOW"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	req := &api.CreateContainerRequest{PodSandboxId: "s1", Config: &api.ContainerConfig{
		Metadata: &api.ContainerMetadata{Name: "c", Attempt: 2}, Image: &api.ImageSpec{Image: "sha256:x", UserSpecifiedImage: "busybox"},
		Command: []string{"sh"}, Args: []string{"-c", "true"}, WorkingDir: "/w", Envs: []*api.KeyValue{{Key: "A", Value: []byte("b=c")}},
		LogPath: "c/0.log", Stdin: true, StopSignal: api.Signal_SIGNAL_SIGRTMINPLUS3,
		Devices:    []*api.Device{{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "rw"}},
		CDIDevices: []*api.CDIDevice{{Name: "v/c=0"}},
		Mounts: []*api.Mount{
			{ContainerPath: "/m", HostPath: "/h", Readonly: true, RecursiveReadOnly: true, MountOptions: []string{"noexec"}},
			{ContainerPath: "rel", HostPath: "/h", Propagation: api.MountPropagation_PROPAGATION_BIDIRECTIONAL},
			{ContainerPath: "/i", Image: &api.ImageSpec{Image: "img"}, ImageSubPath: "sub", Readonly: true},
		},
		Linux: &api.LinuxContainerConfig{
			Resources: &api.LinuxContainerResources{CpuShares: 2, MemoryLimitInBytes: 3, OomScoreAdj: 9, Unified: map[string]string{"a.b": "1"}, HugepageLimits: []*api.HugepageLimit{{PageSize: "2MB", Limit: 4}}},
			SecurityContext: &api.LinuxContainerSecurityContext{
				RunAsUser: &api.Int64Value{Value: 0}, SupplementalGroups: []int64{5}, SupplementalGroupsPolicy: api.SupplementalGroupsPolicy_Strict,
				NamespaceOptions: &api.NamespaceOption{Pid: api.NamespaceMode_TARGET, TargetId: "t"}, NoNewPrivs: true,
				Capabilities: &api.Capability{AddCapabilities: []string{"NET_RAW"}, AddAmbientCapabilities: []string{"KILL"}},
				Seccomp:      &api.SecurityProfile{ProfileType: api.SecurityProfile_Localhost, LocalhostRef: profile},
				MaskedPaths:  []string{"/proc/x"},
			},
		},
	}}
	if _, err := r.CreateContainer(ctx, req); err != nil {
		t.Fatal(err)
	}
	var uid int64
	want := engine.Config{
		Image: "sha256:x", Entrypoint: []string{"sh"}, Cmd: []string{"-c", "true"}, WorkingDir: "/w", Env: []string{"A=b=c"}, StopSignal: "SIGRTMIN+3",
		OpenStdin: true, AttachStdin: true, AttachStdout: true, AttachStderr: true, CapAdd: []string{"NET_RAW"}, MaskedPaths: []string{"/proc/x"}, ReadonlyPaths: []string{}, OOMScoreAdj: 9,
		SecurityOpt: []string{"no-new-privileges", `seccomp={"defaultAction":"SCMP_ACT_ALLOW"}`},
		Resources: engine.Resources{CPUShares: 2, Memory: 3, Unified: map[string]string{"a.b": "1"}, Hugepages: map[string]uint64{"2MB": 4},
			Devices: []engine.Device{{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "rw"}}},
		Mounts: []engine.Mount{
			{Kind: "bind", Source: "/h", Target: "/m", ReadOnly: true, Propagation: "rprivate", CreateSource: true, Options: []string{"noexec"}},
			{Kind: "bind", Source: "/h", Target: "/rel", Propagation: "rshared", CreateSource: true, ReadOnlyNonRecur: true},
			{Kind: "image", Source: "img", Target: "/i", Subpath: "sub", ReadOnly: true, Propagation: "rprivate", ReadOnlyNonRecur: true},
		},
		Pod: &engine.PodMember{Name: "c", Attempt: 2, LogPath: "/logs/c/0.log", UserImage: "busybox", RunAsUser: &uid, Groups: []int64{5}, StrictGroups: true,
			PID: engine.NamespaceTarget, PIDTarget: "t", AmbientCaps: []string{"KILL"}, CDIDevices: []string{"v/c=0"}, StopSignal: "SIGRTMIN+3"},
	}
	if !reflect.DeepEqual(*f.created, want) {
		t.Errorf("got  %+v %+v\nwant %+v %+v", *f.created, *f.created.Pod, want, *want.Pod)
	}
	for name, change := range map[string]func(c *api.ContainerConfig){
		"no name":               func(c *api.ContainerConfig) { c.Metadata = nil },
		"env":                   func(c *api.ContainerConfig) { c.Envs[0].Key = "A=" },
		"seccomp":               func(c *api.ContainerConfig) { c.Linux.SecurityContext.Seccomp.LocalhostRef = "/none" },
		"mount option":          func(c *api.ContainerConfig) { c.Mounts[0].MountOptions = []string{"suid"} },
		"image that is written": func(c *api.ContainerConfig) { c.Mounts[2].Readonly = false },
		"image and path":        func(c *api.ContainerConfig) { c.Mounts[2].HostPath = "/h" },
		"rro that is written":   func(c *api.ContainerConfig) { c.Mounts[0].Readonly = false },
		"rro that is shared": func(c *api.ContainerConfig) {
			c.Mounts[0].Propagation = api.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		},
		"a log elsewhere":       func(c *api.ContainerConfig) { c.LogPath = "../../x.log" },
		"a log at another root": func(c *api.ContainerConfig) { c.LogPath = "/etc/x.log" },
		"half a map":            func(c *api.ContainerConfig) { c.Mounts[0].UidMappings = []*api.IDMapping{{Length: 1}} },
	} {
		bad := proto.Clone(req).(*api.CreateContainerRequest)
		change(bad.Config)
		if _, err := r.CreateContainer(ctx, bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSeccomp: no profile at all is none, an empty one is the default.
func TestSeccomp(t *testing.T) {
	for name, c := range map[string]struct {
		sec  *api.LinuxContainerSecurityContext
		want []string
	}{
		"nothing":    {nil, []string{"seccomp=unconfined"}},
		"default":    {&api.LinuxContainerSecurityContext{Seccomp: &api.SecurityProfile{}}, nil},
		"unconfined": {&api.LinuxContainerSecurityContext{Seccomp: &api.SecurityProfile{ProfileType: api.SecurityProfile_Unconfined}}, []string{"seccomp=unconfined"}},
		"old":        {&api.LinuxContainerSecurityContext{SeccompProfilePath: "runtime/default"}, nil},                             //nolint:staticcheck // on purpose
		"old none":   {&api.LinuxContainerSecurityContext{SeccompProfilePath: "unconfined"}, []string{"seccomp=unconfined"}},       //nolint:staticcheck // on purpose
		"new wins":   {&api.LinuxContainerSecurityContext{Seccomp: &api.SecurityProfile{}, SeccompProfilePath: "unconfined"}, nil}, //nolint:staticcheck // on purpose
		"privileged": {&api.LinuxContainerSecurityContext{Privileged: true, Seccomp: &api.SecurityProfile{ProfileType: api.SecurityProfile_Localhost, LocalhostRef: "/none"}},
			[]string{"seccomp=unconfined", "apparmor=unconfined"}},
		"apparmor": {&api.LinuxContainerSecurityContext{Seccomp: &api.SecurityProfile{}, Apparmor: &api.SecurityProfile{ProfileType: api.SecurityProfile_Localhost, LocalhostRef: "p"}},
			[]string{"apparmor=p"}},
		"old apparmor": {&api.LinuxContainerSecurityContext{Seccomp: &api.SecurityProfile{}, ApparmorProfile: "localhost/q"}, []string{"apparmor=q"}}, //nolint:staticcheck // on purpose
	} {
		if got, err := profiles(c.sec); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, %v, want %v", name, got, err, c.want)
		}
	}
}

func TestSignals(t *testing.T) {
	for n, name := range api.Signal_name {
		s := api.Signal(n)
		if s == api.Signal_SIGNAL_RUNTIME_DEFAULT {
			continue
		}
		if got := wireSignal(signalName(s)); got != s {
			t.Errorf("%s became %s became %s", name, signalName(s), got)
		}
	}
	if wireSignal("") != api.Signal_SIGNAL_SIGTERM || wireSignal("term") != api.Signal_SIGNAL_SIGTERM || wireSignal("nonsense") != api.Signal_SIGNAL_RUNTIME_DEFAULT {
		t.Error("names that a user may write")
	}
}

func TestStatus(t *testing.T) {
	ctx := t.Context()
	start, end := time.Unix(20, 0), time.Unix(30, 0)
	f := &fake{sandboxes: []engine.Sandbox{sandbox("s1", engine.SandboxReady, nil)}}
	f.images = []engine.ImageDetail{{Image: engine.ImageRecord{ID: digest.FromString("i"), Names: []string{"docker.io/library/img:1"}, Digests: []string{"docker.io/library/img@sha256:1"}}}}
	r, _ := clients(t, f)
	for want, s := range map[string]engine.State{
		"CONTAINER_CREATED 0 0 0  ":                                                            {Status: engine.StatusCreated},
		"CONTAINER_RUNNING 20 0 0  ":                                                           {Status: engine.StatusRunning, StartedAt: start},
		"CONTAINER_EXITED 20 30 0 Completed ":                                                  {Status: engine.StatusExited, StartedAt: start, FinishedAt: end},
		"CONTAINER_EXITED 20 30 7 Error ":                                                      {Status: engine.StatusExited, StartedAt: start, FinishedAt: end, ExitCode: 7},
		"CONTAINER_EXITED 20 30 137 OOMKilled ":                                                {Status: engine.StatusExited, StartedAt: start, FinishedAt: end, ExitCode: 137, OOMKilled: true},
		"CONTAINER_EXITED 0 30 128 StartError no such thing":                                   {Status: engine.StatusExited, FinishedAt: end, ExitCode: 128, Error: "no such thing"},
		"CONTAINER_EXITED 20 30 255 ContainerStatusUnknown nobody saw how the container ended": {Status: engine.StatusExited, StartedAt: start, FinishedAt: end, ExitCode: 255, Lost: true},
	} {
		f.containers = []engine.Container{container("c1", "s1", s)}
		resp, err := r.ContainerStatus(ctx, &api.ContainerStatusRequest{ContainerId: "c", Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		st := resp.Status
		if got := fmt.Sprint(st.State, st.StartedAt/1e9, st.FinishedAt/1e9, st.ExitCode) + " " + st.Reason + " " + st.Message; got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		if st.ImageId != digest.FromString("i").String() || st.ImageRef != f.images[0].Digests[0] || st.Image.Image != f.images[0].Names[0] || resp.Info["info"] == "" {
			t.Errorf("status %v", resp)
		}
	}
	p, err := r.PodSandboxStatus(ctx, &api.PodSandboxStatusRequest{PodSandboxId: "s1"})
	if err != nil || p.Status.Network.Ip != "10.0.0.2" || p.Status.Network.AdditionalIps[0].Ip != "fd00::2" || len(p.ContainersStatuses) != 1 || p.Timestamp == 0 || p.Info != nil {
		t.Errorf("%v, %v", p, err)
	}
	f.containers = nil
	if p, err := r.PodSandboxStatus(ctx, &api.PodSandboxStatusRequest{PodSandboxId: "s1"}); err != nil || p.Timestamp != 0 {
		t.Errorf("a time without containers: %v, %v", p, err)
	}
	st, err := r.Status(ctx, &api.StatusRequest{Verbose: true})
	if err != nil || !st.Status.Conditions[0].Status || !st.Status.Conditions[1].Status || len(st.RuntimeHandlers) != 3 || !strings.Contains(st.Info["config"], `"stateDir":"/state"`) {
		t.Errorf("%v, %v", st, err)
	}
	f.netErr = errors.New("no configuration")
	if st, _ := r.Status(ctx, &api.StatusRequest{}); st.Status.Conditions[1].Status || st.Status.Conditions[1].Reason != "NetworkPluginNotReady" || st.Info != nil {
		t.Errorf("%v", st)
	}
	if c, err := r.RuntimeConfig(ctx, &api.RuntimeConfigRequest{}); err != nil || c.Linux.CgroupDriver != api.CgroupDriver_CGROUPFS {
		t.Errorf("%v, %v", c, err)
	}
	if _, err := r.UpdateRuntimeConfig(ctx, &api.UpdateRuntimeConfigRequest{RuntimeConfig: &api.RuntimeConfig{NetworkConfig: &api.NetworkConfig{PodCidr: "10.1.0.0/24, fd00::/64"}}}); err != nil || len(f.cidrs) != 2 {
		t.Errorf("%v, %v", f.cidrs, err)
	}
}

func TestLists(t *testing.T) {
	ctx := t.Context()
	f := &fake{}
	for i := range 600 {
		id := fmt.Sprintf("%03d", i)
		state := engine.SandboxReady
		if i%2 == 1 {
			state = engine.SandboxNotReady
		}
		f.sandboxes = append(f.sandboxes, sandbox(id, state, map[string]string{"l": id[:1]}))
		f.containers = append(f.containers, container("c"+id, id, engine.State{Status: engine.StatusRunning}))
	}
	r, i := clients(t, f)
	for want, filter := range map[int]*api.PodSandboxFilter{
		600: nil, 300: {State: &api.PodSandboxStateValue{State: api.PodSandboxState_SANDBOX_NOTREADY}}, 100: {LabelSelector: map[string]string{"l": "5"}},
		50: {LabelSelector: map[string]string{"l": "5"}, State: &api.PodSandboxStateValue{}}, 10: {Id: "12"}, 0: {Id: "x"},
	} {
		l, err := r.ListPodSandbox(ctx, &api.ListPodSandboxRequest{Filter: filter})
		if err != nil || len(l.Items) != want {
			t.Errorf("%v: %d, %v", filter, len(l.Items), err)
		}
	}
	for want, filter := range map[int]*api.ContainerFilter{
		600: {State: &api.ContainerStateValue{State: api.ContainerState_CONTAINER_RUNNING}}, 1: {PodSandboxId: "123"}, 10: {Id: "c12"},
		0: {State: &api.ContainerStateValue{}},
	} {
		l, err := r.ListContainers(ctx, &api.ListContainersRequest{Filter: filter})
		if err != nil || len(l.Containers) != want {
			t.Errorf("%v: %d, %v", filter, len(l.Containers), err)
		}
	}
	s, err := r.StreamPodSandboxes(ctx, &api.StreamPodSandboxesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if len(m.PodSandboxes) == 0 {
			t.Error("an empty message")
		}
		for _, sb := range m.PodSandboxes {
			if seen[sb.Id] {
				t.Errorf("%s is sent twice", sb.Id)
			}
			seen[sb.Id] = true
		}
	}
	if len(seen) != 600 {
		t.Errorf("%d items", len(seen))
	}
	none, err := i.StreamImages(ctx, &api.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := none.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("a stream of nothing: %v", err)
	}
	if l, err := r.ListContainerStats(ctx, &api.ListContainerStatsRequest{Filter: &api.ContainerStatsFilter{PodSandboxId: "001"}}); err != nil || len(l.Stats) != 1 || l.Stats[0].Cpu.UsageCoreNanoSeconds.Value != 5 {
		t.Errorf("%v, %v", l, err)
	}
	if p, err := r.PodSandboxStats(ctx, &api.PodSandboxStatsRequest{PodSandboxId: "001"}); err != nil || p.Stats.Linux.Network.DefaultInterface.RxBytes.Value != 7 || len(p.Stats.Linux.Network.Interfaces) != 1 {
		t.Errorf("%v, %v", p, err)
	}
}

func TestStop(t *testing.T) {
	f := &fake{containers: []engine.Container{container("c1", "s1", engine.State{})}}
	r, _ := clients(t, f)
	for timeout, want := range map[int64]string{30: " 30", 0: "SIGKILL 10", -5: "SIGKILL 10"} {
		if _, err := r.StopContainer(t.Context(), &api.StopContainerRequest{ContainerId: "c1", Timeout: timeout}); err != nil {
			t.Error(err)
		}
		if got := fmt.Sprint(f.stopped.Signal, " ", *f.stopped.Timeout); got != want {
			t.Errorf("timeout %d: %q, want %q", timeout, got, want)
		}
	}
	f.err = engine.ErrNotModified
	if _, err := r.StopContainer(t.Context(), &api.StopContainerRequest{ContainerId: "c1"}); err != nil {
		t.Errorf("one that has ended: %v", err)
	}
}

func TestExecSync(t *testing.T) {
	f := &fake{containers: []engine.Container{container("c1", "s1", engine.State{})}}
	r, _ := clients(t, f)
	f.exec = func(_ context.Context, cmd []string, timeout time.Duration, limit int) (engine.ExecOutput, error) {
		if timeout != 3*time.Second || cmd[0] != "x" {
			t.Errorf("%v %v", cmd, timeout)
		}
		return engine.ExecOutput{Stdout: make([]byte, limit-10), Stderr: make([]byte, 10), ExitCode: 4}, nil
	}
	resp, err := r.ExecSync(t.Context(), &api.ExecSyncRequest{ContainerId: "c1", Cmd: []string{"x"}, Timeout: 3})
	if err != nil || resp.ExitCode != 4 || len(resp.Stdout) < 15<<20 {
		t.Errorf("the most output that there may be: %d bytes, %v", len(resp.GetStdout()), err)
	}
	f.exec = func(context.Context, []string, time.Duration, int) (engine.ExecOutput, error) {
		return engine.ExecOutput{}, fmt.Errorf("too long: %w", context.DeadlineExceeded)
	}
	if _, err := r.ExecSync(t.Context(), &api.ExecSyncRequest{ContainerId: "c1", Cmd: []string{"x"}}); status.Code(err) != codes.DeadlineExceeded {
		t.Error(err)
	}
	if _, err := r.ExecSync(t.Context(), &api.ExecSyncRequest{ContainerId: "c1"}); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
}

func TestEvents(t *testing.T) {
	f := &fake{events: make(chan engine.Event, 8), sandboxes: []engine.Sandbox{sandbox("s1", engine.SandboxReady, nil)}}
	f.containers = []engine.Container{container("c1", "s1", engine.State{Status: engine.StatusRunning})}
	r, _ := clients(t, f)
	for _, e := range []engine.Event{
		{Type: engine.EventSandbox, Action: "start", ID: "s1"},
		{Type: "container", Action: "start", ID: "lone"},
		{Type: "container", Action: "exec_create: x", ID: "c1", Attributes: map[string]string{engine.AttrSandbox: "s1"}},
		{Type: "container", Action: "die", ID: "c1", Attributes: map[string]string{engine.AttrSandbox: "s1"}, Time: time.Unix(5, 0)},
		{Type: engine.EventSandbox, Action: "destroy", ID: "s2", Attributes: map[string]string{engine.AttrPodName: "gone"}},
	} {
		f.events <- e
	}
	close(f.events)
	s, err := r.GetContainerEvents(t.Context(), &api.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(e.ContainerId, " ", e.ContainerEventType, " ", e.PodSandboxStatus.GetMetadata().GetName(), " ", len(e.ContainersStatuses)))
	}
	want := []string{"s1 CONTAINER_STARTED_EVENT n-s1 1", "c1 CONTAINER_STOPPED_EVENT n-s1 1", "s2 CONTAINER_DELETED_EVENT gone 0"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestImages(t *testing.T) {
	ctx := t.Context()
	f := &fake{pinned: map[string]bool{digest.FromString("a").String(): true}}
	for i, user := range map[string]string{"a": "1000:5", "b": "www:x", "c": ""} {
		d := engine.ImageDetail{Image: engine.ImageRecord{ID: digest.FromString(i), Names: []string{i}, Size: 9}}
		d.Config.Config.User = user
		f.images = append(f.images, d)
	}
	_, c := clients(t, f)
	for name, want := range map[string]string{"a": "1000  true", "b": "-1 www false", "c": "-1  false"} {
		resp, err := c.ImageStatus(ctx, &api.ImageStatusRequest{Image: &api.ImageSpec{Image: name}})
		if err != nil {
			t.Fatal(err)
		}
		uid := int64(-1)
		if resp.Image.Uid != nil {
			uid = resp.Image.Uid.Value
		}
		if got := fmt.Sprint(uid, " ", resp.Image.Username, " ", resp.Image.Pinned); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if l, err := c.ListImages(ctx, &api.ListImagesRequest{}); err != nil || len(l.Images) != 3 {
		t.Errorf("%v, %v", l, err)
	}
	if l, err := c.ListImages(ctx, &api.ListImagesRequest{Filter: &api.ImageFilter{Image: &api.ImageSpec{Image: "x"}}}); err != nil || len(l.Images) != 0 {
		t.Errorf("%v, %v", l, err)
	}
	for name, a := range map[string]*api.AuthConfig{
		"password": {Username: "u", Password: "p"}, "base64": {Auth: "dTpw"},
	} {
		resp, err := c.PullImage(ctx, &api.PullImageRequest{Image: &api.ImageSpec{Image: "a"}, Auth: a})
		if err != nil || resp.ImageRef != digest.FromString("a").String() || f.pulled.Auth.Username != "u" || f.pulled.Auth.Password != "p" {
			t.Errorf("%s: %v, %v", name, resp, err)
		}
	}
	if _, err := c.PullImage(ctx, &api.PullImageRequest{Image: &api.ImageSpec{Image: "a"}, Auth: &api.AuthConfig{}}); err != nil || f.pulled.Auth != nil {
		t.Errorf("no credentials: %v, %v", f.pulled.Auth, err)
	}
	for name, a := range map[string]*api.AuthConfig{"identity": {IdentityToken: "t"}, "registry": {RegistryToken: "t"}} {
		if _, err := c.PullImage(ctx, &api.PullImageRequest{Image: &api.ImageSpec{Image: "a"}, Auth: a}); err != nil ||
			*f.pulled.Auth != (engine.RegistryAuth{IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}) {
			t.Errorf("%s token: %+v, %v", name, f.pulled.Auth, err)
		}
	}
	// Credentials go to the registry that they are for.
	for server, want := range map[string]bool{
		"https://index.docker.io/v1/": true, "docker.io": true, "example.com": false, "https://docker.io.example.com/": false,
	} {
		if _, err := c.PullImage(ctx, &api.PullImageRequest{Image: &api.ImageSpec{Image: "a"}, Auth: &api.AuthConfig{Username: "u", Password: "p", ServerAddress: server}}); err != nil ||
			(f.pulled.Auth != nil) != want {
			t.Errorf("%s: %+v, %v", server, f.pulled.Auth, err)
		}
	}
	for handler, want := range map[string]codes.Code{"": codes.OK, "hako": codes.OK, "runc": codes.OK, "none": codes.InvalidArgument} {
		if _, err := c.PullImage(ctx, &api.PullImageRequest{Image: &api.ImageSpec{Image: "a", RuntimeHandler: handler}}); status.Code(err) != want {
			t.Errorf("handler %q: %v", handler, err)
		}
	}
	_, err := c.PullImage(ctx, &api.PullImageRequest{Image: &api.ImageSpec{Image: "a"}, Auth: &api.AuthConfig{Auth: "c2VjcmV0"}})
	if status.Code(err) != codes.InvalidArgument || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "c2Vj") {
		t.Errorf("bad credentials: %v", err)
	}
	f.err = fmt.Errorf("dial: %w", errdefs.ErrUnavailable)
	if _, err := c.PullImage(ctx, &api.PullImageRequest{Image: &api.ImageSpec{Image: "a"}}); !strings.HasPrefix(status.Convert(err).Message(), "RegistryUnavailable") {
		t.Errorf("registry that is down: %v", err)
	}
	if fs, err := c.ImageFsInfo(ctx, &api.ImageFsInfoRequest{}); err != nil || fs.ImageFilesystems[0].UsedBytes.Value != 1 || fs.ImageFilesystems[0].FsId.Mountpoint != "/r" {
		t.Errorf("%v, %v", fs, err)
	}
}

func TestCheckpointContainer(t *testing.T) {
	f := &fake{containers: []engine.Container{container("c1", "s", engine.State{Status: engine.StatusRunning})}}
	r, _ := clients(t, f)
	call := func(id, path string, timeout int64) error {
		_, err := r.CheckpointContainer(t.Context(), &api.CheckpointContainerRequest{ContainerId: id, Location: path, Timeout: timeout})
		return err
	}
	if err := call("none", "/x", 0); status.Code(err) != codes.NotFound {
		t.Errorf("an unknown container: %v", err)
	}
	if err := call("c1", "", 0); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no location: %v", err)
	}
	if err := call("c1", "/x", 0); err != nil || f.checkpointed != "/x" {
		t.Errorf("to %q: %v", f.checkpointed, err)
	}
	f.err = fmt.Errorf("no CRIU: %w", errdefs.ErrNotImplemented)
	if err := call("c1", "/x", 0); status.Code(err) != codes.Unimplemented {
		t.Errorf("without CRIU: %v", err)
	}
	f.hold = make(chan struct{})
	if err := call("c1", "/x", 1); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("a timeout: %v", err)
	}
}
