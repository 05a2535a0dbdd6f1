package docker

import (
	"context"
	"net/http"
	"strings"

	"github.com/distribution/reference"
	wire "github.com/moby/moby/api/types/image"

	"github.com/hako-engine/hako/engine"
)

func (s *Server) imageList(ctx context.Context, c *call) error {
	f, err := c.filters("before", "dangling", "label", "reference", "since", "until")
	if err != nil {
		return err
	}
	if name := c.query("filter"); name != "" { // of clients before API 1.41
		if f == nil {
			f = map[string][]string{}
		}
		f["reference"] = append(f["reference"], name)
	}
	images, err := s.opt.Backend.Images(ctx, f)
	if err != nil {
		return err
	}
	out := make([]wire.Summary, 0, len(images))
	for i := range images {
		sum := imageSummaryOf(&images[i])
		if c.flag("manifests") {
			sum.Manifests = manifestsOf(&images[i].Image)
		}
		out = append(out, sum)
	}
	return c.json(http.StatusOK, c.version.images(out))
}

// imageGet tells apart what may follow /images/ in a GET.
func (s *Server) imageGet(ctx context.Context, c *call) error {
	name, verb := cutVerb(c.PathValue("rest"))
	switch {
	case name == "":
	case verb == "json":
		return s.imageInspect(ctx, c, name)
	case verb == "history":
		return s.imageHistory(ctx, c, name)
	case verb == "get":
		return s.save(ctx, c, []string{name})
	}
	return errNoPage
}

func (s *Server) imagePost(ctx context.Context, c *call) error {
	name, verb := cutVerb(c.PathValue("rest"))
	switch {
	case name == "":
	case verb == "push":
		return s.imagePush(ctx, c, name)
	case verb == "tag":
		return s.imageTag(ctx, c, name)
	}
	return errNoPage
}

// cutVerb splits docker.io/library/alpine/json at the last slash.
func cutVerb(rest string) (name, verb string) {
	i := strings.LastIndexByte(rest, '/')
	if i < 0 {
		return "", rest
	}
	return rest[:i], rest[i+1:]
}

func (s *Server) imageInspect(ctx context.Context, c *call, name string) error {
	d, err := s.opt.Backend.Image(ctx, name)
	if err != nil {
		return err
	}
	info, err := s.opt.Backend.Info(ctx)
	if err != nil {
		return err
	}
	out := imageInspectOf(&d, info.Snapshotter)
	if c.flag("manifests") {
		out.Manifests = manifestsOf(&d.Image)
	}
	return c.json(http.StatusOK, c.version.image(out))
}

func (s *Server) imageHistory(ctx context.Context, c *call, name string) error {
	history, err := s.opt.Backend.ImageHistory(ctx, name)
	if err != nil {
		return err
	}
	out := make([]wire.HistoryResponseItem, 0, len(history))
	for _, h := range history {
		out = append(out, wire.HistoryResponseItem{
			ID: h.ID, Created: h.Created.Unix(), CreatedBy: h.CreatedBy, Comment: h.Comment, Size: h.Size, Tags: h.Tags,
		})
	}
	return c.json(http.StatusOK, out)
}

func (s *Server) imageTag(ctx context.Context, c *call, name string) error {
	repo, tag := c.query("repo"), c.query("tag")
	named, err := reference.ParseNormalizedNamed(repo)
	if err != nil {
		return invalidf("%v", err)
	}
	target := named.String()
	if tag != "" {
		tagged, err := reference.WithTag(reference.TrimNamed(named), tag)
		if err != nil {
			return invalidf("%v", err)
		}
		target = tagged.String()
	}
	if err := s.opt.Backend.TagImage(ctx, name, target); err != nil {
		return err
	}
	return c.empty(http.StatusCreated)
}

func (s *Server) imageDelete(ctx context.Context, c *call) error {
	name := c.PathValue("rest")
	if name == "" {
		return invalidf("image name cannot be blank")
	}
	removed, err := s.opt.Backend.RemoveImage(ctx, name, c.flag("force"), c.flag("noprune"))
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, removedOf(removed))
}

func (s *Server) imagePrune(ctx context.Context, c *call) error {
	f, err := c.filters("dangling", "label", "label!", "until")
	if err != nil {
		return err
	}
	removed, reclaimed, err := s.opt.Backend.PruneImages(ctx, f)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, wire.PruneReport{ImagesDeleted: removedOf(removed), SpaceReclaimed: uint64(reclaimed)})
}

