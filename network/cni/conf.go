package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
)

const maxConf = 1 << 20 // bytes of one configuration file

// configuration is the network of the pods as the folder says, or why there is none.
type configuration struct {
	stamp string // of the folder when it was read
	file  string
	list  *libcni.NetworkConfigList // self-contained: its Bytes hold all its plugins; nil with err
	err   error
}

// stamp changes when a configuration in the folder does. A missing folder is empty.
func stamp(dir string) (string, error) {
	var b strings.Builder
	var add func(dir string, deep bool) error
	add = func(dir string, deep bool) error {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			if e.IsDir() && deep { // plugins of the network of that name
				if err := add(path, false); err != nil {
					return err
				}
			}
			if !isConf(e.Name()) {
				continue
			}
			st, err := os.Stat(path) // follows links, as ConfigMaps are made of
			if err != nil {
				fmt.Fprintf(&b, "%s: %v\n", path, err)
				continue
			}
			fmt.Fprintf(&b, "%s: %v %v\n", path, st.Mode(), idOf(st))
		}
		return nil
	}
	err := add(dir, true)
	return b.String(), err
}

func isConf(name string) bool {
	return slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(name))
}

// readConf reads the configuration that counts: the first by name of the folder. A broken one does not
// let the next take its place, or pods would silently join another network while it is being written.
func readConf(dir string) (string, *libcni.NetworkConfigList, error) {
	entries, err := os.ReadDir(dir) // sorted by name
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", nil, fmt.Errorf("read CNI configurations: %w: %w", err, errdefs.ErrUnavailable)
	}
	for _, e := range entries {
		if e.IsDir() || !isConf(e.Name()) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		list, err := parseConf(path)
		if err != nil {
			return path, nil, fmt.Errorf("CNI configuration %s: %w: %w", path, err, errdefs.ErrUnavailable)
		}
		return path, list, nil
	}
	return "", nil, fmt.Errorf("no CNI configuration in %s: %w", dir, errdefs.ErrUnavailable)
}

