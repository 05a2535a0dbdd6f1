# shellcheck shell=bash
# To be sourced: controllers of cgroup v1 that the machine has, and has not mounted, are
# mounted for the time of a test, in a mount namespace of the script's own (unshare -m).
#
#   hierarchies_mount CONTROLLER...      those that the machine lacks are left out
#   hierarchies_back PATTERN...          with names of cgroups that may have been left behind
#
# A controller is first taken from cgroup v2, and given back afterwards. While it is away
# nobody can use it there. On a machine without cgroup v1 nothing happens.
hierarchies_root=/sys/fs/cgroup
hierarchies_taken=()   # "CONTROLLER DIRECTORY" of v2 cgroups that had handed it down
hierarchies_mounted=()
hierarchies_own=       # the mount points are in a directory of our own

# hierarchies_copy makes /sys/fs/cgroup a directory of our own: a mount point that others
# see would make them believe that there is a hierarchy.
hierarchies_copy() {
	local old h
	[ ! "$hierarchies_own" ] || return 0
	old=$(mktemp -d)
	mount --rbind $hierarchies_root "$old"
	mount -t tmpfs -o mode=755 tmpfs $hierarchies_root
	for h in "$old"/*; do
		if mountpoint -q "$h"; then mkdir "$hierarchies_root/${h##*/}" && mount --rbind "$h" "$hierarchies_root/${h##*/}"; fi
		if [ -L "$h" ]; then cp -P "$h" $hierarchies_root/; fi
	done
	umount -l "$old"
	rmdir "$old"
	hierarchies_own=1
}

hierarchies_mount() {
	local c d v2=$hierarchies_root/unified
	[ -d $hierarchies_root/memory ] && [ -d $v2 ] || return 0
	hierarchies_copy
	for c in "$@"; do
		grep -q "^$c	" /proc/cgroups || continue
		awk -v c="$c" '$3 == "cgroup" {n = split($4, o, ","); for (i = 1; i <= n; i++) if (o[i] == c) found = 1} END {exit !found}' /proc/mounts && continue
		while read -r d; do
			if grep -qw "$c" "$d/cgroup.subtree_control" 2>/dev/null && echo "-$c" 2>/dev/null >"$d/cgroup.subtree_control"; then
				hierarchies_taken=("$c $d" "${hierarchies_taken[@]}")
			fi
		done < <(find $v2 -type d -printf '%d %p\n' | sort -rn | cut -d' ' -f2-)
		mkdir -p "$hierarchies_root/$c"
		for _ in $(seq 20); do
			if mount -t cgroup -o "$c" "$c" "$hierarchies_root/$c" 2>/dev/null; then hierarchies_mounted+=("$c"); continue 2; fi
			sleep 0.3 # until the kernel has let go of removed cgroups
		done
		echo "no v1 hierarchy for $c: another process uses it on cgroup v2" >&2
	done
}

hierarchies_back() {
	local c d entry pattern
	for c in "${hierarchies_mounted[@]}"; do
		for _ in $(seq 20); do
			for pattern in "$@"; do
				find "$hierarchies_root/$c" -mindepth 1 -depth -type d -name "$pattern" -exec rmdir {} + 2>/dev/null || true
			done
			umount "$hierarchies_root/$c" || true
			sleep 0.5
			grep -q ":$c:" /proc/self/cgroup || break
			# Removed cgroups keep a hierarchy alive for a moment, and then for ever, unless
			# it is mounted and unmounted once more.
			mount -t cgroup -o "$c" "$c" "$hierarchies_root/$c" || break
		done
		if grep -q ":$c:" /proc/self/cgroup; then echo "the v1 hierarchy $c is left behind: something else uses it" >&2; fi
	done
	for entry in "${hierarchies_taken[@]}"; do echo "+${entry%% *}" 2>/dev/null >"${entry#* }/cgroup.subtree_control" || true; done
}