// imageCreate pulls an image, or imports one.
func (s *Server) imageCreate(ctx context.Context, c *call) error {
	if src := c.query("fromSrc"); src != "" {
		return s.imageImport(ctx, c, src)
	}
	name := c.query("fromImage")
	if name == "" {
		return invalidf("invalid reference format: fromImage is empty")
	}
	ref, allTags, err := pullReference(name, c.query("tag"))
	if err != nil {
		return err
	}
	platform, err := c.platform()
	if err != nil {
		return err
	}
	t := c.transfer()
	_, err = s.opt.Backend.PullImage(ctx, ref, engine.PullOptions{
		Platform: platform, Auth: c.auth(), AllTags: allTags, Progress: t.progress,
	})
	return t.finish(err)
}

// pushResult is the line for programs at the end of a push.
type pushResult struct {
	Tag    string
	Digest string
	Size   int64
}

func (s *Server) imagePush(ctx context.Context, c *call, name string) error {
	ref := name
	if tag := c.query("tag"); tag != "" {
		named, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return invalidf("%v", err)
		}
		tagged, err := reference.WithTag(reference.TrimNamed(named), tag)
		if err != nil {
			return invalidf("%v", err)
		}
		ref = tagged.String()
	}
	platform, err := c.platform()
	if err != nil {
		return err
	}
	d, err := s.opt.Backend.Image(ctx, ref)
	if err != nil {
		return err
	}
	t := c.transfer()
	err = s.opt.Backend.PushImage(ctx, ref, engine.PushOptions{Platform: platform, Auth: c.auth(), Progress: t.progress})
	if err != nil {
		return t.finish(err)
	}
	if named, err := reference.ParseNormalizedNamed(ref); err == nil {
		if tagged, ok := reference.TagNameOnly(named).(reference.Tagged); ok {
			pushed := d.Target
			if platform != nil {
				pushed = d.Manifest
			}
			if err := t.aux(pushResult{Tag: tagged.Tag(), Digest: pushed.Digest.String(), Size: pushed.Size}); err != nil {
				return nil // the client left after its push was done
			}
		}
	}
	return t.finish(nil)
}

func (s *Server) imageLoad(ctx context.Context, c *call) error {
	platform, err := c.platform()
	if err != nil {
		return err
	}
	quiet := c.flagOr("quiet", true)
	t := c.transfer()
	o := engine.LoadOptions{Platform: platform}
	if !quiet {
		o.Progress = t.progress
	}
	loaded, err := s.opt.Backend.LoadImages(ctx, c.Body, o)
	if err != nil {
		return t.finish(err)
	}
	for _, l := range loaded {
		line := "Loaded image ID: " + l.Image.ID.String()
		for _, name := range l.Names {
			if err := t.text("Loaded image: " + familiarName(name) + "\n"); err != nil {
				return nil // the client left after its images were loaded
			}
			line = ""
		}
		if line != "" {
			if err := t.text(line + "\n"); err != nil {
				return nil
			}
		}
	}
	return t.finish(nil)
}

func (s *Server) imagesSave(ctx context.Context, c *call) error {
	var names []string
	for _, n := range c.URL.Query()["names"] {
		for name := range strings.SplitSeq(n, ",") {
			if name != "" {
				names = append(names, name)
			}
		}
	}
	if len(names) == 0 {
		return invalidf("no image given to save")
	}
	return s.save(ctx, c, names)
}

func (s *Server) save(ctx context.Context, c *call, names []string) error {
	platform, err := c.platform()
	if err != nil {
		return err
	}
	return s.opt.Backend.SaveImages(ctx, names, engine.SaveOptions{Platform: platform}, &tarBody{c: c})
}

// tarBody begins the answer with its first byte; until then an error has its own status code.
type tarBody struct{ c *call }

func (t *tarBody) Write(p []byte) (int, error) {
	if !t.c.w.wrote {
		t.c.w.Header().Set("Content-Type", "application/x-tar")
	}
	return t.c.w.Write(p)
}

func (s *Server) imageSearch(context.Context, *call) error {
	return notImplementedf("searching Docker Hub is not in this version of hako")
}

func (s *Server) distribution(context.Context, *call) error {
	return notImplementedf("asking a registry about an image without pulling it is not in this version of hako")
}
