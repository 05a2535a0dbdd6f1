package cli

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

func (a *app) loginCommand() *cobra.Command {
	var user, password string
	var fromStdin bool
	var verify bool
	var certDir, authFile string
	var getLogin bool
	cmd := &cobra.Command{Use: "login [OPTIONS] [REGISTRY]", Short: "Log in to a registry", Args: needArgs(0, 1, "at most one registry"),
		Long: `Log in to a registry (default: Docker Hub): ask it whether it takes the credentials, then
keep them where docker does: with the credential helper that ~/.docker/config.json names
(credHelpers, credsStore), else in that file, readable by you only, and not encrypted.`,
		Example: "  hako login registry.example.com\n  pass show registry | hako login -u me --password-stdin registry.example.com",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			server := ""
			if len(args) == 1 {
				server = args[0]
			}
			key := serverKey(server)
			conf, err := readDockerFile(authFile)
			if err != nil {
				return err
			}
			if getLogin {
				name, err := conf.user(key)
				if err == nil && name == "" {
					err = &exitError{exitGeneral, "not logged in to " + key}
				}
				if err == nil {
					fmt.Fprintln(a.Out, printable(name))
				}
				return err
			}
			switch {
			case fromStdin && password != "":
				return usage("--password and --password-stdin: choose one")
			case fromStdin && user == "":
				return usage("--password-stdin needs --username")
			case fromStdin:
				b, err := io.ReadAll(io.LimitReader(a.In, 64<<10))
				if err != nil {
					return err
				}
				password = strings.TrimRight(string(b), "\r\n")
			case password != "":
				fmt.Fprintln(a.Err, "hako: a password on the command line is seen by every user of this machine: use --password-stdin")
			}
			in := bufio.NewReader(a.In)
			if user == "" {
				if !isTerminal(a.In) {
					return &exitError{exitGeneral, "no terminal to ask at: use --username and --password-stdin"}
				}
				fmt.Fprint(a.Err, "Username: ")
				if user, err = in.ReadString('\n'); err != nil {
					return err
				}
				user = strings.TrimSpace(user)
			}
			if password == "" {
				if password, err = a.askPassword("Password: "); err != nil {
					return err
				}
			}
			if user == "" || password == "" {
				return &exitError{exitGeneral, "a username and a password are needed"}
			}
			images, err := a.images()
			if err != nil {
				return err
			}
			if err := images.Login(cmd.Context(), server, Access{Username: user, Password: password, Insecure: !verify, CertDir: certDir}); err != nil {
				return err
			}
			where, err := conf.store(key, user, password)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.Err, "Credentials are kept "+where)
			fmt.Fprintln(a.Out, "Login succeeded")
			return nil
		}}
	fs := cmd.Flags()
	fs.StringVarP(&user, "username", "u", "", "username")
	fs.StringVarP(&password, "password", "p", "", "password; others see it in the list of processes")
	fs.BoolVar(&fromStdin, "password-stdin", false, "read the password from standard input")
	fs.BoolVar(&verify, "tls-verify", true, "false: accept any certificate, and plain HTTP")
	fs.StringVar(&certDir, "cert-dir", "", "folder with *.crt, and NAME.cert with NAME.key")
	fs.StringVar(&authFile, "authfile", "", authFileHelp)
	fs.BoolVar(&getLogin, "get-login", false, "only print the name that is logged in")
	a.registryFlags(fs)
	return cmd
}

const authFileHelp = "file with the credentials (default: $REGISTRY_AUTH_FILE, else docker's config.json)"

func (a *app) logoutCommand() *cobra.Command {
	var all bool
	var authFile string
	cmd := &cobra.Command{Use: "logout [OPTIONS] [REGISTRY]", Short: "Forget the credentials for a registry", Args: needArgs(0, 1, "at most one registry"),
		Example: "  hako logout registry.example.com\n  hako logout --all",
		RunE: func(cmd *cobra.Command, args []string) error {
			conf, err := readDockerFile(authFile)
			if err != nil {
				return err
			}
			keys := []string{serverKey("")}
			if len(args) == 1 {
				if all {
					return usage("--all and a registry: choose one")
				}
				keys[0] = serverKey(args[0])
			}
			if all {
				keys = conf.servers()
			}
			for _, k := range keys {
				was, err := conf.erase(k)
				if err != nil {
					return err
				}
				if was {
					fmt.Fprintln(a.Out, "Removed the credentials for "+k)
				} else {
					fmt.Fprintln(a.Out, "Not logged in to "+k)
				}
			}
			return nil
		}}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "for all registries")
	cmd.Flags().StringVar(&authFile, "authfile", "", authFileHelp)
	return cmd
}

// serverKey is what docker files a registry under.
func serverKey(server string) string {
	host := server
	if _, rest, ok := strings.Cut(host, "://"); ok {
		host = rest
	}
	host, _, _ = strings.Cut(host, "/")
	switch host {
	case "", "docker.io", "index.docker.io", "registry-1.docker.io":
		return dockerHub
	}
	return host
}

// askPassword reads a line from the terminal without showing it.
func (a *app) askPassword(prompt string) (string, error) {
	fd, ok := fdOf(a.In)
	if !ok || !term.IsTerminal(fd) {
		return "", &exitError{exitGeneral, "no terminal to ask for the password at: use --password-stdin, or USER:PASSWORD"}
	}
	old, err := term.GetState(fd)
	if err != nil {
		return "", err
	}
	// Ctrl-C must not leave the terminal silent.
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, unix.SIGINT)
	defer signal.Stop(sig)
	go func() {
		if _, ok := <-sig; ok {
			_ = term.Restore(fd, old)
			fmt.Fprintln(a.Err)
			os.Exit(exitInterrupt)
		}
	}()
	fmt.Fprint(a.Err, prompt)
	b, err := term.ReadPassword(fd)
	signal.Stop(sig)
	close(sig)
	fmt.Fprintln(a.Err)
	return string(b), err
}

