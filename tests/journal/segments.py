"""Segments for tests: random but well-formed, from a seeded generator."""

from __future__ import annotations

import random
import uuid

from journal.encoder import Encoder
from journal.extent import SECTOR_BYTES, Extents, Kind
from journal.position import Position
from journal.segment import Flags, Header

MACHINE = uuid.UUID("6d616368-696e-4000-8000-000000000001")


def random_writes(rng: random.Random, disk_bytes: int, disks: int, count: int) -> tuple[Extents, bytes]:
    """Up to ``count`` sorted, disjoint extents over ``disks`` disks of ``disk_bytes`` bytes, and their payload."""
    rows: list[tuple[int, int, int, int]] = []
    payload = bytearray()
    sectors = disk_bytes // SECTOR_BYTES
    for disk in range(disks):
        at = 0
        for _ in range(count // disks):
            start = at + rng.choice((0, 0, 1, 7, 64))
            length = rng.choice((1, 1, 8, 8, 33, 128, 300))
            if start + length > sectors:
                break
            kind = rng.choice((Kind.DATA, Kind.DATA, Kind.DATA, Kind.ZERO, Kind.DISCARD))
            rows.append((disk, start * SECTOR_BYTES, length * SECTOR_BYTES, kind))
            if kind == Kind.DATA:
                size = length * SECTOR_BYTES
                # Half random, half repeating: both frame forms (compressed, raw) occur.
                payload += rng.randbytes(size) if rng.random() < 0.5 else bytes([rng.randrange(256)]) * size
            at = start + length
    return Extents.from_rows(rows), bytes(payload)


def encode_next(
    previous: Position,
    extents: Extents,
    payload: bytes = b"",
    *,
    machine: uuid.UUID = MACHINE,
    flags: Flags = Flags.NONE,
    second: int = 0,
) -> tuple[Header, bytearray]:
    """The segment after ``previous``, sealed at ``second`` seconds after the epoch."""
    return Encoder(machine).encode(
        previous,
        extents,
        [payload],
        opened_at_ns=max(second - 1, 0) * 10**9,
        sealed_at_ns=second * 10**9,
        sealed_monotonic_ns=second * 10**9,
        flags=flags,
    )
