#!/bin/bash
# Drives Debian's podman with hako-oci as its runtime: run, exec, pause, top, stop, terminal,
# and the exit codes of commands that do not exist. Everything lies in a temporary
# directory. Usage: podman.sh PATH_OF_HAKO_OCI (root, podman, busybox-static).
set -eu
oci=$(realpath "${1:?usage: podman.sh HAKO_OCI}")
command -v podman >/dev/null || { echo "podman is not installed" >&2; exit 1; }
busybox=$(command -v busybox) || { echo "busybox-static is not installed" >&2; exit 1; }
w=$(mktemp -d)
trap 'podman_ rm -fa >/dev/null 2>&1; cd /; rm -rf "$w"' EXIT
# The defaults of Debian's podman raise limits above what the caller may have.
printf '[containers]\ndefault_ulimits = ["nofile=1000:2000"]\n' >"$w/containers.conf"
export CONTAINERS_CONF=$w/containers.conf
podman_() { timeout 60 podman --root "$w/root" --runroot "$w/run" --storage-driver vfs --cgroup-manager cgroupfs --runtime "$oci" "$@"; }
opts=(--network none --ulimit nofile=1000:2000 --ulimit nproc=1000:2000)
failed=0
is() { # what, got, want
	if [ "$2" = "$3" ]; then echo "ok    $1"; else echo "FAIL  $1: got '$2', want '$3'"; failed=1; fi
}
mkdir -p "$w/img/bin" "$w/img/etc" "$w/img/tmp"
cp "$busybox" "$w/img/bin/busybox"
for a in sh cat ls sleep id ps echo hostname true tty; do ln -s busybox "$w/img/bin/$a"; done
echo 'root:x:0:0::/:/bin/sh' >"$w/img/etc/passwd"
tar -C "$w/img" -cf "$w/img.tar" .
podman_ import "$w/img.tar" box >/dev/null 2>&1

code=0; out=$(podman_ run --rm "${opts[@]}" --hostname here box sh -c 'hostname; exit 5') || code=$?
is "run: output" "$out" here
is "run: exit code" "$code" 5
is "run as a user" "$(podman_ run --rm "${opts[@]}" --user 7:8 box id -u)" 7
is "read-only root" "$(podman_ run --rm "${opts[@]}" --read-only box sh -c 'echo x 2>/dev/null >/x || echo refused')" refused
is "memory limit" "$(podman_ run --rm "${opts[@]}" -m 64m box sh -c 'cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null')" 67108864
podman_ run -d --name w "${opts[@]}" box sleep 100 >/dev/null
code=0; out=$(podman_ exec w sh -c 'echo inside; exit 3') || code=$?
is "exec: output" "$out" inside
is "exec: exit code" "$code" 3
podman_ pause w >/dev/null; is "pause" "$(podman_ ps -a --format '{{.Status}}')" Paused
podman_ unpause w >/dev/null; is "unpause" "$(podman_ ps -a --format '{{.Status}}' | cut -d' ' -f1)" Up
is "top" "$(podman_ top w args | tail -n 1 | sed 's/ *$//')" "sleep 100"
podman_ stop -t 1 w >/dev/null; is "stop" "$(podman_ ps -a --format '{{.Status}}' | cut -d' ' -f1)" Exited
podman_ rm w >/dev/null
code=0; podman_ run --rm "${opts[@]}" box nosuch 2>/dev/null || code=$?; is "command not found" "$code" 127
code=0; podman_ run --rm "${opts[@]}" box /etc 2>/dev/null || code=$?; is "command is a directory" "$code" 126
out=$(script -qec "timeout 60 podman --root $w/root --runroot $w/run --storage-driver vfs --cgroup-manager cgroupfs --runtime $oci run --rm -it ${opts[*]} box tty" /dev/null | grep -o "/dev/pts/0" | head -n 1)
is "terminal" "$out" /dev/pts/0
is "privileged" "$(podman_ run --rm "${opts[@]}" --privileged box sh -c 'ls /dev/kmsg')" /dev/kmsg
exit $failed
