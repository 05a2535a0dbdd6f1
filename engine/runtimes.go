package engine

import "maps"

// Runtimes gives the further OCI runtimes: name to path of the binary. It is the caller's.
func (e *Engine) Runtimes() map[string]string { return maps.Clone(e.runtimes()) }

func (e *Engine) runtimes() map[string]string { return *e.runtimesNow.Load() }

// SetRuntimes replaces the further OCI runtimes. One that a container or sandbox is made for stays
// as it is: kept names those that would have gone or changed.
func (e *Engine) SetRuntimes(next map[string]string) (kept []string) {
	old, next := e.runtimes(), maps.Clone(next)
	if next == nil {
		next = map[string]string{}
	}
	used := map[string]bool{}
	for _, c := range e.containers.all() {
		used[c.view().Config.Runtime] = true
	}
	for _, s := range e.pods.all() {
		used[s.rec.Config.Runtime] = true
	}
	for name, bin := range old {
		if used[name] && next[name] != bin {
			next[name] = bin
			kept = append(kept, name)
		}
	}
	e.runtimesNow.Store(&next)
	return kept
}
