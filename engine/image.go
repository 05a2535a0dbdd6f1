package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/image-spec/identity"

	"github.com/hako-engine/hako/image"
)

// Images lists images, the newest first. Filters: before, dangling, label, reference,
// since, until.
func (e *Engine) Images(ctx context.Context, f Filters) ([]ImageSummary, error) {
	ctx = e.ns(ctx)
	if err := f.check("before", "dangling", "label", "label!", "reference", "since", "until"); err != nil {
		return nil, err
	}
	dangling, asked, err := f.bool("dangling")
	if err != nil {
		return nil, err
	}
	until, err := f.until()
	if err != nil {
		return nil, err
	}
	bound := func(field string) (time.Time, error) {
		if len(f[field]) == 0 {
			return time.Time{}, nil
		}
		img, err := e.image(ctx, f[field][0])
		return img.Created, err
	}
	before, err := bound("before")
	if err != nil {
		return nil, err
	}
	since, err := bound("since")
	if err != nil {
		return nil, err
	}
	list, err := e.opt.Images.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	users, err := e.imageUsers(ctx)
	if err != nil {
		return nil, err
	}
	out := []ImageSummary{}
	for _, img := range list {
		if asked && dangling != (len(img.Names) == 0) ||
			!before.IsZero() && !img.Created.Before(before) || !since.IsZero() && !img.Created.After(since) ||
			!until.IsZero() && !img.Created.Before(until) || !f.labels(img.Labels) {
			continue
		}
		if pats := f["reference"]; len(pats) > 0 {
			img.Names = slices.DeleteFunc(slices.Clone(img.Names), func(n string) bool { return !matchReference(n, pats) })
			img.Digests = slices.DeleteFunc(slices.Clone(img.Digests), func(n string) bool { return !matchReference(n, pats) })
			if len(img.Names) == 0 && len(img.Digests) == 0 {
				continue
			}
		}
		out = append(out, ImageSummary{Image: img, Containers: len(users[img.ID.String()]), SharedSize: -1})
	}
	slices.SortStableFunc(out, func(a, b ImageSummary) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID))
	})
	return out, nil
}

// matchReference applies Docker's patterns ("alpine", "al*:3", "host/*/x") to a full name.
func matchReference(full string, patterns []string) bool {
	named, err := reference.ParseNormalizedNamed(full)
	if err != nil {
		return false
	}
	for _, p := range patterns {
		if ok, err := reference.FamiliarMatch(p, named); err == nil && ok {
			return true
		}
		if ok, err := path.Match(p, reference.FamiliarName(named)); err == nil && ok {
			return true
		}
	}
	return false
}

// imageUsers gives the containers of each image, by image id: those of containerd's clients too, as far
// as the name that they were made from still is an image's.
func (e *Engine) imageUsers(ctx context.Context) (map[string][]Container, error) {
	users := map[string][]Container{}
	for _, c := range e.containers.all() {
		v := c.view()
		used := []string{v.ImageID}
		for _, m := range v.Mounts {
			if m.Kind == MountImage && m.ImageID != "" {
				used = append(used, m.ImageID)
			}
		}
		slices.Sort(used)
		for _, id := range slices.Compact(used) {
			users[id] = append(users[id], v)
		}
	}
	guests, err := e.guests(ctx)
	if err != nil {
		return nil, fmt.Errorf("who uses images: %w", err)
	}
	ids := map[string]string{}
	for _, g := range guests {
		name := g.rec.Image
		if _, asked := ids[name]; !asked && name != "" {
			img, err := e.opt.Images.Get(shared(ctx), name, nil)
			if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
				return nil, fmt.Errorf("who uses images: %w", err)
			}
			if err == nil {
				ids[name] = img.ID.String()
			}
		}
		if id := ids[name]; id != "" {
			v := g.view()
			v.ImageID = id
			users[id] = append(users[id], v)
		}
	}
	return users, nil
}

