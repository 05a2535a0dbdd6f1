package hako

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// declared maps every package folder of the module to the names that it declares:
// functions, types, methods as Type.Method, fields as Type.Field, constants and variables.
func declared(t *testing.T) map[string]map[string]bool {
	t.Helper()
	out := map[string]map[string]bool{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir := filepath.ToSlash(filepath.Dir(path))
		names := out[dir]
		if names == nil {
			names = map[string]bool{}
			out[dir] = names
		}
		for _, decl := range f.Decls {
			switch decl := decl.(type) {
			case *ast.FuncDecl:
				name := decl.Name.Name
				if decl.Recv != nil {
					name = receiver(decl.Recv.List[0].Type) + "." + name
				}
				names[name] = true
			case *ast.GenDecl:
				for _, spec := range decl.Specs {
					switch spec := spec.(type) {
					case *ast.TypeSpec:
						names[spec.Name.Name] = true
						if it, ok := spec.Type.(*ast.InterfaceType); ok {
							for _, m := range it.Methods.List {
								for _, n := range m.Names {
									names[spec.Name.Name+"."+n.Name] = true
								}
							}
						}
					case *ast.ValueSpec:
						for _, n := range spec.Names {
							names[n.Name] = true
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
	return out
}

func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return "?"
}

var (
	codeSpan = regexp.MustCompile("`([^`\n]+)`")
	// A name in code: folder/sub.Name or folder/sub.Type.Method, with or without ().
	goName = regexp.MustCompile(`^((?:[a-z0-9-]+/)*[a-z0-9-]+)\.([A-Za-z][A-Za-z0-9]*(?:\.[A-Za-z][A-Za-z0-9]*)?)(?:\(\))?$`)
	goFile = regexp.MustCompile(`^(?:[A-Za-z0-9_.-]+/)+[A-Za-z0-9_.-]*$`)
)

// TestArchitectureNamesExist holds ARCHITECTURE.md to the code: each name in
// backquotes that looks like one of ours must be declared, and each path must exist.
func TestArchitectureNamesExist(t *testing.T) {
	text, err := os.ReadFile("ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	names := declared(t)
	checked := 0
	for _, m := range codeSpan.FindAllStringSubmatch(string(text), -1) {
		span := m[1]
		if n := goName.FindStringSubmatch(span); n != nil {
			dir, ok := names[n[1]]
			if !ok {
				if top, _, _ := strings.Cut(n[1], "/"); rooms[top] != "" || top == "oci" || top == "internal" || top == "store" || top == "network" || top == "shim" {
					if _, err := os.Stat(n[1]); err != nil {
						t.Errorf("`%s`: there is no folder %s", span, n[1])
					}
				}
				continue
			}
			checked++
			if !dir[n[2]] {
				t.Errorf("`%s`: %s declares no %s", span, n[1], n[2])
			}
			continue
		}
		if goFile.MatchString(span) && !strings.Contains(span, "//") {
			top, _, _ := strings.Cut(span, "/")
			if _, ours := rooms[top]; ours || top == "docs" || top == ".ci" || top == "scripts" {
				checked++
				if _, err := os.Stat(strings.TrimSuffix(span, "/")); err != nil {
					t.Errorf("`%s` does not exist", span)
				}
			}
		}
	}
	if checked < 40 {
		t.Errorf("only %d names were checked: the page no longer follows the code by name", checked)
	}
}
