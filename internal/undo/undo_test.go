package undo

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestRunReversesAndGoesOnAfterAFailure(t *testing.T) {
	var s Stack
	var ran []string
	boom := errors.New("boom")
	for _, name := range []string{"a", "b", "c"} {
		s.Add(name, func(context.Context) error {
			ran = append(ran, name)
			if name == "b" {
				return boom
			}
			return nil
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // the client went away
	err := s.Run(ctx)
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "undo b") {
		t.Fatalf("got %v", err)
	}
	if want := []string{"c", "b", "b", "b", "a"}; !slices.Equal(ran, want) {
		t.Fatalf("ran %v, want %v", ran, want)
	}
	if err := s.Run(ctx); err != nil {
		t.Fatalf("a second run did something: %v", err)
	}
}

func TestReleaseForgets(t *testing.T) {
	var s Stack
	s.Add("never", func(context.Context) error { t.Error("ran"); return nil })
	s.Release()
	if err := s.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
}
