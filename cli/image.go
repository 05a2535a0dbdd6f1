package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func (a *app) imageCommands() []*cobra.Command {
	return []*cobra.Command{
		a.imagesCommand(), a.pullCommand(), a.pushCommand(), a.tagCommand(), a.rmiCommand(),
		a.saveCommand(), a.loadCommand(), a.importCommand(), a.historyCommand(),
	}
}

var imagesList = list{
	table:   `{{.Repository}}\t{{.Tag}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}`,
	headers: map[string]string{"Repository": "REPOSITORY", "Tag": "TAG", "ID": "IMAGE ID", "CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "Size": "SIZE", "Digest": "DIGEST", "Containers": "CONTAINERS"},
	quiet:   "ID",
}

// imageRow is one name of one image.
type imageRow struct {
	s                 image.Summary
	repo, tag, digest string
	trunc             bool
}

func (r imageRow) ID() string {
	if r.trunc {
		return shortID(r.s.ID)
	}
	return r.s.ID
}
func (r imageRow) Repository() string   { return r.repo }
func (r imageRow) Tag() string          { return r.tag }
func (r imageRow) Digest() string       { return r.digest }
func (r imageRow) CreatedSince() string { return ago(time.Unix(r.s.Created, 0)) }
func (r imageRow) CreatedAt() string    { return time.Unix(r.s.Created, 0).String() }
func (r imageRow) Size() string         { return units.HumanSizeWithPrecision(float64(r.s.Size), 3) }
func (r imageRow) Containers() string {
	if r.s.Containers < 0 {
		return "N/A"
	}
	return strconv.FormatInt(r.s.Containers, 10)
}

const none = "<none>"

// imageRows gives a row for each name; an image without any still has one.
func imageRows(items []image.Summary, trunc bool) []any {
	slices.SortStableFunc(items, func(a, b image.Summary) int { return int(b.Created - a.Created) })
	var rows []any
	for _, s := range items {
		digests := map[string]string{}
		for _, d := range s.RepoDigests {
			repo, dig, _ := strings.Cut(d, "@")
			digests[repo] = dig
		}
		n := 0
		for _, t := range s.RepoTags {
			if t == none+":"+none {
				continue
			}
			repo, tag, _ := cutLast(t, ":")
			dig := digests[repo]
			if dig == "" {
				dig = none
			}
			rows = append(rows, imageRow{s, repo, tag, dig, trunc})
			n++
		}
		if n > 0 {
			continue
		}
		row := imageRow{s, none, none, none, trunc}
		for repo, dig := range digests {
			row.repo, row.digest = repo, dig
		}
		rows = append(rows, row)
	}
	return rows
}

func (a *app) imagesCommand() *cobra.Command {
	var o client.ImageListOptions
	var quiet, noTrunc, digests bool
	var format string
	cmd := &cobra.Command{Use: "images [OPTIONS] [REPOSITORY[:TAG]]", Short: "List images", Args: cobra.MaximumNArgs(1)}
	fs := cmd.Flags()
	fs.BoolVarP(&o.All, "all", "a", false, "also intermediate images")
	fs.BoolVarP(&quiet, "quiet", "q", false, "only ids")
	fs.BoolVar(&noTrunc, "no-trunc", false, "do not shorten ids")
	fs.BoolVar(&digests, "digests", false, "show digests")
	fs.StringVar(&format, "format", "", formatHelp)
	filter := filterFlag(fs, "images")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, f, err := a.filtered(*filter)
		if err != nil {
			return err
		}
		o.Filters = f
		if len(args) == 1 {
			o.Filters.Add("reference", args[0])
		}
		res, err := c.ImageList(cmd.Context(), o)
		if err != nil {
			return err
		}
		l := imagesList
		if digests {
			l.table = `{{.Repository}}\t{{.Tag}}\t{{.Digest}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}`
		}
		l.whole = noTrunc
		return l.print(a.Out, imageRows(res.Items, !noTrunc), format, quiet)
	}
	return cmd
}

// repository gives the part of a reference that credentials belong to.
func registryOf(ref string) string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ""
	}
	return reference.Domain(named)
}

