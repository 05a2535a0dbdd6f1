package shim

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/shim/wire"
)

// stateDir holds the runtime's own state, in the bundle.
const stateDir = "runtime"

// fileVersion is that of exit.json and task.json. A reader accepts the versions up
// to its own; a field is never given another meaning.
const fileVersion = 1

// Exit is the content of exit.json: how a container's first process ended.
type Exit struct {
	Version   int       `json:"version"`
	Pid       int       `json:"pid"`
	Status    uint32    `json:"status"` // exit code, or 128 + signal
	ExitedAt  time.Time `json:"exitedAt"`
	OOMKilled bool      `json:"oomKilled"`
}

// Task is the content of task.json: what it takes to clean up after a dead shim.
type Task struct {
	Version int           `json:"version"`
	ID      string        `json:"id"`
	Pid     int           `json:"pid"`
	ShimPid int           `json:"shimPid"`
	Runtime RuntimeConfig `json:"runtime"`
}

// ReadExit reads the exit file of a bundle; fs.ErrNotExist if there is none.
func ReadExit(bundle string) (e Exit, err error) {
	err = readJSON(filepath.Join(bundle, wire.ExitFile), &e)
	if err == nil && e.Version != fileVersion {
		err = fmt.Errorf("%s has version %d", filepath.Join(bundle, wire.ExitFile), e.Version)
	}
	return e, err
}

func readTask(bundle string) (t Task, err error) {
	err = readJSON(filepath.Join(bundle, wire.TaskFile), &t)
	if err == nil && t.Version != fileVersion {
		err = fmt.Errorf("%s has version %d", filepath.Join(bundle, wire.TaskFile), t.Version)
	}
	return t, err
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return durable.WriteVolatile(path, append(b, '\n'), 0o600)
}
