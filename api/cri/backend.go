package cri

import (
	"context"
	"net/netip"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/engine"
)

// Backend is what the API needs of the engine, which documents each call.
type Backend interface {
	Sandboxes
	Containers
	Images
	Node
}

// Sandboxes are the life of pods.
type Sandboxes interface {
	RunSandbox(ctx context.Context, c engine.SandboxConfig) (id string, err error)
	StopSandbox(ctx context.Context, ref string) error
	RemoveSandbox(ctx context.Context, ref string) error
	Sandbox(ctx context.Context, ref string) (engine.Sandbox, error)
	Sandboxes(ctx context.Context) []engine.Sandbox
	SandboxContainers(ctx context.Context, id string) []engine.Container
	SandboxSpec(ctx context.Context, id string) (*specs.Spec, error)
	UpdateSandboxResources(ctx context.Context, ref string, overhead, resources *engine.Resources) error
	SandboxUsage(ctx context.Context, ref string) (engine.SandboxUsage, error)
	SandboxUsages(ctx context.Context, want func(engine.Sandbox) bool) []engine.SandboxUsage
	PodMetrics(ctx context.Context) []engine.PodMetrics
}

// Containers are the life of the containers in pods.
type Containers interface {
	CreatePodContainer(ctx context.Context, sandbox string, c engine.Config) (id string, err error)
	StartPodContainer(ctx context.Context, ref string) error
	StopContainer(ctx context.Context, ref string, o engine.StopOptions) error
	RemovePodContainer(ctx context.Context, ref string) error
	UpdatePodContainer(ctx context.Context, ref string, r engine.Resources, oomScoreAdj *int) error
	Container(ctx context.Context, ref string) (engine.Container, error)
	ContainerSpec(ctx context.Context, id string) (*specs.Spec, error)
	PodContainers(ctx context.Context) []engine.PodContainer
	PodContainerUsage(ctx context.Context, want func(engine.Container) bool) []engine.ContainerUsage
	ReopenLog(ctx context.Context, ref string) error
	CheckpointContainer(ctx context.Context, ref, path string) error
	ExecSync(ctx context.Context, ref string, cmd []string, timeout time.Duration, limit int) (engine.ExecOutput, error)
}

// Images are what containers are made of.
type Images interface {
	Images(ctx context.Context, f engine.Filters) ([]engine.ImageSummary, error)
	Image(ctx context.Context, ref string) (engine.ImageDetail, error)
	PullImage(ctx context.Context, ref string, o engine.PullOptions) (engine.ImageRecord, error)
	DropImage(ctx context.Context, ref string) error
	PinnedImages(ctx context.Context) map[string]bool
	ImageFsUsage(ctx context.Context) (engine.FsUsage, error)
}

// Node is the machine.
type Node interface {
	PodFeatures(ctx context.Context) engine.PodFeatures
	NetworkReady(ctx context.Context) error
	SetPodCIDR(ctx context.Context, ranges []netip.Prefix) error
	Events(ctx context.Context, since, until time.Time, f engine.Filters) (<-chan engine.Event, error)
}
