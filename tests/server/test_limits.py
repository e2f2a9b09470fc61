"""Limits over the real server: set, shown, divided, told with answers and over the control channel, and kept by the
agent's own client over loopback."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cdp.agent.client import Client as AgentClient
from cdp.server import limit_messages as m
from journal import wire
from journal.errors import BadRequest
from journal.position import Position
from tests.harness.wait import wait_until_async
from tests.server.peers import AGENT_REPORT, connected
from tests.server.running import Running, Writer, running

MB = 1_000_000


def rule(rate: int, **more: str) -> dict[str, Any]:
    return {"bytes_per_s": rate, **more}


def path(name: str) -> str:
    return m.LIMIT.format(name=name)


async def shown(server: Running) -> m.LimitsAnswer:
    return msgspec.convert(await server.operator.ask("GET", m.LIMITS), m.LimitsAnswer)


@asynccontextmanager
async def telling(server: Running) -> AsyncIterator[None]:
    """The background task of the limits."""
    task = asyncio.create_task(server.server.limits.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_rules_are_kept_replaced_and_removed(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, _ = await server.protected()
        await server.operator.ask("PUT", path("db1"), rule(5 * MB))
        await server.operator.ask("PUT", path("db1"), rule(7 * MB))
        window = {"during": "Mon-Fri  08:00-18:00", "time_zone": "Europe/Berlin"}
        await server.operator.ask("PUT", path(m.TOTAL), rule(9 * MB, **window))
        for wrong in (rule(1), rule(MB, during="never"), rule(MB, during="mon 01:00-02:00", time_zone="Mars/Base")):
            with pytest.raises(BadRequest):
                await server.operator.ask("PUT", path("db1"), wrong)
    async with running(tmp_path) as server:
        found = await shown(server)
        assert [one.bytes_per_s for one in found.machines[0].rules] == [7 * MB]
        assert found.total_rules[0].during == "mon-fri 08:00-18:00"
        assert (await server.operator.ask("DELETE", path(m.TOTAL)))["total_rules"] == []
        with pytest.raises(BadRequest):
            await server.operator.ask("DELETE", path("db1"), during="mon 08:00-18:00")
        await server.operator.ask("DELETE", path("db1"), during="")
        assert (await shown(server)).machines[0].rules == []
        await server.operator.ask("PUT", path("db1"), rule(7 * MB))
        await server.operator.ask("DELETE", "/v1/operator/machines/db1", force=1)
        assert not [key for key in server.server.store.settings.items() if machine in key]


async def test_the_total_is_divided_and_told(tmp_path: Path) -> None:
    told: list[tuple[str, int | None]] = []
    async with running(tmp_path) as server, telling(server):
        names = ("db1", "db2")
        agents = {name: await server.protected(name) for name in names}

        def verbs(name: str) -> dict[str, Any]:
            async def limit(args: dict[str, Any]) -> dict[str, Any]:
                told.append((name, args["bytes_per_s_max"]))
                return {}

            return {"limit": limit}

        async with (
            connected(server, agents["db1"][1], agents["db1"][0], verbs=verbs("db1")) as one,
            connected(server, agents["db2"][1], agents["db2"][0], verbs=verbs("db2")) as two,
        ):
            await server.operator.ask("PUT", path(m.TOTAL), rule(10 * MB))
            await one.report(msgspec.structs.replace(AGENT_REPORT, backlog_bytes=50 << 20))
            await two.report(msgspec.structs.replace(AGENT_REPORT, borrowed_bytes=77))
            await wait_until_async(lambda: ("db1", 10 * MB - 64_000) in told, 10, "the busy one gets what is left")
            assert (await shown(server)).machines[1].borrowed_bytes == 77
            await two.report(msgspec.structs.replace(AGENT_REPORT, backlog_bytes=50 << 20))
            await wait_until_async(
                lambda: told[-2:] and dict(told) == {"db1": 5 * MB, "db2": 5 * MB}, 10, "equal parts"
            )
            await server.operator.ask("PUT", path("db1"), rule(2 * MB))
            await wait_until_async(
                lambda: dict(told) == {"db1": 2 * MB, "db2": 8 * MB}, 10, "what the other may not use"
            )
            machine, agent = agents["db2"]
            writer = Writer(machine)
            raw = writer.seal([(0, 0, b"x" * 4096)])
            assert (await agent.put(machine, writer.tip, raw)).bytes_per_s_max == 8 * MB
            state = await agent.ask("GET", wire.MACHINE.format(machine=machine))
            assert state["bytes_per_s_max"] == 8 * MB
            metrics = (await server.operator.raw("/metrics")).decode()
            assert 'cdp_limit_bytes_per_second{machine="db1"} 2e+06' in metrics
            for name in (m.TOTAL, "db1"):
                await server.operator.ask("DELETE", path(name))
            await wait_until_async(lambda: dict(told) == {"db1": None, "db2": None}, 10, "no limit")


async def test_the_agents_client_keeps_the_limit(tmp_path: Path) -> None:
    rate, segments, size = 4 * MB, 12, 1 << 20
    async with running(tmp_path / "server") as server:
        machine, agent = await server.protected()
        (tmp_path / "ca.pem").write_text(server.ca_pem)
        headers = dict(agent.session.headers)
        writer, sealed = Writer(machine), []
        for number in range(segments):
            raw = writer.seal([(0, number * size, os.urandom(size))])
            sealed.append((writer.tip, tmp_path / f"{number}", len(raw)))
            sealed[-1][1].write_bytes(raw)

        async def push(client: AgentClient, some: list[tuple[Position, Path, int]]) -> float:
            began = time.monotonic()
            for position, file, length in some:
                await client.put_segment(position, file, length)
            return time.monotonic() - began

        async with AgentClient(server.url, machine, headers, tmp_path / "ca.pem") as client:
            free_s = await push(client, sealed[:3])
            await server.operator.ask("PUT", path("db1"), rule(rate))
            assert (await client.state()).bytes_per_s_max == rate
            took_s = await push(client, sealed[3:])
        least_s = (segments - 3) * size / rate - 0.4
        print(f"{took_s:.2f} s at {rate / MB} MB/s, {free_s:.2f} s for a third of it without a limit")
        assert least_s < took_s < 3 * least_s + 2
        assert server.server.store.live(uuid.UUID(machine)) == sealed[-1][0]
