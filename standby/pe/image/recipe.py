"""What the PE consists of. Everything here is part of the cache key: change a line and the layer is built again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

RECIPE_VERSION = 1
"""Raise it when the *way* a layer is made changes."""

PYTHON = (3, 11)
"""The interpreter of SUITE. The PE's wheels come from the environment that builds it, so both must be the same."""

DEFAULT_MIRROR = "http://deb.debian.org/debian"


@dataclass(frozen=True)
class DebianRecipe:
    """The distribution layer: packages are extracted, not configured, and then thinned out."""

    suite: str = "bookworm"
    packages: tuple[str, ...] = (
        "linux-image-amd64",
        "busybox-static",
        "python3-minimal",
        "libpython3-stdlib",
        "kexec-tools",
        "kmod",
        "iproute2",
        "e2fsprogs",
        "xfsprogs",
        "lvm2",
        "util-linux",
        "cpio",
        "zstd",
        "lz4",
        "xz-utils",
        "gzip",
    )
    modules: tuple[str, ...] = (
        # the buses, disks and NICs of a libvirt domain
        "virtio_pci",
        "virtio_blk",
        "virtio_scsi",
        "sd_mod",
        "virtio_net",
        "virtio_rng",
        "virtio_console",
        "virtio_balloon",
        # announcing an address needs packet sockets
        "af_packet",
        # what the replicated machine's disks may hold
        "ext4",
        "xfs",
        "vfat",
        "nls_cp437",
        "nls_ascii",
        "nls_utf8",
        "crc32c_generic",
        "dm_mod",
        "loop",
    )
    """Kernel modules that are kept, with everything they depend on; all others are left out."""

    left_out: tuple[str, ...] = (
        "usr/share/",
        "usr/include/",
        "usr/games/",
        "usr/lib/systemd/",
        "usr/lib/udev/",
        "usr/lib/dracut/",
        "usr/lib/initramfs-tools/",
        "usr/lib/klibc/",
        "usr/lib/apt/",
        "usr/lib/dpkg/",
        "usr/lib/locale/",
        "usr/lib/x86_64-linux-gnu/gconv/",
        "usr/lib/x86_64-linux-gnu/perl",
        "usr/lib/python3.11/idlelib/",
        "usr/lib/python3.11/lib2to3/",
        "usr/lib/python3.11/pydoc_data/",
        "usr/lib/python3.11/distutils/",
        "usr/lib/python3.11/turtledemo/",
        "usr/lib/python3.11/ensurepip/",
        "usr/lib/python3.11/wsgiref/",
        "usr/lib/valgrind/",
        "usr/lib/xfsprogs/",
        "usr/lib/x86_64-linux-gnu/libicu",
        "usr/lib/x86_64-linux-gnu/libxenlight",
        "usr/lib/x86_64-linux-gnu/libxml2",
        "usr/lib/x86_64-linux-gnu/libdb-",
        "usr/lib/x86_64-linux-gnu/libmvec",
        "usr/sbin/xfs_scrub",
        "usr/sbin/tc",
        "usr/sbin/arpd",
        "usr/bin/udevadm",
        "usr/bin/pzstd",
        "usr/bin/perl",
        "usr/bin/localedef",
        "usr/bin/gdbus",
        "usr/bin/dpkg",
        "usr/bin/apt",
        "etc/systemd/",
        "etc/apt/",
        "etc/cron",
        "etc/init",
        "var/",
        "boot/",
    )
    """Path prefixes, after bin, sbin and lib were merged into usr."""


KERNEL_ARGUMENTS = "console=ttyS0 rootfstype=ramfs loglevel=4 panic=1"
"""What the PE's kernel must be started with. A tmpfs root would be limited to half of the memory, which unpacking
exceeds; a panic ends the domain at once instead of leaving it hanging."""

DISTRIBUTIONS = (
    "numpy",
    "aiohttp",
    "aiohappyeyeballs",
    "aiosignal",
    "attrs",
    "frozenlist",
    "idna",
    "multidict",
    "propcache",
    "typing_extensions",
    "yarl",
    "blake3",
    "msgspec",
    "pyroute2",
    "zstandard",
)
"""Python distributions that the PE carries: what ``standby.pe`` and ``standby.replay`` import, and what those need."""

DISTRIBUTION_PARTS_LEFT_OUT = (
    "/tests/",
    "/testing/tests/",
    "numpy/f2py/",
    "numpy/distutils/",
    "numpy/random/lib/",
    "numpy/_core/include/",
    "numpy/_core/lib/",
    "numpy/_pyinstaller/",
    "zstandard/_cffi.",
    "zstandard/backend_cffi.",
    "/__pycache__/",
)
DISTRIBUTION_SUFFIXES_LEFT_OUT = (".pyi", ".pyx", ".pxd", ".pxi", ".a", ".h", ".c", ".hash")

CODE_PACKAGES = ("journal", "standby")
CODE_LEFT_OUT = ("standby/pe/image/", "standby/target/", "/__pycache__/")


def debian_key(recipe: DebianRecipe) -> str:
    """16 hexadecimal digits that change when the distribution layer has to be built again."""
    text = json.dumps([RECIPE_VERSION, asdict(recipe)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
