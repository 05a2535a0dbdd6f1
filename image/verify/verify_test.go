package verify

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	rekor "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"
	"github.com/sigstore/sigstore-go/pkg/tlog"
	"github.com/sigstore/sigstore/pkg/signature"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/hako-engine/hako/image/transport"
)

// place is a repository in memory.
type place struct {
	transport.Source
	blobs map[digest.Digest][]byte
	tags  map[string]ocispec.Descriptor
	refs  []ocispec.Descriptor
	fail  error
}

func newPlace() *place {
	return &place{blobs: map[digest.Digest][]byte{}, tags: map[string]ocispec.Descriptor{}}
}

func (p *place) add(mt string, raw []byte) ocispec.Descriptor {
	d := digest.FromBytes(raw)
	p.blobs[d] = raw
	return ocispec.Descriptor{MediaType: mt, Digest: d, Size: int64(len(raw))}
}

func (p *place) Tagged(_ context.Context, tag string) (ocispec.Descriptor, []byte, error) {
	d, ok := p.tags[tag]
	if !ok {
		return d, nil, errdefs.ErrNotFound
	}
	return d, p.blobs[d.Digest], nil
}

func (p *place) Document(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	return p.blobs[d.Digest], nil
}

func (p *place) Blob(_ context.Context, d ocispec.Descriptor, _ int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(p.blobs[d.Digest])), nil
}

func (p *place) Referrers(context.Context, digest.Digest) ([]ocispec.Descriptor, error) {
	return p.refs, p.fail
}

func (p *place) Close() error { return nil }

func (p *place) manifest(t *testing.T, artifact string, layers ...ocispec.Descriptor) ocispec.Descriptor {
	t.Helper()
	raw, err := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifact,
		Config: p.add(ocispec.MediaTypeImageConfig, []byte("{}")), Layers: layers})
	if err != nil {
		t.Fatal(err)
	}
	d := p.add(ocispec.MediaTypeImageManifest, raw)
	d.ArtifactType = artifact
	return d
}

// signer is a key and the file with its public half.
type signer struct {
	signature.Signer
	file string
}

func newSigner(t *testing.T) signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key.pub")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := signature.LoadSigner(k, crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return signer{s, file}
}

func (s signer) sign(t *testing.T, raw []byte) string {
	t.Helper()
	sig, err := s.SignMessage(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(sig)
}

func simplePayload(d digest.Digest, typ string) []byte {
	return fmt.Appendf(nil, `{"critical":{"identity":{"docker-reference":"x"},"image":{"docker-manifest-digest":%q},"type":%q},"optional":null}`, d, typ)
}

// simple puts a signature of the older form under the tag for d.
func (p *place) simple(t *testing.T, d digest.Digest, s signer, payload []byte) {
	t.Helper()
	l := p.add(simpleSigning, payload)
	l.Annotations = map[string]string{annotationSignature: s.sign(t, payload)}
	p.tags[strings.Replace(d.String(), ":", "-", 1)+".sig"] = p.manifest(t, "", l)
}

func statement(d digest.Digest, predicate string) []byte {
	return fmt.Appendf(nil, `{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":%q}}],"predicateType":%q,"predicate":{}}`, d.Encoded(), predicate)
}

// pae is what DSSE signs (its protocol.md).
func pae(typ string, payload []byte) []byte {
	return fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(typ), typ, len(payload), payload)
}

const intoto = "application/vnd.in-toto+json"

