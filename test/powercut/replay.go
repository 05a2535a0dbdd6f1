package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/test/chaos"
)

// These end what hangs. Nothing is measured by them.
const (
	recordLimit = 3 * time.Hour
	lookLimit   = 20 * time.Minute // a daemon's start and check
)

// The log of QEMU's blklogwrites has the format of the kernel's dm-log-writes:
// https://docs.kernel.org/admin-guide/device-mapper/log-writes.html
const (
	logMagic   = 0x6a736677736872
	logFlush   = 1 << 0
	logFUA     = 1 << 1
	logDiscard = 1 << 2
	logEntry   = 32 // bytes of an entry's head, which takes a sector
)

// loggedWrite is one entry of the log.
type loggedWrite struct {
	flags uint64
	at    int64
	data  []byte
}

// logEntries tells how many entries the log has so far.
func logEntries(f *os.File) int64 {
	b := make([]byte, 28)
	if _, err := f.ReadAt(b, 0); err != nil || binary.LittleEndian.Uint64(b) != logMagic {
		return 0
	}
	return int64(binary.LittleEndian.Uint64(b[16:]))
}

// readLog calls fn with each entry.
func readLog(f *os.File, fn func(i int64, w loggedWrite) error) error {
	super := make([]byte, 28)
	if _, err := f.ReadAt(super, 0); err != nil {
		return err
	}
	if binary.LittleEndian.Uint64(super) != logMagic {
		return errors.New("no log of writes")
	}
	entries, size := int64(binary.LittleEndian.Uint64(super[16:])), int64(binary.LittleEndian.Uint32(super[24:]))
	at := size
	for i := range entries {
		head := make([]byte, logEntry)
		if _, err := f.ReadAt(head, at); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		at += size
		w := loggedWrite{flags: binary.LittleEndian.Uint64(head[16:]), at: int64(binary.LittleEndian.Uint64(head)) * size}
		n := int64(binary.LittleEndian.Uint64(head[8:])) * size
		if w.flags&logDiscard == 0 && n > 0 {
			w.data = make([]byte, n)
			if _, err := f.ReadAt(w.data, at); err != nil {
				return fmt.Errorf("entry %d: %w", i, err)
			}
			at += n
		}
		if err := fn(i, w); err != nil {
			return err
		}
	}
	return nil
}

// placed is an entry of the journal with where the log was when it came.
type placed struct {
	chaos.Entry
	at int64
}

