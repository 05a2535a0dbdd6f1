package docker

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/common"

	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/internal/errtext"
)

// statusClientGone is what a log shows for a request whose client left (nginx's 499).
const statusClientGone = 499

// statusOf maps the class of an error to the status code that Docker's clients
// expect. It is the only place that does.
func statusOf(err error) int {
	switch {
	case errors.Is(err, engine.ErrNotModified), errdefs.IsNotModified(err):
		return http.StatusNotModified
	case errdefs.IsNotFound(err):
		return http.StatusNotFound
	case errdefs.IsInvalidArgument(err), errdefs.IsOutOfRange(err):
		return http.StatusBadRequest
	case errdefs.IsConflict(err), errdefs.IsAlreadyExists(err), errdefs.IsFailedPrecondition(err), errdefs.IsAborted(err):
		return http.StatusConflict
	case errdefs.IsUnauthorized(err):
		return http.StatusUnauthorized
	case errdefs.IsPermissionDenied(err):
		return http.StatusForbidden
	case errdefs.IsNotImplemented(err):
		return http.StatusNotImplemented
	case errdefs.IsUnavailable(err):
		return http.StatusServiceUnavailable
	case errors.Is(err, context.Canceled), errdefs.IsCanceled(err):
		return statusClientGone
	case errors.Is(err, context.DeadlineExceeded), errdefs.IsDeadlineExceeded(err):
		return http.StatusGatewayTimeout
	default:
		return http.StatusInternalServerError
	}
}

// textError is an error whose text is exactly what the client shall read.
type textError struct {
	text  string
	class error
}

func (e *textError) Error() string { return e.text }
func (e *textError) Unwrap() error { return e.class }

func invalidf(format string, args ...any) error {
	return &textError{fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument}
}

func conflictf(format string, args ...any) error {
	return &textError{fmt.Sprintf(format, args...), errdefs.ErrConflict}
}

func notFoundf(format string, args ...any) error {
	return &textError{fmt.Sprintf(format, args...), errdefs.ErrNotFound}
}

func notImplementedf(format string, args ...any) error {
	return &textError{fmt.Sprintf(format, args...), errdefs.ErrNotImplemented}
}

// errorBody is what a client gets for an error: Docker's text, without the class that the
// status code says already.
func errorBody(err error) common.ErrorResponse {
	return common.ErrorResponse{Message: errtext.Plain(err)}
}
