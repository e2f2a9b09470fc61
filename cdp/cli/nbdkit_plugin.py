"""nbdkit's Python plugin that reads a held image from the server: what ``cdp export`` starts.

    NBD client ─► nbdkit ─► pread ─► blocks in memory ─► GET data     ─► server
                        └─► extents ─────────────────► GET extents ─┘

It runs inside of nbdkit, with the Python that nbdkit was built for: the standard library is all that it has, and
``cdp`` never imports it. Requests run in parallel, each thread with a connection of its own. A server that is away is
waited for: a machine that runs on the export stalls instead of seeing errors.
"""

from __future__ import annotations

import errno
import http.client
import json
import ssl
import sys
import threading
import time
from array import array
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import nbdkit

API_VERSION = 2
BLOCK_BYTES: Final = 64 << 10
"""Small reads are served from whole blocks: file systems keep together what they use together."""
CACHE_BYTES: Final = 64 << 20
AHEAD_BLOCKS_MAX: Final = 64
"""Whoever reads one block after another gets up to 4 MiB at once."""
REQUEST_BYTES_MAX: Final = 32 << 20
HOLE: Final = 1 << 63
ANSWER_S: Final = 120.0
AWAY_S: Final = 300.0
"""How long a read waits for a server that is away, before it fails with EIO."""
RETRY_S: Final = 0.5

settings: dict[str, str] = {}
disks: dict[str, dict[str, Any]] = {}


class Refused(Exception):
    """The server's typed refusal: repeating the request is of no use."""


