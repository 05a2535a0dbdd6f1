#!/bin/bash
# Drives ctr, containerd's own client, against hakod or containerd: images, content, snapshots,
# leases, namespaces, events, and what it does with containers and tasks.
# Usage: ctr.sh BIN_DIR CTR [RUNTIME]
#   BIN_DIR  hakod and its shims, or containerd and containerd-shim-runc-v2
#   RUNTIME  name of the runtime, if not the client's default
# (root, go, a static busybox, iproute2, script, jq.)
set -eu
[ $# -ge 2 ] || { sed -n 's/^# \?//; 2,8p' "$0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/lib.sh"
enter "$0" "$(realpath "$1")" "$(realpath "$2")" "${@:3}"
ctr=$2
runtime=(); [ -z "${3:-}" ] || runtime=(--runtime "$3")
daemon "$1"
ns=hw-$$
ctr_() { timeout 60 "$ctr" --namespace "$ns" "$@"; }
run() { ctr_ run "${runtime[@]}" "$@"; }
status() { ctr_ task ls | awk -v id="$1" '$1==id{print $3}'; }
gone() { until_ "status $1" STOPPED >/dev/null; ctr_ task rm "$1" >/dev/null 2>&1 || true; ctr_ container rm "$1"; }
code() { local c=0; "$@" >/dev/null 2>&1 || c=$?; echo $c; }
box=localhost:5000/library/alpine:latest

ctr_ version >"$w/version" 2>&1 || cat "$w/version"
like "version" "$(tr -s ' \n' ' ' <"$w/version")" 'Server: Version: '
like "plugins: a snapshotter" "$(ctr_ plugins ls)" 'io.containerd.snapshotter.v1 +overlayfs .* ok'
ctr_ namespaces create $ns-a k=v
like "namespaces" "$(ctr_ namespaces ls)" "^$ns-a +k=v"
ctr_ namespaces label $ns-a k=w; like "namespaces: label" "$(ctr_ namespaces ls)" "^$ns-a +k=w"
ctr_ namespaces remove $ns-a >/dev/null; is "namespaces: removed" "$(ctr_ namespaces ls -q | grep -c "^$ns-a" || true)" 0

ctr_ events >"$w/events" & events=$!
like "pull through the transfer service" "$(ctr_ images pull --plain-http $box 2>&1 | tr -s ' \r\n' ' ')" 'Completed pull|saved'
is "images: list" "$(ctr_ images ls -q | sort | head -n 1)" $box
ctr_ images pull --local --plain-http localhost:5000/library/busybox:latest >"$w/out" 2>&1 || cat "$w/out"
like "pull by the client" "$(ctr_ images ls -q)" 'library/busybox:latest'
like "images: check" "$(ctr_ images check "name==$box")" "$box.* complete .* true"
ctr_ images tag $box example.org/a:1 >/dev/null
like "images: tag" "$(ctr_ images ls -q)" '^example.org/a:1$'
ctr_ images label example.org/a:1 x=y >/dev/null; like "images: label" "$(ctr_ images ls name==example.org/a:1)" 'x=y'
ctr_ images export "$w/image.tar" example.org/a:1
like "images: export" "$(tar -tf "$w/image.tar")" '^index.json$'
ctr_ images rm --sync example.org/a:1 >/dev/null
like "images: import" "$(ctr_ images import "$w/image.tar" 2>&1 | tr '\r\n' '  ')" 'example.org/a:1'
like "images: import --local" "$(ctr_ images import --local "$w/image.tar" 2>&1)" 'example.org/a:1'
ctr_ images tag example.org/a:1 localhost:5000/pushed:1 >/dev/null
ctr_ images push --plain-http localhost:5000/pushed:1 >"$w/out" 2>&1 || tail -n 1 "$w/out"
is "images: push" "$(curl -fsS -o /dev/null -w '%{http_code}' -H 'Accept: application/vnd.oci.image.index.v1+json' http://localhost:5000/v2/pushed/manifests/1)" 200
mkdir "$w/mnt"
ctr_ images mount $box "$w/mnt" >/dev/null; is "images: mount" "$(cat "$w/mnt/etc/last")" last
ctr_ images unmount --rm "$w/mnt" >/dev/null; is "images: unmount" "$(ls "$w/mnt")" ""
d=$(ctr_ images ls "name==$box" | awk 'NR==2{print $3}')
is "content: get" "sha256:$(ctr_ content get "$d" | sha256sum | cut -d' ' -f1)" "$d"
like "content: list" "$(ctr_ content ls)" "^$d"
like "content: label" "$(ctr_ content label "$d" a=b)" 'a=b'
echo blob >"$w/blob"; b=sha256:$(sha256sum "$w/blob" | cut -d' ' -f1)
ctr_ content ingest --expected-digest "$b" r <"$w/blob"; is "content: ingest" "$(ctr_ content get "$b")" blob
ctr_ content rm "$b" >/dev/null; is "content: removed" "$(code ctr_ content get "$b")" 1
like "snapshots: list" "$(ctr_ snapshots ls)" 'Committed'
top=$(ctr_ snapshots tree | grep -o 'sha256:[0-9a-f]*' | tail -n 1)
like "snapshots: usage" "$(ctr_ snapshots usage "$top")" "$top"
ctr_ snapshots prepare s1 "$top"
ctr_ snapshots mounts "$w/mnt" s1 >"$w/mount.sh"; sh "$w/mount.sh"; echo new >"$w/mnt/new"; umount "$w/mnt"
like "snapshots: diff" "$(ctr_ snapshots diff s1 2>/dev/null | tar -tzf - 2>/dev/null || ctr_ snapshots diff s1 | tar -tf -)" '^new$'
ctr_ snapshots commit c1 s1; ctr_ snapshots view v1 c1
like "snapshots: parent" "$(ctr_ snapshots info v1)" '"Parent": "c1"'
like "snapshots: a parent stays" "$(ctr_ snapshots rm c1 2>&1 || true)" 'cannot remove snapshot with child'
ctr_ snapshots rm v1; ctr_ snapshots rm c1; is "snapshots: removed" "$(ctr_ snapshots ls | grep -c '^[cv]1 ' || true)" 0
ctr_ leases create --id l1 a=b >/dev/null; like "leases: list" "$(ctr_ leases ls)" '^l1 .*a=b'
ctr_ leases delete l1 >/dev/null; is "leases: deleted" "$(ctr_ leases ls -q)" ""

c=0; out=$(run --rm $box a sh -c 'echo hello; exit 5') || c=$?
is "run: output" "$out" hello
is "run: exit code" "$c" 5
out=$(run --rm $box n nosuch 2>&1 || true); ctr_ container rm n >/dev/null 2>&1 || true
# shellcheck disable=SC2016 # the words of the runtime
like "run: command not found" "$out" '"nosuch": executable file not found in \$PATH'
# shellcheck disable=SC2016
is "run: environment and directory" "$(run --rm --env A=b --cwd /tmp $box e sh -c 'echo "$A $PWD"')" "b /tmp"
is "run: a user" "$(run --rm --user 5:6 $box u sh -c 'echo $(id -u) $(id -g)')" "5 6"
is "run: read-only" "$(run --rm --read-only $box r sh -c 'echo x 2>/dev/null >/x || echo refused')" refused
mkdir "$w/volume"
is "run: volume" "$(run --rm --mount "type=bind,src=$w/volume,dst=/v,options=rbind:rw" $box v sh -c 'echo x >/v/file'; cat "$w/volume/file")" x
is "run: privileged" "$(run --rm --privileged $box p sh -c 'touch /proc/sys/kernel/hostname && echo writable')" writable
is "run: host network" "$(run --rm --net-host $box h sh -c 'ls -l /proc/self/ns/net | sed "s/.*-> //"')" "$(readlink /proc/self/ns/net)"
is "run: terminal" "$(terminal "$ctr --namespace $ns run ${runtime[*]} --rm -t $box t sh -c 'tty; sleep 1'" | grep -o '/dev/pts/[0-9]*' | head -n 1)" /dev/pts/0
is "run: user namespace" "$(run --rm --uidmap 0:100000:65536 --gidmap 0:100000:65536 $box ns sh -c 'id -u; cat /proc/self/uid_map' 2>&1 | tr -s ' \n' ' ')" "0 0 100000 65536 "
is "run: native snapshotter" "$(ctr_ images pull --local --plain-http --snapshotter native $box >/dev/null 2>&1; run --rm --snapshotter native $box sn cat /etc/last)" last
run -d --log-uri "file://$w/file.log" $box f sh -c 'echo out; echo err >&2'
is "run: output to a file" "$(until_ "sort $w/file.log | tr '\n' ' '" "err out ")" "err out "
gone f
# shellcheck disable=SC2016
printf '#!/bin/sh\necho "$CONTAINER_NAMESPACE $CONTAINER_ID" >"%s/binary.log"\nexec 5>&-\nexec cat <&3 >>"%s/binary.log"\n' "$w" "$w" >"$w/logger"; chmod +x "$w/logger"
run -d --log-uri "binary://$w/logger" $box b sh -c 'echo out'
is "run: output to a program" "$(until_ "tr '\n' ' ' <$w/binary.log" "$ns b out ")" "$ns b out "
gone b

run -d --memory-limit 67108864 --label x=y --pid-file "$w/pid" $box w sleep 1000
is "limits" "$(cat /sys/fs/cgroup/memory/"$ns"/w/memory.limit_in_bytes /sys/fs/cgroup/"$ns"/w/memory.max 2>/dev/null)" 67108864
is "pid file" "$(tr '\0' ' ' <"/proc/$(cat "$w/pid")/cmdline")" "sleep 1000 "
c=0; out=$(ctr_ task exec --exec-id e1 w sh -c 'echo inside; exit 3') || c=$?
is "exec: output" "$out" inside
is "exec: exit code" "$c" 3
# shellcheck disable=SC2016
is "exec: user and directory" "$(ctr_ task exec --exec-id e2 --user 5 --cwd /tmp w sh -c 'echo "$(id -u) $PWD"')" "5 /tmp"
is "exec: terminal" "$(terminal "$ctr --namespace $ns task exec -t --exec-id e3 w sh -c 'tty; sleep 1'" | grep -o '/dev/pts/[0-9]*' | head -n 1)" /dev/pts/0
like "exec: command not found" "$(ctr_ task exec --exec-id e4 w nosuch 2>&1 || true)" 'executable file not found'
ctr_ task pause w; is "pause" "$(status w)" PAUSED
ctr_ task resume w; is "resume" "$(status w)" RUNNING
is "ps" "$(ctr_ task ps w | tail -n +2 | wc -l)" 1
like "metrics" "$(ctr_ task metrics --format json w 2>&1)" '"(usage_usec|usage)"|"cpu"'
is "container: list" "$(ctr_ container ls -q)" w
like "container: info" "$(ctr_ container info w)" '"SnapshotKey": "w"'
like "container: label" "$(ctr_ container label w a=b)" 'a=b'
like "container: with a task it stays" "$(ctr_ container rm w 2>&1 || true)" 'cannot delete a non stopped container'
is "task: running it stays" "$(code ctr_ task rm w)" 1
ctr_ task kill -s KILL w; is "kill" "$(until_ "status w" STOPPED)" STOPPED
is "task: rm" "$(code ctr_ task rm w)" 0
ctr_ task start -d w; is "start again" "$(status w)" RUNNING
is "task: rm --force" "$(code ctr_ task rm -f w; status w)" 0
ctr_ container rm w

mkfifo "$w/in"; exec 9<>"$w/in"
run --rm $box i cat <"$w/in" >"$w/cat" & job=$!
until_ "status i" RUNNING >/dev/null
echo typed >&9
is "streams" "$(until_ "cat $w/cat" typed)" typed
for _ in $(seq 20); do ctr_ task kill -s KILL i >/dev/null 2>&1 && break; sleep 0.1; done
wait $job || true
exec 9>&-

for i in $(seq 20); do (c=0; run --rm $box "life$i" sh -c "exit $i" >/dev/null 2>&1 || c=$?; echo $c >"$w/life$i") & lives[i]=$!; done
wait "${lives[@]}"
is "20 lives side by side" "$(cat "$w"/life* | sort -n | tr '\n' ' ')" "$(seq 20 | tr '\n' ' ')"
kill $events
of() { grep -o "\"container_id\":\"$1\".*\|/tasks/[a-z-]* {.*\"container_id\":\"$1\".*" "$w/events" | grep -o '^/tasks/[a-z-]*' | tr '\n' ' '; }
is "events of a task in order" "$(of a)" "/tasks/create /tasks/start /tasks/exit /tasks/delete "
for t in /images/create /content/create /snapshot/prepare /snapshot/commit /containers/create /containers/delete /tasks/exec-added /tasks/exec-started /tasks/paused /tasks/resumed; do
	is "event $t" "$(grep -c "$t" "$w/events" | sed 's/^[1-9].*/1/')" 1
done
is "nothing is left: containers" "$(ctr_ container ls -q)$(ctr_ task ls -q)" ""
is "nothing is left: snapshots" "$(ctr_ snapshots ls | grep -c Active || true)" 0
is "nothing is left: state" "$(find /run/containerd/io.containerd.runtime.v2.task/"$ns" /run/containerd/runc/"$ns" -mindepth 1 2>/dev/null || true)" ""
is "nothing is left: processes" "$(pgrep -f 'shim.*-namespace' | wc -l)" 0
is "nothing is left: mounts" "$(grep -c 'rootfs' /proc/self/mountinfo || true)" 0
ctr_ images ls -q | xargs -r -n 1 "$ctr" --namespace "$ns" images rm --sync >/dev/null
is "nothing is left: content" "$(ctr_ content ls -q)" ""
is "nothing is left: snapshots of images" "$(ctr_ snapshots ls | tail -n +2)" ""
exit $failed
