#!/bin/sh
# Times pull + unpack of a large image (5 layers, about 1.2 GB, 100,000 files) from a registry
# on loopback: hako against `ctr image pull` and `podman pull`, alternating, and prints
# the medians and their ratios. Needs root, Go, and about 8 GB in $BENCH_DIR.
#
#   test/bench/pull.sh [ROUNDS]          (default 3)
#
# BENCH_DIR   where everything is put (default: a fresh directory in $TMPDIR; removed)
# BENCH_IMAGE an image layout made before, to be used again and kept
# CONTAINERD  containerd to compare with (default: the one in $PATH), beside its ctr
set -eu
cd "$(dirname "$0")/../.."
rounds=${1:-3}
dir=${BENCH_DIR:-$(mktemp -d "${TMPDIR:-/tmp}/hako-bench.XXXXXX")}
mkdir -p "$dir"
image=${BENCH_IMAGE:-$dir/image}
registry_pid="" containerd_pid=""
stop() { if [ -n "$1" ]; then kill "$1" 2>/dev/null || true; wait "$1" 2>/dev/null || true; fi; }
cleanup() {
	stop "$containerd_pid"
	stop "$registry_pid"
	rm -rf "${dir:?}/hako" "$dir/containerd" "$dir/podman" "${dir:?}/bin"
	[ -n "${BENCH_DIR:-}" ] || rm -rf "$dir"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

export CGO_ENABLED=0
mkdir -p "$dir/bin"
go build -o "$dir/bin/" ./test/registry ./test/bench/pull ./test/bench/mkimage

if [ ! -f "$image/index.json" ]; then
	go=$(go env GOROOT) mod=$(go env GOMODCACHE)
	present() { out=; for d in "$@"; do [ ! -d "$d" ] || out="$out${out:+,}$d"; done; echo "${out:-/usr/share}"; }
	"$dir/bin/mkimage" "$image" 250000000 40000 \
		"$go" \
		"$(present /usr/share/doc /usr/share/man /usr/share/locale /usr/share)" \
		"$(present /usr/include /usr/lib/python3 /usr/lib/node_modules /usr/bin)" \
		"$(present "$mod"/github.com "$mod"/golang.org "$mod"/google.golang.org /usr/lib/gcc)" \
		"$(present /usr/lib/google-cloud-sdk/lib /usr/lib/x86_64-linux-gnu /usr/lib/aarch64-linux-gnu)"
fi

"$dir/bin/registry" -listen 127.0.0.1:0 big="$image" >"$dir/registry.address" &
registry_pid=$!
for _ in $(seq 100); do [ -s "$dir/registry.address" ] && break; sleep 0.1; done
ref=$(cat "$dir/registry.address")/big:latest

now() { date +%s.%N; }
since() { echo "$(now) $1" | awk '{ printf "%.2f", $1 - $2 }'; }

pull_hako() {
	mkdir -p "$dir/hako"
	start=$(now)
	"$dir/bin/pull" -root "$dir/hako" "$ref" >/dev/null
	took=$(since "$start")
	rm -rf "$dir/hako"
}

pull_ctr() {
	mkdir -p "$dir/containerd"
	cat >"$dir/containerd/config.toml" <<-END
		version = 2
		root = "$dir/containerd/root"
		state = "$dir/containerd/state"
		disabled_plugins = ["io.containerd.grpc.v1.cri"]
		[grpc]
		  address = "$dir/containerd/containerd.sock"
	END
	containerd=${CONTAINERD:-$(command -v containerd)}
	"$containerd" -c "$dir/containerd/config.toml" >"$dir/containerd/log" 2>&1 &
	containerd_pid=$!
	for _ in $(seq 50); do [ -S "$dir/containerd/containerd.sock" ] && break; sleep 0.1; done
	sleep 0.5
	start=$(now)
	ctr -a "$dir/containerd/containerd.sock" image pull --plain-http "$ref" >/dev/null
	took=$(since "$start")
	stop "$containerd_pid"
	containerd_pid=
	rm -rf "$dir/containerd"
}

pull_podman() {
	start=$(now)
	podman --root "$dir/podman/root" --runroot "$dir/podman/run" --storage-driver overlay \
		pull -q --tls-verify=false "$ref" >/dev/null
	took=$(since "$start")
	podman --root "$dir/podman/root" --runroot "$dir/podman/run" --storage-driver overlay rmi -af >/dev/null 2>&1 || true
	rm -rf "$dir/podman"
}

tools=hako
[ -z "$(command -v ctr)" ] || tools="$tools ctr"
[ -z "$(command -v podman)" ] || [ -n "${BENCH_SKIP_PODMAN:-}" ] || tools="$tools podman"
for round in $(seq "$rounds"); do
	for tool in $tools; do
		sync
		"pull_$tool"
		echo "$took" >>"$dir/times.$tool"
		echo "round $round: $tool ${took}s"
	done
done
median() { sort -n "$dir/times.$1" | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
ours=$(median hako)
for tool in $tools; do
	theirs=$(median "$tool")
	echo "$tool $theirs s; hako is $(echo "$ours $theirs" | awk '{ printf "%.2f", $1 / $2 }') of it"
	rm -f "$dir/times.$tool"
done