// image finds an image, with Docker's text if there is none.
func (e *Engine) image(ctx context.Context, ref string) (image.Image, error) {
	img, err := e.opt.Images.Get(e.ns(ctx), ref, nil)
	if errdefs.IsNotFound(err) {
		return img, &classed{text: "No such image: " + familiarTag(ref), class: errdefs.ErrNotFound, cause: err}
	}
	return img, err
}

// Image gives an image with its configuration.
func (e *Engine) Image(ctx context.Context, ref string) (ImageDetail, error) {
	ctx = e.ns(ctx)
	img, err := e.image(ctx, ref)
	if err != nil {
		return ImageDetail{}, err
	}
	cfg, err := e.opt.Images.Config(ctx, img)
	if err != nil {
		return ImageDetail{}, fmt.Errorf("configuration of image %s: %w", ref, err)
	}
	return ImageDetail{img, cfg}, nil
}

// PullImage brings an image here and unpacks it.
func (e *Engine) PullImage(ctx context.Context, ref string, o image.PullOptions) (image.Image, error) {
	var meter *pullMeter
	if e.opt.Pulled != nil {
		meter = &pullMeter{began: time.Now(), got: map[string]int64{}}
		o.Progress = meter.watch(o.Progress)
	}
	img, err := e.opt.Images.Pull(e.ns(ctx), ref, o)
	if meter != nil {
		e.opt.Pulled(meter.result(err))
	}
	if err != nil {
		return img, err
	}
	e.emitFor("image", "pull", familiarTag(ref), "name", familiarTag(ref))
	return img, nil
}

// Login asks a registry whether it takes credentials. Nothing of them is kept.
func (e *Engine) Login(ctx context.Context, a image.Auth) error { return e.opt.Images.Login(ctx, a) }

// PushImage sends an image to its registry.
func (e *Engine) PushImage(ctx context.Context, ref string, o image.PushOptions) error {
	if err := e.opt.Images.Push(e.ns(ctx), ref, o); err != nil {
		return err
	}
	e.emitFor("image", "push", familiarTag(ref), "name", familiarTag(ref))
	return nil
}

// TagImage gives an image another name.
func (e *Engine) TagImage(ctx context.Context, source, target string) error {
	img, err := e.image(ctx, source)
	if err != nil {
		return err
	}
	if err := e.opt.Images.Tag(e.ns(ctx), source, target); err != nil {
		return err
	}
	e.emitFor("image", "tag", img.ID.String(), "name", familiarTag(target))
	return nil
}

