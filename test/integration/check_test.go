package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/hako-engine/hako/snapshot"
	"github.com/hako-engine/hako/test/chaos"
)

// checkFound is one finding of a check.
type checkFound struct{ Problem, Severity, Object, Detail, Repaired, Failed string }

type checkReport struct{ Findings []checkFound }

func (r checkReport) String() string {
	var b strings.Builder
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "%+v\n", f)
	}
	return b.String()
}

// checkRoot runs hakod check.
func checkRoot(t *testing.T, n *node, code int, args ...string) (r checkReport) {
	t.Helper()
	cmd := exec.Command(filepath.Join(workDir, "hakod"), append([]string{"check", "--format", "json", "--root", filepath.Join(n.dir, "lib"), "--state", filepath.Join(n.dir, "run"),
		"--config", os.DevNull, "--registry-dir", filepath.Join(n.dir, "certs.d")}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if code != 3 {
		if err := json.Unmarshal(out.Bytes(), &r); err != nil {
			t.Fatalf("hakod check %v: %v: %s%s", args, err, out.Bytes(), errs.Bytes())
		}
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("hakod check %v: exit %d, want %d: %v%s", args, got, code, r, errs.Bytes())
	}
	return r
}

// checkOnline asks the daemon.
func checkOnline(t *testing.T, n *node, query string) (r checkReport) {
	t.Helper()
	code, body, err := n.request("POST", "/hako/v1/check"+query, nil)
	if err != nil || code != 200 {
		t.Fatalf("check: %d %s %v", code, body, err)
	}
	for line := range strings.Lines(body) {
		var l struct {
			Report *checkReport
			Error  string
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil || l.Error != "" {
			t.Fatalf("check: %s %v", line, err)
		}
		if l.Report != nil {
			return *l.Report
		}
	}
	t.Fatalf("check: no report: %s", body)
	return r
}

func (r checkReport) find(problem string) (checkFound, bool) {
	i := slices.IndexFunc(r.Findings, func(f checkFound) bool { return f.Problem == problem })
	if i < 0 {
		return checkFound{}, false
	}
	return r.Findings[i], true
}

// left are findings that count.
func (r checkReport) left() (left []checkFound) {
	for _, f := range r.Findings {
		if f.Severity != "note" && f.Repaired == "" {
			left = append(left, f)
		}
	}
	return left
}

// metadata changes meta.db of a daemon that does not run.
func metadata(t *testing.T, n *node, change func(v1 *bolt.Bucket) error) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(n.dir, "lib/meta.db"), 0o600, &bolt.Options{NoFreelistSync: true})
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(db.Update(func(tx *bolt.Tx) error { return change(tx.Bucket([]byte("v1"))) }), db.Close())
	if err != nil {
		t.Fatal(err)
	}
}

// within gives the bucket at a path.
func within(b *bolt.Bucket, path ...string) *bolt.Bucket {
	for _, p := range path {
		b = b.Bucket([]byte(p))
	}
	return b
}

// checked is what the tests of damage break.
type checkedNode struct {
	*node
	t                       *testing.T
	snapshotter             string
	image                   string // pulled
	manifest, config, layer string // hex digests
	chain                   []string
	container               string // id
}

func (c checkedNode) lib(elem ...string) string {
	return filepath.Join(append([]string{c.dir, "lib"}, elem...)...)
}

func (c checkedNode) blob(hex string) string { return c.lib("content/blobs/sha256", hex) }

// snapshotDir gives the directory of a snapshot.
func (c checkedNode) snapshotDir(key string) (dir string) {
	c.t.Helper()
	metadata(c.t, c.node, func(v1 *bolt.Bucket) error {
		var r struct{ ID uint64 }
		if err := json.Unmarshal(within(v1, "ns", "k8s.io", "snapshots."+c.snapshotter, "keys").Get([]byte(key)), &r); err != nil {
			return err
		}
		dir = c.lib(c.snapshotter, "snapshots", fmt.Sprint(r.ID))
		return nil
	})
	return dir
}

func (c checkedNode) garble(path []string, key string) {
	metadata(c.t, c.node, func(v1 *bolt.Bucket) error { return within(v1, path...).Put([]byte(key), []byte(`{"size":12`)) })
}

func (c checkedNode) drop(path []string, key string) {
	metadata(c.t, c.node, func(v1 *bolt.Bucket) error { return within(v1, path...).Delete([]byte(key)) })
}

// TestCheckFindsAndRepairs breaks a root in every way that a check knows: it is found by
// its name, repaired, and after that everything is clean and works.
func TestCheckFindsAndRepairs(t *testing.T) {
	t.Run("overlayfs", func(t *testing.T) { findAndRepair(t, "overlayfs") })
	t.Run("erofs", func(t *testing.T) { findAndRepair(t, "erofs") })
}

func findAndRepair(t *testing.T, snapshotter string) {
	t.Setenv("HAKO_TEST_SNAPSHOTTER", snapshotter)
	if snapshotter == "erofs" {
		needs(t)
		if err := snapshot.ErofsSupported(t.TempDir()); err != nil {
			t.Skipf("%s needs EROFS below overlayfs: %v", t.Name(), err)
		}
	}
	n := own(t)
	images := chaos.NewRegistry(4 << 10)
	server := httptest.NewServer(images)
	t.Cleanup(server.Close)
	name := strings.TrimPrefix(server.URL, "http://") + "/some/img2:latest"
	n.docker(t, "pull", name)
	n.docker(t, "volume", "create", "vol")
	c := checkedNode{node: n, t: t, image: name, snapshotter: snapshotter}
	c.container = n.docker(t, "create", "--name", "ct", "-v", "vol:/v", name)
	n.docker(t, "create", "--name", "loaded", testImage, "true")
	if r := checkOnline(t, n, "?deep=1"); len(r.left()) > 0 {
		t.Fatalf("nothing is broken yet:\n%v", r)
	}
	// What the image is made of.
	var inspect []struct{ Id string }
	if err := json.Unmarshal([]byte(n.docker(t, "image", "inspect", name)), &inspect); err != nil {
		t.Fatal(err)
	}
	c.config = strings.TrimPrefix(inspect[0].Id, "sha256:")
	stop := func() {
		t.Helper()
		if err := n.signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	metadata(t, n, func(v1 *bolt.Bucket) error {
		var img struct{ Target struct{ Digest string } }
		if err := json.Unmarshal(within(v1, "ns", "k8s.io", "images").Get([]byte(name)), &img); err != nil {
			return err
		}
		c.manifest = strings.TrimPrefix(img.Target.Digest, "sha256:")
		return nil
	})
	raw, err := os.ReadFile(c.blob(c.manifest))
	if err != nil {
		t.Fatal(err)
	}
	var manifest struct{ Layers []struct{ Digest string } }
	if err := json.Unmarshal(raw, &manifest); err != nil {
		t.Fatal(err)
	}
	c.layer = strings.TrimPrefix(manifest.Layers[1].Digest, "sha256:")
	metadata(t, n, func(v1 *bolt.Bucket) error {
		keys := within(v1, "ns", "k8s.io", "snapshots."+snapshotter, "keys")
		for key := c.container; key != ""; {
			var r struct{ Parent string }
			if err := json.Unmarshal(keys.Get([]byte(key)), &r); err != nil {
				return err
			}
			if key != c.container {
				c.chain = append([]string{key}, c.chain...)
			}
			key = r.Parent
		}
		return nil
	})

	k8s := func(section ...string) []string { return append([]string{"ns", "k8s.io"}, section...) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	keys := k8s("snapshots."+snapshotter, "keys")
	works := func(t *testing.T) {
		if err := n.start(); err != nil {
			t.Fatal(err)
		}
		defer stop()
		if r := checkOnline(t, n, "?deep=1"); len(r.left()) > 0 {
			t.Errorf("the daemon finds:\n%v", r)
		}
		for _, name := range []string{"ct", "loaded"} {
			if got := n.docker(t, "inspect", "-f", "{{.State.Status}}", name); got != "created" {
				t.Errorf("container %s is %s", name, got)
			}
		}
		if got := n.docker(t, "image", "inspect", "-f", "{{.Id}}", name); got != images.ID(2) {
			t.Errorf("the image is %s", got)
		}
		// All of it can be read and mounted.
		n.docker(t, "save", "-o", filepath.Join(t.TempDir(), "tar"), name)
		n.docker(t, "cp", "ct:/layer1", filepath.Join(t.TempDir(), "out"))
		n.docker(t, "run", "--rm", testImage, "true")
	}
	ofLayer := "files-missing"
	if snapshotter == "erofs" {
		ofLayer = "image-damaged"
	}
	// alter changes a byte of a layer's image.
	alter := func(at int64) func() {
		return func() {
			f, err := os.OpenFile(filepath.Join(c.snapshotDir(c.chain[1]), "layer.erofs"), os.O_RDWR, 0)
			must(err)
			defer f.Close()
			if at < 0 {
				st, err := f.Stat()
				must(err)
				at += st.Size()
			}
			b := make([]byte, 1)
			_, err = f.ReadAt(b, at)
			must(err)
			b[0] ^= 1
			_, err = f.WriteAt(b, at)
			must(err)
		}
	}
	done := 0
	for what, d := range map[string]struct {
		problem string
		object  string // "": any
		deep    bool   // only found so
		damage  func()
	}{
		"a bit of a layer flipped": {"blob-digest", "sha256:" + c.layer, true, func() {
			b, err := os.ReadFile(c.blob(c.layer))
			must(err)
			b[len(b)/2] ^= 4
			must(os.Remove(c.blob(c.layer)))
			must(os.WriteFile(c.blob(c.layer), b, 0o444))
		}},
		"a bit of a config flipped": {"blob-digest", "sha256:" + c.config, false, func() {
			b, err := os.ReadFile(c.blob(c.config))
			must(err)
			b[10] ^= 1
			must(os.Remove(c.blob(c.config)))
			must(os.WriteFile(c.blob(c.config), b, 0o444))
		}},
		"a manifest's file removed":     {"blob-missing", "sha256:" + c.manifest, false, func() { must(os.Remove(c.blob(c.manifest))) }},
		"a layer truncated":             {"blob-size", "sha256:" + c.layer, false, func() { must(os.Truncate(c.blob(c.layer), 100)) }},
		"a config truncated to nothing": {"blob-size", "sha256:" + c.config, false, func() { must(os.Truncate(c.blob(c.config), 0)) }},
		"a layer's record removed":      {"image-incomplete", name, false, func() { c.drop(k8s("content"), "sha256:"+c.layer) }},
		"a manifest's record removed":   {"image-incomplete", name, false, func() { c.drop(k8s("content"), "sha256:"+c.manifest) }},
		"a manifest's record damaged":   {"record-damaged", "content sha256:" + c.manifest, false, func() { c.garble(k8s("content"), "sha256:"+c.manifest) }},
		"a layer's record damaged":      {"record-damaged", "content sha256:" + c.layer, false, func() { c.garble(k8s("content"), "sha256:"+c.layer) }},
		"an image's record damaged": {"record-damaged", "images docker.io/library/x:1", false, func() {
			c.garble(k8s("images"), "docker.io/library/x:1")
		}},
		"a lease's record damaged": {"record-damaged", "leases l", false, func() {
			metadata(t, n, func(v1 *bolt.Bucket) error {
				b, err := within(v1, "ns", "k8s.io").CreateBucketIfNotExists([]byte("leases"))
				if err == nil {
					b, err = b.CreateBucketIfNotExists([]byte("l"))
				}
				if err != nil {
					return err
				}
				return b.Put([]byte("info"), []byte("{"))
			})
		}},
		"a layer's directory removed":                 {"directory-missing", snapshotter + " " + c.chain[1], false, func() { must(os.RemoveAll(c.snapshotDir(c.chain[1]))) }},
		"the lowest directory removed":                {"directory-missing", snapshotter + " " + c.chain[0], false, func() { must(os.RemoveAll(c.snapshotDir(c.chain[0]))) }},
		"the topmost directory removed":               {"directory-missing", snapshotter + " " + c.chain[len(c.chain)-1], false, func() { must(os.RemoveAll(c.snapshotDir(c.chain[len(c.chain)-1]))) }},
		"a byte of a file of a layer altered":         {"image-damaged", "erofs " + c.chain[1], true, alter(4096 + 7)},
		"a byte of the metadata of a layer altered":   {"image-damaged", "erofs " + c.chain[1], true, alter(-4096 + 100)},
		"a byte of the superblock of a layer altered": {"image-damaged", "erofs " + c.chain[1], true, alter(1024 + 16)},
		"files of a layer removed": {ofLayer, snapshotter + " " + c.chain[1], true, func() {
			dir := c.snapshotDir(c.chain[1])
			if snapshotter == "erofs" {
				must(os.Truncate(filepath.Join(dir, "layer.erofs"), 8192))
				return
			}
			must(os.RemoveAll(filepath.Join(dir, "fs", fileIn(t, dir))))
		}},
		"a container's directory removed": {"directory-missing", snapshotter + " " + c.container, false, func() { must(os.RemoveAll(c.snapshotDir(c.container))) }},
		"a layer's snapshot removed":      {"parent-missing", "", false, func() { c.drop(keys, c.chain[1]) }},
		"a layer's snapshot damaged":      {"record-damaged", snapshotter + " " + c.chain[1], false, func() { c.garble(keys, c.chain[1]) }},
		"a container's snapshot removed":  {"container-snapshot-missing", c.container, false, func() { c.drop(keys, c.container) }},
		"the list of children damaged":    {"index-wrong", "", false, func() { c.drop(k8s("snapshots."+snapshotter, "children"), c.chain[0]+"\x00"+c.chain[1]) }},
		"a blob that nobody has":          {"blob-orphan", "", false, func() { must(os.WriteFile(c.blob(strings.Repeat("ab", 32)), []byte("x"), 0o444)) }},
		"a file among the blobs":          {"file-stray", "content/blobs/sha256/core", false, func() { must(os.WriteFile(c.blob("core"), []byte("x"), 0o600)) }},
		"an ingest without a record":      {"ingest-damaged", "feed", false, func() { must(os.Mkdir(c.lib("content/ingest/feed"), 0o700)) }},
		"a directory without a snapshot":  {"directory-orphan", snapshotter + " 99999", false, func() { must(os.MkdirAll(c.lib(snapshotter, "snapshots/99999/fs"), 0o700)) }},
		"a file among the snapshots":      {"file-stray", snapshotter + " x", false, func() { must(os.WriteFile(c.lib(snapshotter, "snapshots/x"), nil, 0o600)) }},
		"a volume's folder removed":       {"volume-folder-missing", "vol", false, func() { must(os.RemoveAll(c.lib("volumes/vol"))) }},
		"a volume's record removed":       {"container-volume-missing", c.container, false, func() { c.drop([]string{"records", "volumes"}, "vol") }},
		"a volume's record damaged":       {"record-damaged", "record volumes vol", false, func() { c.garble([]string{"records", "volumes"}, "vol") }},
		"a folder without a volume":       {"volume-folder-stray", "stray", false, func() { must(os.MkdirAll(c.lib("volumes/stray/_data"), 0o755)) }},
		"a container's folder removed":    {"container-folder-missing", c.container, false, func() { must(os.RemoveAll(c.lib("containers", c.container))) }},
		"a folder without a container":    {"container-folder-stray", strings.Repeat("0", 64), false, func() { must(os.Mkdir(c.lib("containers", strings.Repeat("0", 64)), 0o710)) }},
		"a record of an unknown container": {"container-damaged", "x", false, func() {
			metadata(t, n, func(v1 *bolt.Bucket) error { return within(v1, "records", "containers").Put([]byte("x"), []byte(`{}`)) })
		}},
		"a record of a container that is torn": {"record-damaged", "record containers y", false, func() { c.garble([]string{"records", "containers"}, "y") }},
		"a page of the metadata overwritten":   {"page-damaged", "", false, func() { c.overwritePage() }},
	} {
		if snapshotter == "erofs" && !strings.HasPrefix(d.object, "erofs ") && d.problem != "parent-missing" {
			continue // the same as with overlayfs
		}
		if snapshotter != "erofs" && d.problem == "image-damaged" {
			continue
		}
		t.Run(what, func(t *testing.T) {
			d.damage()
			args := []string{}
			if d.deep {
				args = append(args, "--deep")
			}
			r := checkRoot(t, n, 1, args...)
			if f, ok := r.find(d.problem); !ok || d.object != "" && f.Object != d.object {
				if !slices.ContainsFunc(r.Findings, func(f checkFound) bool { return f.Problem == d.problem && (d.object == "" || f.Object == d.object) }) {
					t.Errorf("found:\n%vwant %s of %q", r, d.problem, d.object)
				}
			}
			repaired := checkRoot(t, n, 0, append(args, "--repair")...)
			if again := checkRoot(t, n, 0, "--deep"); len(again.left()) > 0 {
				t.Errorf("after the repair:\n%v\nthere is:\n%v", repaired, again)
			}
			// A start for every damage would take long.
			if done++; done%12 == 0 || testing.Verbose() {
				works(t)
			}
		})
		if t.Failed() {
			break
		}
	}
	works(t)
	torn, files, err := chaos.CheckLayers(c.lib())
	if err != nil || len(torn) > 0 || files == 0 && snapshotter == "overlayfs" {
		t.Errorf("%d files of layers, torn: %v, %v", files, torn, err)
	}
	// A root that a daemon has open is not touched.
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	checkRoot(t, n, 3, "--repair")
}

// TestCheckSparesWhatRuns: a layer that a container runs on is not made anew below it.
func TestCheckSparesWhatRuns(t *testing.T) {
	t.Setenv("HAKO_TEST_SNAPSHOTTER", "overlayfs")
	n := own(t)
	n.docker(t, "run", "-d", "--name", "runs", testImage, "sleep", "1000")
	var layers []string
	dirs, err := filepath.Glob(filepath.Join(n.dir, "lib/overlayfs/snapshots/*/fs/bin"))
	if err != nil || len(dirs) == 0 {
		t.Fatal(dirs, err)
	}
	for _, d := range dirs {
		layers = append(layers, filepath.Dir(filepath.Dir(d)))
	}
	extra := fileIn(t, dirs[0][:len(dirs[0])-len("/fs/bin")])
	if err := os.Rename(filepath.Join(layers[0], "fs", extra), filepath.Join(n.dir, "kept")); err != nil {
		t.Fatal(err)
	}
	r := checkOnline(t, n, "?deep=1&repair=1")
	f, ok := r.find("files-missing")
	if !ok || f.Repaired != "" || !strings.Contains(f.Failed, "a container runs on it") {
		t.Errorf("%v", r)
	}
	if err := os.Rename(filepath.Join(n.dir, "kept"), filepath.Join(layers[0], "fs", extra)); err != nil {
		t.Fatal(err)
	}
	if r := checkOnline(t, n, "?deep=1"); len(r.left()) > 0 {
		t.Errorf("%v", r)
	}
	if got := n.state(t, "runs"); got != "running 0" {
		t.Error(got)
	}
	n.docker(t, "exec", "runs", "true")
}

// fileIn gives the name of an entry of a layer.
func fileIn(t *testing.T, dir string) string {
	t.Helper()
	list, err := os.ReadDir(filepath.Join(dir, "fs"))
	if err != nil || len(list) == 0 {
		t.Fatalf("%s is empty: %v", dir, err)
	}
	return list[0].Name()
}

// overwritePage damages a page of the metadata that the newest version has and the one
// before it has not.
func (c checkedNode) overwritePage() {
	c.t.Helper()
	var page int64 = -1
	db, err := bolt.Open(c.lib("meta.db"), 0o600, &bolt.Options{NoFreelistSync: true})
	if err != nil {
		c.t.Fatal(err)
	}
	// A transaction writes the pages of what it changes anew.
	err = db.Update(func(tx *bolt.Tx) error {
		b, err := tx.Bucket([]byte("v1")).CreateBucketIfNotExists([]byte("test"))
		if err != nil {
			return err
		}
		return b.Put([]byte("key"), bytes.Repeat([]byte("v"), 10000))
	})
	if err == nil {
		err = db.View(func(tx *bolt.Tx) error { page = int64(within(tx.Bucket([]byte("v1")), "test").Root()); return nil })
	}
	size := int64(db.Info().PageSize)
	if err = errors.Join(err, db.Close()); err != nil || page <= 1 {
		c.t.Fatal(page, err)
	}
	f, err := os.OpenFile(c.lib("meta.db"), os.O_RDWR, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(bytes.Repeat([]byte{0xa5}, int(size)), page*size); err != nil {
		c.t.Fatal(err)
	}
	// The daemon does not start on it, and says what to do.
	out, err := exec.Command(filepath.Join(workDir, "hakod"), "--root", c.lib(), "--state", filepath.Join(c.dir, "run"), "--config", os.DevNull, "--bridge-name", c.bridge).CombinedOutput()
	if err == nil || !strings.Contains(string(out), fmt.Sprintf("page %d", page)) || !strings.Contains(string(out), "hakod check --repair") {
		c.t.Errorf("the daemon on a damaged page: %v, %s", err, out)
	}
}
