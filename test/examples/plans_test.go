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

// stepNumber finds numbers of steps, which a change of the plan elsewhere shifts.
var stepNumber = regexp.MustCompile(`(?m)(^ *|then |: |step |# |runtime, )\d+( |\)|;|$)`)

// TestShownPlans holds the plans that ARCHITECTURE.md and docs/plan.md show, shortened, to what is printed for the
// configuration that 'hako-oci spec' writes, but for the numbers of steps.
func TestShownPlans(t *testing.T) {
	t.Parallel()
	built(t)
	bundle := t.TempDir()
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("hako-oci", args...)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("hako-oci %v: %v", args, err)
		}
		return string(out)
	}
	run("spec", "--bundle", bundle)
	out := run("plan", "--facts", "cgroup=v2,kernel=6.12,lastcap=40,rootless=false,apparmor=false,selinux=false", bundle)
	plain := func(text string) string { return stepNumber.ReplaceAllString(text, "${1}N$2") }
	lines := strings.Split(plain(strings.ReplaceAll(out, bundle, "/bundle")), "\n")
	for page, want := range map[string]int{"ARCHITECTURE.md": 30, "docs/plan.md": 5} {
		raw, err := os.ReadFile(filepath.Join(top, page))
		if err != nil {
			t.Fatal(err)
		}
		shown := 0
		for i, block := range strings.Split(string(raw), "```") {
			if i%2 == 0 || !strings.Contains(block, "openat2($") {
				continue
			}
			at := 0 // lines of the plan before this one have been shown
			for line := range strings.SplitSeq(plain(strings.TrimPrefix(block, "\n")), "\n") {
				if line == "" || strings.TrimSpace(line) == "..." {
					continue
				}
				shown++
				head, tail, _ := strings.Cut(line, "...")
				n := slices.IndexFunc(lines[at:], func(l string) bool {
					return strings.HasPrefix(l, head) && strings.HasSuffix(l, tail) && (tail != "" || l == line)
				})
				if n < 0 {
					t.Errorf("%s: %q is not printed there", page, line)
					continue
				}
				at += n + 1
			}
		}
		if shown < want {
			t.Errorf("%s: only %d lines of a plan were found", page, shown)
		}
	}
}
