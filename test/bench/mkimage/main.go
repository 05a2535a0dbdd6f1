// Command mkimage makes an image of files of this machine, for the pull benchmark.
//
// In flow directories; out flows an OCI image layout with one gzip layer per group of
// them: mkimage OUTPUT MAXBYTES MAXFILES DIR[,DIR...] ...
package main

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	if len(os.Args) < 5 {
		log.Fatal("usage: mkimage OUTPUT MAXBYTES MAXFILES DIR[,DIR...] ...")
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4:]); err != nil {
		log.Fatal(err)
	}
}

var errFull = errors.New("layer is full")

func run(out, maxBytes, maxFiles string, groups []string) error {
	bytes, err := strconv.ParseInt(maxBytes, 10, 64)
	if err != nil {
		return err
	}
	files, err := strconv.Atoi(maxFiles)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(out, "blobs/sha256"), 0o755); err != nil {
		return err
	}
	layers := make([]ocispec.Descriptor, len(groups))
	diffs := make([]digest.Digest, len(groups))
	errs := make([]error, len(groups))
	slots := make(chan struct{}, runtime.NumCPU())
	var wg sync.WaitGroup
	for i, g := range groups {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			layers[i], diffs[i], errs[i] = layer(out, i, strings.Split(g, ","), bytes, files)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	cfg, err := blob(out, ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   ocispec.ImageConfig{Cmd: []string{"/bin/true"}},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: diffs},
	})
	if err != nil {
		return err
	}
	manifest, err := blob(out, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: cfg, Layers: layers,
	})
	if err != nil {
		return err
	}
	idx, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{manifest}})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, ocispec.ImageLayoutFile), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(out, ocispec.ImageIndexFile), idx, 0o644)
}

func blob(out, mediaType string, v any) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := digest.FromBytes(b)
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}, os.WriteFile(filepath.Join(out, "blobs/sha256", d.Encoded()), b, 0o644)
}

func layer(out string, i int, dirs []string, maxBytes int64, maxFiles int) (ocispec.Descriptor, digest.Digest, error) {
	tmp := filepath.Join(out, fmt.Sprintf("layer-%d", i))
	f, err := os.Create(tmp)
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	defer f.Close()
	packed, plain := sha256.New(), sha256.New()
	z := gzip.NewWriter(io.MultiWriter(f, packed))
	tw := tar.NewWriter(io.MultiWriter(z, plain))
	var bytes int64
	var files int
	seen := map[string]bool{}
	for _, dir := range dirs {
		if err := parents(tw, dir, seen); err != nil {
			return ocispec.Descriptor{}, "", err
		}
		err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if bytes >= maxBytes || files >= maxFiles {
				return errFull
			}
			n, err := add(tw, p, e)
			bytes += n
			files++
			return err
		})
		if err != nil && !errors.Is(err, errFull) {
			return ocispec.Descriptor{}, "", err
		}
	}
	if err := errors.Join(tw.Close(), z.Close()); err != nil {
		return ocispec.Descriptor{}, "", err
	}
	st, err := f.Stat()
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	d := digest.NewDigest(digest.SHA256, packed)
	log.Printf("layer %d: %d files, %d MB, %d MB packed", i, files, bytes>>20, st.Size()>>20)
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: d, Size: st.Size()},
		digest.NewDigest(digest.SHA256, plain), os.Rename(tmp, filepath.Join(out, "blobs/sha256", d.Encoded()))
}

func parents(tw *tar.Writer, dir string, seen map[string]bool) error {
	for i := 1; i < len(dir); i++ {
		if dir[i] != '/' || seen[dir[:i]] {
			continue
		}
		seen[dir[:i]] = true
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir[1:i] + "/", Mode: 0o755}); err != nil {
			return err
		}
	}
	return nil
}

func add(tw *tar.Writer, p string, e fs.DirEntry) (int64, error) {
	st, err := e.Info()
	if err != nil {
		return 0, err
	}
	link := ""
	switch {
	case st.Mode()&fs.ModeSymlink != 0:
		if link, err = os.Readlink(p); err != nil {
			return 0, err
		}
	case !st.Mode().IsRegular() && !st.IsDir():
		return 0, nil
	}
	hdr, err := tar.FileInfoHeader(st, link)
	if err != nil {
		return 0, err
	}
	hdr.Name = strings.TrimPrefix(p, "/")
	if st.IsDir() {
		hdr.Name += "/"
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		hdr.Uid, hdr.Gid = int(sys.Uid), int(sys.Gid)
	}
	hdr.Uname, hdr.Gname = "", ""
	if err := tw.WriteHeader(hdr); err != nil || !st.Mode().IsRegular() {
		return 0, err
	}
	f, err := os.Open(p)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return io.CopyN(tw, f, st.Size())
}
