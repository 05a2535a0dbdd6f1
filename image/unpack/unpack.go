//go:build linux

// Package unpack turns the tar stream of one image layer into a directory tree.
//
// In flow hostile bytes and an open directory; out flow files below that
// directory and nowhere else, with the owners, modes, times, attributes and holes
// that the layer asked for, or a typed error. No name of the layer is ever looked up
// other than relative to a descriptor inside the directory, with
// openat2(2) RESOLVE_IN_ROOT or without following a link at all.
//
// Formats: POSIX ustar, PAX and GNU tar; whiteouts of the OCI image layer
// specification ("Whiteouts"); markers of overlayfs (kernel documentation,
// filesystems/overlayfs, "whiteouts and opaque directories").
package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Mode says what the tree is.
type Mode int

const (
	// Diff is one layer of a stack, alone: whiteouts become overlayfs markers.
	Diff Mode = iota
	// Base is the lowest layer: whiteouts have nothing to hide and are dropped.
	Base
	// Merged is a tree that shows the layers below (a mounted overlay, a copy):
	// whiteouts remove what they name.
	Merged
)

// ErrNeedsParent says that a layer cannot be unpacked alone (Diff): a hard link or a
// directory on the way leads into the layers below. It has to be unpacked as Merged.
var ErrNeedsParent = errors.New("layer refers to a layer below")

// Limits bound what one layer may cost. A zero field means the default.
type Limits struct {
	Size    int64 // bytes of the decompressed stream, and of the files with their holes; 100 GiB
	Entries int64 // members of the tar; 2,000,000
	Names   int64 // bytes of names that are remembered until the end (directories); 64 MiB
	Ratio   int64 // decompressed : compressed, looked at beyond RatioFrom; 250
	// RatioFrom is the size in bytes up to which any ratio is fine; 1 GiB.
	RatioFrom int64
}

func (l Limits) withDefaults() Limits {
	set := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	set(&l.Size, 100<<30)
	set(&l.Entries, 2_000_000)
	set(&l.Names, 64<<20)
	set(&l.Ratio, 250)
	set(&l.RatioFrom, 1<<30)
	return l
}

// Options of Apply.
type Options struct {
	Mode   Mode
	Limits Limits
	// Writeback starts writing large files to the disk while the layer is still being
	// unpacked, so that a later sync has little left to do.
	Writeback bool
}

// Result is what a layer came to.
type Result struct {
	Size    int64 // bytes in regular files; a hard link adds nothing
	Entries int64 // members of the tar
	Disk    int64 // bytes on the disk, about
	Inodes  int64
	// Implicit are the directories that the layer needs but does not describe, in an
	// order in which parents come first; "." is the top. See Inherit.
	Implicit []string
}

const (
	maxName    = 4096 // PATH_MAX: nothing in a container could use a longer one
	copyBuffer = 256 << 10
	// writebackFrom is the file size from which starting the write early pays.
	writebackFrom = 128 << 10
	whiteout      = ".wh."
	opaqueMarker  = ".wh..wh.opq"
	opaqueXattr   = "trusted.overlay.opaque"
	xattrPrefix   = "SCHILY.xattr."
	sparsePrefix  = "GNU.sparse."
)

