#!/bin/bash
# Drives Debian's containerd: with hako-oci as the runtime of containerd's own runc shim,
# or with hako's shim (io.containerd.hako.v2). A containerd of its own, in a temporary
# directory. Usage: containerd.sh PATH_OF_HAKO_OCI [PATH_OF_CONTAINERD_SHIM_HAKO_V2]
# (root, containerd, ctr, busybox-static, jq).
set -eu
if [ -z "${HAKO_ENGINES_INSIDE:-}" ]; then HAKO_ENGINES_INSIDE=1 exec unshare --mount "$0" "$@"; fi
oci=$(realpath "${1:?usage: containerd.sh HAKO_OCI [SHIM]}")
for p in containerd ctr jq; do command -v $p >/dev/null || { echo "$p is not installed" >&2; exit 1; }; done
busybox=$(command -v busybox) || { echo "busybox-static is not installed" >&2; exit 1; }
w=$(mktemp -d)
chmod 711 "$w" # a container in a user namespace has its cgroups below it
# A cgroup v1 hierarchy that exists and is not mounted makes containerd lose all metrics.
sed -n 's/^[1-9][0-9]*:\([^:]*\):.*/\1/p' /proc/self/cgroup | while read -r c; do
	grep -q " - cgroup .*[ ,]$c\(,.*\)*$" /proc/self/mountinfo && continue
	mkdir -p "$w/cgroup/$c" && mount -t cgroup -o "$c" none "$w/cgroup/$c"
