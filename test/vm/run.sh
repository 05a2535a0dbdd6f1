#!/usr/bin/env bash
# run.sh [OPTION...] COMMAND [ARGUMENT...]
#
# Boots Debian's kernel under QEMU's software emulation, with cgroup v2 only and
# AppArmor, and runs COMMAND in it as root. Its output goes to standard output; the exit
# code is COMMAND's (124: time limit, 125: the machine gave none). COMMAND of one word
# is a line of shell.
#
#  -f PATH[:DEST]  hand in this file or folder (as DEST, else at the same path); repeatable
#  -o FOLDER       what COMMAND writes below /out is put here
#  -C FOLDER       COMMAND runs in this folder of the machine
#  -s              systemd is PID 1 and COMMAND a service of it with Delegate=yes
#                  (else: a minimal init, every controller enabled below the root cgroup)
#  -T              COMMAND gets a terminal
#  -t SECONDS      time limit (900)
#  -m MIB          memory (2048)
#  -k FILE         the kernel's console goes here
#  -a ARGUMENTS    more kernel arguments
#
# ARCH=arm64 boots a machine of that architecture, without systemd.
# The disk is thrown away afterwards: each run starts from the same image (image.sh).
set -u
here=$(cd "$(dirname "$0")" && pwd)
limit=900 memory=2048 console='' append='' outdir='' cwd='' tty=0 init=/sbin/vm-init files=()
while getopts f:o:C:sTt:m:k:a: option; do
	case $option in
	f) files+=("$OPTARG") ;; o) outdir=$OPTARG ;; C) cwd=$OPTARG ;;
	s) init='/lib/systemd/systemd systemd.unit=vm.target systemd.show_status=0' ;;
	T) tty=1 ;; t) limit=$OPTARG ;; m) memory=$OPTARG ;;
	k) console=$OPTARG ;; a) append=$OPTARG ;; *) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
case ${ARCH:-amd64} in
arm64)
	emulator=qemu-system-aarch64 package=qemu-system-arm port=ttyAMA0 machine=(-cpu 'max,pauth-impdef=on' -machine virt)
	case $init in */systemd\ *) echo "run.sh: no systemd in the machine of arm64" >&2; exit 2 ;; esac
	;;
*) emulator=qemu-system-x86_64 package=qemu-system-x86 port=ttyS0 machine=(-cpu 'max,cx16=off' -machine q35) ;;
esac
command -v $emulator >/dev/null || { echo "run.sh: QEMU is missing: apt-get install $package" >&2; exit 1; }
image=$("$here/image.sh") || exit 1

tmp=$(mktemp -d)
qemu=
# The child is timeout(1), which hands TERM on to QEMU.
trap '[ -z "$qemu" ] || { kill "$qemu" && wait "$qemu"; } 2>/dev/null; rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM

# The command and the files travel as a tar on the second disk.
mkdir -p "$tmp/in/vm"
if [ $# = 1 ]; then printf '%s\n' "$1"; else printf '%q ' "$@"; fi >"$tmp/in/vm/cmd"
[ -z "$cwd" ] || printf '%s\n' "$cwd" >"$tmp/in/vm/cwd"
[ $tty = 0 ] || : >"$tmp/in/vm/tty"
tar -C "$tmp/in" -cf "$tmp/in.tar" vm
for f in ${files[@]+"${files[@]}"}; do
	from=${f%%:*} to=${f#*:}
	[ -e "$from" ] || { echo "run.sh: no file $from" >&2; exit 2; }
	from=$(readlink -f "$from")
	case $f in *:*) ;; *) to=$from ;; esac
	# The flags keep the targets of symbolic links as they are.
	tar -C "$(dirname "$from")" --numeric-owner --transform "flags=rh;s|^$(basename "$from" | sed 's/[].[\*^$]/\\&/g')|${to#/}|" \
		-rf "$tmp/in.tar" "$(basename "$from")" || exit 2
done
truncate -s %512 "$tmp/in.tar"
truncate -s 1G "$tmp/out.tar"
mkfifo "$tmp/output"

: "${console:=$tmp/console}"
disk=format=raw,if=virtio
nice timeout -k 5 "$limit" $emulator -accel tcg,thread=multi,tb-size=512 "${machine[@]}" \
	-m "$memory" -smp 2 -display none -nodefaults -no-reboot \
	-kernel "$image/vmlinuz" -initrd "$image/initrd.gz" \
	-append "console=$port quiet panic=-1 mitigations=off pci=nomsi apparmor=1 security=apparmor vm.init=$init $append" \
	-drive "file=$image/root.ext4,$disk,snapshot=on,cache=unsafe" \
	-drive "file=$tmp/in.tar,$disk,readonly=on" \
	-drive "file=$tmp/out.tar,$disk,cache=unsafe" \
	-serial "file:$console" \
	-device virtio-serial-pci -chardev "file,id=o,path=$tmp/output" -device virtserialport,chardev=o,name=vm.output \
	</dev/null >"$tmp/qemu.log" 2>&1 &
qemu=$!
cat "$tmp/output" &
output=$!
# Held open, so that cat does not wait for a QEMU that failed to start.
exec 8>"$tmp/output"
wait $qemu
status=$?
qemu=
exec 8>&-
wait $output
if [ $status = 124 ] || [ $status = 137 ]; then
	echo "run.sh: time limit of $limit s" >&2
	exit 124
fi
mkdir -p "$tmp/out"
tar -C "$tmp/out" -xf "$tmp/out.tar" 2>/dev/null
if [ ! -r "$tmp/out/.rc" ]; then
	echo "run.sh: the machine gave no exit code; its console ends:" >&2
	tail -n 15 "$console" "$tmp/qemu.log" >&2
	exit 125
fi
status=$(cat "$tmp/out/.rc")
rm -f "$tmp/out/.rc"
if [ -n "$outdir" ]; then mkdir -p "$outdir" && cp -a "$tmp/out/." "$outdir/"; fi
exit "$status"
