#!/bin/bash
# Runs a real kubelet without an API server, with static pods, on hakod: a pod with probes, one
# with an init container and shared volumes, one with a host port and a log that is rotated. In the middle
# hakod is killed, and the kubelet started anew. Shows that the node stays ready, that containers are restarted
# only where the pod wants it, that no line of the log is lost, and that nothing is left at the end.
# All of it lives in namespaces of its own and in a temporary directory.
# Usage: run.sh KUBELET HAKOD CRICTL [MINUTES]
#   KUBELET  see build.sh
#   HAKOD    with hako-shim beside it
#   CRICTL   of kubernetes-sigs/cri-tools
#   MINUTES  default 10
# NET=builtin takes hako's own bridge instead of CNI plugins (CNI_BIN: their folders). KEEP=1 keeps the directory when something was wrong.
# (root, busybox-static, curl, jq, iproute2, iptables, containernetworking-plugins, Go)
set -eu
[ $# -ge 3 ] || { sed -n 's/^# \?//; 2,15p' "$0" >&2; exit 2; }
if [ -z "${HAKO_KUBELET_INSIDE:-}" ]; then
	HAKO_KUBELET_INSIDE=1 exec unshare --net --mount --ipc --propagation slave "$0" "$@"
fi
kubelet=$(realpath "$1") hakod=$(realpath "$2") crictl=$(realpath "$3") minutes=${4:-10}
here=$(dirname "$(realpath "$0")")
net=${NET:-cni}
mount --make-rshared /
ip link set lo up
# The address of the node.
ip link add node0 type veth peer name node1
ip link set node1 up
ip addr add 192.0.2.10/24 dev node0
ip link set node0 up
ip route add default via 192.0.2.1
w=$(mktemp -d /tmp/hako-kubelet.XXXXXX)
group=hakokubelet$$
hakod_pid='' kubelet_pid='' registry_pid='' failed=0
say() { echo "$(date +%T) $*"; }
bad() { say "WRONG: $*"; failed=1; }
groups() { find /sys/fs/cgroup -mindepth 2 -maxdepth 2 -type d -name "$group"; }
stop() { # stop PID [SIGNAL]
	[ -n "$1" ] || return 0
	kill "-${2:-TERM}" "$1" 2>/dev/null || true
	wait "$1" 2>/dev/null || true
}
cleanup() {
	status=$?
	trap - EXIT
	stop "$kubelet_pid"; stop "$hakod_pid"; stop "$registry_pid"
	"$w/hakod" "${hakod_flags[@]}" cleanup || true
	for g in $(groups); do find "$g" -depth -type d -exec rmdir {} + 2>/dev/null || true; done
	if [ -n "${KEEP:-}" ] && [ $status$failed != 00 ]; then echo "kept: $w" >&2; exit 1; fi
	cd /
	awk -v d="$w/" 'index($2, d) == 1 {print $2}' /proc/mounts | sort -r | while read -r m; do umount -l "$m"; done
	rm -rf --one-file-system "$w"
	exit $status
}
mkdir -p "$w/manifests" "$w/pods" "$w/kubelet" "$w/logs" "$w/cni" "$w/plugins"
hakod_flags=(--config /dev/null --root "$w/lib" --state "$w/run" --network "$net" --cni-conf-dir "$w/cni" --cni-bin-dir "${CNI_BIN:-/opt/cni/bin:/usr/lib/cni}"
	--containerd-socket "" --bridge-name hkkubelet0 --bridge-subnet 10.213.9.0/24 --log-level debug)
trap cleanup EXIT
cp "$hakod" "$(dirname "$hakod")/hako-shim" "$w/"
cat >"$w/cni/10-kubelet.conflist" <<T
{"cniVersion": "1.0.0", "name": "kubelet", "plugins": [
  {"type": "bridge", "bridge": "hkkubelet1", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$w/ipam", "ranges": [[{"subnet": "10.213.10.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
T
"$here/image.sh" "$w/image"
(cd "$here/../.." && CGO_ENABLED=0 go build -o "$w/registry" ./test/registry)
"$w/registry" -listen 127.0.0.1:5000 box="$w/image" >"$w/registry.log" 2>&1 & registry_pid=$!
start_hakod() { "$w/hakod" "${hakod_flags[@]}" >>"$w/hakod.log" 2>&1 & hakod_pid=$!; }
start_kubelet() {
	PATH=/usr/sbin:/sbin:$PATH "$kubelet" --config "$w/kubelet.yaml" --root-dir "$w/kubelet" --cert-dir "$w/kubelet/pki" \
		--hostname-override hako-node --node-ip 192.0.2.10 -v "${V:-2}" >>"$w/kubelet.log" 2>&1 & kubelet_pid=$!
}
cri() { "$crictl" --config "$w/crictl.yaml" "$@"; }
printf 'runtime-endpoint: unix://%s\nimage-endpoint: unix://%s\ntimeout: 10\n' "$w/run/cri.sock" "$w/run/cri.sock" >"$w/crictl.yaml"
for c in /sys/fs/cgroup/*/; do if [ -e "$c/cgroup.procs" ] || [ -e "$c/tasks" ]; then mkdir -p "$c/$group"; fi; done
# The CPUs of a new cpuset are none.
for f in cpus mems; do
	p=/sys/fs/cgroup/cpuset
	if [ -e "$p/cpuset.$f" ]; then cat "$p/cpuset.$f" >"$p/$group/cpuset.$f"; fi
done
cat >"$w/kubelet.yaml" <<T
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://$w/run/cri.sock
staticPodPath: $w/manifests
podLogsDir: $w/logs
volumePluginDir: $w/plugins
cgroupRoot: /$group
failCgroupV1: false
failSwapOn: false
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
address: 127.0.0.1
resolvConf: ""
containerLogMaxSize: 64Ki
containerLogMaxFiles: 4
containerLogMonitorInterval: 3s
evictionHard: {memory.available: 10Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%, imagefs.inodesFree: 1%}
imageGCHighThresholdPercent: 100
logging: {verbosity: ${V:-2}}
T
cat >"$w/pods/probe.yaml" <<T
apiVersion: v1
kind: Pod
metadata: {name: probe, namespace: default, labels: {app: probe}}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: well
    image: 127.0.0.1:5000/box:latest
    imagePullPolicy: Always
    command: [sh, -c, 'mkdir -p /www; echo ok >/www/health; exec httpd -f -p 8080 -h /www']
    resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {cpu: 200m, memory: 64Mi}}
    readinessProbe: {httpGet: {path: /health, port: 8080}, periodSeconds: 2, timeoutSeconds: 5, failureThreshold: 5}
    livenessProbe: {exec: {command: [cat, /www/health]}, initialDelaySeconds: 2, periodSeconds: 2, timeoutSeconds: 10, failureThreshold: 5}
    startupProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, failureThreshold: 60}
  - name: sick
    image: 127.0.0.1:5000/box:latest
    command: [sh, -c, 'trap "exit 0" TERM; touch /tmp/well; sleep 20 & wait; rm /tmp/well; sleep 1000 & wait']
    livenessProbe: {exec: {command: [cat, /tmp/well]}, initialDelaySeconds: 2, periodSeconds: 2, timeoutSeconds: 10, failureThreshold: 2}
T
cat >"$w/pods/volume.yaml" <<T
apiVersion: v1
kind: Pod
metadata: {name: volume, namespace: default}
spec:
  terminationGracePeriodSeconds: 5
  shareProcessNamespace: true
  securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 2000, seccompProfile: {type: RuntimeDefault}}
  initContainers:
  - name: first
    image: 127.0.0.1:5000/box:latest
    command: [sh, -c, 'echo from-init >/data/hello']
    volumeMounts: [{name: data, mountPath: /data}]
  containers:
  - name: writer
    image: 127.0.0.1:5000/box:latest
    command: [sh, -c, 'trap "exit 0" TERM; while :; do date >/memory/now; sleep 1 & wait; done']
    securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    volumeMounts: [{name: data, mountPath: /data}, {name: memory, mountPath: /memory}]
  - name: reader
    image: 127.0.0.1:5000/box:latest
    command: [sh, -c, 'trap "exit 0" TERM; while :; do sleep 1 & wait; done']
    readinessProbe: {exec: {command: [sh, -c, 'grep from-init /data/hello && [ -s /memory/now ]']}, periodSeconds: 3, timeoutSeconds: 10, failureThreshold: 5}
    volumeMounts: [{name: data, mountPath: /data, readOnly: true}, {name: memory, mountPath: /memory, readOnly: true}]
  volumes:
  - {name: data, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
T
cat >"$w/pods/web.yaml" <<T
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: default}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: web
    image: 127.0.0.1:5000/box:latest
    command: [sh, -c, 'mkdir -p /www; echo served >/www/index.html; exec httpd -f -p 8080 -h /www']
    ports: [{containerPort: 8080, hostPort: 18080, protocol: TCP}]
    lifecycle: {preStop: {exec: {command: [sh, -c, 'echo bye >/www/bye']}}}
  - name: log
    image: 127.0.0.1:5000/box:latest
    command: [sh, -c, 'trap "exit 0" TERM; i=0; while :; do for _ in 1 2 3 4 5 6 7 8 9 10; do echo "line \$i of a log that is rotated by the kubelet"; i=\$((i+1)); done; sleep 0.2; done']
T
cp "$w"/pods/*.yaml "$w/manifests/"
start_hakod
start_kubelet
pods() { curl -sSk --max-time 10 https://127.0.0.1:10250/pods 2>/dev/null; }
health() { curl -sSk --max-time 10 https://127.0.0.1:10250/healthz 2>&1; }
# Pods that are not running and ready: none is as it should be.
unready() {
	pods | jq -r '[.items[]? | select(.metadata.namespace == "default")] as $p
		| (if ($p | length) == 3 then empty else "only \($p | length) pods" end),
		  ($p[] | select(.status.phase != "Running") | "\(.metadata.name): \(.status.phase)"),
		  ($p[] | (.metadata.name | sub("-hako-node$"; "")) as $n | .status.containerStatuses[]? | select(.name != "sick" and .ready != true) | "\($n)/\(.name) is not ready: \(.state | tostring)")' 2>/dev/null || echo "no answer"
}
restarts() { pods | jq -r '.items[] | (.metadata.name | sub("-hako-node$"; "")) as $n | (.status.containerStatuses[]?, .status.initContainerStatuses[]?) | "\($n)/\(.name) \(.restartCount)"'; }
conditions() { cri info 2>/dev/null | jq -r '.status.conditions[] | select(.type | endswith("Ready")) | select(.status != true) | "\(.type): \(.reason) \(.message)"'; }
deadline=$((SECONDS + 120))
until [ "$(health)" = ok ] && [ -z "$(unready)" ]; do
	kill -0 "$kubelet_pid" 2>/dev/null || { tail -5 "$w/kubelet.log" >&2; bad "the kubelet ended"; exit 1; }
	if [ $SECONDS -gt $deadline ]; then bad "the pods are not up: $(unready)"; exit 1; fi
	sleep 1
done
say "$("$kubelet" --version), $("$w/hakod" version | head -1), network $net: the pods are up"
end=$((SECONDS + minutes * 60)) middle=$((SECONDS + minutes * 30)) checks=0
cri ps
while [ $SECONDS -lt $end ]; do
	sleep 5
	if [ $middle -gt 0 ] && [ $SECONDS -ge $middle ]; then
		middle=0
		say "hakod is killed"
		stop "$hakod_pid" KILL
		start_hakod
		sleep 2
		say "the kubelet is started anew"
		stop "$kubelet_pid"
		start_kubelet
		deadline=$((SECONDS + 60))
		until [ "$(health)" = ok ] && [ -z "$(unready)" ]; do
			if [ $SECONDS -gt $deadline ]; then bad "the pods are not up after the restart: $(unready)"; break; fi
			sleep 1
		done
	fi
	checks=$((checks + 1))
	h=$(health); [ "$h" = ok ] || bad "healthz: $h"
	u=$(unready); [ -z "$u" ] || bad "$u"
	c=$(conditions); [ -z "$c" ] || bad "$c"
	[ "$(curl -sS --max-time 5 http://192.0.2.10:18080/ 2>&1)" = served ] || bad "the host port does not answer"
	r=$(restarts | awk '$1 != "probe/sick" && $2 != 0'); [ -z "$r" ] || bad "restarted: $r"
done
say "$checks checks over $minutes min"
restarts
[ "$(restarts | awk '$1 == "probe/sick" {print $2}')" -gt 0 ] || bad "the container whose probe fails was not restarted"
# The log: as many files as allowed, and no number missing from the oldest to the newest line.
dir=$(echo "$w"/logs/default_web-hako-node_*/log)
files=$(find "$dir" -type f | wc -l)
say "log files: $(find "$dir" -type f -printf '%f %s bytes, ')"
[ "$files" -gt 1 ] || bad "the log was not rotated"
[ "$files" -le 5 ] || bad "$files log files"
sleep 1
for f in $(find "$dir" -name '0.log.*' ! -name '*.tmp' | sort) "$dir/0.log"; do case $f in *.gz) zcat "$f" ;; *) cat "$f" ;; esac; done |
	awk '$3 != "F" || $4 != "line" {print "bad line: " $0; exit 1} NR > 1 && $5 != last + 1 {print "line " $5 " follows " last; exit 1} {last = $5} END {print NR " lines of the log, none missing, the last is " last}' || bad "the log"
cri stats | head -8
grep -cE 'pleg was last seen active' "$w/kubelet.log" | sed 's/^/PLEG not healthy, times: /'
grep -E '^E[0-9]{4}' "$w/kubelet.log" | sed -E 's/^E[0-9]+ [0-9:.]+ +[0-9]+ //; s/[0-9a-f]{64}/ID/g; s/[0-9a-f-]{32,36}/UID/g' | cut -c1-160 | sort | uniq -c | sort -rn | head -12
say "the pods are taken away"
rm "$w"/manifests/*.yaml
deadline=$((SECONDS + 150))
while [ -n "$(cri pods -q 2>/dev/null)" ]; do
	if [ $SECONDS -gt $deadline ]; then bad "pods left: $(cri pods)"; break; fi
	sleep 2
done
say "the pods are gone"
stop "$kubelet_pid"; kubelet_pid=''
[ -z "$(cri ps -aq)" ] || bad "containers left: $(cri ps -a)"
sleep 1
stop "$hakod_pid"; hakod_pid=''
left=$(awk -v d="$w/" 'index($2, d) == 1 {print $2}' /proc/mounts)
[ -z "$left" ] || bad "mounts left: $left"
left=$(find "$w/run/sandboxes" "$w/run/containers" "$w/run/network/netns" -mindepth 1 -maxdepth 1 2>/dev/null | grep -v /pool || true)
[ -z "$left" ] || bad "files left: $left"
left=$(find "$w/ipam" -type f -name '10.*' 2>/dev/null || true)
[ -z "$left" ] || bad "addresses left: $left"
left=$(for e in /proc/[0-9]*/exe; do echo "$e $(readlink "$e" 2>/dev/null)"; done | grep " $w/hako" || true)
[ -z "$left" ] || bad "processes left: $left"
left=$(for g in $(groups); do find "$g" -type d -name 'pod*'; done)
[ -z "$left" ] || bad "cgroups left: $left"
[ $failed = 0 ] && say "nothing is left; all was well" || exit 1
