#!/usr/bin/env bash
# image.sh: makes what run.sh boots and prints the folder that holds it:
#   vmlinuz     Debian's cloud kernel
#   initrd.gz   busybox and the modules that find the root disk
#   root.ext4   Debian with systemd, AppArmor and what the tests call
# The folder is .cache/vm/KEY, where KEY is the hash of this script and of guest/, so
# an image is built once and again only when one of these has changed. Downloaded
# packages stay in .cache/vm/debs. Needs root, debootstrap, busybox and mke2fs.
# MIRROR names another Debian mirror, VM_CACHE another folder than .cache/vm.
# KERNEL=backports takes the kernel of Debian's backports (6.12 or later, which mounts
# EROFS from a file) instead of Debian 12's own; the folder is KEY-backports then.
# ARCH=arm64 makes a machine of that architecture, for the minimal mode only: packages are unpacked
# and not set up, because nothing here can run what is in them. The folder is KEY-arm64 then.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${VM_CACHE:-$here/../../.cache/vm}
suite=bookworm
mirror=${MIRROR:-http://deb.debian.org/debian}
kernel=${KERNEL:-stable}
arch=${ARCH:-amd64}
case $arch in
amd64 | arm64) ;;
*) echo "image.sh: ARCH is $arch, not amd64 or arm64" >&2; exit 2 ;;
esac
case $kernel-$arch in backports-arm64) echo "image.sh: the kernel of backports is for amd64 only" >&2; exit 2 ;; esac
case $kernel in
stable) of='' from=$suite ;;
backports) of=-backports from=$suite-backports ;;
*) echo "image.sh: KERNEL is $kernel, not stable or backports" >&2; exit 2 ;;
esac
packages=(
	systemd systemd-sysv dbus apparmor kmod            # what boots
	iproute2 nftables iptables procps util-linux-extra # what hako or its tests call
	busybox-static jq strace attr socat curl uidmap libcap2-bin
	runc crun criu containernetworking-plugins         # peers, checkpoints, pods on CNI
)
if [ "$arch" = arm64 ]; then
	of=$of-arm64
	packages=(iproute2 procps util-linux-extra busybox-static strace attr uidmap linux-image-cloud-arm64)
fi

