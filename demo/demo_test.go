package demo_test

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/hako-engine/hako/demo"
)

// TestBuild makes the image twice, and looks at what is in it.
func TestBuild(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var made [2]string
	for i := range made {
		name := filepath.Join(dir, "demo.tar.gz")
		cmd := exec.Command("go", "run", "./demo/build", "-o", name)
		cmd.Dir = ".."
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		made[i] = string(b)
	}
	if made[0] != made[1] {
		t.Error("the same source gave two different images")
	}
	z, err := gzip.NewReader(strings.NewReader(made[0]))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for tr := tar.NewReader(z); ; {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		found[hdr.Name] = true
	}
	for _, want := range []string{"manifest.json", "index.json", "oci-layout"} {
		if !found[want] {
			t.Errorf("archive has no %s: %v", want, found)
		}
	}
}

// TestGuest runs the program itself.
func TestGuest(t *testing.T) {
	t.Parallel()
	bin := filepath.Join(t.TempDir(), "demo")
	cmd := exec.Command("go", "build", "-o", bin, "./guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, c := range []struct {
		args   []string
		stdin  string
		want   string
		status int
	}{
		{[]string{"true"}, "", "", 0},
		{[]string{"false"}, "", "", 1},
		{[]string{"exit", "42"}, "", "", 42},
		{[]string{"exit", "many"}, "", "exit: \"many\" is not", 1},
		{[]string{"echo", "a", "b"}, "", "a b\n", 0},
		{[]string{"cat"}, "text", "text", 0},
		{[]string{"cat", "/no/such/file"}, "", "no such file", 1},
		{[]string{"sleep", "0.01"}, "", "", 0},
		{[]string{"spam", "1k", "0.2"}, "", "0000000000 xxx", 0},
		{[]string{"id"}, "", "uid=", 0},
		{[]string{"show"}, "", "seccomp", 0},
		{[]string{"nothing"}, "", "unknown command", 127},
	} {
		cmd := exec.Command(bin, c.args...)
		cmd.Stdin = strings.NewReader(c.stdin)
		out, _ := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); got != c.status || !strings.Contains(string(out), c.want) {
			t.Errorf("%q: status %d, output %q", c.args, got, out)
		}
	}
}

func TestArchive(t *testing.T) {
	t.Parallel()
	r, err := demo.Archive()
	if errors.Is(err, demo.ErrNoImage) {
		return // built without the tag
	}
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, r); err != nil || n < 1<<20 {
		t.Errorf("archive for %s has %d bytes (%v)", runtime.GOARCH, n, err)
	}
}
