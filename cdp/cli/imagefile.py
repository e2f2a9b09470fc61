"""A disk of a held image, written to a file: sparse, in parallel, synced, and read back if that is asked for.

    plan     GET extents ─► batches of data, ascending, holes skipped
    fetch    CONNECTIONS threads: GET data ─► write in place
    sync     a thread of its own, so that the disk works while the network does
    check    what the disk gives back, against the digests of what was received

The server checks each stored frame against its checksum before it answers, and TLS protects the way.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

from blake3 import blake3

from cdp.cli.errors import RecoverFailed, ServerUnreachable
from cdp.cli.nbd import Held
from cdp.server import export_messages as x
from journal import wire

Advance = Callable[[int], None]
T = TypeVar("T")

CONNECTIONS: Final = 3
BATCH_BYTES: Final = 8 << 20
"""One request: large enough that its round trip does not matter, small enough for a moving bar."""
GAP_BYTES_MAX: Final = 64 << 10
"""Smaller holes are fetched with what surrounds them; they are not written."""
SYNC_BYTES: Final = 64 << 20
AWAY_S: Final = 300.0
"""How long a server that is away is waited for."""
_RETRY_S: Final = 0.5


@dataclass(slots=True)
class Batch:
    """``parts``: ``(offset, length)`` of data, ascending; ``end``: of the disk that is done with it, holes included."""

    parts: list[tuple[int, int]] = field(default_factory=list)
    end: int = 0

    @property
    def start(self) -> int:
        return self.parts[0][0]

    @property
    def length(self) -> int:
        last = self.parts[-1]
        return last[0] + last[1] - self.start


class ImageFile:
    """Raises ``RecoverFailed``, ``ServerUnreachable``, the server's refusals, and ``OSError`` of the file."""

    def __init__(self, held: Held, disk: wire.DiskInfo, file: int, advance: Advance) -> None:
        self._held = held
        self._disk = disk
        self._file = file
        self._advance = advance
        self._lock = threading.Lock()
        self._failed: BaseException | None = None
        self._digests: list[tuple[int, int, bytes]] = []
        self._unsynced = 0
        self._due = threading.Semaphore(0)
        self.written_bytes = 0

    def write(self, *, check: bool) -> None:
        """``advance`` is told of disk bytes, and once more of the same if they are read back."""
        os.ftruncate(self._file, self._disk.size_bytes)
        work: queue.Queue[Batch | None] = queue.Queue(2 * CONNECTIONS)
        threads = [threading.Thread(target=self._fetch_all, args=(work, check)) for _ in range(CONNECTIONS)]
        syncing = threading.Thread(target=self._sync_all)
        for thread in (*threads, syncing):
            thread.start()
        try:
            for batch in self._batches():
                if self._failed is not None:
                    break
                work.put(batch)
        finally:
            for _ in threads:
                work.put(None)
            for thread in threads:
                thread.join()
            self._unsynced = -1
            self._due.release()
            syncing.join()
        if self._failed is not None:
            raise self._failed
        os.fsync(self._file)
        if check:
            self._check()

    # --- plan ---------------------------------------------------------------------------------------------------------
    def _batches(self) -> Iterator[Batch]:
        batch = Batch()
        for start, size, is_hole in self._extents():
            if is_hole:
                if batch.parts and size > GAP_BYTES_MAX:
                    batch.end = start + size
                    yield batch
                    batch = Batch()
                else:
                    self._skipped(batch, size)
                continue
            at, left = start, size
            while left:
                room = BATCH_BYTES - (at - batch.start) if batch.parts else BATCH_BYTES
                if room <= 0:
                    batch.end = at
                    yield batch
                    batch = Batch()
                    continue
                take = min(room, left)
                batch.parts.append((at, take))
                at, left = at + take, left - take
        if batch.parts:
            batch.end = self._disk.size_bytes
            yield batch

    def _skipped(self, batch: Batch, size: int) -> None:
        if not batch.parts:
            self._advance(size)

    def _extents(self) -> Iterator[tuple[int, int, bool]]:
        at, path = 0, self._held.path + "/extents"
        while at < self._disk.size_bytes:
            left = self._disk.size_bytes - at
            packed = array("Q")
            packed.frombytes(
                _patiently(lambda: self._held.client.raw("GET", path, disk=self._disk.index, offset=at, length=left))  # noqa: B023
            )
            if sys.byteorder == "big":
                packed.byteswap()
            for word in packed:
                size = word & ~x.HOLE
                yield at, size, bool(word & x.HOLE)
                at += size
            if not packed:
                raise ServerUnreachable("The server does not tell what the disk holds.", remedy="Repeat the command.")

    # --- fetch --------------------------------------------------------------------------------------------------------
    def _fetch_all(self, work: queue.Queue[Batch | None], check: bool) -> None:
        client = self._held.client.another()
        buffer = memoryview(bytearray(BATCH_BYTES))
        path = self._held.path + "/data"
        try:
            while (batch := work.get()) is not None:
                if self._failed is not None:
                    continue
                data = buffer[: batch.length]
                query = {"disk": self._disk.index, "offset": batch.start, "length": batch.length}
                try:
                    _patiently(lambda: client.read_into(data, path, **query))  # noqa: B023
                    self._put(batch, data, check)
                except BaseException as error:
                    self._failed = self._failed or error
        finally:
            client.close()

    def _put(self, batch: Batch, data: memoryview, check: bool) -> None:
        for at, size in batch.parts:
            piece, done = data[at - batch.start : at - batch.start + size], 0
            while done < size:
                done += os.pwrite(self._file, piece[done:], at + done)
        digests = []
        if check:
            digests = [
                (at, size, blake3(data[at - batch.start : at - batch.start + size]).digest())
                for at, size in batch.parts
            ]
        written = sum(size for _, size in batch.parts)
        with self._lock:
            self._digests += digests
            self.written_bytes += written
            self._unsynced += written
            if self._unsynced >= SYNC_BYTES:
                self._unsynced = 0
                self._due.release()
            self._advance(batch.end - batch.start)

    # --- sync and check -----------------------------------------------------------------------------------------------
    def _sync_all(self) -> None:
        while True:
            self._due.acquire()
            if self._unsynced < 0 or self._failed is not None:
                return
            try:
                os.fdatasync(self._file)
            except OSError as error:
                self._failed = self._failed or error
                return

    def _check(self) -> None:
        """Not from memory: the pages are dropped first."""
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        at_last = 0
        for at, size, digest in sorted(self._digests):
            if blake3(os.pread(self._file, size, at)).digest() != digest:
                raise RecoverFailed(
                    f"The disk here gives back something else than was written, at byte {at}.",
                    remedy="Check it, or recover to another one.",
                    offset=at,
                    length=size,
                )
            self._advance(at + size - at_last)
            at_last = at + size
        self._advance(self._disk.size_bytes - at_last)


def _patiently(ask: Callable[[], T]) -> T:
    until_s = time.monotonic() + AWAY_S
    while True:
        try:
            return ask()
        except ServerUnreachable:
            if time.monotonic() > until_s:
                raise
            time.sleep(_RETRY_S)
