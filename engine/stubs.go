package engine

import (
	"context"
	"io"
	"iter"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/network"
)

func (e *Engine) CreateContainer(ctx context.Context, name string, c Config) (id string, warnings []string, err error) {
	return "", nil, errdefs.ErrNotImplemented
}
func (e *Engine) StartContainer(ctx context.Context, ref string) error {
	return errdefs.ErrNotImplemented
}

// StopContainer and StartContainer give errdefs.ErrFailedPrecondition wrapped in ErrNotModified when there is nothing to do.
func (e *Engine) StopContainer(ctx context.Context, ref string, o StopOptions) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) RestartContainer(ctx context.Context, ref string, o StopOptions) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) KillContainer(ctx context.Context, ref, signal string) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) PauseContainer(ctx context.Context, ref string) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) UnpauseContainer(ctx context.Context, ref string) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) RenameContainer(ctx context.Context, ref, newName string) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) RemoveContainer(ctx context.Context, ref string, o RemoveOptions) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) UpdateContainer(ctx context.Context, ref string, r Resources, p *RestartPolicy) (warnings []string, err error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) WaitContainer(ctx context.Context, ref string, cond WaitCondition) (<-chan WaitResult, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) Containers(ctx context.Context, o ListOptions) ([]Container, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) Container(ctx context.Context, ref string) (Container, error) {
	return Container{}, errdefs.ErrNotImplemented
}
func (e *Engine) ContainerSize(ctx context.Context, ref string) (rw, rootfs int64, err error) {
	return 0, 0, errdefs.ErrNotImplemented
}
func (e *Engine) Logs(ctx context.Context, ref string, o LogOptions) (iter.Seq2[LogEntry, error], error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) Attach(ctx context.Context, ref string, o AttachOptions) (Attachment, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) ResizeContainer(ctx context.Context, ref string, width, height uint32) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) TopContainer(ctx context.Context, ref string, psArgs []string) (Top, error) {
	return Top{}, errdefs.ErrNotImplemented
}
func (e *Engine) Stats(ctx context.Context, ref string) (Stats, error) {
	return Stats{}, errdefs.ErrNotImplemented
}
func (e *Engine) Changes(ctx context.Context, ref string) ([]Change, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) StatPath(ctx context.Context, ref, path string) (PathStat, error) {
	return PathStat{}, errdefs.ErrNotImplemented
}
func (e *Engine) GetArchive(ctx context.Context, ref, path string) (io.ReadCloser, PathStat, error) {
	return nil, PathStat{}, errdefs.ErrNotImplemented
}
func (e *Engine) PutArchive(ctx context.Context, ref, path string, r io.Reader, o PutOptions) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) Export(ctx context.Context, ref string, w io.Writer) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) PruneContainers(ctx context.Context, f Filters) (Pruned, error) {
	return Pruned{}, errdefs.ErrNotImplemented
}

func (e *Engine) CreateExec(ctx context.Context, c ExecConfig) (id string, err error) {
	return "", errdefs.ErrNotImplemented
}
func (e *Engine) StartExec(ctx context.Context, id string) error { return errdefs.ErrNotImplemented }
func (e *Engine) AttachExec(ctx context.Context, id string) (Attachment, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) ResizeExec(ctx context.Context, id string, width, height uint32) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) Exec(ctx context.Context, id string) (Exec, error) {
	return Exec{}, errdefs.ErrNotImplemented
}

func (e *Engine) Images(ctx context.Context, f Filters) ([]ImageSummary, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) Image(ctx context.Context, ref string) (ImageDetail, error) {
	return ImageDetail{}, errdefs.ErrNotImplemented
}
func (e *Engine) PullImage(ctx context.Context, ref string, o image.PullOptions) (image.Image, error) {
	return image.Image{}, errdefs.ErrNotImplemented
}
func (e *Engine) PushImage(ctx context.Context, ref string, o image.PushOptions) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) TagImage(ctx context.Context, source, target string) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) RemoveImage(ctx context.Context, ref string, force, noPrune bool) ([]RemovedImage, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) LoadImages(ctx context.Context, r io.Reader, o image.LoadOptions) ([]image.Loaded, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) SaveImages(ctx context.Context, refs []string, o image.SaveOptions, w io.Writer) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) ImageHistory(ctx context.Context, ref string) ([]ImageHistory, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) PruneImages(ctx context.Context, f Filters) (removed []RemovedImage, reclaimed int64, err error) {
	return nil, 0, errdefs.ErrNotImplemented
}

func (e *Engine) CreateVolume(ctx context.Context, v Volume) (Volume, error) {
	return Volume{}, errdefs.ErrNotImplemented
}
func (e *Engine) Volumes(ctx context.Context, f Filters) ([]Volume, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) Volume(ctx context.Context, name string) (Volume, error) {
	return Volume{}, errdefs.ErrNotImplemented
}
func (e *Engine) RemoveVolume(ctx context.Context, name string, force bool) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) PruneVolumes(ctx context.Context, f Filters) (Pruned, error) {
	return Pruned{}, errdefs.ErrNotImplemented
}

func (e *Engine) CreateNetwork(ctx context.Context, c network.Config) (network.Network, error) {
	return network.Network{}, errdefs.ErrNotImplemented
}
func (e *Engine) Networks(ctx context.Context, f Filters) ([]network.Network, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Engine) Network(ctx context.Context, ref string) (network.Network, []network.Endpoint, error) {
	return network.Network{}, nil, errdefs.ErrNotImplemented
}
func (e *Engine) RemoveNetwork(ctx context.Context, ref string) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) ConnectNetwork(ctx context.Context, netRef, ctrRef string, s EndpointSettings) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) DisconnectNetwork(ctx context.Context, netRef, ctrRef string, force bool) error {
	return errdefs.ErrNotImplemented
}
func (e *Engine) PruneNetworks(ctx context.Context, f Filters) (Pruned, error) {
	return Pruned{}, errdefs.ErrNotImplemented
}

func (e *Engine) Info(ctx context.Context) (Info, error) { return Info{}, errdefs.ErrNotImplemented }
func (e *Engine) DiskUsage(ctx context.Context) (DiskUsage, error) {
	return DiskUsage{}, errdefs.ErrNotImplemented
}
