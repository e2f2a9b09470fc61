"""The replicated system on its disks: find the root file system, mount it, find the way around in it.

    disks ─► partitions ─► file systems (and LVM volumes) ─► the one that holds an /etc/fstab and an init ─► /boot

Everything is looked up afresh each time, because the source may repartition while we follow. Blocking.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from standby.pe import mounts
from standby.pe.errors import SystemNotFound, SystemUnreadable
from standby.pe.filesystems import READ_ONLY, READ_WRITE, Filesystem, is_lvm, probe
from standby.pe.partitions import Partition, expose, forget_caches, parse

MOUNT_POINT: Final = Path("/run/cdp-pe/root")
_INITS: Final = ("sbin/init", "usr/sbin/init", "lib/systemd/systemd", "usr/lib/systemd/systemd")
_PROGRAM_S_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class Placed:
    """A partition's device, its place on a disk (by position among the given ones), or nothing for an LVM volume."""

    device: Path
    disk: int | None = None
    partition: Partition | None = None


@dataclass(slots=True)
class MountedSystem:
    """``root`` is where the root file system is mounted; ``boot`` too, if it is a file system of its own."""

    root: Path
    filesystem: Filesystem
    placed: Placed
    boot_filesystem: Filesystem | None
    boot_placed: Placed | None
    volumes: list[Placed]
    filesystems: dict[Path, Filesystem] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Does the root lie directly on a partition, so that a kernel needs no more than a driver to find it?"""
        return self.placed.partition is not None

    def path(self, inside: str) -> Path:
        """Where the system's ``/inside`` is now. Symbolic links are followed as the system itself would."""
        return resolve(self.root, inside)


def resolve(root: Path, inside: str) -> Path:
    """``inside`` within ``root``; an absolute link starts again at ``root``, and nothing leads out of it."""
    at = root
    todo = [part for part in inside.split("/") if part not in ("", ".")][::-1]
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            at = at.parent if at != root else root
            continue
        step = at / part
        if step.is_symlink():
            links += 1
            if links > 40:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), inside)
            target = str(step.readlink())
            at = root if target.startswith("/") else at
            todo += [piece for piece in target.split("/") if piece not in ("", ".")][::-1]
        else:
            at = step
    return at


@contextlib.contextmanager
def mounted(
    disks: list[Path], *, writable: bool, at: Path = MOUNT_POINT, root_uuid: str | None = None
) -> Iterator[MountedSystem]:
    """The system of ``disks``, mounted ``at``. Read-only mounts write nothing, not even a journal replay.

    ``root_uuid``: of the file system that was its root the last time, to save looking for it.

    Raises ``SystemNotFound`` and ``SystemUnreadable``.
    """
    with contextlib.ExitStack() as stack:
        try:
            _unmount_all(at)
            volumes = _volumes(disks, stack)
            stack.callback(_unmount_all, at)  # before the volumes are deactivated
            filesystems = {at.device: found for at in volumes if (found := probe(at.device)) is not None}
            system = _mount_root(volumes, filesystems, at, root_uuid, writable=writable)
            _mount_boot(system, writable=writable)
        except OSError as error:
            raise SystemUnreadable(
                f"The replicated disks cannot be mounted: {error}.",
                remedy="It is tried again at another recovery point. If it stays so, check the source's file systems.",
                errno=error.errno,
            ) from error
        yield system


def _volumes(disks: list[Path], stack: contextlib.ExitStack) -> list[Placed]:
    """Everything that may hold a file system."""
    found: list[Placed] = []
    physical: list[Path] = []
    forget_caches(disks)
    for index, disk in enumerate(disks):
        partitions = _partitions(disk)
        devices = expose(disk, partitions)
        places = [Placed(devices[part.number], index, part) for part in partitions]
        if not partitions:
            places = [Placed(disk, index, Partition(0, 0, _size(disk)))]
        forget_caches([place.device for place in places])
        physical += [place.device for place in places if is_lvm(place.device)]
        found += [place for place in places if place.device not in physical]
    return found + _logical_volumes(physical, stack)


def _partitions(disk: Path) -> list[Partition]:
    fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sector = int(Path(f"/sys/block/{disk.name}/queue/logical_block_size").read_text())
        return parse(lambda offset, length: os.pread(fd, length, offset), os.lseek(fd, 0, os.SEEK_END), sector)
    finally:
        os.close(fd)


