package integration

import (
	"encoding/json"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestBadInput gives the daemon what people get wrong: each has a clear message that names
// the object, the right code, and leaves nothing behind.
func TestBadInput(t *testing.T) {
	t.Parallel()
	n := shared(t)
	taken := n.name(t, "-taken")
	n.docker(t, "create", "--name", taken, testImage)
	id := n.docker(t, "inspect", "-f", "{{.Id}}", taken)
	for _, tt := range []struct {
		args string
		code int
		want string
	}{
		{"run --rm IMG nope", 127, `exec: "nope": executable file not found in $PATH`},
		{"run --rm IMG /nope", 127, `no such file or directory`},
		{"run --rm IMG /etc/noexec", 126, `permission denied`},
		{"run --rm IMG /etc", 126, `/etc`},
		{"run --rm -w /etc/passwd IMG true", 125, `not a directory`},
		{"run --rm --pull never nope:latest", 125, "No such image: nope:latest"},
		{"run --rm --name TAKEN IMG", 125, `Conflict. The container name "/TAKEN" is already in use by container "` + id + `". You have to remove (or rename) that container to be able to reuse that name.`},
		{"run --rm --name bad/name IMG", 125, `Invalid container name (bad/name), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed`},
		{"run --rm -u nobody-here IMG", 125, "unable to find user nobody-here"},
		{"run --rm --memory 1m IMG", 125, "Minimum memory limit allowed is 6MB"},
		{"run --rm --cap-add FLY IMG", 125, "FLY"},
		{"run --rm --sysctl kernel.domainname=x --uts host IMG", 125, "kernel.domainname"},
		{"run --rm --restart always --rm IMG", 125, ""},
		{"run --rm --network nope-net IMG", 125, "network nope-net not found"},
		{"run --rm --network container:nope IMG", 125, "No such container: nope"},
		{"run --rm -v x/y:/z IMG", 125, "includes invalid characters for a local volume name"},
		{"run --rm -v /a:/ IMG", 125, "destination can't be '/'"},
		{"run --rm --runtime nope IMG", 125, "unknown or invalid runtime name: nope"},
		{"run --rm --device /dev/nope IMG", 127, "/dev/nope"},
		{"run --rm --log-driver nope IMG", 125, "nope"},
		{"run --rm --stop-signal FOO IMG", 125, "FOO"},
		{"inspect nope", 1, "No such object: nope"},
		{"start nope", 1, "No such container: nope"},
		{"stop nope", 1, "No such container: nope"},
		{"rm nope", 1, "No such container: nope"},
		{"logs nope", 1, "No such container: nope"},
		{"rmi nope", 1, "No such image: nope:latest"},
		{"tag nope x", 1, "No such image: nope:latest"},
		{"tag IMG BAD", 1, "invalid reference format"},
		{"pull BAD", 1, "invalid reference format"},
		{"kill -s NOPE TAKEN", 1, "NOPE"},
		{"volume rm nope", 1, "no such volume"},
		{"network rm nope", 1, "network nope not found"},
		{"volume create a/b", 1, "includes invalid characters"},
		{"ps --filter nope=x", 1, "invalid filter 'nope'"},
		{"build .", 1, ""},
	} {
		args := strings.Fields(strings.NewReplacer("IMG", testImage, "TAKEN", taken).Replace(tt.args))
		t.Run(tt.args, func(t *testing.T) {
			n.expect(t, tt.code, strings.ReplaceAll(tt.want, "TAKEN", taken), args...)
		})
	}
	for _, tt := range []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"POST", "/containers/create", `{"Image":`, 400, "invalid JSON"},
		{"POST", "/containers/create", `{"Image":"` + testImage + `"} x`, 400, "unexpected content after the value"},
		{"POST", "/containers/create", `{"Image":"nope"}`, 404, "No such image: nope"},
		{"POST", "/containers/create", `{"Image":"` + testImage + `","HostConfig":{"PortBindings":{"80/tcp":[{"HostPort":"x"}]}}}`, 400, "invalid port specification"},
		{"POST", "/containers/create?name=" + taken, `{"Image":"` + testImage + `"}`, 409, "Conflict"},
		{"GET", "/containers/nope/json", "", 404, "No such container: nope"},
		{"POST", "/containers/" + taken + "/kill", "", 409, "is not running"},
		{"POST", "/containers/" + taken + "/exec", `{"Cmd":["true"]}`, 409, "is not running"},
		{"POST", "/containers/" + taken + "/pause", "", 409, "is not running"},
		{"POST", "/exec/nope/start", `{}`, 404, "No such exec instance: nope"},
		{"GET", "/images/nope/json", "", 404, "No such image: nope"},
		{"POST", "/images/create?fromImage=BAD", "", 400, "invalid reference format"},
		{"POST", "/images/load", "not a tar", 400, ""},
		{"GET", "/volumes/nope", "", 404, "no such volume"},
		{"GET", "/networks/nope", "", 404, "network nope not found"},
		{"POST", "/networks/create", `{"Name":"bridge"}`, 409, "already exists"},
		{"GET", "/nothing", "", 404, "page not found"},
	} {
		code, body, err := n.request(tt.method, tt.path, strings.NewReader(tt.body), "Content-Type", "application/json")
		if err != nil || code != tt.code || !strings.Contains(body, tt.want) || !strings.HasPrefix(body, `{"message":"`) {
			t.Errorf("%s %s: %d %s %v, want %d %q", tt.method, tt.path, code, body, err, tt.code, tt.want)
		}
	}
}

