#!/usr/bin/env bash
# Containers from create to delete, 8 side by side, with hako-oci killed at a random
# moment in 1 % of them: prints wrong exit codes and what was left behind, as root.
# Usage: test/bench/oci-lives.sh [LIVES] [SIDE_BY_SIDE] [SHARE_KILLED]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"
CGO_ENABLED=0 go build -ldflags "-E main.entry" -o "$work/hako-oci" ./cmd/hako-oci # as make build
CGO_ENABLED=0 go build -o "$work/ocilives" ./test/bench/ocilives
"$work/ocilives" -oci "$work/hako-oci" -lives "${1:-1000}" -side "${2:-8}" -killed "${3:-0.01}"