def _size(disk: Path) -> int:
    return int(Path(f"/sys/block/{disk.name}/size").read_text()) * 512


def _logical_volumes(physical: list[Path], stack: contextlib.ExitStack) -> list[Placed]:
    """Activate what lies on ``physical``, without writing anything, for as long as ``stack`` is open."""
    if not physical:
        return []
    # Only these devices exist for LVM, nothing is locked and no udev is waited for: there is none.
    options = [
        *(f"--devices={device}" for device in physical),
        "--config=global{locking_type=1 use_lvmlockd=0} activation{udev_sync=0 udev_rules=0 verify_udev_operations=1}",
    ]
    stack.callback(_lvm, "vgchange", *options, "--activate=n")
    _lvm("vgchange", *options, "--activate=y", "--sysinit")
    listed = _lvm("lvs", *options, "--noheadings", "--options=lv_dm_path", "--select=lv_active=active")
    return [Placed(Path(line.strip())) for line in listed.splitlines() if line.strip()]


def _lvm(*command: str) -> str:
    ended = subprocess.run(
        ["lvm", *command], capture_output=True, text=True, check=False, timeout=_PROGRAM_S_MAX, stdin=subprocess.DEVNULL
    )
    if ended.returncode != 0:
        raise OSError(errno.EIO, f"lvm {command[0]}: {ended.stderr.strip()}")
    return ended.stdout


def _mount_root(
    volumes: list[Placed], filesystems: dict[Path, Filesystem], at: Path, root_uuid: str | None, *, writable: bool
) -> MountedSystem:
    failures: list[str] = []
    for place in volumes:
        filesystem = filesystems.get(place.device)
        if filesystem is None:
            continue
        # Looked at read-only first: only the root itself may be written to.
        known = filesystem.uuid == root_uuid
        try:
            _mount(filesystem, at, writable=writable and known)
        except OSError as error:
            failures.append(str(error))
            continue
        is_root = (at / "etc/fstab").exists() and any(os.path.lexists(at / init) for init in _INITS)
        if is_root and (known or not writable):
            return MountedSystem(at, filesystem, place, None, None, volumes, filesystems)
        mounts.unmount(at)
        if is_root:
            _mount(filesystem, at, writable=True)
            return MountedSystem(at, filesystem, place, None, None, volumes, filesystems)
    if failures:
        raise OSError(errno.EIO, "; ".join(failures))
    raise SystemNotFound(
        f"None of the {len(filesystems)} file systems on the replicated disks holds an operating system.",
        remedy="The root must be ext4 or XFS, on a partition or an LVM volume of a protected disk.",
    )


def _mount_boot(system: MountedSystem, *, writable: bool) -> None:
    for line in system.path("etc/fstab").read_text(errors="replace").splitlines():
        words = line.split()
        if len(words) >= 3 and not words[0].startswith("#") and words[1].rstrip("/") == "/boot":
            place = _named(system, words[0])
            if place is None:
                return
            filesystem = system.filesystems[place.device]
            _mount(filesystem, system.path("boot"), writable=writable)
            system.boot_filesystem, system.boot_placed = filesystem, place
            return


def _named(system: MountedSystem, name: str) -> Placed | None:
    """The volume that fstab calls ``name``, by UUID or label."""
    key, _, value = name.partition("=")
    value = value.strip('"')
    for place in system.volumes:
        filesystem = system.filesystems.get(place.device)
        if filesystem is None:
            continue
        if (key == "UUID" and value.lower() == filesystem.uuid) or (key == "LABEL" and value == filesystem.label):
            return place
        if name in (f"/dev/disk/by-uuid/{filesystem.uuid}", str(place.device)):
            return place
    return None


def _mount(filesystem: Filesystem, directory: Path, *, writable: bool) -> None:
    flags = 0 if writable else mounts.MS_RDONLY
    options = (READ_WRITE if writable else READ_ONLY)[filesystem.kind]
    mounts.mount(filesystem.device, directory, filesystem.kind, flags | mounts.MS_NOATIME, options)


def _unmount_all(at: Path) -> None:
    """Whatever is mounted there and below, the innermost first; also what a killed process left."""
    table = Path("/proc/self/mounts").read_text().splitlines()
    for line in reversed(table):
        directory = Path(line.split()[1])
        if directory == at or at in directory.parents:
            mounts.unmount(directory)
