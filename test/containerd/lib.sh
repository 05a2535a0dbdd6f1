# shellcheck shell=bash
# Sourced by the scripts in this folder: a world of its own (network, mounts, processes) with a
# registry of test images in it, and a daemon that speaks containerd's API, hakod or containerd.
# What it needs: root, go, a static busybox, iproute2.

# enter SCRIPT ARGUMENTS...: runs the script again inside, with $w, a temporary folder; returns only there.
enter() {
	if [ -n "${HAKO_WORLD:-}" ]; then w=$HAKO_WORLD; world; return; fi
	local here code=0 pid
	here=$(cd "$(dirname "$1")" && pwd)
	busybox=$(command -v busybox) || { echo "busybox-static is not installed" >&2; exit 1; }
	w=$(mktemp -d /var/tmp/hako-world.XXXXXX)
	mkdir "$w/path"
	if [ -n "${TESTIMAGES:-}" ]; then ln -s "$TESTIMAGES" "$w/testimages"
	else (cd "$here" && CGO_ENABLED=0 go build -o "$w/testimages" ./testimages); fi
	"$w/testimages" -busybox "$busybox" -digests "$w/digests" -http 127.0.0.1:0 & pid=$!
	for _ in $(seq 100); do [ -s "$w/digests" ] && break; sleep 0.1; done
	kill $pid; wait $pid 2>/dev/null || true
	if type before >/dev/null 2>&1; then before "${@:2}"; fi
	HAKO_WORLD=$w HAKO_BUSYBOX=$busybox unshare --net --mount --ipc --pid --fork --kill-child --mount-proc --propagation slave "$@" || code=$?
	# Groups of processes that are gone; all of them are in the namespaces' names.
	find /sys/fs/cgroup -mindepth 2 -depth -type d \( -path '*/hw-*' -o -path '*/testing*' -o -path '*/tracing*' -o -path '*/buildkit*' -o -path '*/containerd/shim' -o -path '*/containerd/oomshim' \) -exec rmdir {} + 2>/dev/null || true
	if [ -s "$w/cgroups" ]; then while read -r c; do rmdir /sys/fs/cgroup/*/"$c" 2>/dev/null || true; done <"$w/cgroups"; fi
	rmdir /tmp/runc-test 2>/dev/null || true
	rm -rf --one-file-system "$w"
	exit $code
}

world() {
	ip link set lo up
	mount -t tmpfs -o mode=755 none /run
	mkdir -p "$w/var-lib" "$w/etc-cni" "$w/tmp" /run/lock
	mount --bind "$w/var-lib" /var/lib # what daemons and clients keep at fixed places is theirs alone
	[ ! -d /etc/cni ] || mount --bind "$w/etc-cni" /etc/cni
	export CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 TMPDIR=$w/tmp SSL_CERT_FILE=$w/ca.pem PATH=$w/path:$PATH
	unset HTTP_PROXY HTTPS_PROXY http_proxy https_proxy ALL_PROXY all_proxy
	echo "127.0.0.1 localhost ghcr.io registry.k8s.io registry-1.docker.io" >"$w/hosts"
	mount --bind "$w/hosts" /etc/hosts
	# A cgroup v1 hierarchy that somebody has made and not mounted here makes containerd lose all metrics.
	sed -n 's/^[1-9][0-9]*:\([^:]*\):.*/\1/p' /proc/self/cgroup | while read -r c; do
		grep -q " - cgroup .*[ ,]$c\(,.*\)*$" /proc/self/mountinfo && continue
		mkdir -p "$w/cgroup/$c" && mount -t cgroup -o "$c" none "$w/cgroup/$c"
	done
	"$w/testimages" -busybox "$HAKO_BUSYBOX" -ca "$w/ca.pem" -https 127.0.0.1:443 -http 127.0.0.1:5000 2>/dev/null &
	for _ in $(seq 100); do (exec 3<>/dev/tcp/127.0.0.1/443) 2>/dev/null && break; sleep 0.1; done
}

# wrapper BIN_DIR: makes a program "containerd" of hakod, which takes containerd's flags.
wrapper() {
	cat >"$w/path/containerd" <<-'S'
		#!/bin/bash
		root=/var/lib/containerd state=/run/containerd address=/run/containerd/containerd.sock config=
		for a in "$@"; do case $a in oci-hook|config|publish) exec "${HAKO_PEER_DIR:-/nonexistent}/containerd" "$@" ;; esac; done
		while [ $# -gt 0 ]; do
			case $1 in
			--root) root=$2 ;; --state) state=$2 ;; --address) address=$2 ;; --config|-c) config=$2 ;; --log-level) ;;
			*) echo "what is $1?" >&2; exit 2 ;;
			esac
			shift 2
		done
		mkdir -p "$state" "$root"
		: >"$state/hako.toml"
		# How often the restart monitor looks.
		if grep -qs monitor.container.v1.restart "$config"; then
			sed -n 's/^[[:space:]]*interval = /restart-interval = /p' "$config" >"$state/hako.toml"
		fi
		# The cgroup of the daemon, which nobody removes.
		cgroup=$(sed -n '/^\[cgroup\]/,/^\[[^c]/s/^[[:space:]]*path = "\/*\(.*\)"/\1/p' "$config" 2>/dev/null)
		if [ -n "$cgroup" ]; then
			echo "cgroup-path = \"/$cgroup\"" >>"$state/hako.toml"
			echo "$cgroup" >>"$HAKO_WORLD/cgroups"
		fi
		# Daemons of one world want bridges of their own.
		exec hakod --config "$state/hako.toml" --root "$root" --state "$state" --containerd-socket "$address" --docker-socket "" --cri-socket "" --log-level debug \
			--bridge-name "hk$(echo "$root" | cksum | cut -d' ' -f1)" --bridge-subnet "10.$((100 + $(echo "$root" | cksum | cut -d' ' -f1) % 100)).0.0/24"
	S
	chmod +x "$w/path/containerd"
}

# daemon BIN_DIR: starts hakod or containerd of that folder where its clients look for it.
daemon() {
	PATH=$1:$PATH
	export CONTAINERD_ADDRESS=/run/containerd/containerd.sock
	[ ! -x "$1/hakod" ] || wrapper
	mkdir -p /run/containerd /var/lib/containerd
	: >"$w/containerd.toml"
	containerd --config "$w/containerd.toml" --log-level debug >"${DAEMON_LOG:-$w/daemon.log}" 2>&1 &
	for _ in $(seq 200); do [ -S $CONTAINERD_ADDRESS ] && break; sleep 0.1; done
}

# shellcheck disable=SC2034 # read by the scripts
failed=0
is() { # what, got, want
	if [ "$2" = "$3" ]; then echo "ok    $1"; else echo "FAIL  $1: got '$2', want '$3'"; failed=1; fi
}
like() { # what, got, pattern
	# shellcheck disable=SC2034
	if grep -qE -- "$3" <<<"$2"; then echo "ok    $1"; else echo "FAIL  $1: got '$2', want something like '$3'"; failed=1; fi
}
# until_ COMMAND WANT...: waits until the command says so, and prints what it says.
until_() { local got; for _ in $(seq 100); do got=$(eval "$1" 2>&1 || true); [ "$got" = "$2" ] && break; sleep 0.1; done; echo "$got"; }
terminal() { script -qec "timeout --foreground 60 $*" /dev/null </dev/null | tr -d '\r'; }
