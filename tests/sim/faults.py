"""Chance, time and death in a schedule. Everything random comes from one seeded generator."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final

from standby.replay.ports import T

RATES: Final = {
    "request-lost": 0.06,
    "answer-lost": 0.06,
    "answer-late": 0.05,
    "request-late": 0.03,
    "request-damaged": 0.004,
    "answer-damaged": 0.03,
    "server-dies-before-answer": 0.02,
    "agent-dies": 0.02,
    "writes-lost": 0.05,
}
"""What may happen at each request, or at each step of the agent; a schedule scales each of them."""


class Died(BaseException):
    """A process was killed here. Not an ``Exception``: nothing in it may handle that."""


class Dice:
    """The generator of one schedule. ``calm``: no fault happens any more."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.calm = False
        self._rates = {what: rate * self.random.choice((0.0, 0.0, 1.0, 3.0)) for what, rate in RATES.items()}

    def happens(self, what: str) -> bool:
        return not self.calm and self.random.random() < self._rates[what]

    def die(self, what: str) -> None:
        if self.happens(what):
            raise Died(what)


class Clock:
    """``standby.replay.ports.Clock`` in the loop's virtual time; the wall clock may jump."""

    def __init__(self) -> None:
        self.wall_offset_s = 1.7e9

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def time(self) -> float:
        return self.wall_offset_s + self.monotonic()

    def time_ns(self) -> int:
        return int(self.time() * 1e9)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def inline(work: Callable[[], T], /) -> Awaitable[T]:
    """``Offload`` without threads."""

    async def run() -> T:
        await asyncio.sleep(0)
        return work()

    return run()
