"""Where the agent stands towards the server, and pushing through every kind of refusal."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cdp.agent.errors import ServerUnreachable
from cdp.agent.push import Pusher, Standing, compare
from cdp.agent.spool import Spool
from cdp.agent.status import Status
from journal import chain, wire
from journal.decoder import decode
from journal.encoder import Encoder
from journal.errors import CdpError
from journal.extent import Extents
from journal.position import Position
from tests.harness.wait import wait_until_async

MACHINE = uuid.UUID(int=9)


class Chain:
    """Segments sealed one after another into a spool."""

    def __init__(self, spool: Spool, tip: Position) -> None:
        self.spool = spool
        self.tip = tip
        self._encoder = Encoder(MACHINE)

    def seal(self) -> Position:
        header, raw = self._encoder.encode(
            self.tip, Extents.empty(), [], opened_at_ns=0, sealed_at_ns=time.time_ns(), sealed_monotonic_ns=0
        )
        self.spool.publish(self.spool.put(header, raw))
        self.tip = header.position
        return self.tip


class MemoryServer:
    """Judges as the store does. ``faults``: what the next requests raise, in order; None lets one through."""

    def __init__(self, generation: int = 1) -> None:
        self.tip = Position.genesis(MACHINE, generation, None)
        self.digests: dict[int, bytes] = {}
        self.fenced = False
        self.faults: list[CdpError | None] = []
        self.told_lost: list[Position] = []
        self.asked = 0

    async def state(self) -> wire.MachineState:
        self._fault()
        return wire.MachineState(
            machine=str(MACHINE),
            name="db1",
            generation=self.tip.generation,
            tip=str(self.tip),
            recovery_point=None,
            fuzzy=False,
            fenced=self.fenced,
            disks=[],
            service_addresses=["10.0.0.5/24"],
        )

    async def put_segment(self, position: Position, path: Path, length: int) -> wire.StoredAnswer:
        self._fault()
        raw = path.read_bytes()
        assert len(raw) == length
        header = decode(raw).header
        verdict = chain.judge(header, self.tip, self.digests.get)
        if verdict is chain.Verdict.EXTENDS:
            self.tip = header.position
            self.digests[header.seq] = header.digest
        self._fault()  # stored, and the answer lost
        return wire.StoredAnswer(position=str(header.position), duplicate=verdict is chain.Verdict.DUPLICATE)

    async def lost(self, position: Position) -> None:
        self.told_lost.append(position)

    def _fault(self) -> None:
        self.asked += 1
        if self.faults and (fault := self.faults.pop(0)) is not None:
            raise fault


class Bench:
    def __init__(self, directory: Path) -> None:
        self.spool = Spool(directory, 1 << 30)
        self.spool.open()
        self.server = MemoryServer()
        self.chain = Chain(self.spool, self.server.tip)
        self.status = Status(boot_id="boot")
        self.events: list[str] = []
        self.addresses: list[str] = []
        self.pusher = Pusher(
            self.spool,
            self.server,
            self.status,
            tip=lambda: self.chain.tip,
            superseded=self._superseded,
            diverged=self._diverged,
            addresses=self.addresses.extend,
            news=asyncio.Event(),
        )

    async def _superseded(self, state: wire.MachineState) -> None:
        self.events.append("superseded")
        self.pusher.paused = True

    async def _diverged(self, reason: str) -> None:
        """What the agent does: go on at the server's tip."""
        self.events.append(reason)
        self.spool.discard()
        self.chain.tip = self.server.tip

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.pusher.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        self.pusher.notify()
        await wait_until_async(condition, 20, what)


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "spool")


AWAY = ServerUnreachable("away")


async def test_everything_is_pushed_through_losses_before_and_after_storing(bench: Bench) -> None:
    bench.server.faults = [AWAY, None, AWAY, None, None, AWAY, None, None, None, AWAY]
    for _ in range(8):
        bench.chain.seal()
    async with bench.running():
        await bench.until(lambda: bench.server.tip == bench.chain.tip and not bench.spool.entries, "all of it")
        assert bench.events == []
        assert bench.status.online
        assert bench.addresses[:1] == ["10.0.0.5/24"]
        tip = bench.chain.seal()
        bench.pusher.notify()
        async with asyncio.timeout(20):
            await bench.pusher.wait_stored(tip)
    assert not list(bench.spool.directory.glob("*.segment"))


