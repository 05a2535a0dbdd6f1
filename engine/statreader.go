package engine

import (
	"bytes"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// statReader reads the short files in which the kernel gives numbers. Package os takes seven system calls for
// one, since it asks the poller about each; statistics of a hundred containers are seven hundred files.
type statReader struct {
	// kept holds files open, so that the next read is one system call; nil: none is. A nil
	// file is one that is not there.
	kept map[statFile]*os.File
	buf  [8 << 10]byte // none of a cgroup's files is longer
}

// statFile names a file. It takes less to keep than a path: directories share theirs, and names are constants.
type statFile struct{ dir, name string }

// statReaders are for those who read now: their buffers would be most of what a list of statistics allocates.
var statReaders = sync.Pool{New: func() any { return new(statReader) }}

// done gives a reader back.
func (r *statReader) done() {
	r.kept = nil
	statReaders.Put(r)
}

// read gives a file's content, which is valid until the next read; nil on an error.
func (r *statReader) read(dir, name string) []byte {
	f, known := r.kept[statFile{dir, name}]
	if !known {
		path := dir + "/" + name
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		for err == unix.EINTR {
			fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		if r.kept == nil {
			if err != nil {
				return nil
			}
			defer unix.Close(fd)
			return r.fill(fd)
		}
		switch err {
		case nil:
			f = os.NewFile(uintptr(fd), name)
		case unix.ENOENT:
		default:
			return nil
		}
		r.kept[statFile{dir, name}] = f
	}
	if f == nil {
		return nil
	}
	return r.fill(int(f.Fd()))
}

// fill reads a file from its beginning. The kernel gives such a file whole, up to a page: what is shorter is all of it.
func (r *statReader) fill(fd int) []byte {
	for n := 0; n < len(r.buf); {
		m, err := unix.Pread(fd, r.buf[n:], int64(n))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil: // ENODEV: the cgroup has gone
			return nil
		}
		if n += m; m == 0 || n < 2<<10 {
			return r.buf[:n]
		}
	}
	return r.buf[:]
}

// number reads a file with one number; 0 for "max", a missing one and a missing controller.
func (r *statReader) number(dir, name string) uint64 {
	if dir == "" {
		return 0
	}
	return parseUint(r.read(dir, name))
}

func parseUint(text []byte) uint64 {
	n, _ := strconv.ParseUint(string(bytes.TrimSpace(text)), 10, 64)
	return n
}

// field is a key of a flat-keyed file, and where its number goes.
type field struct {
	key string
	to  *uint64
}

// flat reads the wanted keys of a flat-keyed file (see cgroups(7)): "key number" lines.
func (r *statReader) flat(dir, name string, want ...field) {
	left := len(want)
	for line := range bytes.Lines(r.read(dir, name)) {
		k, v, _ := bytes.Cut(bytes.TrimSpace(line), []byte{' '})
		for _, f := range want {
			if f.key != string(k) {
				continue
			}
			*f.to, _ = strconv.ParseUint(string(v), 10, 64)
			if left--; left == 0 {
				return
			}
		}
	}
}

// psi reads a file such as cpu.pressure.
func (r *statReader) psi(dir, name string) *PSI {
	text := r.read(dir, name)
	if text == nil {
		return nil
	}
	var out PSI
	for line := range bytes.Lines(text) {
		to := &out.Some
		if bytes.HasPrefix(line, []byte("full")) {
			to = &out.Full
		}
		for kv := range bytes.FieldsSeq(line) {
			k, v, _ := bytes.Cut(kv, []byte{'='})
			switch string(k) {
			case "avg10":
				to.Avg10, _ = strconv.ParseFloat(string(v), 64)
			case "avg60":
				to.Avg60, _ = strconv.ParseFloat(string(v), 64)
			case "avg300":
				to.Avg300, _ = strconv.ParseFloat(string(v), 64)
			case "total":
				us, _ := strconv.ParseUint(string(v), 10, 64)
				to.Total = us * 1000
			}
		}
	}
	return &out
}
