#!/usr/bin/env bash
# 2,000 lives of containers by `ctr run --rm`, 32 loops side by side: prints errors and what was left behind.
# Usage: CTR=/path/of/ctr test/bench/ctr-lives.sh [LIVES] [SIDE_BY_SIDE]
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
lives=${1:-2000} side=${2:-32}
ctr=${CTR:-$(command -v ctr || true)}
[ -n "$ctr" ] || { echo "bench: no ctr (set CTR)" >&2; exit 1; }
start_hakod hako --containerd-socket "$work/c.sock"
docker -H "unix://$work/hako/run/docker.sock" load -q -i "$root/demo/image/demo-$(go env GOARCH).tar.gz" >/dev/null
ns=k8s.io
c="$ctr -a $work/c.sock -n $ns"
image=$($c images ls -q | grep demo | head -1)
# A parent of its own, so that containers of other engines do not count.
parent=/hako-bench-$$
bench_cleanup() { find /sys/fs/cgroup -depth -type d -path "*$parent*" -exec rmdir {} + 2>/dev/null; }
census() {
  echo "mounts $(grep -c "$work/hako" "/proc/$hakod_pid/mountinfo" || true)"
  echo "cgroups $(find /sys/fs/cgroup -type d -path "*$parent/*" | wc -l)"
  echo "containers $($c containers ls -q | wc -l)"
  echo "tasks $($c tasks ls -q | wc -l)"
  echo "leases $($c leases ls -q | wc -l)"
  echo "bundles $(find "$work/hako/run" -name config.json | wc -l)"
  echo "snapshots $(find "$work/hako/lib" -path '*snapshots/*' -maxdepth 4 -name fs | wc -l)"
  echo "shims $(pgrep -fc "hako-shim.*$work" || true)"
  echo "FIFOs $(find /run/containerd/fifo -name 'life-*' 2>/dev/null | wc -l)" # that folder is everybody's
}
run() { # run ID ARGUMENTS...
  $c run --rm --cgroup "$parent/$1" "$image" "$@"
}
run warm /bin/true
sleep 1
census >"$work/before"
t0=$(date +%s%N)
# Every other life says something that must arrive; the others end with a code that must.
# shellcheck disable=SC2016
seq "$lives" | xargs -P "$side" -I{} sh -c 'case $(({} % 2)) in 0) want={}:0 cmd="/bin/echo {}" ;; *) want=:3 cmd="/bin/exit 3" ;; esac
  out=$('"$c"' run --rm --cgroup '"$parent"'/life-{} '"$image"' life-{} $cmd 2>&1); code=$?
  [ "$out:$code" = "$want" ] || echo "life {}: exit $code: $out"' >"$work/errors"
t1=$(date +%s%N)
sleep 3
census >"$work/after"
echo "$lives lives, $side side by side: $(((t1 - t0) / 1000000)) ms, $(wc -l <"$work/errors") errors"
head -5 "$work/errors"
if diff "$work/before" "$work/after"; then echo "nothing was left behind"; else echo "left behind: see above"; exit 1; fi
[ ! -s "$work/errors" ]
