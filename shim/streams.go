package shim

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/shim/log"
	"github.com/hako-engine/hako/shim/wire"
)

const (
	// drainLimit bounds how long the end of a process waits for a FIFO or a logging program
	// that takes nothing of its output. One that is slow is waited for as for copying.
	drainLimit = 2 * time.Second
	// copyLimit bounds it where nobody refuses the output, and it is only not copied yet, as on a
	// machine with much else to do.
	copyLimit = time.Minute
)

// ioRequest is the part of a request that configures the streams of a process.
type ioRequest struct {
	id, namespace         string
	terminal              bool
	stdin, stdout, stderr string
	uid, gid              int // owner of the pipes that the process gets
}

// streams are the streams of one process. Output flows from a pipe or the console
// to the log or file, and then to each attached client; input flows from a FIFO or
// from attached clients into a pipe or the console.
type streams struct {
	terminal bool
	uid, gid int // owner of the process's ends
	// The process's ends; closed after the start.
	stdinEnd, stdoutEnd, stderrEnd *os.File

	outputs []*output // one for a console
	input   *input    // nil: stdin is /dev/null
	clients clients
	once    bool // stdin ends with the first client

	log  *log.Writer
	busy func() // notes that there was output
}

// sink takes output. A write blocks while the taker is slow, and fails when it is gone.
type sink interface {
	Write(p []byte) (int, error)
	Close() error
}

// openStreams makes the streams that a request describes. start starts a child that
// the reaper knows (for binary://); busy is called when there is output.
func openStreams(r ioRequest, start startChild, busy func()) (s *streams, err error) {
	s = &streams{terminal: r.terminal, uid: r.uid, gid: r.gid, busy: busy}
	defer func() {
		if err != nil {
			s.closeEnds()
			s.close()
			s = nil
		}
	}()
	if r.terminal {
		r.stderr = ""
	}
	outSink, errSink, config, err := s.openSinks(r, start)
	if err != nil {
		return s, err
	}
	s.once = config.StdinOnce
	if err := s.openInput(r, config); err != nil {
		if outSink != nil {
			outSink.Close()
		}
		if errSink != nil {
			errSink.Close()
		}
		return s, err
	}
	hako := config.hako
	if r.terminal {
		s.outputs = []*output{newOutput(s, wire.FrameStdout, outSink)} // source: the console, later
		return s, nil
	}
	if outSink != nil || hako {
		if err := s.addOutput(wire.FrameStdout, outSink, &s.stdoutEnd); err != nil {
			return s, err
		}
	}
	if errSink != nil || hako {
		if err := s.addOutput(wire.FrameStderr, errSink, &s.stderrEnd); err != nil {
			return s, err
		}
	}
	return s, nil
}

type sinkConfig struct {
	wire.Stdio
	hako bool // the streams are configured by a URI of ours: clients may attach
}

// openSinks opens what takes stdout and stderr. Either may be nil: nothing takes it.
func (s *streams) openSinks(r ioRequest, start startChild) (out, errs sink, c sinkConfig, err error) {
	u, err := url.Parse(r.stdout)
	if err != nil {
		return nil, nil, c, fmt.Errorf("stdout %q: %w: %w", r.stdout, err, errdefs.ErrInvalidArgument)
	}
	switch u.Scheme {
	case wire.Scheme:
		c.hako = true
		if c.Stdio, err = wire.ParseStdio(u); err != nil || c.Log.Format == "" {
			return nil, nil, c, err
		}
		if c.Log.Format == "cri" {
			// The kubelet makes the folder; other clients may not know that. It is made here, since it may be on
			// a mount that hangs: whoever ends this shim ends the waiting.
			if err := os.MkdirAll(filepath.Dir(c.Log.Path), 0o755); err != nil {
				return nil, nil, c, fmt.Errorf("folder of the log: %w", err)
			}
		}
		if s.log, err = log.Open(c.Log); err != nil {
			return nil, nil, c, fmt.Errorf("open log: %w", err)
		}
		return s.log.Stream(log.Stdout), s.log.Stream(log.Stderr), c, nil
	case "binary", "binary-v2":
		out, errs, err = startLogger(u, r, start)
		return out, errs, c, err
	}
	if out, err = openSink(r.stdout); err != nil {
		return nil, nil, c, err
	}
	if errs, err = openSink(r.stderr); err != nil && out != nil {
		out.Close()
	}
	return out, errs, c, err
}

