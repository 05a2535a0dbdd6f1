package cri

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"google.golang.org/grpc"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/hako-engine/hako/engine"
)

func (s *imageService) PullImage(ctx context.Context, r *api.PullImageRequest) (*api.PullImageResponse, error) {
	if h := r.GetImage().GetRuntimeHandler(); h != "" && !slices.Contains(s.handlers(), h) {
		return nil, invalidf("no runtime handler %q is configured", h)
	}
	auth, err := registryAuth(r.GetAuth(), r.GetImage().GetImage())
	if err != nil {
		return nil, err
	}
	img, err := s.opt.Backend.PullImage(ctx, r.GetImage().GetImage(), engine.PullOptions{Auth: auth})
	if errdefs.IsUnavailable(err) {
		return nil, fmt.Errorf("%w: %w", crierrors.ErrRegistryUnavailable, err) // the kubelet reads the beginning of the text
	}
	var rejected interface{ SignatureRejected() bool }
	if errors.As(err, &rejected) && rejected.SignatureRejected() {
		return nil, fmt.Errorf("%w: %w", crierrors.ErrSignatureValidationFailed, err)
	}
	if err != nil {
		return nil, err
	}
	return &api.PullImageResponse{ImageRef: img.ID.String()}, nil
}

// registryAuth makes the engine's form of credentials; nil for none, or for some that are meant for
// another registry than that of ref. No error shows them.
func registryAuth(w *api.AuthConfig, ref string) (*engine.RegistryAuth, error) {
	if w.GetServerAddress() != "" {
		named, err := reference.ParseDockerRef(ref)
		if err != nil {
			return nil, invalidf("%v", err)
		}
		if serverHost(w.GetServerAddress()) != serverHost(reference.Domain(named)) {
			return nil, nil
		}
	}
	a := engine.RegistryAuth{
		Username: w.GetUsername(), Password: w.GetPassword(), IdentityToken: w.GetIdentityToken(),
		RegistryToken: w.GetRegistryToken(), ServerAddress: w.GetServerAddress(),
	}
	if w.GetAuth() != "" && a.Username == "" {
		raw, err := base64.StdEncoding.DecodeString(w.GetAuth())
		user, pass, ok := strings.Cut(strings.TrimRight(string(raw), "\x00"), ":")
		if err != nil || !ok {
			return nil, invalidf("the credentials are not the base64 form of USER:PASSWORD")
		}
		a.Username, a.Password = user, pass
	}
	if a == (engine.RegistryAuth{ServerAddress: a.ServerAddress}) {
		return nil, nil
	}
	return &a, nil
}

// serverHost is the host of a registry, however it is written. Docker Hub has several names.
func serverHost(address string) string {
	if _, rest, ok := strings.Cut(address, "://"); ok {
		address = rest
	}
	host, _, _ := strings.Cut(address, "/")
	switch host = strings.ToLower(host); host {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return host
}

func (s *imageService) ListImages(ctx context.Context, r *api.ListImagesRequest) (*api.ListImagesResponse, error) {
	list, err := s.listImages(ctx, r.GetFilter())
	return &api.ListImagesResponse{Images: list}, err
}

func (s *imageService) StreamImages(r *api.StreamImagesRequest, to grpc.ServerStreamingServer[api.StreamImagesResponse]) error {
	list, err := s.listImages(to.Context(), r.GetFilter())
	if err != nil {
		return err
	}
	return inParts(list, func(p []*api.Image) error { return to.Send(&api.StreamImagesResponse{Images: p}) })
}

func (s *Server) listImages(ctx context.Context, f *api.ImageFilter) ([]*api.Image, error) {
	pinned := s.opt.Backend.PinnedImages(ctx)
	if ref := f.GetImage().GetImage(); ref != "" {
		img, err := s.opt.Backend.Image(ctx, ref)
		if notFound(err) {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
		return []*api.Image{imageOf(img, pinned)}, nil
	}
	all, err := s.opt.Backend.Images(ctx, nil)
	if err != nil {
		return nil, err
	}
	var out []*api.Image
	for _, i := range all {
		img, err := s.opt.Backend.Image(ctx, i.ID.String())
		if notFound(err) {
			continue // removed meanwhile
		} else if err != nil {
			s.log.Warn("an image is left out of the list", "image", i.ID, "error", err)
			continue
		}
		out = append(out, imageOf(img, pinned))
	}
	return out, nil
}

func (s *imageService) ImageStatus(ctx context.Context, r *api.ImageStatusRequest) (*api.ImageStatusResponse, error) {
	if r.GetImage().GetImage() == "" {
		return nil, invalidf("no image was given")
	}
	img, err := s.opt.Backend.Image(ctx, r.GetImage().GetImage())
	if notFound(err) {
		return &api.ImageStatusResponse{}, nil
	} else if err != nil {
		return nil, err
	}
	resp := &api.ImageStatusResponse{Image: imageOf(img, s.opt.Backend.PinnedImages(ctx))}
	if r.GetVerbose() {
		resp.Info = info(map[string]any{"chainID": img.ChainID, "imageSpec": img.Config, "manifest": img.Manifest, "target": img.Target})
	}
	return resp, nil
}

func (s *imageService) RemoveImage(ctx context.Context, r *api.RemoveImageRequest) (*api.RemoveImageResponse, error) {
	if r.GetImage().GetImage() == "" {
		return nil, invalidf("no image was given")
	}
	if err := s.opt.Backend.DropImage(ctx, r.GetImage().GetImage()); err != nil && !notFound(err) {
		return nil, err
	}
	return &api.RemoveImageResponse{}, nil
}

func (s *imageService) ImageFsInfo(ctx context.Context, _ *api.ImageFsInfoRequest) (*api.ImageFsInfoResponse, error) {
	u, err := s.opt.Backend.ImageFsUsage(ctx)
	if err != nil {
		return nil, err
	}
	fs := []*api.FilesystemUsage{fsUsage(u)}
	return &api.ImageFsInfoResponse{ImageFilesystems: fs, ContainerFilesystems: fs}, nil
}

func fsUsage(u engine.FsUsage) *api.FilesystemUsage {
	return &api.FilesystemUsage{
		Timestamp: u.Time.UnixNano(), FsId: &api.FilesystemIdentifier{Mountpoint: u.Path},
		UsedBytes: &api.UInt64Value{Value: u.Bytes}, InodesUsed: &api.UInt64Value{Value: u.Inodes},
	}
}

func imageOf(img engine.ImageDetail, pinned map[string]bool) *api.Image {
	id := img.ID.String()
	w := &api.Image{Id: id, RepoTags: img.Names, RepoDigests: img.Digests, Size: uint64(max(img.Size, 1)), Pinned: pinned[id]}
	// The user of the image: an id, or a name.
	user, _, _ := strings.Cut(img.Config.Config.User, ":")
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		w.Uid = &api.Int64Value{Value: uid}
	} else {
		w.Username = user
	}
	return w
}
