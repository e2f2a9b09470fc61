"""Where on the disks the files lie that decide about the next boot, so that a write to them is noticed as it passes.

Metadata may reach its place long after it is in the file system's journal, so this is the quick way to notice, not the
sure one: at a takeover the files themselves are compared.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from journal.extent import Extents
from standby.pe.system import Placed

_FS_IOC_FIEMAP: Final = 0xC020660B
_FIEMAP_HEADER: Final = struct.Struct("=QQIIII")
_FIEMAP_EXTENT: Final = struct.Struct("=QQQQQIIII")
_EXTENTS_MAX: Final = 256
_UNKNOWN_PLACE: Final = 0x2 | 0x4 | 0x200  # unknown, delayed, inline: no whole blocks of its own

Stat = tuple[str, int, int, int, int]


@dataclass(slots=True)
class Watch:
    """Half-open byte ranges by disk number, each disk's sorted columns ``(starts, ends)``."""

    ranges: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = field(default_factory=dict)

    def touched_by(self, extents: Extents) -> bool:
        """Does any extent overlap any range?"""
        for disk, (starts, ends) in self.ranges.items():
            # The table is sorted by (disk, offset), and a disk's extents do not overlap.
            low, high = np.searchsorted(extents.disks, (disk, disk + 1))
            if low == high:
                continue
            offsets = extents.offsets[low:high].astype(np.int64)
            first = np.searchsorted(offsets + extents.lengths[low:high].astype(np.int64), starts, side="right")
            inside = first < len(offsets)
            if (offsets[first[inside]] < ends[inside]).any():
                return True
        return False


def watch(files: Iterable[tuple[Path, Placed]], numbers: list[int]) -> Watch:
    """``files`` with the volume that each lies on; ``numbers``: disk number by position.

    What lies on LVM volumes is not watched.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for path, place in files:
        if place.disk is not None and place.partition is not None:
            start = place.partition.start_bytes
            ranges = found.setdefault(numbers[place.disk], [])
            ranges += [(start + at, start + at + length) for at, length in _extents(path)]
    result = Watch()
    for disk, ranges in found.items():
        if ranges:
            columns = np.array(sorted(ranges), np.int64)
            result.ranges[disk] = (columns[:, 0].copy(), columns[:, 1].copy())
    return result


def stat_of(root: Path, paths: Iterable[Path]) -> tuple[Stat, ...]:
    """What tells a replaced or rewritten file from the one that was read: inode, size and both times."""
    result = []
    for path in sorted(set(paths)):
        now = path.stat()
        if path.is_file():
            inside = str(path.relative_to(root))
            result.append((inside, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))
    return tuple(result)


def glance(root: Path, insides: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The same of files and directories by their paths inside, as cheaply as can be; empty if one is missing."""
    try:
        # Not with pathlib: this runs while the service is down.
        found = [os.stat(f"{root}/{inside}") for inside in insides]  # noqa: PTH116
    except OSError:
        return ()
    return tuple((at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns) for at in found)


def _extents(path: Path) -> list[tuple[int, int]]:
    """``(offset, length)`` on the volume; empty where the file system cannot tell."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        request = bytearray(_FIEMAP_HEADER.size + _EXTENTS_MAX * _FIEMAP_EXTENT.size)
        _FIEMAP_HEADER.pack_into(request, 0, 0, 2**64 - 1, 0, 0, _EXTENTS_MAX, 0)
        try:
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        except OSError:
            return []
        count = _FIEMAP_HEADER.unpack_from(request)[3]
        rows = [_FIEMAP_EXTENT.unpack_from(request, _FIEMAP_HEADER.size + at * 56) for at in range(count)]
        return [(row[1], row[2]) for row in rows if not row[5] & _UNKNOWN_PLACE]
    finally:
        os.close(fd)
