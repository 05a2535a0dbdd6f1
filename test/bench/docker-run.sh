#!/usr/bin/env bash
# docker run --rm IMAGE true, the same client and image: hakod against dockerd.
# Usage: test/bench/docker-run.sh [RUNS]
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
runs=${1:-20}
missing docker docker.io && exit 0
missing dockerd docker.io && exit 0
start_hakod hako
start_dockerd
h="docker -H unix://$work/hako/run/docker.sock"
d="docker -H unix://$work/dockerd/d.sock"
image=$root/demo/image/demo-$(go env GOARCH).tar.gz
for e in "$h" "$d"; do $e load -q -i "$image"; done
for net in ${NETS:-bridge none host}; do
  echo "network $net, docker run --rm hako/demo true:"
  compare "$runs" hakod "$h run --rm --network $net hako/demo true" dockerd "$d run --rm --network $net hako/demo true"
done
