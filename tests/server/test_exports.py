"""Exports over HTTPS: what is held, for how long, over a restart, and how odd requests are refused."""

from __future__ import annotations

import uuid
from array import array
from pathlib import Path

import pytest

from cdp.server import export_messages as x
from cdp.server.errors import ExportDiffers, UnknownExport
from cdp.server.exports import PREFIX, Exports
from cdp.store.errors import UnknownPosition
from journal.errors import BadRequest, Forbidden, NoRecoveryPoint
from journal.segment import Flags
from tests.server.running import DISKS, Running, Writer, running

ID = "0123456789abcdef"
KB = 1024


def path(kind: str = x.EXPORT, export: str = ID) -> str:
    return kind.format(name="db1", id=export)


async def seeded(server: Running) -> tuple[str, Writer]:
    machine, agent = await server.protected()
    writer = Writer(machine)
    raw = writer.seal([(0, 8 * KB, b"a" * 4 * KB)])
    await agent.put(machine, writer.tip, raw)
    return machine, writer


def cursors(server: Running, machine: str) -> list[str]:
    return [one.consumer for one in server.server.store.cursors(uuid.UUID(machine))]


async def extents(server: Running, **query: int) -> list[tuple[int, bool]]:
    packed = array("Q")
    packed.frombytes(await server.operator.raw(path(x.EXPORT_EXTENTS), **query))
    return [(word & ~x.HOLE, bool(word & x.HOLE)) for word in packed]


async def test_an_export_is_read_held_and_ended(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, writer = await seeded(server)
        at = writer.tip
        told = await server.operator.ask("PUT", path(), {"position": str(at)})
        assert (told["machine"], told["id"], len(told["disks"])) == (machine, ID, 2)
        assert cursors(server, machine) == [PREFIX + ID]
        body = await server.operator.raw(path(x.EXPORT_DATA), disk=0, offset=8 * KB - 3, length=9)
        assert body == bytes(3) + b"a" * 6
        size = DISKS[0].size_bytes
        assert await extents(server, disk=0, offset=0, length=size) == [
            (8 * KB, True),
            (4 * KB, False),
            (size - 12 * KB, True),
        ]
        with pytest.raises(ExportDiffers):
            await server.operator.ask("PUT", path(), {"position": str(writer_genesis(server, machine))})
        await server.operator.ask("DELETE", path())
        assert cursors(server, machine) == []
        with pytest.raises(UnknownExport):
            await server.operator.raw(path(x.EXPORT_DATA), disk=0, offset=0, length=1)


def writer_genesis(server: Running, machine: str) -> object:
    return server.server.store.generations(uuid.UUID(machine))[0].genesis(uuid.UUID(machine))


async def test_an_export_goes_on_after_a_restart_or_ends_when_nobody_comes_back(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, writer = await seeded(server)
        await server.operator.ask("PUT", path(), {"position": str(writer.tip)})
        await server.operator.ask("PUT", path(export="f" * 16), {"position": str(writer.tip)})
    async with running(tmp_path) as server:
        assert await server.operator.raw(path(x.EXPORT_DATA), disk=0, offset=8 * KB, length=4) == b"aaaa"
        later_s = [x.LEASE_S + 1.0]
        again = Exports(server.server.store, server.server.workers, None, clock_s=lambda: later_s[0])  # type: ignore[arg-type]
        await again.start()
        await again.expire()
        assert len(cursors(server, machine)) == 2
        later_s[0] *= 3
        await again.expire()
        assert cursors(server, machine) == []


async def test_only_recovery_points_of_the_machine_are_exported_and_only_to_operators(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        writer = Writer(machine)
        raw = writer.seal([(0, 0, b"a" * 4 * KB)], Flags.FUZZY)
        await agent.put(machine, writer.tip, raw)
        with pytest.raises(NoRecoveryPoint):
            await server.operator.ask("PUT", path(), {"position": str(writer.tip)})
        with pytest.raises(UnknownPosition):
            await server.operator.ask("PUT", path(), {"position": str(Writer(str(uuid.uuid4())).tip)})
        for odd in ("UPPERCASE1", "short", "a" * 33, "..%2f..%2fetc"):
            with pytest.raises(BadRequest):
                await server.operator.ask("PUT", path(export=odd), {"position": str(writer.tip)})
        with pytest.raises(Forbidden):
            await agent.raw(path(x.EXPORT_DATA), disk=0, offset=0, length=1)
        await server.operator.ask("PUT", path(), {"position": str(writer_genesis(server, machine))})
        for query in (
            {"disk": 0, "offset": 1, "length": 512},
            {"disk": 0, "offset": 0, "length": 513},
            {"disk": 0, "offset": -1, "length": 512},
        ):
            with pytest.raises(BadRequest):
                await extents(server, **query)
        with pytest.raises(BadRequest):
            await server.operator.raw(path(x.EXPORT_DATA), disk=0, offset=0, length=x.DATA_BYTES_MAX + 1)
