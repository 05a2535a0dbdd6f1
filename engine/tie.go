package engine

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/shim/client"
)

// taskKey names an object of containerd's clients.
type taskKey struct{ namespace, id string }

// shimTie ties an object of containerd's clients, a task or a room, to the shim that holds it. Such an
// object has no record: the shim knows it, and the bundle says how the shim is found. A connection that
// breaks is made anew; a shim that is gone takes the object with it.
type shimTie struct {
	taskKey
	what   string // for people: "task" or "sandbox"
	bundle string
	shims  client.TaskOptions // how the shim is started and found

	// ticket is held by the one operation that makes, starts or ends the object.
	ticket chan struct{}
	gone   chan struct{} // closed when it is no more
}

func newTie(k taskKey, what, bundle string) shimTie {
	return shimTie{taskKey: k, what: what, bundle: bundle, ticket: make(chan struct{}, 1), gone: make(chan struct{})}
}

// acquire waits for the ticket; errdefs.ErrNotFound if the object is gone by then.
func (t *shimTie) acquire(ctx context.Context) error {
	select {
	case t.ticket <- struct{}{}:
		select {
		case <-t.gone:
			t.release()
			return t.notFound()
		default:
			return nil
		}
	case <-t.gone:
		return t.notFound()
	case <-ctx.Done():
		return fmt.Errorf("%s %s: another operation is under way: %w", t.what, t.id, context.Cause(ctx))
	}
}

func (t *shimTie) release() { <-t.ticket }

func (t *shimTie) notFound() error { return notTied(t.what, t.taskKey) }

func notTied(what string, k taskKey) error {
	return fmt.Errorf("%s %s of namespace %s: %w", what, k.id, k.namespace, errdefs.ErrNotFound)
}

// tied is an object that a shim holds.
type tied interface {
	tie() *shimTie
	// connection is the present one to the shim, nil while there is none.
	connection() TaskShim
	// follow waits for the end of the object and takes it in. It tells whether nothing is left to
	// be asked over this connection, so that only the end of the shim is waited for.
	follow(e *Engine, shim TaskShim) (done bool)
	// reconnected takes a new connection in place of one that broke; errdefs.ErrNotFound if the shim
	// does not know the object any more. The caller holds the ticket.
	reconnected(ctx context.Context, e *Engine, shim TaskShim) error
	// lost ends the object, whose shim is gone or has forgotten it. The caller holds the ticket.
	lost(e *Engine)
}

// watchTied waits for the end of an object, whatever happens to the connection to its shim, and then
// for the end of the shim. It ends silently with the engine.
func (e *Engine) watchTied(o tied) {
	t := o.tie()
	pause := restartFirst
	for {
		began := time.Now()
		shim := o.connection()
		if shim != nil && o.follow(e, shim) {
			select {
			case <-shim.Gone():
			case <-t.gone:
			case <-e.ctx.Done():
			}
		}
		if e.disconnected(o, shim) {
			return
		}
		if time.Since(began) > reconnectMost { // that one was good
			pause = restartFirst
		}
		select { // no spinning, whether it broke again or does not answer
		case <-time.After(pause):
			pause = min(pause*2, reconnectMost)
		case <-t.gone:
			return
		case <-e.ctx.Done():
			return
		}
	}
}

// disconnected looks after an object whose connection ended. It tells whether there is nothing more to watch.
func (e *Engine) disconnected(o tied, was TaskShim) bool {
	t := o.tie()
	// An end that is under way ends the connection, too.
	if t.acquire(e.ctx) != nil {
		return true
	}
	defer t.release()
	ctx, cancel := context.WithTimeout(e.ctx, connectLimit)
	defer cancel()
	next, err := e.opt.TaskShims.ConnectTask(ctx, t.shims)
	if err == nil {
		if err = o.reconnected(ctx, e, next); err != nil {
			next.Close()
		}
	}
	switch {
	case e.ctx.Err() != nil:
		if err == nil {
			next.Close() // Close may have come before it was the object's
		}
		return true
	case errdefs.IsNotFound(err):
		e.log.Warn("a shim is gone, or knows no more of what it held", t.what, t.id, "namespace", t.namespace)
		o.lost(e)
		return true
	case err != nil:
		e.log.Warn("a shim does not answer, it is tried again in the background", t.what, t.id, "namespace", t.namespace, "error", err)
	case was != nil:
		was.Close()
	}
	return false
}

// removeBundle is the last that is done for an object: afterwards a restart does not find it.
func (e *Engine) removeBundle(t *shimTie) {
	if err := removeTaskBundle(t.bundle); err != nil {
		e.log.Error("remove bundle", t.what, t.id, "namespace", t.namespace, "error", err)
	}
}

// eachBundle calls f for the objects that have a folder below root, for restoreWidth of them at a time.
func (e *Engine) eachBundle(root string, f func(taskKey)) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, restoreWidth)
	for _, ns := range folders(root) {
		for _, id := range folders(filepath.Join(root, ns)) {
			if identifiers.Validate(ns) != nil || identifiers.Validate(id) != nil {
				continue
			}
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				f(taskKey{ns, id})
			})
		}
	}
	wg.Wait()
}

// tiedIndex finds objects by their keys.
type tiedIndex[T interface {
	comparable
	tied
}] struct {
	mu  sync.RWMutex
	all map[taskKey]T
}

// add tells whether the key was free.
func (r *tiedIndex[T]) add(o T) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := o.tie().taskKey
	if _, taken := r.all[k]; taken {
		return false
	}
	r.all[k] = o
	return true
}

// remove takes o out, and not another object of its key.
func (r *tiedIndex[T]) remove(o T) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if k := o.tie().taskKey; r.all[k] == o {
		delete(r.all, k)
	}
}

// get is nil if there is none.
func (r *tiedIndex[T]) get(k taskKey) T {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.all[k]
}

// in lists the objects of a namespace ("": all) in the order of their ids.
func (r *tiedIndex[T]) in(namespace string) []T {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var out []T
	for k, o := range r.all {
		if namespace == "" || k.namespace == namespace {
			out = append(out, o)
		}
	}
	slices.SortFunc(out, func(a, b T) int { return cmp.Compare(a.tie().id, b.tie().id) })
	return out
}
