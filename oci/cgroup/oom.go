//go:build linux

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// OOM gives a channel that receives when the cgroup (or one below it) runs out of
// memory; notices that are not fetched merge into one. The channel is closed when ctx
// ends or the cgroup is removed.
func (c *Cgroup) OOM(ctx context.Context) (<-chan struct{}, error) {
	var ch chan struct{}
	var err error
	if dir, ok := c.v1["memory"]; ok {
		ch, err = oomV1(ctx, dir)
	} else if c.v2 != "" && exists(c.v2+"/memory.events") {
		ch, err = oomV2(ctx, c.v2)
	} else {
		err = &MissingError{"memory", "OOM notices"}
	}
	if gone(err) {
		err = classed(err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("watch cgroup for OOM: %w", err)
	}
	return ch, nil
}

// notify sends without waiting.
func notify(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// oomV1 has the kernel count into an eventfd. It also does when the cgroup is removed.
func oomV1(ctx context.Context, dir string) (chan struct{}, error) {
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	f := os.NewFile(uintptr(event), "eventfd")
	control, err := open(dir+"/memory.oom_control", unix.O_RDONLY)
	if err == nil {
		err = writeFile(dir+"/cgroup.event_control", strconv.Itoa(event)+" "+strconv.Itoa(control))
		unix.Close(control) // the kernel has its own reference now
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	ch := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, func() { f.Close() })
	go func() {
		defer close(ch)
		defer f.Close()
		defer stop()
		count := make([]byte, 8)
		for {
			if _, err := f.Read(count); err != nil || !exists(dir+"/cgroup.event_control") {
				return
			}
			notify(ch)
		}
	}()
	return ch, nil
}

// lookAfter is how long an empty v2 cgroup goes unobserved.
const lookAfter = 500 * time.Millisecond

// oomV2 watches memory.events. That a cgroup is removed no watch tells, but
// cgroup.events tells that it has become empty, which must come before: as long as it
// is, one looks from time to time whether it is still there.
func oomV2(ctx context.Context, dir string) (chan struct{}, error) {
	events, population := dir+"/memory.events", dir+"/cgroup.events"
	seen, err := oomEvents(events)
	if err != nil {
		return nil, err
	}
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	f := os.NewFile(uintptr(watch), "inotify")
	for _, path := range []string{events, population} {
		if _, err := unix.InotifyAddWatch(watch, path, unix.IN_MODIFY|unix.IN_DELETE_SELF); err != nil {
			f.Close()
			return nil, &os.PathError{Op: "inotify_add_watch", Path: path, Err: err}
		}
	}
	ch := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, func() { f.Close() })
	go func() {
		defer close(ch)
		defer f.Close()
		defer stop()
		buf := make([]byte, 16*unsafe.Sizeof(unix.InotifyEvent{}))
		for {
			state, err := readFile(population)
			if err != nil {
				return
			}
			var deadline time.Time
			if keyed(state)["populated"] == 0 {
				deadline = time.Now().Add(lookAfter)
			}
			if err := f.SetReadDeadline(deadline); err != nil {
				return
			}
			// What changed does not matter: the files say how it is now.
			if _, err := f.Read(buf); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				return
			}
			now, err := oomEvents(events)
			if err != nil {
				return
			}
			if now > seen {
				notify(ch)
			}
			seen = now
		}
	}()
	return ch, nil
}

// oomEvents counts what is worth a notice: that an allocation failed, or that a
// process was killed for it.
func oomEvents(file string) (uint64, error) {
	b, err := readFile(file)
	if err != nil {
		return 0, err
	}
	m := keyed(b)
	return m["oom"] + m["oom_kill"], nil
}

// OOMKills counts the processes that the OOM killer has taken in the cgroup; on v2
// also in those below it. It is errdefs.ErrNotFound when the cgroup is gone.
func (c *Cgroup) OOMKills() (uint64, error) {
	var file string
	if dir, ok := c.v1["memory"]; ok {
		file = dir + "/memory.oom_control"
	} else if c.v2 != "" {
		file = c.v2 + "/memory.events"
	} else {
		return 0, fmt.Errorf("count OOM kills: %w", &MissingError{"memory", "OOM kills"})
	}
	b, err := readFile(file)
	if gone(err) {
		err = classed(err, errdefs.ErrNotFound)
	}
	if err != nil {
		return 0, fmt.Errorf("count OOM kills: %w", err)
	}
	return keyed(b)["oom_kill"], nil
}
