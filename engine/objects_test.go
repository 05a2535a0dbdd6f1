package engine

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/store"
)

func TestVolumes(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	v, err := n.e.CreateVolume(bg, Volume{Name: "data", Labels: map[string]string{"a": "b"}})
	if err != nil || v.Driver != "local" || v.Mountpoint != filepath.Join(n.root, "volumes/data/_data") {
		t.Fatalf("%+v %v", v, err)
	}
	if again, err := n.e.CreateVolume(bg, Volume{Name: "data"}); err != nil || again.Labels["a"] != "b" {
		t.Errorf("second create: %+v %v", again, err)
	}
	for _, name := range []string{"a/b", "..", ".x", strings.Repeat("v", 300), "x y"} {
		if _, err := n.e.CreateVolume(bg, Volume{Name: name}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if _, err := n.e.CreateVolume(bg, Volume{Name: "nfs", Options: map[string]string{"type": "nfs", "o": "addr=x"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("mount options: %v", err)
	}
	id := n.create("cc", Config{Mounts: []Mount{{Kind: MountVolume, Source: "data", Target: "/d"}, {Kind: MountVolume, Target: "/anon"}}})
	if err := n.e.RemoveVolume(bg, "data", true); !errdefs.IsConflict(err) || !strings.Contains(err.Error(), id) {
		t.Errorf("remove in use: %v", err)
	}
	list, err := n.e.Volumes(bg, Filters{"dangling": {"false"}})
	if err != nil || len(list) != 2 || list[0].RefCount != 1 {
		t.Errorf("%+v %v", list, err)
	}
	if err := n.e.RemoveContainer(bg, id, RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(v.Mountpoint, "f"), []byte("12345"), 0o644); err != nil {
		t.Fatal(err)
	}
	p, err := n.e.PruneVolumes(bg, nil)
	if err != nil || len(p.IDs) != 1 {
		t.Errorf("prune takes anonymous volumes only: %+v %v", p, err)
	}
	p, err = n.e.PruneVolumes(bg, Filters{"all": {"true"}, "label": {"a=b"}})
	if err != nil || !slices.Equal(p.IDs, []string{"data"}) || p.Reclaimed != 5 {
		t.Errorf("%+v %v", p, err)
	}
	if err := n.e.RemoveVolume(bg, "data", false); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if err := n.e.RemoveVolume(bg, "data", true); err != nil {
		t.Errorf("forced: %v", err)
	}
	if left := folders(filepath.Join(n.root, "volumes")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestMounts(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.images.cfg.Config.Volumes = map[string]struct{}{"/img": {}, "/own": {}}
	src := t.TempDir()
	first := n.create("first", Config{Mounts: []Mount{
		{Kind: MountBind, Source: src, Target: "/b"}, {Kind: MountVolume, Source: "named", Target: "/own"},
		{Kind: MountBind, Source: src + "/made", Target: "/made", CreateSource: true},
	}})
	v, _ := n.e.Container(bg, first)
	var targets []string
	for _, m := range v.Mounts {
		targets = append(targets, m.Target)
		if m.Resolved == "" {
			t.Errorf("%s has no source", m.Target)
		}
	}
	if !slices.Equal(targets, []string{"/b", "/img", "/made", "/own"}) {
		t.Errorf("%v", targets)
	}
	if _, err := os.Stat(src + "/made"); err != nil {
		t.Error(err)
	}
	second := n.create("second", Config{VolumesFrom: []string{"first:ro"}})
	v, _ = n.e.Container(bg, second)
	if len(v.Mounts) != 4 || !v.Mounts[0].ReadOnly {
		t.Errorf("%+v", v.Mounts)
	}
	for _, c := range []Config{
		{Mounts: []Mount{{Kind: MountBind, Source: "/none-such", Target: "/x"}}},
		{Mounts: []Mount{{Kind: MountTmpfs, Target: "/x"}, {Kind: MountTmpfs, Target: "/x/"}}},
		{VolumesFrom: []string{"none"}},
		{NetworkMode: "none-such"},
		{NetworkMode: "container:none-such"},
	} {
		c.Image = "test"
		if _, _, err := n.e.CreateContainer(bg, "", c); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if _, _, err := n.e.CreateContainer(bg, "", Config{Image: "nope"}); !errdefs.IsNotFound(err) || err.Error() != "No such image: nope:latest" {
		t.Errorf("missing image: %v", err)
	}
	yes := true
	if _, _, err := n.e.CreateContainer(bg, "", Config{Image: "test", Init: &yes}); !errdefs.IsNotImplemented(err) {
		t.Errorf("init: %v", err)
	}
}

// TestRemoveImage follows Docker's rules.
func TestRemoveImage(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	full := func(s string) string { return "docker.io/library/" + s }
	reset := func(names ...string) image.Image {
		img := image.Image{ID: digest.FromString("i"), Names: names, Digests: []string{full("a@" + digest.FromString("m").String())}}
		n.images.mu.Lock()
		n.images.imgs = []image.Image{img}
		n.images.mu.Unlock()
		return img
	}
	img := reset(full("a:1"), full("a:2"))
	id := img.ID.String()
	short := shortImageID(id)
	got, err := n.e.RemoveImage(bg, "a:1", false, false)
	if err != nil || len(got) != 1 || got[0].Untagged != "a:1" {
		t.Errorf("one of two names: %+v %v", got, err)
	}
	got, err = n.e.RemoveImage(bg, "a:2", false, false)
	if err != nil || len(got) != 3 || got[2].Deleted != id {
		t.Errorf("last name: %+v %v", got, err)
	}
	reset(full("a:1"), full("b:1"))
	if _, err := n.e.RemoveImage(bg, id, false, false); !errdefs.IsConflict(err) || err.Error() != "conflict: unable to delete "+short+" (must be forced) - image is referenced in multiple repositories" {
		t.Errorf("by id with two repositories: %v", err)
	}
	if _, err := n.e.RemoveImage(bg, id[7:20], true, false); err != nil {
		t.Errorf("forced: %v", err)
	}
	reset(full("a:1"))
	c := n.create("cc", Config{Image: "a:1"})
	cid := shortID(c)
	for ref, want := range map[string]string{
		"a:1": `conflict: unable to remove repository reference "a:1" (must force) - container ` + cid + ` is using its referenced image ` + short,
		id:    "conflict: unable to delete " + short + " (must be forced) - image is being used by stopped container " + cid,
	} {
		if _, err := n.e.RemoveImage(bg, ref, false, false); err == nil || err.Error() != want {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if err := n.e.StartContainer(bg, c); err != nil {
		t.Fatal(err)
	}
	if _, err := n.e.RemoveImage(bg, id, true, false); err == nil || err.Error() != "conflict: unable to delete "+short+" (cannot be forced) - image is being used by running container "+cid {
		t.Errorf("running: %v", err)
	}
	got, err = n.e.RemoveImage(bg, "a:1", true, false)
	if err != nil || len(got) != 1 || got[0].Untagged != "a:1" {
		t.Errorf("name of a running one, forced: %+v %v", got, err)
	}
	list, err := n.e.Images(bg, Filters{"dangling": {"true"}})
	if err != nil || len(list) != 1 || list[0].Containers != 1 {
		t.Errorf("%+v %v", list, err)
	}
	if removed, _, err := n.e.PruneImages(bg, nil); err != nil || len(removed) != 0 {
		t.Errorf("prune took a used image: %+v %v", removed, err)
	}
	if err := n.e.RemoveContainer(bg, c, RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if removed, _, err := n.e.PruneImages(bg, nil); err != nil || len(removed) == 0 {
		t.Errorf("prune: %+v %v", removed, err)
	}
}

func TestNetworksOfContainers(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	if _, err := n.e.CreateNetwork(bg, NetworkConfig{Name: "n1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.e.CreateNetwork(bg, NetworkConfig{Name: "n1"}); !errdefs.IsConflict(err) || err.Error() != "network with name n1 already exists" {
		t.Error(err)
	}
	id := n.run("cc", Config{NetworkMode: "n1", Hostname: "box"})
	if err := n.e.RemoveNetwork(bg, "n1"); !errdefs.IsPermissionDenied(err) {
		t.Errorf("in use: %v", err)
	}
	if err := n.e.ConnectNetwork(bg, "bridge", id, EndpointSettings{}); err != nil {
		t.Fatal(err)
	}
	if err := n.e.ConnectNetwork(bg, "bridge", id, EndpointSettings{}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("twice: %v", err)
	}
	v, _ := n.e.Container(bg, id)
	hosts, err := os.ReadFile(v.HostsPath)
	if err != nil || strings.Count(string(hosts), "\tbox\n") != 2 {
		t.Errorf("hosts: %s %v", hosts, err)
	}
	if err := n.e.DisconnectNetwork(bg, "n1", id, false); err != nil {
		t.Fatal(err)
	}
	if err := n.e.DisconnectNetwork(bg, "n1", id, false); !errdefs.IsConflict(err) {
		t.Errorf("not connected: %v", err)
	}
	if err := n.e.StopContainer(bg, id, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	v, _ = n.e.Container(bg, id)
	if len(v.Endpoints) != 1 || v.Endpoints[0].NetworkName != "bridge" || v.Endpoints[0].IPv4.IsValid() {
		t.Errorf("stopped: %+v", v.Endpoints)
	}
	p, err := n.e.PruneNetworks(bg, nil)
	if err != nil || !slices.Equal(p.IDs, []string{"n1"}) {
		t.Errorf("%+v %v", p, err)
	}
	if _, err := n.e.Networks(bg, Filters{"nonsense": {"x"}}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

func TestEvents(t *testing.T) {
	t.Parallel()
	var b bus
	base := time.Now()
	for i := range eventsKept + 10 {
		b.publish(Event{Type: "container", Action: "start", ID: newID(), Time: base.Add(time.Duration(i))})
	}
	past, r := b.subscribe(base, nil)
	if len(past) != eventsKept {
		t.Errorf("%d past events", len(past))
	}
	for i := 1; i < len(past); i++ {
		if !past[i].Time.After(past[i-1].Time) {
			t.Fatal("times are not unique and rising")
		}
	}
	// One that does not read is cut off, and nobody waits for it.
	for range eventBuffer + 1 {
		b.publish(Event{Type: "container"})
	}
	select {
	case <-r.dropped:
	default:
		t.Error("a slow reader is still served")
	}
	ev := Event{Type: "container", Action: "health_status: healthy", ID: "abcdef", Attributes: map[string]string{"name": "web", "image": "img", "l": "v"}}
	for _, c := range []struct {
		f    Filters
		want bool
	}{
		{Filters{"type": {"container"}, "event": {"health_status"}}, true},
		{Filters{"event": {"health_status: healthy"}}, true},
		{Filters{"event": {"die"}}, false},
		{Filters{"container": {"web"}}, true},
		{Filters{"container": {"abcd"}}, true},
		{Filters{"container": {"other"}}, false},
		{Filters{"image": {"img"}, "label": {"l=v"}}, true},
		{Filters{"label": {"l=w"}}, false},
		{Filters{"scope": {"local"}}, true},
		{Filters{"volume": {"web"}}, false},
	} {
		if got := matchEvent(ev, c.f); got != c.want {
			t.Errorf("%v: %v", c.f, got)
		}
	}
	n := newNode(t)
	ch, err := n.e.Events(bg, time.Time{}, time.Now().Add(20*time.Millisecond), nil)
	if err != nil {
		t.Fatal(err)
	}
	for range ch {
		t.Error("unexpected event")
	}
	if _, err := n.e.Events(bg, time.Now(), time.Unix(1, 0), nil); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.run("cc", Config{Healthcheck: &Healthcheck{Test: []string{"CMD", "exit", "0"}, Interval: time.Hour, Retries: 2, StartPeriod: 5 * time.Second}})
	c, _ := n.e.containers.get(id)
	r := c.run
	h := *c.view().Healthcheck
	result := func(code int, after time.Duration) string {
		n.e.healthResult(c, r, h, HealthResult{Start: r.started.Add(after), ExitCode: code})
		return c.view().State.Health.Status
	}
	for i, s := range []struct {
		code  int
		after time.Duration
		want  string
	}{
		{1, time.Second, "starting"}, {1, 2 * time.Second, "starting"}, {1, 3 * time.Second, "starting"}, // in the start period
		{1, 6 * time.Second, "starting"}, {1, 7 * time.Second, "unhealthy"},
		{0, 8 * time.Second, "healthy"}, {1, 9 * time.Second, "healthy"}, {1, 10 * time.Second, "unhealthy"},
	} {
		if got := result(s.code, s.after); got != s.want {
			t.Errorf("result %d: %s, want %s", i, got, s.want)
		}
	}
	if log := c.view().State.Health.Log; len(log) != healthLog {
		t.Errorf("%d results are kept", len(log))
	}
}

func TestGCRoots(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("cc", Config{})
	n.e.containers.making([]string{"young"}, "fake", true)
	var got []string
	if err := n.e.Roots(bg, func(nd store.Node) { got = append(got, nd.Type+"/"+nd.Namespace+"/"+nd.ID) }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	want := []string{"snapshots/fake/k8s.io/" + id, "snapshots/fake/k8s.io/young"}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestListAndInfo(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	a := n.run("alpha", Config{Labels: map[string]string{"k": "1"}})
	b := n.create("beta", Config{Labels: map[string]string{"k": "2"}})
	names := func(o ListOptions) (out []string) {
		t.Helper()
		list, err := n.e.Containers(bg, o)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range list {
			out = append(out, v.Name)
		}
		return out
	}
	for i, c := range []struct {
		o    ListOptions
		want []string
	}{
		{ListOptions{}, []string{"alpha"}},
		{ListOptions{All: true}, []string{"beta", "alpha"}},
		{ListOptions{Limit: 1}, []string{"beta"}},
		{ListOptions{Filters: Filters{"status": {"created"}}}, []string{"beta"}},
		{ListOptions{All: true, Filters: Filters{"label": {"k=1"}}}, []string{"alpha"}},
		{ListOptions{All: true, Filters: Filters{"name": {"^al"}}}, []string{"alpha"}},
		{ListOptions{All: true, Filters: Filters{"id": {b[:8]}}}, []string{"beta"}},
		{ListOptions{All: true, Filters: Filters{"before": {"beta"}}}, []string{"alpha"}},
		{ListOptions{All: true, Filters: Filters{"since": {a}}}, []string{"beta"}},
		{ListOptions{All: true, Filters: Filters{"ancestor": {"test"}, "network": {"bridge"}}}, []string{"beta", "alpha"}},
		{ListOptions{All: true, Filters: Filters{"ancestor": {"other"}}}, nil},
		{ListOptions{All: true, Filters: Filters{"health": {"none"}}}, []string{"beta", "alpha"}},
	} {
		if got := names(c.o); !slices.Equal(got, c.want) {
			t.Errorf("list %d: %v, want %v", i, got, c.want)
		}
	}
	for _, f := range []Filters{{"nonsense": {"x"}}, {"status": {"weird"}}, {"exited": {"x"}}} {
		if _, err := n.e.Containers(bg, ListOptions{Filters: f}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", f, err)
		}
	}
	i, err := n.e.Info(bg)
	if err != nil || i.Containers != 2 || i.Running != 1 || i.Stopped != 1 || i.Images != 1 || i.ID == "" || i.NCPU == 0 {
		t.Errorf("%+v %v", i, err)
	}
	top, err := n.e.TopContainer(bg, a, nil)
	if err != nil || len(top.Processes) != 1 || len(top.Processes[0]) != len(top.Titles) {
		t.Errorf("%+v %v", top, err)
	}
	rows, err := parsePS("PID COMMAND\n 1 a b c\n22 x\n", []int{1})
	if err != nil || len(rows.Processes) != 1 || rows.Processes[0][1] != "a b c" {
		t.Errorf("%+v %v", rows, err)
	}
	if _, err := parsePS("COMMAND\nx\n", nil); err == nil {
		t.Error("no PID column")
	}
	p, err := n.e.PruneContainers(bg, nil)
	if err != nil || !slices.Equal(p.IDs, []string{b}) {
		t.Errorf("%+v %v", p, err)
	}
	if st, err := n.e.Stats(bg, a); err != nil || st.SystemCPU == 0 {
		t.Errorf("%+v %v", st, err)
	}
	ctx, cancel := context.WithCancel(bg)
	cancel()
	if err := n.e.RenameContainer(ctx, a, "gamma"); err != nil && names(ListOptions{})[0] != "alpha" {
		t.Errorf("a cancelled rename: %v", err)
	}
}

func TestCgroupMounts(t *testing.T) {
	t.Parallel()
	m := cgroupMounts("25 1 0:22 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n" +
		"26 1 0:23 /docker/x /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n" +
		"27 1 0:24 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\nbroken\n")
	if got := m["memory"].join("/hako/a"); got != "/sys/fs/cgroup/memory/hako/a" {
		t.Error(got)
	}
	if got := m["cpuacct"].join("/docker/x/hako/a"); got != "/sys/fs/cgroup/cpu/hako/a" {
		t.Error(got)
	}
	if m[""].point != "/sys/fs/cgroup/unified" {
		t.Errorf("%+v", m)
	}
}

func TestExec(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: TestExec opens the root of a process")
	}
	n := newNode(t)
	id := n.run("cc", Config{})
	run := func(cmd ...string) (string, error) {
		x, err := n.e.CreateExec(bg, ExecConfig{Container: id, Cmd: cmd, AttachStdout: true})
		if err != nil {
			t.Fatal(err)
		}
		a, err := n.e.AttachExec(bg, x)
		if err != nil {
			return x, err
		}
		defer a.Close()
		for {
			if _, _, err := a.ReadFrame(); err != nil {
				return x, nil
			}
		}
	}
	x, err := run("exit", "5")
	if err != nil {
		t.Fatal(err)
	}
	got, err := n.e.Exec(bg, x)
	if err != nil || got.Running || got.ExitCode == nil || *got.ExitCode != 5 {
		t.Errorf("at the end of the output: %+v %v", got, err)
	}
	if err := n.e.StartExec(bg, x); !errdefs.IsConflict(err) {
		t.Errorf("second start: %v", err)
	}
	for text, code := range map[string]int{`exec: "x": executable file not found in $PATH`: 127, "exec: permission denied": 126} {
		n.breakStep("task.start", &classed{text: text, class: errdefs.ErrUnknown})
		x, err := run("exit", "0")
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%v", err)
		}
		if got, _ := n.e.Exec(bg, x); got.ExitCode == nil || *got.ExitCode != code {
			t.Errorf("%s: %+v", text, got)
		}
	}
	n.breakStep("", nil)
	if _, err := n.e.CreateExec(bg, ExecConfig{Container: id}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no command: %v", err)
	}
	if err := n.e.RemoveContainer(bg, id, RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.e.Exec(bg, x); !errdefs.IsNotFound(err) {
		t.Errorf("exec of a removed container: %v", err)
	}
}
