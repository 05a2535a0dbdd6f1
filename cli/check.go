package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

// exitNotChecked is for a check that could not be made.
const exitNotChecked = 3

// checkFinding is one of a check's findings: docs/check.md.
type checkFinding struct {
	Room      string `json:"room"`
	Problem   string `json:"problem"`
	Severity  string `json:"severity"`
	Namespace string `json:"namespace,omitempty"`
	Object    string `json:"object"`
	Detail    string `json:"detail"`
	Repaired  string `json:"repaired,omitempty"`
	Failed    string `json:"failed,omitempty"`
}

const noteSeverity = "note"

// checkReport is the end of the daemon's answer.
type checkReport struct {
	Findings  []checkFinding `json:"findings"`
	Collected int64          `json:"collected,omitempty"`
	Deep      bool           `json:"deep"`
	Took      int64          `json:"took"` // nanoseconds
}

func (a *app) checkCommand() *cobra.Command {
	var deep, repair bool
	var format string
	cmd := &cobra.Command{Use: "check [OPTIONS]", Short: "Check the store: that everything is there and whole", Args: cobra.NoArgs,
		Long: `Check records, blobs, snapshots, containers, volumes and networks: that every reference leads to
something, and that nothing lies around which nothing needs. It runs beside all other work.

--repair fetches again what is missing from the registry that it came from, unpacks again what can be
unpacked, and drops what is beyond help; it says what it did. What a running container
needs stays.

If the daemon does not run, 'hakod check' does the same.

Exit status: 0 clean, or repaired; 1 there are problems; 3 the check could not be made.`,
		Example: "  hako system check --deep\n  hako system check --repair --format json"}
	fs := cmd.Flags()
	fs.BoolVar(&deep, "deep", false, "read and hash all that is there")
	fs.BoolVar(&repair, "repair", false, "mend what is found")
	fs.StringVar(&format, "format", "", `"json": the report as one object (default: a finding a line)`)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if format != "" && format != "json" {
			return usage("bad format %q: expected json", format)
		}
		r, err := a.check(cmd.Context(), deep, repair)
		if err != nil {
			msg := a.explain(err)
			if isUnreachable(err) {
				msg += "\n'hakod check' checks a root whose daemon does not run"
			}
			return &exitError{exitNotChecked, msg}
		}
		left := 0
		for _, f := range r.Findings {
			if f.Severity != noteSeverity && f.Repaired == "" {
				left++
			}
		}
		if format == "json" {
			b, err := json.MarshalIndent(r, "", "  ")
			if err != nil {
				return err
			}
			fmt.Fprintf(a.Out, "%s\n", b)
		} else {
			a.printReport(r, left)
		}
		if left > 0 {
			return &exitError{code: exitGeneral}
		}
		return nil
	}
	return cmd
}

// errUnreachable marks that no daemon answered.
var errUnreachable = errors.New("no daemon")

func isUnreachable(err error) bool { return errors.Is(err, errUnreachable) }

// check asks the daemon. The request is not in Docker's API, nor in its client.
func (a *app) check(ctx context.Context, deep, repair bool) (r checkReport, err error) {
	c, err := a.client()
	if err != nil {
		return r, err
	}
	hc := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return c.Dialer()(ctx) }, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("http://hako/hako/v1/check?deep=%t&repair=%t", deep, repair), nil)
	if err != nil {
		return r, err
	}
	resp, err := hc.Do(req)
	if err != nil {
		return r, fmt.Errorf("cannot reach the daemon at %s: %w (%w)", a.address(), errUnreachable, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var e struct{ Message string }
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		if json.Unmarshal(body, &e) != nil || e.Message == "" {
			e.Message = strings.TrimSpace(string(body))
		}
		return r, fmt.Errorf("the daemon answers: %s (%s)", e.Message, resp.Status)
	}
	for dec := json.NewDecoder(resp.Body); ; {
		var line struct {
			Progress *struct {
				What        string
				Done, Total int64
			}
			Report *checkReport
			Error  string
		}
		if err := dec.Decode(&line); err != nil {
			return r, fmt.Errorf("the daemon's answer breaks off: %w", err)
		}
		switch {
		case line.Error != "":
			return r, errors.New(line.Error)
		case line.Report != nil:
			a.status("")
			return *line.Report, nil
		case line.Progress != nil:
			p := line.Progress
			text := fmt.Sprintf("%s: %d of %d", p.What, p.Done, p.Total)
			if strings.Contains(p.What, "hashing") {
				text = fmt.Sprintf("%s: %s of %s", p.What, units.HumanSize(float64(p.Done)), units.HumanSize(float64(p.Total)))
			}
			a.status(text)
		}
	}
}

// status shows a line that the next one replaces, if somebody sees it.
func (a *app) status(text string) {
	if isTerminal(a.Err) {
		fmt.Fprintf(a.Err, "\r\x1b[K%s", text)
	}
}

func (a *app) printReport(r checkReport, left int) {
	for _, f := range r.Findings {
		where := f.Room
		if f.Namespace != "" {
			where += ", " + f.Namespace
		}
		fmt.Fprintf(a.Out, "%-8s  %s  %s (%s)\n          %s\n", f.Severity, f.Problem, f.Object, where, f.Detail)
		switch {
		case f.Repaired != "":
			fmt.Fprintf(a.Out, "          repaired: %s\n", f.Repaired)
		case f.Failed != "":
			fmt.Fprintf(a.Out, "          not repaired: %s\n", f.Failed)
		}
	}
	if left == 0 {
		fmt.Fprintln(a.Out, "clean")
		return
	}
	word := "problems"
	if left == 1 {
		word = "problem"
	}
	fmt.Fprintf(a.Out, "%d %s\n", left, word)
}