// pull fetches an image and shows progress on w; a nil w shows nothing.
func (a *app) pull(ctx context.Context, ref, platform string, w io.Writer) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	auth, err := registryAuth(registryOf(ref))
	if err != nil {
		return err
	}
	o := client.ImagePullOptions{RegistryAuth: auth}
	p, err := parsePlatform(platform)
	if err != nil {
		return err
	}
	if p != nil {
		o.Platforms = []ocispec.Platform{*p}
	}
	res, err := c.ImagePull(ctx, ref, o)
	if err != nil {
		return err
	}
	defer res.Close()
	return showProgress(res, w)
}

func (a *app) pullCommand() *cobra.Command {
	var quiet bool
	var platform string
	cmd := &cobra.Command{Use: "pull [OPTIONS] IMAGE", Short: "Fetch an image from a registry", Args: needArgs(1, 1, "one image"),
		Example: "  hako pull alpine:3\n  hako pull --platform linux/arm64 registry.example.com/app@sha256:...",
		RunE: func(cmd *cobra.Command, args []string) error {
			named, err := reference.ParseNormalizedNamed(args[0])
			if err != nil {
				return &exitError{exitGeneral, fmt.Sprintf("bad image reference %q: %s", args[0], err)}
			}
			if reference.IsNameOnly(named) && !quiet {
				fmt.Fprintln(a.Out, "Using default tag: latest")
			}
			var w io.Writer = a.Out
			if quiet {
				w = nil
			}
			if err := a.pull(cmd.Context(), args[0], platform, w); err != nil {
				return err
			}
			fmt.Fprintln(a.Out, reference.TagNameOnly(named).String())
			return nil
		}}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only the image's name at the end")
	cmd.Flags().StringVar(&platform, "platform", "", "platform of the image: OS/ARCH[/VARIANT]")
	return cmd
}

func (a *app) pushCommand() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{Use: "push [OPTIONS] IMAGE", Short: "Send an image to a registry", Args: needArgs(1, 1, "one image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			auth, err := registryAuth(registryOf(args[0]))
			if err != nil {
				return err
			}
			res, err := c.ImagePush(cmd.Context(), args[0], client.ImagePushOptions{RegistryAuth: auth})
			if err != nil {
				return err
			}
			defer res.Close()
			var w io.Writer = a.Out
			if quiet {
				w = nil
			}
			return showProgress(res, w)
		}}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

func (a *app) tagCommand() *cobra.Command {
	return &cobra.Command{Use: "tag SOURCE TARGET", Short: "Give an image a further name", Args: needArgs(2, 2, "an image and a name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			_, err = c.ImageTag(cmd.Context(), client.ImageTagOptions{Source: args[0], Target: args[1]})
			return err
		}}
}

func (a *app) rmiCommand() *cobra.Command {
	var o client.ImageRemoveOptions
	var noPrune bool
	cmd := &cobra.Command{Use: "rmi [OPTIONS] IMAGE...", Short: "Remove images", Args: needNames("an image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			o.PruneChildren = !noPrune
			var failed []string
			for _, name := range args {
				res, err := c.ImageRemove(cmd.Context(), name, o)
				if err != nil {
					failed = append(failed, a.explain(err))
					continue
				}
				for _, d := range res.Items {
					if d.Untagged != "" {
						fmt.Fprintln(a.Out, "Untagged: "+d.Untagged)
					}
					if d.Deleted != "" {
						fmt.Fprintln(a.Out, "Deleted: "+d.Deleted)
					}
				}
			}
			if len(failed) > 0 {
				return &exitError{exitGeneral, strings.Join(failed, "\nhako: ")}
			}
			return nil
		}}
	cmd.Flags().BoolVarP(&o.Force, "force", "f", false, "remove it even if a stopped container uses it")
	cmd.Flags().BoolVar(&noPrune, "no-prune", false, "keep untagged parents")
	return cmd
}