// TestErrorTexts asks the API for what cannot be: the text is the sentence that says what
// is wrong, once, without the class that the status says already.
func TestErrorTexts(t *testing.T) {
	t.Parallel()
	n := sharedWithout(t)
	name, taken, network := n.name(t, "-a"), n.name(t, "-b"), "texts-"+n.bridge
	post := func(path, body string) (int, string) {
		code, text, err := n.request("POST", path, strings.NewReader(body), "Content-Type", "application/json")
		if err != nil {
			t.Fatal(err)
		}
		return code, strings.TrimSpace(text)
	}
	port := strconv.Itoa(30000 + os.Getpid()%2000) // below those that the kernel gives away
	published := `{"Image":"` + testImage + `","Cmd":["sleep","1000000"],"HostConfig":{"PortBindings":{"80/tcp":[{"HostIp":"127.0.0.1","HostPort":"` + port + `"}]}}}`
	for _, c := range []string{name, taken} {
		if code, text := post("/containers/create?name="+c, published); code != 201 {
			t.Fatal(code, text)
		}
	}
	if code, text := post("/containers/"+name+"/start", ""); code != 204 {
		t.Fatal(code, text)
	}
	if code, text := post("/networks/create", `{"Name":"`+network+`"}`); code != 201 {
		t.Fatal(code, text)
	}
	defer func() { _, _, _ = n.request("DELETE", "/networks/"+network, nil) }()
	upper := "invalid reference format: repository name (library/UPPER) must be lowercase"
	for _, tt := range []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"POST", "/containers/" + taken + "/start", "", 500, `failed to set up container networking: driver failed programming external connectivity on endpoint ` + taken +
			` (ID): Bind for 127.0.0.1:` + port + ` failed: port is already allocated`},
		{"POST", "/containers/create", `{"Image":"UPPER:x"}`, 400, upper},
		{"POST", "/containers/create", `{"Image":"nope:x"}`, 404, "No such image: nope:x"},
		{"POST", "/images/create?fromImage=UPPER&tag=x", "", 400, upper},
		{"GET", "/images/UPPER:x/json", "", 400, upper},
		{"DELETE", "/images/UPPER:x", "", 400, upper},
		{"POST", "/images/" + testImage + "/tag?repo=UPPER", "", 400, upper},
		{"POST", "/images/UPPER/push?tag=x", "", 400, upper},
		{"POST", "/networks/create", `{"Name":"` + network + `"}`, 409, "network with name " + network + " already exists"},
		{"POST", "/networks/create", `{"Name":"n3","Driver":"nope"}`, 404, `create network n3: network driver "nope" is not known, only bridge`},
		{"POST", "/networks/create", `{"Name":"n3","IPAM":{"Config":[{"Subnet":"` + n.subnet + `"}]}}`, 409, "create network n3: invalid pool request: Pool overlaps with other one on this address space: " + n.subnet},
		{"POST", "/images/load", "junk", 400, "load archive: not a tar archive, or a truncated one: unexpected EOF"},
		{"DELETE", "/networks/bridge", "", 403, "bridge is a pre-defined network and cannot be removed"},
		{"GET", "/containers/nope/json", "", 404, "No such container: nope"},
	} {
		code, text, err := n.request(tt.method, tt.path, strings.NewReader(tt.body), "Content-Type", "application/json")
		var m struct{ Message string }
		if err == nil {
			err = json.Unmarshal([]byte(text), &m)
		}
		m.Message = regexp.MustCompile(`[0-9a-f]{64}`).ReplaceAllString(m.Message, "ID")
		if err != nil || code != tt.code || m.Message != tt.want {
			t.Errorf("%s %s: %d %q, want %d %q (%v)", tt.method, tt.path, code, m.Message, tt.code, tt.want, err)
		}
	}
	// Of a pull, whose errors may come after the first line of progress.
	if _, text := post("/images/create?fromImage=localhost:1/nope&tag=x", ""); !strings.Contains(text, `connection refused"`) {
		t.Errorf("pull: %s", text)
	}
}
