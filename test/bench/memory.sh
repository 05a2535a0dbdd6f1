#!/usr/bin/env bash
# Memory: hakod idle, hakod with 50 containers, hako-shim of an idle container
# (PSS), and dockerd with containerd where they are installed.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
rss() { awk '/^VmRSS/ {printf "%.1f MB\n", $2 / 1000}' "/proc/$1/status"; }
pss() { awk '/^Pss:/ {print $2}' "/proc/$1/smaps_rollup"; }
start_hakod hako
h="docker -H unix://$work/hako/run/docker.sock"
sleep 3
echo "hakod idle, no container, RSS:      $(rss "$hakod_pid")"
$h load -q -i "$root/demo/image/demo-$(go env GOARCH).tar.gz" >/dev/null
# shellcheck disable=SC2086 # a command with its arguments
bench_cleanup() { $h ps -aq | xargs -r $h rm -f >/dev/null; }
$h run -d --name one hako/demo sleep 1000 >/dev/null
sleep 5
shim=$(pgrep -f "hako-shim.*$work" | head -1)
echo "hako-shim of an idle container, PSS: $(pss "$shim") kB"
for i in $(seq 49); do $h run -d --name "c$i" hako/demo sleep 1000 >/dev/null; done
sleep 5
echo "hakod with 50 containers, RSS:      $(rss "$hakod_pid")"
total=0; n=0
for pid in $(pgrep -f "hako-shim.*$work"); do total=$((total + $(pss "$pid"))); n=$((n + 1)); done
echo "hako-shim, PSS, mean of $n:          $((total / n)) kB"
missing dockerd docker.io && exit 0
start_dockerd
sleep 3
sum=0
for pid in "$dockerd_pid" $(pgrep -P "$dockerd_pid"); do sum=$((sum + $(awk '/^VmRSS/ {print $2}' "/proc/$pid/status"))); done
echo "dockerd and containerd idle, RSS:   $((sum / 1000)) MB"
