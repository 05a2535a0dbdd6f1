package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// checkpointImage makes an image of an archive, as buildah(1) does for "add ARCHIVE /" and "config --annotation", in a layout to be loaded.
func checkpointImage(t *testing.T, archive, name string) []byte {
	t.Helper()
	layer, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	file := func(name string, b []byte) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	blob := func(mediaType string, b []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		file("blobs/sha256/"+d.Digest.Encoded(), b)
		return d
	}
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	l := blob(ocispec.MediaTypeImageLayer, layer)
	c := blob(ocispec.MediaTypeImageConfig, encode(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{l.Digest}},
	}))
	m := blob(ocispec.MediaTypeImageManifest, encode(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: c, Layers: []ocispec.Descriptor{l},
		Annotations: map[string]string{"org.criu.checkpoint.container.name": "main"},
	}))
	m.Annotations = map[string]string{"io.containerd.image.name": name, ocispec.AnnotationRefName: "1"}
	file(ocispec.ImageLayoutFile, encode(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}))
	file(ocispec.ImageIndexFile, encode(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{m}}))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestPodRestore: a container of a pod is made of the archive that CheckpointContainer has written, and of an image with its files. It counts on
// from where it was, in another pod, with the files that it had written, and is like any other. It works in the virtual
// machine: MODES=systemd RUN=TestPodRestore test/vm/suite.sh ./test/integration
func TestPodRestore(t *testing.T) {
	n := own(t, "--restore-checkpoints", "images")
	needsCRIU(t)
	k := newKubelet(t, n)
	pc := k.config("written", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	data := t.TempDir()
	script := "trap 'exit 7' TERM; echo kept >/new; rm /etc/group; i=0; while :; do i=$((i+1)); echo $i >/count; echo $i; sleep 0.2; done"
	request := func(pc *cri.PodSandboxConfig, name, image string) *cri.ContainerConfig {
		c := k.request(pc, name, "sh", "-c", script)
		c.Image = &cri.ImageSpec{Image: image}
		c.Mounts = []*cri.Mount{{HostPath: data, ContainerPath: "/data"}}
		c.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{}
		return c
	}
	slow := func() context.Context { // an emulated machine is slow
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		t.Cleanup(cancel)
		return ctx
	}
	id := k.launch(pod, pc, request(pc, "first", testImage))
	count := func(id string) int {
		t.Helper()
		n, err := strconv.Atoi(k.sh(id, "until c=$(cat /count 2>/dev/null); [ -n \"$c\" ]; do sleep 0.1; done; echo $c" /* it is empty when it is about to be written */))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for count(id) < 5 {
		time.Sleep(50 * time.Millisecond)
	}
	archive := filepath.Join(t.TempDir(), "checkpoint.tar")
	if _, err := k.CheckpointContainer(slow(), &cri.CheckpointContainerRequest{ContainerId: id, Location: archive}); err != nil {
		t.Fatal(err)
	}
	if code, body, err := n.request("POST", "/images/load?quiet=1", bytes.NewReader(checkpointImage(t, archive, "docker.io/library/frozen:1"))); err != nil || code != 200 {
		t.Fatalf("load the checkpoint as an image: %d %s %v", code, body, err)
	}
	k.end(pod)
	base, err := k.images.ImageStatus(ctx(t), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: testImage}})
	if err != nil {
		t.Fatal(err)
	}

	for name, from := range map[string]string{"archive": archive, "image": "frozen:1"} {
		pc := k.config("again-"+name, cri.NamespaceMode_CONTAINER)
		pod := k.runPod(pc)
		c := request(pc, name, from)
		id, err := k.ask(pod, pc, c)
		if err != nil {
			t.Fatalf("a container of the %s: %v", name, err)
		}
		if st := k.status(id); st.State != cri.ContainerState_CONTAINER_CREATED || st.ImageId != base.Image.Id || st.Image.UserSpecifiedImage != from {
			t.Errorf("a container of the %s, before its start: %v", name, st)
		}
		if _, err := k.StartContainer(slow(), &cri.StartContainerRequest{ContainerId: id}); err != nil {
			t.Fatalf("start a container of the %s: %v", name, err)
		}
		first := count(id)
		if first < 5 {
			t.Errorf("a container of the %s counts from %d on", name, first)
		}
		eventually(t, "the container of the "+name+" to count on", func() bool { return count(id) > first })
		if got := k.sh(id, "cat /new; ls /etc/group 2>/dev/null; cat /etc/hostname; ls -d /data"); got != "kept\n"+pc.Hostname+"\n/data" {
			t.Errorf("files of a container of the %s: %q", name, got)
		}
		if log := k.log(name); !strings.Contains(log, " stdout F ") || strings.Contains(log, "stdout F 1\n") {
			t.Errorf("log of a container of the %s: %q", name, log)
		}
		if left, err := filepath.Glob(filepath.Join(n.dir, "lib", "containers", id, "restore", "checkpoint")); err != nil || len(left) != 0 {
			t.Errorf("a container of the %s runs, and its images are still there: %v", name, err)
		}
		if _, err := k.StopContainer(slow(), &cri.StopContainerRequest{ContainerId: id, Timeout: 300}); err != nil {
			t.Error(err)
		}
		if st := k.status(id); st.ExitCode != 7 || st.State != cri.ContainerState_CONTAINER_EXITED {
			t.Errorf("a container of the %s has ended with %v", name, st)
		}
		k.end(pod)
	}

	// What is no mount of the container that was written, and what the configuration forbids.
	pc = k.config("refused", cri.NamespaceMode_CONTAINER)
	pod = k.runPod(pc)
	c := request(pc, "more", archive)
	c.Mounts = append(c.Mounts, &cri.Mount{HostPath: data, ContainerPath: "/more"})
	if _, err := k.ask(pod, pc, c); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a mount that the container had not: %v", err)
	}
	c = request(pc, "less", archive)
	c.Mounts = nil
	id, err = k.ask(pod, pc, c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.StartContainer(slow(), &cri.StartContainerRequest{ContainerId: id}); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "/data") {
		t.Errorf("without a mount that the container had: %v", err)
	}
	c = request(pc, "caps", archive)
	c.Linux.SecurityContext.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}}
	if id, err = k.ask(pod, pc, c); err != nil {
		t.Fatal(err)
	}
	if _, err := k.StartContainer(slow(), &cri.StartContainerRequest{ContainerId: id}); err == nil || !strings.Contains(err.Error(), "configuration") {
		t.Errorf("with less capabilities than what it was: %v", err)
	}
	if st := k.status(id); st.State != cri.ContainerState_CONTAINER_EXITED || st.Reason != "StartError" {
		t.Errorf("after a restore that failed: %v", st)
	}
	k.end(pod)
}
