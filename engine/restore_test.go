package engine

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/network"
)

func TestCrashOfTheDaemon(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	running := n.run("running", Config{})
	paused := n.run("paused", Config{})
	if err := n.e.PauseContainer(bg, paused); err != nil {
		t.Fatal(err)
	}
	ended := n.run("ended", Config{})
	lost := n.run("lost", Config{})
	always := n.run("always", Config{Restart: RestartPolicy{Name: "always"}})
	auto := n.run("auto", Config{AutoRemove: true})
	idle := n.create("idle", Config{AutoRemove: true})
	started := n.state_(running).StartedAt

	n.e.cancel(errClosed)
	n.e.work.Wait()
	kill := func(id string, code int) {
		s := n.shims.live[n.e.bundle(id)]
		s.mu.Lock()
		defer s.mu.Unlock()
		s.procs[procKey(id, "")].end(code)
	}
	kill(ended, 9)
	kill(always, 4)
	kill(auto, 0)
	n.shims.live[n.e.bundle(lost)].die()
	n.containers.damage("zz", `{"version":1,"id":`) // a damaged one
	n.boot()

	if s := n.state_(running); s.Status != StatusRunning || !s.StartedAt.Equal(started) || s.Pid == 0 {
		t.Errorf("running: %+v", s)
	}
	if v, _ := n.e.Container(bg, running); v.SandboxKey == "" || len(v.Endpoints) != 1 || !v.Endpoints[0].IPv4.IsValid() {
		t.Errorf("running lost its network: %+v", v.Endpoints)
	}
	if s := n.state_(paused); s.Status != StatusPaused {
		t.Errorf("paused: %+v", s)
	}
	if s := n.state_(ended); s.Status != StatusExited || s.ExitCode != 9 || s.FinishedAt.IsZero() {
		t.Errorf("ended: %+v", s)
	}
	if s := n.state_(lost); s.Status != StatusExited || s.ExitCode != 137 {
		t.Errorf("lost: %+v", s)
	}
	n.eventually("always runs again", func() bool { return n.state_(always).Status == StatusRunning })
	n.eventually("auto is removed", func() bool { _, err := n.e.Container(bg, auto); return errdefs.IsNotFound(err) })
	if s := n.state_(idle); s.Status != StatusCreated {
		t.Errorf("idle: %+v", s)
	}
	if err := n.e.UnpauseContainer(bg, paused); err != nil {
		t.Error(err)
	}
	n.crash() // a second time
	if s := n.state_(idle); s.Status != StatusCreated {
		t.Errorf("idle, after two crashes: %+v", s)
	}
	if s := n.state_(ended); s.ExitCode != 9 {
		t.Errorf("ended, after two crashes: %+v", s)
	}
	for _, id := range []string{running, paused, ended, lost, always, idle} {
		if err := n.e.RemoveContainer(bg, id, RemoveOptions{Force: true}); err != nil {
			t.Error(err)
		}
	}
	if err := n.containers.Delete(bg, "zz"); err != nil {
		t.Fatal(err)
	}
	n.clean()
}

