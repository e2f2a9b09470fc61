"""A small replicated system as a directory tree, and a disk made of it: enough to be found, read and changed."""

from __future__ import annotations

import struct
import subprocess
import zlib
from pathlib import Path

from tests.harness.process import run

RELEASE = "6.1.0-test-amd64"
ROOT_UUID = "11111111-2222-4333-8444-555555555555"
BOOT_UUID = "66666666-7777-4888-8999-aaaaaaaaaaaa"
DISK_BYTES = 80 << 20
_START = 1 << 20
_MODULES = {
    "kernel/drivers/virtio/virtio.ko": "",
    "kernel/drivers/virtio/virtio_ring.ko": "",
    "kernel/drivers/virtio/virtio_pci.ko": "virtio virtio_ring",
    "kernel/drivers/block/virtio_blk.ko": "virtio virtio_ring",
    "kernel/drivers/scsi/virtio_scsi.ko": "virtio virtio_ring",
    "kernel/drivers/net/virtio_net.ko": "virtio virtio_ring",
    "kernel/fs/ext4/ext4.ko": "jbd2",
    "kernel/fs/jbd2/jbd2.ko": "",
    "kernel/fs/xfs/xfs.ko": "libcrc32c",
    "kernel/lib/libcrc32c.ko": "",
    "kernel/crypto/crc32c_generic.ko": "",
}
GRUB = f"""
set default="0"
if [ x"${{feature_menuentry_id}}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
function gfxmode {{
        set gfxpayload="${{1}}"
}}
menuentry 'Debian GNU/Linux' --class debian --class os $menuentry_id_option 'gnulinux-simple-{ROOT_UUID}' {{
        load_video
        if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
        search --no-floppy --fs-uuid --set=root {ROOT_UUID}
        echo    'Loading Linux {RELEASE} ...'
        linux   /boot/vmlinuz-{RELEASE} root=UUID={ROOT_UUID} ro console=ttyS0 cgroup_enable=memory
        initrd  /boot/initrd.img-{RELEASE}
}}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced' {{
        menuentry 'Debian, with Linux old' --class debian $menuentry_id_option 'gnulinux-old' {{
                linux   /boot/vmlinuz-old root=UUID={ROOT_UUID} ro
                initrd  /boot/initrd.img-old
        }}
}}
"""


def bzimage(release: str = RELEASE, elf: bytes = b"\x7fELF" + bytes(1000)) -> bytes:
    """The header of one, and a gzip payload that holds ``elf``."""
    payload = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    packed = payload.compress(elf) + payload.flush()
    image = bytearray(0x1000 + 512 + len(packed))
    image[0x1F1] = 7  # sectors of setup code; protected mode starts at 0x1000
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<H", image, 0x20E, 0x300)
    text = f"{release} (builder@test) #1 SMP".encode()
    image[0x500 : 0x500 + len(text)] = text
    struct.pack_into("<II", image, 0x248, 512, len(packed))
    image[0x1200 : 0x1200 + len(packed)] = packed
    return bytes(image)


def make_tree(root: Path) -> Path:
    """A usr-merged system with ifupdown, open-vm-tools and an fstab by the old platform's names."""
    for directory in ("boot/grub", "etc/systemd/system", "usr/lib/systemd/system", "usr/sbin", "etc/cdp"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    (root / "lib").symlink_to("usr/lib")
    (root / "sbin").symlink_to("usr/sbin")
    modules = root / "usr/lib/modules" / RELEASE
    lines = []
    for path, needs in _MODULES.items():
        (modules / path).parent.mkdir(parents=True, exist_ok=True)
        (modules / path).write_bytes(path.encode())
        paths = [other for other in _MODULES for need in needs.split() if other.endswith(f"/{need}.ko")]
        lines.append(f"{path}: {' '.join(paths)}".rstrip())
    (modules / "modules.dep").write_text("\n".join(lines) + "\n")
    (modules / "modules.builtin").write_text("kernel/drivers/scsi/sd_mod.ko\n")
    files = {
        "etc/fstab": f"# file systems\n/dev/sda1 / ext4 errors=remount-ro 0 1\nUUID={BOOT_UUID} /srv xfs noauto 0 0\n",
        "usr/sbin/init": "#!/bin/sh\n",
        "boot/grub/grub.cfg": GRUB,
        f"boot/initrd.img-{RELEASE}": "not read for a plain root",
        "usr/lib/systemd/system/open-vm-tools.service": "[Service]\n",
        "etc/network/interfaces": (
            "auto lo\niface lo inet loopback\n\nauto ens192\niface ens192 inet static\n    address 10.77.0.10/24\n"
            "    gateway 10.77.0.1\n    dns-nameservers 10.77.0.53\n"
            "iface ens192 inet static\n    address 10.77.0.100/24\n"
        ),
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / f"boot/vmlinuz-{RELEASE}").write_bytes(bzimage())
    return root


def make_disk(tree: Path, disk: Path) -> None:
    """One MBR partition with ext4 at 1 MiB, filled from ``tree``."""
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    table = "label: dos\nstart=2048, type=83, bootable\n"
    subprocess.run(["sfdisk", "--quiet", str(disk)], input=table, text=True, check=True)
    options = f"offset={_START},lazy_itable_init=0"
    kib = str((DISK_BYTES - _START) >> 10)
    run(["mke2fs", "-q", "-t", "ext4", "-U", ROOT_UUID, "-E", options, "-d", str(tree), str(disk), f"{kib}k"])