// refused is the class of everything that a well-made layer does not contain.
func refused(name, format string, args ...any) error {
	return fmt.Errorf("layer entry %q: %s: %w", name, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

type applier struct {
	ctx    context.Context
	o      Options
	in     *limitReader
	tr     *tar.Reader
	root   int
	umask  uint32
	buf    []byte
	dirs   dirCache
	times  map[string]int64 // directories to their mtimes in ns: set last, when nothing changes them any more
	names  int64            // bytes of names held in times and implicit
	size   int64            // bytes that files will have, with holes
	missed map[string]struct{}
	setgid bool // what is made in some directories belongs to their group unless it is given away
	stale  bool // the cache may hold directories that are not where their names say
	res    Result

	// Merged only: what this layer made, which its own whiteouts must not remove.
	made map[uint64]struct{}
	seed maphash.Seed
}

// Apply unpacks a tar stream (already decompressed) into the directory root, and
// reads r to its end. Errors are errdefs.ErrInvalidArgument for a hostile or broken
// layer, ErrResourceExhausted for one beyond the limits or a full disk, ErrNeedsParent.
// After an error the tree holds an unspecified part of the layer.
func Apply(ctx context.Context, root *os.File, r io.Reader, o Options) (Result, error) {
	o.Limits = o.Limits.withDefaults()
	umask, err := processUmask()
	if err != nil {
		return Result{}, err
	}
	bounded := &limitReader{r: r, left: o.Limits.Size}
	a := &applier{
		ctx: ctx, o: o, in: bounded, tr: tar.NewReader(bounded), root: int(root.Fd()), umask: umask,
		setgid: o.Mode == Merged,
		buf:    make([]byte, copyBuffer), times: map[string]int64{}, missed: map[string]struct{}{".": {}},
	}
	if o.Mode == Merged {
		a.made, a.seed = map[uint64]struct{}{}, maphash.MakeSeed()
	}
	a.dirs.open = a.openDir
	defer a.dirs.flush()
	if err := a.run(); err != nil {
		return Result{}, classify(err)
	}
	if err := drain(bounded, a.buf); err != nil {
		return Result{}, classify(err)
	}
	if err := a.setTimes(); err != nil {
		return Result{}, classify(err)
	}
	a.res.Implicit = slices.Sorted(maps.Keys(a.missed)) // "." sorts before all names but those that start with ! to -
	slices.SortFunc(a.res.Implicit, func(x, y string) int { return depth(x) - depth(y) })
	return a.res, nil
}

func depth(name string) int {
	if name == "." {
		return 0
	}
	return 1 + strings.Count(name, "/")
}

func (a *applier) run() error {
	for {
		if err := a.ctx.Err(); err != nil {
			return context.Cause(a.ctx)
		}
		hdr, err := a.tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read layer entry %d: %w", a.res.Entries+1, a.broken(err))
		}
		if a.res.Entries++; a.res.Entries > a.o.Limits.Entries {
			return fmt.Errorf("layer has more than %d entries: %w", a.o.Limits.Entries, errdefs.ErrResourceExhausted)
		}
		if err := a.entry(hdr); err != nil {
			return err
		}
	}
}

// broken gives an error of the tar reader its class: what the stream below did not
// report is the tar's own fault.
func (a *applier) broken(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if below := a.in.err; below != nil && below != io.EOF { //nolint:errorlint // the bare end is no error
		return below
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
}

// entry applies one member of the tar.
func (a *applier) entry(hdr *tar.Header) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(hdr.Name)
	if err != nil {
		return err
	}
	if a.stale {
		a.dirs.flush()
		a.stale = false
	}
	if name == "." {
		if hdr.Typeflag != tar.TypeDir {
			return refused(hdr.Name, "the root is not a directory")
		}
		return a.describe(name, a.root, hdr)
	}
	dir, base := path.Split(name)
	dir = path.Clean(dir)
	if strings.HasPrefix(base, whiteout) {
		return a.whiteout(hdr, dir, base)
	}
	fd, err := a.parent(dir, hdr.Name)
	if err != nil {
		return err
	}
	a.mark(name)
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		err = a.file(fd, base, hdr)
	case tar.TypeDir:
		err = a.directory(fd, name, base, hdr)
	case tar.TypeSymlink:
		err = a.symlink(fd, base, hdr)
	case tar.TypeLink:
		err = a.link(name, dir, base, hdr)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		err = a.node(fd, base, hdr)
	default:
		return refused(hdr.Name, "unknown type %q", hdr.Typeflag)
	}
	return wrap(hdr.Name, err)
}

// wrap names the entry unless the error does already.
func wrap(name string, err error) error {
	var ent *entryError
	if err == nil || errors.As(err, &ent) || errdefs.IsInvalidArgument(err) || errdefs.IsResourceExhausted(err) {
		return err
	}
	return &entryError{name, err}
}

type entryError struct {
	name string
	err  error
}

func (e *entryError) Error() string {
	return "layer entry " + strconv.Quote(e.name) + ": " + e.err.Error()
}
func (e *entryError) Unwrap() error { return e.err }

// cleanName gives a name relative to the root, "." for the root itself. Absolute names
// are taken as relative to the root, as every engine does; names that climb are refused.
func cleanName(name string) (string, error) {
	if len(name) > maxName {
		return "", refused(name[:64]+"...", "name of %d bytes", len(name))
	}
	if strings.ContainsRune(name, 0) {
		return "", refused(name, "NUL in the name")
	}
	if strings.Contains(name, "..") {
		for elem := range strings.SplitSeq(name, "/") {
			if elem == ".." {
				return "", refused(name, "name leaves the layer")
			}
		}
	}
	name = strings.TrimLeft(path.Clean("/"+name), "/")
	if name == "" {
		return ".", nil
	}
	return name, nil
}

