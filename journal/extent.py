"""The columnar extent table of a segment.

An extent is ``(disk, offset, length, kind)``: the half-open byte range ``[offset, offset + length)`` of one disk.
Inside one segment extents are sorted by ``(disk, offset)`` and do not overlap (the last writer has won), so that the
payload of the data extents is simply their bytes one after another in table order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from journal.errors import SegmentDamaged

SECTOR_BYTES = 512
"""Every offset and length is a multiple of this: the smallest unit a block device writes."""
DISKS_MAX = 64
"""Disks of one machine; bounds the kernel-side tables of the capture."""
DISK_BYTES_MAX = 2**50
"""1 PiB: bounds every offset before it is used."""


class Kind(IntEnum):
    DATA = 1
    ZERO = 2
    DISCARD = 3
    """Reads as zeros in the store and on a standby, whatever the source's device returns after it."""


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """Columns of equal length n. ``offsets`` and ``lengths``: u64 bytes; ``disks``: u16; ``kinds``: u8 (``Kind``)."""

    disks: npt.NDArray[np.uint16]
    offsets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint64]
    kinds: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.offsets)

    @classmethod
    def empty(cls) -> Extents:
        return cls.from_rows([])

    @classmethod
    def from_rows(cls, rows: list[tuple[int, int, int, int]]) -> Extents:
        """From ``(disk, offset, length, kind)`` tuples, in the given order."""
        disks, offsets, lengths, kinds = zip(*rows, strict=True) if rows else ((), (), (), ())
        return cls(
            np.array(disks, np.uint16),
            np.array(offsets, np.uint64),
            np.array(lengths, np.uint64),
            np.array(kinds, np.uint8),
        )

    def rows(self) -> list[tuple[int, int, int, int]]:
        columns = (self.disks, self.offsets, self.lengths, self.kinds)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    @property
    def payload_bytes(self) -> int:
        """Bytes of payload that belong to the table: the lengths of the data extents."""
        return int(self.lengths[self.kinds == Kind.DATA].sum())

    def payload_offsets(self) -> npt.NDArray[np.uint64]:
        """Start of each extent's bytes within the payload, u64[n]; for zero and discard extents it means nothing."""
        sizes = np.where(self.kinds == Kind.DATA, self.lengths, np.uint64(0))
        ends = np.cumsum(sizes, dtype=np.uint64)
        return ends - sizes

    def check(self) -> None:
        """Raise ``SegmentDamaged`` unless every invariant named on top of this module holds."""
        if len(self) == 0:
            return
        unit = np.uint64(SECTOR_BYTES - 1)
        ends = self.offsets + self.lengths
        bad = {
            "an unknown kind": (self.kinds < Kind.DATA) | (self.kinds > Kind.DISCARD),
            f"a disk beyond {DISKS_MAX}": self.disks >= DISKS_MAX,
            "an empty length": self.lengths == 0,
            "an offset off the sector grid": (self.offsets & unit) != 0,
            "a length off the sector grid": (self.lengths & unit) != 0,
            "an end beyond the largest disk": (self.lengths > DISK_BYTES_MAX)
            | (self.offsets > DISK_BYTES_MAX)
            | (ends > DISK_BYTES_MAX),
        }
        same_disk = self.disks[1:] == self.disks[:-1]
        bad["extents out of order or overlapping"] = np.concatenate(
            ([False], (self.disks[1:] < self.disks[:-1]) | (same_disk & (self.offsets[1:] < ends[:-1])))
        )
        for what, mask in bad.items():
            if mask.any():
                row = int(np.argmax(mask))
                raise SegmentDamaged(
                    f"Extent {row} has {what}.",
                    remedy="Send the segment again; if it repeats, the writer is broken: start a resync.",
                    extent=row,
                )
