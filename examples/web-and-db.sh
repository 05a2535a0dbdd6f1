#!/usr/bin/env bash
# Two containers on a network of their own, which find each other by name. "db" is hako's
# demo server; "web" is the small program beside this script, bound into the demo image,
# which asks db on every request and is published on a port of this host.
# Needs a running hakod, Go and curl. HAKO names another binary, PORT another port.
set -euo pipefail
cd "$(dirname "$0")"
hako=${HAKO:-hako}
port=${PORT:-8080}
run=example-$$ # so that two runs do not meet
dir=$(mktemp -d)

cleanup() {
  "$hako" rm -fv "$run-web" "$run-db" >/dev/null 2>&1 || true
  "$hako" network rm "$run" >/dev/null 2>&1 || true
  rm -rf "$dir"
}
trap cleanup EXIT

"$hako" inspect --type image hako/demo >/dev/null 2>&1 || "$hako" load --demo
CGO_ENABLED=0 go build -o "$dir/web" web-and-db.go

"$hako" network create "$run" >/dev/null
"$hako" run -d --name "$run-db" --network "$run" --network-alias db hako/demo serve >/dev/null
"$hako" run -d --name "$run-web" --network "$run" -p "127.0.0.1:$port:80" \
  --mount "type=bind,source=$dir/web,target=/bin/web,readonly" hako/demo web http://db:8080/ >/dev/null

for _ in $(seq 50); do
  page=$(curl -fsS --max-time 5 "http://127.0.0.1:$port/" 2>/dev/null) && break
  sleep 0.1
done
echo "${page:?web does not answer}"

# db has no published port: from outside the network it cannot be reached by name.
if "$hako" run --rm --mount "type=bind,source=$dir/web,target=/bin/web,readonly" hako/demo web -once http://db:8080/ 2>"$dir/err"; then
  echo "db can be reached from another network" >&2
  exit 1
fi
echo "from another network: $(tail -1 "$dir/err")"
