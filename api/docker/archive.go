package docker

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"io/fs"
	"net/http"

	"github.com/moby/moby/api/types/container"

	"github.com/hako-engine/hako/engine"
)

const pathStatHeader = "X-Docker-Container-Path-Stat"

// archivePath reads the path of a copy.
func (c *call) archivePath() (string, error) {
	p := c.query("path")
	if p == "" {
		return "", invalidf("bad parameter: path cannot be empty")
	}
	return p, nil
}

func (c *call) setPathStat(st engine.PathStat) error {
	b, err := json.Marshal(container.PathStat{
		Name: st.Name, Size: st.Size, Mode: fs.FileMode(st.Mode), Mtime: st.Mtime, LinkTarget: st.LinkTarget,
	})
	if err != nil {
		return err
	}
	c.w.Header().Set(pathStatHeader, base64.StdEncoding.EncodeToString(b))
	return nil
}

func (s *Server) archiveStat(ctx context.Context, c *call) error {
	p, err := c.archivePath()
	if err != nil {
		return err
	}
	st, err := s.opt.Backend.StatPath(ctx, c.id(), p)
	if err != nil {
		return err
	}
	if err := c.setPathStat(st); err != nil {
		return err
	}
	return c.empty(http.StatusOK)
}

func (s *Server) archiveGet(ctx context.Context, c *call) error {
	p, err := c.archivePath()
	if err != nil {
		return err
	}
	r, st, err := s.opt.Backend.GetArchive(ctx, c.id(), p)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := c.setPathStat(st); err != nil {
		return err
	}
	c.w.Header().Set("Content-Type", "application/x-tar")
	c.w.WriteHeader(http.StatusOK)
	_, err = io.Copy(c.w, r)
	return err
}

func (s *Server) archivePut(ctx context.Context, c *call) error {
	p, err := c.archivePath()
	if err != nil {
		return err
	}
	o := engine.PutOptions{NoOverwriteDirNonDir: c.flag("noOverwriteDirNonDir"), CopyUIDGID: c.flag("copyUIDGID")}
	if err := s.opt.Backend.PutArchive(ctx, c.id(), p, c.Body, o); err != nil {
		return err
	}
	return c.empty(http.StatusOK)
}

func (s *Server) containerExport(ctx context.Context, c *call) error {
	return s.opt.Backend.Export(ctx, c.id(), &tarBody{c: c})
}