class Server:
    """Raises ``Refused``, and ``OSError`` once the server has been away for too long."""

    def __init__(self, url: str, ca_pem: str, authorization: str, path: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port or 443
        self._context = ssl.create_default_context(cadata=ca_pem)
        self._headers = {"Authorization": authorization, "User-Agent": "cdp export"}
        self._path = path
        self._local = threading.local()

    def get(self, what: str, query: dict[str, int], into: memoryview | None = None) -> bytes:
        """The body, or b"" if it was read into ``into``, which it has to fill."""
        until_s = time.monotonic() + AWAY_S
        while True:
            try:
                return self._get(f"{self._path}/{what}?{urlencode(query)}", into)
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                if time.monotonic() > until_s:
                    raise OSError(errno.EIO, f"the server cannot be reached: {error}") from error
                # A kept connection that the server has closed says so at once; a server that is away needs time.
                if not isinstance(error, http.client.RemoteDisconnected):
                    time.sleep(RETRY_S)

    def _get(self, target: str, into: memoryview | None) -> bytes:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=ANSWER_S, context=self._context)
            self._local.connection = connection
        connection.request("GET", target, headers=self._headers)
        answer = connection.getresponse()
        if answer.status != 200:
            self._refuse(answer.status, answer.read())
        if into is None:
            body: bytes = answer.read()
            return body
        done = 0
        while done < len(into):
            got = answer.readinto(into[done:])
            if not got:
                raise http.client.IncompleteRead(b"", len(into) - done)
            done += got
        answer.read()
        return b""

    def _refuse(self, status: int, body: bytes) -> None:
        try:
            told = json.loads(body)
        except ValueError:
            raise OSError(errno.EIO, f"HTTP status {status}") from None
        if status in (503, 504):
            raise OSError(errno.EAGAIN, told.get("sentence", ""))
        raise Refused(f"{told.get('sentence', status)} {told.get('remedy', '')}")

    def _drop(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None


class Disk:
    """One disk of the image. Thread-safe."""

    def __init__(self, server: Server, index: int, size_bytes: int, cache: Cache) -> None:
        self.size_bytes = size_bytes
        self._server = server
        self._index = index
        self._cache = cache
        self._lock = threading.Lock()
        self._next_block = -1
        self._ahead = 1

    def read(self, out: memoryview, offset: int) -> None:
        if len(out) >= BLOCK_BYTES:
            for at in range(0, len(out), REQUEST_BYTES_MAX):
                part = out[at : at + REQUEST_BYTES_MAX]
                self._server.get("data", self._range(offset + at, len(part)), part)
            return
        done = 0
        while done < len(out):
            number, skip = divmod(offset + done, BLOCK_BYTES)
            block = self._block(number)
            take = min(len(block) - skip, len(out) - done)
            out[done : done + take] = block[skip : skip + take]
            done += take

    def extents(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        start = offset - offset % 512
        stop = min(-(-(offset + length) // 512) * 512, self.size_bytes)
        packed = array("Q")
        packed.frombytes(self._server.get("extents", self._range(start, stop - start)))
        if sys.byteorder == "big":
            packed.byteswap()
        found = []
        at = start
        for word in packed:
            size = word & ~HOLE
            found.append((at, size, nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO if word & HOLE else 0))
            at += size
        return found

    def _block(self, number: int) -> memoryview:
        key = (self._index, number)
        while True:
            block, mine = self._cache.get_or_claim(key)
            if block is not None:
                return block
            if mine:
                break
        claimed = [number]
        try:
            with self._lock:
                self._ahead = min(self._ahead * 2, AHEAD_BLOCKS_MAX) if number == self._next_block else 1
                wanted = self._ahead
            for following in range(number + 1, min(number + wanted, -(-self.size_bytes // BLOCK_BYTES))):
                if not self._cache.claim((self._index, following)):
                    break
                claimed.append(following)
            with self._lock:
                self._next_block = claimed[-1] + 1
            return self._fetch(claimed)
        finally:
            for one in claimed:
                self._cache.release((self._index, one))

    def _fetch(self, numbers: list[int]) -> memoryview:
        start = numbers[0] * BLOCK_BYTES
        stop = min((numbers[-1] + 1) * BLOCK_BYTES, self.size_bytes)
        body = memoryview(bytearray(stop - start))
        self._server.get("data", self._range(start, stop - start), body)
        for number in numbers:
            piece = body[number * BLOCK_BYTES - start : (number + 1) * BLOCK_BYTES - start]
            # A copy, so that a block that stays does not keep its neighbours in memory.
            self._cache.put((self._index, number), memoryview(bytes(piece)))
        return body[:BLOCK_BYTES]

    def _range(self, offset: int, length: int) -> dict[str, int]:
        return {"disk": self._index, "offset": offset, "length": length}


class Cache:
    """The blocks used last; each is fetched by one thread, and others that want it wait for that one."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks: OrderedDict[tuple[int, int], memoryview] = OrderedDict()
        self._blocks_max = blocks_max
        self._fetching: set[tuple[int, int]] = set()
        self._changed = threading.Condition()

    def get_or_claim(self, key: tuple[int, int]) -> tuple[memoryview | None, bool]:
        """The block, or whether the caller has to fetch it; neither: look again."""
        with self._changed:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
                return block, False
            if key in self._fetching:
                self._changed.wait()
                return None, False
            self._fetching.add(key)
            return None, True

    def claim(self, key: tuple[int, int]) -> bool:
        with self._changed:
            if key in self._blocks or key in self._fetching:
                return False
            self._fetching.add(key)
            return True

    def put(self, key: tuple[int, int], block: memoryview) -> None:
        with self._changed:
            self._blocks[key] = block
            while len(self._blocks) > self._blocks_max:
                self._blocks.popitem(last=False)

    def release(self, key: tuple[int, int]) -> None:
        with self._changed:
            self._fetching.discard(key)
            self._changed.notify_all()


# --- what nbdkit calls ------------------------------------------------------------------------------------------------
def config(key: str, value: str) -> None:
    """``credential``: the operator's file; ``server``: URL; ``path``: of the export; ``disks``: JSON, by export name;
    ``default``: the one that a client gets which names none."""
    settings[key] = value


def config_complete() -> None:
    held = json.loads(Path(settings["credential"]).read_bytes())
    authorization = f"Bearer {held['credential']}.{held['secret']}"
    server = Server(settings["server"], held["ca_pem"], authorization, settings["path"])
    cache = Cache(CACHE_BYTES // BLOCK_BYTES)
    for name, disk in json.loads(settings["disks"]).items():
        disks[name] = {"disk": Disk(server, disk["index"], disk["size_bytes"], cache), "about": disk["about"]}


def thread_model() -> int:
    model: int = nbdkit.THREAD_MODEL_PARALLEL
    return model


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:  # noqa: ARG001
    return [(name, one["about"]) for name, one in disks.items()]


def default_export(readonly: bool, is_tls: bool) -> str:  # noqa: ARG001
    return settings["default"]


def open(readonly: bool) -> Disk:  # noqa: A001, ARG001
    name = nbdkit.export_name() or settings["default"]
    if name not in disks:
        nbdkit.set_error(errno.ENOENT)
        raise Refused(f"no disk {name!r}; there are: {', '.join(disks)}")
    found: Disk = disks[name]["disk"]
    return found


def get_size(disk: Disk) -> int:
    return disk.size_bytes


def block_size(disk: Disk) -> tuple[int, int, int]:  # noqa: ARG001
    return 1, 64 << 10, REQUEST_BYTES_MAX


def can_multi_conn(disk: Disk) -> bool:  # noqa: ARG001
    return True


def can_extents(disk: Disk) -> bool:  # noqa: ARG001
    return True


def pread(disk: Disk, buf: bytearray, offset: int, flags: int) -> None:  # noqa: ARG001
    disk.read(memoryview(buf), offset)


def extents(disk: Disk, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:  # noqa: ARG001
    return disk.extents(offset, count)
