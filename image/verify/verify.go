// Package verify checks signatures of images: cosign's, made with keys or with
// certificates of Fulcio's for an identity (keyless), as bundles that refer to the image and
// in the older form under a tag.
//
// In flow rules of an administrator, the name and the digest that will be pulled, and what
// the registry has about it, which is hostile; out flows who signed, or an error that says
// what is missing. The cryptography is sigstore's.
package verify

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sigstore/sigstore-go/pkg/root"
	sigverify "github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/hako-engine/hako/image/transport"
)

// What a rule may say.
const (
	Require = "require" // a signature by one of the keys or identities
	Warn    = "warn"    // the same, but its lack is only logged
	Accept  = "accept"  // anything: an exception to a wider rule
	Reject  = "reject"  // nothing
)

// What a rule may say of images that did not come from the registry.
const (
	LocalSame   = "same"   // what the policy says
	LocalAccept = "accept" // anything
)

// Any is the prefix that stands for every registry.
const Any = "*"

const (
	maxKeyFile = 1 << 20
	maxRules   = 10_000
)

// Rule says what images need. The fields are those of the configuration file.
type Rule struct {
	Policy      string     `toml:"policy,omitempty"`       // "": require
	Keys        []string   `toml:"keys,omitempty"`         // files with public keys (PEM)
	Identities  []Identity `toml:"identities,omitempty"`   // of keyless signatures
	TrustedRoot string     `toml:"trusted-root,omitempty"` // file: sigstore's trusted_root.json; needed for identities, unless a mirror has it
	// TUFMirror is where trusted_root.json is kept up to date by The Update Framework: the
	// address of a repository (https, http on this machine, or file); TUFRoot is the file
	// root.json that it is trusted by, of any version.
	TUFMirror string `toml:"tuf-mirror,omitempty"`
	TUFRoot   string `toml:"tuf-root,omitempty"`
	// Log asks for an entry in a transparency log of the trusted root for signatures by keys, too.
	Log bool `toml:"transparency-log,omitempty"`
	// Local is for images that are loaded, imported, committed or tagged under the prefix;
	// "": same.
	Local string `toml:"local,omitempty"`
}

// Identity is who signed without a key of their own. A value that begins with ~ is a
// regular expression, which has to match the whole text.
type Identity struct {
	Issuer  string `toml:"issuer"`
	Subject string `toml:"subject"`
}

// Signature is a good one.
type Signature struct {
	Kind    string `json:"kind"`              // "bundle" or "simple signing"
	Key     string `json:"key,omitempty"`     // file
	Issuer  string `json:"issuer,omitempty"`  // of the identity
	Subject string `json:"subject,omitempty"` // the identity
	Time    string `json:"time,omitempty"`    // that a log or an authority vouches for, RFC 3339
}

// Error says that an image may not be used. Its class is errdefs.ErrPermissionDenied.
type Error struct {
	Name    string // of the image
	Digest  digest.Digest
	Prefix  string // of the rule
	Rejects bool   // the rule takes no image at all
	Local   bool   // it was not pulled, but is to have a name that the rule is for
	Found   int    // signatures that were looked at
	Reasons []string
}

func (e *Error) Error() string {
	where := "the rule for " + e.Prefix
	if e.Prefix == "" {
		where = "what was asked for"
	}
	what, local := "image "+e.Name, ""
	if e.Local {
		what, local = "the name "+e.Name+" for an image", `, or let what is made here have such names (local = "accept" in the rule)`
	}
	if e.Rejects {
		return fmt.Sprintf("%s is refused: %s takes no images%s", what, where, strings.Replace(local, ", or let", ": let", 1))
	}
	why := "it has no signature"
	if e.Found > 0 {
		why = fmt.Sprintf("none of its %d signatures is good", e.Found)
	}
	if len(e.Reasons) > 0 {
		why += " (" + strings.Join(e.Reasons, "; ") + ")"
	}
	return fmt.Sprintf("%s with digest %s is refused: %s, and %s requires one: have it signed (cosign sign --key KEY %s@%s), or change the rule ([verify] in hakod's configuration)%s",
		what, e.Digest, why, where, e.Name, e.Digest, local)
}

// Unwrap gives the class.
func (e *Error) Unwrap() error { return errdefs.ErrPermissionDenied }

// SignatureRejected marks the error for those who tell it from other refusals.
func (e *Error) SignatureRejected() bool { return true }

// rule is a Rule with its keys read.
type rule struct {
	prefix     string
	policy     string
	local      bool // what was not pulled needs no signature
	keys       []key
	identities sigverify.CertificateIdentities
	trusted    trust // nil: none
	log        bool
}

type key struct {
	file string
	v    signature.Verifier
}

// Policy is a set of rules. It does not change.
type Policy struct{ rules map[string]*rule }

