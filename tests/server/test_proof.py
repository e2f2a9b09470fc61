"""Verification, repair, comparison and reseeding through the real server: TLS, store, websockets."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest

from cdp.server import messages as m
from cdp.server import proof_messages as pm
from cdp.server.config import Verify
from cdp.store import ImageReader
from journal import wire
from journal.comparison import Comparison, digest, part_bytes_for
from journal.errors import CdpError
from journal.position import Position
from tests.harness.wait import wait_until_async
from tests.server.peers import connected
from tests.server.running import DISKS, Client, Running, Writer, running
from tests.store.test_damage import flip


async def proven(server: Running, path: str, **body: Any) -> dict[str, Any]:
    """Begin, and wait for the end."""
    await server.operator.ask("POST", path, body)
    machine = server.server.store.machine("db1").uuid
    proofs = server.server.verification, server.server.comparisons
    await wait_until_async(
        lambda: proofs[0].running(machine) is None and proofs[1].running(machine)[1] is None, 30, "the end of the proof"
    )
    last: dict[str, Any] = (await server.operator.ask("GET", path))["last"]
    return last


async def filled(server: Running, seconds: int = 5) -> tuple[str, Client, Writer]:
    machine, agent = await server.protected()
    writer = Writer(machine)
    for second in range(seconds):
        data = bytes([second + 1]) * 8192
        raw = writer.seal([(0, 65536 * second, data), (1, 4096 * second, data[:4096])], sealed_at_s=1000.0 + second)
        await agent.put(machine, writer.tip, raw)
    return machine, agent, writer


async def verified(server: Running, **body: Any) -> pm.VerifyReport:
    report = await proven(server, pm.VERIFY.format(name="db1"), **body)
    report["damages"] = [pm.DamageLine(**line) for line in report["damages"]]
    return pm.VerifyReport(**report)


def damage_segment(server: Running, machine: str, seq: int) -> None:
    """In the middle of its payload."""
    store = server.server.store
    entry = store.entry(store.state(uuid.UUID(machine)), 1, seq)
    assert entry is not None
    flip(store.pool.path(entry.file), entry.offset + 128 + 256 + entry.header.table_bytes + 3)


async def test_what_is_found_is_told_kept_measured_and_stops_the_feed(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, _, _ = await filled(server)
        clean = await verified(server)
        assert clean.success and clean.segments == 5 and clean.index_rows > 5
        damage_segment(server, machine, 3)
        report = await verified(server)
        assert not report.success and report.damaged == 1
        (line,) = report.damages
        assert (line.kind, line.first_s, line.until_s) == ("segment", 1002.0, None)
        status = await server.operator.ask("GET", m.MACHINE.format(name="db1"))
        assert status["proof"]["damaged"] == 1 and any("damages" in problem for problem in status["problems"])
        metrics = (await server.operator.raw("/metrics")).decode()
        assert 'cdp_verify_last_success{machine="db1"} 0.0' in metrics
        genesis = str(Position.genesis(uuid.UUID(machine), 1, None))
        feed = wire.FEED.format(machine=machine)
        first = await server.operator.ask("GET", feed, after=genesis, until="tip")
        assert len(first["entries"]) == 2
        after = first["entries"][-1]["position"]
        assert (await server.operator.ask("GET", feed, after=after, until="tip"))["restart"]
    async with running(tmp_path) as server:
        again = await server.operator.ask("GET", pm.VERIFY.format(name="db1"))
        assert again["last"]["damaged"] == 1


async def test_the_source_is_asked_for_exactly_what_is_lost_and_then_all_is_well(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    async def resync(args: dict[str, Any]) -> dict[str, Any]:
        asked.append(args)
        return {}

    async with running(tmp_path) as server:
        machine, agent, writer = await filled(server)
        damage_segment(server, machine, 3)
        async with connected(server, agent, machine, verbs={"resync": resync}):
            report = await verified(server, repair=True)
        assert "again" in report.repair
        assert asked == [{"reason": "repair", "ranges": [[0, 131072, 8192], [1, 8192, 4096]]}]
        # A comparison finds no digest for what cannot be read, and so sends it; here the repair itself.
        raw = writer.seal([(0, 131072, b"x" * 8192), (1, 8192, b"y" * 4096)], sealed_at_s=1010.0)
        await agent.put(machine, writer.tip, raw)
        healed = await verified(server)
        (line,) = healed.damages
        assert (line.first_s, line.until_s, line.lost_bytes) == (1002.0, 1010.0, 0)
        with ImageReader(server.server.store, uuid.UUID(machine), writer.tip) as image:
            assert image.read(0, 131072, 8192) == b"x" * 8192


async def test_digests_of_what_cannot_be_read_match_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent, _ = await filled(server)
        damage_segment(server, machine, 3)
        raw = await agent.raw(wire.HASHES.format(machine=machine), disk=0, offset=0, length=5 * 65536, chunk=65536)
        digests = [raw[at : at + 32] for at in range(0, len(raw), 32)]
        assert [digest == b"\xff" * 32 for digest in digests] == [False, False, True, False, False]


async def test_a_record_whose_segment_is_whole_is_mended_in_place(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, _, _ = await filled(server)
        store = server.server.store
        entry = store.entry(store.state(uuid.UUID(machine)), 1, 2)
        assert entry is not None
        flip(store.pool.path(entry.file), entry.offset + 20)
        report = await verified(server, repair=True)
        assert "written anew" in report.repair
        assert (await verified(server)).success


async def test_machines_are_verified_in_the_background(tmp_path: Path) -> None:
    async with running(tmp_path, verify=Verify(mb_per_s_max=0, interval_h=1e-9)) as server:
        await filled(server)
        watching = asyncio.create_task(server.server.verification.watch())
        known = server.server.verification
        machine = server.server.store.machine("db1").uuid
        await wait_until_async(lambda: known.last(machine) is not None, 10, "a verification")
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def told(server: Running, machine: str, position: Position) -> Comparison:
    """What an honest source would tell of the store's own image."""
    part = part_bytes_for(sum(disk.size_bytes for disk in DISKS))
    digests = {}
    with ImageReader(server.server.store, uuid.UUID(machine), position) as image:
        for disk in DISKS:
            parts = range(0, disk.size_bytes, part)
            digests[disk.index] = b"".join(digest(memoryview(image.read(disk.index, at, part))) for at in parts)
    sizes = {disk.index: disk.size_bytes for disk in DISKS}
    return Comparison(position=str(position), part_bytes=part, sizes=sizes, digests=digests, unsettled=[])


