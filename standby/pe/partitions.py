"""The partitions of a replicated disk: read from its own table, then shown to the kernel.

The table is written past the kernel's back (O_DIRECT, whole disk), so the kernel's idea of it is stale. It is not asked
to read the table again either: it would refuse while any partition is in use, and not every kernel knows every format.
What we parsed is added and removed one by one (BLKPG).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_BLKPG: Final = 0x1269
_BLKFLSBUF: Final = 0x1261
_ADD, _DELETE = 1, 2
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_GPT_PROTECTIVE: Final = 0xEE
_LOGICAL_MAX: Final = 60
"""Bounds the walk along the chain of logical partitions, which a broken table may close to a ring."""
_GPT_ENTRIES_MAX: Final = 1024

Read = Callable[[int, int], bytes | memoryview]
"""``(offset, length)`` -> that many bytes."""


@dataclass(frozen=True, slots=True)
class Partition:
    """``number`` as the kernel counts; ``[start_bytes, start_bytes + size_bytes)`` of the disk."""

    number: int
    start_bytes: int
    size_bytes: int


def parse(read: Read, disk_bytes: int, sector_bytes: int) -> list[Partition]:
    """The partitions of an MBR or GPT disk; none if there is no table. What does not fit the disk is left out."""
    first = bytes(read(0, 512))
    if first[510:512] != b"\x55\xaa":
        return []
    entries = _mbr_entries(first)
    if any(kind == _GPT_PROTECTIVE for kind, _, _ in entries):
        found = _gpt(read, sector_bytes)
    else:
        found = _mbr(read, entries, sector_bytes)
    return [part for part in found if part.start_bytes > 0 and part.start_bytes + part.size_bytes <= disk_bytes]


def expose(disk: Path, partitions: list[Partition]) -> dict[int, Path]:
    """Make the kernel show exactly ``partitions`` of ``disk``; number -> device. Raises ``OSError``."""
    name = disk.name
    separator = "p" if name[-1].isdigit() else ""
    shown = _shown(name, separator)
    fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    try:
        wanted = {part.number: (part.start_bytes, part.size_bytes) for part in partitions}
        for number, place in shown.items():
            if wanted.get(number) != place:
                _blkpg(fd, _DELETE, number, 0, 0)
        for number, (start, size) in wanted.items():
            if shown.get(number) != (start, size):
                _blkpg(fd, _ADD, number, start, size)
    finally:
        os.close(fd)
    return {number: disk.with_name(f"{name}{separator}{number}") for number in wanted}


def forget_caches(devices: list[Path]) -> None:
    """Drop what the kernel remembers of block devices that were written past their page caches."""
    for device in devices:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _BLKFLSBUF, 0)
        finally:
            os.close(fd)


def _shown(name: str, separator: str) -> dict[int, tuple[int, int]]:
    """What the kernel shows now: number -> (start, size) in bytes."""
    shown = {}
    for entry in Path("/sys/block", name).glob(f"{name}{separator}*"):
        # sysfs counts in units of 512 bytes, whatever the disk's sectors are.
        start, size = (int((entry / what).read_text()) * 512 for what in ("start", "size"))
        shown[int((entry / "partition").read_text())] = (start, size)
    return shown


def _blkpg(fd: int, operation: int, number: int, start: int, length: int) -> None:
    partition = ctypes.create_string_buffer(struct.pack("=qqi64s64s4x", start, length, number, b"", b""))
    argument = struct.pack("=iiiiQ", operation, 0, len(partition.raw) - 1, 0, ctypes.addressof(partition))
    try:
        fcntl.ioctl(fd, _BLKPG, argument)
    except OSError as error:
        if not (operation == _DELETE and error.errno == errno.ENXIO):
            raise


def _mbr_entries(sector: bytes) -> list[tuple[int, int, int]]:
    """``(type, first sector, sectors)`` of the four entries."""
    return [struct.unpack_from("<4xB3xII", sector, 446 + 16 * slot) for slot in range(4)]


def _mbr(read: Read, entries: list[tuple[int, int, int]], sector_bytes: int) -> list[Partition]:
    found = []
    logical = 5
    for slot, (kind, start, count) in enumerate(entries):
        if kind in _EXTENDED and count:
            table = start
            while table and logical < _LOGICAL_MAX:
                sector = bytes(read(table * sector_bytes, 512))
                if sector[510:512] != b"\x55\xaa":
                    break
                here, following = _mbr_entries(sector)[:2]
                if here[0] and here[2]:
                    found.append(Partition(logical, (table + here[1]) * sector_bytes, here[2] * sector_bytes))
                    logical += 1
                table = start + following[1] if following[0] in _EXTENDED and following[1] else 0
        elif kind and count:
            found.append(Partition(slot + 1, start * sector_bytes, count * sector_bytes))
    return found


def _gpt(read: Read, sector_bytes: int) -> list[Partition]:
    header = bytes(read(sector_bytes, 512))
    if header[:8] != b"EFI PART":
        return []
    table, count, entry_bytes = struct.unpack_from("<QII", header, 72)
    if count > _GPT_ENTRIES_MAX or not 128 <= entry_bytes <= 4096:
        return []
    # Whole sectors: the disk is read past the page cache.
    length = -(-count * entry_bytes // sector_bytes) * sector_bytes
    raw = bytes(read(table * sector_bytes, length))
    found = []
    for slot in range(count):
        kind, first, last = struct.unpack_from("<16s16xQQ", raw, slot * entry_bytes)
        if kind != bytes(16) and last >= first:
            found.append(Partition(slot + 1, first * sector_bytes, (last - first + 1) * sector_bytes))
    return found
