package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

// printable takes control characters out of text of strangers: a terminal would obey them.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || !unicode.IsPrint(r) && r != ' ' {
			return '?'
		}
		return r
	}, s)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

func sortedMap(m map[string]string) (out []string) {
	for _, k := range sortedKeys(m) {
		out = append(out, k+"="+m[k])
	}
	return out
}

func quoted(list []string) string {
	if len(list) == 0 {
		return ""
	}
	s, err := jsonString(list)
	if err != nil {
		return strings.Join(list, " ")
	}
	return s
}

func (a *app) imageConvertCommand() *cobra.Command {
	var platform []string
	var r CopyRequest
	var digestFile string
	var quiet bool
	var src, dst accessFlags
	cmd := &cobra.Command{Use: "convert [OPTIONS] --to FORM SOURCE DESTINATION", Short: "Copy an image with its layers compressed in another way", Args: needArgs(2, 2, "a source and a destination"),
		Long: `Copy an image with its layers in another form:
  gzip     understood everywhere
  zstd     smaller, and faster to unpack
  estargz  gzip that can be read before all of it is there (stargz snapshotter)
  erofs    a file system that the kernel mounts
  none     plain tar archives

The image gets other digests; signatures of the old one do not fit. A layer that has
the form already stays as it is.
` + references,
		Example: `  hako image convert --to zstd docker://registry.example.com/app:1 docker://registry.example.com/app:1-zstd
  hako image convert --to gzip --level 9 oci:./layout:1 oci:./small:1`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if !slices.Contains(compressions, r.Compression) {
				return usage("bad --to %q: expected gzip, zstd, estargz, erofs or none", r.Compression)
			}
			r.Source, r.Destination = args[0], args[1]
			if r.Platforms, err = parsePlatforms(platform); err != nil {
				return err
			}
			return a.copyImage(cmd.Context(), r, &src, &dst, digestFile, quiet)
		}}
	fs := cmd.Flags()
	fs.StringVar(&r.Compression, "to", "", "gzip, zstd, estargz, erofs or none")
	fs.IntVar(&r.Level, "level", 0, "of the compression: 1 to 9 of gzip, 1 to 22 of zstd (default: 6, and 3)")
	fs.StringArrayVar(&platform, "platform", nil, "only this one, OS/ARCH[/VARIANT]; may be repeated (default: all)")
	fs.StringVar(&r.Format, "format", "", "write the manifests as oci or docker (default: as they are, if the form allows it)")
	copyFlags(fs, &r, &digestFile, &quiet)
	src.register(fs, "src-", "source")
	dst.register(fs, "dest-", "destination")
	return cmd
}

func (a *app) imageSyncCommand() *cobra.Command {
	var r SyncRequest
	var quiet bool
	var format string
	var src, dst accessFlags
	cmd := &cobra.Command{Use: "sync [OPTIONS] FILE|docker://REPOSITORY[:TAG] [DESTINATION]", Short: "Bring repositories up to date, by a YAML file or one by name", Args: needArgs(1, 2, "a file, or a repository"),
		Long: `Copy the images that a YAML file lists, or all tags of one repository, to a registry or a
folder, and skip those that are up to date. A failure does not stop the others; the exit
code tells. The file is skopeo's, or says:

  destination: docker://mirror.example.com/hub   # or oci:/srv/mirror
  registries:
    docker.io:
      repositories:
        library/alpine: ["3.20", "sha256:..."]   # tags and digests
        library/nginx: {regex: '^1\.2[0-9]$'}    # of all tags
        library/redis: {semver: '>=7.0, <8'}     # versions
        library/busybox: {}                      # all tags
      platforms: [linux/amd64, linux/arm64]      # default: all
      referrers: true                            # with signatures
      tls-verify: false                          # and username, password, token

The second argument is the destination in place of the file's. A destination docker://HOST/PATH gets PATH/REPOSITORY; a folder oci:DIR a layout in
DIR/HOST/REPOSITORY.`,
		Example: "  hako image sync --dry-run mirror.yaml\n  hako image sync mirror.yaml docker://mirror.example.com\n  hako image sync --scoped docker://registry.example.com/team/app docker://mirror.example.com",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if len(args) == 2 {
				r.Destination = args[1]
			}
			if r.Access, err = dst.access(a); err != nil {
				return err
			}
			if format != "" && format != "json" {
				return usage(`bad --format %q: expected json`, format)
			}
			if r.Jobs < 1 || r.Jobs > 50 {
				return usage("bad --jobs %d: expected 1 to 50", r.Jobs)
			}
			in := a.In
			if strings.HasPrefix(args[0], "docker://") {
				if r.Source = args[0]; len(args) < 2 {
					return usage("where to? Name a destination: docker://HOST[/PATH] or oci:DIR")
				}
				if r.SourceAccess, err = src.access(a); err != nil {
					return err
				}
			} else if len(r.Platforms) > 0 || r.Referrers || cmd.Flags().Changed("src-creds") || cmd.Flags().Changed("src-tls-verify") {
				return usage("platforms, referrers and access to the source are in the file")
			} else if r.Name = args[0]; r.Name != "-" {
				f, err := os.Open(r.Name)
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			r.Config = in
			return a.syncImages(cmd.Context(), r, format, quiet)
		}}
	fs := cmd.Flags()
	fs.BoolVar(&r.DryRun, "dry-run", false, "only say what would be copied")
	fs.BoolVar(&r.Scoped, "scoped", false, "put the name of the source's registry into the path, too")
	fs.StringArrayVar(&r.Platforms, "platform", nil, "of a repository by name: only this one, OS/ARCH[/VARIANT]; may be repeated (default: all)")
	fs.BoolVar(&r.Referrers, "referrers", false, "of a repository by name: with signatures and other documents")
	fs.BoolP("all", "a", false, "all platforms: what is done without --platform, too")
	fs.Bool("keep-going", true, "go on when an image fails, which is always done")
	fs.IntVar(&r.Jobs, "jobs", 3, "images side by side")
	fs.StringVar(&format, "format", "", `"json": an object a line for each image`)
	fs.BoolVarP(&quiet, "quiet", "q", false, "only the report")
	src.register(fs, "src-", "source, of a repository by name")
	dst.register(fs, "dest-", "destination")
	return cmd
}