// NewPolicy reads the files that rules name. Prefixes are a registry, or a registry and the
// beginning of a repository's path, up to a slash; "*" is every image.
//
// cache is a folder for what mirrors of trusted roots have sent; "" keeps nothing.
func NewPolicy(rules map[string]Rule, cache string) (*Policy, error) {
	if len(rules) > maxRules {
		return nil, fmt.Errorf("more than %d rules: %w", maxRules, errdefs.ErrResourceExhausted)
	}
	p := &Policy{rules: map[string]*rule{}}
	for _, prefix := range slices.Sorted(maps.Keys(rules)) {
		norm, err := normalPrefix(prefix)
		if err != nil {
			return nil, fmt.Errorf("verify: %q: %w", prefix, err)
		}
		if p.rules[norm] != nil {
			return nil, fmt.Errorf("verify: %q and %q are the same: %w", prefix, p.rules[norm].prefix, errdefs.ErrInvalidArgument)
		}
		if p.rules[norm], err = readRule(prefix, rules[prefix], cache); err != nil {
			return nil, fmt.Errorf("verify: %q: %w", prefix, err)
		}
	}
	return p, nil
}

// normalPrefix spells a prefix as scope spells names.
func normalPrefix(prefix string) (string, error) {
	if prefix == Any {
		return Any, nil
	}
	domain, path, _ := strings.Cut(strings.TrimSuffix(prefix, "/"), "/")
	if path == "" {
		path = "x"
		n, err := reference.ParseNormalizedNamed(domain + "/" + path)
		if err != nil || !strings.EqualFold(reference.Domain(n), domain) && !isHub(domain) {
			return "", fmt.Errorf("not a registry: write registry.example.com or registry.example.com/team: %w", errdefs.ErrInvalidArgument)
		}
		return normalDomain(domain), nil
	}
	n, err := reference.ParseNormalizedNamed(domain + "/" + path)
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if !reference.IsNameOnly(n) {
		return "", fmt.Errorf("a rule is for repositories, and holds for all of their tags: %w", errdefs.ErrInvalidArgument)
	}
	if !strings.EqualFold(reference.Domain(n), domain) && !isHub(domain) {
		return "", fmt.Errorf("it begins with no registry: write docker.io/%s: %w", prefix, errdefs.ErrInvalidArgument)
	}
	if isHub(domain) {
		return "docker.io/" + path, nil // docker.io/library means all of it, and no library/library
	}
	return normalDomain(reference.Domain(n)) + "/" + reference.Path(n), nil
}

func isHub(domain string) bool {
	return slices.Contains([]string{"docker.io", "index.docker.io", "registry-1.docker.io"}, strings.ToLower(domain))
}

// normalDomain has one spelling for the names of one registry: hosts do not differ by case,
// and 443 is the port that is meant without one.
func normalDomain(d string) string {
	d = strings.ToLower(d)
	if isHub(strings.TrimSuffix(d, ":443")) {
		return "docker.io"
	}
	return strings.TrimSuffix(d, ":443")
}

func readRule(prefix string, r Rule, cache string) (*rule, error) {
	out := &rule{prefix: prefix, policy: r.Policy, local: r.Local == LocalAccept, log: r.Log}
	if r.Local != "" && r.Local != LocalSame && r.Local != LocalAccept {
		return nil, fmt.Errorf("local %q is neither %s nor %s: %w", r.Local, LocalSame, LocalAccept, errdefs.ErrInvalidArgument)
	}
	switch r.Policy {
	case "":
		out.policy = Require
	case Require, Warn, Accept, Reject:
	default:
		return nil, fmt.Errorf("policy %q is not one of %s, %s, %s, %s: %w", r.Policy, Require, Warn, Accept, Reject, errdefs.ErrInvalidArgument)
	}
	for _, file := range r.Keys {
		v, err := readKey(file)
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", file, err)
		}
		out.keys = append(out.keys, key{file, v})
	}
	for _, id := range r.Identities {
		ci, err := id.matcher()
		if err != nil {
			return nil, err
		}
		out.identities = append(out.identities, ci)
	}
	if r.TrustedRoot != "" {
		raw, err := readFile(r.TrustedRoot)
		if err != nil {
			return nil, fmt.Errorf("trusted-root: %w", err)
		}
		t, err := root.NewTrustedRootFromJSON(raw)
		if err != nil {
			return nil, fmt.Errorf("trusted-root %s: %w: %w", r.TrustedRoot, err, errdefs.ErrInvalidArgument)
		}
		out.trusted = fileTrust{t}
	}
	if r.TUFMirror != "" || r.TUFRoot != "" {
		if r.TrustedRoot != "" {
			return nil, fmt.Errorf("trusted-root and tuf-mirror: choose one: %w", errdefs.ErrInvalidArgument)
		}
		m, err := newMirror(r.TUFMirror, r.TUFRoot, cache)
		if err != nil {
			return nil, err
		}
		out.trusted = m
	}
	checks := out.policy == Require || out.policy == Warn
	switch {
	case checks && len(out.keys)+len(out.identities) == 0:
		return nil, fmt.Errorf("policy %s needs keys or identities: %w", out.policy, errdefs.ErrInvalidArgument)
	case !checks && len(out.keys)+len(out.identities) > 0:
		return nil, fmt.Errorf("policy %s takes no keys and no identities: %w", out.policy, errdefs.ErrInvalidArgument)
	case out.trusted == nil && (len(out.identities) > 0 || out.log):
		return nil, fmt.Errorf("identities and transparency-log need trusted-root, the file trusted_root.json of the sigstore that signs (cosign trusted-root create), or tuf-mirror and tuf-root: %w", errdefs.ErrInvalidArgument)
	}
	return out, nil
}

