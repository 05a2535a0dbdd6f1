// Package undo takes back what a failed operation did.
//
// In flow named steps as the operation makes progress; on failure they run in
// reverse order, each one retried, all of them even if some fail, under a context
// that the client's cancellation does not reach. Out flow the errors of those that
// could not be taken back.
package undo

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	attempts = 3
	limit    = 30 * time.Second // for all steps together
)

type step struct {
	name string
	run  func(context.Context) error
}

// Stack holds the steps of one operation. Its zero value is ready to use. It is
// not safe for concurrent use.
type Stack struct {
	steps    []step
	released bool
}

// Add registers a step. The name completes the sentence "undo ...".
func (s *Stack) Add(name string, run func(context.Context) error) {
	s.steps = append(s.steps, step{name, run})
}

// Release forgets all steps: the operation took effect.
func (s *Stack) Release() { s.released, s.steps = true, nil }

// Run takes everything back unless Release was called, and gives the errors of
// the steps that could not be undone, joined. It is meant to be deferred:
//
//	var u undo.Stack
//	defer func() { err = errors.Join(err, u.Run(ctx)) }()
func (s *Stack) Run(ctx context.Context) error {
	if s.released || len(s.steps) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	var errs []error
	for i := len(s.steps) - 1; i >= 0; i-- {
		if err := retry(ctx, s.steps[i].run); err != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", s.steps[i].name, err))
		}
	}
	s.steps = nil
	return errors.Join(errs...)
}

func retry(ctx context.Context, run func(context.Context) error) (err error) {
	for i := range attempts {
		if err = run(ctx); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(time.Duration(i+1) * 20 * time.Millisecond):
		}
	}
	return err
}
