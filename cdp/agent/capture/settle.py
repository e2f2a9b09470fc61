"""Has every write that was submitted before a moment completed?

    submitted ──► (≤ 1 s) counted as in flight ──► completed
         │                                            │
         since                         inflight writes == 0, seen at least 1 s after ``since``

Between the tracepoint and the counter a write waits for a request slot, which a busy queue hands out in order; one
second covers that. A queue that is never seen empty is bounded by its own timeout: by then the kernel has ended it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cdp.agent.capture.devices import SYSFS, Device
from cdp.agent.capture.errors import NotSettled

ACCOUNTED_NS = 1_000_000_000
POLL_S = 0.002
TIMEOUT_SLACK_NS = 5_000_000_000
IO_TIMEOUT_MS_DEFAULT = 30_000


class Clock(Protocol):
    def monotonic_ns(self) -> int: ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def wait_settled(
    devices: Sequence[Device], since_ns: int, clock: Clock | None = None, sysfs: Path = SYSFS
) -> None:
    """Return once no write submitted before ``since_ns`` (CLOCK_MONOTONIC) can be in flight on any of the devices.

    Raises ``NotSettled`` if a device disappears meanwhile.
    """
    clock = clock or SystemClock()
    for device in devices:
        await _settle(device, since_ns, clock, sysfs)


async def _settle(device: Device, since_ns: int, clock: Clock, sysfs: Path) -> None:
    directory = sysfs / f"dev/block/{device.major}:{device.minor}"
    timeout_ms = IO_TIMEOUT_MS_DEFAULT
    with contextlib.suppress(OSError, ValueError):  # bio-based: the devices below have the usual one
        timeout_ms = int((directory / "queue/io_timeout").read_text())
    certain_ns = since_ns + timeout_ms * 1_000_000 + TIMEOUT_SLACK_NS
    await _sleep_until(since_ns + ACCOUNTED_NS, clock)
    while clock.monotonic_ns() < certain_ns:
        if _writes_in_flight(directory, device) == 0:
            return
        await clock.sleep(POLL_S)


async def _sleep_until(moment_ns: int, clock: Clock) -> None:
    while (left_ns := moment_ns - clock.monotonic_ns()) > 0:
        await clock.sleep(left_ns / 1e9)


def _writes_in_flight(directory: Path, device: Device) -> int:
    try:
        return int((directory / "inflight").read_text().split()[1])
    except (OSError, IndexError, ValueError) as error:
        raise NotSettled(
            f"{device.path} cannot be asked for writes in flight.",
            remedy="Check that the disk is still there.",
            path=str(device.path),
        ) from error
