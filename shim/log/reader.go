package log

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	readBuffer = 32 << 10
	// maxRecord bounds a record in the file; ours are at most 6 bytes for each of
	// maxPiece and the attributes. What is longer is skipped as malformed.
	maxRecord = 1 << 20
	// headSize is how much of a file's beginning identifies it once it is compressed.
	headSize = 512
	// pollInterval is how often a followed file is looked at where inotify is not to be had.
	pollInterval = 250 * time.Millisecond
	// patience bounds the search for a file among others that are being rotated.
	patience = 10 * time.Second
)

// ReadOptions chooses what is read. The zero value with a Format reads nothing
// (Tail 0): set Tail to -1 for everything.
type ReadOptions struct {
	Format       string
	Since, Until time.Time // inclusive; zero: no bound
	Tail         int       // the last so many records before the filters; negative: all
	// Follow goes on when the end is reached, until the context ends or Done is closed.
	Follow bool
	// Done says that nothing more will be written: what is there is read to the end,
	// then the sequence ends.
	Done <-chan struct{}
}

// Read gives the records of a log file and of its rotated predecessors (path.N and
// path.N.gz), oldest first. Malformed records, such as one that a crash tore, are
// passed over. The sequence ends after an error; memory is bounded whatever the
// file holds. A missing file is errdefs.ErrNotFound, but with Follow it is waited for.
func Read(ctx context.Context, path string, o ReadOptions) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		r := &reader{path: path, o: o, yield: yield}
		switch o.Format {
		case FormatJSON:
			r.parse = parseJSON
		case FormatCRI:
			r.parse = parseCRI
		default:
			yield(Entry{}, fmt.Errorf("log format %q: %w", o.Format, errdefs.ErrInvalidArgument))
			return
		}
		err := r.run(ctx)
		if err != nil && !errors.Is(err, errEnd) {
			yield(Entry{}, fmt.Errorf("read log %s: %w", path, err))
		}
	}
}

// errEnd ends a read early and in good order: the consumer or Until asked for it.
var errEnd = errors.New("end")

type reader struct {
	path  string
	o     ReadOptions
	parse func(rec, buf []byte) (Entry, error)
	yield func(Entry, error) bool
	line  []byte // Entry.Line of the current record
}

func (r *reader) run(ctx context.Context) error {
	var wake <-chan struct{}
	if r.o.Follow {
		// Before the first look at the files, so that no change is missed.
		w, err := watch(filepath.Dir(r.path))
		if err != nil {
			return err
		}
		defer w.close()
		wake = w.wake
	}
	files, err := openAll(r.path)
	if err != nil {
		return err
	}
	defer func() {
		for _, f := range files {
			f.close()
		}
	}()
	if len(files) == 0 && !r.o.Follow {
		return errdefs.ErrNotFound
	}
	if r.o.Tail >= 0 {
		if files, err = tail(files, r.o.Tail); err != nil {
			return err
		}
	}
	var cur *logFile
	for len(files) > 0 {
		cur, files = files[0], files[1:]
		live := len(files) == 0 && r.o.Follow
		if !live && !r.o.Since.IsZero() && cur.modTime.Before(r.o.Since) {
			cur.close()
			continue
		}
		if err := r.drain(ctx, cur); err != nil || !live {
			cur.close()
			if err != nil {
				return err
			}
		}
	}
	if !r.o.Follow {
		return nil
	}
	return r.follow(ctx, cur, wake)
}

// follow goes on from the end of cur, which may be nil, and closes it.
func (r *reader) follow(ctx context.Context, cur *logFile, wake <-chan struct{}) error {
	defer func() { cur.close() }()
	var until <-chan time.Time
	if !r.o.Until.IsZero() {
		t := time.NewTimer(time.Until(r.o.Until) + time.Second)
		defer t.Stop()
		until = t.C
	}
	last := false
	for {
		next, err := r.successor(cur)
		if err != nil {
			return err
		}
		if next != nil {
			// The writer makes the new file after its last write to the old one.
			if cur != nil {
				err = r.drain(ctx, cur)
			}
			cur.close()
			cur = next
			if err == nil {
				err = r.drain(ctx, cur)
			}
			if err != nil {
				return err
			}
			continue
		}
		if last {
			return nil
		}
		select {
		case <-wake:
		case <-until:
			last = true
		case <-r.o.Done:
			last = true
		case <-ctx.Done():
			return ctx.Err()
		}
		if cur != nil {
			if err := cur.rewindIfTruncated(); err != nil {
				return err
			}
			if err := r.drain(ctx, cur); err != nil {
				return err
			}
		}
	}
}

// drain yields all whole records up to the end of f.
func (r *reader) drain(ctx context.Context, f *logFile) error {
	for n := 0; ; n++ {
		if n%64 == 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		rec, err := f.record()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		e, err := r.parse(rec, r.line)
		if err != nil {
			continue
		}
		r.line = e.Line
		if !r.o.Since.IsZero() && e.Time.Before(r.o.Since) {
			continue
		}
		if !r.o.Until.IsZero() && e.Time.After(r.o.Until) {
			return errEnd
		}
		if !r.yield(e, nil) {
			return errEnd
		}
	}
}

