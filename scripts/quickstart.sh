#!/usr/bin/env bash
# hako in one minute: builds it, starts a daemon that touches nothing else on this
# machine, runs two containers from an image that is made here, and cleans up.
set -euo pipefail
cd "$(dirname "$0")/.."
GO=${GO:-go}
MAKE=${MAKE:-make}

bold=''; dim=''; off=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then bold=$'\e[1m'; dim=$'\e[2m'; off=$'\e[0m'; fi
step() { printf '\n%s==> %s%s\n' "$bold" "$*" "$off"; }
show() { printf '%s$ %s%s\n' "$dim" "$*" "$off"; }
die() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }
now() { date +%s%N; }
ms() { echo $((($2 - $1) / 1000000)); }

[ "$(uname -s)" = Linux ] || die "containers need Linux; this is $(uname -s)"
command -v "$GO" >/dev/null || die "Go is missing: install Go 1.26 or newer (https://go.dev/dl, or apt-get install golang) and put it on PATH"
[ "$(id -u)" -eq 0 ] || die "root is needed to make namespaces and cgroups: run 'sudo -E env PATH=\$PATH make quickstart'"
if [ -z "$(ls -A /sys/fs/cgroup 2>/dev/null)" ]; then die "no cgroups: mount them, e.g. 'mount -t cgroup2 none /sys/fs/cgroup'"; fi

step "Building hako (Go only: no C compiler, nothing downloaded but Go modules)"
t0=$(now)
"$MAKE" --no-print-directory build
t1=$(now)
build_ms=$(ms "$t0" "$t1")

hako=$PWD/bin/hako
dir=$(mktemp -d /tmp/hako-quickstart.XXXXXX)
subnet=10.$((RANDOM % 100 + 100)).$((RANDOM % 250)).0/24
bridge=hakoq$((RANDOM % 10000))
export HAKO_HOST=unix://$dir/run/docker.sock
daemon=''
cleanup() {
  status=$?
  trap - EXIT INT TERM
  if [ -n "$daemon" ]; then
    "$hako" ps -aq 2>/dev/null | while read -r id; do "$hako" rm -fv "$id" >/dev/null 2>&1 || true; done
    kill "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
    bin/hakod --root "$dir/lib" --state "$dir/run" --config /dev/null --bridge-name "$bridge" cleanup >/dev/null 2>&1 || true
  fi
  if [ $status -ne 0 ] && [ -s "$dir/log" ]; then echo "--- hakod's log:" >&2; tail -20 "$dir/log" >&2; fi
  rm -rf "$dir"
  exit $status
}
trap cleanup EXIT INT TERM

step "Checking this machine"
show hako doctor
"$hako" doctor --root "$dir" || die "the machine is not ready: see the advice above"

step "Starting hakod with root $dir/lib, network $subnet"
t0=$(now)
bin/hakod --config /dev/null --root "$dir/lib" --state "$dir/run" --containerd-socket '' --cri-socket '' \
  --bridge-name "$bridge" --bridge-subnet "$subnet" >"$dir/log" 2>&1 &
daemon=$!
for _ in $(seq 200); do
  [ -S "$dir/run/docker.sock" ] && break
  kill -0 "$daemon" 2>/dev/null || die "hakod ended"
  sleep 0.02
done
"$hako" version >/dev/null
t1=$(now)
start_ms=$(ms "$t0" "$t1")
echo "ready after $start_ms ms"

step "Loading the demo image, which is built into hako"
show hako load --demo
t0=$(now)
"$hako" load --demo
t1=$(now)
load_ms=$(ms "$t0" "$t1")

step "What a process in a container sees, with limits on memory, CPU and processes"
show hako run --rm --name first --hostname box -m 64m --cpus 0.5 --pids-limit 32 hako/demo show
t0=$(now)
code=0
"$hako" run --rm --name first --hostname box -m 64m --cpus 0.5 --pids-limit 32 hako/demo show || code=$?
t1=$(now)
run_ms=$(ms "$t0" "$t1")
[ $code -eq 0 ] || exit $code

step "Exit codes are passed through"
show hako run --rm hako/demo exit 42
code=0
t0=$(now)
"$hako" run --rm hako/demo exit 42 || code=$?
t1=$(now)
exit_ms=$(ms "$t0" "$t1")
echo "exit code $code"
[ $code -eq 42 ] || die "expected exit code 42"

step "A service on a published port"
port=$(((RANDOM % 10000) + 20000))
show hako run -d --name web -p 127.0.0.1:$port:8080 hako/demo serve
t0=$(now)
"$hako" run -d --name web -p "127.0.0.1:$port:8080" hako/demo serve
fetch() {
  if command -v curl >/dev/null; then curl -fsS --max-time 2 "http://127.0.0.1:$port/" 2>/dev/null; return; fi
  exec 3<>"/dev/tcp/127.0.0.1/$port" || return 1
  printf 'GET / HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3
  sed '1,/^\r$/d' <&3
}
page=''
for _ in $(seq 100); do
  page=$(fetch) && [ -n "$page" ] && break
  sleep 0.02
done
t1=$(now)
serve_ms=$(ms "$t0" "$t1")
[ -n "$page" ] || die "http://127.0.0.1:$port/ does not answer"
show curl http://127.0.0.1:$port/
echo "$page"
show hako ps
"$hako" ps
show hako logs web
"$hako" logs web
show hako stop web
"$hako" stop -t 1 web

step "Timings"
printf '%8d ms  %s\n' "$build_ms" "building the binaries" "$start_ms" "starting the daemon" "$load_ms" "loading the image" \
  "$run_ms" "first container: create, network, start, run, remove" "$exit_ms" "second container, the same" "$serve_ms" "service: from 'run -d' to the first answer"

cat <<EOF

${bold}What to try next${off}
  make install                       put hako, hakod, hako-shim and hako-oci into /usr/local/bin
  hakod &                            start the daemon (docs/install.md has a service unit)
  hako run --rm -it alpine sh        a shell in a container from a registry
  DOCKER_HOST=unix:///run/hako/docker.sock docker ps
                                     docker's own command line works on hako
  hako-oci spec && hako-oci plan     see the system calls that a container is made of
EOF
