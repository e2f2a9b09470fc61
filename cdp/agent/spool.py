"""Sealed segments that the server has not acknowledged, and the cursor that vouches for them.

    put      write the segment's file                       data first
    commit   replace the cursor; its tip is that segment    cursor last
    push     only what is at or below the cursor's tip

A process may die between any two steps: files above the cursor's tip are deleted at the next start, and their second
is sealed again from the raw spool. The spool need not survive the machine, so nothing here is fsynced.

Bounded by ``bytes_max``; whoever seals asks ``has_room`` first and, if there is none, drops and marks dirty instead.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from cdp.agent.capture.devices import disks_under
from cdp.agent.errors import SpoolOnProtectedDisk, SpoolTooSmall
from cdp.agent.state import Cursor, load_cursor, save_cursor
from journal.errors import SegmentDamaged
from journal.position import Position
from journal.segment import HEADER_BYTES, Header

SUFFIX = ".segment"
RESERVE_BYTES = 4 << 20
"""Beside the segments: the cursor, and file system overhead."""


@dataclass(frozen=True, slots=True)
class Spooled:
    """One sealed segment on its way."""

    position: Position
    path: Path
    segment_bytes: int
    sealed_at_ns: int
    recovery_point: bool


class Spool:
    """One writer. ``put`` may run in a worker thread; everything else belongs to the event loop."""

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self.directory = directory
        self.bytes_max = bytes_max
        self.entries: deque[Spooled] = deque()
        self.bytes = 0
        self._cursor_path = directory / "cursor"

    def open(self) -> Cursor | None:
        """Create or take over the directory; the cursor, if there is one. Files above its tip are deleted."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        cursor = load_cursor(self._cursor_path)
        self.entries.clear()
        self.bytes = 0
        for path in sorted(self.directory.iterdir()):
            if path.suffix == SUFFIX and cursor is not None:
                header = _header(path)
                if header is not None and header.position <= cursor.position:
                    self.publish(_entry(path, header))
                    continue
            if path.suffix in (SUFFIX, ".tmp"):
                path.unlink()
        return cursor

    def check_space(self) -> None:
        """Raise ``SpoolTooSmall`` unless the directory could be filled to its bound."""
        found = os.statvfs(self.directory)
        usable = found.f_bavail * found.f_frsize + self.bytes
        if usable < self.bytes_max + RESERVE_BYTES:
            raise SpoolTooSmall(
                f"{self.directory} has {usable >> 20} MiB, but the spool may need {self.bytes_max >> 20} MiB.",
                remedy="Give it more room, or lower spool.bytes in agent.toml.",
                directory=str(self.directory),
            )

    def has_room(self, more_bytes: int) -> bool:
        return self.bytes + more_bytes <= self.bytes_max

    def put(self, header: Header, raw: bytearray) -> Spooled:
        """Write one segment; it counts only once ``commit`` has named it."""
        path = self.directory / f"{header.generation:08x}-{header.seq:016x}{SUFFIX}"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb", buffering=0) as file:
            at = 0
            while at < len(raw):
                at += file.write(memoryview(raw)[at:])
        temporary.replace(path)
        return _entry(path, header)

    def publish(self, entry: Spooled) -> None:
        self.entries.append(entry)
        self.bytes += entry.segment_bytes

    def commit(self, cursor: Cursor) -> None:
        save_cursor(self._cursor_path, cursor)

    def acknowledged(self, position: Position) -> None:
        """Delete everything up to and including ``position``."""
        while self.entries and self.entries[0].position <= position:
            entry = self.entries.popleft()
            self.bytes -= entry.segment_bytes
            entry.path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Forget everything: the history goes on elsewhere, by a resync."""
        self._cursor_path.unlink(missing_ok=True)
        while self.entries:
            self.entries.popleft().path.unlink(missing_ok=True)
        self.bytes = 0


def _entry(path: Path, header: Header) -> Spooled:
    return Spooled(header.position, path, header.segment_bytes, header.sealed_at_ns, header.is_recovery_point)


def _header(path: Path) -> Header | None:
    try:
        with path.open("rb") as file:
            header = Header.unpack(file.read(HEADER_BYTES))
    except SegmentDamaged:
        return None
    return header if path.stat().st_size == header.segment_bytes else None


def check_not_protected(directory: Path, protected: set[tuple[int, int]]) -> None:
    """Raise ``SpoolOnProtectedDisk`` if ``directory`` lies on one of the disks ``(major, minor)``, through partitions
    and stacked devices."""
    under = backing_disks(directory)
    if under & protected:
        raise SpoolOnProtectedDisk(
            f"{directory} lies on a protected disk: what the agent writes there would be captured and sent again.",
            remedy="Use tmpfs (the default), or a directory on a disk that is not protected.",
            directory=str(directory),
        )


def backing_disks(directory: Path) -> set[tuple[int, int]]:
    """``(major, minor)`` of all whole disks below the file system of ``directory``; empty for tmpfs."""
    path = directory.resolve()
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    if os.major(device) != 0:
        return disks_under(os.major(device), os.minor(device))
    # An anonymous device (btrfs, overlay, tmpfs): the mount table knows what is below.
    return _mount_sources(device)


def _mount_sources(device: int) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        if head.split()[2] != f"{os.major(device)}:{os.minor(device)}":
            continue
        _, source, options = tail.split(maxsplit=2)
        if Path(source).is_block_device():
            number = Path(source).stat().st_rdev
            found |= disks_under(os.major(number), os.minor(number))
        for option in options.split(","):
            name, _, value = option.partition("=")
            if name == "upperdir" and value:
                found |= backing_disks(Path(value))
    return found