// successor opens the file that came after cur, or gives nil if cur is the newest.
func (r *reader) successor(cur *logFile) (*logFile, error) {
	if cur == nil {
		f, err := openLog(r.path, "")
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return f, err
	}
	// After a rotation under our feet it looks again.
	for end := time.Now().Add(patience); time.Now().Before(end); {
		i, err := r.position(cur)
		if err != nil || i == 0 {
			return nil, err
		}
		var next *logFile
		if i < 0 {
			// cur has been deleted: whatever is left is younger.
			files, err := openAll(r.path)
			if err != nil || len(files) == 0 {
				return nil, err
			}
			for _, f := range files[1:] {
				f.close()
			}
			return files[0], nil
		}
		for _, ext := range []string{"", gz} {
			if next, err = openLog(Config{Path: r.path}.name(i-1), ext); !errors.Is(err, fs.ErrNotExist) {
				break
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			if i == 1 {
				return nil, nil // renamed, and the new one is not there yet
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		if again, err := r.position(cur); err != nil || again == i {
			return next, err
		}
		next.close()
	}
	return nil, errTooFast
}

// position is the number of rotations since cur was the newest file; -1 if it is gone.
func (r *reader) position(cur *logFile) (i int, err error) {
	err = quiet(r.path, func(names []rotatedName) (bool, error) {
		i, err = r.find(cur, names)
		return i >= 0, err
	})
	return i, err
}

func (r *reader) find(cur *logFile, names []rotatedName) (int, error) {
	st, err := os.Stat(r.path)
	if err == nil && os.SameFile(st, cur.info) {
		return 0, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	for _, n := range names {
		same, err := cur.is(Config{Path: r.path}.name(n.i)+n.ext, n.ext)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
		if same {
			return n.i, nil
		}
	}
	return -1, nil
}

// quiet calls look with the rotated files, again and again until it is satisfied or
// no file was renamed, made or compressed meanwhile.
func quiet(path string, look func([]rotatedName) (done bool, err error)) error {
	for end := time.Now().Add(patience); time.Now().Before(end); {
		before, names, err := survey(path)
		if err != nil {
			return err
		}
		if done, err := look(names); done || err != nil {
			return err
		}
		after, names2, err := survey(path)
		if err != nil {
			return err
		}
		if slices.Equal(names, names2) && (before == nil) == (after == nil) && (before == nil || os.SameFile(before, after)) {
			return nil
		}
	}
	return errTooFast
}

var errTooFast = errors.New("rotated faster than it can be read")

// survey gives what there is: the newest file (nil: missing) and the rotated ones.
func survey(path string) (fs.FileInfo, []rotatedName, error) {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		st, err = nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	names, err := rotated(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return st, names, err
}

type rotatedName struct {
	i   int
	ext string
}

// rotated lists the rotated files, youngest first.
func rotated(path string) ([]rotatedName, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	byNumber := map[int]string{}
	most := 0
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), filepath.Base(path)+".")
		if !ok {
			continue
		}
		number, zipped := strings.CutSuffix(rest, gz)
		i, err := strconv.Atoi(number)
		if err != nil || i < 1 || strconv.Itoa(i) != number {
			continue
		}
		if _, both := byNumber[i]; both && zipped {
			continue // the plain file is whole as long as it exists
		}
		byNumber[i] = ""
		if zipped {
			byNumber[i] = gz
		}
		most = max(most, i)
	}
	var out []rotatedName
	for i := 1; i <= most; i++ {
		if ext, ok := byNumber[i]; ok {
			out = append(out, rotatedName{i, ext})
		}
	}
	return out, nil
}

// openAll opens the file and its predecessors, oldest first.
func openAll(path string) (files []*logFile, err error) {
	err = quiet(path, func(names []rotatedName) (bool, error) {
		for _, f := range files {
			f.close() // of a look that was disturbed
		}
		files, err = openNames(path, names)
		return false, err
	})
	if err != nil {
		for _, f := range files {
			f.close()
		}
		return nil, err
	}
	return files, nil
}

func openNames(path string, names []rotatedName) (files []*logFile, err error) {
	add := func(name, ext string) error {
		f, err := openLog(name, ext)
		if errors.Is(err, fs.ErrNotExist) && ext == "" {
			f, err = openLog(name, gz) // compressed a moment ago
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		for _, have := range files {
			if os.SameFile(have.info, f.info) {
				f.close()
				return nil
			}
		}
		files = append([]*logFile{f}, files...)
		return nil
	}
	if err := add(path, ""); err != nil {
		return files, err
	}
	for _, n := range names {
		if err := add(Config{Path: path}.name(n.i), n.ext); err != nil {
			return files, err
		}
	}
	return files, nil
}

// logFile is one open file, plain or compressed.
type logFile struct {
	f       *os.File
	info    fs.FileInfo
	modTime time.Time
	zip     *gzip.Reader
	r       *bufio.Reader
	off     int64  // bytes taken from the file (plain only)
	part    []byte // a record whose end has not been read yet
	skip    bool   // the record is too long: pass over the rest
}

func openLog(name, ext string) (*logFile, error) {
	f, err := os.OpenFile(name+ext, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	l := &logFile{f: f}
	if l.info, err = f.Stat(); err == nil && !l.info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err == nil {
		l.modTime = l.info.ModTime()
		err = l.reset(ext == gz)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", filepath.Base(name+ext), err)
	}
	return l, nil
}

// reset goes to the beginning.
func (l *logFile) reset(zipped bool) error {
	if _, err := l.f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	l.off, l.part, l.skip = 0, nil, false
	if !zipped {
		l.r = bufio.NewReaderSize(l.f, readBuffer)
		return nil
	}
	z, err := gzip.NewReader(l.f)
	if err != nil {
		return err
	}
	l.zip, l.r = z, bufio.NewReaderSize(z, readBuffer)
	return nil
}

func (l *logFile) close() {
	if l != nil {
		l.f.Close()
	}
}

// record gives the next record without its newline, valid until the next call;
// io.EOF when there is no whole one (yet).
func (l *logFile) record() ([]byte, error) {
	for {
		p, err := l.r.ReadSlice('\n')
		l.off += int64(len(p))
		whole := err == nil
		if whole && len(l.part) == 0 && !l.skip {
			return p[:len(p)-1], nil
		}
		if !l.skip && len(l.part)+len(p) > maxRecord {
			l.part, l.skip = nil, true
		}
		if !l.skip {
			l.part = append(l.part, p...)
		}
		switch {
		case whole && l.skip:
			l.skip = false
		case whole:
			rec := l.part[:len(l.part)-1]
			l.part = l.part[:0]
			return rec, nil
		case errors.Is(err, bufio.ErrBufferFull):
		default:
			return nil, err
		}
	}
}

// rewindIfTruncated goes back to the beginning of a file that was emptied.
func (l *logFile) rewindIfTruncated() error {
	if l.zip != nil {
		return nil
	}
	st, err := l.f.Stat()
	if err != nil || st.Size() >= l.off {
		return err
	}
	return l.reset(false)
}

// is reports whether a name leads to this file, or to what became of it when it was
// compressed.
func (l *logFile) is(name, ext string) (bool, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || os.SameFile(st, l.info) {
		return err == nil, err
	}
	if ext != gz {
		return false, nil
	}
	head := gzipHead(f)
	return head != nil && bytes.Equal(l.head(), head), nil
}

// head is the beginning of the file, which no other file of this log shares: it
// holds a time.
func (l *logFile) head() []byte {
	if l.zip != nil {
		return gzipHead(l.f) // by its descriptor: its name has moved on
	}
	b := make([]byte, headSize)
	n, err := l.f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil
	}
	return b[:n]
}

func gzipHead(f io.ReaderAt) []byte {
	z, err := gzip.NewReader(io.NewSectionReader(f, 0, 1<<62))
	if err != nil {
		return nil
	}
	b := make([]byte, headSize)
	n, err := io.ReadFull(z, b)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return b[:n]
}

// tail leaves the files that hold the last n records, the first of them positioned.
func tail(files []*logFile, n int) ([]*logFile, error) {
	for i := len(files) - 1; i >= 0; i-- {
		f := files[i]
		have, err := f.seekTail(n)
		if err != nil {
			return files, err
		}
		if n -= have; n == 0 {
			for _, old := range files[:i] {
				old.close()
			}
			return files[i:], nil
		}
	}
	return files, nil
}

// seekTail goes to the last n records of the file, or to its beginning if it holds
// fewer, and gives how many there are to read.
func (l *logFile) seekTail(n int) (int, error) {
	if l.zip == nil {
		return l.seekTailPlain(n)
	}
	total := 0
	for {
		if _, err := l.record(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return 0, err
		}
		total++
	}
	if err := l.reset(true); err != nil {
		return 0, err
	}
	for range total - n {
		if _, err := l.record(); err != nil {
			return 0, err
		}
	}
	return min(n, total), nil
}

func (l *logFile) seekTailPlain(n int) (int, error) {
	st, err := l.f.Stat()
	if err != nil {
		return 0, err
	}
	buf := make([]byte, readBuffer)
	end := st.Size()
	var newlines int // n records end with n newlines and begin after the one before
	start := int64(0)
search:
	for pos := end; pos > 0; {
		size := min(int64(len(buf)), pos)
		pos -= size
		if _, err := l.f.ReadAt(buf[:size], pos); err != nil {
			return 0, err
		}
		for b := buf[:size]; ; {
			i := bytes.LastIndexByte(b, '\n')
			if i < 0 {
				break
			}
			if newlines == n {
				start = pos + int64(i) + 1
				break search
			}
			newlines++
			b = b[:i]
		}
	}
	if _, err := l.f.Seek(start, io.SeekStart); err != nil {
		return 0, err
	}
	l.off = start
	l.r.Reset(l.f)
	return newlines, nil
}
