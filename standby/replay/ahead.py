"""Fetching the next segments while one is being applied.

Hides the round trip to the server when segments are small, and holds little when they are large.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Final

from journal.position import Position
from journal.wire import FeedEntry
from standby.replay.ports import Transport

_BYTES_MAX: Final = 24 << 20
"""Encoded bytes on the way beside the segment that is being applied: bounds memory in a 512 MiB PE. One segment more is
always fetched, whatever its size."""
_SEGMENTS_MAX: Final = 8

Raw = bytes | bytearray | memoryview


class Ahead:
    """Serves ``entries`` in order. An entry that is asked for again is fetched again."""

    def __init__(self, transport: Transport, entries: list[FeedEntry]) -> None:
        self._transport = transport
        self._to_start = deque(entries)
        self._started: deque[tuple[FeedEntry, asyncio.Task[Raw]]] = deque()

    async def __aenter__(self) -> Ahead:
        self._fill()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        tasks = [task for _, task in self._started]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def take(self, entry: FeedEntry) -> Raw:
        if not self._started or self._started[0][0] is not entry:
            return await self._fetch(entry)
        _, task = self._started.popleft()
        try:
            raw = await task
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        self._fill()
        return raw

    def _fill(self) -> None:
        ahead_bytes = sum(entry.segment_bytes for entry, _ in self._started)
        while self._to_start and len(self._started) < _SEGMENTS_MAX:
            entry = self._to_start[0]
            if self._started and ahead_bytes + entry.segment_bytes > _BYTES_MAX:
                break
            self._to_start.popleft()
            ahead_bytes += entry.segment_bytes
            self._started.append((entry, asyncio.create_task(self._fetch(entry))))

    async def _fetch(self, entry: FeedEntry) -> Raw:
        return await self._transport.segment(Position.parse(entry.position))
