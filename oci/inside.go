//go:build linux && (amd64 || arm64)

package oci

import (
	"context"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func (c *Container) hookInside(ctx context.Context, kind string, i int, h specs.Hook, st specs.State) error {
	return runHook(ctx, kind, i, h, st, nil)
}
