//go:build linux && (amd64 || arm64)

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/spec"
)

// criuFlags are those of checkpoint and restore.
type criuFlags struct {
	o     oci.CRIUOptions
	empty listFlag
}

func addCRIUFlags(fs *flag.FlagSet) *criuFlags {
	f := new(criuFlags)
	fs.StringVar(&f.o.ImagePath, "image-path", "checkpoint", "directory of the images; nobody else may be able to write to it")
	fs.StringVar(&f.o.WorkPath, "work-path", "", "directory for CRIU's logs (default: they are dropped, and an error quotes them)")
	fs.StringVar(&f.o.ParentPath, "parent-path", "", "directory of an earlier dump, relative to --image-path")
	fs.BoolVar(&f.o.TCPEstablished, "tcp-established", false, "keep TCP connections")
	fs.BoolVar(&f.o.TCPSkipInFlight, "tcp-skip-in-flight", false, "leave out TCP connections that are being made")
	fs.BoolVar(&f.o.TCPClose, "tcp-close", false, "restore TCP connections as closed")
	fs.BoolVar(&f.o.ExtUnixSk, "ext-unix-sk", false, "allow unix sockets that lead out of the container")
	fs.BoolVar(&f.o.ShellJob, "shell-job", false, "allow a session that belongs to a process outside")
	fs.BoolVar(&f.o.FileLocks, "file-locks", false, "keep file locks")
	fs.BoolVar(&f.o.LinkRemap, "link-remap", false, "keep unlinked files by a link beside them")
	fs.BoolVar(&f.o.LazyPages, "lazy-pages", false, "fetch memory when it is touched, from criu lazy-pages")
	fs.BoolVar(&f.o.AutoDedup, "auto-dedup", false, "drop from earlier dumps what a later one has")
	fs.StringVar(&f.o.ManageCgroups, "manage-cgroups-mode", "", "what CRIU does about cgroups below the container's: soft (default), full, strict, ignore")
	fs.Var(&f.empty, "empty-ns", "come back with an empty namespace: network")
	return f
}

func (f *criuFlags) options() oci.CRIUOptions {
	f.o.EmptyNamespaces = f.empty
	return f.o
}

func checkpointCommand(a *app, fs *flag.FlagSet) (action, error) {
	f := addCRIUFlags(fs)
	leave := fs.Bool("leave-running", false, "let the container run on")
	preDump := fs.Bool("pre-dump", false, "write the memory only, and let the container run on")
	server := fs.String("page-server", "", "ADDRESS:PORT of a criu page-server that takes the memory")
	status := fs.Int("status-fd", -1, "descriptor that gets a zero byte when a lazy dump is ready")
	return func(args []string) (int, error) {
		c, err := a.rt.Load(args[0])
		if err != nil {
			return 0, err
		}
		o := oci.CheckpointOptions{CRIUOptions: f.options(), LeaveRunning: *leave, PreDump: *preDump, PageServer: *server}
		if *status >= 0 {
			if flags, err := unix.FcntlInt(uintptr(*status), unix.F_GETFL, 0); err != nil || flags&unix.O_ACCMODE == unix.O_RDONLY {
				return 0, fmt.Errorf("--status-fd %d: no descriptor that can be written: %w", *status, errUsage)
			}
			o.Ready = os.NewFile(uintptr(*status), "status")
		}
		ctx := context.Background()
		if err := c.Checkpoint(ctx, o); err != nil {
			return 0, err
		}
		if *leave || *preDump {
			return 0, nil
		}
		// What has been written to files is here no more.
		return 0, c.Delete(ctx, true)
	}, nil
}

func restoreCommand(a *app, fs *flag.FlagSet) (action, error) {
	f := addCRIUFlags(fs)
	bundle := stringFlag(fs, "bundle", "b", ".", "directory with config.json")
	detach := boolFlag(fs, "detach", "d", "do not wait for the end")
	pidFile := fs.String("pid-file", "", "file to write the process id to")
	console := fs.String("console-socket", "", "unix socket that receives the master of the terminal")
	fs.Bool("no-subreaper", false, "ignored")
	fs.Bool("no-pivot", false, "ignored: CRIU changes the root")
	profile := fs.String("lsm-profile", "", "apparmor:NAME or selinux:LABEL instead of that of the configuration")
	mountContext := fs.String("lsm-mount-context", "", "SELinux context of the mounts instead of that of the configuration")
	return func(args []string) (code int, err error) {
		ctx := context.Background()
		if err := keepRoot(a.rt.Root); err != nil {
			return 0, err
		}
		o := oci.RestoreOptions{CRIUOptions: f.options(), LSMProfile: *profile, LSMMountContext: *mountContext}
		s, raw, err := spec.Read(filepath.Join(*bundle, "config.json"))
		if err != nil {
			return 0, err
		}
		if s.Process == nil {
			return 0, errors.New("process property must not be empty")
		}
		p := processFlags{pidFile: pidFile, consoleSocket: console, pidfdSocket: new(string), preserve: new(int)}
		if err := p.check(s.Process.Terminal, *detach); err != nil {
			return 0, err
		}
		o.CreateOptions = oci.CreateOptions{Bundle: *bundle, Spec: s, Raw: raw, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
		c, err := a.rt.Restore(ctx, args[0], o)
		if err != nil {
			return 0, err
		}
		if err := p.tell(c.Pid(), c.Console, c.PidFD); err != nil {
			return 0, errors.Join(err, c.Delete(ctx, true))
		}
		if *detach {
			return 0, nil
		}
		code, err = attend(c.Pid(), c.PidFD, c.Console)
		return code, errors.Join(err, c.Delete(ctx, true))
	}, nil
}