func (a *app) saveCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{Use: "save [OPTIONS] IMAGE...", Short: "Write images to an archive", Args: needNames("an image"),
		Example: "  hako save -o app.tar app:1 app:2\n  hako save app:1 | zstd > app.tar.zst",
		RunE: func(cmd *cobra.Command, args []string) error {
			if output == "" && isTerminal(a.Out) {
				return &exitError{exitGeneral, "an archive is not for a terminal: use -o FILE or a pipe"}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			res, err := c.ImageSave(cmd.Context(), args)
			if err != nil {
				return err
			}
			defer res.Close()
			return a.writeOutput(output, res)
		}}
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write (default: standard output)")
	return cmd
}

// writeOutput copies r into a file, which appears only when it is whole, or to standard output.
func (a *app) writeOutput(path string, r io.Reader) (err error) {
	if path == "" || path == "-" {
		_, err = io.Copy(a.Out, r)
		return err
	}
	tmp := path + ".partial"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(tmp)
		}
	}()
	if _, err = io.Copy(f, r); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err = f.Close(); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(tmp, path)
}

func (a *app) loadCommand() *cobra.Command {
	var input string
	var quiet, demo bool
	cmd := &cobra.Command{Use: "load [OPTIONS]", Short: "Load images from an archive", Args: cobra.NoArgs,
		Long:    "Load images from an archive in Docker's or OCI's form, plain or compressed.",
		Example: "  hako load -i app.tar\n  curl -L https://example.com/app.tar.gz | hako load",
		RunE: func(cmd *cobra.Command, args []string) error {
			in := a.In
			if demo {
				if a.Demo == nil {
					return &exitError{exitGeneral, "this build carries no demo image: build it with 'make'"}
				}
				var err error
				if in, err = a.Demo(); err != nil {
					return err
				}
			} else if input != "" {
				f, err := os.Open(input)
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			} else if isTerminal(a.In) {
				return &exitError{exitGeneral, "no archive: use -i FILE or a pipe"}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			res, err := c.ImageLoad(cmd.Context(), in, client.ImageLoadWithQuiet(quiet || !isTerminal(a.Out)))
			if err != nil {
				return err
			}
			defer res.Close()
			return showProgress(res, a.Out)
		}}
	cmd.Flags().StringVarP(&input, "input", "i", "", "file to read (default: standard input)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	cmd.Flags().BoolVar(&demo, "demo", false, "load the small demo image hako/demo that this program carries")
	cmd.MarkFlagsMutuallyExclusive("input", "demo")
	return cmd
}

var historyList = list{
	table:   `{{.ID}}\t{{.CreatedSince}}\t{{.CreatedBy}}\t{{.Size}}\t{{.Comment}}`,
	headers: map[string]string{"ID": "IMAGE", "CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "CreatedBy": "CREATED BY", "Size": "SIZE", "Comment": "COMMENT"},
	quiet:   "ID",
}

type historyRow struct {
	h     image.HistoryResponseItem
	trunc bool
}

func (r historyRow) ID() string {
	if r.trunc && r.h.ID != "<missing>" {
		return shortID(r.h.ID)
	}
	return r.h.ID
}
func (r historyRow) CreatedSince() string { return ago(time.Unix(r.h.Created, 0)) }
func (r historyRow) CreatedAt() string    { return time.Unix(r.h.Created, 0).Format(time.RFC3339) }
func (r historyRow) CreatedBy() string {
	s := strings.ReplaceAll(r.h.CreatedBy, "\t", " ")
	if r.trunc {
		return ellipsis(s, 45)
	}
	return s
}
func (r historyRow) Size() string    { return units.HumanSizeWithPrecision(float64(r.h.Size), 3) }
func (r historyRow) Comment() string { return r.h.Comment }

func (a *app) historyCommand() *cobra.Command {
	var quiet, noTrunc bool
	var format string
	cmd := &cobra.Command{Use: "history [OPTIONS] IMAGE", Short: "Show how an image was built", Args: needArgs(1, 1, "one image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			res, err := c.ImageHistory(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			rows := make([]any, len(res.Items))
			for i, h := range res.Items {
				rows[i] = historyRow{h, !noTrunc}
			}
			l := historyList
			l.whole = noTrunc
			return l.print(a.Out, rows, format, quiet)
		}}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "only ids")
	cmd.Flags().BoolVar(&noTrunc, "no-trunc", false, "do not shorten")
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	return cmd
}

func (a *app) imagePruneCommand() *cobra.Command {
	var all, force bool
	cmd := &cobra.Command{Use: "prune [OPTIONS]", Short: "Remove images that are not in use", Args: cobra.NoArgs}
	filter := cmd.Flags().StringArray("filter", nil, "only images that match KEY=VALUE")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "all images without a container, not only untagged ones")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		what := "This removes all untagged images."
		if all {
			what = "This removes all images without a container."
		}
		if !force && !a.confirm(what) {
			return nil
		}
		return a.reclaimed(a.pruneImages(cmd.Context(), *filter, all))
	}
	return cmd
}

