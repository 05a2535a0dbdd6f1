package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
)

// A connection to a shim's socket whose first byte is '{' speaks the attach
// protocol instead of ttrpc (whose first byte is that of a length, and small): the
// client sends an AttachRequest as one line of JSON, the shim answers with an
// AttachReply as one line, and then both send frames: type (1 byte), length
// (uint32, big endian), payload.
const (
	FrameStdin      = 0 // client: input
	FrameStdout     = 1 // shim: output
	FrameStderr     = 2
	FrameEnd        = 3 // shim: all output has been sent, and the connection ends; see AttachRequest.Process
	FrameCloseStdin = 4 // client: no more input from this client
)

const (
	frameHeader = 5
	// MaxFrame bounds the payload of a frame, in bytes.
	MaxFrame = 64 << 10
	// maxLine bounds the lines of JSON.
	maxLine = 4096
	// maxProcess bounds a process to be run, in bytes of JSON.
	maxProcess = 4 << 20
)

// VersionRun is the version of requests with a process.
const VersionRun = 2

// AttachRequest names a process and the streams that the client wants.
type AttachRequest struct {
	Version int    `json:"version"` // 1, or VersionRun
	ID      string `json:"id"`
	ExecID  string `json:"execID,omitempty"`
	Stdin   bool   `json:"stdin,omitempty"`
	Stdout  bool   `json:"stdout,omitempty"`
	Stderr  bool   `json:"stderr,omitempty"`
	// Process is the length in bytes of an OCI process in JSON that follows the line. It is
	// added under ExecID, attached to, started and, when it has ended, deleted: the reply comes
	// after the start, and FrameEnd has the exit status (uint32, big endian) as its payload. It runs on when the
	// client goes.
	Process int `json:"process,omitempty"`
}

// ReadProcess reads the process that follows a request.
func ReadProcess(r io.Reader, q AttachRequest) ([]byte, error) {
	if q.Process <= 0 || q.Process > maxProcess {
		return nil, fmt.Errorf("process of %d bytes", q.Process)
	}
	b := make([]byte, q.Process)
	_, err := io.ReadFull(r, b)
	return b, err
}

// WriteRun sends a request with its process, with one write(2).
func WriteRun(w io.Writer, q AttachRequest, process []byte) error {
	q.Version, q.Process = VersionRun, len(process)
	b, err := json.Marshal(q)
	if err != nil {
		return err
	}
	_, err = w.Write(append(append(b, '\n'), process...))
	return err
}

// AttachReply is the answer. Code is 0 or the number of an error class.
type AttachReply struct {
	Code    int32  `json:"code"`
	Message string `json:"message,omitempty"`
	// Of a process that was run: its number, and whether the error is one of its start.
	Pid   int  `json:"pid,omitempty"`
	Start bool `json:"start,omitempty"`
}

// WriteLine sends v as one line of JSON.
func WriteLine(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// ReadLine reads one line of JSON into v.
func ReadLine(r *bufio.Reader, v any) error {
	var line []byte
	for {
		p, err := r.ReadSlice('\n')
		if len(line)+len(p) > maxLine {
			return errors.New("line too long")
		}
		line = append(line, p...)
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
	return json.Unmarshal(bytes.TrimSpace(line), v)
}

// Reply makes the answer of the outcome of an attach.
func Reply(err error) AttachReply {
	if st := toStatus(err); st != nil {
		return AttachReply{Code: st.Code, Message: st.Message}
	}
	return AttachReply{}
}

// Err is the error that the reply tells of.
func (r AttachReply) Err() error {
	return (&status{r.Code, r.Message}).error()
}

// WriteFrame sends a frame of at most MaxFrame bytes, with one writev(2).
func WriteFrame(w net.Conn, typ byte, p []byte) error {
	h := [frameHeader]byte{typ}
	binary.BigEndian.PutUint32(h[1:], uint32(len(p)))
	if len(p) == 0 {
		_, err := w.Write(h[:])
		return err
	}
	b := net.Buffers{h[:], p}
	_, err := b.WriteTo(w)
	return err
}

// AppendFrame appends a frame of at most MaxFrame bytes.
func AppendFrame(b []byte, typ byte, p []byte) []byte {
	b = append(b, typ)
	b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
	return append(b, p...)
}

// ReadFrameHeader reads the type of a frame and the length of its payload.
func ReadFrameHeader(r io.Reader) (typ byte, n int, err error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, 0, err
	}
	size := binary.BigEndian.Uint32(h[1:])
	if size > MaxFrame {
		return 0, 0, fmt.Errorf("attach frame of %d bytes", size)
	}
	return h[0], int(size), nil
}

// ReadFrame reads a frame into buf, which must hold MaxFrame bytes, and gives the payload.
func ReadFrame(r io.Reader, buf []byte) (typ byte, p []byte, err error) {
	typ, n, err := ReadFrameHeader(r)
	if err != nil {
		return 0, nil, err
	}
	if _, err := io.ReadFull(r, buf[:n]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return typ, buf[:n], nil
}

// ServiceTask and the others are the names of ttrpc services.
const (
	ServiceTaskV3 = "containerd.task.v3.Task"
	ServiceTaskV2 = "containerd.task.v2.Task"
	ServiceHako   = "hako.shim.v1.Shim" // hako's own: ReopenLog, Reserve
	ServiceEvents = "containerd.services.events.ttrpc.v1.Events"
)

// Files in a bundle (docs/shim.md).
const (
	ExitFile    = "exit.json"
	TaskFile    = "task.json"
	AddressFile = "address"
	SocketFile  = "shim.sock"
	LogFile     = "shim.log"
)
