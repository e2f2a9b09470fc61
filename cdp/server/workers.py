"""Threads for blocking work, a budget for the memory it holds, and news of changes for those who wait for them."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Final, ParamSpec, TypeVar

from journal.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")

WRITERS: Final = 8
"""The store commits machines as a group: eight fdatasyncs in flight took 10 ms where one after another took 18."""
READERS: Final = 8
OUTSIDE: Final = 4
"""For hypervisors and probes, which may hang for their own reasons."""


class Workers:
    """Separate threads for ingest, for reading and for what is not ours, so that neither a recovery nor a hanging
    hypervisor ever delays an acknowledgement."""

    def __init__(self) -> None:
        self._writers = ThreadPoolExecutor(WRITERS, "ingest")
        self._readers = ThreadPoolExecutor(READERS, "read")
        self._outside = ThreadPoolExecutor(OUTSIDE, "outside")

    async def write(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writers, lambda: work(*args, **kwargs))

    async def read(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, lambda: work(*args, **kwargs))

    async def outside(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._outside, lambda: work(*args, **kwargs))

    async def close(self) -> None:
        """Wait for all work that was begun: an acknowledgement may depend on it. What hangs outside is left alone."""
        self._outside.shutdown(wait=False, cancel_futures=True)
        for pool in (self._writers, self._readers):
            await asyncio.to_thread(pool.shutdown)


class ByteBudget:
    """At most ``limit_bytes`` held at once; who asks first gets first, so that large requests are not starved."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, amount_bytes: int) -> AsyncIterator[None]:
        if amount_bytes > self.limit_bytes:
            raise Unavailable(
                f"{amount_bytes} bytes are more than the server may hold at once.",
                remedy="Raise the limits of the server's configuration, or ask for less.",
            )
        await self._take(amount_bytes)
        try:
            yield
        finally:
            self.held_bytes -= amount_bytes
            self._grant()

    async def _take(self, amount_bytes: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (amount_bytes, turn)
        self._queue.append(entry)
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.held_bytes -= amount_bytes  # granted in the very moment of the cancellation
            else:
                self._queue.remove(entry)
            self._grant()
            raise

    def _grant(self) -> None:
        while self._queue:
            amount_bytes, turn = self._queue[0]
            if turn.cancelled():
                return  # its owner removes the entry, and calls again
            if self.held_bytes + amount_bytes > self.limit_bytes:
                return
            self._queue.popleft()
            self.held_bytes += amount_bytes
            turn.set_result(None)


class Changes:
    """News per machine: a version that only grows, and a way to wait until it is another one. No news is ever lost
    between reading the version and waiting, because the version is compared first."""

    def __init__(self) -> None:
        self._versions: defaultdict[uuid.UUID, int] = defaultdict(int)
        self._waiters: defaultdict[uuid.UUID, set[asyncio.Future[None]]] = defaultdict(set)

    def version(self, machine: uuid.UUID) -> int:
        return self._versions.get(machine, 0)

    def notify(self, machine: uuid.UUID) -> None:
        self._versions[machine] += 1
        for waiter in self._waiters.pop(machine, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, machine: uuid.UUID, seen_version: int, timeout_s: float) -> bool:
        """True as soon as the version is not ``seen_version``; False after ``timeout_s``."""
        if self.version(machine) != seen_version:
            return True
        if timeout_s <= 0:
            return False
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[machine].add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            return False
        finally:
            waiting = self._waiters.get(machine)
            if waiting is not None:
                waiting.discard(waiter)
                if not waiting:
                    del self._waiters[machine]
        return True

    def wake_all(self) -> None:
        """For a shutdown: everybody who waits looks again."""
        for machine in list(self._waiters):
            self.notify(machine)

    def forget(self, machine: uuid.UUID) -> None:
        self.notify(machine)
        self._versions.pop(machine, None)
