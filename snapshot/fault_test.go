package snapshot

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	imagestore "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/store"
)

const faultText = "the contents of a blob"

// faultStep is an operation of store or snapshotter, and how to see that it is there.
type faultStep struct {
	name  string
	do    func(ctx context.Context, s *store.Store, sn *Snapshotter) error
	there func(ctx context.Context, s *store.Store, sn *Snapshotter) error
}

// committed makes a layer with one file.
func committed(name, parent string) faultStep {
	return faultStep{"commit " + name, func(ctx context.Context, _ *store.Store, sn *Snapshotter) error {
		mounts, err := sn.Prepare(ctx, "tmp-"+name, parent)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(upperOf(mounts), "file-"+name), []byte(name), 0o644); err != nil {
			return err
		}
		return sn.Commit(ctx, name, "tmp-"+name)
	}, func(ctx context.Context, _ *store.Store, sn *Snapshotter) error {
		info, err := sn.Stat(ctx, name)
		if err != nil {
			return err
		}
		if info.Kind != snapshots.KindCommitted || info.Parent != parent {
			return fmt.Errorf("%+v", info)
		}
		mounts, err := sn.View(ctx, "view-"+name, name)
		if err != nil {
			return err
		}
		defer sn.Remove(ctx, "view-"+name)
		return mount.WithTempMount(ctx, mounts, func(dir string) error {
			raw, err := os.ReadFile(filepath.Join(dir, "file-"+name))
			if err == nil && string(raw) != name {
				err = fmt.Errorf("the file holds %q", raw)
			}
			return err
		})
	}}
}

// upperOf is the directory that mounts of an active snapshot are written to.
func upperOf(mounts []mount.Mount) string {
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			return dir
		}
	}
	return mounts[0].Source
}

var faultBlob = ocispec.Descriptor{MediaType: "t", Digest: digest.FromString(faultText), Size: int64(len(faultText))}

var faultSteps = []faultStep{
	{"blob", func(ctx context.Context, s *store.Store, _ *Snapshotter) error {
		return content.WriteBlob(ctx, s.Content(), "ref", strings.NewReader(faultText), faultBlob, content.WithLabels(map[string]string{"containerd.io/gc.root": "x"}))
	}, func(ctx context.Context, s *store.Store, _ *Snapshotter) error {
		raw, err := content.ReadBlob(ctx, s.Content(), faultBlob)
		if err == nil && string(raw) != faultText {
			err = fmt.Errorf("it holds %q", raw)
		}
		return err
	}},
	{"image", func(ctx context.Context, s *store.Store, _ *Snapshotter) error {
		_, err := s.Images().Create(ctx, imagestore.Image{Name: "image", Target: faultBlob})
		return err
	}, func(ctx context.Context, s *store.Store, _ *Snapshotter) error {
		img, err := s.Images().Get(ctx, "image")
		if err == nil && img.Target.Digest != faultBlob.Digest {
			err = fmt.Errorf("%+v", img)
		}
		return err
	}},
	{"record", func(ctx context.Context, s *store.Store, _ *Snapshotter) error {
		return s.Records("kind").Put(ctx, "id", "value")
	}, func(ctx context.Context, s *store.Store, _ *Snapshotter) error {
		var v string
		err := s.Records("kind").Get(ctx, "id", &v)
		if err == nil && v != "value" {
			err = fmt.Errorf("it is %q", v)
		}
		return err
	}},
	committed("base", ""),
	committed("top", "base"),
	{"removal", func(ctx context.Context, _ *store.Store, sn *Snapshotter) error {
		if _, err := sn.Prepare(ctx, "gone", "base"); err != nil {
			return err
		}
		return sn.Remove(ctx, "gone")
	}, func(ctx context.Context, _ *store.Store, sn *Snapshotter) error {
		_, err := sn.Stat(ctx, "gone")
		if errdefs.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("it is there (%v)", err)
	}},
}

