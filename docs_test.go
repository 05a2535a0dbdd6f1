package hako

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// pages are the documents that people read, by path.
func pages(t *testing.T) map[string]string {
	t.Helper()
	files := []string{"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"}
	docs, err := filepath.Glob("docs/*.md")
	if err != nil || len(docs) < 20 {
		t.Fatalf("%d pages in docs, %v", len(docs), err)
	}
	out := map[string]string{}
	for _, f := range append(files, docs...) {
		out[f] = read(t, f)
	}
	return out
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var (
	mdLink    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	mdHeading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	mdFence   = regexp.MustCompile("(?ms)^ *```.*?^ *```")
	notAnchor = regexp.MustCompile(`[^a-z0-9 _-]`)
)

// TestLinks follows the links between the documents, to headings too, and holds that the README leads to each page.
func TestLinks(t *testing.T) {
	all := pages(t)
	reached := map[string]bool{}
	for page, text := range all {
		for _, m := range mdLink.FindAllStringSubmatch(mdFence.ReplaceAllString(text, ""), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			path, anchor, _ := strings.Cut(m[1], "#")
			target := page
			if path != "" {
				target = filepath.Join(filepath.Dir(page), path)
			}
			if page == "README.md" {
				reached[target] = true
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: the link %s leads nowhere", page, m[1])
				continue
			}
			if anchor != "" && !slices.Contains(anchors(read(t, target)), anchor) {
				t.Errorf("%s: the link %s leads to no heading", page, m[1])
			}
		}
	}
	for page := range all {
		if page != "README.md" && !reached[page] {
			t.Errorf("README.md does not lead to %s", page)
		}
	}
}

// anchors are the names of a page's headings, as forges make them.
func anchors(text string) (out []string) {
	for _, m := range mdHeading.FindAllStringSubmatch(mdFence.ReplaceAllString(text, ""), -1) {
		out = append(out, strings.ReplaceAll(notAnchor.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-"))
	}
	return out
}

// foreign are tests of containerd's that docs/conformance.md names.
var foreign = []string{"TestContainerHook", "TestKillContainerDeletedByRunc", "TestMigration", "TestRestartMonitor"}

var (
	testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Benchmark|Fuzz)[A-Z][A-Za-z0-9_]*)\(`)
	testName = regexp.MustCompile(`\b(?:Test|Benchmark|Fuzz)[A-Z][A-Za-z0-9]+`)
	placed   = regexp.MustCompile("(?:([a-z0-9]+(?:/[a-z0-9]+)*) )?`(Test[A-Za-z0-9]+)`")
)

// testsOf maps each test, benchmark and fuzz target to the folders that it is in.
func testsOf(t *testing.T) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	err := filepath.WalkDir(".", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, "_test.go") {
			for _, m := range testFunc.FindAllStringSubmatch(read(t, path), -1) {
				out[m[1]] = append(out[m[1]], filepath.Dir(path))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestNamedTestsExist holds that each test which a document, the Makefile or a script names is there, and those in the
// table of docs/security.md in the folder that it says.
func TestNamedTestsExist(t *testing.T) {
	tests := testsOf(t)
	all := pages(t)
	for _, pattern := range []string{"Makefile", ".ci/run", "scripts/*.sh", "test/*/*.sh"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v", pattern, err)
		}
		for _, f := range files {
			all[f] = read(t, f)
		}
	}
	for page, text := range all {
		text = strings.ReplaceAll(text, ".TestGoFiles", "") // of go list
		for _, name := range testName.FindAllString(text, -1) {
			if tests[name] == nil && !slices.Contains(foreign, name) {
				t.Errorf("%s names %s, which does not exist", page, name)
			}
		}
	}
	rows := 0
	for line := range strings.Lines(all["docs/security.md"]) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || !strings.Contains(cells[2], "`Test") {
			continue
		}
		rows++
		for part := range strings.SplitSeq(cells[2], ";") {
			dir := "test/security"
			for _, m := range placed.FindAllStringSubmatch(part, -1) {
				if info, err := os.Stat(m[1]); m[1] != "" && err == nil && info.IsDir() {
					dir = m[1]
				}
				if !slices.Contains(tests[m[2]], dir) {
					t.Errorf("docs/security.md: there is no %s in %s", m[2], dir)
				}
			}
		}
	}
	if rows < 40 {
		t.Errorf("docs/security.md: only %d rows with tests were found", rows)
	}
}

