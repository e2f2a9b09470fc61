#!/bin/sh
# Makes the source machine's disk from an archive of its root file system: an MBR partition, ext4, GRUB, and a Python
# environment with what the agent needs (not the agent: see customize-disk.sh).
#
#   build-disk.sh DISK ROOT.tar WHEELHOUSE SIZE_BYTES
#
# Run it in a mount namespace of its own (unshare --mount): then every mount ends with this process, however it ends,
# and the loop device with its mount.
set -eu
disk=$1 root_tar=$2 wheelhouse=$3 size_bytes=$4
start_bytes=1048576

truncate -s "$size_bytes" "$disk"
printf 'label: dos\nstart=2048, type=83, bootable\n' | sfdisk --quiet "$disk"
# No lazy initialisation: the kernel would go on writing to the file system for minutes, and the journal would carry it.
mke2fs -q -t ext4 -L root -E "offset=$start_bytes,lazy_itable_init=0,lazy_journal_init=0" \
    "$disk" "$(((size_bytes - start_bytes) / 1024))k"

mnt=$(mktemp -d)
ours=''
loop=$(losetup --find --show --partscan "$disk")
ours=$loop
trap 'umount -R "$mnt" 2>/dev/null || true; [ -z "$ours" ] || losetup -d "$ours"; rmdir "$mnt"' EXIT
# A kernel without MS-DOS partition tables is told of the partition; --partscan makes it forget it again.
[ -e "${loop}p1" ] || partx --add "$loop"
mount "${loop}p1" "$mnt"
# Now that it is mounted, this only says: let it go when the mount ends. From then on its number may be another's.
losetup -d "$loop"
ours=''
tar -xf "$root_tar" -C "$mnt" --numeric-owner --xattrs
uuid=$(blkid -s UUID -o value "${loop}p1")
echo "UUID=$uuid / ext4 errors=remount-ro 0 1" >"$mnt/etc/fstab"

# grub-mkconfig runs as on the machine itself; it shall see the machine's disk and nothing else of this host.
mount -t proc proc "$mnt/proc"
mount -t sysfs -o ro sysfs "$mnt/sys"
mount -t tmpfs tmpfs "$mnt/dev"
cp -a /dev/null /dev/zero /dev/urandom /dev/random "$loop" "${loop}p1" "$mnt/dev/"
ln -s /proc/self/fd "$mnt/dev/fd"
mkdir -p "$mnt/dev/disk/by-uuid" "$mnt/boot/grub"
ln -s "../../$(basename "${loop}p1")" "$mnt/dev/disk/by-uuid/$uuid"
echo "(hd0) $loop" >"$mnt/boot/grub/device.map"

cat >"$mnt/etc/default/grub" <<'EOF'
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="console=ttyS0"
GRUB_TERMINAL=serial
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
EOF
cp -r "$mnt/usr/lib/grub/i386-pc" "$mnt/boot/grub/"
chroot "$mnt" grub-mkconfig -o /boot/grub/grub.cfg 2>&1
rm "$mnt/boot/grub/device.map"

# No grub-install: it wants the real disk. Its work on a BIOS machine is these two copies.
grub-mkimage -d "$mnt/usr/lib/grub/i386-pc" -O i386-pc -p '(hd0,msdos1)/boot/grub' -o "$disk.core" \
    biosdisk part_msdos ext2 normal configfile linux search search_fs_uuid serial
dd if="$mnt/usr/lib/grub/i386-pc/boot.img" of="$disk" bs=440 count=1 conv=notrunc status=none
dd if="$disk.core" of="$disk" bs=512 seek=1 conv=notrunc status=none
rm "$disk.core"

mkdir "$mnt/opt/wheelhouse"
cp "$wheelhouse"/*.whl "$mnt/opt/wheelhouse/"
chroot "$mnt" python3 -m venv /opt/cdp
chroot "$mnt" sh -c 'cd /opt/wheelhouse && PIP_CONFIG_FILE=/dev/null /opt/cdp/bin/pip install -q --no-index --no-cache-dir *.whl'
rm -r "$mnt/opt/wheelhouse"

rm -rf "$mnt"/var/cache/apt/* "$mnt"/var/lib/apt/lists/* "$mnt"/var/log/* "$mnt"/tmp/*
mkdir -p "$mnt/var/log/postgresql"
chroot "$mnt" chown postgres:adm /var/log/postgresql
umount "$mnt/dev" "$mnt/sys" "$mnt/proc"
fstrim "$mnt" 2>/dev/null || true
umount "$mnt"
