#!/usr/bin/env bash
# hako image copy against skopeo copy: an image of five layers from registry to registry, within one
# registry (blobs mounted), and from a registry to an OCI layout, in turns. Two of Debian's docker-registry on
# loopback. Prints medians of wall time, CPU time, memory, and ratios.
#
#   test/bench/image-copy.sh [ROUNDS]          (default 7)
#
# BENCH_BYTES of each layer's files at most (default 60000000)
set -euo pipefail
cd "$(dirname "$0")/../.."
rounds=${1:-7}
bytes=${BENCH_BYTES:-60000000}
for c in skopeo docker-registry jq; do
  command -v $c >/dev/null || { echo "bench: $c is not installed: this comparison is left out" >&2; exit 0; }
done
work=$(mktemp -d "${TMPDIR:-/tmp}/hako-bench.XXXXXX")
pids=()
cleanup() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; done
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
export CGO_ENABLED=0 TMPDIR=$work DOCKER_CONFIG=$work
go build -trimpath -ldflags '-s -w' -o "$work/" ./cmd/hako ./test/bench/mkimage

# All layers are of files of this machine that most have.
dirs=()
for d in "$(go env GOROOT)/src" /usr/share/doc /usr/include /usr/lib/python3 "$(go env GOMODCACHE)/github.com" /usr/share/man; do [ -d "$d" ] && dirs+=("$d"); done
"$work/mkimage" "$work/image" "$bytes" 20000 "${dirs[@]:0:5}" 2>/dev/null
echo "image: $(du -sh "$work/image" | cut -f1), $(find "$work/image/blobs" -type f | wc -l) blobs"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
serve() { # serve NAME: a registry of its own; its address goes to $address
  local port; port=$(free_port)
  cat >"$work/$1.yml" <<END
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $work/$1}, delete: {enabled: true}}
http: {addr: 127.0.0.1:$port, secret: x}
END
  docker-registry serve "$work/$1.yml" >"$work/$1.log" 2>&1 &
  pids+=($!)
  address=127.0.0.1:$port
  for _ in $(seq 200); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then return; fi
    sleep 0.05
  done
  return 1
}
serve from; from=$address
serve to; to=$address
"$work/hako" image copy -q "oci:$work/image" "docker://$from/app:1" >/dev/null

measure() { # measure CASE TOOL COMMAND...: appends wall, CPU (s) and memory (kB)
  local out=$work/times.$1.$2; shift 2
  /usr/bin/time -a -o "$out" -f '%e %U %S %M' "$@" >/dev/null
}
skopeo=(skopeo copy -q --all --src-tls-verify=false)
for round in $(seq "$rounds"); do
  tools=(hako skopeo)
  [ $((round % 2)) -eq 0 ] && tools=(skopeo hako)
  for tool in "${tools[@]}"; do
    sync
    # A repository that was never there: nothing is skipped.
    a=$to/$tool-$round/app:1 b=$from/$tool-$round/app:1 l=$work/out/$tool-$round
    if [ "$tool" = hako ]; then
      measure registry hako "$work/hako" image copy -q "docker://$from/app:1" "docker://$a"
      measure mounted hako "$work/hako" image copy -q "docker://$from/app:1" "docker://$b"
      measure layout hako "$work/hako" image copy -q "docker://$from/app:1" "oci:$l:1"
      measure again hako "$work/hako" image copy -q "docker://$from/app:1" "docker://$a"
    else
      measure registry skopeo "${skopeo[@]}" --dest-tls-verify=false "docker://$from/app:1" "docker://$a"
      measure mounted skopeo "${skopeo[@]}" --dest-tls-verify=false "docker://$from/app:1" "docker://$b"
      mkdir -p "$l"
      measure layout skopeo "${skopeo[@]}" "docker://$from/app:1" "oci:$l:1"
      measure again skopeo "${skopeo[@]}" --dest-tls-verify=false "docker://$from/app:1" "docker://$a"
    fi
    rm -rf "$work/out"
  done
  # The registry shares blobs between repositories by linking them: an empty one for the next round.
  rm -rf "$work/to/docker"
done

column() { awk -v c="$3" '{ print (c == "cpu" ? $2 + $3 : c == "wall" ? $1 : $4 / 1024) }' "$work/times.$1.$2" | sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", (b > 0 ? a / b : 0) }'; }
printf '%-10s %22s %22s %22s\n' '' 'wall: hako skopeo' 'CPU: hako skopeo' 'MB: hako skopeo'
for case in registry mounted layout again; do
  printf '%-10s' "$case"
  for c in wall cpu memory; do
    h=$(column $case hako $c) s=$(column $case skopeo $c)
    printf ' %8.2f %7.2f (%s)' "$h" "$s" "$(ratio "$h" "$s")"
  done
  echo
done
