#!/bin/bash
# Builds the kubelet from its Go module, in a module of its own.
# Usage: build.sh VERSION OUTPUT     e.g. build.sh v1.37.2 bin/kubelet
# (Go, jq; half an hour of one core.)
set -eu
[ $# -eq 2 ] || { sed -n 's/^# \?//; 2,4p' "$0" >&2; exit 2; }
version=$1 out=$(realpath -m "$2")
w=$(mktemp -d)
trap 'rm -rf "$w"' EXIT
cd "$w"
go mod init kubelet.build
go mod edit -require "k8s.io/kubernetes@$version"
# What Kubernetes develops in its own tree has the version v0.0.0 there: each is a module of its own, too.
gomod=$(go mod download -json "k8s.io/kubernetes@$version" | jq -r .GoMod)
sed -nE 's/^\s+(k8s.io\/[a-z-]+) v0\.0\.0$/\1/p' "$gomod" | while read -r m; do
	go mod edit -replace "$m=$m@v0.${version#v1.}"
done
stamp=k8s.io/component-base/version
CGO_ENABLED=0 go build -mod=mod -p "${JOBS:-1}" -trimpath -o "$out" \
	-ldflags "-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=$(echo "$version" | cut -d. -f2)" k8s.io/kubernetes/cmd/kubelet
