"""What the replay engine needs from outside: transport, disks, clock and a way to run blocking work.

Everything is passed in, so that a simulation can break any of it. The real ones are ``fetch.HttpTransport``,
``device.BlockDisk``, ``SystemClock`` and ``asyncio.to_thread``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol, TypeVar

from journal.errors import CdpError
from journal.extent import Extents
from journal.position import Position
from journal.wire import FeedAnswer, MachineState

T = TypeVar("T")

Until = Literal["recovery-point", "tip"]


class Transport(Protocol):
    """One machine's history on the server. A call is tried once; retries are the engine's.

    Raises ``ServerUnreachable`` (transient) when there was no answer, otherwise the server's own typed error.
    """

    async def state(self) -> MachineState: ...

    async def feed(self, after: Position, until: Until, wait_s: float) -> FeedAnswer:
        """The entries that follow ``after``; with ``recovery-point`` whole runs only. May wait up to ``wait_s``."""
        ...

    async def segment(self, position: Position) -> bytes | bytearray | memoryview:
        """The encoded bytes, not verified yet."""
        ...

    async def image(self, at: Position, disk: int, offset: int, length: int) -> bytes | bytearray | memoryview:
        """``wire.IMAGE``: one encoded segment that holds that range of the disk, not verified yet."""
        ...

    async def hashes(self, disk: int, offset: int, length: int, chunk: int) -> bytes:
        """``wire.HASHES``: 32 bytes for each chunk of the newest image."""
        ...

    async def cursor(self) -> Position | None:
        """The position last acknowledged, None if there was none."""
        ...

    async def ack(self, position: Position) -> None:
        """Make ``position`` the durable cursor of this standby."""
        ...

    async def forget(self) -> None:
        """Remove the cursor: the disks are going to be written by somebody else."""
        ...


class Disk(Protocol):
    """One target disk. Blocking; the engine calls it through ``Offload``. Raises ``OSError``.

    Offsets and lengths are multiples of 512 whatever ``sector_bytes`` is. Nothing is durable before ``flush``.
    """

    @property
    def size_bytes(self) -> int: ...

    def write(self, writes: Sequence[tuple[int, memoryview]]) -> None:
        """``(offset, bytes)`` pairs, sorted and disjoint; the bytes lie at multiples of 512 in memory."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """Make the range read as zeros, and give its space back if the disk can do both."""
        ...

    def read(self, offset: int, length: int) -> memoryview: ...

    def flush(self) -> None: ...


class Clock(Protocol):
    def monotonic(self) -> float: ...

    def time(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class Offload(Protocol):
    """Runs a blocking function without blocking the event loop."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


class Observer(Protocol):
    """Told what happens to the disks, so that what was read from them can be kept up to date."""

    def everything_changed(self) -> None: ...

    def applied(self, extents: Extents) -> None: ...

    async def recovery_point(self, position: Position, /) -> None:
        """The disks are consistent, flushed and stand still until this returns."""
        ...


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class ServerUnreachable(CdpError):
    """No answer, or one that broke off."""

    code = "server-unreachable"
    transient = True
    http_status = 503


class TargetTooSmall(CdpError):
    """A target disk cannot hold the disk that it should become."""

    code = "target-too-small"
    http_status = 409


class TargetMissing(CdpError):
    """A protected disk has no target disk."""

    code = "target-missing"
    http_status = 409


class TargetFailed(CdpError):
    """The target disk returned an I/O error."""

    code = "target-failed"
    transient = True


class FlushFailed(TargetFailed):
    """The target disk could not say that it is durable; a second flush that succeeds would not vouch for the first, so
    that nobody knows what the disk holds: it must be compared again."""

    code = "flush-failed"


class HistoryChanged(CdpError):
    """The applied position is no longer in the live history; the disks must be seeded again."""

    code = "history-changed"
    transient = True
    http_status = 409


class DrainRefused(CdpError):
    """The asked position cannot be reached from what has been applied."""

    code = "drain-refused"
    http_status = 409
