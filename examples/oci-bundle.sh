#!/usr/bin/env bash
# A container without any daemon: hako-oci on a bundle that is made by hand. As root.
# The only program in it is hako-oci itself, which is a static binary that is at hand.
# HAKO_OCI names another binary.
set -euo pipefail
oci=$(command -v "${HAKO_OCI:-hako-oci}")
oci=$(readlink -f "$oci")
dir=$(mktemp -d)
id=example-$$
# State of its own, so that `list` shows only this container.
runtime() { "$oci" --root "$dir/state" "$@"; }
cleanup() {
  runtime delete --force "$id" >/dev/null 2>&1 || true
  rm -rf "$dir"
}
trap cleanup EXIT

mkdir -p "$dir/bundle/rootfs/bin"
cp "$oci" "$dir/bundle/rootfs/bin/hako-oci"
cd "$dir/bundle"
runtime spec
sed -i -e 's|"terminal": true|"terminal": false|' -e 's|"sh"|"hako-oci", "--version"|' config.json

echo "== the plan: what making this container means, down to the system calls"
runtime plan | sed -n 1,12p

echo "== run"
runtime run "$id"

echo "== the same in steps"
runtime create "$id"
runtime state "$id" | grep '"status"'
runtime start "$id"
for _ in $(seq 50); do
  status=$(runtime state "$id" | grep '"status"')
  case $status in *stopped*) break ;; esac
  sleep 0.1
done
echo "$status"
runtime delete "$id"
runtime list
