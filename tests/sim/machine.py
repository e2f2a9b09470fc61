"""The protected machine as the model knows it: its disks, every write in order, and the image at each sealed position.

``log`` stands for the raw spool: what was captured, in submission order; it survives the agent. A *lost* write changed
the disk and was not captured.
"""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from journal.encoder import Encoder
from journal.extent import SECTOR_BYTES, Extents, Kind
from journal.position import Position
from journal.segment import Flags, Header
from tests.sim.faults import Clock, Dice

Bits = list[npt.NDArray[np.bool_]]
Images = tuple[bytes, ...]
_NOBODY: Final = -1
_COPY: Final = -2


@dataclass(frozen=True, slots=True)
class Write:
    disk: int
    offset: int
    data: bytes
    kind: Kind
    lost: bool

    @property
    def sectors(self) -> slice:
        return slice(self.offset // SECTOR_BYTES, (self.offset + len(self.data)) // SECTOR_BYTES)


@dataclass(frozen=True, slots=True)
class Sealed:
    header: Header
    raw: bytes
    previous: Position
    rows: list[tuple[int, int, int, int]]


class Machine:
    """``images`` and ``sealed`` know every position that was ever encoded; ``committed`` are those in the spool."""

    def __init__(self, dice: Dice, clock: Clock, sizes: list[int]) -> None:
        self._dice = dice
        self._clock = clock
        self.sizes = sizes
        self.disks = [bytearray(size) for size in sizes]
        self.log: list[Write] = []
        self.images: dict[Position, Images] = {}
        self.sealed: dict[Position, Sealed] = {}
        self.committed: set[Position] = set()
        self._encoder: Encoder | None = None
        for _ in range(dice.random.randrange(4)):
            self.write()

    def enrol(self, machine: uuid.UUID, genesis: Position) -> None:
        self._encoder = Encoder(machine)
        self.begin_generation(genesis, None)

    def begin_generation(self, genesis: Position, parent: Position | None) -> None:
        self.images[genesis] = tuple(bytes(size) for size in self.sizes) if parent is None else self.images[parent]
        self.committed.add(genesis)

    def write(self) -> None:
        rng = self._dice.random
        disk = rng.randrange(len(self.sizes))
        sectors = self.sizes[disk] // SECTOR_BYTES
        start = rng.randrange(sectors)
        length = SECTOR_BYTES * min(rng.choice((1, 1, 2, 8, 8, 16, 64)), sectors - start)
        kind = rng.choice((Kind.DATA, Kind.DATA, Kind.DATA, Kind.DATA, Kind.ZERO, Kind.DISCARD))
        data = bytes(length) if kind != Kind.DATA else rng.randbytes(length // 4) * 4
        write = Write(disk, start * SECTOR_BYTES, data, kind, self._dice.happens("writes-lost"))
        self.disks[disk][write.offset : write.offset + length] = data
        self.log.append(write)

    def roll_back(self, position: Position) -> None:
        """It is the other side that goes on: from what had been replicated, not from what this side wrote since."""
        self.disks = [bytearray(image) for image in self.images[position]]

    def nothing(self) -> Bits:
        return [np.zeros(size // SECTOR_BYTES, np.bool_) for size in self.sizes]

    def differing(self, position: Position) -> Bits:
        """Sectors of the disks that are not as in the image at ``position``: what a comparison by hash finds."""
        return [
            (_sectors(have) != _sectors(want)).any(axis=1)
            for have, want in zip(self.disks, self.images[position], strict=True)
        ]

    def touched(self, start: int, end: int, *, lost_only: bool) -> Bits:
        bits = self.nothing()
        for write in self.log[start:end]:
            if write.lost or not lost_only:
                bits[write.disk][write.sectors] = True
        return bits

    def seal(
        self, previous: Position, start: int, end: int, copy: Bits | None, flags: Flags
    ) -> tuple[Header, bytearray]:
        """The writes ``[start, end)``, the last one winning, and what is copied from the disks as they are."""
        assert self._encoder is not None
        rows: list[tuple[int, int, int, int]] = []
        payload: list[bytes] = []
        for disk, owners in enumerate(self._owners(start, end, copy)):
            edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
            for low, high in itertools.pairwise(edges):
                owner = int(owners[low])
                if owner == _NOBODY:
                    continue
                offset, length = low * SECTOR_BYTES, (high - low) * SECTOR_BYTES
                if owner == _COPY:
                    kind, data = Kind.DATA, bytes(self.disks[disk][offset : offset + length])
                else:
                    write = self.log[owner]
                    kind, data = write.kind, write.data[offset - write.offset : offset - write.offset + length]
                rows.append((disk, offset, length, kind))
                if kind == Kind.DATA:
                    payload.append(data)
        now_ns = self._clock.time_ns()
        header, raw = self._encoder.encode(
            previous,
            Extents.from_rows(rows),
            payload,
            opened_at_ns=now_ns - 10**9,
            sealed_at_ns=now_ns,
            sealed_monotonic_ns=int(self._clock.monotonic() * 1e9),
            flags=flags,
        )
        self._remember(header, bytes(raw), previous, rows, payload)
        if header.is_recovery_point:
            assert self.images[header.position] == tuple(map(bytes, self.disks)), "the model's source is wrong"
        return header, raw

    def path(self, start: Position, end: Position) -> list[Sealed] | None:
        """What leads from ``start`` to ``end`` within a generation; None if nothing does."""
        found: list[Sealed] = []
        while end != start:
            sealed = self.sealed.get(end)
            if sealed is None:
                return None
            found.append(sealed)
            end = sealed.previous
        return found[::-1]

    def _owners(self, start: int, end: int, copy: Bits | None) -> list[npt.NDArray[np.int64]]:
        owners = [np.full(size // SECTOR_BYTES, _NOBODY, np.int64) for size in self.sizes]
        for number in range(start, end):
            write = self.log[number]
            if not write.lost:
                owners[write.disk][write.sectors] = number
        if copy is not None:  # read after the last of the writes, so it is newer than all of them
            for owner, bits in zip(owners, copy, strict=True):
                owner[bits] = _COPY
        return owners

    def _remember(
        self,
        header: Header,
        raw: bytes,
        previous: Position,
        rows: list[tuple[int, int, int, int]],
        payload: list[bytes],
    ) -> None:
        images = list(self.images[previous])
        changed = {disk: bytearray(images[disk]) for disk in {row[0] for row in rows}}
        data = iter(payload)
        for disk, offset, length, kind in rows:
            changed[disk][offset : offset + length] = next(data) if kind == Kind.DATA else bytes(length)
        for disk, image in changed.items():
            images[disk] = bytes(image)
        self.images[header.position] = tuple(images)
        self.sealed[header.position] = Sealed(header, raw, previous, rows)


def _sectors(data: bytes | bytearray) -> npt.NDArray[np.uint64]:
    return np.frombuffer(bytes(data), np.uint64).reshape(-1, SECTOR_BYTES // 8)
