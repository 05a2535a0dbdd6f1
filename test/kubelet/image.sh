#!/bin/sh
# Makes an image of the machine's static busybox: an OCI layout in the folder DIR, which docker load
# takes as a tar, and test/registry as it is.
# Usage: image.sh DIR [NAME]
set -eu
[ $# -ge 1 ] || { sed -n 's/^# \?//; 2,4p' "$0" >&2; exit 2; }
dir=$1 name=${2:-docker.io/library/hako-busybox:latest}
box=$(command -v busybox)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/bin" "$root/tmp" "$root/etc" "$root/root" "$dir/blobs/sha256"
cp "$box" "$root/bin/busybox"
chmod 755 "$root" # mktemp lets nobody else in
chmod 1777 "$root/tmp"
for p in $("$box" --list); do [ -e "$root/bin/$p" ] || ln -s busybox "$root/bin/$p"; done
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\nnobody:x:65534:\n' >"$root/etc/group"
blob() { # blob FILE: stores it, prints its digest
	d=$(sha256sum "$1" | cut -d' ' -f1)
	cp "$1" "$dir/blobs/sha256/$d"
	echo "sha256:$d"
}
arch=$(uname -m)
case $arch in x86_64) arch=amd64 ;; aarch64) arch=arm64 ;; esac
tar -C "$root" --numeric-owner --owner=0 --group=0 --mtime=@0 --sort=name -cf "$dir/layer" .
layer=$(blob "$dir/layer") size=$(stat -c %s "$dir/layer")
printf '{"architecture":"%s","os":"linux","config":{"Env":["PATH=/bin"],"Cmd":["sh"]},"rootfs":{"type":"layers","diff_ids":["%s"]}}' "$arch" "$layer" >"$dir/config"
config=$(blob "$dir/config") csize=$(stat -c %s "$dir/config")
manifest=application/vnd.oci.image.manifest.v1+json
printf '{"schemaVersion":2,"mediaType":"%s","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"%s","size":%d},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"%s","size":%d}]}' \
	$manifest "$config" "$csize" "$layer" "$size" >"$dir/manifest"
top=$(blob "$dir/manifest") msize=$(stat -c %s "$dir/manifest")
printf '{"schemaVersion":2,"manifests":[{"mediaType":"%s","digest":"%s","size":%d,"annotations":{"io.containerd.image.name":"%s"}}]}' $manifest "$top" "$msize" "$name" >"$dir/index.json"
printf '{"imageLayoutVersion":"1.0.0"}' >"$dir/oci-layout"
rm "$dir/layer" "$dir/config" "$dir/manifest"
