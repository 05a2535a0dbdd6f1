package snapshot

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/store"
)

// TestMain makes this program the child of TestCrash or TestFaults if it is asked to be.
func TestMain(m *testing.M) {
	if root := os.Getenv("HAKO_FAULT_ROOT"); root != "" {
		if err := faultChild(root, os.Getenv("HAKO_CRASH_DRIVER")); err != nil {
			fmt.Println(err)
		}
		return
	}
	if root := os.Getenv("HAKO_CRASH_ROOT"); root != "" {
		fmt.Println("FAIL:", crashChild(root, os.Getenv("HAKO_CRASH_DRIVER")))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// crashChild makes, stacks and removes snapshots until it is killed.
func crashChild(root, driver string) error {
	s, err := store.Open(root+"/store", store.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	sn, err := drivers[driver](root+"/sn", s)
	if err != nil {
		return err
	}
	failed := make(chan error)
	for range 3 {
		go func() {
			for {
				if err := crashStep(sn, rand.Int64()); err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	return <-failed
}

func crashStep(sn *Snapshotter, n int64) error {
	ctx := testContext()
	base, top := fmt.Sprint("base-", n), fmt.Sprint("top-", n)
	for _, step := range []struct{ key, name, parent string }{{"tmp-" + base, base, ""}, {"tmp-" + top, top, base}} {
		m, err := sn.Prepare(ctx, step.key, "")
		if err != nil {
			return err
		}
		for i := range 5 {
			if err := os.WriteFile(filepath.Join(m[0].Source, fmt.Sprint(step.name, i)), []byte(step.name), 0o600); err != nil {
				return err
			}
		}
		var opts []snapshots.Opt
		if step.parent != "" {
			opts = append(opts, snapshots.WithParent(step.parent))
		}
		if err := sn.Commit(ctx, step.name, step.key, opts...); err != nil {
			return err
		}
	}
	if err := sn.Merge(ctx, top); err != nil {
		return err
	}
	run := fmt.Sprint("run-", n)
	if _, err := sn.Prepare(ctx, run, top); err != nil {
		return err
	}
	if err := sn.Remove(ctx, run); err != nil {
		return err
	}
	fmt.Println("have", n)
	if n%3 == 0 {
		fmt.Println("dropping", n)
		if err := sn.Remove(ctx, top); err != nil {
			return err
		}
		if err := sn.Remove(ctx, base); err != nil {
			return err
		}
		fmt.Println("dropped", n)
	}
	return nil
}

// TestCrash kills a process that works on snapshots, again and again: what was
// acknowledged is whole, what was removed stays removed, and no directory is left over.
func TestCrash(t *testing.T) {
	needsRoot(t)
	for driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			root := t.TempDir()
			state := map[string]string{}
			defer func() {
				must(t, unmountAll(root+"/sn"))
				noLoopDevices(t, root)
			}()
			for range 10 {
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), "HAKO_CRASH_ROOT="+root, "HAKO_CRASH_DRIVER="+driver)
				out, err := cmd.StdoutPipe()
				must(t, err)
				must(t, cmd.Start())
				// After some steps, however long they take, and then at any moment.
				kill := time.AfterFunc(5*time.Minute, func() { _ = cmd.Process.Signal(syscall.SIGKILL) })
				left := 4 + rand.IntN(12)
				for lines := bufio.NewScanner(out); lines.Scan(); {
					if left--; left == 0 {
						kill.Reset(time.Duration(rand.IntN(30)) * time.Millisecond)
					}
					what, n, ok := strings.Cut(lines.Text(), " ")
					if !ok || what == "FAIL:" {
						t.Error("child:", lines.Text())
						continue
					}
					state[n] = what
				}
				_ = cmd.Wait()
				checkAfterCrash(t, root, drivers[driver], state)
			}
			if len(state) < 20 {
				t.Errorf("only %d steps were made: this proves little", len(state))
			}
		})
	}
}

func checkAfterCrash(t *testing.T, root string, open opener, state map[string]string) {
	ctx := testContext()
	s := openStore(t, root+"/store")
	defer s.Close()
	sn, err := open(root+"/sn", s)
	must(t, err)
	defer sn.Close()
	must(t, sn.Cleanup(ctx))
	for n, what := range state {
		for _, name := range []string{"base-" + n, "top-" + n} {
			_, err := sn.Stat(ctx, name)
			if errdefs.IsNotFound(err) && what != "have" || err == nil && what != "dropped" {
				continue
			}
			t.Errorf("%s is %q: %v", name, what, err)
		}
	}
	records := 0
	must(t, sn.Walk(ctx, func(ctx context.Context, i snapshots.Info) error {
		records++
		own, _, err := sn.layers(ctx, i.Name)
		if err != nil {
			return err
		}
		release, err := sn.driver.show([]layer{own})
		if err != nil {
			return err
		}
		defer release()
		files, err := os.ReadDir(sn.driver.files(own))
		want := 5
		if i.Parent != "" && sn.driver.whole() {
			want = 10
		}
		if i.Kind == snapshots.KindCommitted && (err != nil || len(files) != want) {
			t.Errorf("%s has %d files, %v", i.Name, len(files), err)
		}
		return nil
	}))
	if dirs, err := os.ReadDir(sn.dir()); err != nil || len(dirs) != records {
		t.Errorf("%d directories for %d records, %v", len(dirs), records, err)
	}
}

func TestFullDisk(t *testing.T) {
	needsRoot(t)
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,nr_inodes=60,size=4m"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	ctx := testContext()
	s := openStore(t, filepath.Join(dir, "store"))
	defer s.Close()
	sn, err := NewNative(filepath.Join(dir, "sn"), s)
	must(t, err)
	defer sn.Close()
	m, err := sn.Prepare(ctx, "a", "")
	must(t, err)
	for i := range 30 {
		must(t, os.WriteFile(filepath.Join(m[0].Source, fmt.Sprint(i)), nil, 0o600))
	}
	must(t, sn.Commit(ctx, "c", "a"))
	if _, err := sn.Prepare(ctx, "b", "c"); !errdefs.IsResourceExhausted(err) {
		t.Error(err)
	}
	must(t, sn.Cleanup(ctx))
	if dirs, err := os.ReadDir(sn.dir()); err != nil || len(dirs) != 1 {
		t.Errorf("left %v, %v", dirs, err)
	}
	if _, err := sn.Stat(ctx, "b"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	prepare(t, sn, "small", "")
}

// TestGivenImageOutlivesTheDaemon: an image that was sealed is what the snapshot holds, also for the daemon that comes after the one
// which took it; and one that a failed commit has made of the directory is not.
func TestGivenImageOutlivesTheDaemon(t *testing.T) {
	needsRoot(t)
	dir := t.TempDir()
	s := openStore(t, filepath.Join(dir, "store"))
	t.Cleanup(func() { must(t, s.Close()) })
	open := func() *Snapshotter {
		sn, err := newErofs(filepath.Join(dir, "sn"), s)
		must(t, err)
		t.Cleanup(func() { must(t, unmountAll(filepath.Join(dir, "sn"))) })
		return sn
	}
	ctx, sn := testContext(), open()
	write(t, prepare(t, sn, "l0", ""), "a", "given")
	must(t, sn.Commit(ctx, "c0", "l0"))
	images, err := filepath.Glob(filepath.Join(dir, "sn", "snapshots", "*", "layer.erofs"))
	must(t, err)
	if len(images) != 1 {
		t.Fatalf("images %v", images)
	}
	image, err := os.ReadFile(images[0])
	must(t, err)

	write(t, prepare(t, sn, "given", ""), "a", "of no account")
	f, err := sn.NewLayerFile(ctx, "given")
	must(t, err)
	_, err = f.Write(image)
	must(t, errors.Join(err, f.Seal(), f.Close()))
	write(t, prepare(t, sn, "made", ""), "a", "old")
	if err := sn.Commit(leases.WithLease(ctx, "none"), "c-made", "made"); !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	must(t, sn.Close())

	sn = open()
	defer sn.Close()
	m, err := sn.Mounts(ctx, "made")
	must(t, err)
	write(t, detached(t, m), "a", "new")
	for key, want := range map[string]string{"given": "a=given", "made": "a=new"} {
		must(t, sn.Commit(ctx, "c-"+key, key))
		if got := tree(t, view(t, sn, "v-"+key, "c-"+key)); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
}