async def test_a_server_that_lost_what_it_had_acknowledged(bench: Bench) -> None:
    async with bench.running():
        for _ in range(3):
            bench.chain.seal()
        await bench.until(lambda: not bench.spool.entries, "the first ones")
        bench.server.tip = Position.genesis(MACHINE, 1, None)
        bench.server.digests.clear()
        bench.chain.seal()
        await bench.until(lambda: bench.events, "the verdict")
        assert bench.events == ["server-lost-segments"] and bench.server.told_lost
        bench.chain.seal()
        await bench.until(lambda: bench.server.tip == bench.chain.tip, "the history after that")


async def test_a_newer_generation_of_ours_and_one_of_the_other_side(bench: Bench) -> None:
    async with bench.running():
        bench.chain.seal()
        await bench.until(lambda: not bench.spool.entries, "the first one")
        bench.server.tip = Position.genesis(MACHINE, 2, bench.chain.tip)
        bench.server.digests.clear()
        bench.chain.seal()
        await bench.until(lambda: bench.events == ["server-tip"], "the new generation")
        bench.chain.seal()
        await bench.until(lambda: bench.server.tip == bench.chain.tip, "the history after that")
        bench.server.fenced = True
        bench.server.tip = Position.genesis(MACHINE, 3, bench.chain.tip)
        bench.chain.seal()
        await bench.until(lambda: bench.events[-1] == "superseded", "the end")
        asked = bench.server.asked
        bench.chain.seal()
        bench.pusher.notify()
        await asyncio.sleep(0)
        assert bench.server.asked == asked, "a fenced agent pushes nothing"


async def test_a_fork(bench: Bench, tmp_path: Path) -> None:
    other = Chain(Spool(tmp_path / "other", 1 << 30), bench.server.tip)
    other.spool.open()
    async with bench.running():
        bench.chain.seal()
        await bench.until(lambda: not bench.spool.entries, "the first one")
        other.tip = bench.chain.tip
        theirs = other.seal()
        await bench.server.put_segment(theirs, other.spool.entries[0].path, other.spool.entries[0].segment_bytes)
        bench.chain.seal()
        await bench.until(lambda: bench.events, "the verdict")
        assert bench.events == ["position-fork"]


def test_standing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", 1 << 30)
    spool.open()
    made = Chain(spool, Position.genesis(MACHINE, 4, None))
    positions = [made.tip, *(made.seal() for _ in range(4))]
    entries = list(spool.entries)

    def standing(tip: Position, spooled: int = 0, fenced: bool = False) -> Standing:
        state = wire.MachineState(
            machine="",
            name="",
            generation=tip.generation,
            tip=str(tip),
            recovery_point=None,
            fuzzy=False,
            fenced=fenced,
            disks=[],
        )
        return compare(state, positions[-1], entries[spooled:])

    assert [standing(tip) for tip in positions] == [Standing.CONTINUES] * 5
    assert standing(positions[2], spooled=2) is Standing.CONTINUES
    # What it has acknowledged is not there any more: an older copy was restored.
    assert standing(positions[1], spooled=2) is Standing.LOST
    assert standing(positions[-1], spooled=4) is Standing.CONTINUES
    assert standing(positions[0], spooled=4) is Standing.LOST
    assert standing(Position(4, 2, bytes(32))) is Standing.DIVERGED
    assert standing(Position(4, 9, bytes(32))) is Standing.DIVERGED
    assert standing(Position(5, 0, bytes(32))) is Standing.DIVERGED
    assert standing(Position(3, 9, bytes(32))) is Standing.LOST
    assert standing(Position(5, 0, bytes(32)), fenced=True) is Standing.SUPERSEDED
