"""The source's part of a comparison: what its disks held at one sealed position, told while it writes on.

    armed ─► settling ─► reading ─► … a round after another, each from a cut on … ─► the last one: done

A round begins at a cut: the position that was sealed there is P. It settles (every write submitted before P has
completed), then reads the parts that were written since they were read last, the first time all of them. What is
captured after P is tracked; at the next cut the sectors of the parts just read that are in it are *unsettled*: what
they held at P cannot be seen any more. All other sectors read as they were at P. So each round ends with the digests
of all disks at its P, and later rounds read, and leave unsettled, ever less: only what is written within a moment.

Reading, tracking and settling are those of the copy rounds (``copy``, ``dirty``, ``rounds``). Nothing is sent, the
history stays as it is. A loss, a copy or a fence ends a comparison.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Final, Literal

import numpy as np

from cdp.agent.coalesce import Pieces, copy_pieces
from cdp.agent.copy import Copier
from cdp.agent.dirty import DirtyMap, Geometry, Round
from cdp.agent.errors import NotComparable
from cdp.agent.intervals import Intervals, disks_of, offsets_of
from journal.comparison import Comparison, digest, part_bytes_for
from journal.errors import CdpError
from journal.position import DIGEST_BYTES, Position

ROUNDS_MAX: Final = 8
"""More do not get any calmer; the next one is as good as any."""
CALM_S: Final = 3.0
"""A round that is read in so short a time leaves as little unsettled as there can be."""
LEASE_S: Final = 60.0
"""A server that asks no more does not want to know any more."""

Phase = Literal["idle", "armed", "settling", "reading", "done"]


class _Table:
    """The digests so far. ``stale``: parts that were written since they were read."""

    def __init__(self, disks: list[Geometry]) -> None:
        self.part_bytes = part_bytes_for(sum(disk.size_bytes for disk in disks))
        self.parts = [Geometry(disk.index, disk.size_bytes, self.part_bytes) for disk in disks]
        self.stale = DirtyMap(self.parts)
        self.stale.mark_all()
        self.digests = {disk.index: bytearray(disk.granules * DIGEST_BYTES) for disk in self.parts}
        self.unsettled: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def put(self, disk: int, offset: int, part: memoryview, unsettled: list[tuple[int, int]]) -> None:
        """``unsettled``: ``(start, end)`` inside of the part, which is zeroed there."""
        number = offset // self.part_bytes
        for low, high in unsettled:
            part[low:high] = bytes(high - low)
        self.digests[disk][number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES] = digest(part)
        if unsettled:
            self.unsettled[disk, number] = [(offset + low, offset + high) for low, high in unsettled]
        else:
            self.unsettled.pop((disk, number), None)

    def told(self, position: Position) -> Comparison:
        return Comparison(
            position=str(position),
            part_bytes=self.part_bytes,
            sizes={disk.index: disk.size_bytes for disk in self.parts},
            digests={index: bytes(digests) for index, digests in self.digests.items()},
            unsettled=[
                (disk, low, high - low) for (disk, _), ranges in sorted(self.unsettled.items()) for low, high in ranges
            ],
        )


class _Prover(Copier):
    """A copier whose pieces are digested instead of sent."""

    def __init__(self, paths: dict[int, Path], todo: DirtyMap, table: _Table) -> None:
        super().__init__(paths, todo, Round(kind="compare", reason="proof", drop_generation=0))
        self._table = table

    def track(self, captured: Intervals) -> None:
        super().track(captured)
        self._table.stale.mark(captured.starts, captured.ends)

    def take(self) -> Pieces:
        for start, at in self._chunks:
            self._digest_chunk(start, at)
        super().take()
        nothing = np.zeros(0, np.uint64)
        return copy_pieces(Intervals(), Intervals(), nothing, np.zeros(0, np.int64))

    def _digest_chunk(self, start: int, at: int) -> None:
        """``start``: its key; ``at``: where it lies in the buffer."""
        end = next(high for low, high in self._kept if low == start)
        written = self.tracked.between(start, end)
        disk = int(disks_of(np.array([start], np.uint64))[0])
        offset = int(offsets_of(np.array([start], np.uint64))[0])
        view = memoryview(self._buffer)
        step = self._table.part_bytes
        for low in range(0, end - start, step):
            high = min(low + step, end - start)
            inside = [
                (max(a - start, low) - low, min(b - start, high) - low)
                for a, b in zip(written.starts.tolist(), written.ends.tolist(), strict=True)
                if a - start < high and b - start > low
            ]
            self._table.put(disk, offset + low, view[at + low : at + high], inside)


class SourceComparison:
    """``rounds.py`` calls it at cuts and lets it read when no copy is under way."""

    def __init__(
        self,
        disks: list[Geometry],
        paths: dict[int, Path],
        *,
        settled: Callable[[int], Awaitable[None]],
        worker: Executor,
        bytes_per_s_max: float,
    ) -> None:
        self._disks = disks
        self._paths = paths
        self._settled = settled
        self._worker = worker
        self._rate = bytes_per_s_max
        self._read_next = 0.0
        self.phase: Phase = "idle"
        self.calm = False
        self._id = ""
        self._table: _Table | None = None
        self._prover: _Prover | None = None
        self._settling: asyncio.Task[None] | None = None
        self._position: Position | None = None
        self._rounds = 0
        self._round_began = 0.0
        self._asked = 0.0
        self._finish = False
        self._last = False
        self._result: asyncio.Future[Comparison] | None = None

    # --- ordered ------------------------------------------------------------------------------------------------------
    def ask(self, comparison: str) -> dict[str, object]:
        """Begin, or tell how far it is. Raises what has ended it."""
        self._asked = time.monotonic()
        if comparison != self._id:
            self.end(NotComparable("Another comparison has begun.", remedy="Wait for that one."))
            self._id, self.phase = comparison, "armed"
            self._table = _Table(self._disks)
            self._rounds, self.calm, self._finish, self._last = 0, False, False, False
            self._result = asyncio.get_running_loop().create_future()
            # Nobody may be waiting when it fails.
            self._result.add_done_callback(lambda done: done.cancelled() or done.exception())
        assert self._result is not None
        if self._result.done():
            self._result.result()
        done_bytes = 0 if self._prover is None else self._prover.round.done_bytes
        return {"calm": self.calm, "rounds": self._rounds, "done_bytes": done_bytes}

    async def finish(self, comparison: str) -> Comparison:
        """The next round is the last; what it told. Raises ``NotComparable`` and what reading raises."""
        self.ask(comparison)
        self._finish = True
        assert self._result is not None
        return await asyncio.shield(self._result)

    def end(self, error: CdpError) -> None:
        """Give up; whoever asks next is told why."""
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        if self._prover is not None:
            self._prover.close()
        if self._result is not None and not self._result.done():
            self._result.set_exception(error)
        self._prover = self._table = None
        self.phase = "idle"

    # --- at cuts ------------------------------------------------------------------------------------------------------
    @property
    def copier(self) -> Copier | None:
        return self._prover

    @property
    def reading(self) -> bool:
        return self.phase == "reading"

    @property
    def urgent(self) -> bool:
        """A cut at once ends the last round: what is written until then is what stays unsettled."""
        if not self._last or self._prover is None:
            return False
        if self.phase == "settling":
            return self._settling is not None and self._settling.done()
        return self.phase == "reading" and self._prover.next() is None

    def at_cut(self, tip: Position, monotonic_ns: int, *, clean: bool) -> None:
        """After a cut was sealed as ``tip``; ``clean``: it is a recovery point."""
        if self.phase in ("idle", "done"):
            return
        if not clean:
            self.end(_unclear("The history is fuzzy."))
        elif not self._finish and time.monotonic() - self._asked > LEASE_S:
            self.end(_unclear("The server has not asked for a while."))
        elif self._prover is not None and self._prover.overflowed:
            self.end(_unclear("Too much was written while the disks were being read."))
        elif self.phase == "armed":
            self._begin_round(tip, monotonic_ns)
        elif self.phase == "settling":
            self._maybe_read()
        elif self._prover is not None and self._prover.finished:
            self._end_round(tip, monotonic_ns)

    def _begin_round(self, tip: Position, monotonic_ns: int) -> None:
        assert self._table is not None
        todo = DirtyMap(self._table.parts)
        todo.absorb(self._table.stale)
        self._table.stale.clear()
        if self._prover is not None:
            self._prover.close()
        self._prover = _Prover(self._paths, todo, self._table)
        self._position, self._last = tip, self._finish
        self._round_began = time.monotonic()
        self._settling = asyncio.ensure_future(self._settled(monotonic_ns))
        self.phase = "settling"

    def _maybe_read(self) -> None:
        assert self._settling is not None
        if not self._settling.done():
            return
        error = self._settling.exception()
        self._settling = None
        if error is not None:
            self.end(_unclear(f"The disks do not settle: {error}."))
            return
        self.phase = "reading"

    def _end_round(self, tip: Position, monotonic_ns: int) -> None:
        assert self._table is not None and self._position is not None and self._result is not None
        self._rounds += 1
        self.calm = self._rounds >= ROUNDS_MAX or time.monotonic() - self._round_began <= CALM_S
        if not self._last:
            self._begin_round(tip, monotonic_ns)
            return
        if not self._result.done():
            self._result.set_result(self._table.told(self._position))
        self.end(_unclear("It is over."))
        self.phase = "done"

    # --- reading ------------------------------------------------------------------------------------------------------
    async def read_until(self, due: float) -> None:
        """As ``Rounds.read_until``."""
        prover, loop = self._prover, asyncio.get_running_loop()
        while prover is not None and prover.has_room and (now := time.monotonic()) < due:
            if now < self._read_next:
                await asyncio.sleep(min(self._read_next, due) - now)
                continue
            chunk = prover.next()
            if chunk is None:
                return
            try:
                await loop.run_in_executor(self._worker, prover.read, chunk)
            except CdpError as error:
                self.end(error)
                raise
            if self._rate:
                self._read_next = max(self._read_next, now) + chunk.length / self._rate


def _unclear(why: str) -> NotComparable:
    return NotComparable(
        f"The source's disks cannot be compared now. {why}",
        remedy="Wait until 'cdp status' shows no seed, resync or takeover, then repeat it.",
    )