// faultChild does all steps, whatever fails, and says what was acknowledged.
func faultChild(root, driver string) error {
	s, err := store.Open(root+"/store", store.Options{NoBackgroundGC: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		fmt.Println("failed open:", err)
		return nil
	}
	sn, err := drivers[driver](root+"/sn", s)
	if err != nil {
		fmt.Println("failed open:", err)
		return nil
	}
	for _, step := range faultSteps {
		if err := step.do(testContext(), s, sn); err != nil {
			fmt.Printf("failed %s: %v\n", step.name, err)
		} else {
			fmt.Println("ack", step.name)
		}
	}
	_ = sn.Close()
	_ = s.Close()
	fmt.Println("end")
	return nil
}

// TestFaults lets the system calls fail that make something last: of one kind, the n-th of each
// thread (so counts strace), for all n. What was acknowledged is there afterwards, whole, and what was not
// is there whole or leaves nothing.
func TestFaults(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s makes overlay snapshots", t.Name())
	}
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skipf("needs strace: %s lets system calls fail", t.Name())
	}
	for _, driver := range []string{"overlayfs", "erofs"} {
		t.Run(driver, func(t *testing.T) {
			if driver == "erofs" {
				if err := ErofsSupported(t.TempDir()); err != nil {
					t.Skipf("needs EROFS: %s: %v", t.Name(), err)
				}
			}
			run := func(root string, options ...string) (out, trace string) {
				t.Helper()
				log := filepath.Join(t.TempDir(), "trace")
				cmd := exec.Command("strace", append(append([]string{"-f", "--seccomp-bpf", "-o", log}, options...), os.Args[0])...)
				cmd.Env = append(os.Environ(), "HAKO_FAULT_ROOT="+root, "HAKO_CRASH_DRIVER="+driver, "GOMAXPROCS=1")
				var b bytes.Buffer
				cmd.Stdout, cmd.Stderr = &b, &b
				if err := cmd.Run(); err != nil {
					t.Fatalf("%v\n%s", err, b.Bytes())
				}
				raw, err := os.ReadFile(log)
				if err != nil {
					t.Fatal(err)
				}
				return b.String(), string(raw)
			}
			for _, call := range []struct{ names, errno string }{{"fsync", "EIO"}, {"fdatasync", "EIO"}, {"syncfs", "EIO"}, {"renameat,renameat2", "ENOSPC"}} {
				root := shortDir(t)
				out, trace := run(root, "-e", "trace="+call.names)
				if strings.Contains(out, "failed") || !strings.Contains(out, "end") {
					t.Fatalf("without a fault: %s", out)
				}
				calls := 0
				for _, name := range strings.Split(call.names, ",") {
					calls += strings.Count(trace, " "+name+"(")
				}
				noticed := 0
				for n := 1; n <= calls; n++ {
					root := shortDir(t)
					out, _ := run(root, "-e", "trace="+call.names, "-e", fmt.Sprintf("inject=%s:error=%s:when=%d", call.names, call.errno, n))
					if strings.Contains(out, "failed") {
						noticed++
					}
					checkFaults(t, driver, root, out, fmt.Sprintf("%s number %d", call.names, n))
				}
				if calls > 0 && noticed == 0 {
					t.Errorf("%s: no operation failed", call.names)
				}
				t.Logf("%s: %d calls, %d runs with failures", call.names, calls, noticed)
			}
		})
	}
}

// shortDir is a folder of its own, with a short name: mount options hold it.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hkf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmountAll(dir + "/sn"); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	return dir
}

// checkFaults looks at what a child left.
func checkFaults(t *testing.T, driver, root, out, what string) {
	t.Helper()
	s, err := store.Open(root+"/store", store.Options{NoBackgroundGC: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Errorf("%s: %v\n%s", what, err, out)
		return
	}
	defer s.Close()
	sn, err := drivers[driver](root+"/sn", s)
	if err != nil {
		t.Errorf("%s: %v\n%s", what, err, out)
		return
	}
	defer sn.Close()
	ctx := testContext()
	for _, step := range faultSteps {
		acked := slices.Contains(strings.Split(out, "\n"), "ack "+step.name)
		err := step.there(ctx, s, sn)
		if acked && err != nil || !acked && err != nil && !errdefs.IsNotFound(err) && step.name != "removal" {
			t.Errorf("%s: %s, acknowledged: %v: %v\n%s", what, step.name, acked, err, out)
		}
	}
	// What failed half way and has a name may be taken away by it.
	for _, key := range []string{"tmp-base", "tmp-top", "gone"} {
		if err := sn.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
			t.Errorf("%s: remove %s: %v", what, key, err)
		}
	}
	if err := sn.Cleanup(ctx); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	if _, err := s.GC(ctx); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	found, err := s.Check(ctx, store.CheckOptions{Deep: true})
	if err != nil {
		t.Errorf("%s: %v", what, err)
	}
	more, err := sn.Check(ctx, store.CheckOptions{Deep: true})
	if err != nil {
		t.Errorf("%s: %v", what, err)
	}
	for _, f := range append(found, more...) {
		t.Errorf("%s: %+v\n%s", what, f, out)
	}
}
