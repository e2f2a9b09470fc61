"""The PE's end of the control channel: dial, say hello, report, answer calls.

A call that is already being worked on, because the server lost the connection and asks again, is joined rather than
begun twice; one that ended is asked again, because verbs are idempotent. Losing the connection never stops a verb.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, Final

import aiohttp
import msgspec

from journal import wire
from journal.errors import BadRequest, CdpError
from standby.replay.ports import Clock, ServerUnreachable
from standby.replay.retry import pause_s

REPORT_S: Final = 1.0
_HEARTBEAT_S: Final = 5.0
"""The server is noticed to be gone after one and a half of these."""
_FRAME_BYTES_MAX: Final = 1 << 20
_SIOCOUTQ: Final = 0x5411
_SENT_S_MAX: Final = 0.5
"""How long the last answer may take to leave this machine before it is left anyway."""

_CALL = msgspec.json.Decoder(wire.Call)

Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class PeFailed(CdpError):
    """Something in the PE broke that is nobody's mistake but ours."""

    code = "pe-failed"


class Control:
    """``run`` is one task of the process. ``departure`` is called after the answer to ``leaving`` was sent."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        server: str,
        *,
        hello: Callable[[], wire.Hello],
        report: Callable[[], wire.StandbyReport],
        verbs: dict[str, Verb],
        leaving: str,
        departure: Callable[[], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._session = session
        self._url = server.rstrip("/") + wire.CONTROL
        self._hello = hello
        self._report = report
        self._verbs = verbs
        self._leaving = leaving
        self._departure = departure
        self._clock = clock
        self._running: dict[bytes, asyncio.Task[dict[str, Any]]] = {}

    async def run(self) -> None:
        """Until cancelled; dials again with growing pauses."""
        failures = 0
        while True:
            try:
                await self._converse()
                failures = 0
            except (TimeoutError, aiohttp.ClientError, OSError, ServerUnreachable) as error:
                failures += 1
                print(f"cdp-pe: control channel: {error or type(error).__name__}", file=sys.stderr)  # noqa: T201
            await self._clock.sleep(pause_s(failures))

    async def _converse(self) -> None:
        """One connection, until it ends."""
        async with self._session.ws_connect(
            self._url, heartbeat=_HEARTBEAT_S, max_msg_size=_FRAME_BYTES_MAX, compress=0
        ) as socket:
            await socket.send_str(msgspec.json.encode(self._hello()).decode())
            reporting = asyncio.create_task(self._reporting(socket))
            answering: set[asyncio.Task[None]] = set()
            try:
                async for message in socket:
                    if message.type is not aiohttp.WSMsgType.TEXT:
                        continue
                    try:
                        call = _CALL.decode(message.data)
                    except msgspec.DecodeError as error:
                        raise ServerUnreachable(
                            f"The server sent a frame that is not a call: {error}.",
                            remedy="Server and standby have different versions: build the PE again.",
                        ) from error
                    task = asyncio.create_task(self._answer(socket, call))
                    answering.add(task)
                    task.add_done_callback(answering.discard)
            finally:
                for waiting in (reporting, *answering):
                    waiting.cancel()
                await asyncio.gather(reporting, *answering, return_exceptions=True)

    async def _reporting(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            await socket.send_str(msgspec.json.encode(self._report()).decode())
            await self._clock.sleep(REPORT_S)

    async def _answer(self, socket: aiohttp.ClientWebSocketResponse, call: wire.Call) -> None:
        answer: wire.Result | wire.Failure
        try:
            answer = wire.Result(id=call.id, ok=await self._work(call))
        except CdpError as error:
            answer = wire.Failure(id=call.id, error=error.as_dict())
        await socket.send_str(msgspec.json.encode(answer).decode())
        if call.verb == self._leaving and isinstance(answer, wire.Result):
            await self._until_sent(socket)
            await self._departure()

    async def _work(self, call: wire.Call) -> dict[str, Any]:
        verb = self._verbs.get(call.verb)
        if verb is None:
            raise BadRequest(
                f"The PE has no verb {call.verb!r}.",
                remedy="Server and standby have different versions: build the PE again with 'cdp pe build'.",
            )
        key = msgspec.json.encode([call.verb, call.args], order="deterministic")
        task = self._running.get(key)
        if task is None:
            task = asyncio.ensure_future(_typed(verb(call.args)))
            self._running[key] = task
            task.add_done_callback(lambda done: self._ended(key, done))
        try:
            # The deadline ends the waiting, not the work: the next call finds it further on.
            return await asyncio.wait_for(asyncio.shield(task), call.deadline_s)
        except TimeoutError as error:
            raise ServerUnreachable(
                f"{call.verb} did not end within {call.deadline_s:g} s; it goes on.", remedy="Call again."
            ) from error

    def _ended(self, key: bytes, task: asyncio.Task[dict[str, Any]]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # it was answered, or nobody waits any more; either way it is not lost: verbs keep state

    async def _until_sent(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """The answer must have left before the network card stops: wait for the peer's acknowledgement of it."""
        raw = socket.get_extra_info("socket")
        end = self._clock.monotonic() + _SENT_S_MAX
        while raw is not None and self._clock.monotonic() < end:
            unsent = struct.unpack("i", fcntl.ioctl(raw.fileno(), _SIOCOUTQ, bytes(4)))[0]
            if unsent == 0:
                return
            await self._clock.sleep(0.005)


async def _typed(work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Whatever breaks in a verb reaches the controller as an error with a sentence."""
    try:
        return await work
    except CdpError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise PeFailed(
            f"The PE failed: {type(error).__name__}: {error}.", remedy="See the console log of the standby's domain."
        ) from error
