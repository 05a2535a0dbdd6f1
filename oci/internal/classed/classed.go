// Package classed gives errors a class of errdefs without adding the class's words to
// their text, which callers compare with runc's.
//
// In flow a class and a message; out flows an error for which errors.Is finds both.
package classed

import "fmt"

type failure struct {
	error
	class error
}

func (e *failure) Unwrap() []error { return []error{e.error, e.class} }

// Errorf is fmt.Errorf with a class.
func Errorf(class error, format string, args ...any) error {
	return &failure{fmt.Errorf(format, args...), class}
}

// As gives err a class.
func As(class, err error) error { return &failure{err, class} }
