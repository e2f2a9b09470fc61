"""Agents and PEs as the server sees them: real websockets over real TLS that speak the protocol."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from cdp.server.control import Slot
from journal import wire
from journal.errors import CdpError
from tests.harness.wait import wait_until_async
from tests.server.running import DISKS, Client, Running

Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

AGENT_REPORT = wire.AgentReport(
    state="following",
    sealed=None,
    sealed_at_s=None,
    captured_at_s=None,
    backlog_bytes=0,
    backlog_segments=0,
    fuzzy=False,
)
STANDBY_REPORT = wire.StandbyReport(state="ready", applied=None, applied_at_s=None, kexec_ready=True)


class Peer:
    """One connection; answers calls with its ``verbs`` and repeats ``report`` until it is closed."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, verbs: dict[str, Verb]) -> None:
        self.socket = socket
        self.verbs = verbs
        self.calls: list[wire.Call] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def send(self, message: msgspec.Struct) -> None:
        await self.socket.send_str(msgspec.json.encode(message).decode())

    async def report(self, report: wire.AgentReport | wire.StandbyReport) -> None:
        await self.send(report)

    async def serve(self) -> None:
        async for frame in self.socket:
            call = msgspec.json.decode(frame.data, type=wire.Call)
            self.calls.append(call)
            task = asyncio.create_task(self._answer(call))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, call: wire.Call) -> None:
        try:
            await self.send(wire.Result(id=call.id, ok=await self.verbs[call.verb](call.args)))
        except CdpError as error:
            await self.send(wire.Failure(id=call.id, error=error.as_dict()))
        except ConnectionError:
            return


@asynccontextmanager
async def connected(
    server: Running,
    client: Client,
    machine: str,
    role: str = "agent",
    verbs: dict[str, Verb] | None = None,
    *,
    boot_id: str = "boot-1",
    taken_over: str | None = None,
) -> AsyncIterator[Peer]:
    """A peer that the server knows as connected; it is gone when the block ends."""
    slot: Slot = "pe" if role == "pe" else "taken-over" if taken_over else "agent"
    hub, key = server.server.hub, uuid.UUID(machine)
    async with client.session.ws_connect(wire.CONTROL, autoping=True) as socket:
        peer = Peer(socket, verbs or {})
        hello = wire.Hello(
            role="pe" if role == "pe" else "agent",
            version="1",
            boot_id=boot_id,
            disks=DISKS if role == "agent" else [],
            taken_over=taken_over,
        )
        await peer.send(hello)
        await wait_until_async(
            lambda: hub.is_connected(key, slot) and hub.state(key, slot).hello == hello, 5, f"the {slot}'s session"
        )
        serving = asyncio.create_task(peer.serve())
        try:
            yield peer
        finally:
            await socket.close()
            await serving
