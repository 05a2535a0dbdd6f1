package examples

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func page(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(top, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// help gives the help of a command. It asks no daemon and needs no privilege.
func help(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], append(args[1:], "--help")...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v --help: %v\n%s", args, err, out)
	}
	return string(out)
}

var (
	longFlag  = regexp.MustCompile(`(?:^|[\s"'\x60])(--[a-z][a-z0-9-]*)`)
	shortFlag = regexp.MustCompile(`^-([A-Za-z]+)$`)
	shBlock   = regexp.MustCompile("(?s)```sh\n(.*?)```")
	listed    = regexp.MustCompile(`(?m)^  ([a-z-]+) {2,}[A-Z]`)
)

// hasFlag tells whether a help text lists a long flag.
func hasFlag(text, flag string) bool {
	return regexp.MustCompile(`(?m)(?:^|[\s,])` + regexp.QuoteMeta(flag) + `(?:[\s,=]|$)`).MatchString(text)
}

// TestInstallFlags holds docs/install.md to hakod --help, in both directions for what its table says.
func TestInstallFlags(t *testing.T) {
	built(t)
	text := help(t, "hakod")
	checked := 0
	for _, line := range strings.Split(page(t, "docs/install.md"), "\n") {
		if !strings.HasPrefix(line, "| `--") && !strings.HasPrefix(line, "hakod ") {
			continue
		}
		if strings.HasPrefix(line, "| ") {
			line = strings.Split(line, "|")[1] // the other columns may speak of other programs
		}
		for _, m := range longFlag.FindAllStringSubmatch(line, -1) {
			checked++
			if !hasFlag(text, m[1]) {
				t.Errorf("docs/install.md names %s, which hakod --help does not list", m[1])
			}
		}
	}
	if checked < 10 {
		t.Errorf("only %d flags were found in docs/install.md", checked)
	}
}

// subcommands lists what a group's help offers.
func subcommands(t *testing.T, path ...string) []string {
	var out []string
	for _, m := range listed.FindAllStringSubmatch(help(t, path...), -1) {
		out = append(out, m[1])
	}
	return out
}

// TestCommands holds docs/cli.md and docs/image-tools.md to the command line: each command that it shows exists
// and has the flags, and each command that exists is shown.
func TestCommands(t *testing.T) {
	built(t)
	all := map[string]bool{} // command, with its group → it was shown
	groups := map[string]bool{"container": true, "image": true, "network": true, "volume": true, "system": true}
	for _, c := range subcommands(t, "hako") {
		switch {
		case c == "help":
		case groups[c]:
			for _, sub := range subcommands(t, "hako", c) {
				all[c+" "+sub] = false
			}
		default:
			all[c] = false
		}
	}
	if len(all) < 50 {
		t.Fatalf("only %d commands were found", len(all))
	}
	text := page(t, "docs/cli.md") + page(t, "docs/image-tools.md")
	texts := map[string]string{}
	for _, block := range shBlock.FindAllStringSubmatch(text, -1) {
		for _, line := range strings.Split(block[1], "\n") {
			line, _, _ = strings.Cut(line, "  #")
			words := strings.Fields(line)
			if len(words) < 2 || words[0] != "hako" {
				continue
			}
			name, rest := words[1], words[2:]
			if groups[name] && len(rest) > 0 {
				name, rest = name+" "+rest[0], rest[1:]
			}
			if _, ok := all[name]; !ok {
				t.Errorf("the pages show 'hako %s', which does not exist", name)
				continue
			}
			all[name] = true
			if texts[name] == "" {
				texts[name] = help(t, append([]string{"hako"}, strings.Fields(name)...)...)
			}
			checkFlags(t, line, name, texts[name], rest)
		}
	}
	for name, shown := range all {
		group, sub, ok := strings.Cut(name, " ")
		if ok && !shown && (group == "container" || group == "image" || group == "system") {
			_, shown = all[sub] // it is the short form that is shown
		}
		if !shown {
			t.Errorf("docs/cli.md does not show 'hako %s'", name)
		}
	}
}

// checkFlags checks the flags of one shown command. What follows the image or container of
// run, create and exec belongs to the container's command.
func checkFlags(t *testing.T, line, name, text string, words []string) {
	t.Helper()
	foreign := slices.Contains([]string{"run", "create", "exec"}, name)
	value := false // the next word is the value of a flag
	for _, w := range words {
		switch {
		case value:
			value = false
		case strings.HasPrefix(w, "--"):
			flag, _, has := strings.Cut(w, "=")
			if !hasFlag(text, flag) {
				t.Errorf("docs/cli.md: %s: 'hako %s' has no flag %s", line, name, flag)
			}
			value = !has && takesValue(text, flag)
		case shortFlag.MatchString(w):
			letters := shortFlag.FindStringSubmatch(w)[1]
			for i, l := range letters {
				flag := "-" + string(l)
				if !hasFlag(text, flag) {
					t.Errorf("docs/cli.md: %s: 'hako %s' has no flag %s", line, name, flag)
				}
				value = i == len(letters)-1 && takesValue(text, flag)
			}
		case foreign:
			return
		}
	}
}