done
ns=conf$$
runtime=(--runc-binary "$oci")
state=/run/containerd/runc/$ns
mkdir "$w/path"
# ctr forgets the name of the binary where it sets up a user namespace.
ln -s "$oci" "$w/path/runc"
PATH=$w/path:$PATH
if [ $# -gt 1 ]; then
	ln -s "$(realpath "$2")" "$w/path/containerd-shim-hako-v2"
	runtime=(--runtime io.containerd.hako.v2)
fi
printf 'version = 2\nroot = "%s/root"\nstate = "%s/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "%s/sock"\n[ttrpc]\naddress = "%s/sock.ttrpc"\n' "$w" "$w" "$w" "$w" >"$w/config.toml"
export CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1
up() { # starts containerd, again
	containerd --config "$w/config.toml" >>"$w/log" 2>&1 &
	pid=$!
	for _ in $(seq 3000); do ctr_ version >/dev/null 2>&1 && break; sleep 0.1; done
}
down() { kill "-${1:-TERM}" "$pid"; wait "$pid" 2>/dev/null || true; }
ctr_() { timeout 600 ctr --address "$w/sock" --namespace "$ns" "$@"; }
cleanup() {
	for id in $(ctr_ container ls -q 2>/dev/null); do
		ctr_ task rm -f "$id" >/dev/null 2>&1 || true
		ctr_ container rm "$id" >/dev/null 2>&1 || true
	done
	[ -z "${watch:-}" ] || kill "$watch" 2>/dev/null || true
	down
	cd /; rmdir "$w"/cgroup/*/"$ns" 2>/dev/null || true
	umount "$w"/cgroup/* 2>/dev/null || true
	rm -rf --one-file-system "$w" || true
	rmdir /sys/fs/cgroup/"$ns" /sys/fs/cgroup/*/"$ns" /run/containerd/runc/"$ns" 2>/dev/null || true
}
trap cleanup EXIT
up
failed=0
is() { if [ "$2" = "$3" ]; then echo "ok    $1"; else echo "FAIL  $1: got '$2', want '$3'"; failed=1; fi; }
like() { if grep -qE -- "$3" <<<"$2"; then echo "ok    $1"; else echo "FAIL  $1: got '$2', want something like '$3'"; failed=1; fi; }
status() { ctr_ task ls | awk -v id="$1" '$1==id{print $3}'; }
# events CONTAINER TOPIC...: the topics of its task, in order, when there are as many
events() {
	local id=$1; shift
	for _ in $(seq 600); do
		grep -E "\"(container_id|id)\": ?\"$id\"" "$w/events" 2>/dev/null | grep -oE ' /tasks/[a-z-]+' | sed 's/.*\///' >"$w/topics"
		[ "$(wc -l <"$w/topics")" -ge $# ] && break
		sleep 0.05
	done
	tr '\n' ' ' <"$w/topics"
}
watch_() { # until it hears something
	: >>"$w/events"; local n; n=$(wc -c <"$w/events")
	ctr_events & watch=$!
	until [ "$(wc -c <"$w/events")" -gt "$n" ]; do ctr_ image label "$box" heard=yes >/dev/null; sleep 0.1; done
}
ctr_events() { exec ctr --address "$w/sock" --namespace "$ns" events >>"$w/events" 2>/dev/null; }
# shim_of CONTAINER: its shim's process
shim_of() {
	local d
	for d in /proc/[0-9]*; do
		case "$({ tr '\0' ' ' <"$d/cmdline"; } 2>/dev/null)" in
		*containerd-shim*" $ns "*"-id $1 "*) echo "${d#/proc/}"; return ;;
		esac
	done
}
until_() { # CONTAINER STATUS: what it is in the end, nothing when there is no task any more
	local s
	for _ in $(seq 3000); do s=$(status "$1"); [ "$s" = "$2" ] || [ -z "$s" ] && break; sleep 0.05; done
	echo "$s"
}
# An image made by hand: a layer, a configuration, a manifest, an index.
mkdir -p "$w/img/bin" "$w/img/etc" "$w/img/tmp" "$w/oci/blobs/sha256" "$w/volume"
cp "$busybox" "$w/img/bin/busybox"
for a in sh cat ls sleep id ps echo hostname true tty touch tr tail; do ln -s busybox "$w/img/bin/$a"; done
blob() { # file, media type: moves it into the layout and prints its descriptor
	local d; d=$(sha256sum "$1" | cut -d' ' -f1)
	jq -nc --arg t "$2" --arg d "sha256:$d" --argjson s "$(stat -c %s "$1")" '{mediaType: $t, digest: $d, size: $s}'
	mv "$1" "$w/oci/blobs/sha256/$d"
}
tar -C "$w/img" --owner 0 --group 0 -cf "$w/layer" .
diff=sha256:$(sha256sum "$w/layer" | cut -d' ' -f1)
layer=$(blob "$w/layer" application/vnd.oci.image.layer.v1.tar)
jq -nc --arg d "$diff" --arg a "$(dpkg --print-architecture)" '{architecture: $a, os: "linux", config: {Env: ["PATH=/bin"]}, rootfs: {type: "layers", diff_ids: [$d]}}' >"$w/config"
config=$(blob "$w/config" application/vnd.oci.image.config.v1+json)
jq -nc --argjson c "$config" --argjson l "$layer" '{schemaVersion: 2, config: $c, layers: [$l]}' >"$w/manifest"
manifest=$(blob "$w/manifest" application/vnd.oci.image.manifest.v1+json)
jq -nc --argjson m "$manifest" '{schemaVersion: 2, manifests: [$m + {annotations: {"io.containerd.image.name": "docker.io/test/box:1"}}]}' >"$w/oci/index.json"
echo '{"imageLayoutVersion":"1.0.0"}' >"$w/oci/oci-layout"
tar -C "$w/oci" -cf "$w/image.tar" .
ctr_ image import "$w/image.tar" >/dev/null
box=docker.io/test/box:1
run() { ctr_ run "${runtime[@]}" "$@"; }

watch_
c=0; out=$(run --rm $box a sh -c 'echo hello; exit 5') || c=$?
is "run: output" "$out" hello
is "run: exit code" "$c" 5
# Version 2.4 of containerd's own shim loses events at its end, and mixes them up.
all="create start exit delete "; [ $# -gt 1 ] || all="create start .*"
like "run: events" "$(events a create start exit delete)" "^$all$"
out=$(run --rm $box n nosuch 2>&1 || true); ctr_ container rm n >/dev/null 2>&1 || true
# shellcheck disable=SC2016 # the words of the runtime
like "run: command not found" "$out" 'exec: "nosuch": executable file not found in \$PATH'
is "run: environment and directory" "$(run --rm --env A=b --cwd /tmp $box e sh -c 'echo "$A $PWD"')" "b /tmp"
is "read-only root" "$(run --rm --read-only $box r sh -c 'echo x 2>/dev/null >/x || echo refused')" refused
is "volume" "$(run --rm --mount "type=bind,src=$w/volume,dst=/v,options=rbind:rw" $box v sh -c 'echo x >/v/file'; cat "$w/volume/file")" x
is "volume: read-only" "$(run --rm --mount "type=bind,src=$w/volume,dst=/v,options=rbind:ro" $box vr sh -c 'cat /v/file; touch /v/y 2>/dev/null || echo refused' | tr '\n' ' ')" "x refused "
is "privileged" "$(run --rm --privileged $box p sh -c 'touch /proc/sys/kernel/hostname && echo writable')" writable
is "terminal" "$(script -qec "timeout --foreground 600 ctr --address $w/sock --namespace $ns run ${runtime[*]} --rm -t $box t sh -c 'tty; sleep 1'" /dev/null | grep -o '/dev/pts/[0-9]*' | head -n 1)" /dev/pts/0
is "user namespace" "$(run --rm --uidmap 0:100000:1000 --gidmap 0:100000:1000 $box ns sh -c 'id -u; cat /proc/self/uid_map' 2>&1 | tr -s ' \n' ' ')" "0 0 100000 1000 "

run -d --memory-limit 67108864 $box w sleep 100000
is "limits" "$(cat /sys/fs/cgroup/memory/"$ns"/w/memory.limit_in_bytes /sys/fs/cgroup/"$ns"/w/memory.max 2>/dev/null)" 67108864
c=0; out=$(ctr_ task exec --exec-id e1 w sh -c 'echo inside; exit 3') || c=$?
is "exec: output" "$out" inside
is "exec: exit code" "$c" 3
is "exec: user and directory" "$(ctr_ task exec --exec-id e2 --user 5 --cwd /tmp w sh -c 'echo "$(id -u) $PWD"')" "5 /tmp"
is "exec: terminal" "$(script -qec "timeout --foreground 600 ctr --address $w/sock --namespace $ns task exec -t --exec-id e3 w sh -c 'tty; sleep 1'" /dev/null | grep -o '/dev/pts/[0-9]*' | head -n 1)" /dev/pts/0
like "exec: command not found" "$(ctr_ task exec --exec-id e4 w nosuch 2>&1 || true)" 'executable file not found'
ctr_ task pause w; is "pause" "$(status w)" PAUSED
ctr_ task resume w; is "resume" "$(status w)" RUNNING
is "ps" "$(ctr_ task ps w | tail -n +2 | wc -l)" 1
like "metrics" "$(ctr_ task metrics --format json w 2>&1)" '"(usage_usec|usage)"|"cpu"'
is "list" "$(ctr_ container ls -q)" w
out=$(ctr_ container checkpoint --task w cp 2>&1 || true)
like "checkpoint is refused clearly" "$out" 'checkpoint|criu|not implemented|unimplemented'
is "checkpoint: the container runs on" "$(status w)" RUNNING
ctr_ task kill -s KILL w; is "kill" "$(until_ w STOPPED)" STOPPED
ctr_ task rm w >/dev/null 2>&1 || true
x="exec-added exec-started exit"
[ $# -gt 1 ] && all="create start $x $x $x exec-added paused resumed paused resumed exit delete "
like "events of its life" "$(events w {1..17})" "^$all$"
ctr_ task start -d w; is "start again" "$(status w)" RUNNING
ctr_ task kill -s KILL w; is "kill again" "$(until_ w STOPPED)" STOPPED
ctr_ task rm w >/dev/null 2>&1 || true; ctr_ container rm w
# containerd's own shim looks for it beside the exit, and may miss it in a container that is gone at once.
hog=(tail /dev/zero)
[ $# -gt 1 ] || hog=(sh -c 'tail /dev/zero; c=$?; sleep 1; exit $c')
c=0; run --rm --memory-limit 16777216 $box o "${hog[@]}" >/dev/null 2>&1 || c=$?
is "out of memory: exit code" "$c" 137
like "out of memory: event" "$(events o create start oom exit delete)" '^create start oom '

# The daemon goes, politely and not; the containers do not notice, and it finds them again.
run -d $box d sh -c 'while :; do sleep 0.1; done'
run -d $box q sleep 100000
kill "$watch" 2>/dev/null; wait "$watch" 2>/dev/null || true
before=$(ctr_ task ls | awk '$1=="d"{print $2}')
for signal in TERM KILL; do
	down $signal
	up
	is "daemon restarted ($signal)" "$(ctr_ task ls | awk '$1=="d"{print $2, $3}')" "$before RUNNING"
	is "daemon restarted ($signal): exec" "$(ctr_ task exec --exec-id "r$signal" d echo inside)" inside
done
gone=$(ctr_ task ls | awk '$1=="q"{print $2}')
down KILL
kill -9 "$gone"
up
watch_
# Since version 2, containerd deletes the task of which it finds no process.
like "ended while there was no daemon" "$(until_ q STOPPED)" '^(STOPPED)?$'
ctr_ task rm q >/dev/null 2>&1 || true
ctr_ task start -d q; is "ended while there was no daemon: start again" "$(status q)" RUNNING
ctr_ task kill -s KILL q; is "ended while there was no daemon: kill again" "$(until_ q STOPPED)" STOPPED
ctr_ task rm q >/dev/null 2>&1 || true; ctr_ container rm q

# The shim is killed: containerd calls its binary to clean up, and knows how it ended.
before=$(ctr_ task ls | awk '$1=="d"{print $2}')
shim=$(shim_of d)
is "the shim is found" "$([ -n "$shim" ] && echo yes)" yes
kill -9 "$shim"
for _ in $(seq 3000); do [ -d "/proc/$before" ] || break; sleep 0.05; done
is "shim killed: the process is gone" "$([ -d "/proc/$before" ] || echo gone)" gone
like "shim killed: events" "$(events d 1 2 3 4)" 'exit delete $'
for _ in $(seq 3000); do [ -z "$(status d)" ] && break; sleep 0.05; done
is "shim killed: no task" "$(status d)" ""
ctr_ task start -d d; is "shim killed: start again" "$(status d)" RUNNING
ctr_ task kill -s KILL d; is "shim killed: kill again" "$(until_ d STOPPED)" STOPPED
ctr_ task rm d >/dev/null 2>&1 || true; ctr_ container rm d

mkfifo "$w/in"; exec 9<>"$w/in"
run --rm $box i cat <"$w/in" >"$w/cat" & job=$!
echo typed >&9; for _ in $(seq 6000); do [ -s "$w/cat" ] && break; sleep 0.05; done
is "attach: streams" "$(cat "$w/cat")" typed
for _ in $(seq 600); do ctr_ task kill -s KILL i >/dev/null 2>&1 && break; sleep 0.1; done
wait $job || true
exec 9>&-

for i in $(seq 20); do (c=0; run --rm $box "life$i" sh -c "exit $i" >/dev/null 2>&1 || c=$?; echo $c >"$w/life$i") & lives[i]=$!; done
wait "${lives[@]}"
is "20 lives side by side" "$(cat "$w"/life* | sort -n | tr '\n' ' ')" "$(seq 20 | tr '\n' ' ')"
is "nothing is left: containers" "$(ctr_ container ls -q)$(ctr_ task ls -q)" ""
is "nothing is left: state" "$(ls "$state" 2>/dev/null)" ""
is "nothing is left: bundles" "$(ls "$w/state/io.containerd.runtime.v2.task/$ns" 2>/dev/null)" ""
is "nothing is left: mounts" "$(grep -c "$w/.*rootfs" /proc/self/mountinfo || true)" 0
exit $failed
