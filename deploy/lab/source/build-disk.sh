#!/bin/sh
# Makes the source machine's disk from an archive of its root file system: an MBR partition, ext4, GRUB, and a Python
# environment with what the agent needs (not the agent: see customize-disk.sh).
#
#   build-disk.sh DISK ROOT.tar WHEELHOUSE SIZE_BYTES
#
# Run it in a mount namespace of its own (unshare --mount): then every mount and, because they are mounted with
# -o loop, every loop device ends with this process, however it ends.
set -eu
disk=$1 root_tar=$2 wheelhouse=$3 size_bytes=$4
start_bytes=1048576

truncate -s "$size_bytes" "$disk"
printf 'label: dos\nstart=2048, type=83, bootable\n' | sfdisk --quiet "$disk"
# No lazy initialisation: the kernel would go on writing to the file system for minutes, and the journal would carry it.
mke2fs -q -t ext4 -L root -E "offset=$start_bytes,lazy_itable_init=0,lazy_journal_init=0" \
    "$disk" "$(((size_bytes - start_bytes) / 1024))k"

mnt=$(mktemp -d)
trap 'umount -R "$mnt" 2>/dev/null || true; rmdir "$mnt" 2>/dev/null || true' EXIT
mount -o "loop,offset=$start_bytes,sizelimit=$((size_bytes - start_bytes))" "$disk" "$mnt"
tar -xf "$root_tar" -C "$mnt" --numeric-owner --xattrs

loop=$(findmnt -n -o SOURCE "$mnt")
uuid=$(blkid -s UUID -o value "$loop")
echo "UUID=$uuid / ext4 errors=remount-ro 0 1" >"$mnt/etc/fstab"

# A /dev of its own: grub-probe wants to see the root device, and nothing else of this host.
mount -t proc proc "$mnt/proc"
mount -t tmpfs tmpfs "$mnt/dev"
cp -a /dev/null /dev/zero /dev/urandom /dev/random "$loop" "$mnt/dev/"
ln -s /proc/self/fd "$mnt/dev/fd"
mkdir -p "$mnt/dev/disk/by-uuid"
ln -s "../../$(basename "$loop")" "$mnt/dev/disk/by-uuid/$uuid"

cat >"$mnt/etc/default/grub" <<'EOF'
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="console=ttyS0"
GRUB_TERMINAL=serial
EOF
mkdir -p "$mnt/boot/grub"
cp -r "$mnt/usr/lib/grub/i386-pc" "$mnt/boot/grub/"
chroot "$mnt" grub-mkconfig -o /boot/grub/grub.cfg 2>&1
# The loop device has no partition table, so grub-probe could not know in which partition the root is; the search by
# UUID that follows each such line finds it.
sed -i '/set root=.hostdisk/d' "$mnt/boot/grub/grub.cfg"

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
umount "$mnt/dev" "$mnt/proc"
fstrim "$mnt" 2>/dev/null || true
umount "$mnt"
