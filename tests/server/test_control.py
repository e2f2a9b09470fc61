"""The control hub, over real websockets."""

from __future__ import annotations

import asyncio
import os
import random
import time
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from cdp.server import messages as m
from cdp.server.errors import CallTimedOut, PeerAway, TokenExpired
from journal import wire
from journal.errors import CdpError, StaleGeneration
from tests.harness.wait import wait_until_async
from tests.server.peers import AGENT_REPORT, STANDBY_REPORT, Peer, connected
from tests.server.running import DISKS, Running, running


async def test_calls_are_answered_refused_and_timed_out(tmp_path: Path) -> None:
    async def echo(args: dict[str, Any]) -> dict[str, Any]:
        return {"got": args}

    async def refuse(args: dict[str, Any]) -> dict[str, Any]:
        raise StaleGeneration("Over.", remedy="Stop.", generation=1)

    async def hang(args: dict[str, Any]) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        hub, key = server.server.hub, uuid.UUID(machine)
        with pytest.raises(PeerAway):
            await hub.call(key, "agent", "echo", {}, 0.1)
        async with connected(server, agent, machine, verbs={"echo": echo, "refuse": refuse, "hang": hang}) as peer:
            answers = await asyncio.gather(*(hub.call(key, "agent", "echo", {"n": n}, 5) for n in range(20)))
            assert answers == [{"got": {"n": n}} for n in range(20)]
            with pytest.raises(StaleGeneration) as caught:
                await hub.call(key, "agent", "refuse", {}, 5)
            assert (caught.value.remedy, caught.value.fields) == ("Stop.", {"generation": 1})
            with pytest.raises(CallTimedOut):
                await hub.call(key, "agent", "hang", {}, 0.2)
            assert peer.calls[-1].deadline_s <= 0.2


@pytest.mark.timeout(30)
async def test_a_call_over_a_connection_that_has_just_died_keeps_nobody_waiting(tmp_path: Path) -> None:
    """It used to be tried again and again at once, so that the connection's own task never came to see its end."""
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        hub, key = server.server.hub, uuid.UUID(machine)
        async with connected(server, agent, machine):
            writer = hub._sessions[key, "agent"].socket._writer
            assert writer is not None
            writer.transport.abort()
            with pytest.raises(PeerAway, match="connection was lost"):
                await hub.call(key, "agent", "echo", {}, 1)
            with pytest.raises(PeerAway):
                await hub.call(key, "agent", "echo", {}, 0)


