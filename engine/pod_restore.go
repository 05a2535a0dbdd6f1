package engine

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/image/unpack"
	"github.com/hako-engine/hako/internal/ctxio"
	"github.com/hako-engine/hako/internal/safepath"
	"github.com/hako-engine/hako/snapshot"
)

// A pod's container may be made of what CheckpointContainer has written: of the archive, or of an image that holds the files of one,
// as buildah(1) makes it. What it may do is said by the request and by the image that it ran from, as for any container; from the checkpoint
// come its memory, the files that it had changed, and the order of its mounts.

// What containers of pods may be restored from (Options.RestoreCheckpoints).
const (
	RestoreNone     = "none"
	RestoreArchives = "archives" // files of the node that only root can write
	RestoreImages   = "images"   // images, too: whoever may name an image hands CRIU, which runs as root, what it reads
)

// PodRestore says what a container is restored from when it is started. The files lie in its folder until then.
type PodRestore struct {
	From   string   `json:"from"`   // as the client named it
	Image  string   `json:"image"`  // as the client had named the image that the container ran from
	Mounts []string `json:"mounts"` // where the container had its mounts, in order
}

// checkpointAnnotations tell of an image that it holds a checkpoint, and of which container: the one of checkpointctl(1),
// and that of older versions of CRI-O.
var checkpointAnnotations = []string{"org.criu.checkpoint.container.name", "io.kubernetes.cri-o.annotations.checkpoint.name"}

// Bounds of what a checkpoint holds.
const (
	maxCheckpointInfo  = 1 << 20 // bytes of config.dump
	maxCheckpointSpec  = 4 << 20 // bytes of spec.dump
	maxCheckpointFiles = 1 << 16 // images of CRIU
)

// checkpointSource is a checkpoint that a container is to be made of.
type checkpointSource struct {
	from   string // as the client named it
	info   checkpointInfo
	mounts []string
	files  checkpointFiles
}

// checkpointFiles are the plain files of a checkpoint. each gives them in no order, with clean relative names.
type checkpointFiles interface {
	each(ctx context.Context, f func(name string, size int64, r io.Reader) error) error
	close()
}

// isCheckpointPath tells a path from the name of an image, which no path can be.
func isCheckpointPath(ref string) bool { return filepath.IsAbs(ref) }

// isCheckpointImage tells whether an image says that it holds a checkpoint.
func isCheckpointImage(img image.Image) bool {
	return slices.ContainsFunc(checkpointAnnotations, func(a string) bool { return img.Annotations[a] != "" })
}

// imageFor finds the image of a new container, and keeps it from being removed until unuse is called. If a pod's container is to be made of
// a checkpoint, that comes along, to be closed by the caller, and image and c are those of the image that the container ran from.
func (e *Engine) imageFor(ctx context.Context, c *Config, pod *sandbox) (img image.Image, from *checkpointSource, unuse func(), err error) {
	find := func() (image.Image, error) { return e.lookupImage(ctx, *c) }
	archive := pod != nil && isCheckpointPath(c.Image)
	if !archive {
		if img, unuse, err = e.useImage(ctx, find); err != nil || pod == nil || !isCheckpointImage(img) {
			return img, nil, unuse, err
		}
		defer unuse() // its files are copied
	}
	if from, err = e.openCheckpoint(ctx, c, img, pod); err != nil {
		return img, nil, nil, err
	}
	base, keep, err := e.useImage(ctx, find)
	if err != nil {
		from.files.close()
		return img, nil, nil, err
	}
	return base, from, keep, nil
}

