package cli

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"flag"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/hako-engine/hako/internal/version"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (rewrite with -update if the change is meant):\n--- got\n%s\n--- want\n%s", path, got, want)
	}
}

func parseRun(t *testing.T, args ...string) (any, error) {
	t.Helper()
	var f containerFlags
	fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
	fs.SetInterspersed(false)
	f.register(fs)
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	o, err := f.parse(fs.Args())
	return o, err
}

func TestRunFlags(t *testing.T) {
	t.Setenv("FROM_OUTSIDE", "yes")
	for name, args := range map[string][]string{
		"plain": {"alpine"},
		"full": {"--name", "web", "-it", "--rm", "-e", "A=1", "-e", "FROM_OUTSIDE", "-e", "NOT_SET_ANYWHERE", "-l", "role=web", "--entrypoint", "sh", "-w", "/src", "-u", "1000:1000",
			"-h", "box", "-p", "127.0.0.1:8080:80", "-p", "9000-9001:9000-9001/udp", "--expose", "7000-7002", "-v", "/a:/b:ro", "-v", "data:/data", "-v", "/anon",
			"--mount", "type=bind,src=/x,dst=/y,readonly,bind-propagation=rslave", "--mount", "type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=1777", "--tmpfs", "/tmp:size=1m",
			"-m", "512m", "--memory-swap", "-1", "--cpus", "1.5", "--pids-limit", "100", "--cap-add", "NET_ADMIN", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
			"--ulimit", "nofile=1024:2048", "--device", "/dev/null:/dev/zero2:r", "--sysctl", "net.core.somaxconn=128", "--restart", "on-failure:3", "--stop-timeout", "3", "--health-cmd", "true", "--health-interval", "5s",
			"--network", "name=back,alias=w,ip=10.0.0.5", "--network", "front", "--network-alias", "w2", "--add-host", "db:1.2.3.4", "--dns", "1.1.1.1", "--log-opt", "max-size=1m", "--shm-size", "128m", "alpine", "-c", "echo --rm"},
	} {
		t.Run(name, func(t *testing.T) {
			o, err := parseRun(t, args...)
			if err != nil {
				t.Fatal(err)
			}
			b, err := json.MarshalIndent(o, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, "run-"+name+".json", append(b, '\n'))
		})
	}
}

func TestRunFlagsRefused(t *testing.T) {
	for _, tc := range []struct{ args, want string }{
		{"--memory lots", "--memory"}, {"--cpus NaN", "--cpus"}, {"--cpus -1", "--cpus"}, {"-p 99999:80", "--publish"}, {"-p 1.2.3:80:80", "--publish"}, {"--restart always:3", "--restart"}, {"--restart sometimes", "--restart"},
		{"--mount type=bind,src=/a", "no target"}, {"--mount type=tmpfs,dst=/a,bind-propagation=shared", "bind mount"}, {"--mount dst=/a,nonsense=1", "unknown key"}, {"-v rel", "absolute"}, {"--device :x", "--device"},
		{"--ulimit nofile", "--ulimit"}, {"--attach nothing", "--attach"}, {"--network a --network a", "twice"}, {"--ip 1.2.3", "--ip"}, {"--ip ::1", "--ip"}, {"--mac-address zz", "--mac-address"}, {"--pull often", "--pull"}, {"--platform a/b/c/d", "--platform"},
		{"--no-healthcheck --health-cmd true", "--no-healthcheck"}, {"--env =x", "variable"}, {"--dns one.one", "--dns"}, {"--security-opt seccomp=/nowhere/at/all", "seccomp"}, {"--device-read-bps /dev/sda", "--device-read-bps"}, {"--tmpfs tmp", "--tmpfs"},
	} {
		_, err := parseRun(t, append(strings.Fields(tc.args), "image")...)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want an error with %q", tc.args, err, tc.want)
		}
	}
}

