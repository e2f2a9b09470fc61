"""Who wrote each sector last? Candidates from many runs -> the pieces of a range, each with one origin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from cdp.store.records import Span
from cdp.store.runs import U64, Found
from journal.extent import SECTOR_BYTES

BASE: Final = 0
"""``Pieces.kinds``: nothing in the journal touches it; otherwise a ``Kind``."""
_SMALL_SECTORS: Final = 128
"""Longer extents are painted one by one, shorter ones all at once."""
_SPAN_BITS: Final = 48
Row = tuple[int, int, int, int, int, int]
"""One of ``Pieces``: offset, length, kind, generation, seq, payload offset."""


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Consecutive parts of a range, in bytes. For ``Kind.DATA``, the content is ``payload_offsets`` of the payload of
    segment ``(generations, seqs)``."""

    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int64]
    generations: npt.NDArray[np.int64]
    seqs: npt.NDArray[np.int64]
    payload_offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets)

    def rows(self) -> Iterator[Row]:
        columns = (self.offsets, self.lengths, self.kinds, self.generations, self.seqs, self.payload_offsets)
        return zip(*(column.tolist() for column in columns), strict=True)


def resolve(start: int, stop: int, found: Sequence[tuple[int, Found]], spans: Sequence[Span]) -> Pieces:
    """The pieces of the sectors ``[start, stop)``. ``found`` are entries with the number of their span in ``spans``; a
    later span is newer than an earlier one."""
    if not found:
        return _whole(start, stop)
    order = np.concatenate([part.seqs | np.uint64(span << _SPAN_BITS) for span, part in found])
    by_age = np.argsort(order, kind="stable")
    order = order[by_age]
    starts = _joined([part.starts for _, part in found], by_age)
    lengths = _joined([part.lengths for _, part in found], by_age)
    kinds = _joined([part.kinds for _, part in found], by_age)
    payload = _joined([part.payload for _, part in found], by_age)
    ends = np.minimum(starts + lengths, stop)
    firsts = np.maximum(starts, start)
    newest = _paint(start, stop, firsts, ends)

    edges = np.flatnonzero(np.diff(newest[0])) + 1
    cuts = np.concatenate(([0], edges, [len(newest[0])]))
    piece_starts = cuts[:-1] * newest[1] + start
    piece_ends = np.minimum(cuts[1:] * newest[1] + start, stop)
    winner = newest[0][cuts[:-1]]
    known = winner >= 0
    pick = np.where(known, winner, 0)
    generations = np.array([span.generation for span in spans], np.int64)
    age = order[pick].astype(np.int64)
    return Pieces(
        offsets=piece_starts * SECTOR_BYTES,
        lengths=(piece_ends - piece_starts) * SECTOR_BYTES,
        kinds=np.where(known, kinds[pick], BASE),
        generations=np.where(known, generations[age >> _SPAN_BITS], 0),
        seqs=np.where(known, age & ((1 << _SPAN_BITS) - 1), 0),
        payload_offsets=np.where(known, (payload[pick] + piece_starts - starts[pick]) * SECTOR_BYTES, 0),
    )


def _paint(
    start: int, stop: int, firsts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], int]:
    """The newest candidate of each unit of the range (-1: none) and the sectors of a unit. Candidates are sorted by
    age, so that a later index is a newer one."""
    unit = 8 if start % 8 == 0 and not ((firsts | np.where(ends == stop, 0, ends)) & 7).any() else 1
    units = -(-(stop - start) // unit)
    begin = (firsts - start) // unit
    size = -(-(ends - start) // unit) - begin
    small = np.zeros(units, np.int64) - 1
    large = np.zeros(units, np.int64) - 1
    is_small = (ends - firsts) <= _SMALL_SECTORS
    index = np.flatnonzero(is_small)
    sizes = size[index]
    if len(index):
        run_starts = np.cumsum(sizes) - sizes
        places = np.repeat(begin[index] - run_starts, sizes) + np.arange(int(sizes.sum()))
        # Of several values for one place the last one stays.
        small[places] = np.repeat(index, sizes)
    for number in np.flatnonzero(~is_small).tolist():
        large[begin[number] : begin[number] + size[number]] = number
    return np.maximum(small, large), unit


def _joined(columns: list[U64], by_age: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate(columns)[by_age].astype(np.int64)


def _whole(start: int, stop: int) -> Pieces:
    def one(value: int) -> npt.NDArray[np.int64]:
        return np.array([value], np.int64)

    return Pieces(one(start * SECTOR_BYTES), one((stop - start) * SECTOR_BYTES), one(BASE), one(0), one(0), one(0))
