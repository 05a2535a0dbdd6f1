#!/bin/bash
# Runs critest, the kubelet's conformance suite for container engines, on an upstream
# containerd 2 whose runtime is hako-oci, or hako's shim. All of it lives in namespaces of its own and in a
# temporary directory.
# Usage: critest.sh RUNTIME CONTAINERD_DIR CRITEST REGISTRY_DIR [ARGUMENTS_OF_CRITEST...]
#   RUNTIME         hako-oci, or containerd-shim-hako-v2
#   CONTAINERD_DIR  containerd and containerd-shim-runc-v2, version 2
#   CRITEST         of kubernetes-sigs/cri-tools, with the images that it names in
#   REGISTRY_DIR    the storage of a docker-registry; it is written to
# (root, docker-registry, containernetworking-plugins, iptables, iproute2, curl.)
set -eu
usage() { sed -n 's/^# \?//; 2,12p' "$0" >&2; exit 2; }
[ $# -ge 4 ] || usage
if [ -z "${HAKO_CRITEST_INSIDE:-}" ]; then
	HAKO_CRITEST_INSIDE=1 exec unshare --net --mount --ipc --propagation slave "$0" "$@"
fi
oci=$(realpath "$1"); peers=$(realpath "$2"); critest=$(realpath "$3"); registry=$(realpath "$4"); shift 4
for p in docker-registry iptables curl ip; do command -v $p >/dev/null || { echo "$p is missing" >&2; exit 1; }; done
mount --make-rshared / # two tests want a host that shares its mounts
ip link set lo up
w=$(mktemp -d)
chmod 711 "$w" # a container in a user namespace has its cgroups below it
# A cgroup v1 hierarchy that somebody has made and not mounted here makes containerd lose
# all metrics.
sed -n 's/^[1-9][0-9]*:\([^:]*\):.*/\1/p' /proc/self/cgroup | while read -r c; do
	grep -q " - cgroup .*[ ,]$c\(,.*\)*$" /proc/self/mountinfo && continue
	mkdir -p "$w/cgroup/$c" && mount -t cgroup -o "$c" none "$w/cgroup/$c"
done
PATH=$peers:$PATH
pids=()
cleanup() {
	for p in "${pids[@]}"; do kill "$p" 2>/dev/null || true; done
	for p in "${pids[@]}"; do wait "$p" 2>/dev/null || true; done
	cd /; umount -R "$w"/state/* 2>/dev/null || true
	umount "$w"/cgroup/* 2>/dev/null || true
	rm -rf --one-file-system "$w" || true
}
trap cleanup EXIT
port=5000
cat >"$w/registry.yml" <<T
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $registry}, delete: {enabled: true}}
http: {addr: "127.0.0.1:$port", secret: critest}
T
docker-registry serve "$w/registry.yml" >"$w/registry.log" 2>&1 & pids+=($!)
for host in registry.k8s.io k8s.gcr.io gcr.io public.ecr.aws; do
	mkdir -p "$w/certs.d/$host"
	printf 'server = "http://127.0.0.1:%s"\n[host."http://127.0.0.1:%s"]\n  capabilities = ["pull", "resolve"]\n' $port $port >"$w/certs.d/$host/hosts.toml"
done
mkdir -p "$w/cni" "$w/cdi" "$w/nri"
cat >"$w/cni/10-critest.conflist" <<T
{"cniVersion": "1.0.0", "name": "critest", "plugins": [
  {"type": "bridge", "bridge": "critest0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$w/ipam", "ranges": [[{"subnet": "10.213.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
T
cat >"$w/config.toml" <<T
version = 3
root = '$w/root'
state = '$w/state'
[grpc]
  address = '$w/sock'
[ttrpc]
  address = '$w/sock.ttrpc'
[plugins.'io.containerd.nri.v1.nri']
  disable = false
  socket_path = '$w/nri.sock'
  plugin_path = '$w/nri'
  plugin_config_path = '$w/nri'
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '$w/certs.d'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  cdi_spec_dirs = ['$w/cdi']
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['/opt/cni/bin', '/usr/lib/cni']
  conf_dir = '$w/cni'
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = 'hako'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.hako]
T
case $(basename "$oci") in
*shim*)
	mkdir "$w/path"
	ln -s "$oci" "$w/path/containerd-shim-hako-v2"
	PATH=$w/path:$PATH
	echo "  runtime_type = 'io.containerd.hako.v2'" ;;
*)
	printf "%s\n" "  runtime_type = 'io.containerd.runc.v2'" "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.hako.options]" "  BinaryName = '$oci'" ;;
esac >>"$w/config.toml"
containerd --config "$w/config.toml" >"$w/containerd.log" 2>&1 & pids+=($!)
for _ in $(seq 200); do [ -S "$w/sock" ] && curl -fsS -o /dev/null "http://127.0.0.1:$port/v2/" 2>/dev/null && break; sleep 0.1; done
: >"$w/crictl.yaml"
cd "$w"
"$critest" --config "$w/crictl.yaml" --runtime-endpoint "unix://$w/sock" --image-endpoint "unix://$w/sock" \
	--nri-socket "$w/nri.sock" -ginkgo.no-color -ginkgo.timeout=1h "$@" </dev/null || { code=$?; tail -n 20 "$w/containerd.log" >&2; exit $code; }
