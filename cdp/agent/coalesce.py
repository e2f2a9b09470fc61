"""Captured records -> the extents of a segment, and a plan of where their payload comes from.

Of all writers of a byte within a segment the last one wins:

    records in submission order      ├──A──┤            edges of all records cut the disk into cells;
                                        ├──B──┤         a cell belongs to the newest record that
                                  ├─C─┤                 covers it
    cells                         ├C│C│B│B│B  ┤
    pieces                        ├─C─┤├──B──┤          (A is gone)

Finding the newest record of each cell is a range-maximum update, done for all records at once by doubling: a range of
cells is covered by two overlapping blocks of a power-of-two length; blocks are then pushed down level by level.
Everything here is a function of values; nothing loops over records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdp.agent.intervals import U64, Intervals, disks_of, offsets_of
from journal.extent import SECTOR_BYTES, Extents, Kind

GATHER_SECTORS = 2048
"""Payload is gathered 1 MiB at a time: large enough for numpy, small enough to stay in the cache."""
COPY = -1
"""Source of a piece that was read from the disk, not captured."""

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Disjoint ranges sorted by key. ``sources``: number of the record that holds the bytes, or ``COPY``;
    ``source_offsets``: where in the record's payload (or in the copy's buffer) the piece begins."""

    starts: U64
    ends: U64
    kinds: npt.NDArray[np.uint8]
    sources: I64
    source_offsets: I64

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def empty(cls) -> Pieces:
        nothing = np.zeros(0, np.uint64)
        return cls(nothing, nothing, np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64))

    def with_copies(self, copies: Pieces) -> Pieces:
        """Both together; ``copies`` must be disjoint from these."""
        if len(copies) == 0:
            return self
        starts = np.concatenate((self.starts, copies.starts))
        order = np.argsort(starts, kind="stable")
        return Pieces(
            starts[order],
            np.concatenate((self.ends, copies.ends))[order],
            np.concatenate((self.kinds, copies.kinds))[order],
            np.concatenate((self.sources, copies.sources))[order],
            np.concatenate((self.source_offsets, copies.source_offsets))[order],
        )

    def extents(self) -> Extents:
        """The extent table: neighbours of one kind are one extent."""
        if len(self) == 0:
            return Extents.empty()
        first = np.concatenate(([True], (self.starts[1:] != self.ends[:-1]) | (self.kinds[1:] != self.kinds[:-1])))
        last = np.concatenate((first[1:], [True]))
        starts = self.starts[first]
        return Extents(disks_of(starts), offsets_of(starts), self.ends[last] - starts, self.kinds[first])

    def data(self) -> Pieces:
        """Those with payload."""
        keep = self.kinds == Kind.DATA
        return Pieces(
            self.starts[keep], self.ends[keep], self.kinds[keep], self.sources[keep], self.source_offsets[keep]
        )


def last_writers(starts: U64, ends: U64, kinds: npt.NDArray[np.uint8]) -> Pieces:
    """The pieces that remain of records ``[starts, ends)`` in submission order: of each byte, the last writer's."""
    count = len(starts)
    if count == 0:
        return Pieces.empty()
    edges = np.unique(np.concatenate((starts, ends)))
    low = np.searchsorted(edges, starts)
    high = np.searchsorted(edges, ends)
    owner = _newest(low, high, len(edges) - 1)
    # Neighbouring cells of one owner are one piece; a cell between records has none.
    first = np.concatenate(([True], owner[1:] != owner[:-1]))
    last = np.concatenate((first[1:], [True]))
    pieces_start, pieces_end, pieces_owner = edges[:-1][first], edges[1:][last], owner[first]
    owned = pieces_owner >= 0
    pieces_start, pieces_end, pieces_owner = pieces_start[owned], pieces_end[owned], pieces_owner[owned]
    source_offsets = (pieces_start - starts[pieces_owner]).astype(np.int64)
    return Pieces(pieces_start, pieces_end, kinds[pieces_owner], pieces_owner, source_offsets)