// keyBundle puts a bundle that a key signed among the referrers.
func (p *place) keyBundle(t *testing.T, s signer, payload []byte) {
	t.Helper()
	raw, err := json.Marshal(map[string]any{
		"mediaType":            "application/vnd.dev.sigstore.bundle.v0.3+json",
		"verificationMaterial": map[string]any{"publicKey": map[string]string{"hint": "x"}},
		"dsseEnvelope": map[string]any{"payload": base64.StdEncoding.EncodeToString(payload), "payloadType": intoto,
			"signatures": []any{map[string]string{"sig": s.sign(t, pae(intoto, payload))}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	p.bundle(t, raw)
}

func (p *place) bundle(t *testing.T, raw []byte) {
	t.Helper()
	const mt = "application/vnd.dev.sigstore.bundle.v0.3+json"
	p.refs = append(p.refs, p.manifest(t, mt, p.add(mt, raw)))
}

var (
	image1 = digest.FromString("image 1")
	image2 = digest.FromString("image 2")
)

func refusal(err error) *Error {
	var e *Error
	errors.As(err, &e)
	return e
}

func TestKeys(t *testing.T) {
	t.Parallel()
	good, other := newSigner(t), newSigner(t)
	rule := Rule{Keys: []string{other.file, good.file}}
	for name, c := range map[string]struct {
		make func(p *place)
		ok   bool
	}{
		"nothing":                 {func(p *place) {}, false},
		"older form":              {func(p *place) { p.simple(t, image1, good, simplePayload(image1, simpleType)) }, true},
		"another image's":         {func(p *place) { p.simple(t, image1, good, simplePayload(image2, simpleType)) }, false},
		"another type":            {func(p *place) { p.simple(t, image1, good, simplePayload(image1, "something else")) }, false},
		"two digests":             {func(p *place) { p.simple(t, image1, good, fmt.Appendf(nil, `{"critical":{},"Critical":%s}`, "{}")) }, false},
		"a stranger's":            {func(p *place) { p.simple(t, image1, newSigner(t), simplePayload(image1, simpleType)) }, false},
		"bundle":                  {func(p *place) { p.keyBundle(t, good, statement(image1, signPredicate)) }, true},
		"bundle of another image": {func(p *place) { p.keyBundle(t, good, statement(image2, signPredicate)) }, false},
		"bundle of a stranger":    {func(p *place) { p.keyBundle(t, newSigner(t), statement(image1, signPredicate)) }, false},
		"an attestation":          {func(p *place) { p.keyBundle(t, good, statement(image1, "https://spdx.dev/Document")) }, false},
		"a bad one, then a good":  {func(p *place) { p.bundle(t, []byte("{")); p.keyBundle(t, good, statement(image1, signPredicate)) }, true},
		"a good one in both forms": {func(p *place) {
			p.keyBundle(t, good, statement(image1, signPredicate))
			p.simple(t, image1, good, simplePayload(image1, simpleType))
		}, true},
		"a payload that was changed": {func(p *place) {
			p.simple(t, image1, good, simplePayload(image2, simpleType))
			for d, raw := range p.blobs { // the signature stays, and the digest in the manifest
				p.blobs[d] = bytes.ReplaceAll(raw, []byte(image2), []byte(image1))
			}
		}, false},
		"what registries say of types": {func(p *place) {
			p.keyBundle(t, good, statement(image1, signPredicate))
			p.refs[0].ArtifactType = "text/plain"
		}, false},
	} {
		p := newPlace()
		c.make(p)
		sig, err := Verify(context.Background(), rule, "app", image1, p)
		if c.ok != (err == nil) || c.ok && (len(sig) != 1 || sig[0].Key != good.file) {
			t.Errorf("%s: %+v %v", name, sig, err)
		}
		if !c.ok && (!errdefs.IsPermissionDenied(err) || refusal(err) == nil || !strings.Contains(err.Error(), "cosign sign")) {
			t.Errorf("%s: %v", name, err)
		}
	}
	p := newPlace()
	p.fail = errdefs.ErrUnavailable
	if _, err := Verify(context.Background(), rule, "app", image1, p); !errdefs.IsUnavailable(err) {
		t.Errorf("a registry that does not answer: %v", err)
	}
}

// keyless makes a bundle with a certificate, a log's entry and a timestamp.
func keyless(t *testing.T, v *ca.VirtualSigstore, subject, issuer string, payload []byte) []byte {
	t.Helper()
	e, err := v.AttestAtTime(subject, issuer, payload, time.Now().Add(5*time.Minute), true)
	if err != nil {
		t.Fatal(err)
	}
	vc, err := e.VerificationContent()
	if err != nil {
		t.Fatal(err)
	}
	sc, err := e.SignatureContent()
	if err != nil {
		t.Fatal(err)
	}
	env := sc.EnvelopeContent().RawEnvelope()
	entries, err := e.TlogEntries()
	if err != nil {
		t.Fatal(err)
	}
	tle := entries[0].TransparencyLogEntry()
	tle.KindVersion = &rekor.KindVersion{Kind: "dsse", Version: "0.0.1"}
	entry, err := protojson.Marshal(tle)
	if err != nil {
		t.Fatal(err)
	}
	stamps, err := e.Timestamps()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(map[string]any{
		"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
		"verificationMaterial": map[string]any{
			"certificate":               map[string]any{"rawBytes": base64.StdEncoding.EncodeToString(vc.Certificate().Raw)},
			"tlogEntries":               []any{json.RawMessage(entry)},
			"timestampVerificationData": map[string]any{"rfc3161Timestamps": []any{map[string]any{"signedTimestamp": base64.StdEncoding.EncodeToString(stamps[0])}}},
		},
		"dsseEnvelope": map[string]any{"payload": env.Payload, "payloadType": env.PayloadType, "signatures": []any{map[string]string{"sig": env.Signatures[0].Sig}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func trustedRoot(t *testing.T, v *ca.VirtualSigstore) string {
	t.Helper()
	logs := v.RekorLogs()
	for id, l := range logs {
		raw, err := hex.DecodeString(id) // the library's test kit has the digits for the number
		if err != nil {
			t.Fatal(err)
		}
		l.ID = raw
	}
	tr, err := root.NewTrustedRoot(root.TrustedRootMediaType01, v.FulcioCertificateAuthorities(), nil, v.TimestampingAuthorities(), logs)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := tr.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "trusted_root.json")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestKeyless(t *testing.T) {
	t.Parallel()
	v, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	trusted := trustedRoot(t, v)
	const subject, issuer = "release@example.com", "https://issuer.example.com"
	good := keyless(t, v, subject, issuer, statement(image1, signPredicate))
	for name, c := range map[string]struct {
		raw []byte
		id  Identity
		ok  bool
	}{
		"exact":                       {good, Identity{issuer, subject}, true},
		"expression":                  {good, Identity{"~https://.*", "~.*@example\\.com"}, true},
		"expression for a part of it": {good, Identity{issuer, "~release@"}, false},
		"another subject":             {good, Identity{issuer, "other@example.com"}, false},
		"another issuer":              {good, Identity{"https://other.example.com", subject}, false},
		"another image":               {keyless(t, v, subject, issuer, statement(image2, signPredicate)), Identity{issuer, subject}, false},
		"an attestation":              {keyless(t, v, subject, issuer, statement(image1, "https://slsa.dev/provenance/v1")), Identity{issuer, subject}, false},
		"another sigstore":            {keyless(t, stranger, subject, issuer, statement(image1, signPredicate)), Identity{issuer, subject}, false},
	} {
		p := newPlace()
		p.bundle(t, c.raw)
		sig, err := Verify(context.Background(), Rule{Identities: []Identity{c.id}, TrustedRoot: trusted}, "app", image1, p)
		if c.ok != (err == nil) || c.ok && (sig[0].Subject != subject || sig[0].Issuer != issuer || sig[0].Time == "") {
			t.Errorf("%s: %+v %v", name, sig, err)
		}
	}
	// Without the log's entry, or without a time, a certificate is worth nothing.
	var doc map[string]any
	if err := json.Unmarshal(good, &doc); err != nil {
		t.Fatal(err)
	}
	delete(doc["verificationMaterial"].(map[string]any), "tlogEntries")
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	p := newPlace()
	p.bundle(t, raw)
	if _, err := Verify(context.Background(), Rule{Identities: []Identity{{issuer, subject}}, TrustedRoot: trusted}, "app", image1, p); refusal(err) == nil {
		t.Errorf("without an entry in the log: %v", err)
	}
	// A key is not enough where an identity is asked for, and the other way round.
	p = newPlace()
	key := newSigner(t)
	p.keyBundle(t, key, statement(image1, signPredicate))
	if _, err := Verify(context.Background(), Rule{Identities: []Identity{{issuer, subject}}, TrustedRoot: trusted}, "app", image1, p); refusal(err) == nil {
		t.Errorf("a key for an identity: %v", err)
	}
	p = newPlace()
	p.bundle(t, good)
	if _, err := Verify(context.Background(), Rule{Keys: []string{key.file}}, "app", image1, p); refusal(err) == nil {
		t.Errorf("an identity for a key: %v", err)
	}
	// A key with a log asks for the log.
	p = newPlace()
	p.keyBundle(t, key, statement(image1, signPredicate))
	if _, err := Verify(context.Background(), Rule{Keys: []string{key.file}, TrustedRoot: trusted, Log: true}, "app", image1, p); refusal(err) == nil {
		t.Errorf("a key without the log: %v", err)
	}
}

// TestScopes holds which rule is for which image, and that no spelling gets around one.
func TestScopes(t *testing.T) {
	t.Parallel()
	key := newSigner(t)
	require := Rule{Keys: []string{key.file}}
	p, err := NewPolicy(map[string]Rule{
		"registry.example.com/team": require, "registry.example.com/team/open": {Policy: Accept}, "registry.example.com/no": {Policy: Reject},
		"docker.io/library": require, "Warn.example.com": {Policy: Warn, Keys: []string{key.file}}, "localhost:5000": require,
	}, "")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"registry.example.com/team/app": Require, "registry.example.com/team": Require, "registry.example.com/team/open/x": Accept,
		"registry.example.com/team/opener": Require, "registry.example.com/teams/app": "", "registry.example.com/other": "",
		"REGISTRY.example.com/team/app": Require, "registry.example.com:443/team/app": Require, "Registry.Example.COM:443/team/app:1": Require,
		"registry.example.com:444/team/app": "", "registry.example.com/no/x": Reject,
		"alpine": Require, "docker.io/library/alpine": Require, "index.docker.io/library/alpine": Require, "user/app": "",
		"registry-1.docker.io/library/alpine": Require, "warn.example.com/x": Warn, "localhost:5000/x": Require,
		"registry.example.com/team/app:1@" + image1.String(): Require,
	} {
		n, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if r := p.find(n); r != nil {
			got = r.policy
		}
		if got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
		sig, warn, err := p.Check(context.Background(), n, ocispec.Descriptor{Digest: image1}, newPlace())
		refused := refusal(err) != nil
		if refused != (want == Require || want == Reject) || len(sig) > 0 || (warn != nil) != (want == Warn) {
			t.Errorf("%s: %v %v %v", name, sig, warn, err)
		}
	}
	p, err = NewPolicy(map[string]Rule{Any: {Policy: Reject}, "docker.io": {Policy: Accept}}, "")
	if err != nil {
		t.Fatal(err)
	}
	for name, refused := range map[string]bool{"alpine": false, "user/app": false, "ghcr.io/x/y": true} {
		n, _ := reference.ParseNormalizedNamed(name)
		if _, _, err := p.Check(context.Background(), n, ocispec.Descriptor{Digest: image1}, newPlace()); refused != (err != nil) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLocalNames holds what a rule says of images that were not pulled, and that the store of
// containerd's clients asks the rules that are in force.
func TestLocalNames(t *testing.T) {
	t.Parallel()
	key := newSigner(t)
	policy := func(rules map[string]Rule) *Policy {
		t.Helper()
		p, err := NewPolicy(rules, "")
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := policy(map[string]Rule{
		"a.example": {Keys: []string{key.file}}, "a.example/made": {Keys: []string{key.file}, Local: LocalAccept}, "a.example/no": {Policy: Reject, Local: LocalSame},
		"a.example/warn": {Policy: Warn, Keys: []string{key.file}}, "*": {Policy: Reject, Local: LocalAccept},
	})
	signed := newPlace()
	signed.simple(t, image1, key, simplePayload(image1, simpleType))
	for name, want := range map[string]struct{ refused, warned, asked bool }{
		"a.example/x": {true, false, true}, "a.example/made/x": {}, "a.example/no/x": {true, false, false}, "a.example/warn/x": {false, true, true}, "b.example/x": {}, "alpine": {},
	} {
		n, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			t.Fatal(err)
		}
		asked := false
		open := func(reference.Named) (transport.Source, error) { asked = true; return signed, nil }
		_, warn, err := p.CheckLocal(context.Background(), n, ocispec.Descriptor{Digest: image2}, open)
		e := refusal(err)
		if (e != nil) != want.refused || (warn != nil) != want.warned || asked != want.asked {
			t.Errorf("%s: %v %v, asked: %v", name, err, warn, asked)
		}
		if e != nil && (!e.Local || !strings.Contains(err.Error(), "the name "+name) || !strings.Contains(err.Error(), `local = "accept"`)) {
			t.Errorf("%s: %v", name, err)
		}
		if want.asked {
			if sig, warn, err := p.CheckLocal(context.Background(), n, ocispec.Descriptor{Digest: image1}, open); err != nil || warn != nil || len(sig) != 1 {
				t.Errorf("%s, signed: %v %v %v", name, sig, warn, err)
			}
		}
		// When it is pulled, Local means nothing.
		if _, _, err := p.Check(context.Background(), n, ocispec.Descriptor{Digest: image2}, signed); (refusal(err) != nil) != (name != "a.example/warn/x") {
			t.Errorf("pull %s: %v", name, err)
		}
	}

	mem := &records{byName: map[string]images.Image{}}
	var now *Policy
	g := Guard(mem, func() *Policy { return now }, func(reference.Named) (transport.Source, error) { return signed, nil }, slog.New(slog.DiscardHandler))
	create := func(name string, d digest.Digest) error {
		_, err := g.Create(context.Background(), images.Image{Name: name, Target: ocispec.Descriptor{Digest: d}})
		return err
	}
	if err := create("a.example/x:0", image2); err != nil {
		t.Errorf("without rules: %v", err)
	}
	now = p
	for name, want := range map[string]struct {
		d  digest.Digest
		ok bool
	}{
		"a.example/x:1": {image1, true}, "a.example/x:2": {image2, true}, // what :0 had before there were rules
		"a.example/y:1": {image2, false}, "a.example/made/x:1": {image2, false}, "a.example/made/x:2": {image1, true}, "no reference": {image2, true},
	} {
		if err := create(name, want.d); want.ok != (err == nil) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := g.Update(context.Background(), images.Image{Name: "a.example/made/x:2", Target: ocispec.Descriptor{Digest: image2}}, "target"); refusal(err) == nil {
		t.Errorf("update: %v", err)
	}
	if _, err := g.Update(context.Background(), images.Image{Name: "a.example/made/x:2", Target: ocispec.Descriptor{Digest: image2}}, "labels"); err != nil {
		t.Errorf("update of labels: %v", err)
	}
}

// records are image records in memory.
type records struct {
	images.Store
	byName map[string]images.Image
}

func (r *records) List(context.Context, ...string) ([]images.Image, error) {
	return slices.Collect(maps.Values(r.byName)), nil
}

func (r *records) Create(_ context.Context, i images.Image) (images.Image, error) {
	r.byName[i.Name] = i
	return i, nil
}

func (r *records) Update(_ context.Context, i images.Image, _ ...string) (images.Image, error) {
	return i, nil
}

func TestBadRules(t *testing.T) {
	t.Parallel()
	key := newSigner(t)
	private := filepath.Join(t.TempDir(), "cosign.key")
	if err := os.WriteFile(private, []byte("-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	require := Rule{Keys: []string{key.file}}
	for name, rules := range map[string]map[string]Rule{
		"no keys":               {"a.example": {}},
		"a mirror without root": {"a.example": {Identities: []Identity{{"i", "s"}}, TUFMirror: "https://tuf.example.com"}},
		"a mirror in the open":  {"a.example": {Identities: []Identity{{"i", "s"}}, TUFMirror: "http://tuf.example.com", TUFRoot: key.file}},
		"a root that is none":   {"a.example": {Identities: []Identity{{"i", "s"}}, TUFMirror: "https://tuf.example.com", TUFRoot: key.file}},
		"unknown local":         {"a.example": {Keys: []string{key.file}, Local: "maybe"}},
		"unknown policy":        {"a.example": {Policy: "maybe"}},
		"keys without use":      {"a.example": {Policy: Accept, Keys: []string{key.file}}},
		"identity without root": {"a.example": {Identities: []Identity{{"i", "s"}}}},
		"half an identity":      {"a.example": {Identities: []Identity{{"i", ""}}, TrustedRoot: key.file}},
		"bad expression":        {"a.example": {Identities: []Identity{{"~(", "s"}}, TrustedRoot: key.file}},
		"no key there":          {"a.example": {Keys: []string{"/nonexistent"}}},
		"a device":              {"a.example": {Keys: []string{"/dev/zero"}}},
		"a private key":         {"a.example": {Keys: []string{private}}},
		"a tag":                 {"a.example/x:1": require},
		"a digest":              {"a.example/x@" + image1.String(): require},
		"no registry":           {"library/alpine": require},
		"a word":                {"alpine": require},
		"a wildcard":            {"a.example/*": require},
		"twice":                 {"a.example": require, "A.example:443": require},
		"empty":                 {"": require},
	} {
		if _, err := NewPolicy(rules, ""); err == nil {
			t.Errorf("%s: was taken", name)
		}
	}
}

func FuzzSignature(f *testing.F) {
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json"}`), "c2ln", "", "")
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	v, err := signature.LoadVerifier(k.Public(), crypto.SHA256)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body []byte, sig, cert, bundle string) {
		for _, log := range []bool{false, true} {
			s := &search{r: &rule{keys: []key{{"k", v}}, log: log}, trusted: &root.BaseTrustedMaterial{}, want: image1}
			if got, err := s.bundle(body); err == nil {
				t.Errorf("%+v", got)
			}
			l := ocispec.Descriptor{Annotations: map[string]string{annotationSignature: sig, annotationCert: cert, annotationBundle: bundle}}
			if got, err := s.simple(l, body); err == nil {
				t.Errorf("%+v", got)
			}
		}
	})
}

// TestKeylessOlderForm has certificate and log's promise as annotations.
func TestKeylessOlderForm(t *testing.T) {
	t.Parallel()
	v, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	const subject, issuer = "release@example.com", "https://issuer.example.com"
	rule := Rule{Identities: []Identity{{issuer, subject}}, TrustedRoot: trustedRoot(t, v)}
	annotated := func(payload []byte) map[string]string {
		e, err := v.SignAtTime(subject, issuer, payload, time.Now().Add(5*time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		vc, err := e.VerificationContent()
		if err != nil {
			t.Fatal(err)
		}
		sc, err := e.SignatureContent()
		if err != nil {
			t.Fatal(err)
		}
		entries, err := e.TlogEntries()
		if err != nil {
			t.Fatal(err)
		}
		tle := entries[0].TransparencyLogEntry()
		promise := tlog.RekorPayload{Body: base64.StdEncoding.EncodeToString(tle.GetCanonicalizedBody()), IntegratedTime: tle.GetIntegratedTime(), LogIndex: tle.GetLogIndex(), LogID: hex.EncodeToString(tle.GetLogId().GetKeyId())}
		set, err := v.RekorSignPayload(promise)
		if err != nil {
			t.Fatal(err)
		}
		bundle, err := json.Marshal(map[string]any{"SignedEntryTimestamp": set, "Payload": promise})
		if err != nil {
			t.Fatal(err)
		}
		return map[string]string{
			annotationSignature: base64.StdEncoding.EncodeToString(sc.Signature()), annotationBundle: string(bundle),
			annotationCert: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: vc.Certificate().Raw})),
		}
	}
	for name, c := range map[string]struct {
		payload []byte
		change  func(map[string]string)
		ok      bool
	}{
		"good":              {simplePayload(image1, simpleType), nil, true},
		"another image":     {simplePayload(image2, simpleType), nil, false},
		"without the log":   {simplePayload(image1, simpleType), func(m map[string]string) { delete(m, annotationBundle) }, false},
		"a log's nonsense":  {simplePayload(image1, simpleType), func(m map[string]string) { m[annotationBundle] = "{}" }, false},
		"no certificate":    {simplePayload(image1, simpleType), func(m map[string]string) { m[annotationCert] = "x" }, false},
		"another signature": {simplePayload(image1, simpleType), func(m map[string]string) { m[annotationSignature] = "c2ln" }, false},
	} {
		p := newPlace()
		l := p.add(simpleSigning, c.payload)
		l.Annotations = annotated(c.payload)
		if c.change != nil {
			c.change(l.Annotations)
		}
		p.tags[strings.Replace(image1.String(), ":", "-", 1)+".sig"] = p.manifest(t, "", l)
		sig, err := Verify(context.Background(), rule, "app", image1, p)
		if c.ok != (err == nil) || c.ok && sig[0].Subject != subject {
			t.Errorf("%s: %+v %v", name, sig, err)
		}
	}
}