func parseConf(path string) (*libcni.NetworkConfigList, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxConf {
		return nil, fmt.Errorf("not a regular file of at most %d bytes", maxConf)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var list *libcni.NetworkConfigList
	if filepath.Ext(path) == ".conflist" {
		if list, err = libcni.NetworkConfFromBytes(raw); err != nil {
			return nil, err
		}
		if !list.LoadOnlyInlinedPlugins && utils.ValidateNetworkName(list.Name) == nil {
			more, err := libcni.NetworkPluginConfsFromFiles(filepath.Dir(path), list.Name)
			if err != nil {
				return nil, err
			}
			list.Plugins = append(list.Plugins, more...)
		}
	} else {
		var probe struct {
			Plugins json.RawMessage `json:"plugins"`
		}
		if json.Unmarshal(raw, &probe) == nil && probe.Plugins != nil {
			return nil, errors.New("a list of plugins: its name has to end in .conflist")
		}
		one, err := libcni.NetworkPluginConfFromBytes(raw)
		if err != nil {
			return nil, err
		}
		list = &libcni.NetworkConfigList{Name: one.Network.Name, CNIVersion: one.Network.CNIVersion, Plugins: []*libcni.PluginConfig{one}, Bytes: raw}
	}
	if len(list.Plugins) == 0 {
		return nil, errors.New("no plugins")
	}
	if err := utils.ValidateNetworkName(list.Name); err != nil {
		return nil, fmt.Errorf("name: %w", err)
	}
	if _, _, _, err := version.ParseVersion(list.CNIVersion); err != nil {
		return nil, fmt.Errorf("cniVersion: %w", err)
	}
	return list, nil
}

// inline makes a list's Bytes tell all of it: the version that was chosen, and plugins that were found in files of their own.
func inline(list *libcni.NetworkConfigList) error {
	plugins := make([]json.RawMessage, len(list.Plugins))
	for i, p := range list.Plugins {
		plugins[i] = p.Bytes
	}
	b, err := json.Marshal(struct {
		CNIVersion   string            `json:"cniVersion"`
		Name         string            `json:"name"`
		DisableCheck bool              `json:"disableCheck,omitempty"`
		DisableGC    bool              `json:"disableGC,omitempty"`
		Inlined      bool              `json:"loadOnlyInlinedPlugins"`
		Plugins      []json.RawMessage `json:"plugins"`
	}{list.CNIVersion, list.Name, list.DisableCheck, list.DisableGC, true, plugins})
	if err != nil {
		return err
	}
	list.Bytes, list.LoadOnlyInlinedPlugins = b, true
	return nil
}

// offered are the versions that a configuration may be used with, the preferred one first.
func offered(list *libcni.NetworkConfigList) []string {
	var many struct {
		Versions []string `json:"cniVersions"`
		Version  string   `json:"cniVersion"`
	}
	_ = json.Unmarshal(list.Bytes, &many) // it has been parsed before
	out := []string{list.CNIVersion}
	for _, v := range append(many.Versions, many.Version) {
		newer, err := version.GreaterThan(v, version.Current())
		if err == nil && !newer && v != "" && !slices.Contains(out, v) {
			out = append(out, v)
		}
	}
	slices.SortStableFunc(out, func(a, b string) int {
		if a == b {
			return 0
		}
		if newer, _ := version.GreaterThan(a, b); newer {
			return -1
		}
		return 1
	})
	return out
}

// equip checks that each plugin of the list is there and speaks one version of the specification, and chooses it.
func (m *Manager) equip(ctx context.Context, list *libcni.NetworkConfigList) error {
	var errs []error
	spoken := map[string][]string{} // plugin → versions
	for _, p := range list.Plugins {
		path, err := m.run.FindInPath(p.Network.Type, m.binDirs)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if ipam := p.Network.IPAM.Type; ipam != "" {
			if _, err := m.run.FindInPath(ipam, m.binDirs); err != nil {
				errs = append(errs, err)
			}
		}
		vs, err := m.run.supported(ctx, path)
		if err != nil {
			errs = append(errs, err)
		} else if len(vs) > 0 {
			spoken[p.Network.Type] = vs
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	var refusing string
	for _, v := range offered(list) {
		refusing = ""
		for plugin, vs := range spoken {
			if !slices.Contains(vs, cmpVersion(v)) {
				refusing = plugin
			}
		}
		if refusing == "" {
			list.CNIVersion = v
			return nil
		}
	}
	return fmt.Errorf("CNI plugin %q does not speak version %q of the configuration: %w", refusing, list.CNIVersion, errdefs.ErrFailedPrecondition)
}

// cmpVersion is the version that a configuration without one has.
func cmpVersion(v string) string {
	if v == "" {
		return "0.1.0"
	}
	return v
}

// current gives the configuration as the folder is now; it is read again only when the folder changed, or while
// plugins are missing.
func (m *Manager) current(ctx context.Context) (*configuration, error) {
	now, err := stamp(m.confDir)
	if err == nil {
		if c := m.conf.Load(); c != nil && c.stamp == now && c.err == nil {
			return c, nil
		}
	}
	select {
	case m.loading <- struct{}{}:
		defer func() { <-m.loading }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if now, err = stamp(m.confDir); err != nil {
		err = fmt.Errorf("read CNI configurations: %w: %w", err, errdefs.ErrUnavailable)
	}
	old := m.conf.Load()
	if old != nil && old.stamp == now && old.err == nil && err == nil {
		return old, nil
	}
	c := &configuration{stamp: now, err: err}
	if err == nil {
		c.file, c.list, c.err = readConf(m.confDir)
	}
	if c.err == nil {
		if err := m.equip(ctx, c.list); err != nil {
			c.err = fmt.Errorf("CNI configuration %s: %w: %w", c.file, err, errdefs.ErrUnavailable)
		} else {
			c.err = inline(c.list)
		}
	}
	if ctx.Err() != nil && c.err != nil {
		return nil, context.Cause(ctx) // says nothing of the configuration
	}
	switch {
	case c.err == nil:
		m.log.Info("CNI configuration", "file", c.file, "network", c.list.Name, "version", c.list.CNIVersion)
	case old == nil || old.err == nil || old.err.Error() != c.err.Error():
		m.log.Warn("pods have no network", "error", c.err)
	}
	m.conf.Store(c)
	if c.err != nil {
		return nil, c.err
	}
	return c, nil
}
