//go:build linux && (amd64 || arm64)

package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hako-engine/hako/internal/version"
)

// option is a flag with its short form.
type option struct {
	long, short, help string
	value             bool // it takes one
}

// options lists the flags of a set in the order of their names.
func options(fs *flag.FlagSet) (out []option) {
	short := map[string]string{}
	fs.VisitAll(func(f *flag.Flag) {
		if long, ok := strings.CutPrefix(f.Usage, "= --"); ok {
			short[long] = f.Name
		}
	})
	fs.VisitAll(func(f *flag.Flag) {
		if strings.HasPrefix(f.Usage, "= --") {
			return
		}
		b, ok := f.Value.(interface{ IsBoolFlag() bool })
		out = append(out, option{long: f.Name, short: short[f.Name], help: strings.ReplaceAll(f.Usage, "\n", " "), value: !ok || !b.IsBoolFlag()})
	})
	return out
}

// optionsOf gives the flags of a command.
func optionsOf(c command) []option {
	fs := newFlags(c.name)
	boolFlag(fs, "help", "h", "print this help")
	if _, err := c.run(&app{}, fs); err != nil {
		return nil
	}
	return options(fs)
}

// words lists the flags as they are typed; only those with a value, if values is set.
func words(list []option, values bool) string {
	var out []string
	for _, o := range list {
		if values && !o.value {
			continue
		}
		out = append(out, "--"+o.long)
		if o.short != "" && values {
			out = append(out, "-"+o.short)
		}
	}
	return strings.Join(out, " ")
}

func completionCommand(*app, *flag.FlagSet) (action, error) {
	return func(args []string) (int, error) {
		fs, _ := globalFlags()
		global := options(fs)
		var text string
		switch {
		case args[0] == "man" && len(args) == 2:
			return 0, writeManual(args[1], global)
		case len(args) > 1:
			return 0, fmt.Errorf("completion: %w: one shell", errUsage)
		case args[0] == "bash":
			text = bashCompletion(global)
		case args[0] == "zsh":
			text = zshCompletion(global)
		case args[0] == "fish":
			text = fishCompletion(global)
		default:
			return 0, fmt.Errorf("unknown shell %q: bash, zsh and fish are known", args[0])
		}
		_, err := os.Stdout.WriteString(text)
		return 0, err
	}, nil
}

// takesContainer tells whether the first argument names a container that exists.
func takesContainer(c command) bool {
	return strings.HasPrefix(c.args, "ID") && !slices.Contains([]string{"create", "run", "restore"}, c.name)
}

// shells are the arguments of completion.
const shells = "bash zsh fish"

func bashCompletion(global []option) string {
	var b strings.Builder
	var names []string
	for _, c := range commandTable() {
		names = append(names, c.name)
	}
	fmt.Fprintf(&b, `# bash completion of hako-oci
_hako_oci() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} cmd= i root=()
	for ((i = 1; i < COMP_CWORD; i++)); do
		case ${COMP_WORDS[i]} in
		--root) root=(--root "${COMP_WORDS[i+1]}"); i=$((i + 1)) ;;
		%s) i=$((i + 1)) ;;
		-*) ;;
		*) cmd=${COMP_WORDS[i]}; break ;;
		esac
	done
	local flags= values= arguments=
	case $cmd in
	'') flags='%s' values='%s' arguments='%s' ;;
`, strings.ReplaceAll(words(global, true), " ", "|"), words(global, false), words(global, true), strings.Join(names, " "))
	for _, c := range commandTable() {
		list := optionsOf(c)
		arguments := ""
		switch {
		case takesContainer(c):
			arguments = ` arguments=$(hako-oci "${root[@]}" list -q 2>/dev/null)`
		case c.name == "completion":
			arguments = " arguments='" + shells + "'"
		}
		fmt.Fprintf(&b, "\t%s) flags='%s' values='%s'%s ;;\n", c.name, words(list, false), words(list, true), arguments)
	}
	b.WriteString(`	esac
	COMPREPLY=()
	case " $values " in *" $prev "*) return ;; esac
	case $cur in
	-*) mapfile -t COMPREPLY < <(compgen -W "$flags" -- "$cur") ;;
	*) mapfile -t COMPREPLY < <(compgen -W "$arguments" -- "$cur") ;;
	esac
}
complete -o default -F _hako_oci hako-oci
`)
	return b.String()
}

// zshText makes a text of _arguments.
func zshText(s string) string {
	return strings.NewReplacer(`'`, `'\''`, `[`, `\[`, `]`, `\]`, `:`, `\:`).Replace(s)
}

func zshArguments(b *strings.Builder, list []option, indent string) {
	for _, o := range list {
		value := ""
		if o.value {
			value = ":value:_files"
		}
		fmt.Fprintf(b, "%s'--%s[%s]%s' \\\n", indent, o.long, zshText(o.help), value)
		if o.short != "" {
			fmt.Fprintf(b, "%s'-%s[%s]%s' \\\n", indent, o.short, zshText(o.help), value)
		}
	}
}

