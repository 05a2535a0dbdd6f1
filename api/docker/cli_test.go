package docker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hako-engine/hako/engine"
)

// cliBackend is what the docker command line sees of a fake engine with one image,
// one container and one network.
type cliBackend struct {
	*fake
	mu sync.Mutex // the command lines of a test order its steps, but the race detector cannot see how
}

// change sets what the fake does from now on.
func (b *cliBackend) change(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
}

func (b *cliBackend) StartContainer(ctx context.Context, ref string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fake.StartContainer(ctx, ref)
}

func (b *cliBackend) Exec(ctx context.Context, id string) (engine.Exec, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fake.Exec(ctx, id)
}

func (b *cliBackend) AttachExec(ctx context.Context, id string) (engine.Attachment, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fake.AttachExec(ctx, id)
}

func (b *cliBackend) LoadImages(ctx context.Context, r io.Reader, o engine.LoadOptions) ([]engine.LoadedImage, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fake.LoadImages(ctx, r, o)
}

func (b *cliBackend) Attach(ctx context.Context, ref string, o engine.AttachOptions) (engine.Attachment, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fake.Attach(ctx, ref, o)
}

func (b *cliBackend) Networks(context.Context, engine.Filters) ([]engine.Network, error) {
	return []engine.Network{{ID: strings.Repeat("1", 64), Name: "bridge", Driver: "bridge"}}, nil
}

func (b *cliBackend) Volumes(context.Context, engine.Filters) ([]engine.Volume, error) {
	return []engine.Volume{{Name: "vol", Driver: "local", Mountpoint: "/v"}}, nil
}

func (b *cliBackend) ImageHistory(context.Context, string) ([]engine.ImageHistory, error) {
	return []engine.ImageHistory{{ID: "sha256:" + strings.Repeat("ab", 32), CreatedBy: "RUN true", Created: time.Unix(1, 0)}}, nil
}

func (b *cliBackend) TopContainer(context.Context, string, []string) (engine.Top, error) {
	return engine.Top{Titles: []string{"PID", "CMD"}, Processes: [][]string{{"1", "sh"}}}, nil
}

func (b *cliBackend) Changes(context.Context, string) ([]engine.Change, error) {
	return []engine.Change{{Path: "/a", Kind: 1}}, nil
}

func (b *cliBackend) RemoveImage(context.Context, string, bool, bool) ([]engine.RemovedImage, error) {
	return []engine.RemovedImage{{Untagged: "alpine:3"}, {Deleted: "sha256:ab"}}, nil
}

