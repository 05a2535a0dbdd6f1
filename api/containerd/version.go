package containerd

import (
	"context"
	"strings"

	api "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/protobuf/types/known/emptypb"
)

// speaks is the containerd whose API this is. Clients compare the server's version with those of
// containerd (nerdctl pulls through the transfer service from 2.0 on), so it comes first.
const speaks = "2.4.2"

type versionService struct {
	api.UnimplementedVersionServer
	*Server
}

func (s *versionService) Version(context.Context, *emptypb.Empty) (*api.VersionResponse, error) {
	return &api.VersionResponse{Version: spoken(s.opt.Version), Revision: s.opt.Revision}, nil
}

// spoken is a version by semver.org: containerd's, with hako's own as what it was built with.
func spoken(own string) string {
	return speaks + "+hako." + strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '-' || r == '.' {
			return r
		}
		return '-'
	}, strings.TrimPrefix(own, "v"))
}
