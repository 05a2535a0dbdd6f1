#!/bin/bash
# Compares hako-oci with the installed runc and crun: `run` of a static program that does
# nothing, and `exec` of it in a running container, with the default specification. Prints
# wall and CPU times and their ratios to each peer.
# Usage: oci.sh [PATH_OF_HAKO_OCI [RUNS]] (root, hyperfine, jq, a C compiler or busybox-static).
#
# crun wants ociVersion 1.0.2 and, where the machine has cgroup v1, every controller in a v1
# hierarchy: a missing hugetlb is taken from cgroup v2 and mounted, in a mount namespace of
# our own, and given back afterwards. While it is away nobody can limit huge pages on v2.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
oci=$(realpath "${1:-$root/bin/hako-oci}")
runs=${2:-100}
if [ "${HAKO_BENCH_NS:-}" = "" ]; then exec env HAKO_BENCH_NS=1 unshare -m "$0" "$oci" "$runs"; fi
w=$(mktemp -d)
# shellcheck source=test/bench/hierarchies.sh
. "$root/test/bench/hierarchies.sh"

cleanup() {
	set +e
	for rt in hako crun runc; do
		[ -f "$w/$rt.running" ] && "$(cat "$w/$rt.running")" --root "$w/$rt" delete --force "bench-x$rt" >/dev/null 2>&1
	done
	hierarchies_back 'bench-*'
	cd /
	rm -rf "$w"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
hierarchies_mount hugetlb

mkdir -p "$w/rootfs/bin" "$w/sleeper"
if command -v cc >/dev/null; then
	echo 'int main(void){return 0;}' | cc -static -O2 -x c -o "$w/rootfs/bin/true" -
	printf '#include <unistd.h>\nint main(void){for(;;)pause();}' | cc -static -O2 -x c -o "$w/rootfs/bin/pause" -
	pause='["/bin/pause"]'
else
	cp "$(command -v busybox)" "$w/rootfs/bin/true"
	pause='["/bin/true","sleep","100000"]'
	cp "$w/rootfs/bin/true" "$w/rootfs/bin/busybox"
	pause=${pause/true/busybox}
fi
cd "$w"
"$oci" spec
jq '.ociVersion="1.0.2" | .process.args=["/bin/true"] | .process.terminal=false' config.json >c && mv c config.json
jq --argjson a "$pause" --arg r "$w/rootfs" '.process.args=$a | .root.path=$r' config.json >sleeper/config.json

# compare TITLE NAME COMMAND ...: several short series, one command after the other in
# turn, so that all meet the same noise.
compare() {
	local title=$1 names=() commands=() i
	shift
	while [ $# -gt 0 ]; do names+=("$1"); commands+=("$2"); shift 2; done
	for i in 1 2 3 4 5; do
		hyperfine -N --style none --warmup 3 --runs $((runs / 5)) --export-json "$w/r$i" "${commands[@]}" >/dev/null 2>&1
	done
	echo "$title"
	jq -s -r --arg names "${names[*]}" '
		def r: . * 100 | round / 100;
		def med: sort | .[length / 2 | floor];
		($names | split(" ")) as $n
		| [range($n | length) as $i | {name: $n[$i], t: [.[].results[$i].times[]], cpu: [.[].results[$i] | .user + .system]}]
		| .[0] as $h | .[]
		| "  \(.name): min \((.t | min) * 1e3 | r) ms, median \((.t | med) * 1e3 | r) ms, CPU \((.cpu | med) * 1e3 | r) ms"
			+ if .name == $h.name then "" else "; hako-oci takes \(($h.t | min) / (.t | min) | r) x min, \(($h.t | med) / (.t | med) | r) x median, \(($h.cpu | med) / (.cpu | med) | r) x CPU" end' "$w"/r?
	rm -f "$w"/r?
}

run=(hako-oci "$oci --root $w/hako run bench-hako")
exe=()
for rt in hako crun runc; do
	bin=$rt
	[ $rt = hako ] && bin=$oci
	command -v "$bin" >/dev/null || { echo "bench: $rt is not installed" >&2; continue; }
	if ! "$bin" --root "$w/$rt" run bench-probe >/dev/null 2>"$w/err"; then
		echo "bench: $rt does not run here: $(head -c 200 "$w/err")" >&2
		continue
	fi
	[ $rt = hako ] || run+=("$rt" "$rt --root $w/$rt run bench-$rt")
	if "$bin" --root "$w/$rt" run -d --bundle "$w/sleeper" "bench-x$rt" </dev/null >/dev/null 2>"$w/err"; then
		echo "$bin" >"$w/$rt.running"
		exe+=("${rt/hako/hako-oci}" "$bin --root $w/$rt exec bench-x$rt /bin/true")
	fi
done
compare "run of a static program, default specification:" "${run[@]}"
compare "exec of it in a running container:" "${exe[@]}"
if command -v strace >/dev/null; then
	echo "system calls of one run, with all threads and children:"
	for ((i = 0; i < ${#run[@]}; i += 2)); do
		read -ra command <<<"${run[i + 1]}"
		strace -f -c -o "$w/calls" "${command[@]}" >/dev/null
		echo "  ${run[i]}: $(awk '/ total$/ {print $4}' "$w/calls"), without waiting in the Go runtime (futex, nanosleep, sched_yield): $(awk '$NF ~ /^(futex|nanosleep|sched_yield|clock_nanosleep)$/ {n += $4} / total$/ {t = $4} END {print t - n}' "$w/calls")"
	done
fi
