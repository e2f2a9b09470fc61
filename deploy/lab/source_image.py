"""The source machine's disk: Debian 12 with GRUB, systemd, PostgreSQL and a Python environment for our agent.

mmdebstrap ─► root-KEY.tar ─► build-disk.sh ─► disk-KEY.raw      cached; KEY covers recipe, script and wheelhouse
                                   copy ─► customize-disk.sh     once per lab: addresses, keys, the agent's wheel
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from standby.pe.image.build import Progress
from standby.pe.image.cache import complete, default_cache_dir, forget_old, locked, used
from standby.pe.image.program import run
from standby.pe.image.recipe import DEFAULT_MIRROR

DISK_BYTES = 2 << 30

_SUITE = "bookworm"
_PACKAGES = (
    "systemd-sysv",
    "dbus",
    "udev",
    "linux-image-amd64",
    "initramfs-tools",
    "zstd",
    "grub-pc-bin",
    "grub2-common",
    "openssh-server",
    "ifupdown",
    "iproute2",
    "iputils-ping",
    "netbase",
    "procps",
    "kmod",
    "e2fsprogs",
    "ca-certificates",
    "python3",
    "python3-venv",
    "libbpf1",
    "postgresql-15",
)
_LEFT_OUT = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    # What a virtual machine without a screen never loads. It would only make the seed longer.
    "/lib/modules/*/kernel/drivers/gpu/*",
    "/lib/modules/*/kernel/drivers/media/*",
    "/lib/modules/*/kernel/drivers/net/wireless/*",
    "/lib/modules/*/kernel/drivers/infiniband/*",
    "/lib/modules/*/kernel/drivers/isdn/*",
    "/lib/modules/*/kernel/drivers/staging/*",
    "/lib/modules/*/kernel/drivers/iio/*",
    "/lib/modules/*/kernel/sound/*",
    "/lib/modules/*/kernel/drivers/net/ethernet/mellanox/*",
    "/lib/modules/*/kernel/drivers/net/ethernet/broadcom/*",
    "/lib/modules/*/kernel/drivers/net/ethernet/qlogic/*",
    "/lib/modules/*/kernel/drivers/net/ethernet/chelsio/*",
    "/lib/modules/*/kernel/drivers/net/ethernet/netronome/*",
    "/lib/modules/*/kernel/drivers/scsi/qla2xxx/*",
    "/lib/modules/*/kernel/drivers/scsi/lpfc/*",
    "/lib/modules/*/kernel/fs/ocfs2/*",
    "/usr/share/i18n/locales/*",
    # PostgreSQL's just-in-time compiler; it is switched off.
    "/usr/lib/x86_64-linux-gnu/libLLVM*",
    "/usr/lib/x86_64-linux-gnu/libz3*",
    "/usr/lib/postgresql/*/lib/bitcode/*",
)
_SCRIPTS = Path(__file__).parent / "source"
_DEBOOTSTRAP_DEADLINE_S = 1800.0
_DISK_DEADLINE_S = 600.0


def base_disk(wheelhouse: Path, progress: Progress, *, refresh: bool = False) -> Path:
    """The cached disk image, built when the cache does not have it. ``wheelhouse`` holds the agent's dependencies."""
    directory = default_cache_dir() / "source"
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        root = _root_archive(directory, progress, refresh)
        wheels = sorted(wheelhouse.glob("*.whl"))
        text = " ".join([root.name, str(DISK_BYTES), *(path.name for path in wheels)])
        digest = hashlib.sha256(text.encode() + (_SCRIPTS / "build-disk.sh").read_bytes()).hexdigest()[:16]
        disk = directory / f"disk-{digest}.raw"
        if refresh or not disk.exists():
            progress("building the source machine's disk")
            with complete(disk) as partial:
                partial.unlink(missing_ok=True)
                arguments = [str(partial), str(root), str(wheelhouse), str(DISK_BYTES)]
                _privately("build-disk.sh", arguments, disk.with_suffix(".log"))
        used(root)
        used(disk)
        for pattern in ("root-*.tar", "disk-*.raw"):
            forget_old(directory, pattern, keep=2)
    return disk


def customize(disk: Path, overlay: Path, wheel: Path, log: Path) -> None:
    """Lay ``overlay`` over the root directory of ``disk`` (a copy of the base) and install ``wheel``."""
    _privately("customize-disk.sh", [str(disk), str(overlay), str(wheel)], log)


def _root_archive(directory: Path, progress: Progress, refresh: bool) -> Path:
    key = hashlib.sha256(repr((_SUITE, _PACKAGES, _LEFT_OUT)).encode()).hexdigest()[:16]
    root = directory / f"root-{key}.tar"
    if refresh or not root.exists():
        progress(f"installing Debian {_SUITE} with PostgreSQL into an archive (about two minutes)")
        mirror = os.environ.get("CDP_DEBIAN_MIRROR") or DEFAULT_MIRROR
        with complete(root) as partial:
            run(
                [
                    "mmdebstrap",
                    "--variant=minbase",
                    "--mode=root",
                    "--format=tar",
                    '--aptopt=Apt::Install-Recommends "false"',
                    *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
                    f"--include={','.join(_PACKAGES)}",
                    _SUITE,
                    str(partial),
                    f"deb {mirror} {_SUITE} main",
                    f"deb {mirror} {_SUITE}-updates main",
                    f"deb {mirror.rstrip('/')}-security {_SUITE}-security main",
                ],
                deadline_s=_DEBOOTSTRAP_DEADLINE_S,
                log=root.with_suffix(".log"),
            )
    return root


def _privately(script: str, arguments: list[str], log: Path) -> None:
    """Run a script in a mount namespace of its own, so that its mounts and loop devices end with it."""
    run(
        ["unshare", "--mount", "--propagation=private", str(_SCRIPTS / script), *arguments],
        deadline_s=_DISK_DEADLINE_S,
        log=log,
    )
