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

// requireRuntime refuses a runtime that is not configured any more: what was made for one, a
// sandboxed one perhaps, must not run on hako's own.
func (e *Engine) requireRuntime(name string) error {
	if name != "" && name != "hako" && e.runtimes()[name] == "" {
		return failedf("runtime %s is not configured any more: add it to the daemon's runtimes", name)
	}
	return nil
}
