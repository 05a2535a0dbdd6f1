package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCommit makes images of containers: what they changed, deleted and replaced is in the
// image, and what is mounted into them is not.
func TestCommit(t *testing.T) {
	t.Parallel()
	n := shared(t)
	src, image := n.name(t, "-src"), "commit-test:v1"
	t.Cleanup(func() { n.run(nil, "rmi", "-f", image, "commit-test:v2", "commit-test:empty") })
	n.docker(t, "run", "-d", "--name", src, "-v", "/vol", "--tmpfs", "/mem", "-e", "A=1", "-w", "/work", "--label", "l=1", testImage, "sh", "-c", `
		mkdir -p /work/dir/deep /old/below && echo one >/work/dir/deep/f && ln /work/dir/deep/f /work/hard && ln -s dir /work/sym
		chmod 4755 /work/dir/deep/f && chown 7:8 /work/dir && mkfifo /work/fifo && echo x >/vol/not && echo x >/mem/not
		rm /etc/group; touch /work/ready; exec sleep 1000`)
	eventually(t, "the container's changes", func() bool { return n.run(nil, "exec", src, "test", "-e", "/work/ready").code == 0 })
	id := n.docker(t, "commit", "-a", "Me <me@example.org>", "-m", "why", "-c", `CMD ["cat", "/work/hard"]`, "-c", "ENV B=2 C=$A", "-c", "EXPOSE 80", src, image)
	if !strings.HasPrefix(id, "sha256:") || n.docker(t, "inspect", "-f", "{{.Id}}", image) != id {
		t.Errorf("commit gave %s", id)
	}
	n.expect(t, 0, "running", "inspect", "-f", "{{.State.Status}}", src)
	n.expect(t, 0, "one", "run", "--rm", image)
	var got struct {
		Author, Comment string
		Config          struct {
			Env, Cmd     []string
			WorkingDir   string
			Labels       map[string]string
			ExposedPorts map[string]struct{}
			Volumes      map[string]struct{}
		}
	}
	if err := json.Unmarshal([]byte(n.docker(t, "inspect", "-f", "{{json .}}", image)), &got); err != nil {
		t.Fatal(err)
	}
	env := strings.Join(got.Config.Env, " ")
	_, port := got.Config.ExposedPorts["80/tcp"]
	_, volume := got.Config.Volumes["/vol"]
	if got.Author != "Me <me@example.org>" || got.Comment != "why" || !strings.Contains(env, "A=1") || !strings.Contains(env, "B=2 C=1") || got.Config.WorkingDir != "/work" || got.Config.Labels["l"] != "1" || !port || !volume {
		t.Errorf("%+v", got)
	}
	n.expect(t, 0, "why", "history", "--format", "{{.Comment}}", image)
	check := `set -e; test "$(stat -c %a:%h /work/hard)" = 4755:2; test "$(stat -c %u:%g /work/dir)" = 7:8; test -p /work/fifo; test "$(readlink /work/sym)" = dir
		test ! -e /etc/group; test ! -e /vol/not; test ! -e /mem/not; test ! -e /.wh.x; echo fine`
	n.expect(t, 0, "fine", "run", "--rm", image, "sh", "-c", check)

	// A commit upon a commit; a directory that takes the place of another is opaque.
	second := n.name(t, "-second")
	n.docker(t, "run", "--name", second, image, "sh", "-c", "rm -r /old /work/dir && mkdir /work/dir && echo two >/work/dir/g && rm /work/sym && mkdir /work/sym")
	n.docker(t, "commit", second, "commit-test:v2")
	n.expect(t, 0, "g", "run", "--rm", "commit-test:v2", "sh", "-c", "ls /work/dir && test ! -e /old && test -d /work/sym && cat /work/hard")
	if a, b := n.docker(t, "inspect", "-f", "{{len .RootFS.Layers}}", testImage), n.docker(t, "inspect", "-f", "{{len .RootFS.Layers}}", "commit-test:v2"); len(a) != 1 || len(b) != 1 || b[0] != a[0]+2 {
		t.Errorf("%s layers upon %s", b, a)
	}

	// Nothing changed: no layer is added. Without a name the image is known by its id.
	idle := n.name(t, "-idle")
	n.docker(t, "create", "--name", idle, testImage, "true")
	n.docker(t, "commit", idle, "commit-test:empty")
	if a, b := n.docker(t, "inspect", "-f", "{{.RootFS.Layers}}", testImage), n.docker(t, "inspect", "-f", "{{.RootFS.Layers}}", "commit-test:empty"); a != b {
		t.Errorf("layers %s, the base's are %s", b, a)
	}
	nameless := n.docker(t, "commit", "-p=false", idle)
	n.docker(t, "run", "--rm", nameless)
	n.docker(t, "rmi", nameless)
	n.expect(t, 1, "from is not a valid change command", "commit", "-c", "FROM x", idle)
	n.expect(t, 1, "No such container: nothing-here", "commit", "nothing-here", "x:y")
	n.expect(t, 1, "must be lowercase", "commit", idle, "UPPER")
	// It goes where images go.
	n.docker(t, "save", "-o", filepath.Join(n.dir, "commit.tar"), image)
	n.docker(t, "rmi", "-f", image)
	n.docker(t, "load", "-i", filepath.Join(n.dir, "commit.tar"))
	n.expect(t, 0, "one", "run", "--rm", image)
}

