"""How fast the agent may read or send: a token bucket, and when a limit is not kept.

What is taken may exceed what is there: then the bucket is in debt, and the next one waits until it is paid. So the
rate holds over any time longer than ``BURST_S`` and one piece, and no piece has to be smaller than the bucket.

The server's limit is kept for everything that can wait. It is *lifted* while keeping it would cost more than it saves:

    the spool is half full         what it cannot hold is dropped and has to be sent again, as a resync
    the machine is quiesced        a planned takeover waits for the last segment: every second is downtime

What is sent above the limit then counts as ``borrowed_bytes`` and is shown wherever the lag is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

BURST_S: Final = 0.25
"""What may go at once after a pause, in seconds of the rate."""
LOOK_S: Final = 0.5
"""How soon somebody who waits learns of a new rate, or of a limit that was lifted."""
BORROW_FRACTION: Final = 0.5
REPAID_FRACTION: Final = 0.25
"""Of the spool: above the first the limit is lifted, below the second it is kept again."""
SHOWN_S: Final = 30.0
"""A limit that was not kept is shown for so long: a fast line empties the spool within a second, again and again."""
COPY_BACKLOG_S: Final = 0.5
"""A seed or resync adds to the spool only while this much of the limit waits there: the journal is delayed by no more
than twice that, and the line is never idle."""


class Bucket:
    """``bytes_per_s`` None: no limit."""

    def __init__(
        self,
        bytes_per_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.lift: Lift | None = None
        self.borrowed_bytes = 0
        self._exceeded_at = -float("inf")
        self._clock = clock
        self._sleep = sleep
        self._level = self._full
        self._at = clock()

    def set_rate(self, bytes_per_s: float | None) -> None:
        if bytes_per_s == self.bytes_per_s:
            return
        self._refill()
        self.bytes_per_s = bytes_per_s
        # Debts at the old rate are not worth minutes at the new one.
        self._level = max(min(self._level, self._full), -self._full)

    async def take(self, length: int) -> None:
        """Before ``length`` bytes are read or sent."""
        self._refill()
        while self.bytes_per_s is not None and self._level <= 0 and not self._lifted:
            await self._sleep(min(LOOK_S, -self._level / self.bytes_per_s + 0.001))
            self._refill()
        if self.bytes_per_s is None:
            return
        if self._level <= 0:
            self.borrowed_bytes += length
            if self.lift is not None and self.lift.borrowing:
                self._exceeded_at = self._at
            return
        self._level -= length

    @property
    def exceeded(self) -> bool:
        """There is a limit, and because of the spool it is not kept, or was not a moment ago."""
        if self.bytes_per_s is None or self.lift is None:
            return False
        return self.lift.borrowing or self._clock() - self._exceeded_at < SHOWN_S

    @property
    def _lifted(self) -> bool:
        return self.lift is not None and self.lift.now

    @property
    def _full(self) -> float:
        return 0.0 if self.bytes_per_s is None else self.bytes_per_s * BURST_S

    def _refill(self) -> None:
        now = self._clock()
        if self.bytes_per_s is not None:
            self._level = min(self._full, self._level + (now - self._at) * self.bytes_per_s)
        self._at = now


class _Spool(Protocol):
    bytes: int
    bytes_max: int


class Lift:
    """When a limit is not kept. ``quiesced``: every second is downtime."""

    def __init__(self, spool: _Spool, quiesced: Callable[[], bool]) -> None:
        self._spool = spool
        self._quiesced = quiesced
        self._borrowing = False

    @property
    def now(self) -> bool:
        return self.borrowing or self._quiesced()

    @property
    def borrowing(self) -> bool:
        fraction = REPAID_FRACTION if self._borrowing else BORROW_FRACTION
        self._borrowing = self._spool.bytes > self._spool.bytes_max * fraction
        return self._borrowing
