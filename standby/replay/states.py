"""The states of the replay engine, and which may follow which; ``follow`` tells what they mean."""

from __future__ import annotations

from typing import Final, Literal

State = Literal["starting", "seeding", "catching-up", "following", "draining", "drained"]

TURNS: Final[dict[State, frozenset[State]]] = {
    "starting": frozenset({"starting", "seeding", "catching-up"}),
    "seeding": frozenset({"seeding", "catching-up"}),
    "catching-up": frozenset({"seeding", "following", "draining"}),
    "following": frozenset({"seeding", "draining"}),
    "draining": frozenset({"seeding", "drained", "catching-up", "following", "draining"}),
    "drained": frozenset({"seeding", "draining", "following"}),
}
