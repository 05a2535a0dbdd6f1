package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestPlan(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "id")
	raw, err := os.ReadFile(filepath.Join(c.bundle, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	must := func(args ...string) string {
		t.Helper()
		out, stderr, code := c.run(args...)
		if code != 0 {
			t.Fatalf("%v: %d %s", args, code, stderr)
		}
		return out
	}
	text := must("plan")
	if !strings.Contains(text, "mount /proc  (mounts[0], line 1)\n") || !strings.Contains(text, "execveat(") {
		t.Errorf("plan:\n%s", text)
	}
	if got := must("plan", filepath.Join(c.bundle, "config.json")); got != text {
		t.Error("the plan of a configuration is not that of its bundle")
	}
	if n := strings.Count(must("plan", "--brief"), "\n"); n > 100 {
		t.Errorf("brief: %d lines", n)
	}
	var doc struct {
		Version int
		Actions []struct{ Do string }
	}
	if err := json.Unmarshal([]byte(must("plan", "--json")), &doc); err != nil || doc.Version != 1 || len(doc.Actions) < 30 {
		t.Errorf("json: %v %+v", err, doc)
	}

	if out := must("plan", "--diff", "config.json"); out != "" {
		t.Errorf("a configuration differs from itself:\n%s", out)
	}
	other := strings.Replace(string(raw), `"hostname":"hako"`, `"hostname":"other"`, 1)
	if err := os.WriteFile(filepath.Join(c.bundle, "other.json"), []byte(other), 0o644); err != nil {
		t.Fatal(err)
	}
	want := "--- .\n+++ other.json\n## the container's first process\n@@ container -hostname, line 1 +hostname, line 1 @@\n" +
		"-set the host name to \"hako\"\n-    sethostname(\"hako\", 4)\n+set the host name to \"other\"\n+    sethostname(\"other\", 5)\n"
	if out := must("plan", "--diff", "other.json"); out != want {
		t.Errorf("diff:\n%s", out)
	}

	facts := must("plan", "--print-facts")
	if err := os.WriteFile(filepath.Join(c.bundle, "facts.json"), []byte(facts), 0o644); err != nil {
		t.Fatal(err)
	}
	if must("plan", "--facts", "facts.json") != text {
		t.Error("this host's own facts give another plan")
	}
	elsewhere := must("plan", "--brief", "--facts", "cgroup=v2,kernel=5.4")
	if !strings.Contains(elsewhere, "mount /sys/fs/cgroup: bind /sys/fs/cgroup ") || !strings.Contains(elsewhere, "Linux 5.4 does not know mount_setattr") {
		t.Errorf("elsewhere:\n%s", elsewhere)
	}

	process := "{\"args\": [\"/guest\", \"id\"],\n\"cwd\": \"/\",\n\"user\": {\"uid\": 3}}"
	if err := os.WriteFile(filepath.Join(c.bundle, "process.json"), []byte(process), 0o644); err != nil {
		t.Fatal(err)
	}
	inside := must("plan", "--exec", "process.json")
	for _, want := range []string{"by the new process\n", "join the container's namespaces  (runtime)\n", "become user 3, group 0  (process.user, line 3)\n", "execute [\"/guest\" \"id\"]  (process.args, line 1)\n"} {
		if !strings.Contains(inside, want) {
			t.Errorf("exec: no %q in\n%s", want, inside)
		}
	}
	s := new(specs.Spec)
	if err := json.Unmarshal(raw, s); err != nil {
		t.Fatal(err)
	}
	limit := 3
	s.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/bin/a"}, {Path: "/bin/b", Args: []string{"b", "c"}, Timeout: &limit}}}
	c.config(s)
	if out := must("plan", "--hook", "createContainer[1]", "--brief"); !strings.Contains(out, "execute [\"/bin/b\" \"c\"]") || !strings.Contains(out, "kill it after 3 s") {
		t.Errorf("hook:\n%s", out)
	}
	for _, bad := range [][]string{{"--exec", "nosuch.json"}, {"--exec", "config.json"}, {"--hook", "createContainer[2]"}, {"--hook", "poststop"}, {"--hook", "createContainer[x]"},
		{"--hook", "createContainer", "--exec", "process.json"}, {"--facts", "cgroup=v9"}, {"--facts", "nosuch.json"}, {"--json", "--brief"}, {"--diff", "nosuch.json"}, {"nosuch"}} {
		if out, stderr, code := c.run(append([]string{"plan"}, bad...)...); code != 1 || out != "" || stderr == "" {
			t.Errorf("%v: %d %s%s", bad, code, out, stderr)
		}
	}
}
