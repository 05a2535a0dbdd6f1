//go:build linux

package unpack

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Compression of a stream.
type Compression string

// The compressions that layers and archives come in.
const (
	None Compression = ""
	Gzip Compression = "gzip"
	Zstd Compression = "zstd"
)

// zstdWindow bounds the memory of one stream: the largest window that zstd's --ultra
// levels use (RFC 8878 recommends to support 8 MiB at least).
const zstdWindow = 128 << 20

var (
	gzipMagic = []byte{0x1f, 0x8b, 0x08}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// Detect tells the compression by the first bytes of a stream.
func Detect(head []byte) Compression {
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		return Gzip
	case bytes.HasPrefix(head, zstdMagic):
		return Zstd
	case len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18}):
		return Zstd // a skippable frame first
	}
	return None
}

// Decoder decompresses a stream, whatever its compression, within limits.
type Decoder struct {
	Compression Compression

	in    *countReader
	out   io.Reader
	close func()
	n     int64
	l     Limits
}

// NewDecoder looks at the first bytes of r. Errors of the decoder are
// errdefs.ErrInvalidArgument for a broken stream, ErrResourceExhausted for a bomb;
// errors of r pass through.
func NewDecoder(r io.Reader, l Limits) (*Decoder, error) {
	d := &Decoder{in: &countReader{r: r}, l: l.withDefaults(), close: func() {}}
	buffered := bufio.NewReaderSize(d.in, 64<<10)
	head, err := buffered.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch d.Compression = Detect(head); d.Compression {
	case Gzip:
		z, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, d.classify(err)
		}
		d.out, d.close = z, func() { z.Close() }
	case Zstd:
		z, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(zstdWindow), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, d.classify(err)
		}
		d.out, d.close = z, z.Close
	default:
		d.out = buffered
	}
	return d, nil
}

func (d *Decoder) Read(p []byte) (int, error) {
	n, err := d.out.Read(p)
	if d.n += int64(n); d.n > d.l.Size {
		return 0, fmt.Errorf("layer is larger than %d bytes: %w", d.l.Size, errdefs.ErrResourceExhausted)
	}
	if d.n > d.l.RatioFrom && d.in.n > 0 && d.n/d.in.n > d.l.Ratio {
		return 0, fmt.Errorf("layer expands more than %d times: %w", d.l.Ratio, errdefs.ErrResourceExhausted)
	}
	return n, d.classify(err)
}

// Close releases the decoder, not the stream below.
func (d *Decoder) Close() error {
	d.close()
	return nil
}

// classify separates what the compressed bytes are to blame for from errors of the
// stream below.
func (d *Decoder) classify(err error) error {
	switch below := d.in.err; {
	case err == nil:
		return nil
	case below != nil && below != io.EOF: //nolint:errorlint // the bare end is no error
		return below
	case err == io.EOF, d.Compression == None: //nolint:errorlint
		return err
	}
	return fmt.Errorf("decompress layer (%s): %w: %w", d.Compression, err, errdefs.ErrInvalidArgument)
}

// countReader counts, and keeps the error that ended the stream.
type countReader struct {
	r   io.Reader
	n   int64
	err error
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.err = err
	return n, err
}
