package imagetools

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/internal/execfile"
)

// TestSkopeoUnderstands has skopeo read what hako writes, and hako what skopeo writes.
func TestSkopeoUnderstands(t *testing.T) {
	t.Parallel()
	needs(t, "skopeo", "docker-registry")
	u, reg, dir := newUser(t), registry(t), t.TempDir()
	src, top := layoutImage(t, 200_000)
	raw := func(ref string) digest.Digest {
		t.Helper()
		out, errs, err := u.try("", "skopeo", "inspect", "--tls-verify=false", "--raw", ref)
		if err != nil {
			t.Fatalf("skopeo inspect %s: %v %s", ref, err, errs)
		}
		return digest.FromString(out)
	}
	for _, to := range []string{"docker://" + reg + "/a/app:1", "oci:" + dir + "/l:v1", "dir:" + dir + "/d", "oci-archive:" + dir + "/a.tar:v1"} {
		if got := u.run("hako", "image", "copy", "oci:"+src+":v1", to); got != top.String() {
			t.Errorf("%s: %s", to, got)
		}
		if got := raw(to); got != top {
			t.Errorf("skopeo reads %s from %s, not %s", got, to, top)
		}
	}
	u.run("hako", "image", "copy", "--platform", "linux/amd64", "oci:"+src+":v1", "docker-archive:"+dir+"/docker.tar:example.com/app:1")
	u.run("skopeo", "copy", "docker-archive:"+dir+"/docker.tar:example.com/app:1", "dir:"+dir+"/from-docker")
	// All bytes, not only documents.
	u.run("skopeo", "copy", "--all", "--src-tls-verify=false", "docker://"+reg+"/a/app:1", "oci:"+dir+"/by-skopeo:v1")
	u.run("skopeo", "copy", "--all", "oci:"+dir+"/l:v1", "dir:"+dir+"/dir-by-skopeo")
	u.run("skopeo", "copy", "--all", "--dest-tls-verify=false", "dir:"+dir+"/d", "docker://"+reg+"/b/app:1")
	for _, from := range []string{"oci:" + dir + "/by-skopeo:v1", "dir:" + dir + "/dir-by-skopeo", "docker://" + reg + "/b/app:1"} {
		if got := u.run("hako", "image", "copy", from, "oci:"+dir+"/back:"+fmt.Sprint(len(from))); got != top.String() {
			t.Errorf("%s: %s", from, got)
		}
	}
	u.run("skopeo", "copy", "oci:"+src+":v1", "docker-archive:"+dir+"/by-skopeo.tar:x:1", "--override-arch", "amd64")
	u.run("hako", "image", "copy", "docker-archive:"+dir+"/by-skopeo.tar", "oci:"+dir+"/fourth:v1")
	if out := u.run("hako", "image", "diff", "--platform", "linux/amd64", "oci:"+src+":v1", "oci:"+dir+"/fourth:v1"); strings.Contains(out, "Files:") {
		t.Errorf("other files than skopeo: %s", out)
	}
	for _, tags := range []string{u.run("hako", "image", "list-tags", reg+"/a/app"), strings.Join(strings.Fields(u.run("skopeo", "list-tags", "--tls-verify=false", "docker://"+reg+"/a/app")), "")} {
		if tags != "1" && !strings.Contains(tags, `"Tags":["1"]`) {
			t.Errorf("tags: %s", tags)
		}
	}
	if out := u.run("hako", "image", "inspect", "--format", "{{.digest}} {{len .platforms}} {{(index .image.layers 0).size}}", "docker://"+reg+"/a/app:1"); !strings.HasPrefix(out, top.String()+" 2 20") {
		t.Error(out)
	}
	if out := u.run("hako", "image", "inspect", "--raw", "docker://"+reg+"/a/app:1"); digest.FromString(out) != top {
		t.Error(out)
	}
	if out := u.run("hako", "image", "inspect", "--config", "--platform", "linux/arm64", "docker://"+reg+"/a/app:1"); !strings.Contains(out, `"architecture":"arm64"`) {
		t.Error(out)
	}
	if out := u.run("hako", "image", "inspect", "docker://"+reg+"/a/app:1"); !strings.Contains(out, "PLATFORM") || !strings.Contains(out, `["/run"]`) {
		t.Error(out)
	}
	u.run("hako", "image", "convert", "--to", "zstd", "--digest-file", dir+"/digest", "docker://"+reg+"/a/app:1", "docker://"+reg+"/a/app:zstd")
	if b, err := os.ReadFile(dir + "/digest"); err != nil || strings.TrimSpace(string(b)) != u.run("hako", "image", "inspect", "--format", "{{.digest}}", "docker://"+reg+"/a/app:zstd") {
		t.Errorf("digest file: %q %v", b, err)
	}
	u.run("skopeo", "copy", "--all", "--src-tls-verify=false", "docker://"+reg+"/a/app:zstd", "dir:"+dir+"/zstd")
	u.run("hako", "image", "delete", "-f", reg+"/b/app:1")
	u.fails("not found", "hako", "image", "inspect", "docker://"+reg+"/b/app:1")
	file := filepath.Join(dir, "sync.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, "destination: docker://%s/mirror\nregistries:\n  %q: {repositories: {a/app: {}}}\n", reg, reg), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := u.run("hako", "image", "sync", "--dry-run", file); !strings.Contains(out, "2 to copy, 0 up to date, 0 failed") {
		t.Error(out)
	}
	if out := u.run("hako", "image", "sync", file); !strings.Contains(out, "2 copied") {
		t.Error(out)
	}
	if out := u.run("hako", "image", "sync", file); !strings.Contains(out, "0 copied, 2 up to date") {
		t.Error(out)
	}
}

