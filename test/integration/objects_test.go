package integration

import (
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
)

func TestCopy(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	n.docker(t, "run", "-d", "--name", name, testImage, "sleep", "1000")
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	if err := os.MkdirAll(filepath.Join(src, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for p, s := range map[string]string{"a": "A\n", "sub/b": "B\n"} {
		if err := os.WriteFile(filepath.Join(src, p), []byte(s), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	n.docker(t, "cp", src, name+":/tmp/copied")
	n.docker(t, "cp", src+"/.", name+":/tmp")
	if got := n.docker(t, "exec", name, "sh", "-c", "cat /tmp/copied/a /tmp/copied/sub/b /tmp/a; stat -c %a /tmp/a"); got != "A\nB\nA\n640" {
		t.Error(got)
	}
	n.docker(t, "exec", name, "sh", "-c", "mkdir /tmp/out; echo deep > /tmp/out/f; ln -s /etc/passwd /tmp/out/l 2>/dev/null || busybox ln -s /etc/passwd /tmp/out/l")
	n.docker(t, "cp", name+":/tmp/out", dir)
	if b, err := os.ReadFile(filepath.Join(dir, "out/f")); err != nil || string(b) != "deep\n" {
		t.Errorf("%q %v", b, err)
	}
	if l, err := os.Readlink(filepath.Join(dir, "out/l")); err != nil || l != "/etc/passwd" {
		t.Errorf("%q %v", l, err)
	}
	// A file, to and from a stopped container.
	n.docker(t, "stop", "-t", "0", name)
	n.docker(t, "cp", filepath.Join(src, "a"), name+":/home/renamed")
	n.docker(t, "cp", name+":/home/renamed", filepath.Join(dir, "back"))
	if b, err := os.ReadFile(filepath.Join(dir, "back")); err != nil || string(b) != "A\n" {
		t.Errorf("%q %v", b, err)
	}
	n.expect(t, 1, "Could not find the file /nope in container "+name, "cp", name+":/nope", dir)
	out := n.docker(t, "diff", name)
	for _, want := range []string{"C /home", "A /home/renamed", "C /tmp", "A /tmp/copied/sub/b"} {
		if !strings.Contains(out+"\n", want+"\n") {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	n.docker(t, "export", "-o", filepath.Join(dir, "export.tar"), name)
	if st, err := os.Stat(filepath.Join(dir, "export.tar")); err != nil || st.Size() < 1<<20 {
		t.Errorf("export: %v", err)
	}
}

func TestImages(t *testing.T) {
	n := own(t)
	dir := t.TempDir()
	n.docker(t, "tag", testImage, "example.org/a/b:v1")
	if got := n.docker(t, "images", "--format", "{{.Repository}}:{{.Tag}}"); !strings.Contains(got, "example.org/a/b:v1") || !strings.Contains(got, testImage) {
		t.Error(got)
	}
	id := n.docker(t, "images", "-q", "--no-trunc", testImage)
	if !strings.HasPrefix(id, "sha256:") || n.docker(t, "inspect", "--type", "image", "-f", "{{.Id}}", id[7:19]) != id {
		t.Error(id)
	}
	if got := n.docker(t, "image", "inspect", "-f", "{{.Os}} {{.Author}} {{len .RootFS.Layers}} {{.Config.WorkingDir}}", testImage); got != "linux hako 2 /home" {
		t.Error(got)
	}
	if got := n.docker(t, "history", "--no-trunc", "--format", "{{.CreatedBy}}", testImage); got != "ADD helper /bin\nADD busybox /" {
		t.Errorf("%q", got)
	}
	archive := filepath.Join(dir, "save.tar")
	n.docker(t, "save", "-o", archive, testImage, "example.org/a/b:v1")
	if got := n.docker(t, "rmi", "example.org/a/b:v1"); got != "Untagged: example.org/a/b:v1" {
		t.Error(got)
	}
	name := n.name(t, "")
	n.docker(t, "create", "--name", name, testImage)
	n.expect(t, 1, "conflict", "rmi", testImage)
	n.docker(t, "rm", name)
	if got := n.docker(t, "rmi", testImage); !strings.Contains(got, "Untagged: "+testImage) || !strings.Contains(got, "Deleted: "+id) {
		t.Error(got)
	}
	n.expect(t, 1, "No such image: "+testImage, "rmi", testImage)
	n.expect(t, 125, "", "run", "--pull", "never", testImage)
	if got := n.docker(t, "images", "-q"); got != "" {
		t.Errorf("left: %q", got)
	}
	if got := n.docker(t, "load", "-i", archive); !strings.Contains(got, "Loaded image: "+testImage) || !strings.Contains(got, "Loaded image: example.org/a/b:v1") {
		t.Error(got)
	}
	if got := n.docker(t, "images", "-q", "--no-trunc", testImage); got != id {
		t.Errorf("%s came back as %s", id, got)
	}
	if got := n.docker(t, "run", "--rm", "example.org/a/b:v1"); got != "default command" {
		t.Error(got)
	}
	n.docker(t, "rmi", "-f", id)
	if got := n.docker(t, "image", "prune", "-af"); !strings.Contains(got, "Total reclaimed space") {
		t.Error(got)
	}
}

// registryFor serves an empty registry on loopback and tells the daemon that it speaks plain HTTP.
func (n *node) registryFor(t *testing.T) string {
	t.Helper()
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	host := strings.TrimPrefix(srv.URL, "http://")
	dir := filepath.Join(n.dir, "certs.d", host)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	hosts := "server = \"" + srv.URL + "\"\n[host.\"" + srv.URL + "\"]\n  capabilities = [\"pull\", \"resolve\", \"push\"]\n"
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(hosts), 0o600); err != nil {
		t.Fatal(err)
	}
	return host
}

func TestPullAndPush(t *testing.T) {
	n := own(t)
	host := n.registryFor(t)
	ref := host + "/team/app:v1"
	n.docker(t, "tag", testImage, ref)
	out := n.docker(t, "push", ref)
	if !strings.Contains(out, "v1: digest: sha256:") || !strings.Contains(out, "Pushed") {
		t.Error(out)
	}
	if out := n.docker(t, "push", ref); !strings.Contains(out, "Layer already exists") {
		t.Error(out)
	}
	id := n.docker(t, "images", "-q", "--no-trunc", ref)
	n.docker(t, "rmi", ref, testImage)
	out = n.docker(t, "pull", ref)
	if !strings.Contains(out, "Pull complete") && !strings.Contains(out, "Already exists") { // not collected yet
		t.Error(out)
	}
	for _, want := range []string{"v1: Pulling from team/app", "Digest: sha256:", "Status: Downloaded newer image for " + ref} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if got := n.docker(t, "images", "-q", "--no-trunc", ref); got != id {
		t.Errorf("%s came back as %s", id, got)
	}
	if out := n.docker(t, "pull", ref); !strings.Contains(out, "Status: Image is up to date for "+ref) {
		t.Error(out)
	}
	digest := n.docker(t, "inspect", "-f", "{{index .RepoDigests 0}}", ref)
	n.docker(t, "rmi", ref)
	n.docker(t, "pull", "-q", digest)
	// run pulls what is missing.
	n.docker(t, "rmi", "-f", id)
	r := n.run(nil, "run", "--rm", ref)
	if r.out != "default command\n" || !strings.Contains(r.stderr, "Unable to find image '"+ref+"' locally") {
		t.Error(r)
	}
	n.expect(t, 1, "not found", "pull", host+"/team/app:nope")
	n.expect(t, 1, "not found", "pull", host+"/nobody/nothing:v1")
	n.expect(t, 125, "", "run", "--rm", host+"/nobody/nothing:v1")
	n.expect(t, 1, "", "push", host+"/team/not-here:v1")
}

func TestVolumes(t *testing.T) {
	t.Parallel()
	n := shared(t)
	vol := strings.ToLower(t.Name()) + "-vol"
	if got := n.docker(t, "volume", "create", "--label", "x=y", vol); got != vol {
		t.Error(got)
	}
	t.Cleanup(func() { n.run(nil, "volume", "rm", "-f", vol) })
	// What the image has at the mount point is copied into an empty volume, with owner and mode.
	if got := n.docker(t, "run", "--rm", "-v", vol+":/data", testImage, "sh", "-c", "cat /data/seed; stat -c '%u %a' /data /data/seed; echo kept > /data/new"); got != "from the image\n1000 750\n1000 640" {
		t.Errorf("%q", got)
	}
	if got := n.docker(t, "run", "--rm", "-v", vol+":/elsewhere:ro", testImage, "cat", "/elsewhere/new"); got != "kept" {
		t.Error(got)
	}
	if got := n.docker(t, "run", "--rm", "-v", vol+"2:/data:nocopy", testImage, "ls", "/data"); got != "" {
		t.Error(got)
	}
	n.docker(t, "volume", "rm", vol+"2")
	name := n.name(t, "")
	n.docker(t, "create", "--name", name, "-v", vol+":/v", testImage)
	n.expect(t, 1, "volume is in use", "volume", "rm", vol)
	if got := n.docker(t, "ps", "-aq", "--filter", "volume="+vol); len(got) != 12 {
		t.Error(got)
	}
	other := n.name(t, "-from")
	if got := n.docker(t, "run", "--name", other, "--volumes-from", name, testImage, "cat", "/v/new"); got != "kept" {
		t.Error(got)
	}
	n.docker(t, "rm", other, name)
	if got := n.docker(t, "volume", "ls", "-q", "--filter", "label=x=y"); got != vol {
		t.Error(got)
	}
	mountpoint := n.docker(t, "volume", "inspect", "-f", "{{.Mountpoint}}", vol)
	if b, err := os.ReadFile(filepath.Join(mountpoint, "new")); err != nil || string(b) != "kept\n" {
		t.Errorf("%q %v", b, err)
	}
	n.docker(t, "volume", "rm", vol)
	n.expect(t, 1, "no such volume", "volume", "inspect", vol)
	// An anonymous volume goes with rm -v.
	anon := n.name(t, "-anon")
	n.docker(t, "create", "--name", anon, "-v", "/a", testImage)
	v := n.docker(t, "inspect", "-f", "{{(index .Mounts 0).Name}}", anon)
	n.docker(t, "rm", "-v", anon)
	n.expect(t, 1, "no such volume", "volume", "inspect", v)
}

func TestNetworks(t *testing.T) {
	t.Parallel()
	n := shared(t)
	net := strings.ToLower(t.Name()) + "-net"
	id := n.docker(t, "network", "create", "--label", "x=y", net)
	t.Cleanup(func() { n.run(nil, "network", "rm", net) })
	if len(id) != 64 {
		t.Error(id)
	}
	server, client := n.name(t, "-server"), n.name(t, "-client")
	n.docker(t, "run", "-d", "--name", server, "--network", net, "--network-alias", "web", testImage, "helper", "serve", "80", "by name")
	for _, host := range []string{server, "web", n.docker(t, "inspect", "-f", "{{slice .Id 0 12}}", server)} {
		eventually(t, "an answer from "+host, func() bool {
			return n.run(nil, "run", "--rm", "--network", net, testImage, "wget", "-q", "-O-", "http://"+host+"/").out == "by name"
		})
	}
	n.docker(t, "run", "-d", "--name", client, testImage, "sleep", "1000")
	if r := n.run(nil, "exec", client, "wget", "-q", "-O-", "http://"+server+"/"); r.code == 0 {
		t.Errorf("reached from another network: %v", r)
	}
	n.docker(t, "network", "connect", "--alias", "late", net, client)
	eventually(t, "an answer after connect", func() bool {
		return n.run(nil, "exec", client, "wget", "-q", "-O-", "http://"+server+"/").out == "by name"
	})
	if got := n.docker(t, "network", "inspect", "-f", "{{range .Containers}}{{.Name}} {{end}}", net); !strings.Contains(got, server) || !strings.Contains(got, client) {
		t.Error(got)
	}
	if got := n.docker(t, "inspect", "-f", "{{len .NetworkSettings.Networks}}", client); got != "2" {
		t.Error(got)
	}
	n.expect(t, 1, "has active endpoints", "network", "rm", net)
	n.docker(t, "network", "disconnect", net, client)
	if got := n.docker(t, "exec", client, "ls", "/sys/class/net"); got != "eth0\nlo" {
		t.Error(got)
	}
	// The namespace of another container.
	if got := n.docker(t, "run", "--rm", "--network", "container:"+server, testImage, "wget", "-q", "-O-", "http://127.0.0.1/"); got != "by name" {
		t.Error(got)
	}
	n.docker(t, "rm", "-f", server, client)
	if got := n.docker(t, "network", "ls", "-q", "--no-trunc", "--filter", "label=x=y"); got != id {
		t.Error(got)
	}
	n.docker(t, "network", "rm", net)
	n.expect(t, 1, "not found", "network", "inspect", net)
	n.expect(t, 1, "", "network", "rm", "bridge")
	n.expect(t, 125, "network nope-"+net+" not found", "run", "--rm", "--network", "nope-"+net, testImage)
}

func TestPrune(t *testing.T) {
	n := own(t)
	n.docker(t, "run", "--name", "gone", "-v", "/anon", testImage, "true")
	n.docker(t, "run", "-d", "--name", "stays", testImage, "sleep", "1000")
	n.docker(t, "network", "create", "unused")
	out := n.docker(t, "system", "prune", "-af", "--volumes")
	for _, want := range []string{"Deleted Containers:", "Deleted Networks:\nunused", "Total reclaimed space:"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if got := n.docker(t, "ps", "-a", "--format", "{{.Names}}"); got != "stays" {
		t.Error(got)
	}
	if got := n.docker(t, "images", "--format", "{{.Repository}}"); got != "hako-test" {
		t.Error(got)
	}
	if got := n.docker(t, "system", "df", "--format", "{{.Type}} {{.TotalCount}}"); !strings.Contains(got, "Containers 1") || !strings.Contains(got, "Images 1") {
		t.Error(got)
	}
}

func TestSystem(t *testing.T) {
	t.Parallel()
	n := shared(t)
	for _, args := range [][]string{
		{"version"}, {"info"}, {"version", "-f", "{{json .}}"}, {"info", "-f", "{{json .}}"}, {"system", "df", "-v"},
		{"ps", "-a"}, {"images", "-a", "--digests"}, {"network", "ls"}, {"volume", "ls"}, {"system", "info", "-f", "{{.Driver}} {{.CgroupVersion}} {{.SecurityOptions}}"},
	} {
		r := n.run(nil, args...)
		if r.code != 0 || strings.Contains(r.stderr, "ERROR") {
			t.Error(r)
		}
	}
	n.expect(t, 1, "not a swarm manager", "node", "ls")
}