func (a *app) syncImages(ctx context.Context, r SyncRequest, format string, quiet bool) error {
	images, err := a.images()
	if err != nil {
		return err
	}
	if !quiet && isTerminal(a.Err) {
		r.Progress = newImageProgress(a.Err).event
	}
	r.Report = func(l SyncLine) {
		if format == "json" {
			if s, err := jsonString(l); err == nil {
				fmt.Fprintln(a.Out, s)
			}
			return
		}
		switch {
		case l.Error != "":
			fmt.Fprintf(a.Err, "hako: %s: %s\n", l.Source, printable(l.Error))
		case l.Destination == "":
			fmt.Fprintf(a.Out, "%s: %s\n", l.Source, l.Action)
		default:
			fmt.Fprintf(a.Out, "%s: %s to %s\n", l.Source, l.Action, l.Destination)
		}
	}
	rep, err := images.Sync(ctx, r)
	if err != nil {
		return err
	}
	if format == "" {
		if r.DryRun {
			fmt.Fprintf(a.Out, "%d to copy, %d up to date, %d failed\n", rep.WouldCopy, rep.UpToDate, rep.Failed)
		} else {
			fmt.Fprintf(a.Out, "%d copied, %d up to date, %d failed\n", rep.Copied, rep.UpToDate, rep.Failed)
		}
	}
	if rep.Failed > 0 {
		return &exitError{exitGeneral, fmt.Sprintf("%d images failed", rep.Failed)}
	}
	return nil
}

func (a *app) imageDiffCommand() *cobra.Command {
	var format, platform string
	var noFiles bool
	var src, dst accessFlags
	cmd := &cobra.Command{Use: "diff [OPTIONS] IMAGE IMAGE", Short: "Compare two images: configuration, layers, files", Args: needArgs(2, 2, "two images"),
		Long: `Compare two images: their configurations, their layers, and the files in them with their
sizes (A added, C changed, D deleted). Layers that both have are not read.
` + references,
		Example: "  hako image diff docker://alpine:3.19 docker://alpine:3.20\n  hako image diff --no-files app:1 oci:./build",
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := parsePlatform(platform)
			if err != nil {
				return err
			}
			sa, err := src.access(a)
			if err != nil {
				return err
			}
			da, err := dst.access(a)
			if err != nil {
				return err
			}
			images, err := a.images()
			if err != nil {
				return err
			}
			rep, err := images.Diff(cmd.Context(), args[0], args[1], sa, da, p, !noFiles)
			if err != nil {
				return err
			}
			if format != "" {
				return inspectPrint(a.Out, []any{rep}, format)
			}
			return a.printDiff(rep)
		}}
	fs := cmd.Flags()
	fs.StringVarP(&format, "format", "f", "", `"json" or a Go template`)
	fs.StringVar(&platform, "platform", "", "of images for several: OS/ARCH[/VARIANT] (default: this machine's)")
	fs.BoolVar(&noFiles, "no-files", false, "do not read layers to compare files")
	src.register(fs, "src-", "first image")
	dst.register(fs, "dest-", "second image")
	return cmd
}

