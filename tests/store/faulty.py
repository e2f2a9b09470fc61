"""A disk that fails on purpose: it loses what was not synced, tears writes, fills up, and cuts the power at any step.

What is written stays aside until it is synced. ``power_cut`` decides for each 512-byte sector of what was not synced
whether it reached the platter, and whether a name that was removed without a sync is back.
"""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from cdp.store.files import Buffer, OsFiles

SECTOR_BYTES = 512


class PowerCut(BaseException):
    """Not an ``Exception``: nothing in the store may handle it."""


class FaultyFiles:
    def __init__(self, seed: int = 0) -> None:
        self._real = OsFiles()
        self._random = random.Random(seed)
        self._paths: dict[int, Path] = {}
        self._handles = itertools.count(1000)
        self._unsynced: dict[Path, list[tuple[int, bytes]]] = {}
        self._removed: list[Path] = []
        self._steps_left: int | None = None
        self._dead = False
        self.steps = 0
        self.fail_next: int | None = None
        """The errno that the next write or creation fails with."""
        self.free_bytes: int | None = None
        """What the filesystem says is free; None: the truth."""

    def cut_after(self, steps: int | None) -> None:
        """Cut the power at the ``steps``-th operation from now."""
        self._steps_left = steps

    def power_cut(self) -> None:
        """What is on the platter after the cut; the store that used this must be abandoned."""
        self._dead = True
        for path, writes in self._unsynced.items():
            keep = self._random.choice((0.0, 0.5, 1.0))
            if not path.exists():
                continue  # its whole directory was removed
            handle = self._real.open(path, write=True)
            for offset, data in writes:
                for at in range(0, len(data), SECTOR_BYTES):
                    if self._random.random() < keep:
                        self._real.write(handle, [data[at : at + SECTOR_BYTES]], offset + at)
            self._real.close(handle)
        for path in self._removed:
            hidden = _hidden(path)
            if self._random.random() < 0.5 and not path.exists():
                hidden.rename(path)
            else:
                hidden.unlink()
        self._unsynced.clear()
        self._removed.clear()

    def create(self, path: Path, size_bytes: int) -> None:
        self._fail(errno.ENOSPC)
        if self._step(also_after=True):
            self._real.create(path, size_bytes // 2)
            raise PowerCut
        self._real.create(path, size_bytes)

    def create_sparse(self, path: Path, size_bytes: int) -> None:
        self._fail(errno.ENOSPC)
        if self._step(also_after=True):
            self._real.create_sparse(path, size_bytes)
            raise PowerCut
        self._real.create_sparse(path, size_bytes)

    def open(self, path: Path, *, write: bool = False) -> int:
        self._alive()
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        handle = next(self._handles)
        self._paths[handle] = path
        return handle

    def close(self, handle: int) -> None:
        del self._paths[handle]

    def write(self, handle: int, buffers: Sequence[Buffer], offset: int) -> None:
        self._fail(errno.EIO)
        data = b"".join(bytes(buffer) for buffer in buffers)
        if self._step(also_after=True):
            self._unsynced.setdefault(self._paths[handle], []).append((offset, data))
            raise PowerCut
        self._unsynced.setdefault(self._paths[handle], []).append((offset, data))

    def read(self, handle: int, length: int, offset: int) -> bytes:
        self._alive()
        path = self._paths[handle]
        real = self._real.open(path)
        try:
            data = bytearray(self._real.read(real, length, offset))
        finally:
            self._real.close(real)
        for start, written in self._unsynced.get(path, ()):
            first, last = max(start, offset), min(start + len(written), offset + len(data))
            if first < last:
                data[first - offset : last - offset] = written[first - start : last - start]
        return bytes(data)

    def punch(self, handle: int, length: int, offset: int) -> None:
        self.write(handle, [bytes(length)], offset)

    def start(self, handle: int, length: int, offset: int) -> None:
        """What is begun may be done, or not, when the power is cut: as what was written."""
        self._alive()

    def sync(self, handle: int) -> None:
        self._fail(errno.EIO)
        self._step()
        path = self._paths[handle]
        real = self._real.open(path, write=True)
        try:
            for offset, data in self._unsynced.pop(path, ()):
                self._real.write(real, [data], offset)
        finally:
            self._real.close(real)

    def replace(self, source: Path, target: Path) -> None:
        after = self._step(also_after=True)
        assert source not in self._unsynced, f"{source} is renamed before it was synced"
        self._real.replace(source, target)
        if after:
            raise PowerCut

    def unlink(self, path: Path) -> None:
        self._step()
        self._unsynced.pop(path, None)
        if path.exists():
            path.replace(_hidden(path))
            if path not in self._removed:
                self._removed.append(path)

    def room(self, path: Path) -> tuple[int, int]:
        self._alive()
        return self.free_bytes if self.free_bytes is not None else self._real.room(path)[0], self._real.room(path)[1]

    def _alive(self) -> None:
        if self._dead:
            raise PowerCut

    def _step(self, *, also_after: bool = False) -> bool:
        """Cut the power here if it is time. True: do the operation first, then cut."""
        self._alive()
        self.steps += 1
        if self._steps_left is None:
            return False
        self._steps_left -= 1
        if self._steps_left > 0:
            return False
        self._dead = True
        if also_after and self._random.random() < 0.5:
            return True
        raise PowerCut

    def _fail(self, number: int) -> None:
        if self.fail_next is not None:
            number, self.fail_next = self.fail_next, None
            raise OSError(number, "injected")


def _hidden(path: Path) -> Path:
    return path.with_name(path.name + ".unlinked")
