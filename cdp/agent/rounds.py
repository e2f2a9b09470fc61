"""The life of copy rounds inside the pipeline: when one starts, settles, reads and is done. ``dirty.py`` draws it.

Called between and at cuts; it never seals itself. All decisions use values read *after* the cut's mark was made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from cdp.agent.compare import SourceComparison
from cdp.agent.copy import BUFFER_BYTES, CHUNK_BYTES, FINE_BYTES, ZERO_DIGEST, Chunk, Copier
from cdp.agent.dirty import DirtyMap, Geometry, Round
from cdp.agent.errors import NotComparable
from cdp.agent.intervals import key
from cdp.agent.rate import COPY_BACKLOG_S
from journal.position import Position
from journal.wire import Progress

STABLE_S: Final = 1.0
"""A round that starts while writes are still being lost would have to be done again."""
IMPATIENT_S: Final = 10.0
"""But with a loss now and then it starts anyway."""
COMPARE_BYTES_MIN: Final = 1 << 30
"""A resync of more than this asks for hashes first: most of a disk that was marked as a whole has not changed."""
HASH_WINDOW_BYTES: Final = 64 * CHUNK_BYTES
"""Digests asked for at once."""

Phase = Literal["idle", "armed", "settling", "reading"]


class Losses(Protocol):
    """Part of ``CaptureSession``."""

    def stamps(self, disk: int) -> npt.NDArray[np.uint64]: ...


class Hashes(Protocol):
    async def hashes(self, disk: int, offset: int, length: int, chunk: int) -> list[bytes]: ...


class Rounds:
    """``dirty``: marks for the next round; ``dealt``: the drop generation up to which losses have been copied.
    ``sending``: bytes/s that may be sent, None without a limit."""

    def __init__(
        self,
        disks: list[Geometry],
        paths: dict[int, Path],
        *,
        losses: Losses,
        hashes: Hashes,
        settled: Callable[[int], Awaitable[None]],
        stored: Callable[[], Position | None],
        started: Callable[[str], None],
        worker: Executor,
        bytes_per_s_max: float,
        sending: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.dirty = DirtyMap(disks)
        self.dealt = 0
        self.current: Round | None = None
        self.phase: Phase = "idle"
        self._disks = disks
        self._paths = paths
        self._losses = losses
        self._hashes = hashes
        self._settled = settled
        self._stored = stored
        self._started = started
        self._worker = worker
        self._rate = bytes_per_s_max
        self._sending = sending
        self._todo = DirtyMap(disks)
        self._copier: Copier | None = None
        self._settling: asyncio.Task[None] | None = None
        self._digests: tuple[int, int, list[bytes]] = (-1, 0, [])
        self._floor: Position | None = None
        self._generation_seen = (-1, 0.0)
        self._dirty_since: float | None = None
        self._began: tuple[float, int] = (0.0, 0)
        self._read_next = 0.0
        self.comparison = SourceComparison(
            disks, paths, settled=settled, worker=worker, bytes_per_s_max=bytes_per_s_max
        )
        """Tells what the disks hold, while nothing has to be copied."""

    # --- state --------------------------------------------------------------------------------------------------------
    @property
    def copier(self) -> Copier | None:
        """What has to track captured writes; None before the cut at which tracking begins."""
        return self._copier if self.phase in ("settling", "reading") else self.comparison.copier

    def clean(self, generation: int) -> bool:
        """Nothing is missing from the history, given a drop generation that was read after draining to the cut."""
        return self.current is None and not self.dirty and generation == self.dealt

    @property
    def urgent(self) -> bool:
        """A cut at once brings the round forward."""
        return self.phase == "armed" or self.comparison.urgent

    @property
    def reading(self) -> bool:
        """There is something to read now. A comparison waits until the server has all that was sealed before tracking
        began: a digest that is older could match, and the late segment then undo what it matched."""
        if self.phase != "reading" or self.current is None:
            return self.current is None and self.comparison.reading
        stored = self._stored()
        return self.current.kind != "compare" or self._floor is None or (stored is not None and stored >= self._floor)

    def gives_way(self, backlog_bytes: int) -> bool:
        """The journal goes first: where sending is limited, a copy takes what the journal leaves."""
        rate = self._sending()
        return rate is not None and backlog_bytes > rate * COPY_BACKLOG_S

    def progress(self) -> Progress | None:
        if self.current is None:
            return None
        rate = 0.0
        if self.phase == "reading" and (passed := time.monotonic() - self._began[0]) > 0.5:
            rate = (self.current.done_bytes - self._began[1]) / passed
        left = max(0, self.current.total_bytes - self.current.done_bytes)
        return Progress(
            what=self.current.kind,
            done_bytes=self.current.done_bytes,
            total_bytes=self.current.total_bytes,
            bytes_per_s=rate,
            eta_s=left / rate if rate > 0 else None,
        )

    # --- transitions --------------------------------------------------------------------------------------------------
    def begin(self, current: Round) -> None:
        """Arm ``current``; also one that a restart has interrupted."""
        self.abandon()
        self.comparison.end(_copying())
        self._todo = DirtyMap(self._disks)
        self._todo.unpack(current.todo)
        self._copier = Copier(self._paths, self._todo, current)
        self.current = current
        self.phase = "armed"

    def mark(self, ranges: list[tuple[int, int, int]]) -> None:
        """``(disk, offset, length)`` for the next round."""
        starts = np.array([key(disk, offset) for disk, offset, _ in ranges], np.uint64)
        self.dirty.mark(starts, starts + np.array([length for *_, length in ranges], np.uint64))

    def abandon(self) -> None:
        """Forget the current round. Whoever calls this starts another one for the same ranges."""
        self._stop_settling()
        if self._copier is not None:
            self._copier.close()
        self._copier, self.current, self.phase = None, None, "idle"

    def interrupt(self) -> None:
        """Captured writes are going to be dropped: tracking is worthless from here on; settle again later."""
        self._stop_settling()
        self.comparison.end(_copying())
        if self._copier is not None:
            self._copier.forget()
            self.phase = "armed"

    def at_cut(self, tip: Position, generation: int, monotonic_ns: int, *, complete: bool) -> Round | None:
        """One step, after a cut was sealed as ``tip``. ``generation`` was read after the cut's mark, which was made at
        ``monotonic_ns``. Returns a round that has just been finished."""
        finished = None
        self.comparison.at_cut(tip, monotonic_ns, clean=complete and self.clean(generation))
        match self.phase:
            case "idle":
                self._maybe_arm(generation)
            case "armed":
                # Everything captured from this cut on was submitted after the round's losses.
                self._start_settling(monotonic_ns)
                self._floor = tip
            case "settling":
                self._maybe_read(complete=complete)
            case "reading":
                finished = self._maybe_finish()
        return finished

    def _maybe_arm(self, generation: int) -> None:
        now = time.monotonic()
        if generation == self.dealt and not self.dirty:
            self._dirty_since = None
            return
        if self._generation_seen[0] != generation:
            self._generation_seen = (generation, now)
        self._dirty_since = self._dirty_since or now
        if now - self._generation_seen[1] >= STABLE_S or now - self._dirty_since >= IMPATIENT_S:
            self._dirty_since = None
            reason = "lost-writes" if generation != self.dealt else "dropped-writes"
            self._started(reason)
            self.begin(Round(kind="resync", reason=reason, drop_generation=generation))

    def _start_settling(self, monotonic_ns: int) -> None:
        assert self.current is not None
        if not self.current.complete:
            self._todo.absorb(self.dirty)
            self.dirty.clear()
            self.current.todo = self._todo.pack()
        self._settling = asyncio.ensure_future(self._settled(monotonic_ns))
        self.phase = "settling"

    def _maybe_read(self, *, complete: bool) -> None:
        assert self.current is not None and self._settling is not None and self._copier is not None
        if self._copier.overflowed:
            self.interrupt()
            return
        if not self._settling.done():
            return
        if self._settling.exception() is not None:
            self.interrupt()  # a disk is gone, which is told elsewhere; try again for as long as that lasts
            return
        if not self.current.complete:
            if not complete:
                return  # some loss is still being stamped; it may be one of ours
            for disk in self._disks:
                stamps = self._losses.stamps(disk.index)
                ours = (stamps > np.uint64(self.dealt)) & (stamps <= np.uint64(self.current.drop_generation))
                self._todo.mark_bits(disk.index, ours)
            self.current.complete = True
            self.current.todo = self._todo.pack()
            self.current.total_bytes = self._todo.total_bytes
            if self.current.total_bytes >= COMPARE_BYTES_MIN:
                self.current.kind = "compare"
        self._settling = None
        self._digests = (-1, 0, [])
        self._began = (time.monotonic(), self.current.done_bytes)
        self.phase = "reading"

    def _maybe_finish(self) -> Round | None:
        assert self._copier is not None and self.current is not None
        if self._copier.overflowed:
            self.interrupt()
            return None
        if not self._copier.finished:
            return None
        finished = self.current
        self.dealt = finished.drop_generation
        self.abandon()
        return finished

    def _stop_settling(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None

    # --- reading ------------------------------------------------------------------------------------------------------
    async def read_until(self, due: float) -> None:
        """Read chunks until ``due`` (monotonic seconds), the buffer is full, or everything is read. Raises
        ``DiskReadFailed`` and, when comparing, what ``hashes`` raises."""
        if self.current is None:
            await self.comparison.read_until(due)
            return
        copier, loop = self._copier, asyncio.get_running_loop()
        assert self.reading and copier is not None and self.current is not None
        rate = self._sending()
        copier.room_bytes = BUFFER_BYTES if rate is None else min(BUFFER_BYTES, int(rate * COPY_BACKLOG_S))
        while copier.has_room and (now := time.monotonic()) < due:
            if now < self._read_next:
                await asyncio.sleep(min(self._read_next, due) - now)
                continue
            chunk = copier.next()
            if chunk is None:
                return
            coarse = await self._coarse(chunk) if self.current.kind == "compare" else None
            differs = await loop.run_in_executor(self._worker, copier.read, chunk, coarse)
            if coarse is not None and differs:
                fine = await self._fine(chunk, coarse)
                await loop.run_in_executor(self._worker, copier.keep_differing, chunk, fine)
            if self._rate:
                self._read_next = max(self._read_next, now) + chunk.length / self._rate

    async def _coarse(self, chunk: Chunk) -> bytes:
        """The server's digest of a chunk, asked for in windows."""
        start, length, digests = self._digests
        if not start <= chunk.start < start + length or (chunk.start - start) % CHUNK_BYTES:
            end = min(chunk.offset + HASH_WINDOW_BYTES, self._size(chunk.disk))
            digests = await self._hashes.hashes(chunk.disk, chunk.offset, end - chunk.offset, CHUNK_BYTES)
            start = chunk.start
            self._digests = (start, end - chunk.offset, digests)
        return digests[(chunk.start - start) // CHUNK_BYTES]

    async def _fine(self, chunk: Chunk, coarse: bytes) -> list[bytes]:
        if coarse == ZERO_DIGEST:
            return [ZERO_DIGEST] * -(-chunk.length // FINE_BYTES)
        return await self._hashes.hashes(chunk.disk, chunk.offset, chunk.length, FINE_BYTES)

    def _size(self, disk: int) -> int:
        return next(geometry.size_bytes for geometry in self._disks if geometry.index == disk)


def _copying() -> NotComparable:
    return NotComparable(
        "The source copies what has not been captured.",
        remedy="Wait until 'cdp status' shows a recovery point, then repeat it.",
    )
