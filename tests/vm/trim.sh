#!/bin/sh
# Makes a guest image out of a fresh Debian tree: trim.sh ROOT MODULE...
# Only the named kernel modules, and those they need, are kept. Prints what it could not find.
set -eu

root=$1
shift
kernel=$(ls "$root/lib/modules")
modules="$root/lib/modules/$kernel"

keep=$(mktemp)
trap 'rm -f "$keep"' EXIT
for module; do
	chroot "$root" modprobe --show-depends --set-version "$kernel" "$module" ||
		echo "no module $module in $kernel" >&2
done | sed -n "s|^insmod /.*/$kernel/\([^ ]*\).*|\1|p" | sort -u >"$keep"
(cd "$modules" && find kernel -type f) | grep -vxFf "$keep" | while read -r file; do
	rm "$modules/$file"
done
chroot "$root" depmod "$kernel"

for path in \
	boot/* tmp/* var/cache/* var/lib/apt/lists/* var/lib/dpkg/info/* var/log/* \
	etc/apt/sources.list* etc/initramfs-tools etc/resolv.conf \
	usr/include usr/src usr/games \
	usr/lib/apt usr/lib/dracut usr/lib/initramfs-tools usr/lib/klibc usr/lib/udev/hwdb.bin usr/lib/udev/hwdb.d \
	usr/lib/*/gconv usr/lib/*/perl-base usr/bin/perl* \
	usr/share/bash-completion usr/share/bug usr/share/common-licenses usr/share/doc usr/share/doc-base \
	usr/share/fish usr/share/gcc usr/share/gdb usr/share/i18n usr/share/info usr/share/initramfs-tools \
	usr/share/lintian usr/share/locale usr/share/man usr/share/menu usr/share/perl5 usr/share/pixmaps \
	usr/share/zoneinfo usr/share/zsh; do
	# Some paths are patterns on purpose, and not every release has all of them.
	# shellcheck disable=SC2086
	rm -rf "${root:?}"/$path
done

# An empty machine-id makes a new one at each boot, without the steps of a first boot.
: >"$root/etc/machine-id"
echo guest >"$root/etc/hostname"
echo '127.0.0.1 localhost guest' >"$root/etc/hosts"
chmod 0644 "$root/etc/hostname" "$root/etc/hosts"

# Nobody logs in, nothing is updated, no disk is there.
for unit in \
	apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
	getty@.service serial-getty@.service \
	ldconfig.service systemd-hwdb-update.service systemd-journal-catalog-update.service; do
	ln -sf /dev/null "$root/etc/systemd/system/$unit"
done

ln -sf sbin/init "$root/init"
