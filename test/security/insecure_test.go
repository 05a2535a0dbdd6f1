//go:build linux && (amd64 || arm64)

package security

import (
	"debug/buildinfo"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// The tag that takes defences out cannot get into a binary that anybody runs.
func TestNormalBuildsAreSecure(t *testing.T) {
	out, err := exec.Command("go", "build", "-tags", "insecure,demo_image", "../../oci/internal/defence").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "ExcludeEachOther") {
		t.Errorf("a binary of the Makefile can be built insecure: %v %s", err, out)
	}
	makefile, err := os.ReadFile("../../Makefile")
	must(t, err)
	if !strings.Contains(string(makefile), "build -trimpath -tags 'demo_image nri_no_wasm grpcnotrace'") || strings.Contains(string(makefile), "-tags insecure") {
		t.Error("the Makefile builds with other tags than demo_image, nri_no_wasm and grpcnotrace")
	}
	ours := hako(t)
	info, err := buildinfo.ReadFile(ours.command[0])
	must(t, err)
	for _, s := range info.Settings {
		if strings.Contains(s.Value, "insecure") {
			t.Errorf("the runtime was built with %s=%s", s.Key, s.Value)
		}
	}
	// The variable means nothing to it.
	ours.env = []string{"HAKO_INSECURE=A5"}
	b := newBundle(t, "true")
	b.link(b.canary.dir, "way")
	b.mount("/way/deep", "tmpfs", "tmpfs")
	b.run(ours)
	if hit := b.canary.touched(t); hit != "" {
		t.Error(hit)
	}
}

// docs/security.md names a test for each row, and a control: they must exist.
func TestDocumentedTestsExist(t *testing.T) {
	doc, err := os.ReadFile("../../docs/security.md")
	must(t, err)
	out, err := exec.Command("grep", "-rhoE", "--include=*_test.go", `^func Test\w+`, "../..").Output()
	must(t, err)
	declared := string(out)
	names := regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(string(doc), -1)
	if len(names) < 40 {
		t.Errorf("only %d tests are named", len(names))
	}
	// Every row of a runtime and of identities has a control.
	for _, row := range regexp.MustCompile(`(?m)^\| [ABE]\d.*$`).FindAllString(string(doc), -1) {
		cells := strings.Split(strings.Trim(row, "| "), "|")
		if control := strings.TrimSpace(cells[len(cells)-1]); len(cells) != 3 || control == "" || strings.HasPrefix(control, "none") {
			t.Errorf("docs/security.md: no control in %q", row)
		}
	}
	for _, n := range names {
		if !strings.Contains(declared, "func "+n[1]+"\n") {
			t.Errorf("docs/security.md names %s, which does not exist", n[1])
		}
	}
}
