"""A long synthetic history of one disk: cheap to make, and its content at every second is known.

Second ``s`` (1, 2, ...) is segment ``s``. It writes some hundred blocks of 4 KiB, half of them into a small hot part of
the disk; a block that second ``s`` has written consists of the word ``s << 32 | block``. The rest is zero.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

from cdp.store import Store
from cdp.store.files import OsFiles
from journal.encoder import Encoder
from journal.extent import Extents, Kind
from journal.position import Position

BLOCK = 4096
_WORDS = BLOCK // 8
_HOT_PART = 64
_DRAWN_SECONDS = 128


class Unsynced(OsFiles):
    """For making a store whose making need not survive a power cut."""

    def sync(self, handle: int) -> None:
        pass


@dataclass(frozen=True)
class LongHistory:
    seconds: int
    disk_bytes: int
    extents: int = 500
    seed: int = 1

    @property
    def blocks(self) -> int:
        return self.disk_bytes // BLOCK

    def written(self, second: int) -> npt.NDArray[np.uint64]:
        """The blocks that a second writes, ascending."""
        row = self._drawn(second // _DRAWN_SECONDS)[second % _DRAWN_SECONDS]
        first: npt.NDArray[np.uint64] = row[np.append(True, row[1:] != row[:-1])]
        return first

    @functools.lru_cache(maxsize=4)  # noqa: B019 (there are few histories, and they stay)
    def _drawn(self, number: int) -> npt.NDArray[np.uint64]:
        """A row of sorted blocks for each of some seconds: drawing them one by one takes most of the time."""
        rng = np.random.Generator(np.random.PCG64([self.seed, number]))
        hot, cold = self.extents // 2, self.extents - self.extents // 2
        return np.sort(
            np.concatenate(
                (
                    rng.integers(0, max(1, self.blocks // _HOT_PART), (_DRAWN_SECONDS, hot), np.uint64),
                    rng.integers(0, self.blocks, (_DRAWN_SECONDS, cold), np.uint64),
                ),
                axis=1,
            )
        )

    def segments(self, machine: uuid.UUID, genesis: Position, start_ns: int) -> Iterator[bytes]:
        encoder, position = Encoder(machine), genesis
        for second in range(1, self.seconds + 1):
            blocks = self.written(second)
            words = np.repeat(np.uint64(second << 32) | blocks, _WORDS)
            extents = Extents(
                disks=np.zeros(len(blocks), np.uint16),
                offsets=blocks * np.uint64(BLOCK),
                lengths=np.full(len(blocks), BLOCK, np.uint64),
                kinds=np.full(len(blocks), Kind.DATA, np.uint8),
            )
            header, raw = encoder.encode(
                position,
                extents,
                [words.tobytes()],
                opened_at_ns=start_ns + (second - 1) * 10**9,
                sealed_at_ns=start_ns + second * 10**9,
                sealed_monotonic_ns=second * 10**9,
            )
            position = header.position
            yield bytes(raw)

    def fill(self, store: Store, machine: uuid.UUID, start_ns: int, told: Callable[[str], None] = print) -> None:
        """Put all of it; encoding and storing each have a process."""
        receiving, sending = multiprocessing.get_context("spawn").Pipe(duplex=False)
        worker = multiprocessing.get_context("spawn").Process(
            target=_encode, args=(self, machine, store.live(machine), start_ns, sending)
        )
        worker.start()
        sending.close()
        began_s = time.monotonic()
        for second in range(1, self.seconds + 1):
            store.put_segment(machine, receiving.recv_bytes())
            if second % 10_000 == 0:
                told(f"{second} seconds of history after {time.monotonic() - began_s:.0f} s")
        worker.join()
        receiving.close()

    def last_writers(self) -> Iterator[npt.NDArray[np.uint64]]:
        """Before any second, and after each: who wrote each block last (0: nobody). The same array, changed."""
        last = np.zeros(self.blocks, np.uint64)
        yield last
        for second in range(1, self.seconds + 1):
            last[self.written(second)] = second
            yield last


def content(last: npt.NDArray[np.uint64], offset: int, length: int) -> bytes:
    """Of whole blocks."""
    first = offset // BLOCK
    writers = last[first : first + length // BLOCK]
    words = np.where(writers > 0, writers << np.uint64(32) | np.arange(first, first + len(writers), dtype=np.uint64), 0)
    return np.repeat(words.astype(np.uint64), _WORDS).tobytes()


def _encode(history: LongHistory, machine: uuid.UUID, genesis: Position, start_ns: int, out: Connection) -> None:
    for raw in history.segments(machine, genesis, start_ns):
        out.send_bytes(raw)
    out.close()
