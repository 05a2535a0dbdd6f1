package cli

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
	"github.com/moby/moby/api/types/registry"
)

// dockerConfig is the part of ~/.docker/config.json that names credentials.
type dockerConfig struct {
	Auths map[string]struct {
		Auth          string `json:"auth"`
		IdentityToken string `json:"identitytoken"`
	} `json:"auths"`
	CredsStore  string            `json:"credsStore"`
	CredHelpers map[string]string `json:"credHelpers"`
}

// dockerHub is the key under which docker keeps the credentials of docker.io.
const dockerHub = "https://index.docker.io/v1/"

// registryAuth gives the header value with the user's credentials for a registry, or "".
func registryAuth(host string) (string, error) {
	if host == "" {
		return "", nil
	}
	dir := os.Getenv("DOCKER_CONFIG")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", nil
		}
		dir = filepath.Join(home, ".docker")
	}
	path := filepath.Join(dir, "config.json")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	var conf dockerConfig
	if err := json.Unmarshal(b, &conf); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	key := host
	if host == "docker.io" {
		key = dockerHub
	}
	a, err := conf.lookup(key)
	if err != nil || a == nil {
		return "", err
	}
	a.ServerAddress = key
	j, err := json.Marshal(a)
	if err != nil {
		return "", err
	}
	return base64.URLEncoding.EncodeToString(j), nil
}

func (c *dockerConfig) lookup(key string) (*registry.AuthConfig, error) {
	helper := c.CredHelpers[key]
	if helper == "" {
		helper = c.CredsStore
	}
	if helper != "" {
		cred, err := client.Get(client.NewShellProgramFunc("docker-credential-"+helper), key)
		if credentials.IsErrCredentialsNotFound(err) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("ask credential helper docker-credential-%s for %s: %w", helper, key, err)
		}
		if cred.Username == "<token>" {
			return &registry.AuthConfig{IdentityToken: cred.Secret}, nil
		}
		return &registry.AuthConfig{Username: cred.Username, Password: cred.Secret}, nil
	}
	for k, e := range c.Auths {
		if k != key && strings.TrimSuffix(strings.TrimPrefix(strings.TrimPrefix(k, "https://"), "http://"), "/") != key {
			continue
		}
		if e.IdentityToken != "" {
			return &registry.AuthConfig{IdentityToken: e.IdentityToken}, nil
		}
		b, err := base64.StdEncoding.DecodeString(e.Auth)
		if err != nil {
			return nil, fmt.Errorf("credentials of %s in docker's config.json: %w", k, err)
		}
		user, pass, ok := strings.Cut(string(b), ":")
		if !ok {
			return nil, fmt.Errorf("credentials of %s in docker's config.json: no colon", k)
		}
		return &registry.AuthConfig{Username: user, Password: strings.TrimRight(pass, "\x00")}, nil
	}
	return nil, nil
}
