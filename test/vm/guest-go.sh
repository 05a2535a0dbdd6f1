#!/bin/bash
# guest-go.sh: what the VM has for Go. Tests that build a program with "go build -o FILE
# PACKAGE" get the one that suite.sh has built beforehand.
[ "$1" = build ] || { echo "go: only build, in the VM" >&2; exit 1; }
out=''
while [ $# -gt 1 ]; do
	if [ "$1" = -o ]; then out=$2; fi
	shift
done
built=$(readlink -f "$1")/.built
[ -e "$built" ] || { echo "go: suite.sh has not built $1 ($built)" >&2; exit 1; }
[ ! -d "$out" ] || out=$out/$(basename "$1")
cp "$built" "$out"
