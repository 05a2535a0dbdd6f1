package verify

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	sigverify "github.com/sigstore/sigstore-go/pkg/verify"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/transport"
)

const (
	// maxSignatures bounds how many signatures of one image are looked at.
	maxSignatures = 64
	maxPayload    = 1 << 20 // bytes of a signed document or bundle

	simpleSigning = "application/vnd.dev.cosign.simplesigning.v1+json"
	simpleReferer = "application/vnd.dev.cosign.artifact.sig.v1+json"
	simpleType    = "cosign container image signature"
	bundlePrefix  = "application/vnd.dev.sigstore.bundle"
	// signPredicate is what a statement says that is a signature of an image, and no
	// attestation about it (cosign's specs/BUNDLE_SPEC.md).
	signPredicate = "https://sigstore.dev/cosign/sign/v1"

	annotationSignature = "dev.cosignproject.cosign/signature"
	annotationCert      = "dev.sigstore.cosign/certificate"
	annotationChain     = "dev.sigstore.cosign/chain"
	annotationBundle    = "dev.sigstore.cosign/bundle"
)

// search is one check of one image.
type search struct {
	r       *rule
	src     transport.Source
	want    digest.Digest
	trusted root.TrustedMaterial // nil: none
	found   int
	reasons []string
}

// check looks for a good signature.
func (r *rule) check(ctx context.Context, name string, d digest.Digest, src transport.Source) ([]Signature, error) {
	if err := manifest.ValidDigest(d); err != nil {
		return nil, err
	}
	s := &search{r: r, src: src, want: d}
	if r.trusted != nil {
		var err error
		if s.trusted, err = r.trusted.material(ctx); err != nil {
			return nil, fmt.Errorf("verify %s: %w", name, err)
		}
	}
	list, err := src.Referrers(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("look for signatures of %s: %w", name, err)
	}
	for _, ref := range list {
		if !strings.HasPrefix(ref.ArtifactType, bundlePrefix) && ref.ArtifactType != simpleReferer {
			continue
		}
		raw, err := src.Document(ctx, ref)
		if err != nil {
			return nil, fmt.Errorf("read signature %s of %s: %w", ref.Digest, name, err)
		}
		if sig, err := s.document(ctx, ref, raw); sig != nil || err != nil {
			return sig, err
		}
	}
	// The tag of the digest: cosign's way before registries knew referrers.
	ref, raw, err := src.Tagged(ctx, strings.Replace(d.String(), ":", "-", 1)+".sig")
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		return nil, fmt.Errorf("look for signatures of %s: %w", name, err)
	default:
		if sig, err := s.document(ctx, ref, raw); sig != nil || err != nil {
			return sig, err
		}
	}
	return nil, &Error{Name: name, Digest: d, Prefix: r.prefix, Found: s.found, Reasons: s.reasons}
}

// note keeps why a signature is no good.
func (s *search) note(err error) {
	text := printable(err.Error())
	if len(text) > 300 {
		text = text[:300] + "..."
	}
	if len(s.reasons) < 3 {
		s.reasons = append(s.reasons, text)
	}
}

func printable(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f {
			return ' '
		}
		return c
	}, strings.ToValidUTF8(s, "?"))
}

// document looks at a manifest with signatures as its layers. Errors are those of reading.
func (s *search) document(ctx context.Context, ref ocispec.Descriptor, raw []byte) ([]Signature, error) {
	doc, err := manifest.Parse("signature "+ref.Digest.String(), ref.MediaType, raw)
	if err != nil || doc.Manifest == nil {
		s.found++
		s.note(errors.Join(err, errors.New("not a manifest")))
		return nil, nil
	}
	for _, l := range doc.Manifest.Layers {
		simple, isBundle := l.MediaType == simpleSigning, strings.HasPrefix(l.MediaType, bundlePrefix)
		if !simple && !isBundle {
			continue
		}
		if s.found++; s.found > maxSignatures {
			s.note(fmt.Errorf("more than %d signatures: the rest was not looked at", maxSignatures))
			return nil, nil
		}
		body, err := transport.ReadBlob(ctx, s.src, l, maxPayload)
		if err != nil {
			if errdefs.IsUnavailable(err) || ctx.Err() != nil {
				return nil, err
			}
			s.note(err)
			continue
		}
		var sig *Signature
		if simple {
			sig, err = s.simple(l, body)
		} else {
			sig, err = s.bundle(body)
		}
		if err != nil {
			s.note(err)
			continue
		}
		return []Signature{*sig}, nil
	}
	return nil, nil
}

// payload is what cosign signs in its older form (cosign's specs/SIGNATURE_SPEC.md).
type payload struct {
	Critical struct {
		Image struct {
			Digest digest.Digest `json:"docker-manifest-digest"`
		} `json:"image"`
		Type string `json:"type"`
	} `json:"critical"`
}

