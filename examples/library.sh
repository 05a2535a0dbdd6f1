#!/usr/bin/env bash
# A container without a daemon and without a command line: library.go, a program of eighty lines
# that uses the Go library oci/. As root, with Go. The only program in the container is hako-oci
# itself, which is a static binary that is at hand. HAKO_OCI names another binary.
set -euo pipefail
oci=$(command -v "${HAKO_OCI:-hako-oci}")
oci=$(readlink -f "$oci")
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

mkdir -p "$dir/rootfs/bin"
cp "$oci" "$dir/rootfs/bin/hako-oci"
(cd "$here" && CGO_ENABLED=0 go build -o "$dir/library" library.go)
"$dir/library" "$dir/state" "library-$$" "$dir/rootfs" hako-oci --version
