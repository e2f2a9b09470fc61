"""The control hub: one websocket per peer, its last report, and calls to it.

    peer dials ─ Hello ─► session takes its slot ─ reports ─► kept as last known
                              │  ▲
                        Call  ▼  │ Result | Failure
                           hub.call()

A machine has three slots, because after a takeover two machines carry the same agent:

    agent        the source's agent
    taken-over   the replicated agent inside the standby, which says so in its Hello
    pe           the standby's PE

A peer that reconnects replaces the session in its slot. Verbs are idempotent, so a call that loses its connection is
repeated on the next one until its deadline.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from cdp.server.errors import CallTimedOut, PeerAway, UnexpectedFrame
from journal.errors import CdpError, Unavailable
from journal.wire import AgentReport, Call, Failure, FromPeer, Hello, Result, StandbyReport, raise_remote

log = logging.getLogger(__name__)

Slot = Literal["agent", "taken-over", "pe"]

FRAME_BYTES_MAX: Final = 1 << 20
"""Far above any report; bounds the memory that a peer can make the server spend on one frame."""
HEARTBEAT_S: Final = 5.0
"""A peer that is gone without a word (power cut) is noticed after one and a half of these."""
HELLO_DEADLINE_S: Final = 10.0
CLOSE_DEADLINE_S: Final = 2.0
"""How long a closing peer is given to say goodbye."""
TEXT_CHARS_MAX: Final = 256
"""Of version, boot id and the like: they end in the log and on screens."""

_FROM_PEER = msgspec.json.Decoder(FromPeer)


@dataclass(slots=True)
class PeerState:
    """What is known of one slot, also while nobody is connected. Times are the server's clock, Unix seconds."""

    hello: Hello | None = None
    report: AgentReport | StandbyReport | None = None
    connected: bool = False
    last_heard_s: float = 0.0


@dataclass(slots=True)
class _Session:
    socket: web.WebSocketResponse
    pending: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    gone: asyncio.Event = field(default_factory=asyncio.Event)


HelloHandler = Callable[[uuid.UUID, Slot, Hello], Awaitable[None]]