// docker runs the real command line against a server.
func (n *node) docker(stdin string, args ...string) (stdout, stderr string, code int) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+n.socket, "DOCKER_CONFIG="+n.t.TempDir())
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		n.t.Fatalf("docker %v: %v", args, err)
	}
	if ctx.Err() != nil {
		n.t.Fatalf("docker %v hangs: %s%s", args, &out, &errs)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// TestCommandLine drives the API with the real docker command line.
func TestCommandLine(t *testing.T) {
	if _, err := exec.LookPath("docker"); err != nil {
		t.Skip("TestCommandLine needs the docker command line")
	}
	ctr := sampleContainer(t)
	ctr.Config.TTY = false
	ctr.State = engine.State{Status: engine.StatusRunning, Pid: 7, StartedAt: time.Now().Add(-3 * time.Hour)}
	detail := engine.ImageDetail{Image: engine.ImageRecord{ID: "sha256:" + "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd", Names: []string{"docker.io/library/alpine:3"}, Size: 5000000, Created: time.Now()}}
	b := &cliBackend{}
	b.fake = &fake{
		containers: []engine.Container{ctr},
		images:     map[string]engine.ImageDetail{"alpine:3": detail},
		node:       engine.Info{Name: "node", Snapshotter: "overlayfs", CgroupVersion: 1, CgroupDriver: "cgroupfs", Runtimes: map[string]string{"hako": ""}, Version: "0.1.0", SecurityOptions: []string{"name=seccomp,profile=builtin"}, MemoryLimit: true, SwapLimit: true, PidsLimit: true, CPUCfs: true, CPUSet: true, IPv4Forwarding: true},
		usage:      engine.DiskUsage{LayersSize: 5000000, Images: []engine.ImageSummary{{Image: detail.Image, Containers: 1}}, Containers: []engine.Container{ctr}, Volumes: []engine.Volume{{Name: "vol", Size: 3}}},
		resized:    make(chan [2]uint32, 10),
		create: func(_ string, c engine.Config) (string, []string, error) {
			if c.Image == "nope" {
				return "", nil, notFoundf("No such image: nope:latest")
			}
			return ctr.ID, nil, nil
		},
		pull: func(ref string, _ engine.PullOptions) error { return notFoundf("pull access denied for %s", ref) },
		stats: func() (engine.Stats, error) {
			return engine.Stats{Read: time.Now(), MemUsage: 1 << 20, MemLimit: 1 << 30, Pids: 3, OnlineCPUs: 2}, nil
		},
		eventStream: func(_ context.Context, _, _ time.Time, _ engine.Filters) (<-chan engine.Event, error) {
			ch := make(chan engine.Event, 1)
			ch <- engine.Event{Type: "container", Action: "start", ID: ctr.ID, Attributes: map[string]string{"image": "alpine"}, Time: time.Unix(1, 0)}
			close(ch)
			return ch, nil
		},
	}
	var p *process
	exited := make(chan engine.WaitResult, 1)
	b.attach = func(string, engine.AttachOptions) (engine.Attachment, error) { p = newProcess(); return p, nil }
	b.wait = func(context.Context, string, engine.WaitCondition) (<-chan engine.WaitResult, error) {
		return exited, nil
	}
	b.start = func(ref string) error {
		go func() {
			p.frames <- frame{1, "out:" + <-p.stdin}
			p.frames <- frame{2, "err"}
			close(p.frames)
			exited <- engine.WaitResult{ExitCode: 3}
		}()
		return nil
	}
	n := serve(t, b)

	for _, tt := range []struct {
		args string
		want string // in stdout
	}{
		{"version", "API version:      1.52 (minimum version 1.24)|Version:          0.1.0"},
		{"version --format {{.Server.Version}}", "0.1.0"},
		{"info", "Storage Driver: overlayfs|Default Runtime: hako|Cgroup Driver: cgroupfs|seccomp"},
		{"info --format {{json_.}}", `"Driver":"overlayfs"`},
		{"ps", "web|Up 3 hours|alpine:3|0.0.0.0:8080->80/tcp"},
		{"ps -a --no-trunc --format {{.ID}}_{{.Names}}_{{.State}}_{{.Mounts}}_{{.Networks}}", ctr.ID + " web running"},
		{"ps -q --filter status=running", "abababababab"},
		{"inspect web", `"Name": "/web"`},
		{"inspect --format {{.State.Status}}_{{.HostConfig.Memory}}_{{json_.NetworkSettings.Ports}} web", "running 67108864"},
		{"images", "alpine       3         cdcdcdcdcdcd"},
		{"image inspect alpine:3", `"alpine:3"`},
		{"history alpine:3", "RUN true"},
		{"rmi alpine:3", "Untagged: alpine:3|Deleted: sha256:ab"},
		{"network ls", "bridge    bridge    local"},
		{"volume ls", "local     vol"},
		{"system df", "Images          1         1         5MB"},
		{"system df -v", "vol"},
		{"top web", "PID"},
		{"diff web", "A /a"},
		{"stats --no-stream web", "1MiB / 1GiB"},
		{"events --since 1 --until 2", "container start " + ctr.ID},
		{"container ls", "web"},
		{"search --help", "Search Docker Hub"},
	} {
		args := strings.Fields(tt.args)
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "_", " ")
		}
		out, errs, code := n.docker("", args...)
		for want := range strings.SplitSeq(tt.want, "|") {
			if code != 0 || !strings.Contains(out, want) {
				t.Errorf("docker %s: exit %d, wants %q\n%s%s", tt.args, code, want, out, errs)
			}
		}
	}

	out, errs, code := n.docker("typed", "run", "-i", "alpine:3", "cat")
	if out != "out:typed" || errs != "err" || code != 3 {
		t.Errorf("run: %q %q %d", out, errs, code)
	}
	_, errs, code = n.docker("", "run", "nope")
	if code != 125 || !strings.Contains(errs, "pull access denied for docker.io/library/nope:latest") {
		t.Errorf("run of an unknown image: %d %s", code, errs)
	}
	b.change(func() {
		b.start = func(string) error {
			return invalidf(`failed to create task for container: exec: "nope": executable file not found in $PATH`)
		}
	})
	if _, errs, code = n.docker("", "run", "alpine:3", "nope"); code != 127 {
		t.Errorf("run of an unknown command: %d %s", code, errs)
	}

	q := newProcess()
	b.change(func() {
		b.exec = &engine.Exec{ID: "e1", ContainerID: ctr.ID, Config: engine.ExecConfig{Cmd: []string{"cat"}, AttachStdin: true, AttachStdout: true, AttachStderr: true}}
		four := 4
		b.exec.ExitCode = &four
		b.attachExec = func() (engine.Attachment, error) {
			go func() {
				q.frames <- frame{1, fmt.Sprintf("exec:%s", <-q.stdin)}
				close(q.frames)
			}()
			return q, nil
		}
	})
	out, errs, code = n.docker("typed", "exec", "-i", "web", "cat")
	if out != "exec:typed" || code != 4 {
		t.Errorf("exec: %q %q %d", out, errs, code)
	}
	b.change(func() {
		b.load = func(r io.Reader, _ engine.LoadOptions) ([]engine.LoadedImage, error) {
			_, err := io.Copy(io.Discard, r)
			return []engine.LoadedImage{{Names: []string{"docker.io/library/a:1"}}}, err
		}
	})
	if out, errs, code := n.docker(strings.Repeat("x", 100000), "load"); out != "Loaded image: a:1\n" || code != 0 {
		t.Errorf("load: %q %q %d", out, errs, code)
	}
}
