package stream

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

// Stream numbers of the multiplexed format.
const (
	Stdin       = 0
	Stdout      = 1
	Stderr      = 2
	SystemError = 3
)

const (
	headerSize = 8
	// maxFrame bounds what a Reader accepts as one frame, in bytes.
	maxFrame = 16 << 20
)

// Framer writes the multiplexed format of the Docker Engine API ("Stream format" of
// its ContainerAttach operation): one byte for the stream, three zero bytes, the
// payload's length as a big-endian uint32, the payload. It is safe for concurrent use.
type Framer struct {
	mu  sync.Mutex
	w   io.Writer
	buf []byte
}

// NewFramer writes frames to w, each with a single Write.
func NewFramer(w io.Writer) *Framer { return &Framer{w: w} }

// WriteFrame writes one frame. An empty payload writes nothing.
func (f *Framer) WriteFrame(stream int, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var header [headerSize]byte
	header[0] = byte(stream)
	binary.BigEndian.PutUint32(header[4:], uint32(len(p)))
	f.buf = append(append(f.buf[:0], header[:]...), p...)
	_, err := f.w.Write(f.buf)
	return err
}

// Raw is the sink of a terminal: payloads without frames.
type Raw struct{ W io.Writer }

// WriteFrame writes the payload alone.
func (r Raw) WriteFrame(_ int, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	_, err := r.W.Write(p)
	return err
}

// Reader reads the multiplexed format.
type Reader struct {
	r   io.Reader
	buf []byte
}

// NewReader reads frames from r.
func NewReader(r io.Reader) *Reader { return &Reader{r: r} }

// ReadFrame gives the next frame; the payload is valid until the next call. It
// ends with io.EOF between frames and with io.ErrUnexpectedEOF within one.
func (r *Reader) ReadFrame() (stream int, p []byte, err error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r.r, header[:]); err != nil {
		return 0, nil, err
	}
	size := binary.BigEndian.Uint32(header[4:])
	if header[0] > SystemError || header[1] != 0 || header[2] != 0 || header[3] != 0 || size > maxFrame {
		return 0, nil, fmt.Errorf("bad frame header % x", header)
	}
	if cap(r.buf) < int(size) {
		r.buf = make([]byte, size)
	}
	p = r.buf[:size]
	if _, err := io.ReadFull(r.r, p); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return int(header[0]), p, nil
}
