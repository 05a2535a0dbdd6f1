package manifest

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var (
	sum  = digest.FromString("x").String()
	part = fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":3}`, sum)
)

func TestParse(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ said, raw, want string }{
		"manifest":                   {"", `{"schemaVersion":2,"config":` + part + `,"layers":[` + part + `]}`, ocispec.MediaTypeImageManifest},
		"manifest that says so":      {ocispec.MediaTypeImageManifest, `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":` + part + `,"layers":[]}`, ocispec.MediaTypeImageManifest},
		"docker's, announced":        {DockerManifest, `{"schemaVersion":2,"config":` + part + `,"layers":[]}`, DockerManifest},
		"without layers":             {"", `{"config":` + part + `}`, ocispec.MediaTypeImageManifest},
		"announced as anything":      {"text/plain", `{"config":` + part + `}`, ocispec.MediaTypeImageManifest},
		"index":                      {"", `{"manifests":[` + part + `]}`, ocispec.MediaTypeImageIndex},
		"an empty one":               {DockerIndex, `{"manifests":[]}`, DockerIndex},
		"fields that nobody knows":   {"", `{"manifests":[],"more":{"manifests":1,"layers":2}}`, ocispec.MediaTypeImageIndex},
		"a referrer":                 {"", `{"config":` + part + `,"subject":` + part + `,"artifactType":"a/b"}`, ocispec.MediaTypeImageManifest},
		"a digest of 512 bits":       {"", `{"config":` + strings.Replace(part, sum, digest.SHA512.FromString("x").String(), 1) + `}`, ocispec.MediaTypeImageManifest},
		"an index that is a referer": {"", `{"manifests":[],"subject":` + part + `,"artifactType":"c/d"}`, ocispec.MediaTypeImageIndex},
	} {
		d, err := Parse("x", c.said, []byte(c.raw))
		if err != nil || d.MediaType != c.want || string(d.Raw) != c.raw || (d.Manifest == nil) == (d.Index == nil) {
			t.Errorf("%s: %+v %v", name, d, err)
		}
		if strings.Contains(c.raw, "subject") && (d.Subject() == nil || d.Subject().Digest.String() != sum || len(d.ArtifactType()) != 3) {
			t.Errorf("%s: subject %v, type %q", name, d.Subject(), d.ArtifactType())
		}
	}
	big := strings.Repeat(" ", MaxSize)
	for name, c := range map[string]struct {
		said, raw string
		is        func(error) bool
	}{
		"nothing":                      {"", ``, errdefs.IsInvalidArgument},
		"null":                         {"", `null`, errdefs.IsInvalidArgument},
		"a list":                       {"", `[]`, errdefs.IsInvalidArgument},
		"an empty object":              {"", `{}`, errdefs.IsInvalidArgument},
		"cut off":                      {"", `{"config":` + part, errdefs.IsInvalidArgument},
		"more behind it":               {"", `{"manifests":[]} {}`, errdefs.IsInvalidArgument},
		"both at once":                 {"", `{"config":` + part + `,"layers":[],"manifests":[]}`, errdefs.IsInvalidArgument},
		"both by another case":         {"", `{"config":` + part + `,"MANIFESTS":[]}`, errdefs.IsInvalidArgument},
		"a field twice":                {"", `{"manifests":[],"manifests":[]}`, errdefs.IsInvalidArgument},
		"a field twice, by case":       {"", `{"config":` + part + `,"Config":` + part + `}`, errdefs.IsInvalidArgument},
		"an index called a manifest":   {ocispec.MediaTypeImageManifest, `{"manifests":[]}`, errdefs.IsInvalidArgument},
		"a manifest called an index":   {"", `{"mediaType":"` + DockerIndex + `","config":` + part + `}`, errdefs.IsInvalidArgument},
		"announced as another":         {DockerManifest, `{"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":` + part + `}`, errdefs.IsInvalidArgument},
		"of an unknown type":           {"", `{"mediaType":"a/b","config":` + part + `}`, errdefs.IsInvalidArgument},
		"manifests that are no list":   {"", `{"manifests":{}}`, errdefs.IsInvalidArgument},
		"manifests that are null":      {"", `{"manifests":null}`, errdefs.IsInvalidArgument},
		"a config that is null":        {"", `{"config":null,"layers":[]}`, errdefs.IsInvalidArgument},
		"a config that is text":        {"", `{"config":"x"}`, errdefs.IsInvalidArgument},
		"layers that are no list":      {"", `{"config":` + part + `,"layers":{}}`, errdefs.IsInvalidArgument},
		"a digest that is a path":      {"", `{"config":` + strings.Replace(part, sum, "sha256:../../x", 1) + `}`, errdefs.IsInvalidArgument},
		"a digest in upper case":       {"", `{"config":` + strings.Replace(part, sum, strings.ToUpper(sum), 1) + `}`, errdefs.IsInvalidArgument},
		"a digest of another kind":     {"", `{"config":` + strings.Replace(part, sum, digest.SHA384.FromString("x").String(), 1) + `}`, errdefs.IsInvalidArgument},
		"no digest":                    {"", `{"config":{"size":1}}`, errdefs.IsInvalidArgument},
		"a size below nothing":         {"", `{"config":` + strings.Replace(part, "3}", "-3}", 1) + `}`, errdefs.IsInvalidArgument},
		"a size that is none":          {"", `{"config":` + strings.Replace(part, "3}", "1e30}", 1) + `}`, errdefs.IsInvalidArgument},
		"a bad subject":                {"", `{"manifests":[],"subject":{"digest":"x"}}`, errdefs.IsInvalidArgument},
		"a child as large as the disk": {"", `{"manifests":[{"mediaType":"` + ocispec.MediaTypeImageManifest + `","digest":"` + sum + `","size":99999999}]}`, errdefs.IsResourceExhausted},
		"too large":                    {"", `{"manifests":[]}` + big, errdefs.IsResourceExhausted},
		"too many parts":               {"", `{"manifests":[` + strings.Repeat(part+",", maxChildren) + part + `]}`, errdefs.IsResourceExhausted},
		"schema 1":                     {"", `{"schemaVersion":1,"name":"a"}`, errdefs.IsNotImplemented},
		"schema 1 by its layers":       {"", `{"fsLayers":[]}`, errdefs.IsNotImplemented},
	} {
		if d, err := Parse("x", c.said, []byte(c.raw)); !c.is(err) {
			t.Errorf("%s: %+v %v", name, d, err)
		}
	}
}

