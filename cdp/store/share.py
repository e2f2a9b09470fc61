"""Equal chunks of two base images, made one on disk: reflinks, where the filesystem has them.

The kernel compares the two ranges itself, with both locked, and shares them only if they are equal (FIDEDUPERANGE): a
place that changed meanwhile, or whose content lies in segments, is simply not shared. Content is never touched, so
nothing depends on this, neither order nor durability.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cdp.store.base import CHUNK_BYTES
from cdp.store.chunks import Place
from cdp.store.store import Store
from journal.errors import CdpError

_FIDEDUPERANGE: Final = 0xC0189436
_RANGE: Final = struct.Struct("<QQHHIqQQiI")
"""Source offset, length, count 1; then target fd, target offset, bytes shared, status."""
_RUN_CHUNKS: Final = 16
"""Shared at once: each call writes the range back first, and one difference in it spoils all of it."""
_NEVER: Final = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV)


class Sharer:
    """``shared_bytes``: since the start. Gives up for good on a filesystem that cannot do it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._possible = True
        self.shared_bytes = 0

    def share(self, machine: uuid.UUID, disk: int, places: dict[int, Place]) -> None:
        """``places``: chunk of ``machine``'s base image -> where the same content was found. Never fails: what is not
        shared is stored twice."""
        for number, place, count in _runs(places):
            if not self._possible:
                return
            try:
                source = self._store.base_path(place.machine, place.disk)
                self._share(source, place.number, self._store.base_path(machine, disk), number, count)
            except (CdpError, FileNotFoundError):
                continue  # it has no base image, or none any more
            except OSError as error:
                if error.errno in _NEVER:
                    self._possible = False

    def _share(self, source: Path, at: int, target: Path, number: int, count: int) -> None:
        with source.open("rb") as one, target.open("rb+") as other:
            answer = bytearray(
                _RANGE.pack(
                    at * CHUNK_BYTES, count * CHUNK_BYTES, 1, 0, 0, other.fileno(), number * CHUNK_BYTES, 0, 0, 0
                )
            )
            fcntl.ioctl(one.fileno(), _FIDEDUPERANGE, answer, True)
        *_, shared, status, _ = _RANGE.unpack(answer)
        if status < 0:
            raise OSError(-status, os.strerror(-status))
        self.shared_bytes += shared


def _runs(places: dict[int, Place]) -> Iterator[tuple[int, Place, int]]:
    """``(number, place, count)``: chunks that are neighbours on both sides."""
    begin, count = 0, 0
    for number in sorted(places):
        here = places[number]
        if count:
            first = places[begin]
            follows = number == begin + count and here == Place(first.machine, first.disk, first.number + count)
            if not follows or count == _RUN_CHUNKS:
                yield begin, first, count
                count = 0
        if not count:
            begin = number
        count += 1
    if count:
        yield begin, places[begin], count