func TestLayoutFitsTheTerminal(t *testing.T) {
	lines := [][]string{{"NAME", "COMMAND"}, {"web", strings.Repeat("x", 100)}, {"datenbank-ü", "y"}}
	for line := range strings.SplitSeq(strings.TrimSuffix(layout(lines, 60), "\n"), "\n") {
		if n := len([]rune(line)); n > 60 {
			t.Errorf("%d columns: %q", n, line)
		}
	}
	full := strings.Repeat("0123456789", 6)
	lines = append(lines, []string{full, strings.Repeat("x", 100)})
	if got := layout(lines, 60); !strings.Contains(got, full+"   xxxxxxxxx…\n") {
		t.Errorf("a name is cut, or the rest is not:\n%s", got)
	}
	if got := layout(lines, 0); !strings.Contains(got, strings.Repeat("x", 100)) {
		t.Error("cut although there is no terminal")
	}
}

func TestDetachKeys(t *testing.T) {
	for _, tc := range []struct {
		in, out  string
		detached bool
	}{
		{"hello", "hello", false}, {"a\x10b", "a\x10b", false}, {"a\x10\x11b", "a", true}, {"\x10\x10\x11", "\x10", true}, {"\x10", "", false}, {"", "", false},
	} {
		r := &detachReader{r: strings.NewReader(tc.in), keys: []byte{16, 17}}
		got, err := io.ReadAll(r)
		if string(got) != tc.out || (err == errDetached) != tc.detached {
			t.Errorf("%q: got %q, %v", tc.in, got, err)
		}
	}
	if keys, err := parseDetachKeys("ctrl-a,x,ctrl-]"); err != nil || !bytes.Equal(keys, []byte{1, 'x', 0x1d}) {
		t.Errorf("got %v, %v", keys, err)
	}
	for _, bad := range []string{"ctrl-", "ctrl-ab", "ab", "ctrl-1", "a,,b"} {
		if _, err := parseDetachKeys(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestCopiedArchiveStaysInItsFolder(t *testing.T) {
	dir := t.TempDir()
	into, outside := filepath.Join(dir, "into"), filepath.Join(dir, "outside")
	for _, d := range []string{into, outside} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "d/link", Typeflag: tar.TypeSymlink, Linkname: outside},
		{Name: "../../outside/a", Typeflag: tar.TypeReg, Mode: 0o644},
		{Name: outside + "/b", Typeflag: tar.TypeReg, Mode: 0o644},
		{Name: "d/ok", Typeflag: tar.TypeReg, Mode: 0o600},
	} {
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	tw.Close()
	if err := untarInto(into, "d", "", &b); err != nil {
		t.Fatal(err)
	}
	b.Reset()
	tw = tar.NewWriter(&b)
	tw.WriteHeader(&tar.Header{Name: "d/link/c", Typeflag: tar.TypeReg, Mode: 0o644})
	tw.Close()
	// The link leads to the folder of that name below the destination, which the first archive made.
	if err := untarInto(into, "d", "", &b); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(into, outside, "c")); err != nil {
		t.Error(err)
	}
	left, err := os.ReadDir(outside)
	if err != nil || len(left) != 0 {
		t.Errorf("outside holds %v, %v", left, err)
	}
	if st, err := os.Stat(filepath.Join(into, "d", "ok")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
}

func TestTarTreeKeepsHardLinks(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "b")); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := tarTree(&b, dir, "top", false); err != nil {
		t.Fatal(err)
	}
	var names []string
	for tr := tar.NewReader(&b); ; {
		h, err := tr.Next()
		if err != nil {
			break
		}
		names = append(names, h.Name+"="+string(h.Typeflag)+h.Linkname)
	}
	if want := []string{"top/=5", "top/a=0", "top/b=1top/a"}; !slices.Equal(names, want) {
		t.Errorf("got %q, want %q", names, want)
	}
}

// daemon serves canned answers on a unix socket and gives its address.
func daemon(t *testing.T, answers map[string]string) string {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "d.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.50")
		w.Header().Set("Content-Type", "application/json")
		for route, body := range answers {
			method, path, _ := strings.Cut(route, " ")
			if r.Method == method && strings.HasSuffix(r.URL.Path, path) {
				if strings.HasPrefix(body, "404 ") {
					w.WriteHeader(http.StatusNotFound)
					body = `{"message":"` + body[4:] + `"}`
				}
				io.WriteString(w, body)
				return
			}
		}
		if !strings.HasSuffix(r.URL.Path, "/_ping") {
			w.WriteHeader(http.StatusInternalServerError)
			io.WriteString(w, `{"message":"unexpected `+r.Method+" "+r.URL.Path+`"}`)
		}
	}))
	srv.Listener = l
	srv.Start()
	t.Cleanup(srv.Close)
	return "unix://" + sock
}

