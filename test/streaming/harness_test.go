package streaming

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/network"
	"github.com/hako-engine/hako/shim/client"
	"github.com/hako-engine/hako/snapshot"
	"github.com/hako-engine/hako/store"
)

const testImage = "hako-streaming-test:latest"

// shims gives the shim room's client the engine's interface types.
type shims struct{ m client.Manager }

func (s shims) Start(ctx context.Context, o client.StartOptions) (engine.Shim, error) {
	sh, err := s.m.Start(ctx, o)
	if err != nil {
		return nil, err
	}
	return sh, nil
}

func (s shims) Connect(ctx context.Context, bundle string) (engine.Shim, error) {
	sh, err := s.m.Connect(ctx, bundle)
	if err != nil {
		return nil, err
	}
	return sh, nil
}

func (s shims) Reap(ctx context.Context, o client.StartOptions) (client.Exit, error) {
	return s.m.Reap(ctx, o)
}

func (s shims) Kill(ctx context.Context, o client.StartOptions) error { return s.m.Kill(ctx, o) }

var shared struct {
	sync.Once
	e   *engine.Engine
	end func() error
	err error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.end != nil {
		if err := shared.end(); err != nil {
			fmt.Fprintln(os.Stderr, "the end of the engine:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// open gives the engine that the tests share. They name and remove what they make.
func open(tb testing.TB) *engine.Engine {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skipf("%s needs root", tb.Name())
	}
	if _, err := exec.LookPath("busybox"); err != nil {
		tb.Skipf("%s needs busybox", tb.Name())
	}
	shared.Do(func() { shared.e, shared.end, shared.err = openEngine() })
	if shared.err != nil {
		tb.Fatal(shared.err)
	}
	return shared.e
}

func openEngine() (_ *engine.Engine, end func() error, err error) {
	dir, err := os.MkdirTemp("", "hks") // short: the paths of sockets are bounded
	if err != nil {
		return nil, nil, err
	}
	var ends []func() error
	end = func() error {
		var first error
		for i := len(ends) - 1; i >= 0; i-- {
			if err := ends[i](); err != nil && first == nil {
				first = err
			}
		}
		return first
	}
	ends = append(ends, func() error { return os.RemoveAll(dir) })
	defer func() {
		if err != nil {
			_ = end()
		}
	}()
	shim := filepath.Join(dir, "hako-shim")
	build := exec.Command("go", "build", "-o", shim, "../../cmd/hako-shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := build.CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("build hako-shim: %w\n%s", err, b)
	}
	ctx := context.Background()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	root, state := filepath.Join(dir, "root"), filepath.Join(dir, "state")
	st, err := store.Open(root, store.Options{Log: log})
	if err != nil {
		return nil, nil, err
	}
	ends = append(ends, st.Close)
	overlay, err := snapshot.NewOverlay(filepath.Join(root, "overlayfs"), st)
	if err != nil {
		return nil, nil, err
	}
	snapshotters := map[string]snapshots.Snapshotter{"overlayfs": overlay}
	images := image.New(image.Options{Content: st.Content(), Images: st.Images(), Leases: st.Leases(),
		Snapshotters: snapshotters, Default: "overlayfs", Log: log})
	nets, err := network.Open(ctx, network.Options{Root: filepath.Join(root, "network"), State: filepath.Join(state, "network"),
		Records: st.Records("networks"), BridgeName: fmt.Sprintf("hkst%d", os.Getpid()%100000), BridgeSubnet: netip.MustParsePrefix("10.213.77.0/24"), MTU: 1500, Log: log})
	if err != nil {
		return nil, nil, err
	}
	ends = append(ends, nets.Close)
	e, err := engine.New(ctx, engine.Options{
		Root: root, State: state, Containers: st.Records("containers"), Volumes: st.Records("volumes"), Settings: st.Records("settings"),
		Sandboxes: st.Records("sandboxes"),
		Images:    images, Networks: nets, Shims: shims{}, Snapshotters: snapshotters, Snapshotter: "overlayfs", ShimBinary: shim, Log: log,
	})
	if err != nil {
		return nil, nil, err
	}
	ends = append(ends, e.Close)
	archive, err := makeImage()
	if err != nil {
		return nil, nil, err
	}
	if _, err := e.LoadImages(ctx, archive, image.LoadOptions{}); err != nil {
		return nil, nil, err
	}
	return e, end, nil
}

// makeImage is an archive of an image with busybox.
func makeImage() (io.Reader, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, d := range []string{"bin/", "etc/", "proc/", "sys/", "dev/", "tmp/"} {
		if err := w.WriteHeader(&tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o755}); err != nil {
			return nil, err
		}
	}
	for name, content := range map[string][]byte{"bin/busybox": busybox, "etc/passwd": []byte("root:x:0:0:root:/:/bin/sh\n")} {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(content))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	for _, applet := range []string{"sh", "cat", "echo", "sleep", "true", "stty", "head", "dd", "yes", "setsid", "touch", "nc", "ps", "tty"} {
		if err := w.WriteHeader(&tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeSymlink, Linkname: "busybox"}); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", runtime.GOARCH
	cf.Config = v1.Config{Cmd: []string{"sleep", "1000000"}, Env: []string{"PATH=/bin"}}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		return nil, err
	}
	tag, err := name.NewTag(testImage)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = tarball.Write(tag, img, &out)
	return &out, err
}

// run starts a container for a test.
func run(tb testing.TB, e *engine.Engine, change func(*engine.Config)) string {
	tb.Helper()
	cfg := engine.Config{Image: testImage, NetworkMode: "none"}
	if change != nil {
		change(&cfg)
	}
	id, _, err := e.CreateContainer(tb.Context(), "", cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if err := e.RemoveContainer(ctx, id, engine.RemoveOptions{Force: true}); err != nil {
			tb.Error(err)
		}
	})
	if err := e.StartContainer(tb.Context(), id); err != nil {
		tb.Fatal(err)
	}
	return id
}
