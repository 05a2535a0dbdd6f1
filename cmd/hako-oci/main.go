//go:build linux && (amd64 || arm64)

// Command hako-oci is hako's OCI runtime behind the command line of runc: for engines
// that call a runtime, and for people who want to see what it does (hako-oci plan).
//
// In flow arguments and bundles; out flow containers, and exit codes as runc's.
//
// The Go runtime need not follow changes of the CPU limit: there is one goroutine.
//
//go:debug updatemaxprocs=0
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/early"
)

// Exit codes, as runc's.
const (
	exitFailure = 1
	exitNoSuch  = 3   // unknown command
	exitExec    = 255 // exec failed before the process ran
)

// command is one verb. args is the usage of its positional arguments, min and max
// their number (max < 0: any).
type command struct {
	name, args, help string
	min, max         int
	run              func(*app, *flag.FlagSet) (func(args []string) (int, error), error)
}

// app is what all commands share.
type app struct {
	rt      *oci.Runtime
	debug   bool
	onError int // exit code of a failure
}

func main() {
	returnFiles()
	growStack()
	code := Main(os.Args[1:])
	early.Begun.Discard()
	os.Exit(code)
}

// growStack makes room for the deepest calls at once: growing step by step means to copy
// the stack four times.
//
//go:noinline
func growStack() byte {
	var room [24 << 10]byte
	return room[len(os.Args)]
}

// globals are the flags before the command.
type globals struct {
	root, logFile, logFormat            *string
	dbg, systemd, showVersion, showHelp *bool
}

func globalFlags() (*flag.FlagSet, globals) {
	fs := newFlags("hako-oci")
	g := globals{
		root:        fs.String("root", defaultRoot(), "directory for the state of containers"),
		logFile:     fs.String("log", "", "file for log messages (default: standard error)"),
		logFormat:   fs.String("log-format", "text", "text or json"),
		dbg:         fs.Bool("debug", false, "log more"),
		systemd:     fs.Bool("systemd-cgroup", false, "let systemd manage cgroups"),
		showVersion: boolFlag(fs, "version", "v", "print the version"),
		showHelp:    boolFlag(fs, "help", "h", "print this help"),
	}
	fs.String("rootless", "auto", "ignored: the runtime finds out")
	fs.String("criu", "criu", "ignored: criu is looked up in $PATH")
	return fs, g
}

// Main runs the command line and gives the exit code.
func Main(args []string) int {
	global, g := globalFlags()
	if err := global.Parse(args); err != nil {
		fmt.Fprintln(os.Stderr, "hako-oci:", err, "(see hako-oci --help)")
		return exitFailure
	}
	switch {
	case *g.showVersion:
		printVersion()
		return 0
	case *g.showHelp || global.NArg() == 0:
		usage(global)
		return 0
	}
	name, rest := global.Arg(0), global.Args()[1:]
	if name == "help" || name == "h" {
		if len(rest) == 0 {
			usage(global)
			return 0
		}
		name, rest = rest[0], []string{"--help"}
	}
	commands := commandTable()
	i := slices.IndexFunc(commands, func(c command) bool { return c.name == name })
	if i < 0 {
		fmt.Fprintf(os.Stderr, "No help topic for '%s' (see hako-oci --help)\n", name)
		return exitNoSuch
	}
	log, closeLog, err := openLog(*g.logFile, *g.logFormat, *g.dbg)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitFailure
	}
	defer closeLog()
	a := &app{debug: *g.dbg, onError: exitFailure, rt: &oci.Runtime{Root: *g.root, Log: log, TimerSlack: quietRuntime(), Begun: &early.Begun}}
	if *g.systemd {
		a.rt.CgroupDriver = "systemd"
	}
	code, err := a.dispatch(commands[i], rest)
	if err != nil {
		// The last line of level error is what callers show (containerd's shim, BuildKit).
		msg := oneLine(err)
		log.Error(msg)
		if *g.logFile != "" {
			fmt.Fprintln(os.Stderr, msg)
		}
		if code == 0 {
			code = a.onError
		}
	}
	return code
}

func (a *app) dispatch(c command, args []string) (int, error) {
	fs := newFlags(c.name)
	help := boolFlag(fs, "help", "h", "print this help")
	run, err := c.run(a, fs)
	if err != nil {
		return 0, err
	}
	if err := fs.Parse(args); err != nil {
		fmt.Fprintf(os.Stderr, "Incorrect Usage: %v\n", err)
		commandUsage(os.Stderr, c, fs)
		return exitFailure, err
	}
	if *help {
		commandUsage(os.Stdout, c, fs)
		return 0, nil
	}
	if n := fs.NArg(); n < c.min || c.max >= 0 && n > c.max {
		commandUsage(os.Stderr, c, fs)
		return exitFailure, fmt.Errorf("%s: %d arguments given, expected: %s", c.name, n, c.args)
	}
	return run(fs.Args())
}

