package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/hako-engine/hako/internal/durable"
)

// fileRecords are Records in a folder, one file each, for a Manager that has no store.
type fileRecords struct{ dir string }

func openFileRecords(dir string) (*fileRecords, error) {
	return &fileRecords{dir}, os.MkdirAll(dir, 0o700)
}

func (f *fileRecords) Put(_ context.Context, id string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("record %s: %w", id, err)
	}
	return durable.WriteFile(filepath.Join(f.dir, id+".json"), data, 0o600)
}

func (f *fileRecords) Delete(_ context.Context, id string) error {
	if err := os.Remove(filepath.Join(f.dir, id+".json")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return durable.SyncDir(f.dir)
}

func (f *fileRecords) ForEach(fn func(id string, raw []byte) error) error {
	files, err := os.ReadDir(f.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range files {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || strings.HasPrefix(id, ".") {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(f.dir, e.Name()))
		if err == nil {
			err = fn(id, raw)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("record %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}
