package store

import (
	"crypto/sha256"
	_ "crypto/sha512" // registers the algorithm for go-digest
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/hako-engine/hako/internal/durable"
)

// blobs is the directory of blobs: blobs/ALGORITHM/HEX as in an OCI image layout,
// and ingest/ for what is being written. It knows nothing of namespaces.
type blobs struct {
	dir string

	// A lock per part of the digests. Who gives a blob a name in the metadata holds
	// it shared from before the file appears until the metadata does; who removes a
	// file that no metadata names holds it alone.
	locks [64]sync.RWMutex

	syncs map[digest.Algorithm]*Coalescer // of blobs/ALGORITHM

	// fail, if set by a test, breaks the step that it returns an error for.
	fail func(step string) error

	mu      sync.Mutex
	writing map[string]bool      // ingests that have a writer, by directory name
	resume  map[string]hashState // of ingests that a writer of this process closed
}

// hashState is the hash of the first offset bytes of an ingest.
type hashState struct {
	offset int64
	state  []byte
}

// algorithms that a blob may be named by.
var algorithms = []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512}

func openBlobs(dir string) (*blobs, error) {
	b := &blobs{dir: dir, syncs: map[digest.Algorithm]*Coalescer{}, writing: map[string]bool{}, resume: map[string]hashState{}}
	for _, d := range []string{filepath.Join(dir, "ingest"), b.algDir(digest.SHA256)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	for _, a := range algorithms {
		b.syncs[a] = &Coalescer{Run: func() error { return durable.SyncDir(b.algDir(a)) }}
	}
	for _, d := range []string{filepath.Join(dir, "blobs"), dir, filepath.Dir(dir)} {
		if err := durable.SyncDir(d); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func (b *blobs) algDir(a digest.Algorithm) string { return filepath.Join(b.dir, "blobs", a.String()) }

// path is only for digests that were validated.
func (b *blobs) path(d digest.Digest) string {
	return filepath.Join(b.algDir(d.Algorithm()), d.Encoded())
}

func (b *blobs) lock(d digest.Digest) *sync.RWMutex {
	e := d.Encoded()
	return &b.locks[(int(e[0])*31+int(e[1]))%len(b.locks)]
}

// publish gives a synced file its name and makes the name durable. An equal file
// that is there already stays.
func (b *blobs) publish(file string, d digest.Digest) error {
	dir := b.algDir(d.Algorithm())
	if d.Algorithm() != digest.SHA256 {
		if err := os.Mkdir(dir, 0o700); err == nil {
			if err := durable.SyncDir(filepath.Dir(dir)); err != nil {
				return err
			}
		} else if !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if err := b.step("rename"); err != nil {
		return err
	}
	if err := os.Rename(file, b.path(d)); err != nil {
		return err
	}
	// Not before: an ingest whose rename failed must be writable again.
	if err := os.Chmod(b.path(d), 0o444); err != nil {
		return err
	}
	if err := b.step("sync directory"); err != nil {
		return err
	}
	return b.syncs[d.Algorithm()].Do()
}

func (b *blobs) step(name string) error {
	if b.fail == nil {
		return nil
	}
	return b.fail(name)
}

// size of a blob on disk, or fs.ErrNotExist.
func (b *blobs) size(d digest.Digest) (int64, error) {
	st, err := os.Lstat(b.path(d))
	if err != nil {
		return 0, err
	}
	if !st.Mode().IsRegular() {
		return 0, fmt.Errorf("%s is not a regular file: %w", b.path(d), errdefs.ErrDataLoss)
	}
	return st.Size(), nil
}

// ingestName is the directory of an ingest: refs are any text.
func ingestName(ns, ref string) string {
	h := sha256.Sum256([]byte(ns + "\x00" + ref))
	return hex.EncodeToString(h[:16])
}

func (b *blobs) ingestDir(name string) string { return filepath.Join(b.dir, "ingest", name) }

// acquire makes the caller the only writer of an ingest.
func (b *blobs) acquire(name string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.writing[name] {
		return false
	}
	b.writing[name] = true
	return true
}

func (b *blobs) release(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.writing, name)
}

func (b *blobs) keepHash(name string, h hashState) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.resume[name] = h
}

func (b *blobs) takeHash(name string) hashState {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.resume[name]
	delete(b.resume, name)
	return h
}

// removeIngest is for the one who acquired it.
func (b *blobs) removeIngest(name string) error {
	b.takeHash(name)
	return os.RemoveAll(b.ingestDir(name))
}

func validDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	return nil
}
