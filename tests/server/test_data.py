"""Segments in, feed and images out, over real TLS."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

from cdp.store.errors import UnknownPosition
from journal import wire
from journal.decoder import decode
from journal.errors import (
    BadRequest,
    CdpError,
    ForeignSegment,
    NotProtected,
    PositionFork,
    PositionGap,
    SegmentDamaged,
    StaleGeneration,
    Unauthorized,
)
from journal.position import Position
from journal.segment import SEGMENT_BYTES_MAX, Flags
from tests.server.running import Client, Running, Writer, running


async def test_what_is_put_is_served_unchanged(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        writer = Writer(machine)
        raw = writer.seal([(0, 4096, b"a" * 4096), (1, 0, b"b" * 512)])
        stored = await agent.put(machine, writer.tip, raw)
        assert (stored.position, stored.duplicate) == (str(writer.tip), False)
        again = await agent.put(machine, writer.tip, raw)
        assert (again.position, again.duplicate) == (str(writer.tip), True)
        path = wire.SEGMENT.format(machine=machine, generation=1, seq=1)
        assert await server.operator.raw(path) == bytes(raw)
        image = decode(
            await server.operator.raw(wire.IMAGE.format(machine=machine), at=writer.tip, disk=0, offset=0, length=8192)
        )
        assert [(offset, bytes(data or b"")) for _, offset, _, _, data in image.writes()] == [(4096, b"a" * 4096)]
        state = msgspec.convert(await agent.ask("GET", wire.MACHINE.format(machine=machine)), wire.MachineState)
        assert (state.tip, state.fuzzy, state.fenced) == (str(writer.tip), False, False)
        assert state.recovery_point == str(writer.tip)


async def test_large_segments_pass(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(32 << 20)
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        writer = Writer(machine)
        raw = writer.seal([(0, 0, noise)])
        await agent.put(machine, writer.tip, raw)
        assert await server.operator.raw(wire.SEGMENT.format(machine=machine, generation=1, seq=1)) == bytes(raw)


async def test_hashes_tell_zeros_apart(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        writer = Writer(machine)
        raw = writer.seal([(0, 65536, b"x" * 65536)])
        await agent.put(machine, writer.tip, raw)
        got = await agent.raw(wire.HASHES.format(machine=machine), disk=0, offset=0, length=131072, chunk=65536)
        assert got == bytes(32) + blake3(b"x" * 65536).digest()


async def test_the_feed_lists_whole_runs_and_wakes_up(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        writer = Writer(machine)
        genesis = writer.tip

        async def feed(after: Position, until: str, wait_s: float = 0.0) -> wire.FeedAnswer:
            answer = await server.operator.ask(
                "GET", wire.FEED.format(machine=machine), after=after, until=until, wait_s=wait_s
            )
            return msgspec.convert(answer, wire.FeedAnswer)

        first = writer.seal([(0, 0, b"1" * 512)])
        await agent.put(machine, writer.tip, first)
        point = writer.tip
        await agent.put(machine, *_next(writer, Flags.CONTINUES))
        await agent.put(machine, *_next(writer, Flags.FUZZY))
        assert [entry.recovery_point for entry in (await feed(genesis, "tip")).entries] == [True, False, False]
        listed = await feed(genesis, "recovery-point")
        assert [entry.position for entry in listed.entries] == [str(point)]
        assert listed.tip == str(writer.tip)
        waiting = asyncio.create_task(feed(point, "recovery-point", 10.0))
        raw_closing = writer.seal([(0, 512, b"2" * 512)])
        started = time.monotonic()
        await agent.put(machine, writer.tip, raw_closing)
        woken = await waiting
        assert time.monotonic() - started < 5
        assert [entry.recovery_point for entry in woken.entries] == [False, False, True]
        assert (await feed(writer.tip, "tip", 0.2)).entries == []
        stranger = Position(1, 2, bytes(32))
        assert (await feed(stranger, "tip")).restart


def _next(writer: Writer, flags: Flags) -> tuple[Position, bytearray]:
    raw = writer.seal([(0, 1024, b"f" * 512)], flags)
    return writer.tip, raw


async def test_a_cursor_is_kept_and_forgotten(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        writer = Writer(machine)
        raw = writer.seal()
        await agent.put(machine, writer.tip, raw)
        issued = server.server.auth.issue("pe", uuid.UUID(machine), "pe")
        pe = server.client(wire.authorization(issued.credential, issued.secret))
        path = wire.CURSOR.format(machine=machine, consumer="standby")
        assert await pe.ask("GET", path) == {"position": None}
        await pe.ask("PUT", path, {"position": str(writer.tip)})
        assert await pe.ask("GET", path) == {"position": str(writer.tip)}
        await pe.ask("PUT", path, {"position": None})
        assert await pe.ask("GET", path) == {"position": None}
        with pytest.raises(UnknownPosition):
            await pe.ask("PUT", path, {"position": str(Position(1, 9, bytes(32)))})


class Refusals:
    """Each refusal must carry a sentence and a remedy, and leave the history as it was."""

    def __init__(self, server: Running, machine: str, agent: Client) -> None:
        self.server, self.machine, self.agent = server, machine, agent

    async def expect(self, error: type[CdpError], position: Position, raw: bytes | bytearray) -> None:
        before = self.server.server.store.live(uuid.UUID(self.machine))
        with pytest.raises(error) as caught:
            await self.agent.put(self.machine, position, raw)
        assert caught.value.sentence
        assert caught.value.remedy
        assert self.server.server.store.live(uuid.UUID(self.machine)) == before


async def test_every_bad_segment_is_refused_by_name(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        refused = Refusals(server, machine, agent)
        writer = Writer(machine)
        raw = writer.seal([(0, 0, b"one" * 512 + b"x" * 512)])
        await agent.put(machine, writer.tip, raw)
        first = writer.tip
        good = writer.seal([(0, 0, b"n" * 4096)])
        second = writer.tip

        await refused.expect(SegmentDamaged, second, good[:-1])
        await refused.expect(SegmentDamaged, second, good[:100])
        for at in (5, 100, 250, 256, 300, len(good) - 1):
            flipped = bytearray(good)
            flipped[at] ^= 0x40
            await refused.expect(SegmentDamaged, second, flipped)
        third = writer.seal()
        await refused.expect(PositionGap, writer.tip, third)
        fork = Writer(machine)
        forked = fork.seal([(0, 0, b"z" * 512)])
        await refused.expect(PositionFork, fork.tip, forked)
        foreign = Writer(str(uuid.uuid4()))
        await refused.expect(ForeignSegment, Position(1, 2, bytes(32)), _second(foreign))
        await refused.expect(BadRequest, Position(1, 7, bytes(32)), good)
        server.server.store.start_generation(uuid.UUID(machine), first, "test")
        await refused.expect(StaleGeneration, second, good)


def _second(writer: Writer) -> bytearray:
    writer.seal()
    return writer.seal()


async def test_nothing_is_read_before_its_length_is_known(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        path = wire.SEGMENT.format(machine=machine, generation=1, seq=1)

        async def endless() -> AsyncIterator[bytes]:
            yield b"x" * 1024

        async with agent.session.put(path, data=endless()) as got:
            assert (got.status, (await got.json())["code"]) == (400, "bad-request")
        async with agent.session.put(
            path, headers={"Content-Length": str(SEGMENT_BYTES_MAX + 1)}, data=endless()
        ) as got:
            assert (got.status, (await got.json())["code"]) == (413, "body-too-large")


async def test_before_protect_there_is_nothing_to_write_to(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.add_machine()
        with pytest.raises(NotProtected) as caught:
            await agent.ask("GET", wire.MACHINE.format(machine=machine))
        assert "cdp protect" in caught.value.remedy


async def test_a_credential_opens_its_own_doors_only(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        mine, agent = await server.protected("one")
        other, _ = await server.protected("two")
        for path in (wire.MACHINE, wire.FEED, wire.IMAGE, wire.HASHES):
            with pytest.raises(CdpError) as caught:
                await agent.ask("GET", path.format(machine=other))
            assert caught.value.code == "forbidden"
        with pytest.raises(CdpError) as caught:
            await agent.ask("GET", wire.FEED.format(machine=mine))
        assert caught.value.code == "forbidden"
        with pytest.raises(CdpError) as caught:
            await agent.ask("GET", "/v1/operator/machines")
        assert caught.value.code == "forbidden"
        with pytest.raises(Unauthorized):
            await server.client().ask("GET", wire.MACHINE.format(machine=mine))
        with pytest.raises(CdpError) as caught:
            await server.operator.put(mine, Position(1, 1, bytes(32)), bytes(300))
        assert caught.value.code == "forbidden"