func runCLI(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errb bytes.Buffer
	code = Main(args, Streams{In: strings.NewReader(""), Out: &out, Err: &errb}, Options{})
	return code, out.String(), errb.String()
}

func TestCommandsAgainstADaemon(t *testing.T) {
	host := daemon(t, map[string]string{
		"GET /containers/json":      `[{"Id":"0123456789abcdef0123","Names":["/web"],"Image":"nginx","Command":"nginx -g x","Created":1,"State":"running","Status":"Up 2 hours","Ports":[{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":8080,"Type":"tcp"}],"Labels":{"a":"b"}}]`,
		"POST /containers/web/stop": ``,
		"POST /containers/no/stop":  `404 No such container: no`,
		"GET /volumes":              `{"Volumes":[{"Name":"v1","Driver":"local"}]}`,
		"DELETE /images/x":          `[{"Untagged":"x:latest"},{"Deleted":"sha256:1"}]`,
		"GET /containers/gone/json": `404 No such container: gone`,
		"GET /images/gone/json":     `404 No such image: gone`,
		"GET /networks/gone":        `404 network gone not found`,
		"GET /volumes/gone":         `404 get gone: no such volume`,
	})
	for _, tc := range []struct {
		args     string
		code     int
		out, err string
	}{
		{"ps --format {{.ID}}|{{.Names}}|{{.Ports}}|{{.Label\x00\"a\"}}", 0, "0123456789ab|web|0.0.0.0:8080->80/tcp|b\n", ""},
		{"ps -q --no-trunc", 0, "0123456789abcdef0123\n", ""},
		{"stop web no", 1, "web\n", "No such container: no"},
		{"volume ls -q", 0, "v1\n", ""},
		{"rmi x", 0, "Untagged: x:latest\nDeleted: sha256:1\n", ""},
		{"inspect gone", 1, "[]\n", "no such object: gone"},
		{"ps --format {{.Nope}}", 125, "", "Fields: .Command"},
		{"logs", 1, "", "needs one container"},
		{"rn", 1, "", "did you mean"},
		{"ps --bad", 125, "", "unknown flag: --bad"},
		{"run", 125, "", "needs an image"},
	} {
		args := strings.Fields(tc.args)
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "\x00", " ")
		}
		code, out, errs := runCLI(t, append([]string{"--host", host}, args...)...)
		if code != tc.code || out != tc.out || !strings.Contains(errs, tc.err) {
			t.Errorf("hako %s: exit %d, want %d\nstdout %q\nwant   %q\nstderr %q, want %q in it", tc.args, code, tc.code, out, tc.out, errs, tc.err)
		}
	}
}

func TestNoDaemonIsExplained(t *testing.T) {
	code, _, errs := runCLI(t, "--host", "unix:///nowhere/hako.sock", "ps")
	if code != 1 || !strings.Contains(errs, "no socket /nowhere/hako.sock") || !strings.Contains(errs, "hakod") {
		t.Errorf("exit %d, %q", code, errs)
	}
	if code, _, errs := runCLI(t, "--host", "unix:///nowhere/hako.sock", "run", "x"); code != 125 {
		t.Errorf("exit %d, %q", code, errs)
	}
}

func TestVersionFlagNeedsNoDaemon(t *testing.T) {
	for _, flag := range []string{"--version", "-v"} {
		code, out, errs := runCLI(t, "--host", "unix:///nowhere/hako.sock", flag)
		if want := "hako " + version.Version + "\n"; code != 0 || out != want || errs != "" {
			t.Errorf("%s: exit %d, %q, %q; want %q", flag, code, out, errs, want)
		}
	}
}

