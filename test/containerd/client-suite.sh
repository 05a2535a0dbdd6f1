#!/bin/bash
# Runs containerd's own client tests (integration/client of a containerd checkout) on a live
# daemon: hakod, or containerd itself for comparison. Images come from a registry of its own,
# and all of it lives in namespaces of its own (network, mounts, processes): nothing is left.
# Usage: client-suite.sh CONTAINERD_SRC BIN_DIR RESULTS [ARGUMENTS_OF_GO_TEST...]
#   CONTAINERD_SRC  the source, version 2.4 (the copy in Go's module cache will do)
#   BIN_DIR         hakod and its shims, or containerd and containerd-shim-runc-v2
#   RESULTS         file to write: PASS, FAIL or SKIP and the name of a test, a line each, sorted
# With HAKO_PEER_DIR, a folder with containerd, calls of its other commands (`containerd oci-hook`,
# which a test uses as a hook) go there when BIN_DIR has hakod.
# With RUNC=FILE it is that program which tests get as "runc" (hako-oci knows the containers of hako's shim).
# With EXPECT=FILE (results of containerd) it says what passed there and did not here,
# and ends with 1 if that is more than 3 %.
# LOG=FILE keeps what tests and daemon say. TEST_RUNTIME and TEST_SNAPSHOTTER are the tests' own.
# (root, go, runc, iproute2, lsof, a static busybox; criu and mkfs.xfs, or tests that want them skip.)
set -eu
[ $# -ge 3 ] || { sed -n 's/^# \?//; 2,17p' "$0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/lib.sh"
# before builds the tests, where there is a network.
before() {
	local source=$1 list digest
	for p in lsof runc; do command -v $p >/dev/null || { echo "$p is missing" >&2; exit 1; }; done
	# Go replaces nothing in its module cache.
	case $source in "$(go env GOMODCACHE)"/*) cp -r --no-preserve=mode "$source" "$w/source"; source=$w/source ;; esac
	# One test pulls by digest: it has to be that of our image.
	digest=$(sed -n 's,^containerd/busybox:1.36 ,,p' "$w/digests")
	list=$source/integration/images/image_list.go
	sed "s,\(ghcr.io/containerd/busybox@\)sha256:[0-9a-f]*,\1$digest," "$list" >"$w/image_list.go"
	grep -q "$digest" "$w/image_list.go" || { echo "$list has changed: no image by digest" >&2; exit 1; }
	printf '{"Replace": {"%s": "%s/image_list.go"}}' "$list" "$w" >"$w/overlay.json"
	cd "$source"
	GOFLAGS='' CGO_ENABLED=0 go test -c -overlay "$w/overlay.json" -o "$w/client.test" ./integration/client
	GOFLAGS='' CGO_ENABLED=0 go build -o "$w/path/runc-fp" ./integration/failpoint/cmd/runc-fp
	cp -r --no-preserve=mode integration/client "$w/data" # testdata is looked for where a test runs
	cd "$OLDPWD"
}
touch "$3"
[ -z "${RUNC:-}" ] || RUNC=$(realpath "$RUNC")
[ -z "${EXPECT:-}" ] || { EXPECT=$(realpath "$EXPECT"); export EXPECT; }
enter "$0" "$(realpath "$1")" "$(realpath "$2")" "$(realpath "$3")" "${@:4}"
bin=$2 results=$3 log=${LOG:-$w/log}; shift 3
PATH=$bin:$PATH
[ ! -x "$bin/hakod" ] || wrapper
[ -z "${RUNC:-}" ] || ln -s "$RUNC" "$w/path/runc"
cd "$w/data"
mkdir -p /var/lib/containerd-test /run/containerd-test
# A test keeps containers' state at this place: that of an earlier run would be in its way.
mkdir -p /tmp/runc-test
mount -t tmpfs -o mode=711 none /tmp/runc-test
code=0
"$w/client.test" -test.v -test.root -test.timeout 30m "$@" >"$log" 2>&1 </dev/null || code=$?
sed -n 's/^[[:space:]]*--- \(PASS\|FAIL\|SKIP\): \([^ ]*\) (.*/\1 \2/p' "$log" | sort -k2 >"$results"
awk '{n[$1]++} END {printf "%d passed, %d failed, %d skipped\n", n["PASS"], n["FAIL"], n["SKIP"]}' "$results"
grep -aq '^PASS\|^FAIL' "$log" || { echo "the tests broke off:" >&2; tail -n 40 "$log" >&2; exit 1; }
[ -n "${EXPECT:-}" ] || exit "$code"
awk 'NR==FNR {if ($1=="PASS") want[$2]=1; next} {got[$2]=$1}
	END {for (t in want) {total++; if (got[t]=="PASS") ok++; else print "not as containerd:", t, got[t]}
	     printf "%d of %d that pass on containerd: %.1f %%\n", ok, total, 100*ok/total; exit ok < 0.97*total}' "$EXPECT" "$results"
