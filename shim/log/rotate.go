package log

import (
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"os"
	"strconv"
	"sync/atomic"
)

// name is the path of a rotated file: 1 is the youngest.
func (c Config) name(i int) string {
	if i == 0 {
		return c.Path
	}
	return c.Path + "." + strconv.Itoa(i)
}

const gz = ".gz"

// rotate moves path to path.1, path.1 to path.2 and so on, and starts a new file.
// On a failure the writer goes on in the file that it has: rather a file that is
// too long than a record lost. The caller holds the lock and has flushed.
func (w *Writer) rotate() {
	if w.mu.f == nil || w.mu.size == 0 {
		return
	}
	if w.c.MaxFiles <= 1 {
		if w.mu.f.Truncate(0) == nil {
			w.mu.size = 0
		}
		return
	}
	w.zip.abort()
	for i := w.c.oldest(); i >= 1; i-- {
		for _, ext := range []string{"", gz} {
			from := w.c.name(i) + ext
			if i >= w.c.MaxFiles-1 {
				// Gone by configuration; the rename of the younger one replaces it, but
				// not if that one has the other extension.
				os.Remove(from)
				continue
			}
			if err := os.Rename(from, w.c.name(i+1)+ext); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return
			}
		}
	}
	if err := os.Rename(w.c.Path, w.c.name(1)); err != nil {
		return
	}
	old, size := w.mu.f, w.mu.size
	if err := w.open(os.O_EXCL); err != nil {
		// Back to the name under which readers look for it.
		w.mu.f, w.mu.size = old, size
		_ = os.Rename(w.c.name(1), w.c.Path)
		return
	}
	old.Close()
	if w.c.Compress && w.c.MaxFiles > 2 {
		w.zip.start(w.c)
	}
}

// oldest is the number of the oldest rotated file, 0 if there is none.
func (c Config) oldest() int {
	for i := 1; ; i++ {
		if _, err := os.Lstat(c.name(i)); err == nil {
			continue
		}
		if _, err := os.Lstat(c.name(i) + gz); err != nil {
			return i - 1
		}
	}
}

// compressor compresses rotated files in the background. path.1 is left alone:
// readers that follow may still be at its end.
type compressor struct {
	stop atomic.Bool
	done chan struct{} // nil if none was started; guarded by Writer.mu
}

func (z *compressor) start(c Config) {
	z.stop.Store(false)
	z.done = make(chan struct{})
	go func(done chan struct{}) {
		defer close(done)
		for i := 2; i <= c.oldest(); i++ {
			if err := z.compress(c.name(i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return // it stays as it is, and is tried again at the next rotation
			}
		}
	}(z.done)
}

// abort ends the compression under way; its file stays uncompressed for now.
func (z *compressor) abort() {
	z.stop.Store(true)
	z.wait()
}

func (z *compressor) wait() {
	if z.done != nil {
		<-z.done
	}
}

var errAborted = errors.New("aborted")

func (z *compressor) compress(path string) (err error) {
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	tmp := path + gz + ".tmp"
	out, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			out.Close()
			os.Remove(tmp)
		}
	}()
	zw, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	if err != nil {
		return err
	}
	buf := make([]byte, 32<<10)
	for {
		if z.stop.Load() {
			return errAborted
		}
		n, rerr := in.Read(buf)
		if _, err := zw.Write(buf[:n]); err != nil {
			return err
		}
		if errors.Is(rerr, io.EOF) {
			break
		} else if rerr != nil {
			return rerr
		}
	}
	if err := zw.Close(); err != nil {
		return err
	}
	// The old file goes only after the new one is on the disk.
	if err := out.Sync(); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	if err := os.Rename(tmp, path+gz); err != nil {
		return err
	}
	return os.Remove(path)
}