// openCheckpoint opens the checkpoint that a container is to be made of: an archive if c names a path, else an image. c is changed to
// the image that the container ran from, which is pulled if it is not here.
func (e *Engine) openCheckpoint(ctx context.Context, c *Config, img image.Image, s *sandbox) (cp *checkpointSource, err error) {
	from := c.Image
	defer func() {
		if err != nil {
			err = fmt.Errorf("restore from %s: %w", from, err)
			if cp != nil {
				cp.files.close()
				cp = nil
			}
		}
	}()
	if err := e.mayRestore(isCheckpointPath(from), s); err != nil {
		return nil, err
	}
	cp = &checkpointSource{from: from}
	if isCheckpointPath(from) {
		cp.files, err = openCheckpointArchive(from)
	} else {
		cp.files, err = e.openCheckpointImage(ctx, img)
	}
	if err != nil {
		return nil, err
	}
	if err := cp.describe(ctx); err != nil {
		return cp, err
	}
	for _, m := range c.Mounts {
		if !slices.Contains(cp.mounts, path.Clean("/"+m.Target)) {
			return cp, failedf("the container that was written had no mount %s", m.Target)
		}
	}
	base, err := e.baseImage(ctx, cp.info)
	if err != nil {
		return cp, err
	}
	p := *c.Pod
	p.Restore = &PodRestore{From: from, Image: cp.info.Image, Mounts: cp.mounts}
	if p.UserImage == "" {
		p.UserImage = from
	}
	c.Pod, c.Image = &p, base.ID.String()
	return cp, nil
}

// mayRestore tells why a container of a sandbox cannot be restored.
func (e *Engine) mayRestore(archive bool, s *sandbox) error {
	allowed := e.opt.RestoreCheckpoints
	if allowed == "" {
		allowed = RestoreArchives
	}
	switch {
	case allowed == RestoreNone || !archive && allowed != RestoreImages:
		what := "an image with a checkpoint"
		if archive {
			what = "an archive of a checkpoint"
		}
		return &classed{text: fmt.Sprintf("it is %s, and the daemon's setting restore-checkpoints is %q", what, allowed), class: errdefs.ErrPermissionDenied}
	case s.rec.Config.Runtime != "" && s.rec.Config.Runtime != "hako":
		return notImplementedf("the runtime %s knows no restored container that waits to be started", s.rec.Config.Runtime)
	case s.rec.Config.Userns != nil:
		return notImplementedf("a container in a user namespace cannot be restored")
	}
	if _, err := exec.LookPath("criu"); err != nil {
		return &classed{text: "it needs CRIU, and there is no program criu in $PATH", class: errdefs.ErrNotImplemented}
	}
	return nil
}

