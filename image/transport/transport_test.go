package transport

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParseRef(t *testing.T) {
	t.Parallel()
	sum := strings.Repeat("a", 64)
	for in, want := range map[string]string{
		"docker://alpine":                       "docker://docker.io/library/alpine:latest",
		"docker://localhost:5000/a:1":           "docker://localhost:5000/a:1",
		"docker://a/b:tag@sha256:" + sum:        "docker://docker.io/a/b@sha256:" + sum,
		"alpine:3":                              "local:docker.io/library/alpine:3",
		"local:app":                             "local:docker.io/library/app:latest",
		"docker-daemon:app:1":                   "local:docker.io/library/app:1",
		"docker:5000/app":                       "local:docker:5000/app:latest",
		"tarball:1":                             "local:docker.io/library/tarball:1",
		"oci:/x/y":                              "oci:/x/y",
		"oci:/x/y:v1":                           "oci:/x/y:v1",
		"oci:dir:docker.io/library/alpine:3":    "oci:dir:docker.io/library/alpine:3",
		"oci:dir@sha256:" + sum:                 "oci:dir@sha256:" + sum,
		"oci-archive:a.tar:1":                   "oci-archive:a.tar:1",
		"docker-archive:a.tar":                  "docker-archive:a.tar",
		"docker-archive:a.tar:app:1":            "docker-archive:a.tar:docker.io/library/app:1",
		"dir:/a:b":                              "dir:/a:b",
		"registry.example.com:5000/team/app:v2": "local:registry.example.com:5000/team/app:v2",
	} {
		if got, err := ParseRef(in, Local); err != nil || got.String() != want {
			t.Errorf("%s: %s %v, want %s", in, got, err, want)
		}
	}
	for _, in := range []string{"", "docker://", "docker://UPPER", "oci:", "oci::x", "dir:", "http://x/y", "ftp://x", "oci:dir@sha256:xyz", "docker-archive:a:UPPER", "oci:a\x00b", "local:", "containers-storage:x/Y", "containers-storage:alpine", "containers-storage:[overlay@/x]a", "ostree:a@/b", "sif:/x", "tarball:/x.tar", "atomic:a/b"} {
		if got, err := ParseRef(in, Local); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v %v", in, got, err)
		}
	}
}

func FuzzParseRef(f *testing.F) {
	for _, s := range []string{"docker://a/b:c", "oci:a:b", "x@sha256:", "docker-archive:a:b/c:d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRef(s, Registry)
		if err != nil {
			return
		}
		again, err := ParseRef(r.String(), Registry)
		if err != nil || again.String() != r.String() {
			t.Errorf("%q: %s, then %s %v", s, r, again, err)
		}
	})
}
