"""Who waits for a sealed recovery point, and the hold that may follow.

ask ──► the beat cuts ──► grant (with a hold, if one was asked for) or refuse
                            └► held: nothing may be added to the history; whoever asks again gets the same position
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Final

from journal.errors import CdpError
from journal.position import Position

HOLD_S_MAX: Final = 120.0
"""A planned takeover that has not fenced by then has failed; the raw spool must not fill up for it."""


class SealOrders:
    """Belongs to the event loop. Orders are answered in the order of their coming, the first ``asked`` of them."""

    def __init__(self) -> None:
        self._waiting: list[tuple[bool, asyncio.Future[Position]]] = []
        self._held_until = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, *, hold: bool) -> asyncio.Future[Position]:
        order: asyncio.Future[Position] = asyncio.get_running_loop().create_future()
        self._waiting.append((hold, order))
        return order

    @property
    def held(self) -> bool:
        return time.monotonic() < self._held_until

    def release(self) -> None:
        """End a hold."""
        self._held_until = 0.0

    def grant(self, asked: int, position: Position) -> None:
        for hold, order in self._take(asked):
            if hold and not self.held:
                self._held_until = time.monotonic() + HOLD_S_MAX
            order.set_result(position)

    def refuse(self, asked: int, error: Callable[[], CdpError]) -> None:
        for _, order in self._take(asked):
            order.set_exception(error())

    def _take(self, asked: int) -> Iterator[tuple[bool, asyncio.Future[Position]]]:
        orders, self._waiting = self._waiting[:asked], self._waiting[asked:]
        return (order for order in orders if not order[1].done())
