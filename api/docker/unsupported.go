package docker

import (
	"context"
	"net/http"

	"github.com/containerd/errdefs"
)

// errNoSwarm is what a node outside a swarm says; the docker CLI and Portainer know it.
var errNoSwarm = &textError{
	`This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm and try again.`,
	errdefs.ErrUnavailable,
}

// unsupported registers the parts of the API that hako does not have, so that
// clients read why, and not that a page is missing.
func (s *Server) unsupported() {
	for _, p := range []string{
		"/swarm", "/swarm/{any...}", "/nodes", "/nodes/{any...}", "/services", "/services/{any...}",
		"/tasks", "/tasks/{any...}", "/secrets", "/secrets/{any...}", "/configs", "/configs/{any...}",
		"PUT /volumes/{any...}",
	} {
		s.refuse(p, errNoSwarm)
	}
	build := notImplementedf("building images is not in this version of hako: it comes with the build room (BuildKit); build elsewhere and use docker load or docker pull")
	for _, p := range []string{"POST /build", "POST /build/cancel", "POST /session", "POST /grpc"} {
		s.refuse(p, build)
	}
	// There is no build cache, so pruning it is done at once; docker system prune asks.
	s.handle("POST /build/prune", func(_ context.Context, c *call) error {
		return c.json(http.StatusOK, map[string]any{"CachesDeleted": []string{}, "SpaceReclaimed": 0})
	})
	s.refuse("/containers/{id}/checkpoints", notImplementedf("checkpoints are not in this version of hako"))
	s.refuse("/containers/{id}/checkpoints/{any...}", notImplementedf("checkpoints are not in this version of hako"))
	s.handle("GET /plugins", func(_ context.Context, c *call) error { return c.json(http.StatusOK, []string{}) })
	plugins := notImplementedf("hako has no managed plugins")
	s.refuse("POST /plugins/{any...}", plugins)
	// docker inspect looks here last for an object of any kind.
	s.handle("GET /plugins/{id}/json", func(_ context.Context, c *call) error {
		return notFoundf("plugin %q not found", c.id())
	})
	s.refuse("DELETE /plugins/{any...}", plugins)
}

func (s *Server) refuse(pattern string, err error) {
	s.handle(pattern, func(context.Context, *call) error { return err })
}
