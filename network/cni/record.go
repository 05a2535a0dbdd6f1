package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/durable"
)

// recordVersion is the version of the files in attachments/.
const recordVersion = 1

// record is a file in attachments/, named after the sandbox: all that it takes to undo what plugins
// did, or may have done, for it. It is written before the first plugin runs and removed when DEL succeeded,
// and does not depend on the configuration, which may change or go away meanwhile.
type record struct {
	Version      int             `json:"version"`
	ID           string          `json:"id"`
	Network      string          `json:"network"`
	CNIVersion   string          `json:"cniVersion"`
	Config       json.RawMessage `json:"config"` // a network configuration list with all its plugins
	NetNS        string          `json:"netns"`
	IfName       string          `json:"ifName"`
	Args         [][2]string     `json:"args"`
	Capabilities map[string]any  `json:"capabilities,omitempty"`
}

func (r record) runtimeConf() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: r.ID, NetNS: r.NetNS, IfName: r.IfName, Args: r.Args, CapabilityArgs: r.Capabilities}
}

func (r record) list() (*libcni.NetworkConfigList, error) {
	list, err := libcni.NetworkConfFromBytes(r.Config)
	if err != nil {
		return nil, err
	}
	list.CNIVersion = r.CNIVersion
	return list, nil
}

// records keeps record files.
type records struct{ dir string }

func (s records) path(id string) string { return filepath.Join(s.dir, id+".json") }

// add writes a record that a crash of the daemon does not reach, and tells when it has reached the disk.
func (s records) add(r record) (synced <-chan error, err error) {
	path := s.path(r.ID)
	if _, err := os.Lstat(path); err == nil {
		return nil, fmt.Errorf("the sandbox has a network already: %w", errdefs.ErrAlreadyExists)
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if err := durable.WriteVolatile(path, raw, 0o600); err != nil {
		return nil, err
	}
	done := make(chan error, 1)
	go func() { done <- syncFile(path) }()
	return done, nil
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // removed meanwhile
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

// get reads a record: errdefs.ErrNotFound, ErrDataLoss.
func (s records) get(id string) (record, error) {
	var r record
	raw, err := os.ReadFile(s.path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return r, fmt.Errorf("network of sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(raw, &r); err != nil || r.Version != recordVersion || r.ID != id {
		return r, fmt.Errorf("record %s is damaged or of another version: %w", s.path(id), errdefs.ErrDataLoss)
	}
	return r, nil
}

func (s records) remove(id string) error {
	if err := os.Remove(s.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// ids lists the sandboxes that have a record.
func (s records) ids() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), ".json"); ok && utils.ValidateContainerID(id) == nil {
			out = append(out, id)
		}
	}
	return out, nil
}

// sweep removes what interrupted writes left.
func (s records) sweep() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			if err := os.Remove(filepath.Join(s.dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// endStrays ends plugins that a daemon which was killed left running for sandboxes whose ADD has no result: a late
// one would take an address after its DEL. Their children (an IPAM plugin) have the same variables in their environment. They
// are waited for first: killed in the middle, they leave what no DEL finds.
func endStrays(ids []string, patience time.Duration) (found int) {
	if len(ids) == 0 {
		return 0
	}
	known := map[string]bool{}
	for _, id := range ids {
		known[id] = true
	}
	seen := map[int]bool{}
	for end := time.Now().Add(patience); ; {
		pids := strays(known)
		if len(pids) == 0 || time.Now().After(end.Add(patience)) { // what SIGKILL does not end hangs in the kernel
			return len(seen)
		}
		for _, pid := range pids {
			seen[pid] = true
			if fd, err := unix.PidfdOpen(pid, 0); err == nil {
				// Asked again: the descriptor may be that of a later process of the same number.
				if time.Now().After(end) && isStray(pid, known) {
					_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
				}
				_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20)
				unix.Close(fd)
			}
		}
	}
}

// strays are the processes that work on one of the sandboxes for a plugin.
func strays(known map[string]bool) (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid != os.Getpid() && isStray(pid, known) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func isStray(pid int, known map[string]bool) bool {
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return false // ended, or a kernel thread
	}
	for kv := range bytes.SplitSeq(env, []byte{0}) {
		if id, ok := bytes.CutPrefix(kv, []byte("CNI_CONTAINERID=")); ok {
			return known[string(id)]
		}
	}
	return false
}
