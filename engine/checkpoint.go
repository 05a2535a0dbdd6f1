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
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/shim/client"
)

// The archive has the layout that CRI-O and containerd write and checkpointctl(1) reads: a
// plain tar with CRIU's images in checkpoint/, what the container changed of its files as an image
// layer, and descriptions in JSON.
const (
	checkpointConfig  = "config.dump"
	checkpointSpec    = "spec.dump"
	checkpointNetwork = "network.status"
	checkpointImages  = "checkpoint"
	checkpointRootfs  = "rootfs-diff.tar"
)

// checkpointInfo is the content of config.dump.
type checkpointInfo struct {
	ID           string    `json:"id"`
	Name         string    `json:"name"`
	Image        string    `json:"rootfsImage"`     // as the client named it
	ImageRef     string    `json:"rootfsImageRef"`  // its id
	ImageName    string    `json:"rootfsImageName"` // the name it was found under
	Runtime      string    `json:"runtime"`
	Created      time.Time `json:"createdTime"`
	Checkpointed time.Time `json:"checkpointedTime"`
	Restored     bool      `json:"restored"`
	Engine       string    `json:"engine"` // who has written it: hako restores its own only
}

const checkpointEngine = "hako"

// CheckpointContainer writes a running container to an archive, mode 0600, at an absolute
// path. It is frozen meanwhile, so that its files are those that its processes knew, and goes on
// afterwards. Without CRIU the error is errdefs.ErrNotImplemented. An archive that was not finished is
// removed.
func (e *Engine) CheckpointContainer(ctx context.Context, ref, path string) (err error) {
	c, err := e.containers.get(ref)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("checkpoint container %s: %w", c.id, err)
		}
	}()
	if !filepath.IsAbs(path) {
		return invalidf("the location %q is no absolute path", path)
	}
	if st, err := os.Stat(filepath.Dir(path)); err != nil || !st.IsDir() {
		return invalidf("the location %s is in no folder", path)
	}
	if _, err := exec.LookPath("criu"); err != nil {
		return &classed{text: "it needs CRIU, and there is no program criu in $PATH", class: errdefs.ErrNotImplemented}
	}
	if !c.checkpointing.CompareAndSwap(false, true) {
		return failedf("another checkpoint of it is being made")
	}
	defer c.checkpointing.Store(false)
	r, err := c.live("use")
	if err != nil {
		return failedf("it is not running")
	}
	if c.status() == StatusRunning {
		if err := e.pauseFor(ctx, c.id); err != nil {
			return err
		}
		defer func() {
			limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeLimit)
			defer cancel()
			// It may have been stopped, or resumed, by somebody else.
			if uerr := e.UnpauseContainer(limit, c.id); uerr != nil && !errdefs.IsConflict(uerr) && !errdefs.IsNotFound(uerr) {
				err = errors.Join(err, fmt.Errorf("resume: %w", uerr))
			}
		}()
	}
	work, err := os.MkdirTemp(e.dir(c.id), "checkpoint-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	// CRIU's own files need a folder in which there is nothing else, and go into the archive's root.
	o := client.CheckpointOptions{Images: filepath.Join(work, checkpointImages), Work: filepath.Join(work, "criu"), OpenTCP: true, FileLocks: true}
	if err := os.Mkdir(o.Work, 0o700); err != nil {
		return err
	}
	if err := r.shim.get().Checkpoint(ctx, c.id, o); err != nil {
		return err
	}
	if err := moveUp(o.Work); err != nil {
		return err
	}
	if err := e.describeCheckpoint(ctx, c.view(), r.bundle, work); err != nil {
		return err
	}
	return writeCheckpoint(ctx, work, path)
}

// moveUp puts the plain files of a folder beside it, and removes it.
func moveUp(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range entries {
		if f.Type().IsRegular() {
			if err := os.Rename(filepath.Join(dir, f.Name()), filepath.Join(filepath.Dir(dir), f.Name())); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(dir)
}

// resumeLimit is how long a shim may take to let a container go on.
const resumeLimit = 30 * time.Second

// describeCheckpoint lays what else belongs to a checkpoint beside the images.
func (e *Engine) describeCheckpoint(ctx context.Context, v Container, bundle, work string) error {
	info := checkpointInfo{ID: v.ID, Name: v.Name, Image: v.ImageName, ImageRef: v.ImageID, ImageName: v.ImageName, Runtime: v.Config.Runtime, Created: v.Created, Checkpointed: time.Now().UTC(), Engine: checkpointEngine}
	var addresses struct {
		IP  string   `json:"ip,omitempty"`
		IPs []string `json:"ips,omitempty"`
	}
	if p := v.Config.Pod; p != nil {
		info.Name, info.Image = p.Name, p.UserImage
		if p.Restore != nil {
			info.Image, info.Restored = p.Restore.Image, true
		}
		if s, err := e.Sandbox(ctx, p.Sandbox); err == nil {
			for _, ip := range s.IPs {
				addresses.IPs = append(addresses.IPs, ip.String())
			}
			if len(addresses.IPs) > 0 {
				addresses.IP = addresses.IPs[0]
			}
		}
	}
	for name, v := range map[string]any{checkpointConfig: info, checkpointNetwork: addresses} {
		raw, err := json.Marshal(v)
		if err == nil {
			err = os.WriteFile(filepath.Join(work, name), raw, 0o600)
		}
		if err != nil {
			return err
		}
	}
	raw, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(work, checkpointSpec), raw, 0o600); err != nil {
		return err
	}
	changes, err := e.Changes(ctx, v.ID)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(work, checkpointRootfs), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(e.writeChanges(e.ns(ctx), v, changes, f), f.Close())
}

// writeCheckpoint packs a folder. The archive has its name when it is whole.
func writeCheckpoint(ctx context.Context, dir, path string) (err error) {
	out, err := os.CreateTemp(filepath.Dir(path), ".checkpoint-*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(out.Name()))
		}
	}()
	tw := tar.NewWriter(out)
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == dir {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		return packFile(tw, dir, name, d)
	})
	if err = errors.Join(err, tw.Close(), out.Sync(), out.Close()); err != nil {
		return err
	}
	if err := os.Rename(out.Name(), path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

func packFile(tw *tar.Writer, dir, name string, d fs.DirEntry) error {
	if !d.IsDir() && !d.Type().IsRegular() {
		return nil // CRIU leaves sockets and links to earlier dumps, which mean nothing elsewhere
	}
	st, err := d.Info()
	if err != nil {
		return err
	}
	h, err := tar.FileInfoHeader(st, "")
	if err != nil {
		return err
	}
	if h.Name, err = filepath.Rel(dir, name); err != nil {
		return err
	}
	if d.IsDir() {
		h.Name += "/"
		return tw.WriteHeader(h)
	}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyN(tw, f, h.Size)
	return err
}
