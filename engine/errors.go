package engine

import (
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
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
		return &classed{text: err.Error(), class: errdefs.ErrInvalidArgument}
	}
	return err
}

// plainText is an error's text without the class that wrapping put at its end, where
// the text already says it.
func plainText(err error) string {
	text := err.Error()
	for _, class := range []error{errdefs.ErrNotFound, errdefs.ErrPermissionDenied, errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition, errdefs.ErrUnknown, errdefs.ErrInternal, errdefs.ErrAlreadyExists, errdefs.ErrResourceExhausted} {
		if errors.Is(err, class) {
			short, cut := strings.CutSuffix(text, ": "+class.Error())
			// EACCES reads like its class. Clients look for the words, so they stay once.
			if cut && (class != errdefs.ErrPermissionDenied || strings.HasSuffix(short, class.Error())) {
				text = short
			}
		}
	}
	return text
}