func readFile(name string) ([]byte, error) {
	st, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxKeyFile {
		return nil, fmt.Errorf("%s: not a regular file of at most %d bytes: %w", name, maxKeyFile, errdefs.ErrInvalidArgument)
	}
	return os.ReadFile(name)
}

func readKey(file string) (signature.Verifier, error) {
	raw, err := readFile(file)
	if err != nil {
		return nil, err
	}
	if bytes.Contains(raw, []byte("PRIVATE KEY")) {
		return nil, fmt.Errorf("a private key: verifying takes the public one (cosign public-key): %w", errdefs.ErrInvalidArgument)
	}
	pub, err := cryptoutils.UnmarshalPEMToPublicKey(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	v, err := signature.LoadVerifier(pub, crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return v, nil
}

func (id Identity) matcher() (sigverify.CertificateIdentity, error) {
	var exact, expr [2]string
	for i, s := range []string{id.Issuer, id.Subject} {
		if s == "" {
			return sigverify.CertificateIdentity{}, fmt.Errorf("an identity needs an issuer and a subject: %w", errdefs.ErrInvalidArgument)
		}
		e, ok := strings.CutPrefix(s, "~")
		if !ok {
			exact[i] = s
			continue
		}
		if _, err := regexp.Compile(e); err != nil {
			return sigverify.CertificateIdentity{}, fmt.Errorf("identity: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		expr[i] = "^(?:" + e + ")$"
	}
	ci, err := sigverify.NewShortCertificateIdentity(exact[0], expr[0], exact[1], expr[1])
	if err != nil {
		return ci, fmt.Errorf("identity: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return ci, nil
}

// find gives the rule with the longest prefix of a repository's name; nil: none.
func (p *Policy) find(name reference.Named) *rule {
	scope := normalDomain(reference.Domain(name)) + "/" + reference.Path(name)
	for {
		if r := p.rules[scope]; r != nil {
			return r
		}
		i := strings.LastIndexByte(scope, '/')
		if i < 0 {
			return p.rules[Any]
		}
		scope = scope[:i]
	}
}

// Applies says whether a rule asks for anything of images of this name.
func (p *Policy) Applies(name reference.Named) bool {
	r := p.find(name)
	return r != nil && r.policy != Accept
}

// Check decides whether the image with a digest may be pulled by a name: d is the document
// that the pull begins with, an index or a manifest. src is the repository. It gives the
// first good signature; none if no rule asks. warn is set where the rule only warns.
//
// Errors: *Error; those of reading signatures, which refuse the image as well.
func (p *Policy) Check(ctx context.Context, name reference.Named, d ocispec.Descriptor, src transport.Source) (sig []Signature, warn error, err error) {
	r := p.find(name)
	if r == nil || r.policy == Accept {
		return nil, nil, nil
	}
	if r.policy == Reject {
		return nil, nil, &Error{Name: reference.FamiliarName(name), Digest: d.Digest, Prefix: r.prefix, Rejects: true}
	}
	sig, err = r.check(ctx, reference.FamiliarName(name), d.Digest, src)
	if err != nil && r.policy == Warn {
		return nil, err, nil
	}
	return sig, nil, err
}

// CheckLocal decides whether an image that was not pulled by a name (it was loaded,
// imported, committed, or has another name) may have it. It is as Check; open gives the
// repository, and is only called if that has to be asked.
func (p *Policy) CheckLocal(ctx context.Context, name reference.Named, d ocispec.Descriptor, open func(reference.Named) (transport.Source, error)) (sig []Signature, warn error, err error) {
	r := p.find(name)
	if r == nil || r.policy == Accept || r.local {
		return nil, nil, nil
	}
	if r.policy != Reject {
		src, err := open(name)
		if err != nil {
			return nil, nil, err
		}
		defer src.Close()
		sig, warn, err = p.Check(ctx, name, d, src)
		return sig, warn, local(err)
	}
	sig, warn, err = p.Check(ctx, name, d, nil)
	return sig, warn, local(err)
}

// local says in a refusal that it is about a name.
func local(err error) error {
	var refused *Error
	if errors.As(err, &refused) {
		refused.Local = true
	}
	return err
}

// Verify checks by one rule, whatever the name.
func Verify(ctx context.Context, want Rule, name string, d digest.Digest, src transport.Source) ([]Signature, error) {
	r, err := readRule("", want, "")
	if err != nil {
		return nil, err
	}
	return r.check(ctx, name, d, src)
}