var (
	makeTarget = regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`)
	madeTarget = regexp.MustCompile(`(?:^|&& |sudo )make ([a-z][a-z0-9-]*)`)
	shBlock    = regexp.MustCompile("(?ms)^ *```sh\n(.*?)^ *```")
)

// TestNamedTargetsExist holds that the documents call only targets that the Makefile has, and that 'make help' tells of each.
func TestNamedTargetsExist(t *testing.T) {
	text := read(t, "Makefile")
	var targets []string
	for _, m := range makeTarget.FindAllStringSubmatch(text, -1) {
		targets = append(targets, m[1])
	}
	for _, target := range targets {
		if target != "all" && !regexp.MustCompile(`(?m)^`+target+`:.* ## `).MatchString(text) {
			t.Errorf("Makefile: 'make help' says nothing of %s", target)
		}
		if !regexp.MustCompile(`(?m)^\.PHONY:.* ` + target + `( |$)`).MatchString(text) {
			t.Errorf("Makefile: %s is not .PHONY", target)
		}
	}
	called := 0
	for page, text := range pages(t) {
		var code []string
		for _, m := range shBlock.FindAllStringSubmatch(text, -1) {
			for line := range strings.Lines(m[1]) {
				line, _, _ = strings.Cut(line, "#")
				code = append(code, strings.TrimSpace(line))
			}
		}
		for _, m := range codeSpan.FindAllStringSubmatch(mdFence.ReplaceAllString(text, ""), -1) {
			code = append(code, m[1])
		}
		for _, c := range code {
			for _, m := range madeTarget.FindAllStringSubmatch(c, -1) {
				called++
				if !slices.Contains(targets, m[1]) {
					t.Errorf("%s: 'make %s': there is no such target", page, m[1])
				}
			}
		}
	}
	if called < 20 {
		t.Errorf("only %d calls of make were found", called)
	}
}

// TestNamedPathsExist holds that files and folders of this repository which the pages name in code font are there.
// (TestArchitectureNamesExist does it for ARCHITECTURE.md, with names of the code.)
func TestNamedPathsExist(t *testing.T) {
	names, checked := declared(t), 0
	for page, text := range pages(t) {
		if page == "ARCHITECTURE.md" || page == "CHANGELOG.md" {
			continue
		}
		for _, m := range codeSpan.FindAllStringSubmatch(mdFence.ReplaceAllString(text, ""), -1) {
			path, _, _ := strings.Cut(m[1], " ")
			top, _, below := strings.Cut(path, "/")
			if _, ours := rooms[top]; !below || !ours && top != "docs" && top != "scripts" && top != ".ci" && top != "examples" {
				continue
			}
			checked++
			if n := goName.FindStringSubmatch(path); n != nil && names[n[1]][n[2]] {
				continue
			}
			if found, err := filepath.Glob(strings.TrimSuffix(path, "/")); err != nil || len(found) == 0 {
				t.Errorf("%s: `%s` does not exist", page, m[1])
			}
		}
	}
	if checked < 40 {
		t.Errorf("only %d paths were found", checked)
	}
}

