# shellcheck shell=bash
# Shared by the benchmarks: temporary folders, engines of their own in a network
# namespace of their own, interleaved timing, medians and ratios. Source it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/hako-bench.XXXXXX")
pids=()

[ "$(id -u)" -eq 0 ] || { echo "bench: root is needed" >&2; exit 1; }

finish() {
  status=$?
  trap - EXIT INT TERM
  set +e
  if declare -F bench_cleanup >/dev/null; then bench_cleanup; fi
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null; done
  # What engines left mounted below our own folder.
  awk -v d="$work/" 'index($2, d) == 1 {print $2}' /proc/mounts | sort -r | while read -r m; do umount -l "$m"; done
  rm -rf "$work"
  exit $status
}
trap finish EXIT INT TERM

missing() { # missing COMMAND PACKAGE: says why a comparison is left out
  command -v "$1" >/dev/null && return 1
  echo "bench: $1 is not installed (package $2): its comparison is left out" >&2
}

wait_for() { # wait_for SECONDS COMMAND...
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { echo "bench: gave up waiting for: $*" >&2; return 1; }
    sleep 0.05
  done
}

# start_hakod NAME [FLAGS]: a daemon in its own network namespace; its socket is $work/NAME/run/docker.sock
start_hakod() {
  local name=$1; shift
  mkdir -p "$work/$name"
  unshare -n sh -c 'ip link set lo up; exec "$@"' - "$root/bin/hakod" --config /dev/null --root "$work/$name/lib" --state "$work/$name/run" \
    --containerd-socket '' --cri-socket '' --bridge-name "hakob$((RANDOM % 10000))" --bridge-subnet 10.231.7.0/24 "$@" >"$work/$name.log" 2>&1 &
  pids+=($!)
  # shellcheck disable=SC2034 # for the script that sources this
  hakod_pid=$!
  wait_for 10 docker -H "unix://$work/$name/run/docker.sock" version
}

# start_dockerd: the same for Debian's dockerd; its socket is $work/dockerd/d.sock
start_dockerd() {
  mkdir -p "$work/dockerd"
  unshare -n sh -c 'ip link set lo up; exec "$@"' - dockerd --data-root "$work/dockerd/lib" --exec-root "$work/dockerd/run" \
    -H "unix://$work/dockerd/d.sock" -p "$work/dockerd/pid" --bip 10.232.7.1/24 >"$work/dockerd.log" 2>&1 &
  pids+=($!)
  # shellcheck disable=SC2034
  dockerd_pid=$!
  wait_for 30 docker -H "unix://$work/dockerd/d.sock" version
}

# compare RUNS NAME COMMAND NAME COMMAND ...: runs the commands in turn (A B A B …)
# and prints, for each, minimum, median and maximum in ms and the ratio of the
# medians to the last one.
compare() {
  local runs=$1; shift
  local -a names=() cmds=()
  while [ $# -gt 0 ]; do names+=("$1"); cmds+=("$2"); shift 2; done
  local i r t0 t1
  for i in "${!cmds[@]}"; do : >"$work/times.$i"; bash -c "${cmds[$i]}" >/dev/null; done # a warm-up
  for ((r = 0; r < runs; r++)); do
    for i in "${!cmds[@]}"; do
      t0=$(date +%s%N)
      bash -c "${cmds[$i]}" >/dev/null
      t1=$(date +%s%N)
      echo $(((t1 - t0) / 1000)) >>"$work/times.$i"
    done
  done
  local last=$((${#cmds[@]} - 1))
  local base; base=$(median "$work/times.$last")
  printf '%-28s %9s %9s %9s %8s\n' "" min median max ratio
  for i in "${!cmds[@]}"; do
    sort -n "$work/times.$i" | awk -v name="${names[$i]}" -v base="$base" '
      {t[NR] = $1} END {m = t[int((NR + 1) / 2)]; printf "%-28s %6.1f ms %6.1f ms %6.1f ms %8.2f\n", name, t[1] / 1000, m / 1000, t[NR] / 1000, m / base}'
  done
}

median() { sort -n "$1" | awk '{t[NR] = $1} END {print t[int((NR + 1) / 2)]}'; }
