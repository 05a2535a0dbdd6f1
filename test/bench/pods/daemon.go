package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// readyLimit is how long a daemon may take to answer, from its start on.
const readyLimit = 5 * time.Second

// daemon is one that is killed and started again.
type daemon struct {
	command []string
	ready   func(context.Context) error

	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan error
	up     chan struct{} // closed while it answers
}

// start runs it and waits until it answers.
func (d *daemon) start(ctx context.Context) error {
	cmd := exec.Command(d.command[0], d.command[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	d.mu.Lock()
	d.cmd, d.exited = cmd, make(chan error, 1)
	if d.up == nil {
		d.up = make(chan struct{})
	}
	exited, up := d.exited, d.up
	d.mu.Unlock()
	go func() { exited <- cmd.Wait() }()
	for {
		select {
		case err := <-exited:
			return fmt.Errorf("the daemon ended: %w", err)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
		if d.ready(ctx) == nil {
			close(up)
			return nil
		}
	}
}

// wait waits until it answers again.
func (d *daemon) wait(ctx context.Context) error {
	d.mu.Lock()
	up := d.up
	d.mu.Unlock()
	select {
	case <-up:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *daemon) signal(s syscall.Signal) error {
	d.mu.Lock()
	cmd, exited := d.cmd, d.exited
	d.up = make(chan struct{})
	d.mu.Unlock()
	if err := cmd.Process.Signal(s); err != nil {
		return err
	}
	select {
	case err := <-exited:
		var exit *exec.ExitError
		if s == syscall.SIGKILL && errors.As(err, &exit) {
			return nil
		}
		return err
	case <-time.After(20 * time.Second):
		return errors.New("the daemon goes on")
	}
}

func (d *daemon) stop() {
	if err := d.signal(syscall.SIGTERM); err != nil {
		fmt.Fprintln(os.Stderr, "pods: stop the daemon:", err)
	}
}

// killAll kills the daemon at random moments, and looks after the pods that run on as soon as it is back.
func (d *driver) killAll(ctx context.Context, kept []*life) {
	fmt.Println("seed", d.seed)
	r := rand.New(rand.NewPCG(d.seed, 0))
	for i := range d.kill {
		pause := time.Duration(50+r.IntN(1500)) * time.Millisecond
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		if err := d.daemon.signal(syscall.SIGKILL); err != nil {
			d.complain("kill %d: %v", i, err)
			return
		}
		start := time.Now()
		if err := d.daemon.start(ctx); err != nil {
			d.complain("start after kill %d: %v", i, err)
			return
		}
		took := time.Since(start)
		d.times.add("ready", took)
		if took > readyLimit {
			d.complain("kill %d: ready again after %v", i, took)
		}
		for _, l := range kept {
			if err := l.check(ctx); err != nil {
				d.complain("after kill %d: %v", i, err)
			}
		}
	}
}
