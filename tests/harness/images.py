"""Are two disks equal? And if not, where do they differ first?"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

CHUNK_BYTES = 4 << 20
SECTOR_BYTES = 512
RANGES_SHOWN_MAX = 16

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Difference:
    """Half-open byte range ``[offset, offset + length)``."""

    offset: int
    length: int


def differences(one: Path, other: Path, exempt: Iterable[tuple[int, int]] = ()) -> list[Difference]:
    """The ranges, in whole sectors, in which the two differ; at most ``RANGES_SHOWN_MAX``, the first ones.

    ``exempt``: half-open ``(offset, end)`` that may differ (discarded, on a device that does not return zeros then).
    Block devices: flush their caches first (``loop.drop_caches``). A different size is an ``AssertionError``.
    """
    skipped = sorted(exempt)
    found: list[Difference] = []
    with one.open("rb", buffering=0) as left, other.open("rb", buffering=0) as right:
        size = left.seek(0, os.SEEK_END)
        assert size == right.seek(0, os.SEEK_END), f"{one} and {other} have different sizes"
        left.seek(0)
        right.seek(0)
        at = 0
        while at < size and len(found) <= RANGES_SHOWN_MAX:
            a, b = left.read(CHUNK_BYTES), right.read(CHUNK_BYTES)
            assert len(a) == len(b), f"short read at {at}"
            if a != b:
                wrong = np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)
                for offset, end in skipped:
                    wrong[max(offset - at, 0) : max(end - at, 0)] = False
                found += [Difference(at + run.offset, run.length) for run in ranges_of(sectors_of(wrong))]
            at += len(a)
    return _merged(found)[:RANGES_SHOWN_MAX]


def assert_equal(one: Path, other: Path, what: str, exempt: Iterable[tuple[int, int]] = ()) -> None:
    found = differences(one, other, exempt)
    shown = ", ".join(f"[{d.offset}, {d.offset + d.length})" for d in found)
    assert not found, f"{what}: {one} and {other} differ first at {shown}"


def sectors_of(wrong: Bits) -> Bits:
    """Per byte -> per sector; the length is whole sectors."""
    sectors: Bits = np.any(wrong.reshape(-1, SECTOR_BYTES), axis=1)
    return sectors


def ranges_of(sectors: Bits) -> list[Difference]:
    """The runs of set sectors."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], sectors, [False])).astype(np.int8)))
    return [
        Difference(int(start) * SECTOR_BYTES, int(end - start) * SECTOR_BYTES)
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def _merged(found: list[Difference]) -> list[Difference]:
    merged: list[Difference] = []
    for piece in found:
        if merged and merged[-1].offset + merged[-1].length == piece.offset:
            merged[-1] = Difference(merged[-1].offset, merged[-1].length + piece.length)
        else:
            merged.append(piece)
    return merged
