#!/bin/bash
# Runs the validation programs of opencontainers/runtime-tools against a runtime and
# compares with what is expected (runtime-tools.txt). Prints a table; ends with 1 if a
# program fails that is to pass. Nothing is written into the checkout.
# Usage: runtime-tools.sh [--corrected] DIR_OF_RUNTIME_TOOLS [RUNTIME] (root, Go; default: bin/hako-oci).
#
# --corrected: programs that cannot pass because they are wrong are corrected first, in a
# copy; see corrections below. Their results say what the runtime does, and no more that
# the program is wrong.
#
# Where the machine has cgroup v1, the controllers that the programs set are mounted while
# they run, in a mount namespace of our own.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ "${HAKO_CONFORMANCE_NS:-}" = "" ]; then exec env HAKO_CONFORMANCE_NS=1 unshare -m "$0" "$@"; fi
corrected=
if [ "${1:-}" = --corrected ]; then corrected=1; shift; fi
src=$(realpath "${1:?usage: runtime-tools.sh [--corrected] DIR [RUNTIME]}")
runtime=$(realpath "$(command -v "${2:-$here/../../bin/hako-oci}")")
[ "$(id -u)" = 0 ] || { echo "needs root" >&2; exit 1; }
# shellcheck source=test/bench/hierarchies.sh
. "$here/../bench/hierarchies.sh"
w=$(mktemp -d)
cleanup() {
	set +e
	"$w/runtime" list -q 2>/dev/null | xargs -r -n1 "$w/runtime" delete --force
	rmdir $hierarchies_root/*/testdir/cgrouptest $hierarchies_root/*/testdir $hierarchies_root/*/cgrouptest 2>/dev/null
	hierarchies_back cgrouptest testdir
	cd /
	rm -rf "$w"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
chmod 755 "$w"
mkdir "$w/bin" "$w/tmp"
export TMPDIR=$w/tmp
# Containers that programs leave behind are ours to delete.
printf '#!/bin/sh\nexec "%s" --root "%s" "$@"\n' "$runtime" "$w/state" >"$w/runtime"
chmod 755 "$w/runtime"
export CGO_ENABLED=0 GOFLAGS=-mod=vendor
overlay=()

# correct FILE EXPRESSION: a sed expression that has to change the file.
correct() {
	sed -i.before -E "$2" "$src/$1"
	if cmp -s "$src/$1" "$src/$1.before"; then echo "$1: nothing to correct" >&2; exit 1; fi
	rm "$src/$1.before"
}
corrections() {
	cp -r "$src" "$w/src"
	src=$w/src
	# Compares the numbers, not their addresses.
	correct validation/util/linux_resources_pids.go 's/lpd\.Limit == config\.Linux\.Resources\.Pids\.Limit/*lpd.Limit == *config.Linux.Resources.Pids.Limit/'
	# Looks for what its hooks write, before the bundle is removed, and does not ask for the
	# text of an error that is not there.
	correct validation/hooks/hooks.go 's/\\npost-(start|stop)([12])/\\npost-\1\2 called/g; s/^(\t\} else )\{$/\1if err != nil {/; s/^\tvar output string/\tvar outputData []byte\n&/; /outputData, _ := /d; s/^\t\tPreDelete:/\t\tPostDelete: func(*util.Runtime) (err error) { outputData, err = os.ReadFile(output); return },\n&/'
	# Runs what there is in the root: nobody has copied runtimetest there.
	correct validation/misc_props/misc_props.go 's/^\tannotationConfig\.AddAnnotation/\tannotationConfig.SetProcessArgs([]string{"true"})\n&/'
	# Has something to kill.
	correct validation/pidfile/pidfile.go 's/\[\]string\{"true"\}/[]string{"sleep", "30"}/'
	# Specification 1.3: prestart hooks are called in create; a failing poststart hook is an
	# error and the end; unknown capabilities are a warning.
	correct validation/prestart/prestart.go '/PostCreate:/,/PreDelete:/ {/"pre-start called"/ {n; s/return .*/return nil/}; s/^\t\t\treturn nil$/\t\t\treturn fmt.Errorf("prestart hooks MUST be called as part of create")/}'
	correct validation/poststart_fail/poststart_fail.go 's/runErr != nil \|\| string\(outputData\) != "post-start called\\n"/runErr == nil || string(outputData) != ""/'
	correct validation/process_capabilities_fail/process_capabilities_fail.go 's/if err == nil/if err != nil/'
	# Wants the error that its own sentence demands; the container stays as it was.
	correct validation/start/start.go '/SpecErrorOK\(t, err == nil, .*StartWithProcUnsetGenError/ {s/err == nil/err != nil/; n; s/LifecycleStatusStopped/LifecycleStatusCreated|util.LifecycleStatusStopped/}'
	# Its Go does not raise the soft RLIMIT_NOFILE that runtimetest is to look at.
	local rlimit; rlimit=$(go env GOROOT)/src/syscall/rlimit.go
	sed 's/^func init()/func leftOut()/' "$rlimit" >"$w/rlimit.go"
	printf '{"Replace": {"%s": "%s"}}' "$rlimit" "$w/rlimit.go" >"$w/overlay.json"
	overlay=(-overlay "$w/overlay.json")
}
[ ! "$corrected" ] || corrections
(cd "$src" && go build "${overlay[@]}" -tags "netgo osusergo" -o "$w/runtimetest" ./cmd/runtimetest)
programs=$(cd "$src/validation" && for d in */; do [ "$d" = util/ ] || echo "${d%/}"; done)
for p in $programs; do (cd "$src" && go build -o "$w/bin/$p" "./validation/$p"); done
cp "$src"/rootfs-*.tar.gz "$w/"
hierarchies_mount hugetlb net_cls net_prio
cd "$w"
try() { # a program passes if it ends with 0, no point is "not ok", and nothing is reported instead of a point
	RUNTIME=$w/runtime timeout 120 "bin/$1" >out 2>err || return 1
	! grep -q '^ *not ok' out || return 1
	! { grep -q '^1\.\.0$' out && grep -q '"error"' out; }
}
passed=0 excepted=0 failed=0
printf '%-32s %-8s %s\n' PROGRAM RESULT WHY
for p in $programs; do
	line=$(grep "^$p " "$here/runtime-tools.txt" || true)
	read -r _ kind why <<<"$line" || true
	if [ "${kind:-}" = test ] && [ "$corrected" ]; then line=; fi
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
printf '%d programs%s: %d pass, %d are exceptions, %d fail\n' "$((passed + excepted + failed))" "${corrected:+ (corrected)}" "$passed" "$excepted" "$failed"
[ "$failed" = 0 ]