// takesValue tells whether a flag's line in a help text names a type.
func takesValue(text, flag string) bool {
	typed := regexp.MustCompile(`(?m)^.*(?:^|[\s,])` + regexp.QuoteMeta(flag) + `(?:, --[a-z0-9-]+)? (string|stringArray|int|uint16|duration)\b`)
	return typed.MatchString(text)
}

var route = regexp.MustCompile(`s\.(?:handle|refuse)\("((?:[A-Z]+ )?/[^"]*)"`)

// TestDockerRoutes holds docs/docker-api.md to the table of routes: each one is named.
func TestDockerRoutes(t *testing.T) {
	text := page(t, "docs/docker-api.md")
	routes := route.FindAllStringSubmatch(page(t, "api/docker/routes.go"), -1)
	if len(routes) < 50 {
		t.Fatalf("only %d routes were found", len(routes))
	}
	for _, m := range routes {
		want := "`" + strings.ReplaceAll(m[1], "{rest...}", "{name}")
		if !strings.Contains(text, want) {
			t.Errorf("docs/docker-api.md does not name %s`", want)
		}
	}
}

var (
	fenced = regexp.MustCompile("(?ms)^ *```[a-z]*\n(.*?)^ *```")
	span   = regexp.MustCompile("`([^`\n]+)`")
)

// shown gives the command lines in code font and in blocks of a page.
func shown(text string) (out []string) {
	for _, block := range fenced.FindAllStringSubmatch(text, -1) {
		out = append(out, strings.Split(block[1], "\n")...)
	}
	for _, m := range span.FindAllStringSubmatch(fenced.ReplaceAllString(text, ""), -1) {
		out = append(out, m[1])
	}
	return out
}

// TestRuntimeAndDaemonAsShown holds what all pages show of hako-oci and hakod to the programs: commands and flags. In
// docs/oci.md the commands of hako-oci are also meant without its name.
func TestRuntimeAndDaemonAsShown(t *testing.T) {
	built(t)
	daemon := help(t, "hakod")
	runtime := map[string]string{} // command → help
	for _, m := range regexp.MustCompile(`(?m)^  ([a-z]+) {2,}[a-z]`).FindAllStringSubmatch(help(t, "hako-oci"), -1) {
		runtime[m[1]] = help(t, "hako-oci", m[1])
	}
	if len(runtime) < 15 {
		t.Fatalf("only %d commands of hako-oci were found", len(runtime))
	}
	pages, err := filepath.Glob(filepath.Join(top, "docs/*.md"))
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, path := range append(pages, filepath.Join(top, "README.md"), filepath.Join(top, "ARCHITECTURE.md")) {
		name, err := filepath.Rel(top, path)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range shown(page(t, name)) {
			line, _, _ = strings.Cut(line, "  ") // what it is for
			words := strings.Fields(line)
			if len(words) < 2 {
				continue
			}
			if name == "docs/oci.md" && runtime[words[0]] != "" && strings.HasPrefix(words[1], "--") {
				words = append([]string{"hako-oci"}, words...)
			}
			var text, sign string
			switch {
			case words[0] == "hako-oci" && runtime[words[1]] != "":
				text, sign = runtime[words[1]], "-" // as package flag prints them
			case words[0] == "hako-oci" && words[1] != "COMMAND":
				t.Errorf("%s: %q: hako-oci has no command %s", name, line, words[1])
				continue
			case words[0] == "hakod":
				text, sign = daemon, "--"
				if c := words[1]; c != "&" && c != "verify-image" && !strings.HasPrefix(c, "-") && !strings.Contains(daemon, "\n  hakod "+c) {
					t.Errorf("%s: %q: hakod has no command %s", name, line, c)
				}
			default:
				continue
			}
			checked++
			for _, m := range longFlag.FindAllStringSubmatch(" "+strings.Join(words, " "), -1) {
				flag := sign + strings.TrimPrefix(m[1], "--")
				if !hasFlag(text, flag) && flag != sign+"help" && !strings.Contains(text, "["+m[1]+"]") {
					t.Errorf("%s: %q: %s %s has no flag %s", name, line, words[0], words[1], m[1])
				}
			}
		}
	}
	if checked < 25 {
		t.Errorf("only %d commands were found", checked)
	}
}
