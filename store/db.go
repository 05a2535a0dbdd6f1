package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/hako-engine/hako/internal/durable"
)

const (
	// openTimeout is how long Open waits for another process to let go of the file.
	openTimeout = 2 * time.Second
	// reserved address space: while the file is smaller, a long read never makes a
	// writer wait for a new mapping. It costs no memory.
	mapSize = 1 << 30
	// maxGroup bounds how many updates share one transaction.
	maxGroup      = 256
	togetherLimit = 5 * time.Millisecond
)

type togetherKey struct{}

// together counts the updates that are still to come. Only the committer changes it.
type together struct{ left int }

// Together gives a context under which n updates, made side by side, are waited for, so
// that they share one transaction. It is a hint: one that does not come delays the others
// by some milliseconds, and each still fails alone.
func Together(ctx context.Context, n int) context.Context {
	return context.WithValue(ctx, togetherKey{}, &together{left: n})
}

// DB is the metadata file. Updates that wait at the same time share one
// transaction, and so the price of making it durable; one that fails is rolled back
// without failing the others. All methods may be called concurrently.
type DB struct {
	bolt *bolt.DB
	reqs chan *update
	done chan struct{} // closed when the committer has ended
	// patience bounds how long an update waits for the others of its Together.
	patience time.Duration

	mu     sync.RWMutex // guards closed; held while a request is handed over
	closed bool
}

type update struct {
	ctx  context.Context
	fn   func(*bolt.Tx) error
	err  error
	done chan struct{}
}

func openDB(path string) (*DB, error) {
	_, statErr := os.Stat(path)
	if statErr == nil {
		// bbolt would end the process.
		damage, err := checkPages(path)
		if err != nil {
			return nil, fmt.Errorf("open metadata %s: %w", path, classify(err))
		}
		if len(damage) > 0 {
			return nil, fmt.Errorf("open metadata %s: %s; \"hakod check --repair\" saves what is left: %w", path, damage[0], errdefs.ErrDataLoss)
		}
	}
	b, err := bolt.Open(path, 0o600, &bolt.Options{
		Timeout:         openTimeout,
		InitialMmapSize: mapSize,
		// The free list is rebuilt from the tree when the file is opened instead of
		// being written with every commit.
		NoFreelistSync: true,
		FreelistType:   bolt.FreelistMapType,
	})
	if err != nil {
		return nil, fmt.Errorf("open metadata %s: %w", path, classify(err))
	}
	if errors.Is(statErr, os.ErrNotExist) {
		if err := durable.SyncDir(filepath.Dir(path)); err != nil {
			b.Close()
			return nil, fmt.Errorf("open metadata %s: %w", path, err)
		}
	}
	d := &DB{bolt: b, reqs: make(chan *update, maxGroup), done: make(chan struct{}), patience: togetherLimit}
	go d.commitLoop()
	return d, nil
}

// View runs fn in a read transaction: a consistent picture that writers do not
// disturb and that does not hold them up.
func (d *DB) View(ctx context.Context, fn func(*bolt.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return classify(d.bolt.View(fn))
}

// Update runs fn in a write transaction and returns when it is durable. If fn
// fails, nothing of it is kept and its error is returned. fn runs on another
// goroutine and may run more than once (with what an earlier run did rolled back),
// so it must set, not add to, what it captured. It must not call Update or View.
//
// Once fn has run, the cancellation of ctx is not looked at: the result is the real one.
func (d *DB) Update(ctx context.Context, fn func(*bolt.Tx) error) error {
	u := &update{ctx: ctx, fn: fn, done: make(chan struct{})}
	d.mu.RLock()
	if d.closed {
		d.mu.RUnlock()
		return fmt.Errorf("update metadata: store is closed: %w", errdefs.ErrUnavailable)
	}
	select {
	case d.reqs <- u:
		d.mu.RUnlock()
	case <-ctx.Done():
		d.mu.RUnlock()
		return ctx.Err()
	}
	<-u.done
	return u.err
}

// barrier returns when all updates that began before it are durable. It writes nothing.
func (d *DB) barrier(ctx context.Context) error { return d.Update(ctx, nil) }

// Close waits for updates under way.
func (d *DB) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	close(d.reqs)
	d.mu.Unlock()
	<-d.done
	return d.bolt.Close()
}

// commitLoop is the only writer. It takes everything that waits into one transaction.
func (d *DB) commitLoop() {
	defer close(d.done)
	for u := range d.reqs {
		d.commit(d.gather(u))
	}
}

// gather gives an update with all those that wait already, or are waited for (Together).
func (d *DB) gather(first *update) (group []*update) {
	add := func(u *update) {
		group = append(group, u)
		if t := u.together(); t != nil {
			t.left--
		}
	}
	add(first)
	var limit <-chan time.Time
	for len(group) < maxGroup {
		select {
		case u, ok := <-d.reqs:
			if !ok {
				return group
			}
			add(u)
			continue
		default:
		}
		if !slices.ContainsFunc(group, func(u *update) bool { t := u.together(); return t != nil && t.left > 0 }) {
			return group
		}
		if limit == nil {
			t := time.NewTimer(d.patience)
			defer t.Stop()
			limit = t.C
		}
		select {
		case u, ok := <-d.reqs:
			if !ok {
				return group
			}
			add(u)
		case <-limit:
			return group
		}
	}
	return group
}

func (u *update) together() *together {
	t, _ := u.ctx.Value(togetherKey{}).(*together)
	return t
}

// commit applies a group. bbolt has no savepoints: after a failure the transaction
// is rolled back and the others run again.
func (d *DB) commit(group []*update) {
	for len(group) > 0 {
		failed := d.try(group)
		if failed < 0 {
			return
		}
		close(group[failed].done)
		group = append(group[:failed:failed], group[failed+1:]...)
	}
}

// try gives the index of the update that failed alone (its error is set), or -1 when
// every update got its result.
func (d *DB) try(group []*update) (failed int) {
	finish := func(err error) int {
		for _, u := range group {
			u.err = err
			close(u.done)
		}
		return -1
	}
	if !slices.ContainsFunc(group, func(u *update) bool { return u.fn != nil }) {
		return finish(nil)
	}
	tx, err := d.bolt.Begin(true)
	if err != nil {
		return finish(fmt.Errorf("update metadata: %w", classify(err)))
	}
	for i, u := range group {
		if u.err = u.ctx.Err(); u.err == nil && u.fn != nil {
			u.err = call(u.fn, tx)
		}
		if u.err != nil {
			_ = tx.Rollback()
			return i
		}
	}
	if err := tx.Commit(); err != nil {
		_ = tx.Rollback()
		return finish(fmt.Errorf("update metadata: %w", classify(err)))
	}
	return finish(nil)
}

// call makes a panic of one update its own error: it must not take the committer,
// and so every other caller, with it.
func call(fn func(*bolt.Tx) error, tx *bolt.Tx) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("update metadata: panic: %v: %w", p, errdefs.ErrInternal)
		}
	}()
	return fn(tx)
}

// Classify gives errors of files and of the metadata file their errdefs class: a full
// disk is ErrResourceExhausted.
func Classify(err error) error { return classify(err) }

func classify(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("in use by another process: %w", errdefs.ErrUnavailable)
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch):
		return fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	case errors.Is(err, bolterrors.ErrDatabaseNotOpen):
		return fmt.Errorf("store is closed: %w", errdefs.ErrUnavailable)
	}
	return err
}
