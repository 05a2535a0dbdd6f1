package docker

import (
	"context"
	"io"
	"iter"
	"time"

	"github.com/hako-engine/hako/engine"
)

// Backend is what the API needs of the engine, which documents each call.
type Backend interface {
	Containers
	Processes
	Files
	Execs
	Images
	Volumes
	Networks
	System
}

// Containers are their life, from create to remove.
type Containers interface {
	CreateContainer(ctx context.Context, name string, c engine.Config) (id string, warnings []string, err error)
	StartContainer(ctx context.Context, ref string) error
	StopContainer(ctx context.Context, ref string, o engine.StopOptions) error
	RestartContainer(ctx context.Context, ref string, o engine.StopOptions) error
	KillContainer(ctx context.Context, ref, signal string) error
	PauseContainer(ctx context.Context, ref string) error
	UnpauseContainer(ctx context.Context, ref string) error
	RenameContainer(ctx context.Context, ref, newName string) error
	RemoveContainer(ctx context.Context, ref string, o engine.RemoveOptions) error
	UpdateContainer(ctx context.Context, ref string, r engine.Resources, p *engine.RestartPolicy) (warnings []string, err error)
	WaitContainer(ctx context.Context, ref string, cond engine.WaitCondition) (<-chan engine.WaitResult, error)
	Containers(ctx context.Context, o engine.ListOptions) ([]engine.Container, error)
	Container(ctx context.Context, ref string) (engine.Container, error)
	ContainerSize(ctx context.Context, ref string) (rw, rootfs int64, err error)
	PruneContainers(ctx context.Context, f engine.Filters) (engine.Pruned, error)
}

// Processes are what runs in a container: its streams and its use of resources.
type Processes interface {
	Logs(ctx context.Context, ref string, o engine.LogOptions) (iter.Seq2[engine.LogEntry, error], error)
	Attach(ctx context.Context, ref string, o engine.AttachOptions) (engine.Attachment, error)
	ResizeContainer(ctx context.Context, ref string, width, height uint32) error
	TopContainer(ctx context.Context, ref string, psArgs []string) (engine.Top, error)
	Stats(ctx context.Context, ref string) (engine.Stats, error)
}

// Files are a container's file system.
type Files interface {
	Changes(ctx context.Context, ref string) ([]engine.Change, error)
	StatPath(ctx context.Context, ref, path string) (engine.PathStat, error)
	GetArchive(ctx context.Context, ref, path string) (io.ReadCloser, engine.PathStat, error)
	PutArchive(ctx context.Context, ref, path string, r io.Reader, o engine.PutOptions) error
	Export(ctx context.Context, ref string, w io.Writer) error
}

// Execs are further processes in containers.
type Execs interface {
	CreateExec(ctx context.Context, c engine.ExecConfig) (id string, err error)
	StartExec(ctx context.Context, id string) error
	AttachExec(ctx context.Context, id string) (engine.Attachment, error)
	ResizeExec(ctx context.Context, id string, width, height uint32) error
	Exec(ctx context.Context, id string) (engine.Exec, error)
}

// Images are images and their transfer.
type Images interface {
	Images(ctx context.Context, f engine.Filters) ([]engine.ImageSummary, error)
	Image(ctx context.Context, ref string) (engine.ImageDetail, error)
	PullImage(ctx context.Context, ref string, o engine.PullOptions) (engine.ImageRecord, error)
	PushImage(ctx context.Context, ref string, o engine.PushOptions) error
	TagImage(ctx context.Context, source, target string) error
	RemoveImage(ctx context.Context, ref string, force, noPrune bool) ([]engine.RemovedImage, error)
	LoadImages(ctx context.Context, r io.Reader, o engine.LoadOptions) ([]engine.LoadedImage, error)
	SaveImages(ctx context.Context, refs []string, o engine.SaveOptions, w io.Writer) error
	ImageHistory(ctx context.Context, ref string) ([]engine.ImageHistory, error)
	CommitContainer(ctx context.Context, ref string, o engine.CommitOptions) (id string, err error)
	ImportImage(ctx context.Context, r io.Reader, o engine.ImportOptions) (id string, err error)
	Login(ctx context.Context, a engine.RegistryAuth) error
	PruneImages(ctx context.Context, f engine.Filters) (removed []engine.RemovedImage, reclaimed int64, err error)
}

// Volumes are named storage.
type Volumes interface {
	CreateVolume(ctx context.Context, v engine.Volume) (engine.Volume, error)
	Volumes(ctx context.Context, f engine.Filters) ([]engine.Volume, error)
	Volume(ctx context.Context, name string) (engine.Volume, error)
	RemoveVolume(ctx context.Context, name string, force bool) error
	PruneVolumes(ctx context.Context, f engine.Filters) (engine.Pruned, error)
}

// Networks are networks and who is on them.
type Networks interface {
	CreateNetwork(ctx context.Context, c engine.NetworkConfig) (engine.Network, error)
	Networks(ctx context.Context, f engine.Filters) ([]engine.Network, error)
	Network(ctx context.Context, ref string) (engine.Network, []engine.Endpoint, error)
	RemoveNetwork(ctx context.Context, ref string) error
	ConnectNetwork(ctx context.Context, netRef, ctrRef string, s engine.EndpointSettings) error
	DisconnectNetwork(ctx context.Context, netRef, ctrRef string, force bool) error
	PruneNetworks(ctx context.Context, f engine.Filters) (engine.Pruned, error)
}

// System is the node as a whole.
type System interface {
	Events(ctx context.Context, since, until time.Time, f engine.Filters) (<-chan engine.Event, error)
	Info(ctx context.Context) (engine.Info, error)
	DiskUsage(ctx context.Context) (engine.DiskUsage, error)
	Check(ctx context.Context, o engine.CheckOptions) (engine.CheckReport, error)
}

var _ Backend = (*engine.Engine)(nil)