func TestCandidates(t *testing.T) {
	t.Parallel()
	idx := &ocispec.Index{}
	add := func(name, platform string, change func(*ocispec.Descriptor)) {
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(name), Annotations: map[string]string{"name": name}}
		if platform != "" {
			p := platforms.MustParse(platform)
			d.Platform = &p
		}
		if change != nil {
			change(&d)
		}
		idx.Manifests = append(idx.Manifests, d)
	}
	add("unsaid", "", nil)
	add("v6", "linux/arm/v6", nil)
	add("v7", "linux/arm/v7", nil)
	add("amd64", "linux/amd64", nil)
	add("windows", "windows/amd64", nil)
	add("attestation", "unknown/unknown", nil)
	add("attestation of a kind", "linux/arm/v7", func(d *ocispec.Descriptor) {
		d.Annotations["vnd.docker.reference.type"] = "attestation-manifest"
		d.Annotations["vnd.docker.reference.digest"] = sum
	})
	add("artifact", "", func(d *ocispec.Descriptor) { d.ArtifactType = "a/b" })
	add("layer", "linux/arm/v7", func(d *ocispec.Descriptor) { d.MediaType = DockerLayerGzip })
	for platform, want := range map[string]string{"linux/arm/v7": "v7 v6 unsaid", "linux/arm/v6": "v6 unsaid", "linux/amd64": "amd64 unsaid", "linux/s390x": "unsaid"} {
		var got []string
		for _, d := range Candidates(idx, platforms.Only(platforms.MustParse(platform))) {
			got = append(got, d.Annotations["name"])
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %q, want %q", platform, got, want)
		}
	}
	for _, d := range idx.Manifests {
		if is := strings.HasPrefix(d.Annotations["name"], "attestation"); IsCompanion(d) != is {
			t.Errorf("%s: companion: %v", d.Annotations["name"], !is)
		}
		if about := About(d); (about != "") != (d.Annotations["name"] == "attestation of a kind") {
			t.Errorf("%s is about %q", d.Annotations["name"], about)
		}
	}
}

// FuzzParse holds that what is taken has valid parts, is one thing only, and is taken again
// under the media type that it got.
func FuzzParse(f *testing.F) {
	f.Add("", []byte(`{"schemaVersion":2,"config":`+part+`,"layers":[`+part+`]}`))
	f.Add(DockerIndex, []byte(`{"manifests":[`+part+`],"subject":`+part+`}`))
	f.Fuzz(func(t *testing.T, said string, raw []byte) {
		d, err := Parse("x", said, raw)
		if err != nil {
			return
		}
		if (d.Manifest == nil) == (d.Index == nil) || IsIndex(d.MediaType) != (d.Index != nil) || !json.Valid(raw) {
			t.Fatalf("%+v", d)
		}
		var list []ocispec.Descriptor
		if d.Index != nil {
			list = slices.Clone(d.Index.Manifests)
			Candidates(d.Index, platforms.All)
		} else {
			list = append(list, d.Manifest.Config)
			list = append(list, d.Manifest.Layers...)
		}
		for _, c := range list {
			if name := c.Digest.Encoded(); strings.ContainsAny(name, "/.") || len(name) < 64 || c.Size < 0 {
				t.Errorf("%+v", c)
			}
		}
		if again, err := Parse("x", d.MediaType, raw); err != nil || again.MediaType != d.MediaType {
			t.Errorf("again: %+v %v", again, err)
		}
	})
}
