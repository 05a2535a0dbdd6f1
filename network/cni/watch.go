package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/fsnotify/fsnotify"
)

// settleTime is how long further changes of the folder are waited for: files are written in several steps.
const settleTime = 20 * time.Millisecond

// health is what Ready says.
type health struct {
	err   error
	conf  *configuration // that it was found for
	asked time.Time      // when STATUS was run
}

// Ready tells why pods cannot get a network: errdefs.ErrUnavailable; nil: they can. It never waits: it says
// what was last found, at most a few seconds ago, and has it looked up again.
func (m *Manager) Ready() error {
	m.ask()
	return m.health.Load().err
}

// ask wakes the watch.
func (m *Manager) ask() {
	select {
	case m.poke <- struct{}{}:
	default:
	}
}

// watch follows the configuration until ctx ends. It closes first when it has looked at it once.
func (m *Manager) watch(ctx context.Context, first chan<- struct{}) {
	var events chan fsnotify.Event
	var errs chan error
	w, err := fsnotify.NewWatcher()
	if err != nil {
		m.log.Warn("the CNI configuration cannot be watched, only looked at now and then", "every", m.poll, "error", err)
	} else {
		defer w.Close()
		events, errs = w.Events, w.Errors
	}
	seen := map[string]fileID{}
	tick := time.NewTicker(m.poll)
	defer tick.Stop()
	for {
		if w != nil {
			m.aim(w, seen) // before it is read, so that no change falls between
		}
		m.refresh(ctx)
		if first != nil {
			close(first)
			first = nil
		}
		for look := false; !look; {
			select {
			case <-ctx.Done():
				return
			case ev := <-events:
				if look = m.concerns(ev.Name); look {
					settle(events)
				}
			case <-errs: // an overflow of the queue, for one
				look = true
			case <-m.poke:
				look = true
			case <-tick.C:
				m.retry(ctx)
				look = true
			}
		}
	}
}

// settle waits a moment and forgets the events that came meanwhile.
func settle(events <-chan fsnotify.Event) {
	end := time.After(settleTime)
	for {
		select {
		case <-events:
		case <-end:
			return
		}
	}
}

// concerns tells whether a change of path may change the configuration: it lies in the folder, is the folder, or is one
// that the folder lies in.
func (m *Manager) concerns(path string) bool {
	return strings.HasPrefix(path+"/", m.confDir+"/") || strings.HasPrefix(m.confDir+"/", path+"/")
}

// aim watches the folder and the one that it lies in, or the nearest that exists: so it is noticed when the
// folder is made, or another takes its place. seen tells which folders are watched.
func (m *Manager) aim(w *fsnotify.Watcher, seen map[string]fileID) {
	wanted := map[string]fileID{}
	for dir, found := m.confDir, 0; found < 2; dir = filepath.Dir(dir) {
		if st, err := os.Stat(dir); err == nil && st.IsDir() {
			id := idOf(st)
			wanted[dir] = fileID{dev: id.dev, ino: id.ino}
			found++
			if dir != m.confDir {
				break
			}
		}
		if dir == filepath.Dir(dir) {
			break
		}
	}
	for dir, id := range seen {
		if wanted[dir] != id {
			_ = w.Remove(dir) // fails if it went with the folder
			delete(seen, dir)
		}
	}
	for dir, id := range wanted {
		if _, ok := seen[dir]; ok {
			continue
		}
		if err := w.Add(dir); err != nil {
			m.log.Warn("the CNI configuration cannot be watched, only looked at now and then", "folder", dir, "every", m.poll, "error", err)
			continue
		}
		seen[dir] = id
	}
}

// refresh finds out whether pods can get a network.
func (m *Manager) refresh(ctx context.Context) {
	ctx, cancel := context.WithTimeoutCause(ctx, min(m.run.limit, 10*time.Second), errStuck)
	defer cancel()
	old := m.health.Load()
	conf, err := m.current(ctx)
	if err != nil {
		if errors.Is(err, context.Canceled) {
			return
		}
		m.health.Store(&health{err: err})
		return
	}
	if old.conf == conf && old.err == nil && time.Since(old.asked) < m.poll/2 {
		return
	}
	h := &health{conf: conf, asked: time.Now()}
	// Those of specifications before 1.1 cannot tell, and are not asked.
	if err := m.cni.GetStatusNetworkList(ctx, conf.list); err != nil {
		if errors.Is(err, context.Canceled) {
			return
		}
		h.err = fmt.Errorf("CNI network %s is not ready: %w: %w", conf.list.Name, err, errdefs.ErrUnavailable)
	}
	if h.err != nil && (old.err == nil || old.err.Error() != h.err.Error()) {
		m.log.Warn("the network of pods is not ready", "error", h.err)
	}
	m.health.Store(h)
}
