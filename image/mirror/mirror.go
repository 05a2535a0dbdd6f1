// Package mirror brings repositories at one place up to date with those of registries, as a
// YAML file says.
//
// In flow the file and the tools; out flow copies, and a line for each image about what
// became of it. One failure does not end the others.
package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sync/errgroup"

	"github.com/hako-engine/hako/image/copier"
	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/tools"
	"github.com/hako-engine/hako/image/transport"
)

const (
	maxFile   = 4 << 20 // bytes
	maxImages = 100_000
)

// Config is the file.
type Config struct {
	// Destination is docker://HOST[/PATH] or oci:DIR.
	Destination string `yaml:"destination"`
	// Scoped puts the source registry's name into the path, too.
	Scoped     bool                `yaml:"scoped"`
	Registries map[string]Registry `yaml:"registries"`
}

// Registry is what to copy from one.
type Registry struct {
	Repositories map[string]Selection `yaml:"repositories"`
	Platforms    []string             `yaml:"platforms"`
	Referrers    bool                 `yaml:"referrers"`
	TLSVerify    *bool                `yaml:"tls-verify"`
	CertDir      string               `yaml:"cert-dir"`
	Username     string               `yaml:"username"`
	Password     string               `yaml:"password"`
	Token        string               `yaml:"token"`

	// Access of a repository that no file is for; the fields above are not looked at then.
	Access tools.Access `yaml:"-"`

	byName    bool
	platforms []ocispec.Platform
}

// Selection is which images of a repository; a plain list in the file is one of tags and
// digests, an empty mapping all tags.
type Selection struct {
	Tags   []string `yaml:"tags"`   // and digests
	Regex  string   `yaml:"regex"`  // of whole tags
	Semver string   `yaml:"semver"` // of tags that are versions
	Latest int      `yaml:"latest"` // only so many of these, the newest versions

	regex  *regexp.Regexp
	semver constraint
}

// UnmarshalYAML takes both forms.
func (s *Selection) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.SequenceNode {
		return n.Decode(&s.Tags)
	}
	if n.Kind == yaml.MappingNode {
		for i := 0; i < len(n.Content); i += 2 {
			if !slices.Contains([]string{"tags", "regex", "semver", "latest"}, n.Content[i].Value) {
				return fmt.Errorf("line %d: unknown key %q: expected tags, regex, semver or latest", n.Content[i].Line, n.Content[i].Value)
			}
		}
	}
	type plain Selection
	return n.Decode((*plain)(s))
}

// Parse reads and checks the file.
func Parse(name string, r io.Reader) (*Config, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxFile {
		return nil, fmt.Errorf("%s: larger than %d bytes: %w", name, maxFile, errdefs.ErrResourceExhausted)
	}
	if c, err := parseSkopeo(raw); c != nil || err != nil {
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		return c, c.complete(name)
	}
	var c Config
	dec := yaml.NewDecoder(strings.NewReader(string(raw)))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	if len(c.Registries) == 0 {
		return nil, fmt.Errorf("%s: no registries: %w", name, errdefs.ErrInvalidArgument)
	}
	return &c, c.complete(name)
}

// complete checks all registries' parts.
func (c *Config) complete(name string) error {
	for _, host := range slices.Sorted(maps.Keys(c.Registries)) {
		reg := c.Registries[host]
		if err := reg.complete(host); err != nil {
			return fmt.Errorf("%s: registry %s: %w", name, host, err)
		}
		c.Registries[host] = reg
	}
	return nil
}

// Single is for one repository (docker://NAME), all of its tags, or one image of it.
func Single(ref string, r Registry) (*Config, error) {
	text, ok := strings.CutPrefix(ref, "docker://")
	n, err := reference.ParseNormalizedNamed(text)
	if err != nil || !ok {
		return nil, errors.Join(invalid("source %q", ref), err)
	}
	var s Selection
	if d, ok := n.(reference.Digested); ok {
		s.Tags = []string{d.Digest().String()}
	} else if t, ok := n.(reference.Tagged); ok {
		s.Tags = []string{t.Tag()}
	}
	r.byName, r.Repositories = true, map[string]Selection{reference.Path(n): s}
	c := &Config{Registries: map[string]Registry{reference.Domain(n): r}}
	return c, c.complete(ref)
}

