"""Retention that runs by itself: policies, what holds it back, what operators see of it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cdp.server import messages as m
from cdp.server.app import METRICS, OPERATOR_FILE
from cdp.server.config import Retention
from cdp.server.errors import PolicyInvalid
from cdp.server.retention_messages import RETENTION, RetentionPolicy, RetentionStatus
from cdp.store import ImageReader
from journal.errors import CdpError
from journal.position import Position
from tests.server.running import Client, Running, Writer, running

HOUR_S = 3600.0
OFTEN = Retention(interval_s=0.05)
PATH = RETENTION.format(name="db1")


async def history(agent: Client, machine: str, ages_s: list[float]) -> list[Position]:
    """A segment for each age; the content at offset 0 is its number."""
    writer, stored, now = Writer(machine), [], time.time()
    for number, age_s in enumerate(ages_s):
        raw = writer.seal([(0, 0, bytes([number + 1]) * 512)], sealed_at_s=now - age_s)
        await agent.put(machine, writer.tip, raw)
        stored.append(writer.tip)
    return stored


async def retention(server: Running, method: str = "GET", policy: RetentionPolicy | None = None) -> RetentionStatus:
    return msgspec.convert(await server.operator.ask(method, PATH, policy), RetentionStatus)


async def status(server: Running) -> m.MachineStatus:
    return msgspec.convert(await server.operator.ask("GET", m.MACHINE.format(name="db1")), m.MachineStatus)


async def until(server: Running, what: Callable[[m.MachineStatus], object]) -> m.MachineStatus:
    async with asyncio.timeout(20):
        while not what(now := await status(server)):  # noqa: ASYNC110 (only the server knows)
            await asyncio.sleep(0.02)
    return now


def content(server: Running, machine: str, position: Position) -> int:
    with ImageReader(server.server.store, uuid.UUID(machine), position) as image:
        return image.read(0, 0, 1)[0]


def kept(now: m.MachineStatus) -> RetentionStatus:
    assert now.retention is not None
    return now.retention


async def test_what_is_older_than_the_policy_keeps_is_folded(tmp_path: Path) -> None:
    async with running(tmp_path, retention=OFTEN) as server:
        machine, agent = await server.protected()
        ages = [HOUR_S * hours for hours in (30, 28, 26, 20, 10, 5, 1)]
        stored = await history(agent, machine, ages)
        # Retention runs while the history arrives: it may fold in any number of steps.
        now = await until(server, lambda s: kept(s).folded_segments == 3)
        assert kept(now).policy == RetentionPolicy() and kept(now).is_default
        assert now.journal.oldest_s == pytest.approx(time.time() - ages[2], abs=30)
        assert kept(now).holds_s == pytest.approx(ages[2] - ages[-1], abs=1)
        assert kept(now).limited_by == "time" and kept(now).will_hold_s == 24 * HOUR_S

        await retention(server, "PUT", RetentionPolicy(keep_s=6 * HOUR_S))
        now = await until(server, lambda s: kept(s).folded_segments == 5)
        assert [content(server, machine, stored[n]) for n in (4, 5, 6)] == [5, 6, 7]
        assert now.problems == ["The agent is not connected."]
        body = (await server.operator.raw(METRICS)).decode()
        assert 'cdp_retention_folded_segments_total{machine="db1"} 5.0' in body
        assert "cdp_store_free_bytes " in body and 'cdp_retention_held{machine="db1"} 0.0' in body
        assert not (await retention(server)).is_default
        assert (await retention(server, "DELETE")).policy.keep_s == 24 * HOUR_S
        audited = {line["action"]: line for line in await server.operator.ask("GET", m.AUDIT)}
        assert json.loads(audited["set retention"]["details"]["policy"])["keep_s"] == 6 * HOUR_S
        assert "reset retention" in audited


async def test_a_standby_that_is_behind_holds_retention_until_told_otherwise(tmp_path: Path) -> None:
    async with running(tmp_path, retention=Retention(interval_s=0.05, keep_s=100 * HOUR_S)) as server:
        machine, agent = await server.protected()
        store, key = server.server.store, uuid.UUID(machine)
        stored = await history(agent, machine, [HOUR_S * hours for hours in (40, 36, 32, 28, 10, 1)])
        store.set_cursor(key, "standby", stored[1])
        await retention(server, "PUT", RetentionPolicy(keep_s=24 * HOUR_S))
        now = await until(server, lambda s: kept(s).held_by)
        assert any("standby" in problem and "--past-standby" in problem for problem in now.problems)
        assert content(server, machine, stored[1]) == 2
        await retention(server, "PUT", RetentionPolicy(past_standby=True))
        now = await until(server, lambda s: kept(s).folded_segments == 4)
        assert not kept(now).held_by
        assert not store.contains(key, stored[1]) and content(server, machine, stored[4]) == 5
        assert not any("standby" in problem for problem in now.problems)


async def test_a_bookmark_holds_or_expires(tmp_path: Path) -> None:
    async with running(tmp_path, retention=Retention(interval_s=0.05, keep_s=100 * HOUR_S)) as server:
        machine, agent = await server.protected()
        store, key = server.server.store, uuid.UUID(machine)
        stored = await history(agent, machine, [HOUR_S * hours for hours in (40, 36, 32, 28, 10, 1)])
        store.add_bookmark(key, "passing", stored[0])
        store.add_bookmark(key, "dear", stored[2], hold=True)
        await retention(server, "PUT", RetentionPolicy(keep_s=24 * HOUR_S, past_standby=True))
        now = await until(server, lambda s: "dear" in kept(s).held_by)
        assert any("'dear'" in problem for problem in now.problems)
        assert content(server, machine, stored[2]) == 3
        assert store.bookmark(key, "passing").expired_at_ns is not None
        assert any(entry.action == "bookmark expired" for entry in store.audit_log())
        store.hold_bookmark(key, "dear", False)
        await until(server, lambda s: not kept(s).held_by and not kept(s).folding)
        assert store.bookmark(key, "dear").expired_at_ns is not None
        again = store.add_bookmark(key, "dear", stored[4])
        assert again.expired_at_ns is None


async def test_policies_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        await server.protected()
        with pytest.raises(CdpError) as refused:
            await retention(server, "PUT", RetentionPolicy(max_bytes=100 << 20))
        assert refused.value.code == PolicyInvalid.code and refused.value.fields["least_bytes"] == 160 << 20
        for wrong in ({"keep_s": 0.5}, {"max_bytes": -1}, {"kept": 1}):
            with pytest.raises(CdpError):
                await server.operator.ask("PUT", PATH, wrong)
        assert (await retention(server)).is_default


async def cdp(server: Running, *words: str, code: int = 0) -> str:
    env = {**os.environ, "CDP_CREDENTIAL": str(server.server.directory / OPERATOR_FILE), "CDP_SERVER": server.url}
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "cdp.cli.main", *words],
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode == code, out.decode()
    return out.decode()


async def test_the_command(tmp_path: Path) -> None:
    async with running(tmp_path, retention=OFTEN) as server:
        machine, agent = await server.protected()
        await history(agent, machine, [HOUR_S * hours for hours in (23, 10, 1)])
        told = await cdp(server, "retention", "show", "db1")
        assert "kept for 1 d 0 h (the server's default)" in told and "journal holds 22 h 0 min; at today's rate" in told
        assert "journal holds 22 h 0 min" in await cdp(server, "status", "db1")
        told = await cdp(server, "retention", "set", "db1", "--keep", "12h", "--max-bytes", "2G")
        assert "kept for 12 h 0 min, at most 2.0 GiB (its own policy)" in told
        shown: dict[str, Any] = json.loads(
            await cdp(server, "retention", "set", "db1", "--max-bytes", "none", "--json")
        )
        assert shown["policy"] == {"keep_s": 12 * HOUR_S, "max_bytes": None, "past_standby": False}
        assert "server's default" in await cdp(server, "retention", "set", "db1", "--default")
        for wrong in (["--keep", "soon"], ["--max-bytes", "0"], [], ["--default", "--keep", "1h"]):
            await cdp(server, "retention", "set", "db1", *wrong, code=2)
        await cdp(server, "retention", "set", "db1", "--max-bytes", "1M", code=1)
