package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

func openTest(t testing.TB, root string) *Store {
	t.Helper()
	s, err := Open(root, Options{NoBackgroundGC: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// put is an update that writes one key.
func put(key, value string) func(*bolt.Tx) error {
	return func(tx *bolt.Tx) error {
		b, err := MakeBucket(tx, "test")
		if err != nil {
			return err
		}
		return b.Put([]byte(key), []byte(value))
	}
}

func has(t testing.TB, s *Store, key string) bool {
	t.Helper()
	found := false
	must(t, s.DB().View(context.Background(), func(tx *bolt.Tx) error {
		b := Bucket(tx, "test")
		found = b != nil && b.Get([]byte(key)) != nil
		return nil
	}))
	return found
}

func TestUpdatesShareACommitAndFailAlone(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := context.Background()
	// The first update holds the committer until all the others wait.
	gate := make(chan struct{})
	held := make(chan struct{})
	var wg sync.WaitGroup
	var once sync.Once
	wg.Go(func() {
		must(t, s.DB().Update(ctx, func(tx *bolt.Tx) error {
			once.Do(func() { close(held) })
			<-gate
			return nil
		}))
	})
	<-held
	st := s.db.bolt.Stats()
	before := st.TxStats.GetWrite()
	const n = 40
	errFail := errors.New("fail")
	var failed, panicked, cancelled atomic.Int32
	for i := range n {
		wg.Go(func() {
			key := fmt.Sprint("key", i)
			switch i % 4 {
			case 0:
				err := s.DB().Update(ctx, func(tx *bolt.Tx) error { return errors.Join(put(key, "x")(tx), errFail) })
				if errors.Is(err, errFail) {
					failed.Add(1)
				}
			case 1:
				err := s.DB().Update(ctx, func(tx *bolt.Tx) error { _ = put(key, "x")(tx); panic("oops") })
				if errdefs.IsInternal(err) {
					panicked.Add(1)
				}
			case 2:
				dead, cancel := context.WithCancel(ctx)
				cancel()
				if err := s.DB().Update(dead, put(key, "x")); errors.Is(err, context.Canceled) {
					cancelled.Add(1)
				}
			default:
				if err := s.DB().Update(ctx, put(key, "x")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for len(s.db.reqs) < n*3/4 { // the cancelled ones may not have got in
		time.Sleep(time.Millisecond)
	}
	close(gate)
	wg.Wait()
	if failed.Load() != n/4 || panicked.Load() != n/4 || cancelled.Load() != n/4 {
		t.Errorf("%d failed, %d panicked, %d cancelled, want %d each", failed.Load(), panicked.Load(), cancelled.Load(), n/4)
	}
	for i := range n {
		if got, want := has(t, s, fmt.Sprint("key", i)), i%4 == 3; got != want {
			t.Errorf("key%d there: %v, want %v", i, got, want)
		}
	}
	// A commit writes a handful of pages; each of the ten on its own would have.
	st = s.db.bolt.Stats()
	if w := st.TxStats.GetWrite() - before; w > 16 {
		t.Errorf("%d page writes: the updates did not share a commit", w)
	}
}

func TestClosedStore(t *testing.T) {
	s, err := Open(t.TempDir(), Options{})
	must(t, err)
	must(t, s.Close())
	must(t, s.Close())
	ctx := context.Background()
	if err := s.DB().Update(ctx, put("a", "b")); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
	if err := s.DB().View(ctx, func(*bolt.Tx) error { return nil }); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
	s.ScheduleGC()
}

func TestOpenRefuses(t *testing.T) {
	ctx := context.Background()
	t.Run("second opener", func(t *testing.T) {
		t.Parallel()
		root := t.TempDir()
		openTest(t, root)
		if _, err := Open(root, Options{}); !errdefs.IsUnavailable(err) {
			t.Error(err)
		}
	})
	t.Run("newer schema", func(t *testing.T) {
		root := t.TempDir()
		s, err := Open(root, Options{})
		must(t, err)
		must(t, s.DB().Update(ctx, func(tx *bolt.Tx) error {
			return tx.Bucket(bucketMeta).Put(keySchema, binary.BigEndian.AppendUint32(nil, schemaVersion+1))
		}))
		must(t, s.Close())
		before, err := os.ReadFile(filepath.Join(root, "meta.db"))
		must(t, err)
		if _, err := Open(root, Options{}); !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
		after, err := os.ReadFile(filepath.Join(root, "meta.db"))
		must(t, err)
		if string(before) != string(after) {
			t.Error("a newer file was written to")
		}
	})
	t.Run("foreign file", func(t *testing.T) {
		root := t.TempDir()
		b, err := bolt.Open(filepath.Join(root, "meta.db"), 0o600, nil)
		must(t, err)
		must(t, b.Update(func(tx *bolt.Tx) error { _, err := tx.CreateBucket([]byte("other")); return err }))
		must(t, b.Close())
		if _, err := Open(root, Options{}); !errdefs.IsDataLoss(err) {
			t.Error(err)
		}
	})
	t.Run("damaged file", func(t *testing.T) {
		root := t.TempDir()
		must(t, os.WriteFile(filepath.Join(root, "meta.db"), make([]byte, 64<<10), 0o600))
		if _, err := Open(root, Options{}); !errdefs.IsDataLoss(err) {
			t.Error(err)
		}
	})
}

type thing struct {
	Name  string
	Count int
}

func TestRecords(t *testing.T) {
	root := t.TempDir()
	s := openTest(t, root)
	ctx := context.Background()
	r := s.Records("things")
	var got thing
	if err := r.Get(ctx, "a", &got); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	must(t, r.ForEach(func(string, []byte) error { t.Error("a record in an empty kind"); return nil }))
	must(t, r.Delete(ctx, "a"))
	must(t, r.Put(ctx, "a", thing{"one", 1}))
	must(t, r.Put(ctx, "a", thing{"two", 2}))
	must(t, r.Get(ctx, "a", &got))
	if got != (thing{"two", 2}) {
		t.Error(got)
	}
	must(t, r.PutAll(ctx, map[string]any{"b": thing{"b", 1}, "c": thing{"c", 1}}))
	must(t, s.Write(ctx, Change{"things", "d", thing{"d", 1}}, Change{"things", "c", nil}, Change{"others", "x", 7}))
	// One bad change, and none is made.
	if err := s.Write(ctx, Change{"things", "e", thing{}}, Change{"things", "f", func() {}}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	for _, bad := range []error{r.Put(ctx, "", 1), r.Put(ctx, "x", nil), s.Records("").Put(ctx, "x", 1), r.Put(ctx, string(make([]byte, maxKey+1)), 1)} {
		if !errdefs.IsInvalidArgument(bad) {
			t.Error(bad)
		}
	}
	// A damaged record, and one that the caller cannot use, do not hide the others.
	must(t, s.DB().Update(ctx, func(tx *bolt.Tx) error {
		return Bucket(tx, "records", "things").Put([]byte("b"), []byte(`{"Name":"b`))
	}))
	if err := r.Get(ctx, "b", &got); !errdefs.IsDataLoss(err) {
		t.Error(err)
	}
	var ids []string
	errMine := errors.New("mine")
	err := r.ForEach(func(id string, raw []byte) error {
		ids = append(ids, id)
		if id == "a" {
			return errMine
		}
		return nil
	})
	if fmt.Sprint(ids) != "[a d]" || !errors.Is(err, errMine) || !errdefs.IsDataLoss(err) {
		t.Errorf("visited %v: %v", ids, err)
	}
	n := 0
	must(t, r.ForEach(func(string, []byte) error { n++; return ErrStop }))
	if n != 1 {
		t.Errorf("ErrStop after %d", n)
	}
}

func TestCoalescerCoversWhatCameBefore(t *testing.T) {
	const callers = 64
	var written, synced, runs atomic.Int64
	c := &Coalescer{Run: func() error {
		// The first run lasts until all have come, however long that takes.
		for first := runs.Add(1) == 1; first && written.Load() < callers; {
			time.Sleep(time.Millisecond)
		}
		now := written.Load()
		time.Sleep(2 * time.Millisecond)
		synced.Store(now)
		return nil
	}}
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			mine := written.Add(1)
			must(t, c.Do())
			if synced.Load() < mine {
				t.Errorf("returned with %d synced, %d needed", synced.Load(), mine)
			}
		})
	}
	wg.Wait()
	if runs.Load() > 16 {
		t.Errorf("%d runs for 64 callers", runs.Load())
	}
}
