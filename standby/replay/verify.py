"""Is this really the next segment? Nothing that fails here reaches a disk (invariant 6)."""

from __future__ import annotations

import uuid

from journal.chain import check_machine, judge
from journal.decoder import Segment, decode
from journal.errors import SegmentDamaged
from journal.position import Position
from journal.segment import Header
from standby.replay.ports import HistoryChanged


def verify_next(raw: bytes | bytearray | memoryview, machine: uuid.UUID, entry: Position, applied: Position) -> Segment:
    """The segment that the feed announced as ``entry``, fit to be applied on top of ``applied``.

    Raises ``SegmentDamaged``, ``ForeignSegment``, ``PositionGap``, ``PositionFork`` or ``HistoryChanged``.
    """
    segment = decode(raw)
    check_machine(segment.header, machine)
    if segment.header.position != entry:
        raise SegmentDamaged(
            f"Segment {segment.header.position.short} came where {entry.short} was announced.",
            remedy="Fetch it again; if it repeats, see the server's log: its disk may be failing.",
        )
    judge(segment.header, _base(segment.header, applied), lambda _seq: None)
    return segment


def verify_image(raw: bytes | bytearray | memoryview, machine: uuid.UUID, at: Position, disk: int) -> Segment:
    """An IMAGE answer for ``disk`` at position ``at``."""
    segment = decode(raw)
    check_machine(segment.header, machine)
    if segment.header.previous != at.digest or (segment.extents.disks != disk).any():
        raise SegmentDamaged(
            f"The server answered with another image than disk {disk} at {at.short}.",
            remedy="Fetch it again; if it repeats, see the server's log: its disk may be failing.",
        )
    return segment


def _base(header: Header, applied: Position) -> Position:
    """What ``header`` has to extend: ``applied``, or the genesis of its generation if that grew out of ``applied``."""
    base = applied
    # A generation may have ended without a segment; then the next one grew out of its genesis.
    for generation in range(applied.generation + 1, header.generation + 1):
        if header.previous == Position.genesis(header.machine, header.generation, base).digest:
            return Position.genesis(header.machine, header.generation, base)
        base = Position.genesis(header.machine, generation, base)
    if header.generation > applied.generation:
        raise HistoryChanged(
            f"Generation {header.generation} did not grow out of {applied.short}, which is applied here.",
            remedy="The standby seeds again by itself, fetching only what differs.",
            applied=str(applied),
        )
    return base
