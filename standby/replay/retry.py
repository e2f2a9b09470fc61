"""Trying again, with a bound and with growing pauses."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Final

from journal.errors import SegmentDamaged
from standby.replay.ports import Clock, T

PAUSE_S_MAX: Final = 15.0
"""Longest pause: what a returned server waits for at most."""
_FETCHES_MAX: Final = 3
"""A segment that is damaged this often is not damaged on the way."""


def pause_s(failures: int, first_s: float = 0.25) -> float:
    """Before the next try after ``failures`` in a row: doubles, with jitter so that standbys do not come in step."""
    return float(min(first_s * 2 ** min(failures, 10), PAUSE_S_MAX) * random.uniform(0.5, 1.0))  # noqa: S311


async def undamaged(fetch: Callable[[], Awaitable[T]], clock: Clock) -> T:
    """Fetch again what arrives damaged, a few times; every other error is the caller's."""
    failures = 0
    while True:
        try:
            return await fetch()
        except SegmentDamaged:
            failures += 1
            if failures >= _FETCHES_MAX:
                raise
            await clock.sleep(pause_s(failures))
