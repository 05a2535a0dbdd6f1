package cli

import (
	"io"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// TestHelp: every command's help fits into a terminal of 80 columns, but for what is to be copied (usage and
// examples), and names no type of Go's.
func TestHelp(t *testing.T) {
	t.Parallel()
	a := &app{Streams: Streams{Out: io.Discard, Err: io.Discard}}
	var paths [][]string
	var walk func(*cobra.Command, []string)
	walk = func(c *cobra.Command, path []string) {
		paths = append(paths, path)
		for _, sub := range c.Commands() {
			if !sub.Hidden {
				walk(sub, append(path[:len(path):len(path)], sub.Name()))
			}
		}
	}
	walk(a.root(), nil)
	if len(paths) < 60 {
		t.Errorf("only %d commands were found", len(paths))
	}
	for _, path := range paths {
		code, out, errs := runCLI(t, append(path, "--help")...)
		name := strings.Join(path, " ")
		if code != 0 || errs != "" || !strings.Contains(out, "\nUsage:\n  hako") {
			t.Errorf("%s --help: exit %d, %q, %q", name, code, out, errs)
		}
		copied := false
		for line := range strings.Lines(out) {
			line = strings.TrimSuffix(line, "\n")
			if line != "" && line[0] != ' ' {
				copied = line == "Usage:" || line == "Examples:"
			}
			if n := utf8.RuneCountInString(line); n > 80 && !copied && strings.Contains(strings.TrimSpace(line), " ") {
				t.Errorf("%s --help: %d columns: %s", name, n, line)
			}
			if strings.Contains(line, "stringArray") || strings.Contains(line, "[]") && strings.Contains(line, "default") {
				t.Errorf("%s --help: %s", name, line)
			}
		}
	}
}

func TestReflow(t *testing.T) {
	t.Parallel()
	got := reflow("One two\nthree four.\n\n  name   a long explanation\n  short\n", 20)
	want := "One two three four.\n\n  name   a long\n         explanation\n  short"
	if got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
