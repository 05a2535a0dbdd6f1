package cli

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// setHelp shapes what --help prints: as wide as the terminal, and one line of usage where cobra
// has a second one for commands that hold others.
func (a *app) setHelp(root *cobra.Command) {
	w := helpWidth(a.Out)
	root.SetUsageTemplate(strings.NewReplacer(
		"{{if .Runnable}}\n  {{.UseLine}}{{end}}{{if .HasAvailableSubCommands}}\n  {{.CommandPath}} [command]{{end}}", "\n  {{.UseLine}}",
		".FlagUsages ", fmt.Sprintf(".FlagUsagesWrapped %d ", w),
		"[command] --help", "COMMAND --help",
	).Replace(root.UsageTemplate()))
	help := root.HelpFunc()
	root.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		if names := cmd.Flags().Args(); cmd.HasSubCommands() && len(names) > 0 {
			a.noHelp = unknownCommand(cmd, names[0])
			return
		}
		nameLists(cmd)
		cmd.Long = reflow(cmd.Long, w)
		help(cmd, args)
	})
}

// helpWidth is how wide help may be: like the terminal, but not so wide that nobody likes to read it.
func helpWidth(out any) int {
	if w := width(out); w > 0 {
		return min(w, 110)
	}
	return 80
}

// nameLists calls a flag's value "list" where pflag's own name for it would be a type of Go's. It is for
// what is about to be printed: completion goes by that name.
func nameLists(cmd *cobra.Command) {
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Value.Type() == "stringArray" {
			f.Value = listValue{f.Value}
			if f.DefValue == "[]" {
				f.DefValue = ""
			}
		}
	})
	for _, c := range cmd.Commands() {
		nameLists(c)
	}
}

type listValue struct{ pflag.Value }

func (listValue) Type() string { return "list" }

// reflow fills paragraphs up to a width. Indented lines stay lines; one that is too long goes on
// below its last column.
func reflow(text string, width int) string {
	var out []string
	var words []string
	flush := func() {
		out = append(out, fill(words, "", "", width)...)
		words = nil
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \n")
		switch trimmed := strings.TrimLeft(line, " "); {
		case line == "":
			flush()
			out = append(out, "")
		case line != trimmed:
			flush()
			if utf8.RuneCountInString(line) <= width {
				out = append(out, line)
				break
			}
			lead := len(line) - len(trimmed)
			if i := strings.LastIndex(trimmed, "  "); i >= 0 {
				lead += i + 2
			}
			out = append(out, fill(strings.Fields(line[lead:]), line[:lead], strings.Repeat(" ", lead), width)...)
		default:
			words = append(words, strings.Fields(line)...)
		}
	}
	flush()
	return strings.Join(out, "\n")
}

// fill puts words into lines, the first of which begins with first, the others with rest.
func fill(words []string, first, rest string, width int) (lines []string) {
	line := first
	for i, w := range words {
		switch {
		case i == 0:
			line += w
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(w) > width:
			lines = append(lines, line)
			line = rest + w
		default:
			line += " " + w
		}
	}
	if len(words) > 0 {
		lines = append(lines, line)
	}
	return lines
}

// tidyUsage drops cobra's own "[flags]", since the usage lines say [OPTIONS] where there are some, and words
// cobra's own flag like the others.
func tidyUsage(cmd *cobra.Command) {
	cmd.DisableFlagsInUseLine = true
	cmd.InitDefaultHelpFlag()
	cmd.Flags().Lookup("help").Usage = "show this help"
	for _, c := range cmd.Commands() {
		tidyUsage(c)
	}
}