async def test_a_call_survives_a_lost_connection(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def vanish(args: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        await asyncio.Event().wait()
        return {}

    async def answer(args: dict[str, Any]) -> dict[str, Any]:
        return {"second": True}

    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        async with connected(server, agent, machine, verbs={"seal": vanish}):
            call = asyncio.create_task(server.server.hub.call(uuid.UUID(machine), "agent", "seal", {}, 10))
            await asked.wait()
        async with connected(server, agent, machine, verbs={"seal": answer}):
            assert await call == {"second": True}


async def test_who_reconnects_replaces_the_old_session(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        hub, key = server.server.hub, uuid.UUID(machine)

        async def name(args: dict[str, Any]) -> dict[str, Any]:
            return {"new": True}

        async with connected(server, agent, machine, boot_id="old") as old:
            async with connected(server, agent, machine, boot_id="new", verbs={"name": name}):
                await wait_until_async(lambda: old.socket.closed, 5, "the old session's end")
                assert await hub.call(key, "agent", "name", {}, 5) == {"new": True}
            await wait_until_async(lambda: not hub.is_connected(key, "agent"), 5, "the new session's end")


async def test_reports_are_kept_and_shown(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        progress = wire.Progress(what="seed", done_bytes=5, total_bytes=10, eta_s=1.5)
        async with connected(server, agent, machine) as peer:
            await peer.report(
                msgspec.structs.replace(
                    AGENT_REPORT, state="seeding", fuzzy_reason="seed", progress=progress, lost_events=7
                )
            )
            hub, key = server.server.hub, uuid.UUID(machine)
            await wait_until_async(lambda: hub.state(key, "agent").report is not None, 5, "the report")
            status = msgspec.convert(await server.operator.ask("GET", m.MACHINE.format(name="db1")), m.MachineStatus)
            assert (status.agent.state, status.agent.progress, status.agent.lost_events) == ("seeding", progress, 7)
            assert status.fuzzy_reason == "seed"
            assert any("No recovery point" in problem for problem in status.problems)
        await wait_until_async(lambda: not hub.is_connected(key, "agent"), 5, "the end")
        status = msgspec.convert(await server.operator.ask("GET", m.MACHINE.format(name="db1")), m.MachineStatus)
        assert (status.agent.connected, status.agent.state) == (False, "seeding")


async def test_the_agents_disks_become_the_machines(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.add_machine()
        async with connected(server, agent, machine):
            assert server.server.store.machine("db1").disks == DISKS
        await server.operator.ask("PUT", m.PROTECTION.format(name="db1"), {"disks": ["vda", "vdb"]})

        async def status_with(disks: list[wire.DiskInfo]) -> m.MachineStatus:
            async with agent.session.ws_connect(wire.CONTROL) as socket:
                peer = Peer(socket, {})
                hello = wire.Hello(role="agent", version="1", boot_id="2", disks=disks)
                await peer.send(hello)
                hub, key = server.server.hub, uuid.UUID(machine)
                await wait_until_async(lambda: hub.state(key, "agent").hello == hello, 5, "the hello")
            return msgspec.convert(await server.operator.ask("GET", m.MACHINE.format(name="db1")), m.MachineStatus)

        grown = [wire.DiskInfo(index=0, name="vda", size_bytes=128 << 20), DISKS[1]]
        assert (await status_with(grown)).disks == grown
        lost = await status_with(grown[:1])
        assert lost.disks == grown
        assert "missing or smaller" in lost.problems[0]
        assert "missing or smaller" not in "".join((await status_with(grown)).problems)


BAD_FRAMES = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"type":"hello"}',
    b'{"type":"result","id":1,"ok":{}}',
    b'{"type":"hello","role":"pe","version":"1","boot_id":"b"}',
    b'{"type":"hello","role":"agent","version":"1","boot_id":"b","surprise":1}',
    b'{"type":"hello","role":"agent","version":"' + b"x" * 5000 + b'","boot_id":"b"}',
    b"[" * 100_000,
]


async def first_close(server: Running, headers: dict[str, str], frame: bytes, *, hello: bool) -> int | None:
    client = server.client(headers)
    async with client.session.ws_connect(wire.CONTROL) as socket:
        if hello:
            await socket.send_bytes(msgspec.json.encode(wire.Hello(role="agent", version="1", boot_id="b")))
        await socket.send_bytes(frame)
        async with asyncio.timeout(5):
            got = await socket.receive()
        assert got.type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING}
        return socket.close_code


async def test_bad_frames_end_the_session_and_nothing_else(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    rng = random.Random(seed)
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        headers = dict(agent.session.headers)
        for frame in BAD_FRAMES:
            assert await first_close(server, headers, frame, hello=False) == 1008
        good = msgspec.json.encode(AGENT_REPORT)
        for _ in range(60):
            broken = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            try:
                msgspec.json.decode(broken, type=wire.FromPeer)
            except (msgspec.MsgspecError, UnicodeError):
                assert await first_close(server, headers, bytes(broken), hello=True) == 1008
        # Cut off while it is still being sent: the close frame may not get through.
        assert await first_close(server, headers, b"x" * (2 << 20), hello=True) in {1006, 1009}
        # the server is as it was
        async with connected(server, agent, machine) as peer:
            await peer.report(AGENT_REPORT)
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            async with server.client().session.ws_connect(wire.CONTROL):
                pass
        assert caught.value.status == 401


async def test_a_standby_cannot_speak_for_an_agent(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        _, agent = await server.protected()
        async with agent.session.ws_connect(wire.CONTROL) as socket:
            peer = Peer(socket, {})
            await peer.send(wire.Hello(role="agent", version="1", boot_id="b"))
            await peer.send(STANDBY_REPORT)
            assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE


async def test_revoked_credentials_lose_their_connection(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        async with connected(server, agent, machine) as peer:
            assert await server.operator.ask("DELETE", m.CREDENTIALS.format(name="db1")) == {"credentials": 1}
            await wait_until_async(lambda: peer.socket.closed, 5, "the end of the session")
        with pytest.raises(CdpError) as caught:
            await agent.ask("GET", wire.MACHINE.format(machine=machine))
        assert caught.value.code == "unauthorized"


async def test_a_replica_of_no_known_takeover_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        machine, agent = await server.protected()
        async with agent.session.ws_connect(wire.CONTROL) as socket:
            peer = Peer(socket, {})
            await peer.send(wire.Hello(role="agent", version="1", boot_id="b", taken_over="unheard-of"))
            await socket.receive()
            assert socket.close_code == 1008
        assert not server.server.hub.is_connected(uuid.UUID(machine), "agent")


async def test_joining_over_the_wire_is_typed(tmp_path: Path) -> None:
    async with running(tmp_path, token_lifetime_s=1.0) as server:
        issued = await server.operator.ask("POST", m.MACHINES, {"name": "db2"})
        assert f"cdp1.{server.server.authority.fingerprint}." in issued["token"]
        await wait_until_async(lambda: time.time() > issued["expires_at_s"], 5, "the token's end")
        with pytest.raises(TokenExpired) as caught:
            await server.join(issued["token"])
        assert "cdp machines token" in caught.value.remedy
