package engine

import "github.com/containerd/containerd/v2/core/containers"

// ContainerStore are the records of all containers, as containerd's clients see them.
func (e *Engine) ContainerStore() containers.Store { return e.opt.ContainerRecords }
