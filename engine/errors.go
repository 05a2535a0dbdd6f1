package engine

import (
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/internal/errtext"
)

// classed is an error whose text is exactly what a client shall read, and whose
// class (one of errdefs) decides the protocol's code.
type classed struct {
	text  string
	class error
	cause error // may be nil
}

func (e *classed) Error() string { return e.text }

func (e *classed) Unwrap() []error {
	if e.cause == nil {
		return []error{e.class}
	}
	return []error{e.class, e.cause}
}

func invalidf(format string, args ...any) error {
	return &classed{text: fmt.Sprintf(format, args...), class: errdefs.ErrInvalidArgument}
}

func conflictf(format string, args ...any) error {
	return &classed{text: fmt.Sprintf(format, args...), class: errdefs.ErrConflict}
}

func notFoundf(format string, args ...any) error {
	return &classed{text: fmt.Sprintf(format, args...), class: errdefs.ErrNotFound}
}

func notModifiedf(format string, args ...any) error {
	return &classed{text: fmt.Sprintf(format, args...), class: errdefs.ErrNotModified}
}

func notImplementedf(format string, args ...any) error {
	return &classed{text: fmt.Sprintf(format, args...), class: errdefs.ErrNotImplemented}
}

// badRequest gives an error the class of a wrong request, with the same text: a missing
// container or network that a request only mentions must not look like a missing image
// to a client, which would then pull it.
func badRequest(err error) error {
	if errdefs.IsNotFound(err) {
		return &classed{text: errtext.Plain(err), class: errdefs.ErrInvalidArgument}
	}
	return err
}
