// Command testimages serves the images that containerd's tests, ctr, nerdctl and BuildKit
// are tried with, from memory, to whoever trusts the certificate that it writes.
//
// In flow a static busybox and pushes; out flow images of it under the names by which the
// tests ask for them, whatever the host in the name: with `ghcr.io` and the like in
// /etc/hosts, a client cannot tell the difference. Images are the same bytes for the same busybox.
//
//	testimages -busybox /bin/busybox -ca ca.pem -https 127.0.0.1:443 -http 127.0.0.1:5000 [-digests FILE]
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"sort"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// hosts are the names that the certificate is good for.
var hosts = []string{"ghcr.io", "registry.k8s.io", "docker.io", "registry-1.docker.io", "localhost"}

func main() {
	busybox := flag.String("busybox", "/bin/busybox", "a static busybox")
	ca := flag.String("ca", "", "where to write the certificate (PEM)")
	digests := flag.String("digests", "", "where to write NAME DIGEST of each image, a line each")
	secure := flag.String("https", "", "address for TLS")
	plain := flag.String("http", "", "address without TLS")
	flag.Parse()
	if err := run(*busybox, *ca, *digests, *secure, *plain); err != nil {
		log.Fatal(err)
	}
}

func run(busybox, ca, digests, secure, plain string) error {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	var list strings.Builder
	for _, i := range all(program) {
		d, err := i.push(handler)
		if err != nil {
			return fmt.Errorf("image %s:%s: %w", i.name, i.tag, err)
		}
		fmt.Fprintf(&list, "%s:%s %s\n", i.name, i.tag, d)
	}
	if digests != "" {
		if err := os.WriteFile(digests, []byte(list.String()), 0o600); err != nil {
			return err
		}
	}
	failed := make(chan error)
	if secure != "" {
		cert, err := certificate(ca)
		if err != nil {
			return err
		}
		l, err := tls.Listen("tcp", secure, &tls.Config{Certificates: []tls.Certificate{cert}})
		if err != nil {
			return err
		}
		go func() { failed <- http.Serve(l, handler) }() //nolint:gosec // loopback, for tests
	}
	if plain != "" {
		l, err := net.Listen("tcp", plain)
		if err != nil {
			return err
		}
		go func() { failed <- http.Serve(l, handler) }() //nolint:gosec // loopback, for tests
	}
	return <-failed
}

// image is one name in the registry: one manifest, or an index of one for each platform.
type image struct {
	name, tag string
	platforms []string // empty: this machine's, and no index
	layers    func(platform string) [][]byte
	config    ocispec.ImageConfig
}

// foreign are the platforms which indexes have besides this machine's: their images differ in
// every blob and are not meant to run.
var foreign = []string{"linux/arm64/v8", "linux/s390x", "linux/ppc64le", "linux/arm/v7"}

func all(busybox []byte) []image {
	here := "linux/" + runtime.GOARCH
	box := root(busybox)
	sh := ocispec.ImageConfig{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: []string{"sh"}}
	if here == "linux/arm64" {
		foreign[0] = "linux/amd64"
	}
	index := append([]string{here}, foreign...)
	// A platform's own file keeps any two from sharing a layer.
	boxFor := func(extra ...file) func(string) [][]byte {
		return func(platform string) [][]byte {
			first := layer(file{name: "etc/platform", data: []byte(platform)})
			if platform == here {
				first = layer(append(box, file{name: "etc/platform", data: []byte(platform)})...)
			}
			if len(extra) == 0 {
				return [][]byte{first}
			}
			return [][]byte{first, layer(extra...), layer(file{name: "etc/last", data: []byte("last")})}
		}
	}
	tiny := func(content string) func(string) [][]byte {
		return func(platform string) [][]byte {
			// Bigger unpacked than all of its metadata, so that usage differs.
			return [][]byte{layer(file{name: "pause", mode: 0o755, data: append(bytes.Repeat([]byte(content), 1<<14), platform...)})}
		}
	}
	owned := []file{{name: "test_dir/", uid: 2000, gid: 2000}, {name: "test_dir/test_file", data: []byte("test_content\n"), uid: 2000, gid: 2000}}
	return []image{
		{name: "containerd/busybox", tag: "1.36", platforms: index, layers: boxFor(), config: sh},
		{name: "containerd/alpine", tag: "3.14.0", platforms: index, layers: boxFor(), config: sh},
		{name: "containerd/volume-copy-up", tag: "2.2", platforms: index, layers: boxFor(owned...), config: sh},
		{name: "containerd/volume-ownership", tag: "2.1", platforms: index, layers: boxFor(owned[:1]...), config: sh},
		{name: "containerd/windows/nanoserver", tag: "1809", platforms: []string{"windows/amd64"}, layers: tiny("nano"), config: sh},
		{name: "pause", tag: "3.6", platforms: index, layers: tiny("six"), config: ocispec.ImageConfig{Entrypoint: []string{"/pause"}}},
		{name: "pause", tag: "3.10.2", platforms: index, layers: tiny("ten"), config: ocispec.ImageConfig{Entrypoint: []string{"/pause"}}},
		{name: "e2e-test-images/busybox", tag: "1.29-2", platforms: index, layers: tiny("e2e"), config: sh},
		{name: "library/busybox", tag: "latest", layers: boxFor(), config: sh},
		{name: "library/alpine", tag: "latest", platforms: index, layers: boxFor(owned...), config: sh},
	}
}

