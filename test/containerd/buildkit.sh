#!/bin/bash
# Builds with BuildKit's containerd worker on hakod or containerd: a Dockerfile of several
# stages, exported into the image store, to a tar and to a registry.
# Usage: buildkit.sh BIN_DIR BUILDKIT_DIR [RUNTIME [SNAPSHOTTER]]
#   BIN_DIR       hakod and its shims, or containerd and containerd-shim-runc-v2
#   BUILDKIT_DIR  buildkitd, buildctl and ctr
#   RUNTIME, SNAPSHOTTER  which of the engine's the worker uses, if not its defaults
# (root, go, a static busybox, iproute2, curl.)
set -eu
[ $# -ge 2 ] || { sed -n 's/^# \?//; 2,8p' "$0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/lib.sh"
enter "$0" "$(realpath "$1")" "$(realpath "$2")" "${@:3}"
kit=$2
daemon "$1"
mkdir -p "$w/etc" /etc/cni
cat >"$w/etc/buildkitd.toml" <<'C'
[registry."localhost:5000"]
  http = true
C
worker=(--oci-worker=false --containerd-worker=true --containerd-worker-addr "$CONTAINERD_ADDRESS" --containerd-worker-net host --containerd-worker-namespace hw-build)
[ -z "${3:-}" ] || worker+=(--containerd-worker-runtime "$3")
[ -z "${4:-}" ] || worker+=(--containerd-worker-snapshotter "$4")
"$kit/buildkitd" --config "$w/etc/buildkitd.toml" --root "$w/buildkit" --addr "unix://$w/buildkit.sock" "${worker[@]}" >"${BUILDKIT_LOG:-$w/buildkitd.log}" 2>&1 &
ctl() { timeout 120 "$kit/buildctl" --addr "unix://$w/buildkit.sock" "$@"; }
for _ in $(seq 100); do ctl debug workers >/dev/null 2>&1 && break; sleep 0.2; done
ctr_() { timeout 60 "$kit/ctr" --namespace hw-build "$@"; }
build() { ctl build --frontend dockerfile.v0 --local context="$w/context" --local dockerfile="$w/context" --progress plain "$@"; }
mkdir "$w/context"
cat >"$w/context/Dockerfile" <<'D'
FROM localhost:5000/library/alpine:latest AS base
RUN echo base >/base && mkdir /dir && echo one >/dir/one && ln -s one /dir/link
FROM base AS build
ARG WHO=nobody
COPY file /src/file
RUN --mount=type=cache,target=/cache echo x >>/cache/times && wc -l </cache/times >/times
RUN --mount=type=secret,id=key cat /run/secrets/key >/secret-was-there
RUN --mount=type=tmpfs,target=/scratch --mount=type=bind,from=base,source=/dir,target=/bound cat /bound/one >/from-bound && rm -r /dir
RUN echo $WHO $(cat /src/file) >/out && id -u >/uid
FROM base AS parallel
RUN sleep 1; echo parallel >/parallel
FROM localhost:5000/library/busybox:latest
COPY --from=build /out /uid /times /from-bound /result/
COPY --from=build --chown=7:8 /src/file /owned
COPY --from=parallel /parallel /result/
COPY --link file /linked
WORKDIR /result
USER 5
ENV NAME=value
RUN test "$(id -u) $PWD $NAME" = "5 /result value"
ENTRYPOINT ["cat"]
CMD ["out"]
D
echo content >"$w/context/file"; echo secret >"$w/key"
like "a worker" "$(ctl debug workers)" 'linux/'
build --opt build-arg:WHO=somebody --secret "id=key,src=$w/key" --output type=image,name=localhost:5000/built:1,push=true >"$w/out" 2>&1 || { echo "FAIL  build: $(tail -n 20 "$w/out")"; tail -n 20 "${BUILDKIT_LOG:-$w/buildkitd.log}" >&2; exit 1; }
echo "ok    build"
like "the image is in the store" "$(ctr_ images ls -q)" '^localhost:5000/built:1$'
like "the image is in the registry" "$(curl -sS -H 'Accept: application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json' http://localhost:5000/v2/built/manifests/1)" '"schemaVersion"'
runtime=(); [ -z "${3:-}" ] || runtime=(--runtime "$3")
ctr_ images pull --local --plain-http localhost:5000/built:1 >"$w/out" 2>&1 || cat "$w/out"
run() { ctr_ run --rm "${runtime[@]}" localhost:5000/built:1 "$@"; }
is "it runs: stages" "$(run r1 cat out uid times from-bound parallel | tr '\n' ' ')" "somebody content 0 1 one parallel "
is "it runs: owner, directory, user" "$(run r2 sh -c 'stat -c %u:%g /owned; pwd; id -u; cat /linked; ls /dir /base 2>/dev/null | wc -l' | tr '\n' ' ')" "7:8 /result 5 content 0 "
build --opt build-arg:WHO=somebody --secret "id=key,src=$w/key" --output type=image,name=localhost:5000/built:2 >"$w/out" 2>&1 || cat "$w/out"
# Everything but the sources is in the cache.
is "second build: all of it is cached" "$(grep -c '^#[0-9]* CACHED' "$w/out")" "$(grep -c '^#[0-9]* \[.*\] \(RUN\|COPY\|WORKDIR\)' "$w/out")"
echo changed >"$w/context/file"
build --opt build-arg:WHO=other --secret "id=key,src=$w/key" --output "type=oci,dest=$w/oci.tar" >"$w/out" 2>&1 || cat "$w/out"
like "a change builds anew" "$(ctr_ images import "$w/oci.tar" --base-name changed >/dev/null 2>&1; tar -tf "$w/oci.tar")" '^index.json$'
build --secret "id=key,src=$w/key" --output "type=docker,name=changed:1,dest=$w/docker.tar" >"$w/out" 2>&1 || cat "$w/out"
like "export: docker" "$(tar -xOf "$w/docker.tar" manifest.json)" 'changed:1'
build --secret "id=key,src=$w/key" --output "type=local,dest=$w/local" >"$w/out" 2>&1 || cat "$w/out"
is "export: local" "$(cat "$w/local/result/out" "$w/local/result/times" "$w/local/linked" | tr '\n' ' ')" "nobody changed 3 changed "
build --secret "id=key,src=$w/key" --output "type=tar,dest=$w/root.tar" >"$w/out" 2>&1 || cat "$w/out"
is "export: tar" "$(tar -xOf "$w/root.tar" result/parallel)" parallel
build --secret "id=key,src=$w/key" --export-cache type=registry,ref=localhost:5000/cache:1,mode=max --output type=image,name=c:1 >"$w/out" 2>&1 || cat "$w/out"
is "cache: exported" "$(curl -sS -o /dev/null -w '%{http_code}' -H 'Accept: application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json' http://localhost:5000/v2/cache/manifests/1)" 200
build --secret "id=key,src=$w/key" --output type=image,name=z:1,compression=zstd,force-compression=true,oci-mediatypes=true >"$w/out" 2>&1 || cat "$w/out"
like "layers in zstd" "$(ctr_ images inspect z:1 2>/dev/null || ctr_ content ls)" 'zstd|z:1'
ctl prune --all >"$w/out" 2>&1 || cat "$w/out"
build --secret "id=key,src=$w/key" --import-cache type=registry,ref=localhost:5000/cache:1 --output type=image,name=c:2 >"$w/out" 2>&1 || cat "$w/out"
like "cache: imported" "$(cat "$w/out")" '^#[0-9]* CACHED'
printf 'FROM localhost:5000/library/alpine:latest\nRUN echo to-stderr >&2; exit 9\n' >"$w/context/Dockerfile"
like "a failing step" "$(build 2>&1 || true)" 'did not complete successfully: exit code: 9'
printf 'FROM localhost:5000/nosuch:latest\n' >"$w/context/Dockerfile"
like "no such image" "$(build 2>&1 || true)" 'localhost:5000/nosuch:latest: not found'
printf 'FROM localhost:5000/library/alpine:latest\nRUN sleep 1000\n' >"$w/context/Dockerfile"
timeout 3 "$kit/buildctl" --addr "unix://$w/buildkit.sock" build --frontend dockerfile.v0 --local context="$w/context" --local dockerfile="$w/context" >/dev/null 2>&1 || true
is "a build that is given up stops its container" "$(until_ "pgrep -cx sleep" 0)" 0
is "nothing is left: tasks and containers" "$(until_ "timeout 60 $kit/ctr --namespace hw-build task ls -q; timeout 60 $kit/ctr --namespace hw-build container ls -q" "")" ""
exit $failed
