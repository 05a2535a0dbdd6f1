//go:build linux && (amd64 || arm64)

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/version"
	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/features"
	"github.com/hako-engine/hako/oci/spec"
)

type action = func(args []string) (int, error)

// commandTable gives all commands in the order of the help.
func commandTable() []command {
	return []command{
		{"create", "ID", "create a container that waits for start", 1, 1, createCommand},
		{"start", "ID", "start a created container", 1, 1, startCommand},
		{"run", "ID", "create and start a container", 1, 1, runCommand},
		{"exec", "ID COMMAND [ARG...]", "run a process in a container", 1, -1, execCommand},
		{"state", "ID", "print the state of a container as JSON", 1, 1, stateCommand},
		{"kill", "ID [SIGNAL]", "send a signal (default TERM) to a container's first process", 1, 2, killCommand},
		{"delete", "ID", "delete a stopped container", 1, 1, deleteCommand},
		{"list", "", "list containers", 0, 0, listCommand},
		{"ps", "ID [PS OPTION...]", "show the processes of a container", 1, -1, psCommand},
		{"pause", "ID", "freeze a container", 1, 1, pauseCommand},
		{"resume", "ID", "thaw a container", 1, 1, resumeCommand},
		{"update", "ID", "change the limits of a container", 1, 1, updateCommand},
		{"events", "ID", "print statistics and OOM events as JSON lines", 1, 1, eventsCommand},
		{"checkpoint", "ID", "write a container's processes to files (needs CRIU)", 1, 1, checkpointCommand},
		{"restore", "ID", "make a container of such files (needs CRIU)", 1, 1, restoreCommand},
		{"spec", "", "write a config.json to start from", 0, 0, specCommand},
		{"plan", "[BUNDLE | CONFIG]", "explain what creating a container would do, and do nothing", 0, 1, planCommand},
		{"features", "", "print what the runtime supports as JSON", 0, 0, featuresCommand},
		{"completion", "bash|zsh|fish|man DIR", "print a completion script, or write the manual pages into a folder", 1, 2, completionCommand},
	}
}

func startCommand(a *app, _ *flag.FlagSet) (action, error) {
	return func(args []string) (int, error) {
		c, err := a.rt.Load(args[0])
		if err != nil {
			return 0, err
		}
		if err := c.EarlyFailure(); err != nil {
			return 0, err
		}
		n, err := a.notifier(args[0])
		if err != nil {
			return 0, err
		}
		if n == nil {
			return 0, c.Start(context.Background())
		}
		defer n.close()
		pidfd, err := unix.PidfdOpen(c.Pid(), 0)
		if err != nil {
			return 0, c.Start(context.Background()) // it says better why not
		}
		process := os.NewFile(uintptr(pidfd), "pidfd")
		defer process.Close()
		if err := n.listen(false); err != nil {
			return 0, err
		}
		if err := c.Start(context.Background()); err != nil {
			return 0, err
		}
		return 0, n.forward(c.Pid(), process)
	}, nil
}

