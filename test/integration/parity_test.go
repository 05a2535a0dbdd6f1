package integration

import (
	"strings"
	"testing"
)

// TestParity holds what was once different from Docker: each line was found by giving
// the same command line to both.
func TestParity(t *testing.T) {
	t.Parallel()
	n := shared(t)
	peer := n.name(t, "-peer")
	n.docker(t, "run", "-d", "--name", peer, "--hostname", "peerhost", testImage, "sleep", "1000")
	stopped := n.name(t, "-stopped")
	n.docker(t, "create", "--name", stopped, testImage, "true")
	for name, tt := range map[string]struct {
		args []string
		code int
		want string // in stdout or stderr
	}{
		"empty entrypoint":             {[]string{"--entrypoint", "", testImage}, 125, "no command specified"},
		"empty entrypoint and command": {[]string{"--entrypoint", "", testImage, "echo", "ran"}, 0, "ran\n"},
		"host ipc":                     {[]string{"--ipc", "host", testImage, "readlink", "/proc/self/ns/ipc"}, 0, readlink(t, "/proc/self/ns/ipc")},
		"link":                         {[]string{"--link", peer + ":al", testImage, "grep", "-o", "al peerhost " + peer, "/etc/hosts"}, 0, "al peerhost " + peer + "\n"},
		"link to nothing":              {[]string{"--link", "no-such-container", testImage, "true"}, 125, "could not get container for no-such-container: No such container: no-such-container"},
		"link to a stopped container":  {[]string{"--link", stopped, testImage, "true"}, 125, "Cannot link to a non running container: /" + stopped},
		"host name with dots":          {[]string{"--hostname", "a.b", "--domainname", "c", testImage, "sh", "-c", "cat /etc/hostname; tail -1 /etc/hosts"}, 0, "\ta.b.c a\n"},
		"localhost of IPv6":            {[]string{testImage, "grep", "^::1", "/etc/hosts"}, 0, "localhost ip6-localhost ip6-loopback"},
		"dockerenv":                    {[]string{testImage, "sh", "-c", "test -f /.dockerenv && echo here"}, 0, "here\n"},
		"cpus and quota":               {[]string{"--cpus", "1", "--cpu-quota", "1000", testImage, "true"}, 125, "Nano CPUs and CPU Quota cannot both be set"},
		"tmpfs option":                 {[]string{"--tmpfs", "/t:bogus=1", testImage, "true"}, 125, `invalid tmpfs option ["bogus" "1"]`},
		"tmpfs options":                {[]string{"--tmpfs", "/t:rw,exec,size=1m,mode=1770,uid=1000,noatime", testImage, "stat", "-c", "%a %u", "/t"}, 0, "1770 1000\n"},
		"init":                         {[]string{"--init", testImage, "cat", "/proc/1/comm"}, 0, "docker-init\n"},
		"init and exit code":           {[]string{"--init", testImage, "sh", "-c", "exit 9"}, 9, ""},
		"init and no command":          {[]string{"--init", testImage, "no-such-command"}, 127, "no-such-command"},
		"init and user":                {[]string{"--init", "-u", "user", "-t", testImage, "id", "-u"}, 0, "1000"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n.expect(t, tt.code, tt.want, append([]string{"run", "--rm"}, tt.args...)...)
		})
	}
	t.Run("exec", func(t *testing.T) {
		r := n.expect(t, 127, `OCI runtime exec failed: exec failed: unable to start container process: exec: "nosuch": executable file not found in $PATH`, "exec", peer, "nosuch")
		if strings.Contains(r.out, "start process") {
			t.Error(r)
		}
	})
	t.Run("kill", func(t *testing.T) {
		n.expect(t, 1, "cannot kill container: no-such-container: No such container: no-such-container", "kill", "no-such-container")
	})
	t.Run("pull", func(t *testing.T) {
		r := n.expect(t, 1, "Error response from daemon: ", "pull", "127.0.0.1:1/no/such")
		if strings.Contains(r.out, "Pulling from") {
			t.Error(r)
		}
	})
	t.Run("diff", func(t *testing.T) {
		if out := n.docker(t, "diff", peer); out != "" {
			t.Errorf("changes of a container that did nothing: %s", out)
		}
	})
	t.Run("network disconnect of a stopped container", func(t *testing.T) {
		net := strings.ReplaceAll(t.Name(), "/", "-")
		n.docker(t, "network", "create", net)
		t.Cleanup(func() { n.run(nil, "network", "rm", net) })
		name := n.name(t, "")
		n.docker(t, "create", "--name", name, "--network", net, "--network-alias", "web", testImage, "true")
		networks := func() string {
			return n.docker(t, "inspect", "-f", "{{range $n, $s := .NetworkSettings.Networks}}{{$n}} {{$s.Aliases}};{{end}}", name)
		}
		if got, want := networks(), net+" [web];"; got != want {
			t.Errorf("networks %q, want %q", got, want)
		}
		n.docker(t, "network", "disconnect", net, name)
		n.docker(t, "network", "connect", "bridge", name)
		n.docker(t, "network", "disconnect", "bridge", name)
		if got := networks(); got != "" {
			t.Errorf("networks %q after disconnect", got)
		}
		n.docker(t, "network", "connect", "--alias", "again", net, name)
		if got, want := networks(), net+" [again];"; got != want {
			t.Errorf("networks %q, want %q", got, want)
		}
	})
	t.Run("cp of a volume", func(t *testing.T) {
		name := n.name(t, "")
		n.docker(t, "run", "--name", name, "-v", "/data", testImage, "touch", "/data/f")
		if r := n.run(nil, "cp", name+":/data", "-"); r.code != 0 || !strings.Contains(r.out, "data/\x00") {
			t.Errorf("the archive does not hold data/: %d %q", r.code, clip(r.out))
		}
	})
}
