"""Everything that comes from outside and is not a segment: paths, parameters, bodies; and /metrics."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import ssl
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from blockbuster import blockbuster_ctx

from cdp.server import messages as m
from cdp.server.app import Server, _is_loopback
from cdp.server.config import Config
from cdp.server.errors import ListenFailed
from cdp.server.http import JSON_BODY_BYTES_MAX
from cdp.store import Store
from cdp.store.errors import StoreLocked
from journal import wire
from journal.position import Position
from tests.harness.wait import wait_until_async
from tests.server.peers import AGENT_REPORT, connected
from tests.server.running import MemoryTarget, Writer, running

ODD = [
    "",
    "0",
    "-1",
    "1.5",
    "1e3",
    "٣",
    "99999999999999999999999999",
    "NaN",
    "inf",
    "\x00",
    "a" * 2000,
    "' OR 1=1",
    "../../etc/passwd",
    "00000001-0000000000000001-" + "0" * 64,
    "ffffffff-ffffffffffffffff-" + "f" * 64,
]


async def test_odd_parameters_are_refused_and_nothing_breaks(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    rng = random.Random(seed)
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        writer = Writer(machine)
        raw = writer.seal([(0, 0, b"x" * 4096)])
        await agent.put(machine, writer.tip, raw)
        names = {
            wire.FEED: ("after", "until", "wait_s"),
            wire.IMAGE: ("at", "disk", "offset", "length"),
            wire.HASHES: ("disk", "offset", "length", "chunk"),
            m.POINTS: ("from", "to"),
            m.POINT: ("at",),
            m.AUDIT: ("limit",),
        }
        good = {"after": str(writer.tip), "at": str(writer.tip), "disk": "0", "offset": "0", "length": "4096"}
        good |= {"chunk": "4096", "until": "tip", "wait_s": "0", "from": "0", "to": "10", "limit": "5"}
        for _ in range(250):
            path = rng.choice(list(names))
            query = [(name, good[name]) for name in names[path] if rng.random() < 0.9]
            query += [(rng.choice(names[path]), rng.choice(ODD)) for _ in range(rng.randint(0, 2))]
            rng.shuffle(query)
            target = path.format(machine=machine, name="db1")
            async with server.operator.session.get(target, params=query) as got:
                await check(got)
        for path in (wire.MACHINE, wire.SEGMENT, wire.CURSOR, m.MACHINE, m.TAKEOVER):
            for odd in ODD:
                filled = path.format(machine=odd, generation=odd, seq=odd, consumer=odd, name=odd, id=odd)
                async with server.operator.session.get(filled) as got:
                    assert got.status in range(400, 500) or path == m.MACHINE, (filled, got.status)
                    await check(got)


async def check(got: aiohttp.ClientResponse) -> None:
    """Any refusal is typed, with a remedy, and never an internal error."""
    body = await got.read()
    assert got.status < 500, (got.url, body)
    if got.status >= 400:
        assert got.content_type == "application/json", (got.url, got.status, body)
        told = json.loads(body)
        assert told["code"]
        assert told["sentence"]
        assert told["remedy"], (got.url, told)


BODIES = [b"", b"{", b"null", b"[]", b'"x"', b"{}", b'{"name":1}', b'{"name":"x","extra":1}', b"\xff", b"[" * 50_000]


async def test_odd_bodies_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        await server.protected()
        for method, path in (
            ("POST", wire.JOIN),
            ("POST", m.MACHINES),
            ("PUT", m.PROTECTION.format(name="db1")),
            ("POST", m.STANDBY.format(name="db1")),
            ("POST", m.MACHINE_TAKEOVERS.format(name="db1")),
        ):
            for body in BODIES:
                async with server.operator.session.request(method, path, data=body) as got:
                    assert got.status < 500
                    if body not in {b"", b"{}"}:
                        assert got.status == 400, (path, body[:20], got.status)
            huge = b" " * (JSON_BODY_BYTES_MAX + 1)
            async with server.operator.session.request(method, path, data=io.BytesIO(huge)) as got:
                assert got.status == 413


@pytest.mark.parametrize(
    "change",
    [
        {"service_addresses": ["10.0.0.5"]},
        {"service_addresses": ["10.0.0.5/24", "10.0.0.5/16"]},
        {"probes": [{"kind": "tcp", "port": 0}]},
        {"probes": [{"kind": "http", "port": 80, "path": "/\r\nX: y"}]},
        {"quiesce": "format"},
        {"silence_s": -1},
        {"deadlines": {"drain": 0}},
        {"standby": {"hypervisor": "x", "bridge": "br 0; rm", "management_address": "10.0.0.6/24"}},
        {"standby": {"hypervisor": "x", "bridge": "br0", "management_address": "10.0.0.6/24", "memory_bytes": 1}},
    ],
)
async def test_a_bad_specification_is_refused_when_it_is_given(tmp_path: Path, change: dict[str, Any]) -> None:
    async with running(tmp_path) as server:
        await server.protected()
        before = await server.operator.ask("GET", m.PROTECTION.format(name="db1"))
        with pytest.raises(Exception, match="not valid") as caught:
            await server.operator.ask("PUT", m.PROTECTION.format(name="db1"), change)
        assert getattr(caught.value, "code", "") == "bad-request"
        assert await server.operator.ask("GET", m.PROTECTION.format(name="db1")) == before


async def test_unknown_paths_and_methods_are_typed_too(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for method, path, status in (("GET", "/", 404), ("GET", "/v1/none", 404), ("DELETE", wire.CA, 405)):
            async with server.operator.session.request(method, path) as got:
                assert (got.status, json.loads(await got.read())["code"]) == (status, "bad-request")


async def test_garbage_instead_of_tls_or_http_does_no_harm(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        rng = random.Random(7)
        context = ssl.create_default_context(cadata=server.ca_pem)
        for number in range(20):
            tls = context if number % 2 else None
            _, writer = await asyncio.open_connection("127.0.0.1", server.server.port, ssl=tls)
            writer.write(rng.randbytes(rng.randint(1, 3000)) + b"\r\n\r\n")
            writer.close()
        assert (await server.operator.ask("GET", m.VERSION))["version"]


async def test_metrics_have_the_promised_names(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected(
            standby={"hypervisor": "memory:///", "bridge": "br0", "management_address": "192.0.2.6/24"}
        )
        writer = Writer(machine)
        raw = writer.seal([(0, 0, b"x" * 4096)])
        await agent.put(machine, writer.tip, raw)
        server.server.store.set_cursor(uuid.UUID(machine), "standby", writer.tip)
        async with connected(server, agent, machine) as peer:
            await peer.report(
                msgspec.structs.replace(
                    AGENT_REPORT,
                    sealed_at_s=1.0,
                    captured_at_s=2.0,
                    resyncs={"ring-full": 3},
                    cpu_s=1.5,
                    lost_events=9,
                    progress=wire.Progress(what="resync", done_bytes=1, total_bytes=2, eta_s=3.0),
                )
            )
            hub, key = server.server.hub, uuid.UUID(machine)
            await wait_until_async(lambda: hub.state(key, "agent").report is not None, 5, "the report")
            async with server.client().session.get("/metrics") as got:
                text = await got.text()
                assert got.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for line in (
        'cdp_replication_lag_seconds{machine="db1",stage="sealed"}',
        'cdp_replication_lag_seconds{machine="db1",stage="stored"}',
        'cdp_replication_lag_seconds{machine="db1",stage="applied"}',
        'cdp_backlog_bytes{machine="db1",stage="applied"} 0.0',
        'cdp_backlog_eta_seconds{machine="db1",what="resync"} 3.0',
        'cdp_last_sealed_timestamp_seconds{machine="db1"} 1.0',
        'cdp_last_stored_timestamp_seconds{machine="db1"}',
        'cdp_last_applied_timestamp_seconds{machine="db1"}',
        'cdp_capture_lost_events_total{machine="db1"} 9.0',
        'cdp_resync_total{machine="db1",reason="ring-full"} 3.0',
        'cdp_journal_bytes{machine="db1"}',
        'cdp_journal_oldest_timestamp_seconds{machine="db1"}',
        'cdp_fuzzy{machine="db1"} 0.0',
        'cdp_standby_ready{machine="db1"} 0.0',
        'cdp_agent_cpu_seconds_total{machine="db1"} 1.5',
        'cdp_agent_resident_memory_bytes{machine="db1"}',
        "cdp_ingest_bytes_total",
        "cdp_ingest_store_seconds_bucket",
    ):
        assert line in text, line


@pytest.mark.parametrize(
    ("remote", "local"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("127.9.9.9", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("fe80::1%eth0", False),
        (None, False),
    ],
)
def test_only_this_host_reads_metrics_without_a_credential(remote: str | None, local: bool) -> None:
    assert _is_loopback(remote) is local


async def test_nothing_blocks_the_loop(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        with blockbuster_ctx():
            machine, agent = await server.protected()
            writer = Writer(machine)
            genesis: Position = writer.tip
            raw = writer.seal([(0, 0, b"x" * 65536)])
            await agent.put(machine, writer.tip, raw)
            await server.operator.ask("GET", wire.FEED.format(machine=machine), after=genesis, until="tip")
            await server.operator.raw(wire.SEGMENT.format(machine=machine, generation=1, seq=1))
            await server.operator.raw(wire.IMAGE.format(machine=machine), at=writer.tip, disk=0, offset=0, length=65536)
            await server.operator.ask("GET", m.MACHINES)
            await server.operator.ask("POST", m.MACHINE_TAKEOVERS.format(name="db1"), {"mode": "planned"})
            async with connected(server, agent, machine) as peer:
                await peer.report(AGENT_REPORT)
            async with server.client().session.get("/metrics") as got:
                assert got.status == 200
            await server.operator.ask("POST", m.MACHINES, {"name": "db2"})
            await server.operator.ask("DELETE", m.MACHINE.format(name="db2"))


async def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    async with running(tmp_path / "one") as server:
        config = Config(directory=str(tmp_path / "two"), listen=("127.0.0.1",), port=server.server.port)
        with pytest.raises(ListenFailed) as caught:
            async with Server(config, MemoryTarget()):
                pass
        assert "listen" in caught.value.remedy


async def test_there_is_one_server_of_a_directory(tmp_path: Path) -> None:
    async with running(tmp_path):
        with pytest.raises(StoreLocked):
            async with Server(Config(directory=str(tmp_path), listen=("127.0.0.1",), port=0), MemoryTarget()):
                pass
    with Store.open(tmp_path / "store", file_bytes=80 << 20, map_bytes=1 << 30):
        pass
