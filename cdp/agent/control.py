"""The control channel: one outbound websocket; Hello, a report every second, verbs.

connect ─ Hello ─┬─ report every second
                 └─ Call ─► a task of its own ─► Result | Failure
lost: connect again, with growing pauses. A call whose connection is lost runs to its end; the server repeats it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import aiohttp
import msgspec

from cdp.agent.errors import UnknownVerb
from journal.errors import CdpError
from journal.wire import AgentReport, Call, Failure, Hello, Result

log = logging.getLogger(__name__)

REPORT_S: Final = 1.0
BACKOFF_S: Final = (0.2, 10.0)
CALLS_MAX: Final = 16
"""Verbs at work at once; a controller has one or two."""

Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
_CALL: Final = msgspec.json.Decoder(Call)


class Dialer(Protocol):
    async def control(self) -> aiohttp.ClientWebSocketResponse: ...


class Control:
    """``verbs`` by name; ``hello`` and ``report`` are asked each time they are needed."""

    def __init__(
        self,
        server: Dialer,
        verbs: dict[str, Verb],
        *,
        hello: Callable[[], Hello],
        report: Callable[[], AgentReport],
        trouble: Callable[[CdpError | None], None],
    ) -> None:
        self._server = server
        self._verbs = verbs
        self._hello = hello
        self._report = report
        self._trouble = trouble
        self._calls: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    def report_soon(self) -> None:
        """Something changed that the server should not wait a second for."""
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        try:
            while True:
                try:
                    socket = await self._server.control()
                except CdpError as error:
                    self._trouble(error)
                    pause = min(BACKOFF_S[0] * 2**failures, BACKOFF_S[1])
                    failures = min(failures + 1, 10)
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 (jitter, not a secret)
                    continue
                self._trouble(None)
                reason = await self._converse(socket)
                # A connection that the server ends at once is no success.
                failures = 0 if reason is None else min(failures + 1, 10)
                await asyncio.sleep(min(BACKOFF_S[0] * 2**failures, BACKOFF_S[1]))
        finally:
            for task in self._calls:
                task.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)

    async def _converse(self, socket: aiohttp.ClientWebSocketResponse) -> str | None:
        """Until the connection ends; the reason that the server gave, if it closed it on purpose."""
        reporter = None
        try:
            await socket.send_bytes(msgspec.json.encode(self._hello()))
            reporter = asyncio.create_task(self._send_reports(socket))
            async for frame in socket:
                if frame.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                    break
                self._take(socket, frame.data)
            code = socket.close_code
            if code == aiohttp.WSCloseCode.POLICY_VIOLATION:
                log.error("the server ended the control channel: see its log for the reason")
                return "refused"
        except ConnectionError:
            return None
        finally:
            if reporter is not None:
                reporter.cancel()
                await asyncio.gather(reporter, return_exceptions=True)
            await socket.close()
        return None

    async def _send_reports(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            self._news.clear()
            await socket.send_bytes(msgspec.json.encode(self._report()))
            try:
                async with asyncio.timeout(REPORT_S):
                    await self._news.wait()
            except TimeoutError:
                continue

    def _take(self, socket: aiohttp.ClientWebSocketResponse, raw: bytes | str) -> None:
        try:
            call = _CALL.decode(raw)
        except msgspec.DecodeError as error:
            log.error("a control frame cannot be read: %s", error)
            return
        if len(self._calls) >= CALLS_MAX:
            log.error("too many calls at once: %s is not answered", call.verb)
            return
        task = asyncio.create_task(self._answer(socket, call))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _answer(self, socket: aiohttp.ClientWebSocketResponse, call: Call) -> None:
        answer: Result | Failure
        try:
            verb = self._verbs.get(call.verb)
            if verb is None:
                raise UnknownVerb(f"There is no verb {call.verb!r} here.", remedy="Upgrade the agent.", verb=call.verb)
            async with asyncio.timeout(call.deadline_s):
                answer = Result(id=call.id, ok=await verb(call.args))
        except CdpError as error:
            log.warning("%s: %s", call.verb, error)
            answer = Failure(id=call.id, error=error.as_dict())
        except TimeoutError:
            return  # nobody waits for an answer any more
        if not socket.closed:
            try:
                await socket.send_bytes(msgspec.json.encode(answer))
            except ConnectionError:
                return  # the server repeats the call
            self.report_soon()
