// Command guest is the one program of the demo image, under several names: it shows
// what a process sees inside a container, and does small chores for tests and first
// steps.
//
// In flow its name or first argument (show serve true false exit echo cat sleep spam
// env id); out flows text, or HTTP on port 8080.
package main

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// commands by name. Each gives the exit status.
var commands = map[string]func(args []string) int{
	"show":  func([]string) int { show(os.Stdout); return 0 },
	"serve": serve,
	"true":  func([]string) int { return 0 },
	"false": func([]string) int { return 1 },
	"exit":  exit,
	"echo":  func(args []string) int { fmt.Println(strings.Join(args, " ")); return 0 },
	"cat":   cat,
	"sleep": sleep,
	"spam":  spam,
	"env":   func([]string) int { fmt.Println(strings.Join(os.Environ(), "\n")); return 0 },
	"id":    id,
}

func main() {
	args := os.Args
	name := args[0][strings.LastIndexByte(args[0], '/')+1:]
	if name == "demo" || name == "guest" {
		if len(args) < 2 {
			fmt.Fprintln(os.Stderr, "usage: demo show|serve|true|false|exit N|echo|cat|sleep SECONDS|spam RATE SECONDS|env|id")
			os.Exit(2)
		}
		name, args = args[1], args[1:]
	}
	run, ok := commands[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "demo: unknown command %q\n", name)
		os.Exit(127)
	}
	os.Exit(run(args[1:]))
}

func fail(format string, args ...any) int {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	return 1
}

func exit(args []string) int {
	if len(args) != 1 {
		return fail("usage: exit N")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil || n < 0 || n > 255 {
		return fail("exit: %q is not a number from 0 to 255", args[0])
	}
	return n
}

func cat(args []string) int {
	if len(args) == 0 {
		args = []string{"-"}
	}
	status := 0
	for _, a := range args {
		if err := catOne(a); err != nil {
			status = fail("cat: %v", err)
		}
	}
	return status
}

func catOne(name string) error {
	f := os.Stdin
	if name != "-" {
		var err error
		if f, err = os.Open(name); err != nil {
			return err
		}
		defer f.Close()
	}
	_, err := io.Copy(os.Stdout, f)
	return err
}

// sleep ends at once on SIGTERM and SIGINT: as PID 1 it would ignore them otherwise.
func sleep(args []string) int {
	if len(args) != 1 {
		return fail("usage: sleep SECONDS|infinity")
	}
	var over <-chan time.Time
	if args[0] != "infinity" {
		s, err := strconv.ParseFloat(args[0], 64)
		if err != nil || s < 0 || s > 1e9 {
			return fail("sleep: %q is not a number of seconds", args[0])
		}
		over = time.After(time.Duration(s * float64(time.Second)))
	}
	select {
	case <-over:
		return 0
	case s := <-stopped():
		return s
	}
}

// stopped gives the exit status that a signal stands for.
func stopped() <-chan int {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGTERM, syscall.SIGINT)
	out := make(chan int, 1)
	go func() {
		if s, ok := (<-sig).(syscall.Signal); ok {
			out <- 128 + int(s)
		}
	}()
	return out
}

// spam writes numbered lines of 100 bytes, RATE bytes a second (suffix k or m), for
// SECONDS; RATE 0 is as fast as possible.
func spam(args []string) int {
	if len(args) != 2 {
		return fail("usage: spam RATE SECONDS")
	}
	rate, err := bytesOf(args[0])
	if err != nil {
		return fail("spam: %v", err)
	}
	seconds, err := strconv.ParseFloat(args[1], 64)
	if err != nil || seconds <= 0 {
		return fail("spam: %q is not a number of seconds", args[1])
	}
	start := time.Now()
	end := start.Add(time.Duration(seconds * float64(time.Second)))
	pad := strings.Repeat("x", 100-11-1)
	var written int64
	for n := 0; time.Now().Before(end); n++ {
		m, err := fmt.Printf("%010d %s\n", n, pad)
		if err != nil {
			return fail("spam: %v", err)
		}
		written += int64(m)
		if rate > 0 {
			due := start.Add(time.Duration(float64(written) / float64(rate) * float64(time.Second)))
			if wait := time.Until(due); wait > time.Millisecond {
				time.Sleep(wait)
			}
		}
	}
	return 0
}

func bytesOf(s string) (int64, error) {
	factor := int64(1)
	switch low := strings.ToLower(s); {
	case strings.HasSuffix(low, "k"):
		factor, s = 1<<10, s[:len(s)-1]
	case strings.HasSuffix(low, "m"):
		factor, s = 1<<20, s[:len(s)-1]
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > 1<<40 {
		return 0, fmt.Errorf("%q is not a rate in bytes a second", s)
	}
	return n * factor, nil
}

func id([]string) int {
	groups, err := os.Getgroups()
	if err != nil {
		return fail("id: %v", err)
	}
	text := make([]string, len(groups))
	for i, g := range groups {
		text[i] = strconv.Itoa(g)
	}
	fmt.Printf("uid=%d gid=%d groups=%s\n", os.Getuid(), os.Getgid(), strings.Join(text, ","))
	return 0
}
