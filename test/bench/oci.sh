#!/bin/bash
# Compares hako-oci with the installed runc and crun: `run` of a static program that does
# nothing, with the default specification. Makes the bundle itself, prints ratios of the
# minimum and the mean. Usage: oci.sh PATH_OF_HAKO_OCI [RUNS] (root, hyperfine, jq, a C
# compiler or busybox-static).
#
# crun wants ociVersion 1.0.2, and every controller that the kernel has in a v1
# hierarchy: a missing hugetlb is mounted, in a mount namespace of our own.
set -eu
oci=$(realpath "${1:?usage: oci.sh HAKO_OCI [RUNS]}")
runs=${2:-60}
if [ "${HAKO_BENCH_NS:-}" = "" ]; then exec env HAKO_BENCH_NS=1 unshare -m "$0" "$oci" "$runs"; fi
w=$(mktemp -d)
mounted=
cleanup() { [ -z "$mounted" ] || { umount "$mounted"; rmdir "$mounted"; }; cd /; rm -rf "$w"; }
trap cleanup EXIT
if [ -d /sys/fs/cgroup/memory ] && [ ! -d /sys/fs/cgroup/hugetlb ] && mkdir /sys/fs/cgroup/hugetlb; then
	if mount -t cgroup -o hugetlb cgroup /sys/fs/cgroup/hugetlb 2>/dev/null; then mounted=/sys/fs/cgroup/hugetlb
	else rmdir /sys/fs/cgroup/hugetlb; fi
fi
mkdir -p "$w/rootfs/bin"
if command -v cc >/dev/null; then echo 'int main(void){return 0;}' | cc -static -O2 -x c -o "$w/rootfs/bin/true" -
else cp "$(command -v busybox)" "$w/rootfs/bin/true"; fi
cd "$w"
"$oci" spec
jq '.ociVersion="1.0.2" | .process.args=["/bin/true"] | .process.terminal=false' config.json >c && mv c config.json
commands=("$oci run bench-hako"); names=(hako-oci)
for rt in crun runc; do
	command -v $rt >/dev/null || continue
	if $rt run bench-probe >/dev/null 2>"$w/err"; then commands+=("$rt run bench-$rt"); names+=($rt)
	else echo "$rt does not run here: $(head -c 200 "$w/err")"; fi
done
# Several short series, one runtime after the other, so that all meet the same noise.
for i in 1 2 3 4; do
	hyperfine -N --style none --warmup 3 --runs $((runs / 4)) --export-json "$w/r$i" "${commands[@]}" >/dev/null 2>&1
done
jq -s -r --arg names "${names[*]}" '
	($names | split(" ")) as $n
	| [range($n | length) as $i | {name: $n[$i], t: [.[].results[$i].times[]], cpu: ([.[].results[$i] | .user + .system] | add / length)}]
	| . as $all | ($all[0].t | add / length) as $mean | ($all[0].t | min) as $min | ($all[0].t | sort | .[length / 2 | floor]) as $med
	| $all[] | (.t | add / length) as $m | (.t | sort | .[length / 2 | floor]) as $d
	| "\(.name): min \((.t | min) * 1e5 | round / 100) ms, median \($d * 1e5 | round / 100) ms, mean \($m * 1e5 | round / 100) ms, CPU \(.cpu * 1e5 | round / 100) ms; hako-oci takes \($min / (.t | min) * 100 | round / 100) x min, \($med / $d * 100 | round / 100) x median, \($mean / $m * 100 | round / 100) x mean"' "$w"/r?
