"""Before a first seed: what does the server have already?

    state "open" ─► begin ─► a sample: is anything known? ─► every chunk of every disk, in batches ─► end ─► compare

The disks are read once for this, and again by the comparison that follows: what was written in between simply differs.
Chunks of zeros are not asked for. Nothing is captured into a history meanwhile, because there is none yet.

Where a sample of a large machine finds nothing, asking is given up: reading everything twice would gain nothing.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from cdp.agent.copy import CHUNK_BYTES as READ_BYTES
from cdp.agent.copy import disk_unreadable
from cdp.agent.dirty import Geometry
from cdp.agent.errors import ServerUnreachable
from cdp.agent.push import BACKOFF_S
from cdp.agent.rate import Bucket
from cdp.agent.status import Status
from journal import proof, wire
from journal.errors import CdpError
from journal.wire import Progress

log = logging.getLogger(__name__)

SAMPLE: Final = 512
"""Chunks: with one in a hundred known, it is missed with less than one in a hundred."""
SAMPLE_FROM_CHUNKS: Final = 1 << 16
"""4 GiB: smaller machines are read whole at once."""


TRIES_MAX: Final = 8
"""Of one batch, with growing pauses: some twenty seconds, more than a restart of the server takes."""


class Server(Protocol):
    async def state(self) -> wire.MachineState: ...

    async def begin_prefill(self) -> bytes: ...

    async def prefill(self, key: bytes, disk: int, body: bytes) -> int: ...

    async def end_prefill(self) -> wire.PrefillEnded: ...


async def settled_state(server: Server) -> wire.MachineState:
    """Where the history stands, with the prefill ended if it was still open: before a history begins."""
    state = await server.state()
    if state.prefill == "open":
        await server.end_prefill()
        state = await server.state()
    return state


class Asker:
    """``bytes_per_s_max``: of reading; 0: no limit."""

    def __init__(
        self,
        server: Server,
        disks: list[Geometry],
        paths: dict[int, Path],
        *,
        status: Status,
        worker: Executor,
        bytes_per_s_max: float,
    ) -> None:
        self._server = server
        self._disks = disks
        self._paths = paths
        self._status = status
        self._worker = worker
        self._pace = Bucket(bytes_per_s_max or None)
        self._total_bytes = sum(disk.size_bytes for disk in disks)
        self._done_bytes = 0

    async def run(self) -> None:
        """Ask for everything, and end it. Raises transient errors only: then ask again. Any other one ends the asking,
        because a seed needs none of it."""
        self._done_bytes = 0
        try:
            key = await self._server.begin_prefill()
            if await self._is_worth_it(key):
                laid = 0
                for disk in self._disks:
                    laid += await self._ask(key, disk)
                log.info(
                    "the server has %d MiB of %d MiB already", laid * proof.CHUNK_BYTES >> 20, self._total_bytes >> 20
                )
        except CdpError as error:
            if error.transient:
                raise
            log.warning("everything is sent: %s", error)
        finally:
            self._status.progress = None
        await self._server.end_prefill()

    async def _is_worth_it(self, key: bytes) -> bool:
        chunks = self._total_bytes // proof.CHUNK_BYTES
        if chunks < SAMPLE_FROM_CHUNKS:
            return True
        step = chunks // SAMPLE * proof.CHUNK_BYTES
        for disk in self._disks:
            offsets = range(0, disk.size_bytes - proof.CHUNK_BYTES + 1, step)
            with _Reader(self._paths[disk.index], disk.index) as reader:
                body = bytearray()
                for offset in offsets:
                    body += await self._in_worker(reader, key, offset, proof.CHUNK_BYTES)
            for part in _parts(bytes(body)):
                if await self._send(key, disk.index, part):
                    return True
        return False

    async def _ask(self, key: bytes, disk: Geometry) -> int:
        laid, body = 0, bytearray()
        with _Reader(self._paths[disk.index], disk.index) as reader:
            for offset in range(0, disk.size_bytes, READ_BYTES):
                length = min(READ_BYTES, disk.size_bytes - offset)
                await self._pace.take(length)
                body += await self._in_worker(reader, key, offset, length)
                self._done_bytes += length
                if len(body) > (proof.ENTRIES_MAX - READ_BYTES // proof.CHUNK_BYTES) * proof.ENTRY_BYTES:
                    laid += await self._send(key, disk.index, bytes(body))
                    body.clear()
                    self._show()
        if body:
            laid += await self._send(key, disk.index, bytes(body))
        return laid

    async def _send(self, key: bytes, disk: int, body: bytes) -> int:
        """Lost answers are asked for again: a short outage must not cost hours of reading."""
        for tried in range(TRIES_MAX):
            try:
                return await self._server.prefill(key, disk, body)
            except ServerUnreachable:
                if tried == TRIES_MAX - 1:
                    raise
                await asyncio.sleep(BACKOFF_S[0] * 2**tried)
        raise AssertionError

    async def _in_worker(self, reader: _Reader, key: bytes, offset: int, length: int) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, reader.entries, key, offset, length)

    def _show(self) -> None:
        self._status.progress = Progress(what="dedup", done_bytes=self._done_bytes, total_bytes=self._total_bytes)


class _Reader:
    """One disk, past the page cache."""

    def __init__(self, path: Path, disk: int) -> None:
        self._path = path
        self._disk = disk
        self._buffer = mmap.mmap(-1, READ_BYTES)
        self._fd = -1

    def __enter__(self) -> _Reader:
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            raise disk_unreadable(self._path, self._disk, 0, str(error)) from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def entries(self, key: bytes, offset: int, length: int) -> bytes:
        """What to ask for of a range that begins on a chunk. Raises ``DiskReadFailed``."""
        view = memoryview(self._buffer)
        try:
            got = os.preadv(self._fd, [view[:length]], offset)
        except OSError as error:
            raise disk_unreadable(self._path, self._disk, offset, str(error)) from error
        if got != length:
            raise disk_unreadable(self._path, self._disk, offset, f"{got} bytes came")
        found = bytearray()
        for at in range(0, length - proof.CHUNK_BYTES + 1, proof.CHUNK_BYTES):
            chunk = view[at : at + proof.CHUNK_BYTES]
            if np.frombuffer(chunk, np.uint64).any():
                found += proof.entry((offset + at) // proof.CHUNK_BYTES, chunk, key)
        return bytes(found)


def _parts(body: bytes) -> Iterator[bytes]:
    size = proof.ENTRIES_MAX * proof.ENTRY_BYTES
    for at in range(0, len(body), size):
        yield body[at : at + size]
