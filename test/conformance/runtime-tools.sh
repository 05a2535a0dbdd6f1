#!/bin/bash
# Runs the validation programs of opencontainers/runtime-tools against a runtime and
# compares with what is expected (runtime-tools.txt). Prints a table; ends with 1 if a
# program fails that is to pass. Nothing is written into the checkout.
# Usage: runtime-tools.sh DIR_OF_RUNTIME_TOOLS [RUNTIME] (root, Go; default: bin/hako-oci).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
src=$(realpath "${1:?usage: runtime-tools.sh DIR [RUNTIME]}")
runtime=$(realpath "$(command -v "${2:-$here/../../bin/hako-oci}")")
[ "$(id -u)" = 0 ] || { echo "needs root" >&2; exit 1; }
w=$(mktemp -d)
trap 'rm -rf "$w"' EXIT
mkdir "$w/bin"
export CGO_ENABLED=0 GOFLAGS=-mod=vendor
(cd "$src" && go build -tags "netgo osusergo" -o "$w/runtimetest" ./cmd/runtimetest)
programs=$(cd "$src/validation" && for d in */; do [ "$d" = util/ ] || echo "${d%/}"; done)
for p in $programs; do (cd "$src" && go build -o "$w/bin/$p" "./validation/$p"); done
cp "$src"/rootfs-*.tar.gz "$w/"
cd "$w"
try() { # a program passes if it ends with 0, no point is "not ok", and nothing is reported instead of a point
	RUNTIME=$runtime timeout 120 "bin/$1" >out 2>err || return 1
	! grep -q '^ *not ok' out || return 1
	! { grep -q '^1\.\.0$' out && grep -q '"error"' out; }
}
passed=0 excepted=0 failed=0
printf '%-32s %-8s %s\n' PROGRAM RESULT WHY
for p in $programs; do
	line=$(grep "^$p " "$here/runtime-tools.txt" || true)
	read -r _ kind why <<<"$line" || true
	result=fails
	for _ in $([ "${kind:-}" = race ] && seq 5 || echo 1); do
		if try "$p"; then result=passes; break; fi
	done
	if [ $result = passes ]; then
		passed=$((passed + 1)); why=
	elif [ -n "$line" ] && [ "$kind" != race ]; then
		result=except; excepted=$((excepted + 1)); why="$kind: $why"
	else
		result=FAILS; failed=$((failed + 1)); why=$(grep -h -m1 -e '^ *not ok' -e '"error"' -e error out err || true)
	fi
	printf '%-32s %-8s %s\n' "$p" "$result" "$why"
done
printf '%d programs: %d pass, %d are exceptions, %d fail\n' "$((passed + excepted + failed))" "$passed" "$excepted" "$failed"
[ "$failed" = 0 ]
