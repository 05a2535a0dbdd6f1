// Package errtext makes the text of an error that people read.
//
// In flow errors whose class (errdefs) was wrapped into them with %w, so that the
// class's words stand in their text as if they said something: "port is already
// allocated: already exists". Out flows the text without these.
package errtext

import (
	"errors"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// classes are the errors that stand for a class and for nothing else.
var classes = []error{
	errdefs.ErrUnknown, errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrAlreadyExists,
	errdefs.ErrPermissionDenied, errdefs.ErrResourceExhausted, errdefs.ErrFailedPrecondition, errdefs.ErrConflict,
	errdefs.ErrNotModified, errdefs.ErrAborted, errdefs.ErrOutOfRange, errdefs.ErrNotImplemented, errdefs.ErrInternal,
	errdefs.ErrUnavailable, errdefs.ErrDataLoss, errdefs.ErrUnauthenticated,
}

// saying are words of which one is in every sentence that says what is wrong, and none
// in what merely names an object or an action: "lease x", "start container x".
var saying = []string{
	"already", "ambiguous", "are", "cannot", "can't", "could", "damaged", "denied", "did", "does", "empty", "ended", "ending",
	"exist", "exists", "failed", "has", "have", "invalid", "is", "larger", "longer", "missing", "more", "must", "needed", "needs",
	"no", "not", "only", "overlaps", "refused", "than", "unable", "unexpected", "unknown", "was", "without", "would",
}

// Plain gives an error's text without the words of the classes in it. It looks at the
// errors that are wrapped, not at the words alone: "network x not found" stays. So does
// a class that is all that is said: "lease x: not found".
func Plain(err error) string {
	text := err.Error()
	end := len(text)
	wrapped := unwrap(err)
	// A cause beside the class says what is wrong.
	explained := slices.ContainsFunc(wrapped, func(e error) bool { return e != nil && !isClass(e) })
	for _, inner := range slices.Backward(wrapped) {
		if inner == nil {
			continue
		}
		words := inner.Error()
		i := strings.LastIndex(text[:end], words)
		if i < 0 || words == "" {
			continue // err has a text of its own
		}
		head, rest := text[:i], text[i+len(words):]
		if !isClass(inner) {
			text, end = head+Plain(inner)+rest, i
			continue
		}
		switch short, ok := strings.CutSuffix(head, ": "); {
		case ok && !explained && !says(short):
		case ok && inner == errdefs.ErrPermissionDenied && !strings.HasSuffix(short, words):
			// It reads like EACCES, whose words may be what it stands for here.
		case ok:
			text, end = short+rest, len(short)
		case head == "" && strings.HasPrefix(rest, ": ") && inner != errdefs.ErrConflict: // with which Docker's own texts begin
			text, end = rest[2:], 0
		}
	}
	return text
}

func says(text string) bool {
	return slices.ContainsFunc(strings.FieldsFunc(text, func(r rune) bool { return r == ' ' || r == ':' || r == ',' }),
		func(word string) bool { return slices.Contains(saying, word) })
}

func isClass(err error) bool {
	return slices.ContainsFunc(classes, func(c error) bool { return c == err })
}

func unwrap(err error) []error {
	if m, ok := err.(interface{ Unwrap() []error }); ok {
		return m.Unwrap()
	}
	return []error{errors.Unwrap(err)}
}