// externalState is the JSON of state and list.
type externalState struct {
	OCIVersion  string            `json:"ociVersion"`
	ID          string            `json:"id"`
	Pid         int               `json:"pid"`
	Status      string            `json:"status"`
	Bundle      string            `json:"bundle"`
	Rootfs      string            `json:"rootfs"`
	Created     time.Time         `json:"created"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Owner       string            `json:"owner"`
}

func external(c *oci.Container) (externalState, error) {
	s, err := c.State()
	if err != nil {
		return externalState{}, err
	}
	return externalState{
		OCIVersion: s.Version, ID: s.ID, Pid: s.Pid, Status: string(s.Status), Bundle: s.Bundle, Rootfs: c.Rootfs(),
		Created: c.CreatedAt(), Annotations: s.Annotations,
	}, nil
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func stateCommand(a *app, _ *flag.FlagSet) (action, error) {
	return func(args []string) (int, error) {
		c, err := a.rt.Load(args[0])
		if err != nil {
			return 0, err
		}
		s, err := external(c)
		if err != nil {
			return 0, err
		}
		return 0, printJSON(s)
	}, nil
}

func parseSignal(s string) (unix.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 0 || n > 64 {
			return 0, fmt.Errorf("unknown signal %q", s)
		}
		return unix.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig, nil
	}
	if rt, ok := strings.CutPrefix(name, "SIGRTMIN"); ok {
		if n, err := strconv.Atoi("0" + strings.TrimPrefix(rt, "+")); err == nil && n <= 30 {
			return unix.Signal(34 + n), nil
		}
	}
	return 0, fmt.Errorf("unknown signal %q", s)
}

func killCommand(a *app, fs *flag.FlagSet) (action, error) {
	all := boolFlag(fs, "all", "a", "send the signal to all processes of the container")
	return func(args []string) (int, error) {
		c, err := a.rt.Load(args[0])
		if err != nil {
			return 0, err
		}
		sig := unix.SIGTERM
		if len(args) > 1 {
			if sig, err = parseSignal(args[1]); err != nil {
				return 0, err
			}
		}
		if *all {
			return 0, c.KillAll(context.Background(), sig)
		}
		return 0, c.Kill(context.Background(), sig)
	}, nil
}

func deleteCommand(a *app, fs *flag.FlagSet) (action, error) {
	force := boolFlag(fs, "force", "f", "kill the container if it runs; no error if it does not exist")
	return func(args []string) (int, error) {
		c, err := a.rt.Load(args[0])
		if errdefs.IsNotFound(err) {
			// Half a container, of a create that was killed, is removed too.
			perr := a.rt.Purge(args[0])
			removeNotify(a.rt.Root, args[0])
			if perr == nil || *force && errdefs.IsNotFound(perr) {
				return 0, nil
			}
			if !errdefs.IsNotFound(perr) {
				return 0, perr
			}
		}
		if err != nil {
			return 0, err
		}
		if err := c.Delete(context.Background(), *force); err != nil {
			return 0, err
		}
		removeNotify(a.rt.Root, c.ID())
		return 0, nil
	}, nil
}

func listCommand(a *app, fs *flag.FlagSet) (action, error) {
	format := stringFlag(fs, "format", "f", "table", "table or json")
	quiet := boolFlag(fs, "quiet", "q", "print only names")
	return func([]string) (int, error) {
		cs, err := a.rt.List()
		if err != nil {
			return 0, err
		}
		var all []externalState
		for _, c := range cs {
			if *quiet {
				fmt.Println(c.ID())
				continue
			}
			s, err := external(c)
			if err != nil {
				return 0, err
			}
			s.Owner = userName(c.Owner())
			all = append(all, s)
		}
		if *quiet {
			return 0, nil
		}
		switch *format {
		case "json":
			return 0, json.NewEncoder(os.Stdout).Encode(all)
		case "table":
			w := tabwriter.NewWriter(os.Stdout, 12, 1, 3, ' ', 0)
			fmt.Fprint(w, "ID\tPID\tSTATUS\tBUNDLE\tCREATED\tOWNER\n")
			for _, s := range all {
				fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", s.ID, s.Pid, s.Status, s.Bundle, s.Created.Format(time.RFC3339Nano), s.Owner)
			}
			return 0, w.Flush()
		}
		return 0, fmt.Errorf("invalid format option %q: it is table or json", *format)
	}, nil
}

// userName looks the owner up without the resolver library of the C world.
func userName(uid int) string {
	raw, _ := os.ReadFile("/etc/passwd")
	for line := range strings.Lines(string(raw)) {
		if f := strings.SplitN(line, ":", 4); len(f) == 4 && f[2] == strconv.Itoa(uid) {
			return f[0]
		}
	}
	return "#" + strconv.Itoa(uid)
}

func psCommand(a *app, fs *flag.FlagSet) (action, error) {
	format := stringFlag(fs, "format", "f", "table", "table or json")
	return func(args []string) (int, error) {
		c, err := a.rt.Load(args[0])
		if err != nil {
			return 0, err
		}
		pids, err := c.Processes()
		if err != nil {
			return 0, err
		}
		slices.Sort(pids)
		switch *format {
		case "json":
			if pids == nil {
				pids = []int{}
			}
			return 0, json.NewEncoder(os.Stdout).Encode(pids)
		case "table":
			return 0, psTable(pids, args[1:])
		}
		return 0, fmt.Errorf("invalid format option %q: it is table or json", *format)
	}, nil
}

// psTable prints those lines of ps(1) that show one of the pids.
func psTable(pids []int, options []string) error {
	if len(options) == 0 {
		options = []string{"-ef"}
	}
	out, err := exec.Command("ps", options...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ps: %w: %s", err, bytes.TrimSpace(out))
	}
	lines := strings.Split(strings.TrimRight(string(out), "\n"), "\n")
	col := slices.Index(strings.Fields(lines[0]), "PID")
	if col < 0 {
		return fmt.Errorf("couldn't find PID field in ps output")
	}
	fmt.Println(lines[0])
	for _, l := range lines[1:] {
		f := strings.Fields(l)
		if col >= len(f) {
			continue
		}
		if pid, err := strconv.Atoi(f[col]); err == nil && slices.Contains(pids, pid) {
			fmt.Println(l)
		}
	}
	return nil
}

func pauseCommand(a *app, _ *flag.FlagSet) (action, error) {
	return func(args []string) (int, error) {
		c, err := a.rt.Load(args[0])
		if err != nil {
			return 0, err
		}
		return 0, c.Pause(context.Background())
	}, nil
}

func resumeCommand(a *app, _ *flag.FlagSet) (action, error) {
	return func(args []string) (int, error) {
		c, err := a.rt.Load(args[0])
		if err != nil {
			return 0, err
		}
		return 0, c.Resume(context.Background())
	}, nil
}

func specCommand(a *app, fs *flag.FlagSet) (action, error) {
	bundle := stringFlag(fs, "bundle", "b", ".", "directory to write to")
	rootless := fs.Bool("rootless", false, "for a user without privileges")
	return func([]string) (int, error) {
		path := filepath.Join(*bundle, "config.json")
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if errors.Is(err, os.ErrExist) {
			return 0, fmt.Errorf("file %s exists: remove it first", path)
		}
		if err != nil {
			return 0, err
		}
		defer f.Close()
		s := spec.Default(oci.CgroupV2())
		if *rootless {
			spec.Rootless(s, os.Geteuid(), os.Getegid())
		}
		raw, err := json.MarshalIndent(s, "", "\t")
		if err != nil {
			return 0, err
		}
		if _, err := f.Write(append(raw, '\n')); err != nil {
			return 0, err
		}
		return 0, f.Close()
	}, nil
}

func featuresCommand(*app, *flag.FlagSet) (action, error) {
	return func([]string) (int, error) { return 0, printJSON(features.Get(version.Version)) }, nil
}

func printVersion() {
	// The first word is what go-runc and Docker look for.
	fmt.Printf("runc version %s (hako-oci)\ncommit: %s\nspec: %s\ngo: %s\n", version.Version, version.Revision(), specs.Version, runtime.Version())
}
