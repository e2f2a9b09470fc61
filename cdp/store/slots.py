"""The slots of a base image: what each 64 KiB chunk hashes to.

    before   u64   what the chunk hashed to before the last fold that changed it; 0: zeros
    after    u64   what it hashes to since
    check    u64   of the two and of the chunk's number, so that a slot that rotted or lies in the wrong place is seen
    zero     u64

A slot of nothing but zeros stands for a chunk that was never written. A slot never crosses a sector, so that a torn
write leaves the old one or the new one.

Stores of format 1 have ``N.sums`` instead, 16 bytes a chunk without a check: ``convert`` makes slots of them once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from cdp.store.files import Files, opened

SLOT_BYTES: Final = 32
SUFFIX: Final = ".slots"
_OLD_SUFFIX: Final = ".sums"
_OLD_BYTES: Final = 16
_CONVERT_SLOTS: Final = 1 << 16

U64 = npt.NDArray[np.uint64]
Bits = npt.NDArray[np.bool_]


def pack(slots: Mapping[int, tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """``{chunk: (before, after)}``, ascending -> the first chunk and the slots of each run of neighbours."""
    numbers = np.fromiter(slots, np.uint64, len(slots))
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    sums = np.array(list(slots.values()), np.uint64).reshape(-1, 2)
    for run, of_run in zip(np.split(numbers, cuts), np.split(sums, cuts), strict=True):
        if len(run):
            yield int(run[0]), _packed(int(run[0]), of_run)


def unpack(raw: bytes, first: int) -> tuple[U64, Bits]:
    """``(before, after)`` of the chunks from ``first`` on, and which slots are good."""
    rows = np.frombuffer(raw, np.uint64).reshape(-1, 4)
    sums = rows[:, :2]
    good = (rows[:, 2] == _check(first, sums)) & (rows[:, 3] == 0)
    return sums, good | ~rows.any(axis=1)


def convert(files: Files, directory: Path) -> None:
    """Replace every ``N.sums`` by ``N.slots``. A crash leaves the one or both; both mean that this had ended."""
    for old in sorted(directory.glob(f"*{_OLD_SUFFIX}")):
        new = old.with_suffix(SUFFIX)
        if not new.exists():
            _convert(files, old, new.with_suffix(".new"))
            files.replace(new.with_suffix(".new"), new)
        files.unlink(old)


def _convert(files: Files, old: Path, new: Path) -> None:
    count = old.stat().st_size // _OLD_BYTES
    files.create_sparse(new, count * SLOT_BYTES)
    with opened(files, old) as source, opened(files, new, write=True) as target:
        for first in range(0, count, _CONVERT_SLOTS):
            raw = files.read(source, _CONVERT_SLOTS * _OLD_BYTES, first * _OLD_BYTES)
            sums = np.frombuffer(raw, np.uint64).reshape(-1, 2)
            if sums.any():
                files.write(target, [_packed(first, sums)], first * SLOT_BYTES)
        files.sync(target)


def _packed(first: int, sums: U64) -> bytes:
    rows = np.zeros((len(sums), 4), np.uint64)
    rows[:, :2] = sums
    rows[:, 2] = np.where(sums.any(axis=1), _check(first, sums), 0)
    return rows.tobytes()


def _check(first: int, sums: U64) -> U64:
    """Each step is a bijection: a change of one word always changes the check."""
    numbers = np.arange(first + 1, first + 1 + len(sums), dtype=np.uint64)
    return _mixed(_mixed(_mixed(numbers) ^ sums[:, 0]) ^ sums[:, 1])


def _mixed(words: U64) -> U64:
    """The finaliser of splitmix64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
