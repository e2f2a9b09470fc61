"""The preallocated segment files: handed out, closed when full, recycled when everything in them has been removed.

A file never moves: being handed out, closed or made spare is a change of its row in the index. Files that no row knows
(a crash between creating one and committing its row, or between removing a row and unlinking) are deleted at start.
"""

from __future__ import annotations

import secrets
import threading
import uuid
from pathlib import Path
from typing import Final

import msgspec

from cdp.store.errors import StoreFailed, StoreFull
from cdp.store.files import Files
from cdp.store.index import Index, Writer, disk_error
from cdp.store.record import TAG_BYTES
from cdp.store.records import SegmentFile

_SUFFIX: Final = ".seg"
RESERVE_BYTES_MAX: Final = 1 << 30
_RESERVE_SHARE: Final = 20
"""A twentieth of the filesystem, at most 1 GiB, is never taken for segment files: folding needs room for what it adds
to the base image, so that space can come back."""


class Pool:
    def __init__(self, directory: Path, files: Files, index: Index, file_bytes: int, spares_max: int) -> None:
        self._directory = directory
        self._files = files
        self._file_bytes = file_bytes
        self._spares_max = spares_max
        self._lock = threading.Lock()
        self._rows: dict[int, SegmentFile] = {}
        self._claimed: set[int] = set()
        directory.mkdir(mode=0o700, exist_ok=True)
        with index.read() as txn:
            self._rows = {row.number: row for row in txn.rows("files", b"", SegmentFile)}
        for path in directory.iterdir():
            if path.suffix == _SUFFIX and (not path.stem.isdecimal() or int(path.stem) not in self._rows):
                files.unlink(path)
        # A number is never used twice while the process lives, so that a reader never opens another file by mistake.
        self._next_number = max(self._rows, default=0) + 1

    def path(self, number: int) -> Path:
        return self._directory / f"{number:08d}{_SUFFIX}"

    def row(self, number: int) -> SegmentFile | None:
        with self._lock:
            return self._rows.get(number)

    def bytes_of(self, machine: uuid.UUID) -> int:
        with self._lock:
            return sum(row.size_bytes for row in self._rows.values() if row.machine == machine)

    def claim(self, machine: uuid.UUID, size_bytes: int) -> SegmentFile:
        """A file for at least ``size_bytes`` of records: a spare one, or a new one. Not in the index yet: ``commit``
        the row together with whatever refers to it, or ``release`` it. Raises ``StoreFull`` and ``StoreFailed``."""
        with self._lock:
            spares = [row for row in self._rows.values() if self._is_spare(row) and row.size_bytes >= size_bytes]
            if spares:
                number, size = min((row.size_bytes, row.number) for row in spares)[::-1]
                self._claimed.add(number)
                return _handed_out(number, machine, size)
            number = self._next_number
            self._next_number += 1
        size = max(self._file_bytes, size_bytes)
        try:
            self._check_room(size)
            self._files.create(self.path(number), size)
        except OSError as error:
            raise _with_file(disk_error(error, "the next segment file"), size) from error
        return _handed_out(number, machine, size)

    def room(self) -> tuple[int, int]:
        """Bytes free on the store's filesystem, and those of them that are kept for folding."""
        try:
            free, total = self._files.room(self._directory)
        except OSError as error:
            raise disk_error(error, "the store") from error
        return free, min(RESERVE_BYTES_MAX, total // _RESERVE_SHARE)

    def _check_room(self, size_bytes: int) -> None:
        free, reserve = self.room()
        if free - size_bytes < reserve:
            raise StoreFull(
                f"The store's disk has {free >> 20} MiB left; the next segment file needs {size_bytes >> 20} MiB, and "
                f"{reserve >> 20} MiB are kept for folding.",
                remedy="Shorten the retention ('cdp retention set'), free space, or move the store to a larger disk.",
                free_bytes=free,
                reserve_bytes=reserve,
            )

    def commit(self, txn: Writer, row: SegmentFile) -> None:
        txn.put_row("files", row.number.to_bytes(4, "big"), row)

    def committed(self, row: SegmentFile) -> None:
        """The change that ``commit`` was part of has happened."""
        with self._lock:
            self._rows[row.number] = row
            self._claimed.discard(row.number)

    def release(self, row: SegmentFile) -> None:
        """The change that the claimed row was to be part of did not happen."""
        with self._lock:
            self._claimed.discard(row.number)
            if row.number in self._rows:
                return
        self._files.unlink(self.path(row.number))

    def removed(self, txn: Writer, counts: dict[int, int]) -> list[SegmentFile]:
        """Count removed records per file number; a closed file without any left becomes spare. Returns the changed
        rows: pass them to ``committed`` once ``txn`` has happened."""
        changed = []
        with self._lock:
            for number, count in counts.items():
                row = msgspec.structs.replace(self._rows[number], removed=self._rows[number].removed + count)
                changed.append(_spare(row) if row.segments is not None and row.removed >= row.segments else row)
        for row in changed:
            self.commit(txn, row)
        return changed

    def left_by(self, machine: uuid.UUID, changed: list[SegmentFile]) -> list[SegmentFile]:
        """Spare rows for the files of a machine that has no segment any more, but for those in ``changed``."""
        known = {row.number for row in changed}
        with self._lock:
            left = [row for row in self._rows.values() if row.machine == machine and row.number not in known]
        return [_spare(row) for row in left]

    def trim(self, index: Index) -> int:
        """Delete spare files beyond the number that is kept, all of them when the disk is nearly full; returns the
        bytes given back."""
        free, reserve = self.room()
        spares_max = self._spares_max if free >= reserve else 0
        with self._lock:
            spares = sorted((row for row in self._rows.values() if self._is_spare(row)), key=lambda row: row.number)
            surplus = spares[spares_max:]
            self._claimed.update(row.number for row in surplus)
        if not surplus:
            return 0
        try:
            with index.write() as txn:
                for row in surplus:
                    txn.delete("files", row.number.to_bytes(4, "big"))
        except BaseException:
            with self._lock:
                self._claimed.difference_update(row.number for row in surplus)
            raise
        with self._lock:
            for row in surplus:
                del self._rows[row.number]
                self._claimed.discard(row.number)
        for row in surplus:
            self._files.unlink(self.path(row.number))
        return sum(row.size_bytes for row in surplus)

    def _is_spare(self, row: SegmentFile) -> bool:
        return row.machine is None and row.number not in self._claimed


def closed(row: SegmentFile, segments: int) -> SegmentFile:
    """The row of a file that takes no more records; spare at once if nothing in it is left."""
    row = msgspec.structs.replace(row, segments=segments)
    return _spare(row) if row.removed >= segments else row


def _spare(row: SegmentFile) -> SegmentFile:
    return SegmentFile(number=row.number, machine=None, tag=row.tag, size_bytes=row.size_bytes)


def _handed_out(number: int, machine: uuid.UUID, size_bytes: int) -> SegmentFile:
    return SegmentFile(number=number, machine=machine, tag=secrets.token_bytes(TAG_BYTES), size_bytes=size_bytes)


def _with_file(error: StoreFull | StoreFailed, size_bytes: int) -> StoreFull | StoreFailed:
    error.fields["file_bytes"] = size_bytes
    return error