// parent opens the directory that an entry goes into, and makes it if the layer did not.
func (a *applier) parent(dir, of string) (int, error) {
	fd, err := a.dirs.get(dir)
	if err == nil {
		return fd, nil
	}
	if !errors.Is(err, unix.ENOENT) {
		return -1, refused(of, "directory %q: %v", dir, err)
	}
	if err := a.makeParents(dir); err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) {
			// A symbolic link on the way points to what this layer does not hold.
			if a.o.Mode == Diff {
				return -1, fmt.Errorf("layer entry %q: directory %q: %w", of, dir, ErrNeedsParent)
			}
			return -1, refused(of, "directory %q: dangling link", dir)
		}
		return -1, wrap(of, err)
	}
	fd, err = a.dirs.get(dir)
	return fd, wrap(of, err)
}

// makeParents makes a directory and those above it that are missing.
func (a *applier) makeParents(dir string) error {
	at := a.root
	for i := 0; i <= len(dir); i++ {
		if i < len(dir) && dir[i] != '/' {
			continue
		}
		prefix := dir[:i]
		fd, err := a.dirs.get(prefix)
		if errors.Is(err, unix.ENOENT) {
			err = unix.Mkdirat(at, path.Base(prefix), 0o755)
			if err != nil {
				return err
			}
			a.mark(prefix)
			a.count(blockSize)
			if err := a.remember(prefix); err != nil {
				return err
			}
			a.missed[prefix] = struct{}{}
			if fd, err = a.dirs.get(prefix); err == nil && a.setgid {
				err = unix.Fchown(fd, 0, 0)
			}
			if err == nil && (a.setgid || a.umask&0o755 != 0) {
				err = unix.Fchmod(fd, 0o755)
			}
		}
		if err != nil {
			return err
		}
		at = fd
	}
	return nil
}

// blockSize is what a directory, and the last part of a file, take up on most file systems.
const blockSize = 4096

// count adds a new inode that uses some bytes of the disk.
func (a *applier) count(bytes int64) {
	a.res.Inodes++
	a.res.Disk += (bytes + blockSize - 1) &^ (blockSize - 1)
}

// remember accounts for a name that is kept until the end.
func (a *applier) remember(name string) error {
	if a.names += int64(len(name)) + 48; a.names > a.o.Limits.Names {
		return fmt.Errorf("layer has more than %d bytes of directory names: %w", a.o.Limits.Names, errdefs.ErrResourceExhausted)
	}
	return nil
}

// mark notes, for a merged tree, that this layer made name and so what is above it.
func (a *applier) mark(name string) {
	if a.made == nil {
		return
	}
	for name != "." {
		h := maphash.String(a.seed, name)
		if _, ok := a.made[h]; ok {
			return
		}
		a.made[h] = struct{}{}
		name = path.Dir(name)
	}
}

func (a *applier) isMade(name string) bool {
	_, ok := a.made[maphash.String(a.seed, name)]
	return ok
}

// setTimes gives directories their times, now that nothing is put into them any more.
func (a *applier) setTimes() error {
	for name, ns := range a.times {
		fd, err := openat2(a.root, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NONBLOCK, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue // replaced later by the same layer
		}
		if err != nil {
			return wrap(name, err)
		}
		err = futimens(fd, ns)
		unix.Close(fd)
		if err != nil {
			return wrap(name, err)
		}
	}
	return nil
}

// classify gives errors of the stream and of the kernel their class.
func classify(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.Is(err, ErrNeedsParent):
		return err
	case errdefs.IsInvalidArgument(err), errdefs.IsResourceExhausted(err), errdefs.IsDataLoss(err), errdefs.IsUnavailable(err):
		return err
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.ENOMEM):
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	case errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.EINVAL),
		errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EMLINK), errors.Is(err, unix.EISDIR),
		errors.Is(err, unix.EFBIG), errors.Is(err, unix.E2BIG), errors.Is(err, unix.ERANGE):
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

// limitReader fails, other than io.LimitReader, when there is more.
type limitReader struct {
	r    io.Reader
	left int64
	err  error
}

func (l *limitReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		n, err = 0, fmt.Errorf("layer is larger than the limit: %w", errdefs.ErrResourceExhausted)
	}
	l.err = err
	return n, err
}

// drain reads what follows the end marker of the tar: padding, which belongs to the
// digest. Anything but zeros is an error, because other readers would see other files.
func drain(r io.Reader, buf []byte) error {
	for {
		n, err := r.Read(buf)
		if !isZero(buf[:n]) {
			return fmt.Errorf("layer has data after its end: %w", errdefs.ErrInvalidArgument)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read layer: %w", err)
		}
	}
}

// processUmask asks without setting: the mask is one for all threads.
func processUmask() (uint32, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, fmt.Errorf("read umask: %w", err)
	}
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "Umask:"); ok {
			m, err := strconv.ParseUint(strings.TrimSpace(v), 8, 32)
			return uint32(m), err
		}
	}
	return 0, errors.New("read umask: not in /proc/self/status")
}
