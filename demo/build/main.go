// Command build makes the demo image.
//
// In flows the Go source of demo/guest; out flows a reproducible archive that is both a
// docker-archive and an OCI layout: build [-arch ARCH] [-o FILE]. It is run from the
// top of the repository.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	_ "crypto/sha256" // digests
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/demo"
)

// names are what the one program is called in /bin.
var names = []string{"demo", "cat", "echo", "env", "exit", "false", "id", "serve", "show", "sleep", "spam", "true"}

// epoch is when everything in the image was made, so that the same source gives the
// same image.
var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func main() {
	arch := flag.String("arch", runtime.GOARCH, "GOARCH of the image")
	out := flag.String("o", "", "file to write (default demo/image/demo-ARCH.tar.gz)")
	flag.Parse()
	if *out == "" {
		*out = filepath.Join("demo", "image", "demo-"+*arch+".tar.gz")
	}
	if err := run(*arch, *out); err != nil {
		log.Fatal("build demo image: ", err)
	}
}

func run(arch, out string) error {
	dir, err := os.MkdirTemp("", "hako-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "demo")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", program, "./demo/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOAMD64=v1", "GOARM64=v8.0")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%v: %w", cmd.Args, err)
	}
	binary, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	layer, err := layerTar(binary)
	if err != nil {
		return err
	}
	archive, err := archiveOf(arch, layer)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	tmp := out + ".tmp"
	if err := os.WriteFile(tmp, archive, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, out)
}

// layerTar is the image's file system.
func layerTar(binary []byte) ([]byte, error) {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	add := func(h tar.Header, body string) error {
		h.ModTime, h.Size, h.Format = epoch, int64(len(body)), tar.FormatPAX
		if err := tw.WriteHeader(&h); err != nil {
			return err
		}
		_, err := io.WriteString(tw, body)
		return err
	}
	for _, d := range []struct {
		name string
		mode int64
	}{{"bin/", 0o755}, {"dev/", 0o755}, {"etc/", 0o755}, {"home/", 0o755}, {"proc/", 0o755}, {"root/", 0o700}, {"sys/", 0o755}, {"tmp/", 0o1777}} {
		if err := add(tar.Header{Typeflag: tar.TypeDir, Name: d.name, Mode: d.mode}, ""); err != nil {
			return nil, err
		}
	}
	files := map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/demo\nnobody:x:65534:65534:nobody:/home:/bin/false\n",
		"etc/group":  "root:x:0:\nnobody:x:65534:\n",
	}
	for _, name := range []string{"etc/group", "etc/passwd"} {
		if err := add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, files[name]); err != nil {
			return nil, err
		}
	}
	if err := add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/" + names[0], Mode: 0o755}, string(binary)); err != nil {
		return nil, err
	}
	for _, n := range names[1:] {
		if err := add(tar.Header{Typeflag: tar.TypeLink, Name: "bin/" + n, Linkname: "bin/" + names[0], Mode: 0o755}, ""); err != nil {
			return nil, err
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

func archiveOf(arch string, layer []byte) ([]byte, error) {
	blobs := map[digest.Digest][]byte{}
	put := func(mediaType string, v any) (ocispec.Descriptor, error) {
		b, ok := v.([]byte)
		if !ok {
			var err error
			if b, err = json.Marshal(v); err != nil {
				return ocispec.Descriptor{}, err
			}
		}
		d := digest.FromBytes(b)
		blobs[d] = b
		return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}, nil
	}
	l, err := put(ocispec.MediaTypeImageLayer, layer)
	if err != nil {
		return nil, err
	}
	platform := ocispec.Platform{OS: "linux", Architecture: arch}
	if arch == "arm64" {
		platform.Variant = "v8"
	}
	cfg, err := put(ocispec.MediaTypeImageConfig, dockerspec.DockerOCIImage{
		Image: ocispec.Image{
			Created: &epoch, Author: "hako", Platform: platform,
			RootFS:  ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{l.Digest}},
			History: []ocispec.History{{Created: &epoch, CreatedBy: "demo/build", Comment: "made from demo/guest"}},
		},
		Config: dockerspec.DockerOCIImageConfig{ImageConfig: ocispec.ImageConfig{
			Env: []string{"PATH=/bin"}, Cmd: []string{"show"}, WorkingDir: "/", ExposedPorts: map[string]struct{}{"8080/tcp": {}},
			Labels: map[string]string{ocispec.AnnotationTitle: "hako demo", ocispec.AnnotationSource: "https://github.com/hako-engine/hako"},
		}},
	})
	if err != nil {
		return nil, err
	}
	m, err := put(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: cfg, Layers: []ocispec.Descriptor{l},
	})
	if err != nil {
		return nil, err
	}
	m.Platform = &platform
	m.Annotations = map[string]string{"io.containerd.image.name": "docker.io/" + demo.Name, ocispec.AnnotationRefName: "latest"}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{m}})
	if err != nil {
		return nil, err
	}
	file := func(d digest.Digest) string { return "blobs/sha256/" + d.Encoded() }
	docker, err := json.Marshal([]map[string]any{{"Config": file(cfg.Digest), "RepoTags": []string{demo.Name}, "Layers": []string{file(l.Digest)}}})
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "index.json": index, "manifest.json": docker}
	for d, b := range blobs {
		files[file(d)] = b
	}
	return pack(files)
}

func pack(files map[string][]byte) ([]byte, error) {
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	tw := tar.NewWriter(z)
	var sorted []string
	for n := range files {
		sorted = append(sorted, n)
	}
	slices.Sort(sorted)
	for _, d := range []string{"blobs/", "blobs/sha256/"} {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755, ModTime: epoch}); err != nil {
			return nil, err
		}
	}
	for _, n := range sorted {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: n, Mode: 0o644, Size: int64(len(files[n])), ModTime: epoch}); err != nil {
			return nil, err
		}
		if _, err := tw.Write(files[n]); err != nil {
			return nil, err
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
