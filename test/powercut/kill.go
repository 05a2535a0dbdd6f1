package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hako-engine/hako/test/chaos"
)

// bootLimit ends a machine that hangs before its daemon has told what it has. Emulation on a
// busy host may take minutes to get there.
const bootLimit = 30 * time.Minute

// errNoBoot marks a machine that did not come as far as the daemon: emulation on a busy host
// has such. Nothing of ours has run, or its end counts as a power cut.
var errNoBoot = errors.New("the machine ended before its daemon was up")

const (
	// maxWrites is after how many writes and flushes a machine dies at the latest.
	maxWrites = 3000
	lifeLimit = time.Minute
	// maxFailedBoots is how many machines may fail to boot.
	maxFailedBoots = 5
)

// kills boots the machine again and again on the same disk, and kills it at a random point.
func kills(ctx context.Context, s settings, n int) error {
	d, err := newDisk(s.work, filepath.Join(s.work, "base.ext4"))
	if err != nil {
		return err
	}
	defer d.close()
	d.lie = s.lie
	socket := filepath.Join(s.work, "nbd")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _ = d.serve(c) }()
		}
	}()
	rng := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	model := &chaos.Model{}
	bad, early, began := 0, 0, time.Now()
	failedBoots, toBoot := 0, 8*time.Second
	for i := 0; i <= n; i++ { // the last time only to look
		d.powerOn()
		m, err := s.boot(ctx, "kill", "-drive", "file=nbd+unix:///?socket="+socket+",format=raw,if=none,id=disk,cache=writeback", "-device", "virtio-blk-pci,drive=disk")
		if err != nil {
			return err
		}
		// One in eight dies before it is up: in the journal's recovery, the daemon's start, the check.
		var soon <-chan time.Time
		if i > 0 && i < n && rng.IntN(8) == 0 {
			soon = time.After(time.Duration(rng.Int64N(int64(toBoot))))
		}
		booted := time.Now()
		wrong, up, err := s.oneLife(ctx, m, d, model, rng, soon, i == n, func() { toBoot = time.Since(booted) })
		m.kill()
		if errors.Is(err, errNoBoot) && failedBoots < maxFailedBoots {
			failedBoots++
			fmt.Printf("      machine %d did not boot (%d so far): %s\n", i, failedBoots, m.logs())
			if _, err := d.powerCut(rng); err != nil {
				return err
			}
			i--
			continue
		}
		if err != nil {
			return fmt.Errorf("machine %d: %w\n%s", i, err, m.logs())
		}
		for line := range m.lines { // what was on its way
			if up {
				note(model, line)
			}
		}
		if !up {
			early++
		}
		if len(wrong) > 0 {
			bad++
			fmt.Printf("FAIL  machine %d:\n", i)
			for _, w := range wrong {
				fmt.Printf("        %s\n", w)
			}
			if dir := os.Getenv("POWERCUT_KEEP"); dir != "" && bad == 1 {
				_ = copyTo(filepath.Join(s.work, "current"), filepath.Join(dir, fmt.Sprintf("disk-%d.ext4", i)))
			}
		}
		if i == n {
			break
		}
		flushes := d.flushes
		how, err := d.powerCut(rng)
		if err != nil {
			return err
		}
		if s.verbose {
			fmt.Printf("      cut %d after %d flushes, up: %t; %s; acknowledged: %d (%s)\n", i+1, flushes, up, how, model.Acks, model.Summary())
		}
	}
	fmt.Printf("%d power cuts in %v, %d of them before the daemon was up; %d operations acknowledged, %d flushes; %s are there at the end; %d machines with something wrong\n",
		n, time.Since(began).Round(time.Second), early, model.Acks, d.flushes, model.Summary(), bad)
	if bad > 0 {
		return errors.New("something was lost")
	}
	return nil
}

// oneLife reads what a machine says until it is to die.
func (s settings) oneLife(ctx context.Context, m *machine, d *disk, model *chaos.Model, rng *rand.Rand, soon <-chan time.Time, last bool, isUp func()) (wrong []string, up bool, err error) {
	var g greeting
	limit := time.After(bootLimit)
	for !up {
		select {
		case line, ok := <-m.lines:
			if !ok {
				return nil, false, errNoBoot
			}
			if up, err = g.take(line); err != nil {
				return nil, false, err
			}
		case <-soon:
			return nil, false, nil
		case <-limit:
			return nil, false, errors.New("it takes too long")
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
	isUp()
	wrong = g.verdict(model)
	if last {
		return wrong, true, nil
	}
	// By what the disk does, not by time: most of the time a disk has nothing in its cache.
	writes, long := 1+int(math.Exp(rng.Float64()*math.Log(maxWrites))), lifeLimit
	if model.Acks == 0 { // the first one fills the disk
		writes, long = 2*maxWrites, 2*lifeLimit
	}
	death := d.after(writes)
	limit = time.After(long)
	for {
		select {
		case line, ok := <-m.lines:
			if !ok {
				return wrong, true, errors.New("it ended")
			}
			if s.verbose && strings.HasPrefix(line, "#") {
				fmt.Println(line)
			}
			note(model, line)
		case <-death:
			return wrong, true, nil
		case <-limit:
			return wrong, true, nil
		case <-ctx.Done():
			return wrong, true, ctx.Err()
		}
	}
}

// note takes a line of the journal. The last one may be cut.
func note(model *chaos.Model, line string) {
	var e chaos.Entry
	if json.Unmarshal([]byte(line), &e) == nil && e.Object != "" {
		model.Add(e)
	}
}

func copyTo(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o600)
}
