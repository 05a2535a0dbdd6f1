package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/cli"
	"github.com/hako-engine/hako/image/convert"
	"github.com/hako-engine/hako/image/copier"
	"github.com/hako-engine/hako/image/daemon"
	"github.com/hako-engine/hako/image/mirror"
	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/tools"
	"github.com/hako-engine/hako/image/transport"
	"github.com/hako-engine/hako/internal/version"
)

// namespace is where the images of hakod's Docker and CRI sockets are.
const namespace = "k8s.io"

// images gives the image tools the words of the command line.
type images struct {
	t *tools.Tools
	d *daemon.Daemon
}

func newImages(c cli.ImagesConfig) cli.Images {
	log := slog.New(slog.DiscardHandler)
	if c.Debug != nil {
		log = slog.New(debugHandler{c.Debug})
	}
	ro := registry.Options{Attempts: c.Attempts}
	if cache, err := os.UserCacheDir(); err == nil {
		ro.UploadDir = filepath.Join(cache, "hako", "uploads")
	}
	d := daemon.New(daemon.Options{Docker: c.Docker, Containerd: c.Containerd, Namespace: namespace})
	return &images{tools.New(tools.Options{RegistryDir: c.RegistryDir, UserAgent: "hako/" + version.Version, Registry: ro, Local: d, Log: log}), d}
}

func (i *images) Close() error { return i.d.Close() }

func access(a cli.Access) tools.Access {
	return tools.Access{
		Credentials: registry.Credentials{Username: a.Username, Password: a.Password, RegistryToken: a.Token},
		Anonymous:   a.Anonymous, Insecure: a.Insecure, CertDir: a.CertDir, AuthFile: a.AuthFile,
	}
}

func (i *images) Inspect(ctx context.Context, ref string, a cli.Access, p *ocispec.Platform, referrers bool) (any, error) {
	return i.t.Inspect(ctx, ref, tools.InspectOptions{Access: access(a), Platform: p, Referrers: referrers})
}

func (i *images) Raw(ctx context.Context, ref string, a cli.Access, p *ocispec.Platform, config bool) ([]byte, error) {
	return i.t.Raw(ctx, ref, tools.InspectOptions{Access: access(a), Platform: p}, config)
}

func progress(tell func(cli.ImageEvent)) func(copier.Event) {
	if tell == nil {
		return nil
	}
	return func(e copier.Event) {
		tell(cli.ImageEvent{ID: e.Digest.String(), Action: e.Action, Current: e.Current, Total: e.Total})
	}
}

func (i *images) Copy(ctx context.Context, r cli.CopyRequest) (res cli.CopyResult, err error) {
	o := tools.CopyOptions{Source: access(r.SourceAccess), Destination: access(r.DestinationAccess)}
	o.Options = copier.Options{Platforms: r.Platforms, Referrers: r.Referrers, Format: r.Format, Tags: r.Tags, Jobs: r.Jobs, Progress: progress(r.Progress)}
	if r.Compression != "" {
		c, err := convert.New(convert.Form(r.Compression), r.Level)
		if err != nil {
			return res, err
		}
		defer func() { err = errors.Join(err, c.Close()) }()
		o.Convert = c
	}
	got, err := i.t.Copy(ctx, r.Source, r.Destination, o)
	return cli.CopyResult{
		Digest: got.Top.Digest.String(), SourceDigest: got.Source.String(), Blobs: got.Blobs, Present: got.Present, Mounted: got.Mounted,
		Referrers: got.Referrers, Sent: got.Sent, UpToDate: got.UpToDate,
	}, err
}

func (i *images) Tags(ctx context.Context, ref string, a cli.Access) (string, []string, error) {
	return i.t.Tags(ctx, ref, access(a))
}

func (i *images) Delete(ctx context.Context, ref string, a cli.Access, dryRun bool) (string, error) {
	d, err := i.t.Delete(ctx, ref, access(a), dryRun)
	return d.String(), err
}

func (i *images) Login(ctx context.Context, address string, a cli.Access) error {
	return i.t.Login(ctx, address, access(a))
}

func (i *images) Sync(ctx context.Context, r cli.SyncRequest) (rep cli.SyncReport, err error) {
	var c *mirror.Config
	if r.Source != "" {
		c, err = mirror.Single(r.Source, mirror.Registry{Access: access(r.SourceAccess), Platforms: r.Platforms, Referrers: r.Referrers})
	} else {
		c, err = mirror.Parse(r.Name, r.Config)
	}
	if err != nil {
		return rep, err
	}
	c.Scoped = c.Scoped || r.Scoped
	count := map[string]*int{mirror.Copied: &rep.Copied, mirror.UpToDate: &rep.UpToDate, mirror.WouldCopy: &rep.WouldCopy, mirror.Failed: &rep.Failed}
	err = mirror.Run(ctx, i.t, c, mirror.Options{
		Destination: r.Destination, Access: access(r.Access), DryRun: r.DryRun, Jobs: r.Jobs, Progress: progress(r.Progress),
		Report: func(l mirror.Line) {
			*count[l.Action]++
			line := cli.SyncLine{Source: l.Source, Destination: l.Destination, Action: l.Action, Digest: l.Digest.String(), Sent: l.Sent}
			if l.Err != nil {
				line.Error = l.Err.Error()
			}
			r.Report(line)
		},
	})
	return rep, err
}

func (i *images) Diff(ctx context.Context, a, b string, aa, ba cli.Access, p *ocispec.Platform, files bool) (any, error) {
	return i.t.Diff(ctx, a, b, access(aa), access(ba), p, files)
}

func (i *images) Mount(ctx context.Context, name, dir string) error {
	r, err := transport.ParseRef(name, transport.Local)
	if err != nil {
		return err
	}
	if r.Kind != transport.Local {
		return fmt.Errorf("%s: only the daemon's images are mounted: copy it to local:NAME first", r)
	}
	return i.d.Mount(ctx, r.Name, dir)
}

func (i *images) Unmount(ctx context.Context, dir string) error { return i.d.Unmount(ctx, dir) }

func (i *images) Mounts(ctx context.Context) (out []cli.ImageMount, err error) {
	list, err := i.d.Mounts(ctx)
	for _, m := range list {
		out = append(out, cli.ImageMount(m))
	}
	return out, err
}

// debugHandler passes log lines on to the command line.
type debugHandler struct {
	tell func(msg string, args ...any)
}

func (debugHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h debugHandler) Handle(_ context.Context, r slog.Record) error {
	var args []any
	r.Attrs(func(a slog.Attr) bool { args = append(args, a.String()); return true })
	h.tell(r.Message, args...)
	return nil
}

func (h debugHandler) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h debugHandler) WithGroup(string) slog.Handler      { return h }
