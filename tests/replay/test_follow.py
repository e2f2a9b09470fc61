"""The engine against a history in memory: what it applies, what it holds back, and that it comes back from anything."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from journal.errors import CdpError, DrainNotYet
from journal.position import Position
from journal.segment import Flags
from standby.replay.follow import Follower
from standby.replay.ports import DrainRefused, TargetTooSmall
from tests.harness.wait import wait_until_async
from tests.journal.segments import MACHINE
from tests.replay.model import FastClock, History, MemoryDisk, inline, unreachable


class Standby:
    """The target disks, and the engine as often as it is started."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.disks = {info.index: MemoryDisk(info.size_bytes) for info in history.infos}

    def image(self) -> list[bytes]:
        return [bytes(disk.data) for disk in self.disks.values()]

    def equals(self, position: Position | None) -> bool:
        return position is not None and self.image() == self.history.images[position]

    @asynccontextmanager
    async def following(self) -> AsyncIterator[Follower]:
        engine = Follower(MACHINE, self.history, self.disks, clock=FastClock(), offload=inline)
        task = asyncio.create_task(engine.run())
        try:
            yield engine
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled(), task.exception()


async def until_applied(engine: Follower, position: Position | None) -> None:
    await wait_until_async(lambda: engine.status().applied == position, 10, f"applying {position and position.short}")


async def test_seeds_follows_and_acknowledges() -> None:
    rng = random.Random(1)
    history = History()
    for _ in range(20):
        history.write_random(rng)
    standby = Standby(history)
    async with standby.following() as engine:
        await until_applied(engine, history.tip)
        await wait_until_async(lambda: engine.status().state == "following", 10, "following")
        for _ in range(30):
            history.write_random(rng)
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "the last acknowledgement")
        assert standby.equals(history.tip)
        assert all(disk.flushes for disk in standby.disks.values())


async def test_a_seed_is_not_consistent_before_its_first_recovery_point() -> None:
    rng = random.Random(2)
    history = History()
    for _ in range(5):
        history.write_random(rng, Flags.FUZZY)
    standby = Standby(history)
    async with standby.following() as engine:
        await until_applied(engine, history.tip)
        assert engine.status().state == "catching-up"
        history.write_random(rng, Flags.CONTINUES)
        await until_applied(engine, history.tip)
        assert not engine.status().consistent
        assert history.stored_cursor is None
        history.write_random(rng)
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "the first acknowledgement")
        assert engine.status().consistent
        assert standby.equals(history.tip)


async def test_holds_while_the_history_is_fuzzy() -> None:
    rng = random.Random(3)
    history = History()
    point = history.write_random(rng)
    standby = Standby(history)
    async with standby.following() as engine:
        await wait_until_async(lambda: history.stored_cursor == point, 10, "following")
        polls = history.served.count("feed")
        for flags in (Flags.FUZZY, Flags.FUZZY | Flags.CONTINUES, Flags.CONTINUES, Flags.FUZZY):
            history.write_random(rng, flags)
        await wait_until_async(lambda: history.served.count("feed") >= polls, 10, "another poll")
        assert standby.equals(point)
        assert engine.status().state == "following"
        closed = history.write_random(rng)
        await wait_until_async(lambda: history.stored_cursor == closed, 10, "the closing recovery point")
        assert standby.equals(closed)


@pytest.mark.parametrize("seed", range(40))
async def test_killed_and_disconnected_anywhere_it_ends_equal(seed: int) -> None:
    rng = random.Random(seed)
    history = History()
    standby = Standby(history)
    fault_rate = rng.choice((0.0, 0.1, 0.3))

    def faults(_call: str) -> None:
        if rng.random() < fault_rate:
            raise unreachable()

    history.faults = faults
    for _ in range(rng.randrange(4, 9)):
        async with standby.following() as engine:
            for _ in range(rng.randrange(60)):
                if rng.random() < 0.2:
                    history.write_random(rng, rng.choice((Flags.NONE, Flags.NONE, Flags.FUZZY, Flags.CONTINUES)))
                await asyncio.sleep(0)
                if engine.status().state == "following" and engine.status().applied == history.stored_cursor:
                    assert standby.equals(history.stored_cursor)
        if rng.random() < 0.2:  # the address moved to another history
            point = rng.choice([at for at in history.live if at == history.genesis or at in history.headers])
            history.start_generation(point)
        if rng.random() < 0.2:  # somebody replaced a disk
            standby.disks[0] = MemoryDisk()
    history.write_random(rng)
    async with standby.following() as engine:
        await wait_until_async(lambda: history.stored_cursor == history.tip, 20, f"catching up (seed {seed})")
        assert standby.equals(history.tip), f"seed {seed}"


