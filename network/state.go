package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/hako-engine/hako/internal/durable"
)

// endpointState is what is kept of an endpoint while it exists. It lies in the state
// folder and is not synced: an endpoint does not outlive a reboot, and neither does
// its lease (an address is held from the start of a container to its stop).
type endpointState struct {
	Endpoint        Endpoint     `json:"endpoint"`
	Hostname        string       `json:"hostname,omitempty"`
	GatewayPriority int          `json:"gatewayPriority,omitempty"`
	DNS             []netip.Addr `json:"dns,omitempty"`
	DNSPort         uint16       `json:"dnsPort,omitempty"` // of the sandbox's nameserver, which rules inside lead to
	BootID          string       `json:"bootID"`
	Unfinished      bool         `json:"unfinished,omitempty"` // Connect has not ended, or Disconnect has begun: to be removed
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func (m *Manager) statePath(endpointID string) string {
	return filepath.Join(m.endpointDir, endpointID+".json")
}

// saveEndpoint records the endpoint. On bridge networks the caller holds box.mu.
func (m *Manager) saveEndpoint(e *endpoint, unfinished bool) error {
	s := endpointState{
		Endpoint: e.Endpoint, Hostname: e.hostname, GatewayPriority: e.priority, DNS: e.upstream,
		BootID: m.boot, Unfinished: unfinished,
	}
	if e.box.dns != nil {
		s.DNSPort = e.box.dns.port
	}
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("record endpoint %s: %w", e.ID, err)
	}
	return durable.WriteVolatile(m.statePath(e.EndpointID), data, 0o600)
}

func (m *Manager) forgetEndpoint(endpointID string) error {
	if err := os.Remove(m.statePath(endpointID)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget endpoint %s: %w", endpointID, err)
	}
	return nil
}

// loadEndpoints reads what an earlier daemon left; files of an earlier boot, and broken ones, are removed.
func (m *Manager) loadEndpoints() ([]endpointState, error) {
	files, err := os.ReadDir(m.endpointDir)
	if err != nil {
		return nil, fmt.Errorf("read endpoints: %w", err)
	}
	var out []endpointState
	for _, f := range files {
		path := filepath.Join(m.endpointDir, f.Name())
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read endpoint: %w", err)
		}
		var s endpointState
		if err := json.Unmarshal(data, &s); err != nil || s.Endpoint.EndpointID+".json" != f.Name() || s.BootID != m.boot {
			if s.BootID == m.boot {
				m.log.Warn("removing a broken endpoint record", "path", path, "error", err)
			}
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("remove endpoint record: %w", err)
			}
			continue
		}
		out = append(out, s)
	}
	return out, nil
}
