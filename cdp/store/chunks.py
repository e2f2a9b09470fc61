"""Where chunks with a given digest may be found: what wire dedup asks before a first seed.

One file per machine, written anew from its newest recovery point now and then:

    ┌────────┐ 0
    │ head   │ magic, when it was built, entries
    ├────────┤ 64
    │ keys   │ u64 each, ascending: the first eight bytes of a chunk's blake3 digest
    │ places │ u64 each: disk << 40 | number of the chunk
    └────────┘

These are *hints*. Whoever uses one reads the content and compares all of it (``dedup.py``), so that a file that is old,
damaged or of a machine that is gone costs a miss and nothing else; it needs neither checksums nor syncs, and may be
deleted at any time. Zeros have no entry. Bounded: 16 bytes for each different 64 KiB, up to ``ENTRIES_MAX``.
"""

from __future__ import annotations

import mmap
import struct
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

MAGIC: Final = b"CDPCHNK\x01"
ENTRIES_MAX: Final = 4 << 20
"""256 GiB of different content of one machine: 64 MiB of file, and twice that in memory while it is being built."""
CANDIDATES_MAX: Final = 3
"""Machines that are tried for one chunk: hints go stale, but not all of them at once."""
_HEAD: Final = struct.Struct("<8sQQ40x")
_DISK_SHIFT: Final = 40
_SUFFIX: Final = ".chunks"

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Place:
    """One 64 KiB chunk of a machine's disk."""

    machine: uuid.UUID
    disk: int
    number: int


@dataclass(frozen=True, slots=True)
class _Hints:
    built_at_ns: int
    keys: U64
    places: U64


class ChunkIndex:
    """Thread-safe."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._lock = threading.Lock()
        self._hints: dict[uuid.UUID, _Hints] = {}
        for path in directory.iterdir():
            hints = _load(path) if path.suffix == _SUFFIX else None
            if hints is None:
                path.unlink()
            else:
                self._hints[uuid.UUID(path.stem)] = hints

    def __bool__(self) -> bool:
        """Is there any hint?"""
        with self._lock:
            return any(len(hints.keys) for hints in self._hints.values())

    def entries(self) -> int:
        with self._lock:
            return sum(len(hints.keys) for hints in self._hints.values())

    def built_at_ns(self, machine: uuid.UUID) -> int | None:
        """When the machine's file was written; None if it has none."""
        with self._lock:
            hints = self._hints.get(machine)
        return None if hints is None else hints.built_at_ns

    def machines(self) -> list[uuid.UUID]:
        with self._lock:
            return list(self._hints)

    def replace(self, machine: uuid.UUID, keys: U64, places: U64, now_ns: int) -> None:
        """The machine's chunks, in any order; of equal keys one is kept. Raises ``OSError``."""
        keys, first = np.unique(keys, return_index=True)
        path = self._path(machine)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(_HEAD.pack(MAGIC, now_ns, len(keys)))
            file.write(keys.tobytes())
            file.write(places[first].tobytes())
        temporary.replace(path)
        hints = _load(path)
        assert hints is not None
        with self._lock:
            self._hints[machine] = hints

    def drop(self, machine: uuid.UUID) -> None:
        with self._lock:
            self._hints.pop(machine, None)
        self._path(machine).unlink(missing_ok=True)

    def find(self, keys: U64) -> list[list[Place]]:
        """For each key where such a chunk may be, at most ``CANDIDATES_MAX`` places; the newest files first."""
        with self._lock:
            known = sorted(self._hints.items(), key=lambda item: -item[1].built_at_ns)
        found: list[list[Place]] = [[] for _ in range(len(keys))]
        for machine, hints in known:
            if not len(hints.keys):
                continue
            at = np.minimum(np.searchsorted(hints.keys, keys), len(hints.keys) - 1)
            hits = np.flatnonzero(hints.keys[at] == keys)
            for which, place in zip(hits.tolist(), hints.places[at[hits]].tolist(), strict=True):
                if len(found[which]) < CANDIDATES_MAX:
                    number = place & ((1 << _DISK_SHIFT) - 1)
                    found[which].append(Place(machine, place >> _DISK_SHIFT, number))
        return found

    def _path(self, machine: uuid.UUID) -> Path:
        return self._directory / f"{machine}{_SUFFIX}"


class Collected:
    """The chunks of one machine while its file is being made; what is beyond ``ENTRIES_MAX`` is left out."""

    def __init__(self) -> None:
        self._keys: list[U64] = []
        self._places: list[U64] = []
        self._count = 0

    @property
    def full(self) -> bool:
        return self._count >= ENTRIES_MAX

    def add(self, disk: int, first: int, digests: bytes) -> None:
        """32-byte digests of consecutive chunks, ``first`` the number of the first one; zeros are skipped."""
        keys = np.frombuffer(digests, np.uint64).reshape(-1, 4)
        some = np.flatnonzero(keys.any(axis=1))[: ENTRIES_MAX - self._count]
        self._keys.append(keys[some, 0].copy())
        self._places.append(some.astype(np.uint64) + np.uint64(disk << _DISK_SHIFT | first))
        self._count += len(some)

    def arrays(self) -> tuple[U64, U64]:
        return _joined(self._keys), _joined(self._places)


def _joined(parts: Iterable[U64]) -> U64:
    return np.concatenate([np.empty(0, np.uint64), *parts])


def _load(path: Path) -> _Hints | None:
    """None if the file is not one of ours, or not whole."""
    try:
        uuid.UUID(path.stem)
        with path.open("rb") as file:
            magic, built_at_ns, count = _HEAD.unpack(file.read(_HEAD.size).ljust(_HEAD.size, b"\0"))
            if magic != MAGIC or path.stat().st_size != _HEAD.size + 16 * count:
                return None
            # The mapping keeps the file's content, also when its name is replaced or removed.
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    body = np.frombuffer(raw, np.uint64, 2 * count, _HEAD.size)
    return _Hints(built_at_ns, body[:count], body[count:])
