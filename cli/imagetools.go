package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Images is what the commands of 'hako image' do that reach beyond the daemon. References
// are as people write them; reports are values whose JSON form is shown.
type Images interface {
	// Inspect tells of an image, with referrers also of what refers to it.
	Inspect(ctx context.Context, ref string, a Access, platform *ocispec.Platform, referrers bool) (report any, err error)
	// Raw gives the bytes of its manifest or, with config, of its configuration.
	Raw(ctx context.Context, ref string, a Access, platform *ocispec.Platform, config bool) ([]byte, error)
	// Copy copies an image between places.
	Copy(ctx context.Context, r CopyRequest) (CopyResult, error)
	// Tags lists the names in a repository, a layout or an archive; name is the place in full.
	Tags(ctx context.Context, ref string, a Access) (name string, tags []string, err error)
	// Delete removes an image from its registry, and gives its digest.
	Delete(ctx context.Context, ref string, a Access, dryRun bool) (digest string, err error)
	// Login asks a registry whether it takes the credentials of a.
	Login(ctx context.Context, registry string, a Access) error
	// Sync copies all images that r selects. An image that fails is reported, and does not end it.
	Sync(ctx context.Context, r SyncRequest) (SyncReport, error)
	// Diff compares two images, with files also what is in their layers.
	Diff(ctx context.Context, a, b string, aa, ba Access, platform *ocispec.Platform, files bool) (report any, err error)
	// Mount shows the daemon's image at a folder, read-only.
	Mount(ctx context.Context, name, dir string) error
	// Unmount ends that.
	Unmount(ctx context.Context, dir string) error
	// Mounts lists what Mount shows.
	Mounts(ctx context.Context) ([]ImageMount, error)
	// Close ends the connections.
	Close() error
}

// ImagesConfig is what Images may use.
type ImagesConfig struct {
	RegistryDir string                         // certs.d
	Docker      func() (*client.Client, error) // the daemon
	Containerd  string                         // path of the daemon's containerd socket
	Attempts    int                            // of a request to a registry
	Debug       func(msg string, args ...any)  // nil: silent
}

// Access says how to get at a registry.
type Access struct {
	Username, Password string
	Token              string
	Anonymous          bool
	Insecure           bool
	CertDir            string
	AuthFile           string // config.json under another name; "": docker's
}

// CopyRequest is a copy, or a conversion on the way.
type CopyRequest struct {
	Source, Destination             string
	SourceAccess, DestinationAccess Access
	Platforms                       []ocispec.Platform // empty: all
	Referrers                       bool
	Tags                            []string // further ones at the destination
	Format                          string   // "", "oci", "docker"
	Compression                     string   // "": as it is; else gzip, zstd, estargz, erofs, none
	Level                           int      // of the compression; 0: its default
	Jobs                            int
	Progress                        func(ImageEvent)
}

// ImageEvent is one step of one blob.
type ImageEvent struct {
	ID, Action     string
	Current, Total int64 // bytes
}

// CopyResult is what a copy did.
type CopyResult struct {
	Digest, SourceDigest               string
	Blobs, Present, Mounted, Referrers int
	Sent                               int64 // bytes
	UpToDate                           bool
}

// SyncRequest brings repositories up to date by a file.
type SyncRequest struct {
	// Source is a repository or an image in a registry (docker://NAME) instead of a file.
	Source       string
	SourceAccess Access
	// Platforms and Referrers are for Source; Scoped for both.
	Platforms   []string
	Referrers   bool
	Scoped      bool
	Config      io.Reader
	Name        string // of the file
	Destination string // "": what the file says
	Access      Access // of the destination
	DryRun      bool
	Jobs        int // images side by side
	Report      func(SyncLine)
	Progress    func(ImageEvent)
}

// SyncLine is what became of one image.
type SyncLine struct {
	Source      string `json:"source"`
	Destination string `json:"destination,omitempty"`
	Action      string `json:"action"` // "copied", "up to date", "would copy", "failed", "skipped"
	Digest      string `json:"digest,omitempty"`
	Sent        int64  `json:"sent,omitempty"`
	Error       string `json:"error,omitempty"`
}

