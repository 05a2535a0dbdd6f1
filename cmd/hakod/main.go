// Command hakod is the daemon: it owns the node's objects and serves them on its
// sockets. The rooms are opened and wired in daemon.go, in one visible place. Containers run
// on when it ends, however it ends.
//
// In flow flags, a configuration file and requests on the sockets; out flow answers, shims, and a
// log on standard error.
//
// Exit codes: 0 after SIGTERM or SIGINT, 1 on errors, 2 on wrong usage. Those of hakod check are
// 0 for a clean root (or one that was repaired), 1 for problems that are there, 3 if it
// could not be checked.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"strings"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/version"
)

const usage = `hakod is the daemon of hako, a container engine.

Usage:
  hakod [flags]              run the daemon
  hakod version              print the version
  hakod config default       print a configuration file with all keys
  hakod config check [FILE]  check a configuration file
  hakod cleanup [flags]      end all containers of this root and remove what the
                             daemon made outside its folders: processes,
                             cgroups, networks
  hakod check [--deep] [--repair] [--format text|json] [flags]
                             check a root that no daemon has open: records,
                             blobs, snapshots, volumes, networks. --deep reads
                             everything, --repair mends. A daemon that runs is
                             asked with hako system check. Exit codes: 0 clean,
                             1 problems, 3 not checked

Each flag is also a key of the configuration file, without the dashes (--runtime
is the table runtimes); the tables proxy_plugins and verify are in the file only.
Flags count more than the file. SIGHUP makes the daemon read the file again; log
level, runtimes and verify change at once, the rest at the next start.

Flags:
`

// errUsage marks wrong usage.
var errUsage = errors.New("see hakod --help")

func main() {
	runtime.MemProfileRate = 0 // the tables for it take a megabyte; profileMemory turns it on again
	unix.Umask(0o022)          // modes are set exactly; nothing may be open wider because of the caller
	err := run(os.Args[1:], os.Stdout)
	switch {
	case err == nil:
	case errors.Is(err, errFound): // the report said so
		os.Exit(1)
	case errors.Is(err, errNotChecked):
		fmt.Fprintf(os.Stderr, "hakod: %v\n", err)
		os.Exit(exitNotChecked)
	case errors.Is(err, errUsage):
		fmt.Fprintf(os.Stderr, "hakod: %v\n", err)
		os.Exit(2)
	default:
		fmt.Fprintf(os.Stderr, "hakod: %v\n", err)
		os.Exit(1)
	}
}

// helpWidth is that of the narrowest terminal that people use.
const helpWidth = 80

func run(args []string, out io.Writer) error {
	cfg := defaultConfig()
	fs := pflag.NewFlagSet("hakod", pflag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.SortFlags = false
	path := fs.String("config", defaultConfigPath, "Configuration file. Only the default one may be missing.")
	showVersion := fs.Bool("version", false, "Print the version.")
	cfg.flags(fs)
	var cf checkFlags
	cf.flags(fs)
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			fmt.Fprint(out, usage, fs.FlagUsagesWrapped(helpWidth))
			return nil
		}
		return fmt.Errorf("%w: %w", unknownFlag(err, fs), errUsage)
	}
	if *showVersion {
		return printVersion(out)
	}
	switch cmd := fs.Args(); {
	case len(cmd) == 0:
	case cmd[0] == "version" && len(cmd) == 1:
		return printVersion(out)
	case cmd[0] == "help" && len(cmd) == 1:
		fmt.Fprint(out, usage, fs.FlagUsagesWrapped(helpWidth))
		return nil
	case len(cmd) == 2 && cmd[0] == "config" && cmd[1] == "default":
		raw, err := defaultConfig().write()
		if err == nil {
			_, err = out.Write(raw)
		}
		return err
	case len(cmd) >= 2 && len(cmd) <= 3 && cmd[0] == "config" && cmd[1] == "check":
		named := fs.Changed("config")
		if len(cmd) == 3 {
			*path, named = cmd[2], true
		}
		if err := cfg.load(*path, named); err != nil {
			return err
		}
		if err := cfg.complete(); err != nil {
			return fmt.Errorf("%s: %w", *path, err)
		}
		if _, err := os.Stat(*path); errors.Is(err, os.ErrNotExist) {
			fmt.Fprintf(out, "there is no %s: the defaults hold\n", *path)
			return nil
		}
		fmt.Fprintf(out, "%s is valid\n", *path)
		return nil
	case len(cmd) == 1 && cmd[0] == "verify-image":
		return verifyImage(context.Background(), os.Stdin, out)
	case len(cmd) == 1 && (cmd[0] == "cleanup" || cmd[0] == "check"):
	default:
		return fmt.Errorf("unknown command %q: %w", strings.Join(cmd, " "), errUsage)
	}

	if fs.Arg(0) != "check" && (fs.Changed("repair") || fs.Changed("deep") || fs.Changed("format")) {
		return fmt.Errorf("--repair, --deep and --format are of hakod check: %w", errUsage)
	}
	given := func() (config, error) { return settings(*path, fs.Changed("config"), args) }
	cfg, err := given()
	if err != nil {
		return err
	}
	log, level := newLogger(cfg, os.Stderr)
	if fs.Arg(0) == "check" {
		err := check(context.Background(), cfg, cf, out, log)
		if err == nil || errors.Is(err, errFound) || errors.Is(err, errUsage) {
			return err
		}
		return fmt.Errorf("%w: %w", errNotChecked, err)
	}
	if fs.NArg() == 1 { // cleanup
		return cleanup(context.Background(), cfg, log)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	signal.Ignore(unix.SIGPIPE)
	return serve(ctx, cfg, newReloader(cfg, given, level, log), log)
}

// settings reads the file, which the user may have named, lays the flags over it, and checks the whole.
func settings(path string, named bool, args []string) (config, error) {
	cfg := defaultConfig()
	fs := pflag.NewFlagSet("hakod", pflag.ContinueOnError)
	fs.String("config", path, "")
	fs.Bool("version", false, "")
	new(checkFlags).flags(fs)
	cfg.flags(fs)
	if err := cfg.load(path, named); err != nil {
		return cfg, err
	}
	if err := fs.Parse(args); err != nil {
		return cfg, err
	}
	return cfg, cfg.complete()
}

func printVersion(out io.Writer) error {
	_, err := fmt.Fprintf(out, "hakod version %s, revision %s\n", version.Version, version.Revision())
	return err
}

// unknownFlag names the nearest flag to one that does not exist.
func unknownFlag(err error, fs *pflag.FlagSet) error {
	name, ok := strings.CutPrefix(err.Error(), "unknown flag: --")
	if !ok {
		return err
	}
	var known []string
	fs.VisitAll(func(f *pflag.Flag) { known = append(known, f.Name) })
	return fmt.Errorf("%w, did you mean --%s?", err, nearest(name, known))
}

// newLogger gives the log, and what changes its level.
func newLogger(cfg config, w io.Writer) (*slog.Logger, *slog.LevelVar) {
	level := new(slog.LevelVar)
	_ = level.UnmarshalText([]byte(cfg.LogLevel)) // checked by complete
	opts := &slog.HandlerOptions{Level: level}
	if cfg.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, opts)), level
	}
	return slog.New(slog.NewTextHandler(w, opts)), level
}
