"""The standby's part of a comparison: it holds, compares at one position, goes on, and gives way to a takeover."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from journal.comparison import Comparison, digest, part_bytes_for
from journal.errors import CdpError
from journal.position import Position
from standby.replay.compare import LEASE_S, ComparisonInterrupted, StandbyComparison
from standby.replay.follow import Follower
from tests.harness.wait import wait_until_async
from tests.replay.model import FastClock, History, inline
from tests.replay.test_follow import Standby

PART = part_bytes_for(1)
NAME: dict[str, Any] = {"comparison": "c1"}


def told(history: History, position: Position, unsettled: list[tuple[int, int, int]] | None = None) -> Comparison:
    """What the source would tell; unsettled ranges count as zeros."""
    digests = {}
    for index, image in enumerate(history.images[position]):
        disk = bytearray(image)
        for of, offset, length in unsettled or []:
            if of == index:
                disk[offset : offset + length] = bytes(length)
        parts = [memoryview(disk)[at : at + PART] for at in range(0, len(disk), PART)]
        digests[index] = b"".join(digest(part) for part in parts)
    sizes = {index: len(image) for index, image in enumerate(history.images[position])}
    return Comparison(position=str(position), part_bytes=PART, sizes=sizes, digests=digests, unsettled=unsettled or [])


class Source:
    """Where the standby gets the digests from."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.proof: Comparison | None = None
        self.before: asyncio.Event | None = None
        self.asked = False

    async def comparison(self, comparison: str) -> bytes:
        assert comparison == "c1" and self.proof is not None
        self.asked = True
        if self.before is not None:
            await self.before.wait()
        return self.proof.encode()


@asynccontextmanager
async def followed(seed: int) -> AsyncIterator[tuple[History, Standby, Follower, StandbyComparison, Source]]:
    history, rng = History(), random.Random(seed)
    history.write_random(rng)
    standby, source = Standby(history), Source(history)
    async with standby.following() as engine:
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "following")
        yield (
            history,
            standby,
            engine,
            StandbyComparison(engine, source, standby.disks, clock=FastClock(), offload=inline),
            source,
        )


async def test_it_holds_goes_on_to_exactly_the_position_and_follows_again() -> None:
    rng = random.Random(2)
    async with followed(1) as (history, standby, engine, comparison, source):
        held = await comparison.hold(NAME)
        assert held["applied"] == str(history.tip) and comparison.holding
        position = [history.write_random(rng) for _ in range(3)][1]
        source.proof = told(history, position)
        found = await comparison.compare({**NAME, "position": str(position)})
        assert found["differing"] == [] and found["compared_bytes"] == sum(source.proof.sizes.values())
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "following again")
        assert standby.equals(history.tip) and engine.status().state == "following"


async def test_exactly_what_differs_is_told_and_what_is_unsettled_is_not() -> None:
    async with followed(3) as (history, standby, _, comparison, source):
        await comparison.hold(NAME)
        standby.disks[1].data[PART + 5] ^= 1
        standby.disks[0].data[3 * PART] ^= 1
        source.proof = told(history, history.tip, [(0, 3 * PART, 512)])
        found = await comparison.compare({**NAME, "position": str(history.tip)})
        assert found["differing"] == [(1, PART, PART)] and found["differing_bytes"] == PART


async def test_a_takeover_takes_the_held_standby_and_ends_the_comparison() -> None:
    async with followed(4) as (history, _, engine, comparison, source):
        await comparison.hold(NAME)
        source.proof, source.before = told(history, history.tip), asyncio.Event()
        comparing = asyncio.create_task(comparison.compare({**NAME, "position": str(history.tip)}))
        await wait_until_async(lambda: source.asked, 10, "the comparison at its position")
        comparison.give_up()
        assert await engine.drain(history.tip) == history.tip
        await engine.lend()
        source.before.set()
        with pytest.raises(ComparisonInterrupted):
            await comparing
        # The takeover's disks are left where they are.
        assert engine.status().state == "drained"
        await comparison.release(NAME)
        assert engine.status().state == "drained"


async def test_a_hold_that_nobody_asks_for_ends_by_itself() -> None:
    async with followed(5) as (_, _, engine, comparison, _source):
        await comparison.hold(NAME)
        watching = asyncio.create_task(comparison.watch())
        await wait_until_async(lambda: not comparison.holding, LEASE_S, "the end of the lease")
        await wait_until_async(lambda: engine.status().state == "following", 10, "following")
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_what_the_source_told_of_another_position_is_refused() -> None:
    rng = random.Random(6)
    async with followed(6) as (history, _, engine, comparison, source):
        await comparison.hold(NAME)
        source.proof = told(history, history.tip)
        other = history.write_random(rng)
        with pytest.raises(CdpError):
            await comparison.compare({**NAME, "position": str(other)})
        await wait_until_async(lambda: engine.status().state == "following", 10, "following")


async def test_a_standby_that_a_takeover_has_drained_does_not_hold() -> None:
    async with followed(7) as (history, _, engine, comparison, _source):
        await engine.drain(None)
        for verb in (comparison.hold(NAME), comparison.compare({**NAME, "position": str(history.tip)})):
            with pytest.raises(ComparisonInterrupted):
                await verb
        assert engine.status().state == "drained" and not comparison.holding