// SyncReport sums up.
type SyncReport struct{ Copied, UpToDate, Failed, WouldCopy int }

// ImageMount is a folder where an image is mounted.
type ImageMount struct{ Image, Dir string }

// images gives the tools, on their first use.
func (a *app) images() (Images, error) {
	if a.i != nil {
		return a.i, nil
	}
	if a.Options.Images == nil {
		return nil, &exitError{exitGeneral, "this build carries no image tools"}
	}
	c := ImagesConfig{RegistryDir: a.registryDir, Docker: a.client, Containerd: a.containerdSocket(), Attempts: a.retryTimes + 1}
	if a.retryTimes < 0 || a.retryTimes > 100 {
		return nil, usage("bad --retry-times %d: expected 0 to 100", a.retryTimes)
	}
	if a.debug {
		c.Debug = func(msg string, args ...any) { fmt.Fprintln(a.Err, append([]any{"hako: debug: " + msg}, args...)...) }
	}
	a.i = a.Options.Images(c)
	return a.i, nil
}

// imagesWith is images, and how the flags say that places are reached.
func (a *app) imagesWith(acc *accessFlags) (Images, Access, error) {
	access, err := acc.access(a)
	if err != nil {
		return nil, access, err
	}
	images, err := a.images()
	return images, access, err
}

// containerdSocket is beside the Docker socket, unless it was named.
func (a *app) containerdSocket() string {
	for _, s := range []string{a.containerd, os.Getenv("HAKO_CONTAINERD_SOCKET")} {
		if s != "" {
			return strings.TrimPrefix(s, "unix://")
		}
	}
	if path, ok := strings.CutPrefix(a.address(), "unix://"); ok {
		return filepath.Join(filepath.Dir(path), "containerd.sock")
	}
	return ""
}

const references = `
References:
  docker://NAME               an image in its registry
  oci:DIR[:TAG]               an OCI image layout
  oci-archive:FILE[:TAG]      the same as a tar archive, also compressed
  docker-archive:FILE[:NAME]  an archive of docker save
  dir:DIR                     a folder with one image's files, as skopeo makes them
  local:NAME, or just NAME    the daemon's images`

// registryFlags are those of commands that speak to registries.
func (a *app) registryFlags(fs *pflag.FlagSet) {
	fs.StringVar(&a.registryDir, "registry-dir", "/etc/hako/certs.d", "folder with HOST/hosts.toml: mirrors and certificates")
	fs.IntVar(&a.retryTimes, "retry-times", 4, "how often a request to a registry is made again after a network error, 429 or 5xx")
}

// daemonFlags are those of commands that reach the daemon's images.
func (a *app) daemonFlags(fs *pflag.FlagSet) {
	fs.StringVar(&a.containerd, "containerd-socket", "", "the daemon's containerd socket (default: beside its Docker socket)")
}

// accessFlags are those for one registry; prefix is "", "src-" or "dest-".
type accessFlags struct {
	creds, token, certDir, authFile string
	noCreds, verify                 bool
}

func (f *accessFlags) register(fs *pflag.FlagSet, prefix, of string) {
	fs.StringVar(&f.creds, prefix+"creds", "", "USER[:PASSWORD] for the "+of+"; a password left out is asked for")
	fs.StringVar(&f.authFile, prefix+"authfile", "", "file with credentials for the "+of+", as docker's config.json (default: $REGISTRY_AUTH_FILE, else that)")
	fs.StringVar(&f.token, prefix+"registry-token", "", "bearer token for the "+of)
	fs.BoolVar(&f.noCreds, prefix+"no-creds", false, "no credentials for the "+of+", not even those of config.json")
	fs.BoolVar(&f.verify, prefix+"tls-verify", true, "false: accept any certificate, and plain HTTP, from the "+of)
	fs.StringVar(&f.certDir, prefix+"cert-dir", "", "folder with *.crt, and NAME.cert with NAME.key, for the "+of)
}

