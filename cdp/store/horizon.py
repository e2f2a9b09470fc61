"""How far may retention fold now? A walk over what is stored, and what holds it back; nothing is changed here.

oldest ──────────── expired ────────────┬──── to be kept ──── tip
points   *    *    *    *    *    *     │  *     *     *
               ▲         ▲
               held      furthest point of this step
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from cdp.store.base import CHUNK_BYTES
from cdp.store.records import Bookmark, Cursor, Entry
from cdp.store.state import MachineState
from journal.position import Position

STEP_SEGMENTS_MAX: Final = 3600
STEP_BYTES_MAX: Final = 256 << 20
"""One fold: bounds what a start after a crash has to do again, while nobody is served."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """Without this, more would have been folded. ``name``: the consumer's or the bookmark's, "" for a reader."""

    kind: Literal["consumer", "bookmark", "reader"]
    name: str
    position: str

    @property
    def at(self) -> Position:
        return Position.parse(self.position)


class Retained(msgspec.Struct, frozen=True, kw_only=True):
    """``more``: call again, there is more to fold."""

    folded_to: str | None
    segments: int
    freed_bytes: int
    held_by: Held | None
    more: bool


NOTHING: Final = Retained(folded_to=None, segments=0, freed_bytes=0, held_by=None, more=False)


@dataclass(frozen=True, slots=True)
class Step:
    """``points``: the recovery points that a fold may go to, the oldest first; none: nothing to do.
    ``growth_bytes_max``: what the base image grows by at most, if each extent touches chunks of its own."""

    points: list[Entry]
    growth_bytes_max: int
    held_by: Held | None
    more: bool


def walk(entries: Iterable[Entry], oldest_ns: int | None, excess_bytes: int) -> Step:
    """The recovery points among ``entries`` (from the oldest one on) that retention wants to fold to in one step: those
    sealed up to ``oldest_ns``, and as many as make up ``excess_bytes`` of records."""
    points: list[Entry] = []
    walked_bytes = growth = 0
    for number, entry in enumerate(entries):
        expired = oldest_ns is not None and entry.header.sealed_at_ns <= oldest_ns
        if not expired and walked_bytes >= excess_bytes:
            break
        if points and (number >= STEP_SEGMENTS_MAX or walked_bytes >= STEP_BYTES_MAX):
            return Step(points, growth, None, more=True)
        walked_bytes += entry.record_bytes
        growth += entry.header.payload_bytes + 2 * CHUNK_BYTES * entry.header.extent_count
        if entry.header.is_recovery_point:
            points.append(entry)
    return Step(points, growth, None, more=False)


def held_back(step: Step, state: MachineState, holds: list[Held]) -> Step:
    """``step`` without the points past one of ``holds``."""
    points = list(step.points)
    held_by: Held | None = None
    while points:
        target = points[-1].header.position
        blocking = next((hold for hold in holds if not leads_to(state, target, hold.at)), None)
        if blocking is None:
            break
        held_by = blocking
        points.pop()
    return Step(points, step.growth_bytes_max, held_by, step.more and held_by is None)


def holds_of(cursors: Iterable[Cursor], bookmarks: Iterable[Bookmark]) -> list[Held]:
    """Cursors first: a standby that is behind matters more than a bookmark."""
    return [
        *(Held(kind="consumer", name=row.consumer, position=row.position) for row in cursors),
        *(
            Held(kind="bookmark", name=row.name, position=row.position)
            for row in bookmarks
            if row.hold and row.expired_at_ns is None
        ),
    ]


def leads_to(state: MachineState, target: Position, position: Position) -> bool:
    """Is the image at ``position`` still there once the base image has gone to ``target``?"""
    lineage = state.lineage(position)
    return lineage[0].generation > state.root(target) or any(target in span for span in lineage)