// diffReport is what is shown of a comparison as text.
type diffReport struct {
	Same   bool
	Config []struct{ Key, Old, New string }
	Layers []struct {
		Change, Digest, CreatedBy string
		Size                      int64
	}
	Files []struct {
		Change, Path, Note string
		Old, New           int64
	}
	OldSize, NewSize, AddedBytes, RemovedBytes int64
	FilesRead                                  bool
}

func (a *app) printDiff(v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var r diffReport
	if err := json.Unmarshal(raw, &r); err != nil {
		return err
	}
	if r.Same {
		fmt.Fprintln(a.Out, "The images are the same.")
		return nil
	}
	colour := colours(a.Out)
	for _, c := range r.Config {
		if c.Old != "" {
			fmt.Fprintln(a.Out, paint(colour, "31", "- "+printable(c.Key+": "+c.Old)))
		}
		if c.New != "" {
			fmt.Fprintln(a.Out, paint(colour, "32", "+ "+printable(c.Key+": "+c.New)))
		}
	}
	var lines [][]string
	for _, l := range r.Layers {
		lines = append(lines, []string{l.Change, shortID(l.Digest), units.HumanSizeWithPrecision(float64(l.Size), 4), ellipsis(printable(l.CreatedBy), 60)})
	}
	if len(lines) > 0 {
		fmt.Fprintln(a.Out, "Layers:")
		io.WriteString(a.Out, layout(lines, width(a.Out)))
	}
	lines = nil
	for _, f := range r.Files {
		size := ""
		switch {
		case f.Change == "A":
			size = units.HumanSize(float64(f.New))
		case f.Change == "D":
			size = units.HumanSize(float64(f.Old))
		case f.Old != f.New:
			size = units.HumanSize(float64(f.Old)) + " → " + units.HumanSize(float64(f.New))
		}
		lines = append(lines, []string{f.Change + " " + printable(f.Path), size, f.Note})
	}
	if len(lines) > 0 {
		fmt.Fprintln(a.Out, "Files:")
		io.WriteString(a.Out, layout(lines, width(a.Out)))
	}
	fmt.Fprintf(a.Out, "Size: %s → %s compressed", units.HumanSizeWithPrecision(float64(r.OldSize), 4), units.HumanSizeWithPrecision(float64(r.NewSize), 4))
	if r.FilesRead {
		fmt.Fprintf(a.Out, "; files: +%s -%s", units.HumanSizeWithPrecision(float64(r.AddedBytes), 4), units.HumanSizeWithPrecision(float64(r.RemovedBytes), 4))
	}
	fmt.Fprintln(a.Out)
	return nil
}

func (a *app) imageMountCommand() *cobra.Command {
	return &cobra.Command{Use: "mount [OPTIONS] [IMAGE DIRECTORY]", Short: "Mount an image's files at a folder, read-only", Args: func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		return needArgs(2, 2, "an image and a folder, or nothing")(cmd, args)
	},
		Long: `Mount the files of one of the daemon's images at an empty folder, read-only, without set-user-ID
programs and devices. Without arguments, list what is mounted. It takes root, on the daemon's machine.`,
		Example: "  hako image mount alpine:3 /mnt\n  hako image mount\n  hako image unmount /mnt",
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := a.images()
			if err != nil {
				return err
			}
			if len(args) == 0 {
				list, err := images.Mounts(cmd.Context())
				if err != nil {
					return err
				}
				lines := [][]string{{"IMAGE", "DIRECTORY"}}
				for _, m := range list {
					lines = append(lines, []string{m.Image, m.Dir})
				}
				_, err = io.WriteString(a.Out, layout(lines, width(a.Out)))
				return err
			}
			dir, err := filepath.Abs(args[1])
			if err != nil {
				return err
			}
			if err := images.Mount(cmd.Context(), args[0], dir); err != nil {
				return err
			}
			fmt.Fprintln(a.Out, dir)
			return nil
		}}
}

func (a *app) imageUnmountCommand() *cobra.Command {
	return &cobra.Command{Use: "unmount [OPTIONS] DIRECTORY...", Aliases: []string{"umount"}, Short: "Unmount images", Args: needNames("a folder"),
		Long: "Unmount images that 'hako image mount' has mounted. Other mounts are left alone.",
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := a.images()
			if err != nil {
				return err
			}
			return a.each(args, func(name string) error {
				dir, err := filepath.Abs(name)
				if err != nil {
					return err
				}
				return images.Unmount(cmd.Context(), dir)
			})
		}}
}
