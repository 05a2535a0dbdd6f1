#!/usr/bin/env bash
# Runs all tests and ends with go test's own summary. Where it does not run as root,
# it names the tests that were left out.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
GO=${GO:-go}
export CGO_ENABLED=0

command -v "$GO" >/dev/null || { echo "test: Go is missing: install Go 1.26 or newer (https://go.dev/dl)" >&2; exit 1; }

# Packages one after the other would waste the machine, too many at once make the
# integration tests (which start daemons) slow: two at a time suits small machines. The limit of a package only ends
# a hang: all of them together take 5 to 7 minutes on a quiet machine.
args=(-p 2 -timeout 40m -count=1 -tags demo_image "$@" ./...)

if [ "$(id -u)" -eq 0 ]; then
  exec "$GO" test "${args[@]}"
fi

log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
"$GO" test -v "${args[@]}" >"$log" 2>&1
status=$?
if [ $status -ne 0 ]; then
  grep -vE '^(=== |\s*--- (PASS|SKIP))' "$log"
fi
skipped=$(grep -cE '^\s*--- SKIP' "$log")
if [ "$skipped" -gt 0 ]; then
  echo "Not root: these $skipped tests were left out (run 'sudo make test' for all):"
  grep -E '^\s*--- SKIP' "$log" | sed -E 's/^\s*--- SKIP: ([^ ]+).*/  \1/'
fi
grep -E '^(ok|FAIL|\?|---)\s' "$log" | grep -vE '^--- (PASS|SKIP)'
exit $status