// simple checks a signature of the older form.
func (s *search) simple(l ocispec.Descriptor, body []byte) (*Signature, error) {
	sig, err := base64.StdEncoding.DecodeString(l.Annotations[annotationSignature])
	if err != nil || len(sig) == 0 {
		return nil, errors.New("a signature is missing, or not base64")
	}
	got, err := s.signedBy(l, body, sig)
	if err != nil {
		return nil, err
	}
	// Only now are the contents somebody's word.
	var p payload
	if _, err := manifest.TopLevel(body); err != nil {
		return nil, fmt.Errorf("what was signed: %w", err)
	}
	if err := json.Unmarshal(body, &p); err != nil {
		return nil, fmt.Errorf("what was signed: %w", err)
	}
	if p.Critical.Type != simpleType {
		return nil, fmt.Errorf("what was signed is a %q", p.Critical.Type)
	}
	if p.Critical.Image.Digest != s.want {
		return nil, fmt.Errorf("a signature of another image, %s", p.Critical.Image.Digest)
	}
	got.Kind = "simple signing"
	return got, nil
}

// signedBy finds who signed a payload.
func (s *search) signedBy(l ocispec.Descriptor, body, sig []byte) (*Signature, error) {
	cert := l.Annotations[annotationCert]
	var last error
	if !s.r.log {
		for _, k := range s.r.keys {
			if last = k.v.VerifySignature(bytes.NewReader(sig), bytes.NewReader(body)); last == nil {
				return &Signature{Key: k.file}, nil
			}
		}
	} else if len(s.r.keys) > 0 {
		b, err := legacyBundle(l, body, sig, false)
		if err != nil {
			return nil, err
		}
		for _, k := range s.r.keys {
			var out *Signature
			if out, last = s.byKey(b, k, sigverify.WithArtifact(bytes.NewReader(body))); last == nil {
				return out, nil
			}
		}
	}
	if cert != "" && len(s.r.identities) > 0 {
		b, err := legacyBundle(l, body, sig, true)
		if err != nil {
			return nil, err
		}
		return s.byIdentity(b, sigverify.WithArtifact(bytes.NewReader(body)))
	}
	if last == nil {
		last = errors.New("a signature with a key, where only identities count")
	}
	return nil, last
}

// bundle checks a bundle of sigstore's.
func (s *search) bundle(body []byte) (*Signature, error) {
	b := &bundle.Bundle{}
	if err := b.UnmarshalJSON(body); err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	sum, err := hex.DecodeString(s.want.Encoded())
	if err != nil {
		return nil, err
	}
	content, err := b.SignatureContent()
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	env := content.EnvelopeContent()
	if env == nil {
		return nil, errors.New("bundle without a statement")
	}
	verification, err := b.VerificationContent()
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	artifact := sigverify.WithArtifactDigest(s.want.Algorithm().String(), sum)
	var got *Signature
	if verification.Certificate() != nil {
		if len(s.r.identities) == 0 {
			return nil, errors.New("a keyless signature, where only keys count")
		}
		got, err = s.byIdentity(b, artifact)
	} else {
		err = errors.New("a signature with a key, where only identities count")
		for _, k := range s.r.keys {
			if got, err = s.byKey(b, k, artifact); err == nil {
				break
			}
		}
	}
	if err != nil {
		return nil, err
	}
	// An attestation is signed by the same people, and says nothing of what may run.
	statement, err := env.Statement()
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	if statement.GetPredicateType() != signPredicate {
		return nil, fmt.Errorf("a statement of type %s, which is no signature", statement.GetPredicateType())
	}
	got.Kind = "bundle"
	return got, nil
}

// byKey checks a bundle with one key.
func (s *search) byKey(b *bundle.Bundle, k key, artifact sigverify.ArtifactPolicyOption) (*Signature, error) {
	ours := root.NewTrustedPublicKeyMaterial(func(string) (root.TimeConstrainedVerifier, error) {
		return root.NewExpiringKey(k.v, time.Time{}, time.Time{}), nil
	})
	trusted := root.TrustedMaterialCollection{ours}
	options := []sigverify.VerifierOption{sigverify.WithNoObserverTimestamps()}
	if s.r.log {
		trusted = append(trusted, s.trusted)
		options = []sigverify.VerifierOption{sigverify.WithTransparencyLog(1), sigverify.WithObserverTimestamps(1)}
	}
	v, err := sigverify.NewVerifier(trusted, options...)
	if err != nil {
		return nil, err
	}
	res, err := v.Verify(b, sigverify.NewPolicy(artifact, sigverify.WithKey()))
	if err != nil {
		return nil, err
	}
	return &Signature{Key: k.file, Time: when(res)}, nil
}

