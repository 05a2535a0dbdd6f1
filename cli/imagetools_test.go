package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestImageHelp holds the help of the image tools.
func TestImageHelp(t *testing.T) {
	for _, name := range strings.Fields("inspect copy sync list-tags delete convert diff verify mount unmount login logout") {
		code, out, errs := runCLI(t, "image", name, "--help")
		if code != 0 || errs != "" {
			t.Errorf("%s: exit %d %q", name, code, errs)
		}
		golden(t, "help-image-"+name+".txt", []byte(out))
	}
}

// fake answers what the commands ask, and keeps it.
type fake struct {
	copied  CopyRequest
	deleted []string
	err     error
}

func (f *fake) Inspect(_ context.Context, ref string, _ Access, _ *ocispec.Platform, _ bool) (any, error) {
	return map[string]any{"name": ref, "digest": "sha256:1", "mediaType": "x", "platforms": []any{map[string]any{"platform": "linux/amd64", "digest": "sha256:1", "size": 1000, "layers": 1}, map[string]any{"platform": "linux/arm64", "digest": "sha256:2"}},
		"image": map[string]any{"id": "sha256:3", "platform": "linux/amd64", "size": 1000, "config": map[string]any{"Env": []string{"A=\x1b[31mred"}},
			"layers": []any{map[string]any{"digest": "sha256:4444444444444444", "size": 1000, "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "createdBy": "RUN \x07bell"}}}}, f.err
}

func (f *fake) Raw(context.Context, string, Access, *ocispec.Platform, bool) ([]byte, error) {
	return []byte(`{"raw":true}`), f.err
}

func (f *fake) Copy(_ context.Context, r CopyRequest) (CopyResult, error) {
	f.copied = r
	if r.Progress != nil {
		for _, e := range []ImageEvent{{"sha256:aaaaaaaaaaaaaaaa", "Copying", 1, 10}, {"sha256:aaaaaaaaaaaaaaaa", "Copying", 9, 10}, {"sha256:aaaaaaaaaaaaaaaa", "Copied", 10, 10}} {
			r.Progress(e)
		}
	}
	return CopyResult{Digest: "sha256:top", Blobs: 3, Present: 1, Mounted: 1, Sent: 10}, f.err
}

func (f *fake) Tags(context.Context, string, Access) (string, []string, error) {
	return "r", []string{"1", "2"}, f.err
}

func (f *fake) Delete(_ context.Context, ref string, _ Access, dryRun bool) (string, error) {
	if !dryRun {
		f.deleted = append(f.deleted, ref)
	}
	return "sha256:d", f.err
}

func (f *fake) Login(context.Context, string, Access) error { return f.err }

func (f *fake) Sync(_ context.Context, r SyncRequest) (SyncReport, error) {
	r.Report(SyncLine{Source: "a", Destination: "b", Action: "copied"})
	r.Report(SyncLine{Source: "c", Action: "failed", Error: "broken"})
	return SyncReport{Copied: 1, Failed: 1}, f.err
}

func (f *fake) Diff(context.Context, string, string, Access, Access, *ocispec.Platform, bool) (any, error) {
	return map[string]any{"config": []any{map[string]any{"key": "User", "old": "a", "new": "b"}}, "layers": []any{map[string]any{"change": "+", "digest": "sha256:55", "size": 10}},
		"files": []any{map[string]any{"change": "A", "path": "/x\x1b", "new": 10}}, "filesRead": true}, f.err
}

func (f *fake) Mount(context.Context, string, string) error  { return f.err }
func (f *fake) Unmount(context.Context, string) error        { return f.err }
func (f *fake) Mounts(context.Context) ([]ImageMount, error) { return []ImageMount{{"i", "/d"}}, f.err }
func (f *fake) Close() error                                 { return nil }

func runFake(t *testing.T, f *fake, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errb bytes.Buffer
	code = Main(args, Streams{In: strings.NewReader(stdin), Out: &out, Err: &errb}, Options{
		Images: func(ImagesConfig) Images { return f },
		Verify: func(_ context.Context, r VerifyRequest) (json.RawMessage, error) {
			if len(r.Keys) > 0 && r.Keys[0] == "bad" {
				return nil, errors.New("refused")
			}
			return json.RawMessage(`{"digest":"sha256:v","signatures":[{"kind":"bundle","subject":"me","issuer":"them"}]}`), nil
		},
	})
	return code, out.String(), errb.String()
}

func TestImageTools(t *testing.T) {
	file := filepath.Join(t.TempDir(), "sync.yaml")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args     string
		code     int
		out, err string
	}{
		{"image copy docker://a oci:b", 0, "sha256:top\n", "Blobs: 3: 1 copied (10B), 1 mounted, 1 already there"},
		{"image copy -q docker://a oci:b", 0, "sha256:top\n", ""},
		{"image copy docker://a", 1, "", "needs a source and a destination"},
		{"image copy --jobs 0 a b", 125, "", "--jobs"},
		{"image copy --platform a/b/c/d a b", 125, "", "--platform"},
		{"image copy --src-creds :x a b", 125, "", "USER[:PASSWORD]"},
		{"image copy --src-creds me a b", 1, "", "no terminal"},
		{"image copy --src-creds me:x --src-no-creds a b", 125, "", "choose one"},
		{"image convert --to lzma a b", 125, "", "--to"},
		{"image convert a b", 125, "", "--to"},
		{"image list-tags r", 0, "1\n2\n", ""},
		{"image list-tags --format json r", 0, `{"Repository":"r","Tags":["1","2"]}` + "\n", ""},
		{"image delete -f r.example:5000/app:1", 0, "r.example:5000/app:1\n", ""},
		{"image delete --dry-run r", 0, "r\n", "Would delete sha256:d"},
		{"image inspect --raw docker://a", 0, `{"raw":true}`, ""},
		{"image inspect --format {{.digest}} docker://a", 0, "sha256:1\n", ""},
		{"image inspect --raw --config docker://a", 0, `{"raw":true}`, ""},
		{"image inspect -n --config --format {{.raw}} docker://a", 0, "true\n", ""},
		{"image copy --all --digestfile " + file + "2 --retry-times 0 docker://a oci:b", 0, "sha256:top\n", ""},
		{"image copy --all --platform linux/arm64 a b", 1, "", "platform"},
		{"image copy --retry-times -1 a b", 125, "", "--retry-times"},
		{"image copy --format v2s1 a b", 125, "", "schema 1"},
		{"image copy --preserve-digests --format v2s2 a b", 125, "", "--preserve-digests"},
		{"image copy --preserve-digests a docker-archive:b", 125, "", "--preserve-digests"},
		{"image copy --dest-compress-format lzma a b", 125, "", "lzma"},
		{"image sync docker://a/b", 125, "", "where to"},
		{"image sync --platform linux/arm64 " + file, 125, "", "are in the file"},
		{"login --get-login r", 1, "", "not logged in"},
		{"logout -a --authfile " + file + "3", 0, "", ""},
		{"image sync --format json " + file, 1, `{"source":"a","destination":"b","action":"copied"}` + "\n" + `{"source":"c","action":"failed","error":"broken"}` + "\n", "1 images failed"},
		{"image verify r", 125, "", "signed by whom"},
		{"image verify --certificate-identity x r", 125, "", "go together"},
		{"image verify --key k r", 0, "sha256:v\n", "Signed by me (them), bundle"},
		{"image verify --key bad r", 1, "", "refused"},
		{"image mount", 0, "IMAGE   DIRECTORY\ni       /d\n", ""},
		{"image mount x", 1, "", "needs an image and a folder"},
		{"image unmount /d", 0, "/d\n", ""},
		{"login --password-stdin r", 125, "", "--username"},
		{"login r", 1, "", "no terminal"},
		{"logout --all r", 125, "", "choose one"},
	} {
		t.Setenv("DOCKER_CONFIG", t.TempDir())
		f := &fake{}
		code, out, errs := runFake(t, f, "", strings.Fields(tt.args)...)
		if code != tt.code || out != tt.out || !strings.Contains(errs, tt.err) {
			t.Errorf("hako %s: exit %d, want %d\nstdout %q\nwant   %q\nstderr %q, want %q in it", tt.args, code, tt.code, out, tt.out, errs, tt.err)
		}
		if strings.HasPrefix(tt.args, "image delete -f") && (len(f.deleted) != 1 || f.deleted[0] != "r.example:5000/app@sha256:d") {
			t.Errorf("deleted %q", f.deleted)
		}
	}
	// Text of strangers does not reach the terminal's controls.
	for _, args := range [][]string{{"image", "inspect", "docker://a"}, {"image", "diff", "a", "b"}} {
		_, out, _ := runFake(t, &fake{}, "", args...)
		if out == "" || strings.ContainsAny(out, "\x1b\x07") {
			t.Errorf("%q: %q", args, out)
		}
	}
	if code, _, _ := runFake(t, &fake{}, "n\n", "image", "delete", "r"); code == 0 {
		t.Error("deleted without a yes")
	}
	f := &fake{}
	if code, _, errs := runFake(t, f, "", "image", "copy", "--src-tls-verify=false", "--dest-creds", "me:a:b", "--platform", "linux/arm64,linux/amd64", "--referrers", "--format", "oci", "docker://a", "docker://b"); code != 0 ||
		!f.copied.SourceAccess.Insecure || f.copied.DestinationAccess != (Access{Username: "me", Password: "a:b"}) || len(f.copied.Platforms) != 2 || !f.copied.Referrers || f.copied.Format != "oci" {
		t.Errorf("%d %s %+v", code, errs, f.copied)
	}
	t.Setenv("REGISTRY_AUTH_FILE", "/env.json")
	if code, _, errs := runFake(t, f, "", "image", "copy", "--src-authfile", "/x.json", "--additional-tag", "2", "--additional-tag", "3", "--format", "v2s2", "--dest-compress-format", "zstd", "docker://a", "docker://b"); code != 0 ||
		f.copied.SourceAccess.AuthFile != "/x.json" || f.copied.DestinationAccess.AuthFile != "/env.json" || len(f.copied.Tags) != 2 || f.copied.Format != "docker" || f.copied.Compression != "zstd" {
		t.Errorf("%d %s %+v", code, errs, f.copied)
	}
	// Credentials in a file of one's own.
	auth := filepath.Join(t.TempDir(), "auth.json")
	if code, _, errs := runFake(t, &fake{}, "secret", "login", "--authfile", auth, "-u", "me", "--password-stdin", "r.example"); code != 0 {
		t.Errorf("%d %s", code, errs)
	}
	if code, out, errs := runFake(t, &fake{}, "", "login", "--authfile", auth, "--get-login", "r.example"); code != 0 || out != "me\n" {
		t.Errorf("%d %q %s", code, out, errs)
	}
	if code, _, errs := runFake(t, &fake{err: errors.New("no")}, "x", "login", "-u", "me", "--password-stdin", "r"); code != 1 || !strings.Contains(errs, "no") {
		t.Errorf("%d %s", code, errs)
	}
	var _ io.Closer = f
}
