// Command hako-shim supervises the containers of a pod, or one lone container. It
// is also installed as containerd-shim-hako-v2.
//
//	hako-shim -namespace NS -id ID -bundle DIR [flags] serve|start|delete
//
// In flow a listening socket on file descriptor 3 (serve) or containerd's shim v2
// bootstrap (start, delete, -v, -info); out flow processes of containers, their logs, exit
// statuses and events. See docs/shim.md.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/hako-engine/hako/internal/quiet"
	"github.com/hako-engine/hako/internal/version"
	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/features"
	"github.com/hako-engine/hako/shim"
	"github.com/hako-engine/hako/shim/ociexec"
	"github.com/hako-engine/hako/shim/pid1"
	"github.com/hako-engine/hako/shim/wire"
)

// runtimeName is the name under which containerd knows this shim.
const runtimeName = "io.containerd.hako.v2"

// deleteTimeout bounds the clean-up after a dead shim.
const deleteTimeout = 30 * time.Second

const usage = `hako-shim supervises the containers of a pod, or one lone container. hakod starts it; it is also
installed as containerd-shim-hako-v2, for containerd. It is not for people to call.

Usage:
  hako-shim -namespace NS -id ID -bundle DIR [flags] serve    supervise; listens on file descriptor 3
  hako-shim -namespace NS -id ID [flags] start                containerd's start: prints the address
  hako-shim -namespace NS -id ID [flags] delete               end what a dead shim left behind
  hako-shim -version | -info

Flags:
`

func main() {
	if filepath.Base(os.Args[0]) == pid1.Name { // a copy of this binary, mounted into a container
		os.Exit(pid1.Run(os.Args[1:], os.Stderr))
	}
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "hako-shim:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	c := shim.Command{Runtime: newRuntime}
	fs := flag.NewFlagSet("hako-shim", flag.ContinueOnError)
	fs.StringVar(&c.Namespace, "namespace", os.Getenv("NAMESPACE"), "containerd namespace of the container")
	fs.StringVar(&c.Address, "address", os.Getenv("GRPC_ADDRESS"), "gRPC socket of containerd")
	fs.StringVar(&c.ID, "id", "", "id of the container")
	fs.StringVar(&c.Bundle, "bundle", "", "bundle folder (default: the working directory)")
	fs.StringVar(&c.Events, "events", os.Getenv("TTRPC_ADDRESS"), "ttrpc socket that takes events")
	fs.StringVar(&c.Defaults.Binary, "runtime", "", "OCI runtime to execute (default: hako's own)")
	fs.BoolVar(&c.Defaults.SystemdCgroup, "systemd-cgroup", false, "let systemd manage cgroups")
	fs.BoolVar(&c.Debug, "debug", false, "verbose log")
	fs.String("publish-binary", "", "ignored: events go over ttrpc")
	fs.StringVar(&c.Socket, "socket", "", "path of the listening socket")
	showVersion := fs.Bool("version", false, "print the version")
	fs.BoolVar(showVersion, "v", false, "= -version")
	showInfo := fs.Bool("info", false, "print a RuntimeInfo message")
	fs.SetOutput(io.Discard) // what is wrong is said once, by main
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(out, usage)
		fs.SetOutput(out)
		fs.PrintDefaults()
		return nil
	} else if err != nil {
		return fmt.Errorf("%w (see hako-shim --help)", err)
	}
	switch {
	case *showVersion:
		fmt.Fprintf(out, "hako-shim:\n  Version:  %s\n  Revision: %s\n  Go version: %s\n", version.Version, version.Revision(), runtime.Version())
		return nil
	case *showInfo:
		return info(os.Stdin, c.Defaults.Binary, out)
	}
	switch fs.Arg(0) {
	case "serve":
		return serve(c)
	case "start":
		return shim.Start(c, os.Stdin, out)
	case "delete":
		ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
		defer cancel()
		return shim.Cleanup(ctx, c, out)
	}
	return fmt.Errorf("unknown command %q: want serve, start or delete (see hako-shim --help)", strings.Join(fs.Args(), " "))
}

// monitorSlack is how late the Go runtime's monitor may wake, in nanoseconds: see internal/quiet.
const monitorSlack = 2000000

func serve(c shim.Command) error {
	quiet.Monitor(monitorSlack)
	runtime.GOMAXPROCS(2)
	// A daemon that stops its process group must not take the containers along. The
	// signals are caught and not ignored: a container would inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	shim.RaiseOOMScore(c.Events != "") // clients of containerd's API expect it
	shim.SettleFileLimit()
	shim.ResetSignals()
	level := slog.LevelInfo
	if c.Debug {
		level = slog.LevelDebug
	}
	l, err := shim.Listener()
	if err != nil {
		return err
	}
	s, err := shim.New(shim.Options{
		Namespace: c.Namespace, Socket: c.Socket, EventsAddress: c.Events, Runtime: c.Runtime, Defaults: c.Defaults, JoinCgroup: joinCgroup,
		Log: slog.New(slog.NewTextHandler(shim.Stderr{}, &slog.HandlerOptions{Level: level})),
	})
	if err != nil {
		return err
	}
	return s.Serve(l)
}

// info tells of the runtime that containerd's options, on in, ask for: binary if they name none.
func info(in *os.File, binary string, w io.Writer) error {
	if st, err := in.Stat(); err == nil && st.Mode()&os.ModeCharDevice == 0 {
		raw, err := io.ReadAll(io.LimitReader(in, maxOptions))
		if err != nil {
			return err
		}
		var a wire.Any
		var o wire.RuntimeOptions
		if err := wire.Unmarshal(raw, &a); err != nil {
			return fmt.Errorf("options: %w", err)
		}
		if strings.HasSuffix(a.TypeURL, wire.RuntimeOptionsURL) {
			if err := wire.Unmarshal(a.Value, &o); err != nil {
				return fmt.Errorf("options: %w", err)
			}
		}
		if o.BinaryName != "" {
			binary = o.BinaryName
		}
	}
	var known []byte
	var err error
	if binary != "" {
		known, err = exec.Command(binary, "features").Output()
		if err != nil || !json.Valid(known) {
			known = nil // an older one does not tell
		}
	} else if known, err = json.Marshal(features.Get(version.Version)); err != nil {
		return err
	}
	m := &wire.RuntimeInfo{Name: runtimeName, Version: &wire.RuntimeVersion{Version: version.Version, Revision: version.Revision()}}
	if known != nil {
		m.Features = &wire.Any{TypeURL: featuresURL, Value: known}
	}
	_, err = w.Write(wire.Marshal(m))
	return err
}

// maxOptions bounds what is read of options, in bytes.
const maxOptions = 1 << 20

// featuresURL names the document of features.md in an Any.
const featuresURL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

// newRuntime wires the runtime that a configuration asks for.
func newRuntime(cfg shim.RuntimeConfig) (shim.Runtime, error) {
	if cfg.Binary != "" {
		return &ociexec.Runtime{Binary: cfg.Binary, Root: cfg.Root, SystemdCgroup: cfg.SystemdCgroup, Cgroup: cgroupOf}, nil
	}
	driver := "cgroupfs"
	if cfg.SystemdCgroup {
		driver = "systemd"
	}
	return native{&oci.Runtime{Root: cfg.Root, CgroupDriver: driver, Log: slog.Default()}}, nil
}
