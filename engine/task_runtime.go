package engine

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hako-engine/hako/shim/client"
)

// Names of runtimes that are hako's own shim.
const (
	RuntimeHako = "io.containerd.hako.v2"
	RuntimeRunc = "io.containerd.runc.v2"
)

// runcOptions is the type of the options that hako's own shim knows.
const runcOptions = "containerd.runc.v1.Options"

// taskRuntime finds out what the name of a runtime stands for: hako's own shim with its own
// runtime (two empty strings) or with an OCI runtime that it executes (binary), or the shim of a third
// party (program).
func (e *Engine) taskRuntime(name string) (program, binary string, err error) {
	switch name {
	case RuntimeHako, RuntimeRunc, "hako":
		return "", "", nil
	}
	if bin := e.runtimes()[name]; bin != "" {
		return "", bin, nil
	}
	if filepath.IsAbs(name) {
		st, err := os.Stat(name)
		if err != nil {
			return "", "", notFoundf("runtime %q: %v", name, err)
		}
		if st.IsDir() || st.Mode().Perm()&0o111 == 0 {
			return "", "", invalidf("runtime %q is no program", name)
		}
		return name, "", nil
	}
	parts := strings.Split(name, ".")
	if n := len(parts); n >= 2 && parts[n-1] != "" && parts[n-2] != "" && !strings.ContainsAny(name, "/\x00") {
		file := "containerd-shim-" + parts[n-2] + "-" + parts[n-1]
		if path, err := exec.LookPath(file); err == nil {
			if path, err = filepath.Abs(path); err == nil {
				return path, "", nil
			}
		}
		if e.opt.ShimBinary != "" {
			if path := filepath.Join(filepath.Dir(e.opt.ShimBinary), file); executable(path) {
				return path, "", nil
			}
		}
		if self, err := os.Executable(); err == nil {
			if path := filepath.Join(filepath.Dir(self), file); executable(path) {
				return path, "", nil
			}
		}
		return "", "", notFoundf("runtime %q: there is no %s in $PATH: not found", name, file)
	}
	return "", "", invalidf("runtime %q: want io.containerd.NAME.VERSION, the path of a shim, or the name of a configured runtime", name)
}

// RuntimeInfo tells what a runtime is and can do, by its name (or a shim's path), with such options.
func (e *Engine) RuntimeInfo(ctx context.Context, req *types.RuntimeRequest) (*types.RuntimeInfo, error) {
	name := req.GetRuntimePath()
	program, binary, err := e.taskRuntime(name)
	if err != nil {
		return nil, err
	}
	opts := req.GetOptions()
	var args []string
	if program == "" {
		if program, err = (client.StartOptions{Binary: e.opt.ShimBinary}).Program(); err != nil {
			return nil, err
		}
		if binary != "" {
			args = []string{"-runtime", binary}
		}
	}
	return e.opt.TaskShims.RuntimeInfo(ctx, program, opts, args...)
}

func executable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o111 != 0
}

// taskOptions are the options of a task as its shim gets them.
func taskOptions(own bool, runtime string, o typeurl.Any) (*anypb.Any, *options.Options, error) {
	if o == nil || o.GetTypeUrl() == "" {
		return nil, nil, nil
	}
	a := &anypb.Any{TypeUrl: o.GetTypeUrl(), Value: o.GetValue()}
	name := a.TypeUrl[strings.LastIndexByte(a.TypeUrl, '/')+1:]
	if name != runcOptions {
		if own && len(a.Value) > 0 {
			return nil, nil, invalidf("runtime %s takes options of type %s, not %s", runtime, runcOptions, name)
		}
		return a, nil, nil
	}
	var opts options.Options
	if err := proto.Unmarshal(a.Value, &opts); err != nil {
		return nil, nil, invalidf("options of runtime %s: %v", runtime, err)
	}
	a.TypeUrl = name
	return a, &opts, nil
}
