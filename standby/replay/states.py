"""The states of the replay engine, and which may follow which; ``follow`` tells what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from journal.errors import CdpError
from journal.position import Position
from journal.wire import Progress

State = Literal["starting", "seeding", "catching-up", "following", "draining", "drained"]

TURNS: Final[dict[State, frozenset[State]]] = {
    "starting": frozenset({"starting", "seeding", "catching-up"}),
    "seeding": frozenset({"seeding", "catching-up"}),
    "catching-up": frozenset({"seeding", "following", "draining"}),
    "following": frozenset({"seeding", "draining"}),
    "draining": frozenset({"seeding", "drained", "catching-up", "following", "draining"}),
    "drained": frozenset({"seeding", "draining", "following"}),
}


@dataclass(frozen=True, slots=True)
class Status:
    """``sealed_at_ns`` is that of ``applied``, None before the first segment. ``backlog_bytes``: what the last feed
    answer held and is not applied yet. ``error``: of the last try, None once one succeeded."""

    state: State
    applied: Position | None
    consistent: bool
    sealed_at_ns: int | None
    backlog_bytes: int
    progress: Progress | None
    error: CdpError | None
