package cli

import (
	"fmt"
	"os"

	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func (a *app) commitCommand() *cobra.Command {
	var o client.ContainerCommitOptions
	pause := true
	cmd := &cobra.Command{Use: "commit [OPTIONS] CONTAINER [IMAGE]", Short: "Make an image of a container's changes", Args: needArgs(1, 2, "a container and at most one name"),
		Example: "  hako commit -m 'with tools' -c 'CMD [\"tool\"]' web web:tools",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if o.NoPause = !pause; len(args) > 1 {
				o.Reference = args[1]
			}
			res, err := c.ContainerCommit(cmd.Context(), args[0], o)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.Out, res.ID)
			return nil
		}}
	f := cmd.Flags()
	f.StringVarP(&o.Author, "author", "a", "", "who made it")
	f.StringVarP(&o.Comment, "message", "m", "", "what it is for")
	f.StringArrayVarP(&o.Changes, "change", "c", nil, "instruction of a Dockerfile that changes the image's configuration; may be repeated")
	f.BoolVarP(&pause, "pause", "p", true, "pause the container meanwhile")
	return cmd
}

func (a *app) importCommand() *cobra.Command {
	var o client.ImageImportOptions
	cmd := &cobra.Command{Use: "import [OPTIONS] FILE|- [IMAGE]", Short: "Make an image of an archive of files", Args: needArgs(1, 2, "a file, - for standard input, and at most one name"),
		Long:    "Make an image of one layer of an archive of files: a tar, plain or compressed with gzip, bzip2 or zstd.",
		Example: "  hako export web | hako import -c 'CMD [\"sh\"]' - web:flat",
		RunE: func(cmd *cobra.Command, args []string) error {
			in := a.In
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			} else if isTerminal(a.In) {
				return &exitError{exitGeneral, "no archive: name a file or use a pipe"}
			}
			ref := ""
			if len(args) > 1 {
				ref = args[1]
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			res, err := c.ImageImport(cmd.Context(), client.ImageImportSource{Source: in, SourceName: "-"}, ref, o)
			if err != nil {
				return err
			}
			defer res.Close()
			return showProgress(res, a.Out)
		}}
	f := cmd.Flags()
	f.StringVarP(&o.Message, "message", "m", "", "what it is for")
	f.StringArrayVarP(&o.Changes, "change", "c", nil, "instruction of a Dockerfile that sets the image's configuration; may be repeated")
	return cmd
}
