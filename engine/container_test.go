package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/internal/errtext"
)

var bg = context.Background()

func TestLife(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	ctx, cancel := context.WithCancel(bg)
	defer cancel()
	events, err := n.e.Events(ctx, time.Time{}, time.Time{}, Filters{"type": {"container"}})
	if err != nil {
		t.Fatal(err)
	}
	id := n.create("web", Config{Cmd: []string{"exit", "7"}, Labels: map[string]string{"l": "v"}})
	if s := n.state_("web"); s.Status != StatusCreated {
		t.Errorf("created container is %s", s.Status)
	}
	next, err := n.e.WaitContainer(bg, "web", WaitNextExit)
	if err != nil {
		t.Fatal(err)
	}
	a, err := n.e.Attach(bg, "web", AttachOptions{Stdout: true, Stream: true})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := n.e.StartContainer(bg, "/web"); err != nil {
		t.Fatal(err)
	}
	if r := <-next; r.ExitCode != 7 {
		t.Errorf("exit code %d", r.ExitCode)
	}
	if _, p, err := a.ReadFrame(); string(p) != "hello\n" || err != nil {
		t.Errorf("attached before the start, read %q, %v", p, err)
	}
	if _, _, err := a.ReadFrame(); !errors.Is(err, io.EOF) {
		t.Errorf("end of output: %v", err)
	}
	n.eventually("exited", func() bool { return n.state_(id).Status == StatusExited })
	s := n.state_(id[:10])
	if s.ExitCode != 7 || s.FinishedAt.IsZero() || s.Pid != 0 {
		t.Errorf("state after the end: %+v", s)
	}
	if n.nets.taken() != 0 || n.shims.count() != 0 {
		t.Error("network or shim is held after the end")
	}
	if err := n.e.RemoveContainer(bg, "web", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	n.clean()
	var got []string
	for ev := range events {
		if ev.Attributes["name"] != "web" || ev.Attributes["image"] != "test" || ev.Attributes["l"] != "v" {
			t.Errorf("event %s has attributes %v", ev.Action, ev.Attributes)
		}
		got = append(got, ev.Action)
		if ev.Action == "destroy" {
			break
		}
	}
	if want := []string{"create", "attach", "start", "die", "destroy"}; !slices.Equal(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
}

// TestKillBeforeDie: however late a shim answers that a signal was sent, its event comes before that of the end.
func TestKillBeforeDie(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("web", Config{Cmd: []string{"sleep"}})
	if err := n.e.StartContainer(bg, id); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(bg)
	defer cancel()
	events, err := n.e.Events(ctx, time.Time{}, time.Time{}, Filters{"type": {"container"}})
	if err != nil {
		t.Fatal(err)
	}
	n.shims.killed = func() {
		n.eventually("exited", func() bool { return n.state_(id).Status == StatusExited })
	}
	if err := n.e.KillContainer(bg, id, ""); err != nil {
		t.Fatal(err)
	}
	if err := n.e.RemoveContainer(bg, id, RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	var got []string
	for ev := range events {
		if got = append(got, ev.Action); ev.Action == "destroy" {
			break
		}
	}
	if want := []string{"kill", "die", "destroy"}; !slices.Equal(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
}

func TestAutoRemove(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("", Config{Cmd: []string{"exit", "3"}, AutoRemove: true, Mounts: []Mount{{Kind: MountVolume, Target: "/v"}}})
	ch, err := n.e.WaitContainer(bg, id, WaitRemoved)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.e.StartContainer(bg, id); err != nil {
		t.Fatal(err)
	}
	if r := <-ch; r.ExitCode != 3 {
		t.Errorf("exit code %d", r.ExitCode)
	}
	n.clean()
	if v, _ := n.e.Volumes(bg, nil); len(v) != 0 {
		t.Errorf("anonymous volume is left: %v", v)
	}
	// One durable write for the creation, one for the removal, none for the start.
	if p, d := n.count("containers.put"), n.count("containers.delete"); p != 1 || d != 1 {
		t.Errorf("%d puts and %d deletes of the record, want one of each", p, d)
	}
}

func TestNameConflict(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("web", Config{})
	_, _, err := n.e.CreateContainer(bg, "/web", Config{Image: "test"})
	want := fmt.Sprintf(`Conflict. The container name "/web" is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.`, id)
	if err == nil || err.Error() != want || !errdefs.IsConflict(err) {
		t.Errorf("got %v", err)
	}
	if err := n.e.RenameContainer(bg, id, "web2"); err != nil {
		t.Fatal(err)
	}
	n.create("web", Config{})
	if err := n.e.RenameContainer(bg, "web2", "web"); !errdefs.IsConflict(err) {
		t.Errorf("rename to a taken name: %v", err)
	}
}

// TestStates tries every operation in every state that a client can bring about.
func TestStates(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	ops := map[string]func(ref string) error{
		"start":   func(r string) error { return n.e.StartContainer(bg, r) },
		"stop":    func(r string) error { return n.e.StopContainer(bg, r, StopOptions{}) },
		"kill":    func(r string) error { return n.e.KillContainer(bg, r, "USR1") },
		"pause":   func(r string) error { return n.e.PauseContainer(bg, r) },
		"unpause": func(r string) error { return n.e.UnpauseContainer(bg, r) },
		"remove":  func(r string) error { return n.e.RemoveContainer(bg, r, RemoveOptions{}) },
		"top":     func(r string) error { _, err := n.e.TopContainer(bg, r, nil); return err },
		"exec": func(r string) error {
			_, err := n.e.CreateExec(bg, ExecConfig{Container: r, Cmd: []string{"sleep"}})
			return err
		},
	}
	states := map[string]func() string{
		"created": func() string { return n.create("", Config{}) },
		"running": func() string { return n.run("", Config{}) },
		"paused": func() string {
			id := n.run("", Config{})
			if err := n.e.PauseContainer(bg, id); err != nil {
				t.Fatal(err)
			}
			return id
		},
		"exited": func() string {
			id := n.run("", Config{Cmd: []string{"exit", "0"}})
			n.wait(id, WaitNotRunning)
			n.eventually("exited", func() bool { return n.state_(id).Status == StatusExited })
			return id
		},
	}
	conflict := map[string]string{
		"created": "kill pause unpause top exec",
		"running": "unpause remove",
		"paused":  "start pause remove exec",
		"exited":  "kill pause unpause top exec",
	}
	same := map[string]string{"created": "stop", "running": "start", "exited": "stop"}
	for state, enter := range states {
		for op, do := range ops {
			err := do(enter())
			switch {
			case slices.Contains(strings.Fields(conflict[state]), op):
				if !errdefs.IsConflict(err) {
					t.Errorf("%s of a %s container: %v, want a conflict", op, state, err)
				}
			case slices.Contains(strings.Fields(same[state]), op):
				if !errors.Is(err, ErrNotModified) {
					t.Errorf("%s of a %s container: %v, want not modified", op, state, err)
				}
			case err != nil:
				t.Errorf("%s of a %s container: %v", op, state, err)
			}
		}
	}
}

func TestStop(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.run("", Config{})
	if err := n.e.StopContainer(bg, id, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if s := n.state_(id); s.Status != StatusExited || s.ExitCode != 143 {
		t.Errorf("%+v", s)
	}
	zero := 0
	id = n.run("", Config{Cmd: []string{"stubborn"}})
	if err := n.e.StopContainer(bg, id, StopOptions{Timeout: &zero}); err != nil {
		t.Fatal(err)
	}
	if s := n.state_(id); s.ExitCode != 137 {
		t.Errorf("%+v", s)
	}
	id = n.run("", Config{StopSignal: "SIGINT"})
	if err := n.e.RestartContainer(bg, id, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if s := n.state_(id); s.Status != StatusRunning {
		t.Errorf("after restart %+v", s)
	}
	if err := n.e.RemoveContainer(bg, id, RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
}

// TestStartIsUndone breaks every step of a start.
func TestStartIsUndone(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("cc", Config{})
	missing := fmt.Errorf(`exec: "x": executable file not found in $PATH: %w`, errdefs.ErrNotFound)
	for _, c := range []struct {
		step string
		err  error
		code int
	}{
		{"netns", errdefs.ErrUnavailable, 128},
		{"connect", errors.New("port is already allocated"), 128},
		{"shim.start", errdefs.ErrUnavailable, 128},
		{"task.create", missing, 127},
		{"task.start", errors.New("exec: permission denied"), 126},
		{"task.start", errors.New("some other trouble"), 128},
	} {
		n.breakStep(c.step, c.err)
		a, err := n.e.Attach(bg, id, AttachOptions{Stdout: true, Stream: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := n.e.StartContainer(bg, id); err == nil || !strings.Contains(err.Error(), errtext.Plain(c.err)) {
			t.Errorf("%s broken: %v", c.step, err)
		}
		for frames := 0; ; frames++ {
			if _, _, err := a.ReadFrame(); err != nil {
				break
			} else if frames > 1 {
				t.Fatalf("%s broken: the attachment does not end", c.step)
			}
		}
		a.Close()
		if s := n.state_(id); s.Status != StatusCreated || s.ExitCode != c.code || s.Error == "" {
			t.Errorf("%s broken: state %+v, want code %d", c.step, s, c.code)
		}
		if n.nets.taken() != 0 || n.shims.count() != 0 || len(folders(n.state+"/containers")) != 0 {
			t.Errorf("%s broken: something is left", c.step)
		}
	}
	n.breakStep("", nil)
	if err := n.e.StartContainer(bg, id); err != nil {
		t.Fatalf("after all that: %v", err)
	}
	if s := n.state_(id); s.Error != "" || s.ExitCode != 0 {
		t.Errorf("%+v", s)
	}
}

// TestCreateIsUndone breaks every step of a creation.
func TestCreateIsUndone(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	for _, step := range []string{"unpack", "prepare", "containers.put", "volumes.put"} {
		n.breakStep(step, errors.New("broken"))
		_, _, err := n.e.CreateContainer(bg, "cc", Config{Image: "test", Mounts: []Mount{{Kind: MountVolume, Source: "vol", Target: "/v"}}})
		if err == nil || !strings.Contains(err.Error(), "broken") {
			t.Errorf("%s: %v", step, err)
		}
		n.clean()
		if v, _ := n.e.Volumes(bg, nil); len(v) != 0 {
			t.Errorf("%s: volumes are left: %v", step, v)
		}
	}
	n.breakStep("", nil)
	n.create("cc", Config{})
}

func TestRestartPolicy(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.run("", Config{Cmd: []string{"exit", "5"}, Restart: RestartPolicy{Name: "on-failure", MaxRetries: 2}})
	n.wait(id, WaitNotRunning)
	v, _ := n.e.Container(bg, id)
	if v.RestartCount != 2 || v.State.ExitCode != 5 || v.State.Status != StatusExited {
		t.Errorf("after on-failure:2: %d restarts, %+v", v.RestartCount, v.State)
	}
	id = n.run("", Config{Restart: RestartPolicy{Name: "always"}})
	if err := n.e.StopContainer(bg, id, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if s := n.state_(id); s.Status != StatusExited {
		t.Errorf("stopped by a user: %+v", s)
	}
	id = n.run("", Config{Cmd: []string{"exit", "0"}, Restart: RestartPolicy{Name: "always"}})
	n.eventually("restarting", func() bool { return n.state_(id).Status == StatusRestarting })
	if err := n.e.RemoveContainer(bg, id, RemoveOptions{}); !errdefs.IsConflict(err) {
		t.Errorf("remove of a restarting container: %v", err)
	}
	if err := n.e.RemoveContainer(bg, id, RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		p     RestartPolicy
		code  int
		count int
		user  bool
		again bool
		boot  bool
	}{
		{RestartPolicy{}, 1, 0, false, false, false},
		{RestartPolicy{Name: "no"}, 1, 0, false, false, false},
		{RestartPolicy{Name: "always"}, 0, 9, false, true, true},
		{RestartPolicy{Name: "always"}, 0, 9, true, false, true},
		{RestartPolicy{Name: "unless-stopped"}, 0, 0, false, true, true},
		{RestartPolicy{Name: "unless-stopped"}, 0, 0, true, false, false},
		{RestartPolicy{Name: "on-failure"}, 0, 0, false, false, false},
		{RestartPolicy{Name: "on-failure"}, 1, 99, false, true, true},
		{RestartPolicy{Name: "on-failure", MaxRetries: 3}, 1, 3, false, false, false},
	} {
		if got := c.p.again(c.code, c.count, c.user); got != c.again {
			t.Errorf("%+v again: %v", c, got)
		}
		if got := c.p.afterBoot(c.code, c.count, c.user); got != c.boot {
			t.Errorf("%+v after boot: %v", c, got)
		}
	}
}

// TestRaces lets 32 clients do everything to one container at once. Nothing may hang,
// and every state seen must be a legal one.
func TestRaces(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	const clients, each = 32, 40
	zero := 0
	ops := []func() error{
		func() error { return n.e.StartContainer(bg, "xx") },
		func() error { return n.e.StopContainer(bg, "xx", StopOptions{Timeout: &zero}) },
		func() error { return n.e.RestartContainer(bg, "xx", StopOptions{Timeout: &zero}) },
		func() error { return n.e.KillContainer(bg, "xx", "KILL") },
		func() error { return n.e.PauseContainer(bg, "xx") },
		func() error { return n.e.UnpauseContainer(bg, "xx") },
		func() error { return n.e.RemoveContainer(bg, "xx", RemoveOptions{Force: true}) },
		func() error { return n.e.RemoveContainer(bg, "xx", RemoveOptions{}) },
		func() error { _, _, err := n.e.CreateContainer(bg, "xx", Config{Image: "test"}); return err },
		func() error {
			_, err := n.e.UpdateContainer(bg, "xx", Resources{CPUShares: 100}, &RestartPolicy{Name: "always"})
			return err
		},
		func() error { _, err := n.e.Containers(bg, ListOptions{All: true}); return err },
		func() error {
			ctx, cancel := context.WithTimeout(bg, time.Millisecond)
			defer cancel()
			ch, err := n.e.WaitContainer(ctx, "xx", WaitNextExit)
			if err == nil {
				select {
				case <-ch:
				case <-ctx.Done():
				}
			}
			return err
		},
		func() error {
			a, err := n.e.Attach(bg, "xx", AttachOptions{Stdout: true, Stream: true})
			if err == nil {
				a.Close()
			}
			return err
		},
		func() error { return n.e.ConnectNetwork(bg, "n1", "xx", EndpointSettings{}) },
		func() error { return n.e.DisconnectNetwork(bg, "n1", "xx", false) },
		func() error { return n.e.RenameContainer(bg, "xx", "xx") },
	}
	if _, err := n.e.CreateNetwork(bg, NetworkConfig{Name: "n1"}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(i)))
			for range each {
				err := ops[r.IntN(len(ops))]()
				if err != nil && !errdefs.IsConflict(err) && !errdefs.IsNotFound(err) && !errdefs.IsNotModified(err) &&
					!errdefs.IsPermissionDenied(err) && !errdefs.IsInvalidArgument(err) {
					t.Errorf("unexpected error %v", err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Minute):
		t.Fatal("deadlock: not done after 5 minutes")
	}
	if err := n.e.RemoveContainer(bg, "xx", RemoveOptions{Force: true}); err != nil && !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	n.clean()
}

func TestWaitRemoved(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.run("", Config{})
	ch, err := n.e.WaitContainer(bg, id, WaitRemoved)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.e.RemoveContainer(bg, id, RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if r := <-ch; r.ExitCode != 137 {
		t.Errorf("%+v", r)
	}
	if _, err := n.e.WaitContainer(bg, id, "nonsense"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad condition: %v", err)
	}
}

// TestShimCrash: a container whose shim dies has ended, and its end is known at once.
func TestShimCrash(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.run("", Config{})
	n.shims.live[n.e.bundle(id)].die()
	if code := n.wait(id, WaitNotRunning); code != 137 {
		t.Errorf("exit code %d", code)
	}
	if n.nets.taken() != 0 {
		t.Error("network is held")
	}
}

func TestIDs(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for range 1000 {
		id := newID()
		if len(id) != 64 || seen[id] {
			t.Fatalf("id %q", id)
		}
		seen[id] = true
	}
	for i := range 1000 {
		if name := randomName(i % 10); !validName.MatchString(name) || !strings.Contains(name, "_") {
			t.Fatalf("name %q", name)
		}
	}
}