func (f *accessFlags) access(a *app) (Access, error) {
	acc := Access{Token: f.token, Anonymous: f.noCreds, Insecure: !f.verify, CertDir: f.certDir, AuthFile: f.authFile}
	if acc.AuthFile == "" {
		acc.AuthFile = os.Getenv("REGISTRY_AUTH_FILE")
	}
	if f.creds == "" {
		return acc, nil
	}
	if f.noCreds || f.token != "" {
		return acc, usage("credentials, a token, or none of them: choose one")
	}
	user, pass, ok := strings.Cut(f.creds, ":")
	if user == "" {
		return acc, usage("bad credentials: expected USER[:PASSWORD]")
	}
	if !ok {
		var err error
		if pass, err = a.askPassword("Password of " + user + ": "); err != nil {
			return acc, err
		}
	}
	acc.Username, acc.Password = user, pass
	return acc, nil
}

func parsePlatforms(list []string) ([]ocispec.Platform, error) {
	var out []ocispec.Platform
	for _, s := range list {
		for one := range strings.SplitSeq(s, ",") {
			p, err := parsePlatform(strings.TrimSpace(one))
			if err != nil {
				return nil, err
			}
			if p != nil {
				out = append(out, *p)
			}
		}
	}
	return out, nil
}

func (a *app) imageToolCommands() []*cobra.Command {
	// Some are about registries, some about the daemon, most about places of all kinds.
	registries := []*cobra.Command{a.imageTagsCommand(), a.imageDeleteCommand(), a.imageVerifyCommand()}
	daemon := []*cobra.Command{a.imageMountCommand(), a.imageUnmountCommand()}
	list := []*cobra.Command{a.imageInspectCommand(), a.imageCopyCommand(), a.imageSyncCommand(), a.imageConvertCommand(), a.imageDiffCommand()}
	for _, c := range slices.Concat(registries, list) {
		a.registryFlags(c.Flags())
	}
	for _, c := range slices.Concat(daemon, list) {
		a.daemonFlags(c.Flags())
	}
	list = slices.Concat(list, registries, daemon)
	for _, c := range list {
		c.RunE = interruptible(c.RunE)
	}
	return append(list, a.loginCommand(), a.logoutCommand())
}

// interruptible lets ctrl-c end a command in order: what it has begun is cleared away, or left
// for the next attempt. A second one ends the program at once.
func interruptible(run func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt)
		defer stop()
		context.AfterFunc(ctx, stop)
		cmd.SetContext(ctx)
		err := run(cmd, args)
		if err != nil && ctx.Err() != nil {
			return &exitError{exitInterrupt, "interrupted"}
		}
		return err
	}
}

// isReference says whether a name begins with a place, and so is not for the daemon's own inspection.
func isReference(name string) bool {
	kind, _, ok := strings.Cut(name, ":")
	switch kind {
	case "docker":
		return strings.HasPrefix(name, "docker://")
	case "oci", "oci-archive", "docker-archive", "dir", "local", "docker-daemon":
		return ok
	}
	return strings.Contains(name, "://")
}

func (a *app) imageInspectCommand() *cobra.Command {
	var format, platform string
	var rawDoc, config, referrers bool
	var acc accessFlags
	cmd := &cobra.Command{Use: "inspect [OPTIONS] IMAGE...", Short: "Show everything about images, here or in a registry", Args: needNames("an image"),
		Long: `Show everything about images. Just a name is an image of the daemon, in docker's form.
A reference is looked at where it is: an image in a registry is not fetched but for its
documents.
` + references,
		Example: `  hako image inspect alpine:3
  hako image inspect docker://alpine:3
  hako image inspect --raw docker://registry.example.com/app:1
  hako image inspect --config --platform linux/arm64 docker://alpine:3
  hako image inspect --config --format '{{.config.Env}}' docker://alpine:3
  hako image inspect --format '{{.digest}}' oci:./layout:v1`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ours := rawDoc || config || platform != "" || referrers
			for _, n := range args {
				ours = ours || isReference(n)
			}
			if !ours {
				return a.inspectAll(args, format, func(c *client.Client, name string) (any, error) {
					return inspectAny(cmd.Context(), c, name, "image", false)
				})
			}
			return a.inspectReferences(cmd.Context(), args, format, platform, rawDoc, config, referrers, &acc)
		}}
	fs := cmd.Flags()
	fs.StringVarP(&format, "format", "f", "", `"json" or a Go template; references are shown as text otherwise`)
	fs.BoolVar(&rawDoc, "raw", false, "print the manifest or index as it is")
	fs.BoolVar(&config, "config", false, "print the configuration as it is, or by --format")
	fs.StringVar(&platform, "platform", "", "of an image for several: OS/ARCH[/VARIANT]")
	fs.BoolVar(&referrers, "referrers", false, "list signatures and other documents about the image, too")
	acc.register(fs, "", "registry")
	fs.BoolP("no-tags", "n", false, "for those who know skopeo: tags are never listed here, but by list-tags")
	cmd.MarkFlagsMutuallyExclusive("raw", "format")
	return cmd
}