key=$(cat "$0" "$here"/guest/* | sha256sum | cut -c1-12)$of
mkdir -p "$cache/debs"
cache=$(cd "$cache" && pwd)
out=$cache/$key
if [ -e "$out/complete" ]; then
	echo "$out"
	exit
fi
# One build at a time; whoever waited finds the image made.
exec 9>"$cache/lock"
flock 9
if [ -e "$out/complete" ]; then
	echo "$out"
	exit
fi
tools=(debootstrap busybox mke2fs)
[ "$arch" = amd64 ] || tools+=(depmod)
for c in "${tools[@]}"; do
	command -v "$c" >/dev/null || { echo "image.sh: $c is missing: apt-get install debootstrap busybox-static e2fsprogs kmod" >&2; exit 1; }
done
[ "$(id -u)" -eq 0 ] || { echo "image.sh: needs root (debootstrap)" >&2; exit 1; }
echo "test VM: making the image (once, a few minutes) ..." >&2
rm -rf "$out"
mkdir -p "$out"
tmp=$(mktemp -d -p "$cache" build.XXXXXX)
trap 'rm -rf "$tmp"' EXIT
fail() { tail -n 20 "$out/build.log" >&2; echo "image.sh: $1 (log: $out/build.log)" >&2; exit 1; }

root=$tmp/root
list=$(IFS=,; echo "${packages[*]}")
if [ "$arch" = arm64 ]; then foreign=(--arch=arm64 --foreign); else foreign=(); fi
debootstrap --variant=minbase --cache-dir="$cache/debs" ${foreign[@]+"${foreign[@]}"} --include="$list" "$suite" "$root" "$mirror" \
	>"$out/build.log" 2>&1 || fail "debootstrap failed"
busybox=$(command -v busybox)

# The kernel is taken from its package without installing it: no boot loader, no
# initramfs of a size that would be felt at each boot.
take_kernel() {
	[ "$from" = "$suite" ] || echo "deb $mirror $from main" >>"$root/etc/apt/sources.list"
	cat >"$root/kernel" <<'K'
set -e
apt-get update -qq
p=$(apt-cache -t "$1" depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
cd /tmp
apt-get download -qq -o APT::Sandbox::User=root "$p"
dpkg -x "$p"*.deb /tmp/kernel
K
	chroot "$root" bash /kernel "$from" >>"$out/build.log" 2>&1 || fail "no kernel package"
	rm -f "$root/kernel"
}

# unpack_foreign puts everything that debootstrap has fetched into its place, with the users that
# the base package would make, and the kernel where take_kernel puts it.
unpack_foreign() {
	for deb in "$root"/var/cache/apt/archives/*.deb; do
		to=$root
		case ${deb##*/} in linux-image-[0-9]*) to=$root/tmp/kernel && mkdir -p "$to" ;; esac
		dpkg-deb --fsys-tarfile "$deb" | tar -C "$to" --keep-directory-symlink -xf - || fail "cannot unpack ${deb##*/}"
	done
	cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
	cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
	for d in proc dev sys; do # debootstrap may have left a link to those of this machine
		if [ -L "$root/$d" ]; then rm "$root/$d" && mkdir "$root/$d"; fi
	done
	ln -sf mawk "$root/usr/bin/awk"
	rm -rf "$root/debootstrap" "$root"/var/cache/apt/archives/*.deb
	busybox=$root/bin/busybox
}
if [ "$arch" = arm64 ]; then unpack_foreign; else take_kernel; fi
image=$(echo "$root"/tmp/kernel/boot/vmlinuz-*)
release=${image##*/vmlinuz-}
cp "$image" "$out/vmlinuz"
mkdir -p "$root/lib/modules"
cp -a "$root/tmp/kernel/lib/modules/$release" "$root/lib/modules/"
rm -rf "$root"/tmp/kernel "$root"/tmp/*.deb \
	"$root/lib/modules/$release/kernel/drivers"/{gpu,infiniband,scsi,nvme,media,usb}
# kmod's tools, on the modules of the machine: its own, where they run here.
if [ "$arch" = arm64 ]; then
	needed() { modprobe -d "$root" -S "$release" --show-depends "$1" | awk '$1 == "insmod" { print $2 }'; }
	depmod -b "$root" "$release"
else
	needed() { chroot "$root" modprobe -S "$release" --show-depends "$1" | awk -v root="$root" '$1 == "insmod" { print root $2 }'; }
	chroot "$root" depmod "$release"
fi

# initrd: load the disk's driver, mount it, go on there.
initrd=$tmp/initrd
mkdir -p "$initrd"/{bin,dev,proc,sys,new,modules}
cp "$busybox" "$initrd/bin/busybox"
ln -s busybox "$initrd/bin/sh"
install -m 0755 "$here/guest/initrd-init" "$initrd/init"
for module in virtio_pci virtio_blk virtio_console ext4; do
	needed "$module" 2>/dev/null
done | awk '!seen[$0]++' | while read -r file; do
	cp "$file" "$initrd/modules/"
	basename "$file" >>"$initrd/modules/order"
done
(cd "$initrd" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) >"$out/initrd.gz"

install -m 0755 "$here/guest/init" "$root/sbin/vm-init"
install -m 0755 "$here/guest/command" "$root/sbin/vm-command"
mkdir -p "$root/etc/systemd/system"
install -m 0644 "$here/guest/vm.service" "$here/guest/vm.target" "$root/etc/systemd/system/"
# Nothing starts that a test does not need: the machine is up in seconds.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
	e2scrub_reap.service fstrim.timer getty@tty1.service serial-getty@ttyS0.service \
	systemd-timesyncd.service systemd-update-utmp.service systemd-networkd.service \
	systemd-resolved.service systemd-udevd.service systemd-udevd-control.socket \
	systemd-udevd-kernel.socket systemd-udev-trigger.service apparmor.service \
	systemd-modules-load.service systemd-random-seed.service; do
	ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
echo vm >"$root/etc/hostname"
echo '127.0.0.1 localhost vm' >"$root/etc/hosts"
echo 'nameserver 127.0.0.1' >"$root/etc/resolv.conf"
: >"$root/etc/fstab"
echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/*

size=$(($(du -sm "$root" | cut -f1) + 2000))
mke2fs -q -t ext4 -O ^has_journal -L vm -d "$root" "$out/root.ext4" "${size}M" >>"$out/build.log" 2>&1 || fail "mke2fs failed"
echo "$release" >"$out/complete"
# Images of earlier versions of this script are of no use any more.
for old in "$cache"/*/; do
	old=${old%/}
	name=${old##*/} tail=
	case $name in *-*) tail=-${name#*-} ;; esac
	[ "$tail" = "$of" ] || continue # of another kernel
	[ "$old" = "$out" ] || [ "$old" = "$cache/debs" ] || [ "$old" = "$tmp" ] || [ ! -e "$old/complete" ] || rm -rf "$old"
done
echo "$out"