// TestImport makes images of archives of files.
func TestImport(t *testing.T) {
	t.Parallel()
	n := shared(t)
	t.Cleanup(func() { n.run(nil, "rmi", "-f", "import-test:plain", "import-test:gz") })
	src := n.name(t, "-src")
	n.docker(t, "create", "--name", src, testImage, "true")
	archive := filepath.Join(n.dir, "import.tar")
	n.docker(t, "export", "-o", archive, src)
	id := n.docker(t, "import", "-m", "from a test", "-c", `ENTRYPOINT ["echo", "imported"]`, archive, "import-test:plain")
	if !strings.HasPrefix(id, "sha256:") {
		t.Errorf("import gave %s", id)
	}
	n.expect(t, 0, "imported\n", "run", "--rm", "import-test:plain")
	n.expect(t, 0, "from a test", "history", "--format", "{{.Comment}}", "import-test:plain")

	raw, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	_, _ = z.Write(raw)
	z.Close()
	if r := n.run(&packed, "import", "-", "import-test:gz"); r.code != 0 {
		t.Error(r)
	}
	if a, b := n.docker(t, "inspect", "-f", "{{.RootFS.Layers}}", "import-test:plain"), n.docker(t, "inspect", "-f", "{{.RootFS.Layers}}", "import-test:gz"); a != b {
		t.Errorf("the same files, compressed, are %s instead of %s", b, a)
	}
	n.expect(t, 0, "Imported from -", "history", "--format", "{{.Comment}}", "import-test:gz")
	for name, body := range map[string]string{"junk": "this is no archive", "nothing": ""} {
		if r := n.run(strings.NewReader(body), "import", "-", "import-test:bad"); r.code != 1 {
			t.Errorf("%s: %v", name, r)
		}
	}
	var hostile bytes.Buffer
	tw := tar.NewWriter(&hostile)
	_ = tw.WriteHeader(&tar.Header{Name: "../../escaped", Typeflag: tar.TypeReg, Size: 1, Mode: 0o644})
	_, _ = tw.Write([]byte("x"))
	tw.Close()
	n.run(&hostile, "import", "-", "import-test:bad")
	n.run(nil, "rmi", "-f", "import-test:bad")
	if _, err := os.Stat(filepath.Join(n.dir, "escaped")); err == nil {
		t.Error("a file outside of the layer")
	}
}

// TestLogin checks credentials against a registry, as docker login has it.
func TestLogin(t *testing.T) {
	t.Parallel()
	n := shared(t)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, pass, ok := r.BasicAuth(); !ok || user != "me" || pass != "right" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer s.Close()
	host, dir := strings.TrimPrefix(s.URL, "http://"), t.TempDir()
	login := func(password string) (string, error) {
		cmd := n.command(t.Context(), "login", "-u", "me", "--password-stdin", host)
		cmd.Env = append(cmd.Env, "DOCKER_CONFIG="+dir)
		cmd.Stdin = strings.NewReader(password)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := login("wrong"); err == nil || !strings.Contains(out, "401") && !strings.Contains(out, "unauthorized") {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := login("right"); err != nil || !strings.Contains(out, "Login Succeeded") {
		t.Errorf("%v: %s", err, out)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "config.json")); err != nil || !strings.Contains(string(b), host) {
		t.Errorf("config.json: %s %v", b, err)
	}
	s.Close()
	if out, err := login("right"); err == nil {
		t.Errorf("a registry that is not there: %s", out)
	}
}

// TestUntaggedImageOfARunningContainer is still an image: it is listed, and can be committed
// upon and be named again.
func TestUntaggedImageOfARunningContainer(t *testing.T) {
	t.Parallel()
	n := shared(t)
	base, c := "untag-test:v1", n.name(t, "")
	t.Cleanup(func() { n.run(nil, "rmi", "-f", base, "untag-test:v2") })
	src := n.name(t, "-src")
	n.docker(t, "create", "--name", src, "-e", "MADE=here", testImage, "true")
	id := n.docker(t, "commit", src, base)
	n.docker(t, "run", "-d", "--name", c, base, "sleep", "1000")
	n.expect(t, 0, "Untagged: "+base, "rmi", "-f", base)
	n.expect(t, 1, "No such image: "+base, "image", "inspect", base)
	n.expect(t, 0, id, "images", "-q", "--no-trunc", "--filter", "dangling=true")
	n.expect(t, 1, "is being used by running container", "rmi", "-f", id)
	n.docker(t, "commit", c, "untag-test:v2")
	n.docker(t, "tag", id, base)
	n.docker(t, "rm", "-f", c)
	n.expect(t, 0, "MADE=here", "run", "--rm", "untag-test:v2", "env")
}
