package integration

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// imageArchive makes the test image once and gives the path of a docker-archive of it.
var imageArchive = sync.OnceValues(func() (string, error) {
	img, err := makeImage()
	if err != nil {
		return "", err
	}
	tag, err := name.NewTag(testImage)
	if err != nil {
		return "", err
	}
	path := filepath.Join(workDir, "image.tar")
	return path, tarball.WriteToFile(path, tag, img)
})

// file is one entry of a layer: a directory for a name that ends in a slash, a link for one with a target.
type file struct {
	name, content, link string
	mode                int64
	uid                 int
}

func layer(files ...file) (v1.Layer, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Uid: f.uid, Gid: f.uid, Size: int64(len(f.content)), Typeflag: tar.TypeReg, ModTime: time.Unix(1700000000, 0)}
		switch {
		case f.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
		case f.name[len(f.name)-1] == '/':
			h.Typeflag = tar.TypeDir
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, f.content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
}

// makeImage makes an image of two layers: busybox with its applets, and the helper with data for a volume.
func makeImage() (v1.Image, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	helper, err := os.ReadFile(filepath.Join(workDir, "helper"))
	if err != nil {
		return nil, err
	}
	base := []file{
		{name: "bin/"}, {name: "etc/"}, {name: "root/"}, {name: "home/"}, {name: "proc/"}, {name: "sys/"}, {name: "dev/"},
		{name: "tmp/", mode: 0o1777},
		{name: "bin/busybox", content: string(busybox)},
		{name: "etc/passwd", content: "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home:/bin/sh\n", mode: 0o644},
		{name: "etc/group", content: "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n", mode: 0o644},
	}
	for _, applet := range []string{
		"sh", "cat", "echo", "sleep", "true", "false", "ls", "id", "pwd", "env", "hostname", "tty", "stty", "head", "wc", "mount", "ip", "ping",
		"nslookup", "wget", "nc", "touch", "mkdir", "rm", "kill", "ps", "stat", "test", "dd", "yes", "seq", "grep", "date", "chmod", "mv", "cp", "readlink",
	} {
		base = append(base, file{name: "bin/" + applet, link: "busybox"})
	}
	first, err := layer(base...)
	if err != nil {
		return nil, err
	}
	second, err := layer(
		file{name: "bin/helper", content: string(helper)},
		file{name: "data/", mode: 0o750, uid: 1000},
		file{name: "data/seed", content: "from the image\n", mode: 0o640, uid: 1000},
		file{name: "etc/noexec", content: "#!/bin/sh\n", mode: 0o644},
	)
	if err != nil {
		return nil, err
	}
	history := func(s string) v1.History {
		return v1.History{CreatedBy: s, Created: v1.Time{Time: time.Unix(1700000000, 0)}}
	}
	img, err := mutate.Append(empty.Image,
		mutate.Addendum{Layer: first, History: history("ADD busybox /")},
		mutate.Addendum{Layer: second, History: history("ADD helper /bin")},
	)
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Author = "linux", runtime.GOARCH, "hako"
	cf.Created = v1.Time{Time: time.Unix(1700000001, 0)}
	cf.Config = v1.Config{
		Cmd: []string{"sh", "-c", "echo default command"}, Env: []string{"PATH=/bin", "FROM_IMAGE=yes"},
		Labels: map[string]string{"org.example.from": "image"}, WorkingDir: "/home",
		ExposedPorts: map[string]struct{}{"8080/tcp": {}},
	}
	return mutate.ConfigFile(img, cf)
}
