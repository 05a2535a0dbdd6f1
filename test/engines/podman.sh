#!/bin/bash
# Drives Debian's podman with hako-oci as its runtime: what podman asks of a runtime, from
# run to 20 lives side by side, and that nothing is left. Everything lies in a temporary
# directory. Usage: podman.sh PATH_OF_HAKO_OCI (root, podman, conmon, busybox-static).
set -eu
oci=$(realpath "${1:?usage: podman.sh HAKO_OCI}")
command -v podman >/dev/null || { echo "podman is not installed" >&2; exit 1; }
busybox=$(command -v busybox) || { echo "busybox-static is not installed" >&2; exit 1; }
w=$(mktemp -d)
# The defaults of Debian's podman raise limits above what the caller may have.
printf '[containers]\ndefault_ulimits = ["nofile=1000:2000"]\nlog_driver = "k8s-file"\n[engine]\nevents_logger = "file"\n' >"$w/containers.conf"
export CONTAINERS_CONF=$w/containers.conf
# podman passes flags of the runtime to some of its calls only: the directory of state is
# set by a wrapper.
printf '#!/bin/sh\nexec "%s" --root "%s/oci" "$@"\n' "$oci" "$w" >"$w/hako-oci"
chmod +x "$w/hako-oci"
args=(--root "$w/root" --runroot "$w/run" --tmpdir "$w/tmp" --storage-driver vfs --cgroup-manager cgroupfs --runtime "$w/hako-oci")
podman_() { timeout 600 podman "${args[@]}" "$@"; }
cleanup() { podman_ rm -fa -t 0 >/dev/null 2>&1; cd /; rm -rf "$w"; }
trap cleanup EXIT
opts=(--network none --ulimit nofile=1000:2000 --ulimit nproc=1000:2000)
failed=0
is() { # what, got, want
	if [ "$2" = "$3" ]; then echo "ok    $1"; else echo "FAIL  $1: got '$2', want '$3'"; failed=1; fi
}
like() { # what, got, pattern
	if grep -qE -- "$3" <<<"$2"; then echo "ok    $1"; else echo "FAIL  $1: got '$2', want something like '$3'"; failed=1; fi
}
code() { local c=0; "$@" >/dev/null 2>&1 || c=$?; echo $c; }
run() { podman_ run --rm "${opts[@]}" "$@"; }
status() { podman_ inspect --format '{{.State.Status}}' "$1"; }
mkdir -p "$w/img/bin" "$w/img/etc" "$w/img/tmp" "$w/volume"
cp "$busybox" "$w/img/bin/busybox"
for a in sh cat ls sleep id ps echo hostname true tty touch; do ln -s busybox "$w/img/bin/$a"; done
echo 'root:x:0:0::/:/bin/sh' >"$w/img/etc/passwd"
tar -C "$w/img" -cf "$w/img.tar" .
podman_ import "$w/img.tar" box >/dev/null 2>&1

c=0; out=$(run --hostname here box sh -c 'hostname; exit 5') || c=$?
is "run: output" "$out" here
is "run: exit code" "$c" 5
is "run: a user" "$(run --user 7:8 box id -u)" 7
is "run: command not found" "$(code run box nosuch)" 127
is "run: command is a directory" "$(code run box /etc)" 126
is "run: privileged" "$(run --privileged box ls /dev/kmsg)" /dev/kmsg
is "read-only root" "$(run --read-only box sh -c 'echo x 2>/dev/null >/x || echo refused')" refused
is "volume" "$(run -v "$w/volume:/v" box sh -c 'echo x >/v/file'; cat "$w/volume/file")" x
is "volume: read-only" "$(run -v "$w/volume:/v:ro" box sh -c 'cat /v/file; touch /v/y 2>/dev/null || echo refused' | tr '\n' ' ')" "x refused "
is "tmpfs" "$(run --tmpfs /t:size=64k box sh -c 'echo x >/t/y; cat /t/y')" x
is "user namespace" "$(run --uidmap 0:100000:1000 --gidmap 0:200000:1000 box sh -c 'id -u; cat /proc/self/uid_map' | tr -s ' \n' ' ')" "0 0 100000 1000 "
limits=$(run -m 64m --cpus 0.5 --pids-limit 50 box sh -c 'cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || true')
is "limits: memory and pids" "$(head -n 2 <<<"$limits" | tr '\n' ' ')" "67108864 50 "

