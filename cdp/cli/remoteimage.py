"""A disk of a held image, as the server gives it: what ``ImageFile`` writes for ``cdp recover``.

The server checks each stored frame against its checksum before it answers, and TLS protects the way. A server that is
away is waited for.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from cdp.cli.errors import ServerUnreachable
from cdp.cli.nbd import Held
from cdp.imagefile import Fill
from cdp.server import export_messages as x
from journal import wire

T = TypeVar("T")

CONNECTIONS: Final = 3
AWAY_S: Final = 300.0
"""How long a server that is away is waited for."""
_RETRY_S: Final = 0.5


class RemoteImage:
    def __init__(self, held: Held, disk: wire.DiskInfo) -> None:
        self._held = held
        self._disk = disk

    def size_bytes(self) -> int:
        return self._disk.size_bytes

    def extents(self) -> Iterator[tuple[int, int, bool]]:
        at = 0
        while at < self._disk.size_bytes:
            words = self._extents_from(at)
            if not words:
                raise ServerUnreachable("The server does not tell what the disk holds.", remedy="Repeat the command.")
            for word in words:
                size = word & ~x.HOLE
                yield at, size, bool(word & x.HOLE)
                at += size

    def _extents_from(self, at: int) -> array[int]:
        query = {"disk": self._disk.index, "offset": at, "length": self._disk.size_bytes - at}
        packed = array("Q")
        packed.frombytes(_patiently(lambda: self._held.client.raw("GET", self._held.path + "/extents", **query)))
        if sys.byteorder == "big":
            packed.byteswap()
        return packed

    @contextmanager
    def filling(self) -> Iterator[Fill]:
        client = self._held.client.another()
        path = self._held.path + "/data"

        def fill(offset: int, into: memoryview) -> None:
            query = {"disk": self._disk.index, "offset": offset, "length": len(into)}
            _patiently(lambda: client.read_into(into, path, **query))

        try:
            yield fill
        finally:
            client.close()


def _patiently(ask: Callable[[], T]) -> T:
    until_s = time.monotonic() + AWAY_S
    while True:
        try:
            return ask()
        except ServerUnreachable:
            if time.monotonic() > until_s:
                raise
            time.sleep(_RETRY_S)
