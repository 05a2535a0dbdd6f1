package main

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite docs/deps/hako-shim.txt")

// TestLinkedPackages holds the list of what a shim links: it is paid for once per
// pod. Regenerate it with -update, and review the difference.
func TestLinkedPackages(t *testing.T) {
	const file = "../../docs/deps/hako-shim.txt"
	cmd := exec.Command("go", "list", "-deps", ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for pkg := range strings.FieldsSeq(string(out)) {
		// The standard library's inside changes with every release of Go.
		if first, _, _ := strings.Cut(pkg, "/"); !strings.Contains(first, ".") && (slices.Contains(strings.Split(pkg, "/"), "internal") || first == "vendor") {
			continue
		}
		got = append(got, pkg)
		for _, bad := range []string{"net/http", "crypto/tls", "google.golang.org/", "github.com/spf13/", "github.com/sirupsen/", "github.com/containerd/ttrpc", "github.com/hako-engine/hako/engine"} {
			if pkg == strings.TrimSuffix(bad, "/") || strings.HasPrefix(pkg, bad) {
				t.Errorf("links %s", pkg)
			}
		}
	}
	text := []byte(strings.Join(got, "\n") + "\n")
	if *update {
		if err := os.WriteFile(file, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(text, want) {
		t.Errorf("the linked packages are not those of %s (run with -update, and look at the difference): %v", file, err)
	}
}