// byIdentity checks a bundle with a certificate.
func (s *search) byIdentity(b *bundle.Bundle, artifact sigverify.ArtifactPolicyOption) (*Signature, error) {
	options := []sigverify.VerifierOption{sigverify.WithObserverTimestamps(1)}
	if len(s.trusted.RekorLogs()) > 0 {
		options = append(options, sigverify.WithTransparencyLog(1))
	}
	if len(s.trusted.CTLogs()) > 0 {
		options = append(options, sigverify.WithSignedCertificateTimestamps(1))
	}
	v, err := sigverify.NewVerifier(s.trusted, options...)
	if err != nil {
		return nil, err
	}
	var policy []sigverify.PolicyOption
	for _, id := range s.r.identities {
		policy = append(policy, sigverify.WithCertificateIdentity(id))
	}
	res, err := v.Verify(b, sigverify.NewPolicy(artifact, policy...))
	if err != nil {
		return nil, err
	}
	c := res.Signature.Certificate
	return &Signature{Issuer: c.Issuer, Subject: c.SubjectAlternativeName, Time: when(res)}, nil
}

func when(res *sigverify.VerificationResult) string {
	if len(res.VerifiedTimestamps) == 0 {
		return ""
	}
	return res.VerifiedTimestamps[0].Timestamp.UTC().Format(time.RFC3339)
}

// legacyBundle makes a bundle of what annotations of the older form say.
func legacyBundle(l ocispec.Descriptor, body, sig []byte, withCert bool) (*bundle.Bundle, error) {
	material := map[string]any{}
	if withCert {
		var certs []map[string]string
		for rest := []byte(l.Annotations[annotationCert] + "\n" + l.Annotations[annotationChain]); ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil || len(certs) > 10 {
				break
			}
			certs = append(certs, map[string]string{"rawBytes": base64.StdEncoding.EncodeToString(block.Bytes)})
		}
		if len(certs) == 0 {
			return nil, errors.New("a certificate that is none")
		}
		material["x509CertificateChain"] = map[string]any{"certificates": certs}
	} else {
		material["publicKey"] = map[string]string{"hint": ""}
	}
	if text := l.Annotations[annotationBundle]; text != "" {
		entry, err := legacyEntry(text)
		if err != nil {
			return nil, err
		}
		material["tlogEntries"] = []any{entry}
	}
	doc := map[string]any{
		"mediaType":            "application/vnd.dev.sigstore.bundle+json;version=0.1",
		"verificationMaterial": material,
		"messageSignature": map[string]any{
			"messageDigest": map[string]string{"algorithm": "SHA2_256", "digest": base64.StdEncoding.EncodeToString(sum256(body))},
			"signature":     base64.StdEncoding.EncodeToString(sig),
		},
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return nil, err
	}
	b := &bundle.Bundle{}
	if err := b.UnmarshalJSON(raw); err != nil {
		return nil, fmt.Errorf("signature: %w", err)
	}
	return b, nil
}

func sum256(b []byte) []byte {
	h := digest.SHA256.Hash()
	_, _ = h.Write(b) // a hash does not fail
	return h.Sum(nil)
}

// legacyEntry turns the log's promise of the older form into the newer.
func legacyEntry(text string) (any, error) {
	var old struct {
		SignedEntryTimestamp string
		Payload              struct {
			Body           string `json:"body"`
			IntegratedTime int64  `json:"integratedTime"`
			LogIndex       int64  `json:"logIndex"`
			LogID          string `json:"logID"`
		}
	}
	if err := json.Unmarshal([]byte(text), &old); err != nil {
		return nil, fmt.Errorf("entry of the log: %w", err)
	}
	id, err := hex.DecodeString(old.Payload.LogID)
	if err != nil {
		return nil, fmt.Errorf("entry of the log: %w", err)
	}
	raw, err := base64.StdEncoding.DecodeString(old.Payload.Body)
	if err != nil {
		return nil, fmt.Errorf("entry of the log: %w", err)
	}
	var kind struct{ Kind, APIVersion string }
	if err := json.Unmarshal(raw, &kind); err != nil {
		return nil, fmt.Errorf("entry of the log: %w", err)
	}
	return map[string]any{
		"logIndex": strconv.FormatInt(old.Payload.LogIndex, 10), "integratedTime": strconv.FormatInt(old.Payload.IntegratedTime, 10),
		"logId":             map[string]string{"keyId": base64.StdEncoding.EncodeToString(id)},
		"kindVersion":       map[string]string{"kind": kind.Kind, "version": kind.APIVersion},
		"inclusionPromise":  map[string]string{"signedEntryTimestamp": old.SignedEntryTimestamp},
		"canonicalizedBody": old.Payload.Body,
	}, nil
}