// TestKilled kills copies in their middle; the last one finishes what they began.
func TestKilled(t *testing.T) {
	t.Parallel()
	needs(t, "docker-registry")
	u, reg, dir := newUser(t), registry(t), t.TempDir()
	src, top := layoutImage(t, 10_000_000)
	for _, to := range []string{"docker://" + reg + "/app:1", "oci:" + dir + "/l:v1", "oci-archive:" + dir + "/a.tar"} {
		for _, wait := range []time.Duration{20, 60, 120} {
			cmd := exec.Command(filepath.Join(workDir, "hako"), "image", "copy", "oci:"+src+":v1", to)
			cmd.Env = u.env
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(wait * time.Millisecond)
			_ = cmd.Process.Signal(syscall.SIGKILL)
			_ = cmd.Wait()
		}
		if got := u.run("hako", "image", "copy", "-q", "oci:"+src+":v1", to); got != top.String() {
			t.Errorf("%s: %s", to, got)
		}
		if got := u.run("hako", "image", "copy", "-q", to, "oci:"+dir+"/check:"+fmt.Sprint(len(to))); got != top.String() {
			t.Errorf("%s: %s", to, got)
		}
	}
}

// TestDaemon copies to and from a daemon, and mounts.
func TestDaemon(t *testing.T) {
	t.Parallel()
	needs(t, "root", "docker-registry")
	u, reg, dir := newUser(t), registry(t), t.TempDir()
	u.env = append(u.env, "HAKO_HOST="+hakod(t, ""))
	src, top := layoutImage(t, 200_000)
	name := reg + "/team/app:1"
	if got := u.run("hako", "image", "copy", "oci:"+src+":v1", "local:"+name); got != top.String() {
		t.Errorf("to the daemon: %s", got)
	}
	if out := u.run("hako", "images", "--digests"); !strings.Contains(out, top.String()) {
		t.Error(out)
	}
	for _, to := range []string{"docker://" + name, "oci:" + dir + "/l:v1"} {
		if got := u.run("hako", "image", "copy", name, to); got != top.String() {
			t.Errorf("to %s: %s", to, got)
		}
	}
	if out := u.run("hako", "image", "inspect", "--format", "{{.Id}}", name); !strings.HasPrefix(out, "sha256:") {
		t.Errorf("docker's form: %s", out)
	}
	if out := u.run("hako", "image", "inspect", "--format", "{{.digest}}", "local:"+name); out != top.String() {
		t.Error(out)
	}
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Unmount(mnt, syscall.MNT_DETACH) }()
	u.fails("not unpacked", "hako", "image", "mount", name, mnt)
	// Through Docker's API alone.
	old := *u
	old.env = append(old.env, "HAKO_CONTAINERD_SOCKET=/nowhere.sock")
	if got := old.run("hako", "image", "copy", "--platform", "linux/amd64", "docker://"+name, "local:by-load:1"); got == "" {
		t.Error("no digest")
	}
	if got := old.run("hako", "image", "copy", "local:"+name, "oci:"+dir+"/saved:v1"); got != top.String() {
		t.Errorf("by docker save: %s", got)
	}

	u.run("hako", "pull", name)
	u.run("hako", "image", "mount", name, mnt)
	if b, err := os.ReadFile(filepath.Join(mnt, "etc/arch")); err != nil || len(b) == 0 {
		t.Errorf("%q %v", b, err)
	}
	if err := os.WriteFile(filepath.Join(mnt, "etc/arch"), nil, 0o644); err == nil {
		t.Error("the mount is writable")
	}
	if out := u.run("hako", "image", "mount"); !strings.Contains(out, mnt) {
		t.Error(out)
	}
	u.fails("not empty", "hako", "image", "mount", name, mnt)
	u.fails("no image is mounted", "hako", "image", "unmount", dir)
	// Something else on top of it is left alone.
	if err := syscall.Mount("tmpfs", mnt, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	u.fails("something else", "hako", "image", "unmount", mnt)
	if err := syscall.Unmount(mnt, 0); err != nil {
		t.Fatal(err)
	}
	u.run("hako", "image", "unmount", mnt)
	if left, err := os.ReadDir(mnt); err != nil || len(left) != 0 {
		t.Errorf("%v %v", left, err)
	}
	u.fails("no image is mounted", "hako", "image", "unmount", mnt)
	link := filepath.Join(dir, "link")
	if err := os.Symlink(mnt, link); err != nil {
		t.Fatal(err)
	}
	if _, _, err := u.try("", "hako", "image", "mount", name, link); err == nil {
		t.Error("mounted through a link")
	}
}

