package cli

import (
	"regexp"
	"strings"
	"testing"
)

// TestHabits holds what users of docker type without thinking.
func TestHabits(t *testing.T) {
	t.Setenv("DOCKER_API_VERSION", "")
	host := daemon(t, map[string]string{
		"GET /containers/json":      `[{"Id":"0123456789abcdef0123","Names":["/web"],"Image":"nginx"}]`,
		"GET /containers/web/json":  `{"Id":"0123","Name":"/web","HostConfig":{"NanoCpus":1500000000123}}`,
		"POST /containers/prune":    `{"ContainersDeleted":["c1"],"SpaceReclaimed":1}`,
		"POST /images/prune":        `{"ImagesDeleted":[{"Deleted":"i1"}],"SpaceReclaimed":2}`,
		"POST /volumes/prune":       `{"SpaceReclaimed":3}`,
		"POST /networks/prune":      `{}`,
		"GET /images/json":          `[]`,
		"DELETE /images/x":          `[{"Untagged":"x:latest"}]`,
		"DELETE /containers/web":    ``,
		"GET /images/web/json":      `404 No such image: web`,
		"GET /containers/gone/json": `404 No such container: gone`,
	})
	for _, tt := range []struct {
		args     string
		code     int
		out, err string
	}{
		{"container prune -f", 0, "Deleted containers:\nc1\n", ""},
		{"container prune -f --filter label=x", 0, "Deleted containers:\nc1\n", ""},
		{"container prune", 0, "Go on? [y/N]", ""},
		{"image prune -f", 0, "i1", ""},
		{"system prune -f --volumes", 0, "Deleted containers:\nc1\n\nDeleted images:\ndeleted: i1\n\nTotal reclaimed space: 6B\n", ""},
		{"container ls -q", 0, "0123456789ab\n", ""},
		{"container ps -q", 0, "0123456789ab\n", ""},
		{"container list -q", 0, "0123456789ab\n", ""},
		{"image ls -q", 0, "", ""},
		{"image images -q", 0, "", ""},
		{"image list -q", 0, "", ""},
		{"image rm x", 0, "Untagged: x:latest\n", ""},
		{"image rmi x", 0, "Untagged: x:latest\n", ""},
		{"inspect -f {{.Id}} web", 0, "0123\n", ""},
		{"inspect -f {{.ID}} web", 0, "0123\n", ""},
		{"container inspect -f {{.Id}} web", 0, "0123\n", ""},
		{"container inspect --type image web", 125, "", "unknown flag: --type"},
		{"container inspect x", 1, "[]\n", ""},
		{"inspect -f {{.Id}}/{{.HostConfig.NanoCpus}} web", 0, "0123/1500000000123\n", ""},
		{"inspect -f {{.Nope}} web", 125, "", "can't evaluate field Nope"},
		{"nosuch --help", 1, "", `"nosuch" is not a hako command`},
		{"help nosuch", 1, "", `"nosuch" is not a hako command`},
		{"help image nosuch", 1, "", `"nosuch" is not a hako image command`},
		{"help image ls", 0, "List images", ""},
		{"container nosuch --help", 1, "", `"nosuch" is not a hako container command`},
		{"volume nosuch -h", 1, "", `"nosuch" is not a hako volume command`},
		{"run --help", 0, "Usage:\n  hako run [OPTIONS] IMAGE", ""},
		{"--help", 0, "Usage:\n  hako [OPTIONS] COMMAND\n\n", ""},
		{"container --help", 0, "Usage:\n  hako container COMMAND\n\n", ""},
		{"container ls --help", 0, "Usage:\n  hako container ls [OPTIONS]\n", ""},
		{"version --client", 0, "1.56 (at most)", ""},
		{"__completeNoDesc stop w", 0, "web\n:4\n", ""},
		{"__completeNoDesc stop x", 0, ":4\n", ""},
		{"__completeNoDesc exec web l", 0, ":0\n", ""},
		{"__completeNoDesc network connect x w", 0, "web\n:4\n", ""},
	} {
		code, out, errs := runCLI(t, append([]string{"--host", host}, strings.Fields(tt.args)...)...)
		if code != tt.code || !strings.Contains(out, tt.out) || !strings.Contains(errs, tt.err) || tt.err != "" && out != "" {
			t.Errorf("hako %s: exit %d, want %d\nstdout %q\nwant   %q\nstderr %q, want %q in it", tt.args, code, tt.code, out, tt.out, errs, tt.err)
		}
	}
	_, _, errs := runCLI(t, "--host", host, "--debug", "ps")
	if !regexp.MustCompile(`(?m)^hako: debug: GET /v1\.50/containers/json: 200 OK after [0-9.]+[mµ]?s$`).MatchString(errs) {
		t.Errorf("--debug: %q", errs)
	}
}
