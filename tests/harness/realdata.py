"""Data as machines have it, for benchmarks: files of this host's /usr behind one another, and a change set on top."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

from cdp.store import Store
from journal.encoder import Encoder
from journal.extent import Extents, Kind
from journal.position import Position
from journal.wire import DiskInfo

BLOCK = 4096
COPY_BYTES = 8 << 20
FILE_BYTES_MAX = 32 << 20


def write_base(path: Path, size_bytes: int) -> None:
    """``size_bytes`` of file contents, the same ones each time on the same host."""
    with path.open("wb") as out:
        for content in _contents():
            out.write(content[: size_bytes - out.tell()])
            if out.tell() >= size_bytes:
                return
        raise AssertionError("this host has too few files in /usr")


def change(path: Path, second: int, blocks: int) -> list[tuple[int, bytes]]:
    """``(offset, content)`` of one second's changes, ascending: blocks from elsewhere on the disk, slightly altered."""
    rng = random.Random(second)
    count = path.stat().st_size // BLOCK
    with path.open("rb") as file:
        changes = []
        for block in sorted(rng.sample(range(count), blocks)):
            content = bytearray(os.pread(file.fileno(), BLOCK, rng.randrange(count) * BLOCK))
            content[:16] = rng.randbytes(16)
            changes.append((block * BLOCK, bytes(content)))
        return changes


def apply(path: Path, changes: list[tuple[int, bytes]]) -> None:
    with path.open("r+b") as file:
        for offset, content in changes:
            os.pwrite(file.fileno(), content, offset)


class Stored:
    """A machine in ``store`` whose one disk is filled as a seed does it, and then changes second by second."""

    def __init__(self, store: Store, name: str, size_bytes: int, start_ns: int) -> None:
        self._store = store
        disk = DiskInfo(index=0, name="vda", size_bytes=size_bytes)
        self.machine = store.create_machine(name, [disk]).uuid
        self._encoder = Encoder(self.machine)
        self._start_ns = start_ns

    def seed(self, path: Path) -> Position:
        with path.open("rb") as file:
            offset = 0
            while content := file.read(COPY_BYTES):
                self.second([(offset, content)])
                offset += len(content)
        return self._store.live(self.machine)

    def second(self, writes: list[tuple[int, bytes]]) -> Position:
        tip = self._store.live(self.machine)
        at_ns = self._start_ns + (tip.seq + 1) * 10**9
        _, raw = self._encoder.encode(
            tip,
            Extents.from_rows([(0, offset, len(content), Kind.DATA) for offset, content in writes]),
            [content for _, content in writes],
            opened_at_ns=at_ns - 10**9,
            sealed_at_ns=at_ns,
            sealed_monotonic_ns=at_ns,
        )
        return self._store.put_segment(self.machine, raw)[0]


def _contents() -> Iterator[bytes]:
    for directory, below, names in os.walk("/usr"):
        below.sort()
        for name in sorted(names):
            path = Path(directory) / name
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= FILE_BYTES_MAX:
                yield path.read_bytes()
