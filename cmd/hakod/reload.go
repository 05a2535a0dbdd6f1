package main

import (
	"context"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"reflect"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image/verify"
)

// reloader reads the configuration again at each SIGHUP and applies what can change while the
// daemon runs. A closed terminal sends the same signal: it is never the end.
type reloader struct {
	hup   chan os.Signal
	read  func() (config, error)
	now   config // what is in force
	level *slog.LevelVar
	log   *slog.Logger
}

// runtimeSetter is the part of the engine that a reload changes.
type runtimeSetter interface {
	SetRuntimes(map[string]string) (kept []string)
}

// ruleSetter is what decides about images.
type ruleSetter interface {
	SetRules(map[string]verify.Rule) error
}

func newReloader(cfg config, read func() (config, error), level *slog.LevelVar, log *slog.Logger) *reloader {
	r := &reloader{hup: make(chan os.Signal, 1), read: read, now: cfg, level: level, log: log}
	signal.Notify(r.hup, unix.SIGHUP) // from now on, so that one during the start is not lost
	return r
}

// run applies changes until ctx ends.
func (r *reloader) run(ctx context.Context, eng runtimeSetter, rules ruleSetter) {
	defer signal.Stop(r.hup)
	for {
		select {
		case <-r.hup:
			r.apply(eng, rules)
		case <-ctx.Done():
			return
		}
	}
}

// apply takes all of a valid configuration that can change now, or nothing of one that is not valid.
func (r *reloader) apply(eng runtimeSetter, rules ruleSetter) {
	next, err := r.read()
	if err != nil {
		r.log.Error("the configuration is not reloaded", "error", err)
		return
	}
	// First, since it may fail; and also if the rules are the same, whose files may have changed.
	if err := rules.SetRules(next.Verify); err != nil {
		r.log.Error("the configuration is not reloaded", "error", err)
		return
	}
	var done []string
	if len(next.Verify)+len(r.now.Verify) > 0 {
		r.now.Verify = next.Verify
		done = append(done, "verify")
	}
	if next.LogLevel != r.now.LogLevel {
		_ = r.level.UnmarshalText([]byte(next.LogLevel)) // checked
		r.now.LogLevel = next.LogLevel
		done = append(done, "log-level")
	}
	if !maps.Equal(next.Runtimes, r.now.Runtimes) {
		if kept := eng.SetRuntimes(next.Runtimes); len(kept) > 0 {
			slices.Sort(kept)
			r.log.Warn("runtimes stay as they are while containers or pods are made for them", "runtimes", kept)
		}
		r.now.Runtimes = next.Runtimes
		done = append(done, "runtimes")
	}
	r.log.Info("configuration reloaded", "changed", done)
	if left := changed(r.now, next); len(left) > 0 {
		r.log.Warn("these keys count after a restart of the daemon", "keys", left)
	}
}

// changed names the keys that two configurations do not agree on.
func changed(a, b config) []string {
	var out []string
	x, y := reflect.ValueOf(a), reflect.ValueOf(b)
	for i, key := range keys() {
		if !reflect.DeepEqual(x.Field(i).Interface(), y.Field(i).Interface()) {
			out = append(out, key)
		}
	}
	return out
}