// sign makes a signature of cosign's older form in a layout, and gives that.
func sign(t *testing.T, key *ecdsa.PrivateKey, image digest.Digest) string {
	t.Helper()
	payload := fmt.Appendf(nil, `{"critical":{"identity":{"docker-reference":""},"image":{"docker-manifest-digest":%q},"type":"cosign container image signature"},"optional":null}`, image)
	sum := sha256.Sum256(payload)
	sig, err := key.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	add := func(mt string, raw []byte) ocispec.Descriptor {
		d := digest.FromBytes(raw)
		if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", d.Encoded()), raw, 0o644); err != nil {
			t.Fatal(err)
		}
		return ocispec.Descriptor{MediaType: mt, Digest: d, Size: int64(len(raw))}
	}
	l := add("application/vnd.dev.cosign.simplesigning.v1+json", payload)
	l.Annotations = map[string]string{"dev.cosignproject.cosign/signature": base64.StdEncoding.EncodeToString(sig)}
	raw, err := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: add(ocispec.MediaTypeImageConfig, []byte("{}")), Layers: []ocispec.Descriptor{l}})
	if err != nil {
		t.Fatal(err)
	}
	top := add(ocispec.MediaTypeImageManifest, raw)
	idx, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{top}})
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "index.json": idx} {
		if err := os.WriteFile(filepath.Join(dir, name), raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return "oci:" + dir
}

// TestPullPolicy has a daemon refuse what is not signed, however it is asked.
func TestPullPolicy(t *testing.T) {
	t.Parallel()
	needs(t, "root", "docker-registry")
	u, reg, dir := newUser(t), registry(t), t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	pub := filepath.Join(dir, "cosign.pub")
	if err := os.WriteFile(pub, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf("[verify.%q]\npolicy = \"require\"\nkeys = [%q]\n[verify.%q]\npolicy = \"accept\"\n", reg+"/team", pub, reg+"/team/open")
	host, reload := reloadable(t, config)
	u.env = append(u.env, "HAKO_HOST="+host)
	src, top := layoutImage(t, 20_000)
	other, _ := layoutImage(t, 30_000)
	good, bad := "docker://"+reg+"/team/app", "docker://"+reg+"/team/bad"
	for from, to := range map[string]string{src: good + ":1", other: bad + ":1"} {
		u.run("hako", "image", "copy", "oci:"+from+":v1", to)
	}
	u.run("hako", "image", "copy", "oci:"+other+":v1", "docker://"+reg+"/team/open/x:1")
	u.run("hako", "image", "copy", "oci:"+other+":v1", "docker://"+reg+"/other/x:1")
	app := reg + "/team/app"
	u.fails("no signature", "hako", "pull", app+":1")
	u.fails("no signature", "hako", "image", "verify", "--key", pub, app+":1")
	signature := sign(t, key, top)
	tag := strings.Replace(top.String(), ":", "-", 1) + ".sig"
	u.run("hako", "image", "copy", signature, good+":"+tag)
	if out := u.run("hako", "image", "verify", "--key", pub, app+":1"); out != top.String() {
		t.Errorf("verify: %s", out)
	}
	file := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := u.run("hako", "image", "verify", "--policy", file, "--format", "{{.digest}} {{(index .signatures 0).key}}", app+":1"); out != top.String()+" "+pub {
		t.Errorf("verify by policy: %s", out)
	}
	u.run("hako", "pull", app+":1")
	u.run("hako", "pull", app+"@"+top.String())
	u.run("hako", "pull", reg+"/team/open/x:1")
	u.run("hako", "pull", reg+"/other/x:1")

	// Ways around it.
	raw := u.run("hako", "image", "inspect", "--raw", good+":1")
	var idx ocispec.Index
	if err := json.Unmarshal([]byte(raw), &idx); err != nil {
		t.Fatal(err)
	}
	u.fails("no signature", "hako", "pull", app+"@"+idx.Manifests[0].Digest.String()) // part of what is signed, and not signed itself
	u.run("hako", "image", "copy", signature, bad+":"+tag)                            // a signature of another image
	u.fails("is refused", "hako", "pull", reg+"/team/bad:1")
	otherTop := u.run("hako", "image", "inspect", "--format", "{{.digest}}", bad+":1")
	u.run("hako", "image", "copy", signature, bad+":"+strings.Replace(otherTop, ":", "-", 1)+".sig")
	u.fails("another image", "hako", "pull", reg+"/team/bad:1")
	u.fails("is refused", "hako", "pull", reg+"/team/bad@"+otherTop)
	u.fails("is refused", "hako", "run", "--rm", "--pull", "always", reg+"/team/bad:1", "/run")
	// The image is here by another name already.
	u.fails("is refused", "hako", "pull", reg+"/team/bad:1")
	// The tag moves to what is not signed.
	u.run("hako", "image", "copy", "oci:"+other+":v1", good+":1")
	u.fails("is refused", "hako", "pull", app+":1")
	if out := u.run("hako", "images", "--digests", app); strings.Contains(out, otherTop) {
		t.Errorf("it has the name: %s", out)
	}
	// The kubelet reads the beginning of the text.
	conn, err := grpc.NewClient("unix://"+strings.Replace(strings.TrimPrefix(u.env[len(u.env)-1], "HAKO_HOST=unix://"), "docker.sock", "cri.sock", 1), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	_, err = cri.NewImageServiceClient(conn).PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: reg + "/team/bad:1"}})
	if s, _ := status.FromError(err); !strings.HasPrefix(s.Message(), "SignatureValidationFailed") {
		t.Errorf("CRI: %v", err)
	}
	// A client that fetches blobs itself, and then names what it has.
	u.fails("is refused", "hako", "image", "copy", bad+":1", "local:"+reg+"/team/bad:1")
	u.run("hako", "image", "copy", bad+":1", "local:example.com/free:1")
	if ctr, err := exec.LookPath("ctr"); err == nil {
		sock := strings.Replace(strings.TrimPrefix(u.env[len(u.env)-1], "HAKO_HOST=unix://"), "docker.sock", "containerd.sock", 1)
		u.fails("is refused", ctr, "-a", sock, "-n", "k8s.io", "image", "pull", "--plain-http", reg+"/team/bad:1")
		u.fails("is refused", ctr, "-a", sock, "-n", "k8s.io", "image", "tag", "example.com/free:1", reg+"/team/bad:1")
	}
	// What did not come from the registry: tagged, loaded, committed, imported.
	u.fails("the name "+reg+"/team/bad for an image", "hako", "tag", "example.com/free:1", reg+"/team/bad:1")
	u.run("hako", "image", "copy", "oci:"+other+":v1", "docker-archive:"+filepath.Join(dir, "bad.tar")+":"+reg+"/team/bad:1")
	u.fails("is refused", "hako", "load", "-i", filepath.Join(dir, "bad.tar"))
	u.run("hako", "create", "--name", "made", reg+"/other/x:1", "/run")
	u.fails("is refused", "hako", "commit", "made", reg+"/team/bad:1")
	if out := u.run("hako", "images", "-q", reg+"/team/bad"); out != "" {
		t.Errorf("it has the name: %s", out)
	}
	u.run("hako", "tag", app+"@"+top.String(), app+":again") // what the repository gave already
	// The rules change while the daemon runs.
	reload(config + "[verify.'example.com']\npolicy = 'reject'\n")
	u.fails("is refused", "hako", "tag", reg+"/other/x:1", "example.com/new:1")
	reload(strings.Replace(config, "keys", "local = 'accept'\nkeys", 1))
	u.run("hako", "commit", "made", reg+"/team/bad:1")
	u.fails("is refused", "hako", "pull", reg+"/team/bad:1")
	reload("")
	u.run("hako", "pull", reg+"/team/bad:1")
}

