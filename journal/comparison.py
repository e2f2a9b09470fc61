"""Proof that two disks are equal at one position: digests of one, and what must be left out, compared with the other.

The one whose disks change (the source) tells, for each part of ``part_bytes``, the blake3 digest of the part as it was
at the position; sectors whose content at the position it cannot tell, because they were written while it was reading,
are *unsettled*: they count as zeros on both sides. A part that reads as zeros has the all-zero digest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
import numpy as np
from blake3 import blake3

from journal.position import DIGEST_BYTES
from journal.wire import Struct

PART_BYTES: Final = (64 << 10, 1 << 20)
PARTS_MAX: Final = 1 << 20
"""Of small parts; beyond it parts are larger: 32 MiB of digests up to a terabyte, and 32 MiB more for each further."""
WINDOW_BYTES: Final = 8 << 20
"""Read at once."""
BODY_BYTES_MAX: Final = 1 << 30
_ZERO: Final = bytes(DIGEST_BYTES)

Read = Callable[[int, int, int], bytes | bytearray | memoryview]
"""``(disk, offset, length)``"""


class Comparison(Struct):
    """``sizes`` and ``digests`` by disk number; ``unsettled``: sorted, disjoint ``(disk, offset, length)``."""

    position: str
    part_bytes: int
    sizes: dict[int, int]
    digests: dict[int, bytes]
    unsettled: list[tuple[int, int, int]]

    def __post_init__(self) -> None:
        if self.part_bytes not in {1 << bits for bits in range(16, 21)}:
            raise ValueError(f"parts of {self.part_bytes} bytes")
        for disk, size in self.sizes.items():
            if len(self.digests.get(disk, b"")) != -(-size // self.part_bytes) * DIGEST_BYTES:
                raise ValueError(f"disk {disk} has digests of another length")

    @property
    def unsettled_bytes(self) -> int:
        return sum(length for _, _, length in self.unsettled)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, raw: bytes | bytearray) -> Comparison:
        """Raises ``ValueError``."""
        return msgspec.msgpack.decode(raw, type=cls)


def part_bytes_for(total_bytes: int) -> int:
    """The size of parts for disks of so many bytes in all."""
    wanted = 1 << max(0, math.ceil(math.log2(max(1, total_bytes / PARTS_MAX))))
    return min(max(wanted, PART_BYTES[0]), PART_BYTES[1])


def digest(part: memoryview) -> bytes:
    return blake3(part).digest() if np.frombuffer(part, np.uint8).any() else _ZERO


def differing(
    proof: Comparison, disk: int, read: Read, progress: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of the parts of ``disk`` that are not what ``proof`` tells, neighbours joined. ``progress``
    gets the bytes compared since the last call."""
    held: tuple[int, int] | None = None
    for offset, length in _differing(proof, disk, read, progress):
        if held is not None and held[0] + held[1] == offset:
            held = (held[0], held[1] + length)
            continue
        if held is not None:
            yield held
        held = (offset, length)
    if held is not None:
        yield held


def _differing(proof: Comparison, disk: int, read: Read, progress: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    size, digests = proof.sizes[disk], proof.digests[disk]
    unsettled = [(offset, offset + length) for of, offset, length in proof.unsettled if of == disk]
    step = max(WINDOW_BYTES, proof.part_bytes)
    at = 0
    for start in range(0, size, step):
        length = min(step, size - start)
        data = bytearray(read(disk, start, length))
        while at < len(unsettled) and unsettled[at][0] < start + length:
            low, high = max(unsettled[at][0], start), min(unsettled[at][1], start + length)
            data[low - start : high - start] = bytes(high - low)
            if unsettled[at][1] > start + length:
                break
            at += 1
        view = memoryview(data)
        for offset in range(0, length, proof.part_bytes):
            number = (start + offset) // proof.part_bytes
            part = view[offset : offset + proof.part_bytes]
            if digest(part) != digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]:
                yield start + offset, len(part)
        progress(length)
