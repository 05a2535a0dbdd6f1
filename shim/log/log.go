// Package log writes and reads the log files of containers, in Docker's json-file
// format and in the CRI format.
//
// In flow the bytes that a container writes; out flow records in a file that is
// rotated without losing any, and from the reader entries in order, across
// rotation, while the file grows. A log file that cannot be written (disk full)
// costs records, which are counted, and never blocks the container for longer than
// the write(2) that failed.
//
// A record holds a line, or a piece of at most 16 KiB of a longer one.
package log

import (
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// Formats of log files.
const (
	FormatJSON = "json-file" // Docker's
	FormatCRI  = "cri"       // Kubernetes': TIME STREAM P|F LINE
)

// maxPiece is the longest piece of a line in one record, in bytes. Docker and
// containerd cut at the same length.
const maxPiece = 16 << 10

// Streams of a process.
const (
	Stdout = "stdout"
	Stderr = "stderr"
)

// Config describes a log file.
type Config struct {
	Format   string // FormatJSON or FormatCRI
	Path     string // parent directories must exist
	MaxSize  int64  // bytes at which the file is rotated; 0: never
	MaxFiles int    // files kept, the current one included; 0 means 1: the file is emptied
	Compress bool   // gzip the second and older rotated files
	// Attrs are added to each json-file record.
	Attrs map[string]string
}

// Entry is one record.
type Entry struct {
	Time   time.Time
	Stream string // Stdout or Stderr
	// Line ends with "\n" unless the record holds a piece of a line that goes on, or
	// the last line of a process that did not end it. It is valid until the next entry.
	Line  []byte
	Attrs map[string]string
}

// Partial reports whether the line goes on in the stream's next record.
func (e Entry) Partial() bool { return len(e.Line) == 0 || e.Line[len(e.Line)-1] != '\n' }

func (c Config) validate() error {
	switch c.Format {
	case FormatJSON, FormatCRI:
	default:
		return fmt.Errorf("log format %q: %w", c.Format, errdefs.ErrInvalidArgument)
	}
	if c.Path == "" || c.MaxSize < 0 || c.MaxFiles < 0 {
		return fmt.Errorf("log file %q, max-size %d, max-files %d: %w", c.Path, c.MaxSize, c.MaxFiles, errdefs.ErrInvalidArgument)
	}
	return nil
}
