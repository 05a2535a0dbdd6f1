package cli

import (
	"context"
	"strings"
	"time"

	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

// completeLimit bounds how long a shell waits for the daemon's names, in silence.
const completeLimit = 2 * time.Second

// completeNames lets the shell complete arguments by what the usage line calls them: CONTAINER, IMAGE, NETWORK, VOLUME.
// Everything else are files.
func (a *app) completeNames(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		a.completeNames(c)
	}
	words := strings.Fields(strings.ReplaceAll(cmd.Use, "[OPTIONS] ", ""))[1:]
	if len(words) == 0 || cmd.ValidArgsFunction != nil || len(cmd.ValidArgs) > 0 {
		return
	}
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		last := words[len(words)-1]
		word := ""
		switch {
		case len(args) < len(words):
			word = words[len(args)]
		case strings.Contains(last, "..."):
			word = last
		}
		names, known := a.names(cmd.Context(), strings.Trim(word, "[]."))
		if !known {
			return nil, cobra.ShellCompDirectiveDefault
		}
		var fit []string
		for _, n := range names {
			if strings.HasPrefix(n, toComplete) {
				fit = append(fit, n)
			}
		}
		return fit, cobra.ShellCompDirectiveNoFileComp
	}
}

// names lists the daemon's objects of a kind. known tells that it is one of the daemon's; there may
// be no names because it does not answer.
func (a *app) names(ctx context.Context, kind string) (names []string, known bool) {
	switch kind {
	case "CONTAINER", "IMAGE", "NETWORK", "VOLUME":
	default:
		return nil, false
	}
	c, err := a.client()
	if err != nil {
		return nil, true
	}
	ctx, cancel := context.WithTimeout(ctx, completeLimit)
	defer cancel()
	switch kind {
	case "CONTAINER":
		res, err := c.ContainerList(ctx, client.ContainerListOptions{All: true})
		if err != nil {
			return nil, true
		}
		for _, o := range res.Items {
			for _, n := range o.Names {
				names = append(names, strings.TrimPrefix(n, "/"))
			}
		}
	case "IMAGE":
		res, err := c.ImageList(ctx, client.ImageListOptions{})
		if err != nil {
			return nil, true
		}
		for _, o := range res.Items {
			names = append(names, o.RepoTags...)
		}
	case "NETWORK":
		res, err := c.NetworkList(ctx, client.NetworkListOptions{})
		if err != nil {
			return nil, true
		}
		for _, o := range res.Items {
			names = append(names, o.Name)
		}
	case "VOLUME":
		res, err := c.VolumeList(ctx, client.VolumeListOptions{})
		if err != nil {
			return nil, true
		}
		for _, o := range res.Items {
			names = append(names, o.Name)
		}
	}
	return names, true
}