async def test_a_seed_of_a_replaced_disk_that_breaks_off_is_not_taken_for_the_old_one() -> None:
    rng = random.Random(14)
    history = History()
    for _ in range(3):
        history.write_random(rng)
    standby = Standby(history)
    async with standby.following():
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "following")
    standby.disks[0] = MemoryDisk()
    async with standby.following():
        await wait_until_async(lambda: any(standby.disks[0].data[: 1 << 20]), 10, "the seed's first writes")
    assert history.stored_cursor is None or standby.equals(history.stored_cursor)
    async with standby.following():
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "the seed")
        assert standby.equals(history.tip)


async def test_a_dirty_disk_is_seeded_by_fetching_what_differs() -> None:
    rng = random.Random(5)
    history = History()
    history.write_random(rng)
    standby = Standby(history)
    standby.disks[1] = MemoryDisk(fill=0xAA)
    async with standby.following():
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "the seed")
        assert standby.equals(history.tip)


async def test_drains_to_exactly_that_position_and_stays() -> None:
    rng = random.Random(6)
    history = History()
    first = history.write_random(rng)
    standby = Standby(history)
    async with standby.following() as engine:
        await wait_until_async(lambda: history.stored_cursor == first, 10, "following")
        target = history.write_random(rng)
        history.write_random(rng)
        if engine.status().applied == first:
            assert await engine.drain(target) == target
            assert await engine.drain(target) == target
            history.write_random(rng)
            assert standby.equals(target)
            assert engine.status().state == "drained"
        with pytest.raises(DrainRefused):
            await engine.drain(first)
        engine.resume()
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "following again")
        assert standby.equals(history.tip)


async def test_drains_across_a_fence() -> None:
    """The fence starts the next generation on the sealed position; the drain to that position still works."""
    rng = random.Random(7)
    history = History()
    first = history.write_random(rng)
    standby = Standby(history)
    async with standby.following() as engine:
        await wait_until_async(lambda: history.stored_cursor == first, 10, "following")
        target = history.write_random(rng)
        history.start_generation(target)
        assert await engine.drain(None) == target
        assert standby.equals(target)


async def test_restarted_after_the_fence_it_still_drains_to_the_cut() -> None:
    """The genesis of the next generation has the image of the cut it stands on; nothing will ever follow it."""
    rng = random.Random(15)
    history = History()
    history.write_random(rng)
    cut = history.write_random(rng)
    standby = Standby(history)
    async with standby.following():
        await wait_until_async(lambda: history.stored_cursor == cut, 10, "following")
    history.start_generation(cut)
    async with standby.following() as engine:
        await wait_until_async(lambda: engine.status().state == "following", 10, "following")
        assert (engine.status().applied, engine.status().consistent) == (cut, True)
        assert await engine.drain(cut) == cut
        assert standby.equals(cut)
        engine.resume()
        await until_applied(engine, history.write_random(rng))
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "the next generation's segment")
        assert standby.equals(history.tip)


@pytest.mark.parametrize("flags", [Flags.FUZZY, Flags.CONTINUES])
async def test_a_generation_on_what_is_no_recovery_point_is_not_consistent(flags: Flags) -> None:
    rng = random.Random(16)
    history = History()
    point = history.write_random(rng)
    standby = Standby(history)
    history.start_generation(history.write_random(rng, flags))
    async with standby.following() as engine:
        await until_applied(engine, history.tip)
        assert (engine.status().state, engine.status().consistent) == ("catching-up", False)
        with pytest.raises(DrainRefused):
            await engine.drain(point)
        history.write_random(rng)
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "the first recovery point")
        assert standby.equals(history.tip)