// dockerFile is docker's config.json; what is not about credentials stays as it is.
type dockerFile struct {
	path string
	doc  map[string]json.RawMessage
	dockerConfig
	auths map[string]map[string]any
}

func dockerDir() (string, error) {
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		return dir, nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(home, ".docker"), nil
}

// readDockerFile reads it, or another file of its form.
func readDockerFile(path string) (*dockerFile, error) {
	if path == "" {
		path = os.Getenv("REGISTRY_AUTH_FILE")
	}
	if path == "" {
		dir, err := dockerDir()
		if err != nil {
			return nil, err
		}
		path = filepath.Join(dir, "config.json")
	}
	f := &dockerFile{path: path, doc: map[string]json.RawMessage{}, auths: map[string]map[string]any{}}
	b, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return nil, err
	}
	for _, to := range []any{&f.doc, &f.dockerConfig} {
		if err := json.Unmarshal(b, to); err != nil {
			return nil, fmt.Errorf("read %s: %w", f.path, err)
		}
	}
	if raw := f.doc["auths"]; raw != nil {
		if err := json.Unmarshal(raw, &f.auths); err != nil {
			return nil, fmt.Errorf("read %s: auths: %w", f.path, err)
		}
	}
	return f, nil
}

func (f *dockerFile) helper(key string) string {
	if h := f.CredHelpers[key]; h != "" {
		return h
	}
	return f.CredsStore
}

func helperProgram(name string) (client.ProgramFunc, error) {
	if strings.ContainsAny(name, "/\\") {
		return nil, fmt.Errorf("bad name of a credential helper: %q", name)
	}
	return client.NewShellProgramFunc("docker-credential-" + name), nil
}

// store keeps credentials, and says where.
func (f *dockerFile) store(key, user, password string) (string, error) {
	if h := f.helper(key); h != "" {
		p, err := helperProgram(h)
		if err != nil {
			return "", err
		}
		if err := client.Store(p, &credentials.Credentials{ServerURL: key, Username: user, Secret: password}); err != nil {
			return "", fmt.Errorf("credential helper docker-credential-%s: %w", h, err)
		}
		// As docker does: an entry without a secret lists the registry.
		f.auths[key] = map[string]any{}
		return "by docker-credential-" + h, f.write()
	}
	f.auths[key] = map[string]any{"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}
	return "in " + f.path + ", not encrypted; a credential helper would do that", f.write()
}

// user gives the name that is logged in; "": none.
func (f *dockerFile) user(key string) (string, error) {
	if h := f.helper(key); h != "" {
		p, err := helperProgram(h)
		if err != nil {
			return "", err
		}
		got, err := client.Get(p, key)
		if credentials.IsErrCredentialsNotFound(err) {
			return "", nil
		}
		if err != nil {
			return "", fmt.Errorf("credential helper docker-credential-%s: %w", h, err)
		}
		return got.Username, nil
	}
	for k, v := range f.auths {
		if k != key && serverKey(k) != key {
			continue
		}
		if name, _ := v["username"].(string); name != "" {
			return name, nil
		}
		auth, _ := v["auth"].(string)
		plain, err := base64.StdEncoding.DecodeString(auth)
		if err != nil {
			return "", fmt.Errorf("%s: auths[%q].auth is not base64", f.path, k)
		}
		name, _, _ := strings.Cut(string(plain), ":")
		return name, nil
	}
	return "", nil
}

// erase forgets credentials, and says whether there were any.
func (f *dockerFile) erase(key string) (bool, error) {
	was := false
	if h := f.helper(key); h != "" {
		p, err := helperProgram(h)
		if err != nil {
			return false, err
		}
		if _, err := client.Get(p, key); err == nil {
			was = true
			if err := client.Erase(p, key); err != nil {
				return false, fmt.Errorf("credential helper docker-credential-%s: %w", h, err)
			}
		} else if !credentials.IsErrCredentialsNotFound(err) {
			return false, fmt.Errorf("credential helper docker-credential-%s: %w", h, err)
		}
	}
	changed := false
	for k := range f.auths {
		if k == key || serverKey(k) == key {
			delete(f.auths, k)
			was, changed = true, true
		}
	}
	if !changed {
		return was, nil
	}
	return was, f.write()
}

// servers are the registries with credentials.
func (f *dockerFile) servers() []string {
	all := map[string]bool{}
	for k := range f.auths {
		all[serverKey(k)] = true
	}
	for k := range f.CredHelpers {
		all[k] = true
	}
	return sortedKeys(all)
}

// write replaces the file. Only its owner may read it; through a symbolic link the file that
// it leads to is replaced.
func (f *dockerFile) write() error {
	raw, err := json.Marshal(f.auths)
	if err != nil {
		return err
	}
	f.doc["auths"] = raw
	b, err := json.MarshalIndent(f.doc, "", "\t")
	if err != nil {
		return err
	}
	path := f.path
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".config.json.*") // mode 0600
	if err != nil {
		return err
	}
	_, err = tmp.Write(append(b, '\n'))
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return nil
}
