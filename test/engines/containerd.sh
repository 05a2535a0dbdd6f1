#!/bin/bash
# Drives an upstream containerd with hako-oci as the runtime of its runc shim: run, exec,
# pause, kill, events of a terminal. A containerd of its own, in a temporary directory.
# Usage: containerd.sh PATH_OF_HAKO_OCI (root, containerd, ctr, busybox-static).
set -eu
oci=$(realpath "${1:?usage: containerd.sh HAKO_OCI}")
for p in containerd ctr; do command -v $p >/dev/null || { echo "$p is not installed" >&2; exit 1; }; done
busybox=$(command -v busybox) || { echo "busybox-static is not installed" >&2; exit 1; }
w=$(mktemp -d)
printf 'version = 2\nroot = "%s/root"\nstate = "%s/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "%s/sock"\n[ttrpc]\naddress = "%s/sock.ttrpc"\n' "$w" "$w" "$w" "$w" >"$w/config.toml"
containerd --config "$w/config.toml" >"$w/log" 2>&1 &
pid=$!
ctr_() { timeout 60 ctr --address "$w/sock" "$@"; }
cleanup() {
	ctr_ task kill -s KILL w >/dev/null 2>&1 || true
	ctr_ task rm -f w >/dev/null 2>&1 || true
	ctr_ container rm w >/dev/null 2>&1 || true
	kill "$pid"; wait "$pid" || true
	cd /; rm -rf "$w" || true
}
trap cleanup EXIT
for _ in $(seq 100); do ctr_ version >/dev/null 2>&1 && break; sleep 0.1; done
failed=0
is() { if [ "$2" = "$3" ]; then echo "ok    $1"; else echo "FAIL  $1: got '$2', want '$3'"; failed=1; fi; }
# A plain directory is the root: no image is needed.
mkdir -p "$w/rootfs/bin" "$w/rootfs/etc"
cp "$busybox" "$w/rootfs/bin/busybox"
for a in sh cat ls sleep id ps echo hostname true tty; do ln -s busybox "$w/rootfs/bin/$a"; done
run=(run --runc-binary "$oci" --env PATH=/bin --rootfs)
code=0; out=$(ctr_ "${run[@]}" --rm "$w/rootfs" a sh -c 'echo hello; exit 5') || code=$?
is "run: output" "$out" hello
is "run: exit code" "$code" 5
ctr_ "${run[@]}" -d "$w/rootfs" w sleep 100
code=0; out=$(ctr_ task exec --exec-id e1 w sh -c 'echo inside; exit 3') || code=$?
is "exec: output" "$out" inside
is "exec: exit code" "$code" 3
ctr_ task pause w; is "pause" "$(ctr_ task ls | awk '$1=="w"{print $3}')" PAUSED
ctr_ task resume w; is "resume" "$(ctr_ task ls | awk '$1=="w"{print $3}')" RUNNING
is "ps" "$(ctr_ task ps w | tail -n +2 | wc -l)" 1
out=$(ctr_ "${run[@]}" --rm "$w/rootfs" n nosuch 2>&1 || true)
is "command not found" "$(grep -c 'exec: "nosuch": executable file not found in $PATH' <<<"$out")" 1
out=$(script -qec "timeout 60 ctr --address $w/sock run --runc-binary $oci --env PATH=/bin --rm -t --rootfs $w/rootfs t tty" /dev/null | grep -o "/dev/pts/0" | head -n 1)
is "terminal" "$out" /dev/pts/0
ctr_ task kill -s KILL w; sleep 0.5
is "kill" "$(ctr_ task ls | awk '$1=="w"{print $3}')" STOPPED
ctr_ task rm w >/dev/null 2>&1 || true; ctr_ container rm w
exit $failed
