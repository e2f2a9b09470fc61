"""Spool -> server: in order, one segment at a time, until the server has each of them.

What the server says when we ask where it stands, with ``ours`` the last sealed position:

    server                                        then
    we are fenced                                 SUPERSEDED: stop, give up the addresses
    its tip is before what it has acknowledged    LOST: an older copy of it was restored; tell it, then as DIVERGED
    its tip is ours                               all is there
    its tip is before ours, the rest is spooled   push the rest
    anything else, a newer generation included    DIVERGED: the histories do not meet; compare and go on at its tip

Segments that the server acknowledged are deleted; those that it has after all (an answer was lost) as well.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Final, Protocol

from cdp.agent.errors import ServerUnreachable
from cdp.agent.spool import Spool, Spooled
from cdp.agent.status import Status
from journal import wire
from journal.errors import (
    CdpError,
    Forbidden,
    ForeignSegment,
    PositionFork,
    PositionGap,
    SegmentDamaged,
    StaleGeneration,
    Unauthorized,
    UnknownGeneration,
)
from journal.position import Position

BACKOFF_S: Final = (0.2, 10.0)
"""First and longest pause after a failure; doubled in between, each with jitter so that agents do not march in step."""
REFUSED_S: Final = 15.0
"""Pause after a refusal that only a person can lift."""


class Standing(Enum):
    SUPERSEDED = "superseded"
    DIVERGED = "diverged"
    LOST = "lost"
    CONTINUES = "continues"


def compare(state: wire.MachineState, ours: Position, spooled: Sequence[Spooled]) -> Standing:
    """Where we stand towards the server; the table above."""
    if state.fenced:
        return Standing.SUPERSEDED
    tip = Position.parse(state.tip)
    if tip == ours:
        return Standing.CONTINUES
    if tip.generation < ours.generation:
        return Standing.LOST
    if tip.generation != ours.generation or tip.seq >= ours.seq:
        return Standing.DIVERGED
    if not spooled or spooled[0].position.seq > tip.seq + 1:
        return Standing.LOST
    at_tip = next((entry.position for entry in spooled if entry.position.seq == tip.seq), tip)
    return Standing.CONTINUES if at_tip == tip else Standing.DIVERGED


class Server(Protocol):
    async def state(self) -> wire.MachineState: ...

    async def put_segment(self, position: Position, path: Path, length: int) -> wire.StoredAnswer: ...

    async def lost(self, position: Position) -> None: ...


class Pusher:
    """``superseded`` and ``diverged`` are awaited before anything else is sent; ``news`` is set when there is something
    new in the spool."""

    def __init__(
        self,
        spool: Spool,
        server: Server,
        status: Status,
        *,
        tip: Callable[[], Position | None],
        superseded: Callable[[wire.MachineState], Awaitable[None]],
        diverged: Callable[[str], Awaitable[None]],
        addresses: Callable[[list[str]], None],
        news: asyncio.Event,
    ) -> None:
        self._spool = spool
        self._server = server
        self._status = status
        self._tip = tip
        self._superseded = superseded
        self._diverged = diverged
        self._addresses = addresses
        self._news = news
        self._stored = asyncio.Condition()
        self.paused = False
        """Set while this machine is fenced: nothing may be pushed."""

    def notify(self) -> None:
        """There is something new in the spool."""
        self._news.set()

    async def wait_stored(self, position: Position) -> None:
        """Until the server has acknowledged ``position`` or a later one."""
        async with self._stored:
            await self._stored.wait_for(lambda: self._status.stored is not None and self._status.stored >= position)

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            try:
                await self._resume()
                failures = 0
                await self._push()
            except (Unauthorized, Forbidden) as error:
                self._fail(error)
                await asyncio.sleep(REFUSED_S)
            except CdpError as error:
                self._fail(error)
                pause = min(BACKOFF_S[0] * 2**failures, BACKOFF_S[1])
                failures = min(failures + 1, 10)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 (jitter, not a secret)

    async def _resume(self) -> None:
        """Find out where the server stands, once per connection."""
        while self.paused or (ours := self._tip()) is None:
            self._news.clear()
            await self._news.wait()
        state = await self._server.state()
        self._connected()
        self._addresses(state.service_addresses)
        match compare(state, ours, self._spool.entries):
            case Standing.SUPERSEDED:
                await self._superseded(state)
            case Standing.LOST:
                # It has to tell the standby, which may have applied what the server does not know any more.
                await self._server.lost(ours)
                await self._diverged("server-lost-segments")
            case Standing.DIVERGED:
                await self._diverged("server-tip")
            case Standing.CONTINUES:
                await self._acknowledge(Position.parse(state.tip))

    async def _push(self) -> None:
        """Push until something goes wrong."""
        while not self.paused:
            if not self._spool.entries:
                self._news.clear()
                await self._news.wait()
                continue
            entry = self._spool.entries[0]
            try:
                answer = await self._server.put_segment(entry.position, entry.path, entry.segment_bytes)
            except FileNotFoundError:
                return  # the history was restarted meanwhile
            except (PositionFork, UnknownGeneration, SegmentDamaged, ForeignSegment) as error:
                self._fail(error)
                await self._diverged(error.code)
                return
            except (PositionGap, StaleGeneration):
                return  # ask where the server stands
            self._connected()
            self._status.stored_at_s = entry.sealed_at_ns / 1e9
            await self._acknowledge(Position.parse(answer.position))

    async def _acknowledge(self, position: Position) -> None:
        self._spool.acknowledged(position)
        self._status.backlog_bytes = self._spool.bytes
        self._status.backlog_segments = len(self._spool.entries)
        async with self._stored:
            self._status.stored = position
            self._stored.notify_all()

    def _connected(self) -> None:
        self._status.online, self._status.starting = True, False
        self._status.works("push")

    def _fail(self, error: CdpError) -> None:
        if isinstance(error, ServerUnreachable):
            self._status.online, self._status.starting = False, False
        self._status.failed("push", error)
