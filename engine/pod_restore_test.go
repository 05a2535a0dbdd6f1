package engine

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/shim/client"
)

// tarOf packs headers with what their files hold.
func tarOf(t *testing.T, files ...any) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		h, content := files[i].(tar.Header), files[i+1].(string)
		h.Size, h.Mode = int64(len(content)), 0o644
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func plain(name string) tar.Header { return tar.Header{Name: name, Typeflag: tar.TypeReg} }

// infoOf is a config.dump.
func infoOf(t *testing.T, change func(*checkpointInfo)) string {
	t.Helper()
	i := checkpointInfo{ImageRef: digest.FromString("test").String(), Image: "example.org/test:1", Engine: checkpointEngine}
	if change != nil {
		change(&i)
	}
	raw, err := json.Marshal(i)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// takes lets the fake shims restore: it gives what the next container was made of.
func (n *node) takes() (files, options map[string]string) {
	files, options = map[string]string{}, map[string]string{}
	n.shims.restore = func(o client.CreateOptions, s specs.Spec) error {
		clear(files)
		entries, err := os.ReadDir(o.Checkpoint)
		for _, f := range entries {
			st, serr := f.Info()
			raw, rerr := os.ReadFile(filepath.Join(o.Checkpoint, f.Name()))
			err = errors.Join(err, serr, rerr)
			files[f.Name()] = fmt.Sprintf("%v %s", st.Mode(), raw)
		}
		conf, cerr := os.ReadFile(s.Annotations[annotationCRIUConfig])
		options["criu"] = string(conf)
		var points []string
		for _, m := range s.Mounts {
			points = append(points, m.Destination)
		}
		options["mounts"] = strings.Join(points, " ")
		return errors.Join(err, cerr)
	}
	return files, options
}

func TestRestoreContainer(t *testing.T) {
	withCRIU(t)
	n, snaps := withFiles(t)
	files, options := n.takes()
	pod := n.pod(hostPod("p"))
	out := t.TempDir()
	archive := filepath.Join(out, "c.tar")
	data := t.TempDir()
	c := memberConfig("a", "sleep")
	c.Mounts = []Mount{{Kind: MountBind, Source: data, Target: "/data"}, {Kind: MountBind, Source: data, Target: "/also"}}
	id := n.member(pod, c)
	root, err := n.e.openSnapshot(n.e.ns(bg), n.view(id), true)
	if err != nil {
		t.Fatal(err)
	}
	f, err := root.Open("changed", unix.O_CREAT|unix.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	root.Close()
	if err := n.e.CheckpointContainer(bg, id, archive); err != nil {
		t.Fatal(err)
	}
	var spec specs.Spec
	if err := json.Unmarshal([]byte(filesOf(t, archive)[checkpointSpec]), &spec); err != nil {
		t.Fatal(err)
	}
	var points []string
	for _, m := range spec.Mounts {
		points = append(points, m.Destination)
	}

	// The same as an image, in another place.
	ctx := n.e.ns(bg)
	mounts, err := snaps.Prepare(ctx, "making", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(mounts[0].Source, "checkpoint"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range filesOf(t, archive) {
		if !strings.HasSuffix(name, "/") {
			if err := os.WriteFile(filepath.Join(mounts[0].Source, name), []byte(content), 0o666); err != nil {
				t.Fatal(err)
			}
		}
	}
	// What is no plain file is not followed, and not taken.
	if err := os.Symlink("/etc/shadow", filepath.Join(mounts[0].Source, "checkpoint", "link.img")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(mounts[0].Source, "checkpoint", "fifo.img"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := snaps.Commit(ctx, "layer", "making"); err != nil {
		t.Fatal(err)
	}
	frozen := image.Image{ID: digest.FromString("frozen"), Names: []string{"docker.io/library/frozen:latest"}, Annotations: map[string]string{checkpointAnnotations[0]: "a"}}
	n.images.imgs = append(n.images.imgs, frozen)
	n.images.chains = map[digest.Digest]string{frozen.ID: "layer"}

	again := func(name, from string) (string, error) {
		c := memberConfig(name)
		c.Image = from
		c.Mounts = []Mount{{Kind: MountBind, Source: data, Target: "/also"}, {Kind: MountBind, Source: data, Target: "/data/"}}
		return n.e.CreatePodContainer(bg, pod, c)
	}
	if _, err := again("forbidden", "frozen"); !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "restore-checkpoints") {
		t.Errorf("an image, of which the configuration says nothing: %v", err)
	}
	n.e.opt.RestoreCheckpoints = RestoreNone
	if _, err := again("forbidden", archive); !errdefs.IsPermissionDenied(err) {
		t.Errorf("an archive, where none is allowed: %v", err)
	}
	n.restorable = RestoreImages
	n.crash()
	for name, from := range map[string]string{"archive": archive, "image": "frozen"} {
		id, err := again(name, from)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		v := n.view(id)
		if v.ImageID != digest.FromString("test").String() || v.Config.Pod.UserImage != from {
			t.Errorf("%s: it runs from %s, of %s", name, v.ImageID, v.Config.Pod.UserImage)
		}
		root, err := n.e.openSnapshot(ctx, v, false)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := root.ReadFile("changed", 100); err != nil {
			t.Errorf("%s: a file that had been written: %v", name, err)
		}
		root.Close()
		n.crash() // it waits for its start in the folder
		if err := n.e.StartPodContainer(bg, id); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if want := map[string]string{"frozen": "-rw------- true"}; !maps.Equal(files, want) {
			t.Errorf("%s: CRIU gets %q", name, files)
		}
		if got := strings.Fields(options["mounts"]); !slices.Equal(got, points) || options["criu"] != "tcp-close\n" {
			t.Errorf("%s: mounts %q, were %q; options %q", name, got, points, options["criu"])
		}
		n.eventually("the end of the files that "+name+" was restored from", func() bool {
			_, err := os.Lstat(n.e.restoreDir(id))
			return errors.Is(err, os.ErrNotExist)
		})
	}
	// One that is not started takes its files along.
	id, err = again("never", archive)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.e.RemovePodContainer(bg, id); err != nil {
		t.Error(err)
	}
	less := memberConfig("less")
	less.Image = archive
	if id, err = n.e.CreatePodContainer(bg, pod, less); err != nil {
		t.Fatal(err)
	}
	if err := n.e.StartPodContainer(bg, id); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "had a mount /") {
		t.Errorf("without a mount: %v", err)
	}
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	if left := folders(filepath.Join(n.root, "containers")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func (n *node) view(id string) Container {
	n.t.Helper()
	v, err := n.e.Container(bg, id)
	if err != nil {
		n.t.Fatal(err)
	}
	return v
}

// TestRestoreHostile: an archive says whatever it likes. Nothing of what is refused is left.
func TestRestoreHostile(t *testing.T) {
	withCRIU(t)
	n, _ := withFiles(t)
	files, _ := n.takes()
	pod := n.pod(hostPod("p"))
	mapped := n.e.pods.byID[pod].rec
	mapped.Config.Userns, mapped.Config.Runtime = &Userns{}, ""
	dir := t.TempDir()
	spec := `{"mounts":[]}`
	usual := []any{plain("./" + checkpointConfig), infoOf(t, nil), plain(checkpointSpec), spec}
	write := func(content []byte) string {
		t.Helper()
		name := filepath.Join(dir, "x.tar")
		_ = os.Remove(name)
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	create := func(image string) error {
		t.Helper()
		c := memberConfig("x")
		c.Image = image
		id, err := n.e.CreatePodContainer(bg, pod, c)
		if err == nil {
			err = n.e.RemovePodContainer(bg, id)
		}
		return err
	}
	for what, c := range map[string]struct {
		is   func(error) bool
		text string
		tar  []byte
	}{
		"no tar":            {errdefs.IsInvalidArgument, "plain tar", bytes.Repeat([]byte("x"), 2048)},
		"nothing":           {errdefs.IsInvalidArgument, "no checkpoint", nil},
		"no description":    {errdefs.IsInvalidArgument, "no checkpoint", tarOf(t, plain("checkpoint/a.img"), "a")},
		"no JSON":           {errdefs.IsInvalidArgument, "config.dump", tarOf(t, plain(checkpointConfig), "{", plain(checkpointSpec), spec)},
		"a long one":        {errdefs.IsInvalidArgument, "longer than", tarOf(t, plain(checkpointConfig), strings.Repeat(" ", maxCheckpointInfo+1), plain(checkpointSpec), spec)},
		"of another engine": {errdefs.IsNotImplemented, "another engine", tarOf(t, plain(checkpointConfig), infoOf(t, func(i *checkpointInfo) { i.Engine = "" }), plain(checkpointSpec), spec)},
		"an image by name":  {errdefs.IsInvalidArgument, "names no image", tarOf(t, plain(checkpointConfig), infoOf(t, func(i *checkpointInfo) { i.ImageRef = "test" }), plain(checkpointSpec), spec)},
		"two of a name":     {errdefs.IsInvalidArgument, "two files", tarOf(t, append(usual, plain("checkpoint/a.img"), "a", plain("checkpoint/./a.img"), "b")...)},
		"a broken layer":    {errdefs.IsInvalidArgument, checkpointRootfs, tarOf(t, append(usual, plain(checkpointRootfs), strings.Repeat("x", 1024))...)},
		"cut short":         {errdefs.IsInvalidArgument, "plain tar", tarOf(t, append(usual, plain("checkpoint/a.img"), strings.Repeat("a", 2000))...)[:4000]},
	} {
		if err := create(write(c.tar)); !c.is(err) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// Names that lead out, links and folders below are left out; the rest is there.
	odd := append(slices.Clone(usual), plain("checkpoint/a.img"), "a", plain("../checkpoint/b.img"), "b", plain("/checkpoint/c.img"), "c", plain("checkpoint/deep/d.img"), "d",
		tar.Header{Name: "checkpoint/e.img", Typeflag: tar.TypeSymlink, Linkname: "/etc/shadow"}, "", tar.Header{Name: "checkpoint/f.img", Typeflag: tar.TypeLink, Linkname: "/etc/shadow"}, "")
	c := memberConfig("odd")
	c.Image = write(tarOf(t, odd...))
	id, err := n.e.CreatePodContainer(bg, pod, c)
	if err != nil {
		t.Fatal(err)
	}
	_ = n.e.StartPodContainer(bg, id) // the mounts do not fit
	got := folders(n.e.restoreDir(id))
	images, _ := filepath.Glob(filepath.Join(n.e.checkpointImages(n.view(id)), "*"))
	if !slices.Equal(got, []string{"checkpoint"}) || len(images) != 1 || filepath.Base(images[0]) != "a.img" || len(files) != 0 {
		t.Errorf("it has %v, %v, CRIU got %v", got, images, files)
	}

	// A file that says that it is larger than any disk, as one with holes can.
	huge := write(tarOf(t, usual...))
	raw, err := os.ReadFile(huge)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&tar.Header{Name: "checkpoint/pages-1.img", Typeflag: tar.TypeReg, Size: 1 << 60}); err != nil {
		t.Fatal(err)
	}
	if err := create(write(append(raw[:len(raw)-1024], b.Bytes()...))); !errdefs.IsResourceExhausted(err) && !errdefs.IsInvalidArgument(err) {
		t.Errorf("a file of an exbibyte: %v", err)
	}

	// Only root may have written it.
	good := write(tarOf(t, usual...))
	if err := os.Chmod(good, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := create(good); !errdefs.IsPermissionDenied(err) {
		t.Errorf("an archive that all can write: %v", err)
	}
	if err := errors.Join(os.Chmod(good, 0o600), os.Chown(good, 1000, 0)); err != nil {
		t.Fatal(err)
	}
	if err := create(good); !errdefs.IsPermissionDenied(err) {
		t.Errorf("an archive of somebody else's: %v", err)
	}
	if err := os.Chown(good, 0, 0); err != nil {
		t.Fatal(err)
	}
	link, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.Symlink(good, link), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{link, fifo, dir, "/dev/zero"} {
		if err := create(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if err := create(filepath.Join(dir, "none")); !errdefs.IsNotFound(err) {
		t.Errorf("none: %v", err)
	}
	if err := create(good); err != nil {
		t.Errorf("a good one: %v", err)
	}

	// The image that it ran from is pulled, and has to be that very one.
	base := digest.FromString("base")
	away := write(tarOf(t, plain(checkpointConfig), infoOf(t, func(i *checkpointInfo) { i.ImageRef = base.String() }), plain(checkpointSpec), spec))
	if err := create(away); !errdefs.IsUnavailable(err) {
		t.Errorf("without its image: %v", err)
	}
	n.images.pull = func(ref string) (image.Image, error) { return image.Image{ID: digest.FromString("other")}, nil }
	if err := create(away); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("with another image: %v", err)
	}
	n.images.pull = func(ref string) (image.Image, error) {
		if ref != "example.org/test:1" {
			return image.Image{}, errdefs.ErrNotFound
		}
		return image.Image{ID: base}, nil
	}
	if err := create(away); err != nil {
		t.Errorf("with its image: %v", err)
	}
	n.images.imgs = n.images.imgs[:1]
	byID := write(tarOf(t, plain(checkpointConfig), infoOf(t, func(i *checkpointInfo) { i.ImageRef, i.Image, i.ImageName = base.String(), "", base.String() }), plain(checkpointSpec), spec))
	if err := create(byID); !errdefs.IsNotFound(err) {
		t.Errorf("an image without a name: %v", err)
	}

	s := newSandbox(mapped)
	if err := n.e.mayRestore(true, s); !errdefs.IsNotImplemented(err) {
		t.Errorf("in a user namespace: %v", err)
	}
	s.rec.Config.Userns, s.rec.Config.Runtime = nil, "runc"
	if err := n.e.mayRestore(true, s); !errdefs.IsNotImplemented(err) {
		t.Errorf("on another runtime: %v", err)
	}
	t.Setenv("PATH", t.TempDir())
	if err := create(good); !errdefs.IsNotImplemented(err) {
		t.Errorf("without CRIU: %v", err)
	}
	if err := n.e.RemovePodContainer(bg, id); err != nil {
		t.Error(err)
	}
	if left := folders(filepath.Join(n.root, "containers")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}