// skopeoRegistry is a registry's part of skopeo's file (skopeo-sync(1), "YAML FILE CONTENT").
type skopeoRegistry struct {
	Images      map[string][]string `yaml:"images"`
	Regex       map[string]string   `yaml:"images-by-tag-regex"`
	Semver      map[string]string   `yaml:"images-by-semver"`
	Credentials struct {
		Username string `yaml:"username"`
		Password string `yaml:"password"`
	} `yaml:"credentials"`
	TLSVerify *bool  `yaml:"tls-verify"`
	CertDir   string `yaml:"cert-dir"`
}

// parseSkopeo reads a file of skopeo's; nil if it is none.
func parseSkopeo(raw []byte) (*Config, error) {
	var top map[string]yaml.Node
	if yaml.Unmarshal(raw, &top) != nil || len(top) == 0 {
		return nil, nil
	}
	for k, v := range top {
		if slices.Contains([]string{"registries", "destination", "scoped"}, k) || v.Kind != yaml.MappingNode {
			return nil, nil
		}
	}
	var file map[string]skopeoRegistry
	dec := yaml.NewDecoder(strings.NewReader(string(raw)))
	dec.KnownFields(true)
	if err := dec.Decode(&file); err != nil {
		return nil, err
	}
	c := &Config{Registries: map[string]Registry{}}
	for host, r := range file {
		all := map[string]Selection{}
		add := func(repo string, s Selection) error {
			if _, ok := all[repo]; ok {
				return fmt.Errorf("registry %s: repository %s is listed twice", host, repo)
			}
			all[repo] = s
			return nil
		}
		for repo, tags := range r.Images {
			if err := add(repo, Selection{Tags: tags}); err != nil {
				return nil, err
			}
		}
		for repo, expr := range r.Regex { // of any part of the tag
			if err := add(repo, Selection{Regex: ".*(?:" + expr + ").*"}); err != nil {
				return nil, err
			}
		}
		for repo, versions := range r.Semver {
			if err := add(repo, Selection{Semver: versions}); err != nil {
				return nil, err
			}
		}
		c.Registries[host] = Registry{Repositories: all, TLSVerify: r.TLSVerify, CertDir: r.CertDir, Username: r.Credentials.Username, Password: r.Credentials.Password}
	}
	return c, nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// complete checks a registry's part, and reads its expressions.
func (r *Registry) complete(host string) error {
	if len(r.Repositories) == 0 {
		return invalid("no repositories")
	}
	for _, p := range r.Platforms {
		parsed, err := platforms.Parse(p)
		if err != nil {
			return invalid("platform %q", p)
		}
		r.platforms = append(r.platforms, parsed)
	}
	if r.Token != "" && r.Username != "" {
		return invalid("a token and a username: choose one")
	}
	for repo, s := range r.Repositories {
		n, err := reference.ParseNormalizedNamed(host + "/" + repo)
		if err != nil || !reference.IsNameOnly(n) || reference.Domain(n) != host {
			return invalid("repository %q", repo)
		}
		ways := 0
		for _, set := range []bool{len(s.Tags) > 0, s.Regex != "", s.Semver != ""} {
			if set {
				ways++
			}
		}
		if ways > 1 {
			return invalid("repository %s: tags, regex and semver: choose one", repo)
		}
		for _, t := range s.Tags {
			if d := digest.Digest(t); strings.Contains(t, ":") {
				err = manifest.ValidDigest(d)
			} else {
				_, err = reference.WithTag(n, t)
			}
			if err != nil {
				return invalid("repository %s: %q is neither a tag nor a digest", repo, t)
			}
		}
		if s.Regex != "" {
			if s.regex, err = regexp.Compile("^(?:" + s.Regex + ")$"); err != nil {
				return invalid("repository %s: %v", repo, err)
			}
		}
		if s.Semver != "" {
			if s.semver, err = parseConstraint(s.Semver); err != nil {
				return invalid("repository %s: %v", repo, err)
			}
		}
		if s.Latest < 0 || s.Latest > 0 && len(s.Tags) > 0 {
			return invalid("repository %s: latest is the number of versions to take of those that regex or semver choose", repo)
		}
		r.Repositories[repo] = s
	}
	return nil
}

// Line is what became of one image.
type Line struct {
	Source, Destination string
	Action              string
	Digest              digest.Digest
	Sent                int64 // bytes
	Err                 error
}

// Actions of lines.
const (
	Copied    = "copied"
	UpToDate  = "up to date"
	WouldCopy = "would copy"
	Failed    = "failed"
)

// Options of Run.
type Options struct {
	Destination string       // "": the file's
	Access      tools.Access // of the destination
	DryRun      bool
	Jobs        int                // images side by side; 0: 3
	Report      func(Line)         // for each image, one at a time
	Progress    func(copier.Event) // nil: none
}

// task is one image.
type task struct {
	from, to transport.Ref
	o        tools.CopyOptions
}

// Run does what the file says. Its error is one that nothing could be done about any image
// for; those of single images are reported.
func Run(ctx context.Context, t *tools.Tools, c *Config, o Options) error {
	dest := o.Destination
	if dest == "" {
		dest = c.Destination
	}
	if dest == "" {
		return invalid("no destination, neither in the file nor named")
	}
	if o.Jobs <= 0 {
		o.Jobs = 3
	}
	var mu sync.Mutex
	report := func(l Line) {
		mu.Lock()
		defer mu.Unlock()
		if o.Report != nil {
			o.Report(l)
		}
	}
	tasks, err := plan(ctx, t, c, dest, o, report)
	if err != nil {
		return err
	}
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(o.Jobs)
	for _, k := range tasks {
		eg.Go(func() error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			l := Line{Source: k.from.String(), Destination: k.to.String()}
			if o.DryRun {
				d, pending, err := t.Pending(ctx, k.from, k.to, k.o)
				l.Digest, l.Err, l.Action = d.Digest, err, UpToDate
				if pending {
					l.Action = WouldCopy
				}
			} else {
				res, err := t.CopyRef(ctx, k.from, k.to, k.o)
				l.Digest, l.Sent, l.Err, l.Action = res.Top.Digest, res.Sent, err, Copied
				if res.UpToDate {
					l.Action = UpToDate
				}
			}
			if l.Err != nil {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				l.Action = Failed
			}
			report(l)
			return nil
		})
	}
	return eg.Wait()
}