func newFlags(name string) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	return fs
}

func boolFlag(fs *flag.FlagSet, long, short, help string) *bool {
	p := fs.Bool(long, false, help)
	fs.BoolVar(p, short, false, "= --"+long)
	return p
}

func stringFlag(fs *flag.FlagSet, long, short, value, help string) *string {
	p := fs.String(long, value, help)
	fs.StringVar(p, short, value, "= --"+long)
	return p
}

// listFlag may be given several times.
type listFlag []string

func (l *listFlag) String() string     { return strings.Join(*l, ",") }
func (l *listFlag) Set(v string) error { *l = append(*l, v); return nil }

const systemRoot = "/run/hako-oci"

func defaultRoot() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" && (os.Geteuid() != 0 || rootOfOthers()) {
		return filepath.Join(dir, "hako-oci")
	}
	return systemRoot
}

// rootOfOthers tells whether this is root in a user namespace of a plain user, with that user's
// environment.
func rootOfOthers() bool {
	if os.Getenv("USER") == "root" {
		return false
	}
	raw, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && strings.Join(strings.Fields(string(raw)), " ") != "0 0 4294967295"
}

// keepRoot makes a root in $XDG_RUNTIME_DIR with the sticky bit, without which what is not
// touched there may be cleared away (XDG Base Directory Specification).
func keepRoot(root string) error {
	if root == systemRoot || root != defaultRoot() {
		return nil
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return err
	}
	return os.Chmod(root, 0o700|os.ModeSticky)
}

// openLog sends messages to standard error or a file. The format is what callers parse:
// keys level, msg and time, the level in lower case.
func openLog(file, format string, dbg bool) (*slog.Logger, func(), error) {
	var w io.Writer = os.Stderr
	done := func() {}
	if file != "" {
		f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND|os.O_SYNC, 0o644)
		if err != nil {
			return nil, nil, err
		}
		w, done = f, func() { f.Close() }
	}
	o := &slog.HandlerOptions{Level: slog.LevelWarn, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.LevelKey {
			a.Value = slog.StringValue(strings.ToLower(a.Value.String()))
			if a.Value.String() == "warn" {
				a.Value = slog.StringValue("warning")
			}
		}
		return a
	}}
	if dbg {
		o.Level = slog.LevelDebug
	}
	switch format {
	case "json":
		return slog.New(slog.NewJSONHandler(w, o)), done, nil
	case "text", "":
		return slog.New(slog.NewTextHandler(w, o)), done, nil
	}
	done()
	return nil, nil, fmt.Errorf("invalid log-format: %q: it is text or json", format)
}

func oneLine(err error) string {
	var parts []string
	for _, line := range strings.Split(err.Error(), "\n") {
		if line = strings.TrimSpace(line); line != "" {
			parts = append(parts, line)
		}
	}
	return strings.Join(parts, "; ")
}

func usage(global *flag.FlagSet) {
	fmt.Println("hako-oci makes and manages containers of OCI bundles.\n\nUsage: hako-oci [global flags] COMMAND [flags] [arguments]\n\nCommands:")
	for _, c := range commandTable() {
		fmt.Printf("  %-11s %s\n", c.name, c.help)
	}
	fmt.Println("\nGlobal flags:")
	printFlags(os.Stdout, global)
	fmt.Println("\nEnvironment: NOTIFY_SOCKET, LISTEN_FDS and XDG_RUNTIME_DIR, see hako-oci(1) (hako-oci completion man DIR).")
}

func commandUsage(w io.Writer, c command, fs *flag.FlagSet) {
	fmt.Fprintf(w, "Usage: hako-oci %s\n\n%s\n", strings.TrimSpace(c.name+" [flags] "+c.args), c.help)
	if fs.Lookup("help") != nil {
		fmt.Fprintln(w, "\nFlags:")
		printFlags(w, fs)
	}
}

func printFlags(w io.Writer, fs *flag.FlagSet) {
	fs.SetOutput(w)
	fs.PrintDefaults()
	fs.SetOutput(io.Discard)
}

// errUsage is a wrong combination of flags.
var errUsage = errors.New("wrong usage")