// openSink opens a FIFO or file by its path or file:// URI; "" gives nil.
func openSink(name string) (sink, error) {
	if name == "" {
		return nil, nil
	}
	u, err := url.Parse(name)
	if err != nil {
		return nil, fmt.Errorf("output %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	switch u.Scheme {
	case "", "fifo", "file":
	default:
		return nil, fmt.Errorf("output %q: unknown scheme: %w", name, errdefs.ErrNotImplemented)
	}
	flags := os.O_RDWR | os.O_APPEND | unix.O_NONBLOCK | unix.O_NOCTTY
	if u.Scheme == "file" {
		flags |= os.O_CREATE
		if err := os.MkdirAll(filepath.Dir(u.Path), 0o755); err != nil {
			return nil, fmt.Errorf("open output: %w", err)
		}
	}
	// A FIFO is opened for both directions: opening never waits for a client, and
	// writing never fails because one went away; another may come.
	f, err := os.OpenFile(u.Path, flags, 0o640)
	if err != nil {
		return nil, fmt.Errorf("open output: %w", err)
	}
	if st, err := f.Stat(); err == nil && st.Mode()&os.ModeNamedPipe != 0 {
		return &piped{File: f}, nil
	}
	return f, nil
}

// piped is a FIFO or pipe as a sink. It counts what has gone in: whether a write that takes long
// stands still, or its reader is only slow.
type piped struct {
	*os.File
	taken atomic.Int64 // bytes
}

func (p *piped) Write(b []byte) (int, error) {
	raw, err := p.SyscallConn()
	if err != nil {
		return 0, err
	}
	done := 0
	werr := raw.Write(func(fd uintptr) bool {
		for done < len(b) {
			var n int
			n, err = ignoreEINTR(func() (int, error) { return unix.Write(int(fd), b[done:]) })
			if errors.Is(err, unix.EAGAIN) {
				err = nil
				return false
			}
			if err != nil {
				return true
			}
			done += n
			p.taken.Add(int64(n))
		}
		return true
	})
	return done, errors.Join(err, werr)
}

// openInput opens stdin.
func (s *streams) openInput(r ioRequest, c sinkConfig) error {
	if r.stdin == "" && !c.OpenStdin {
		return nil
	}
	s.input = &input{terminal: r.terminal, ready: make(chan struct{})}
	if r.stdin != "" {
		f, err := os.OpenFile(r.stdin, os.O_RDWR|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err != nil {
			return fmt.Errorf("open stdin: %w", err)
		}
		s.input.fifo = f
	}
	if r.terminal {
		return nil
	}
	end, our, err := pipe(false)
	if err != nil {
		return err
	}
	if err := s.own(end); err != nil {
		our.Close()
		end.Close()
		return err
	}
	s.stdinEnd = end
	s.input.open(our)
	return nil
}

// pipe makes a pipe whose one end, ours, is non-blocking and polled, and whose
// other end, the process's, is an ordinary blocking one. ours is the reading end if
// read is true.
func pipe(read bool) (theirs, ours *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	our, their := p[1], p[0]
	if read {
		our, their = p[0], p[1]
	}
	if err := unix.SetNonblock(our, true); err != nil {
		unix.Close(our)
		unix.Close(their)
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(their), "|"), os.NewFile(uintptr(our), "|"), nil
}

func (s *streams) addOutput(frame byte, to sink, end **os.File) error {
	theirs, ours, err := pipe(true)
	if err != nil {
		return err
	}
	if err := s.own(theirs); err != nil {
		ours.Close()
		theirs.Close()
		return err
	}
	*end = theirs
	o := newOutput(s, frame, to)
	o.src = ours
	s.outputs = append(s.outputs, o)
	return nil
}

// own gives a pipe to whom it shall belong, so that the process can open it anew by
// /dev/stdout.
func (s *streams) own(f *os.File) error {
	if s.uid == 0 && s.gid == 0 {
		return nil
	}
	return f.Chown(s.uid, s.gid)
}

// started begins to copy. console is the pty master, or nil.
func (s *streams) started(console *os.File) {
	s.closeEnds()
	if console != nil {
		// Two files, so that the one can be closed while the other is in use.
		fd, err := unix.FcntlInt(console.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err == nil {
			err = unix.SetNonblock(fd, true)
		}
		console.Close()
		if err != nil {
			return
		}
		master := os.NewFile(uintptr(fd), "console")
		s.outputs[0].src = master
		if s.input != nil {
			s.input.open(master)
		}
	}
	for _, o := range s.outputs {
		o.running.Store(true)
		go o.run()
	}
	if s.input != nil && s.input.fifo != nil {
		go s.input.copyFIFO()
	}
}

func (s *streams) closeEnds() {
	for _, f := range []**os.File{&s.stdinEnd, &s.stdoutEnd, &s.stderrEnd} {
		if *f != nil {
			(*f).Close()
			*f = nil
		}
	}
}

// drain waits until all that the ended process wrote has reached the sinks, but not
// for what another process, that has inherited a stream, may still write; nor for
// clients, whose queues take what is left.
func (s *streams) drain() {
	s.clients.unbound()
	ctx, cancel := context.WithTimeout(context.Background(), copyLimit)
	defer cancel()
	for _, o := range s.outputs {
		o.processEnded()
	}
	var waits sync.WaitGroup
	for _, o := range s.outputs {
		waits.Go(func() {
			tick := time.NewTicker(drainLimit)
			defer tick.Stop()
			o.awaitDrained(ctx, tick.C, o.held())
		})
	}
	waits.Wait()
}

// notHeld: no write stands before a pipe.
const notHeld = -1

// held tells how much the reader of a pipe had taken when a write has to wait for it, and else notHeld.
func (o *output) held() int64 {
	if o.pipe == nil || !o.refused.Load() {
		return notHeld
	}
	return o.pipe.taken.Load()
}

// awaitDrained waits for one output, unless its reader takes nothing from one tick to the next. last is what held has given at the
// beginning.
func (o *output) awaitDrained(ctx context.Context, tick <-chan time.Time, last int64) {
	for {
		select {
		case <-o.drained:
			return
		case <-ctx.Done():
			return
		case <-tick:
			now := o.held()
			if now != notHeld && now == last {
				return
			}
			last = now
		}
	}
}

// end tells the attached clients that there is no more output. It does not wait.
func (s *streams) end() { s.clients.end() }

// close releases everything; output that still arrives is lost, but what is queued
// for clients is not.
func (s *streams) close() {
	if s.input != nil {
		s.input.abort()
	}
	s.clients.end()
	for _, o := range s.outputs {
		o.close()
	}
	if s.log != nil {
		s.log.Close()
	}
}

// resize sets the size of the terminal.
func (s *streams) resize(width, height uint32) error {
	if !s.terminal || len(s.outputs) == 0 || s.outputs[0].src == nil {
		return fmt.Errorf("process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	raw, err := s.outputs[0].src.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	err = raw.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: clamp(height), Col: clamp(width)})
	})
	return errors.Join(err, ierr)
}

func clamp(n uint32) uint16 { return uint16(min(n, 1<<16-1)) }

// output copies one stream of a process to its takers.
type output struct {
	s     *streams
	frame byte
	src   *os.File
	to    sink        // nil: nothing but the clients takes it
	log   *log.Stream // to, if it is one
	pipe  *piped      // to, if it is one

	mu struct {
		sync.Mutex
		taken int64 // bytes read from src
		given int64 // of these, how many have reached the takers
		// limit: the process has ended, and its output ends at so many bytes, or earlier with ending. -1: not yet known.
		limit  int64
		ending bool // it ends when a console has nothing more
	}
	drained chan struct{} // closed when all output of the process has been given
	running atomic.Bool   // run closes the sink
	refused atomic.Bool   // the sink is being written to: so long as it takes nothing
	once    sync.Once
}

func newOutput(s *streams, frame byte, to sink) *output {
	o := &output{s: s, frame: frame, to: to, drained: make(chan struct{})}
	o.mu.limit = -1
	o.log, _ = to.(*log.Stream)
	o.pipe, _ = to.(*piped)
	return o
}

// chunk is how much is read at once: all that a pipe holds.
const chunk = 64 << 10

// consolePiece is the most that a console gives at once.
const consolePiece = 4 << 10

var chunks = sync.Pool{New: func() any { return new([chunk]byte) }}

func (o *output) run() {
	defer o.finish()
	raw, err := o.src.SyscallConn()
	if err != nil {
		return
	}
	for {
		var buf *[chunk]byte
		n := 0
		rerr := raw.Read(func(fd uintptr) bool {
			// The buffer is taken only when there is something to read: an idle
			// container holds none.
			buf = chunks.Get().(*[chunk]byte)
			o.mu.Lock()
			n, err = ignoreEINTR(func() (int, error) { return unix.Read(int(fd), buf[:]) })
			// A console gives 4 KiB at most: what it has more of now goes along.
			for o.s.terminal && err == nil && n > 0 && n <= chunk-consolePiece {
				more, merr := ignoreEINTR(func() (int, error) { return unix.Read(int(fd), buf[n:]) })
				if merr != nil || more <= 0 {
					break // the next round finds out why
				}
				n += more
			}
			if n > 0 {
				o.mu.taken += int64(n)
			}
			empty := errors.Is(err, unix.EAGAIN)
			over := empty && o.mu.ending
			o.mu.Unlock()
			if over {
				o.flush()
				o.isDrained()
			}
			if empty {
				chunks.Put(buf)
				buf = nil
				return false
			}
			return true
		})
		if rerr == nil && err == nil && n > 0 {
			o.give(buf[:n])
		}
		if buf != nil {
			chunks.Put(buf)
		}
		// A console gives EIO when the last process has closed it.
		if rerr != nil || err != nil || n == 0 {
			return
		}
	}
}

func ignoreEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func (o *output) give(p []byte) {
	o.s.busy()
	if o.to != nil {
		o.refused.Store(true)
		_, err := o.to.Write(p)
		o.refused.Store(false)
		if err != nil {
			o.to.Close()
			o.to = nil // the taker is gone, as a file or FIFO can be; the container goes on
		}
	}
	o.s.clients.write(o.frame, p)
	o.mu.Lock()
	o.mu.given += int64(len(p))
	reached := o.mu.limit >= 0 && o.mu.given >= o.mu.limit
	o.mu.Unlock()
	if reached {
		o.flush()
		o.isDrained()
	}
}

// flush records an unfinished line: the process that began it has ended.
func (o *output) flush() {
	if o.log != nil {
		o.log.Close()
	}
}

func (o *output) isDrained() { o.once.Do(func() { close(o.drained) }) }

// finish is the end of the stream itself.
func (o *output) finish() {
	if o.to != nil {
		o.to.Close()
		o.to = nil
	}
	o.isDrained()
}

// consoleHolds is more than a console can hold: 8 KiB on the way (pty(7) gives no number; the kernel's
// tty_buffer_set_limit in pty.c does) and a page that is ready to be read.
const consoleHolds = 64 << 10

// processEnded finds out where the output of the process ends: whatever it wrote is
// in the pipe by now, so that is what has been read, and what the pipe holds. A
// console hands its data on with a delay; but poll and read wait for what is on the way before they
// say that there is nothing.
func (o *output) processEnded() {
	if o.src == nil {
		o.isDrained()
		return
	}
	raw, err := o.src.SyscallConn()
	if err != nil {
		o.isDrained()
		return
	}
	o.mu.Lock()
	held := 0
	cerr := raw.Control(func(fd uintptr) {
		if o.s.terminal {
			held, err = consoleReady(fd)
		} else {
			held, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		}
	})
	if cerr != nil || err != nil {
		held = 0
	}
	o.mu.limit = o.mu.taken + int64(held)
	o.mu.ending = o.s.terminal && held > 0
	reached := o.mu.given >= o.mu.limit
	o.mu.Unlock()
	if reached {
		o.awaitEOF()
	}
}

// consoleReady gives more bytes than a console can hold, or 0 if it holds none.
func consoleReady(fd uintptr) (int, error) {
	n, err := ignoreEINTR(func() (int, error) {
		return unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	})
	if n > 0 {
		return consoleHolds, err
	}
	return 0, err
}

// awaitEOF is for a stream that holds nothing more: nearly always nobody else has it
// open, and its end is on the way. That end also flushes the log.
func (o *output) awaitEOF() {
	go func() {
		select {
		case <-o.drained:
		case <-time.After(20 * time.Millisecond):
			o.flush()
			o.isDrained()
		}
	}()
}

func (o *output) close() {
	if o.src != nil {
		o.src.Close()
	}
	if !o.running.Load() && o.to != nil { // while it runs, the sink is run's alone
		o.to.Close()
	}
}

// input feeds a process's stdin, from a FIFO or from attached clients.
type input struct {
	terminal bool
	fifo     *os.File

	ready chan struct{} // closed when dst is set
	mu    struct {
		sync.Mutex
		dst    *os.File
		closed bool
	}
	write sync.Mutex // one client's piece at a time
}

// open gives the input its destination.
func (i *input) open(dst *os.File) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.mu.dst = dst
	if i.mu.closed && !i.terminal {
		dst.Close()
	}
	close(i.ready)
}

// Write feeds p, and blocks while the process does not read.
func (i *input) Write(p []byte) (int, error) {
	<-i.ready
	i.mu.Lock()
	dst := i.mu.dst
	i.mu.Unlock()
	if dst == nil {
		return 0, os.ErrClosed
	}
	i.write.Lock()
	defer i.write.Unlock()
	return dst.Write(p)
}

// closeWrite lets the process read EOF. A console is left open: the process has it
// for its output, too.
func (i *input) closeWrite() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.mu.closed {
		return
	}
	i.mu.closed = true
	if i.mu.dst != nil && !i.terminal {
		i.mu.dst.Close()
	}
}

// closeFIFO is CloseIO: what the FIFO holds is delivered first.
func (i *input) closeFIFO() {
	if i.fifo == nil {
		i.closeWrite()
		return
	}
	i.fifo.SetReadDeadline(time.Unix(1, 0)) // wakes copyFIFO
}

func (i *input) copyFIFO() {
	defer i.fifo.Close()
	defer i.closeWrite()
	buf := make([]byte, 4<<10)
	for {
		n, err := i.fifo.Read(buf)
		if _, werr := i.Write(buf[:n]); werr != nil {
			return
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			i.rest(buf)
			return
		}
		if err != nil {
			return
		}
	}
}

// rest copies what the FIFO holds now.
func (i *input) rest(buf []byte) {
	raw, err := i.fifo.SyscallConn()
	if err != nil {
		return
	}
	for {
		n := 0
		cerr := raw.Control(func(fd uintptr) {
			n, err = ignoreEINTR(func() (int, error) { return unix.Read(int(fd), buf) })
		})
		if cerr != nil || err != nil || n <= 0 {
			return
		}
		if _, err := i.Write(buf[:n]); err != nil {
			return
		}
	}
}

// abort ends the input for good.
func (i *input) abort() {
	i.closeWrite()
	i.mu.Lock()
	defer i.mu.Unlock()
	select {
	case <-i.ready:
	default:
		close(i.ready) // Write fails
	}
	if i.fifo != nil {
		i.fifo.Close()
	}
}