func (a *app) inspectReferences(ctx context.Context, names []string, format, platform string, rawDoc, config, referrers bool, acc *accessFlags) error {
	p, err := parsePlatform(platform)
	if err != nil {
		return err
	}
	images, access, err := a.imagesWith(acc)
	if err != nil {
		return err
	}
	var reports []any
	for _, n := range names {
		if rawDoc || config && format == "" {
			b, err := images.Raw(ctx, n, access, p, config)
			if err != nil {
				return err
			}
			if _, err := a.Out.Write(b); err != nil {
				return err
			}
			if isTerminal(a.Out) {
				fmt.Fprintln(a.Out)
			}
			continue
		}
		if config {
			b, err := images.Raw(ctx, n, access, p, true)
			if err != nil {
				return err
			}
			var v any
			if err := json.Unmarshal(b, &v); err != nil {
				return fmt.Errorf("configuration of %s: %w", n, err)
			}
			reports = append(reports, v)
			continue
		}
		r, err := images.Inspect(ctx, n, access, p, referrers)
		if err != nil {
			return err
		}
		reports = append(reports, r)
	}
	switch {
	case rawDoc || config && format == "":
		return nil
	case format != "":
		return inspectPrint(a.Out, reports, format)
	}
	for i, r := range reports {
		if i > 0 {
			fmt.Fprintln(a.Out)
		}
		if err := a.printImageReport(r); err != nil {
			return err
		}
	}
	return nil
}

// imageReport is what is shown of a report as text.
type imageReport struct {
	Name, Digest, MediaType, ArtifactType string
	Annotations                           map[string]string
	Platforms                             []struct {
		Platform, Digest, AttestationOf string
		Size                            int64
		Layers                          int
	}
	Image *struct {
		Digest, ID, Platform, Author string
		Created                      *time.Time
		Size                         int64
		Annotations                  map[string]string
		Config                       struct {
			User, WorkingDir, StopSignal string
			Env, Entrypoint, Cmd         []string
			ExposedPorts, Volumes        map[string]any
			Labels                       map[string]string
		}
		Layers []struct {
			Digest, MediaType, CreatedBy string
			Size                         int64
		}
	}
	Referrers []struct {
		Digest, ArtifactType string
		Size                 int64
	}
}

