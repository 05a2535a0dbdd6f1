#!/usr/bin/env bash
# Lives of pods through the CRI, many side by side, on a daemon of its own in a network namespace of its
# own: prints errors, how long the calls took and what was left behind.
# Usage: test/bench/pods.sh [-n host|builtin|cni] [-b FOLDER_OF_HAKOD] [FLAGS OF test/bench/pods...]
#   test/bench/pods.sh                              500 lives, 16 side by side, for each network
#   test/bench/pods.sh -n cni -exhaust 10           a /24 exhausted and reused
#   test/bench/pods.sh -n builtin -kill 100         kill -9 of the daemon at 100 random moments
# (root, busybox-static, curl, nftables; for cni: containernetworking-plugins.)
set -euo pipefail
if [ -z "${HAKO_PODS_INSIDE:-}" ]; then
  HAKO_PODS_INSIDE=1 exec unshare --net --mount --ipc --propagation slave "$0" "$@"
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
networks="host builtin cni" bin=$root/bin
while [ $# -gt 0 ]; do
  case $1 in
  -n) networks=$2; shift 2 ;;
  -b) bin=$(realpath "$2"); shift 2 ;;
  -h | --help) sed -n 's/^# \?//; 2,8p' "$0"; exit ;;
  *) break ;;
  esac
done
mount --make-rshared /
ip link set lo up
w=$(mktemp -d "${TMPDIR:-/tmp}/hako-pods.XXXXXX")
pids=()
cleanup() {
  status=$?
  trap - EXIT
  for p in "${pids[@]}"; do kill "$p" 2>/dev/null || true; done
  for p in "${pids[@]}"; do wait "$p" 2>/dev/null || true; done
  if [ -x "$w/hakod" ]; then
    for n in $networks; do
      if [ -e "$w/$n" ]; then "$w/hakod" --config /dev/null --root "$w/$n/lib" --state "$w/$n/run" --bridge-name hkpods0 cleanup || true; fi
    done
  fi
  find /sys/fs/cgroup -depth -type d -path "*/hako-pods-$$*" -exec rmdir {} + 2>/dev/null || true
  if [ -n "${KEEP:-}" ]; then echo "kept: $w" >&2; exit "$status"; fi
  cd / && rm -rf --one-file-system "$w"
  exit "$status"
}
trap cleanup EXIT
# A copy, so that a build meanwhile does no harm, and processes can be told apart by their path.
cp "$bin/hakod" "$bin/hako-shim" "$w/"
(cd "$root" && CGO_ENABLED=0 go build -o "$w/pods" ./test/bench/pods)
"$root/test/kubelet/image.sh" "$w/image"
tar -C "$w/image" -cf "$w/image.tar" .
mkdir "$w/cni"
cat >"$w/cni/10-pods.conflist" <<T
{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "hkpods1", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$w/ipam", "ranges": [[{"subnet": "10.213.7.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
T

# What the daemon of a network has, by kind.
census() {
  local d=$w/$1
  # Layers of images stay mounted from their first use on.
  echo "mounts $(grep "$w/" /proc/self/mountinfo | grep -vc "$d/run/erofs/" || true)"
  echo "interfaces $(ip -o link | grep -vc -e hkpods -e ': lo:' || true)"
  echo "namespaces $(find "$d/run" -path '*netns/*' | wc -l)"
  # Of the groups that the daemon makes itself, those of pods that its log or the client named: other
  # daemons have some, too.
  echo "cgroups $(find /sys/fs/cgroup -type d -path '*/hako/pod*' | grep -oE 'pod[0-9a-f]{64}' | cut -c4- | grep -cFf <(grep -oE '[0-9a-f]{64}' "$d/log") || true)"
  echo "containers' cgroups $(find /sys/fs/cgroup -mindepth 3 -type d -path "*/hako-pods-$$/*" | wc -l)"
  echo "sandboxes $(find "$d/run/sandboxes" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l)"
  echo "bundles $(find "$d/run/containers" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l)"
  echo "containers $(find "$d/lib/containers" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l)"
  echo "snapshots $(find "$d/lib/overlayfs" "$d/lib/erofs" -mindepth 2 -maxdepth 2 2>/dev/null | wc -l)"
  echo "cni addresses $(find "$w/ipam" -type f -name '10.*' 2>/dev/null | wc -l)"
  echo "cni results $(find "$d/lib/cni" -type f ! -name '*lock*' 2>/dev/null | wc -l)"
  echo "rules $(nft list ruleset 2>/dev/null | grep -cE -e '10\.213\.[78]\.([2-9]|[1-9][0-9])' -e CNI-DN || true)"
  echo "processes $(for e in /proc/[0-9]*/exe; do readlink "$e" || true; done 2>/dev/null | grep -c -e "^$w/hako-shim" -e "^$w/.*overlay" || true)"
}

failed=0
for net in $networks; do
  d=$w/$net
  mkdir -p "$d/logs"
  pods=pod hako=$net
  [ "$net" = host ] && pods=host hako=builtin
  daemon=("$w/hakod" --config /dev/null --root "$d/lib" --state "$d/run" --network "$hako" --cni-conf-dir "$w/cni" --cni-bin-dir "${CNI_BIN:-/opt/cni/bin:/usr/lib/cni}"
    --containerd-socket "" --bridge-name hkpods0 --bridge-subnet 10.213.8.0/24 --log-level debug)
  "${daemon[@]}" >>"$d/log" 2>&1 & pids=($!)
  for _ in $(seq 100); do [ -S "$d/run/cri.sock" ] && break; sleep 0.1; done
  curl -sS --unix-socket "$d/run/docker.sock" -X POST -H 'Content-Type: application/x-tar' --data-binary @"$w/image.tar" 'http://d/images/load?quiet=1' | grep -q 'Loaded image' || { echo "the image was not loaded" >&2; exit 1; }
  "$w/pods" -socket "$d/run/cri.sock" -image hako-busybox -net $pods -cgroup /hako-pods-$$ -logs "$d/logs" -lives 1 -keep 0 >/dev/null 2>>"$d/log" # a warm-up
  sleep 1
  census "$net" >"$d/before"
  kill "${pids[0]}"; wait "${pids[0]}" || true; pids=()
  echo "== network: $net"
  "$w/pods" -socket "$d/run/cri.sock" -image hako-busybox -net $pods -cgroup /hako-pods-$$ -logs "$d/logs" "$@" -- "${daemon[@]}" 2>>"$d/log" || failed=1
  "${daemon[@]}" >>"$d/log" 2>&1 & pids=($!)
  sleep 3 # what ends asynchronously has a moment to do so
  nft list ruleset >"$d/rules" 2>/dev/null || true
  census "$net" >"$d/after"
  kill "${pids[0]}"; wait "${pids[0]}" || true; pids=()
  if diff "$d/before" "$d/after"; then echo "nothing was left behind"; else echo "left behind: see above"; failed=1; fi
done
exit $failed