async def test_a_drain_to_what_is_no_recovery_point_is_refused_and_following_goes_on() -> None:
    rng = random.Random(8)
    history = History()
    first = history.write_random(rng)
    standby = Standby(history)
    async with standby.following() as engine:
        await wait_until_async(lambda: history.stored_cursor == first, 10, "following")
        fuzzy = history.write_random(rng, Flags.FUZZY)
        draining = asyncio.create_task(engine.drain(fuzzy))
        await asyncio.sleep(0)
        history.write_random(rng)
        with pytest.raises(DrainRefused):
            await draining
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "following again")


async def test_a_seeding_standby_drains_later() -> None:
    rng = random.Random(9)
    history = History()
    history.write_random(rng)
    standby = Standby(history)
    engine = Follower(MACHINE, history, standby.disks, clock=FastClock(), offload=inline)
    with pytest.raises(DrainNotYet):
        await engine.drain(None)


async def test_lent_disks_are_seeded_again() -> None:
    rng = random.Random(10)
    history = History()
    point = history.write_random(rng)
    standby = Standby(history)
    async with standby.following() as engine:
        await wait_until_async(lambda: history.stored_cursor == point, 10, "following")
        with pytest.raises(DrainNotYet):
            await engine.lend()
        await engine.drain(None)
        await engine.lend()
        await engine.lend()
        assert history.stored_cursor is None
        standby.disks[0].data[1 << 20 : (1 << 20) + 512] = b"i" * 512  # the injection
        engine.resume()
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "the resync")
        assert standby.equals(history.tip)
        assert history.served.count("image") >= 1


async def test_killed_while_the_disks_are_lent_it_seeds() -> None:
    rng = random.Random(11)
    history = History()
    history.write_random(rng)
    standby = Standby(history)
    async with standby.following() as engine:
        await wait_until_async(lambda: engine.status().state == "following", 10, "following")
        await engine.drain(None)
        await engine.lend()
        standby.disks[0].data[4096:8192] = b"i" * 4096
    async with standby.following() as engine:
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "the resync")
        assert standby.equals(history.tip)


async def test_a_small_disk_is_named_and_a_grown_one_is_used() -> None:
    rng = random.Random(12)
    history = History()
    history.write_random(rng)
    standby = Standby(history)
    grown = standby.disks[1]
    standby.disks[1] = MemoryDisk(1 << 20)
    async with standby.following() as engine:
        await wait_until_async(lambda: engine.status().error is not None, 10, "the error")
        error = engine.status().error
        assert isinstance(error, TargetTooSmall)
        assert error.fields["needed_bytes"] == grown.size_bytes
        assert "Grow" in error.remedy
        standby.disks[1].data.extend(bytes(2 << 20))
        await wait_until_async(lambda: history.stored_cursor == history.tip, 10, "the seed")
        assert standby.equals(history.tip)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "foreign", "swapped"])
async def test_nothing_unverified_is_written(damage: str) -> None:
    rng = random.Random(13)
    history = History()
    point = history.write_random(rng)
    standby = Standby(history)
    async with standby.following() as engine:
        await wait_until_async(lambda: history.stored_cursor == point, 10, "following")
        good = bytearray(history.segments[point])
        history.start_generation(point)
        position = history.write_random(rng)
        right = history.segments[position]
        wrong = bytearray(right)
        if damage == "flipped":
            wrong[rng.randrange(len(wrong))] ^= 1
        elif damage == "truncated":
            del wrong[-1:]
        elif damage == "foreign":
            other = History()
            wrong = other.segments[other.write_random(rng)]
        else:
            wrong = good
        history.segments[position] = wrong
        await wait_until_async(lambda: engine.status().error is not None, 10, "the refusal")
        assert isinstance(engine.status().error, CdpError)
        assert standby.equals(point)
        history.segments[position] = right
        await wait_until_async(lambda: history.stored_cursor == position, 10, "the good one")
        assert standby.equals(position)
