"""Reading a round's ranges from the disks and turning them into pieces of the next segment.

    next ─► read ─► (compare: keep what differs) ─► … ─► cut ─► track what was captured up to it ─► take

The rule that makes this right while the source writes on: chunks are read *before* a cut's mark is made, so every write
that a chunk may show was submitted before the mark, is captured below it, and has been tracked when ``take`` is
called; tracked sectors are left out of the chunk, and the rest ranks below everything captured in the segment.
A write that was captured but had not reached the disk when the chunk was read is tracked for the same reason.
Writes before tracking began have completed: the round has settled (``dirty.py``).

Memory: one buffer of ``BUFFER_BYTES``; the tracked set holds only what is not copied yet, and at most
``TRACKED_MAX`` ranges. Beyond that it is thrown away and the round settles again (``overflowed``).
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from blake3 import blake3

from cdp.agent.coalesce import Pieces, copy_pieces
from cdp.agent.dirty import DirtyMap, Round
from cdp.agent.errors import DiskReadFailed
from cdp.agent.intervals import Intervals, key

CHUNK_BYTES: Final = 1 << 20
"""Read at once, and compared first; large enough for any disk, small enough not to delay a cut."""
FINE_BYTES: Final = 64 << 10
"""Compared, and sent, where a chunk differs."""
BUFFER_BYTES: Final = 8 << 20
"""What one segment carries of a copy."""
TRACKED_MAX: Final = 500_000
"""Ranges; 16 bytes each, and as much again while they are merged."""
_BLOCK: Final = 4096
ZERO_DIGEST: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class Chunk:
    disk: int
    offset: int
    length: int

    @property
    def start(self) -> int:
        return key(self.disk, self.offset)


class Copier:
    """One round at work. Used by one thread at a time."""

    def __init__(self, paths: dict[int, Path], todo: DirtyMap, current: Round) -> None:
        self.round = current
        self.tracked = Intervals()
        self._paths = paths
        self._todo = todo
        self._fds: dict[int, int] = {}
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)
        self._bytes = np.frombuffer(self._buffer, np.uint8)
        self._used = 0
        self.room_bytes = BUFFER_BYTES
        """What one segment may carry; less where the line is slow."""
        self._at = (current.disk, current.offset)
        self._chunks: list[tuple[int, int]] = []
        self._kept: list[tuple[int, int]] = []
        self._looked_at = 0

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    # --- before the cut -----------------------------------------------------------------------------------------------
    @property
    def has_room(self) -> bool:
        return self._used == 0 or self._used + CHUNK_BYTES <= self.room_bytes

    def next(self) -> Chunk | None:
        """What to read next; None when the round has read everything."""
        found = self._todo.next_range(*self._at, CHUNK_BYTES)
        return None if found is None else Chunk(*found)

    def read(self, chunk: Chunk, coarse: bytes | None = None) -> bool:
        """Read ``chunk``; with ``coarse`` (the server's digest of it) tell whether it differs. Raises
        ``DiskReadFailed``.

        Without a digest the chunk is kept whole. A chunk that differs is not done with before ``keep_differing``: if
        that is never called, because the server went away, it is simply the next one again."""
        self._fill(chunk)
        if coarse is None:
            self._keep(chunk, [(0, chunk.length)])
            return True
        if self._digest(0, chunk.length) != coarse:
            return True
        self._advance(chunk)
        return False

    def keep_differing(self, chunk: Chunk, fine: list[bytes]) -> None:
        """Keep the parts of the chunk just read whose digests are not the server's."""
        parts = [(at, min(at + FINE_BYTES, chunk.length)) for at in range(0, chunk.length, FINE_BYTES)]
        self._keep(chunk, [part for part, digest in zip(parts, fine, strict=True) if self._digest(*part) != digest])

    # --- at the cut ---------------------------------------------------------------------------------------------------
    def track(self, captured: Intervals) -> None:
        """These bytes are in the journal since tracking began."""
        self.tracked = self.tracked.union(captured)

    @property
    def overflowed(self) -> bool:
        return len(self.tracked) > TRACKED_MAX

    def take(self) -> Pieces:
        """What the segment at this cut carries of the copy: pieces of ``buffer``. Call once the cut's captured
        writes are tracked. The round's progress then counts this as copied."""
        kept = np.array(self._kept, np.uint64).reshape(-1, 2)
        ranges = Intervals.of(kept[:, 0], kept[:, 1]).minus(self.tracked)
        zeros = self._zeros()
        if self.round.kind == "seed":
            ranges, zeros = ranges.minus(zeros), Intervals()
        chunks = np.array(self._chunks, np.int64).reshape(-1, 2)
        pieces = copy_pieces(ranges, zeros, chunks[:, 0].astype(np.uint64), chunks[:, 1])
        self.round.disk, self.round.offset = self._at
        self.round.done_bytes += self._looked_at
        self.tracked = self.tracked.from_key(key(*self._at))
        self._chunks, self._kept, self._looked_at, self._used = [], [], 0, 0
        return pieces

    def forget(self) -> None:
        """Drop what was read but not taken, and all tracking: the round has to settle before it goes on."""
        self._at = (self.round.disk, self.round.offset)
        self.tracked = Intervals()
        self._chunks, self._kept, self._looked_at, self._used = [], [], 0, 0

    @property
    def buffer(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Where the pieces of ``take`` point to, until the next ``read``."""
        return self._bytes

    @property
    def finished(self) -> bool:
        """Everything has been read and taken."""
        return not self._chunks and not self._looked_at and self.next() is None

    # --- inside -------------------------------------------------------------------------------------------------------
    def _fill(self, chunk: Chunk) -> None:
        fd = self._fds.get(chunk.disk)
        path = self._paths[chunk.disk]
        try:
            if fd is None:
                fd = self._fds[chunk.disk] = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            got = os.preadv(fd, [memoryview(self._buffer)[self._used : self._used + chunk.length]], chunk.offset)
        except OSError as error:
            raise disk_unreadable(path, chunk.disk, chunk.offset, str(error)) from error
        if got != chunk.length:
            raise disk_unreadable(path, chunk.disk, chunk.offset, f"{got} bytes came")

    def _digest(self, low: int, high: int) -> bytes:
        part = self._bytes[self._used + low : self._used + high]
        return blake3(part.data).digest() if part.any() else ZERO_DIGEST

    def _advance(self, chunk: Chunk) -> None:
        self._at = (chunk.disk, chunk.offset + chunk.length)
        self._looked_at += chunk.length

    def _keep(self, chunk: Chunk, parts: list[tuple[int, int]]) -> None:
        self._advance(chunk)
        if not parts:
            return
        self._chunks.append((chunk.start, self._used))
        self._kept += [(chunk.start + low, chunk.start + high) for low, high in parts]
        # Slots begin on a block, so that zero blocks can be found for all of them at once; only the end of a disk
        # leaves a slot partly filled.
        end = self._used + chunk.length
        self._used = -(-end // _BLOCK) * _BLOCK
        self._bytes[end : self._used] = 0

    def _zeros(self) -> Intervals:
        """The blocks of what was kept that hold nothing but zeros."""
        words = self._bytes[: self._used].view(np.uint64).reshape(-1, _BLOCK // 8)
        blocks = np.flatnonzero(~words.any(axis=1)) * _BLOCK
        if len(blocks) == 0:
            return Intervals()
        chunks = np.array(self._chunks, np.int64)
        at = np.searchsorted(chunks[:, 1], blocks, side="right") - 1
        starts = (chunks[at, 0] + (blocks - chunks[at, 1])).astype(np.uint64)
        return Intervals.of(starts, starts + np.uint64(_BLOCK))


def disk_unreadable(path: Path, disk: int, offset: int, why: str) -> DiskReadFailed:
    return DiskReadFailed(
        f"{path} cannot be read at {offset}: {why}.",
        remedy="Look at the kernel log: the disk may be failing. The copy is tried again by itself.",
        disk=disk,
        offset=offset,
    )
