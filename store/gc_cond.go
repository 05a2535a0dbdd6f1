package store

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

const (
	// labelCondSnapshot and the name of a snapshotter: "CONDITION[,CONDITION...]|KEY" refers to the
	// snapshot KEY while one of the conditions holds for it.
	labelCondSnapshot = "containerd.io/gc.cond.snapshot."
	// labelUsedAt is when the object that has it was used, in RFC 3339.
	labelUsedAt = "containerd.io/gc.cond.value-usedat"
)

// condRefs are the references of conditional labels whose conditions hold at a moment.
func condRefs(tx *bolt.Tx, collectors map[string]Collector, ns string, labels map[string]string, at time.Time) (refs []Node) {
	for k, v := range labels {
		name, ok := strings.CutPrefix(k, labelCondSnapshot)
		if !ok {
			continue
		}
		name, _, _ = strings.Cut(name, "/")
		conditions, key, ok := strings.Cut(v, "|")
		c := collectors[resourceSnapshots+name]
		if !ok || key == "" || c == nil {
			continue
		}
		o, err := c.Node(tx, ns, key)
		if err != nil {
			continue
		}
		for cond := range strings.SplitSeq(conditions, ",") {
			if holds(cond, o.Labels, at) {
				refs = append(refs, o.Node)
				break
			}
		}
	}
	return refs
}

// holds tells whether a condition is true of an object: "usedat<2h" that it was used less than two
// hours ago. What cannot be read is not true.
func holds(condition string, labels map[string]string, at time.Time) bool {
	i := strings.IndexAny(condition, "!<>=")
	if i < 0 || condition[:i] != "usedat" {
		return false
	}
	op, value := condition[i:i+1], condition[i+1:]
	if rest, ok := strings.CutPrefix(value, "="); ok && op != "=" {
		op, value = op+"=", rest
	}
	limit, err := time.ParseDuration(value)
	if err != nil {
		return false
	}
	used, err := time.Parse(time.RFC3339, labels[labelUsedAt])
	if err != nil {
		return false
	}
	switch age := at.Sub(used); op {
	case "<":
		return age < limit
	case "<=":
		return age <= limit
	case ">":
		return age > limit
	case ">=":
		return age >= limit
	case "=":
		return age.Truncate(time.Second) == limit.Truncate(time.Second)
	case "!=":
		return age.Truncate(time.Second) != limit.Truncate(time.Second)
	}
	return false
}

// unexpired tells whether labels keep an object until a moment that has not come.
func unexpired(labels map[string]string, at time.Time) bool {
	t, err := time.Parse(time.RFC3339, labels[labelExpire])
	return err == nil && t.After(at)
}

// BackRefs are the objects of a namespace which, by their labels gc.bref.*, keep the one that has these.
func BackRefs(ns string, labels map[string]string) []Node { return backRefs(ns, labels) }

// Exists tells whether there is an object: a blob, an image, a container or a snapshot.
func (s *Store) Exists(ctx context.Context, n Node) (found bool, err error) {
	_, collectors := s.gc.rooms()
	err = s.db.View(ctx, func(tx *bolt.Tx) error {
		var err error
		switch n.Type {
		case resourceContent:
			_, err = readBlob(tx, n.Namespace, digest.Digest(n.ID))
		case resourceImages:
			_, err = readRecord[imageRecord](NamespaceBucket(tx, n.Namespace, sectionImages), n.ID)
		case resourceContainers:
			_, err = readRecord[containerRecord](NamespaceBucket(tx, n.Namespace, sectionContainers), n.ID)
		default:
			c := collectors[n.Type]
			if c == nil {
				return fmt.Errorf("objects of the type %q: %w", n.Type, errdefs.ErrNotImplemented)
			}
			_, err = c.Node(tx, n.Namespace, n.ID)
		}
		found = !errdefs.IsNotFound(err) // a damaged one is there, too
		return nil
	})
	return found, err
}

// AfterGC has fn called after each collection, for what others keep by references.
func (s *Store) AfterGC(fn func(context.Context)) {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	s.gc.after = append(s.gc.after, fn)
}

func (c *collector) finish(ctx context.Context) {
	c.mu.Lock()
	after := c.after
	c.mu.Unlock()
	for _, fn := range after {
		fn(ctx)
	}
}
