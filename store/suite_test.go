package store

import (
	"context"
	"log/slog"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/testsuite"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
)

func TestContentSuite(t *testing.T) {
	init := func(ctx context.Context, root string) (context.Context, content.Store, func() error, error) {
		s, err := Open(root, Options{NoBackgroundGC: true, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return nil, nil, nil, err
		}
		n := 0
		wrap := func(ctx context.Context, shared bool) (context.Context, func(context.Context) error, error) {
			n++
			ctx = namespaces.WithNamespace(ctx, "suite"+string(rune('a'+n)))
			l, err := s.Leases().Create(ctx, leases.WithRandomID())
			if err != nil {
				return nil, nil, err
			}
			return leases.WithLease(ctx, l.ID), func(ctx context.Context) error { return s.Leases().Delete(ctx, l) }, nil
		}
		ctx = testsuite.SetContextWrapper(ctx, wrap)
		return namespaces.WithNamespace(ctx, "suite"), s.Content(), s.Close, nil
	}
	testsuite.ContentSuite(t, "hako", init)
	testsuite.ContentCrossNSSharedSuite(t, "hako", init)
}
