package cli

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"
)

// VerifyRequest asks whether an image is signed.
type VerifyRequest struct {
	Ref    string
	Access Access
	Keys   []string // files with public keys
	// Identities of keyless signatures: issuer and subject; both with a leading "~" are regular expressions.
	Identities  []Identity
	TrustedRoot string // file with the certificates of Fulcio and of logs; needed for identities
	// TUFMirror keeps such a file, and is trusted by the file TUFRoot.
	TUFMirror, TUFRoot string
	Policy             string // configuration file of the daemon to take the rules from
	RegistryDir        string // certs.d
}

// Identity is who signed without a key of their own.
type Identity struct{ Issuer, Subject string }

// Verifier checks signatures.
type Verifier func(ctx context.Context, r VerifyRequest) (report json.RawMessage, err error)

func (a *app) imageVerifyCommand() *cobra.Command {
	var r VerifyRequest
	var issuers, subjects []string
	var format string
	var acc accessFlags
	cmd := &cobra.Command{Use: "verify [OPTIONS] IMAGE", Short: "Check an image's signatures", Args: needArgs(1, 1, "one image"),
		Long: `Check that an image is signed by one of the keys, or by one of the identities (keyless: a
certificate of Fulcio's for an OpenID account, recorded in a transparency log). Signatures
are cosign's: bundles that refer to the image, and those under the tag sha256-DIGEST.sig.
The name is one in a registry; what is checked is the digest that it has there now, which is printed.

The daemon checks by itself before it pulls, where its configuration says so: see
docs/image-tools.md.`,
		Example: `  hako image verify --key cosign.pub registry.example.com/app:1
  hako image verify --certificate-identity https://github.com/o/r/.github/workflows/release.yml@refs/heads/main \
    --certificate-oidc-issuer https://token.actions.githubusercontent.com --trusted-root trusted_root.json ghcr.io/o/r:1
  hako image verify --policy /etc/hako/config.toml registry.example.com/team/app:1`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if len(issuers) != len(subjects) {
				return usage("--certificate-identity and --certificate-oidc-issuer go together")
			}
			for i := range issuers {
				r.Identities = append(r.Identities, Identity{issuers[i], subjects[i]})
			}
			if len(r.Keys) == 0 && len(r.Identities) == 0 && r.Policy == "" {
				return usage("signed by whom? Name --key, an identity, or --policy")
			}
			if r.Access, err = acc.access(a); err != nil {
				return err
			}
			if a.Options.Verify == nil {
				return &exitError{exitGeneral, "this build verifies no signatures"}
			}
			r.Ref = args[0]
			if a.registryDir != "" {
				r.RegistryDir = a.registryDir
			}
			rep, err := a.Options.Verify(cmd.Context(), r)
			if err != nil {
				return err
			}
			if format != "" {
				var v any
				if err := json.Unmarshal(rep, &v); err != nil {
					return err
				}
				return inspectPrint(a.Out, []any{v}, format)
			}
			var v struct {
				Name, Digest string
				Signatures   []struct{ Kind, Key, Issuer, Subject, Time string }
			}
			if err := json.Unmarshal(rep, &v); err != nil {
				return err
			}
			for _, s := range v.Signatures {
				by := "key " + s.Key
				if s.Subject != "" {
					by = s.Subject + " (" + s.Issuer + ")"
				}
				if s.Time != "" {
					by += " at " + s.Time
				}
				fmt.Fprintf(a.Err, "Signed by %s, %s\n", printable(by), s.Kind)
			}
			fmt.Fprintln(a.Out, v.Digest)
			return nil
		}}
	fs := cmd.Flags()
	fs.StringArrayVar(&r.Keys, "key", nil, "file with a public key, PEM; may be repeated")
	fs.StringArrayVar(&subjects, "certificate-identity", nil, "who signed without a key: an e-mail address or URI; ~ and a regular expression")
	fs.StringArrayVar(&issuers, "certificate-oidc-issuer", nil, "who vouches for that identity: a URL; ~ and a regular expression")
	fs.StringVar(&r.TrustedRoot, "trusted-root", "", "file with the certificates of Fulcio and logs (trusted_root.json) for keyless signatures and logs")
	fs.StringVar(&r.TUFMirror, "tuf-mirror", "", "address (https or file) of a TUF repository that has trusted_root.json, instead")
	fs.StringVar(&r.TUFRoot, "tuf-root", "", "file root.json that the repository is trusted by")
	fs.StringVar(&r.Policy, "policy", "", "take keys and identities from the [verify] rules of this configuration file of hakod")
	fs.StringVarP(&format, "format", "f", "", `"json" or a Go template`)
	acc.register(fs, "", "registry")
	return cmd
}
