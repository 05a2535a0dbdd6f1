package store

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// crashRounds is how often the child is killed.
const crashRounds = 50

// acked is one line of what the child says it was promised.
type acked struct {
	Op, ID string
	N      int
}

// TestMain makes this program TestCrash's child if it is asked to be.
func TestMain(m *testing.M) {
	if root := os.Getenv("HAKO_CRASH_ROOT"); root != "" {
		fmt.Println("FAIL:", crashChild(root))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// crashChild works until it is killed, and says what was acknowledged. It returns on
// an error alone.
func crashChild(root string) error {
	s, err := Open(root, Options{GCDelay: 3 * time.Millisecond, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	var mu sync.Mutex
	ack := func(op, id string, n int) {
		raw, _ := json.Marshal(acked{op, id, n})
		mu.Lock()
		defer mu.Unlock()
		fmt.Printf("ack %s\n", raw)
	}
	failed := make(chan error)
	for w := range 4 {
		go func() {
			for i := rand.IntN(1 << 30); ; i++ {
				if err := crashStep(s, w, i, ack); err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	return <-failed
}

// crashStep stores a blob, an image and two records.
func crashStep(s *Store, w, i int, ack func(op, id string, n int)) error {
	ctx := inNamespace("a")
	id := fmt.Sprintf("%d-%d", w, i%7)
	text := strings.Repeat(fmt.Sprint("text", w, i), 1+rand.IntN(3000))
	d := ocispec.Descriptor{MediaType: "t", Digest: digest.FromString(text), Size: int64(len(text))}
	l, err := s.Leases().Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour))
	if err != nil {
		return err
	}
	if err := content.WriteBlob(leases.WithLease(ctx, l.ID), s.Content(), "r"+id, iterReader(text), d); err != nil {
		return err
	}
	img := images.Image{Name: id, Target: d, Labels: map[string]string{"n": fmt.Sprint(i)}}
	ack("try-image", id, i)
	_, err = s.Images().Update(ctx, img)
	if errdefs.IsNotFound(err) {
		_, err = s.Images().Create(ctx, img)
	}
	if err != nil {
		return err
	}
	ack("image", id, i)
	if err := s.Leases().Delete(ctx, l); err != nil {
		return err
	}
	// The two are always equal.
	ack("try-pair", id, i)
	if err := s.Write(ctx, Change{"left", id, i}, Change{"right", id, i}); err != nil {
		return err
	}
	ack("pair", id, i)
	return nil
}

// iterReader is read in small pieces, so that the kill comes within a blob.
func iterReader(text string) io.Reader {
	return struct{ io.Reader }{bufio.NewReaderSize(bytes.NewReader([]byte(text)), 512)}
}

// TestCrash kills a process that works on a store, again and again: what was
// acknowledged is there, and nothing is torn.
func TestCrash(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a while: TestCrash")
	}
	root := t.TempDir()
	// Of each object: the last value acknowledged, and those tried since.
	images, pairs := map[string]map[int]bool{}, map[string]map[int]bool{}
	note := func(m map[string]map[int]bool, id string, n int, final bool) {
		switch {
		case final:
			m[id] = map[int]bool{}
		case m[id] == nil:
			m[id] = map[int]bool{-1: true} // may not be there at all
		}
		m[id][n] = true
	}
	promises := 0
	for round := range crashRounds {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "HAKO_CRASH_ROOT="+root)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		// After some steps, however long they take, and not at one: a little later.
		kill := func() { _ = cmd.Process.Signal(syscall.SIGKILL) }
		left := 10 + rand.IntN(40)
		backstop := time.AfterFunc(5*time.Minute, kill)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			raw, ok := strings.CutPrefix(lines.Text(), "ack ")
			if !ok {
				t.Error("child:", lines.Text())
				continue
			}
			var a acked
			if json.Unmarshal([]byte(raw), &a) != nil {
				continue // cut by the kill
			}
			promises++
			if left--; left == 0 {
				time.AfterFunc(time.Duration(rand.IntN(20))*time.Millisecond, kill)
			}
			switch a.Op {
			case "try-image":
				note(images, a.ID, a.N, false)
			case "image":
				note(images, a.ID, a.N, true)
			case "try-pair":
				note(pairs, a.ID, a.N, false)
			case "pair":
				note(pairs, a.ID, a.N, true)
			}
		}
		_ = cmd.Wait()
		backstop.Stop()
		checkAfterCrash(t, root, images, pairs, round)
		if t.Failed() {
			return
		}
	}
	if promises < 10*crashRounds {
		t.Errorf("only %d steps were made: this proves little", promises)
	}
	t.Logf("%d steps, %d images, %d pairs", promises, len(images), len(pairs))
}

func checkAfterCrash(t *testing.T, root string, images, pairs map[string]map[int]bool, round int) {
	s, err := Open(root, Options{NoBackgroundGC: true, Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	defer s.Close()
	ctx := inNamespace("a")
	collect(t, s)
	for id, allowed := range images {
		img, err := s.Images().Get(ctx, id)
		if errdefs.IsNotFound(err) && allowed[-1] {
			continue
		}
		must(t, err)
		n := -1
		fmt.Sscan(img.Labels["n"], &n)
		if !allowed[n] {
			t.Errorf("round %d: image %s is number %d, allowed are %v", round, id, n, allowed)
		}
		got, err := content.ReadBlob(ctx, s.Content(), ocispec.Descriptor{Digest: img.Target.Digest})
		if err != nil || digest.FromBytes(got) != img.Target.Digest {
			t.Errorf("round %d: image %s: its blob has %d bytes, %v", round, id, len(got), err)
		}
	}
	for id, allowed := range pairs {
		l, r := -1, -1
		errL, errR := s.Records("left").Get(ctx, id, &l), s.Records("right").Get(ctx, id, &r)
		if l != r || !allowed[l] {
			t.Errorf("round %d: records %s are %d (%v) and %d (%v), allowed are %v", round, id, l, errL, r, errR, allowed)
		}
	}
	// Every blob on disk is whole, acknowledged or not.
	must(t, filepath.WalkDir(filepath.Join(root, "content/blobs"), func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(p)
		if err != nil || digest.FromBytes(raw).Encoded() != d.Name() {
			t.Errorf("round %d: blob %s is torn: %d bytes, %v", round, d.Name(), len(raw), err)
		}
		return nil
	}))
}

// Every durable step of a commit fails once: the blob cannot be found, the same
// ingest can be done again, and nothing is left over.
func TestCommitStepsFail(t *testing.T) {
	for i, step := range []string{"sync file", "rename", "sync directory", "commit metadata"} {
		t.Run(step, func(t *testing.T) {
			s := openTest(t, t.TempDir())
			ctx := inNamespace("a")
			text := fmt.Sprint("text", i)
			failed := 0
			s.blobs.fail = func(at string) error {
				if at == step && failed == 0 {
					failed++
					return fmt.Errorf("broken: %w", syscall.ENOSPC)
				}
				return nil
			}
			err := content.WriteBlob(ctx, s.Content(), "r", strings.NewReader(text), describe(text))
			if failed != 1 || !errdefs.IsResourceExhausted(err) {
				t.Fatalf("failed %d times: %v", failed, err)
			}
			if there(t, ctx, s, describe(text)) {
				t.Error("a commit that failed can be seen")
			}
			must(t, content.WriteBlob(ctx, s.Content(), "r", strings.NewReader(text), describe(text), content.WithLabels(map[string]string{labelRoot: "x"})))
			if got, err := content.ReadBlob(ctx, s.Content(), ocispec.Descriptor{Digest: digest.FromString(text)}); err != nil || string(got) != text {
				t.Error(got, err)
			}
			if st := collect(t, s); st.Orphans != 0 || st.Content != 0 {
				t.Errorf("%+v", st)
			}
			if left, err := s.blobs.ingests(); err != nil || len(left) != 0 {
				t.Error(left, err)
			}
		})
	}
}

// small mounts a file system of a few bytes, and gives its directory.
func small(t *testing.T, size string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: " + t.Name())
	}
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+size))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestFullDisk(t *testing.T) {
	root := small(t, "4m")
	s, err := Open(root, Options{NoBackgroundGC: true, Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	defer s.Close()
	ctx := inNamespace("a")
	kept := blob(t, ctx, s, "kept", labelRoot, "x")
	must(t, s.Records("r").Put(ctx, "kept", "value"))

	// A blob that does not fit.
	big := strings.Repeat("0123456789abcdef", 1<<19)
	err = content.WriteBlob(ctx, s.Content(), "big", strings.NewReader(big), describe(big))
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("a blob: %v", err)
	}
	must(t, s.Content().Abort(ctx, "big"))

	// Records until none fits.
	var last error
	n := 0
	for ; n < 10_000 && last == nil; n++ {
		last = s.Records("r").Put(ctx, fmt.Sprint(n), strings.Repeat("x", 30_000))
	}
	if !errdefs.IsResourceExhausted(last) {
		t.Errorf("a record: %v", last)
	}
	var got string
	if err := s.Records("r").Get(ctx, fmt.Sprint(n-1), &got); !errdefs.IsNotFound(err) {
		t.Error("the record that failed is there:", err)
	}
	for i := range n - 1 {
		must(t, s.Records("r").Get(ctx, fmt.Sprint(i), &got))
	}
	// Nothing new fits, but all that was there is, and deleting makes room.
	if w, err := s.Content().Writer(ctx, content.WithRef("w")); err == nil {
		_, err = io.WriteString(w, big)
		if !errdefs.IsResourceExhausted(err) {
			t.Errorf("a write: %v", err)
		}
		_ = w.Close()
		_ = s.Content().Abort(ctx, "w")
	} else if !errdefs.IsResourceExhausted(err) {
		t.Errorf("an ingest: %v", err)
	}
	must(t, s.Records("r").Get(ctx, "kept", &got))
	if raw, err := content.ReadBlob(ctx, s.Content(), ocispec.Descriptor{Digest: kept.Digest}); err != nil || string(raw) != "kept" {
		t.Error(raw, err)
	}
	for i := range n - 1 {
		_ = s.Records("r").Delete(ctx, fmt.Sprint(i))
	}
	must(t, s.Records("r").Put(ctx, "after", "value"))
	collect(t, s)
	if left, err := os.ReadDir(filepath.Join(root, "content/ingest")); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
	if left, err := os.ReadDir(filepath.Join(root, "content/blobs/sha256")); err != nil || len(left) != 1 {
		t.Errorf("left %v, %v", left, err)
	}
	must(t, s.Close())
	s, err = Open(root, Options{NoBackgroundGC: true})
	must(t, err)
	defer s.Close()
	must(t, s.Records("r").Get(context.Background(), "after", &got))
}

func TestFullDiskAtOpen(t *testing.T) {
	root := small(t, "16k")
	if _, err := Open(filepath.Join(root, "s"), Options{}); !errdefs.IsResourceExhausted(err) {
		t.Error(err)
	}
}
