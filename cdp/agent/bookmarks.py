"""The order to bookmark: an exact recovery point of now, of a machine that holds still at it if that was asked for.

    crash          cut ─► stored
    application    hooks prepare ─► freeze ─► cut ─► thaw ─► stored

Preparing may take long (a checkpoint) and keeps nobody waiting, nor other orders. Nothing waits for the network while
the machine is frozen: it is thawed as soon as the cut is sealed here.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from cdp.agent.errors import Fenced, TakeoverUnderWay, no_recovery_point
from cdp.agent.freezing import Freezer
from cdp.agent.pipeline import Pipeline
from cdp.agent.status import Status
from journal.position import Position
from journal.wire import Struct

if TYPE_CHECKING:
    from cdp.agent.push import Pusher


class BookmarkArgs(Struct):
    label: str
    application: bool = False


class Bookmarks:
    """``lock``: that of all orders. ``pusher`` is set right after construction."""

    pusher: Pusher

    def __init__(self, pipeline: Pipeline, freezer: Freezer, status: Status, lock: asyncio.Lock) -> None:
        self._pipeline = pipeline
        self._freezer = freezer
        self._status = status
        self._lock = lock

    async def add(self, args: BookmarkArgs) -> dict[str, Any]:
        """``position``, stored, and ``hooks``: what they said."""
        self._check()
        said = ""
        if args.application:
            async with self._freezer.prepared(args.label) as guarded, self._lock:
                self._check()
                await guarded.freeze()
                position = await self._pipeline.seal_now(hold=False)
                said = await guarded.thaw()
        else:
            async with self._lock:
                self._check()
                position = await self._pipeline.seal_now(hold=False)
        await self._stored(position)
        return {"position": str(position), "hooks": said}

    async def enforce(self) -> None:
        await self._freezer.enforce()

    async def _stored(self, position: Position) -> None:
        self.pusher.notify()
        await self.pusher.wait_stored(position)

    def _check(self) -> None:
        """Before anything is held up for nothing."""
        if self._status.fenced:
            raise Fenced("This machine is fenced; it seals nothing.", remedy="See 'cdp status'.")
        if self._status.quiesced:
            raise TakeoverUnderWay(
                "A takeover has quiesced this machine.", remedy="Repeat it when the takeover is over: 'cdp status'."
            )
        if self._status.fuzzy:
            raise no_recovery_point(self._status.fuzzy_reason)
