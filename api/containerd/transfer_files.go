package containerd

import (
	"context"
	"fmt"
	"io"
	"slices"

	transferapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
)

// tarTypes are the names under which clients ask for a plain tar.
var tarTypes = []string{"", "application/x-tar", "application/tar", "application/vnd.oci.image.layer.v1.tar"}

// filesEnd checks what a transfer of files needs.
func (s *transferService) filesEnd(p *transferapi.ContainerPath) error {
	if s.opt.Backend == nil {
		return errUnsupported
	}
	if p.GetContainerID() == "" || p.GetPath() == "" {
		return invalidf("files of a container: its id and a path are needed")
	}
	return nil
}

// copyOut sends files of a container as a tar.
func (s *transferService) copyOut(ctx context.Context, from *transferapi.ContainerPath, to *transferapi.WriteStream) error {
	if err := s.filesEnd(from); err != nil {
		return err
	}
	if !slices.Contains(tarTypes, to.GetMediaType()) {
		return fmt.Errorf("files as %q: %w", to.GetMediaType(), errdefs.ErrNotImplemented)
	}
	st, err := s.streams.get(ctx, to.GetStream())
	if err != nil {
		return err
	}
	defer st.close()
	r, err := s.opt.Backend.ReadTaskPath(ctx, from.GetContainerID(), from.GetPath(), from.GetNoWalk())
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.CopyBuffer(&byteWriter{ctx: ctx, st: st}, r, make([]byte, byteChunk))
	return err
}

// copyIn unpacks a tar, which may be compressed, into a directory of a container.
func (s *transferService) copyIn(ctx context.Context, from *transferapi.ReadStream, to *transferapi.ContainerPath) error {
	if err := s.filesEnd(to); err != nil {
		return err
	}
	st, err := s.streams.get(ctx, from.GetStream())
	if err != nil {
		return err
	}
	defer st.close()
	return s.opt.Backend.WriteTaskPath(ctx, to.GetContainerID(), to.GetPath(), &byteReader{st: st}, to.GetPreserveOwnership())
}
