"""What a path names, and whether it can be protected. Facts come from sysfs, whose root is passed in.

    /dev/vda1 ─► /sys/dev/block/254:1 ─► …/block/vda/vda1      a partition: protect its disk
    /dev/vda  ─► /sys/dev/block/254:0 ─► …/block/vda           holders, queue/*, size, ro

Holders: device-mapper clones bios, and a clone is seen at the disk below; so LVM or dm-crypt on top of a protected
disk is fine. md, bcache and device-mapper multipath hand the *same* bio or request down, unseen there: with those,
only the top device can be protected.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cdp.agent.capture import errors, layout

SYSFS = Path("/sys")
PROC = Path("/proc")
DISK_BYTES_MAX = 2**50
"""As ``journal.extent.DISK_BYTES_MAX``, which this module does not import: the drainer stays free of numpy."""
SECTOR_BYTES_MAX = 4096
DISKS_MAX = 64


@dataclass(frozen=True, slots=True)
class Device:
    """A block device. ``path`` is what to open, ``name`` the kernel's; for a partition ``partition_of`` names its disk
    and ``start_bytes`` its place on it. ``diskseq`` changes when the kernel puts another disk behind the numbers."""

    path: Path
    name: str
    major: int
    minor: int
    size_bytes: int
    sector_bytes: int
    serial: str
    rotational: bool
    read_only: bool
    diskseq: int
    partition_of: str | None = None
    start_bytes: int = 0

    @property
    def key(self) -> int:
        """Of the kernel-side tables."""
        return self.major << 32 | self.minor

    @property
    def granule_bytes(self) -> int:
        """The unit of dirtiness: the smallest power of two that needs at most ``GRANULES_MAX`` stamps."""
        granule = layout.GRANULE_BYTES_MIN
        while granule * layout.GRANULES_MAX < self.size_bytes:
            granule *= 2
        return granule

    @property
    def granules(self) -> int:
        return -(-self.size_bytes // self.granule_bytes)


def inspect(path: Path | str, sysfs: Path = SYSFS) -> Device:
    """Raises ``DeviceMissing`` and ``NotABlockDevice``; whether it can be protected is ``check_protectable``."""
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise errors.DeviceMissing(
            f"{path} does not exist or cannot be reached: {error.strerror}.",
            remedy="List the machine's disks with 'lsblk -dp'; prefer a name below /dev/disk/by-id, which is stable.",
            path=str(path),
        ) from error
    if not stat.S_ISBLK(status.st_mode):
        raise errors.NotABlockDevice(
            f"{path} is not a block device.",
            remedy="Name a disk, as 'lsblk -dp' lists them; to protect an image file, attach it with 'losetup'.",
            path=str(path),
        )
    return from_sysfs(sysfs, os.major(status.st_rdev), os.minor(status.st_rdev), path)


def from_sysfs(sysfs: Path, major: int, minor: int, path: Path) -> Device:
    """The facts about device ``major:minor``. Raises ``DeviceMissing``."""
    try:
        directory = (sysfs / f"dev/block/{major}:{minor}").resolve(strict=True)
        is_partition = (directory / "partition").exists()
        disk = directory.parent if is_partition else directory
        return Device(
            path=path,
            name=directory.name,
            major=major,
            minor=minor,
            size_bytes=int(_read(directory / "size")) * 512,
            sector_bytes=int(_read(disk / "queue/logical_block_size", "512")),
            serial=_serial(disk),
            rotational=_read(disk / "queue/rotational", "0") == "1",
            read_only=_read(directory / "ro", "0") == "1",
            diskseq=int(_read(disk / "diskseq", "0")),
            partition_of=disk.name if is_partition else None,
            start_bytes=int(_read(directory / "start", "0")) * 512 if is_partition else 0,
        )
    except (OSError, ValueError) as error:
        raise errors.DeviceMissing(
            f"{path} ({major}:{minor}) is not known to the kernel.",
            remedy="It may just have been removed; list the machine's disks with 'lsblk -dp'.",
            path=str(path),
        ) from error


def check_protectable(device: Device, sysfs: Path = SYSFS, proc: Path = PROC) -> None:
    """Raise the first reason why this device cannot be protected."""
    name = str(device.path)
    if device.partition_of is not None:
        raise errors.DeviceIsPartition(
            f"{name} is a partition of {device.partition_of}.",
            remedy=f"Protect the whole disk /dev/{device.partition_of.replace('!', '/')}: a standby needs all of it.",
            path=name,
            disk=device.partition_of,
        )
    directory = (sysfs / f"dev/block/{device.major}:{device.minor}").resolve()
    _check_holders(device, directory)
    queue = directory / "queue"
    if _read(queue / "zoned", "none") != "none":
        raise errors.DeviceZoned(
            f"{name} is a zoned device.",
            remedy="Zoned devices cannot be protected; use a conventional disk.",
            path=name,
        )
    if _read(queue / "dax", "0") == "1":
        raise errors.DeviceDax(
            f"{name} allows direct access (DAX): writes to it bypass the block layer.",
            remedy="Reconfigure the persistent memory as a sector device ('ndctl create-namespace --mode=sector').",
            path=name,
        )
    if (queue / "crypto").exists():
        raise errors.DeviceInlineEncrypted(
            f"{name} encrypts inline: what the block layer sees is not what the disk holds.",
            remedy="Use dm-crypt instead of inline encryption.",
            path=name,
        )
    if device.read_only:
        raise errors.DeviceReadOnly(
            f"{name} is read-only.", remedy="Nothing changes on it: copy it once, or set it writable.", path=name
        )
    if not 0 < device.size_bytes <= DISK_BYTES_MAX or device.sector_bytes > SECTOR_BYTES_MAX:
        raise errors.DeviceOutOfLimits(
            f"{name} has {device.size_bytes} bytes in sectors of {device.sector_bytes}.",
            remedy=f"A disk has 1 byte to {DISK_BYTES_MAX >> 40} TiB and sectors of at most {SECTOR_BYTES_MAX} bytes.",
            path=name,
            size_bytes=device.size_bytes,
        )
    _check_swap(device, sysfs, proc)


def check_group(devices: Sequence[Device], sysfs: Path = SYSFS) -> None:
    """Raise unless these devices may be one consistency group: not too many, none twice, none on top of another."""
    if not 0 < len(devices) <= DISKS_MAX:
        raise errors.DeviceOutOfLimits(
            f"{len(devices)} disks cannot be one machine.", remedy=f"A machine has 1 to {DISKS_MAX} protected disks."
        )
    keys = {(device.major, device.minor) for device in devices}
    for device in devices:
        below = disks_under(device.major, device.minor, sysfs) - {(device.major, device.minor)}
        if below & keys:
            raise errors.DeviceIsMember(
                f"{device.path} lies on another disk of the list.",
                remedy="Protect either the disk or what is built on it, not both.",
                path=str(device.path),
            )
    if len(keys) != len(devices):
        raise errors.DeviceIsMember("A disk is listed twice.", remedy="Name every disk once.")


def disks_under(major: int, minor: int, sysfs: Path = SYSFS) -> set[tuple[int, int]]:
    """The whole disks that a device number ends on, itself included: through partitions, device-mapper and md."""
    directory = sysfs / f"dev/block/{major}:{minor}"
    if not directory.exists():
        return set()  # tmpfs, overlay, network: no block device below
    directory = directory.resolve()
    if (directory / "partition").exists():
        directory = directory.parent
    own_major, own_minor = _read(directory / "dev").split(":")
    found = {(int(own_major), int(own_minor))}
    slaves = directory / "slaves"
    for slave in slaves.iterdir() if slaves.is_dir() else ():
        slave_major, slave_minor = _read(slave / "dev").split(":")
        found |= disks_under(int(slave_major), int(slave_minor), sysfs)
    backing = _read(directory / "loop/backing_file")
    if backing and Path(backing).exists():
        device = Path(backing).stat().st_dev
        found |= disks_under(os.major(device), os.minor(device), sysfs)
    return found


def _check_holders(device: Device, directory: Path) -> None:
    parts = [directory, *(entry.parent for entry in directory.glob("*/partition"))]
    for holder in (holder for part in parts for holder in sorted((part / "holders").glob("*"))):
        if holder.name.startswith("dm-") and not _read(holder / "dm/uuid").startswith("mpath-"):
            continue
        raise errors.DeviceIsMember(
            f"{device.path} is a member of {holder.name}, whose writes are not seen at the member.",
            remedy=f"Protect /dev/{holder.name.replace('!', '/')} instead.",
            path=str(device.path),
            holder=holder.name,
        )


def _check_swap(device: Device, sysfs: Path, proc: Path) -> None:
    for line in _read(proc / "swaps").splitlines()[1:]:
        # The kernel writes blanks as octal escapes.
        swap = Path(line.split()[0].encode().decode("unicode_escape"))
        try:
            status = swap.stat()
        except OSError:
            continue  # deleted while in use: it cannot be told apart, and its writes are harmless, only useless
        number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
        if (device.major, device.minor) in disks_under(os.major(number), os.minor(number), sysfs):
            raise errors.DeviceHasSwap(
                f"{swap}, which lies on {device.path}, is in use as swap.",
                remedy=f"'swapoff {swap}' and take it out of /etc/fstab, or move it to an unprotected disk or zram: "
                "the standby has no use for it, and all of it would be sent.",
                path=str(device.path),
                swap=str(swap),
            )


def _serial(disk: Path) -> str:
    for place in ("serial", "device/serial", "wwid", "dm/uuid"):
        if serial := _read(disk / place):
            return serial
    return ""


def _read(path: Path, default: str = "") -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return default
