"""Waiting for a condition with a deadline: the only way a test waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], deadline_s: float, what: str, poll_s: float = 0.02) -> None:
    """Return once ``condition()`` is true; raise ``TimeoutError`` naming ``what`` after ``deadline_s`` seconds."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {deadline_s} s")
        time.sleep(poll_s)


async def wait_until_async(condition: Callable[[], object], deadline_s: float, what: str, poll_s: float = 0.02) -> None:
    """The same inside an event loop."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {deadline_s} s")
        await asyncio.sleep(poll_s)