func (a *app) printImageReport(v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var r imageReport
	if err := json.Unmarshal(raw, &r); err != nil {
		return err
	}
	var lines [][]string
	add := func(k, v string) {
		if v != "" {
			lines = append(lines, []string{k, printable(v)})
		}
	}
	flush := func() {
		io.WriteString(a.Out, layout(lines, width(a.Out)))
		lines = nil
	}
	add("Name:", r.Name)
	add("Digest:", r.Digest)
	add("Media type:", r.MediaType)
	add("Artifact type:", r.ArtifactType)
	for _, kv := range sortedMap(r.Annotations) {
		add("Annotation:", kv)
	}
	if i := r.Image; i != nil {
		add("Image id:", i.ID)
		add("Platform:", i.Platform)
		if i.Created != nil {
			add("Created:", i.Created.UTC().Format(time.RFC3339)+" ("+ago(*i.Created)+")")
		}
		add("Author:", i.Author)
		add("Size:", fmt.Sprintf("%s in %d layers, compressed", units.HumanSizeWithPrecision(float64(i.Size), 4), len(i.Layers)))
		add("User:", i.Config.User)
		add("Entrypoint:", quoted(i.Config.Entrypoint))
		add("Command:", quoted(i.Config.Cmd))
		add("Working dir:", i.Config.WorkingDir)
		add("Stop signal:", i.Config.StopSignal)
		for _, e := range i.Config.Env {
			add("Env:", e)
		}
		for _, p := range sortedKeys(i.Config.ExposedPorts) {
			add("Port:", p)
		}
		for _, p := range sortedKeys(i.Config.Volumes) {
			add("Volume:", p)
		}
		for _, kv := range sortedMap(i.Config.Labels) {
			add("Label:", kv)
		}
	}
	flush()
	if len(r.Platforms) > 1 {
		fmt.Fprintln(a.Out)
		lines = append(lines, []string{"PLATFORM", "DIGEST", "SIZE", "LAYERS"})
		for _, p := range r.Platforms {
			name, size, n := p.Platform, "-", "-"
			if p.AttestationOf != "" {
				name = "(attestation)"
			} else if p.Size > 0 {
				size, n = units.HumanSizeWithPrecision(float64(p.Size), 4), fmt.Sprint(p.Layers)
			}
			lines = append(lines, []string{printable(name), p.Digest, size, n})
		}
		flush()
	}
	if r.Image != nil && len(r.Image.Layers) > 0 {
		fmt.Fprintln(a.Out)
		lines = append(lines, []string{"LAYER", "SIZE", "TYPE", "CREATED BY"})
		for _, l := range r.Image.Layers {
			lines = append(lines, []string{shortID(l.Digest), units.HumanSizeWithPrecision(float64(l.Size), 4), kindOf(l.MediaType), ellipsis(printable(l.CreatedBy), 60)})
		}
		flush()
	}
	if len(r.Referrers) > 0 {
		fmt.Fprintln(a.Out)
		lines = append(lines, []string{"REFERRER", "SIZE", "TYPE"})
		for _, e := range r.Referrers {
			lines = append(lines, []string{e.Digest, units.HumanSize(float64(e.Size)), printable(e.ArtifactType)})
		}
		flush()
	}
	return nil
}

// kindOf is a layer's media type in short.
func kindOf(mt string) string {
	i := strings.LastIndex(mt, "tar")
	if i < 0 {
		return printable(mt)
	}
	return printable(mt[i:])
}

func (a *app) imageCopyCommand() *cobra.Command {
	var platform []string
	var r CopyRequest
	var digestFile string
	var quiet, all, preserve bool
	var src, dst accessFlags
	cmd := &cobra.Command{Use: "copy [OPTIONS] SOURCE DESTINATION", Short: "Copy an image between registries, layouts, archives and the daemon", Args: needArgs(2, 2, "a source and a destination"),
		Long: `Copy an image, for all of its platforms, with the digests that it has. Blobs that are there
are skipped; a registry takes what another of its repositories has from there; a copy that
was interrupted goes on where it was when it is begun again.

The digest of the image at its destination is printed on standard output, progress on
standard error.
` + references,
		Example: `  hako image copy docker://alpine:3 docker://registry.example.com/base:3
  hako image copy --platform linux/arm64 docker://alpine:3 oci:./layout:3
  hako image copy docker://alpine:3 local:alpine:3
  hako image copy --referrers docker://registry.example.com/app:1 oci-archive:app.tar:1
  hako image copy app:1 docker-archive:app.tar:app:1
  hako image copy --additional-tag latest oci:./layout:3 docker://registry.example.com/base:3`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			r.Source, r.Destination = args[0], args[1]
			if r.Platforms, err = parsePlatforms(platform); err != nil {
				return err
			}
			switch r.Format {
			case "v2s2":
				r.Format = "docker"
			case "v2s1":
				return usage("manifests of schema 1 are not written any more: --format docker is what registries understand")
			}
			if preserve && (r.Format != "" || r.Compression != "" || strings.HasPrefix(r.Destination, "docker-archive:")) {
				return usage("--preserve-digests: neither --format, nor another compression, nor a docker-archive keeps digests")
			}
			return a.copyImage(cmd.Context(), r, &src, &dst, digestFile, quiet)
		}}
	fs := cmd.Flags()
	fs.BoolVarP(&all, "all", "a", false, "all platforms: what is done without --platform, too")
	fs.StringArrayVar(&platform, "platform", nil, "only this one, OS/ARCH[/VARIANT]; may be repeated (default: all, as they are)")
	fs.StringArrayVar(&r.Tags, "additional-tag", nil, "one more tag at the destination; may be repeated")
	fs.BoolVar(&preserve, "preserve-digests", false, "fail if digests would change: they do by --format, compression, or a docker-archive only")
	fs.StringVar(&r.Compression, "dest-compress-format", "", "gzip, zstd, estargz, erofs or none, as 'hako image convert' does")
	fs.IntVar(&r.Level, "dest-compress-level", 0, "of that compression")
	cmd.MarkFlagsMutuallyExclusive("all", "platform")
	fs.BoolVar(&r.Referrers, "referrers", false, "copy signatures and other documents about the image, too")
	fs.StringVar(&r.Format, "format", "", "write the manifests as oci or docker: gives other digests (default: as they are)")
	copyFlags(fs, &r, &digestFile, &quiet)
	src.register(fs, "src-", "source")
	dst.register(fs, "dest-", "destination")
	return cmd
}

