package engine

import (
	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/network"
)

// Types of the rooms below that cross the engine's calls as they are. The
// front-ends know them by these names and import the engine alone.
type (
	ImageRecord  = image.Image
	RegistryAuth = image.Auth
	Progress     = image.Progress
	PullOptions  = image.PullOptions
	PushOptions  = image.PushOptions
	LoadOptions  = image.LoadOptions
	LoadedImage  = image.Loaded
	SaveOptions  = image.SaveOptions

	RemoteImage    = image.Remote
	StoredImage    = image.Stored
	ImageNameRule  = image.NameRule
	ArchiveOptions = image.ArchiveOptions

	Network       = network.Network
	NetworkConfig = network.Config
	Subnet        = network.Subnet
	Endpoint      = network.Endpoint
	PortMapping   = network.PortMapping
)

// Names that the network room gives a meaning.
const (
	DefaultNetwork = network.DefaultName
	DriverBridge   = network.DriverBridge
)
