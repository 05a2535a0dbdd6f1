//go:build linux

// Command turns compares commands: it runs them in turn, in a new order each time, so that
// all meet the same noise, and prints what each takes and the first one's part of it.
//
// In flow a number of runs and the commands, each behind its name and ended by "--"; "+"
// stands between the parts of a command that are run one after the other:
//
//	turns 200 one /bin/true -- both /bin/true + /bin/false
//
// Out flow, for each, minimum and median of the wall time, median of the CPU time (user and
// system, of the process and what it has waited for), page faults and context switches.
package main

import (
	"fmt"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"
	"time"
)

type command struct {
	name             string
	parts            [][]string
	wall, cpu        []time.Duration
	faults, switches []int64
}

// warmUp is how many first runs do not count.
const warmUp = 3

func main() {
	log.SetFlags(0)
	log.SetPrefix("turns: ")
	if len(os.Args) < 4 {
		log.Fatal("usage: turns RUNS NAME COMMAND [+ COMMAND ...] [-- NAME COMMAND ...] ...")
	}
	runs, err := strconv.Atoi(os.Args[1])
	if err != nil || runs < 1 {
		log.Fatalf("%q is no number of runs", os.Args[1])
	}
	commands := parse(os.Args[2:])
	for n := -warmUp; n < runs; n++ {
		for _, i := range rand.Perm(len(commands)) {
			if err := commands[i].run(n >= 0); err != nil {
				log.Fatal(err)
			}
		}
	}
	first := commands[0]
	for i, c := range commands {
		fmt.Printf("  %-10s min %6.2f ms, median %6.2f ms, CPU %6.2f ms, %4d page faults, %3d context switches", c.name,
			ms(slices.Min(c.wall)), ms(median(c.wall)), ms(median(c.cpu)), median(c.faults), median(c.switches))
		if i > 0 {
			fmt.Printf("; %s takes %.2f x min, %.2f x median, %.2f x CPU", first.name,
				ratio(slices.Min(first.wall), slices.Min(c.wall)), ratio(median(first.wall), median(c.wall)), ratio(median(first.cpu), median(c.cpu)))
		}
		fmt.Println()
	}
}

func parse(args []string) (out []*command) {
	var c *command
	for _, a := range args {
		switch {
		case c == nil:
			c = &command{name: a, parts: [][]string{nil}}
			out = append(out, c)
		case a == "--":
			c = nil
		case a == "+":
			c.parts = append(c.parts, nil)
		default:
			c.parts[len(c.parts)-1] = append(c.parts[len(c.parts)-1], a)
		}
	}
	for _, c := range out {
		for _, p := range c.parts {
			if len(p) == 0 {
				log.Fatalf("%s: a command is missing", c.name)
			}
		}
	}
	return out
}

func (c *command) run(counts bool) error {
	var cpu time.Duration
	var faults, switches int64
	start := time.Now()
	for _, p := range c.parts {
		// Without standard error and input there is nothing that exec.Cmd would copy.
		cmd := exec.Command(p[0], p[1:]...)
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %q: %w", c.name, p, err)
		}
		cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
		if u, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
			faults, switches = faults+u.Minflt, switches+u.Nvcsw+u.Nivcsw
		}
	}
	if counts {
		c.wall, c.cpu = append(c.wall, time.Since(start)), append(c.cpu, cpu)
		c.faults, c.switches = append(c.faults, faults), append(c.switches, switches)
	}
	return nil
}

func median[T int64 | time.Duration](v []T) T {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }
