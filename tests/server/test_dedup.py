"""Asking before a first seed, over the real server: what is known is laid, a standby waits for the end of it, and it
can be switched off."""

from __future__ import annotations

import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cdp.agent.client import Client as AgentClient
from cdp.agent.dedup import Asker, settled_state
from cdp.agent.dirty import Geometry
from cdp.agent.status import Status
from cdp.server.config import Dedup
from cdp.store import ImageReader
from journal import proof, wire
from journal.errors import PrefillClosed, PrefillUnsettled
from journal.proof import CHUNK_BYTES
from tests.server.running import DISKS, Client, Running, Writer, running

CONTENT = os.urandom(20 * CHUNK_BYTES)


async def first_machine(server: Running) -> None:
    """With content, and hints of it."""
    machine, agent = await server.protected("first")
    writer = Writer(machine)
    raw = writer.seal([(0, 0, CONTENT)])
    await agent.put(machine, writer.tip, raw)
    dedup = server.server.prefills.dedup
    assert dedup is not None
    dedup.refresh(threading.Event())


async def pe_of(server: Running, machine: str) -> Client:
    issued = server.server.auth.issue("pe", uuid.UUID(machine), "pe")
    return server.client(wire.authorization(issued.credential, issued.secret))


async def test_what_another_machine_has_is_laid_below_a_new_one(tmp_path: Path) -> None:
    async with running(tmp_path / "server") as server:
        assert (await server.protected("alone"))[0]
        await first_machine(server)
        machine, agent = await server.protected("second")
        (tmp_path / "ca.pem").write_text(server.ca_pem)
        paths = [tmp_path / "vda", tmp_path / "vdb"]
        for path, disk in zip(paths, DISKS, strict=True):
            with path.open("wb") as file:
                file.truncate(disk.size_bytes)
        with paths[0].open("r+b") as file:
            file.seek(CHUNK_BYTES)
            file.write(CONTENT[: 10 * CHUNK_BYTES] + os.urandom(CHUNK_BYTES))
        pe = await pe_of(server, machine)
        hashes = {"disk": 0, "offset": 0, "length": 16 * CHUNK_BYTES, "chunk": CHUNK_BYTES}
        with pytest.raises(PrefillUnsettled):
            await pe.raw(wire.HASHES.format(machine=machine), **hashes)

        async with AgentClient(server.url, machine, dict(agent.session.headers), tmp_path / "ca.pem") as client:
            assert (await client.state()).prefill == "open"
            with ThreadPoolExecutor(1) as worker:
                disks = [Geometry(disk.index, disk.size_bytes, 64 << 10) for disk in DISKS]
                status = Status(boot_id="boot")
                asker = Asker(client, disks, dict(enumerate(paths)), status=status, worker=worker, bytes_per_s_max=0)
                await asker.run()
            assert (await settled_state(client)).prefill == "filled"
            with pytest.raises(PrefillClosed):
                await client.begin_prefill()
            assert (await client.end_prefill()).prefill == "filled"
        laid = await pe.raw(wire.HASHES.format(machine=machine), **hashes)
        assert [laid[at : at + 32] != bytes(32) for at in range(0, len(laid), 32)] == [False] + [True] * 10 + [
            False
        ] * 5
        store = server.server.store
        with ImageReader(store, uuid.UUID(machine), store.live(uuid.UUID(machine))) as image:
            assert image.read(0, CHUNK_BYTES, 10 * CHUNK_BYTES) == CONTENT[: 10 * CHUNK_BYTES]
        metrics = (await server.operator.raw("/metrics")).decode()
        assert f'cdp_dedup_bytes_total{{machine="{machine}"}} {10.0 * CHUNK_BYTES}' in metrics


async def test_odd_requests_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        await first_machine(server)
        machine, agent = await server.protected("second")
        path = wire.PREFILL.format(machine=machine)
        key = (await agent.ask("POST", path))["key"]
        good = proof.entry(0, memoryview(CONTENT)[:CHUNK_BYTES], bytes.fromhex(key))
        beyond = proof.entry(DISKS[0].size_bytes // CHUNK_BYTES, memoryview(CONTENT)[:CHUNK_BYTES], bytes.fromhex(key))

        async def put(body: bytes, **query: str) -> int:
            async with agent.session.put(path, data=body, params={"key": key, "disk": "0"} | query) as answer:
                await answer.read()
                return answer.status

        assert await put(good) == 200
        assert await put(b"") == 200
        for body, query in (
            (good[:-1], {}),
            (good + good, {}),
            (beyond, {}),
            (good, {"disk": "7"}),
            (good, {"disk": "-1"}),
            (good, {"key": "zz"}),
            (good, {"key": "00"}),
        ):
            assert await put(body, **query) == 400
        assert await put(good, key="00" * 32) == 409
        assert await put(bytes(1 << 20)) == 413
        other, stranger = await server.protected("third")
        async with stranger.session.post(path) as answer:
            assert answer.status == 403
        assert other != machine


async def test_switched_off_nobody_asks(tmp_path: Path) -> None:
    async with running(tmp_path, dedup=Dedup(enabled=False)) as server:
        machine, agent = await server.protected("second")
        assert (await agent.ask("GET", wire.MACHINE.format(machine=machine)))["prefill"] == "none"
        with pytest.raises(PrefillClosed):
            await agent.ask("POST", wire.PREFILL.format(machine=machine))
