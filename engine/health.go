package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/hako-engine/hako/shim/client"
)

// The state machine of a container's health:
//
//	            success                     Retries failures in a row
//	starting ────────────► healthy ◄──────────────────────────► unhealthy
//	    └── Retries failures after the start period ────────────────▲
//
// It begins anew with every start of the container.

// Defaults of health checks.
const (
	healthInterval      = 30 * time.Second
	healthTimeout       = 30 * time.Second
	healthStartInterval = 5 * time.Second
	healthRetries       = 3
	healthOutput        = 4096 // bytes of a check's output that are kept
	healthLog           = 5    // results that are kept
	healthSlow          = -1   // exit code of a check that took too long
)

// startHealth begins the checks of a new run.
func (e *Engine) startHealth(c *container, r *run) {
	v := c.view()
	h := v.Healthcheck
	if h == nil || len(h.Test) == 0 || h.Test[0] == "NONE" {
		return
	}
	ctx, cancel := context.WithCancel(e.ctx)
	c.mu.Lock()
	r.cancel = cancel
	c.rec.State.Health = &Health{Status: "starting"}
	c.mu.Unlock()
	e.work.Go(func() {
		defer cancel()
		e.watchHealth(ctx, c, r, *h)
	})
}

func orDefault(d, def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return d
}

func (e *Engine) watchHealth(ctx context.Context, c *container, r *run, h Healthcheck) {
	interval := orDefault(h.Interval, healthInterval)
	startInterval := orDefault(h.StartInterval, healthStartInterval)
	for n := 0; ; n++ {
		wait := interval
		if c.view().State.healthStatus() == "starting" && time.Since(r.started) < h.StartPeriod {
			wait = min(startInterval, interval)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		if c.status() != StatusRunning {
			continue // frozen
		}
		res, err := e.probe(ctx, c, r, h, n)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			res.ExitCode, res.Output = exitNotRunnable, err.Error()
		}
		e.healthResult(c, r, h, res)
	}
}

func (s State) healthStatus() string {
	if s.Health == nil {
		return ""
	}
	return s.Health.Status
}

// healthResult enters a result, and tells when the status changes.
func (e *Engine) healthResult(c *container, r *run, h Healthcheck, res HealthResult) {
	retries := h.Retries
	if retries == 0 {
		retries = healthRetries
	}
	c.mu.Lock()
	if c.run != r || c.rec.State.Health == nil {
		c.mu.Unlock()
		return
	}
	old := c.rec.State.Health
	next := &Health{Status: old.Status, FailingStreak: old.FailingStreak}
	next.Log = append(append(next.Log, old.Log...), res)
	if len(next.Log) > healthLog {
		next.Log = next.Log[len(next.Log)-healthLog:]
	}
	switch {
	case res.ExitCode == 0:
		next.FailingStreak, next.Status = 0, "healthy"
	case old.Status == "starting" && res.Start.Sub(r.started) < h.StartPeriod:
		// failures while the container starts do not count
	default:
		if next.FailingStreak++; next.FailingStreak >= retries {
			next.Status = "unhealthy"
		}
	}
	c.rec.State.Health = next
	c.mu.Unlock()
	if next.Status != old.Status {
		e.emit(c, "health_status: "+next.Status)
	}
}

// probe runs one check in the container.
func (e *Engine) probe(ctx context.Context, c *container, r *run, h Healthcheck, n int) (res HealthResult, err error) {
	res.Start = time.Now()
	defer func() { res.End = time.Now() }()
	v := c.view()
	cmd := h.Test[1:]
	if h.Test[0] == "CMD-SHELL" {
		shell := v.Config.Shell
		if len(shell) == 0 {
			shell = []string{"/bin/sh", "-c"}
		}
		cmd = append(shell[:len(shell):len(shell)], strings.Join(cmd, " "))
	}
	x := &execution{id: "health-" + newID()[:24], c: c, done: make(chan struct{}),
		cfg: ExecConfig{Container: c.id, Cmd: cmd, AttachStdout: true, AttachStderr: true}}
	proc, err := e.execProcess(x, r)
	if err != nil {
		return res, err
	}
	if err := r.shim.get().Exec(ctx, client.ExecOptions{ID: c.id, ExecID: x.id, Spec: proc}); err != nil {
		return res, err
	}
	clean := context.WithoutCancel(ctx)
	defer func() { _, _ = r.shim.get().Delete(clean, c.id, x.id) }()
	s, err := r.shim.get().Attach(ctx, client.AttachOptions{ID: c.id, ExecID: x.id, Stdout: true, Stderr: true})
	if err != nil {
		return res, err
	}
	defer s.Close()
	if _, err := r.shim.get().Start(ctx, c.id, x.id); err != nil {
		return res, err
	}
	output := make(chan string, 1)
	go func() { output <- firstBytes(s) }()

	timeout := orDefault(h.Timeout, healthTimeout)
	wctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	exit, err := r.shim.get().Wait(wctx, c.id, x.id)
	if err != nil && errors.Is(wctx.Err(), context.DeadlineExceeded) {
		e.killExec(clean, r, c.id, x.id)
		kctx, kcancel := context.WithTimeout(clean, killLimit)
		defer kcancel()
		_, _ = r.shim.get().Wait(kctx, c.id, x.id)
		res.ExitCode = healthSlow
		res.Output = fmt.Sprintf("Health check exceeded timeout (%v)", timeout)
		return res, nil
	}
	if err != nil {
		return res, err
	}
	res.ExitCode = int(exit.Status)
	select {
	case res.Output = <-output:
	case <-time.After(time.Second): // something in the background holds the pipe open
	}
	return res, nil
}

// firstBytes reads the output to its end and keeps the beginning.
func firstBytes(s client.Stream) string {
	var b strings.Builder
	for {
		_, p, err := s.ReadFrame()
		if room := healthOutput - b.Len(); room > 0 {
			b.Write(p[:min(len(p), room)])
		}
		if err != nil {
			if !errors.Is(err, io.EOF) && b.Len() == 0 {
				return err.Error()
			}
			return b.String()
		}
	}
}