// TestLogin keeps credentials where docker does, and uses them.
func TestLogin(t *testing.T) {
	t.Parallel()
	needs(t, "docker-registry")
	u, inner, dir := newUser(t), registry(t), t.TempDir()
	target, err := url.Parse("http://" + inner)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target); r.Out.Host = r.In.Host }}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, pass, ok := r.BasicAuth(); !ok || user != "me" || pass != "pass:word" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	defer s.Close()
	reg := strings.TrimPrefix(s.URL, "http://")
	conf := filepath.Join(dir, "docker")
	u.env = append(u.env, "DOCKER_CONFIG="+conf)
	src, top := layoutImage(t, 1000)
	to := "docker://" + reg + "/app:1"
	u.fails("denied", "hako", "image", "copy", "oci:"+src+":v1", to)
	if _, errs, err := u.try("wrong\n", "hako", "login", "-u", "me", "--password-stdin", reg); err == nil || strings.Contains(errs, "wrong") {
		t.Errorf("a wrong password: %v %s", err, errs)
	}
	if _, err := os.Stat(filepath.Join(conf, "config.json")); err == nil {
		t.Error("a wrong password was kept")
	}
	if err := os.MkdirAll(conf, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(conf, "config.json"), []byte(`{"psFormat":"x","auths":{"other.example":{"auth":"YTpi"}}}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, errs, err := u.try("pass:word\n", "hako", "login", "-u", "me", "--password-stdin", reg); err != nil || !strings.Contains(out, "Login succeeded") {
		t.Fatalf("%v %s %s", err, out, errs)
	}
	b, err := os.ReadFile(filepath.Join(conf, "config.json"))
	if err != nil || !bytes.Contains(b, []byte("psFormat")) || !bytes.Contains(b, []byte("other.example")) {
		t.Errorf("config.json: %s %v", b, err)
	}
	if st, err := os.Stat(filepath.Join(conf, "config.json")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	if got := u.run("hako", "image", "copy", "oci:"+src+":v1", to); got != top.String() {
		t.Error(got)
	}
	u.fails("", "hako", "image", "inspect", "--no-creds", to)
	u.run("hako", "image", "inspect", "--creds", "me:pass:word", to)
	if out := u.run("hako", "logout", reg); !strings.Contains(out, "Removed") {
		t.Error(out)
	}
	u.fails("", "hako", "image", "inspect", to)
	if out := u.run("hako", "logout", reg); !strings.Contains(out, "Not logged in") {
		t.Error(out)
	}

	// With a credential helper nothing is in the file.
	helper := filepath.Join(dir, "docker-credential-hakotest")
	script := "#!/bin/sh\nf=" + dir + "/kept\ncase $1 in\nstore) cat >$f;;\nget) read h; [ -f $f ] || { echo 'credentials not found in native keychain'; exit 1; }; cat $f;;\nerase) rm -f $f;;\nesac\n"
	if err := execfile.Write(helper, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(conf, "config.json"), fmt.Appendf(nil, `{"credHelpers":{%q:"hakotest"}}`, reg), 0o600); err != nil {
		t.Fatal(err)
	}
	u.env = append(u.env, "PATH="+dir+":"+os.Getenv("PATH"))
	if _, errs, err := u.try("pass:word", "hako", "login", "-u", "me", "--password-stdin", reg); err != nil || !strings.Contains(errs, "docker-credential-hakotest") {
		t.Fatal(err, errs)
	}
	if b, _ := os.ReadFile(filepath.Join(conf, "config.json")); bytes.Contains(b, []byte("auth\"")) {
		t.Errorf("config.json: %s", b)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "kept")); !bytes.Contains(b, []byte("pass:word")) {
		t.Errorf("helper: %s", b)
	}
	u.run("hako", "image", "inspect", to)
	u.run("hako", "logout", reg)
	if _, err := os.Stat(filepath.Join(dir, "kept")); err == nil {
		t.Error("the helper still has it")
	}
}
