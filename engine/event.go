package engine

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// eventsKept is how many past events `since` can reach, as in Docker.
const eventsKept = 256

// eventBuffer is how far a slow reader may lag behind before it is dropped.
const eventBuffer = 1024

// bus orders the events of the node: there is one true sequence, and each reader
// sees it from its start without gaps. A reader that does not read is cut off
// rather than slowing others down.
type bus struct {
	mu      sync.Mutex
	past    []Event
	readers map[*reader]struct{}
	closed  bool
}

type reader struct {
	ch      chan Event
	dropped chan struct{} // closed when it was too slow, or the bus ended
	filters Filters
}

// publish stamps an event and hands it to all readers.
func (b *bus) publish(ev Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	if ev.Time.IsZero() {
		ev.Time = time.Now()
	}
	if n := len(b.past); n > 0 && !ev.Time.After(b.past[n-1].Time) {
		ev.Time = b.past[n-1].Time.Add(1) // times are unique, so that `since` neither repeats nor skips
	}
	if len(b.past) == eventsKept {
		copy(b.past, b.past[1:])
		b.past[eventsKept-1] = ev
	} else {
		b.past = append(b.past, ev)
	}
	for r := range b.readers {
		if !matchEvent(ev, r.filters) {
			continue
		}
		select {
		case r.ch <- ev:
		default:
			delete(b.readers, r)
			close(r.dropped)
		}
	}
}

func (b *bus) subscribe(since time.Time, f Filters) (past []Event, r *reader) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !since.IsZero() {
		for _, ev := range b.past {
			if !ev.Time.Before(since) && matchEvent(ev, f) {
				past = append(past, ev)
			}
		}
	}
	r = &reader{make(chan Event, eventBuffer), make(chan struct{}), f}
	if b.closed {
		close(r.dropped)
		return past, r
	}
	if b.readers == nil {
		b.readers = map[*reader]struct{}{}
	}
	b.readers[r] = struct{}{}
	return past, r
}

func (b *bus) unsubscribe(r *reader) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.readers[r]; ok {
		delete(b.readers, r)
		close(r.dropped)
	}
}

func (b *bus) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for r := range b.readers {
		delete(b.readers, r)
		close(r.dropped)
	}
}

// Events gives the events since a time (zero: only new ones; the last 256 are kept)
// until a time (zero: until ctx ends). It is subscribed when it returns. The channel
// is closed at the end, and also when the reader lags far behind.
func (e *Engine) Events(ctx context.Context, since, until time.Time, f Filters) (<-chan Event, error) {
	if !until.IsZero() && since.After(until) {
		return nil, invalidf("`since` time (%d.%09d) cannot be after `until` time (%d.%09d)",
			since.Unix(), since.Nanosecond(), until.Unix(), until.Nanosecond())
	}
	if err := f.check("container", "daemon", "event", "image", "label", "network", "scope", "type", "volume", "plugin", "service", "node", "secret", "config"); err != nil {
		return nil, err
	}
	past, r := e.events.subscribe(since, f)
	out := make(chan Event)
	go func() {
		defer close(out)
		defer e.events.unsubscribe(r)
		var end <-chan time.Time
		if !until.IsZero() {
			t := time.NewTimer(time.Until(until))
			defer t.Stop()
			end = t.C
		}
		send := func(ev Event) bool {
			if !until.IsZero() && ev.Time.After(until) {
				return false
			}
			select {
			case out <- ev:
				return true
			case <-ctx.Done():
				return false
			}
		}
		for _, ev := range past {
			if !send(ev) {
				return
			}
		}
		for {
			select {
			case ev := <-r.ch:
				if !send(ev) {
					return
				}
			case <-r.dropped:
				for { // what was queued before
					select {
					case ev := <-r.ch:
						if !send(ev) {
							return
						}
					default:
						return
					}
				}
			case <-end:
				return
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}

// emit publishes an event of a container with Docker's attributes: labels, image
// and name, then the pairs given.
func (e *Engine) emit(c *container, action string, pairs ...string) {
	v := c.view()
	attrs := make(map[string]string, len(v.Labels)+2+len(pairs)/2)
	maps.Copy(attrs, v.Labels)
	attrs["image"] = v.Config.Image
	attrs["name"] = v.Name
	if p := v.Config.Pod; p != nil {
		attrs[AttrSandbox] = p.Sandbox
		if s := e.pods.exact(p.Sandbox); s != nil { // it may be gone when the event is read
			maps.Copy(attrs, s.names())
		}
	} else {
		delete(attrs, AttrSandbox) // a label of that name means nothing
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		attrs[pairs[i]] = pairs[i+1]
	}
	e.events.publish(Event{Type: "container", Action: action, ID: c.id, Attributes: attrs})
	e.tellTask(c, action, attrs)
}

// emitFor publishes an event of another object.
func (e *Engine) emitFor(kind, action, id string, pairs ...string) {
	attrs := make(map[string]string, len(pairs)/2)
	for i := 0; i+1 < len(pairs); i += 2 {
		attrs[pairs[i]] = pairs[i+1]
	}
	e.events.publish(Event{Type: kind, Action: action, ID: id, Attributes: attrs})
}

// matchEvent applies Docker's event filters.
func matchEvent(ev Event, f Filters) bool {
	action, _, _ := strings.Cut(ev.Action, ":")
	for field, want := range f {
		ok := false
		switch field {
		case "type":
			ok = slices.Contains(want, ev.Type)
		case "event":
			// "health_status" matches with and without the status, "exec_create" any command.
			ok = slices.Contains(want, ev.Action) || slices.Contains(want, action)
		case "scope":
			ok = slices.Contains(want, "local")
		case "label":
			ok = true
			for _, w := range want {
				ok = ok && matchLabel(ev.Attributes, w)
			}
		case "container", "image", "volume", "network", "daemon":
			if field == "image" && ev.Type == "container" {
				ok = slices.Contains(want, ev.Attributes["image"])
				break
			}
			if ev.Type != field {
				if field == "container" && ev.Type == "network" {
					ok = slices.ContainsFunc(want, func(w string) bool {
						return w != "" && strings.HasPrefix(ev.Attributes["container"], w)
					})
				}
				break
			}
			ok = slices.ContainsFunc(want, func(w string) bool {
				return w == ev.ID || w == ev.Attributes["name"] || len(w) >= 4 && strings.HasPrefix(ev.ID, w)
			})
		}
		if !ok {
			return false
		}
	}
	return true
}