// TestCrashAfterExit: the exit code is right whenever the daemon dies on the way from
// the exit to the record.
func TestCrashAfterExit(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.run("cc", Config{})
	n.breakStep("containers.put", errdefs.ErrUnavailable) // as if it died before the write
	n.shims.exits = map[string]int{n.e.bundle(id): 143}
	if err := n.e.StopContainer(bg, id, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	n.breakStep("", nil)
	n.crash()
	if s := n.state_(id); s.Status != StatusExited || s.ExitCode != 143 {
		t.Errorf("%+v", s)
	}
}

// TestHalfMade: of a creation, and of a removal, only the record was written, or was left.
func TestHalfMade(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	made := n.create("made", Config{})
	ran := n.run("ran", Config{})
	if err := n.e.StopContainer(bg, ran, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	n.e.cancel(errClosed)
	n.e.work.Wait()
	for _, id := range []string{made, ran} {
		if err := n.snaps.Remove(bg, id); err != nil {
			t.Fatal(err)
		}
	}
	n.boot()
	for _, id := range []string{made, ran} {
		if _, err := n.e.Container(bg, id); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", id, err)
		}
		if _, err := os.Stat(n.e.dir(id)); err == nil {
			t.Errorf("the folder of %s is left", id)
		}
	}
	n.create("made", Config{}) // the name is free
}

// TestStraySnapshot: a creation was cut short between the file system and the record.
func TestStraySnapshot(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	made := n.create("made", Config{})
	cut := newID()
	for _, s := range []struct {
		key  string
		opts []snapshots.Opt
	}{{cut, []snapshots.Opt{ownedBy(cut)}}, {newID(), nil}} { // the other is no container's
		if _, err := n.snaps.Prepare(bg, s.key, "", s.opts...); err != nil {
			t.Fatal(err)
		}
	}
	n.crash()
	if _, err := n.snaps.Stat(bg, cut); !errdefs.IsNotFound(err) {
		t.Errorf("the stray snapshot is left: %v", err)
	}
	if n.snaps.count() != 2 {
		t.Errorf("%d snapshots, not the container's and that of somebody else", n.snaps.count())
	}
	if err := n.e.StartContainer(bg, made); err != nil {
		t.Error(err)
	}
	// With a record that cannot be read, nobody knows whose it is.
	if _, err := n.snaps.Prepare(bg, cut, "", ownedBy(cut)); err != nil {
		t.Fatal(err)
	}
	n.containers.damage(cut, "{")
	n.crash()
	if n.snaps.count() != 3 {
		t.Errorf("%d snapshots: that of an unreadable record is gone", n.snaps.count())
	}
}

// TestCrashBeforeShutdown: the task is deleted, the shim still lives.
func TestCrashBeforeShutdown(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.run("cc", Config{})
	n.e.cancel(errClosed)
	n.e.work.Wait()
	s := n.shims.live[n.e.bundle(id)]
	if _, err := s.Delete(bg, id, ""); err != nil {
		t.Fatal(err)
	}
	n.shims.exits = map[string]int{n.e.bundle(id): 8}
	n.boot()
	if s := n.state_(id); s.Status != StatusExited || s.ExitCode != 8 {
		t.Errorf("%+v", s)
	}
	if n.shims.count() != 0 || n.nets.taken() != 0 {
		t.Error("something is left")
	}
}

// TestCrashInCleanup: an end that is recorded is not asked for again.
func TestCrashInCleanup(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.run("cc", Config{Cmd: []string{"exit", "6"}})
	n.wait(id, WaitNotRunning)
	n.e.cancel(errClosed)
	n.e.work.Wait()
	started := n.state_(id).StartedAt
	if err := os.Mkdir(n.e.bundle(id), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeRunFile(n.e.bundle(id), runFile{Pid: 1, StartedAt: started}); err != nil {
		t.Fatal(err)
	}
	n.boot()
	if s := n.state_(id); s.Status != StatusExited || s.ExitCode != 6 {
		t.Errorf("%+v", s)
	}
	if left := folders(filepath.Join(n.state, "containers")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestReboot(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	plain := n.run("plain", Config{})
	always := n.run("always", Config{Restart: RestartPolicy{Name: "always"}})
	unless := n.run("unless", Config{Restart: RestartPolicy{Name: "unless-stopped"}})
	stopped := n.run("stopped", Config{Restart: RestartPolicy{Name: "unless-stopped"}})
	if err := n.e.StopContainer(bg, stopped, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	never := n.create("never", Config{Restart: RestartPolicy{Name: "always"}})
	auto := n.run("auto", Config{AutoRemove: true})
	n.eventually("records are written", func() bool {
		var r record
		return n.containers.Get(bg, plain, &r) == nil && r.Started && n.containers.Get(bg, stopped, &r) == nil && r.StoppedByUser && r.State.Status == StatusExited
	})
	n.e.cancel(errClosed)
	n.e.work.Wait()
	if err := os.RemoveAll(filepath.Join(n.state, "containers")); err != nil {
		t.Fatal(err)
	}
	clear(n.shims.live)
	n.boot()
	if s := n.state_(plain); s.Status != StatusExited || s.ExitCode != exitUnknown {
		t.Errorf("plain: %+v", s)
	}
	n.eventually("policies", func() bool {
		return n.state_(always).Status == StatusRunning && n.state_(unless).Status == StatusRunning
	})
	if s := n.state_(stopped); s.Status != StatusExited {
		t.Errorf("stopped: %+v", s)
	}
	if s := n.state_(never); s.Status != StatusCreated {
		t.Errorf("never: %+v", s)
	}
	n.eventually("auto is removed", func() bool { _, err := n.e.Container(bg, auto); return errdefs.IsNotFound(err) })
	n.eventually("only what runs holds addresses", func() bool { return n.nets.taken() == 2*2 })
	for _, id := range []string{plain, always, unless, stopped, never} {
		if err := n.e.RemoveContainer(bg, id, RemoveOptions{Force: true}); err != nil {
			t.Error(err)
		}
	}
	n.clean()
}

// TestHungShim: a shim that does not answer holds nobody up, and is taken up when it does.
func TestHungShim(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	hung := n.run("hung", Config{})
	good := n.run("good", Config{})
	n.e.cancel(errClosed)
	n.e.work.Wait()
	n.shims.mu.Lock()
	n.shims.hang[n.e.bundle(hung)] = true
	n.shims.mu.Unlock()
	n.boot() // it would hang
	if s := n.state_(good); s.Status != StatusRunning {
		t.Errorf("good: %+v", s)
	}
	if s := n.state_(hung); s.Status != StatusRunning {
		t.Errorf("hung: %+v", s)
	}
	n.shims.mu.Lock()
	delete(n.shims.hang, n.e.bundle(hung))
	n.shims.mu.Unlock()
}

// TestManyHungShims: they are waited for together.
func TestManyHungShims(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	const many = 4 * restoreWidth
	var hung []string
	for i := range many {
		hung = append(hung, n.run(fmt.Sprint("hung", i), Config{}))
	}
	good := n.run("zz", Config{})
	n.e.cancel(errClosed)
	n.e.work.Wait()
	n.shims.mu.Lock()
	for _, id := range hung {
		n.shims.hang[n.e.bundle(id)] = true
	}
	n.shims.mu.Unlock()
	n.boot()
	n.shims.mu.Lock()
	if most := n.shims.mostHung; most <= restoreWidth {
		t.Errorf("never more than %d were waited for at a time", most)
	}
	n.shims.mu.Unlock()
	for _, id := range append(hung, good) {
		if s := n.state_(id); s.Status != StatusRunning {
			t.Errorf("%+v", s)
		}
	}
	n.shims.mu.Lock()
	clear(n.shims.hang)
	n.shims.mu.Unlock()
}

// TestUnfinished: what a daemon that died in the middle of something leaves is cleaned.
func TestUnfinished(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("cc", Config{})
	n.e.cancel(errClosed)
	n.e.work.Wait()
	// A start that got as far as the bundle and the network.
	if err := os.Mkdir(n.e.bundle(id), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := n.nets.Connect(bg, network.EndpointConfig{ID: id, Network: "bridge", Netns: "/ns/" + id}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.nets.NewNetns(bg, id); err != nil {
		t.Fatal(err)
	}
	// A creation and a removal that were cut short.
	stray := newID()
	for _, dir := range []string{n.e.dir(stray), n.e.bundle(stray)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	doomed := filepath.Join(n.root, "volumes", doomedPrefix+"v", "_data")
	if err := os.MkdirAll(doomed, 0o700); err != nil {
		t.Fatal(err)
	}
	n.boot()
	if s := n.state_(id); s.Status != StatusCreated {
		t.Errorf("%+v", s)
	}
	if n.nets.taken() != 0 {
		t.Error("an endpoint is held")
	}
	for _, dir := range []string{n.e.dir(stray), n.e.bundle(stray), filepath.Dir(doomed)} {
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s is left", dir)
		}
	}
	if err := n.e.StartContainer(bg, id); err != nil {
		t.Error(err)
	}
}