var compressions = []string{"gzip", "zstd", "estargz", "erofs", "none"}

func copyFlags(fs *pflag.FlagSet, r *CopyRequest, digestFile *string, quiet *bool) {
	// skopeo has it without the hyphen.
	fs.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "digestfile" {
			name = "digest-file"
		}
		return pflag.NormalizedName(name)
	})
	fs.IntVar(&r.Jobs, "jobs", 6, "blobs side by side")
	fs.StringVar(digestFile, "digest-file", "", "write the digest to this file, too")
	fs.BoolVarP(quiet, "quiet", "q", false, "no progress")
}

func (a *app) copyImage(ctx context.Context, r CopyRequest, src, dst *accessFlags, digestFile string, quiet bool) (err error) {
	if r.Compression != "" && !slices.Contains(compressions, r.Compression) {
		return usage("bad compression %q: expected %s", r.Compression, strings.Join(compressions, ", "))
	}
	if r.Jobs < 1 || r.Jobs > 100 {
		return usage("bad --jobs %d: expected 1 to 100", r.Jobs)
	}
	if r.SourceAccess, err = src.access(a); err != nil {
		return err
	}
	if r.DestinationAccess, err = dst.access(a); err != nil {
		return err
	}
	images, err := a.images()
	if err != nil {
		return err
	}
	var show *imageProgress
	if !quiet {
		show = newImageProgress(a.Err)
		r.Progress = show.event
	}
	res, err := images.Copy(ctx, r)
	if err != nil {
		return err
	}
	if digestFile != "" {
		if err := os.WriteFile(digestFile, []byte(res.Digest+"\n"), 0o644); err != nil {
			return err
		}
	}
	if show != nil {
		show.say(summary(res))
	}
	fmt.Fprintln(a.Out, res.Digest)
	return nil
}

func summary(r CopyResult) string {
	if r.UpToDate {
		return "Up to date: nothing to copy"
	}
	var parts []string
	if n := r.Blobs - r.Present - r.Mounted; n > 0 {
		parts = append(parts, fmt.Sprintf("%d copied (%s)", n, units.HumanSizeWithPrecision(float64(r.Sent), 4)))
	}
	if r.Mounted > 0 {
		parts = append(parts, fmt.Sprintf("%d mounted", r.Mounted))
	}
	if r.Present > 0 {
		parts = append(parts, fmt.Sprintf("%d already there", r.Present))
	}
	if r.Referrers > 0 {
		parts = append(parts, fmt.Sprintf("%d referrers", r.Referrers))
	}
	return fmt.Sprintf("Blobs: %d: %s", r.Blobs, strings.Join(parts, ", "))
}

// imageProgress shows steps of blobs, which come from several goroutines: bars on a
// terminal, a line for each change elsewhere.
type imageProgress struct {
	mu   sync.Mutex
	p    progress
	last map[string]time.Time
}

// redraw is how often a bar changes.
const redraw = 100 * time.Millisecond