class Hub:
    """All control connections. Lives in one event loop.

    ``on_hello`` may refuse a peer by raising a ``CdpError``.
    """

    def __init__(
        self,
        *,
        peers_max: int,
        on_hello: HelloHandler,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._peers_max = peers_max
        self._on_hello = on_hello
        self._clock = clock
        self._sessions: dict[tuple[uuid.UUID, Slot], _Session] = {}
        self._states: dict[tuple[uuid.UUID, Slot], PeerState] = {}
        self._arrival = asyncio.Condition()
        self._numbers = itertools.count(1)
        self._closing = False

    # --- asking ---------------------------------------------------------------------------------------------------
    def state(self, machine: uuid.UUID, slot: Slot) -> PeerState:
        """The last known state; an empty one if the peer was never seen since the server started."""
        return self._states.get((machine, slot), PeerState())

    def is_connected(self, machine: uuid.UUID, slot: Slot) -> bool:
        return (machine, slot) in self._sessions

    def silent_for_s(self, machine: uuid.UUID, slot: Slot) -> float | None:
        """Seconds since the peer was last heard; None if never since the server started."""
        state = self._states.get((machine, slot))
        return None if state is None else max(0.0, self._clock() - state.last_heard_s)

    def forget(self, machine: uuid.UUID) -> None:
        for key in [key for key in self._states if key[0] == machine and key not in self._sessions]:
            del self._states[key]

    # --- calling --------------------------------------------------------------------------------------------------
    async def call(
        self, machine: uuid.UUID, slot: Slot, verb: str, args: dict[str, Any], deadline_s: float
    ) -> dict[str, Any]:
        """What the peer answers. Raises its own typed error, ``PeerAway`` if it was not connected by the deadline, or
        ``CallTimedOut`` if it did not answer by then."""
        end = time.monotonic() + deadline_s
        asked = False
        while True:
            session = await self._session(machine, slot, end, asked=asked, verb=verb)
            asked = True
            answer = await self._ask(session, verb, args, end)
            if answer is not None:
                return answer

    async def _session(self, machine: uuid.UUID, slot: Slot, end: float, *, asked: bool, verb: str) -> _Session:
        async with self._arrival:
            try:
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    await self._arrival.wait_for(lambda: self._closing or (machine, slot) in self._sessions)
            except TimeoutError:
                raise PeerAway(
                    f"The {slot} of the machine is not connected"
                    + (f"; the connection was lost during {verb!r}." if asked else "."),
                    remedy="Check that it runs and reaches this server; see 'cdp status'.",
                    slot=slot,
                    verb=verb,
                ) from None
            if self._closing:
                raise Unavailable("The server is shutting down.", remedy="Repeat it when the server is back.")
            return self._sessions[machine, slot]

    async def _ask(self, session: _Session, verb: str, args: dict[str, Any], end: float) -> dict[str, Any] | None:
        """The answer on this session; None if the session ends first."""
        left = end - time.monotonic()
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        session.pending[number] = answer
        gone = asyncio.ensure_future(session.gone.wait())
        try:
            call = Call(id=number, verb=verb, args=args, deadline_s=max(0.1, left))
            waiting: list[asyncio.Future[Any]] = [answer, gone]
            try:
                await session.socket.send_str(msgspec.json.encode(call).decode())
            except ConnectionError:
                # It is dead, but its own task has yet to notice: asking again at once would keep it from ever doing so.
                waiting = [gone]
            await asyncio.wait(waiting, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if gone.done():
                return None
            raise CallTimedOut(
                f"{verb!r} was not answered within its deadline.",
                remedy="See the peer's log; the call is idempotent and may be repeated.",
                verb=verb,
            )
        finally:
            gone.cancel()
            session.pending.pop(number, None)
            if answer.done() and not answer.cancelled():
                answer.exception()  # an error that nobody waits for any more is not a loop error
            answer.cancel()

    # --- serving --------------------------------------------------------------------------------------------------
    async def serve(self, request: web.Request, machine: uuid.UUID, role: str) -> web.WebSocketResponse:
        """Serve one peer until it leaves, is replaced, or breaks the protocol."""
        if len(self._sessions) >= self._peers_max or self._closing:
            raise Unavailable("The server takes no more control connections now.", remedy="Try again later.")
        socket = web.WebSocketResponse(
            timeout=CLOSE_DEADLINE_S, heartbeat=HEARTBEAT_S, max_msg_size=FRAME_BYTES_MAX, compress=False
        )
        await socket.prepare(request)
        try:
            await self._converse(socket, machine, role)
        except CdpError as error:
            log.warning("control: machine %s, %s: %s", machine, role, error)
            # The close reason carries at most 123 bytes: the code, which is what a program needs.
            await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=error.code.encode())
        return socket

    async def _converse(self, socket: web.WebSocketResponse, machine: uuid.UUID, role: str) -> None:
        try:
            async with asyncio.timeout(HELLO_DEADLINE_S):
                hello = await self._next(socket)
        except TimeoutError:
            raise UnexpectedFrame("No Hello came.", remedy="The first frame has to be a Hello.") from None
        if hello is None:
            return
        if not isinstance(hello, Hello) or hello.role != role:
            raise UnexpectedFrame("The first frame is not a Hello of this role.", remedy="Upgrade the peer.")
        if max(len(hello.version), len(hello.boot_id), len(hello.taken_over or "")) > TEXT_CHARS_MAX:
            raise UnexpectedFrame("A text of the Hello is too long.", remedy="Upgrade the peer.")
        slot: Slot = "pe" if hello.role == "pe" else "taken-over" if hello.taken_over else "agent"
        await self._on_hello(machine, slot, hello)
        session = _Session(socket)
        await self._enter(machine, slot, session, hello)
        try:
            while (message := await self._next(socket)) is not None:
                self._states[machine, slot].last_heard_s = self._clock()
                self._take(machine, slot, session, message)
        finally:
            session.gone.set()
            await self._leave(machine, slot, session)

    async def _enter(self, machine: uuid.UUID, slot: Slot, session: _Session, hello: Hello) -> None:
        key = (machine, slot)
        old = self._sessions.get(key)
        async with self._arrival:
            self._sessions[key] = session
            state = self._states.setdefault(key, PeerState())
            if state.hello is not None and state.hello.boot_id != hello.boot_id:
                state.report = None  # another boot: what it said before is history
            state.hello = hello
            state.connected = True
            state.last_heard_s = self._clock()
            self._arrival.notify_all()
        log.info("control: %s of machine %s is connected (version %s)", slot, machine, hello.version)
        if old is not None:
            old.gone.set()
            await old.socket.close(code=WSCloseCode.GOING_AWAY, message=b"replaced")

    async def _leave(self, machine: uuid.UUID, slot: Slot, session: _Session) -> None:
        if self._sessions.get((machine, slot)) is session:
            del self._sessions[machine, slot]
            self._states[machine, slot].connected = False
            log.info("control: %s of machine %s is gone", slot, machine)

    def _take(self, machine: uuid.UUID, slot: Slot, session: _Session, message: FromPeer) -> None:
        match message:
            case AgentReport() | StandbyReport():
                if isinstance(message, StandbyReport) != (slot == "pe"):
                    raise UnexpectedFrame("The report is one of another role.", remedy="Upgrade the peer.")
                self._states[machine, slot].report = message
            case Result():
                answer = session.pending.get(message.id)
                if answer is not None and not answer.done():
                    answer.set_result(message.ok)
            case Failure():
                answer = session.pending.get(message.id)
                if answer is not None and not answer.done():
                    answer.set_exception(_remote(message.error))
            case Hello():
                raise UnexpectedFrame("A second Hello came.", remedy="Open a new connection instead.")

    async def _next(self, socket: web.WebSocketResponse) -> FromPeer | None:
        """The next message; None when the connection is over."""
        frame = await socket.receive()
        if frame.type not in {WSMsgType.TEXT, WSMsgType.BINARY}:
            return None
        try:
            message: FromPeer = _FROM_PEER.decode(frame.data)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise UnexpectedFrame(
                f"A control frame is not a message of the protocol: {error}.", remedy="Upgrade the older side."
            ) from None
        return message

    async def drop(self, machine: uuid.UUID, slot: Slot) -> None:
        """Close a peer's connection, because its credential was revoked."""
        session = self._sessions.get((machine, slot))
        if session is not None:
            await session.socket.close(code=WSCloseCode.POLICY_VIOLATION, message=b"unauthorized")

    async def close(self) -> None:
        """Say goodbye to every peer; calls that wait end with ``Unavailable``."""
        async with self._arrival:
            self._closing = True
            self._arrival.notify_all()
        async with asyncio.TaskGroup() as group:
            for session in list(self._sessions.values()):
                session.gone.set()
                group.create_task(session.socket.close(code=WSCloseCode.GOING_AWAY, message=b"shutdown"))


def _remote(body: dict[str, Any]) -> CdpError:
    try:
        raise_remote(body)
    except CdpError as error:
        return error
    except TypeError:  # fields that clash with an argument's name
        pass
    return UnexpectedFrame("The peer reported an error that cannot be read.", remedy="Upgrade the older side.")
