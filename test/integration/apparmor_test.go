package integration

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestAppArmor is a machine where AppArmor is on: containers are confined by hako's profile
// unless they are told otherwise, and it takes from them what it is there for.
func TestAppArmor(t *testing.T) {
	if on, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err != nil || on[0] != 'Y' {
		t.Skipf("needs AppArmor: %s", t.Name())
	}
	parser, err := exec.LookPath("apparmor_parser")
	if err != nil {
		t.Skipf("needs apparmor_parser: %s", t.Name())
	}
	n := own(t)
	const profile, label = "hako-default", "cat /proc/self/attr/current"
	t.Cleanup(func() {
		cmd := exec.Command(parser, "-R")
		cmd.Stdin = strings.NewReader("profile " + profile + " {}\n")
		_ = cmd.Run()
	})
	n.expect(t, 0, "name=apparmor", "info", "-f", "{{.SecurityOptions}}")
	for want, opts := range map[string][]string{
		profile + " (enforce)": nil,
		"unconfined":           {"--security-opt", "apparmor=unconfined"},
		"unconfined\n":         {"--privileged"},
	} {
		args := append(append([]string{"run", "--rm"}, opts...), testImage, "sh", "-c", label)
		if r := n.run(nil, args...); r.code != 0 || !strings.HasPrefix(r.out, want) {
			t.Errorf("want %s: %v", want, r)
		}
	}
	if r := n.run(nil, "run", "--rm", "--security-opt", "apparmor=hako-no-such", testImage, "true"); r.code == 0 || !strings.Contains(r.stderr, "hako-no-such") {
		t.Errorf("a profile that does not exist: %v", r)
	}

	n.docker(t, "run", "-d", "--name", "box", testImage, "sleep", "1000")
	if got := n.docker(t, "inspect", "-f", "{{.AppArmorProfile}}", "box"); got != profile {
		t.Errorf("inspect shows %q", got)
	}
	n.expect(t, 0, profile+" (enforce)", "exec", "box", "sh", "-c", label)
	n.expect(t, 0, profile+" (enforce)", "exec", "-u", "1000", "box", "sh", "-c", label)
	n.expect(t, 0, "ended", "exec", "box", "sh", "-c", "sleep 100 & kill $!; wait $! || echo ended")
	n.docker(t, "kill", "box") // from outside

	// What a capability, or an unmasked path, would give.
	for script, allowed := range map[string]bool{
		"mount -t tmpfs none /tmp":                                               false,
		"echo 60 >/proc/sys/vm/swappiness":                                       false,
		"echo /x >/proc/sys/kernel/core_pattern":                                 false,
		"echo s >/proc/sysrq-trigger":                                            false,
		"head -c 1 /proc/kcore >/dev/null":                                       false,
		"ls /sys/kernel/security/apparmor":                                       false,
		"echo 1 >/proc/sys/net/ipv4/conf/all/log_martians":                       true,
		"echo 4096 >/proc/sys/kernel/shmmni && echo 64 >/proc/sys/kernel/msgmni": true,
		"echo 300 >/proc/self/oom_score_adj":                                     true,
		"hostname x && echo y >/proc/sys/kernel/hostname":                        true,
		"mkdir /a && echo 1 >/a/b && ln /a/b /a/c && chown 1:1 /a/b && mknod /a/d c 1 3 && ping -c 1 127.0.0.1": true,
	} {
		opts := []string{"run", "--rm", "--cap-add", "SYS_ADMIN", "--cap-add", "SYS_RAWIO", "--cap-add", "NET_ADMIN", "--security-opt", "systempaths=unconfined"}
		for _, confined := range []bool{true, false} {
			args := opts
			if !confined {
				if strings.Contains(script, "sysrq") || strings.Contains(script, "core_pattern") || strings.Contains(script, "apparmor") {
					continue
				}
				args = append(args[:len(args):len(args)], "--security-opt", "apparmor=unconfined")
			}
			r := n.run(nil, append(args, testImage, "sh", "-c", "set -o pipefail; "+script)...)
			if want := allowed || !confined; (r.code == 0) != want {
				t.Errorf("%s: confined %v, want success %v:\n%v", script, confined, want, r)
			}
		}
	}

	// Tools of the distribution unload profiles that no file describes.
	cmd := exec.Command(parser, "-R")
	cmd.Stdin = strings.NewReader("profile " + profile + " {}\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	n.expect(t, 0, profile+" (enforce)", "run", "--rm", testImage, "sh", "-c", label)
}
