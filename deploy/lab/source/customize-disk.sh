#!/bin/sh
# Makes a copy of the source image one lab's machine: addresses, keys, PostgreSQL's access rules, our agent's wheel.
#
#   customize-disk.sh DISK OVERLAY_DIR WHEEL
#
# OVERLAY_DIR is copied over the root directory. To be run like build-disk.sh.
set -eu
disk=$1 overlay=$2 wheel=$3
start_bytes=1048576

mnt=$(mktemp -d)
trap 'umount -R "$mnt" 2>/dev/null || true; rmdir "$mnt" 2>/dev/null || true' EXIT
mount -o "loop,offset=$start_bytes" "$disk" "$mnt"
mount -t proc proc "$mnt/proc"

cp -r --no-preserve=ownership "$overlay/." "$mnt/"
chmod 700 "$mnt/root/.ssh"
chmod 600 "$mnt/root/.ssh/authorized_keys"
rm -f "$mnt"/etc/ssh/ssh_host_*
ssh-keygen -q -t ed25519 -N '' -C source -f "$mnt/etc/ssh/ssh_host_ed25519_key"
cat "$mnt/etc/postgresql/15/main/pg_hba.lab" >>"$mnt/etc/postgresql/15/main/pg_hba.conf"

# As a user installs it: a wheel into a virtual environment.
cp "$wheel" "$mnt/tmp/"
chroot "$mnt" sh -c "PIP_CONFIG_FILE=/dev/null /opt/cdp/bin/pip install -q --no-index --no-deps --no-cache-dir /tmp/$(basename "$wheel")"
rm "$mnt/tmp/$(basename "$wheel")"
ln -sf /opt/cdp/bin/cdp "$mnt/usr/local/bin/cdp"

umount "$mnt/proc"
umount "$mnt"
