package log

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// watcher tells of changes in a directory.
type watcher struct {
	wake chan struct{} // holds one value while there is something new
	f    *os.File      // inotify; nil: polling
	stop chan struct{}
}

func watch(dir string) (*watcher, error) {
	w := &watcher{wake: make(chan struct{}, 1), stop: make(chan struct{})}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err == nil {
		w.f = os.NewFile(uintptr(fd), "inotify")
		_, err = unix.InotifyAddWatch(fd, dir, unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_ONLYDIR)
	}
	switch {
	case err == nil:
		go w.read()
		return w, nil
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.ENOMEM):
		// The user's instances or watches are used up.
		if w.f != nil {
			w.f.Close()
			w.f = nil
		}
		go w.poll()
		return w, nil
	default:
		if w.f != nil {
			w.f.Close()
		}
		return nil, &os.PathError{Op: "inotify_add_watch", Path: dir, Err: err}
	}
}

func (w *watcher) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watcher) read() {
	var buf [4096]byte
	for {
		if _, err := w.f.Read(buf[:]); err != nil {
			return
		}
		w.signal()
	}
}

func (w *watcher) poll() {
	t := time.NewTicker(pollInterval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			w.signal()
		case <-w.stop:
			return
		}
	}
}

func (w *watcher) close() {
	close(w.stop)
	if w.f != nil {
		w.f.Close()
	}
}
