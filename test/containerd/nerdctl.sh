#!/bin/bash
# Drives nerdctl on hakod or containerd: run, exec, logs, cp, commit, networks, volumes, compose.
# Usage: nerdctl.sh BIN_DIR NERDCTL [RUNTIME]
#   BIN_DIR  hakod and its shims, or containerd and containerd-shim-runc-v2
#   RUNTIME  name of the runtime, if not the client's default
# (root, go, a static busybox, iproute2, iptables, script, containernetworking-plugins.)
set -eu
[ $# -ge 2 ] || { sed -n 's/^# \?//; 2,6p' "$0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/lib.sh"
enter "$0" "$(realpath "$1")" "$(realpath "$2")" "${@:3}"
nerdctl=$2
cni=/opt/cni/bin; [ -x $cni/bridge ] || cni=/usr/lib/cni
runtime=(); [ -z "${3:-}" ] || runtime=(--runtime "$3")
daemon "$1"
mkdir -p "$w/config"
cat >"$w/nerdctl.toml" <<C
namespace = "hw-$$"
data_root = "$w/nerdctl"
cni_path = "$cni"
cni_netconfpath = "$w/net.d"
cgroup_manager = "cgroupfs"
insecure_registry = true
C
export NERDCTL_TOML=$w/nerdctl.toml DOCKER_CONFIG=$w/config
n() { timeout 60 "$nerdctl" "$@"; }
run() { n run "${runtime[@]}" "$@"; }
code() { local c=0; "$@" >/dev/null 2>&1 || c=$?; echo $c; }
status() { n inspect -f '{{.State.Status}}' "$1"; }
box=localhost:5000/library/alpine:latest

like "version" "$(n version 2>&1)" 'containerd|hako'
like "info" "$(n info 2>&1)" 'Storage Driver: overlayfs'
n pull -q $box >"$w/out" 2>&1 || cat "$w/out"
like "pull" "$(n images)" 'localhost:5000/library/alpine[: ]+latest'
n tag $box box; like "tag" "$(n images --names)" 'docker.io/library/box:latest'
n tag $box localhost:5000/pushed:n >/dev/null; n push -q localhost:5000/pushed:n >"$w/out" 2>&1 || cat "$w/out"
is "push" "$(curl -fsS -o /dev/null -w '%{http_code}' -H 'Accept: application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json' http://localhost:5000/v2/pushed/manifests/n)" 200
n save -o "$w/box.tar" box; n rmi box >/dev/null; like "save and load" "$(n load -i "$w/box.tar" 2>&1)" 'box:latest'
is "image inspect" "$(n image inspect -f '{{.Os}}' box)" linux
like "history" "$(n history --no-trunc box)" testimages

c=0; out=$(run --rm --network none box sh -c 'echo hello; exit 5') || c=$?
is "run: output" "$out" hello
is "run: exit code" "$c" 5
is "run: command not found" "$(code run --rm --network none box nosuch)" 1
# shellcheck disable=SC2016
is "run: user, directory, environment, name" "$(run --rm --network none -u 5:6 -w /tmp -e A=b -h here box sh -c 'echo $(id -u) $(id -g) $PWD $A $(hostname)')" "5 6 /tmp b here"
is "run: input" "$(echo text | run --rm -i --network none box cat)" text
is "run: terminal" "$(terminal "$nerdctl run ${runtime[*]} --rm -t --network none box sh -c 'tty; sleep 1'" | grep -o '/dev/pts/[0-9]*' | head -n 1)" /dev/pts/0
is "run: read-only, tmpfs" "$(run --rm --network none --read-only --tmpfs /t box sh -c 'echo x 2>/dev/null >/x || echo refused; echo y >/t/y; cat /t/y' | tr '\n' ' ')" "refused y "
mkdir "$w/dir"
is "run: volume" "$(run --rm --network none -v "$w/dir:/v" box sh -c 'echo x >/v/file'; cat "$w/dir/file")" x
is "run: limits" "$(run --rm --network none -m 64m --pids-limit 50 box sh -c 'cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null' | tr '\n' ' ')" "67108864 50 "
is "run: init is privileged" "$(run --rm --network none --privileged box sh -c 'touch /proc/sys/kernel/hostname && echo writable')" writable

n volume create vol >/dev/null
run --rm --network none -v vol:/data box sh -c 'echo kept >/data/file'
is "volumes: kept" "$(run --rm --network none -v vol:/data:ro box cat /data/file)" kept
is "volumes: copied up" "$(run --rm --network none -v up:/test_dir box cat /test_dir/test_file)" test_content
like "volumes: list" "$(n volume ls)" '^vol '
n volume rm vol up >/dev/null; is "volumes: removed" "$(n volume ls -q)" ""

run -d --name ww --network none box sleep 1000 >/dev/null
c=0; out=$(n exec ww sh -c 'echo inside; exit 3' 2>/dev/null) || c=$?
is "exec: output" "$out" inside
# nerdctl answers 1 for any code of the program.
is "exec: exit code" "$([ $c -ne 0 ] && echo failed)" failed
is "exec: input" "$(echo text | n exec -i ww cat)" text
# shellcheck disable=SC2016
is "exec: user, directory, environment" "$(n exec -u 5:6 -w /tmp -e A=b ww sh -c 'echo $(id -u) $(id -g) $PWD $A')" "5 6 /tmp b"
is "exec: terminal" "$(terminal "$nerdctl exec -t ww sh -c 'tty; sleep 1'" | grep -o '/dev/pts/[0-9]*' | head -n 1)" /dev/pts/0
like "ps" "$(n ps --format '{{.Names}} {{.Status}}')" '^ww Up'
like "top" "$(n top ww)" 'sleep 1000'
like "stats" "$(n stats --no-stream --format '{{.Name}} {{.PIDs}}' ww)" '^ww [1-9]'
echo copied >"$w/file"
n cp "$w/file" ww:/tmp/file; is "cp: into" "$(n exec ww cat /tmp/file)" copied
n cp ww:/test_dir "$w/back"; is "cp: out of" "$(cat "$w/back/test_file")" test_content
n commit -m message ww committed >"$w/out" 2>&1 || cat "$w/out"
is "commit" "$(run --rm --network none committed cat /tmp/file)" copied
is "diff" "$(n diff ww 2>/dev/null | grep -c '^A /tmp/file' || true)" 1
n export ww >"$w/export.tar"; like "export" "$(tar -tf "$w/export.tar")" '^tmp/file$'
n pause ww >/dev/null; is "pause" "$(status ww)" paused
n unpause ww >/dev/null; is "unpause" "$(status ww)" running
n update --memory 96m ww >/dev/null 2>&1 || true
n rename ww w2; is "rename" "$(status w2)" running
n kill w2 >/dev/null; is "kill" "$(n wait w2)" 137
n start w2 >/dev/null; is "start again" "$(status w2)" running
n restart -t 1 w2 >/dev/null; is "restart" "$(status w2)" running
n stop -t 1 w2 >/dev/null; is "stop" "$(status w2)" exited
is "rm" "$(n rm w2)" w2

run -d --name ll --network none box sh -c 'echo one; echo two >&2; sleep 2; echo three' >/dev/null
is "logs: follow" "$(n logs -f ll 2>&1 | sort | tr '\n' ' ')" "one three two "
is "logs: tail" "$(n logs -n 1 ll)" three
like "logs: times" "$(n logs -t ll 2>/dev/null | head -n 1)" '^20[0-9T:.-]*Z one'
n rm ll >/dev/null
run -d --name oo --network none --restart on-failure:2 box sh -c 'echo life; exit 1' >/dev/null
is "restart policy" "$(for _ in $(seq 45); do [ "$(n logs oo 2>/dev/null | grep -c life)" = 3 ] && break; sleep 1; done; n logs oo | grep -c life)" 3
n rm -f oo >/dev/null
run -d --name hh --network none --health-cmd true box sleep 100 >/dev/null
n container healthcheck hh >/dev/null 2>&1 || true
is "health" "$(n inspect -f '{{.State.Health.Status}}' hh)" healthy
n rm -f hh >/dev/null

like "bridge: an address" "$(run --rm box ip -4 addr show eth0)" 'inet 10\.4\.'
n network create --subnet 10.244.7.0/24 blue >/dev/null
run -d --name web --network blue -p 127.0.0.1:8089:80 box httpd -f -p 80 -h /test_dir >/dev/null
is "network: by name" "$(run --rm --network blue box sh -c 'for _ in 1 2 3 4 5; do wget -qO- http://web/test_file && break; sleep 1; done')" test_content
is "network: published port" "$(curl -fsS --retry 5 --retry-connrefused http://127.0.0.1:8089/test_file)" test_content
like "network: inspect" "$(n network inspect blue)" '10.244.7.0/24'
like "port" "$(n port web)" '80/tcp -> 127.0.0.1:8089'
is "network: of another container" "$(run --rm --network container:web box wget -qO- http://127.0.0.1/test_file)" test_content
n rm -f web >/dev/null; n network rm blue >/dev/null
is "network: removed" "$(n network ls -q --filter name=blue)" ""
is "network: host" "$(run --rm --network host box sh -c 'ls -l /proc/self/ns/net | sed "s/.*-> //"')" "$(readlink /proc/self/ns/net)"

mkdir "$w/project"
cat >"$w/project/compose.yaml" <<C
services:
  web:
    image: $box
    command: httpd -f -p 80 -h /www
    volumes: ["www:/www"]
    ports: ["127.0.0.1:8088:80"]
  writer:
    image: $box
    command: sh -c 'echo "from \$\$WHO" >/www/index.html; sleep 1000'
    environment: {WHO: compose}
    volumes: ["www:/www"]
  asker:
    image: $box
    depends_on: [web, writer]
    command: sh -c 'while ! wget -qO- http://web/index.html; do sleep 1; done; sleep 1000'
volumes: {www: {}}
C
if [ ${#runtime[@]} -gt 0 ]; then sed -i "s,^    image:.*,&\n    runtime: ${runtime[1]}," "$w/project/compose.yaml"; fi
compose() { n compose -p proj -f "$w/project/compose.yaml" "$@"; }
compose up -d >"$w/out" 2>&1 || cat "$w/out"
is "compose: ps" "$(compose ps --format '{{.Service}}' 2>/dev/null | sort | tr '\n' ' '; compose ps 2>/dev/null | grep -c running)" "3"
is "compose: port" "$(curl -fsS --retry 10 --retry-delay 1 --retry-all-errors http://127.0.0.1:8088/index.html)" "from compose"
is "compose: names" "$(for _ in $(seq 20); do compose logs asker 2>/dev/null | grep -q 'from compose' && break; sleep 0.5; done; compose logs --no-color asker 2>/dev/null | grep -c 'from compose')" 1
is "compose: exec" "$(compose exec -T writer cat /www/index.html 2>/dev/null)" "from compose"
compose down -v >"$w/out" 2>&1 || cat "$w/out"
is "compose: down" "$(n ps -aq; n volume ls -q; n network ls -q --filter name=proj_)" ""

for i in $(seq 10); do (c=0; run --rm --network none box sh -c "exit $i" >/dev/null 2>&1 || c=$?; echo $c >"$w/life$i") & lives[i]=$!; done
wait "${lives[@]}"
is "10 lives side by side" "$(cat "$w"/life* | sort -n | tr '\n' ' ')" "$(seq 10 | tr '\n' ' ')"
n system prune -af >/dev/null 2>&1 || true
is "nothing is left: containers" "$(n ps -aq)" ""
is "nothing is left: processes" "$(pgrep -f 'shim.*-namespace' | wc -l)" 0
exit $failed
