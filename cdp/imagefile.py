"""A disk of an image, written to a file: sparse, in parallel, synced, and read back if that is asked for.

    plan     extents of the image ─► batches of data, ascending, holes skipped
    fetch    some threads: fill a buffer ─► write it in place
    check    what the disk gives back, against the digests of what was written

Whole pages go past the page cache where the file system can do that: half of the work of writing is copying into it.
Shared by the store (which fetches from itself) and the command line (which fetches from the server).
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from blake3 import blake3

from journal.errors import CdpError

Advance = Callable[[int], None]
"""Told of bytes of the disk, holes included."""
Fill = Callable[[int, memoryview], None]
"""Fill the buffer with the image's content from an offset on; both are multiples of 512."""

BATCH_BYTES: Final = 8 << 20
"""Every batch costs a look into the index of versions, whatever its size: 4 MiB took a fifth longer than 16."""
GAP_BYTES_MAX: Final = 64 << 10
"""Smaller holes are fetched with what surrounds them; they are not written."""
PAGE_BYTES: Final = 4096


class Image(Protocol):
    def size_bytes(self) -> int: ...

    def extents(self) -> Iterator[tuple[int, int, bool]]:
        """``(offset, length, is_hole)``, consecutive, of the whole disk."""

    def filling(self) -> AbstractContextManager[Fill]:
        """What one thread fetches with."""


class WrittenDiffers(CdpError):
    """The disk gives back something else than was written to it."""

    code = "written-differs"


@dataclass(slots=True)
class Batch:
    """``parts``: ``(offset, length)`` of data, ascending; ``disk_bytes``: of the disk that are done with it."""

    parts: list[tuple[int, int]] = field(default_factory=list)
    disk_bytes: int = 0

    @property
    def start(self) -> int:
        return self.parts[0][0]

    @property
    def length(self) -> int:
        last = self.parts[-1]
        return last[0] + last[1] - self.start


class ImageFile:
    """Raises ``WrittenDiffers``, what the image raises, and ``OSError`` of the file."""

    def __init__(self, image: Image, path: Path, advance: Advance, *, threads: int) -> None:
        """``path`` exists; it is overwritten."""
        self._image = image
        self._path = path
        self._advance = advance
        self._threads = threads
        self._lock = threading.Lock()
        self._failed: BaseException | None = None
        self._digests: list[tuple[int, int, bytes]] = []
        self.written_bytes = 0

    def write(self, *, check: bool) -> None:
        """Durable on return. With ``check``, ``advance`` is told of the whole disk twice."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._direct = _open_direct(self._path)
        try:
            os.ftruncate(self._file, 0)
            os.ftruncate(self._file, self._image.size_bytes())
            self._write_all(check)
            os.fsync(self._file)
            if check:
                self._check()
        finally:
            os.close(self._file)
            if self._direct is not None:
                os.close(self._direct)

    def _write_all(self, check: bool) -> None:
        work: queue.Queue[Batch | None] = queue.Queue(2 * self._threads)
        threads = [threading.Thread(target=self._fetch_all, args=(work, check)) for _ in range(self._threads)]
        for thread in threads:
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
        if self._failed is not None:
            raise self._failed

    def _batches(self) -> Iterator[Batch]:
        batch = Batch()
        for start, size, is_hole in self._image.extents():
            if is_hole:
                if batch.parts and size > GAP_BYTES_MAX:
                    yield batch
                    batch = Batch()
                batch.disk_bytes += size
                continue
            at, left = start, size
            while left:
                room = BATCH_BYTES - (at - batch.start) if batch.parts else BATCH_BYTES
                if room <= 0:
                    yield batch
                    batch = Batch()
                    continue
                take = min(room, left)
                batch.parts.append((at, take))
                batch.disk_bytes += take
                at, left = at + take, left - take
        if batch.parts:
            yield batch
        else:
            self._advance(batch.disk_bytes)

    def _fetch_all(self, work: queue.Queue[Batch | None], check: bool) -> None:
        # Page-aligned, as writing past the page cache wants it; and used again, so that its pages are there.
        buffer = memoryview(mmap.mmap(-1, BATCH_BYTES + PAGE_BYTES))
        try:
            with self._image.filling() as fill:
                while (batch := work.get()) is not None:
                    if self._failed is None:
                        lead = batch.start % PAGE_BYTES
                        data = buffer[lead : lead + batch.length]
                        fill(batch.start, data)
                        self._put(batch, data, check)
        except BaseException as error:
            self._failed = self._failed or error
            while work.get() is not None:
                pass

    def _put(self, batch: Batch, data: memoryview, check: bool) -> None:
        digests = []
        for at, size in batch.parts:
            piece = data[at - batch.start : at - batch.start + size]
            self._write_at(at, piece)
            if check:
                digests.append((at, size, blake3(piece).digest()))
        with self._lock:
            self._digests += digests
            self.written_bytes += sum(size for _, size in batch.parts)
            self._advance(batch.disk_bytes)

    def _write_at(self, offset: int, data: memoryview) -> None:
        is_whole = offset % PAGE_BYTES == 0 and len(data) % PAGE_BYTES == 0
        file = self._direct if is_whole and self._direct is not None else self._file
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(file, data[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or file == self._file:
                    raise
                # Sectors larger than our pages, or a file system that changed its mind.
                file = self._file

    def _check(self) -> None:
        """Not from memory: the pages are dropped first."""
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        done = 0
        for at, size, digest in sorted(self._digests):
            if blake3(os.pread(self._file, size, at)).digest() != digest:
                raise WrittenDiffers(
                    f"The disk gives back something else than was written to {self._path} at byte {at}.",
                    remedy="Check that disk, or recover to another one.",
                    offset=at,
                    length=size,
                )
            self._advance(at + size - done)
            done = at + size
        self._advance(self._image.size_bytes() - done)


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
