"""The base image of one machine: each disk as it was at the oldest recovery point, as a sparse raw file.

Beside each image lies a file of slots, 32 bytes for each 64 KiB chunk: what the chunk hashed to before the last fold
that changed it, and after, and a check of the two (``slots``). A chunk is good if it matches either. A fold writes and
syncs the slots of a batch before the batch itself:

    crash here                     after the restart, before anything is read, the fold is done again:
    ────────────────────────────   ──────────────────────────────────────────────────────────────────────────────────
    slots written                  chunks match their first sum
    chunks partly written          a torn chunk matches neither; with the folded writes laid over it once more it must
                                   match the second sum, for all else in it is unchanged
    chunks written, not committed  chunks match their second sum; folding again changes nothing

A chunk that is written as a whole is not looked at before: whatever a crash left of it is replaced.
A sum of 0 stands for a chunk of zeros, which is a hole.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from cdp.store import slots as slots_
from cdp.store.errors import StoredDamage
from cdp.store.files import Buffer, Files, opened
from cdp.store.slots import SLOT_BYTES

CHUNK_BYTES: Final = 64 << 10
BATCH_CHUNKS: Final = 128
"""8 MiB: what a fold holds in memory, how long it keeps readers of the base image waiting, and, where the file system
orders its own log after the data, what a sync of ingest may have to wait for."""
_SLOTS_READ: Final = 1 << 16
_SLOTS_GAP_MAX: Final = 128
"""A page of slots: reading past it costs less than another read."""


class BaseImage:
    """Thread-safe: a batch of a fold and a read exclude each other."""

    def __init__(self, files: Files, directory: Path) -> None:
        self._files = files
        self._directory = directory
        self._lock = threading.Lock()
        slots_.convert(files, directory)

    def prepare(self, disk: int, size_bytes: int) -> None:
        """Make the disk's files, or let them grow with the disk."""
        chunks = -(-size_bytes // CHUNK_BYTES)
        # The slots first: a reader takes a disk for one that is there once it has its image.
        for path, size in ((self._slots(disk), chunks * SLOT_BYTES), (self._image(disk), chunks * CHUNK_BYTES)):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not path.exists() or path.stat().st_size < size:
                self._files.create_sparse(path, size)

    def disks(self) -> list[int]:
        return sorted(int(path.stem) for path in self._directory.glob("*.img"))

    def has(self, disk: int) -> bool:
        return self._image(disk).exists()

    def stored_bytes(self) -> int:
        """Disk blocks in use."""
        return sum(path.stat().st_blocks * 512 for path in self._directory.glob("*"))

    def read_into(self, disk: int, offset: int, out: memoryview) -> None:
        """Fill ``out``, which is all zeros. Every chunk is checked: raises ``StoredDamage``; and ``OSError``."""
        if not self.has(disk):
            return
        first = offset // CHUNK_BYTES
        count = -(-(offset + len(out)) // CHUNK_BYTES) - first
        with (
            self._lock,
            opened(self._files, self._image(disk)) as image,
            opened(self._files, self._slots(disk)) as table,
        ):
            done = 0
            for number, slot in enumerate(self._read_slots(disk, table, first, count).tolist(), first):
                skip = offset + done - number * CHUNK_BYTES
                take = min(CHUNK_BYTES - skip, len(out) - done)
                if any(slot):
                    chunk = self._files.read(image, CHUNK_BYTES, number * CHUNK_BYTES)
                    if chunk_sum(chunk) not in slot:
                        raise self._damaged(disk, number)
                    out[done : done + take] = memoryview(chunk)[skip : skip + take]
                done += take

    def extents(self, disk: int, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """``(offset, length, is_hole)``, consecutive; holes by whole chunks."""
        if not self.has(disk):
            yield offset, length, True
            return
        at, stop = offset, offset + length
        while at < stop:
            first = at // CHUNK_BYTES
            count = min(_SLOTS_READ, -(-stop // CHUNK_BYTES) - first)
            with self._lock, opened(self._files, self._slots(disk)) as table:
                slots, good = slots_.unpack(self._raw_slots(table, first, count), first)
            # What a bad slot stands for is refused when it is read, not passed over as a hole.
            is_data = ((slots[:, 0] | slots[:, 1]) != 0) | ~good
            edges = [0, *(np.flatnonzero(np.diff(is_data)) + 1).tolist(), count]
            for begin, end in itertools.pairwise(edges):
                last = min(stop, (first + end) * CHUNK_BYTES)
                yield at, last - at, not is_data[begin]
                at = last

    def fold(self, disk: int, rows: Iterable[tuple[int, int, memoryview | None]]) -> None:
        """Lay ``(offset, length, content)`` rows, ascending, over one batch; None: zeros. All rows together touch at
        most ``BATCH_CHUNKS`` chunks. Durable only after ``sync``. Raises ``StoredDamage`` and ``OSError``."""
        rows = list(rows)
        numbers = sorted({n for at, size, _ in rows for n in range(at // CHUNK_BYTES, -(-(at + size) // CHUNK_BYTES))})
        with (
            self._lock,
            opened(self._files, self._image(disk), write=True) as image,
            opened(self._files, self._slots(disk), write=True) as table,
        ):
            # A chunk that is written as a whole is not looked at: after a fold that was committed it matches its second
            # sum, and what is left of one that was not is replaced. That is also how a resync repairs what rotted.
            whole = _covered(rows, numbers)
            slots = self._slots_to_fold(disk, table, numbers, whole)
            chunks: dict[int, bytearray | memoryview] = {
                number: self._chunk(image, number, slots[number]) for number in numbers if number not in whole
            }
            there = {number: chunk_sum(chunk) for number, chunk in chunks.items()}
            for at, size, content in rows:
                _lay_over(chunks, at, size, content)
            sums = {number: chunk_sum(chunks[number]) for number in numbers}
            changed: dict[int, tuple[int, int]] = {}
            for number, new in sums.items():
                first, second, is_good = slots[number]
                old = there.get(number, second)
                if old not in (first, second) and new != second:
                    raise self._damaged(disk, number)
                if old != new or not is_good:
                    changed[number] = (old if old in (first, second) else first, new)
            for number, packed in slots_.pack(changed):
                self._files.write(table, [packed], number * SLOT_BYTES)
            self._files.sync(table)
            for number in sorted(whole | changed.keys()):
                if sums[number]:
                    self._files.write(image, [chunks[number]], number * CHUNK_BYTES)
                else:
                    self._files.punch(image, CHUNK_BYTES, number * CHUNK_BYTES)

    def _chunk(self, image: int, number: int, slot: tuple[int, int, bool]) -> bytearray:
        there = self._files.read(image, CHUNK_BYTES, number * CHUNK_BYTES) if any(slot[:2]) else b""
        return bytearray(there.ljust(CHUNK_BYTES, b"\0"))

    def sync(self, disk: int) -> None:
        with opened(self._files, self._image(disk), write=True) as image:
            self._files.sync(image)

    def verify(self, disk: int) -> Iterator[tuple[int, list[StoredDamage]]]:
        """Read everything, a batch at a time: bytes checked, and the damaged chunks among them."""
        chunks = self._image(disk).stat().st_size // CHUNK_BYTES
        for first in range(0, chunks, BATCH_CHUNKS):
            count = min(BATCH_CHUNKS, chunks - first)
            with (
                self._lock,
                opened(self._files, self._image(disk)) as image,
                opened(self._files, self._slots(disk)) as table,
            ):
                sums, good = slots_.unpack(self._raw_slots(table, first, count), first)
                data = memoryview(self._files.read(image, count * CHUNK_BYTES, first * CHUNK_BYTES))
            bad = [
                (first + index, bool(good[index] and not any(slot)))
                for index, slot in enumerate(sums.tolist())
                if not good[index] or chunk_sum(data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]) not in slot
            ]
            yield len(data), [self._damaged(disk, number, is_hole=is_hole) for number, is_hole in bad]

    def _read_slots(self, disk: int, table: int, first: int, count: int) -> npt.NDArray[np.uint64]:
        """``(count, 2)``. Raises ``StoredDamage``."""
        sums, good = slots_.unpack(self._raw_slots(table, first, count), first)
        if not good.all():
            raise self._damaged(disk, first + int(np.argmin(good)))
        return sums

    def _slots_to_fold(
        self, disk: int, table: int, numbers: list[int], whole: set[int]
    ) -> dict[int, tuple[int, int, bool]]:
        """Both sums of each chunk, and whether its slot is good. Raises ``StoredDamage`` for a bad slot of a chunk of
        which something is to stay."""
        found: dict[int, tuple[int, int, bool]] = {}
        for near in _near(numbers):
            first = near[0]
            sums, good = slots_.unpack(self._raw_slots(table, first, near[-1] + 1 - first), first)
            for number in near:
                is_good = bool(good[number - first])
                if not is_good and number not in whole:
                    raise self._damaged(disk, number)
                before, after = sums[number - first].tolist()
                found[number] = (before, after, is_good)
        return found

    def _raw_slots(self, table: int, first: int, count: int) -> bytes:
        raw = self._files.read(table, count * SLOT_BYTES, first * SLOT_BYTES)
        # Beyond the end of the file: the disk has grown since the last fold.
        return raw + bytes(count * SLOT_BYTES - len(raw))

    def _image(self, disk: int) -> Path:
        return self._directory / f"{disk}.img"

    def _slots(self, disk: int) -> Path:
        return self._directory / f"{disk}{slots_.SUFFIX}"

    def _damaged(self, disk: int, number: int, *, is_hole: bool = False) -> StoredDamage:
        """``is_hole``: there should be nothing, and nothing is served from there."""
        return StoredDamage(
            f"64 KiB at byte {number * CHUNK_BYTES} of the base image of disk {disk} are damaged on the store's disk.",
            remedy="Check the disk. Recovery points that need these bytes are lost until a resync has replaced them.",
            disk=disk,
            offset=number * CHUNK_BYTES,
            length=CHUNK_BYTES,
            hole=is_hole,
        )


def chunk_sum(chunk: Buffer) -> int:
    """0 for zeros only."""
    if not np.frombuffer(chunk, np.uint8).any():
        return 0
    return int.from_bytes(blake3(chunk).digest(8), "little") or 1


def _lay_over(chunks: dict[int, bytearray | memoryview], at: int, size: int, content: memoryview | None) -> None:
    """A chunk that is not in ``chunks`` is all the row's, or that of several rows."""
    done = 0
    while done < size:
        number, skip = divmod(at + done, CHUNK_BYTES)
        take = min(CHUNK_BYTES - skip, size - done)
        if take == CHUNK_BYTES and content is not None:
            chunks[number] = content[done : done + take]
        else:
            chunk = chunks.setdefault(number, bytearray(CHUNK_BYTES))
            chunk[skip : skip + take] = bytes(take) if content is None else content[done : done + take]
        done += take


def _near(numbers: list[int]) -> Iterator[list[int]]:
    """Ascending numbers in groups whose slots are worth one read."""
    cuts = [at for at in range(1, len(numbers)) if numbers[at] - numbers[at - 1] > _SLOTS_GAP_MAX]
    for start, stop in itertools.pairwise([0, *cuts, len(numbers)] if numbers else []):
        yield numbers[start:stop]


def _covered(rows: list[tuple[int, int, memoryview | None]], numbers: list[int]) -> set[int]:
    """The chunks that ``rows``, which are disjoint, cover as a whole."""
    left = dict.fromkeys(numbers, CHUNK_BYTES)
    for at, size, _ in rows:
        for number in range(at // CHUNK_BYTES, -(-(at + size) // CHUNK_BYTES)):
            start, stop = number * CHUNK_BYTES, (number + 1) * CHUNK_BYTES
            left[number] -= min(stop, at + size) - max(start, at)
    return {number for number, missing in left.items() if missing == 0}
