"""What a damage costs: the recovery points that need the lost bytes, and the ranges that the newest image still needs.

    damaged segment 8123 wrote A and B          8123 ......... 8190 ............. tip
    A was overwritten by 8150, B by 8190          └─ lost ──────┘ every point from here on is whole again

A point needs a damaged segment if the point-in-time index leads to one of its damaged frames; it needs a damaged chunk
of the base image if nothing in the journal lies over all of it. Both only ever end, so the end is found by halving.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from cdp.store.errors import StoredDamage
from cdp.store.files import opened
from cdp.store.image import ImageReader
from cdp.store.record import read_extents, read_layout
from cdp.store.records import Entry
from cdp.store.resolve import BASE
from cdp.store.store import Store
from journal.errors import CdpError
from journal.extent import Extents, Kind
from journal.position import DIGEST_BYTES, Position
from journal.segment import FRAME_BYTES

DamageKind = Literal["segment", "chain", "base", "index", "run"]
Range = tuple[int, int, int]
"""Disk, offset, length."""
NO_DIGEST: Final = b"\xff" * DIGEST_BYTES
LOST_MAX: Final = 10_000
"""Ranges kept of one damage; more are told as the whole machine."""


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """``position``: of a damaged segment. Recovery points in ``[first_ns, until_ns)`` are not whole: what they need is
    refused; None: from the oldest one on, and to the newest. Both 0: no point needs it. ``lost``: what the newest image
    needs of it, to be sent again; None: unknown, everything."""

    kind: DamageKind
    sentence: str
    position: str | None = None
    first_ns: int | None = None
    until_ns: int | None = None
    lost: list[Range] | None = None

    @property
    def costs(self) -> bool:
        """Is there a recovery point that needs it?"""
        return self.until_ns is None or self.until_ns > (self.first_ns or 0)


@dataclass(frozen=True, slots=True)
class _Lost:
    """Bytes on a disk whose content came from the damaged thing."""

    ranges: list[Range]
    needs: Callable[[Position, Range], list[Range]]


def of_segment(store: Store, machine: uuid.UUID, entry: Entry, error: Exception) -> Damage:
    damage = Damage(
        kind="segment",
        sentence=error.sentence if isinstance(error, CdpError) else str(error),
        position=str(entry.header.position),
        first_ns=entry.header.sealed_at_ns,
    )
    return _told(store, machine, _lost_of_segment(store, machine, entry), damage)


def of_chunk(store: Store, machine: uuid.UUID, root: int, error: StoredDamage) -> Damage:
    """A damaged chunk of the base image of the lineage that began with generation ``root``."""
    chunk = (error.fields["disk"], error.fields["offset"], error.fields["length"])

    def needs(at: Position, part: Range) -> list[Range]:
        if store.state(machine).root(at) != root:
            return []
        return [row for row, kind, *_ in _rows(store, machine, at, part) if kind == BASE]

    damage = Damage(kind="base", sentence=error.sentence)
    disk = store.machine(machine).disk(chunk[0])
    if disk is None or error.fields["hole"]:
        return msgspec.structs.replace(damage, first_ns=0, until_ns=0, lost=[])
    part = (chunk[0], chunk[1], max(0, min(chunk[2], disk.size_bytes - chunk[1])))
    return _told(store, machine, _Lost([part], needs), damage)


def _lost_of_segment(store: Store, machine: uuid.UUID, entry: Entry) -> _Lost:
    header = entry.header
    try:
        extents = read_extents(store.files, store.pool.path(entry.file), entry)
    except (StoredDamage, OSError):
        # Where it wrote, only the runs may still tell.
        ranges = [(disk.index, 0, disk.size_bytes) for disk in store.machine(machine).disks]
    else:
        ranges = _in_frames(extents, _bad_frames(store, entry))

    def needs(at: Position, part: Range) -> list[Range]:
        return [
            row
            for row, kind, generation, seq in _rows(store, machine, at, part)
            if kind == Kind.DATA and (generation, seq) == (header.generation, header.seq)
        ]

    return _Lost(ranges, needs)


def hashes_with_damage(image: ImageReader, part: Range, chunk: int) -> bytes:
    """As ``ImageReader.hashes``; a chunk that cannot be read has a digest that nothing has, so that whoever compares
    sends it again, or asks for it."""
    disk, offset, length = part
    try:
        return image.hashes(disk, offset, length, chunk)
    except StoredDamage:
        if length <= chunk:
            return NO_DIGEST
    # Halves, so that one damaged chunk among many costs few questions.
    middle = max(1, length // chunk // 2) * chunk
    first = hashes_with_damage(image, (disk, offset, middle), chunk)
    return first + hashes_with_damage(image, (disk, offset + middle, length - middle), chunk)


def _in_frames(extents: Extents, bad: set[int] | None) -> list[Range]:
    """The parts of the extents whose payload lies in ``bad`` frames; None: in any."""
    ranges: list[Range] = []
    columns = (extents.disks, extents.offsets, extents.lengths, extents.kinds, extents.payload_offsets())
    for disk, offset, length, kind, payload in zip(*(column.tolist() for column in columns), strict=True):
        if kind != Kind.DATA:
            continue
        if bad is None:
            ranges.append((disk, offset, length))
            continue
        for frame in range(payload // FRAME_BYTES, -(-(payload + length) // FRAME_BYTES)):
            if frame in bad:
                start = max(payload, frame * FRAME_BYTES)
                stop = min(payload + length, (frame + 1) * FRAME_BYTES)
                ranges.append((disk, offset + start - payload, stop - start))
    return ranges


def _bad_frames(store: Store, entry: Entry) -> set[int] | None:
    """None: any of them may be."""
    if store.pool.row(entry.file) is None:
        return None
    path = store.pool.path(entry.file)
    try:
        layout = read_layout(store.files, path, entry)
    except StoredDamage:
        return None
    bad = set()
    with opened(store.files, path) as handle:
        for frame, (start, stop) in enumerate(zip(layout.starts, layout.starts[1:], strict=False)):
            try:
                layout.check_frame(frame, store.files.read(handle, stop - start, start))
            except StoredDamage:
                bad.add(frame)
    return bad


def _rows(store: Store, machine: uuid.UUID, at: Position, part: Range) -> list[tuple[Range, int, int, int]]:
    """The pieces of ``part`` at a position: range, kind, generation, seq."""
    state = store.state(machine)
    with state.lock:
        spans = state.unfolded(state.lineage(at))
    versions = store.versions(machine)
    versions.catch_up(spans)
    disk, offset, length = part
    rows = []
    for pieces in versions.pieces(spans, disk, offset, length):
        for start, size, kind, generation, seq, _ in pieces.rows():
            rows.append(((disk, start, size), kind, generation, seq))
    return rows


def _told(store: Store, machine: uuid.UUID, found: _Lost, damage: Damage) -> Damage:
    """``damage`` with what it costs."""
    try:
        tip = store.live(machine)
        lost = [row for part in found.ranges for row in found.needs(tip, part)]
        points = store.recovery_points(machine, damage.first_ns or 0, 2**63).points
        if damage.position is not None:
            points = [point for point in points if Position.parse(point.position) >= Position.parse(damage.position)]

        def needed(number: int) -> bool:
            at = Position.parse(points[number].position)
            return any(found.needs(at, part) for part in found.ranges)

        low, high = 0, len(points)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if needed(middle) else (low, middle)
    except StoredDamage:
        # Another segment is so damaged that nothing can be looked up behind it.
        return damage
    if low == 0 and not lost:
        return msgspec.structs.replace(damage, first_ns=0, until_ns=0, lost=[])
    until_ns = points[low].sealed_at_ns if low < len(points) else None
    return msgspec.structs.replace(damage, until_ns=until_ns, lost=lost if len(lost) <= LOST_MAX else None)
