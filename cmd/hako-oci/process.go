//go:build linux && (amd64 || arm64)

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/early"
	"github.com/hako-engine/hako/oci/spec"
)

// processFlags are those of create, run and exec.
type processFlags struct {
	pidFile, consoleSocket, pidfdSocket *string
	preserve                            *int
}

func addProcessFlags(fs *flag.FlagSet) processFlags {
	return processFlags{
		pidFile:       fs.String("pid-file", "", "file to write the process id to"),
		consoleSocket: fs.String("console-socket", "", "unix socket that receives the master of the terminal"),
		pidfdSocket:   fs.String("pidfd-socket", "", "unix socket that receives a pidfd"),
		preserve:      fs.Int("preserve-fds", 0, "hand on so many descriptors, from 3 on"),
	}
}

// check fails on combinations that cannot work.
func (f processFlags) check(terminal, detach bool) error {
	if terminal && detach && *f.consoleSocket == "" {
		return errors.New("cannot allocate tty if runc will detach without setting console socket")
	}
	if (!terminal || !detach) && *f.consoleSocket != "" {
		return errors.New("cannot use console socket if runc will not detach or allocate tty")
	}
	return nil
}

// files gives the descriptors that are handed on: --preserve-fds, and those of systemd's
// socket activation.
func (f processFlags) files(env *[]string) ([]*os.File, error) {
	n := *f.preserve
	// With another LISTEN_PID they are whoever's has called us, and perhaps not open here (sd_listen_fds(3)).
	pid := os.Getenv("LISTEN_PID")
	if s := os.Getenv("LISTEN_FDS"); s != "" && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		k, err := strconv.Atoi(s)
		if err != nil || k < 0 || k > 1000 {
			return nil, fmt.Errorf("LISTEN_FDS=%q is not a number of descriptors", s)
		}
		n += k
		*env = append(*env, "LISTEN_FDS="+s, "LISTEN_PID=1")
	}
	if n < 0 || n > 1000 {
		return nil, fmt.Errorf("--preserve-fds %d is out of range", n)
	}
	var out []*os.File
	for fd := 3; fd < 3+n; fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			return nil, fmt.Errorf("preserve-fds: descriptor %d: %w", fd, err)
		}
		out = append(out, os.NewFile(uintptr(fd), "preserved"))
	}
	return out, nil
}

// tell reports the process to those who asked.
func (f processFlags) tell(pid int, console, pidfd *os.File) error {
	if *f.consoleSocket != "" {
		if err := sendFile(*f.consoleSocket, console); err != nil {
			return fmt.Errorf("console socket: %w", err)
		}
	}
	if *f.pidfdSocket != "" {
		if err := sendFile(*f.pidfdSocket, pidfd); err != nil {
			return fmt.Errorf("pidfd socket: %w", err)
		}
	}
	if *f.pidFile == "" {
		return nil
	}
	tmp := filepath.Join(filepath.Dir(*f.pidFile), "."+filepath.Base(*f.pidFile))
	if err := os.WriteFile(tmp, []byte(strconv.Itoa(pid)), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, *f.pidFile)
}

// sendFile passes a descriptor over a unix stream socket.
func sendFile(path string, f *os.File) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	return unix.Sendmsg(fd, []byte(f.Name()), unix.UnixRights(int(f.Fd())), nil, 0)
}

type createFlags struct {
	processFlags
	bundle                *string
	noPivot, noNewKeyring *bool
}

func addCreateFlags(fs *flag.FlagSet) createFlags {
	return createFlags{
		processFlags: addProcessFlags(fs),
		bundle:       stringFlag(fs, "bundle", "b", ".", "directory with config.json"),
		noPivot:      fs.Bool("no-pivot", false, "for a host whose root is an initramfs"),
		noNewKeyring: fs.Bool("no-new-keyring", false, "keep the session keyring"),
	}
}

func (f createFlags) options(begun *early.Begin, n *notifier, detach bool) (oci.CreateOptions, error) {
	o := oci.CreateOptions{
		Bundle: *f.bundle, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		NoPivot: *f.noPivot, NoNewKeyring: *f.noNewKeyring,
	}
	var s *specs.Spec
	var raw []byte
	var err error
	if begun.There() && begun.Bundle == *f.bundle {
		raw = begun.Config
		s, err = spec.Parse(raw)
	} else {
		s, raw, err = spec.Read(filepath.Join(*f.bundle, "config.json"))
	}
	if err != nil {
		return o, err
	}
	o.Spec, o.Raw = s, raw
	if s.Process == nil {
		return o, nil // it can be created, and then not be started
	}
	if err := f.check(s.Process.Terminal, detach); err != nil {
		return o, err
	}
	before := len(s.Process.Env)
	o.PreserveFDs, err = f.files(&s.Process.Env)
	n.show(s)
	if len(s.Process.Env) != before {
		o.Raw = nil
	}
	return o, err
}

