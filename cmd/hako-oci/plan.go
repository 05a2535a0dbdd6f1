//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/plan"
	"github.com/hako-engine/hako/oci/spec"
)

// factsLimit bounds what is read from a file of facts.
const factsLimit = 4 << 20

func planCommand(a *app, fs *flag.FlagSet) (action, error) {
	asJSON := fs.Bool("json", false, "print JSON, as docs/plan.schema.json says")
	brief := fs.Bool("brief", false, "one line for each action")
	other := fs.String("diff", "", "a config.json or bundle: print what it would do differently")
	factsText := fs.String("facts", "", "another host: a file as --print-facts writes it (FILE, - for standard input),\nor changes to this host: cgroup=v1|hybrid|v2,kernel=5.15,rootless=true,apparmor=true,selinux=true,lastcap=40")
	printFacts := fs.Bool("print-facts", false, "print the facts about this host that the plan depends on")
	bundle := stringFlag(fs, "bundle", "b", ".", "the bundle, or a config.json")
	execFile := fs.String("exec", "", "explain exec of the process in this file (- for standard input) in that container instead")
	hook := fs.String("hook", "", "explain a hook in the container's namespaces instead: createContainer[0], startContainer[1]")
	noPivot := fs.Bool("no-pivot", false, "as for create")
	id := fs.String("id", "ID", "name of the container")
	return func(args []string) (int, error) {
		if len(args) > 0 {
			*bundle = args[0]
		}
		given := map[string]bool{"exec": *execFile != "", "hook": *hook != "", "json": *asJSON, "brief": *brief, "diff": *other != "", "print-facts": *printFacts}
		for _, pair := range [][2]string{{"exec", "hook"}, {"json", "brief"}, {"json", "diff"}, {"print-facts", "exec"}, {"print-facts", "hook"},
			{"print-facts", "json"}, {"print-facts", "brief"}, {"print-facts", "diff"}} {
			if given[pair[0]] && given[pair[1]] {
				return 0, fmt.Errorf("plan: %w: --%s and --%s exclude each other", errUsage, pair[0], pair[1])
			}
		}
		change, err := otherFacts(*factsText)
		if err != nil {
			return 0, err
		}
		options := func(path string) (oci.CreateOptions, error) {
			o := oci.CreateOptions{Bundle: path, NoPivot: *noPivot}
			if !fileExists(path) || isDir(path) {
				return o, nil // create's own error is the better one
			}
			var err error
			if o.Bundle = filepath.Dir(path); path == *other {
				// Another configuration of the same bundle.
				if o.Bundle = *bundle; fileExists(*bundle) && !isDir(*bundle) {
					o.Bundle = filepath.Dir(*bundle)
				}
			}
			o.Spec, o.Raw, err = spec.Read(path)
			return o, err
		}
		var process *specs.Process
		var processText []byte
		if *execFile != "" {
			if process, processText, err = readProcess(*execFile); err != nil {
				return 0, err
			}
		}
		explain := func(path string) (*plan.Explanation, error) {
			o, err := options(path)
			if err != nil {
				return nil, err
			}
			switch {
			case process != nil:
				return a.rt.PlanExec(*id, o, process, processText, change)
			case *hook != "":
				name, i, err := parseHook(*hook)
				if err != nil {
					return nil, err
				}
				return a.rt.PlanHook(*id, o, name, i, change)
			}
			return a.rt.Plan(*id, o, change)
		}
		if *printFacts {
			o, err := options(*bundle)
			if err != nil {
				return 0, err
			}
			f, err := a.rt.Facts(*id, o, change)
			if err != nil {
				return 0, err
			}
			return 0, printJSON(f)
		}
		e, err := explain(*bundle)
		if err != nil {
			return 0, err
		}
		if *asJSON {
			enc := json.NewEncoder(os.Stdout)
			enc.SetIndent("", "  ")
			enc.SetEscapeHTML(false)
			return 0, enc.Encode(e)
		}
		text := e.Text()
		switch {
		case *other != "":
			b, err := explain(*other)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", *other, err)
			}
			text = plan.Diff(e, b, *bundle, *other, *brief)
		case *brief:
			text = e.Brief()
		}
		_, err = os.Stdout.WriteString(text)
		return 0, err
	}, nil
}

// parseHook reads NAME or NAME[INDEX].
func parseHook(text string) (name string, i int, err error) {
	name, index, ok := strings.Cut(text, "[")
	if !ok {
		return name, 0, nil
	}
	if i, err = strconv.Atoi(strings.TrimSuffix(index, "]")); err != nil || !strings.HasSuffix(index, "]") {
		return "", 0, fmt.Errorf("plan: --hook %q: %w", text, errUsage)
	}
	return name, i, nil
}

// otherFacts reads the value of --facts, once.
func otherFacts(text string) (func(*plan.Facts) error, error) {
	if text == "" {
		return nil, nil
	}
	if text == "-" || !strings.Contains(text, "=") || fileExists(text) {
		var r io.Reader = os.Stdin
		if text != "-" {
			f, err := os.Open(text)
			if err != nil {
				return nil, err
			}
			defer f.Close()
			r = f
		}
		raw, err := io.ReadAll(io.LimitReader(r, factsLimit))
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", text, err)
		}
		text = string(raw)
	}
	return func(f *plan.Facts) error { return f.Change(text) }, nil
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
