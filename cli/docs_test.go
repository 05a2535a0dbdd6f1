package cli

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDocs: every hako command in the documents is one that there is, with flags and arguments that it takes.
func TestDocs(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, file := range append(files, "../README.md", "../examples/README.md") {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		shell, before := false, ""
		for line := range strings.Lines(string(raw)) {
			if strings.HasPrefix(strings.TrimSpace(line), "```") {
				shell = !shell && strings.Contains(line, "sh")
				continue
			}
			if !shell {
				continue
			}
			line = before + strings.TrimSpace(line)
			if before = ""; strings.HasSuffix(line, "\\") {
				before = strings.TrimSuffix(line, "\\")
				continue
			}
			for _, args := range commandsOf(line) {
				count++
				a := &app{Streams: Streams{Out: io.Discard, Err: io.Discard}}
				cmd, rest, err := a.root().Traverse(args)
				if err == nil {
					cmd.InitDefaultHelpFlag()
					err = cmd.ParseFlags(rest)
				}
				if err == nil {
					err = cmd.ValidateArgs(cmd.Flags().Args())
				}
				if err != nil {
					t.Errorf("%s: hako %s: %v", filepath.Base(file), strings.Join(args, " "), err)
				}
			}
		}
	}
	if count < 100 {
		t.Errorf("only %d commands were found", count)
	}
}

// commandsOf gives the arguments of the hako commands in a line of shell.
func commandsOf(line string) (out [][]string) {
	var words []string
	var word strings.Builder
	quoted, begun := rune(0), false
	end := func() {
		if begun {
			words = append(words, word.String())
		}
		word.Reset()
		begun = false
	}
	flush := func() {
		end()
		if len(words) > 0 && words[0] == "sudo" {
			words = words[1:]
		}
		if len(words) > 0 && words[0] == "hako" {
			out = append(out, words[1:])
		}
		words = nil
	}
	for _, r := range line {
		switch {
		case quoted != 0:
			if r == quoted {
				quoted = 0
			} else {
				word.WriteRune(r)
			}
		case r == '\'' || r == '"':
			quoted, begun = r, true
		case r == ' ':
			end()
		case r == '#' && !begun:
			flush()
			return out
		case r == '|' || r == ';' || r == '&' || r == '>' || r == '<' || r == '(' || r == ')':
			flush()
		default:
			word.WriteRune(r)
			begun = true
		}
	}
	flush()
	return out
}
