package docker

import (
	"context"
	"net/http"

	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	wire "github.com/moby/moby/api/types/common"
	"github.com/moby/moby/api/types/jsonstream"

	"github.com/hako-engine/hako/engine"
)

// newName reads the name that an image is given: "" for none.
func newName(repo, tag string) (string, error) {
	if repo == "" {
		if tag != "" {
			return "", invalidf("invalid reference format: a tag without a repository")
		}
		return "", nil
	}
	named, err := reference.ParseNormalizedNamed(repo)
	if err != nil {
		return "", invalidf("%v", err)
	}
	if _, ok := named.(reference.Digested); ok {
		return "", invalidf("cannot import digest reference")
	}
	if tag != "" {
		if named, err = reference.WithTag(reference.TrimNamed(named), tag); err != nil {
			return "", invalidf("%v", err)
		}
	}
	return reference.TagNameOnly(named).String(), nil
}

// commit makes an image of a container.
func (s *Server) commit(ctx context.Context, c *call) error {
	ref := c.query("container")
	if ref == "" {
		return invalidf("container parameter is required")
	}
	name, err := newName(c.query("repo"), c.query("tag"))
	if err != nil {
		return err
	}
	// The fields of an image's configuration have the names that they have in a container's.
	var body *dockerspec.DockerOCIImageConfig
	if err := c.optionalBody(&body); err != nil {
		return err
	}
	id, err := s.opt.Backend.CommitContainer(ctx, ref, engine.CommitOptions{
		Name: name, Author: c.query("author"), Comment: c.query("comment"), Pause: c.flagOr("pause", true),
		Config: body, Changes: c.URL.Query()["changes"],
	})
	if err != nil {
		return err
	}
	return c.json(http.StatusCreated, wire.IDResponse{ID: id})
}

// imageImport makes an image of an archive of files, which is the body: the engine fetches
// none itself.
func (s *Server) imageImport(ctx context.Context, c *call, src string) error {
	if src != "-" {
		return notImplementedf("importing from an address is not in this version of hako: fetch it, and import the file")
	}
	name, err := newName(c.query("repo"), c.query("tag"))
	if err != nil {
		return err
	}
	platform, err := c.platform()
	if err != nil {
		return err
	}
	message := c.query("message")
	if message == "" {
		message = "Imported from " + src
	}
	t := c.transfer()
	id, err := s.opt.Backend.ImportImage(ctx, c.Body, engine.ImportOptions{
		Name: name, Message: message, Changes: c.URL.Query()["changes"], Platform: platform,
	})
	if err == nil {
		err = t.out.write(transferMessage{Message: jsonstream.Message{Status: id}})
	}
	return t.finish(err)
}
