#!/usr/bin/env bash
# Image tools: an image goes out of the daemon into a folder, is compressed in another way, compared,
# and put into an archive. Needs a running hakod; hako finds it by $HAKO_HOST, or at its
# default socket. HAKO names another binary.
set -euo pipefail
hako=${HAKO:-hako}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

# The demo image is built into hako; nothing is downloaded.
"$hako" inspect --type image hako/demo >/dev/null 2>&1 || "$hako" load --demo

echo "== out of the daemon, into an OCI layout: the digest stays"
digest=$("$hako" image copy -q hako/demo "oci:$dir/layout:demo")
[ "$digest" = "$("$hako" image inspect --format '{{.digest}}' local:hako/demo)" ]
echo "$digest"

echo "== the same image with zstd layers"
"$hako" image convert -q --to zstd "oci:$dir/layout:demo" "oci:$dir/layout:zstd"
"$hako" image list-tags "oci:$dir/layout"

echo "== what differs: how the layers are compressed, and no file"
"$hako" image diff "oci:$dir/layout:demo" "oci:$dir/layout:zstd"

echo "== an archive for docker load"
"$hako" image copy -q "oci:$dir/layout:demo" "docker-archive:$dir/demo.tar:example/demo:1"
"$hako" image inspect "docker-archive:$dir/demo.tar"
