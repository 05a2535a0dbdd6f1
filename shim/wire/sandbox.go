package wire

import "time"

// The messages of containerd's runtime/sandbox/v1/sandbox.proto.

// ServiceSandbox is the name of the service.
const ServiceSandbox = "containerd.runtime.sandbox.v1.Sandbox"

// CreateSandboxRequest makes this shim a sandbox.
type CreateSandboxRequest struct {
	ID, Bundle  string
	Rootfs      []Mount
	Options     *Any
	NetNS       string
	Annotations map[string]string
}

func (m *CreateSandboxRequest) fields(c *coder) {
	c.string(1, &m.ID)
	c.string(2, &m.Bundle)
	repeated(c, 3, &m.Rootfs)
	optional(c, 4, &m.Options)
	c.string(5, &m.NetNS)
	c.stringMap(6, &m.Annotations)
}

// SandboxRequest names a sandbox: it is the request of StartSandbox, Platform, WaitSandbox,
// PingSandbox, ShutdownSandbox and SandboxMetrics.
type SandboxRequest struct{ ID string }

func (m *SandboxRequest) fields(c *coder) { c.string(1, &m.ID) }

// StartSandboxResponse tells who serves a sandbox.
type StartSandboxResponse struct {
	Pid       uint32
	CreatedAt time.Time
	Spec      *Any
}

func (m *StartSandboxResponse) fields(c *coder) {
	c.uint32(1, &m.Pid)
	c.time(2, &m.CreatedAt)
	optional(c, 3, &m.Spec)
}

// Platform is containerd.types.Platform.
type Platform struct {
	OS, Architecture, Variant, OSVersion string
	OSFeatures                           []string
}

func (m *Platform) fields(c *coder) {
	c.string(1, &m.OS)
	c.string(2, &m.Architecture)
	c.string(3, &m.Variant)
	c.string(4, &m.OSVersion)
	c.strings(5, &m.OSFeatures)
}

// PlatformResponse tells for what the containers of a sandbox have to be made.
type PlatformResponse struct{ Platform *Platform }

func (m *PlatformResponse) fields(c *coder) { optional(c, 1, &m.Platform) }

// StopSandboxRequest ends what runs in a sandbox.
type StopSandboxRequest struct {
	ID      string
	Timeout uint32 // seconds
}

func (m *StopSandboxRequest) fields(c *coder) {
	c.string(1, &m.ID)
	c.uint32(2, &m.Timeout)
}

// WaitSandboxResponse tells how a sandbox ended.
type WaitSandboxResponse struct {
	ExitStatus uint32
	ExitedAt   time.Time
}

func (m *WaitSandboxResponse) fields(c *coder) {
	c.uint32(1, &m.ExitStatus)
	c.time(2, &m.ExitedAt)
}

// SandboxStatusResponse is the state of a sandbox.
type SandboxStatusResponse struct {
	ID                  string
	Pid                 uint32
	State               string
	Info                map[string]string
	CreatedAt, ExitedAt time.Time
	Extra               *Any
}

func (m *SandboxStatusResponse) fields(c *coder) {
	c.string(1, &m.ID)
	c.uint32(2, &m.Pid)
	c.string(3, &m.State)
	c.stringMap(4, &m.Info)
	c.time(5, &m.CreatedAt)
	c.time(6, &m.ExitedAt)
	optional(c, 7, &m.Extra)
}