// RemoveImage removes a name of an image, and the image with its last name, by
// Docker's rules. Images that containers use stay unless forced, and those of running
// ones always.
func (e *Engine) RemoveImage(ctx context.Context, ref string, force, noPrune bool) ([]RemovedImage, error) {
	ctx = e.ns(ctx)
	img, busy, done, err := e.removingImage(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer done()
	id := shortImageID(img.ID.String())
	all, err := e.imageUsers(ctx)
	if err != nil {
		return nil, err
	}
	users := all[img.ID.String()]
	i := slices.IndexFunc(users, func(v Container) bool { return v.State.live() || v.State.Status == StatusRestarting })
	names := namesMeant(img, ref)
	if len(names) > 0 {
		if others := len(img.Names) - len(names); others > 0 && !strings.Contains(ref, "@") {
			return e.untag(ctx, img, names)
		}
		switch {
		case len(users) > 0 && !force:
			return nil, conflictf("conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s",
				ref, shortID(users[0].ID), id)
		case i >= 0: // forced: the name goes, the image stays as long as it runs
			return e.untag(ctx, img, names)
		}
	} else {
		switch {
		case i >= 0:
			return nil, conflictf("conflict: unable to delete %s (cannot be forced) - image is being used by running container %s", id, shortID(users[i].ID))
		case len(repositories(img)) > 1 && !force:
			return nil, conflictf("conflict: unable to delete %s (must be forced) - image is referenced in multiple repositories", id)
		case len(users) > 0 && !force:
			return nil, conflictf("conflict: unable to delete %s (must be forced) - image is being used by stopped container %s", id, shortID(users[0].ID))
		}
	}
	if busy {
		return nil, conflictf("conflict: unable to delete %s (cannot be forced) - a container is being created from it", id)
	}
	return e.deleteImage(ctx, img)
}

// deleteImage removes an image with all its names.
func (e *Engine) deleteImage(ctx context.Context, img image.Image) ([]RemovedImage, error) {
	if _, err := e.opt.Images.Delete(ctx, img); err != nil {
		return nil, fmt.Errorf("delete image %s: %w", shortImageID(img.ID.String()), err)
	}
	var out []RemovedImage
	for _, n := range slices.Concat(img.Names, img.Digests) {
		out = append(out, RemovedImage{Untagged: familiarName(n)})
		e.emitFor("image", "untag", img.ID.String(), "name", familiarName(n))
	}
	if _, err := e.opt.Images.Get(ctx, img.ID.String(), nil); err == nil {
		return out, nil // it got another name meanwhile
	}
	out = append(out, RemovedImage{Deleted: img.ID.String()})
	e.emitFor("image", "delete", img.ID.String(), "name", img.ID.String())
	return out, nil
}

// untag removes names only.
func (e *Engine) untag(ctx context.Context, img image.Image, names []string) ([]RemovedImage, error) {
	var out []RemovedImage
	for _, n := range names {
		if err := e.opt.Images.Untag(ctx, n); err != nil && !errdefs.IsNotFound(err) {
			return out, fmt.Errorf("untag %s: %w", familiarName(n), err)
		}
		out = append(out, RemovedImage{Untagged: familiarName(n)})
		e.emitFor("image", "untag", img.ID.String(), "name", familiarName(n))
	}
	return out, nil
}

// namesMeant gives the image's names that a reference stands for: none if it is an id.
func namesMeant(img image.Image, ref string) []string {
	if strings.HasPrefix(img.ID.String(), ref) || strings.HasPrefix(img.ID.Encoded(), ref) && !slices.Contains(img.Names, ref) {
		if named, err := reference.ParseNormalizedNamed(ref); err != nil || !slices.Contains(img.Names, reference.TagNameOnly(named).String()) {
			return nil
		}
	}
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil
	}
	if _, ok := named.(reference.Digested); ok {
		var out []string
		for _, n := range slices.Concat(img.Names, img.Digests) {
			if p, err := reference.ParseNormalizedNamed(n); err == nil && p.Name() == named.Name() {
				out = append(out, n)
			}
		}
		return out
	}
	full := reference.TagNameOnly(named).String()
	if slices.Contains(img.Names, full) {
		return []string{full}
	}
	return nil
}

// repositories are the different repositories that an image has names in.
func repositories(img image.Image) map[string]bool {
	out := map[string]bool{}
	for _, n := range img.Names {
		if p, err := reference.ParseNormalizedNamed(n); err == nil {
			out[p.Name()] = true
		}
	}
	return out
}

func shortImageID(id string) string {
	_, hex, ok := strings.Cut(id, ":")
	if !ok {
		hex = id
	}
	return shortID(hex)
}

// LoadImages reads an archive of images.
func (e *Engine) LoadImages(ctx context.Context, r io.Reader, o image.LoadOptions) ([]image.Loaded, error) {
	loaded, err := e.opt.Images.Load(e.ns(ctx), r, o)
	for _, l := range loaded {
		name := l.Image.ID.String()
		if len(l.Names) > 0 {
			name = familiarName(l.Names[0])
		}
		e.emitFor("image", "load", l.Image.ID.String(), "name", name)
	}
	return loaded, err
}

// SaveImages writes images as an archive.
func (e *Engine) SaveImages(ctx context.Context, refs []string, o image.SaveOptions, w io.Writer) error {
	for _, r := range refs {
		img, done, err := e.useImage(ctx, func() (image.Image, error) { return e.image(ctx, r) })
		if err != nil {
			return err
		}
		defer done()
		defer e.emitFor("image", "save", img.ID.String(), "name", familiarName(r))
	}
	return e.opt.Images.Save(e.ns(ctx), refs, o, w)
}

