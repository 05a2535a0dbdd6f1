package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/transport"
	"github.com/hako-engine/hako/image/verify"
	"github.com/hako-engine/hako/internal/version"
)

// pullRules are the rules about signatures that are in force. They may change at any time.
type pullRules struct {
	policy atomic.Pointer[verify.Policy] // nil: everything is allowed
	cache  string                        // folder
	reg    *registry.Client
	log    *slog.Logger
}

func newPullRules(cfg config, log *slog.Logger) (*pullRules, error) {
	r := &pullRules{cache: filepath.Join(cfg.Root, "tuf"), reg: registry.New(registry.Options{Dir: cfg.RegistryDir, UserAgent: "hako/" + version.Version, Log: log}), log: log}
	return r, r.SetRules(cfg.Verify)
}

// SetRules lets other rules count from now on, and reads their files. With an error the old
// ones stay.
func (r *pullRules) SetRules(rules map[string]verify.Rule) error {
	if len(rules) == 0 {
		r.policy.Store(nil)
		return nil
	}
	policy, err := verify.NewPolicy(rules, r.cache)
	if err == nil {
		r.policy.Store(policy)
	}
	return err
}

// open gives the repository of a name.
func (r *pullRules) open(name reference.Named) (transport.Source, error) {
	repo, err := r.reg.Repository(reference.TrimNamed(name), registry.Credentials{})
	if err != nil {
		return nil, err
	}
	return transport.OpenRegistry(repo, name), nil
}

// allow is the image room's question before an image is pulled, or named (repo is nil then).
func (r *pullRules) allow(ctx context.Context, name reference.Named, d ocispec.Descriptor, repo *registry.Repository) error {
	policy := r.policy.Load()
	if policy == nil {
		return nil
	}
	var signatures []verify.Signature
	var warn, err error
	if repo != nil {
		signatures, warn, err = policy.Check(ctx, name, d, transport.OpenRegistry(repo, name))
	} else {
		signatures, warn, err = policy.CheckLocal(ctx, name, d, r.open)
	}
	switch {
	case err != nil:
		r.log.Warn("image refused", "image", name.String(), "digest", d.Digest, "error", err)
	case warn != nil:
		r.log.Warn("image without a good signature is taken: the rule only warns", "image", name.String(), "digest", d.Digest, "error", warn)
	case len(signatures) > 0:
		r.log.Info("image is signed", "image", name.String(), "digest", d.Digest, "key", signatures[0].Key, "subject", signatures[0].Subject)
	}
	return err
}

// guard is for the images of containerd's API, whose clients may fetch blobs themselves.
func (r *pullRules) guard(s images.Store) images.Store {
	return verify.Guard(s, r.policy.Load, r.open, r.log)
}

// verifyRequest is what 'hako image verify' asks for, as JSON on standard input: the
// command line does not link what verifying takes.
type verifyRequest struct {
	Ref    string
	Access struct {
		Username, Password, Token string
		Anonymous, Insecure       bool
		CertDir, AuthFile         string
	}
	Keys        []string
	Identities  []verify.Identity
	TrustedRoot string
	TUFMirror   string
	TUFRoot     string
	Policy      string // configuration file
	RegistryDir string
}

// verifyReport is the answer.
type verifyReport struct {
	Name       string             `json:"name"`
	Digest     digest.Digest      `json:"digest"`
	Signatures []verify.Signature `json:"signatures"`
	Warning    string             `json:"warning,omitempty"`
}

const maxVerifyRequest = 1 << 20 // bytes

// verifyImage checks signatures once, without a daemon.
func verifyImage(ctx context.Context, in io.Reader, out io.Writer) error {
	raw, err := io.ReadAll(io.LimitReader(in, maxVerifyRequest))
	if err != nil {
		return err
	}
	var q verifyRequest
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&q); err != nil {
		return fmt.Errorf("request: %w: %w", err, errUsage)
	}
	ref, err := transport.ParseRef(q.Ref, transport.Registry)
	if err != nil {
		return err
	}
	var src transport.Source
	switch ref.Kind {
	case transport.Registry:
		c := registry.New(registry.Options{Dir: q.RegistryDir, UserAgent: "hako/" + version.Version, Anonymous: q.Access.Anonymous, Insecure: q.Access.Insecure, CertDir: q.Access.CertDir, AuthFile: q.Access.AuthFile})
		repo, err := c.Repository(reference.TrimNamed(ref.Name), registry.Credentials{Username: q.Access.Username, Password: q.Access.Password, RegistryToken: q.Access.Token})
		if err != nil {
			return err
		}
		src = transport.OpenRegistry(repo, ref.Name)
	case transport.Layout:
		if src, err = transport.OpenLayout(ref); err != nil {
			return err
		}
	default:
		return fmt.Errorf("signatures are in registries and OCI layouts, not in %s", ref)
	}
	defer src.Close()
	d, _, err := src.Top(ctx)
	if err != nil {
		return err
	}
	rep := verifyReport{Name: ref.String(), Digest: d.Digest}
	if q.Policy == "" {
		rep.Signatures, err = verify.Verify(ctx, verify.Rule{Keys: q.Keys, Identities: q.Identities, TrustedRoot: q.TrustedRoot, TUFMirror: q.TUFMirror, TUFRoot: q.TUFRoot}, rep.Name, d.Digest, src)
	} else {
		rep, err = verifyByPolicy(ctx, rep, q, ref, d, src)
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(rep)
}

func verifyByPolicy(ctx context.Context, rep verifyReport, q verifyRequest, ref transport.Ref, d ocispec.Descriptor, src transport.Source) (verifyReport, error) {
	if len(q.Keys)+len(q.Identities) > 0 || ref.Name == nil {
		return rep, errors.New("--policy goes by the name of an image in a registry, and takes no keys and identities besides")
	}
	cfg := defaultConfig()
	if err := cfg.load(q.Policy, true); err != nil {
		return rep, err
	}
	policy, err := verify.NewPolicy(cfg.Verify, "")
	if err != nil {
		return rep, err
	}
	var warn error
	rep.Signatures, warn, err = policy.Check(ctx, ref.Name, d, src)
	switch {
	case warn != nil:
		rep.Warning = warn.Error()
	case err == nil && len(rep.Signatures) == 0:
		rep.Warning = "no rule asks for signatures of this image"
	}
	return rep, err
}