func createCommand(a *app, fs *flag.FlagSet) (action, error) {
	f := addCreateFlags(fs)
	return func(args []string) (code int, err error) {
		defer prefix(&err, "runc create failed")
		n, err := a.notifier(args[0])
		if err != nil {
			return 0, err
		}
		defer n.close()
		if err := keepRoot(a.rt.Root); err != nil {
			return 0, err
		}
		o, err := f.options(a.rt.Begun, n, true)
		if err != nil {
			return 0, err
		}
		if err := n.makeDir(); err != nil {
			return 0, errors.Join(err, n.remove())
		}
		c, err := a.rt.Create(context.Background(), args[0], o)
		if err != nil {
			return 0, errors.Join(err, n.remove())
		}
		if err := f.tell(c.Pid(), c.Console, c.PidFD); err != nil {
			return 0, errors.Join(err, c.Delete(context.Background(), true), n.remove())
		}
		return 0, nil
	}, nil
}

func runCommand(a *app, fs *flag.FlagSet) (action, error) {
	f := addCreateFlags(fs)
	detach := boolFlag(fs, "detach", "d", "do not wait for the end")
	keep := fs.Bool("keep", false, "do not delete the container when it ends")
	fs.Bool("no-subreaper", false, "ignored")
	return func(args []string) (code int, err error) {
		defer prefix(&err, "runc run failed")
		ctx := context.Background()
		n, err := a.notifier(args[0])
		if err != nil {
			return 0, err
		}
		defer n.close()
		if err := keepRoot(a.rt.Root); err != nil {
			return 0, err
		}
		o, err := f.options(a.rt.Begun, n, *detach)
		if err != nil {
			return 0, err
		}
		if err := n.listen(true); err != nil {
			return 0, errors.Join(err, n.remove())
		}
		c, err := a.rt.Run(ctx, args[0], o)
		if err != nil {
			return 0, errors.Join(err, n.remove())
		}
		if err := f.tell(c.Pid(), c.Console, c.PidFD); err != nil {
			return 0, errors.Join(err, c.Delete(ctx, true), n.remove())
		}
		if *detach {
			return 0, n.forward(c.Pid(), c.PidFD)
		}
		if n != nil {
			go func() {
				if err := n.forward(c.Pid(), c.PidFD); err != nil {
					a.rt.Log.Warn("cannot pass on that the container is ready", "error", err)
				}
			}()
		}
		code, err = attend(c.Pid(), c.PidFD, c.Console)
		if !*keep {
			err = errors.Join(err, c.Delete(ctx, true), n.remove())
		}
		return code, err
	}, nil
}

func execCommand(a *app, fs *flag.FlagSet) (action, error) {
	f := addProcessFlags(fs)
	file := stringFlag(fs, "process", "p", "", "file with the process as JSON")
	cwd := fs.String("cwd", "", "working directory")
	var env, gids, caps, cgroups listFlag
	fs.Var(&env, "env", "environment variable KEY=value")
	fs.Var(&env, "e", "= --env")
	tty := boolFlag(fs, "tty", "t", "allocate a terminal")
	user := stringFlag(fs, "user", "u", "", "UID[:GID]")
	fs.Var(&gids, "additional-gids", "additional group")
	fs.Var(&gids, "g", "= --additional-gids")
	detach := boolFlag(fs, "detach", "d", "do not wait for the end")
	label := fs.String("process-label", "", "SELinux label")
	apparmor := fs.String("apparmor", "", "AppArmor profile")
	noNewPrivs := fs.Bool("no-new-privs", false, "set no_new_privs")
	fs.Var(&caps, "cap", "additional capability")
	fs.Var(&caps, "c", "= --cap")
	fs.Var(&cgroups, "cgroup", "[CONTROLLER,...:]PATH below the container's cgroup")
	ignorePaused := fs.Bool("ignore-paused", false, "also in a paused container")
	fs.Bool("no-subreaper", false, "ignored")
	a.onError = exitExec
	return func(args []string) (code int, err error) {
		defer prefix(&err, "exec failed")
		c, err := a.rt.Load(args[0])
		if err != nil {
			return 0, err
		}
		var p *specs.Process
		if *file != "" {
			if p, _, err = readProcess(*file); err != nil {
				return 0, err
			}
		} else {
			if len(args) < 2 {
				return 0, errors.New("exec args cannot be empty")
			}
			if p, err = c.ExecProcess(args[1:]); err != nil {
				return 0, err
			}
			if err := (execFlags{*cwd, *user, *label, *apparmor, env, gids, caps, set(fs, "no-new-privs", noNewPrivs)}).apply(p); err != nil {
				return 0, err
			}
			p.Terminal = *tty
		}
		if err := f.check(p.Terminal, *detach); err != nil {
			return 0, err
		}
		sub, err := parseCgroups(cgroups)
		if err != nil {
			return 0, err
		}
		var more []string
		files, err := f.files(&more)
		if err != nil {
			return 0, err
		}
		p.Env = append(p.Env, more...)
		proc, err := c.Exec(context.Background(), oci.ExecOptions{
			Process: p, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, PreserveFDs: files, IgnorePaused: *ignorePaused, Cgroup: sub,
		})
		if err != nil {
			return 0, err
		}
		if err := f.tell(proc.Pid, proc.Console, proc.PidFD); err != nil {
			unix.Kill(proc.Pid, unix.SIGKILL)
			return 0, err
		}
		if *detach {
			return 0, nil
		}
		return attend(proc.Pid, proc.PidFD, proc.Console)
	}, nil
}

