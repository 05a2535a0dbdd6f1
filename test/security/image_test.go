//go:build linux && (amd64 || arm64)

package security

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// naive unpacks as engines did before the first of these holes was published: it joins names
// to the folder and trusts them.
func naive(dir string, raw []byte) {
	for r := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := r.Next()
		if err != nil {
			return
		}
		name := dir + "/" + h.Name
		if parent, err := filepath.EvalSymlinks(filepath.Dir(name)); err != nil || !strings.HasPrefix(parent, workDir+"/") {
			continue // the control must hurt nothing but the canary
		}
		if base := filepath.Base(name); strings.HasPrefix(base, ".wh.") {
			os.RemoveAll(filepath.Dir(name) + "/" + base[4:])
			continue
		}
		switch h.Typeflag {
		case tar.TypeDir:
			os.MkdirAll(name, 0o755)
			os.Chmod(name, h.FileInfo().Mode())
		case tar.TypeSymlink:
			os.Symlink(h.Linkname, name)
		case tar.TypeLink:
			os.Link(dir+"/"+h.Linkname, name)
		case tar.TypeReg:
			if f, err := os.Create(name); err == nil {
				_, _ = io.Copy(f, r)
				f.Close()
				os.Chmod(name, h.FileInfo().Mode())
			}
		}
	}
}

// CVE-2021-32760, CVE-2025-47290, CVE-2026-17106 and others: members of a layer, or of two,
// leave the root. The corpus of 90 archives is in image/unpack.TestHostile; here the attacks
// go through the whole engine, and are shown to work.
func TestC1Layers(t *testing.T) {
	n := engineNode(t)
	c := newCanary(t)
	up := strings.Repeat("../", 30) + strings.TrimPrefix(c.dir, "/")
	hit, control := "", 0
	attacks := map[string][][]entry{
		"absolute link, then write":   {{{name: "l", link: c.dir}, {name: "l/ptmx", content: "owned"}}},
		"climbing link, then write":   {{{name: "l", link: up}, {name: "l/new", content: "owned"}}},
		"chain of links":              {{{name: "a", link: "b"}, {name: "b", link: c.dir}, {name: "a/sub/file", content: "owned"}}},
		"two layers conspire":         {{{name: "l", link: c.dir}}, {{name: "l/sub/file", content: "owned"}}},
		"dots":                        {{{name: up + "/ptmx", content: "owned"}}},
		"mode through a link":         {{{name: "l", link: c.dir}, {name: "l/sub/", mode: 0o777}}},
		"whiteout through a link":     {{{name: "l", link: c.dir}}, {{name: "l/.wh.ptmx"}}},
		"whiteout of the parent":      {{{name: "l", link: c.dir + "/sub"}}, {{name: "l/.wh..", mode: 0o644}}},
		"hard link to a link":         {{{name: "l", link: c.dir + "/ptmx"}, {name: "h", typ: tar.TypeLink, link: "l"}, {name: "h", content: "owned"}}},
		"hard link out":               {{{name: "h", typ: tar.TypeLink, link: up + "/ptmx"}, {name: "h", content: "owned"}}},
		"file over a link":            {{{name: "l", link: c.dir + "/new"}, {name: "l", content: "owned"}}},
		"opaque through a link":       {{{name: "l", link: c.dir}}, {{name: "l/.wh..wh..opq"}}},
		"device in a folder by link":  {{{name: "l", link: c.dir}, {name: "l/dev", typ: tar.TypeChar}}},
		"link in place of a folder":   {{{name: "d/"}, {name: "d/file", content: "x"}}, {{name: "d", link: c.dir}, {name: "d/kernel/shm_rmid_forced", content: "owned"}}},
		"the root is a link":          {{{name: "./", mode: 0o777}, {name: ".", link: c.dir}, {name: "new", content: "owned"}}},
		"work folder of the overlay":  {{{name: "../work/x", content: "owned"}, {name: "../../../../x", content: "owned"}}},
		"slashes and dots in between": {{{name: "a/"}, {name: "a/./..//../" + up + "/new", content: "owned"}}},
	}
	for what, layers := range attacks {
		dir, err := os.MkdirTemp(workDir, "naive")
		must(t, err)
		for _, l := range layers {
			raw, err := archive(l...)
			must(t, err)
			naive(dir, raw)
		}
		os.RemoveAll(dir)
		if c.touched(t) != "" {
			control++
		}
		ref, err := n.load(t, nil, append([][]entry{base(t)}, layers...)...)
		if err == nil {
			_, _ = n.run(t, script(ref, "true"))
		}
		if h := c.touched(t); h != "" {
			hit = what + ": " + h
		}
	}
	seen := ""
	if control > len(attacks)/2 {
		seen = fmt.Sprintf("%d of %d attacks", control, len(attacks))
	}
	compared(t, "C1 CVE-2021-32760, 2025-47290 layers", "a naive unpacker", seen, hit)
}

// CVE-2021-21285: a malformed image ends the daemon. All fields of all documents: see
// image.TestBadDocuments.
func TestC3MalformedImages(t *testing.T) {
	n := engineNode(t)
	hit, control := "", ""
	for _, manifest := range []string{"null", "[null]", "[]", "[{}]", `[{"Config":null,"Layers":null,"RepoTags":null}]`, `[{"Config":"c","Layers":["../../etc/passwd"]}]`, `{"a":1}`, `[{"Config":"manifest.json","Layers":[]}]`} {
		raw, err := archive(entry{name: "manifest.json", content: manifest}, entry{name: "c", content: "null"})
		must(t, err)
		if code, body := n.call("POST", "/images/load?quiet=1", bytes.NewReader(raw)); code == 0 || strings.Contains(body, "Loaded image") {
			hit = fmt.Sprintf("%s: %d %s", manifest, code, body)
		}
		if code, _ := n.call("GET", "/_ping", nil); code != 200 {
			hit = manifest + ": the daemon does not answer"
		}
		if err := trusting(manifest, map[string]string{"c": "null", "manifest.json": manifest}); err != nil {
			control += fmt.Sprintf("%s: %v; ", manifest, err)
		}
	}
	compared(t, "C3 CVE-2021-21285 malformed images", "reading them with trust", control, hit)
}

// trusting reads an image's documents and believes that what must be there is there. It gives what would have ended a daemon.
func trusting(manifest string, files map[string]string) (ended any) {
	defer func() { ended = recover() }()
	var images []struct {
		Config *string
		Layers []string
	}
	if json.Unmarshal([]byte(manifest), &images) != nil {
		return nil
	}
	var config *struct {
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if json.Unmarshal([]byte(files[*images[0].Config]), &config) == nil {
		for i := range images[0].Layers {
			_ = config.RootFS.DiffIDs[i]
		}
		_ = config.RootFS.DiffIDs[0]
	}
	return nil
}
