#!/bin/bash
# Compares hako-oci with crun and runc: `run` of a static program that does nothing, with
# the default specification, with a seccomp profile, and in a user namespace; create, start
# and delete of it; and `exec` of it in a running container. Prints wall and CPU times and
# hako-oci's part of each peer's.
# Usage: oci.sh [PATH_OF_HAKO_OCI [RUNS [PEER ...]]] (root, Go, jq, a C compiler or
# busybox-static). The peers are paths; without any, those called crun and runc.
#
# crun wants ociVersion 1.0.2 and, where the machine has cgroup v1, every controller in a v1
# hierarchy: a missing hugetlb is taken from cgroup v2 and mounted, in a mount namespace of
# our own, and given back afterwards. While it is away nobody can limit huge pages on v2.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
oci=$(realpath "${1:-$root/bin/hako-oci}")
runs=${2:-200}
peers=("${@:3}")
[ ${#peers[@]} -gt 0 ] || peers=(crun runc)
if [ "${HAKO_BENCH_NS:-}" = "" ]; then exec env HAKO_BENCH_NS=1 unshare -m "$0" "$oci" "$runs" "${peers[@]}"; fi
w=$(mktemp -d)
# State is kept in memory, where all of them keep it by default (/run): to remove a folder
# from a disk is a wait for the disk.
state=$w
for d in /run /dev/shm; do
	if [ "$(findmnt -no FSTYPE -T $d)" = tmpfs ]; then state=$(mktemp -d "$d/bench.XXXXXX"); break; fi
done
arch=$(uname -m)
export arch
runtimes=()
# shellcheck source=test/bench/hierarchies.sh
. "$root/test/bench/hierarchies.sh"

cleanup() {
	set +e
	for i in "${!runtimes[@]}"; do
		"${runtimes[i]}" --root "$state/root$i" delete --force "bench-x$i" >/dev/null 2>&1
		"${runtimes[i]}" --root "$state/root$i" delete --force "bench-$i" >/dev/null 2>&1
	done
	hierarchies_back 'bench-*'
	# crun makes plain folders for hierarchies that the kernel has and nobody mounts.
	find /sys/fs/cgroup -mindepth 2 -fstype tmpfs -path '/sys/fs/cgroup/*/bench-*' -delete
	cd /
	rm -rf "$w" "$state"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
hierarchies_mount hugetlb

mkdir -p "$state/rootfs/bin" "$w/plain" "$w/seccomp" "$w/userns" "$w/sleeper"
chmod 755 "$w"
# The program has no C library: that of Debian spends half a millisecond of a virtual
# machine's time on asking the processor what it can do.
if command -v cc >/dev/null; then
	case $(uname -m) in
	x86_64) leave='mov $60,%eax; xor %edi,%edi; syscall' ;;
	*) leave='mov x8,93; mov x0,0; svc 0' ;;
	esac
	echo "void _start(void) { __asm__(\"$leave\"); }" | cc -static -nostdlib -O2 -x c -o "$state/rootfs/bin/true" -
	printf '#include <unistd.h>\nint main(void){for(;;)pause();}' | cc -static -O2 -x c -o "$state/rootfs/bin/pause" -
	pause='["/bin/pause"]'
else
	cp "$(command -v busybox)" "$state/rootfs/bin/true"
	cp "$state/rootfs/bin/true" "$state/rootfs/bin/busybox"
	pause='["/bin/busybox","sleep","100000"]'
fi
# What is measured is a program as it is installed: a copy. See the Makefile.
cp "$oci" "$w/hako-oci"
oci=$w/hako-oci
(cd "$root" && CGO_ENABLED=0 go build -o "$w/turns" ./test/bench/turns)
cd "$w"
"$oci" spec
jq --arg r "$state/rootfs" '.ociVersion="1.0.2" | .process.args=["/bin/true"] | .process.terminal=false | .root.path=$r' config.json >plain/config.json
jq --argjson a "$pause" '.process.args=$a' plain/config.json >sleeper/config.json
jq '.linux.namespaces+=[{"type":"user"}] | .linux.uidMappings=[{"containerID":0,"hostID":100000,"size":65536}] | .linux.gidMappings=.linux.uidMappings' plain/config.json >userns/config.json
profile=/usr/share/containers/seccomp.json
if [ -f $profile ]; then # what Docker's has for everybody
	jq --slurpfile p $profile '.linux.seccomp = ($p[0] | {defaultAction, defaultErrnoRet,
		architectures: (if env.arch == "aarch64" then ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"] else ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"] end),
		syscalls: [.syscalls[] | select((.includes // {} | length) == 0)
			| {names, action, args: (if (.args // []) == [] then null else .args end), errnoRet} | with_entries(select(.value != null))]})' plain/config.json >seccomp/config.json
else
	echo "bench: $profile is missing (package golang-github-containers-common): no seccomp profile is tried" >&2
fi

names=()
for rt in "$oci" "${peers[@]}"; do
	path=$(command -v "$rt") || { echo "bench: $rt is not installed" >&2; continue; }
	if ! "$path" --root "$state/root${#names[@]}" run --bundle "$w/plain" bench-probe >/dev/null 2>"$w/err"; then
		echo "bench: $rt does not run here: $(head -c 200 "$w/err")" >&2
		continue
	fi
	runtimes+=("$path")
	names+=("$(basename "$rt")")
done

# compare TITLE PART ...: the runtimes in turn; in a part, R is the runtime with its flags and
# ID the container.
compare() {
	local title=$1 all=() i part
	shift
	for i in "${!runtimes[@]}"; do
		[ "$i" = 0 ] || all+=(--)
		all+=("${names[i]}")
		for part in "$@"; do
			case $part in
			R) all+=("${runtimes[i]}" --root "$state/root$i") ;;
			ID) all+=("bench-$i") ;;
			XID) all+=("bench-x$i") ;;
			*) all+=("$part") ;;
			esac
		done
	done
	echo "$title"
	"$w/turns" "$runs" "${all[@]}"
}

compare "run of a static program, default specification:" R run --bundle "$w/plain" ID
[ -s seccomp/config.json ] && compare "the same with a seccomp profile:" R run --bundle "$w/seccomp" ID
compare "the same in a user namespace:" R run --bundle "$w/userns" ID
compare "create, start and delete of it:" R create --bundle "$w/plain" ID + R start ID + R delete --force ID
for i in "${!runtimes[@]}"; do
	"${runtimes[i]}" --root "$state/root$i" run -d --bundle "$w/sleeper" "bench-x$i" </dev/null >/dev/null 2>"$w/err" || { cat "$w/err" >&2; exit 1; }
done
compare "exec of it in a running container:" R exec XID /bin/true
if command -v strace >/dev/null; then
	echo "system calls of one run, with all threads and children:"
	for i in "${!runtimes[@]}"; do
		strace -f -c -o "$w/calls" "${runtimes[i]}" --root "$state/root$i" run --bundle "$w/plain" "bench-$i" >/dev/null
		echo "  ${names[i]}: $(awk '/ total$/ {print $4}' "$w/calls"), without waiting in the Go runtime (futex, nanosleep, sched_yield): $(awk '$NF ~ /^(futex|nanosleep|sched_yield|clock_nanosleep)$/ {n += $4} / total$/ {t = $4} END {print t - n}' "$w/calls")"
	done
fi