// push stores the image through the registry's own door and returns the digest of its top.
func (i image) push(h http.Handler) (digest.Digest, error) {
	here := "linux/" + runtime.GOARCH
	if len(i.platforms) == 0 {
		d, err := i.manifest(h, here, i.tag)
		return d.Digest, err
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, p := range i.platforms {
		d, err := i.manifest(h, p, "")
		if err != nil {
			return "", err
		}
		idx.Manifests = append(idx.Manifests, d)
	}
	d, err := i.put(h, idx, ocispec.MediaTypeImageIndex, i.tag)
	return d.Digest, err
}

func (i image) manifest(h http.Handler, platform, tag string) (ocispec.Descriptor, error) {
	var p ocispec.Platform
	parts := strings.SplitN(platform, "/", 3)
	p.OS, p.Architecture = parts[0], parts[1]
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	config := ocispec.Image{Created: &created, Platform: p, Config: i.config, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range i.layers(platform) {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l))
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		if _, err := w.Write(l); err != nil {
			return ocispec.Descriptor{}, err
		}
		if err := w.Close(); err != nil {
			return ocispec.Descriptor{}, err
		}
		d, err := i.blob(h, z.Bytes(), ocispec.MediaTypeImageLayerGzip)
		if err != nil {
			return d, err
		}
		m.Layers = append(m.Layers, d)
		config.History = append(config.History, ocispec.History{Created: &created, CreatedBy: "testimages"})
	}
	raw, err := json.Marshal(config)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if m.Config, err = i.blob(h, raw, ocispec.MediaTypeImageConfig); err != nil {
		return ocispec.Descriptor{}, err
	}
	d, err := i.put(h, m, ocispec.MediaTypeImageManifest, tag)
	d.Platform = &p
	return d, err
}

func (i image) blob(h http.Handler, b []byte, mediaType string) (ocispec.Descriptor, error) {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return d, send(h, http.MethodPost, "/v2/"+i.name+"/blobs/uploads/?digest="+d.Digest.String(), "application/octet-stream", b)
}

// put stores a manifest or index under the tag, or under its digest.
func (i image) put(h http.Handler, v any, mediaType, tag string) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	if tag == "" {
		tag = d.Digest.String()
	}
	return d, send(h, http.MethodPut, "/v2/"+i.name+"/manifests/"+tag, mediaType, b)
}

func send(h http.Handler, method, path, mediaType string, b []byte) error {
	r := httptest.NewRequest(method, path, bytes.NewReader(b))
	r.Header.Set("Content-Type", mediaType)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code/100 != 2 {
		return fmt.Errorf("%s %s: %d %s", method, path, w.Code, w.Body)
	}
	return nil
}

// created is when all of them say that they were made: some clients want to know.
var created = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// file is an entry of a layer: a directory if its name ends in a slash, a link if link is set.
type file struct {
	name, link string
	data       []byte
	mode       int64
	uid, gid   int
}

// applets are the names under which the tests call busybox.
const applets = "sh cat ls sleep id ps echo hostname true false tty touch stty top head tail dd grep sed cp mv rm ln mkdir rmdir mount umount " +
	"chmod chown chgrp stat sync tar gzip test [ env printf kill trap wc sort uniq seq sum md5sum sha256sum date uname whoami wget ping ip " +
	"ifconfig route nslookup httpd tee xargs find cut tr awk vi yes sha1sum readlink mknod mkfifo df du free su adduser addgroup basename dirname expr usleep od"

// root is a small root file system with accounts as Debian numbers them.
func root(busybox []byte) []file {
	fs := []file{
		{name: "bin/"}, {name: "dev/"}, {name: "etc/"}, {name: "home/"}, {name: "proc/"}, {name: "root/", mode: 0o700}, {name: "run/"}, {name: "sys/"},
		{name: "tmp/", mode: 0o1777}, {name: "usr/"}, {name: "usr/bin/"}, {name: "usr/sbin/"}, {name: "var/"}, {name: "var/www/"},
		{name: "bin/busybox", data: busybox, mode: 0o755},
		{name: "bin/bash", data: []byte("#!/bin/sh\nexec sh \"$@\"\n"), mode: 0o755},
		// Debian's nc has no handler for signals, so that as a first process it would get none.
		{name: "bin/nc", data: []byte("#!/bin/sh\ntrap 'kill $!; exit 143' TERM\nbusybox nc \"$@\" &\nwait $!\n"), mode: 0o755},
		{name: "usr/bin/passwd", data: []byte("#!/bin/sh\n"), mode: 0o4755}, // one test looks for the bit
		{name: "etc/passwd", data: []byte("root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nsys:x:3:3:sys:/dev:/bin/false\nsync:x:4:100:sync:/bin:/bin/sync\nwww-data:x:33:33:www-data:/var/www:/bin/false\nbackup:x:34:34:backup:/var/backups:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n")},
		{name: "etc/group", data: []byte("root:x:0:\ndaemon:x:1:\nsys:x:3:\ntty:x:5:\nwww-data:x:33:\nbackup:x:34:\nusers:x:100:\nnogroup:x:65534:\n")},
	}
	names := strings.Fields(applets)
	sort.Strings(names)
	for _, a := range names {
		fs = append(fs, file{name: "bin/" + a, link: "busybox"})
	}
	return fs
}

func layer(files ...file) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Linkname: f.link, Mode: f.mode, Size: int64(len(f.data)), Uid: f.uid, Gid: f.gid, Typeflag: tar.TypeReg}
		switch {
		case f.link != "":
			h.Typeflag = tar.TypeSymlink
		case strings.HasSuffix(f.name, "/"):
			h.Typeflag = tar.TypeDir
			if h.Mode == 0 {
				h.Mode = 0o755
			}
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(h); err != nil {
			log.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			log.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		log.Fatal(err)
	}
	return b.Bytes()
}

// certificate makes one that signs itself, and writes it to the path that clients will trust.
func certificate(path string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "testimages"}, DNSNames: hosts, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(7 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, err
	}
	raw := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if path != "" {
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			return tls.Certificate{}, err
		}
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
