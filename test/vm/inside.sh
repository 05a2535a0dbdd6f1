#!/bin/bash
# inside.sh: what suite.sh runs in the machine: every test binary below /tests, in its
# folder. Prints go test's lines and names the tests that were skipped.
cd /tests || exit 1
echo "kernel $(uname -r), PID 1 $(cat /proc/1/comm), $(stat -fc %T /sys/fs/cgroup), LSMs $(cat /sys/kernel/security/lsm)"
failed=0
exec 3>/dev/null
[ -z "$VERBOSE" ] || exec 3>&1 # shown while it comes
while read -r binary; do
	dir=$(dirname "${binary#./}")
	start=$EPOCHREALTIME
	(cd "$dir" && "$PWD/test" -test.v -test.short -test.timeout "${TIMEOUT:-2h}" ${RUN:+-test.run "$RUN"}) 2>&1 | tee /tmp/log >&3
	status=${PIPESTATUS[0]}
	took=$(awk "BEGIN { printf \"%.1fs\", $EPOCHREALTIME - $start }")
	if [ "$status" -eq 0 ]; then
		echo "ok    $dir  $took  $(grep -c '^--- PASS' /tmp/log) passed"
	else
		if [ -z "$VERBOSE" ]; then grep -vE "^(=== |\s*--- (PASS|SKIP))|level=debug" /tmp/log | tail -n 200; fi
		echo "FAIL  $dir  $took"
		failed=1
	fi
	grep -oE '_test\.go:[0-9]+: needs .*' /tmp/log | sed -E 's/^[^ ]+ /      skipped: /' | sort -u
done < <(find . -name test -type f | sort)
exit $failed
