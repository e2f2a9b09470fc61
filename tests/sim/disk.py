"""A target disk with a volatile write cache: what was not flushed survives a power cut by chance, sector by sector."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Literal

from journal.extent import SECTOR_BYTES
from tests.sim.faults import Dice, Died

Failing = Literal["any", "flush"]


class CachedDisk:
    """``standby.replay.ports.Disk``. ``content`` is what is read, ``platter`` what survives for certain."""

    def __init__(self, dice: Dice, size_bytes: int, *, used: bool) -> None:
        self._dice = dice
        start = dice.random.randbytes(size_bytes) if used else bytes(size_bytes)
        self.content = bytearray(start)
        self.platter = bytearray(start)
        self._cache: list[tuple[int, bytes]] = []
        self.die_in: int | None = None
        """The process dies at that many calls from now, before, after or in the middle of it."""
        self.fail_next: Failing | None = None
        self.fail_calls = 1
        """So many of them, before the disk works again."""
        self.failures = 0

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    def write(self, writes: Sequence[tuple[int, memoryview]]) -> None:
        try:
            cut = self._step(len(writes))
        except OSError:
            for offset, data in writes[: self._dice.random.randint(0, len(writes))]:
                self._put(offset, bytes(data))
            raise
        for offset, data in writes[:cut]:
            self._put(offset, bytes(data))
        self._stop(cut is not None)

    def zero(self, offset: int, length: int) -> None:
        cut = self._step(1)
        if cut is None or cut > 0:
            self._put(offset, bytes(length))
        self._stop(cut is not None)

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length)

    def read(self, offset: int, length: int) -> memoryview:
        self._stop(self._step(0) is not None)
        return memoryview(bytes(self.content[offset : offset + length]))

    def flush(self) -> None:
        try:
            cut = self._step(len(self._cache), "flush")
        except OSError:
            self._forget_some()
            raise
        done, self._cache = self._cache[:cut], self._cache[len(self._cache) if cut is None else cut :]
        for offset, data in done:
            self.platter[offset : offset + len(data)] = data
        self._stop(cut is not None)

    def _forget_some(self) -> None:
        """A failed flush: the disk does not say what it lost."""
        self._cache = [held for held in self._cache if self._dice.random.random() < 0.5]
        self.content = bytearray(self.platter)
        for offset, data in self._cache:
            self.content[offset : offset + len(data)] = data

    def survivors(self) -> bytearray:
        """What a power cut at this instant might leave."""
        left = bytearray(self.platter)
        odds = self._dice.random.choice((0.0, 0.5, 1.0))
        for offset, data in self._cache:
            for at in range(0, len(data), SECTOR_BYTES):
                if odds == 1.0 or (odds and self._dice.random.random() < odds):
                    left[offset + at : offset + at + SECTOR_BYTES] = data[at : at + SECTOR_BYTES]
        return left

    def power_cut(self) -> None:
        self.platter = self.survivors()
        self.content = bytearray(self.platter)
        self._cache.clear()

    def heal(self) -> None:
        self.die_in, self.fail_next = None, None

    def _put(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= len(self.content), "a write beyond the end"
        self.content[offset : offset + len(data)] = data
        self._cache.append((offset, data))

    def _step(self, parts: int, call: Failing = "any") -> int | None:
        """How many of ``parts`` are done before the process dies; None if it lives."""
        if self.fail_next in ("any", call):
            self.fail_calls -= 1
            if self.fail_calls <= 0:
                self.fail_next = None
            self.failures += 1
            raise OSError(errno.EIO, "injected")
        if self.die_in is not None:
            self.die_in -= 1
            if self.die_in <= 0:
                return self._dice.random.randint(0, parts)
        return None

    def _stop(self, dies: bool) -> None:
        if dies:
            self.die_in = None
            raise Died("disk")