// prefix puts what has failed in front of an error, as callers know it from runc.
func prefix(err *error, what string) {
	if *err != nil && !strings.HasPrefix((*err).Error(), what+": ") {
		*err = fmt.Errorf("%s: %w", what, *err)
	}
}

// readProcess reads a process, and gives its text too; "-" is standard input.
func readProcess(file string) (*specs.Process, []byte, error) {
	f := os.Stdin
	if file != "-" {
		var err error
		if f, err = os.Open(file); err != nil {
			return nil, nil, err
		}
		defer f.Close()
	}
	raw, err := io.ReadAll(io.LimitReader(f, spec.MaxSize))
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", file, err)
	}
	p := new(specs.Process)
	if err := json.Unmarshal(raw, p); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", file, err)
	}
	return p, raw, spec.ValidateProcess(p)
}

type execFlags struct {
	cwd, user, label, apparmor string
	env, gids, caps            listFlag
	noNewPrivs                 *bool // nil: as in the configuration
}

// set gives the value of a flag that the command line has, or nil.
func set[T any](fs *flag.FlagSet, name string, value *T) (p *T) {
	fs.Visit(func(f *flag.Flag) {
		if f.Name == name {
			p = value
		}
	})
	return p
}

func (f execFlags) apply(p *specs.Process) error {
	if f.cwd != "" {
		p.Cwd = f.cwd
	}
	if f.label != "" {
		p.SelinuxLabel = f.label
	}
	if f.apparmor != "" {
		p.ApparmorProfile = f.apparmor
	}
	for _, e := range f.env {
		// Programs take the first of two values of a name.
		name, _, _ := strings.Cut(e, "=")
		p.Env = append(slices.DeleteFunc(slices.Clone(p.Env), func(old string) bool { return strings.HasPrefix(old, name+"=") }), e)
	}
	if f.noNewPrivs != nil {
		p.NoNewPrivileges = *f.noNewPrivs
	}
	if len(f.caps) > 0 {
		k := specs.LinuxCapabilities{}
		if p.Capabilities != nil {
			k = *p.Capabilities
		}
		// Not inheritable: that would make file capabilities effective for others.
		for _, set := range []*[]string{&k.Bounding, &k.Effective, &k.Permitted} {
			*set = append(append([]string{}, *set...), f.caps...)
		}
		p.Capabilities = &k
	}
	if f.user != "" {
		u, g, both := strings.Cut(f.user, ":")
		uid, err := parseID(u)
		if err != nil {
			return fmt.Errorf("parsing %s as int for uid failed: %w", u, err)
		}
		p.User.UID = uid
		if both {
			if p.User.GID, err = parseID(g); err != nil {
				return fmt.Errorf("parsing %s as int for gid failed: %w", g, err)
			}
		}
	}
	for _, g := range f.gids {
		gid, err := parseID(g)
		if err != nil {
			return fmt.Errorf("parsing %s as int for gid failed: %w", g, err)
		}
		p.User.AdditionalGids = append(p.User.AdditionalGids, gid)
	}
	return nil
}

// parseID takes decimal numbers that are ids, and nothing that would wrap around to one.
func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == 1<<32-1 {
		err = errors.New("out of range")
	}
	return uint32(n), err
}

// parseCgroups reads runc's form [controller,...:]path. The key of a path alone is "".
func parseCgroups(list []string) (map[string]string, error) {
	out := map[string]string{}
	for _, v := range list {
		names, path, ok := strings.Cut(v, ":")
		if !ok {
			if len(list) != 1 {
				return nil, fmt.Errorf("--cgroup %s: beside others it needs a controller in front (CONTROLLER:PATH)", v)
			}
			names, path = "", v
		}
		for _, n := range strings.Split(names, ",") {
			if ok && n == "" {
				return nil, fmt.Errorf("--cgroup %s: the name of the controller is empty", v)
			}
			if _, twice := out[n]; twice {
				return nil, fmt.Errorf("--cgroup: %q is given twice", n)
			}
			out[n] = path
		}
	}
	return out, nil
}
