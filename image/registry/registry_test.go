package registry

import (
	"context"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/internal/execfile"
)

const manifestBody = `{"schemaVersion":2}`

// one serves one manifest and counts requests.
func one(n *atomic.Int32) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n.Add(1)
		if !strings.Contains(r.URL.Path, "/manifests/") {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest+"; charset=utf-8")
		_, _ = io.WriteString(w, manifestBody)
	})
}

func name(t *testing.T, s string) reference.Named {
	t.Helper()
	n, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func quick(t *testing.T, dir string) *Client {
	t.Helper()
	return New(Options{Dir: dir, Timeout: time.Second, Backoff: time.Millisecond, Attempts: 3, DockerConfig: t.TempDir()})
}

// hostsToml writes HOST/hosts.toml, and gives the certs.d folder.
func hostsToml(t *testing.T, host, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, host), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestMirrors(t *testing.T) {
	t.Parallel()
	var first, second, upstream atomic.Int32
	asked := ""
	m1 := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		first.Add(1)
		asked = r.URL.Query().Get("ns")
		w.WriteHeader(http.StatusNotFound)
	}))
	defer m1.Close()
	m2 := httptest.NewServer(one(&second))
	defer m2.Close()
	up := httptest.NewServer(one(&upstream))
	defer up.Close()
	dir := hostsToml(t, "registry.example", fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", up.URL, m1.URL, m2.URL))
	repo, err := quick(t, dir).Repository(name(t, "registry.example/app"), Credentials{})
	if err != nil {
		t.Fatal(err)
	}
	desc, body, err := repo.Manifest(context.Background(), "v1")
	if err != nil || string(body) != manifestBody || desc.MediaType != ocispec.MediaTypeImageManifest || desc.Digest != digest.FromString(manifestBody) {
		t.Fatalf("%+v %q %v", desc, body, err)
	}
	if first.Load() == 0 || second.Load() == 0 || upstream.Load() != 0 || asked != "registry.example" {
		t.Errorf("asked: %d %d %d, ns=%q", first.Load(), second.Load(), upstream.Load(), asked)
	}
	// A mirror that may not resolve is not asked for a tag.
	second.Store(0)
	dir = hostsToml(t, "registry.example", fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", up.URL, m2.URL))
	if repo, err = quick(t, dir).Repository(name(t, "registry.example/app"), Credentials{}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := repo.Manifest(context.Background(), "v1"); err != nil || second.Load() != 0 || upstream.Load() != 1 {
		t.Errorf("tag: %v, mirror asked %d times, registry %d", err, second.Load(), upstream.Load())
	}
	if _, _, err := repo.Manifest(context.Background(), digest.FromString(manifestBody).String()); err != nil || second.Load() != 1 {
		t.Errorf("digest: %v, mirror asked %d times", err, second.Load())
	}
}

func TestBadHostsFile(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"not toml at all", "server = 5", "host = \"x\"", "[host"} {
		_, err := quick(t, hostsToml(t, "registry.example", text)).Repository(name(t, "registry.example/app"), Credentials{})
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestTLS trusts a registry by the authority that hosts.toml names.
func TestTLS(t *testing.T) {
	t.Parallel()
	var n atomic.Int32
	s := httptest.NewTLSServer(one(&n))
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "https://")
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	for text, ok := range map[string]bool{
		fmt.Sprintf("server = %q\n[host.%q]\nca = %q\n", s.URL, s.URL, ca):            true,
		fmt.Sprintf("server = %q\n[host.%q]\nskip_verify = true\n", s.URL, s.URL):     true,
		fmt.Sprintf("server = %q\n[host.%q]\nskip_verify = false\n", s.URL, s.URL):    false,
		fmt.Sprintf("server = %q\n[host.%q]\nca = \"/no/such/file\"\n", s.URL, s.URL): false,
	} {
		repo, err := quick(t, hostsToml(t, host, text)).Repository(name(t, host+"/app"), Credentials{})
		if err == nil {
			_, _, err = repo.Manifest(context.Background(), "v1")
		}
		if ok != (err == nil) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestGuard refuses to send a password in the clear to another machine.
func TestGuard(t *testing.T) {
	t.Parallel()
	g := &guard{plain: map[string]bool{"insecure.example": true}}
	for _, c := range []struct {
		url, header string
		ok          bool
	}{
		{"http://registry.example/v2/", "Basic x", false},
		{"https://registry.example/v2/", "Basic x", true},
		{"http://registry.example/v2/", "", true},
		{"http://insecure.example/v2/", "Basic x", true},
		{"http://127.0.0.1:5000/v2/", "Basic x", true},
	} {
		req := httptest.NewRequest(http.MethodGet, c.url, nil)
		if c.header != "" {
			req.Header.Set("Authorization", c.header)
		}
		if err := g.check(req); c.ok != (err == nil) {
			t.Errorf("%s %q: %v", c.url, c.header, err)
		}
	}
	form := httptest.NewRequest(http.MethodPost, "http://registry.example/token", strings.NewReader("password=x"))
	form.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if err := g.check(form); !errdefs.IsPermissionDenied(err) {
		t.Errorf("form: %v", err)
	}
}

func TestCredentialsOfConfig(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	helper := filepath.Join(dir, "docker-credential-test")
	if err := execfile.Write(helper, []byte("#!/bin/sh\nread host\ncase $host in\n*helped*) echo '{\"ServerURL\":\"x\",\"Username\":\"u\",\"Secret\":\"s\"}';;\n*token*) echo '{\"ServerURL\":\"x\",\"Username\":\"<token>\",\"Secret\":\"t\"}';;\n*broken*) echo boom; exit 1;;\n*) echo 'credentials not found in native keychain'; exit 1;;\nesac\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	auth := base64.StdEncoding.EncodeToString([]byte("me:pass:word"))
	for _, c := range []struct {
		config, host string
		want         Credentials
		bad          bool
	}{
		{`{}`, "h", Credentials{}, false},
		{`{"auths":{"h":{"auth":"` + auth + `"}}}`, "h", Credentials{Username: "me", Password: "pass:word"}, false},
		{`{"auths":{"https://h/v2/":{"auth":"` + auth + `"}}}`, "h", Credentials{Username: "me", Password: "pass:word"}, false},
		{`{"auths":{"h":{"auth":"` + auth + `"}}}`, "h.example", Credentials{}, false},
		{`{"auths":{"https://index.docker.io/v1/":{"identitytoken":"t"}}}`, "registry-1.docker.io", Credentials{IdentityToken: "t"}, false},
		{`{"auths":{"h":{"auth":"!"}}}`, "h", Credentials{}, true},
		{`{"auths":{"h":{"auth":"bm9jb2xvbg=="}}}`, "h", Credentials{}, true},
		{`not json, with top-secret in it`, "h", Credentials{}, true},
		{`{"credHelpers":{"helped":"test"}}`, "helped", Credentials{Username: "u", Password: "s"}, false},
		{`{"credHelpers":{"token":"test"}}`, "token", Credentials{IdentityToken: "t"}, false},
		{`{"credHelpers":{"broken":"test"}}`, "broken", Credentials{}, true},
		{`{"credHelpers":{"h":"../evil"}}`, "h", Credentials{}, true},
		{`{"credsStore":"test","auths":{"h":{"auth":"` + auth + `"}}}`, "h", Credentials{Username: "me", Password: "pass:word"}, false},
	} {
		got, err := fromConfigWithPath(t, dir, c.config, c.host)
		if c.bad != (err != nil) || got != c.want {
			t.Errorf("%s for %s: %+v %v", c.config, c.host, got, err)
		}
		if err != nil && strings.Contains(err.Error(), "top-secret") {
			t.Errorf("error tells the contents: %v", err)
		}
	}
}

// TestAuthFile has a file of another name count, alone, and missed if it is not there.
func TestAuthFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	auth := func(user string) []byte {
		return []byte(`{"auths":{"h":{"auth":"` + base64.StdEncoding.EncodeToString([]byte(user+":x")) + `"}}}`)
	}
	file := filepath.Join(dir, "auth.json")
	for name, raw := range map[string][]byte{filepath.Join(dir, "config.json"): auth("docker"), file: auth("file")} {
		if err := os.WriteFile(name, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for authFile, want := range map[string]string{"": "docker", file: "file"} {
		if got, err := New(Options{DockerConfig: dir, AuthFile: authFile}).credentials("h", "h", Credentials{}); err != nil || got.Username != want {
			t.Errorf("%q: %+v %v", authFile, got, err)
		}
	}
	if _, err := New(Options{DockerConfig: dir, AuthFile: file + "x"}).credentials("h", "h", Credentials{}); err == nil {
		t.Error("a missing file is no error")
	}
}

// fromConfigWithPath asks with helpers found in dir.
func fromConfigWithPath(t *testing.T, dir, config, host string) (Credentials, error) {
	t.Helper()
	return fromConfig([]byte(config), host, func(helper string) string { return filepath.Join(dir, helper) })
}

func TestTags(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.Contains(r.URL.Path, "/bad/"):
			_, _ = io.WriteString(w, `{"tags":["../x"]}`)
		case r.URL.Query().Get("last") == "":
			w.Header().Set("Link", `</v2/app/tags/list?n=1000&last=b>; rel="next"`)
			_, _ = io.WriteString(w, `{"tags":["a","b"]}`)
		default:
			_, _ = io.WriteString(w, `{"tags":["c"]}`)
		}
	}))
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "http://")
	repo, err := quick(t, "").Repository(name(t, host+"/app"), Credentials{})
	if err != nil {
		t.Fatal(err)
	}
	if tags, err := repo.Tags(context.Background()); err != nil || strings.Join(tags, "") != "abc" {
		t.Errorf("%q %v", tags, err)
	}
	if repo, err = quick(t, "").Repository(name(t, host+"/bad"), Credentials{}); err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Tags(context.Background()); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad tag: %v", err)
	}
}

func TestErrorText(t *testing.T) {
	t.Parallel()
	for body, want := range map[string]string{
		`{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}`: "denied: requested access to the resource is denied",
		`{"errors":[{"code":"TOOMANYREQUESTS"}]}`:                                               "toomanyrequests",
		"line\x1b[31m\nline":      "line [31m line",
		strings.Repeat("x", 5000): "forbidden",
		"":                        "forbidden",
	} {
		_, err := errorText(&http.Response{StatusCode: http.StatusForbidden, Body: io.NopCloser(strings.NewReader(body))})
		if err.Error() != want {
			t.Errorf("%q: %q", body, err)
		}
	}
}

func FuzzHostsFile(f *testing.F) {
	f.Add([]byte("server = \"https://x\"\n[host.\"https://y\"]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = validHosts("hosts.toml", b)
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"auths":{"h":{"auth":"YTpi"}},"credHelpers":{}}`), "h")
	f.Fuzz(func(t *testing.T, b []byte, host string) {
		_, _ = fromConfig(b, host, func(string) string { return "/nonexistent" })
	})
}
