package engine

import (
	"context"

	"github.com/containerd/containerd/api/types"

	"github.com/hako-engine/hako/shim/client"
)

// RuntimeInfo asks the shim of a runtime what it can do.
func (e *Engine) RuntimeInfo(ctx context.Context, r *types.RuntimeRequest) (*types.RuntimeInfo, error) {
	name := r.GetRuntimePath()
	if name == "" {
		name = RuntimeRunc
	}
	program, binary, err := e.taskRuntime(name)
	if err != nil {
		return nil, err
	}
	opts, _, err := taskOptions(program == "", name, anyOrNil(r.GetOptions()))
	if err != nil {
		return nil, err
	}
	info, err := client.TaskOptions{StartOptions: client.StartOptions{Binary: e.opt.ShimBinary, Runtime: binary}, Program: program, Options: opts}.Info(ctx)
	if err != nil {
		return nil, err
	}
	if program == "" && binary == "" {
		info.Name = name // hako's shim by whatever name it was asked for
	}
	return info, nil
}
