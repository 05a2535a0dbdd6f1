#!/usr/bin/env bash
# suite.sh [PACKAGE...]: runs tests of ours in the VM, in minimal mode and then under
# systemd. Without arguments these are the tests that depend on the kernel and the cgroup
# layout. The machine has no Go: test binaries are compiled here and handed in with the
# folders testdata and with bin/. MODES="minimal systemd" picks the modes, RUN is go
# test's -run, VERBOSE=1 its -v, TIMEOUT its -timeout of one package. APPEND is for the kernel's command
# line. HAKO_TEST_SNAPSHOTTER is handed on. ARCH=arm64 takes a machine of that architecture, in minimal
# mode.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
GO=${GO:-go}
arch=${ARCH:-amd64}
bin=bin
export CGO_ENABLED=0
packages=("$@")
[ ${#packages[@]} -gt 0 ] || packages=(./oci/... ./cmd/hako-oci/... ./internal/longoverlay ./test/vm/...)

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
mkdir -p "$tmp/tests"
# A binary per package, named after its folder; the folder itself, with testdata, is the
# directory that the test runs in, as go test would have it.
"$GO" list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.Dir}}{{end}}' "${packages[@]}" | while read -r dir; do
	dir=${dir#"$PWD"/}
	mkdir -p "$tmp/tests/$dir"
	GOARCH=$arch nice "$GO" test -c -tags demo_image -o "$tmp/tests/$dir/test" "./$dir"
	[ ! -d "$dir/testdata" ] || cp -r "$dir/testdata" "$tmp/tests/$dir/"
	# Programs that a test builds for itself are built here: see guest-go.sh.
	for main in "$dir"/testdata/*/main.go; do
		[ ! -e "$main" ] || GOARCH=$arch nice "$GO" build -o "$tmp/tests/$(dirname "$main")/.built" "./$(dirname "$main")"
	done
done
[ ! -d "$tmp/tests/oci/plan" ] || cp -r docs "$tmp/tests/" # a schema that a test compares with
if [ "$arch" != amd64 ]; then
	bin=$tmp/bin
	GOARCH=$arch nice "$GO" build -trimpath -ldflags '-s -w -E main.entry' -o "$bin/hako-oci" ./cmd/hako-oci # as the Makefile does
fi
for binary in "$bin"/*; do
	name=${binary##*/}
	[ ! -d "cmd/$name" ] || { mkdir -p "$tmp/tests/cmd/$name" && cp "$binary" "$tmp/tests/cmd/$name/.built"; }
done

# Docker's client is no package of Debian 12's by this version: handed in if it is a static
# binary here.
peers=()
docker=$(command -v docker || true)
if [ -n "$docker" ] && ! ldd "$docker" >/dev/null 2>&1; then peers=(-f "$docker:/usr/local/bin/docker"); fi

status=0
[ "$arch" = amd64 ] || : "${MODES:=minimal}"
for mode in ${MODES:-minimal systemd}; do
	flags=()
	[ "$mode" = minimal ] || flags=(-s)
	[ -z "${APPEND:-}" ] || flags+=(-a "$APPEND")
	echo "--- test VM, $mode mode"
	"$here/run.sh" ${flags[@]+"${flags[@]}"} -t 14400 -f "$tmp/tests:/tests" \
		-f "$bin:/usr/local/bin" -f "$here/guest-go.sh:/usr/local/bin/go" -f "$here/inside.sh:/inside.sh" ${peers[@]+"${peers[@]}"} \
		"RUN='${RUN:-}' TIMEOUT='${TIMEOUT:-}' VERBOSE='${VERBOSE:-}' ${HAKO_TEST_SNAPSHOTTER:+HAKO_TEST_SNAPSHOTTER='$HAKO_TEST_SNAPSHOTTER'} bash /inside.sh" || status=$?
done
exit $status
