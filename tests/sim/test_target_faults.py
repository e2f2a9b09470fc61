"""Failures of a target disk whose traces a random schedule rarely uncovers, played step by step."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Sequence

from standby.replay.follow import Follower
from tests.harness.wait import wait_until_async
from tests.journal.segments import MACHINE
from tests.replay.model import FastClock, History, MemoryDisk, inline

SIZE_BYTES = 1 << 20


class FailingDisk(MemoryDisk):
    """While ``failing``, a write is torn: its first half arrives. A flush that fails loses what was written last."""

    failing = False
    failing_flush = False
    failures = 0
    last: tuple[int, bytes] = (0, b"")

    def write(self, writes: Sequence[tuple[int, memoryview]]) -> None:
        if self.failing:
            self.failures += 1
            super().write(writes[: len(writes) // 2 + 1])
            raise OSError(errno.EIO, "injected")
        if writes:
            offset, data = writes[0]
            self.last = offset, bytes(self.data[offset : offset + len(data)])
        super().write(writes)

    def flush(self) -> None:
        if self.failing_flush:
            self.failing_flush = False
            self.failures += 1
            offset, before = self.last
            self.data[offset : offset + len(before)] = before
            raise OSError(errno.EIO, "injected")
        super().flush()


async def _until_acknowledged(history: History) -> None:
    await wait_until_async(lambda: history.stored_cursor == history.tip, 10, f"the cursor at {history.tip.short}")


async def test_a_segment_applied_in_part_leaves_no_trace_in_another_generation() -> None:
    rng = random.Random(1)
    history, disk = History(1, SIZE_BYTES), FailingDisk(SIZE_BYTES)
    parent = history.write_random(rng)
    task = asyncio.create_task(Follower(MACHINE, history, {0: disk}, clock=FastClock(), offload=inline).run())
    try:
        await _until_acknowledged(history)
        disk.failing = True
        history.write_random(rng)
        await wait_until_async(lambda: disk.failures, 10, "a torn write")
        history.start_generation(parent)
        history.write_random(rng)
        disk.failing = False
        await _until_acknowledged(history)
        assert bytes(disk.data) == history.images[history.tip][0]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_a_failed_flush_lost_is_found() -> None:
    rng = random.Random(2)
    history, disk = History(1, SIZE_BYTES), FailingDisk(SIZE_BYTES)
    history.write_random(rng)
    task = asyncio.create_task(Follower(MACHINE, history, {0: disk}, clock=FastClock(), offload=inline).run())
    try:
        await _until_acknowledged(history)
        disk.failing_flush = True
        history.write_random(rng)
        await wait_until_async(lambda: disk.failures, 10, "a failed flush")
        await _until_acknowledged(history)
        assert bytes(disk.data) == history.images[history.tip][0]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
