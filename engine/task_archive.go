//go:build linux

package engine

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Files of containers for containerd's clients, of any namespace, in the form of Docker's archives.

// anyContainer finds a container of the context's namespace by its id, for one operation.
func (e *Engine) anyContainer(ctx context.Context, id string) (*container, error) {
	k, err := keyOf(ctx, id)
	if err != nil {
		return nil, err
	}
	if c := e.ours(ctx, id); c != nil {
		return c, nil
	}
	if e.opt.ContainerRecords == nil {
		return nil, fmt.Errorf("container %s of namespace %s: %w", id, k.namespace, errdefs.ErrNotFound)
	}
	rec, err := e.opt.ContainerRecords.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	return e.guestContainer(ctx, e.newGuest(k.namespace, rec)), nil
}

// ReadTaskPath gives a path of a container as a tar stream, which the caller closes: a file, or a directory with what is below it,
// under its last name. With alone nothing below it. The files are those that a running task sees, with what is mounted there, or those
// of the snapshot.
func (e *Engine) ReadTaskPath(ctx context.Context, id, p string, alone bool) (io.ReadCloser, error) {
	c, err := e.anyContainer(ctx, id)
	if err != nil {
		return nil, err
	}
	r, _, err := e.getArchive(ctx, c, id, p, alone)
	return r, err
}

// WriteTaskPath unpacks a tar stream into a directory of a container whose task runs. With owners the files belong to whom
// the archive says, else to the container's root.
func (e *Engine) WriteTaskPath(ctx context.Context, id, p string, r io.Reader, owners bool) error {
	c, err := e.anyContainer(ctx, id)
	if err != nil {
		return err
	}
	c.mu.Lock()
	run := c.run
	c.mu.Unlock()
	if run == nil {
		return failedf("cannot write into container %s: no task of it runs", id)
	}
	o := PutOptions{}
	uid, gid := -1, -1
	if !owners {
		pid := int(run.pid.Load())
		if uid, err = rootOf(fmt.Sprintf("/proc/%d/uid_map", pid)); err == nil {
			gid, err = rootOf(fmt.Sprintf("/proc/%d/gid_map", pid))
		}
		if err != nil {
			return fmt.Errorf("root of container %s: %w", id, err)
		}
	}
	return e.putArchive(ctx, c, id, p, r, o, func(x *extractor) { x.uid, x.gid = uid, gid })
}

// rootOf reads whom of the host's users 0 is in a user namespace, from its map.
func rootOf(file string) (int, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var inside, outside, length int64
		if n, _ := fmt.Sscan(lines.Text(), &inside, &outside, &length); n == 3 && inside == 0 {
			return int(outside), nil
		}
	}
	return 0, fmt.Errorf("%s has no user 0: %w", file, errdefs.ErrFailedPrecondition)
}

// getArchive is GetArchive of a container that was found; alone leaves out what is below a directory.
func (e *Engine) getArchive(ctx context.Context, c *container, ref, p string, alone bool) (io.ReadCloser, PathStat, error) {
	root, inside, done, err := e.openFiles(ctx, c, p, false)
	if err != nil {
		return nil, PathStat{}, err
	}
	f, st, err := openAt(root, inside, p)
	if err != nil {
		done()
		return nil, PathStat{}, pathError(err, ref, p)
	}
	ps, err := pathStat(f, st, p)
	if err != nil {
		f.Close()
		done()
		return nil, ps, pathError(err, ref, p)
	}
	// Of the path asked for: inside is / where that is a volume of a stopped container.
	name := path.Base(path.Clean("/" + p))
	if strings.HasSuffix(p, "/.") || p == "." || name == "/" {
		name = "."
	}
	pr, pw := io.Pipe()
	go func() {
		defer done()
		defer f.Close()
		w := tarWriter{tw: tar.NewWriter(pw), links: map[[2]uint64]string{}}
		if alone && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			err = w.object(st, name, nil, nil)
		} else {
			err = w.tree(ctx, f, st, name)
		}
		if err == nil {
			err = w.tw.Close()
		}
		pw.CloseWithError(err)
	}()
	return pr, ps, nil
}

// putArchive is PutArchive of a container that was found; adjust may change whom files belong to.
func (e *Engine) putArchive(ctx context.Context, c *container, ref, p string, r io.Reader, o PutOptions, adjust func(*extractor)) error {
	root, inside, done, err := e.openFiles(ctx, c, p, true)
	if err != nil {
		return err
	}
	defer done()
	dir, st, err := openAt(root, inside, p+"/")
	if err != nil {
		return pathError(err, ref, p)
	}
	dir.Close()
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return invalidf("extraction point is not a directory")
	}
	x := extractor{root: root, base: inside, o: o, uid: -1, gid: -1}
	if v := c.view(); o.CopyUIDGID && v.User != "" {
		acs, err := readAccounts(root)
		if err != nil {
			return err
		}
		acc, err := acs.resolve(v.User, nil)
		if err != nil {
			return err
		}
		x.uid, x.gid = int(acc.UID), int(acc.GID)
	}
	if adjust != nil {
		adjust(&x)
	}
	plain, err := decompress(r)
	if err != nil {
		return err
	}
	defer plain.Close()
	if err := x.extract(ctx, plain); err != nil {
		if errors.Is(err, unix.EROFS) {
			return invalidf("container rootfs or mounted volume is marked read-only: %v", err)
		}
		return fmt.Errorf("unpack into %s of container %s: %w", p, ref, err)
	}
	return nil
}

// snapshotNamespace is where the snapshot of a container lies.
func (e *Engine) snapshotNamespace(ctx context.Context, c *container) context.Context {
	if c.guest != nil {
		return namespaces.WithNamespace(ctx, c.guest.namespace)
	}
	return e.ns(ctx)
}
