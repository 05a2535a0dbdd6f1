package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/network"
)

// CreateNetwork makes a network.
func (e *Engine) CreateNetwork(ctx context.Context, c network.Config) (network.Network, error) {
	n, err := e.opt.Networks.Create(ctx, c)
	if errdefs.IsAlreadyExists(err) {
		return n, &classed{text: fmt.Sprintf("network with name %s already exists", c.Name), class: errdefs.ErrConflict, cause: err}
	}
	if err != nil {
		return n, err
	}
	e.emitFor("network", "create", n.ID, "name", n.Name, "type", n.Driver)
	return n, nil
}

func (e *Engine) network(ctx context.Context, ref string) (network.Network, error) {
	n, err := e.opt.Networks.Get(ctx, ref)
	if errdefs.IsNotFound(err) {
		return n, &classed{text: fmt.Sprintf("network %s not found", ref), class: errdefs.ErrNotFound, cause: err}
	}
	return n, err
}

// Networks lists networks by name. Filters: dangling, driver, id, label, name, scope, type.
func (e *Engine) Networks(ctx context.Context, f Filters) ([]network.Network, error) {
	if err := f.check("dangling", "driver", "id", "label", "label!", "name", "scope", "type"); err != nil {
		return nil, err
	}
	dangling, asked, err := f.bool("dangling")
	if err != nil {
		return nil, err
	}
	for _, t := range f["type"] {
		if t != "custom" && t != "builtin" {
			return nil, invalidf("invalid filter: 'type'='%s'", t)
		}
	}
	list, err := e.opt.Networks.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list networks: %w", err)
	}
	used := e.networkUsers()
	out := []network.Network{}
	for _, n := range list {
		if asked && dangling != (!n.Predefined && !used[n.Name]) || !f.labels(n.Labels) ||
			!f.any("driver", func(w string) bool { return w == n.Driver }) ||
			!f.any("id", func(w string) bool { return strings.HasPrefix(n.ID, w) }) ||
			!f.any("name", func(w string) bool { return matchName(n.Name, w) }) ||
			!f.any("scope", func(w string) bool { return w == "local" }) ||
			!f.any("type", func(w string) bool { return n.Predefined == (w == "builtin") }) {
			continue
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b network.Network) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// networkUsers tells which networks containers are on, running or not, by name.
func (e *Engine) networkUsers() map[string]bool {
	used := map[string]bool{}
	for _, c := range e.containers.all() {
		c.mu.Lock()
		for _, s := range c.rec.Networks {
			used[s.Network] = true
		}
		c.mu.Unlock()
	}
	return used
}

// Network gives one network with the endpoints of running containers.
func (e *Engine) Network(ctx context.Context, ref string) (network.Network, []network.Endpoint, error) {
	n, err := e.network(ctx, ref)
	if err != nil {
		return n, nil, err
	}
	eps, err := e.opt.Networks.Endpoints(ctx, n.ID)
	if err != nil {
		return n, nil, fmt.Errorf("endpoints of network %s: %w", ref, err)
	}
	return n, eps, nil
}

// RemoveNetwork removes a network that no running container is on.
func (e *Engine) RemoveNetwork(ctx context.Context, ref string) error {
	n, err := e.network(ctx, ref)
	if err != nil {
		return err
	}
	if n.Predefined {
		return &classed{text: fmt.Sprintf("%s is a pre-defined network and cannot be removed", n.Name), class: errdefs.ErrPermissionDenied}
	}
	if eps, err := e.opt.Networks.Endpoints(ctx, n.ID); err == nil && len(eps) > 0 {
		names := make([]string, len(eps))
		for i, ep := range eps {
			names[i] = fmt.Sprintf("name:%q id:%q", ep.Name, shortID(ep.EndpointID))
		}
		return &classed{text: fmt.Sprintf("error while removing network: network %s has active endpoints (%s)", n.Name, strings.Join(names, ", ")), class: errdefs.ErrPermissionDenied}
	}
	if err := e.opt.Networks.Remove(ctx, n.ID); err != nil {
		return err
	}
	e.emitFor("network", "destroy", n.ID, "name", n.Name, "type", n.Driver)
	return nil
}

// ConnectNetwork puts a container on a network, at once if it runs.
func (e *Engine) ConnectNetwork(ctx context.Context, netRef, ctrRef string, s EndpointSettings) error {
	c, err := e.containers.get(ctrRef)
	if err != nil {
		return err
	}
	n, err := e.network(ctx, netRef)
	if err != nil {
		return err
	}
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	if err := c.require("change"); err != nil {
		return err
	}
	forbidden := func(format string, args ...any) error {
		return &classed{text: fmt.Sprintf(format, args...), class: errdefs.ErrPermissionDenied}
	}
	v := c.view()
	mode := v.Config.NetworkMode
	switch {
	case strings.HasPrefix(mode, "container:"):
		return forbidden("container sharing network namespace with another container or host cannot be connected to any other network")
	case mode == "host" || n.Driver == network.DriverHost:
		return forbidden("cannot connect container to host network - container must be created in host network mode")
	case n.Driver == network.DriverNone || mode == "none":
		return forbidden("container cannot be connected to multiple networks with one of the networks in private (none) mode")
	case !isUserDefined(n.Name) && (s.IPv4.IsValid() || s.IPv6.IsValid()):
		return invalidf("user specified IP address is supported on user defined networks only")
	}
	s.Network = n.Name
	c.mu.Lock()
	have := slices.ContainsFunc(c.rec.Networks, func(o EndpointSettings) bool { return o.Network == n.Name })
	running := c.run != nil
	c.mu.Unlock()
	if have {
		return forbidden("endpoint with name %s already exists in network %s", v.Name, n.Name)
	}
	ep := network.Endpoint{NetworkID: n.ID, NetworkName: n.Name, Aliases: s.Aliases}
	if running {
		ctx = context.WithoutCancel(ctx)
		if ep, err = e.connectOne(ctx, v, s, v.SandboxKey, false); err != nil {
			return err
		}
	}
	return e.changeNetworks(ctx, c, func(r *record) {
		r.Networks = append(slices.Clone(r.Networks), s)
		r.Endpoints = append(slices.Clone(r.Endpoints), ep)
	}, "connect", n)
}

// changeNetworks enters a connect or disconnect, writes the files and the record.
func (e *Engine) changeNetworks(ctx context.Context, c *container, change func(*record), action string, n network.Network) error {
	c.mu.Lock()
	change(&c.rec)
	running := c.run
	c.mu.Unlock()
	v := c.view()
	if running != nil {
		if err := e.writeNetFiles(ctx, v, v.Endpoints); err != nil {
			e.log.Warn("rewrite hosts file", "container", c.id, "error", err)
		}
		rf := runFile{Pid: int(running.pid.Load()), StartedAt: running.started, SandboxKey: v.SandboxKey, Endpoints: v.Endpoints}
		if err := writeRunFile(running.bundle, rf); err != nil {
			e.log.Warn("write state of container", "container", c.id, "error", err)
		}
	}
	if err := e.save(ctx, c); err != nil {
		return fmt.Errorf("%s container %s: %w", action, v.Name, err)
	}
	e.emitFor("network", action, n.ID, "container", c.id, "name", n.Name, "type", n.Driver)
	return nil
}

// DisconnectNetwork takes a container off a network. With force it also removes an
// endpoint whose container is not known any more.
func (e *Engine) DisconnectNetwork(ctx context.Context, netRef, ctrRef string, force bool) error {
	n, err := e.network(ctx, netRef)
	if err != nil {
		return err
	}
	c, err := e.containers.get(ctrRef)
	if err != nil {
		if force && errdefs.IsNotFound(err) {
			return e.dropEndpoint(ctx, n, ctrRef, err)
		}
		return err
	}
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	v := c.view()
	c.mu.Lock()
	on := slices.ContainsFunc(c.rec.Networks, func(s EndpointSettings) bool { return s.Network == n.Name })
	c.mu.Unlock()
	if v.Config.NetworkMode == "host" {
		return &classed{text: "container cannot be disconnected from host network or connected to host network", class: errdefs.ErrPermissionDenied}
	}
	if !on {
		return conflictf("container %s is not connected to network %s", c.id, n.Name)
	}
	ctx = context.WithoutCancel(ctx)
	for _, ep := range v.Endpoints {
		if ep.NetworkID != n.ID || ep.ID == "" {
			continue
		}
		if err := e.opt.Networks.Disconnect(ctx, n.ID, ep.ID); err != nil {
			return fmt.Errorf("disconnect container %s from network %s: %w", v.Name, n.Name, err)
		}
	}
	return e.changeNetworks(ctx, c, func(r *record) {
		r.Networks = slices.DeleteFunc(slices.Clone(r.Networks), func(s EndpointSettings) bool { return s.Network == n.Name })
		r.Endpoints = slices.DeleteFunc(slices.Clone(r.Endpoints), func(ep network.Endpoint) bool { return ep.NetworkID == n.ID })
	}, "disconnect", n)
}

// dropEndpoint removes an endpoint by the name or id of a container that is gone.
func (e *Engine) dropEndpoint(ctx context.Context, n network.Network, ref string, notFound error) error {
	eps, err := e.opt.Networks.Endpoints(ctx, n.ID)
	if err != nil {
		return err
	}
	for _, ep := range eps {
		if ep.Name == ref || ep.ID == ref {
			return e.opt.Networks.Disconnect(ctx, n.ID, ep.ID)
		}
	}
	return notFound
}

// PruneNetworks removes the networks that no container names.
func (e *Engine) PruneNetworks(ctx context.Context, f Filters) (Pruned, error) {
	if err := f.check("label", "label!", "until"); err != nil {
		return Pruned{}, err
	}
	until, err := f.until()
	if err != nil {
		return Pruned{}, err
	}
	list, err := e.Networks(ctx, Filters{"label": f["label"], "label!": f["label!"]})
	if err != nil {
		return Pruned{}, err
	}
	used := e.networkUsers()
	p := Pruned{IDs: []string{}}
	for _, n := range list {
		if n.Predefined || used[n.Name] || !until.IsZero() && !n.Created.Before(until) {
			continue
		}
		if err := e.RemoveNetwork(ctx, n.ID); err != nil {
			if errors.Is(err, context.Canceled) {
				return p, err
			}
			continue // in use by now
		}
		p.IDs = append(p.IDs, n.Name)
	}
	e.emitFor("network", "prune", "", "reclaimed", "0")
	return p, nil
}
