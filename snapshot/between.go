package snapshot

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/hako-engine/hako/internal/safepath"
)

// Between gives what a file system has other than another one, in the order of paths, and
// the root at which what was added or modified can be read. Both are given as mounts, of any
// snapshotter whose mounts MountDetached knows; no lower mounts are an empty directory. Where the
// upper one is an overlay upon just the lower one, only its own layer is looked at, so that
// it may be in use, and it is fast. The caller closes the root.
func Between(ctx context.Context, lower, upper []mount.Mount) (_ []Change, _ *safepath.Root, err error) {
	d := differ{ctx: ctx}
	defer func() {
		for _, r := range d.lower {
			r.Close()
		}
		if err != nil && d.upper != nil {
			err = errors.Join(err, d.upper.Close())
		}
	}()
	if own, below, ok := ownLayer(lower, upper); ok {
		if d.upper, err = safepath.OpenRoot(own); err != nil {
			return nil, nil, wrap(err, "compare file systems")
		}
		for _, dir := range below {
			r, err := safepath.OpenRoot(dir)
			if err != nil {
				return nil, nil, wrap(err, "compare file systems")
			}
			d.lower = append(d.lower, r)
		}
	} else {
		d.whole = true
		f, err := MountAny(upper)
		if err != nil {
			return nil, nil, wrap(err, "compare file systems")
		}
		d.upper = safepath.NewRoot(f)
		if len(lower) > 0 {
			f, err := MountAny(lower)
			if err != nil {
				return nil, nil, wrap(err, "compare file systems")
			}
			d.lower = append(d.lower, safepath.NewRoot(f))
		}
	}
	if err := d.dir("/", folder{reported: true, fresh: len(d.lower) == 0}); err != nil {
		return nil, nil, wrap(err, "compare file systems")
	}
	slices.SortFunc(d.list, func(a, b Change) int { return strings.Compare(a.Path, b.Path) })
	return d.list, d.upper, nil
}

// ownLayer gives the directory of the upper file system's own layer and those of the layers
// below, if these are the lower file system.
func ownLayer(lower, upper []mount.Mount) (own string, below []string, ok bool) {
	if len(upper) != 1 || upper[0].Type != "overlay" || len(lower) != 1 {
		return "", nil, false
	}
	o, err := parseOverlay(upper[0].Options)
	if err != nil || o.upper == "" {
		return "", nil, false
	}
	switch m := lower[0]; m.Type {
	case "bind":
		below = []string{m.Source}
	case "overlay":
		l, err := parseOverlay(m.Options)
		if err != nil || l.upper != "" {
			return "", nil, false
		}
		below = l.lower
	}
	return o.upper, below, slices.Equal(below, o.lower) || sameLayers(below, o.lower)
}

// sameLayers tells whether one is a merged image of the other: the topmost layer says which they all are.
func sameLayers(a, b []string) bool {
	if len(a) == 0 || len(b) == 0 {
		return false
	}
	top, merged := strings.CutSuffix(a[0], mergedSuffix)
	other, otherMerged := strings.CutSuffix(b[0], mergedSuffix)
	return top == other && (merged && len(a) == 1) != (otherMerged && len(b) == 1)
}
