package chaos

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/internal/erofs"
)

// Images is how many images the registry has.
const Images = 8

// Registry serves images img0 to imgN below any name: HOST/what/ever/img3:latest.
type Registry struct {
	blobs     map[digest.Digest][]byte
	manifests []digest.Digest
	ids       []string // of the images: digests of their configs
}

// NewRegistry makes images whose layers are about size bytes each. Every two images share
// their lowest layer. They are the same each time.
func NewRegistry(size int) *Registry {
	r := &Registry{blobs: map[digest.Digest][]byte{}}
	for i := range Images {
		var layers []ocispec.Descriptor
		var diffs []digest.Digest
		for l := range 2 + i%3 {
			seed := uint64(1000*i + l + 1)
			if l == 0 {
				seed = uint64(i / 2)
			}
			plain := layerTar(seed, size)
			var packed bytes.Buffer
			w, _ := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
			_, _ = w.Write(plain)
			_ = w.Close()
			layers = append(layers, r.add(ocispec.MediaTypeImageLayerGzip, packed.Bytes()))
			diffs = append(diffs, digest.FromBytes(plain))
		}
		cfg := r.addJSON(ocispec.MediaTypeImageConfig, ocispec.Image{
			Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
			Config:   ocispec.ImageConfig{Cmd: []string{"/nothing"}, Labels: map[string]string{"image": strconv.Itoa(i)}},
			RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: diffs},
		})
		m := r.addJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: cfg, Layers: layers,
		})
		if i%2 == 1 { // every other one by an index
			m = r.addJSON(ocispec.MediaTypeImageIndex, ocispec.Index{
				Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{m},
			})
		}
		r.manifests = append(r.manifests, m.Digest)
		r.ids = append(r.ids, cfg.Digest.String())
	}
	return r
}

func (r *Registry) add(mediaType string, b []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	r.blobs[d.Digest] = b
	return d
}

func (r *Registry) addJSON(mediaType string, v any) ocispec.Descriptor {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // of values made above
	}
	return r.add(mediaType, b)
}

// ID is what the engine calls image i.
func (r *Registry) ID(i int) string { return r.ids[i] }

// selfNamed is a file whose name tells what is in it.
const selfNamed = "v-"

// layerTar makes a layer of files that are named by what they hold.
func layerTar(seed uint64, size int) []byte {
	rng := rand.New(rand.NewPCG(seed, 7))
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	dir := fmt.Sprintf("layer%d/", seed)
	_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755})
	for have := 0; have < size; {
		b := make([]byte, 1+rng.IntN(size/4+1))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		h := sha256.Sum256(b)
		_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: dir + selfNamed + hex.EncodeToString(h[:]), Mode: 0o644, Size: int64(len(b))})
		_, _ = w.Write(b)
		have += len(b)
	}
	_ = w.Close()
	return buf.Bytes()
}

// CheckLayers reads the files of unpacked layers below a daemon's root, in folders and in EROFS
// images, and gives those that do not hold what their names say, and images that cannot be mounted.
func CheckLayers(root string) (torn []string, files int, err error) {
	dirs, err := filepath.Glob(filepath.Join(root, "*", "snapshots", "*", "fs"))
	if err != nil {
		return nil, 0, err
	}
	images, err := filepath.Glob(filepath.Join(root, "*", "snapshots", "*", "layer.erofs"))
	if err != nil {
		return nil, 0, err
	}
	for _, image := range images {
		m, err := erofs.Mount(image)
		if err != nil {
			torn = append(torn, fmt.Sprintf("%s: %v", image, err))
			continue
		}
		defer m.Close()
		dirs = append(dirs, fmt.Sprintf("/proc/self/fd/%d/.", m.Fd()))
	}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			name, ok := strings.CutPrefix(filepath.Base(path), selfNamed)
			if err != nil || !ok || !e.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			files++
			if h := sha256.Sum256(b); hex.EncodeToString(h[:]) != name {
				torn = append(torn, fmt.Sprintf("%s (%d bytes)", path, len(b)))
			}
			return nil
		})
		if err != nil {
			return torn, files, err
		}
	}
	return torn, files, nil
}

var repository = regexp.MustCompile(`^/v2/(?:[a-z0-9._/-]*/)?img([0-9]+)/(manifests|blobs)/(.+)$`)

// ServeHTTP speaks as much of the distribution protocol as a pull takes.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/v2/" {
		return
	}
	m := repository.FindStringSubmatch(req.URL.Path)
	if m == nil {
		http.NotFound(w, req)
		return
	}
	d := digest.Digest(m[3])
	if i, err := strconv.Atoi(m[1]); err == nil && m[3] == "latest" && i < len(r.manifests) {
		d = r.manifests[i]
	}
	b, ok := r.blobs[d]
	if !ok {
		http.NotFound(w, req)
		return
	}
	if m[2] == "manifests" {
		var doc struct{ MediaType string }
		_ = json.Unmarshal(b, &doc)
		w.Header().Set("Content-Type", doc.MediaType)
	} else {
		w.Header().Set("Content-Type", "application/octet-stream")
	}
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	if req.Method != http.MethodHead {
		_, _ = w.Write(b)
	}
}
