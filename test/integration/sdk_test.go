package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
)

// sdk gives the newest Go SDK for a daemon. It speaks the newest version of the API that both know.
func (n *node) sdk(t *testing.T) *client.Client {
	t.Helper()
	c, err := client.New(client.WithHost("unix://" + n.socket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestSDK drives the daemon without a command line: the life of a container as
// programs live it.
func TestSDK(t *testing.T) {
	t.Parallel()
	n := sharedWithout(t)
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	c := n.sdk(t)
	name := n.name(t, "")
	created, err := c.ContainerCreate(ctx, client.ContainerCreateOptions{
		Name: name,
		Config: &container.Config{
			Image: testImage, Cmd: []string{"sh", "-c", "cat; echo err >&2; exit 17"}, OpenStdin: true, StdinOnce: true,
			AttachStdin: true, AttachStdout: true, AttachStderr: true, Labels: map[string]string{"sdk": "yes"},
			ExposedPorts: network.PortSet{network.MustParsePort("9/udp"): {}},
		},
		HostConfig: &container.HostConfig{
			PortBindings: network.PortMap{network.MustParsePort("8080/tcp"): {{HostIP: netip.MustParseAddr("127.0.0.1")}}},
			Resources:    container.Resources{Memory: 64 << 20},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	attached, err := c.ContainerAttach(ctx, created.ID, client.ContainerAttachOptions{Stream: true, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	defer attached.Close()
	wait := c.ContainerWait(ctx, created.ID, client.ContainerWaitOptions{Condition: container.WaitConditionNextExit})
	if _, err := c.ContainerStart(ctx, created.ID, client.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(attached.Conn, "from the SDK\n"); err != nil {
		t.Fatal(err)
	}
	if err := attached.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &errs, attached.Reader); err != nil {
		t.Error(err)
	}
	if out.String() != "from the SDK\n" || errs.String() != "err\n" {
		t.Errorf("%q %q", &out, &errs)
	}
	select {
	case r := <-wait.Result:
		if r.StatusCode != 17 || r.Error != nil {
			t.Errorf("%+v", r)
		}
	case err := <-wait.Error:
		t.Error(err)
	}
	inspect, err := c.ContainerInspect(ctx, created.ID, client.ContainerInspectOptions{Size: true})
	if err != nil {
		t.Fatal(err)
	}
	ctr := inspect.Container
	if ctr.State.ExitCode != 17 || ctr.Config.Labels["sdk"] != "yes" || ctr.HostConfig.Memory != 64<<20 || ctr.SizeRootFs == nil || ctr.Name != "/"+name {
		t.Errorf("%s", inspect.Raw)
	}
	list, err := c.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: make(client.Filters).Add("label", "sdk=yes").Add("name", name)})
	if err != nil || len(list.Items) != 1 || list.Items[0].ID != created.ID {
		t.Errorf("%+v %v", list, err)
	}
	logs, err := c.ContainerLogs(ctx, created.ID, client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true, Tail: "1", Details: true})
	if err != nil {
		t.Fatal(err)
	}
	out.Reset()
	errs.Reset()
	if _, err := stdcopy.StdCopy(&out, &errs, logs); err != nil {
		t.Error(err)
	}
	logs.Close()
	if out.Len()+errs.Len() == 0 {
		t.Error("no logs")
	}
	stats, err := c.ContainerStats(ctx, created.ID, client.ContainerStatsOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var s container.StatsResponse
	if err := json.NewDecoder(stats.Body).Decode(&s); err != nil || s.ID != created.ID {
		t.Errorf("%+v %v", s, err)
	}
	stats.Body.Close()
	if _, err := c.ContainerRemove(ctx, created.ID, client.ContainerRemoveOptions{RemoveVolumes: true}); err != nil {
		t.Error(err)
	}
	if _, err := c.ContainerInspect(ctx, created.ID, client.ContainerInspectOptions{}); !errdefs.IsNotFound(err) {
		t.Errorf("after the removal: %v", err)
	}
}

func TestSDKExecAndFiles(t *testing.T) {
	t.Parallel()
	n := sharedWithout(t)
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	c := n.sdk(t)
	name := n.name(t, "")
	created, err := c.ContainerCreate(ctx, client.ContainerCreateOptions{Name: name, Config: &container.Config{Image: testImage, Cmd: []string{"sleep", "1000"}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ContainerStart(ctx, created.ID, client.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	ex, err := c.ExecCreate(ctx, created.ID, client.ExecCreateOptions{Cmd: []string{"sh", "-c", "cat; exit 5"}, AttachStdin: true, AttachStdout: true, AttachStderr: true})
	if err != nil {
		t.Fatal(err)
	}
	attached, err := c.ExecAttach(ctx, ex.ID, client.ExecAttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer attached.Close()
	if _, err := io.WriteString(attached.Conn, "in"); err != nil {
		t.Fatal(err)
	}
	if err := attached.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &errs, attached.Reader); err != nil || out.String() != "in" {
		t.Errorf("%q %q %v", &out, &errs, err)
	}
	if i, err := c.ExecInspect(ctx, ex.ID, client.ExecInspectOptions{}); err != nil || i.ExitCode != 5 || i.Running || i.ContainerID != created.ID {
		t.Errorf("%+v %v", i, err)
	}
	got, err := c.CopyFromContainer(ctx, created.ID, client.CopyFromContainerOptions{SourcePath: "/data/seed"})
	if err != nil {
		t.Fatal(err)
	}
	defer got.Content.Close()
	if b, err := io.ReadAll(got.Content); err != nil || !bytes.Contains(b, []byte("from the image\n")) || got.Stat.Name != "seed" || got.Stat.Size != 15 || got.Stat.Mode != 0o640 {
		t.Errorf("%+v %d bytes %v", got.Stat, len(b), err)
	}
	if _, err := c.CopyFromContainer(ctx, created.ID, client.CopyFromContainerOptions{SourcePath: "/nope"}); !errdefs.IsNotFound(err) {
		t.Errorf("copy of nothing: %v", err)
	}
}

func TestSDKSystem(t *testing.T) {
	t.Parallel()
	n := sharedWithout(t)
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	c := n.sdk(t)
	ping, err := c.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true})
	if err != nil || ping.APIVersion != "1.52" || ping.OSType != "linux" {
		t.Errorf("%+v %v", ping, err)
	}
	if v, err := c.ServerVersion(ctx, client.ServerVersionOptions{}); err != nil || v.Os != "linux" || len(v.Components) == 0 {
		t.Errorf("%+v %v", v, err)
	}
	info, err := c.Info(ctx, client.InfoOptions{})
	if err != nil || info.Info.Driver != n.snapshotter(t) || info.Info.DefaultRuntime != "hako" || info.Info.NCPU == 0 || info.Info.MemTotal == 0 {
		t.Errorf("%+v %v", info, err)
	}
	du, err := c.DiskUsage(ctx, client.DiskUsageOptions{Images: true, Containers: true, Volumes: true, BuildCache: true, Verbose: true})
	if err != nil || du.Images.TotalCount < 1 || du.Images.TotalSize == 0 || len(du.Images.Items) < 1 {
		t.Errorf("%+v %v", du, err)
	}
	images, err := c.ImageList(ctx, client.ImageListOptions{Manifests: true})
	if err != nil || len(images.Items) < 1 || len(images.Items[0].Manifests) != 1 {
		t.Errorf("%+v %v", images, err)
	}
	im, err := c.ImageInspect(ctx, testImage)
	if err != nil || im.Os != "linux" || im.Descriptor == nil || len(im.RootFS.Layers) != 2 || im.Config.Labels["org.example.from"] != "image" {
		t.Errorf("%+v %v", im, err)
	}
	saved, err := c.ImageSave(ctx, []string{testImage})
	if err != nil {
		t.Fatal(err)
	}
	defer saved.Close()
	loaded, err := c.ImageLoad(ctx, saved)
	if err != nil {
		t.Fatal(err)
	}
	defer loaded.Close()
	if b, err := io.ReadAll(loaded); err != nil || !strings.Contains(string(b), "Loaded image: "+testImage) {
		t.Errorf("%s %v", b, err)
	}
	if nets, err := c.NetworkList(ctx, client.NetworkListOptions{}); err != nil || len(nets.Items) < 3 {
		t.Errorf("%+v %v", nets, err)
	}
	vol, err := c.VolumeCreate(ctx, client.VolumeCreateOptions{Labels: map[string]string{"a": "b"}})
	if err != nil || len(vol.Volume.Name) != 64 {
		t.Errorf("%+v %v", vol, err)
	}
	if _, err := os.Stat(vol.Volume.Mountpoint); err != nil {
		t.Error(err)
	}
	if _, err := c.VolumeRemove(ctx, vol.Volume.Name, client.VolumeRemoveOptions{}); err != nil {
		t.Error(err)
	}
	events := c.Events(ctx, client.EventsListOptions{
		Since: time.Now().Add(-time.Hour).Format(time.RFC3339), Until: time.Now().Add(time.Second).Format(time.RFC3339),
		Filters: make(client.Filters).Add("volume", vol.Volume.Name),
	})
	var actions []string
	for {
		select {
		case m := <-events.Messages:
			actions = append(actions, string(m.Action))
			continue
		case err := <-events.Err:
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
		}
		break
	}
	if got := strings.Join(actions, " "); got != "create destroy" {
		t.Errorf("events of the volume: %q", got)
	}
}