podman_ run -d --name w "${opts[@]}" box sleep 100000 >/dev/null
c=0; out=$(podman_ exec w sh -c 'echo inside; exit 3') || c=$?
is "exec: output" "$out" inside
is "exec: exit code" "$c" 3
is "exec: input" "$(echo text | podman_ exec -i w cat)" text
is "exec: user, directory, environment" "$(podman_ exec -u 5:6 -w /tmp -e A=b w sh -c 'echo $(id -u) $(id -g) $PWD $A')" "5 6 /tmp b"
is "exec: command not found" "$(code podman_ exec w nosuch)" 127
is "exec: terminal" "$(script -qec "timeout --foreground 600 podman ${args[*]} exec -it w sh -c 'tty; sleep 1'" /dev/null | grep -o '/dev/pts/[0-9]*' | head -n 1)" /dev/pts/0
podman_ pause w >/dev/null; is "pause" "$(status w)" paused
is "pause: exec is refused" "$(code podman_ exec w true)" 255
podman_ unpause w >/dev/null; is "unpause" "$(status w)" running
is "top" "$(podman_ top w args | tail -n 1 | sed 's/ *$//')" "sleep 100000"
like "stats" "$(podman_ stats --no-stream --format '{{.PIDs}} {{.MemUsage}}' w)" '^1 [0-9.]+[kM]?B / '
podman_ update --cpus 0.25 w >/dev/null 2>&1 || true # from podman 4.3 on
is "ps" "$(podman_ ps --format '{{.Names}}')" w
out=$(podman_ container checkpoint w 2>&1 || true)
like "checkpoint is refused clearly" "$out" 'does not support checkpoint|CRIU|criu'
is "checkpoint: the container runs on" "$(status w)" running
podman_ kill -s KILL w >/dev/null; podman_ wait w >/dev/null
is "kill" "$(podman_ inspect --format '{{.State.ExitCode}}' w)" 137
podman_ start w >/dev/null; is "start again" "$(status w)" running
podman_ stop -t 0 w >/dev/null 2>&1; is "stop" "$(status w)" exited
podman_ rm w >/dev/null

podman_ run -d -i --name a "${opts[@]}" box sh -c 'read x; echo got $x; echo oops >&2' >/dev/null
is "attach" "$(echo hello | podman_ attach a 2>/dev/null)" "got hello"
podman_ wait a >/dev/null
is "logs" "$(podman_ logs a 2>&1 | sort | tr '\n' ' ')" "got hello oops "
podman_ rm a >/dev/null
# Of a program that has ended at once, engine and terminal may lose the output, whatever the runtime.
is "terminal" "$(script -qec "timeout --foreground 600 podman ${args[*]} run --rm -it ${opts[*]} box sh -c 'tty; sleep 1'" /dev/null | grep -o '/dev/pts/[0-9]*' | head -n 1)" /dev/pts/0

for i in $(seq 20); do (c=0; run box sh -c "exit $i" >/dev/null 2>&1 || c=$?; echo $c >"$w/life$i") & done
wait
is "20 lives side by side" "$(cat "$w"/life* | sort -n | tr '\n' ' ')" "$(seq 20 | tr '\n' ' ')"
is "nothing is left: containers" "$(podman_ ps -aq)" ""
is "nothing is left: state" "$(ls "$w/oci")" ""
is "nothing is left: mounts of containers" "$(grep -c "$w/.*merged\|$w/oci" /proc/self/mountinfo || true)" 0
exit $failed