// plan lists the images. A repository whose tags cannot be listed is reported, and left out.
func plan(ctx context.Context, t *tools.Tools, c *Config, dest string, o Options, report func(Line)) ([]task, error) {
	var tasks []task
	taken := map[string]string{}
	for _, host := range slices.Sorted(maps.Keys(c.Registries)) {
		reg := c.Registries[host]
		acc := tools.Access{
			Credentials: registry.Credentials{Username: reg.Username, Password: reg.Password, RegistryToken: reg.Token},
			CertDir:     reg.CertDir, Insecure: reg.TLSVerify != nil && !*reg.TLSVerify,
		}
		if reg.byName {
			acc = reg.Access
		}
		for _, repo := range slices.Sorted(maps.Keys(reg.Repositories)) {
			name, err := reference.ParseNormalizedNamed(host + "/" + repo)
			if err != nil {
				return nil, invalid("repository %q", repo)
			}
			tags, err := reg.Repositories[repo].choose(ctx, t, name, acc)
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if err != nil {
				report(Line{Source: "docker://" + name.Name(), Action: Failed, Err: err})
				continue
			}
			for _, tag := range tags {
				k := task{o: tools.CopyOptions{Source: acc, Destination: o.Access, Options: copier.Options{Platforms: reg.platforms, Referrers: reg.Referrers, Progress: o.Progress}}}
				if k.from, k.to, err = place(name, tag, dest, c.Scoped); err != nil {
					return nil, err
				}
				if other, ok := taken[k.to.String()]; ok {
					return nil, invalid("%s and %s would both go to %s (scoped: true keeps registries apart)", other, k.from, k.to)
				}
				taken[k.to.String()] = k.from.String()
				if tasks = append(tasks, k); len(tasks) > maxImages {
					return nil, fmt.Errorf("more than %d images: %w", maxImages, errdefs.ErrResourceExhausted)
				}
			}
		}
	}
	return tasks, nil
}

