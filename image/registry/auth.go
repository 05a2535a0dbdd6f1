package registry

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/docker/docker-credential-helpers/client"
	helpers "github.com/docker/docker-credential-helpers/credentials"
)

const (
	// hubKey is what docker login files Docker Hub under.
	hubKey        = "https://index.docker.io/v1/"
	tokenUsername = "<token>" // of a credential helper: the secret is an identity token
	maxConfig     = 4 << 20
)

// dockerConfig is the part of docker's config.json that is about credentials
// (docs.docker.com/reference/cli/docker, "Configuration files").
type dockerConfig struct {
	Auths map[string]struct {
		Auth          string `json:"auth"`
		Username      string `json:"username"`
		Password      string `json:"password"`
		IdentityToken string `json:"identitytoken"`
		RegistryToken string `json:"registrytoken"`
	} `json:"auths"`
	CredsStore  string            `json:"credsStore"`
	CredHelpers map[string]string `json:"credHelpers"`
}

// credentials finds what to tell a host: what the client gave, if the host belongs to the
// registry that it gave it for; else what docker's config.json has for that very host.
func (c *Client) credentials(domain, host string, given Credentials) (Credentials, error) {
	if !given.empty() {
		if belongs(domain, host) {
			return given, nil
		}
		return Credentials{}, nil
	}
	if c.o.Ask != nil {
		return c.o.Ask(host)
	}
	if c.o.Anonymous {
		return Credentials{}, nil
	}
	dir := c.o.DockerConfig
	if dir == "" {
		dir = os.Getenv("DOCKER_CONFIG")
	}
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil && c.o.AuthFile == "" {
			return Credentials{}, nil // a daemon without a home has no config either
		}
		dir = filepath.Join(home, ".docker")
	}
	name := filepath.Join(dir, "config.json")
	if c.o.AuthFile != "" {
		name = c.o.AuthFile
	}
	st, err := os.Stat(name)
	if errors.Is(err, os.ErrNotExist) && c.o.AuthFile == "" {
		return Credentials{}, nil
	}
	if err == nil && (!st.Mode().IsRegular() || st.Size() > maxConfig) {
		err = fmt.Errorf("not a regular file of at most %d bytes: %w", maxConfig, errdefs.ErrInvalidArgument)
	}
	var b []byte
	if err == nil {
		b, err = os.ReadFile(name)
	}
	if err != nil {
		return Credentials{}, fmt.Errorf("read %s: %w", name, err)
	}
	cred, err := fromConfig(b, host, func(program string) string { return program })
	if err != nil {
		return Credentials{}, fmt.Errorf("%s: %w", name, err)
	}
	return cred, nil
}

// fromConfig finds a host's credentials. Its errors never hold them. find says where a
// credential helper is; a bare name is looked up in $PATH.
func fromConfig(b []byte, host string, find func(program string) string) (Credentials, error) {
	var cfg dockerConfig
	if err := json.Unmarshal(b, &cfg); err != nil {
		return Credentials{}, fmt.Errorf("not valid JSON: %w", errdefs.ErrInvalidArgument)
	}
	keys := []string{host, "https://" + host, "http://" + host, "https://" + host + "/", "https://" + host + "/v1/", "https://" + host + "/v2/"}
	if belongs(dockerHub, host) {
		keys = []string{hubKey, "index.docker.io", dockerHub, dockerHubHost}
	}
	for _, k := range keys {
		if h, ok := cfg.CredHelpers[k]; ok {
			return fromHelper(h, k, find)
		}
	}
	if cfg.CredsStore != "" {
		if cred, err := fromHelper(cfg.CredsStore, keys[0], find); err != nil || !cred.empty() {
			return cred, err
		}
	}
	for _, k := range keys {
		a, ok := cfg.Auths[k]
		if !ok {
			continue
		}
		cred := Credentials{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}
		if a.Auth != "" {
			plain, err := base64.StdEncoding.DecodeString(a.Auth)
			if err != nil {
				return Credentials{}, fmt.Errorf("auths[%q].auth is not base64: %w", k, errdefs.ErrInvalidArgument)
			}
			user, pass, ok := strings.Cut(string(plain), ":")
			if !ok {
				return Credentials{}, fmt.Errorf("auths[%q].auth is not user:password: %w", k, errdefs.ErrInvalidArgument)
			}
			cred.Username, cred.Password = user, strings.TrimRight(pass, "\x00")
		}
		return cred, nil
	}
	return Credentials{}, nil
}

// fromHelper asks a docker-credential-* program.
func fromHelper(helper, server string, find func(string) string) (Credentials, error) {
	if helper == "" || strings.ContainsAny(helper, "/\\") {
		return Credentials{}, fmt.Errorf("credential helper %q: %w", helper, errdefs.ErrInvalidArgument)
	}
	got, err := client.Get(client.NewShellProgramFunc(find("docker-credential-"+helper)), server)
	if err != nil {
		if helpers.IsErrCredentialsNotFound(err) {
			return Credentials{}, nil
		}
		return Credentials{}, fmt.Errorf("credential helper docker-credential-%s: %w", helper, err)
	}
	if got.Username == tokenUsername {
		return Credentials{IdentityToken: got.Secret}, nil
	}
	return Credentials{Username: got.Username, Password: got.Secret}, nil
}