def _newest(low: I64, high: I64, cells: int) -> I64:
    """For each cell the greatest index i with ``low[i] <= cell < high[i]``, or -1."""
    rows = np.flatnonzero(high > low)
    low, high = low[rows], high[rows]
    owner = np.full(cells, -1, np.int64)
    if len(rows) == 0:
        return owner
    # frexp's exponent of n is floor(log2(n)) + 1: the largest block that fits.
    level = np.frexp((high - low).astype(np.float64))[1].astype(np.int64) - 1
    for current in range(int(level.max()), -1, -1):
        mine = level == current
        np.maximum.at(owner, low[mine], rows[mine])
        np.maximum.at(owner, high[mine] - (1 << current), rows[mine])
        if current:
            # Each block is its two halves; the left half stays where it is, at the same index.
            half = 1 << (current - 1)
            pushed = owner.copy()
            np.maximum(pushed[half:], owner[:-half], out=pushed[half:])
            owner = pushed
    return owner


def copy_pieces(ranges: Intervals, zeros: Intervals, chunk_starts: U64, chunk_sources: I64) -> Pieces:
    """Pieces for ``ranges`` that were read from the disks; ``zeros`` among them are extents without payload.

    Chunk i was read at key ``chunk_starts[i]`` into the buffer at ``chunk_sources[i]``; chunks are sorted by key, and
    neighbours by key are neighbours in the buffer.
    """
    data, empty = ranges.minus(zeros), ranges.within(zeros)
    at = np.searchsorted(chunk_starts, data.starts, side="right").astype(np.int64) - 1
    offsets = chunk_sources[at] + (data.starts - chunk_starts[at]).astype(np.int64)
    nothing = np.zeros(len(empty), np.int64)
    return Pieces(
        data.starts, data.ends, np.full(len(data), Kind.DATA, np.uint8), np.full(len(data), COPY, np.int64), offsets
    ).with_copies(Pieces(empty.starts, empty.ends, np.full(len(empty), Kind.ZERO, np.uint8), nothing + COPY, nothing))


def gather(
    pieces: Pieces, batches: Sequence[npt.NDArray[np.uint8]], copied: npt.NDArray[np.uint8]
) -> Iterator[memoryview]:
    """The payload of all data pieces in order, in chunks that are valid until the next one is asked for.

    ``batches``: the records' payload, u8[n, 4096] each, numbered through; ``copied``: the copy's buffer, u8[m].
    """
    data = pieces.data()
    lengths = (data.ends - data.starts).astype(np.int64)
    sector = np.int64(SECTOR_BYTES)
    if ((lengths % sector) | (data.source_offsets % sector)).any():
        # Memory that is not aligned to sectors (a user's O_DIRECT buffer may be): rare, so byte ranges one by one.
        yield from _gather_ranges(data, lengths, batches, copied)
        return
    counts = lengths // sector
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    sources = np.repeat(data.sources, counts)
    sectors = np.repeat(data.source_offsets // sector - (ends - counts), counts) + np.arange(total)
    views = [batch.reshape(len(batch), batch.shape[1] // SECTOR_BYTES, SECTOR_BYTES) for batch in batches]
    bases = np.cumsum([0, *(len(batch) for batch in batches)])
    copied_sectors = copied.reshape(-1, SECTOR_BYTES)
    out = np.empty((GATHER_SECTORS, SECTOR_BYTES), np.uint8)
    for start in range(0, total, GATHER_SECTORS):
        source, at = sources[start : start + GATHER_SECTORS], sectors[start : start + GATHER_SECTORS]
        batch_of = np.searchsorted(bases, source, side="right") - 1
        for number in np.unique(batch_of).tolist():
            mine = np.flatnonzero(batch_of == number)
            if number < 0:
                out[mine] = copied_sectors[at[mine]]
            else:
                out[mine] = views[number][source[mine] - bases[number], at[mine]]
        yield out[: len(source)].data.cast("B")


def _gather_ranges(
    data: Pieces, lengths: I64, batches: Sequence[npt.NDArray[np.uint8]], copied: npt.NDArray[np.uint8]
) -> Iterator[memoryview]:
    bases = np.cumsum([0, *(len(batch) for batch in batches)])
    batch_of = np.searchsorted(bases, data.sources, side="right") - 1
    for number, source, offset, length in zip(
        batch_of.tolist(), data.sources.tolist(), data.source_offsets.tolist(), lengths.tolist(), strict=True
    ):
        held = copied if number < 0 else batches[number][source - int(bases[number])]
        yield held[offset : offset + length].data