// choose gives the tags and digests of a repository that are wanted.
func (s Selection) choose(ctx context.Context, t *tools.Tools, name reference.Named, acc tools.Access) ([]string, error) {
	if len(s.Tags) > 0 {
		return s.Tags, nil
	}
	_, all, err := t.Tags(ctx, "docker://"+name.Name(), acc)
	if err != nil {
		return nil, err
	}
	var tags []string
	for _, tag := range all {
		// Lists of referrers and signatures have tags, too, and come along with their images.
		if companion.MatchString(tag) {
			continue
		}
		v, isVersion := parseVersion(tag)
		switch {
		case s.regex != nil && !s.regex.MatchString(tag):
		case s.semver != nil && (!isVersion || !s.semver.match(v)):
		case s.Latest > 0 && !isVersion:
		default:
			tags = append(tags, tag)
		}
	}
	if len(tags) == 0 {
		return nil, fmt.Errorf("no tag of %s is wanted, of %d: %w", name.Name(), len(all), errdefs.ErrNotFound)
	}
	if s.Latest > 0 {
		slices.SortStableFunc(tags, func(a, b string) int {
			va, _ := parseVersion(a)
			vb, _ := parseVersion(b)
			return vb.compare(va)
		})
		tags = tags[:min(s.Latest, len(tags))]
	}
	slices.Sort(tags)
	return tags, nil
}

var companion = regexp.MustCompile(`^sha(256|512)-[0-9a-f]{64,128}(\.(sig|att|sbom))?$`)

// place says where an image comes from and goes to.
func place(name reference.Named, tag, dest string, scoped bool) (from, to transport.Ref, err error) {
	from = transport.Ref{Kind: transport.Registry}
	isDigest := strings.Contains(tag, ":")
	if isDigest {
		from.Name, err = reference.WithDigest(name, digest.Digest(tag))
	} else {
		from.Name, err = reference.WithTag(name, tag)
	}
	if err != nil {
		return from, to, err
	}
	host := strings.ReplaceAll(reference.Domain(name), ":", "-")
	if path, ok := strings.CutPrefix(dest, "docker://"); ok {
		repo := reference.Path(name)
		if scoped {
			repo = host + "/" + repo
		}
		n, err := reference.ParseNormalizedNamed(strings.TrimSuffix(path, "/") + "/" + repo)
		if err != nil || !reference.IsNameOnly(n) {
			return from, to, errors.Join(invalid("destination %q with repository %q", dest, repo), err)
		}
		to = transport.Ref{Kind: transport.Registry}
		if isDigest {
			to.Name, err = reference.WithDigest(n, digest.Digest(tag))
		} else {
			to.Name, err = reference.WithTag(n, tag)
		}
		return from, to, err
	}
	dir, ok := strings.CutPrefix(dest, "oci:")
	if !ok || dir == "" {
		return from, to, invalid("destination %q is neither docker://HOST[/PATH] nor oci:DIR", dest)
	}
	to = transport.Ref{Kind: transport.Layout, Path: filepath.Join(dir, host, filepath.FromSlash(reference.Path(name)))}
	if !isDigest {
		to.Tag = tag
	}
	return from, to, nil
}
