package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
)

// restoreTasks takes up the tasks of an earlier daemon. It believes the shim:
//
//	bundle, shim answers: created, running, paused, stopped: as the shim says
//	bundle, shim answers: knows no such task: a creation or deletion was cut short: undone, or finished
//	bundle, shim gone:    cleaned up after; the exit, as far as it is known, is told
//	bundle, shim silent:  shown without a state, and tried again in the background
func (e *Engine) restoreTasks(ctx context.Context) {
	e.eachBundle(filepath.Join(e.opt.State, taskFolder), func(k taskKey) { e.restoreTask(ctx, k) })
	used := map[string]bool{}
	for _, t := range e.tasks.in("") {
		if t.grouped() {
			used[filepath.Base(e.groupDir(t))] = true
		}
	}
	for _, name := range folders(filepath.Join(e.opt.State, groupFolder)) {
		if !used[name] { // a shim without containers ends by itself
			if err := os.RemoveAll(filepath.Join(e.opt.State, groupFolder, name)); err != nil {
				e.log.Error("remove the folder of a shim", "error", err)
			}
		}
	}
}

func (e *Engine) restoreTask(ctx context.Context, k taskKey) {
	meta, err := readTaskMeta(e.taskBundle(k))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		e.log.Error("a bundle cannot be read and is left alone", "task", k.id, "namespace", k.namespace, "error", err)
		return
	}
	t := e.newTask(k, meta)
	t.shims = e.tieOptions(&t.shimTie, t.meta.Program, t.meta.Binary, nil)
	if err != nil { // its creation had hardly begun
		e.removeBundle(&t.shimTie)
		return
	}
	e.tasks.add(t)
	cctx, cancel := context.WithTimeout(ctx, e.patience.left())
	defer cancel()
	shim, err := e.opt.TaskShims.ConnectTask(cctx, t.shims)
	if errdefs.IsNotFound(err) {
		t.ticket <- struct{}{}
		defer t.release()
		t.started = meta.CreatedAt // as far as is known
		e.taskLost(t)
		return
	}
	var st *taskapi.StateResponse
	if err == nil {
		st, err = shim.State(cctx, &taskapi.StateRequest{ID: k.id})
	}
	switch {
	case err == nil:
		e.takeTask(t, shim, st)
	case shim != nil && errdefs.IsNotFound(err):
		// Nobody got an answer to a creation, or everything of a deletion was done but the end.
		t.ticket <- struct{}{}
		defer t.release()
		if !t.meta.Foreign {
			if derr := e.dropTaskShim(ctx, t, shim); derr != nil {
				e.log.Error("undo an unfinished creation", "task", k.id, "namespace", k.namespace, "error", derr)
			}
		}
		e.forgetTask(t)
		return
	default:
		e.log.Warn("the shim of a task does not answer, it is tried again in the background", "task", k.id, "namespace", k.namespace, "error", err)
		if shim != nil {
			shim.Close()
		}
		t.mu.Lock()
		t.state = taskCreated
		t.mu.Unlock()
	}
	e.work.Go(func() { e.watchTied(t) })
}

func readTaskMeta(bundle string) (m taskMeta, err error) {
	raw, err := os.ReadFile(filepath.Join(bundle, taskMetaFile))
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("%s: %w: %w", taskMetaFile, err, errdefs.ErrDataLoss)
	}
	if m.Version > taskMetaVersion {
		return m, fmt.Errorf("%s has version %d, written by a newer hako: %w", taskMetaFile, m.Version, errdefs.ErrFailedPrecondition)
	}
	return m, nil
}
