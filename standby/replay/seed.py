"""Seeding: make the target disks what the server holds, by comparing.

    start     P = the tip
    copy      for each stretch of each disk: digests of the newest image against the disk; what differs is fetched
              from the image at the then newest position, what is zero there is discarded here
    end       N = the tip

The history goes on during the copy, so that a block may hold content from anywhere in P..N: a fuzzy copy. Applying the
journal from P in order makes every block right once N is reached; the disks are consistent at the first recovery point
at or after N, not before. A seed that broke off is simply started again: what is equal is not fetched twice, so it
needs no progress record. The same procedure is the standby's resync after its disks were written by somebody else.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from blake3 import blake3

from journal.position import DIGEST_BYTES, Position
from journal.wire import MachineState, Progress
from standby.replay.apply import Applier, target_failed
from standby.replay.cursor import CHUNK_BYTES, NOTHING, blank
from standby.replay.ports import Clock, Disk, HistoryChanged, Offload, Transport
from standby.replay.retry import undamaged
from standby.replay.verify import verify_image

_STRETCH_BYTES: Final = 16 << 20
"""Compared in one request, and the most that one IMAGE answer holds: bounds memory and what a lost answer costs."""
_WORKERS: Final = 2
"""Stretches at once: one is fetched while the other is written. Each holds one answer in memory."""


@dataclass(frozen=True, slots=True)
class Seeded:
    """Apply from ``position``; consistent from the first recovery point at or after ``consistent_from``. ``idle``: that
    is ``position``, because nothing came during the copy."""

    position: Position
    consistent_from: Position
    idle: bool


class Seeder:
    def __init__(
        self, machine: uuid.UUID, transport: Transport, applier: Applier, clock: Clock, offload: Offload
    ) -> None:
        self._machine = machine
        self._transport = transport
        self._applier = applier
        self._clock = clock
        self._offload = offload
        self._applying = asyncio.Lock()
        self.progress: Progress | None = None

    async def run(self) -> Seeded:
        """Raises ``HistoryChanged`` if another generation went live meanwhile, and whatever the ports raise."""
        state = await self._transport.state()
        self._applier.check_disks(state.disks)
        stretches = _stretches(state)
        meter = _Meter(self._clock, sum(source.size_bytes for source in state.disks))
        workers = [asyncio.create_task(self._work(stretches, meter)) for _ in range(_WORKERS)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        await self._offload(self._applier.flush)
        end = await self._transport.state()
        if end.generation != state.generation:
            raise HistoryChanged(
                f"Generation {end.generation} went live during the seed from generation {state.generation}.",
                remedy="The standby seeds again by itself, fetching only what differs.",
            )
        self.progress = None
        return self._seeded(state, end)

    def _seeded(self, start: MachineState, end: MachineState) -> Seeded:
        first, last = Position.parse(start.tip), Position.parse(end.tip)
        point = Position.parse(end.recovery_point) if end.recovery_point else None
        if first == last and point is not None and last == Position.genesis(self._machine, last.generation, point):
            # A takeover's generation, maybe without a segment for ever: its image is that of the cut it stands on.
            first = last = point
        return Seeded(first, last, idle=first == last == point)

    async def _work(self, stretches: Iterator[tuple[int, int, int]], meter: _Meter) -> None:
        for disk, offset, length in stretches:
            await self._copy(disk, offset, length)
            self.progress = meter.progress(length)

    async def _copy(self, disk: int, offset: int, length: int) -> None:
        """Make one stretch equal."""
        digests = await self._transport.hashes(disk, offset, length, CHUNK_BYTES)
        differing = await self._offload(partial(_compare, self._applier.disks[disk], offset, length, digests))
        for start, size, zero in differing:
            if zero:
                await self._offload(partial(_discard, self._applier.disks[disk], start, size))
            else:
                await undamaged(partial(self._fetch, disk, start, size), self._clock)

    async def _fetch(self, disk: int, offset: int, length: int) -> None:
        at = Position.parse((await self._transport.state()).tip)
        raw = await self._transport.image(at, disk, offset, length)

        def write() -> None:
            segment = verify_image(raw, self._machine, at, disk)
            self._applier.apply_image(segment, disk, offset, length)

        async with self._applying:  # the applier has one window
            await self._offload(write)


class _Meter:
    def __init__(self, clock: Clock, total_bytes: int) -> None:
        self._clock = clock
        self._began_s = clock.monotonic()
        self._total_bytes = total_bytes
        self._done_bytes = 0

    def progress(self, more_bytes: int) -> Progress:
        self._done_bytes += more_bytes
        rate = self._done_bytes / max(self._clock.monotonic() - self._began_s, 1e-3)
        return Progress(
            what="seed",
            done_bytes=self._done_bytes,
            total_bytes=self._total_bytes,
            bytes_per_s=rate,
            eta_s=(self._total_bytes - self._done_bytes) / rate,
        )


def _stretches(state: MachineState) -> Iterator[tuple[int, int, int]]:
    for source in state.disks:
        for offset in range(0, source.size_bytes, _STRETCH_BYTES):
            yield source.index, offset, min(_STRETCH_BYTES, source.size_bytes - offset)


def _compare(disk: Disk, offset: int, length: int, digests: bytes) -> list[tuple[int, int, bool]]:
    """Differing ``(offset, length, reads as zeros)`` ranges, neighbours of one sort merged. Raises ``TargetFailed``."""
    count = -(-length // CHUNK_BYTES)
    if len(digests) != count * DIGEST_BYTES:
        raise ValueError(f"{len(digests)} bytes of digests for {count} chunks")
    try:
        data = disk.read(offset, length)
    except OSError as error:
        raise target_failed(error) from error
    ranges: list[tuple[int, int, bool]] = []
    for index in range(count):
        want = digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        chunk = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        have = NOTHING if blank(chunk) else blake3(chunk).digest()
        if have == want:
            continue
        start, zero = offset + index * CHUNK_BYTES, want == NOTHING
        if ranges and ranges[-1][2] == zero and ranges[-1][0] + ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + len(chunk), zero)
        else:
            ranges.append((start, len(chunk), zero))
    return ranges


def _discard(disk: Disk, offset: int, length: int) -> None:
    try:
        disk.discard(offset, length)
    except OSError as error:
        raise target_failed(error) from error
