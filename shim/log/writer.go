package log

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// flushSize is how much a Write collects before it goes to the file.
const flushSize = 64 << 10

// Writer appends records to a log file and rotates it. It is safe for concurrent use.
type Writer struct {
	c       Config
	attrs   []byte
	perm    os.FileMode
	dropped atomic.Uint64
	zip     compressor

	mu struct {
		sync.Mutex
		f    *os.File // nil after Close
		size int64
		buf  []byte // records that are not written yet
		n    uint64 // how many
		last time.Time
		t    []byte // last, encoded
	}
}

// Open opens a log file for appending; it is made if missing (mode 0640). A record
// that a crash left unfinished is ended, so that the next one is a line of its own.
func Open(c Config) (*Writer, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	w := &Writer{c: c, attrs: encodeAttrs(c.Attrs), perm: 0o640}
	if err := w.open(0); err != nil {
		return nil, err
	}
	return w, nil
}

// open opens the file at the path. The caller holds the lock, or is alone.
func (w *Writer) open(flags int) error {
	f, err := os.OpenFile(w.c.Path, os.O_CREATE|os.O_APPEND|os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|flags, w.perm)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &os.PathError{Op: "open", Path: w.c.Path, Err: errors.New("not a regular file")}
	}
	if err != nil {
		f.Close()
		return err
	}
	w.mu.f, w.mu.size = f, st.Size()
	if w.mu.size > 0 {
		var last [1]byte
		if _, err := f.ReadAt(last[:], w.mu.size-1); err == nil && last[0] != '\n' {
			if n, _ := f.Write([]byte{'\n'}); n == 1 {
				w.mu.size++
			}
		}
	}
	return nil
}

// Dropped is the number of records that could not be written.
func (w *Writer) Dropped() uint64 { return w.dropped.Load() }

// Stream gives the writer of one stream (Stdout or Stderr).
func (w *Writer) Stream(name string) *Stream { return &Stream{w: w, name: name} }

// Reopen opens the file anew by its path: whoever called has renamed it. When it
// returns nothing more goes to the old file. If the path cannot be opened the old
// file stays in use.
func (w *Writer) Reopen() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	old := w.mu.f
	if old == nil {
		return fmt.Errorf("reopen log %s: %w", w.c.Path, os.ErrClosed)
	}
	w.flush()
	if err := w.open(0); err != nil {
		return fmt.Errorf("reopen log: %w", err)
	}
	return old.Close()
}

// Close ends the file. Streams should be closed before.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.zip.wait()
	if w.mu.f == nil {
		return nil
	}
	w.flush()
	err := w.mu.f.Close()
	w.mu.f = nil
	return err
}

// stamp sets the time of the records that follow.
func (w *Writer) stamp(t time.Time) {
	if t.Equal(w.mu.last) && w.mu.t != nil {
		return
	}
	w.mu.last = t
	if w.c.Format == FormatCRI {
		w.mu.t = t.AppendFormat(w.mu.t[:0], criTime)
	} else {
		w.mu.t = t.AppendFormat(w.mu.t[:0], time.RFC3339Nano)
	}
}

// record adds a record to the buffer and writes the buffer if it is time. The
// caller holds the lock.
func (w *Writer) record(stream string, line []byte, whole bool) {
	if w.c.Format == FormatCRI {
		w.mu.buf = appendCRI(w.mu.buf, w.mu.t, stream, line, whole)
	} else {
		w.mu.buf = appendJSON(w.mu.buf, w.mu.t, stream, w.attrs, line, whole)
	}
	w.mu.n++
	full := w.c.MaxSize > 0 && w.mu.size+int64(len(w.mu.buf)) >= w.c.MaxSize
	if full || len(w.mu.buf) >= flushSize {
		w.flush()
	}
	if full {
		w.rotate()
	}
}

// flush writes the buffer: whole records, in one write(2). After a partial write
// the rest is tried once; what then is missing is cut off, so that no half record
// stays in the middle of the file.
func (w *Writer) flush() {
	buf, n := w.mu.buf, w.mu.n
	w.mu.buf, w.mu.n = buf[:0], 0
	if cap(buf) > 2*flushSize {
		w.mu.buf = nil
	}
	if len(buf) == 0 {
		return
	}
	if w.mu.f == nil {
		w.dropped.Add(n)
		return
	}
	k, err := w.mu.f.Write(buf) // tries again until it fails
	w.mu.size += int64(k)
	if err == nil {
		return
	}
	whole := bytes.LastIndexByte(buf[:k], '\n') + 1
	w.dropped.Add(n - uint64(bytes.Count(buf[:whole], []byte{'\n'})))
	if whole < k {
		if w.mu.f.Truncate(w.mu.size-int64(k-whole)) == nil {
			w.mu.size -= int64(k - whole)
		}
	}
}

// Stream turns the bytes of one stream into records. Its fields are guarded by the
// Writer's lock.
type Stream struct {
	w    *Writer
	name string
	part []byte // of a line whose end has not come
	// long: a piece of the current line has been recorded, at the time began.
	long  bool
	began time.Time
}

// Write splits p into records. It never fails and never keeps p: what cannot be
// written is counted (Writer.Dropped).
func (s *Stream) Write(p []byte) (int, error) {
	n := len(p)
	now := time.Now().UTC()
	w := s.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(p) > 0 {
		i := bytes.IndexByte(p, '\n')
		line := p
		if i >= 0 {
			line = p[:i]
		}
		// The line is s.part and then line; it is cut while it is too long.
		for len(s.part)+len(line) > maxPiece || i < 0 && len(s.part)+len(line) == maxPiece {
			if len(s.part) == 0 {
				cut := s.cut(line[:maxPiece])
				s.emit(now, line[:cut], false)
				line = line[cut:]
				continue
			}
			take := maxPiece - len(s.part)
			s.part = append(s.part, line[:take]...)
			line = line[take:]
			cut := s.cut(s.part)
			s.emit(now, s.part[:cut], false)
			s.part = append(s.part[:0], s.part[cut:]...)
		}
		if i < 0 {
			s.part = append(s.part, line...)
			break
		}
		if len(s.part) == 0 {
			s.emit(now, line, true)
		} else {
			s.part = append(s.part, line...)
			s.emit(now, s.part, true)
			s.part = s.part[:0]
		}
		p = p[i+1:]
	}
	w.flush()
	if len(s.part) == 0 {
		s.part = nil // an idle container holds no buffer
	}
	return n, nil
}

func (s *Stream) cut(piece []byte) int {
	if s.w.c.Format == FormatCRI {
		return len(piece) // binary is kept
	}
	return cutRune(piece)
}

// emit records a line or piece. All pieces of one line carry the time of the first
// one, as Docker does.
func (s *Stream) emit(now time.Time, line []byte, whole bool) {
	if !s.long {
		s.began = now
	}
	s.w.stamp(s.began)
	s.w.record(s.name, line, whole)
	s.long = !whole
}

// Close records what is left of an unfinished line (as a piece without newline). The
// stream can be written to again.
func (s *Stream) Close() error {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if len(s.part) > 0 {
		s.emit(time.Now().UTC(), s.part, false)
		s.part = nil
	}
	s.w.flush()
	return nil
}

var _ io.WriteCloser = (*Stream)(nil)
