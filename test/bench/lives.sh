#!/usr/bin/env bash
# 500 container lives, 8 side by side: prints errors and what was left behind.
# Usage: test/bench/lives.sh [LIVES] [SIDE_BY_SIDE]
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
lives=${1:-500} side=${2:-8}
start_hakod hako
h="docker -H unix://$work/hako/run/docker.sock"
$h load -q -i "$root/demo/image/demo-$(go env GOARCH).tar.gz" >/dev/null
# A parent of its own, so that containers of other engines do not count.
parent=/hako-bench-$$
bench_cleanup() { find /sys/fs/cgroup -depth -type d -path "*$parent*" -exec rmdir {} + 2>/dev/null; }
in_ns() { nsenter -t "$hakod_pid" -n "$@"; }
census() {
  echo "mounts $(grep -c "$work/hako" "/proc/$hakod_pid/mountinfo" || true)"
  echo "interfaces $(in_ns ip -o link | wc -l)"
  echo "cgroups $(find /sys/fs/cgroup -type d -path "*$parent/*" | wc -l)"
  echo "namespaces $(find "$work/hako/run" -path '*netns/*' | wc -l)"
  echo "bundles $(find "$work/hako/run" -name config.json | wc -l)"
  echo "snapshots $(find "$work/hako/lib" -path '*snapshots/*' -maxdepth 4 -name fs | wc -l)"
  echo "rules $(in_ns nft list ruleset 2>/dev/null | wc -l)"
  echo "shims $(pgrep -fc "hako-shim.*$work" || true)"
}
$h run --rm --cgroup-parent $parent hako/demo true
sleep 1
census >"$work/before"
t0=$(date +%s%N)
# shellcheck disable=SC2016
seq "$lives" | xargs -P "$side" -I{} sh -c 'out=$('"$h"' run --rm --cgroup-parent '"$parent"' hako/demo exit 3 2>&1); code=$?; [ $code -eq 3 ] || echo "life {}: exit $code: $out"' >"$work/errors"
t1=$(date +%s%N)
sleep 2
census >"$work/after"
echo "$lives lives, $side side by side: $(((t1 - t0) / 1000000)) ms, $(wc -l <"$work/errors") errors"
head -5 "$work/errors"
if diff "$work/before" "$work/after"; then echo "nothing was left behind"; else echo "left behind: see above"; exit 1; fi
[ ! -s "$work/errors" ]
