"""Sorted runs of block versions: which segment wrote which sectors, with every version kept.

A run covers the segments ``first .. last`` of one generation. Each extent of them is one entry of two u64:

    key     disk (6 bits) · first sector (41) · seq - first (17)       sorted: by place, then by age
    value   kind (2 bits) · payload sector (17) · sectors (45)

Entries are held in classes by length, each sorted by key: extents of at most ``CLASSES[c]`` sectors that touch
``[a, b)`` start in ``[a - CLASSES[c], b)``, so that a range is found by two binary searches in each class.

Runs are derived from the segments' extent tables and can be rebuilt from them; see ``runfile`` for those on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from journal.extent import SECTOR_BYTES, Extents, Kind
from journal.position import Position

U64 = npt.NDArray[np.uint64]

CLASSES: Final = (8, 128, 2048, 32768, 131072, 1 << 41)
"""Sectors: 4 KiB, 64 KiB, 1 MiB, 16 MiB, the 64 MiB that a segment holds, and whole-disk discards."""
RUN_SEGMENTS_MAX: Final = 1 << 17
_SECTOR_BITS: Final = 41
_SEQ_BITS: Final = 17
_LENGTH_BITS: Final = 45
_SECTOR_MASK: Final = np.uint64((1 << _SECTOR_BITS) - 1)
_SEQ_MASK: Final = np.uint64((1 << _SEQ_BITS) - 1)
_LENGTH_MASK: Final = np.uint64((1 << _LENGTH_BITS) - 1)
_CHUNK_ENTRIES: Final = 1 << 20


class Run(Protocol):
    """``digest`` is that of the segment ``last``: it vouches for all before it."""

    @property
    def generation(self) -> int: ...

    @property
    def first(self) -> int: ...

    @property
    def last(self) -> int: ...

    @property
    def digest(self) -> bytes: ...

    @property
    def counts(self) -> tuple[int, ...]:
        """Entries per class."""

    def bounds(self, length_class: int, low: int, high: int) -> tuple[int, int]:
        """Indexes of the entries of a class whose key is in ``[low, high)``."""

    def slices(self, length_class: int, start: int, stop: int) -> Iterator[tuple[U64, U64]]:
        """Those entries' keys and values, in pieces of bounded size."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Entries that touch a range of one disk. All u64; sectors, and ``payload`` in sectors of the segment's payload."""

    seqs: U64
    starts: U64
    lengths: U64
    kinds: U64
    payload: U64


@dataclass(frozen=True, slots=True, eq=False)
class MemoryRun:
    generation: int
    first: int
    last: int
    digest: bytes
    keys: tuple[U64, ...]
    values: tuple[U64, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(len(keys) for keys in self.keys)

    def bounds(self, length_class: int, low: int, high: int) -> tuple[int, int]:
        start, stop = np.searchsorted(self.keys[length_class], np.array([low, high], np.uint64))
        return int(start), int(stop)

    def slices(self, length_class: int, start: int, stop: int) -> Iterator[tuple[U64, U64]]:
        for at in range(start, stop, _CHUNK_ENTRIES):
            piece = slice(at, min(at + _CHUNK_ENTRIES, stop))
            yield self.keys[length_class][piece], self.values[length_class][piece]


def pack_extents(extents: Extents) -> tuple[U64, U64]:
    """Keys (their seq bits zero) and values of one segment's extents, in table order."""
    sector = np.uint64(SECTOR_BYTES)
    keys = (extents.disks.astype(np.uint64) << np.uint64(_SECTOR_BITS)) | (extents.offsets // sector)
    payload = np.where(extents.kinds == Kind.DATA, extents.payload_offsets() // sector, np.uint64(0))
    values = (extents.kinds.astype(np.uint64) << np.uint64(62)) | (payload << np.uint64(_LENGTH_BITS))
    return keys << np.uint64(_SEQ_BITS), values | (extents.lengths // sector)


def build(tables: list[tuple[Position, U64, U64]]) -> MemoryRun:
    """A run of consecutive segments: ``(position, keys, values)`` of each, as ``pack_extents`` gives them."""
    first, last = tables[0][0], tables[-1][0]
    assert last.seq - first.seq == len(tables) - 1 < RUN_SEGMENTS_MAX
    keys = np.concatenate([keys | np.uint64(position.seq - first.seq) for position, keys, _ in tables])
    values = np.concatenate([values for _, _, values in tables])
    return _sorted(first.generation, first.seq, last, keys, values)


def merge(runs: list[Run]) -> MemoryRun:
    """One run of consecutive runs of a generation."""
    first, last = runs[0], runs[-1]
    assert last.last - first.first < RUN_SEGMENTS_MAX
    # Class by class, and each array let go of when it has served: millions of entries are merged at once.
    all_keys, all_values = [], []
    for length_class in range(len(CLASSES)):
        total = sum(run.counts[length_class] for run in runs)
        keys, values = np.empty(total, np.uint64), np.empty(total, np.uint64)
        at = 0
        for run in runs:
            shift = np.uint64(run.first - first.first)
            for some_keys, some_values in run.slices(length_class, 0, run.counts[length_class]):
                np.add(some_keys, shift, out=keys[at : at + len(some_keys)])
                values[at : at + len(some_keys)] = some_values
                at += len(some_keys)
        assert at == total
        order = np.argsort(keys)
        all_keys.append(keys[order])
        del keys
        all_values.append(values[order])
    return MemoryRun(first.generation, first.first, last.last, last.digest, tuple(all_keys), tuple(all_values))


def count(run: Run, disk: int, start: int, stop: int) -> int:
    """How many entries ``find`` would look at."""
    total = 0
    for length_class, entries in enumerate(run.counts):
        if not entries:
            continue
        low, high = run.bounds(length_class, *_key_range(length_class, disk, start, stop))
        total += high - low
    return total


def find(run: Run, disk: int, start: int, stop: int, seqs_wanted: range) -> Iterator[Found]:
    """The entries of the segments ``seqs_wanted`` that touch the sectors ``[start, stop)`` of ``disk``; versions that a
    later one of the same extent hides are left out."""
    for length_class, entries in enumerate(run.counts):
        if not entries:
            continue
        low, high = run.bounds(length_class, *_key_range(length_class, disk, start, stop))
        for keys, values in run.slices(length_class, low, high):
            seqs = (keys & _SEQ_MASK) + np.uint64(run.first)
            starts = (keys >> np.uint64(_SEQ_BITS)) & _SECTOR_MASK
            lengths = values & _LENGTH_MASK
            wanted = (seqs >= seqs_wanted.start) & (seqs < seqs_wanted.stop) & (starts + lengths > start)
            chosen = np.flatnonzero(wanted)
            if len(chosen) > 1:
                hidden = (starts[chosen[1:]] == starts[chosen[:-1]]) & (lengths[chosen[1:]] == lengths[chosen[:-1]])
                chosen = chosen[~np.append(hidden, False)]
            if len(chosen):
                rest = values[chosen] >> np.uint64(_LENGTH_BITS)
                yield Found(
                    seqs[chosen],
                    starts[chosen],
                    lengths[chosen],
                    rest >> np.uint64(_SEQ_BITS),
                    rest & _SEQ_MASK,
                )


def _key_range(length_class: int, disk: int, start: int, stop: int) -> tuple[int, int]:
    low = max(0, start - CLASSES[length_class] + 1)
    base = disk << _SECTOR_BITS
    return (base | low) << _SEQ_BITS, min((base + stop) << _SEQ_BITS, 2**64 - 1)


def _sorted(generation: int, first: int, last: Position, keys: U64, values: U64) -> MemoryRun:
    lengths = values & _LENGTH_MASK
    by_class = np.searchsorted(np.array(CLASSES, np.uint64), lengths)
    all_keys, all_values = [], []
    for length_class in range(len(CLASSES)):
        mine = np.flatnonzero(by_class == length_class)
        mine = mine[np.argsort(keys[mine])]
        all_keys.append(keys[mine])
        all_values.append(values[mine])
    return MemoryRun(generation, first, last.seq, last.digest, tuple(all_keys), tuple(all_values))