func (a *app) pruneImages(ctx context.Context, filter []string, all bool) (bytes uint64, err error) {
	c, f, err := a.filtered(filter)
	if err != nil {
		return 0, err
	}
	f.Add("dangling", strconv.FormatBool(!all))
	res, err := c.ImagePrune(ctx, client.ImagePruneOptions{Filters: f})
	if err != nil {
		return 0, err
	}
	var names []string
	for _, d := range res.Report.ImagesDeleted {
		if d.Untagged != "" {
			names = append(names, "untagged: "+d.Untagged)
		} else {
			names = append(names, "deleted: "+d.Deleted)
		}
	}
	a.pruned("Deleted images", names)
	return res.Report.SpaceReclaimed, nil
}

// showProgress renders a stream of progress messages: bars that are redrawn on a
// terminal, one line per change of state elsewhere.
func showProgress(r io.Reader, w io.Writer) error {
	dec := json.NewDecoder(r)
	p := progress{w: w, tty: w != nil && isTerminal(w), colour: w != nil && colours(w), lines: map[string]int{}, last: map[string]string{}}
	for {
		var m jsonstream.Message
		if err := dec.Decode(&m); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read progress: %w", err)
		}
		if m.Error != nil {
			return errors.New(m.Error.Message)
		}
		if w != nil {
			p.show(m)
		}
	}
}

type progress struct {
	w      io.Writer
	tty    bool
	colour bool
	lines  map[string]int // id → line from the top
	count  int            // lines drawn
	last   map[string]string
}

func (p *progress) show(m jsonstream.Message) {
	switch {
	case m.Stream != "":
		fmt.Fprint(p.w, m.Stream)
	case m.ID == "":
		if m.Status != "" {
			fmt.Fprintln(p.w, m.Status)
			p.lines, p.count = map[string]int{}, 0
		}
	case !p.tty:
		if p.last[m.ID] != m.Status {
			p.last[m.ID] = m.Status
			fmt.Fprintf(p.w, "%s: %s\n", m.ID, m.Status)
		}
	default:
		line, known := p.lines[m.ID]
		if !known {
			line = p.count
			p.lines[m.ID] = line
			p.count++
			fmt.Fprintln(p.w)
		}
		up := p.count - line
		fmt.Fprintf(p.w, "\x1b[%dA\r\x1b[K%s: %s\x1b[%dB\r", up, m.ID, p.text(m), up)
	}
}

func (p *progress) text(m jsonstream.Message) string {
	if m.Progress == nil || m.Progress.Current == 0 && m.Progress.Total == 0 {
		if strings.HasSuffix(m.Status, "complete") || strings.HasSuffix(m.Status, "exists") {
			return paint(p.colour, "32", m.Status)
		}
		return m.Status
	}
	cur := units.HumanSizeWithPrecision(float64(m.Progress.Current), 3)
	if m.Progress.Total <= 0 {
		return fmt.Sprintf("%-12s %s", m.Status, cur)
	}
	total := units.HumanSizeWithPrecision(float64(m.Progress.Total), 3)
	const bar = 30
	cols := width(p.w)
	if cols > 0 && cols < bar+50 {
		return fmt.Sprintf("%-12s %s/%s", m.Status, cur, total)
	}
	n := int(min(m.Progress.Current, m.Progress.Total) * bar / m.Progress.Total)
	return fmt.Sprintf("%-12s %s%s %s/%s", m.Status, paint(p.colour, "36", strings.Repeat("━", n)), paint(p.colour, "2", strings.Repeat("─", bar-n)), cur, total)
}
