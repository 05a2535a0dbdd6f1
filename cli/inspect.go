package cli

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

// containerInspectCommand is the long form, 'hako container inspect', which looks among containers only.
func (a *app) containerInspectCommand() *cobra.Command {
	var format string
	var size bool
	cmd := &cobra.Command{Use: "inspect [OPTIONS] CONTAINER...", Short: "Show everything about containers", Args: needNames("a container"),
		Example: "  hako container inspect -f '{{.State.Status}} {{.State.ExitCode}}' web",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.inspectAll(args, format, func(c *client.Client, name string) (any, error) {
				return inspectAny(cmd.Context(), c, name, "container", size)
			})
		}}
	cmd.Flags().StringVarP(&format, "format", "f", "", `"json" or a Go template`)
	cmd.Flags().BoolVarP(&size, "size", "s", false, "with the sizes of containers")
	return cmd
}

func (a *app) inspectCommand() *cobra.Command {
	var format, kind string
	var size bool
	cmd := &cobra.Command{Use: "inspect [OPTIONS] NAME...", Short: "Show everything about containers, images, networks or volumes", Args: needNames("a name or id"),
		Example: "  hako inspect web\n  hako inspect -f '{{.State.Status}} {{.State.ExitCode}}' web",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.inspectAll(args, format, func(c *client.Client, name string) (any, error) {
				return inspectAny(cmd.Context(), c, name, kind, size)
			})
		}}
	cmd.Flags().StringVarP(&format, "format", "f", "", `"json" or a Go template`)
	cmd.Flags().StringVar(&kind, "type", "", "only look among these: container, image, network or volume")
	cmd.Flags().BoolVarP(&size, "size", "s", false, "with the sizes of containers")
	return cmd
}

// inspectAny looks a name up among all kinds of objects, in docker's order.
func inspectAny(ctx context.Context, c *client.Client, name, kind string, size bool) (any, error) {
	lookups := []struct {
		kind string
		get  func() (any, error)
	}{
		{"container", func() (any, error) {
			res, err := c.ContainerInspect(ctx, name, client.ContainerInspectOptions{Size: size})
			return res.Container, err
		}},
		{"image", func() (any, error) {
			res, err := c.ImageInspect(ctx, name)
			return res.InspectResponse, err
		}},
		{"network", func() (any, error) {
			res, err := c.NetworkInspect(ctx, name, client.NetworkInspectOptions{})
			return res.Network, err
		}},
		{"volume", func() (any, error) {
			res, err := c.VolumeInspect(ctx, name, client.VolumeInspectOptions{})
			return res.Volume, err
		}},
	}
	known := kind == ""
	for _, l := range lookups {
		if kind != "" && l.kind != kind {
			continue
		}
		known = true
		o, err := l.get()
		if err == nil {
			return o, nil
		}
		if !errdefs.IsNotFound(err) || kind != "" {
			return nil, err
		}
	}
	if !known {
		return nil, usage("bad --type %q: expected container, image, network or volume", kind)
	}
	return nil, fmt.Errorf("no such object: %s", name)
}
