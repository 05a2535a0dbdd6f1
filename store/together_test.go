package store

import (
	"context"
	"errors"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// TestTogether counts transactions: two updates that are announced share one, whichever
// comes late; one that never comes, or fails, does not harm the other.
func TestTogether(t *testing.T) {
	t.Parallel()
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	d := s.DB()
	writes := func() int64 { st := d.bolt.Stats(); return st.TxStats.GetWrite() }
	note := func(tx *bolt.Tx) error { _, err := tx.CreateBucketIfNotExists([]byte("x")); return err }
	if err := d.Update(t.Context(), note); err != nil {
		t.Fatal(err)
	}
	begin := writes()
	if err := d.Update(t.Context(), note); err != nil {
		t.Fatal(err)
	}
	one := writes() - begin

	failed := errors.New("failed")
	for name, second := range map[string]func(context.Context) error{
		"both": func(ctx context.Context) error {
			time.Sleep(time.Millisecond)
			return d.Update(ctx, note)
		},
		"one fails": func(ctx context.Context) error {
			if err := d.Update(ctx, func(*bolt.Tx) error { return failed }); !errors.Is(err, failed) {
				return errors.New("did not fail")
			}
			return nil
		},
		"one never comes": func(context.Context) error { return nil },
	} {
		if d.patience = time.Minute; name == "one never comes" {
			d.patience = time.Millisecond
		}
		begin := writes()
		ctx := Together(t.Context(), 2)
		got := make(chan error, 1)
		go func() { got <- second(ctx) }()
		if err := d.Update(ctx, note); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := <-got; err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if n := writes() - begin; n > one && name != "one fails" {
			t.Errorf("%s: %d pages written, %d by one transaction", name, n, one)
		}
	}
}