func TestAddressOrder(t *testing.T) {
	a := &app{}
	t.Setenv("HAKO_HOST", "")
	t.Setenv("DOCKER_HOST", "")
	if got := a.address(); got != "unix:///run/hako/docker.sock" {
		t.Error(got)
	}
	t.Setenv("DOCKER_HOST", "unix:///d")
	if got := a.address(); got != "unix:///d" {
		t.Error(got)
	}
	t.Setenv("HAKO_HOST", "unix:///h")
	if got := a.address(); got != "unix:///h" {
		t.Error(got)
	}
	a.host = "/f"
	if got := a.address(); got != "unix:///f" {
		t.Error(got)
	}
}

func TestEveryCommandHasHelp(t *testing.T) {
	a := &app{Streams: Streams{Out: io.Discard, Err: io.Discard}}
	root := a.root()
	for _, name := range strings.Fields("run create start stop restart kill pause unpause rm ps logs exec attach inspect top stats cp diff wait rename update images pull push tag rmi save load history commit import volume network events info version system doctor completion") {
		c, _, err := root.Find([]string{name})
		if err != nil || c == root || c.Short == "" {
			t.Errorf("no command %s, or no help for it: %v", name, err)
			continue
		}
		if code, out, errs := runCLI(t, name, "--help"); code != 0 || !strings.Contains(out, "Usage:") {
			t.Errorf("hako %s --help: exit %d, %q %q", name, code, out, errs)
		}
	}
}

func TestCompletionScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if code, out, _ := runCLI(t, "completion", shell); code != 0 || !strings.Contains(out, "hako") {
			t.Errorf("%s: exit %d", shell, code)
		}
	}
	if code, _, _ := runCLI(t, "completion", "csh"); code == 0 {
		t.Error("csh was taken")
	}
}

func TestRegistryAuth(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	write := func(s string) {
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if a, err := registryAuth("docker.io"); a != "" || err != nil {
		t.Errorf("without a file: %q, %v", a, err)
	}
	write(`{"auths":{"https://index.docker.io/v1/":{"auth":"dTpw"},"localhost:5000":{"auth":"bm9jb2xvbg=="}}}`)
	if a, err := registryAuth("docker.io"); err != nil || a == "" {
		t.Errorf("%q, %v", a, err)
	}
	if a, err := registryAuth("other.example"); a != "" || err != nil {
		t.Errorf("credentials for another host: %q, %v", a, err)
	}
	if _, err := registryAuth("localhost:5000"); err == nil || strings.Contains(err.Error(), "nocolon") {
		t.Errorf("got %v", err)
	}
	write(`{`)
	if _, err := registryAuth("docker.io"); err == nil {
		t.Error("broken JSON was taken")
	}
}

func TestDoctorFindsTheKernel(t *testing.T) {
	for release, want := range map[string][2]int{"6.1.0-13-amd64": {6, 1}, "5.15.0": {5, 15}, "6.18.44-fc": {6, 18}} {
		if ma, mi, ok := parseRelease(release); !ok || [2]int{ma, mi} != want {
			t.Errorf("%s: %d.%d %v", release, ma, mi, ok)
		}
	}
	if f := checkKernel(); f.Status == "" || f.Detail == "" {
		t.Errorf("%+v", f)
	}
	if got := existing("/proc/nothing/here"); got != "/proc" {
		t.Error(got)
	}
}

// TestDoctorLooksAtTheDaemonsDisk: at the one that the user names, else at the one of the daemon that answers.
func TestDoctorLooksAtTheDaemonsDisk(t *testing.T) {
	t.Setenv("DOCKER_API_VERSION", "")
	host, silent := daemon(t, map[string]string{"GET /info": `{"DockerRootDir":"/elsewhere"}`}), daemon(t, nil)
	for want, args := range map[string][]string{
		"/elsewhere":    {"--host", host, "doctor"},
		"/var/lib/hako": {"--host", silent, "doctor"},
		"/mine":         {"--host", host, "doctor", "--root", "/mine"},
	} {
		if _, out, errs := runCLI(t, args...); !strings.Contains(out, " free for "+want+"\n") {
			t.Errorf("%q: %s%s", args, out, errs)
		}
	}
}
