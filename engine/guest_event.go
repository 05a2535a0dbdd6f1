package engine

import (
	"maps"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
)

// What happens to guests is told to Docker's clients as well: create, start, pause, unpause, die, destroy.

// emitGuest publishes an event of a guest, as emit does of a container.
func (e *Engine) emitGuest(rec containers.Container, action string, pairs ...string) {
	attrs := make(map[string]string, len(rec.Labels)+2+len(pairs)/2)
	maps.Copy(attrs, rec.Labels)
	delete(attrs, AttrSandbox)
	attrs["image"], attrs["name"] = rec.Image, guestName(rec)
	for i := 0; i+1 < len(pairs); i += 2 {
		attrs[pairs[i]] = pairs[i+1]
	}
	e.events.publish(Event{Type: "container", Action: action, ID: rec.ID, Attributes: attrs})
}

func guestName(rec containers.Container) string {
	if n := rec.Labels[nerdctlName]; n != "" {
		return n
	}
	return rec.ID
}

// emitTask publishes an event of a task whose container is a guest; of others nothing.
func (e *Engine) emitTask(t *task, action string, pairs ...string) {
	if t.namespace != Namespace || e.opt.ContainerRecords == nil {
		return
	}
	rec, err := e.opt.ContainerRecords.Get(shared(e.ctx), t.id)
	if err != nil { // nobody knows what it was
		rec = containers.Container{ID: t.id}
	}
	e.emitGuest(rec, action, pairs...)
}

// taskStarted tells of a start, and then of an end that was faster than the shim's answer.
func (e *Engine) taskStarted(t *task) {
	e.emitTask(t, "start")
	t.mu.Lock()
	t.started = time.Now()
	x, early := t.exit, t.unsaid
	t.unsaid = false
	t.mu.Unlock()
	if early {
		e.emitDie(t, x)
	}
}

// taskEnded records the exit once, and tells of it if the start was told.
func (e *Engine) taskEnded(t *task, x TaskExit) {
	t.mu.Lock()
	running := !t.started.IsZero()
	now := t.endedLocked(x)
	t.unsaid = now && !running
	x = t.exit
	t.mu.Unlock()
	if now && running {
		e.emitDie(t, x)
	}
}

func (e *Engine) emitDie(t *task, x TaskExit) {
	t.mu.Lock()
	ran := time.Since(t.started)
	t.mu.Unlock()
	e.emitTask(t, "die", "exitCode", strconv.Itoa(int(x.Status)), "execDuration", strconv.Itoa(int(ran.Seconds())))
}