func zshCompletion(global []option) string {
	var b strings.Builder
	b.WriteString("#compdef hako-oci\n\n_hako_oci() {\n\tlocal context state state_descr line\n\ttypeset -A opt_args\n\t_arguments -C \\\n")
	zshArguments(&b, global, "\t\t")
	b.WriteString("\t\t'1:command:->command' '*::argument:->argument'\n\tcase $state in\n\tcommand)\n\t\tlocal -a commands=(\n")
	for _, c := range commandTable() {
		fmt.Fprintf(&b, "\t\t\t'%s:%s'\n", c.name, zshText(c.help))
	}
	b.WriteString("\t\t)\n\t\t_describe command commands ;;\n\targument)\n\t\tcase $line[1] in\n")
	for _, c := range commandTable() {
		fmt.Fprintf(&b, "\t\t%s) _arguments \\\n", c.name)
		zshArguments(&b, optionsOf(c), "\t\t\t")
		switch {
		case takesContainer(c):
			b.WriteString("\t\t\t'1:container:($(hako-oci list -q 2>/dev/null))' '*:argument:_files' ;;\n")
		case c.name == "completion":
			fmt.Fprintf(&b, "\t\t\t'1:shell:(%s)' ;;\n", shells)
		default:
			b.WriteString("\t\t\t'*:argument:_files' ;;\n")
		}
	}
	b.WriteString("\t\tesac ;;\n\tesac\n}\n\ncompdef _hako_oci hako-oci\n")
	return b.String()
}

func fishCompletion(global []option) string {
	var b strings.Builder
	quote := func(s string) string { return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'" }
	add := func(condition string, list []option) {
		for _, o := range list {
			fmt.Fprintf(&b, "complete -c hako-oci -n %s -l %s", quote(condition), o.long)
			if o.short != "" {
				b.WriteString(" -s " + o.short)
			}
			if o.value {
				b.WriteString(" -r")
			}
			b.WriteString(" -d " + quote(o.help) + "\n")
		}
	}
	b.WriteString("# fish completion of hako-oci\n")
	add("__fish_use_subcommand", global)
	for _, c := range commandTable() {
		fmt.Fprintf(&b, "complete -c hako-oci -f -n __fish_use_subcommand -a %s -d %s\n", c.name, quote(c.help))
	}
	for _, c := range commandTable() {
		in := "__fish_seen_subcommand_from " + c.name
		add(in, optionsOf(c))
		switch {
		case takesContainer(c):
			fmt.Fprintf(&b, "complete -c hako-oci -f -n %s -a '(hako-oci list -q 2>/dev/null)'\n", quote(in))
		case c.name == "completion":
			fmt.Fprintf(&b, "complete -c hako-oci -f -n %s -a %s\n", quote(in), quote(shells))
		}
	}
	return b.String()
}

// writeManual writes the manual pages: one of the whole, one for each command.
func writeManual(dir string, global []option) error {
	var pages []string
	for _, c := range commandTable() {
		pages = append(pages, "hako-oci-"+c.name)
	}
	page := func(name, help, usage, description string, list []option, more string) error {
		var b strings.Builder
		fmt.Fprintf(&b, ".TH %s 1 \"\" %s\n.SH NAME\n%s \\- %s\n.SH SYNOPSIS\n%s\n.SH DESCRIPTION\n%s\n.SH OPTIONS\n", roff(strings.ToUpper(name)),
			roffWord("hako "+version.Version), roff(name), roff(help), usage, description)
		for _, o := range list {
			names := `\fB\-\-` + roff(o.long) + `\fP`
			if o.short != "" {
				names = `\fB\-` + roff(o.short) + `\fP, ` + names
			}
			if o.value {
				names += ` \fIvalue\fP`
			}
			fmt.Fprintf(&b, ".TP\n%s\n%s\n", names, roff(o.help))
		}
		b.WriteString(more)
		return os.WriteFile(filepath.Join(dir, name+".1"), []byte(b.String()), 0o644)
	}
	var commands strings.Builder
	commands.WriteString(".SH COMMANDS\n")
	for _, c := range commandTable() {
		fmt.Fprintf(&commands, ".TP\n\\fB%s\\fP %s\n%s; see \\fBhako\\-oci\\-%s\\fP(1)\n", roff(c.name), roff(c.args), roff(c.help), roff(c.name))
	}
	commands.WriteString(environment + exitStatus + ".SH SEE ALSO\n" + seeAlso(pages))
	err := page("hako-oci", "OCI runtime of hako", `\fBhako\-oci\fP [\fIglobal options\fP] \fIcommand\fP [\fIoptions\fP] [\fIarguments\fP]`,
		"hako\\-oci makes and manages containers of OCI bundles. Its command line is that of runc(8), for the\nengines that call a runtime.", global, commands.String())
	for _, c := range commandTable() {
		if err != nil {
			return err
		}
		name := "hako-oci-" + c.name
		err = page(name, c.help, fmt.Sprintf(`\fBhako\-oci %s\fP [\fIoptions\fP] %s`, roff(c.name), roff(c.args)), roff(strings.ToUpper(c.help[:1])+c.help[1:])+".",
			optionsOf(c), ".SH SEE ALSO\n"+seeAlso(slices.DeleteFunc(append([]string{"hako-oci"}, pages...), func(p string) bool { return p == name })))
	}
	return err
}

const environment = `.SH ENVIRONMENT
.TP
\fBNOTIFY_SOCKET\fP
where to send word that the container is ready: create and run show the container a socket of its own,
start and run pass READY=1 on, with MAINPID. See sd_notify(3).
.TP
\fBLISTEN_FDS\fP
so many descriptors from 3 on are handed to the container's process. See sd_listen_fds(3).
.TP
\fBXDG_RUNTIME_DIR\fP
holds the state of containers of a user without privileges.
`

const exitStatus = `.SH EXIT STATUS
run and exec end with the status of the process, or 128 and the number of the signal that ended it. Failures are 1,
an unknown command 3, and a failure of exec before there is a process 255.
`

func seeAlso(pages []string) string {
	for i, p := range pages {
		pages[i] = `\fB` + roff(p) + `\fP(1)`
	}
	return strings.Join(pages, ", ") + "\n"
}

// roff protects what troff(1) would take for its own.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, `-`, `\-`).Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}

func roffWord(s string) string { return `"` + strings.ReplaceAll(roff(s), `"`, `\(dq`) + `"` }
