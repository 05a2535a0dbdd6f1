#!/usr/bin/env bash
# A container with limits, and what its process sees. Needs a running hakod; hako finds it
# by $HAKO_HOST, or at its default socket. HAKO names another binary.
set -euo pipefail
hako=${HAKO:-hako}

# The demo image is built into hako; nothing is downloaded.
"$hako" inspect --type image hako/demo >/dev/null 2>&1 || "$hako" load --demo

echo "== a process with 64 MiB of memory, half a CPU, 32 processes and a read-only root"
"$hako" run --rm --hostname hello -m 64m --cpus 0.5 --pids-limit 32 --read-only hako/demo show

echo "== output goes to two streams, and the exit code is passed on"
code=0
"$hako" run --rm hako/demo exit 7 || code=$?
echo "exit code $code"
[ "$code" -eq 7 ]

echo "== input"
echo "from the shell, through a container" | "$hako" run --rm -i hako/demo cat
