"""Sets of byte ranges over all disks of the machine, as sorted numpy arrays.

A *key* is one u64 for a byte of a disk: ``disk << 50 | offset``. So one array can be sorted and searched for all disks
at once, and ranges of two disks can never touch (a disk ends at ``DISK_BYTES_MAX`` at the latest, the last byte of
which no range in practice reaches; merging is by key and checked against it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from journal.extent import DISK_BYTES_MAX

DISK_SHIFT: Final = 50
assert 1 << DISK_SHIFT == DISK_BYTES_MAX

U64 = npt.NDArray[np.uint64]
_NONE: Final = np.zeros(0, np.uint64)


def keys(disks: npt.NDArray[np.unsignedinteger], offsets: U64) -> U64:
    return (disks.astype(np.uint64) << np.uint64(DISK_SHIFT)) | offsets


def key(disk: int, offset: int) -> int:
    return disk << DISK_SHIFT | offset


def disks_of(starts: U64) -> npt.NDArray[np.uint16]:
    return (starts >> np.uint64(DISK_SHIFT)).astype(np.uint16)


def offsets_of(starts: U64) -> U64:
    return starts & np.uint64(DISK_BYTES_MAX - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """Half-open ``[starts, ends)``, sorted, disjoint and not touching each other. Immutable."""

    starts: U64 = field(default_factory=lambda: _NONE)
    ends: U64 = field(default_factory=lambda: _NONE)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def total(self) -> int:
        """Bytes in the set."""
        return int((self.ends - self.starts).sum())

    @classmethod
    def of(cls, starts: U64, ends: U64) -> Intervals:
        """The union of any ranges, in any order, empty ones allowed."""
        if len(starts) == 0:
            return cls()
        # A stable sort of u64 merges the sorted runs that unions consist of in linear time.
        order = np.argsort(starts, kind="stable")
        starts = starts[order]
        reach = np.maximum.accumulate(ends[order])
        first = np.concatenate(([True], starts[1:] > reach[:-1]))
        lasts = np.concatenate((np.flatnonzero(first)[1:] - 1, [len(starts) - 1]))
        starts, ends = starts[first], reach[lasts]
        real = ends > starts
        return cls(starts[real], ends[real]) if not real.all() else cls(starts, ends)

    def union(self, other: Intervals) -> Intervals:
        if len(other) == 0 or len(self) == 0:
            return self if len(other) == 0 else other
        return Intervals.of(np.concatenate((self.starts, other.starts)), np.concatenate((self.ends, other.ends)))

    def minus(self, other: Intervals) -> Intervals:
        return self._cells(other, wanted=False)

    def within(self, other: Intervals) -> Intervals:
        """The intersection."""
        return self._cells(other, wanted=True)

    def from_key(self, low: int) -> Intervals:
        """What lies at or above ``low``: the part that a copy in ascending order has still to look at."""
        at = int(np.searchsorted(self.ends, np.uint64(low), side="right"))
        starts = self.starts[at:].copy()
        if len(starts):
            starts[0] = max(int(starts[0]), low)
        return Intervals(starts, self.ends[at:].copy())

    def between(self, low: int, high: int) -> Intervals:
        """What lies in ``[low, high)``; cheap on large sets."""
        if low >= high:
            return Intervals()
        first = int(np.searchsorted(self.ends, np.uint64(low), side="right"))
        last = int(np.searchsorted(self.starts, np.uint64(high), side="left"))
        starts, ends = self.starts[first:last].copy(), self.ends[first:last].copy()
        if len(starts):
            starts[0] = max(int(starts[0]), low)
            ends[-1] = min(int(ends[-1]), high)
        return Intervals(starts, ends)

    def holds(self, points: U64) -> npt.NDArray[np.bool_]:
        """For each key: is it in the set?"""
        if len(self) == 0:
            return np.zeros(len(points), np.bool_)
        at = np.searchsorted(self.starts, points, side="right").astype(np.int64) - 1
        inside: npt.NDArray[np.bool_] = (at >= 0) & (points < self.ends[np.maximum(at, 0)])
        return inside

    def _cells(self, other: Intervals, *, wanted: bool) -> Intervals:
        if len(self) == 0:
            return self
        other = other.between(int(self.starts[0]), int(self.ends[-1]))
        if len(other) == 0:
            return Intervals() if wanted else self
        edges = np.unique(np.concatenate((self.starts, self.ends, other.starts, other.ends)))
        low, high = edges[:-1], edges[1:]
        keep = self.holds(low) & (other.holds(low) == wanted)
        return Intervals.of(low[keep], high[keep])