// describe reads what a checkpoint says of itself.
func (cp *checkpointSource) describe(ctx context.Context) error {
	var info, spec []byte
	err := cp.files.each(ctx, func(name string, size int64, r io.Reader) (err error) {
		switch name {
		case checkpointConfig:
			info, err = readAtMost(r, maxCheckpointInfo)
		case checkpointSpec:
			spec, err = readAtMost(r, maxCheckpointSpec)
		}
		if err != nil {
			return invalidf("%s: %v", name, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if info == nil || spec == nil {
		return invalidf("it is no checkpoint of a container: it has no %s and %s", checkpointConfig, checkpointSpec)
	}
	if err := json.Unmarshal(info, &cp.info); err != nil {
		return invalidf("%s: %v", checkpointConfig, err)
	}
	if cp.info.Engine != checkpointEngine {
		// Whoever writes images names what CRIU is to be given from outside in its own way.
		return notImplementedf("another engine has written it")
	}
	var sp struct {
		Mounts []struct {
			Destination string `json:"destination"`
		} `json:"mounts"`
	}
	if err := json.Unmarshal(spec, &sp); err != nil {
		return invalidf("%s: %v", checkpointSpec, err)
	}
	for _, m := range sp.Mounts {
		cp.mounts = append(cp.mounts, path.Clean("/"+m.Destination))
	}
	return nil
}

func readAtMost(r io.Reader, limit int64) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(raw)) > limit {
		err = fmt.Errorf("it is longer than %d bytes", limit)
	}
	return raw, err
}

// baseImage is the image that a checkpointed container ran from: the very one, found by its id. It is pulled by the name that
// the checkpoint has for it if it is not here.
func (e *Engine) baseImage(ctx context.Context, info checkpointInfo) (image.Image, error) {
	id, err := digest.Parse(info.ImageRef)
	if err != nil {
		return image.Image{}, invalidf("%s names no image that the container ran from: %v", checkpointConfig, err)
	}
	find := func() (image.Image, error) {
		img, err := e.opt.Images.Get(ctx, id.String(), nil)
		if err == nil && img.ID != id {
			err = notFoundf("no image has the id %s", id)
		}
		return img, err
	}
	img, err := find()
	if !errdefs.IsNotFound(err) {
		return img, err
	}
	for _, name := range []string{info.Image, info.ImageName} {
		named, perr := reference.ParseDockerRef(name)
		if perr != nil {
			continue // an id, as a kubelet has it
		}
		pulled, perr := e.PullImage(ctx, named.String(), image.PullOptions{})
		switch {
		case perr != nil:
			return image.Image{}, fmt.Errorf("pull the image that the container ran from: %w", perr)
		case pulled.ID == id:
			return pulled, nil
		}
		return image.Image{}, failedf("the container ran from the image %s, which is not here, and %s is another one now", id, name)
	}
	return image.Image{}, fmt.Errorf("the image that the container ran from is not here: %w", err)
}

// restoreDir is where the files of a checkpoint lie until the container made of it is started.
func (e *Engine) restoreDir(id string) string { return filepath.Join(e.dir(id), "restore") }

// checkpointImages is the folder of the images that a container is restored from, "" for a new one.
func (e *Engine) checkpointImages(v Container) string {
	if p := v.Config.Pod; p == nil || p.Restore == nil {
		return ""
	}
	return filepath.Join(e.restoreDir(v.ID), checkpointImages)
}

// restoreConfig is a file of options for CRIU beside them.
const restoreConfig = "criu.conf"

// unpack lays a checkpoint into a new folder: CRIU's images, for root alone, and what the container had changed of its files. There is nothing
// else in it that is needed, so nothing else is taken.
func (cp *checkpointSource) unpack(ctx context.Context, dir string) error {
	images := filepath.Join(dir, checkpointImages)
	if err := os.MkdirAll(images, 0o700); err != nil {
		return err
	}
	// The addresses of another pod are other ones, and whoever was connected has gone.
	if err := os.WriteFile(filepath.Join(dir, restoreConfig), []byte("tcp-close\n"), 0o600); err != nil {
		return err
	}
	room, err := freeSpace(dir)
	if err != nil {
		return err
	}
	room = min(room, maxCheckpoint)
	seen := map[string]bool{}
	return cp.files.each(ctx, func(name string, size int64, r io.Reader) error {
		if name != checkpointRootfs && filepath.Dir(name) != checkpointImages {
			return nil
		}
		if seen[name] || len(seen) >= maxCheckpointFiles {
			return invalidf("it has two files %s, or more than %d", name, maxCheckpointFiles)
		}
		seen[name] = true
		if room -= size; size < 0 || room < 0 {
			return &classed{text: "there is no room for its files", class: errdefs.ErrResourceExhausted}
		}
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
		_, err = io.CopyN(f, ctxio.Reader(ctx, r, nil), size)
		if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			err = invalidf("it is no plain tar: %s is cut short", name)
		}
		return errors.Join(err, f.Close())
	})
}

// freeSpace is what a file system has room for, in bytes.
func freeSpace(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// restoreFiles gives the file system of a new container what the one that was written had changed in it.
func restoreFiles(ctx context.Context, mounts []mount.Mount, dir string) error {
	diff, err := os.Open(filepath.Join(dir, checkpointRootfs))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer diff.Close()
	m, err := snapshot.MountDetached(mounts)
	if err != nil {
		return err
	}
	defer m.Close()
	// Through the mount's own descriptor (O_PATH) neither owner nor mode of the root could be set.
	fd, err := unix.Openat(int(m.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("openat", err)
	}
	root := os.NewFile(uintptr(fd), "root")
	defer root.Close()
	if _, err := unpack.Apply(ctx, root, ctxio.Reader(ctx, diff, nil), unpack.Options{Mode: unpack.Merged}); err != nil {
		return fmt.Errorf("%s: %w", checkpointRootfs, err)
	}
	return os.Remove(diff.Name())
}

// fit puts the mounts of a container that is restored into the order in which the images know them, and says where CRIU finds
// its options.
func (r *PodRestore) fit(s *specs.Spec, dir string) error {
	rest := slices.Clone(s.Mounts)
	s.Mounts = s.Mounts[:0:0]
	for _, point := range r.Mounts {
		i := slices.IndexFunc(rest, func(m specs.Mount) bool { return path.Clean("/"+m.Destination) == point })
		if i < 0 {
			return failedf("the container that was written had a mount %s, and this one has not", point)
		}
		s.Mounts = append(s.Mounts, rest[i])
		rest = slices.Delete(rest, i, i+1)
	}
	if len(rest) > 0 {
		return failedf("the container that was written had no mount %s", rest[0].Destination)
	}
	if s.Annotations == nil {
		s.Annotations = map[string]string{}
	}
	s.Annotations[annotationCRIUConfig] = filepath.Join(dir, restoreConfig)
	return nil
}

// annotationCRIUConfig names a file of options for CRIU (oci.AnnotationCRIUConfig).
const annotationCRIUConfig = "org.criu.config"

// checkpointArchive is a plain tar.
type checkpointArchive struct{ f *os.File }

// openCheckpointArchive opens an archive. Only root may be able to write it: CRIU believes what is in it.
func openCheckpointArchive(name string) (checkpointFiles, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_NOCTTY, 0) // a FIFO does not block
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFoundf("there is no such archive")
	} else if err != nil {
		return nil, invalidf("%v", err)
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	switch {
	case err != nil:
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		err = invalidf("it is no regular file")
	case st.Uid != 0 && int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0:
		err = &classed{text: "others than root can write it", class: errdefs.ErrPermissionDenied}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return checkpointArchive{f}, nil
}

func (a checkpointArchive) close() { a.f.Close() }

func (a checkpointArchive) each(ctx context.Context, f func(string, int64, io.Reader) error) error {
	if _, err := a.f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	tr := tar.NewReader(a.f)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return invalidf("it is no plain tar: %v", err)
		}
		name := path.Clean(h.Name)
		if h.Typeflag != tar.TypeReg || !filepath.IsLocal(name) {
			continue
		}
		if err := f(name, h.Size, tr); err != nil {
			return err
		}
	}
}

// checkpointTree is the root of an image that holds the files of an archive.
type checkpointTree struct {
	root *safepath.Root
	drop func()
}

// openCheckpointImage opens the files of an image, by a view that is gone when it is closed.
func (e *Engine) openCheckpointImage(ctx context.Context, img image.Image) (_ checkpointFiles, err error) {
	name := e.opt.Snapshotter
	chain, err := e.opt.Images.Unpack(ctx, img, name)
	if err != nil {
		return nil, fmt.Errorf("unpack the image: %w", err)
	}
	sn := e.opt.Snapshotters[name]
	if sn == nil {
		return nil, notFoundf("snapshotter %q is not there", name)
	}
	id := newID() // no container has it: a view that a killed daemon leaves is a stray one
	key := id + "-checkpoint"
	e.containers.making([]string{key}, name, true)
	drop := func() {
		if err := sn.Remove(context.WithoutCancel(ctx), key); err != nil && !errdefs.IsNotFound(err) {
			e.log.Error("remove the view of a checkpoint", "snapshot", key, "error", err)
		}
		e.containers.making([]string{key}, name, false)
	}
	mounts, err := sn.View(ctx, key, chain, ownedBy(id))
	if err != nil {
		drop()
		return nil, fmt.Errorf("files of the image: %w", err)
	}
	root, err := openMounts(mounts, false)
	if err != nil {
		drop()
		return nil, fmt.Errorf("files of the image: %w", err)
	}
	return checkpointTree{root, drop}, nil
}

func (t checkpointTree) close() {
	t.root.Close()
	t.drop()
}

func (t checkpointTree) each(ctx context.Context, f func(string, int64, io.Reader) error) error {
	names := []string{checkpointConfig, checkpointSpec, checkpointRootfs}
	dir, err := t.root.Open(checkpointImages, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	switch {
	case err == nil:
		images, err := dir.Readdirnames(maxCheckpointFiles + 1)
		dir.Close()
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for _, n := range images {
			names = append(names, path.Join(checkpointImages, n))
		}
	case !errors.Is(err, fs.ErrNotExist) && !isNotDir(err):
		return err
	}
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := t.one(name, f); err != nil {
			return err
		}
	}
	return nil
}

// one gives a file, if it is a plain one.
func (t checkpointTree) one(name string, f func(string, int64, io.Reader) error) error {
	file, err := t.root.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_NOCTTY, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) {
		return nil
	} else if err != nil {
		return err
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return err
	}
	return f(strings.TrimPrefix(name, "/"), st.Size(), file)
}