async def compared(server: Running, proof: Comparison, machine: str, agent: Client) -> dict[str, Any]:
    async def compare(args: dict[str, Any]) -> dict[str, Any]:
        if not args.get("finish"):
            return {"calm": True, "rounds": 1, "done_bytes": 0}
        path = wire.COMPARISON.format(machine=machine, comparison=args["comparison"])
        async with agent.session.put(path, data=proof.encode()) as got:
            assert got.status == 200
        return {"position": proof.position}

    async with connected(server, agent, machine, verbs={"compare": compare}):
        return await proven(server, pm.COMPARE.format(name="db1"))


async def test_the_store_is_compared_with_what_the_source_tells(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent, writer = await filled(server)
        proof = told(server, machine, writer.tip)
        same = await compared(server, proof, machine, agent)
        assert same["success"] and same["differing_bytes"] == 0, same
        proof.digests[0] = b"\x01" * 32 + proof.digests[0][32:]
        other = await compared(server, proof, machine, agent)
        assert not other["success"] and "cdp verify --repair" in other["remedy"]
        assert other["differing"] == [{"with_what": "source", "disk": 0, "offset": 0, "length": 65536}]
        proof.unsettled.append((0, 0, 65536))
        proof.digests[0] = bytes(32) + proof.digests[0][32:]
        unsettled = await compared(server, proof, machine, agent)
        assert unsettled["success"] and unsettled["unsettled_bytes"] == 65536
        status = await server.operator.ask("GET", m.MACHINE.format(name="db1"))
        assert status["proof"]["compare_success"]


async def test_without_its_agent_nothing_is_compared(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        await filled(server)
        with pytest.raises(CdpError) as refused:
            await server.operator.ask("POST", pm.COMPARE.format(name="db1"), {})
        assert refused.value.remedy


async def test_a_standby_that_has_to_be_compared_gets_no_cursor_until_it_begins(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent, writer = await filled(server)
        known = uuid.UUID(machine)
        server.server.store.set_cursor(known, "standby", writer.tip)
        beyond = Position(1, 99, bytes(32))
        await agent.ask("POST", wire.LOST.format(machine=machine), {"acknowledged": str(writer.tip)})
        assert not server.server.reseeds.pending(known)  # that one is here
        await agent.ask("POST", wire.LOST.format(machine=machine), {"acknowledged": str(beyond)})
    async with running(tmp_path) as server:
        path = wire.CURSOR.format(machine=machine, consumer="standby")
        issued = server.server.auth.issue("pe", known, "db1")
        pe = server.client(wire.authorization(issued.credential, issued.secret))
        assert (await pe.ask("GET", path))["position"] is None
        feed = wire.FEED.format(machine=machine)
        assert (await pe.ask("GET", feed, after=str(writer.tip)))["restart"]
        with pytest.raises(CdpError) as refused:
            await pe.ask("PUT", path, {"position": str(writer.tip)})
        assert refused.value.code == "history-changed"
        await pe.ask("PUT", path, {"position": None})
        await pe.ask("PUT", path, {"position": str(writer.tip)})
        assert (await pe.ask("GET", path))["position"] == str(writer.tip)
        assert not (await pe.ask("GET", feed, after=str(writer.tip)))["restart"]