// TestChangelog holds CHANGELOG.md to the form that it says it has: Keep a Changelog 1.1.0. Lines of
// several branches come together there, so a section is easily there twice.
func TestChangelog(t *testing.T) {
	kinds := []string{"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
	release := regexp.MustCompile(`^## \[(Unreleased|\d+\.\d+\.\d+[^\]]*)\](?: - \d{4}-\d\d-\d\d)?$`)
	version, kind, entries, seen := "", -1, 0, map[string]bool{}
	for line := range strings.SplitSeq(read(t, "CHANGELOG.md"), "\n") {
		heading, isKind := strings.CutPrefix(line, "### ")
		switch {
		case strings.HasPrefix(line, "## "):
			if version == "" && line != "## [Unreleased]" || !release.MatchString(line) || seen[line] {
				t.Errorf("%q is no release, not in its place, or there twice", line)
			}
			seen[line] = true
			version, kind, entries = line, -1, 1
		case isKind:
			next := slices.Index(kinds, heading)
			if next <= kind || entries == 0 {
				t.Errorf("%s: the section %q is not one of %v in this order, there twice, or follows an empty one", version, heading, kinds)
			}
			kind, entries = next, 0
		case strings.HasPrefix(line, "- "):
			if kind < 0 {
				t.Errorf("%s: %q is in no section", version, line)
			}
			if entries++; seen[line] {
				t.Errorf("%s: %q is there twice", version, line)
			}
			seen[line] = true
		case strings.HasPrefix(line, "#") && version != "", strings.HasPrefix(line, "<<<<<<<"), strings.HasPrefix(line, "======="), strings.HasPrefix(line, ">>>>>>>"):
			t.Errorf("%s: %q", version, line)
		}
	}
	if version == "" || entries == 0 {
		t.Error("no releases, or the last section is empty")
	}
}

// TestCheckProblemsDocumented holds docs/check.md to the rooms: it has a row for each problem that a check can find, and no other.
func TestCheckProblemsDocumented(t *testing.T) {
	said := map[string]bool{}
	for line := range strings.Lines(read(t, "docs/check.md")) {
		cells := strings.Split(line, "|")
		room, _, ok := strings.Cut(strings.TrimPrefix(cells[min(1, len(cells)-1)], " "), " `")
		if !strings.HasPrefix(line, "| ") || !ok || rooms[room] == "" && room != "store" && room != "network" {
			continue
		}
		for _, m := range codeSpan.FindAllStringSubmatch(cells[1], -1) {
			if !strings.HasPrefix(m[1], "--") {
				said[room+" "+m[1]] = true
			}
		}
	}
	found := 0
	for _, room := range []string{"store", "snapshot", "image", "network", "engine"} {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(room, "check.go"), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			spec, ok := n.(*ast.ValueSpec)
			if !ok || !strings.HasPrefix(spec.Names[0].Name, "Problem") || len(spec.Values) != 1 {
				return true
			}
			found++
			key := room + " " + strings.Trim(spec.Values[0].(*ast.BasicLit).Value, `"`)
			if !said[key] {
				t.Errorf("docs/check.md does not have %s", key)
			}
			delete(said, key)
			return true
		})
	}
	for key := range said {
		t.Errorf("docs/check.md has %s, which no check finds", key)
	}
	if found < 30 {
		t.Errorf("only %d problems were found", found)
	}
}

var (
	flowsIn  = regexp.MustCompile(`(?i)\b(in|nothing) (flow|flows|go|goes)\b`)
	flowsOut = regexp.MustCompile(`(?i)\bout (flow|flows|come|comes)\b|nothing flows in or out`)
)

// TestComments holds that each package says what flows in and out of it, and that exported names are explained.
// Methods which the interfaces of the standard library explain need no words of their own.
func TestComments(t *testing.T) {
	known := []string{"Error", "String", "Unwrap", "Is", "Read", "Write", "Close", "Len", "Less", "Swap", "Set", "MarshalJSON", "UnmarshalJSON"}
	packages := map[string]string{}
	err := filepath.WalkDir(".", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		files := token.NewFileSet()
		f, err := parser.ParseFile(files, path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		packages[filepath.Dir(path)] += strings.ReplaceAll(f.Doc.Text(), "\n", " ")
		bare := func(at token.Pos, name string) {
			if f.Name.Name != "main" {
				t.Errorf("%s: %s has no comment", files.Position(at), name)
			}
		}
		for _, decl := range f.Decls {
			switch decl := decl.(type) {
			case *ast.FuncDecl:
				if !decl.Name.IsExported() || decl.Doc != nil {
					continue
				}
				if decl.Recv != nil {
					if slices.Contains(known, decl.Name.Name) || !ast.IsExported(receiver(decl.Recv.List[0].Type)) {
						continue
					}
				}
				bare(decl.Pos(), decl.Name.Name)
			case *ast.GenDecl:
				said := decl.Doc.Text() // also of the names before in the group
				for _, spec := range decl.Specs {
					switch spec := spec.(type) {
					case *ast.TypeSpec:
						if spec.Name.IsExported() && decl.Doc == nil && spec.Doc == nil && spec.Comment == nil {
							bare(spec.Pos(), spec.Name.Name)
						}
					case *ast.ValueSpec:
						said += spec.Doc.Text()
						if spec.Names[0].IsExported() && decl.Doc == nil && spec.Doc == nil && spec.Comment == nil && !strings.Contains(said, spec.Names[0].Name) {
							bare(spec.Pos(), spec.Names[0].Name)
						}
					}
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for dir, text := range packages {
		if dir == "." || dir == "examples" {
			continue // tests; programs for readers
		}
		if !flowsIn.MatchString(text) || !flowsOut.MatchString(text) {
			t.Errorf("the comment of package %s does not say what flows in and out: %q", dir, text)
		}
	}
}