// replay runs the machine once on a disk that logs, and then looks at the disk as it was at
// each flush.
func replay(ctx context.Context, s settings, flushes, skip int) error {
	entries, err := record(ctx, s, flushes)
	if err != nil {
		return err
	}
	log, err := os.Open(filepath.Join(s.work, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	base, err := os.ReadFile(filepath.Join(s.work, "base.ext4"))
	if err != nil {
		return err
	}
	type point struct {
		n     int
		entry int64
		image string
	}
	points := make(chan point)
	var mu sync.Mutex
	var wg sync.WaitGroup
	looked, bad := 0, 0
	began := time.Now()
	for worker := range 2 {
		wg.Go(func() {
			for p := range points {
				model := modelAt(entries, p.entry)
				wrong, err := s.look(ctx, worker, p.image, model)
				if err != nil {
					wrong = append(wrong, err.Error())
				}
				mu.Lock()
				looked++
				if len(wrong) > 0 {
					bad++
					fmt.Printf("FAIL  flush %d (entry %d of the log):\n", p.n, p.entry)
					for _, w := range wrong {
						fmt.Printf("        %s\n", w)
					}
					if dir := os.Getenv("POWERCUT_KEEP"); dir != "" && bad <= 3 {
						_ = copyTo(p.image, filepath.Join(dir, fmt.Sprintf("flush-%d.ext4", p.n)))
					}
				} else if s.verbose && looked%50 == 0 {
					fmt.Printf("      %d flushes looked at\n", looked)
				}
				mu.Unlock()
				_ = os.Remove(p.image)
			}
		})
	}
	n, writes := 0, 0
	err = readLog(log, func(i int64, w loggedWrite) error {
		if len(w.data) > 0 {
			writes++
			if w.at+int64(len(w.data)) > int64(len(base)) {
				return fmt.Errorf("entry %d lies beyond the end of the disk", i)
			}
			copy(base[w.at:], w.data)
		}
		if w.flags&(logFlush|logFUA) == 0 {
			return nil
		}
		n++
		if n%skip != 0 {
			return nil
		}
		image := filepath.Join(s.work, fmt.Sprintf("flush-%d.ext4", n))
		if err := writeSparse(image, base); err != nil {
			return err
		}
		select {
		case points <- point{n, i, image}:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	close(points)
	wg.Wait()
	if err != nil {
		return err
	}
	last := modelAt(entries, 1<<60)
	fmt.Printf("%d writes and %d flushes; looked at %d of these in %v; %d operations acknowledged (%s); something was wrong at %d\n",
		writes, n, looked, time.Since(began).Round(time.Second), last.Acks, last.Summary(), bad)
	if bad > 0 {
		return errors.New("something was lost")
	}
	return nil
}

// record runs the machine until its disk has been flushed so often.
func record(ctx context.Context, s settings, flushes int) ([]placed, error) {
	data, logPath := filepath.Join(s.work, "data"), filepath.Join(s.work, "log")
	if err := copyTo(filepath.Join(s.work, "base.ext4"), data); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(logPath, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	m, err := s.boot(ctx, "replay",
		"-blockdev", "driver=file,node-name=data,filename="+data+",cache.no-flush=on",
		"-blockdev", "driver=file,node-name=log,filename="+logPath+",cache.no-flush=on",
		"-blockdev", "driver=raw,node-name=rawdata,file=data,cache.no-flush=on",
		"-blockdev", "driver=raw,node-name=rawlog,file=log,cache.no-flush=on",
		"-blockdev", "driver=blklogwrites,node-name=logged,file=rawdata,log=rawlog",
		"-device", "virtio-blk-pci,drive=logged,write-cache=on")
	if err != nil {
		return nil, err
	}
	defer m.kill()
	var entries []placed
	var g greeting
	up := false
	limit := time.After(recordLimit)
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case line, ok := <-m.lines:
			if !ok {
				return nil, fmt.Errorf("the machine ended\n%s", m.logs())
			}
			if !up {
				if up, err = g.take(line); err != nil {
					return nil, fmt.Errorf("%w\n%s", err, m.logs())
				}
				continue
			}
			var e chaos.Entry
			if json.Unmarshal([]byte(line), &e) == nil && e.Object != "" {
				// What an acknowledged operation wrote is in the log by now.
				entries = append(entries, placed{e, logEntries(log)})
			}
		case <-tick.C:
			if n, err := countFlushes(log); err != nil {
				return nil, err
			} else if n >= flushes {
				return entries, nil
			}
		case <-limit:
			n, _ := countFlushes(log)
			return nil, fmt.Errorf("only %d flushes in %v\n%s", n, recordLimit, m.logs())
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func countFlushes(log *os.File) (n int, err error) {
	if logEntries(log) == 0 {
		return 0, nil
	}
	err = readLog(log, func(_ int64, w loggedWrite) error {
		if w.flags&(logFlush|logFUA) != 0 {
			n++
		}
		return nil
	})
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil // it is being written
	}
	return n, err
}

// ahead is how many operations of a client may have been done of which the log's position was
// noted late.
const ahead = 3

// modelAt is what may be on the disk at an entry of the log: all that was acknowledged
// before, and of what each client tried then, all or nothing.
func modelAt(entries []placed, at int64) *chaos.Model {
	m := &chaos.Model{}
	next := map[int]int{}
	for _, e := range entries {
		switch {
		case e.at <= at && next[e.Client] == 0:
			m.Add(e.Entry)
		case e.Do == "try" && next[e.Client] < ahead:
			next[e.Client]++
			m.Add(e.Entry)
		}
	}
	return m
}

// writeSparse writes an image without its zeroes.
func writeSparse(path string, image []byte) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(int64(len(image))); err != nil {
		return err
	}
	const block = 64 << 10
	zero := make([]byte, block)
	for at := 0; at < len(image); at += block {
		b := image[at:min(at+block, len(image))]
		if bytes.Equal(b, zero[:len(b)]) {
			continue
		}
		if _, err := f.WriteAt(b, int64(at)); err != nil {
			return err
		}
	}
	return nil
}

// look mounts a disk and starts a daemon on it.
func (s settings) look(ctx context.Context, worker int, image string, model *chaos.Model) (wrong []string, err error) {
	dir := filepath.Join(s.work, fmt.Sprint("w", worker))
	root, state := filepath.Join(dir, "root"), filepath.Join(dir, "state")
	if err := errors.Join(os.RemoveAll(state), os.MkdirAll(root, 0o755), os.MkdirAll(state, 0o755)); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "mount", "-o", "loop", "-t", "ext4", image, root).CombinedOutput(); err != nil {
		return []string{fmt.Sprintf("it cannot be mounted: %s", bytes.TrimSpace(out))}, nil
	}
	defer func() {
		// The daemon's mounts in its state folder, then the disk.
		for range 50 {
			if err = unix.Unmount(root, 0); err == nil || !errors.Is(err, unix.EBUSY) {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	// As it lies there, before a daemon has put anything right.
	args := []string{"--config", os.DevNull, "--root", root, "--state", state, "--network", "builtin",
		"--bridge-name", fmt.Sprintf("hkpc%d", worker), "--bridge-subnet", fmt.Sprintf("10.197.%d.0/24", worker), "--registry-dir", dir, "--snapshotter", s.snapshotter}
	if _, err := os.Stat(filepath.Join(root, "meta.db")); err == nil {
		wrong = append(wrong, s.offline(ctx, args)...)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	hakod := exec.CommandContext(ctx, filepath.Join(s.bin, "hakod"), args...)
	hakod.Stdout, hakod.Stderr = log, log
	if err := hakod.Start(); err != nil {
		return nil, err
	}
	defer func() {
		_ = hakod.Process.Signal(unix.SIGTERM)
		_ = hakod.Wait()
	}()
	load := &chaos.Load{Socket: filepath.Join(state, "docker.sock")}
	limit, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	g := greeting{}
	if err := load.Ready(limit); err != nil {
		b, _ := os.ReadFile(log.Name())
		return append(wrong, fmt.Sprintf("the daemon does not start: %v\n%s", err, b)), nil
	}
	if g.state, err = load.State(limit); err != nil {
		return append(wrong, err.Error()), nil
	}
	if g.check, err = load.Check(limit, true); err != nil {
		return append(wrong, err.Error()), nil
	}
	if g.layers.Torn, g.layers.Files, err = chaos.CheckLayers(root); err != nil {
		return append(wrong, err.Error()), nil
	}
	wrong = append(wrong, g.verdict(model)...)
	if len(wrong) > 0 {
		b, _ := os.ReadFile(log.Name())
		wrong = append(wrong, fmt.Sprintf("the daemon's log: %s", b))
	}
	return wrong, nil
}

// offline gives the damage that hakod check finds. Leftovers of what was cut short are
// for the daemon to remove, and active snapshots for it to make anew.
func (s settings) offline(ctx context.Context, args []string) (wrong []string) {
	out, err := exec.CommandContext(ctx, filepath.Join(s.bin, "hakod"), append([]string{"check", "--deep", "--format", "json"}, args...)...).Output()
	var report struct{ Findings []chaos.Finding }
	if jerr := json.Unmarshal(out, &report); jerr != nil {
		var exit *exec.ExitError
		text := ""
		if errors.As(err, &exit) {
			text = string(exit.Stderr)
		}
		return []string{fmt.Sprintf("hakod check: %v %s", err, text)}
	}
	found := map[string]bool{}
	for _, f := range report.Findings {
		if f.Severity == "damage" && !slices.Contains(healed, f.Problem) {
			found[fmt.Sprintf("hakod check: %s %s: %s", f.Problem, f.Object, f.Detail)] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// healed are what a daemon puts right when it starts: nothing of what it promised was in it.
var healed = []string{"directory-missing", "volume-folder-missing", "container-folder-missing", "container-snapshot-missing"}
