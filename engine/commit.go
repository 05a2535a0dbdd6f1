//go:build linux

package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/snapshot"
)

// CommitOptions of CommitContainer.
type CommitOptions struct {
	Name            string // of the image; "": none
	Author, Comment string
	Pause           bool // a running container is paused while its files are read
	// Config is laid over the container's own; nil: nothing.
	Config  *dockerspec.DockerOCIImageConfig
	Changes []string // instructions of a Dockerfile
}

// ImportOptions of ImportImage.
type ImportOptions struct {
	Name     string
	Message  string
	Changes  []string
	Platform *ocispec.Platform // nil: the host's
}

// CommitContainer makes an image of a container: its image, what it changed of its files
// (not what is mounted into it), and its configuration.
func (e *Engine) CommitContainer(ctx context.Context, ref string, o CommitOptions) (id string, err error) {
	ctx = e.ns(ctx)
	c, err := e.containers.get(ref)
	if err != nil {
		return "", err
	}
	v := c.view()
	base, done, err := e.useImage(ctx, func() (image.Image, error) { return e.image(ctx, v.ImageID) })
	if errdefs.IsNotFound(err) {
		return "", conflictf("the image of container %s, %s, is not here any more", ref, shortImageID(v.ImageID))
	}
	if err != nil {
		return "", err
	}
	defer done()
	cfg, err := e.opt.Images.Config(ctx, base)
	if err != nil {
		return "", fmt.Errorf("configuration of image %s: %w", base.ID, err)
	}
	now := time.Now().UTC()
	cfg.Created, cfg.Author, cfg.History = &now, o.Author, nil
	own := imageConfigOf(&v)
	cfg.Config = own
	if o.Config != nil {
		cfg.Config = *o.Config
	}
	if err := applyChanges(&cfg.Config, o.Changes); err != nil {
		return "", err
	}
	if o.Config != nil {
		fillConfig(&cfg.Config, own)
	}

	if o.Pause && c.status() == StatusRunning {
		if err := e.pauseFor(ctx, ref); err == nil {
			defer func() {
				if uerr := e.UnpauseContainer(context.WithoutCancel(ctx), ref); uerr != nil && !errdefs.IsConflict(uerr) && !errdefs.IsNotFound(uerr) {
					err = errors.Join(err, fmt.Errorf("resume container %s: %w", ref, uerr))
				}
			}()
		} else if !errdefs.IsConflict(err) { // it has ended, or is paused, by somebody else
			return "", err
		}
	}
	changes, err := e.Changes(ctx, ref)
	if err != nil {
		return "", err
	}
	opts := image.CommitOptions{Base: &base, Config: cfg, Name: o.Name, Snapshotter: v.Snapshotter}
	if len(changes) > 0 {
		opts.Layer = func(ctx context.Context, w io.Writer) error { return e.writeChanges(ctx, v, changes, w) }
	}
	opts.Config.History = []ocispec.History{image.HistoryStep(strings.Join(v.Cmd, " "), o.Author, o.Comment, len(changes) == 0)}
	img, err := e.opt.Images.Commit(ctx, opts)
	if err != nil {
		return "", fmt.Errorf("commit container %s: %w", ref, err)
	}
	e.emit(c, "commit", "comment", o.Comment, "imageID", img.ID.String(), "imageRef", o.Name)
	return img.ID.String(), nil
}

// writeChanges writes a layer: what a container changed, with whiteouts for what it deleted.
func (e *Engine) writeChanges(ctx context.Context, v Container, changes []Change, out io.Writer) error {
	root, err := e.openSnapshot(e.ns(ctx), v, false)
	if err != nil {
		return err
	}
	defer root.Close()
	list := make([]snapshot.Change, len(changes))
	for i, ch := range changes {
		list[i] = snapshot.Change{Kind: snapshot.ChangeKind(ch.Kind), Path: ch.Path}
	}
	return image.WriteLayer(ctx, root, list, out, image.LayerOptions{})
}

// imageConfigOf is what an image needs to run like the container.
func imageConfigOf(v *Container) dockerspec.DockerOCIImageConfig {
	c := dockerspec.DockerOCIImageConfig{ImageConfig: ocispec.ImageConfig{
		User: v.User, Env: slices.Clone(v.Env), Entrypoint: slices.Clone(v.Entrypoint), Cmd: slices.Clone(v.Cmd),
		WorkingDir: v.WorkingDir, Labels: maps.Clone(v.Labels), StopSignal: v.StopSignal,
	}}
	for _, p := range v.ExposedPorts {
		c.ExposedPorts = orEmpty(c.ExposedPorts)
		c.ExposedPorts[p] = struct{}{}
	}
	for _, m := range v.Mounts {
		if m.Kind == MountVolume && (m.FromImage || slices.ContainsFunc(v.Config.Mounts, func(o Mount) bool {
			return o.Kind == MountVolume && o.Source == "" && path.Clean(o.Target) == m.Target
		})) {
			c.Volumes = orEmpty(c.Volumes)
			c.Volumes[m.Target] = struct{}{}
		}
	}
	if h := v.Healthcheck; h != nil {
		c.Healthcheck = &dockerspec.HealthcheckConfig{
			Test: slices.Clone(h.Test), Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod, StartInterval: h.StartInterval, Retries: h.Retries,
		}
	}
	c.Shell = slices.Clone(v.Config.Shell)
	return c
}

// fillConfig fills what a client's configuration leaves open from the container's, as
// Docker does.
func fillConfig(c *dockerspec.DockerOCIImageConfig, own dockerspec.DockerOCIImageConfig) {
	if c.User == "" {
		c.User = own.User
	}
	if len(c.Entrypoint) == 0 {
		if len(c.Cmd) == 0 {
			c.Cmd = own.Cmd
		}
		if c.Entrypoint == nil {
			c.Entrypoint = own.Entrypoint
		}
	}
	c.Env = mergeEnv(own.Env, c.Env)
	if c.WorkingDir == "" {
		c.WorkingDir = own.WorkingDir
	}
	if c.StopSignal == "" {
		c.StopSignal = own.StopSignal
	}
	if c.Healthcheck == nil {
		c.Healthcheck = own.Healthcheck
	}
	if len(c.Shell) == 0 {
		c.Shell = own.Shell
	}
	labels, ports, volumes := orEmpty(own.Labels), orEmpty(own.ExposedPorts), orEmpty(own.Volumes)
	maps.Copy(labels, c.Labels)
	maps.Copy(ports, c.ExposedPorts)
	maps.Copy(volumes, c.Volumes)
	c.Labels, c.ExposedPorts, c.Volumes = labels, ports, volumes
}

// ImportImage makes an image of an archive of files.
func (e *Engine) ImportImage(ctx context.Context, r io.Reader, o ImportOptions) (id string, err error) {
	now := time.Now().UTC()
	cfg := dockerspec.DockerOCIImage{Image: ocispec.Image{Created: &now, Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}}}
	if o.Platform != nil {
		cfg.Platform = *o.Platform
	}
	if err := applyChanges(&cfg.Config, o.Changes); err != nil {
		return "", err
	}
	cfg.History = []ocispec.History{image.HistoryStep("", "", o.Message, false)}
	img, err := e.opt.Images.Import(e.ns(ctx), r, image.ImportOptions{Config: cfg, Name: o.Name})
	if err != nil {
		return "", err
	}
	name := img.ID.String()
	if o.Name != "" {
		name = familiarTag(o.Name)
	}
	e.emitFor("image", "import", img.ID.String(), "name", name)
	return img.ID.String(), nil
}