// ImageHistory gives the steps that made an image, the newest first.
func (e *Engine) ImageHistory(ctx context.Context, ref string) ([]ImageHistory, error) {
	ctx = e.ns(ctx)
	d, err := e.Image(ctx, ref)
	if err != nil {
		return nil, err
	}
	sizes := e.layerSizes(ctx, d)
	var out []ImageHistory
	layer := 0
	for _, h := range d.Config.History {
		s := ImageHistory{ID: "<missing>", CreatedBy: h.CreatedBy, Comment: h.Comment}
		if h.Created != nil {
			s.Created = *h.Created
		}
		if !h.EmptyLayer && layer < len(sizes) {
			s.Size = sizes[layer]
			layer++
		}
		out = append(out, s)
	}
	for ; layer < len(sizes); layer++ { // layers that the history does not tell of
		out = append(out, ImageHistory{ID: "<missing>", Created: d.Created, Size: sizes[layer]})
	}
	slices.Reverse(out)
	if len(out) > 0 {
		out[0].ID = d.ID.String()
		for _, n := range d.Names {
			out[0].Tags = append(out[0].Tags, familiarName(n))
		}
	}
	return out, nil
}

// pruneImage removes an image that nobody uses, and with dangling one without a name. Both
// is looked at again: a name or a container may have come since the images were listed.
func (e *Engine) pruneImage(ctx context.Context, id string, dangling bool) ([]RemovedImage, error) {
	ctx = e.ns(ctx)
	img, busy, done, err := e.removingImage(ctx, id)
	if err != nil {
		return nil, err
	}
	defer done()
	users, err := e.imageUsers(ctx)
	if err != nil {
		return nil, err
	}
	if busy || len(users[img.ID.String()]) > 0 || dangling && len(img.Names) > 0 {
		return nil, conflictf("image %s came into use", shortImageID(id))
	}
	return e.deleteImage(ctx, img)
}

// layerSizes gives the unpacked size of each layer, bottom first.
func (e *Engine) layerSizes(ctx context.Context, d ImageDetail) []int64 {
	chains := identity.ChainIDs(slices.Clone(d.Config.RootFS.DiffIDs))
	sizes := make([]int64, len(chains))
	sn := e.opt.Snapshotters[e.opt.Snapshotter]
	if sn == nil {
		return sizes
	}
	for i, id := range chains {
		if u, err := sn.Usage(ctx, id.String()); err == nil {
			sizes[i] = u.Size
		}
	}
	return sizes
}

// PruneImages removes images that no container uses: those without a name, or with the
// filter dangling=false all.
func (e *Engine) PruneImages(ctx context.Context, f Filters) (removed []RemovedImage, reclaimed int64, err error) {
	if err := f.check("dangling", "label", "label!", "until"); err != nil {
		return nil, 0, err
	}
	dangling, asked, err := f.bool("dangling")
	if err != nil {
		return nil, 0, err
	}
	list := Filters{"label": f["label"], "label!": f["label!"]}
	if len(f["until"]) > 0 {
		list["until"] = f["until"]
	}
	if dangling || !asked {
		list["dangling"] = []string{"true"}
	}
	images, err := e.Images(ctx, list)
	if err != nil {
		return nil, 0, err
	}
	removed = []RemovedImage{}
	for _, img := range images {
		if img.Containers > 0 {
			continue
		}
		gone, err := e.pruneImage(ctx, img.ID.String(), dangling || !asked)
		if err != nil {
			if errors.Is(err, context.Canceled) {
				return removed, reclaimed, err
			}
			continue // in use by now
		}
		removed = append(removed, gone...)
		reclaimed += img.Size
	}
	e.emitFor("image", "prune", "", "reclaimed", fmt.Sprint(reclaimed))
	return removed, reclaimed, nil
}
