"""What has to be read from the disks again, and the round that does it.

Two things make a granule dirty: the kernel side stamps it with the drop generation of a loss (``session.stamps``), or
this agent marks it (``DirtyMap``) because it had to drop what was captured. A *round* takes a snapshot of both and
copies it:

    armed     the drop generation G is read; every loss counted so far is at or below it. At the next cut the
              marks are moved into the round. Whatever is captured after that cut was submitted after the losses.
    settling  wait until every write submitted before the cut has completed; a lost one could still change the disk
              behind the copy. Then granules stamped above ``dealt`` and at or below G join the round: their stampers
              have completed too, so that none can be overlooked.
    reading   copy; what is captured after the cut wins (``copy.py``).
    done      ``dealt`` becomes G. A granule stamped above G meanwhile is dirty still: the next round's.

The history is fuzzy while a round goes on, a mark is set, or the drop generation differs from ``dealt``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from cdp.agent.intervals import U64, disks_of, offsets_of

Bits = npt.NDArray[np.bool_]

RoundKind = Literal["seed", "resync", "compare"]
"""``seed``: onto all-zero disks, so zeros are left out. ``resync``: send what is dirty. ``compare``: send what
differs from what the server has."""


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one disk, by its index. ``granule_bytes`` is a power of two."""

    index: int
    size_bytes: int
    granule_bytes: int

    @property
    def granules(self) -> int:
        return -(-self.size_bytes // self.granule_bytes)


class DirtyMap:
    """A bit per granule of each disk. Bounded: a disk has about a million granules at most."""

    def __init__(self, disks: Sequence[Geometry]) -> None:
        self.disks = {disk.index: disk for disk in disks}
        self.bits: dict[int, Bits] = {disk.index: np.zeros(disk.granules, np.bool_) for disk in disks}

    def mark(self, starts: U64, ends: U64) -> None:
        """Mark every granule that the ranges (keys, half-open) touch. Disks that are not ours are ignored."""
        numbers = disks_of(starts)
        for index, disk in self.disks.items():
            mine = numbers == index
            if not mine.any():
                continue
            unit = np.uint64(disk.granule_bytes)
            first = (offsets_of(starts[mine]) // unit).astype(np.int64)
            last = ((offsets_of(ends[mine] - np.uint64(1))) // unit).astype(np.int64)
            bits = self.bits[index]
            last = np.minimum(last, len(bits) - 1)
            bits[first], bits[last] = True, True
            # Records of data span two granules at most; only discards and zeroes are longer, and they are few.
            for low, high in zip(first[last > first + 1].tolist(), last[last > first + 1].tolist(), strict=True):
                bits[low:high] = True

    def mark_all(self, index: int | None = None) -> None:
        for number, bits in self.bits.items():
            if index is None or number == index:
                bits[:] = True

    def mark_bits(self, index: int, bits: Bits) -> None:
        self.bits[index] |= bits

    def absorb(self, other: DirtyMap) -> None:
        for index, bits in other.bits.items():
            if index in self.bits:
                self.bits[index] |= bits

    def clear(self) -> None:
        for bits in self.bits.values():
            bits[:] = False

    def __bool__(self) -> bool:
        return any(bool(bits.any()) for bits in self.bits.values())

    @property
    def total_bytes(self) -> int:
        return sum(int(bits.sum()) * self.disks[index].granule_bytes for index, bits in self.bits.items())

    def next_range(self, index: int, offset: int, length_max: int) -> tuple[int, int, int] | None:
        """The next marked ``(disk, offset, length)`` at or after a point, in order of disk and offset, or None.

        ``length_max`` is a power of two; the range does not cross a multiple of it.
        """
        for number in sorted(self.bits):
            if number < index:
                continue
            disk, bits = self.disks[number], self.bits[number]
            at = offset if number == index else 0
            granule = at // disk.granule_bytes
            if granule >= len(bits):
                continue
            skip = int(np.argmax(bits[granule:]))
            if not bits[granule + skip]:
                continue
            low = max(at, (granule + skip) * disk.granule_bytes)
            stop = min((low // length_max + 1) * length_max, disk.size_bytes)
            if low >= stop:
                continue
            window = bits[low // disk.granule_bytes : -(-stop // disk.granule_bytes)]
            marked = len(window) if window.all() else int(np.argmin(window))
            high = min((low // disk.granule_bytes + marked) * disk.granule_bytes, stop)
            return number, low, high - low
        return None

    def pack(self) -> dict[int, bytes]:
        """For the cursor; disks without a mark are left out."""
        return {index: np.packbits(bits).tobytes() for index, bits in self.bits.items() if bits.any()}

    def unpack(self, packed: dict[int, bytes]) -> None:
        for index, raw in packed.items():
            if index in self.bits:
                bits = np.unpackbits(np.frombuffer(raw, np.uint8)).astype(np.bool_)
                count = len(self.bits[index])
                self.bits[index] |= bits[:count] if len(bits) >= count else np.ones(count, np.bool_)


class Round(msgspec.Struct, forbid_unknown_fields=True):
    """A copy in progress, as the cursor keeps it. Everything before ``(disk, offset)`` is sealed.

    ``drop_generation`` is G above; ``todo`` the packed marks, all of them once ``complete``. The phase is not kept:
    after a restart a round is armed and settles anew, because which sectors have been captured meanwhile is not kept
    either, and goes on where it was. A seed is complete from the start: what became dirty since is left to the next
    round, for a seed leaves zeros out and may therefore not overwrite anything.
    """

    kind: RoundKind
    reason: str
    drop_generation: int
    todo: dict[int, bytes] = {}
    complete: bool = False
    disk: int = 0
    offset: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