func newImageProgress(w io.Writer) *imageProgress {
	return &imageProgress{p: progress{w: w, tty: isTerminal(w), colour: colours(w), lines: map[string]int{}, last: map[string]string{}}, last: map[string]time.Time{}}
}

func (i *imageProgress) event(e ImageEvent) {
	i.mu.Lock()
	defer i.mu.Unlock()
	m := jsonstream.Message{ID: shortID(e.ID), Status: e.Action}
	if e.Current < e.Total {
		if now := time.Now(); now.Sub(i.last[e.ID]) < redraw && i.p.last[m.ID] == e.Action {
			return
		} else {
			i.last[e.ID] = now
		}
		m.Progress = &jsonstream.Progress{Current: e.Current, Total: e.Total}
	} else if e.Action == "Copied" {
		m.Status = fmt.Sprintf("Copied %s", units.HumanSizeWithPrecision(float64(e.Total), 4))
	}
	i.p.show(m)
	i.p.last[m.ID] = e.Action
}

func (i *imageProgress) say(s string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	fmt.Fprintln(i.p.w, s)
}

func (a *app) imageTagsCommand() *cobra.Command {
	var format string
	var acc accessFlags
	cmd := &cobra.Command{Use: "list-tags [OPTIONS] REPOSITORY", Aliases: []string{"tags"}, Short: "List the tags of a repository in a registry", Args: needArgs(1, 1, "one repository"),
		Long:    "List the tags of a repository in its registry, or the names in a layout or an archive.",
		Example: "  hako image list-tags registry.example.com/app\n  hako image list-tags oci:./layout",
		RunE: func(cmd *cobra.Command, args []string) error {
			images, access, err := a.imagesWith(&acc)
			if err != nil {
				return err
			}
			name, tags, err := images.Tags(cmd.Context(), args[0], access)
			if err != nil {
				return err
			}
			switch format {
			case "":
				for _, t := range tags {
					fmt.Fprintln(a.Out, printable(t))
				}
				return nil
			case "json":
				if tags == nil {
					tags = []string{}
				}
				s, err := jsonString(struct {
					Repository string
					Tags       []string
				}{name, tags})
				if err == nil {
					fmt.Fprintln(a.Out, s)
				}
				return err
			}
			return usage(`bad --format %q: expected json`, format)
		}}
	cmd.Flags().StringVar(&format, "format", "", `"json": one object (default: a tag a line)`)
	acc.register(cmd.Flags(), "", "registry")
	return cmd
}

func (a *app) imageDeleteCommand() *cobra.Command {
	var acc accessFlags
	var force, dryRun bool
	cmd := &cobra.Command{Use: "delete [OPTIONS] IMAGE...", Short: "Delete images from their registry", Args: needNames("an image"),
		Long: `Delete images from their registry: manifests, by digest, and with each all of its tags. The
registry removes blobs later, when it collects garbage. The daemon's images are not
touched; that is 'hako rmi'.`,
		Example: "  hako image delete registry.example.com/app:old\n  hako image delete -f registry.example.com/app@sha256:...",
		RunE: func(cmd *cobra.Command, args []string) error {
			images, access, err := a.imagesWith(&acc)
			if err != nil {
				return err
			}
			return a.each(args, func(name string) error {
				digest, err := images.Delete(cmd.Context(), name, access, true)
				if err != nil {
					return err
				}
				if dryRun {
					fmt.Fprintf(a.Err, "Would delete %s of %s and all of its tags\n", digest, name)
					return nil
				}
				if !force && !a.confirm(fmt.Sprintf("This deletes %s and all of its tags from its registry.", digest)) {
					return fmt.Errorf("%s: left alone", name)
				}
				// By the digest that was shown, whatever the tag is now.
				repo, _, _ := strings.Cut(name, "@")
				if i := strings.LastIndexByte(repo, ':'); i > strings.LastIndexByte(repo, '/') {
					repo = repo[:i]
				}
				_, err = images.Delete(cmd.Context(), repo+"@"+digest, access, false)
				return err
			})
		}}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say what would be deleted")
	acc.register(cmd.Flags(), "", "registry")
	return cmd
}
