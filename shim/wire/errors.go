package wire

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"
)

// status is google.rpc.Status.
type status struct {
	Code    int32
	Message string
}

func (m *status) fields(c *coder) {
	c.int32(1, &m.Code)
	c.string(2, &m.Message)
}

// classes maps gRPC's status codes to classes of errors, as containerd does. Where
// two classes share a code the first one is what a client sees.
var classes = []struct {
	code  int32
	class error
}{
	{1, context.Canceled},
	{2, errdefs.ErrUnknown},
	{3, errdefs.ErrInvalidArgument},
	{4, context.DeadlineExceeded},
	{5, errdefs.ErrNotFound},
	{6, errdefs.ErrAlreadyExists},
	{7, errdefs.ErrPermissionDenied},
	{8, errdefs.ErrResourceExhausted},
	{9, errdefs.ErrFailedPrecondition},
	{9, errdefs.ErrConflict},
	{9, errdefs.ErrNotModified},
	{10, errdefs.ErrAborted},
	{11, errdefs.ErrOutOfRange},
	{12, errdefs.ErrNotImplemented},
	{13, errdefs.ErrInternal},
	{14, errdefs.ErrUnavailable},
	{15, errdefs.ErrDataLoss},
	{16, errdefs.ErrUnauthenticated},
}

// Error is an error that came over the wire: the peer's text and its class.
type Error struct {
	Class error
	Text  string
}

func (e *Error) Error() string { return e.Text }

// Unwrap gives the class, for errors.Is.
func (e *Error) Unwrap() error { return e.Class }

func toStatus(err error) *status {
	if err == nil {
		return nil
	}
	for _, c := range classes {
		if errors.Is(err, c.class) {
			return &status{c.code, err.Error()}
		}
	}
	return &status{2, err.Error()}
}

func (m *status) error() error {
	if m == nil || m.Code == 0 {
		return nil
	}
	e := &Error{errdefs.ErrUnknown, m.Message}
	for _, c := range classes {
		if c.code == m.Code {
			e.Class = c.class
			break
		}
	}
	if e.Text == "" {
		e.Text = e.Class.Error()
	}
	return e
}
