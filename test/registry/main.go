// Command registry serves OCI layout directories as a read-only registry on loopback,
// for benchmarks and tests by hand.
//
// In flow directories in OCI image layout form; out flow their manifests and blobs over
// the distribution protocol, with ranges:
//
//	registry -listen 127.0.0.1:5555 NAME=DIRECTORY ...
//
// serves the manifest that DIRECTORY/index.json lists first as NAME:latest.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "address")
	flag.Parse()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v2/{$}", func(http.ResponseWriter, *http.Request) {})
	for _, arg := range flag.Args() {
		name, dir, ok := strings.Cut(arg, "=")
		if !ok {
			log.Fatalf("argument %q is not NAME=DIRECTORY", arg)
		}
		if err := serve(mux, name, dir); err != nil {
			log.Fatal(err)
		}
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(l.Addr())
	log.Fatal(http.Serve(l, mux)) //nolint:gosec // loopback, for tests
}

func serve(mux *http.ServeMux, name, dir string) error {
	raw, err := os.ReadFile(filepath.Join(dir, ocispec.ImageIndexFile))
	if err != nil {
		return err
	}
	var idx ocispec.Index
	if err := json.Unmarshal(raw, &idx); err != nil || len(idx.Manifests) == 0 {
		return fmt.Errorf("%s: no index (%v)", dir, err)
	}
	top := idx.Manifests[0]
	blob := func(w http.ResponseWriter, r *http.Request, d digest.Digest, mediaType string) {
		if d.Validate() != nil {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", mediaType)
		w.Header().Set("Docker-Content-Digest", d.String())
		http.ServeFile(w, r, filepath.Join(dir, ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded()))
	}
	mux.HandleFunc("GET /v2/"+name+"/manifests/{ref}", func(w http.ResponseWriter, r *http.Request) {
		ref := r.PathValue("ref")
		if ref == "latest" {
			ref = top.Digest.String()
		}
		blob(w, r, digest.Digest(ref), top.MediaType)
	})
	mux.HandleFunc("GET /v2/"+name+"/blobs/{digest}", func(w http.ResponseWriter, r *http.Request) {
		blob(w, r, digest.Digest(r.PathValue("digest")), "application/octet-stream")
	})
	return nil
}
