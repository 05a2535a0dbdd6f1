package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	internalapi "k8s.io/cri-api/pkg/apis"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	remote "k8s.io/cri-client/pkg"
	"k8s.io/cri-client/pkg/logs"
	"k8s.io/utils/exec"
)

// registryPassword is what privateRegistry wants of the user me.
const registryPassword = "s3cret-of-a-test"

// privateRegistry serves the test image as HOST/private/box:latest to those who know the password.
func privateRegistry(t *testing.T, n *node) (ref string) {
	t.Helper()
	archive := filepath.Join(t.TempDir(), "image.tar")
	n.docker(t, "save", "-o", archive, testImage)
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files := map[string][]byte{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if files[path.Clean(h.Name)], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	var index ocispec.Index
	if err := json.Unmarshal(files["index.json"], &index); err != nil || len(index.Manifests) == 0 {
		t.Fatalf("no index in what docker save gave: %v", err)
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, pass, _ := r.BasicAuth(); user != "me" || pass != registryPassword {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		what := path.Base(r.URL.Path)
		if what == "latest" {
			what = index.Manifests[0].Digest.String()
		}
		algorithm, hex, _ := strings.Cut(what, ":")
		b, ok := files["blobs/"+algorithm+"/"+hex]
		switch {
		case r.URL.Path == "/v2/":
			return
		case !ok || !strings.HasPrefix(r.URL.Path, "/v2/private/box/"):
			http.NotFound(w, r)
			return
		case strings.Contains(r.URL.Path, "/manifests/"):
			w.Header().Set("Content-Type", index.Manifests[0].MediaType)
			w.Header().Set("Docker-Content-Digest", what)
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://") + "/private/box:latest"
}

// podEvents collects what GetContainerEvents tells, over restarts of the daemon.
type podEvents struct {
	mu    sync.Mutex
	seen  []string // TYPE NAME
	wrong []string
}

// follow connects again whenever the daemon went away, as the kubelet does.
func (e *podEvents) follow(ctx context.Context, rt internalapi.RuntimeService, connected func()) {
	ch := make(chan *cri.ContainerEventResponse, 100)
	go func() {
		for ev := range ch {
			e.mu.Lock()
			name := "sandbox"
			for _, s := range ev.ContainersStatuses {
				if s.Id == ev.ContainerId {
					name = s.Metadata.Name
				}
			}
			e.seen = append(e.seen, strings.TrimSuffix(strings.TrimPrefix(ev.ContainerEventType.String(), "CONTAINER_"), "_EVENT")+" "+name)
			// An event and the status that comes with it must not contradict each other.
			for _, s := range ev.ContainersStatuses {
				if s.Id == ev.ContainerId && ev.ContainerEventType == cri.ContainerEventType_CONTAINER_STOPPED_EVENT && s.State != cri.ContainerState_CONTAINER_EXITED {
					e.wrong = append(e.wrong, fmt.Sprintf("%v with the status %v", ev.ContainerEventType, s))
				}
			}
			e.mu.Unlock()
		}
	}()
	defer close(ch)
	for ctx.Err() == nil {
		_ = rt.GetContainerEvents(ctx, ch, func(cri.RuntimeService_GetContainerEventsClient) { connected() })
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func (e *podEvents) has(what string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range e.seen {
		if s == what {
			return true
		}
	}
	return false
}

// TestKubeletClient takes a pod through its life by the kubelet's own client library, with the
// daemon killed in the middle.
func TestKubeletClient(t *testing.T) {
	n := own(t)
	ref := privateRegistry(t, n)
	for _, streaming := range []bool{false, true} {
		t.Run(fmt.Sprint("streaming=", streaming), func(t *testing.T) { testKubeletClient(t, n, ref, streaming) })
	}
	if log, err := os.ReadFile(n.log.Name()); err != nil || bytes.Contains(log, []byte(registryPassword)) {
		t.Errorf("the password of the registry is in the daemon's log: %v", err)
	}
}

func testKubeletClient(t *testing.T, n *node, ref string, streaming bool) {
	endpoint := "unix://" + filepath.Join(n.dir, "run", "cri.sock")
	rt, err := remote.NewRemoteRuntimeService(ctx(t), endpoint, hangLimit, nil, streaming)
	if err != nil {
		t.Fatal(err)
	}
	defer rt.Close(ctx(t))
	images, err := remote.NewRemoteImageService(ctx(t), endpoint, hangLimit, nil, streaming)
	if err != nil {
		t.Fatal(err)
	}
	defer images.Close(ctx(t))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	// Images.
	for _, auth := range []*cri.AuthConfig{nil, {Username: "me", Password: "wrong"}} {
		if _, err := images.PullImage(ctx(t), &cri.ImageSpec{Image: ref}, auth, nil); err == nil {
			t.Errorf("pulled without the password: %v", auth)
		}
	}
	id, err := images.PullImage(ctx(t), &cri.ImageSpec{Image: ref}, &cri.AuthConfig{Username: "me", Password: registryPassword}, nil)
	must(err)
	if st, err := images.ImageStatus(ctx(t), &cri.ImageSpec{Image: id}, false); err != nil || st.Image == nil || len(st.Image.RepoTags) == 0 {
		t.Errorf("image %s: %v, %v", id, st, err)
	}
	if list, err := images.ListImages(ctx(t), &cri.ImageFilter{Image: &cri.ImageSpec{Image: ref}}); err != nil || len(list) != 1 || list[0].Id != id {
		t.Errorf("images: %v, %v", list, err)
	}
	if fs, err := images.ImageFsInfo(ctx(t)); err != nil || len(fs.ImageFilesystems) == 0 || fs.ImageFilesystems[0].UsedBytes.Value == 0 {
		t.Errorf("file system of images: %v, %v", fs, err)
	}

	// The node.
	st, err := rt.Status(ctx(t), true)
	must(err)
	for _, c := range st.Status.Conditions {
		if !c.Status {
			t.Errorf("condition %v", c)
		}
	}
	if rc, err := rt.RuntimeConfig(ctx(t)); err != nil || rc.Linux == nil {
		t.Errorf("runtime configuration: %v, %v", rc, err)
	}
	var events podEvents
	ectx, cancel := context.WithCancel(ctx(t))
	connected := make(chan struct{})
	var ended sync.WaitGroup
	first := sync.OnceFunc(func() { close(connected) })
	ended.Go(func() { events.follow(ectx, rt, first) })
	defer ended.Wait()
	defer cancel()
	<-connected

	// A pod.
	dir := t.TempDir()
	pc := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "kubelet", Namespace: "default", Uid: "uid-kubelet"}, LogDirectory: dir,
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}
	pod, err := rt.RunPodSandbox(ctx(t), pc, "")
	must(err)
	run := func(name, script string) string {
		t.Helper()
		id, err := rt.CreateContainer(ctx(t), pod, &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: id, UserSpecifiedImage: ref}, Command: []string{"sh", "-c", script}, LogPath: name + ".log",
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: pc.Linux.SecurityContext.NamespaceOptions}},
		}, pc)
		must(err)
		must(rt.StartContainer(ctx(t), id))
		return id
	}
	main := run("main", `trap "exit 4" TERM; i=0; while :; do echo line $i; i=$((i+1)); sleep 0.05; done`)
	short := run("short", "sleep 1; exit 9")

	out, errs, err := rt.ExecSync(ctx(t), main, []string{"sh", "-c", "echo out; echo err >&2"}, hangLimit)
	if string(out) != "out\n" || string(errs) != "err\n" || err != nil {
		t.Errorf("exec: %q, %q, %v", out, errs, err)
	}
	// The kubelet's probes look at the code of the error.
	var code exec.CodeExitError
	if _, _, err := rt.ExecSync(ctx(t), main, []string{"sh", "-c", "exit 6"}, hangLimit); !errors.As(err, &code) || code.Code != 6 {
		t.Errorf("exec with an exit code: %v", err)
	}
	start := time.Now()
	if _, _, err := rt.ExecSync(ctx(t), main, []string{"sleep", "100"}, time.Second); !errors.Is(err, remote.ErrCommandTimedOut) {
		t.Errorf("exec that takes too long: %v after %v", err, time.Since(start))
	}
	stats, err := rt.ContainerStats(ctx(t), main)
	if err != nil || stats.Cpu.GetUsageCoreNanoSeconds().GetValue() == 0 || stats.Memory.GetWorkingSetBytes().GetValue() == 0 {
		t.Errorf("stats: %v, %v", stats, err)
	}
	if list, err := rt.ListPodSandboxStats(ctx(t), &cri.PodSandboxStatsFilter{Id: pod}); err != nil || len(list) != 1 || len(list[0].Linux.Containers) == 0 {
		t.Errorf("stats of the pod: %v, %v", list, err)
	}
	if list, err := rt.ListPodSandbox(ctx(t), &cri.PodSandboxFilter{Id: pod}); err != nil || len(list) != 1 {
		t.Errorf("sandboxes: %v, %v", list, err)
	}

	// The daemon is killed; what ends meanwhile is known afterwards.
	must(n.signal(syscall.SIGKILL))
	n.awaitEnd(t, short)
	must(n.start())
	eventually(t, "the daemon", func() bool { _, err := rt.Status(ctx(t), false); return err == nil })
	containers, err := rt.ListContainers(ctx(t), &cri.ContainerFilter{PodSandboxId: pod})
	if err != nil || len(containers) != 2 {
		t.Errorf("containers: %v, %v", containers, err)
	}
	eventually(t, "the end to be known", func() bool {
		s, err := rt.ContainerStatus(ctx(t), short, false)
		return err == nil && s.Status.State == cri.ContainerState_CONTAINER_EXITED
	})
	if s, err := rt.ContainerStatus(ctx(t), short, false); err != nil || s.Status.State != cri.ContainerState_CONTAINER_EXITED || s.Status.ExitCode != 9 {
		t.Errorf("what ended meanwhile: %v, %v", s, err)
	}
	if s, err := rt.ContainerStatus(ctx(t), main, false); err != nil || s.Status.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("what runs on: %v, %v", s, err)
	}

	// The log as kubectl reads it, over a rotation.
	file := filepath.Join(dir, "main.log")
	must(os.Rename(file, file+".1"))
	must(rt.ReopenContainerLog(ctx(t), main))
	eventually(t, "lines in the new log", func() bool { st, err := os.Stat(file); return err == nil && st.Size() > 0 })
	must(rt.StopContainer(ctx(t), main, 200))
	if s, err := rt.ContainerStatus(ctx(t), main, false); err != nil || s.Status.ExitCode != 4 {
		t.Errorf("stopped: %v, %v", s, err)
	}
	var text bytes.Buffer
	for _, f := range []string{file + ".1", file} {
		must(logs.ReadLogs(ctx(t), f, main, &logs.LogOptions{}, rt, &text, &text))
	}
	for i, line := range strings.Split(strings.TrimSpace(text.String()), "\n") {
		if line != fmt.Sprint("line ", i) {
			t.Errorf("line %d of the log is %q", i, line)
			break
		}
	}
	must(rt.RemoveContainer(ctx(t), short))
	must(rt.StopPodSandbox(ctx(t), pod))
	must(rt.RemovePodSandbox(ctx(t), pod))
	for _, want := range []string{"CREATED main", "STARTED main", "STOPPED main", "DELETED sandbox"} {
		eventually(t, "the event "+want, func() bool { return events.has(want) })
	}
	for _, w := range events.wrong {
		t.Error(w)
	}
	must(images.RemoveImage(ctx(t), &cri.ImageSpec{Image: ref}))
}
